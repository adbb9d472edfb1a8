"""The lab: installs servers, gives them the corpus, starts them and ends them.

A `Lab` owns a work directory with everything that is built once (virtual environments,
corpora, a filled devpi) and every process that is started; leaving it ends them all.
"""

from __future__ import annotations

import contextlib
import getpass
import marshal
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin

import psutil
from corpus import (
    FILES_PER_PROJECT,
    FORM_TYPE,
    NEWEST,
    Store,
    Wheel,
    build_store,
    make_project,
    upload_form,
    wheel_name,
)
from measure import Answer, ask, cpu_of, hyperfine
from servers import SERVERS, VARIANTS

HERE = Path(__file__).resolve().parent
PATIENCE = 60  # seconds for a start, for a page to show an upload, for calm
PATH = f"{os.defpath}:/usr/sbin"  # where Debian has nginx
# What times a cold start; the server is left running, its process id in <pid>.
COLD = """
ask() {
  exec 3<>/dev/tcp/127.0.0.1/<port> || return
  printf 'GET %s HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' <page> >&3
  read -r _ status _ <&3 && cat <&3 > /dev/null && test "$status" = 200
}
setsid <command> > /dev/null 2> <log> & echo $! > <pid>
until ask 2> /dev/null; do
  kill -0 $! && test $SECONDS -lt 60 && sleep 0.002 || exit 1
done
"""


def fill_in(text: str, values: Mapping[str, object]) -> str:
    """Replace each <word> by its value."""
    return re.sub(r"<([a-z]+)>", lambda match: str(values[match[1]]), text)


# ---- One server ----------------------------------------------------------------------


class Server:
    """A process group that listens on a port, or is about to."""

    def __init__(self, name: str, values: dict[str, Any], scratch: Path) -> None:
        self.name, self.entry, self.pid = name, SERVERS[name], 0
        self.port, self.scratch, self.log = free_port(), scratch, scratch / "log"
        self.values = values | {"port": self.port, "scratch": scratch, "log": self.log}
        self.values["command"] = fill_in(self.entry.command, self.values)
        for file, text in self.entry.files.items():
            path = scratch / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fill_in(text, self.values))
        # Nothing of the caller's environment configures a server, and byte code is
        # cached apart, so that the repository stays as it is.
        self.env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": str(scratch)}
        self.env["PYTHONPYCACHEPREFIX"] = str(scratch.parent.parent / "pycache")
        for key, text in self.entry.env.items():
            self.env[key] = fill_in(text, self.values)

    def launch(self) -> None:
        with self.log.open("wb") as log:
            self.pid = subprocess.Popen(
                shlex.split(self.values["command"]),
                env=self.env,
                cwd=self.scratch,
                stdout=subprocess.DEVNULL,  # access logs of those who insist
                stderr=log,
                start_new_session=True,
            ).pid

    def time_start(self, project: str) -> float:
        """Start it by hyperfine; tell the seconds until a page was there."""
        pid = self.scratch / "pid"
        more = {"page": self.page(project), "pid": pid}
        try:
            return hyperfine(fill_in(COLD, self.values | more), self.scratch, self.env)
        finally:
            self.pid = int(pid.read_text())

    def page(self, project: str) -> str:
        return f"{self.entry.simple}{project}/"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        with self.connect() as connection:
            return ask(connection, path, headers or {})

    def connect(self) -> contextlib.closing[HTTPConnection]:
        return contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=300))

    def answers(self, path: str) -> bool:
        try:
            return self.get(path).status == 200
        except OSError:
            return False

    def processes(self) -> list[psutil.Process]:
        """List what runs of it, the leader first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.pid)
            if self.pid and leader.status() != psutil.STATUS_ZOMBIE:
                return [leader, *leader.children(recursive=True)]
        return []

    def links(self, project: str) -> dict[str, str]:
        """Read the project page: file name to path."""
        path = self.page(project)
        hrefs = re.findall(r'<a[^>]* href="([^"]*)"', self.get(path).body.decode())
        paths = [urldefrag(urljoin(path, href)).url for href in hrefs]
        return {path.rpartition("/")[2]: path for path in paths}

    def upload(self, wheels: list[Wheel]) -> float:
        """Upload over one connection, wait for the page; tell the uploads' seconds."""
        headers = {"Content-Type": FORM_TYPE, **self.entry.login}
        forms = [upload_form(wheel) for wheel in wheels]
        with self.connect() as connection:
            start = time.perf_counter()
            for form in forms:
                answer = ask(connection, self.entry.upload, headers, form)
                if answer.status != 200:
                    raise RuntimeError(f"{self.name}: an upload gets {answer}")
            taken = time.perf_counter() - start
        if self.entry.simple:  # some answer an upload before the page shows it
            last = wheels[-1]
            wait_until(lambda: last.filename in self.links(last.project), self.log)
        return taken

    def upload_projects(self, projects: Iterable[str]) -> None:
        self.upload([wheel for name in projects for wheel in make_project(name)])

    def stop(self) -> None:
        """End the whole group, by force after five seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if self.pid:
                    os.killpg(self.pid, number)
                    psutil.wait_procs([psutil.Process(self.pid)], timeout=5)
        self.pid = 0


# ---- The lab -------------------------------------------------------------------------


class Lab(contextlib.ExitStack):
    """Builds what is needed once, starts servers and ends them."""

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work.resolve()
        self.running: list[Server] = []
        self.made: dict[tuple[str, Path], Any] = {}
        self.installed: dict[Path, tuple[str, ...]] = {}
        self.count = 0
        # Another lab may work here at the same time.
        self.desk = self.work / f"scratch-{os.getpid()}"
        self.desk.mkdir(parents=True, exist_ok=True)
        self.callback(shutil.rmtree, self.desk, ignore_errors=True)

    def store(self, files: int, each: int = FILES_PER_PROJECT) -> Store:
        return build_store(self.work, files, each)

    def scratch(self, name: str) -> Path:
        """Make an empty directory of that name, never used before in this run."""
        self.count += 1
        path = self.desk / f"{self.count:04d}-{name}"
        path.mkdir()
        return path

    def fill(self, name: str, store: Store) -> Any:
        """Make the <source> of a server's command, once a run for all alike."""
        fill = SERVERS[name].fill
        key = (name if fill in OWN else fill), store.path
        made = self.made.get(key)
        if made is None or fill == "uploads":
            made = self.made[key] = FILLS[fill](self, name, store)
        return made.port if isinstance(made, Server) else made

    def bin(self, packages: tuple[str, ...]) -> Path:
        """Make (once) a virtual environment; tell where its programs are."""
        home = self.work / "env" / slug(*packages)
        if packages and not (home / "complete").exists():
            print(f"installing {' '.join(packages)}", file=sys.stderr)
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip = [str(home / "bin/python"), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, *packages], check=True)
            (home / "complete").touch()
        self.installed[home] = packages
        return home / "bin"

    # ---- Starting and stopping

    def prepare(
        self, name: str, store: Store, *, source: object = None, threads: int = 4
    ) -> Server:
        """Make all that a server needs, but do not start it."""
        bin = self.bin(SERVERS[name].packages)
        values = {
            "bin": bin,
            "site": next(bin.parent.glob("lib/*/site-packages"), ""),
            "source": source or self.fill(name, store),
            "threads": threads,
            "here": HERE,
            "repository": HERE.parent,
            "me": getpass.getuser(),
        }
        server = Server(name, values, self.scratch(name))
        self.callback(server.stop)
        self.running.append(server)
        return server

    def start(self, name: str, store: Store, path: str = "", **more: Any) -> Server:
        """Start a server on a store and wait for a page; `more` as in `prepare`."""
        server = self.prepare(name, store, **more)
        page = server.page(store.project) if server.entry.simple else server.entry.up
        server.launch()
        wait_until(lambda: server.answers(path or page), server.log)
        return server

    def stop(self, servers: list[Server]) -> None:
        for server in servers:
            server.stop()
        self.running = [server for server in self.running if server not in servers]

    @contextlib.contextmanager
    def only(self) -> Iterator[None]:
        """End, on leaving, what was started inside; buckets stay."""
        before = list(self.running)
        try:
            yield
        finally:
            stay = [*before, *self.made.values()]
            self.stop([server for server in self.running if server not in stay])

    def drain(self) -> None:
        """Wait until no server works: a slow one would spill into the next window."""
        end, calm = time.monotonic() + PATIENCE, 0
        processes = [p for server in self.running for p in server.processes()]
        before = sum(cpu_of(processes).values())
        while calm < 2 and time.monotonic() < end:
            time.sleep(0.1)
            now = sum(cpu_of(processes).values())
            # One tick (10 ms) in 100 is what idle event loops and timers use.
            calm = calm + 1 if now - before <= 0.011 else 0
            before = now


def wait_until(done: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        time.sleep(0.005)
        if time.monotonic() > end:
            raise RuntimeError(log.read_text(errors="replace")[-2000:] or "no log")


def slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words)) or "none"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- How a server gets the corpus ----------------------------------------------------
# Each makes what <source> stands for in the command line of an entry.


def link_files(lab: Lab, name: str, store: Store) -> Path:
    """A directory of its own: a server may keep facts, or uploads, beside the files."""
    return store.link_to(lab.scratch(f"{name}-store") / "packages").path


def copy_uploaded(lab: Lab, name: str, store: Store) -> Path:
    """A copy of what a server made of uploads, once for all runs."""
    filled = lab.work / "filled" / slug(*SERVERS[name].packages) / str(store.files)
    if not filled.exists():
        source = lab.scratch(f"{name}-fill") / "data"
        with lab.only():
            server = lab.start(name, store, SERVERS[name].up, source=source)
            for command in server.entry.first:
                argv = shlex.split(fill_in(command, server.values))
                subprocess.run(argv, env=server.env, check=True, capture_output=True)
            server.upload_projects(store.projects)
        shutil.copytree(source, filled)
    return shutil.copytree(filled, lab.scratch(f"{name}-store") / "data")


def fill_bucket(lab: Lab, _: str, store: Store) -> Server:
    """An emulator with the corpus; what is asked for is uploaded by our server.

    The rest is loaded from disk: that is quicker, but such objects lack metadata.
    """
    bucket = lab.prepare("emulator", store)
    packages = store.link_to(bucket.scratch / "data/bench/packages").path
    for project in set(store.asked):
        shutil.rmtree(packages / project)
    bucket.launch()
    wait_until(lambda: bucket.answers(bucket.entry.up), bucket.log)
    server = lab.start("ours-bucket", store, "/simple/", source=bucket.port)
    server.upload_projects(set(store.asked))
    lab.stop([server])
    return bucket


OF_GUNICORN = {"date", "server", "connection", "transfer-encoding"}  # headers


def record(lab: Lab, _: str, store: Store) -> Path:
    """A tree of what our server answers: as files for nginx, and as one for hello."""
    tree, answers = lab.scratch("recorded"), {}
    with lab.only():
        server = lab.start("ours", store)
        paths = ["/simple/"]
        for project in store.asked:
            file = f"/packages/{project}/{wheel_name(project, NEWEST)}"
            paths += [server.page(project), file, f"{file}.metadata"]
        for path in paths:
            for variant, headers in variants(server, path, VARIANTS).items():
                status, fields, body = server.get(path, headers)
                kept = [it for it in fields.items() if it[0] not in OF_GUNICORN]
                answers[path, variant] = (f"{status} OK", kept, body)
                if variant in ("html", "json"):
                    index = f"/index.{variant}" if path.endswith("/") else ""
                    target = tree / (path.strip("/") + index)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(body)
    (tree / "answers").write_bytes(marshal.dumps(answers))
    return tree


def variants(
    server: Server, path: str, names: tuple[str, ...]
) -> dict[str, dict[str, str]]:
    """Some ways to ask for a page, by name: the headers of each."""
    json = {"Accept": "application/vnd.pypi.simple.v1+json"}
    gzip = {"Accept-Encoding": "gzip"}
    etag = {"If-None-Match": server.get(path).headers.get("etag", "")}
    every = {"html": {}, "json": json, "gzip": gzip, "json gzip": json | gzip}
    return {name: {**every, "304": etag}[name] for name in names}


OWN = ("files", "uploads")  # each server has a directory of its own
FILLS: dict[str, Callable[[Lab, str, Store], Any]] = {
    "nothing": lambda lab, name, store: "",
    "uploads": copy_uploaded,
    "files": link_files,
    "recorded": record,
    "bucket": fill_bucket,
}
