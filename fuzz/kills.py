#!/usr/bin/env python3
"""Kill real servers at random points of their work, and check what is left.

    python fuzz/kills.py [KILLS] [SEED]     200 kills, on directories and the emulator

Three clients upload, replace and remove files, each its own, while the owner yanks some
by hand. Then all processes of the server get SIGKILL: after a random time, or before a
random step in the file system or on the wire to the bucket. After each start:

- what was answered is as it was answered: whole, with the digest sent, or gone;
- what was not answered is done as a whole, file by file, or not at all;
- nothing else shows: no file, no project, no yank of bytes that are gone;
- the request that was cut off, sent again, is done;
- staged files of killed processes go with the next upload, when they are old enough.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_pypi_ae import (
    FORM_HEADERS,
    JSON,
    MODULE,
    REMOVE,
    Cloud,
    Directory,
    Env,
    Server,
    Store,
    emulating,
    encode,
    field,
    make_metadata,
    make_sdist,
    make_zip,
    new_bucket,
    running,
    sha256,
    url,
    wait_until,
)

Content = bytes | None  # None: there is no such file
CLIENTS = 3
VERSIONS = ("1.0", "2.0")
LARGE = 9 << 20  # bytes; above 8 MiB, a bucket gets a resumable upload
SLOWEST = 0.25  # seconds; some dozens of requests, or one large upload and some others

# Loaded by Python as it starts. Once the file `arm` is there, it counts the steps of
# this process, and kills the server before the step whose number is in that file.
KILLER = """\
import os, signal, sys
home, left = {home!r}, []
steps = {{"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}}

def step(event, arguments):
    own = event in steps and home + "/packages" in str(arguments[0])
    if (own or event == "http.client.send") and os.path.exists(home + "/arm"):
        left[:] = left or [int(open(home + "/arm").read())]
        left[0] -= 1
        if left[0] <= 0:
            os.killpg(os.getpgrp(), signal.SIGKILL)

sys.addaudithook(step)
"""


class Killing:
    """One server that is killed often, and what must and what may be in its store."""

    def __init__(self, server: Server, store: Store, seed: int) -> None:
        self.server, self.store, self.seed = server, store, seed
        self.dice = random.Random(seed)
        self.may: dict[str, set[Content]] = {}  # by path: project/filename
        self.yanked: dict[str, bytes] = {}  # the bytes that the owner yanked
        self.cut_off: list[Callable[[], None]] = []  # to be sent again
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        hook = server.home / "hook"
        hook.mkdir()
        killer = KILLER.format(home=str(server.home))
        (hook / "sitecustomize.py").write_text(killer)
        server.restart(PYTHONPATH=f"{hook}{os.pathsep}{MODULE.parent}")

    def kill(self, times: int) -> Counter[str]:
        for number in range(times):
            self.yank()
            self.work(f"{self.seed}-{number}")
            self.server.restart()
            self.check()
            for act in self.cut_off:
                act()
            self.check()
        self.sweep()
        self.expect("Traceback" not in self.server.log(), "the log has a traceback")
        assert not self.problems, "\n".join(self.problems)
        return self.counts

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(f"kill {self.counts['kills']}: {problem}")

    # One kill...

    def yank(self) -> None:
        """The owner yanks a file by hand."""
        files = [(path, one) for path, (one,) in self.may.items() if one]
        if not files:
            return
        path, content = self.dice.choice(files)
        self.yanked[path] = content
        if isinstance(self.store, Directory):
            self.store.put(f"{path}.yanked", b"bad")
        else:
            item = self.store.hand.get(f"packages/{path}")
            numbers = {"generation": item.generation}
            numbers["metageneration"] = item.metageneration
            self.store.hand.patch(item.name, {"yanked": "bad"}, **numbers)

    def work(self, seed: str) -> None:
        arm, by_step = self.server.home / "arm", self.dice.random() < 0.6
        if by_step:
            arm.write_text(str(self.dice.randint(1, 60)))
        self.counts["kills"] += 1
        with ThreadPoolExecutor(CLIENTS) as pool:
            seeds = [f"{seed}-{number}" for number in range(CLIENTS)]
            clients = pool.map(self.send_requests, range(CLIENTS), seeds)
            time.sleep(0 if by_step else self.dice.uniform(0.005, SLOWEST))
            if not by_step:
                self.server.stop(signal.SIGKILL)
            self.cut_off = list(clients)
        arm.unlink(missing_ok=True)

    def send_requests(self, number: int, seed: str) -> Callable[[], None]:
        """One client: send requests until the server is gone; return the last one."""
        dice = random.Random(seed)
        while True:
            project, version = f"p{number}{dice.choice('abc')}", dice.choice(VERSIONS)
            if dice.random() < 0.3:
                act = partial(self.remove, project, version)
            else:
                name, content = make_file(project, version, dice)
                act = partial(self.upload, project, name, content)
            try:
                act()
            except requests.RequestException:
                return act

    def upload(self, project: str, name: str, content: bytes) -> None:
        path = f"{project}/{name}"
        self.may[path] = self.may.get(path, {None}) | {content}
        assert self.server.upload(name, content).status_code == 200
        self.may[path] = {content}
        self.counts["uploads"] += 1

    def remove(self, project: str, version: str) -> None:
        start = f"{project}/{project}-{version}"
        paths = [path for path in [*self.may] if path.startswith(start)]
        expected = {200 if self.may[path] != {None} else 404 for path in paths} or {404}
        self.may |= {path: self.may[path] | {None} for path in paths}
        form = encode([REMOVE, field("name", project), field("version", version)])
        answer = self.server.ask("POST", "/", data=form, headers=FORM_HEADERS)
        assert answer.status_code == min(expected)
        self.may |= {path: {None} for path in paths}
        self.counts["removals"] += answer.ok

    # After a start...

    def check(self) -> None:
        """Compare pages, downloads and the store with what must and may be there."""
        for path in self.may:
            project, name = path.split("/")
            answer = self.server.ask("GET", url(name, project))
            assert answer.status_code in (200, 404), f"{name}: {answer.text}"
            content = answer.content if answer.ok else None
            self.expect(content in self.may[path], f"{path} is not what it may be")
            self.may[path] = {content}
            if self.yanked.get(path) != content:
                self.yanked.pop(path, None)
        there = {path: one for path, (one,) in self.may.items() if one}
        stored = self.store.all().items()
        files = {n: data for n, data in stored if not n.endswith(".yanked")}
        self.expect(files == there, f"stored: {[*files]}, served: {[*there]}")
        page = self.server.ask("GET", "/simple/", headers={"Accept": JSON}).json()
        listed = {project["name"] for project in page["projects"]}
        projects = {path.split("/")[0] for path in there}
        self.expect(listed == projects, f"/simple/ is wrong in {listed ^ projects}")
        for project in {path.split("/")[0] for path in self.may}:
            self.check_page(project)

    def check_page(self, project: str) -> None:
        page = self.server.ask("GET", f"/simple/{project}/", headers={"Accept": JSON})
        files = {f["filename"]: f for f in page.json()["files"]} if page.ok else {}
        paths = {path for path in self.may if path.startswith(f"{project}/")}
        there = {path.split("/")[1] for path in paths if self.may[path] != {None}}
        self.expect(files.keys() == there, f"{project}'s page: {[*files]}")
        for name in there & files.keys():
            file, path = files[name], f"{project}/{name}"
            (content,) = self.may[path]
            right = {"sha256": sha256(content or b"")}
            self.expect(file["hashes"] == right, f"{path} has another digest")
            yank = "bad" if path in self.yanked else False
            self.expect(file["yanked"] == yank, f"{path} has {yank=}: {file}")
            if "core-metadata" in file:
                text = self.server.ask("GET", f"{url(name, project)}.metadata").content
                right = {"sha256": sha256(text)}
                self.expect(file["core-metadata"] == right, f"{path}: {text!r}")

    def sweep(self) -> None:
        """Staged files that are old go, with the next upload at the latest."""
        staged = [*self.server.home.rglob("staging/*")]
        self.counts["staged files left"] += len(staged)
        for path in staged:
            os.utime(path, (1e9, 1e9))
        self.upload("p", *make_file("p", "1.0", self.dice))
        assert wait_until(lambda: not [*self.server.home.rglob("staging/*")])


def make_file(project: str, version: str, dice: random.Random) -> tuple[str, bytes]:
    """A wheel or an sdist with bytes of its own; some are large."""
    if dice.random() < 0.3:
        python = f">=3.{dice.randint(0, 99999)}"
        return f"{project}-{version}.tar.gz", make_sdist(project, version, python)
    size = LARGE if dice.random() < 0.06 else dice.randint(1, 9999)
    metadata = make_metadata(project, version)
    files = {"x": os.urandom(size), f"{project}-{version}.dist-info/METADATA": metadata}
    name = f"{project}-{version}-py3-none-any.whl"
    return name, make_zip(files, zipfile.ZIP_STORED)


def kill_often(
    kind: str, home: Path, kills: int, seed: int, emulator: str = ""
) -> Counter[str]:
    """Kill a server of a directory or, with the URL of an emulator, of a new bucket."""
    settings = {"OVERWRITE": "yes"}
    if emulator:
        settings |= {"BUCKET_NAME": new_bucket(emulator), "TIER": "prod"}
        settings |= {"SYNC_SECONDS": "0", "STORAGE_EMULATOR_HOST": emulator}
    with environment(settings), running(kind, home, **settings) as server:
        on_disk = Directory(home)
        on_disk.root = server.root
        in_cloud = Cloud(home, settings["BUCKET_NAME"], None) if emulator else None
        return Killing(server, in_cloud or on_disk, seed).kill(kills)


@contextlib.contextmanager
def environment(values: Env) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    broken = 0
    with tempfile.TemporaryDirectory() as name, emulating(Path(name)) as emulator:
        for kind, root in itertools.product(("wsgiref", "gunicorn"), ("", emulator)):
            home = Path(name, f"{kind}-{len(root)}")
            print(f"{kind}, {'bucket' if root else 'directory'}: ", end="", flush=True)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the server's log
                    done = kill_often(kind, home, kills // 4, seed, root)
                print(dict(done), flush=True)
            except AssertionError as problem:
                broken += 1
                print(f"broken:\n{problem}", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
