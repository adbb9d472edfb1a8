"""The scenarios: which servers, what is done to them, what is recorded.

Each is a function of a `Run`; SCENARIOS at the end names them. Rounds go over all
servers of a scenario in turn, each beginning with another one, so that what changes on
the machine in the meantime hits all alike.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from corpus import BIG, INSTALLED, Store, make_wheel
from lab import PATH, Lab, Server, fill_in, variants
from measure import cpu_of, hyperfine, memory_of, others_cpu, wrk
from servers import SERVERS, Entry

T = TypeVar("T")


class Row(NamedTuple):
    """One raw figure. `extra` says under which circumstances it was taken."""

    scenario: str
    variant: str
    files: int
    unit: str
    server: str
    round: int
    value: float
    extra: dict[str, Any] = {}  # noqa: RUF012  # nobody writes to it


Rows = Iterator[Row]


class Run(NamedTuple):
    """What was asked for."""

    lab: Lab
    rounds: int
    seconds: int
    sizes: Sequence[int] | None
    servers: Sequence[str]

    def pick(self, can: Callable[[Entry], object], files: int) -> list[str]:
        """List the servers that can do it and were asked for."""
        entries = [(name, SERVERS[name]) for name in self.servers]
        return [name for name, it in entries if can(it) and files <= it.most]


def turns(rounds: int, things: Sequence[T]) -> Iterable[tuple[int, T]]:
    """Go over all things in each round, beginning with another one each time."""
    for number in range(rounds):
        for offset in range(len(things)):
            yield number, things[(number + offset) % len(things)]


def has_pages(entry: Entry) -> bool:
    return bool(entry.simple)


# ---- Windows of wrk ------------------------------------------------------------------

# One gunicorn worker sometimes accepts all keep-alive connections, and the other idles:
# then half the server is measured. With 8 connections, an uneven but honest split (6:2)
# leaves the lesser worker about a third of the other's work.
BALANCED = 0.25
# The share of the machine that other programs may use before a window is repeated. If
# none is quiet a disturbed one is kept, as it may be all that a shared machine gives.
QUIET = 0.1
TRIES = 5


class Shot(NamedTuple):
    """One thing to load a server with."""

    server: Server
    variant: str
    path: str
    headers: dict[str, str]


def volley(run: Run, files: int, shots: Sequence[Shot]) -> Rows:
    """Load each server in turn, round after round; repeat windows that went wrong."""
    for server, variant, path, headers in shots:
        answer = server.get(path, headers)
        zipped = "content-encoding" in answer.headers
        right = answer.status == (304 if variant == "304" else 200)
        if not right or zipped != ("gzip" in variant):
            raise RuntimeError(f"{server.name} {variant}: {answer}")
        wrk(server.url(path), headers, 1)  # both workers fill their caches
    for number, shot in turns(run.rounds, shots):
        attempts: list[tuple[float, dict[str, Any]]] = []
        while len(attempts) < TRIES:
            attempts.append(load_once(run, shot))
            if attempts[-1][1]["balanced"] and attempts[-1][1]["quiet"]:
                break
        # The choice looks at the circumstances only, never at the rate.
        rate, extra = max(attempts, key=lambda it: (it[1]["balanced"], it[1]["quiet"]))
        name, unit = shot.server.name, "requests/s"
        yield Row("page", shot.variant, files, unit, name, number, rate, extra)


def load_once(run: Run, shot: Shot) -> tuple[float, dict[str, Any]]:
    """Run wrk; tell the rate, and who used the machine in the meantime."""
    run.lab.drain()
    processes = [p for server in run.lab.running for p in server.processes()]
    workers = {p.pid for p in shot.server.processes()[1:]}
    before, others = cpu_of(processes), others_cpu()
    rate, errors = wrk(shot.server.url(shot.path), shot.headers, run.seconds)
    others = others_cpu() - others
    used = {pid: cpu - before[pid] for pid, cpu in cpu_of(processes).items()}
    foreign = max(0.0, others - sum(used.values()))
    busiest = sorted(cpu for pid, cpu in used.items() if pid in workers)[-2:]
    # A server that did next to nothing (ticks are 10 ms) cannot be judged.
    fair = len(busiest) < 2 or sum(busiest) < 0.2 or busiest[0] >= BALANCED * busiest[1]
    return rate, {
        "balanced": fair,
        "quiet": foreign <= QUIET * run.seconds * (os.cpu_count() or 1),
        "errors": errors,
        "other_cpu_s": round(foreign, 2),
    }


def page(run: Run) -> Rows:
    """A project page of 20 files in its variants, the root, a file; and memory."""
    for files in run.sizes or (100, 10_000, 100_000):
        store, shots = run.lab.store(files), list[Shot]()
        with run.lab.only():
            for name in run.pick(has_pages, files):
                server = run.lab.start(name, store)
                yield weigh(server, files, "memory, idle")
                shots += aim(server, store)
            yield from volley(run, files, shots)
            for server in dict.fromkeys(shot.server for shot in shots):
                yield weigh(server, files, "memory, after load")


def aim(server: Server, store: Store) -> list[Shot]:
    path, file = server.page(store.project), server.links(store.project)[store.newest]
    kinds = variants(server, path, server.entry.variants)
    shots = [Shot(server, kind, path, headers) for kind, headers in kinds.items()]
    shots.append(Shot(server, "root", server.entry.simple, {}))
    return [*shots, Shot(server, "10 KB file", file, {})]


def weigh(server: Server, files: int, when: str) -> Row:
    value = memory_of(server.processes())
    return Row("page", when, files, "MiB PSS", server.name, 0, value)


# ---- Uploads and starts --------------------------------------------------------------

BURST = 50


def upload(run: Run) -> Rows:
    """50 small wheels over one connection; a wheel of 200 MB, and its download."""
    with run.lab.only():
        store = run.lab.store(100).link_to(run.lab.scratch("upload") / "packages")
        names = run.pick(lambda entry: entry.upload, store.files)
        servers = [run.lab.start(name, store) for name in names]
        for number, server in turns(run.rounds + 1, servers):
            wheels = [make_wheel(f"new-{number}", f"1.{n}", 1000) for n in range(BURST)]
            run.lab.drain()
            rate = BURST / server.upload(wheels)
            if number:  # in round 0 modules are imported
                yield Row("upload", "50 small", 0, "/s", server.name, number, rate)
        for number, server in turns(run.rounds, servers):
            yield from move_big(run, server, number)


def move_big(run: Run, server: Server, number: int) -> Rows:
    wheel, name = make_wheel(f"big-{number}", "1.0", BIG), server.name
    run.lab.drain()
    rate = BIG / 1e6 / server.upload([wheel])
    yield Row("upload", "200 MB", 0, "MB/s", name, number, rate)
    if server.entry.simple:
        path = server.links(wheel.project)[wheel.filename]
        run.lab.drain()
        start = time.perf_counter()
        size = len(server.get(path).body)
        rate = size / 1e6 / (time.perf_counter() - start)
        yield Row("upload", "200 MB, its download", 0, "MB/s", name, number, rate)
    # Remove what was stored: writing 200 MB back to disk would disturb the next.
    for folder in (server.scratch, Path(str(server.values["source"]))):
        for file in folder.rglob("*") if folder.is_dir() else ():
            if file.is_file() and file.stat().st_size >= BIG:
                file.unlink()


def cold(run: Run) -> Rows:
    """From starting the processes to the first project page, complete."""
    for files in run.sizes or (100, 10_000, 100_000):
        store = run.lab.store(files)
        for number, name in turns(run.rounds + 1, run.pick(has_pages, files)):
            with run.lab.only():
                server = run.lab.prepare(name, store)
                run.lab.drain()
                value = server.time_start(store.project)
            if number:  # round 0 warms byte code and page cache, and facts get known
                yield Row("cold", "first page", files, "s", name, number, value)


# ---- Clients -------------------------------------------------------------------------

CLIENTS = ("pip==26.3", "uv==0.13.9")
INSTALLERS = {
    "pip": "<bin>/python -m pip install --isolated --no-cache-dir --no-compile -q"
    " --disable-pip-version-check --index-url <url> --target <target> ",
    "uv": "<bin>/uv pip install --no-config -q --python <bin>/python --no-cache"
    " --default-index <url> --target <target> ",
}


def install(run: Run) -> Rows:
    """pip and uv install 30 packages with a cold cache.

    uv opens more connections than it uses, and gunicorn's gthread worker gives each new
    one a thread for up to 5 s until it says something: seen as a run 5 or 10 s longer,
    of whatever app, when such connections outnumber threads. Hence 16 of them.
    """
    store = run.lab.store(600)
    with run.lab.only():
        names = run.pick(has_pages, store.files)
        servers = [run.lab.start(name, store, threads=16) for name in names]
        for number, server in turns(run.rounds + 1, servers):
            for client in INSTALLERS:
                run.lab.drain()
                value = time_install(run.lab.bin(CLIENTS), client, server, store)
                if number:  # round 0 warms the page cache and the installers' byte code
                    yield Row("install", client, 600, "s", server.name, number, value)


def time_install(bin: Path, client: str, server: Server, store: Store) -> float:
    # In memory, where there is such a place: a disk's moods are larger than what is
    # to be measured.
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as scratch:
        target, url = Path(scratch, "target"), server.url(server.entry.simple)
        command = fill_in(
            INSTALLERS[client], {"bin": bin, "url": url, "target": target}
        )
        # No settings of this machine: they could add indexes.
        env = {"PATH": PATH, "HOME": scratch, "TMPDIR": scratch}
        env["PIP_CONFIG_FILE"] = os.devnull
        projects = shlex.join(store.projects[:INSTALLED])
        taken = hyperfine(command + projects, Path(scratch), env)
        count = len(list(target.glob("*.dist-info")))
    if count != INSTALLED:
        raise RuntimeError(f"{client} from {server.name} installs {count}")
    return taken


SCENARIOS: dict[str, Callable[[Run], Rows]] = {
    "page": page,
    "upload": upload,
    "cold": cold,
    "install": install,
}
