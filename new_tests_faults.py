"""Kills, and a soak on a bad wire: see fuzz/kills.py and fuzz/soak.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from test_pypi_ae import (
    BYTES,
    FILE,
    FORM_HEADERS,
    MODULE,
    STEPS,
    WHEEL,
    Client,
    Patch,
    Start,
    _alone,
    add_user,
    basic,
    emulator,
    make_app,
    make_wheel,
    start,
)

__all__ = ["_alone", "emulator", "start"]


@pytest.fixture
def scripts(monkeypatch: Patch) -> None:
    """Lets a test import the scripts in fuzz/."""
    monkeypatch.syspath_prepend(MODULE.parent / "fuzz")


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("kind", ["wsgiref", "gunicorn"])
def test_killed_at_random_it_keeps_its_promise(
    tmp_path: Path, emulator: str, kind: str
) -> None:
    """10 times a directory, 10 times a bucket; `fuzz/kills.py 200` is the long run."""
    from kills import kill_often

    place = "" if kind == "wsgiref" else emulator
    print(kill_often(kind, tmp_path / kind, 10, 1, place))


@pytest.mark.usefixtures("scripts")
def test_two_instances_on_a_bad_wire_agree_with_a_model(tmp_path: Path) -> None:
    """300 operations; `fuzz/soak.py 5000` is the long run, and measures memory."""
    from soak import soak

    counts = soak(tmp_path, 300, 1, 1)[1]
    assert counts["200"] > counts["503"]
    assert counts["faults"] > 100


def do_and_die(root: Path, act: Callable[[Client], object], steps: int) -> bool:
    """Do it in a child that is killed at its so many-th step; did it get that far?"""
    child = os.fork()
    if not child:
        left = [steps]

        def step(event: str, _: object) -> None:
            left[0] -= event in STEPS
            if event in STEPS and left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        client = Client(make_app(root, overwrite=True))
        sys.addaudithook(step)
        try:
            act(client)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


NEW = make_wheel(code=b"new")
CUT_OFF: dict[str, Callable[[Client], object]] = {
    "removal": lambda client: client.remove("1.0"),
    "replacement": lambda client: client.upload(WHEEL, NEW),
    "first upload": lambda client: client.upload(WHEEL, NEW),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("case", CUT_OFF)
def test_crash_leaves_no_project_and_no_yank_behind(tmp_path: Path, case: str) -> None:
    """Each step is once the last: no project without files, no yank of other bytes.

    A yank is a file of its own. What was cut off may have taken it away, but must not
    leave it to other bytes.
    """
    for steps in range(100):
        root = tmp_path / str(steps)
        client = Client(make_app(root, overwrite=True))
        if case != "first upload":
            client.upload(WHEEL, BYTES)
            client.drop(f"acme/{WHEEL}.yanked", b"bad")
        died = do_and_die(root, CUT_OFF[case], steps)
        client = Client(make_app(root, overwrite=True))  # started again
        yanked = {n: file["yanked"] for n, file in client.page()["files"].items()}
        listed = client.get("/simple/").text.count("<a ")
        assert listed == len(yanked), f"step {steps}: /simple/ lists a project"
        if yanked and client.get(FILE).body != BYTES:
            assert yanked == {WHEEL: False}
        assert client.upload(WHEEL, NEW).status == 200
        assert client.page()["files"][WHEEL]["yanked"] is False
        if not died:
            return
    raise AssertionError("it takes more than 100 steps")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in Linux's /proc")
def test_memory_of_password_checks_is_not_kept_by_each_thread(start: Start) -> None:
    """A check takes 16 MiB, which glibc would keep for each thread that made one."""
    server = start("server")
    logins = [f"user{number}:secret{number}" for number in range(16)]
    for login in logins:
        add_user(server.home, *login.split(":"))

    def send(login: str) -> int:
        headers = FORM_HEADERS | {"Authorization": basic(login)}
        return server.ask("POST", "/", data=b"--b0--\r\n", headers=headers).status_code

    for _ in range(8):
        assert server.ask("POST", "/", data=b"", headers={}).status_code == 401
    before = server.memory("VmRSS")
    for _ in range(3):  # 2 workers with 4 threads; most check a password
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(send, logins)) == {400}
    assert server.memory("VmRSS") - before < 64
