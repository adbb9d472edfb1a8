"""The scenarios: which servers, what is done to them, what is recorded.

Each is a function of a `Run`; SCENARIOS at the end names them. Rounds go over all
servers of a scenario in turn, each beginning with another one, so that what changes on
the machine in the meantime hits all alike.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from corpus import (
    BIG,
    FILES_PER_PROJECT,
    Store,
    Wheel,
    big_store,
    big_wheel,
    make_wheel,
    newest_version,
    removal_request,
    upload_request,
)
from measure import Peak, Wire, busy_cpu, memory, wrk
from servers import (
    HERE,
    INSTALLED_FROM,
    KINDS,
    PEERS,
    REPOSITORY,
    Lab,
    Server,
    variants,
)

OURS = ("ours", "ours-bucket", "ours-bucket-20ms")


class Row(NamedTuple):
    """One raw figure. `extra` says under which circumstances it was taken."""

    scenario: str
    files: int
    variant: str
    server: str
    unit: str
    round: int
    value: float
    extra: dict[str, Any]


@dataclass
class Run:
    """What was asked for, and what was found."""

    lab: Lab
    rounds: int
    seconds: int
    sizes: Sequence[int] | None
    servers: Sequence[str] | None
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def pick(self, names: Iterable[str], files: int) -> list[str]:
        """Leave out what was not asked for, and say what cannot be measured."""
        picked = []
        for name in names:
            if self.servers and name not in self.servers:
                continue
            if files > KINDS[name].most:
                self.note(
                    f"{name}: not measured at {files:,} files ({KINDS[name].why})"
                )
            else:
                picked.append(name)
        return picked

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def each(self, defaults: Sequence[int]) -> Sequence[int]:
        return self.sizes or defaults

    def record(
        self,
        where: tuple[str, int, str],
        server: str,
        unit: str,
        number: int,
        value: float,
        **extra: Any,
    ) -> None:
        scenario, files, variant = where
        self.rows.append(
            Row(scenario, files, variant, server, unit, number, value, extra)
        )
        line = f"{scenario} {files} {variant} {server} #{number}: {value:,.4g} {unit}"
        print(line, extra or "", file=sys.stderr, flush=True)


def turns(rounds: int, things: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    """Go over all things in each round, beginning with another one each time."""
    for number in range(rounds):
        for offset in range(len(things)):
            yield number, things[(number + offset) % len(things)]


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


def volley(run: Run, scenario: str, files: int, shots: Sequence[Shot]) -> None:
    """Load each server in turn, round after round."""
    for shot in shots:
        _check(shot)
        wrk(
            shot.server.url(shot.path), shot.headers, 1
        )  # both workers fill their caches
    for number, shot in turns(run.rounds, shots):
        _window(run, (scenario, files, shot.variant), number, shot)


class _Others:
    """The CPU seconds that went to none of ours: a disturbed window shows."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.before = lab, self._now(lab)

    @staticmethod
    def _now(lab: Lab) -> float:
        harness = sum(os.times()[:4])  # with wrk, which has ended by then
        return busy_cpu() - harness - sum(server.cpu() for server in lab.running)

    def read(self) -> float:
        return round(max(0.0, self._now(self.lab) - self.before), 2)


def _check(shot: Shot) -> None:
    answer = shot.server.get(shot.path, shot.headers)
    wanted = 304 if shot.variant == "304" else 200
    if answer.status != wanted:
        name = f"{shot.server.name} {shot.path} {shot.variant}"
        raise RuntimeError(f"{name}: {answer.status} instead of {wanted}")
    zipped = answer.headers.get("Content-Encoding") == "gzip"
    if zipped != (shot.variant == "gzip"):
        raise RuntimeError(f"{shot.server.name} {shot.variant}: gzip is {zipped}")


def _window(run: Run, where: tuple[str, int, str], number: int, shot: Shot) -> None:
    """Measure one window; repeat it while it is unbalanced or disturbed."""
    attempts: list[tuple[float, dict[str, Any]]] = []
    while len(attempts) < TRIES and not (attempts and _is_good(attempts[-1][1])):
        attempts.append(_attempt(run, shot))
    # The choice looks at the circumstances only, never at the rate.
    rate, extra = max(attempts, key=lambda a: (a[1]["balanced"], a[1]["quiet"]))
    extra["tries"] = len(attempts)
    run.record(where, shot.server.name, "requests/s", number, rate, **extra)


def _is_good(extra: dict[str, Any]) -> bool:
    return bool(extra["balanced"] and extra["quiet"])


def _attempt(run: Run, shot: Shot) -> tuple[float, dict[str, Any]]:
    run.lab.drain()
    server = shot.server
    before, idle, others = server.workers(), server.cpu(), _Others(run.lab)
    load = wrk(server.url(shot.path), shot.headers, run.seconds)
    foreign, used = others.read(), server.cpu() - idle
    work = [cpu - before.get(pid, 0) for pid, cpu in server.workers().items()]
    # A server that did next to nothing (ticks are 10 ms) cannot be judged.
    balanced = len(work) < 2 or sum(work) < 0.2 or min(work) >= BALANCED * max(work)
    extra: dict[str, Any] = {"balanced": balanced}
    extra["quiet"] = foreign <= QUIET * run.seconds * (os.cpu_count() or 1)
    extra |= {"p50_ms": load.p50, "p99_ms": load.p99, "errors": load.errors}
    return load.rate, extra | {"cpu_s": round(used, 2), "other_cpu_s": foreign}


# ---- Pages and downloads -------------------------------------------------------------


def page(run: Run) -> None:
    """A project page of 20 files: HTML, JSON, gzip and 304; 100, 10k and 100k files."""
    for files in run.each((100, 10_000, 100_000)):
        _pages(run, "page", files, lambda server, store: server.page(store.project))


def root(run: Run) -> None:
    """The root page, in the same variants."""
    for files in run.each((10_000,)):
        _pages(run, "root", files, lambda server, store: server.launch.simple)


def _pages(
    run: Run, scenario: str, files: int, path_of: Callable[[Server, Store], str]
) -> None:
    store, shots = run.lab.store(files), []
    with run.lab.only():
        for name in run.pick((*OURS, "hello", "nginx", *PEERS), files):
            server = run.lab.start(name, store)
            path = path_of(server, store)
            for variant, headers in variants(server, path).items():
                if variant in KINDS[name].variants:
                    shots.append(Shot(server, variant, path, headers))
        volley(run, scenario, files, shots)


def download(run: Run) -> None:
    """A 10 KB wheel by wrk, and one of 200 MB by a single client."""
    for files in run.each((10_000,)):
        store = run.lab.store(files)
        with run.lab.only():
            shots = []
            for name in run.pick(
                ("ours", "ours-bucket-20ms", "hello", "nginx", *PEERS), files
            ):
                server = run.lab.start(name, store)
                path = _file_path(server, store)
                shots.append(Shot(server, "10 KB", path, {}))
            volley(run, "download", files, shots)
    _big_download(run)


def _big_download(run: Run) -> None:
    store = big_store(run.lab.work)
    with run.lab.only():
        targets = []
        for name in run.pick(("ours", "nginx", *PEERS), 1):
            if name == "devpi":
                run.note(
                    "devpi: no 200 MB download (it is filled with the small corpus)"
                )
                continue
            server = run.lab.start(name, store)
            path = _file_path(server, store)
            request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
            targets.append((server, request))
        for number, (server, request) in turns(run.rounds + 1, targets):
            value, peak = _timed(run, server, request)
            if number:  # round 0 fills the page cache
                where = ("download", 1, "200 MB")
                run.record(where, server.name, "MB/s", number, value, peak_mib=peak)


def _timed(run: Run, server: Server, *parts: bytes | Path) -> tuple[float, float]:
    """Send a request that moves 200 MB; tell MB/s, and MiB at the peak above idle."""
    run.lab.drain()
    peak, start = Peak(server.process.pid), time.perf_counter()
    status, _ = Wire(server.port).ask(*parts)
    taken = time.perf_counter() - start
    if status != 200:
        raise RuntimeError(f"{server.name}: a request of 200 MB answers {status}")
    return BIG / 1e6 / taken, peak.read()


def _file_path(server: Server, store: Store) -> str:
    if server.name in ("hello", "nginx"):  # both serve what ours does
        return f"/packages/{store.project}/{store.filename}"
    return server.links(store.project)[store.filename]


# ---- Uploads -------------------------------------------------------------------------

BURST = 50


def upload(run: Run) -> None:
    """50 small wheels over one connection, and one wheel of 200 MB."""
    names = run.pick(
        ("ours", "ours-bucket", "sink", "pypiserver", "pypiserver-run", "devpi"), 100
    )
    corpus = run.lab.store(100)
    with run.lab.only():
        servers = [_own_copy(run, name, corpus) for name in names]
        for server in servers:
            _burst(server, "warm")
        for number, server in turns(run.rounds, servers):
            run.lab.drain()
            value = BURST / _burst(server, f"round{number}")
            run.record(
                ("upload", 100, "50 small"), server.name, "uploads/s", number, value
            )
        for number, server in turns(run.rounds, servers):
            _big_upload(run, server, number)


def _own_copy(run: Run, name: str, corpus: Store) -> Server:
    path = corpus.link_to(run.lab.scratch(f"upload-{name}") / "packages")
    ready = "/" if name == "sink" else None
    return run.lab.start(name, replace(corpus, path=path), path=ready)


def _burst(server: Server, tag: str) -> float:
    """Upload five new projects of ten versions; tell the seconds."""
    wheels = [
        make_wheel(f"new-{tag}-{project}", f"1.{version}", payload=b"x" * 1000)
        for project in range(5)
        for version in range(BURST // 5)
    ]
    requests = [upload_request(wheel, server.launch.upload) for wheel in wheels]
    wire, start = Wire(server.port), time.perf_counter()
    for request in requests:
        status, _ = wire.ask(*request)
        if status != 200:
            raise RuntimeError(f"{server.name}: an upload answers {status}")
    taken = time.perf_counter() - start
    wire.close()
    last = wheels[-1]
    if server.name != "sink" and last.filename not in server.links(last.project):
        raise RuntimeError(f"{server.name}: {last.filename} was not stored")
    return taken


def _big_upload(run: Run, server: Server, number: int) -> None:
    wheel = big_wheel(run.lab.work, f"2.{number}")  # each round's is new to the servers
    request = upload_request(wheel, server.launch.upload)
    rate, peak = _timed(run, server, *request)
    run.record(("upload", 100, "200 MB"), server.name, "MB/s", number, rate)
    where = ("upload", 100, "200 MB: peak above idle")
    run.record(where, server.name, "MiB", number, peak)
    _forget_big(server, wheel)


def _forget_big(server: Server, wheel: Wheel) -> None:
    """Remove what was stored: writing 200 MB back to disk would disturb the next."""
    if not server.launch.stored:
        return
    for path in server.launch.stored.rglob("*"):
        if path.is_file() and path.stat().st_size >= len(wheel):
            path.unlink()


# ---- Starting and memory -------------------------------------------------------------


def cold(run: Run) -> None:
    """From starting the processes to the first project page, complete."""
    for files in run.each((100, 10_000, 100_000)):
        store = run.lab.store(files)
        names = run.pick((*OURS, "hello", "nginx", *PEERS), files)
        for number, name in turns(run.rounds + 1, names):
            # Round 0 is not recorded: byte code and page cache get warm.
            _cold(run, name, store, number, "facts known")
            if name == "ours":
                shutil.rmtree(run.lab.own(store) / ".pypi_ae", ignore_errors=True)
                _cold(run, name, store, number, "facts unknown")


def _cold(run: Run, name: str, store: Store, number: int, variant: str) -> None:
    run.lab.drain()
    with run.lab.only():
        server = run.lab.spawn(name, store)
        value = server.wait(server.page(store.project))
    if number:
        run.record(("cold", store.files, variant), name, "s", number, value)


# Every page is asked for once, by servers fast enough: caches grow with what was seen.
VISIT_SECONDS = 20


def memory_(run: Run) -> None:
    """PSS of the process group: idle, after load, after every page was asked for."""
    for files in run.each((10_000,)):
        store = run.lab.store(files)
        names = run.pick((*OURS, "hello", *PEERS), files)
        for number, name in turns(run.rounds, names):
            with run.lab.only():
                _memory(run, name, store, number)


def _memory(run: Run, name: str, store: Store, number: int) -> None:
    server = run.lab.start(name, store)
    _record_memory(run, server, store, "idle", number)
    for path in (server.page(store.project), server.launch.simple):
        wrk(server.url(path), {}, run.seconds)
    _record_memory(run, server, store, "after load", number)
    if name == "hello":  # which knows but one page
        return
    end = time.monotonic() + VISIT_SECONDS
    for project in store.projects:
        server.get(server.page(project))
        if time.monotonic() > end:
            break
    _record_memory(run, server, store, "after every page", number)


def _record_memory(
    run: Run, server: Server, store: Store, when: str, number: int
) -> None:
    run.lab.drain()
    pss, rss = memory(server.process.pid)
    where = ("memory", store.files, when)
    run.record(where, server.name, "MiB PSS", number, pss, rss_mib=rss)


# ---- Passwords -----------------------------------------------------------------------

PASSWORD = "correct horse battery"


def auth(run: Run) -> None:
    """The project page behind Basic auth, with each format of password."""
    store, hashes = run.lab.store(run.each((100,))[0]), _hashes(run)
    known = {"none", "{SHA}", "$apr1$", "$5$", "$6$", "bcrypt"}  # to pypiserver
    with run.lab.only():
        shots = []
        for name in run.pick(("ours", "pypiserver"), store.files):
            for kind, digest in hashes.items():
                if name == "ours" or kind in known:
                    shots.append(_guarded(run, name, store, kind, digest))
        volley(run, "auth", store.files, shots)


def _guarded(run: Run, name: str, store: Store, kind: str, digest: str) -> Shot:
    proof = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {proof}"} if digest else {}
    users = None
    if digest:
        users = run.lab.scratch("users") / "htpasswd"
        users.write_text(f"user:{digest}\n")
    server = run.lab.start(name, store, users=users, path="/health")
    start = time.perf_counter()
    answer = server.get(server.page(store.project), headers)
    taken = (time.perf_counter() - start) * 1000
    assert answer.status == 200, (name, kind, answer)
    if digest and server.get(server.page(store.project)).status != 401:
        raise RuntimeError(f"{name} {kind}: a request without a password passes")
    run.record(("auth", store.files, f"first request, {kind}"), name, "ms", 0, taken)
    return Shot(server, kind, server.page(store.project), headers)


def _hashes(run: Run) -> dict[str, str]:
    """One line's worth of each format, at the cost its usual tool chooses."""
    password, salt = PASSWORD.encode(), b"0123456789abcdef"
    scrypt = hashlib.scrypt(
        password, salt=salt, n=1 << 14, r=8, p=1, maxmem=1 << 26, dklen=32
    )
    pbkdf2 = hashlib.pbkdf2_hmac("sha256", password, salt, 29_000)  # passlib's rounds
    sha1 = base64.b64encode(hashlib.sha1(password).digest()).decode()
    return {
        "none": "",
        "{SHA}": f"{{SHA}}{sha1}",
        "$apr1$": _openssl("-apr1"),
        "$5$": _openssl("-5"),
        "$6$": _openssl("-6"),
        "bcrypt": _bcrypt(run),
        "$scrypt$": f"$scrypt$ln=14,r=8,p=1${_b64(salt)}${_b64(scrypt)}",
        "$pbkdf2-sha256$": f"$pbkdf2-sha256$29000${_ab64(salt)}${_ab64(pbkdf2)}",
    }


def _openssl(kind: str) -> str:
    command = ["openssl", "passwd", kind, "-salt", "saltsalt", PASSWORD]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def _bcrypt(run: Run) -> str:
    # Cost 10 is what the tools of the trade write; htpasswd's own default is 5.
    make = f"bcrypt.hashpw({PASSWORD.encode()!r}, bcrypt.gensalt(10)).decode()"
    code = f"import bcrypt; print({make})"
    command = [str(run.lab.bin("ours") / "python"), "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _ab64(data: bytes) -> str:
    return _b64(data).replace("+", ".")


# ---- Scale ---------------------------------------------------------------------------

REPEATS = 3  # of each operation in a round; their median counts


def scale(run: Run) -> None:
    """Each operation's time, as the repository grows and as one project does."""
    for files in run.each((100, 10_000, 100_000)):
        for scenario, each in (("scale", FILES_PER_PROJECT), ("scale one", files)):
            store = run.lab.store(files, each)
            with run.lab.only():
                for name in run.pick(("ours",), files):
                    server = _own_copy(run, name, store)
                    # Once for nothing: facts are computed, and modules imported.
                    for number in range(run.rounds + 1):
                        _scale(run, scenario, server, store, number)


def _scale(run: Run, scenario: str, server: Server, store: Store, number: int) -> None:
    wire, taken = Wire(server.port), dict[str, list[float]]()
    for repeat in range(REPEATS):
        time.sleep(0.05)  # a folder is not trusted within the tick of its last change
        wire.ask(*_get(server.page(store.project)))
        for name, (request, wanted) in _operations(
            server, store, number * REPEATS + repeat
        ).items():
            start = time.perf_counter()
            status, _ = wire.ask(*request)
            taken.setdefault(name, []).append((time.perf_counter() - start) * 1000)
            if status != wanted:
                raise RuntimeError(f"{name} at {store.files}: {status}")
    wire.close()
    for name, values in taken.items() if number else ():
        where = (scenario, store.files, name)
        run.record(where, server.name, "ms", number, median(values))


def _operations(
    server: Server, store: Store, tag: int
) -> dict[str, tuple[list[bytes | Path], int]]:
    """Each operation's request, and the status it gets."""
    project, upload = store.project, server.launch.upload
    newer, other = make_wheel(project, f"2.{tag}"), make_wheel(f"n{tag}", "1.0")
    page, file = f"/simple/{project}/", f"/packages/{project}/{store.filename}"
    return {
        "page": (_get(page), 200),
        "root page": (_get("/simple/"), 200),
        "project's JSON": (_get(f"/pypi/{project}/json"), 200),
        "all files": (_get("/packages/"), 200),
        "core metadata": (_get(f"{file}.metadata"), 200),
        "download": (_get(file), 200),
        "unknown project": (_get(f"/simple/no{tag}/"), 404),
        "upload to a project": (upload_request(newer, upload), 200),
        "its page then": (_get(page), 200),
        "the same upload again": (upload_request(newer, upload), 200),
        "upload of a new project": (upload_request(other, upload), 200),
        "another's page then": (_get(page), 200),
        "root page then": (_get("/simple/"), 200),
        "removal": (removal_request(newer, upload), 200),
        "its page then again": (_get(page), 200),
    }


def _get(path: str) -> list[bytes | Path]:
    return [f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()]


# ---- Installers ----------------------------------------------------------------------


INSTALLERS = {
    "pip": "{bin}/python -m pip install --isolated --no-cache-dir --no-compile -q"
    " --disable-pip-version-check --index-url",
    "uv": "{bin}/uv pip install --no-config -q --python {bin}/python"
    " --cache-dir {scratch}/cache --default-index",
}


def install(run: Run) -> None:
    """pip and uv install 30 packages with a cold cache.

    uv opens more connections than it uses, and gunicorn's gthread worker gives each new
    one a thread for up to 5 s until it says something: seen as a run 5 or 10 s longer,
    of whatever app, when such connections outnumber threads. Hence 16 of them.
    """
    store = run.lab.store(INSTALLED_FROM)
    names = ("ours", "ours-bucket-20ms", "hello", "nginx", *PEERS)
    clients = run.lab.bin("clients")
    with run.lab.only():
        picked = run.pick(names, store.files)
        servers = [run.lab.start(name, store, threads=16) for name in picked]
        for number, server in turns(run.rounds + 1, servers):
            for client in ("pip", "uv"):
                run.lab.drain()
                value = _install(clients, client, server, store)
                if number:  # round 0 warms the page cache and the installers' byte code
                    where = ("install", store.files, client)
                    run.record(where, server.name, "s", number, value)


def _install(bin: Path, client: str, server: Server, store: Store) -> float:
    # In memory, where there is such a place: a disk's moods are larger than what is
    # to be measured.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        target = Path(scratch, "target")
        parts = INSTALLERS[client].split()
        command = [part.format(bin=bin, scratch=scratch) for part in parts]
        command += [server.url(server.launch.simple), "--target", str(target)]
        # No settings of this machine: they could add indexes.
        env = {"PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch}
        env["PIP_CONFIG_FILE"] = os.devnull
        start = time.perf_counter()
        subprocess.run([*command, *store.projects[:30]], env=env, check=True)
        taken = time.perf_counter() - start
        assert len(list(target.glob("*.dist-info"))) == 30, f"{client} {server.name}"
    return taken


# ---- The bucket ----------------------------------------------------------------------


def calls(run: Run) -> None:
    """The calls to the bucket that each operation costs; counted, not timed."""
    if not run.pick(("ours-bucket",), 600):
        return
    store = run.lab.store(600)
    with run.lab.only():
        server, proxy = run.lab.counted(store)
        _calls(run, server, proxy, store)


def _calls(run: Run, server: Server, proxy: Server, store: Store) -> None:
    page, fresh = server.page(store.project), make_wheel("counted", "1.0")
    upload = upload_request(fresh, server.launch.upload)
    path = f"/packages/{store.project}/{store.filename}"

    def later(path: str) -> None:
        time.sleep(1.2)  # SYNC_SECONDS is 1
        server.get(path)

    steps: dict[str, Callable[[], object]] = {
        "starting": lambda: None,
        "first page": lambda: server.get(page),
        "page at once": lambda: server.get(page),
        "page after SYNC_SECONDS": lambda: later(page),
        "root page": lambda: server.get("/simple/"),
        "root page at once": lambda: server.get("/simple/"),
        "unknown project": lambda: server.get("/simple/no-such-thing/"),
        "core metadata": lambda: server.get(f"{path}.metadata"),
        "core metadata again": lambda: server.get(f"{path}.metadata"),
        "download": lambda: server.get(path),
        "download again": lambda: server.get(path),
        "download after SYNC_SECONDS": lambda: later(path),
        "upload": lambda: Wire(server.port).ask(*upload),
        "same upload again": lambda: Wire(server.port).ask(*upload),
        "page after the upload": lambda: server.get("/simple/counted/"),
    }
    proxy.get("/-/calls")
    for step, act in steps.items():
        act()
        found = json.loads(proxy.get("/-/calls").body)
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.items())
        where = ("calls", store.files, f"{step} ({kinds or 'none'})")
        run.record(where, "ours-bucket", "calls", 0, sum(found.values()), **found)


# What each client is installed in.
HOMES = {"gcs_rest": "ours", "google": "google-cloud-storage", "requests": "ours"}


def gcs(run: Run) -> None:
    """gcs_rest, google-cloud-storage and plain requests against the emulator."""
    big = big_wheel(run.lab.work, newest_version()).data
    assert isinstance(big, Path)
    for number, client in turns(run.rounds + 1, list(HOMES)):
        found = _gcs(run, client, big)
        for what, value in found.items() if number else ():
            variant, _, unit = what.rpartition(", ")
            run.record(("gcs", 0, variant), client, unit, number, value)


def _gcs(run: Run, client: str, big: Path) -> dict[str, float]:
    """Measure one client on an emulator of its own: what it holds makes it slower."""
    with run.lab.only():
        bucket = run.lab.empty_bucket()
        run.lab.drain()
        command = [
            str(run.lab.bin(HOMES[client]) / "python"),
            str(HERE / "gcs_client.py"),
        ]
        command += [client, "bench", str(big), str(run.seconds)]
        env = {"PATH": os.defpath, "STORAGE_EMULATOR_HOST": bucket.url("")}
        env |= {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONPYCACHEPREFIX": str(run.lab.work / "pycache"),
        }
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
        found: dict[str, float] = json.loads(done.stdout)
        return found


SCENARIOS: dict[str, Callable[[Run], None]] = {
    "page": page,
    "root": root,
    "download": download,
    "upload": upload,
    "cold": cold,
    "memory": memory_,
    "auth": auth,
    "scale": scale,
    "install": install,
    "calls": calls,
    "gcs": gcs,
}
