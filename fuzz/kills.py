#!/usr/bin/env python3
"""Kill real servers at random points of their work, and check what is left.

    python fuzz/kills.py [KILLS] [SEED]     200 kills, on directories and the emulator

Three clients upload, replace and remove files, each its own, while the owner yanks some
by hand. Then all processes of the server get SIGKILL: after a random time, or before a
random step in the file system or on the wire to the bucket. After each start:

- what was answered is as it was answered: whole, with the digest sent, or gone;
- what was not answered is done as a whole, file by file, or not at all;
- nothing else shows: no file, no project, no yank of bytes that are gone; but a yank
  is a file of its own, and what was cut off may have taken it away;
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_pypi_ae as lab

Content = bytes | None  # None: there is no such file
CLIENTS, VERSIONS = 3, ("1.0", "2.0")
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

    def __init__(self, server: lab.Server, store: lab.Store, seed: int) -> None:
        self.server, self.store, self.seed = server, store, seed
        self.dice = random.Random(seed)
        self.may: dict[str, set[Content]] = {}  # by path: project/filename
        self.yanked: dict[str, bytes] = {}  # the bytes that the owner yanked
        self.unsure: set[str] = set()  # files whose last change has no answer
        self.counts, self.problems = Counter[str](), dict[str, int]()
        hook = server.home / "hook"
        hook.mkdir()
        killer = KILLER.format(home=str(server.home))
        (hook / "sitecustomize.py").write_text(killer)
        server.restart(PYTHONPATH=f"{hook}{os.pathsep}{lab.MODULE.parent}")

    def kill(self, times: int) -> Counter[str]:
        for _ in range(times):
            self.counts["kills"] += 1
            self.yank()
            cut_off = self.work()
            self.server.restart()
            self.check()
            for act in cut_off:
                act()
            self.check()
        self.sweep()
        self.expect("Traceback" not in self.server.log(), "the log has a traceback")
        lines = [f"kill {number}: {text}" for text, number in self.problems.items()]
        assert not lines, "\n".join(lines)
        return self.counts

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.setdefault(problem, self.counts["kills"])

    # One kill...

    def yank(self) -> None:
        """The owner yanks a file by hand."""
        files = [(path, one) for path, (one,) in self.may.items() if one]
        if not files:
            return None
        path, content = self.dice.choice(files)
        self.yanked[path] = content
        if isinstance(self.store, lab.Directory):
            return self.store.put(f"{path}.yanked", b"bad")
        item = self.store.hand.get(f"packages/{path}")
        match = {"generation": item.generation, "metageneration": item.metageneration}
        self.store.hand.patch(item.name, {"yanked": "bad"}, **match)
        return None

    def work(self) -> list[Callable[[], None]]:
        """Let the clients work until the kill; return the request that each lost."""
        arm, by_step = self.server.home / "arm", self.dice.random() < 0.6
        if by_step:
            (whole := arm.with_name("arm.new")).write_text(
                str(self.dice.randint(1, 60))
            )
            os.replace(whole, arm)  # a worker that starts now must not read half of it
        with ThreadPoolExecutor(CLIENTS) as pool:
            seeds = [self.dice.random() for _ in range(CLIENTS)]
            clients = pool.map(self.send_requests, range(CLIENTS), seeds)
            time.sleep(0 if by_step else self.dice.uniform(0.005, SLOWEST))
            if not by_step:
                self.server.stop(signal.SIGKILL)
            cut_off = list(clients)
        arm.unlink(missing_ok=True)
        return cut_off

    def send_requests(self, number: int, seed: float) -> Callable[[], None]:
        """One client: send requests until the server is gone; return the last one."""
        dice, ends = random.Random(seed), time.monotonic() + 60
        while time.monotonic() < ends:
            project, version = f"p{number}{dice.choice('abc')}", dice.choice(VERSIONS)
            act = partial(self.remove, project, version)
            if dice.random() < 0.7:
                act = partial(self.upload, project, *make_file(project, version, dice))
            try:
                act()
            except requests.RequestException:
                return act
        raise AssertionError("the server was not killed")

    def upload(self, project: str, name: str, content: bytes) -> None:
        path = f"{project}/{name}"
        self.may[path] = self.may.get(path, {None}) | {content}
        self.unsure.add(path)
        answer = self.server.upload(name, content)
        assert answer.status_code == 200, answer.text
        self.may[path] = {content}
        self.unsure.discard(path)
        self.counts["uploads"] += 1

    def remove(self, project: str, version: str) -> None:
        start = f"{project}/{project}-{version}"
        before = {path: may for path, may in [*self.may.items()] if start in path}
        self.may |= {path: may | {None} for path, may in before.items()}
        self.unsure |= before.keys()
        form = [lab.REMOVE, lab.field("name", project), lab.field("version", version)]
        options = {"data": lab.encode(form), "headers": lab.FORM_HEADERS}
        status = self.server.ask("POST", "/", **options).status_code
        there = any(may != {None} for may in before.values())
        assert status == (200 if there else 404), (status, there)
        self.may |= {path: {None} for path in before}
        self.unsure -= before.keys()
        self.counts["removals"] += there

    # After a start...

    def check(self) -> None:
        """Compare pages, downloads and the store with what must and may be there."""
        for path in self.may:
            project, name = path.split("/")
            answer = self.server.ask("GET", lab.url(name, project))
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
        page = self.server.ask("GET", "/simple/", headers={"Accept": lab.JSON})
        listed = {project["name"] for project in page.json()["projects"]}
        projects = {path.split("/")[0] for path in there}
        self.expect(listed == projects, f"/simple/ is wrong in {listed ^ projects}")
        for project in {path.split("/")[0] for path in self.may}:
            self.check_page(project, there)

    def check_page(self, project: str, there: dict[str, bytes]) -> None:
        options = {"headers": {"Accept": lab.JSON}}
        page = self.server.ask("GET", f"/simple/{project}/", **options)
        files = page.json()["files"] if page.ok else []
        shown = {f"{project}/{file['filename']}": file for file in files}
        right = {path for path in there if path.startswith(f"{project}/")}
        self.expect(shown.keys() == right, f"{project}'s page has {[*shown]}")
        for path in right & shown.keys():
            file = shown[path]
            if path in self.unsure and not file["yanked"]:
                self.yanked.pop(path, None)
            yank = "bad" if path in self.yanked else False
            digest = {"sha256": lab.sha256(there[path])}
            self.expect(file["hashes"] == digest, f"{path} has another digest")
            self.expect(file["yanked"] == yank, f"{path} has {yank=}: {file}")
            if "core-metadata" in file:
                where = lab.url(file["filename"], project) + ".metadata"
                text = self.server.ask("GET", where).content
                digest = {"sha256": lab.sha256(text)}
                self.expect(file["core-metadata"] == digest, f"{path}: {text!r}")

    def sweep(self) -> None:
        """Staged files that are old go, with the next upload at the latest."""
        staged = [*self.server.home.rglob("staging/*")]
        self.counts["staged files left"] += len(staged)
        for path in staged:
            os.utime(path, (1e9, 1e9))
        self.upload("p", *make_file("p", "1.0", self.dice))
        left = self.server.home.rglob
        assert lab.wait_until(lambda: not [*left("staging/*")]), [*left("staging/*")]


def make_file(project: str, version: str, dice: random.Random) -> tuple[str, bytes]:
    """A wheel or an sdist with bytes of its own; some are large."""
    if dice.random() < 0.3:
        python = f">=3.{dice.randint(0, 99999)}"
        sdist = lab.make_sdist(project, version, python)
        return f"{project}-{version}.tar.gz", sdist
    size = LARGE if dice.random() < 0.06 else dice.randint(1, 9999)
    info = f"{project}-{version}.dist-info/METADATA"
    files = {"x": os.urandom(size), info: lab.make_metadata(project, version)}
    name = f"{project}-{version}-py3-none-any.whl"
    return name, lab.make_zip(files, zipfile.ZIP_STORED)


def kill_often(
    kind: str, home: Path, kills: int, seed: int, emulator: str = ""
) -> Counter[str]:
    """Kill a server of a directory or, with the URL of an emulator, of a new bucket."""
    settings = {"OVERWRITE": "yes"}
    if emulator:
        settings |= {"BUCKET_NAME": lab.new_bucket(emulator), "TIER": "prod"}
        settings |= {"SYNC_SECONDS": "0", "STORAGE_EMULATOR_HOST": emulator}
    store: lab.Store = lab.Directory(home)
    with patch.dict(os.environ, settings):
        if emulator:
            store = lab.Cloud(home, settings["BUCKET_NAME"], None)
    with lab.running(kind, home, **settings) as server:
        if isinstance(store, lab.Directory):
            store.root = server.root
        return Killing(server, store, seed).kill(kills)


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    broken = 0
    with tempfile.TemporaryDirectory() as name, lab.emulating(Path(name)) as emulator:
        for kind, root in itertools.product(("wsgiref", "gunicorn"), ("", emulator)):
            home, where = Path(name, f"{kind}-{len(root)}"), root or "a directory"
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # the server's log
                    done = kill_often(kind, home, kills // 4, seed, root)
                print(f"{kind}, {where}: {dict(done)}", flush=True)
            except AssertionError as problem:
                broken += 1
                print(f"{kind}, {where}: broken:\n{problem}", flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
