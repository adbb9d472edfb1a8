"""New tests: what is served while the bucket is slow or gone."""

import itertools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

import pypi_ae
import test_pypi_ae
from gcs_rest import Refused
from test_pypi_ae import (
    FILE,
    FOLDER,
    ROOT,
    SDIST,
    TROUBLE,
    WHEEL,
    WHEEL2,
    Act,
    Answer,
    Client,
    Cloud,
    Go,
    Log,
    Patch,
    Reply,
    _alone,
    emulator,
    facts,
    make_wheel,
    played,
    refuse,
    running,
    shows,
    unreachable,
    url,
    wait_until,
)

__all__ = ["_alone", "emulator", "played"]  # fixtures
START = pypi_ae.look_at_start  # the fixture `played` takes it away

# ---- Stores: when the bucket is slow or gone -----------------------------------------
# Seconds pass by a clock that the tests move. A bucket that hangs does so until a test
# lets it fail.

FALLBACK = "https://fallback.example/simple"
KNOWN = ("/simple/acme/", "/simple/", FILE, f"{FILE}.metadata", "/pypi/acme/json")
# A project, a file, a version, and the bytes of a file that is listed.
UNKNOWN = ("/simple/no/", url(WHEEL2), "/pypi/acme/9.0/json", url(SDIST))
BY_ITSELF = ("/health", "/", "/acme/")


@pytest.fixture
def clock(monkeypatch: Patch) -> Callable[[float], None]:
    """Moves the clock forward."""
    ahead, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def move(seconds: float) -> None:
        ahead[0] += seconds

    return move


@pytest.fixture
def hang() -> Iterator[Any]:
    """An act that hangs until `.release` is set, and then loses the connection."""
    release = threading.Event()

    def act(go: Go) -> Reply:
        assert release.wait(120)
        raise requests.ConnectionError("Read timed out")

    act.release = release  # type: ignore[attr-defined]
    yield act
    release.set()


def known_to(cloud: Cloud, **settings: Any) -> Client:
    """An instance that knows all of KNOWN, and what it knows is old."""
    cloud.put(f"acme/{SDIST}", b"x" * 9, **facts(b"x" * 9))
    client = cloud.with_wheel(sync_seconds=0.01, **settings)
    for path in KNOWN:
        assert client.get(path).status == 200
    time.sleep(0.7)  # 60 times SYNC_SECONDS: the root is old, too
    return client


def is_stale(answer: Answer) -> bool:
    """Is it an answer that says since when it is true?"""
    assert answer.status == 200
    warning = answer.headers.get("warning")
    assert warning in (None, '110 - "Response is Stale"')
    assert (warning is None) == ("age" not in answer.headers)
    return warning is not None


def all_at_once(
    client: Client, paths: list[str]
) -> tuple[ThreadPoolExecutor, list[Future[Answer]]]:
    pool = ThreadPoolExecutor(len(paths))
    return pool, [pool.submit(client.get, path) for path in paths]


def messages(log: Log) -> list[str]:
    """What was logged of the bucket, and not of a request or a start."""
    lines = [record.getMessage() for record in log.records]
    return [line for line in lines if " by " not in line and "serves" not in line]


def count_calls(cloud: Cloud) -> int:
    return len(cloud.wire.calls)


@pytest.mark.parametrize("trouble", [*TROUBLE, "hangs"])
def test_what_is_known_is_served_for_stale_seconds(
    played: Cloud, clock: Any, hang: Any, caplog: Log, trouble: str
) -> None:
    client = known_to(played, fallback_url=FALLBACK, stale_seconds=610)
    before = count_calls(played)
    played.wire.on("", TROUBLE.get(trouble, hang))
    for seconds in (0, 0.5, 2, 30, 300, 260):  # ten minutes
        clock(seconds)
        pages = [client.get(path) for path in KNOWN]
        assert [is_stale(page) for page in pages] == [True] * len(KNOWN)
        if seconds:
            for path in UNKNOWN:
                answer = client.get(path)
                assert (answer.status, "retry-after" in answer.headers) == (503, True)
        else:
            hang.release.set()
    assert 590 < int(pages[0].headers["age"]) < 610
    for path in BY_ITSELF:
        assert client.get(path).status in (200, 302)
    assert count_calls(played) - before < 200
    clock(30)
    assert client.get(KNOWN[0]).status == 503
    played.wire.heal()
    clock(31)
    assert wait_until(lambda: client.get("/simple/").status == 200)
    assert not is_stale(client.get(KNOWN[0]))
    assert client.get(UNKNOWN[0]).headers["location"] == f"{FALLBACK}/no/"
    [gone, back] = messages(caplog)  # one line when it goes, one when it is back
    assert "Only what is known is served" in gone
    assert back == "The bucket answers again."


def test_stale_seconds_0_serves_nothing_old(played: Cloud) -> None:
    client = known_to(played, stale_seconds=0)
    played.wire.on("list", refuse(503))
    assert {client.get(path).status for path in KNOWN} == {503}


@pytest.mark.parametrize("known", [True, False])
def test_100_requests_at_once_cost_one_timeout(
    played: Cloud, hang: Any, known: bool
) -> None:
    """Of those who have nothing to serve, some wait, and share the outcome."""
    client = known_to(played) if known else played.with_wheel()
    played.wire.on("list", hang)
    with played.calls() as sent:
        pool, futures = all_at_once(client, ["/simple/acme/"] * 100)
        waiting = 0 if known else pypi_ae.SLOTS
        assert wait_until(lambda: sum(f.done() for f in futures) == 100 - waiting)
        for path in BY_ITSELF:
            assert client.get(path).status in (200, 302)
        hang.release.set()
        pool.shutdown()
    answers = [future.result() for future in futures]
    if known:
        assert all(map(is_stale, answers))
    else:
        assert {answer.status for answer in answers} == {503}
    tries = [
        call for call, last in zip(sent, ["", *sent], strict=False) if call != last
    ]
    assert (
        len(tries) <= 2
    )  # a root, and a folder; each was sent again until its deadline


def test_threads_for_the_bucket_are_bounded(played: Cloud, hang: Any) -> None:
    """Also if each request is for another project, or another file."""
    for number in range(40):
        name = f"p{number}/p{number}-1.0.tar.gz"
        played.put(name, b"x", **facts(b"x"))
    client = played.instance(sync_seconds=0.01)
    for number in range(20):
        assert client.get(f"/simple/p{number}/").status == 200
    time.sleep(0.05)
    played.wire.on("", hang)
    mark = count_calls(played)
    paths = [f"/simple/p{number}/" for number in range(40)] * 2
    pool, futures = all_at_once(client, paths)
    left = pypi_ae.SLOTS
    assert wait_until(lambda: sum(f.done() for f in futures) >= len(paths) - left)
    assert client.get("/health").status == 200
    assert (
        count_calls(played) - mark <= 2 * pypi_ae.SLOTS
    )  # in the pool, and for those who wait
    hang.release.set()
    pool.shutdown()
    for path, future in zip(paths, futures, strict=True):
        known = int(path[9:-1]) < 20
        assert future.result().status == (200 if known else 503)


@pytest.mark.parametrize("call", ["insert", "delete", "read"])
def test_other_calls_are_bounded_too(played: Cloud, hang: Any, call: str) -> None:
    client = played.with_wheel()
    shows(WHEEL)(client)
    played.wire.on(call, hang)
    act: Callable[[], Answer] = {
        "insert": lambda: client.upload(WHEEL2, make_wheel(version="2.0")),
        "delete": lambda: client.remove("1.0"),
        "read": lambda: client.get(FILE),
    }[call]
    with ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(act) for _ in range(20)]
        many = 20 - pypi_ae.SLOTS
        assert wait_until(lambda: sum(f.done() for f in futures) >= many)
        assert client.get("/health").status == 200
        hang.release.set()
    assert {future.result().status for future in futures} == {503}
    played.wire.heal()
    assert act().status == 200


def test_pauses_double_and_a_success_ends_them(played: Cloud, clock: Any) -> None:
    client = played.instance()
    played.wire.on("list", refuse(403))
    tries, seconds = list[float](), 0.0
    with played.calls() as sent:
        assert {client.get("/simple/").status for _ in range(3)} == {503}
    assert sent == [ROOT]
    clock(31)
    while seconds < 120:
        before = count_calls(played)
        assert client.get("/simple/").status == 503
        tries += [seconds] * (count_calls(played) - before)
        clock(0.5)
        seconds += 0.5
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    wanted = [2, 4, 8, 16, 30, 30]
    assert all(abs(a - b) <= 1 for a, b in zip(gaps, wanted, strict=True)), gaps
    played.wire.heal()
    clock(31)
    played.put(f"acme/{WHEEL}", b"x")
    assert client.get("/simple/").status == 200
    played.wire.on("list", refuse(403))
    assert client.get("/simple/no/").status in (404, 503)
    clock(1.5)  # the first pause is short again
    played.wire.heal()
    assert client.get("/simple/no/").status == 404


def test_a_slow_bucket_is_waited_for_with_patience(
    played: Cloud, monkeypatch: Patch
) -> None:
    """The page is served as it was, and then as it is. A change made here shows."""
    client = known_to(played)
    monkeypatch.setattr(pypi_ae, "PATIENCE", 0.05)
    gate = threading.Event()

    def slow(go: Go) -> Reply:
        assert gate.wait(60)
        return go()

    played.put(f"acme/{WHEEL2}", make_wheel(version="2.0"))
    played.wire.on(FOLDER, slow)
    answer = client.get("/simple/acme/")
    assert is_stale(answer)
    assert WHEEL2 not in answer.text
    gate.set()
    assert wait_until(lambda: WHEEL2 in client.get("/simple/acme/").text)
    assert wait_until(lambda: not is_stale(client.get("/simple/acme/")))
    played.wire.heal()
    assert client.remove("2.0").status == 200
    played.wire.on(FOLDER, test_pypi_ae.slowly)  # twice as slow as we are patient
    answer = client.get("/simple/acme/")
    assert not is_stale(answer)
    assert WHEEL2 not in answer.text


def test_a_listing_that_hangs_holds_up_no_other(played: Cloud, hang: Any) -> None:
    played.put("other/other-1.0.tar.gz", b"x", **facts(b"x"))
    client = known_to(played)
    other = client.get("/simple/other/")
    time.sleep(0.05)
    played.wire.on(FOLDER, hang)
    with ThreadPoolExecutor(30) as pool:
        assert all(map(is_stale, pool.map(client.get, ["/simple/acme/"] * 30)))
    played.put("other/other-2.0.tar.gz", b"x", **facts(b"x"))
    assert wait_until(lambda: client.get("/simple/other/").body != other.body)
    assert is_stale(client.get("/simple/acme/"))


def test_after_an_idle_outage_the_first_page_is_current(
    played: Cloud, clock: Any
) -> None:
    client = known_to(played)
    played.wire.on("list", refuse(503))
    assert is_stale(client.get("/simple/acme/"))
    played.wire.heal()
    played.put(f"acme/{WHEEL2}", make_wheel(version="2.0"))
    clock(600)
    answer = client.get("/simple/acme/")
    assert not is_stale(answer)
    assert WHEEL2 in answer.text


STARTS: dict[str, tuple[Act, str]] = {
    "forbidden": (refuse(403), "grant roles/storage.objectUser on the bucket to"),
    "no bucket": (refuse(404), "check the names of the bucket"),
    "away": (unreachable, "try again"),
}


@pytest.mark.parametrize("case", [*STARTS, "no credentials", "hangs"])
def test_start_says_that_the_bucket_cannot_be_read(
    played: Cloud, monkeypatch: Patch, caplog: Log, hang: Any, case: str
) -> None:
    def no_token(go: Go) -> Reply:
        raise Refused("no access token: none found; use gcloud auth login")

    cases = STARTS | {"no credentials": (no_token, "gcloud"), "hangs": (hang, "b/pack")}
    act, says = cases[case]
    monkeypatch.setattr(pypi_ae, "look_at_start", START)
    forks = list[Callable[[], object]]()
    monkeypatch.setattr("os.register_at_fork", lambda *, before: forks.append(before))
    played.wire.on("list", act)
    client = played.instance()  # it does not wait
    assert client.get("/health").status == 200
    if case == "hangs":
        assert says not in caplog.text
        hang.release.set()
    [wait_for_the_look] = forks
    wait_for_the_look()
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert says in errors[0]
    assert played.wire.calls[0] == ROOT


def test_gunicorn_answers_while_the_bucket_hangs(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """One worker with 16 threads, before a listener that never answers."""
    kind, options = "gunicorn", test_pypi_ae.SERVERS["gunicorn"]
    options = tuple(
        o.replace("2", "1", o == "2").replace("4", "16", o == "4") for o in options
    )
    monkeypatch.setitem(test_pypi_ae.SERVERS, kind, options)
    with socket.create_server(("127.0.0.1", 0), backlog=500) as silent:
        emulator = "http://{}:{}".format(*silent.getsockname())
        settings = {
            "BUCKET_NAME": "b",
            "TIER": "prod",
            "STORAGE_EMULATOR_HOST": emulator,
        }
        with running(kind, tmp_path / "home", **settings) as server:
            began = time.monotonic()
            with ThreadPoolExecutor(100) as pool:
                ask = server.ask
                asked = [
                    pool.submit(ask, "GET", f"/simple/p{number % 30}/")
                    for number in range(100)
                ]
                wait_until(lambda: sum(f.done() for f in asked) >= 50)
                for path in ("/health", "/") * 3:
                    sent = time.monotonic()
                    assert ask("GET", path).status_code == 200
                    assert time.monotonic() - sent < 4
                answers = [future.result() for future in asked]
            assert {answer.status_code for answer in answers} == {503}
            assert all("Retry-After" in answer.headers for answer in answers)
            assert time.monotonic() - began < 25  # a deadline is 8 s, and some more
            errors = re.findall(r"ERROR.*", server.log())
            assert len(errors) == 1, errors
            assert "gs://b/packages/" in errors[0]
