#!/usr/bin/env python3
"""A private Python package index (PyPI) in one file of pure standard library.

    environ -> Request -> route -> authorize -> before -> handler -> after -> Response
                          ROUTES   Users        hooks                hooks
                                                Index.pull           Index.push

Contents. Each part uses those above it; to follow a request, start at the app (15):

     1. Words and errors       the types of checked strings; one error with a status
     2. Settings               one table, one reader: environment or keywords
     3. Names and versions     PEP 503 names, file names, PEP 440 order
     4. Requests and responses what handlers are given and what they give back
     5. Users and passwords    htpasswd files, Basic auth, remembered logins
     6. Archives               core metadata, read out of wheels and sdists
     7. Listings               distributions, their facts, what a page is made of
     8. The index              what is known of a store; the hooks pull and push
     9. A directory            a store on the local disk
    10. A bucket               a store in Cloud Storage, and the cache of its files
    11. Pages                  content negotiation, HTML and JSON
    12. Downloads              ranges, conditions, core metadata
    13. Uploads                the streaming multipart parser, and what is checked
    14. Other answers          JSON API, search, start page, health
    15. Routes and the app     who may do what; the WSGI application; get_app()
    16. Command line           run, passwd, tidy

Three ways, as functions in the order in which they are called, in a bucket (a test
follows them):

    page      respond pull listing look list simple_project page_response render push
    upload    respond pull upload read_form read_core_metadata push create insert
    download  respond pull listing download file_response open read push

Run it:     python pypi_ae.py [run] [DIR] [-p 8080] [-P htpasswd.txt]
            gunicorn 'pypi_ae:get_app()'
Embed it:   from pypi_ae import get_app
            application = get_app(root="packages", users={"ci": hash_password("...")})
Hook it:    app.before.append(f)   f(request): raise HTTPError(status, why) to refuse
            app.after.append(g)    g(request, response): return another response, or
                                   None to keep it; response.changes says what changed

The environment (or the same words in lower case as keywords of get_app):
    LOCAL_PACKAGE_DIRECTORY  where distributions lie, or a bucket's cache   ./packages
                             (/tmp/packages unless TIER is dev)
    TIER                     dev: a directory will do; all else: a bucket   dev
    BUCKET_NAME              the bucket; gcs_rest.py talks to it            none
    REMOTE_PACKAGE_DIRECTORY the prefix in it; without a bucket, the        packages
                             directory that is served
    SYNC_SECONDS             how old a listing of the bucket may be         1
    STALE_SECONDS            the same, while the bucket does not answer     3600
    CACHE_MB                 bound of the local cache of a bucket           100
    PASSWORD_FILE            users, in htpasswd format                      htpasswd.txt
    AUTHENTICATE             actions that need a user: list, download,      update
                             update (anonymous-update if anybody may
                             upload); or "." for none
    FALLBACK_URL             simple index to redirect unknown projects to   none
    PRIVATE_NAMES            glob patterns of names that never fall back    none
    OVERWRITE                may an upload replace a file?                  no
    MAX_UPLOAD_MB            larger uploads get 413; 0: no bound            0, hosted 32
    BEHIND_PROXY             believe X-Forwarded-For, -Host, -Proto, ...?   no
                             (yes on App Engine and Cloud Run)
    HEALTH_ENDPOINT          answers "Ok"                                   /health
    WELCOME_FILE             HTML of the start page                         built in

What it is not: a mirror or cache of another index, a place for documentation, or a
user database; it has no roles beyond the three actions.

Licence: MIT. Origin: the project pypi-ae; __version__ says which release this is.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import filecmp
import fnmatch
import hashlib
import hmac
import html
import io
import json
import logging
import os
import re
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Generic,
    NamedTuple,
    NewType,
    Protocol,
    TypeVar,
)
from urllib.parse import parse_qs, parse_qsl, quote
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment
    from zipfile import ZipFile

    from gcs_rest import Bucket, Object

if sys.version_info < (3, 11):  # noqa: UP036 - anybody may start it with any Python
    why = f"pypi_ae needs Python 3.11 or later; this is {sys.version.split()[0]}."
    raise SystemExit(why) if __name__ == "__main__" else ImportError(why)

__version__ = "1.2.0"
__all__ = ["App", "HTTPError", "Request", "Response", "get_app", "hash_password"]

log = logging.getLogger("pypi_ae")

# ---- 1. Words and errors -------------------------------------------------------------
# Each kind of checked string has a type of its own, which one function makes. Only a
# Filename or a Project is joined to a path. Only Html is sent as markup.

Project = NewType("Project", str)  # a normalised project name (PEP 503): "acme-tools"
Filename = NewType("Filename", str)  # a distribution's name, safe to join to a path
Html = NewType("Html", str)  # markup in which all foreign text is escaped


class HTTPError(Exception):
    """A refusal or a failure: its HTTP status, and a sentence for a person."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = [(name.replace("_", "-"), v) for name, v in headers.items()]


class SettingsError(ValueError):
    """A setting cannot work. The message gives its name, its value and what to do."""


class ArchiveError(ValueError):
    """The core metadata of a wheel or sdist cannot be read. The message says why."""


def quoted(value: str) -> str:
    """A foreign value for a message or a log line: 200 letters of it at most."""
    return repr(value) if len(value) <= 200 else f"{value[:200]!r}..."


# ---- 2. Settings ---------------------------------------------------------------------
# get_app turns its keywords into names of the environment, so that one function checks
# both. A variable that is empty has its default.

DEFAULTS = {
    "LOCAL_PACKAGE_DIRECTORY": "",
    "TIER": "dev",
    "BUCKET_NAME": "",
    "REMOTE_PACKAGE_DIRECTORY": "",
    "SYNC_SECONDS": "1",
    "STALE_SECONDS": "3600",
    # App Engine's smallest class has 384 MB, for the workers, uploads and this cache.
    "CACHE_MB": "100",
    "PASSWORD_FILE": "",
    "AUTHENTICATE": "update",
    "FALLBACK_URL": "",
    "PRIVATE_NAMES": "",
    "OVERWRITE": "no",
    "MAX_UPLOAD_MB": "0",
    "BEHIND_PROXY": "no",
    "HEALTH_ENDPOINT": "/health",
    "WELCOME_FILE": "",
}
YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")
HOSTED = ("GAE_ENV", "K_SERVICE")  # set by App Engine and by Cloud Run
# Google cuts off requests above 32 MB. Our own limit answers with a reason.
HOSTED_DEFAULTS = {"MAX_UPLOAD_MB": "32", "BEHIND_PROXY": "yes"}


class Settings:
    """The checked settings, which nothing changes. Sizes are in bytes; 0: no bound."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read and check all settings; raise SettingsError for one that cannot work."""
        self.hosted = any(name in environ for name in HOSTED)
        defaults = DEFAULTS | HOSTED_DEFAULTS if self.hosted else DEFAULTS
        values = {k: environ.get(k, "").strip() or v for k, v in defaults.items()}
        self.bucket_name = values["BUCKET_NAME"]
        # The prefix in the bucket; without a bucket, the root if it is set.
        self.root, self.remote = _directories(values)
        self.sync_seconds = _number(values, "SYNC_SECONDS")
        self.stale_seconds = _number(values, "STALE_SECONDS")
        self.cache_bytes = int(_number(values, "CACHE_MB") * 1_000_000)
        self.password_file = _password_file(values)
        self.authenticate = _actions(values["AUTHENTICATE"])
        self.fallback_url = _url(values["FALLBACK_URL"])
        self.private_names = tuple(map(normalize, _split(values["PRIVATE_NAMES"])))
        self.overwrite = _yes_or_no(values, "OVERWRITE")
        self.max_upload = int(_number(values, "MAX_UPLOAD_MB") * 1_000_000)
        self.behind_proxy = _yes_or_no(values, "BEHIND_PROXY")
        # On App Engine, X-Forwarded-For ends with an address of its own.
        name = "APPENGINE_USER_IP" if "GAE_ENV" in environ else "FORWARDED_FOR"
        self.address_key = f"HTTP_X_{name}" if self.behind_proxy else "REMOTE_ADDR"
        self.health_endpoint = _endpoint(values["HEALTH_ENDPOINT"])
        self.welcome_file = _file(values, "WELCOME_FILE")
        self.cloud_project = environ.get("GOOGLE_CLOUD_PROJECT", "")


def _directories(values: Mapping[str, str]) -> tuple[Path, str]:
    """Return the local directory and the remote one."""
    tier, bucket = values["TIER"], values["BUCKET_NAME"]
    if tier != "dev" and not bucket:
        need = "it needs a bucket: set BUCKET_NAME, or use TIER=dev for a directory"
        raise _bad("TIER", tier, need)
    if re.search("[:/]", bucket):
        need = "it takes the name alone; REMOTE_PACKAGE_DIRECTORY takes a folder in it"
        raise _bad("BUCKET_NAME", bucket, need)
    default = "packages" if tier == "dev" else "/tmp/packages"
    local = values["LOCAL_PACKAGE_DIRECTORY"]
    remote = values["REMOTE_PACKAGE_DIRECTORY"]
    if not bucket:
        return Path(remote or local or default), remote
    return Path(local or default), remote or "packages"


def _bad(name: str, value: str, rule: str) -> SettingsError:
    return SettingsError(f"{name} is {quoted(value)}; {rule}.")


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _actions(text: str) -> frozenset[str]:
    actions = frozenset(_split(text))
    if actions == {"."}:
        return frozenset()
    known = {"list", "download", "update", "anonymous-update"}
    if not actions <= known or len(actions & {"update", "anonymous-update"}) != 1:
        words = "update (or anonymous-update, if anybody may upload), list and download"
        raise _bad("AUTHENTICATE", text, f'it takes {words}; or "." for no users')
    return actions - {"anonymous-update"}


def _yes_or_no(values: Mapping[str, str], name: str) -> bool:
    if values[name].lower() not in YES + NO:
        raise _bad(name, values[name], "it takes yes or no")
    return values[name].lower() in YES


def _number(values: Mapping[str, str], name: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", values[name], re.ASCII):
        raise _bad(name, values[name], "it takes a number, 0 or more")
    return float(values[name])


def _url(url: str) -> str:
    if url and not re.fullmatch(r"https?://[^\s/?#]+/+[^\s/?#][^\s?#]*", url):
        raise _bad("FALLBACK_URL", url, "it takes an http(s) URL with a path: /simple")
    return url.rstrip("/")


def _endpoint(path: str) -> str:
    free = r"/(?!(simple|packages|pypi|legacy|RPC2)(/|$))[a-z0-9/_-]*[a-z0-9_-]"
    if not re.fullmatch(free, path, re.I | re.ASCII):
        raise _bad("HEALTH_ENDPOINT", path, "it takes a free path such as /health")
    return path


def _file(values: Mapping[str, str], name: str) -> Path | None:
    path = values[name]
    if path and not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise _bad(name, path, "there is no such file, or it cannot be read")
    return Path(path) if path else None


def _password_file(values: Mapping[str, str]) -> Path | None:
    """Return the file of users: as set, or htpasswd.txt here or beside this module.

    The default file need not exist. It is read as soon as it is there.
    """
    if values["PASSWORD_FILE"] == ".":  # as in pypiserver: no passwords
        if values["AUTHENTICATE"] != ".":
            raise SettingsError("-P . (no passwords) also needs -a . (no users).")
        return None
    here = Path("htpasswd.txt").absolute()
    beside = Path(__file__).with_name("htpasswd.txt")
    default = beside if beside.is_file() and not here.is_file() else here
    return _file(values, "PASSWORD_FILE") or default


# ---- 3. Names and versions -----------------------------------------------------------
# A file name is split here into project and version. A name that cannot be split is
# not a distribution: it is never listed, served or stored.

# File names may have 255 bytes. The cache adds a prefix and a suffix, so a name
# gets 215.
_NAME = re.compile(r"[A-Z0-9]([A-Z0-9._-]{0,213}[A-Z0-9])?", re.I | re.ASCII)
_RUNS = re.compile(r"[-_.]+")
_SAFE = re.compile(r"[A-Z0-9][A-Z0-9._+!-]{0,214}", re.I | re.ASCII)
_WHEEL = re.compile(r"([^-]+)-([^-]+)(?:-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl", re.I)
_EGG = re.compile(r"([^-]+)-([^-]+)(?:-py\d[\d.]*(?:-.+)?)?\.egg", re.I)
_SDIST = re.compile(r"(.+)\.(?:tar\.gz|zip|tgz|tar\.bz2|tar\.xz|tar\.Z|tar)", re.I)
_VERSION = re.compile(
    r"""v? (?:(?P<epoch>\d+)!)? (?P<release>\d+(?:\.\d+)*)
    (?:[-_.]? (?P<pre>alpha|a|beta|b|preview|pre|c|rc) [-_.]? (?P<pre_n>\d*))?
    (?P<post>-(?P<post_n>\d+) | [-_.]?(?:post|rev|r)[-_.]?(?P<post_m>\d*))?
    (?P<dev>[-_.]?dev[-_.]?(?P<dev_n>\d*))?
    (?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?""",
    re.X | re.I | re.ASCII,
)
_CLAUSE = re.compile(  # of Requires-Python; pip takes a wildcard after each operator
    rf"\s*(?:===\s*\S+|(?:[~=!<>]=|[<>])\s*{_VERSION.pattern}(?:\.\*)?)?\s*",
    re.X | re.I | re.ASCII,
)
_TWO_WAYS = re.compile(r".+-v?\d.*-v?\d.*\.(?:tar\.gz|tgz|zip)", re.I | re.ASCII)
MAX_VERSION = 200  # letters; a longer one is no version, so that int() stays fast
MAX_PYTHON = 1000  # letters of Requires-Python; each page of a project repeats it
UPLOADABLE = (".whl", ".tar.gz", ".zip")  # wheels and sdists, as PyPI takes them
VersionKey = tuple[Any, ...]  # as version_key() makes it


class Parsed(NamedTuple):
    """A distribution's file name, checked and split."""

    filename: Filename
    project: Project
    version: str


def normalize(name: str) -> str:
    """Normalise a project's name (PEP 503)."""
    return _RUNS.sub("-", name).lower()


def to_project(name: str) -> Project | None:
    """Check and normalise a project's name; None if it is not valid (PEP 508)."""
    return Project(normalize(name)) if _NAME.fullmatch(name) else None


def parse_filename(name: str, project: str = "") -> Parsed | None:
    """Split a distribution's file name (PEP 427, PEP 625, and older forms).

    The name of an old sdist can be split in more than one way. If one of them gives
    `project`, that one is used.
    """
    if not _SAFE.fullmatch(name):
        return None
    parts: Sequence[str] | None = None
    if match := _WHEEL.fullmatch(name) or _EGG.fullmatch(name):
        parts = match.groups()
    elif match := _SDIST.fullmatch(name):
        parts = _split_sdist(match[1], project)
    owner = to_project(parts[0]) if parts else None
    return Parsed(Filename(name), owner, parts[1]) if parts and owner else None


def _split_sdist(stem: str, project: str) -> tuple[str, str] | None:
    """Split name-version at the first hyphen before a valid version, if there is one.

    So beta-1.0-1 is 1.0-1 (1.0.post1) of beta, and not 1 of beta-1.0.
    """
    cuts = [match.start() for match in re.finditer("-", stem)]
    splits = [(stem[:cut], stem[cut + 1 :]) for cut in cuts if stem[cut + 1 :]]
    of_project = [split for split in splits if normalize(split[0]) == project]
    valid = [split for split in splits if _VERSION.fullmatch(split[1])]
    return next(iter(of_project + valid + splits[::-1]), None)


def to_requires_python(text: str) -> str:
    """Requires-Python if it is short, and valid (PEP 440); else ""."""
    valid = len(text) <= MAX_PYTHON and all(map(_CLAUSE.fullmatch, text.split(",")))
    return text if valid else ""


def version_key(version: str) -> VersionKey:
    """Sort key by PEP 440. Equal versions get equal keys; invalid ones sort first."""
    match = _VERSION.fullmatch(version.strip()) if len(version) <= MAX_VERSION else None
    if not match:
        return (False, version)
    part = match.groupdict()
    release = tuple(int(n) for n in part["release"].split("."))
    while len(release) > 1 and not release[-1]:
        release = release[:-1]
    post = int(part["post_n"] or part["post_m"] or 0) if part["post"] else -1
    dev = int(part["dev_n"] or 0) if part["dev"] else float("inf")
    return (True, int(part["epoch"] or 0), release, _pre(part), post, dev, _local(part))


def _pre(part: Mapping[str, str | None]) -> tuple[Any, ...]:
    if letters := part["pre"]:  # alpha < beta < rc; c, pre and preview mean rc
        kind = letters[0].lower()
        return (1, kind if kind in "ab" else "rc", int(part["pre_n"] or 0))
    return (0,) if part["dev"] and not part["post"] else (2,)


def _local(part: Mapping[str, str | None]) -> tuple[Any, ...]:
    segments = re.split(r"[-_.]", (part["local"] or "").lower())
    return tuple((1, int(s), "") if s.isdigit() else (0, 0, s) for s in segments if s)


def is_final(key: VersionKey) -> bool:
    """Is this the key of a version that is neither a pre-release nor a dev release?"""
    return bool(key[0]) and key[3] == (2,) and key[5] == float("inf")


# ---- 4. Requests and responses -------------------------------------------------------
# A Request reads the WSGI environ. A Response is a value: that of a page is made once
# and used many times, so nothing may change it.

Header = tuple[str, str]  # name and value
NOSNIFF: Header = ("X-Content-Type-Options", "nosniff")  # for every answer
CSP = (  # a page runs no script and loads nothing; WELCOME_FILE may have styles
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'none'"
)
OF_PAGES = (("Content-Security-Policy", CSP), ("Referrer-Policy", "same-origin"))
MAX_HOST = 300  # letters; a name has 255, and the JSON API repeats it for each file
MAX_HEADER = 8192  # letters of a header that are read; gunicorn takes no longer one
STATUS = {200: "OK", 301: "Moved Permanently", 302: "Found"}
TEXT = "text/plain; charset=utf-8"
CHUNK = 1 << 20  # bytes per read; gunicorn 27 receives as many, and copies leftovers
SOCKET = "gunicorn.socket"  # the connection, in an environ; serve() sets it too
LINGER = 0.5  # seconds for the rest of a refused body; its thread answers nobody else
SIDECARS = (".metadata", ".yanked")  # of a distribution, by their suffix


class Addition(NamedTuple):
    """A distribution to add; `source` is its staged file."""

    filename: Filename
    project: Project
    version: str
    source: Path
    size: int
    facts: Facts
    uploader: str
    overwrite: bool


class Removal(NamedTuple):
    """A distribution to remove."""

    distribution: Distribution


@dataclass(frozen=True, slots=True)
class Response:
    """Status line, headers, body, and changes: proposed before `push`, then made."""

    status: str
    headers: tuple[Header, ...]
    body: Iterable[bytes] = ()
    changes: tuple[Addition | Removal, ...] = ()


@dataclass(slots=True)
class Request:
    """One request. The path is decoded and below SCRIPT_NAME."""

    environ: WSGIEnvironment
    method: str
    path: str
    started: float  # monotonic seconds
    route: Route | None = None
    project: Project = Project("")  # the one that the path names, if it names one
    args: Mapping[str, str] = field(init=False)  # what else it names
    user: str = ""  # authenticated user, or "" if the action needs none
    listing: Listing = field(init=False)  # set by Index.pull: of the project
    catalog: Catalog = field(init=False)  # set by Index.pull if there is no project
    stale_since: float | None = None  # when they were listed, if they are not current
    unread: int | None = None  # bytes of the body; None: it was not asked for
    behind_proxy: bool = False  # is X-Forwarded-... the word of our own proxy?
    # Called when the request ends.
    cleanup: list[Callable[[], object]] = field(default_factory=list)

    def header(self, name: str) -> str:
        """The value of a header, "" if there is none."""
        name = "HTTP_" + name.upper().replace("-", "_")
        return str(self.environ.get(name, "")[:MAX_HEADER])

    def base_url(self) -> str:
        """The URL of this app as the client sees it, without a slash at the end."""
        environ = self.environ
        scheme = self._forwarded("Proto") or environ["wsgi.url_scheme"]
        host = self._forwarded("Host") or environ.get("HTTP_HOST")
        host = (host or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}")[:MAX_HOST]
        prefix = self._forwarded("Prefix").strip("/")
        path = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1").strip("/")
        return "/".join(filter(None, (f"{scheme}://{host.strip('/')}", prefix, path)))

    def _forwarded(self, what: str) -> str:
        # A proxy in front sets it. The first of several values is the client's.
        value = self.header(f"X-Forwarded-{what}") if self.behind_proxy else ""
        value = value.split(",")[0].strip()
        return value if re.fullmatch(r"[\w.:/\[\]~%-]*", value, re.ASCII) else ""


def connection_of(request: Request) -> Any:
    """The socket of a request, if its server shows it; None if others share it."""
    is_shared = request.environ["SERVER_PROTOCOL"].startswith("HTTP/2")
    return None if is_shared else request.environ.get(SOCKET)


def end_reading(connection: Any) -> None:
    """Let all reads of a socket return; what is to be sent can still be sent."""
    with contextlib.suppress(OSError):  # SSLSocket.shutdown would send in plain text
        socket.socket.shutdown(connection, socket.SHUT_RD)


def answer_early(body: Iterable[bytes], connection: Any) -> Iterator[bytes]:
    """Send an answer while its request still comes, and read that for a moment.

    If a connection is closed while bytes of it are unread, some clients see no answer.
    """
    yield from body
    ends = time.monotonic() + LINGER
    with contextlib.suppress(OSError):  # it is silent, or gone
        connection.settimeout(LINGER / 2)
        while time.monotonic() < ends and connection.recv(CHUNK):
            pass
    end_reading(connection)


def target_of(request: Request) -> tuple[Project | None, str]:
    """The project that a path names and, of a download, the distribution."""
    file = request.args.get("file")
    if not file:
        return request.project or None, ""
    name = distribution_of(file)
    if request.project:
        return request.project, name
    parsed = parse_filename(name)
    return parsed.project if parsed else None, name


def distribution_of(name: str) -> str:
    """The distribution that a sidecar belongs to; any other name as it is."""
    suffix = next(filter(name.endswith, SIDECARS), "")
    return name.removesuffix(suffix)


def text_response(status: int, message: str, *headers: Header) -> Response:
    """A sentence for a person, in the body and, when refusing, in the reason phrase."""
    # twine prints only the reason phrase, so the message goes there.
    reason = STATUS.get(status) or _reason(message)
    body = f"{message}\n".encode()
    return body_response(f"{status} {reason}", TEXT, body, *headers)


def body_response(status: str, kind: str, body: bytes, *headers: Header) -> Response:
    size = ("Content-Length", str(len(body)))
    if kind.startswith("text/html"):
        headers += OF_PAGES
    return Response(status, (*headers, ("Content-Type", kind), size), (body,))


def _reason(message: str) -> str:
    # A reason phrase is latin-1 without control characters (RFC 9112, 4); gunicorn
    # turns anything else into a 500. 400 letters keep any proxy's line limit.
    return one_line(message)[:400].encode("latin-1", "replace").decode("latin-1")


def one_line(text: str) -> str:
    """Text without control characters, so that nobody can add a line to a log."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)


def redirect(location: str, status: int = 302) -> Response:
    """Redirect; a relative location works behind any prefix that a proxy adds."""
    return text_response(status, f"See {location}", ("Location", location))


def relative(path: str, target: str) -> str:
    """The relative URL that leads from one path to another."""
    return "../" * (path.count("/") - 1) + target[1:]


def with_query(path: str, request: Request) -> str:
    query = request.environ.get("QUERY_STRING", "")
    return f"{path}?{quote(query, safe='=&+%/')}" if query else path


def already_exists(request: Request, new: Addition) -> HTTPError:
    # twine knows a duplicate by 400 and this text; uv, poetry and pdm by 409.
    status = 400 if "twine" in request.header("User-Agent") else 409
    why = f"File already exists: {new.filename} is here with other bytes."
    advice = "Raise the version, or start the server with --overwrite."
    if new.overwrite:
        advice = "Others replaced it at the same moment. Try again."
    return HTTPError(status, f"{why} {advice}")


# ---- 5. Users and passwords ----------------------------------------------------------
# The htpasswd file is read again when it changes, and all its lines are checked. One
# table maps each hash format to the function that computes it. The last right login of
# each user is remembered in memory, by a keyed hash, until the file changes. Checks of
# others wait in one short line, so that guesses take neither threads nor memory.

# A check takes 16 MiB (2**14 * 8 * 128 bytes) and about 40 ms. Only one runs at a time.
SCRYPT_LN = 14
MAX_AUTHORIZATION = 4096  # bytes; sha-crypt takes longer for a longer password
# Wrong passwords of one address for one user: ten at once, then one each GUESS_SECONDS.
# Two pairs rarely share a count, as a table of fixed size has 16,384 of them.
GUESSES, GUESS_SECONDS, COUNTS = 10, 6, 1 << 14
MAX_CHECKS = 4  # logins in line for a check; more would hold all threads of a server
MAX_CHECK_SECONDS = 5  # how long a request waits for its check
_ITOA64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

Compute = Callable[..., str]  # (password: bytes, *groups of the pattern) -> digest
Check = Callable[[bytes], bool]


def hash_password(password: str) -> str:
    """Hash a password with scrypt, for an htpasswd line or get_app(users=...)."""
    cost, salt = (str(SCRYPT_LN), "8", "1"), _b64(os.urandom(16))
    digest = _scrypt(password.encode(), *cost, salt, "")
    return "$scrypt$ln={},r={},p={}$".format(*cost) + f"{salt}${digest}"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _scrypt(password: bytes, ln: str, r: str, p: str, salt: str, digest: str) -> str:
    """Compute $scrypt$ as passlib writes it, with a digest of 32 bytes."""
    cost = {"n": 1 << int(ln), "r": int(r), "p": int(p)}
    memory = 128 * cost["r"] * (cost["n"] + cost["p"] + 2) + (1 << 20)  # 1 MiB spare
    raw = base64.b64decode(salt + "==")  # Python takes more padding than it needs
    return _b64(hashlib.scrypt(password, salt=raw, maxmem=memory, dklen=32, **cost))


def _sha1(password: bytes, digest: str) -> str:
    return _b64(hashlib.sha1(password).digest()) + "="


def _bcrypt(password: bytes, digest: str) -> str:
    import bcrypt

    # bcrypt uses 72 bytes of a password. Its package now refuses longer ones.
    return str(bcrypt.hashpw(password[:72], digest.encode()).decode())


def _md5_crypt(password: bytes, magic: str, salt: str, digest: str) -> str:
    """Compute $1$ and $apr1$, as FreeBSD and Apache define them."""
    salted, length = salt.encode(), len(password)
    fill = _fill(hashlib.md5(password + salted + password).digest(), length)
    start = password + f"${magic}$".encode() + salted + fill
    for i in range(length.bit_length()):
        start += b"\0" if length >> i & 1 else password[:1]
    hashed = _stir("md5", start, password, salted, 1000)
    places = [(i, i + 6, i + 12 if i < 4 else 5) for i in range(5)]
    return "".join(_to64(hashed, *p) for p in places) + _to64(hashed, 11)[:2]


def _sha_crypt(password: bytes, kind: str, rounds: str, salt: str, digest: str) -> str:
    """Compute $5$ and $6$ (Drepper, "Unix crypt using SHA-256 and SHA-512")."""
    name = "sha256" if kind == "5" else "sha512"
    salted, length = salt.encode(), len(password)
    first = hashlib.new(name, password + salted + password).digest()
    start = password + salted + _fill(first, length)
    for i in range(length.bit_length()):
        start += first if length >> i & 1 else password
    mixed = hashlib.new(name, start).digest()[0]
    p = _fill(hashlib.new(name, password * length).digest(), length)
    s = _fill(hashlib.new(name, salted * (16 + mixed)).digest(), len(salted))
    hashed = _stir(name, start, p, s, min(max(int(rounds or 5000), 1000), 999_999_999))
    n, turn = len(hashed) // 3, -1 if kind == "5" else 1
    places = [[i + n * ((k + turn * i) % 3) for k in range(3)] for i in range(n)]
    text = "".join(_to64(hashed, *it) for it in places)
    return text + (_to64(hashed, 31, 30)[:3] if kind == "5" else _to64(hashed, 63)[:2])


def _stir(name: str, start: bytes, p: bytes, s: bytes, rounds: int) -> bytes:
    """Hash again and again; `p` and `s` come from the password and the salt."""
    digest = hashlib.new(name, start).digest()
    for i in range(rounds):
        middle = (s if i % 3 else b"") + (p if i % 7 else b"")
        text = p + middle + digest if i & 1 else digest + middle + p
        digest = hashlib.new(name, text).digest()
    return digest


def _fill(digest: bytes, length: int) -> bytes:
    return (digest * (length // len(digest) + 1))[:length]


def _to64(digest: bytes, *places: int) -> str:
    value = int.from_bytes(bytes(digest[i] for i in places), "big")
    return "".join(_ITOA64[value >> 6 * i & 63] for i in range(4))


# A check that needs more than 256 MB would kill the instance. A digest that was cut
# would let wrong passwords in, so each has its full length.
_SCRYPT_COST = r"ln=(1[0-7]|[1-9]),r=(1[0-6]|[1-9]),p=([1-9])"
_SALT = r"((?:[A-Za-z\d+/]{4}){2,20}[A-Za-z\d+/]{2,4})"
_DIGEST = r"\$([./\dA-Za-z]{%d})"  # in crypt's own base64
_SCHEMES: tuple[tuple[str, Compute], ...] = (
    (rf"\$scrypt\${_SCRYPT_COST}\${_SALT}\$([A-Za-z\d+/]{{43}})", _scrypt),
    (r"\{SHA\}([A-Za-z\d+/]{27}=)", _sha1),
    (r"\$(apr1|1)\$([^$]{1,8})" + _DIGEST % 22, _md5_crypt),
    (r"\$(5)\$(?:rounds=(\d{1,7})\$)?([^$]{1,16})" + _DIGEST % 43, _sha_crypt),
    (r"\$(6)\$(?:rounds=(\d{1,7})\$)?([^$]{1,16})" + _DIGEST % 86, _sha_crypt),
    (r"(\$2[abxy]\$(?:0[4-9]|[12]\d|3[01])\$[./\dA-Za-z]{53})", _bcrypt),
)
# The formats that a message may name. Anything else may be a part of a password.
_NAMED = r"\$(scrypt|apr1|sha1|2[abxy]|[156y]|argon2i?d?|pbkdf2-sha\d+)\$|\{S?SHA\}"


def password_check(stored: str, where: str) -> Check:
    """Make the check of one stored hash; raise SettingsError if it cannot be used."""
    again = "set this password again with: python pypi_ae.py passwd FILE USER"
    for pattern, compute in _SCHEMES:
        if match := re.fullmatch(pattern, stored, re.ASCII):
            if compute is _bcrypt and not find_spec("bcrypt"):
                need = "a bcrypt hash needs the package bcrypt"
                raise SettingsError(f"{where}: {need}. pip install bcrypt, or {again}")
            return partial(_matches, compute, match.groups())
    match = re.match(_NAMED, stored, re.ASCII)
    kind = f"{match[0]} hash" if match else "plaintext or DES crypt hash"
    raise SettingsError(f"{where}: this {kind} cannot be used; {again}")


def _matches(compute: Compute, groups: Sequence[str], password: bytes) -> bool:
    return hmac.compare_digest(compute(password, *groups), groups[-1])


class Logins(NamedTuple):
    """The users at one state of their file, and the logins verified since then."""

    state: object
    checks: dict[str, Check]  # by user
    verified: dict[str, bytes]  # keyed hash of the last right login, by user


class Users:
    """Verifies users, from a mapping of user to hash or from an htpasswd file."""

    def __init__(self, source: Mapping[str, str] | Path | None) -> None:
        self._path = source if isinstance(source, Path) else None
        file = self._path or "FILE"
        self.advice = f"Add one with: python pypi_ae.py passwd {file} USER"
        self._secret = os.urandom(32)
        self._paid_until = [0.0] * COUNTS  # monotonic seconds; a failure puts it off
        self._pool = ThreadPoolExecutor(1)  # a check takes 16 MiB or more
        self._running: dict[tuple[bytes, Check], Future[bool]] = {}
        self._lock = threading.Lock()
        users = source.items() if isinstance(source, Mapping) else ()
        checks = {user: password_check(str(h), f"user {user!r}") for user, h in users}
        self._logins = Logins(None, checks, {})
        self.logins()

    def logins(self) -> Logins:
        """Return the users. A file that has changed is read again."""
        if self._path and (state := file_state(self._path)) != self._logins.state:
            # A file that was just written may change again and keep its state.
            known = state and _is_settled(state[1], time.time_ns()) and state
            text = self._path.read_text("utf-8", "replace") if state else ""
            checks = dict(_read_users(text, self._path.name))
            self._logins = Logins(known, checks, {})
        return self._logins

    def verify(self, header: str, address: str) -> str:
        """Return the user of a Basic Authorization header (RFC 7617).

        Raises 401 if the credentials are missing or wrong, 403 if there are no users,
        429 after many wrong passwords, 503 if many logins wait for their check.
        """
        logins = self.logins()
        if not logins.checks:
            raise HTTPError(403, f"This needs a user, but there is none. {self.advice}")
        user, password = _basic(header.encode("latin-1", "replace"))
        login = user.encode() + b":" + password
        key = hashlib.blake2b(login, key=self._secret, digest_size=16).digest()
        if logins.verified.get(user) == key:
            return user
        place, now = hash((self._secret, address, user)) % COUNTS, time.monotonic()
        wait = self._paid_until[place] - now - (GUESSES - 1) * GUESS_SECONDS
        if wait > 0:
            why = "Too many wrong passwords. Try again later."
            raise HTTPError(429, why, Retry_After=str(int(wait) + 1))
        # The same check stands in for every unknown user, and takes its time.
        check = logins.checks.get(user) or next(iter(logins.checks.values()))
        if self._is_right((key, check), password) and user in logins.checks:
            logins.verified[user] = key
            return user
        self._paid_until[place] = max(self._paid_until[place], now) + GUESS_SECONDS
        raise _unauthorized(f"The password for user {quoted(user)} is not right.")

    def _is_right(self, login: tuple[bytes, Check], password: bytes) -> bool:
        """Check a password. Requests with the same login share one check."""
        with self._lock:
            running = {k: it for k, it in self._running.items() if not it.done()}
            if login not in running and len(running) < MAX_CHECKS:
                running[login] = self._pool.submit(login[1], password)
            self._running = running
        try:
            return running[login].result(MAX_CHECK_SECONDS)
        except (KeyError, TimeoutError):
            why = "Too many passwords are being checked. Try again."
            raise HTTPError(503, why, Retry_After="5") from None


def file_state(path: Path | str | int) -> State | None:
    """Return size, mtime and inode of a regular file; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:  # no such file, a loop of links, or a closed folder
        return None
    is_file = stat.S_ISREG(status.st_mode)
    return (status.st_size, status.st_mtime_ns, status.st_ino) if is_file else None


def _is_settled(mtime: int, now: int) -> bool:
    """Would a change after `now` show in this mtime (both in nanoseconds)?

    Linux stamps in ticks of at most 10 ms, FAT and some network file systems in full
    seconds. A second change within one tick does not change the mtime. A time that is
    still to come was set by hand, or by another clock.
    """
    tick = 20_000_000 if mtime % 1_000_000_000 else 2_000_000_000
    return mtime < now - tick or mtime > time.time_ns() + tick


def _read_users(text: str, name: str) -> Iterator[tuple[str, Check]]:
    for number, line in enumerate(text.splitlines(), 1):
        user, colon, stored = line.strip().partition(":")
        if not line.strip() or user.startswith("#"):
            continue
        if not user or not colon:
            raise SettingsError(f"{name}, line {number}: write the line as USER:HASH.")
        yield user, password_check(stored, f"{name}, line {number} (user {user!r})")


def _basic(credentials: bytes) -> tuple[str, bytes]:
    """Split Basic credentials into user and password; raise 401 if that fails."""
    scheme, _, encoded = credentials.partition(b" ")
    try:
        if scheme.lower() != b"basic" or len(credentials) > MAX_AUTHORIZATION:
            raise ValueError
        pair = _text(base64.b64decode(encoded.strip(), validate=True))
        user, password = pair.split(":", 1)
        return user, password.encode()
    except ValueError:  # binascii.Error and UnicodeDecodeError are subclasses
        raise _unauthorized("This needs a user and a password (HTTP Basic).") from None


def _text(sent: bytes) -> str:
    """Decode UTF-8, as uv sends it (RFC 7617), or Latin-1, as pip and twine do."""
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1")


def _unauthorized(message: str) -> HTTPError:
    challenge = 'Basic realm="pypi", charset="UTF-8"'
    return HTTPError(401, message, WWW_Authenticate=challenge)


# ---- 6. Archives ---------------------------------------------------------------------
# Core metadata comes from the distribution itself: METADATA of a wheel, PKG-INFO of an
# sdist. A stranger may have made the archive, so every read is bounded, and a zip that
# two readers may read differently is refused. What archive readers raise becomes
# ArchiveError. An OSError of the source means that the store failed, so it passes
# unchanged.

MAX_METADATA = 4 << 20  # bytes; with a long README, metadata on PyPI has up to 1 MiB
MAX_PIECE = 8 << 20  # bytes of one read; the directory of a zip with 80,000 files
MAX_MEMBERS = 100_000  # of an archive; the largest on PyPI have about 50,000
MAX_EXPANSION = 100  # times its packed size; source text unpacks to 3 to 10 times
MIN_EXPANDED = 64 << 20  # bytes; also a small archive may unpack to this size
# Headers of a tar file that are read: 2,000 take 0.05 s. In a larger file each member
# takes more than 50 bytes, packed.
FREE_HEADERS, HEADER_BYTES = 2000, 50
# Bytes that a tar member may have, by type. An extended header (x, L, K) has a path or
# two. Links, devices and folders (1 to 6) have none: some readers skip them.
MAX_SIZES = dict.fromkeys((b"x", b"L", b"K"), 64 << 10)
MAX_SIZES |= dict.fromkeys((b"1", b"2", b"3", b"4", b"5", b"6"), 0)
MAX_SIZES |= dict.fromkeys((b"0", b"\0", b"7"), 1 << 40)
_RESIZED = re.compile(rb"\d (size|GNU\.sparse\.[^=]*)=")  # in an extended header

_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
_PKG_INFO = re.compile(r"(\./)?(?!\.\.?/)[^/]+/PKG-INFO")
_LEADS_OUT = re.compile(r"/|\w:|(.*/)?\.\.(/|\Z)|.*\\", re.S)  # of its folder
_LOCAL_HEADER = "<4s2x2H8xI4x2H"  # before each member of a zip (APPNOTE, 4.3.7)
_HEAD_END = re.compile(rb"(?:\A|\n)\r?\n")
_FIELD = re.compile(rb"^(name|version|requires-python):(.*)", re.I | re.M)


class CoreMetadata(NamedTuple):
    """The fields of core metadata that an index needs, and all its bytes."""

    name: str
    version: str
    requires_python: str
    text: bytes


class BoundedFile(io.BufferedIOBase):
    """A file that refuses large reads, and reads beyond `end`."""

    def __init__(self, source: IO[bytes], end: int) -> None:
        self._source, self._end = source, end
        self.is_at_hand = isinstance(source, io.IOBase)  # not read in ranges
        self.fault: OSError | None = None  # of the source; zipfile hides some

    def read(self, size: int | None = -1) -> bytes:
        most = MAX_PIECE + 1
        most = most if size is None or size < 0 else min(size, most)
        try:
            data = self._source.read(most)
        except OSError as fault:
            self.fault = fault
            raise
        if len(data) > MAX_PIECE or self._source.tell() > self._end:
            raise ArchiveError("it unpacks to too many bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset <= self._end:
            raise ArchiveError("it refers to bytes beyond its end")
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()


def read_core_metadata(source: IO[bytes], filename: str, size: int) -> CoreMetadata:
    """Read METADATA from a wheel or PKG-INFO from an sdist of `size` bytes.

    Raises ArchiveError if the archive is broken. Errors of `source` pass unchanged.
    """
    file = BoundedFile(source, size)
    try:
        if filename.endswith((".whl", ".zip")):
            name = _METADATA if filename.endswith(".whl") else _PKG_INFO
            return _parse_metadata(_zip_member(file, name))
        return _parse_metadata(_tar_member(file, size))
    except (ArchiveError, MemoryError):
        raise
    except Exception as fault:  # zipfile, tarfile and zlib raise about ten kinds
        if file.fault:
            raise file.fault from None
        raise ArchiveError(f"it cannot be read: {str(fault)[:200]}") from fault


def _zip_member(file: BoundedFile, name: re.Pattern[str]) -> bytes:
    import zipfile  # takes 10 ms; only uploads and new files need it

    archive = zipfile.ZipFile(file)
    if file.is_at_hand:  # else its facts are known, so it was checked before
        _check_zip(file, archive)
    members = [m for m in archive.infolist() if name.fullmatch(m.filename)]
    if len(members) != 1:
        raise ArchiveError(f"it has {len(members)} files like {name.pattern!r}, not 1")
    # Only stored and deflated members: the other methods unpack without a bound.
    if members[0].file_size > MAX_METADATA or members[0].compress_type not in (0, 8):
        raise ArchiveError("its metadata is too large, or packed unusually")
    with archive.open(members[0]) as member:
        return member.read(MAX_METADATA)


def _check_zip(file: BoundedFile, archive: ZipFile) -> None:
    """Refuse a zip that another reader may read differently.

    Its members fill it up to its directory, and only the end record comes after that.
    """
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    starts = [member.header_offset for member in members] + [archive.start_dir]
    count, start = min(len(members), 0xFFFF), min(starts[-1], 0xFFFFFFFF)
    file.seek(-22, io.SEEK_END)
    end = file.read()  # signature, disks, count twice, size and start of the directory
    expected = struct.pack("<4s2HIH", b"PK\5\6", count, count, start, 0)
    if starts[0] or end[:4] + end[8:12] + end[16:] != expected:
        raise ArchiveError("it has bytes before its first record or after its last")
    if not len({member.filename for member in members}) == len(members) <= MAX_MEMBERS:
        raise ArchiveError(f"it has a name twice, or more than {MAX_MEMBERS} members")
    for member, stop in zip(members, starts[1:], strict=True):
        file.seek(member.header_offset)
        head = struct.unpack(_LOCAL_HEADER, file.read(30))
        flags, packed, name_size, extra_size = head[1], *head[3:]
        name = file.read(name_size).decode("utf-8" if flags & 0x800 else "cp437")
        listed = b"PK\3\4", member.flag_bits, member.compress_type, member.orig_filename
        rest = stop - file.tell() - extra_size - member.compress_size
        # With flag 8, the sizes stand behind the data, in one of four forms.
        known = packed in (member.compress_size, 0xFFFFFFFF) and not rest
        fits = rest in (12, 16, 20, 24) if flags & 8 else known
        unsafe = flags & 0x2041 or _LEADS_OUT.match(name)  # the flags: encrypted
        if (*head[:3], name) != listed or not fits or unsafe:
            raise ArchiveError(f"{quoted(name)} in it may be read in two ways")


def _tar_member(packed: BoundedFile, size: int) -> bytes:
    """Read PKG-INFO of an sdist, header by header.

    tarfile itself takes quadratic time for some extended headers.
    """
    import gzip
    import tarfile

    unpacked: Any = gzip.GzipFile(fileobj=packed)
    file = BoundedFile(unpacked, max(MIN_EXPANDED, MAX_EXPANSION * size))
    renamed = False  # Does an extended header give another name to the next member?
    for _ in range(min(MAX_MEMBERS, FREE_HEADERS + size // HEADER_BYTES)):
        header = file.read(512)
        if not any(header):  # the end
            break
        member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        start, kind = file.tell(), member.type
        text = file.read(member.size) if kind in (b"x", b"L") else b""
        if not 0 <= member.size <= MAX_SIZES.get(kind, -1) or _RESIZED.search(text):
            raise ArchiveError(f"it has an unusual member, of type {kind!r}")
        is_wanted = _PKG_INFO.fullmatch(member.name) and member.size <= MAX_METADATA
        if is_wanted and not renamed and kind not in b"xLK":
            return file.read(member.size)
        renamed = kind == b"L" or b" path=" in text or (renamed and kind in b"xK")
        file.seek(start + (member.size + 511 & -512))
    raise ArchiveError("it has no PKG-INFO that can be read")


def _parse_metadata(text: bytes) -> CoreMetadata:
    """Read the header fields of core metadata (RFC 822 style, UTF-8).

    Only a line feed ends a line: other control characters may stand in a Summary.
    """
    fields: dict[bytes, str] = {}
    for match in _FIELD.finditer(_HEAD_END.split(text, 1)[0]):
        fields.setdefault(match[1].lower(), match[2].decode("utf-8", "replace").strip())
    name, version = fields.get(b"name"), fields.get(b"version")
    if not name or not version:
        raise ArchiveError("its metadata has no Name or no Version")
    return CoreMetadata(name, version, fields.get(b"requires-python", ""), text)


# ---- 7. Listings ---------------------------------------------------------------------
# These are values: a Distribution is one file with its facts, a Listing has the files
# of one project, a Catalog the names of all projects. Each keeps what was rendered from
# it, so a page is rendered once, and the line of a file as well.

FILES_KEPT = 10_000  # distributions in the listings that are kept: 20 to 45 MB
ADDRESS = 16  # hex digits of a digest in a URL; nobody meets the same by chance
NAMES_KEPT = 50_000  # file names; they take 15 MB
METADATA_KEPT = 4 << 20  # bytes of core metadata and keys: some 500 wheels

Answer = tuple["Response", "Response"]  # in full, and 304
State = tuple[int, ...]  # of a file: size, mtime_ns, inode; of an object: generations
T = TypeVar("T")


class Facts(NamedTuple):
    """What is read from the bytes of a distribution. Digests in hex; "" for none."""

    sha256: str
    requires_python: str = ""
    core_metadata: str = ""  # sha256 of the bytes that <file>.metadata answers


def facts_from(filename: str, sha256: str, metadata: CoreMetadata) -> Facts:
    is_wheel = filename.endswith(".whl")  # PEP 658 is for wheels
    digest = hashlib.sha256(metadata.text).hexdigest() if is_wheel else ""
    return Facts(sha256, to_requires_python(metadata.requires_python), digest)


def sha256_of(file: BinaryIO) -> str:
    """The digest of a file from where it stands to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def read_facts(source: Any, filename: str, size: int, sha256: str) -> Facts:
    """Read core metadata of a distribution with this digest, if it has any."""
    if not filename.endswith((*UPLOADABLE, ".tgz")):
        return Facts(sha256)
    try:
        return facts_from(filename, sha256, read_core_metadata(source, filename, size))
    except ArchiveError:
        return Facts(sha256)


@dataclass(frozen=True, eq=False)
class Distribution:
    """One wheel or sdist as an index page shows it; two are never equal."""

    filename: Filename
    project: Project
    version: str
    size: int  # bytes
    uploaded: float  # POSIX seconds
    facts: Facts
    yanked: str | None  # the reason, which may be ""; None: not yanked
    path: str  # of the file, or the name of the object
    state: State  # changes when its bytes do
    loose: bool  # it lies in the root, not in its project's folder
    md5: str = ""  # hex; Cloud Storage knows it of objects that were copied in
    lines: dict[str, str] = field(default_factory=dict)  # of pages, by content type

    @cached_property
    def key(self) -> VersionKey:
        """The sort key of its version."""
        return version_key(self.version)

    @property
    def url(self) -> str:
        """Its address below the root of this app: with other bytes it is another."""
        digest = (self.facts.sha256 or self.md5)[:ADDRESS]
        folder = f"packages/{self.project}/{digest}".rstrip("/")
        return f"{folder}/{quote(self.filename)}"

    def has_digest(self, start: str) -> bool:
        """Does a digest of it start so? Its sha256 may be younger than a link to it."""
        return any(each.startswith(start) for each in (self.facts.sha256, self.md5))

    @property
    def hashes(self) -> dict[str, str]:
        """Its sha256, else its md5, in hex, by its name; {} if neither is known."""
        if self.facts.sha256:
            return {"sha256": self.facts.sha256}
        return {"md5": self.md5} if self.md5 else {}

    @property
    def tag(self) -> str:
        """Its entity tag. The same bytes have the same tag on every instance."""
        return f'"{self.facts.sha256 or self.md5 or self.state[0]}"'


class Listing:
    """The distributions of one project, in the order of their versions."""

    def __init__(self, project: Project, dists: Iterable[Distribution]) -> None:
        self.project = project
        self.dists = sorted(dists, key=lambda dist: (dist.key, dist.filename))
        self.by_name: dict[str, Distribution] = {d.filename: d for d in self.dists}
        self.answers: dict[tuple[str, bool], Answer] = {}

    def versions(self) -> dict[VersionKey, str]:
        """Each version once (PEP 700), oldest first. 1.0 and 1.0.0 are the same."""
        names: dict[VersionKey, str] = {}
        for dist in self.dists:
            names.setdefault(dist.key, dist.version)
        return names


class Place(NamedTuple):
    """Where the files of a project lie, as a look at the root shows it."""

    folders: tuple[str, ...] = ()  # names; a directory may have several spellings
    # Loose files by name. The listing of a bucket has their facts, that of a directory
    # only their names.
    loose: Mapping[str, Distribution | None] = MappingProxyType({})


class Catalog:
    """The names of all projects, and where their files lie."""

    def __init__(self, places: Mapping[Project, Place]) -> None:
        self.places = places
        self.projects = sorted(places)
        self.answers: dict[tuple[str, bool], Answer] = {}


def make_catalog(
    folders: Mapping[Project, tuple[str, ...]],
    loose: Mapping[Project, Mapping[str, Distribution | None]],
) -> Catalog:
    names = folders.keys() | loose.keys()
    return Catalog({n: Place(folders.get(n, ()), loose.get(n, {})) for n in names})


class BoundedCache(Generic[T]):
    """Values by key. The sum of their sizes is bounded; the oldest are dropped first.

    One value that is larger than the bound is kept beside the others: it neither pushes
    them out nor is pushed out by them.
    """

    def __init__(self, bound: int) -> None:
        self._bound, self._total = bound, 0  # in the unit that `size` has
        self._values: dict[Hashable, tuple[T, int]] = {}
        self._large: dict[Hashable, T] = {}  # one at most
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        cached = self._values.get(key)
        return cached[0] if cached else self._large.get(key)

    def keep(self, key: Hashable, value: T, size: int) -> None:
        with self._lock:
            self._drop(key)
            if size > self._bound:
                self._large = {key: value}
                return
            self._large.pop(key, None)
            self._values[key] = value, size
            self._total += size
            while self._total > self._bound:
                self._drop(next(iter(self._values)))

    def _drop(self, key: Hashable) -> None:
        self._total -= self._values.pop(key, (None, 0))[1]


# ---- 8. The index --------------------------------------------------------------------
# An Index knows what lies in a Store, which is a directory or a bucket. `pull`, a hook
# before each request, puts on it the listing or the catalog that it reads. A handler
# proposes changes in its response. `push`, a hook after it, commits them before the
# answer is sent: it tries first, and looks at the store only if the name is taken.

LOCKS = 64  # shared by all projects; two busy projects seldom have the same lock
TRIES = 3  # an upload that loses a race is tried again; three losses are an error
TAIL = 256 << 10  # bytes; nearly every wheel has its .dist-info in its last 256 KiB
SLOTS = 8  # of the 16 threads that the README recommends; the others need no bucket
PATIENCE = 1.0  # seconds; a list call takes 0.1, or 1 for 10,000 names
PAUSE, PAUSE_MOST = 1.0, 30.0  # seconds without a call after a failure; they double

Mark = tuple[int, int]  # of a path: mtime_ns, number of links
Body = BinaryIO | Iterator[bytes]  # an unbuffered file at its start, or the bytes


class Look(NamedTuple, Generic[T]):
    """One reading of a store: what was found, and how long to believe it.

    Moments are monotonic seconds. A change of a mark ends the belief at once. While the
    bucket does not answer, a look still serves what it has, for STALE_SECONDS.
    """

    found: T
    marks: Mapping[str, Mark]  # by path; read before the store is read
    until: float  # when to stop believing that what was found is there
    sure: float  # when to stop believing that nothing else is there
    place: Place = Place()  # of a project
    began: float = 0.0  # when a bucket was asked
    stale: bool = False  # it serves, but is not current


Last = Look[Listing] | None  # the last look; what has not changed is kept from it
FindRoot = Callable[[], Look[Catalog]]  # returns a current look at the root


def is_current(look: Look[Any], began: float, *, denies: bool = False) -> bool:
    """May a look serve a request that began then or, if it `denies`, refuse it?"""
    if began >= (look.sure if denies else look.until):
        return False
    for path, mark in look.marks.items():  # noqa: SIM110 - all() is slower here
        if read_mark(path) != mark:
            return False
    return True


def read_marks(paths: Iterable[str]) -> dict[str, Mark]:
    return {path: read_mark(path) for path in paths}


def read_mark(path: str) -> Mark:
    """Return numbers that change when a file, or the names in a folder, change.

    Most file systems count the folders in a folder as its links. So a new folder shows
    even if the clock has not ticked.
    """
    try:
        state = os.stat(path)
    except OSError:  # it is not there, or cannot be looked at
        return 0, 0
    return state.st_mtime_ns, state.st_nlink


class Away(OSError):  # noqa: N818 - it says what happened, as gcs_rest's errors do
    """The bucket did not answer, or is not asked now. The log has the reason."""


class Gate:
    """Who may ask a bucket now, and who may wait for it.

    After a list call has failed, nothing is asked for a pause. Then one list call is
    tried. If that fails, too, the next pause is twice as long; a success ends it.
    """

    def __init__(self) -> None:
        self.slow = False  # a list call failed or took PATIENCE; none succeeded since
        self._slots, self._lock = threading.Semaphore(SLOTS), threading.Lock()
        self._pause = self._retry_at = 0.0  # seconds; no pause: the bucket is well

    def patience(self) -> float:
        """How long may somebody wait who has an old listing to serve?"""
        tries = self._pause > 0 and time.monotonic() >= self._retry_at
        return PATIENCE if tries or not self.slow else 0.0

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Be one of those who wait for the bucket; raise Away if they are too many."""
        paused, patience = time.monotonic() < self._retry_at, not self.slow and PATIENCE
        if paused or not self._slots.acquire(timeout=patience):
            raise Away("The bucket does not answer.")
        try:
            yield
        finally:
            self._slots.release()

    @contextlib.contextmanager
    def list_call(self) -> Iterator[None]:
        """Learn from a list call how the bucket is; raise Away if it fails."""
        with self._lock:
            now = time.monotonic()
            if now < self._retry_at:
                raise Away("The bucket does not answer.")
            self._pause = min(2 * self._pause, PAUSE_MOST)
            self._retry_at = now + self._pause  # for others, while this one tries
        try:
            yield
        except OSError as fault:
            with self._lock:
                if not self._pause:
                    log.error("%s. Only what is known is served now.", fault)
                self.slow, self._pause = True, self._pause or PAUSE
                self._retry_at = time.monotonic() + self._pause
            raise Away("The bucket does not answer.") from fault
        if self._pause:
            log.warning("The bucket answers again.")
        self.slow, self._pause, self._retry_at = False, 0.0, 0.0


class Store(Protocol):
    """Where distributions lie for good. Only an Index calls it.

    It raises an OSError for what it cannot do now. The app answers that with 503.
    """

    staging: Path  # a folder for uploads in progress

    def stage(self, size: int) -> BinaryIO:
        """Open a new file for an upload of so many bytes."""

    @property
    def gate(self) -> Gate | None: ...  # None: it answers at once, as a disk does
    def look_at_root(self, last: Look[Catalog] | None) -> Look[Catalog]: ...
    def look(self, project: Project, find_root: FindRoot, last: Last) -> Look[Listing]:
        """List a project. Distributions that have not changed are kept from `last`."""

    def look_at_all(self, root: Look[Catalog]) -> Look[list[Parsed]]:
        """List every distribution, without its facts."""

    def iter_dists(self, catalog: Catalog) -> Iterator[Distribution]:
        """Every distribution. One that is both loose and in its folder comes twice."""

    def open(self, dist: Distribution, start: int, stop: int) -> Body:
        """Read bytes [start, stop).

        Raises FileNotFoundError if the file is no longer as it was listed.
        """

    def create(self, new: Addition, old: Distribution | None, place: Place) -> None:
        """Store a staged file atomically. It replaces `old`, if that is given.

        Raises FileExistsError if another file has that name.
        """

    def delete(self, dist: Distribution) -> None:
        """Remove a distribution; FileNotFoundError if it is gone.

        A bucket raises FileExistsError if it is another one by now.
        """

    def move_home(self, dist: Distribution) -> None:
        """Move a loose file to its project's folder, which may have a copy of it.

        Raises FileExistsError if other bytes are there.
        """


class Index:
    """What is known of a store, and the only way to change it.

    Who waits for whom, at a bucket: one thread looks at a project, or at the root, and
    others who need that look wait for it. Who has nothing to serve waits to the end, in
    one of the SLOTS of the gate, and fails if that look fails. Who has a last look
    waits for PATIENCE, or not at all if the bucket is slow already, and then serves
    it, while the new look is taken in a thread of the pool.
    """

    def __init__(self, store: Store, stale_seconds: float = 0.0) -> None:
        self.store, self._stale_seconds = store, stale_seconds
        self.open = store.open
        self._slot = store.gate.slot if store.gate else contextlib.nullcontext
        self._root: Look[Catalog] | None = None
        self._looks: BoundedCache[Look[Listing]] = BoundedCache(FILES_KEPT)
        self._metadata: BoundedCache[bytes] = BoundedCache(METADATA_KEPT)
        self._names: Look[list[Parsed]] | None = None
        self._root_lock, self._names_lock = threading.Lock(), threading.Lock()
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._pool, self._lock = ThreadPoolExecutor(SLOTS), threading.Lock()
        # The looks that are taken there, by project; "" is the root.
        self._flights: WeakValueDictionary[str, Future[Any]] = WeakValueDictionary()

    # Before a request...

    def pull(self, request: Request) -> None:
        """Put on a request what it reads: its project's listing, or the catalog."""
        action = request.route.action if request.route else None
        if not action:
            return  # redirects and the start page read neither
        project, filename = target_of(request)
        if project:
            look: Look[Any] = self.listing(project, request.started, filename)
            request.listing = look.found
        else:
            look = self.catalog(request.started, denies=action == "list")
            request.catalog = look.found
        if look.stale:
            request.stale_since = look.began

    def listing(self, project: Project, began: float, name: str = "") -> Look[Listing]:
        """The look at a project, or a file of it, for a request that began then."""
        last = self._looks.get(project)
        if last and _serves(last, began, name):
            return last
        take = partial(self._look_once, project, name, began)
        has = last and _has(last, name)
        return self._wait(project, take, last if has else None, began)

    def catalog(self, began: float, *, denies: bool = True) -> Look[Catalog]:
        """The look at the root for a request that began then, and may show it all."""
        root = self._root
        if root and is_current(root, began, denies=denies):
            return root
        take = partial(self.root, began, denies=denies)
        return self._wait("", take, root if denies else None, began)

    def _wait(
        self, key: str, take: Callable[[], Look[T]], last: Look[T] | None, began: float
    ) -> Look[T]:
        """Take a look, or serve the last one if that fails or takes long."""
        gate = self.store.gate
        patience = gate.patience() if gate else 0.0
        if last and began >= last.began + self._stale_seconds:
            last = None
        if not gate or (last and not is_current(last, 0.0)):
            last = None  # a change that was made here has to show
        try:
            if gate and last:
                with self._lock:
                    flight = self._flights.get(key)
                    if not flight or flight.done():
                        self._flights[key] = flight = self._pool.submit(take)
                flight.result(patience)
            with self._slot():
                return take()
        except OSError as fault:
            if gate and patience and isinstance(fault, TimeoutError):
                gate.slow = True
            if not last:
                raise
            return last._replace(stale=True)

    def _look_once(self, project: Project, name: str, began: float) -> Look[Listing]:
        with self._locks[hash(project) % LOCKS]:
            last = self._looks.get(project)
            if last and _serves(last, began, name):
                return last
            return self._look(project, began, last)

    def look_again(self, project: Project) -> Listing:
        """List a project now, whatever is known of it."""
        with self._slot(), self._locks[hash(project) % LOCKS]:
            last = self._looks.get(project)
            expired = last and last._replace(until=0.0)
            return self._look(project, time.monotonic(), expired).found

    def _look(self, project: Project, began: float, last: Last) -> Look[Listing]:
        find_root: FindRoot = partial(self._root_for, project, began)
        if self._root is None:  # a cold start: both lists of a bucket side by side
            find_root = self._pool.submit(find_root).result
        elif project not in find_root().found.places:
            return Look(Listing(project, ()), {}, 0.0, 0.0)
        look = self.store.look(project, find_root, last)
        self._looks.keep(project, look, 1 + len(look.found.dists))
        return look

    def _root_for(self, project: Project, began: float) -> Look[Catalog]:
        """The look at the root that the page of a project needs.

        It may be older than the page, unless it denies a project or has loose files.
        """
        root = self.root(began)
        place = root.found.places.get(project)
        uncertain = (not place or place.loose) and began >= root.sure
        return self.root(began, denies=True) if uncertain else root

    def root(self, began: float, *, denies: bool = False) -> Look[Catalog]:
        """The look at the root for a request that began then, and may deny names."""
        root = self._root
        if root and is_current(root, began, denies=denies):
            return root
        with self._root_lock:
            last = self._root
            if last and is_current(last, began, denies=denies):
                return last
            self._root = root = self.store.look_at_root(last)
            if last and last.found.projects == root.found.projects:
                root.found.answers = last.found.answers  # rendered pages
            return root

    # What handlers read...

    def names(self, began: float) -> Sequence[Parsed]:
        """Every distribution, for a request that began then."""
        with self._slot(), self._names_lock:
            look = self._names
            if not look or not is_current(look, began):
                look = self.store.look_at_all(self.root(began, denies=True))
                self._names = look if len(look.found) <= NAMES_KEPT else None
            return look.found

    def count(self) -> int:
        """The projects that are known now, without a look at the store."""
        return len(self._root.found.projects) if self._root else 0

    def core_metadata(self, dist: Distribution) -> bytes:
        """METADATA of a wheel. It is read from the end: one ranged read, rarely two."""
        digest = dist.facts.core_metadata
        text = self._metadata.get(digest)
        if text is None:
            source: Any = RangedFile(dist.size, partial(self._read, dist))
            try:
                text = read_core_metadata(source, dist.filename, dist.size).text
            except ArchiveError as fault:  # it was read once, so it came damaged now
                raise OSError(f"{dist.filename} cannot be read: {fault}") from fault
            if hashlib.sha256(text).hexdigest() == digest:  # else it was set wrongly
                self._metadata.keep(digest, text, 500 + len(text))
        return text

    def _read(self, dist: Distribution, start: int, stop: int) -> bytes:
        body = self.open(dist, start, stop)
        chunks = slice_of(body, stop - start) if isinstance(body, io.IOBase) else body
        return b"".join(chunks)

    # After a request...

    def push(self, request: Request, response: Response) -> Response | None:
        """Commit the changes that a response proposes, and answer what was done."""
        if not response.changes:
            return None
        done: list[Addition | Removal] = []
        for change in response.changes:
            if isinstance(change, Removal):
                dist = change.distribution
                with contextlib.suppress(FileNotFoundError):  # another request did it
                    self.store.delete(dist)
                outcome = f"{dist.project} {dist.version} is removed."
            elif self._add(request, change):
                outcome = f"{change.filename} is stored."
            else:
                outcome = f"{change.filename} was here already."
                continue
            done.append(change)
        return replace(text_response(200, f"OK: {outcome}"), changes=tuple(done))

    def _add(self, request: Request, new: Addition) -> bool:
        """Store a distribution; False if the same bytes are there already."""
        existing, catalog = None, request.catalog
        for _ in range(TRIES):
            place = catalog.places.get(new.project, Place())
            try:
                self.store.create(new, existing, place)
                return True
            except FileExistsError:
                existing = self.look_again(new.project).by_name.get(new.filename)
            if existing and has_bytes(existing, new.facts.sha256, new.source):
                return False
            if existing and not new.overwrite:
                break
            catalog = self.root(time.monotonic(), denies=True).found
        raise already_exists(request, new)

    def tidy(self, *, dry_run: bool) -> Iterator[str]:
        """Compute missing facts, move loose files home, and say what is done."""
        catalog = self.root(time.monotonic(), denies=True).found
        dists = list(self.store.iter_dists(catalog))
        at_home = {dist.filename: dist for dist in dists if not dist.loose}
        for dist in dists:
            if not dist.facts.sha256:  # in a bucket; to read it writes its facts
                yield f"facts of {dist.filename}"
                for _ in () if dry_run else self.open(dist, 0, dist.size):
                    pass
            if not dist.loose:
                continue
            existing = at_home.get(dist.filename)
            same = not existing or _have_same_bytes(existing, dist)
            if same and not dry_run:
                try:
                    self.store.move_home(dist)
                except FileExistsError:  # it came since, or is no distribution
                    same = False
            arrow = "->" if same else "stays: other bytes are at"
            yield f"{dist.filename} {arrow} {dist.project}/{dist.filename}"


def _serves(look: Look[Listing], began: float, filename: str) -> bool:
    """May a look serve this request, or deny the file or project that it asks for?"""
    return is_current(look, began, denies=not _has(look, filename))


def _has(look: Look[Listing], filename: str) -> bool:
    return filename in look.found.by_name if filename else bool(look.found.dists)


def has_bytes(dist: Distribution, sha256: str, source: Path) -> bool:
    """Has a distribution the bytes of a file, whose sha256 is known?"""
    if dist.facts.sha256:
        return dist.facts.sha256 == sha256
    with open(source, "rb") as file:
        return dist.md5 == hashlib.file_digest(file, "md5").hexdigest()


def _have_same_bytes(one: Distribution, other: Distribution) -> bool:
    digests = ((one.facts.sha256, other.facts.sha256), (one.md5, other.md5))
    return one.size == other.size and any(a and a == b for a, b in digests)


def relist(project: Project, dists: Iterable[Distribution], last: Last) -> Listing:
    """Return the last listing if it has the same distributions, else a new one."""
    listing = Listing(project, dists)
    return last.found if last and last.found.dists == listing.dists else listing


class RangedFile:
    """A file that is read in ranges, its end first, as zipfile does it."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch = size, fetch
        self._at, self._start, self._window = 0, size, b""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        if not self._start <= self._at <= stop <= self._start + len(self._window):
            self._start = min(self._at, max(0, self._size - TAIL))
            end = min(max(stop, self._start + TAIL), self._size)
            self._window = self._fetch(self._start, end)
        data = self._window[self._at - self._start : stop - self._start]
        self._at += len(data)
        return data


def slice_of(file: io.IOBase, length: int) -> Iterator[bytes]:
    with file:
        while length > 0 and (chunk := file.read(min(CHUNK, length))):
            length -= len(chunk)
            yield chunk


# ---- 9. A directory ------------------------------------------------------------------
#     <root>/<project>/<filename>   what uploads make
#     <root>/<filename>             loose files: listed and served, not uploaded
#     <root>/.pypi_ae/              uploads in progress, and facts; may be deleted
# A look is believed while the times of the root and of the project's folders stay as
# they were, for a second or, if the look was slow, ten times as long as it took. If
# only folders came to the root, only these are looked at; all are, every 30 seconds.
# Facts are computed once per file and kept as JSON lines, keyed by name, size, mtime
# and inode: another start or another worker does not compute them again.

LOOK_SECONDS = 1.0  # a file rewritten in place does not change its folder's time
LOOK_SHARE = 0.1  # at most 10 % of the time is spent on scanning
LOOK_MOST = 30.0  # seconds; a look may be slow for other reasons, or miss a change
IDLE_SECONDS = 600  # another machine, whose processes we do not see, may write here
ABANDONED_SECONDS = 86_400  # a clock seldom jumps so far, and no upload takes so long
RUN = os.urandom(4).hex()  # another process may get the number of this one later

FactsKey = tuple[Any, ...]  # filename, size, mtime_ns, inode


class Directory:
    """Distributions in a local directory."""

    gate: Gate | None = None

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        make_folder(self.root)
        self.staging = self.root / ".pypi_ae" / "staging"
        self._real = os.path.realpath(self.root)
        self._facts = FactsFiles(self.root / ".pypi_ae" / "facts")
        self._names: set[str] = set()  # in the root, at the last look
        self._left_out: set[str] = set()  # paths that a log line has told of
        self._scan_until = 0.0  # when all of them are looked at again
        self._empty: dict[str, Mark] = {}  # folders without files

    # Looking...

    def look_at_root(self, last: Look[Catalog] | None) -> Look[Catalog]:
        now, began, root = time.time_ns(), time.monotonic(), str(self.root)
        marks, names, known = read_marks([root]), set(os.listdir(root)), self._names
        new = {n: to_project(n) or Project("") for n in names - known if known}
        recent = last and known and known <= names and began < self._scan_until
        recent = recent and read_marks(self._empty) == self._empty
        if last and recent and all(new[n] and _is_folder(f"{root}/{n}") for n in new):
            places = dict(last.found.places)
            for name, project in new.items():
                folders, loose = places.get(project, Place())
                places[project] = Place((*folders, name), loose)
            catalog = Catalog(places)
        else:
            catalog, self._scan_until = self._scan_root(), began + LOOK_MOST
        self._names, marks = names, marks | self._empty
        settled = all(_is_settled(mark[0], now) for mark in marks.values())
        until = self._scan_until if settled else began
        return Look(catalog, marks, until, until)

    def _scan_root(self) -> Catalog:
        self._empty = {}
        folders: dict[Project, tuple[str, ...]] = {}
        loose: dict[Project, dict[str, None]] = {}
        for entry in filter(self._is_served, os.scandir(self.root)):
            if entry.is_dir():
                project = to_project(entry.name)
                if project and not self._is_empty(entry.path):
                    folders[project] = (*folders.get(project, ()), entry.name)
            elif parsed := _parse_loose(distribution_of(entry.path)):
                loose.setdefault(parsed.project, {})[entry.name] = None
        return make_catalog(folders, loose)

    def _is_empty(self, folder: str) -> bool:
        """A folder without files, such as a crash may leave, is no project."""
        mark = read_mark(folder)  # a file that comes changes it, but not the root
        with contextlib.suppress(OSError), os.scandir(folder) as names:
            if next(names, None) is None:
                self._empty[folder] = mark
                return True
        return False

    def _is_file(self, entry: os.DirEntry[str]) -> bool:
        plain = entry.is_file(follow_symlinks=False)  # costs nothing, as most are
        return plain or (self._is_served(entry) and entry.is_file())

    def _is_served(self, entry: os.DirEntry[str]) -> bool:
        """Is it a file, or a folder that can be read? Links may not lead elsewhere."""
        why = ""
        with contextlib.suppress(OSError):  # a loop of links, say
            if entry.is_symlink() and not self._is_inside(entry.path):
                why = f"it leads out of {self.root}"
            elif entry.is_dir() and not os.access(entry.path, os.R_OK | os.X_OK):
                why = "it cannot be read"
            else:
                return entry.is_file() or entry.is_dir()
        if why and entry.path not in self._left_out:  # once, not with each scan
            self._left_out.add(entry.path)
            log.warning("%s is left out, as %s", entry.path, why)
        return False

    def look(self, project: Project, find_root: FindRoot, last: Last) -> Look[Listing]:
        root, now, began = find_root(), time.time_ns(), time.monotonic()
        place = root.found.places.get(project, Place())
        # Marks are read first, so that a change during the look is not missed.
        own = read_marks(self._folders(project, place))
        marks = {**root.marks, **own}
        believed = last and began < last.until and last.place == place
        if last and believed and own.items() <= last.marks.items():
            return last._replace(marks=marks)  # only other projects changed
        files: dict[str, str] = {}
        for path in self._paths(project, place):  # of one name, the first folder's
            files.setdefault(_base(path), path)
        states = _states_of(files.values())
        dists = list(self._describe(project, states, last, now))
        times = [mark[0] for mark in marks.values()]
        times += [state[1] for state in states.values()]
        settled = all(_is_settled(mtime, now) for mtime in times)
        ended = time.monotonic()
        trust = min(max(LOOK_SECONDS, (ended - began) / LOOK_SHARE), LOOK_MOST)
        until = ended + trust if settled else began
        return Look(relist(project, dists, last), marks, until, until, place)

    def _folders(self, project: Project, place: Place) -> list[str]:
        """The project's folder first, then folders with other spellings of its name."""
        names = dict.fromkeys((project, *sorted(place.folders)))
        return [f"{self.root}/{name}" for name in names]

    def _paths(self, project: Project, place: Place) -> list[str]:
        """Paths of a project's files and sidecars. Loose ones come last."""
        paths: list[str] = []
        for folder in self._folders(project, place):
            if _base(folder) in place.folders:  # it can be read, and is in the root
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    paths += [e.path for e in os.scandir(folder) if self._is_file(e)]
        return paths + [f"{self.root}/{name}" for name in place.loose]

    def _describe(
        self, project: Project, files: dict[str, State], last: Last, now: int
    ) -> Iterator[Distribution]:
        """Distributions of files. Those that have not changed come first, in order."""
        yanks = [path for path in files if path.endswith(".yanked")]
        yanked = {path.removesuffix(".yanked"): _read_yank(path) for path in yanks}
        kept = last.found.dists if last else []
        kept = [dist for dist in kept if files.get(dist.path) == dist.state]
        for dist in kept:
            reason = yanked.get(dist.path)
            same = reason == dist.yanked
            yield dist if same else replace(dist, yanked=reason, lines={})
        others = files.keys() - {dist.path for dist in kept}
        names = {path: parse_filename(_base(path), project) for path in others}
        new = {path: p for path, p in names.items() if p and p.project == project}
        known = self._facts.read(project, anew=last is None) if new else {}
        for path, parsed in new.items():
            state, facts = files[path], known.get((parsed.filename, *files[path]))
            if not facts and (facts := _compute_facts(path, state)):
                if _is_settled(state[1], now):
                    self._facts.add(project, (parsed.filename, *state), facts)
                else:  # It may be rewritten before the clock ticks. This state equals
                    state = (*state, now)  # no other, so the next look reads it again.
            if facts:
                yield Distribution(
                    *parsed,
                    size=state[0],
                    uploaded=state[1] / 1e9,
                    facts=facts,
                    yanked=yanked.get(path),
                    path=path,
                    state=state,
                    loose=os.path.dirname(path) == str(self.root),
                )

    def _is_inside(self, path: str) -> bool:
        """Does a path lead to a place below the root, whatever links it has?"""
        return os.path.realpath(path).startswith(f"{self._real}/")

    def look_at_all(self, root: Look[Catalog]) -> Look[list[Parsed]]:
        now, began, found = time.time_ns(), time.monotonic(), list[Parsed]()
        places = sorted(root.found.places.items())
        folders = [path for each in places for path in self._folders(*each)]
        marks = {**root.marks, **read_marks(folders)}
        for project, place in places:
            names = set(map(_base, self._paths(project, place)))
            files = (parse_filename(name, project) for name in names)
            found += sorted(p for p in files if p and p.project == project)
        settled = all(_is_settled(mark[0], now) for mark in marks.values())
        until = began + LOOK_MOST if settled else began
        return Look(found, marks, until, until)

    def iter_dists(self, catalog: Catalog) -> Iterator[Distribution]:
        for project, place in sorted(catalog.places.items()):
            states, now = _states_of(self._paths(project, place)), time.time_ns()
            yield from self._describe(project, states, None, now)

    # Reading...

    def open(self, dist: Distribution, start: int, stop: int) -> BinaryIO:
        file = open_at(dist.path, start)
        if file_state(file.fileno()) != dist.state[:3]:
            file.close()
            raise FileNotFoundError(f"{dist.path} was rewritten")
        return file

    # Changing...

    def stage(self, size: int) -> BinaryIO:
        return open_staged(self.staging)

    def create(self, new: Addition, old: Distribution | None, place: Place) -> None:
        home, *others = self._folders(new.project, place)
        target, replaced = f"{home}/{new.filename}", old.path if old else ""
        if not self._is_inside(home):  # a link; what it leads to is not served
            raise OSError(errno.EXDEV, f"it leads out of {self.root}", home)
        for folder in () if old else (self.root, *others):
            if os.path.exists(f"{folder}/{new.filename}"):
                raise FileExistsError(f"{folder} has {new.filename}")
        key = (new.filename, *(file_state(new.source) or ()))
        if old:  # its yank goes first: after a crash it must not be that of new bytes
            Path(f"{old.path}.yanked").unlink(missing_ok=True)
        try:
            place_file(new.source, Path(target), overwrite=replaced == target)
        except OSError:
            with contextlib.suppress(OSError):  # if it was made, it is empty
                os.rmdir(home)
            raise
        self._facts.add(new.project, key, new.facts)
        if old and replaced != target:
            with contextlib.suppress(FileNotFoundError):  # it went at this moment
                self.delete(old)

    def delete(self, dist: Distribution) -> None:
        Path(f"{dist.path}.yanked").unlink(missing_ok=True)  # first, as in `create`
        os.unlink(dist.path)
        if not dist.loose:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(os.path.dirname(dist.path))

    def move_home(self, dist: Distribution) -> None:
        home = self.root / dist.project / dist.filename
        try:
            place_file(Path(dist.path), home, overwrite=False)
        except FileExistsError:
            if not (home.is_file() and filecmp.cmp(dist.path, home, shallow=False)):
                raise
        if dist.yanked is not None:
            os.replace(f"{dist.path}.yanked", f"{home}.yanked")
        os.unlink(dist.path)


class FactsFiles:
    """Facts of a directory's files: for each project a file of JSON lines."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_up_to: dict[Project, int] = {}

    def read(self, project: Project, *, anew: bool) -> dict[FactsKey, Facts]:
        """Read all facts of a project, or those that were added since the last read."""
        start = 0 if anew else self._read_up_to.get(project, 0)
        facts, lines = dict[FactsKey, Facts](), b""
        path = self._folder / f"{project}.jsonl"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            file.seek(start)
            lines = file.read()  # what cannot be read is computed again
        self._read_up_to[project] = start + len(lines)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):  # torn
                name, size, mtime, inode, *rest = json.loads(line)
                facts[name, size, mtime, inode] = Facts(*rest)
        return facts

    def add(self, project: Project, key: FactsKey, facts: Facts) -> None:
        line = json.dumps([*key, *facts]) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"{project}.jsonl", "ab", buffering=0) as file:
                file.write(line.encode())  # at once: lines of two workers do not mix
        except OSError as fault:  # a read-only directory is served, too
            log.warning("facts are not kept, so a restart hashes again: %s", fault)


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _is_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _parse_loose(path: str) -> Parsed | None:
    """Split the name of a loose file. If there are two ways, its PKG-INFO decides."""
    state = file_state(path) if _TWO_WAYS.fullmatch(_base(path)) else None
    return parse_filename(_base(path), _name_inside(path, state) if state else "")


@lru_cache(maxsize=10_000)  # a scan of the root asks for the same files again
def _name_inside(path: str, state: State) -> str:
    with contextlib.suppress(OSError, ArchiveError), open(path, "rb") as file:
        return normalize(read_core_metadata(file, path, state[0]).name)
    return ""


def _states_of(paths: Iterable[str]) -> dict[str, State]:
    states = {path: file_state(path) for path in paths}
    return {path: state for path, state in states.items() if state}


def _compute_facts(path: str, state: State) -> Facts | None:
    """Read a file for its facts; None if it changes while it is read."""
    try:
        with open(path, "rb") as file:
            sha256 = sha256_of(file)
            file.seek(0)
            facts = read_facts(file, _base(path), state[0], sha256)
            return facts if file_state(path) == state else None
    except OSError as fault:
        log.warning("%s is not listed, as it cannot be read: %s", path, fault)
        return None


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        why = f"{str(path)!r} cannot be made a directory: {fault.strerror}"
        raise SettingsError(f"{why}. Set LOCAL_PACKAGE_DIRECTORY (DIR).") from fault


def _read_yank(path: str) -> str:
    """Return the reason of a yank: the text of <file>.yanked, at most 1,000 letters."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return " ".join(file.read(1000).split())
    except OSError:  # the file is yanked, whatever this is
        return ""


def open_at(path: Path | str, start: int) -> BinaryIO:
    """Open a file at a byte of it. The caller closes it."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - unbuffered, for a socket
    file.seek(start)
    return file


def open_staged(folder: Path) -> BinaryIO:
    """Open a new file for an upload; remove files whose process is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another worker removed it
            age = time.time() - entry.stat().st_mtime
            gone = age > IDLE_SECONDS and _is_abandoned(*entry.name.split("-")[:2])
            if gone or age > ABANDONED_SECONDS:
                os.unlink(entry.path)
    name = f"{os.getpid()}-{RUN}-{os.urandom(8).hex()}"
    return open(folder / name, "xb")


def _is_abandoned(pid: str, run: str = "") -> bool:
    if not pid.isdigit() or int(pid) == os.getpid():
        return run != RUN
    if os.name != "posix":  # there, signal 0 is Ctrl-C
        return False
    try:
        os.kill(int(pid), 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it is another user's
        pass
    return False


def place_file(source: Path, target: Path, *, overwrite: bool) -> None:
    """Give a staged file its name atomically; FileExistsError if the name is taken."""
    place_it = os.replace if overwrite else os.link
    try:
        place_it(source, target)
    except FileNotFoundError:  # the folder was removed as it was empty
        target.parent.mkdir(exist_ok=True)
        place_it(source, target)
    if os.name == "posix":  # the name must survive a power cut, too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError:
            if not overwrite:  # what is refused leaves no trace
                os.unlink(target)
            raise
        finally:
            os.close(folder)


# ---- 10. A bucket --------------------------------------------------------------------
#     <prefix>/<project>/<filename>   what uploads make; facts are custom metadata
#     <prefix>/<filename>             loose objects: listed and served, not uploaded
# A listing is believed for SYNC_SECONDS. A change shows at once in all workers of the
# instance that made it: that worker touches a file, and the times of such files are the
# marks of a look. A precondition (a generation) decides between writers. Objects that
# are read or written whole are cached on the local disk.

ROOT_SECONDS = 60  # times SYNC_SECONDS: to a project's page it only adds loose files
MARKERS = 256  # touched files; two projects with the same one cost a list at most
METADATA_KEYS = ("sha256", "requires-python", "core-metadata")  # Facts, in their order


class Cloud:
    """Distributions in a Cloud Storage bucket."""

    def __init__(self, bucket: Bucket, settings: Settings) -> None:
        prefix = settings.remote.strip("/") + "/"  # "/" is the root of the bucket
        self.bucket, self._prefix = bucket, prefix.lstrip("/")
        own = settings.root.absolute() / ".pypi_ae"
        self.staging, self._changes = own / "staging", own / "changes"
        make_folder(self._changes)
        self._cache = FileCache(own, settings.cache_bytes)
        self._sync = settings.sync_seconds
        self.gate = Gate()
        self._places: Mapping[Project, Place] = {}  # at the last look at the root

    # Looking...

    def look_at_root(self, last: Look[Catalog] | None) -> Look[Catalog]:
        marks, began = read_marks([self._marker("")]), time.monotonic()
        with self.gate.list_call():
            objects, prefixes = self.bucket.list(self._prefix, delimiter="/")
        loose: dict[Project, dict[str, Distribution]] = {}
        for dist in self._describe(objects):
            loose.setdefault(dist.project, {})[dist.filename] = dist
        names = {prefix[len(self._prefix) : -1] for prefix in prefixes}
        # Folders with other spellings of a project's name are ignored.
        folders = {Project(n): (n,) for n in names if to_project(n) == n}
        until, sure = began + ROOT_SECONDS * self._sync, began + self._sync
        catalog = make_catalog(folders, loose)
        self._places = catalog.places
        return Look(catalog, marks, until, sure, began=began)

    def look(self, project: Project, find_root: FindRoot, last: Last) -> Look[Listing]:
        marks, began = read_marks([self._marker(project)]), time.monotonic()
        with self.gate.list_call():
            objects, _ = self.bucket.list(f"{self._prefix}{project}/")
        loose = find_root().found.places.get(project, Place()).loose
        dists = {name: dist for name, dist in loose.items() if dist}
        dists |= {d.filename: d for d in self._describe(objects, project, last)}
        listing = relist(project, dists.values(), last)
        return Look(listing, marks, began + self._sync, began, began=began)

    def _describe(
        self, objects: Iterable[Object], project: str = "", last: Last = None
    ) -> Iterator[Distribution]:
        """Distributions of objects in the root, or in their project's folder."""
        known = {dist.path: dist for dist in last.found.dists} if last else {}
        for item in objects:
            old, state = known.get(item.name), (item.generation, item.metageneration)
            if old and old.state == state:
                yield old
                continue
            folder, _, name = item.name[len(self._prefix) :].rpartition("/")
            parsed = parse_filename(name, project or folder)
            if parsed and folder in ("", parsed.project):
                yield Distribution(
                    *parsed,
                    size=item.size,
                    uploaded=item.created,
                    facts=_facts_of(item.metadata),
                    yanked=item.metadata.get("yanked"),
                    path=item.name,
                    state=state,
                    loose=not folder,
                    md5=item.md5,
                )

    def iter_dists(self, catalog: Catalog) -> Iterator[Distribution]:
        with self.gate.list_call():
            return self._describe(self.bucket.list(self._prefix)[0])

    def look_at_all(self, root: Look[Catalog]) -> Look[list[Parsed]]:
        marks, began = read_marks([f"{self._changes}/all"]), time.monotonic()
        dists = self.iter_dists(root.found)
        found = [Parsed(dist.filename, dist.project, dist.version) for dist in dists]
        return Look(found, marks, began + self._sync, began)

    # Reading...

    def open(self, dist: Distribution, start: int, stop: int) -> Body:
        """Read from the cache, else from the bucket. A whole object is then cached."""
        if dist.facts.sha256 and (file := self._cache.open(dist, start)):
            return file
        if not dist.size:  # a Range cannot be empty
            return iter(())
        if stop - start < dist.size:
            return self._read(dist, start, stop)
        # The md5 of a whole object is compared before its last bytes are given.
        chunks = self._cache.fill(dist, self._read(dist))
        if not dist.facts.sha256:
            chunks = self._learn(dist, chunks)
        return iter((b"".join(chunks),)) if dist.size <= CHUNK else chunks

    def _read(self, dist: Distribution, *span: int) -> Iterator[bytes]:
        places = dict(zip(("start", "stop"), span, strict=False))
        with self.gate.slot():
            return self.bucket.read(dist.path, generation=dist.state[0], **places)

    def _learn(self, dist: Distribution, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on an object that was copied in by hand, and store its facts with it."""
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
            yield chunk
        sha256 = digest.hexdigest()
        copy = self._cache.open(replace(dist, facts=Facts(sha256)), 0)
        tail = RangedFile(dist.size, lambda *span: b"".join(self._read(dist, *span)))
        match = dict(zip(("generation", "metageneration"), dist.state, strict=True))
        try:
            with copy or contextlib.nullcontext(tail) as source:
                facts = read_facts(source, dist.filename, dist.size, sha256)
            self.bucket.patch(dist.path, object_metadata(facts), **match)
        except OSError as fault:  # the file is served without them
            log.warning("the facts of %s were not written: %s", dist.path, fault)
        self._touch(dist.project, root=dist.loose)  # it may have changed, too

    # Changing...

    def stage(self, size: int) -> BinaryIO:
        self._cache.give_way(size)
        return open_staged(self.staging)

    def create(self, new: Addition, old: Distribution | None, place: Place) -> None:
        name = f"{self._prefix}{new.project}/{new.filename}"
        if not old and new.filename in place.loose:
            raise FileExistsError(f"{new.filename} is there as a loose file")
        match = old.state[0] if old and not old.loose else 0
        values, insert = object_metadata(new.facts, new.uploader), self.bucket.insert
        try:
            with open(new.source, "rb") as file, self.gate.slot():
                item = insert(name, file, metadata=values, if_generation=match)
        finally:  # after a failure, too: it may have been stored
            self._touch(new.project, root=new.project not in self._places)
        if old and old.loose:
            with contextlib.suppress(FileNotFoundError):  # it went at this moment
                self.delete(old)
        self._cache.put(new.source, f"{item.generation}-{new.filename}")

    def delete(self, dist: Distribution) -> None:
        try:
            with self.gate.slot():
                self.bucket.delete(dist.path, generation=dist.state[0])
        finally:
            self._touch(dist.project, root=True)

    def move_home(self, dist: Distribution) -> None:
        home = f"{self._prefix}{dist.project}/{dist.filename}"
        try:
            self.bucket.rewrite(dist.path, home, generation=dist.state[0])
        except FileExistsError:
            item = self.bucket.get(home)
            if not item.md5 or (item.size, item.md5) != (dist.size, dist.md5):
                raise
        self.delete(dist)

    def _marker(self, project: str) -> str:
        """The file that is touched when a project changes here; for "", the root."""
        number = zlib.crc32(project.encode()) % MARKERS if project else "root"
        return f"{self._changes}/{number}"

    def _touch(self, project: Project, *, root: bool) -> None:
        names = [self._marker(project), f"{self._changes}/all"]
        for marker in map(Path, names + [self._marker("")] * root):
            try:
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                os.utime(marker, ns=(time.time_ns(),) * 2)  # exact, unlike touch()
            except OSError as fault:  # the bucket has the change all the same
                log.warning("other workers may see a change late: %s", fault)


class FileCache:
    """Copies of objects on the local disk; the least recently used go first.

    It is a convenience: if the disk is full, read-only or gone, requests do without it.
    """

    def __init__(self, own: Path, bound: int) -> None:
        self._folder, self._parts = own / "cache", own / "parts"
        self._bound = bound  # bytes of all copies, whole or being written
        self._room = 0  # bytes that may be added before the folders are scanned again
        self._checked: BoundedCache[int] = BoundedCache(FILES_KEPT)  # inode, by name
        self._filling: set[str] = set()  # names of copies that requests write now
        self._lock = threading.Lock()
        make_folder(self._folder)

    def open(self, dist: Distribution, start: int) -> BinaryIO | None:
        """Open a copy at a byte; None if there is none with the bytes of `dist`."""
        path = self._folder / _cache_name(dist)
        with contextlib.suppress(OSError):
            file = open_at(path, 0)
            if self._is_right(file, dist):
                with contextlib.suppress(OSError):  # the disk may be read-only
                    os.utime(path)  # it is used now
                file.seek(start)
                return file
            file.close()  # it was cut short, say
            path.unlink()
        return None

    def _is_right(self, file: BinaryIO, dist: Distribution) -> bool:
        """Has a copy the right size and, when it is first used, the right digest?"""
        state, name = os.fstat(file.fileno()), _cache_name(dist)
        if state.st_size != dist.size:
            return False
        if self._checked.get(name) != state.st_ino:
            if sha256_of(file) != dist.facts.sha256:
                return False
            self._checked.keep(name, state.st_ino, 1)
        return True

    def fill(self, dist: Distribution, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass chunks on, and write them to a copy if there is room for it."""
        name, part = _cache_name(dist), self._begin(dist)
        is_mine = part is not None
        try:
            for chunk in chunks:
                if part and not _write_part(part, chunk):
                    _discard(part)
                    part = None
                yield chunk
            if part:
                self._place(Path(part.name), name)
        finally:
            if part:
                _discard(part)
            if is_mine:
                self._filling.discard(name)

    def _begin(self, dist: Distribution) -> BinaryIO | None:
        """Open a new copy; None if another request is writing it already."""
        name = _cache_name(dist)
        with contextlib.suppress(OSError), self._lock:
            if name not in self._filling and self._take_room(dist.size):
                part = open_staged(self._parts)
                with contextlib.suppress(OSError):
                    part.truncate(dist.size)  # at once, so that other workers see it
                    self._filling.add(name)
                    return part
                _discard(part)
        return None

    def _place(self, source: Path, name: str) -> None:
        """Make a whole file the copy. It may get the inode of one that was checked."""
        with contextlib.suppress(OSError):
            self._checked.keep(name, 0, 1)
            os.replace(source, self._folder / name)

    def put(self, source: Path, name: str) -> None:
        """Move a staged file into the cache, if there is room for it."""
        with contextlib.suppress(OSError), self._lock:
            if self._take_room(source.stat().st_size):
                self._place(source, name)

    def give_way(self, size: int) -> None:
        """Remove copies until the disk has room for an upload of so many bytes."""
        from shutil import disk_usage

        with contextlib.suppress(OSError), self._lock:
            _remove(_copies(self._folder), size - disk_usage(self._folder).free)

    def _take_room(self, size: int) -> bool:
        """Take room for a copy. If there is none, older ones go, an eighth at once."""
        for folder in (self._folder, self._parts):  # a cleaner of /tmp may remove them
            folder.mkdir(parents=True, exist_ok=True)
        if size > self._room:  # a scan takes time and memory, so not for each copy
            parts = sum(part.size for part in _copies(self._parts))
            if size + parts > self._bound:
                return False
            copies = _copies(self._folder)
            # Two workers may each add a share unseen, and keep the bound together.
            share = self._bound // 16
            room = self._bound - share - parts - sum(copy.size for copy in copies)
            if size > room:
                _remove(copies, size - room + 2 * share)
            self._room = size + max(0, min(room - size, share))
        self._room -= size
        return True


class Copy(NamedTuple):
    used: float  # POSIX seconds
    size: int  # bytes
    path: str


def _copies(folder: Path) -> list[Copy]:
    """The files of a folder, the least recently used first."""
    states = [(entry.stat(), entry.path) for entry in os.scandir(folder)]
    return sorted(Copy(state.st_mtime, state.st_size, path) for state, path in states)


def _remove(copies: Iterable[Copy], missing: int) -> None:
    """Remove so many bytes, or all."""
    for copy in copies:
        if missing <= 0:
            break
        os.unlink(copy.path)
        missing -= copy.size


def _write_part(part: BinaryIO, data: bytes) -> bool:
    with contextlib.suppress(OSError):  # the disk is full, say
        part.write(data)
        part.flush()
        return True
    return False


def _discard(part: BinaryIO) -> None:
    with contextlib.suppress(OSError), part:  # on a full disk, to close it fails, too
        os.unlink(part.name)  # unless it is a whole copy by now, and has its name


def _cache_name(dist: Distribution) -> str:
    # The generation is in the name, so an object that was replaced is not found.
    return f"{dist.state[0]}-{dist.filename}"


def object_metadata(facts: Facts, uploader: str = "") -> dict[str, str]:
    """Facts as the custom metadata of an object. The README lists the keys."""
    pairs = zip((*METADATA_KEYS, "uploader"), (*facts, uploader), strict=True)
    return {key: value for key, value in pairs if value}


def _facts_of(metadata: Mapping[str, str]) -> Facts:
    """Facts from custom metadata, which somebody may have set by hand."""
    is_digest = re.compile(r"[0-9a-f]{64}").fullmatch
    sha256, python, core = (metadata.get(key, "") for key in METADATA_KEYS)
    sha256, core = (text if is_digest(text) else "" for text in (sha256, core))
    return Facts(sha256, to_requires_python(python), core)


# ---- 11. Pages -----------------------------------------------------------------------
# HTML and JSON are two renderers of the same listing. Each representation is rendered,
# compressed and hashed once and kept with its listing; a warm page is one look-up. The
# line of a file is kept with the file, so one new file renders one line.

API_VERSION = "1.4"  # of the simple repository API
JSON = "application/vnd.pypi.simple.v1+json"
HTML_V1 = "application/vnd.pypi.simple.v1+html"
HTML = "text/html"
OFFERS = (JSON, HTML_V1, HTML)  # the order of preference among equals
LATEST = {kind.replace("v1", "latest"): kind for kind in (JSON, HTML_V1)}
MOST = 1024  # letters of Accept that are read, as caches keep them; clients send 200
Source = TypeVar("Source", Listing, Catalog)  # what pages are rendered from
Render = Callable[[Source], str]


@lru_cache(maxsize=256)  # clients send only a few different headers
def negotiate(accept: str) -> str:
    """Choose a content type for an Accept header (PEP 691, RFC 9110), or raise 406.

    A type asked for by name beats one that only a wildcard lets in at the same q.
    """
    ranges = {LATEST.get(name, name): q for name, q in _weighted(accept or "*/*")}
    best = max(OFFERS, key=lambda offer: _preference(offer, ranges))
    if _preference(best, ranges)[0] <= 0:
        raise HTTPError(406, f"No answer is acceptable; ask for {', '.join(OFFERS)}.")
    return best


def _preference(offer: str, ranges: Mapping[str, float]) -> tuple[float, int, int]:
    rank = OFFERS.index(offer)
    if offer in ranges:
        return ranges[offer], 1, -rank
    wild = ranges.get(offer.split("/")[0] + "/*", ranges.get("*/*", 0.0))
    return wild, 0, rank  # by wildcard: HTML, which browsers can show


def _weighted(header: str) -> Iterator[tuple[str, float]]:
    for item in header.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        q = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        if name:
            yield name, float(q) if re.fullmatch(r"[01](\.\d{0,3})?", q, re.A) else 0.0


@lru_cache(maxsize=256)
def takes_gzip(accept_encoding: str) -> bool:
    weights = dict(_weighted(accept_encoding))
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def requested_type(query: str, accept: str) -> str:
    """What ?format= says, else what Accept says."""
    formats = parse_qs(query[:MOST].replace("+", "%2B")).get("format")  # v1+json
    return negotiate(formats[-1] if formats else accept)


def page_response(
    request: Request, source: Source, to_html: Render[Source], to_json: Render[Source]
) -> Response:
    """Answer a page in the representation that is asked for, or 304."""
    environ = request.environ
    query, accept = environ.get("QUERY_STRING"), environ.get("HTTP_ACCEPT", "")[:MOST]
    kind = requested_type(query, accept) if query else negotiate(accept)
    gzip = takes_gzip(environ.get("HTTP_ACCEPT_ENCODING", "")[:MOST])
    answer = source.answers.get((kind, gzip))
    if answer is None:
        text = to_json(source) if kind == JSON else to_html(source)
        answer = source.answers[kind, gzip] = render(text.encode(), kind, gzip=gzip)
    full, not_modified = answer
    tags = environ.get("HTTP_IF_NONE_MATCH")
    return not_modified if tags and _names_tag(tags, full.headers[0][1]) else full


def render(body: bytes, kind: str, *, gzip: bool) -> Answer:
    """Make the answers of a page: the page in full, and 304."""
    tag = hashlib.sha256(body).hexdigest()[:32]
    kept = (
        ("ETag", f'"{tag}-{OFFERS.index(kind)}{"z" if gzip else ""}"'),
        # Clients ask again each time and get a 304, so a new upload is seen at once.
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept, Accept-Encoding"),
    )
    packed = [("Content-Encoding", "gzip")] if gzip else []
    if gzip:
        body = zlib.compress(body, 6, wbits=31)  # 31: with gzip's header
    content_type = kind if kind == JSON else f"{kind}; charset=utf-8"
    full = body_response("200 OK", content_type, body, *kept, *packed)
    return full, Response("304 Not Modified", kept)


def _names_tag(header: str, tag: str) -> bool:
    """Does If-None-Match name this tag (RFC 9110, 13.1.2: weak comparison)?"""
    return header in (tag, "*") or tag in re.findall(r'"[^"]*"', header[:MAX_HEADER])


def escape(text: str) -> Html:
    return Html(html.escape(text))


def html_page(title: str, body: str, head: str = "") -> Html:
    """The frame of every page. With an empty icon, browsers do not ask for one."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'{head}<link rel="icon" href="data:,"><title>{escape(title)}</title></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _simple_page(title: str, links: Iterable[str]) -> Html:
    version = f'<meta name="pypi:repository-version" content="{API_VERSION}">\n'
    return html_page(title, "\n".join(links), version)


def _line(dist: Distribution, kind: str, make: Callable[[Distribution], str]) -> str:
    """Return the line of a file on a page; it is rendered once."""
    line = dist.lines.get(kind)
    if line is None:
        line = dist.lines[kind] = make(dist)
    return line


def _link(dist: Distribution) -> Html:
    fragment = "".join(f"#{name}={digest}" for name, digest in dist.hashes.items())
    digest = dist.facts.core_metadata
    core_metadata = f"sha256={digest}" if digest else None
    attributes = {
        "href": f"../../{dist.url}{fragment}",
        "data-requires-python": dist.facts.requires_python or None,
        "data-core-metadata": core_metadata,
        "data-dist-info-metadata": core_metadata,  # its name in PEP 658, for older pip
        "data-yanked": dist.yanked,
    }
    pairs = attributes.items()
    text = "".join(f' {k}="{escape(v)}"' for k, v in pairs if v is not None)
    return Html(f"<a{text}>{escape(dist.filename)}</a><br>")


def _file_json(dist: Distribution) -> str:
    """One file of the JSON API; uv refuses a whole project for a null in it."""
    facts = dist.facts
    entry: dict[str, Any] = {
        "filename": dist.filename,
        "url": f"../../{dist.url}",
        "hashes": dist.hashes,
        "size": dist.size,
        "upload-time": utc(dist.uploaded),
        "yanked": dist.yanked is not None and (dist.yanked or True),
    }
    if facts.requires_python:
        entry["requires-python"] = facts.requires_python
    if facts.core_metadata:
        entry["core-metadata"] = {"sha256": facts.core_metadata}
    return json.dumps(entry, separators=(",", ":"))


def utc(seconds: float) -> str:
    """A POSIX time as PEP 700 wants it: 2026-01-31T12:00:00.123456Z."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{micros:06}Z"


def _json(content: Mapping[str, Any]) -> str:
    meta = {"api-version": API_VERSION}
    return json.dumps({"meta": meta, **content}, separators=(",", ":"))


def _project_html(listing: Listing) -> Html:
    links = (_line(dist, HTML, _link) for dist in listing.dists)
    return _simple_page(f"Links for {listing.project}", links)


def _project_json(listing: Listing) -> str:
    versions = list(listing.versions().values())
    files = ",".join(_line(dist, JSON, _file_json) for dist in listing.dists)
    head = _json({"name": listing.project, "versions": versions})
    return f'{head[:-1]},"files":[{files}]}}'


def _index_html(catalog: Catalog) -> Html:
    links = (f'<a href="{name}/">{name}</a><br>' for name in catalog.projects)
    return _simple_page("Simple index", links)


def _index_json(catalog: Catalog) -> str:
    return _json({"projects": [{"name": name} for name in catalog.projects]})


def simple_index(app: App, request: Request) -> Response:
    """/simple/"""
    return page_response(request, request.catalog, _index_html, _index_json)


def simple_project(app: App, request: Request) -> Response:
    """/simple/<project>/"""
    if request.listing.dists:
        return page_response(request, request.listing, _project_html, _project_json)
    return _fall_back(app.settings, request)


def _fall_back(settings: Settings, request: Request) -> Response:
    """Redirect an unknown project to the fallback index, unless its name is private."""
    project = request.project
    private = any(fnmatch.fnmatchcase(project, p) for p in settings.private_names)
    if private or not settings.fallback_url:
        raise HTTPError(404, f"There is no project {quoted(project)} here.")
    return redirect(with_query(f"{settings.fallback_url}/{project}/", request))


# ---- 12. Downloads -------------------------------------------------------------------
# Status and headers are decided from the facts before a byte is read: conditions first,
# then a range (RFC 9110, 13.2.2). Pages link to an address with a digest, so clients
# may keep what they got there. It has no Content-Encoding, as pip hashes what arrives.

Range = tuple[int, int]  # [start, stop)
SMALL = 64 << 10  # bytes; to read so few is quicker than to set sendfile up
GZIP = "application/gzip"
TYPES = {".zip": "application/zip", ".gz": GZIP, ".tgz": GZIP}


def download(app: App, request: Request) -> Response:
    """/packages/<project>/[<digest>/]<filename>, and .metadata beside a wheel."""
    project, filename = target_of(request)
    suffix = request.args["file"][len(filename) :]
    answer = {"": file_response, ".metadata": metadata_response}.get(suffix)
    dist = request.listing.by_name.get(filename) if project else None
    digest = request.args.get("digest", "")
    if project and dist and not dist.has_digest(digest):  # it may be that of new bytes
        look = app.index.listing(project, request.started, request.path)
        dist = look.found.by_name.get(filename)
    for _ in range(2):  # once more if the file was replaced since it was listed
        if not (project and dist and answer and dist.has_digest(digest)):
            raise HTTPError(404, f"There is no file {quoted(request.path)} here.")
        try:
            return answer(app, request, dist)
        except FileNotFoundError:
            dist = app.index.look_again(project).by_name.get(filename)
    raise HTTPError(503, f"{filename} is changing. Try again.", Retry_After="1")


def metadata_response(app: App, request: Request, dist: Distribution) -> Response:
    if not dist.facts.core_metadata:
        raise HTTPError(404, f"{dist.filename} has no core metadata here.")
    tag = f'"{dist.facts.core_metadata}"'
    headers = (("ETag", tag), ("Cache-Control", _lifetime(request)))
    if (tags := request.header("If-None-Match")) and _names_tag(tags, tag):
        return Response("304 Not Modified", headers)
    body = app.index.core_metadata(dist)
    return body_response("200 OK", TEXT, body, *headers)


def _lifetime(request: Request) -> str:
    # A name may get other bytes. An address with a digest of them may not.
    return "max-age=31536000, immutable" if "digest" in request.args else "no-cache"


def file_response(app: App, request: Request, dist: Distribution) -> Response:
    """Answer a file: 200, 206 or 304. Raises FileNotFoundError if it was replaced."""
    tag, modified, size = dist.tag, _http_date(dist.uploaded), dist.size
    headers = [("ETag", tag), ("Last-Modified", modified)]
    headers.append(("Cache-Control", _lifetime(request)))
    tags = request.environ.get("HTTP_IF_NONE_MATCH")
    since = request.environ.get("HTTP_IF_MODIFIED_SINCE")
    if _names_tag(tags, tag) if tags else since == modified:
        return Response("304 Not Modified", tuple(headers))
    kind = TYPES.get(os.path.splitext(dist.filename)[1], "application/octet-stream")
    headers += [("Content-Type", kind), ("Accept-Ranges", "bytes")]
    status, start, stop = "200 OK", 0, size
    if span := _find_range(request, size, (tag, modified)):
        status, (start, stop) = "206 Partial Content", span
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
    headers.append(("Content-Length", str(stop - start)))
    if request.method == "HEAD":
        return Response(status, tuple(headers))
    body: Iterable[bytes] = app.index.open(dist, start, stop)
    if isinstance(body, io.IOBase):
        body = _file_body(request, body, stop - start, to_end=stop == size)
    return Response(status, tuple(headers), body)


@lru_cache(maxsize=1024)
def _http_date(seconds: float) -> str:
    from email.utils import formatdate

    return formatdate(seconds, usegmt=True)


def _find_range(request: Request, size: int, tags: tuple[str, str]) -> Range | None:
    """Return the requested range as [start, stop); None for the whole file.

    Raises 416 for a range beyond the end.
    """
    text = request.environ.get("HTTP_RANGE", "")
    if_range = request.environ.get("HTTP_IF_RANGE")
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text, re.ASCII)
    if not match or text == "bytes=-" or (if_range and if_range not in tags):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None  # not a range (RFC 9110, 14.1.1): ignored
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size:
        why = f"The file has {size} bytes; the range {quoted(text)} lies beyond them."
        raise HTTPError(416, why, Content_Range=f"bytes */{size}")
    return start, stop


def _file_body(
    request: Request, file: io.IOBase, length: int, *, to_end: bool
) -> Iterable[bytes]:
    if length <= SMALL:
        return (b"".join(slice_of(file, length)),)
    wrapper = request.environ.get("wsgi.file_wrapper")
    if wrapper and to_end:  # wsgiref's wrapper always sends a file to its end
        return wrapper(file, CHUNK)  # type: ignore[no-any-return]
    return slice_of(file, length)


# ---- 13. Uploads ---------------------------------------------------------------------
# The legacy upload form is multipart/form-data (RFC 7578). Its bytes go into the parser
# as they arrive, and events come out. The content is hashed and written to a staging
# file, if its name is good. All other fields are small, and bounded. A staged file gets
# its name when all checks have passed.

MAX_PART_HEADERS = 8 << 10  # bytes; clients send about 150
MAX_VALUE = 1000  # bytes of a field that is used; a name has 215, a digest 128
MAX_FIELDS = 2000  # each classifier, requirement and URL is a field of its own
MAX_FORM = 8 << 20  # bytes of all fields together, without the file
URLENCODED = "application/x-www-form-urlencoded"
MAX_URLENCODED = 64 << 10  # bytes; such a form has no file, and no description
# A body that comes more slowly would hold its thread for long. Any modem is faster.
LEAST_RATE = 1000  # bytes a second on average
GRACE = 10  # seconds before that counts, in which a connection may stall
DIGESTS: dict[str, Callable[[], Any]] = {
    "sha256_digest": hashlib.sha256,
    "md5_digest": partial(hashlib.md5, usedforsecurity=False),
    "blake2_256_digest": partial(hashlib.blake2b, digest_size=32),
}
UPLOAD = "file_upload"
KEPT_FIELDS = {":action", "name", "version", "filetype", *DIGESTS}


@dataclass(frozen=True, slots=True)
class PartBegins:
    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class PartData:
    data: bytes


@dataclass(frozen=True, slots=True)
class PartEnds:
    """Its body is complete."""


Event = PartBegins | PartData | PartEnds


class MultipartParser:
    """Takes bytes, gives events; keeps no more than a chunk and a boundary.

    The states follow RFC 2046, 5.1.1: the preamble, then headers and body of each part,
    then the epilogue. Raises HTTPError 400 for a malformed form, 413 for a large one.
    """

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._rest = b"\r\n"  # lets the first boundary begin like the others
        self._at = 0  # index in _rest of the first byte that is not yet read
        self._step: Callable[[], Event | None] | None = self._preamble
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        self._rest, self._at = self._rest[self._at :] + data, 0
        while step := self._step:
            if event := step():
                yield event
            elif step is self._step:
                return  # this step needs more bytes
        self._at = len(self._rest)  # the epilogue is ignored

    def close(self) -> None:
        """Check that the form was complete."""
        if self._step:
            raise HTTPError(400, "The form ends before its closing boundary.")

    def _preamble(self) -> None:
        most = MAX_PART_HEADERS + len(self._mark)
        at = self._rest.find(self._mark, 0, most)
        if at >= 0:
            self._at, self._step = at + len(self._mark), self._after_mark
        elif len(self._rest) >= most:
            raise HTTPError(400, "The form does not begin with its boundary.")

    def _after_mark(self) -> None:
        if self._rest.startswith(b"--", self._at):
            self._step = None
            return
        line = self._rest[self._at : self._at + 202]  # spaces may follow (RFC 2046)
        padding, end, _ = line.partition(b"\r\n")
        # A line that is not complete may end with the first half of "\r\n" or "--".
        blank = padding if end else padding.removesuffix(b"\r").removesuffix(b"-")
        if blank.strip(b" \t") or len(padding) > 200:
            raise HTTPError(400, "A boundary of the form is followed by other text.")
        if end:  # keep it: a part without headers is this line end and another
            self._at, self._step = self._at + len(padding), self._headers

    def _headers(self) -> Event | None:
        head = self._rest[self._at : self._at + MAX_PART_HEADERS + 4]
        head, end, _ = head.partition(b"\r\n\r\n")
        half = 0 if end else 3  # bytes of the end, which may be there already
        if len(head) > MAX_PART_HEADERS + half or self._parts >= MAX_FIELDS:
            most = f"{MAX_FIELDS} parts, with {MAX_PART_HEADERS} bytes of headers each"
            raise HTTPError(413, f"The form is too large: it may have {most}.")
        if not end:
            return None
        self._parts += 1
        self._at, self._step = self._at + len(head) + len(end), self._body
        return _part(head)

    def _body(self) -> Event | None:
        at = self._rest.find(self._mark, self._at)
        if at == self._at:
            self._at, self._step = at + len(self._mark), self._after_mark
            return PartEnds()
        safe = at if at > 0 else len(self._rest) - len(self._mark) + 1
        if safe <= self._at:
            return None
        data, self._at = self._rest[self._at : safe], safe
        return PartData(data)


_PARAMETER = re.compile(r'[ \t]*;[ \t]*([^\s;="]+)=(?:"([^"\r\n]*)"|([^\s;"]*))', re.A)
_HEADER = re.compile(rf'[ \t]*([^\s;"]+)(?:{_PARAMETER.pattern})*[ \t;]*', re.A)

_PART_HEADER = re.compile(
    r"(?:\A|\r\n)content-(disposition|transfer-encoding)[ \t]*:([^\r\n]*)", re.I
)


def parse_header(text: str) -> tuple[str, dict[str, str]]:
    """Split a header into its value and its parameters (RFC 9110, 5.6.6)."""
    match = _HEADER.fullmatch(text)
    pairs = [(key.lower(), v or token) for key, v, token in _PARAMETER.findall(text)]
    if not match or len(dict(pairs)) < len(pairs):
        raise HTTPError(400, f"The header {quoted(text)} is not well formed.")
    return match[1].lower(), dict(pairs)


def _part(head: bytes) -> PartBegins:
    """Read the headers of a part (RFC 7578, 4.2)."""
    headers = _PART_HEADER.findall(head.decode("utf-8", "replace"))
    about = [value for kind, value in headers if kind.lower() == "disposition"]
    coded = {v.strip().lower() for kind, v in headers if kind.lower() != "disposition"}
    kind, values = parse_header(about[0]) if len(about) == 1 else ("", {})
    plain = kind == "form-data" and coded <= {"binary", "7bit", "8bit"}
    if not plain or "name" not in values:
        raise HTTPError(400, "A part of the form is not plain form-data with a name.")
    return PartBegins(values["name"], values.get("filename"))


@dataclass(slots=True)
class Form:
    """The fields of an upload that are used, and its file, which is staged."""

    fields: dict[str, str] = field(default_factory=dict)
    total: int = 0  # bytes of all fields
    filename: str = ""
    staged: Path | None = None
    size: int = 0  # of the file
    digests: dict[str, Any] = field(default_factory=dict)  # by the name of their field


def parse_upload(name: str, project: str = "") -> Parsed:
    """Split a file name; raise 400 if it is not that of a wheel or sdist."""
    parsed = parse_filename(name, project)
    if not parsed or not name.endswith(UPLOADABLE):
        kinds = f"not that of a wheel or sdist ({', '.join(UPLOADABLE)})"
        why = f"Bad filename: {quoted(name)} is {kinds}: PEP 427, PEP 625."
        raise HTTPError(400, why)
    return parsed


def read_form(app: App, request: Request) -> Form:
    """Read an upload's form. Its staged file is deleted after the request."""
    length, limit = content_length(request), app.settings.max_upload
    if limit and length > limit:
        why = f"The upload has {length} bytes; MAX_UPLOAD_MB allows {limit} bytes."
        raise HTTPError(413, why)
    take_slot(request, app.uploads)
    form = Form()
    for part, chunks in _parts(_events(request, length)):
        if part.name == "content" and form.fields.get(":action", UPLOAD) == UPLOAD:
            if form.staged:
                raise HTTPError(400, "The form has two files; send only one.")
            form.filename = parse_upload(part.filename or "").filename
            with app.index.store.stage(length) as file:
                form.staged = Path(file.name)
                request.cleanup.append(partial(form.staged.unlink, missing_ok=True))
                _write(form, file, chunks)
        else:
            _collect(form, part.name, chunks)
    return form


def take_slot(request: Request, slots: threading.Semaphore) -> None:
    """Let a body be read, in one of a few slots; raise 503 if none is free."""
    if not slots.acquire(blocking=False):
        why = "Too many requests send data at this moment. Try again."
        raise HTTPError(503, why, Retry_After="5")
    request.cleanup.append(slots.release)


def _parts(events: Iterator[Event]) -> Iterator[tuple[PartBegins, Iterator[bytes]]]:
    """Each part and its data, which is read before the next part."""
    for event in events:
        if isinstance(event, PartBegins):
            data: Any = iter(partial(next, events), PartEnds())
            yield event, (piece.data for piece in data)


def _write(form: Form, file: BinaryIO, chunks: Iterator[bytes]) -> None:
    """Write a file. A thread hashes a large chunk while the next one arrives.

    Hashing takes most of the time of an upload, and it can use another processor.
    """
    # Most clients send digests first. Others are computed from the staged file.
    names = {"sha256_digest"} | form.fields.keys() & DIGESTS.keys()
    form.digests = {name: DIGESTS[name]() for name in names}
    hashing: threading.Thread | None = None
    for chunk in chunks:
        if hashing:
            hashing.join()
        if len(chunk) > SMALL:
            hashing = threading.Thread(target=_hash, args=(form, chunk))
            hashing.start()
        else:
            _hash(form, chunk)
        file.write(chunk)
        form.size += len(chunk)
    if hashing:
        hashing.join()
    file.flush()
    os.fsync(file.fileno())  # an acknowledged upload survives a power cut


def _hash(form: Form, chunk: bytes) -> None:
    for digest in form.digests.values():
        digest.update(chunk)


def _collect(form: Form, name: str, chunks: Iterator[bytes]) -> None:
    """Keep a field if it is used; bound it in any case."""
    value = b""
    for chunk in chunks:
        form.total += len(chunk)
        value += chunk if name in KEPT_FIELDS else b""
        if form.total > MAX_FORM or len(value) > MAX_VALUE:
            raise HTTPError(413, f"The field {quoted(name)} is too long.")
    if name in form.fields:
        raise HTTPError(400, f"The form has two fields {quoted(name)}.")
    if name in KEPT_FIELDS:
        form.fields[name] = value.decode("utf-8", "replace")


def _events(request: Request, length: int) -> Iterator[Event]:
    """The fields of a form, as they arrive."""
    sent = request.environ.get("CONTENT_TYPE", "")
    kind, parameters = parse_header(sent or "nothing")
    boundary = parameters.get("boundary", "").encode("latin-1", "replace")
    if kind == "multipart/form-data" and 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        parser = MultipartParser(boundary)
        for chunk in read_body(request, length):
            yield from parser.feed(chunk)
        parser.close()
    elif kind == URLENCODED and length <= MAX_URLENCODED:  # from curl -d, say
        text = b"".join(read_body(request, length)).decode("utf-8", "replace")
        for name, value in parse_qsl(text, keep_blank_values=True):
            yield from (PartBegins(name, None), PartData(value.encode()), PartEnds())
    else:
        need = f"send multipart/form-data, or {URLENCODED} of {MAX_URLENCODED} bytes"
        raise HTTPError(400, f"Content-Type is {quoted(sent)}; {need} at most.")


def content_length(request: Request) -> int:
    text = request.environ.get("CONTENT_LENGTH") or ""
    if not text:
        raise HTTPError(411, "Send the request with a Content-Length.")
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
        raise HTTPError(400, f"Content-Length {quoted(text)} is not a length.")
    return int(text)


def read_body(request: Request, length: int) -> Iterator[bytes]:
    """Read a request's body of exactly `length` bytes, in chunks."""
    request.unread, began, received = length, time.monotonic(), 0
    connection = connection_of(request)
    while request.unread:
        # gunicorn's read returns when it has all bytes asked for. Never ask for more
        # than came before, so that the bytes of a slow client are counted in time.
        size = min(max(received, GRACE * LEAST_RATE), request.unread, CHUNK)
        ends = began + GRACE + received / LEAST_RATE
        timer = threading.Timer(ends - time.monotonic(), end_reading, [connection])
        if connection:
            timer.start()
        try:
            chunk = request.environ["wsgi.input"].read(size)
        except OSError as fault:  # the client is gone; gunicorn has its own kinds
            raise HTTPError(400, f"The body cannot be read: {fault}.") from fault
        finally:
            timer.cancel()
        late = time.monotonic() > ends
        if late or not chunk:
            why = f"The body ends {request.unread} bytes before its Content-Length"
            slow = f"The body comes with less than {LEAST_RATE} bytes a second"
            raise HTTPError(408 if late else 400, f"{slow if late else why}.")
        received += len(chunk)
        request.unread -= len(chunk)
        yield chunk


def upload(app: App, request: Request) -> Response:
    """POST of the legacy upload API: what it does depends on the field :action."""
    form = read_form(app, request)
    action = form.fields.get(":action")
    if not action:
        raise HTTPError(400, "Missing ':action' field!")
    if action == UPLOAD:
        return _propose_file(app, request, form)
    if action == "remove_pkg":
        return _propose_removal(app, form)
    if action in ("verify", "submit", "doc_upload"):
        return text_response(200, f"OK: nothing is done for {action!r}.")
    raise HTTPError(400, f"Unsupported ':action' field: {quoted(action)}.")


def _propose_file(app: App, request: Request, form: Form) -> Response:
    """Check an upload; what is stored, and said, is up to `push`."""
    if not form.staged:
        raise HTTPError(400, "Missing 'content' file-field!")
    parsed = _check_filename(form)
    _check_digests(form, form.staged)
    new = Addition(
        *parsed,
        source=form.staged,
        size=form.size,
        facts=_check_archive(form, form.staged, parsed),
        uploader=request.user,
        overwrite=app.settings.overwrite,
    )
    return replace(text_response(200, "OK"), changes=(new,))


def _check_filename(form: Form) -> Parsed:
    """The name is that of a wheel or sdist, and agrees with the rest of the form."""
    name, fields = form.filename, form.fields
    parsed = parse_upload(name, normalize(fields.get("name", "")))
    kind = fields.get("filetype")
    if kind and kind != ("bdist_wheel" if name.endswith(".whl") else "sdist"):
        raise HTTPError(400, f"The filetype {quoted(kind)} does not fit {name!r}.")
    if not version_key(parsed.version)[0]:
        why = f"{name!r} has the version {parsed.version!r}: see PEP 440."
        raise HTTPError(400, why)
    _check_agreement(parsed, "form", fields.get("name"), fields.get("version"))
    return parsed


def _check_agreement(
    parsed: Parsed, where: str, name: str | None, version: str | None
) -> None:
    pairs = (name, parsed.project, normalize), (version, parsed.version, version_key)
    for sent, own, key in pairs:
        if sent is not None and key(sent) != key(own):
            why = f"The {where} says {quoted(sent)}, but the file is {parsed.filename}."
            raise HTTPError(400, why)


def _check_digests(form: Form, staged: Path) -> None:
    """Compare every digest that the client sent with that of the bytes that came."""
    for name in sorted(form.fields.keys() & DIGESTS.keys()):
        if not form.fields[name]:
            continue  # some clients send the fields they leave empty
        if name not in form.digests:
            with open(staged, "rb") as file:
                form.digests[name] = hashlib.file_digest(file, DIGESTS[name])
        sent, came = form.fields[name].strip().lower(), form.digests[name].hexdigest()
        if sent != came:
            why = f"The {name} of {form.filename} is {came}, not {quoted(sent)}"
            raise HTTPError(400, f"{why}: the file changed on its way. Send it again.")


def _check_archive(form: Form, staged: Path, parsed: Parsed) -> Facts:
    """What the archive says of itself agrees with its name."""
    try:
        with open(staged, "rb") as file:
            metadata = read_core_metadata(file, parsed.filename, form.size)
    except ArchiveError as fault:
        raise HTTPError(400, f"{parsed.filename} is broken: {fault}.") from fault
    _check_agreement(parsed, "archive's metadata", metadata.name, metadata.version)
    sha256 = form.digests["sha256_digest"].hexdigest()
    facts = facts_from(parsed.filename, sha256, metadata)
    if facts.requires_python != metadata.requires_python:
        why = f"Requires-Python is {quoted(metadata.requires_python)}: see PEP 440."
        raise HTTPError(400, why)
    return facts


def _propose_removal(app: App, form: Form) -> Response:
    """Find every distribution of one version of a project."""
    name, version = form.fields.get("name", ""), form.fields.get("version", "")
    project = to_project(name)
    if not project or not version:
        sent = f"name={quoted(name)}, version={quoted(version)}"
        raise HTTPError(400, f"Missing 'name'/'version' fields: {sent}")
    key, listing = version_key(version), app.index.look_again(project)
    removals = tuple(Removal(dist) for dist in listing.dists if dist.key == key)
    if not removals:
        raise HTTPError(404, f"{project} ({version[:MAX_VERSION]}) not found")
    return replace(text_response(200, "OK"), changes=removals)


# ---- 14. Other answers ---------------------------------------------------------------
# What pypiserver's users and PyPI's tools ask for beside the simple index.


def plain_response(kind: str, text: str) -> Response:
    """An answer that is made anew for each request."""
    return body_response("200 OK", kind, text.encode(), ("Cache-Control", "no-cache"))


def project_json(app: App, request: Request) -> Response:
    """/pypi/<project>[/<version>]/json, and pypiserver's /<project>/json."""
    listing, base = request.listing, request.base_url()
    names, version = listing.versions(), request.args.get("version")
    shown = names.get(version_key(version or _latest(listing)))
    if shown is None:
        raise HTTPError(404, f"There is nothing at {quoted(request.path)}.")
    releases: dict[str, list[Any]] = {name: [] for name in names.values()}
    for dist in listing.dists:
        releases[names[dist.key]].append(_release_json(dist, base))
    urls = releases[shown]
    info = {"name": listing.project, "version": shown}
    info["requires_python"] = urls[0]["requires_python"]
    content = {"info": info, "urls": urls}
    if version is None:
        content["releases"] = releases
    return plain_response("application/json", json.dumps(content))


def _latest(listing: Listing) -> str:
    """The newest version; a yanked one or a pre-release only if there is no other."""
    ranks = [(d.yanked is None, is_final(d.key), d.key, d) for d in listing.dists]
    return max(ranks, key=lambda rank: rank[:3])[3].version if ranks else ""


def _release_json(dist: Distribution, base: str) -> dict[str, Any]:
    extension = os.path.splitext(dist.filename)[1]
    kinds = {".whl": "bdist_wheel", ".egg": "bdist_egg"}
    python = dist.filename.split("-")[-3] if extension == ".whl" else "source"
    return {
        "filename": dist.filename,
        "url": f"{base}/{dist.url}",
        "digests": dist.hashes,
        "size": dist.size,
        "packagetype": kinds.get(extension, "sdist"),
        "python_version": python,
        "requires_python": dist.facts.requires_python or None,
        "upload_time": utc(dist.uploaded)[:19],
        "upload_time_iso_8601": utc(dist.uploaded),
        "yanked": dist.yanked is not None,
        "yanked_reason": dist.yanked or None,
    }


def all_files(app: App, request: Request) -> Response:
    """/packages/: every file, for people and for pip --find-links."""
    links = (
        f'<a href="{project}/{quote(name)}">{escape(name)}</a><br>'
        for name, project, _ in app.index.names(request.started)
    )
    return plain_response(f"{HTML}; charset=utf-8", _simple_page("All files", links))


WELCOME = html_page(
    "Private Python packages",
    "<p>Install:</p>\n<pre>pip install --index-url {{SIMPLE}} PROJECT</pre>\n"
    "<p>Publish:</p>\n<pre>twine upload --repository-url {{URL}} dist/*</pre>\n"
    '<p>Look at the <a href="simple/">projects</a> or at '
    '<a href="packages/">all files</a>.</p>\n<p>pypi_ae {{VERSION}}</p>',
)


def start_page(app: App, request: Request) -> Response:
    """/: the commands to copy, or the file that WELCOME_FILE names.

    The placeholders are those of pypiserver. NUMPKGS counts projects.
    """
    base, mount = request.base_url() + "/", request.environ.get("SCRIPT_NAME", "")
    if mount and not request.environ.get("PATH_INFO"):  # relative links need the slash
        return redirect(quote(mount.rpartition("/")[2], encoding="latin-1") + "/")
    file = app.settings.welcome_file
    page = file.read_text("utf-8") if file else WELCOME
    values = {"URL": base, "PACKAGES": f"{base}packages/", "SIMPLE": f"{base}simple/"}
    values["VERSION"] = __version__
    if "{{NUMPKGS}}" in page:
        values["NUMPKGS"] = str(app.index.count())
    for name, value in values.items():
        page = page.replace("{{" + name + "}}", escape(value))
    return plain_response(f"{HTML}; charset=utf-8", page)


def health(app: App, request: Request) -> Response:
    """/health: the process answers."""
    return text_response(200, "Ok")


def warm_up(app: App, request: Request) -> Response:
    """/_ah/warmup: App Engine asks before it sends an instance its first request.

    To list the root takes credentials and a connection: the first request finds all.
    """
    app.index.root(request.started)
    return text_response(200, "Ok")


def to_simple(app: App, request: Request) -> Response:
    """/<project>: people guess this address of a project's page."""
    return redirect(relative(request.path, f"/simple/{request.project}/"))


def search(app: App, request: Request) -> Response:
    """/RPC2: XML-RPC `search` as pip sends it, substrings of project names."""
    import xmlrpc.client

    length = content_length(request)
    if length > MAX_PART_HEADERS:
        raise HTTPError(413, f"A search of {length} bytes is too long.")
    take_slot(request, app.searches)
    body = b"".join(read_body(request, length))
    try:
        if b"<!" in body or b"\0" in body:  # a DTD, perhaps in UTF-16, can explode
            raise ValueError("a DTD is not accepted")
        parameters, method = xmlrpc.client.loads(body)
        if method != "search":
            raise ValueError(f"there is no method {quoted(method or '')}, only search")
        query: Any = parameters[0]
        names = dict(query).get("name", [])
        names = [names] if isinstance(names, str) else names
        words = [normalize(name) for name in names if name]
    except Exception as fault:  # foreign XML raises expat's, struct's and type errors
        raise HTTPError(400, f"Invalid XML-RPC payload: {fault}.") from fault
    latest: dict[str, str] = {}
    for _, project, version in app.index.names(request.started):
        if any(word in project for word in words):
            latest[project] = max(latest.get(project, ""), version, key=version_key)
    hits = [{"name": p, "version": v, "summary": ""} for p, v in latest.items()]
    answer = xmlrpc.client.dumps((hits,), methodresponse=True)
    return plain_response("text/xml", answer)


# ---- 15. Routes and the app ----------------------------------------------------------
# ROUTES says who may do what. The router answers for HEAD, 405, missing slashes and
# names that are not normalised. A handler is a plain function of the app and a request.

Handler = Callable[["App", Request], Response]
Before = Callable[[Request], None]
After = Callable[[Request, Response], "Response | None"]
NOT_NOW = HTTPError(503, "The store does not answer now. Try again.", Retry_After="5")
NO_ROOM = HTTPError(507, "The server's disk has no room for this.", Retry_After="60")
NO_DISK = HTTPError(503, "The server's disk fails; its log says how.", Retry_After="5")
# Errors of a bucket have no number.
BY_ERRNO = {None: NOT_NOW, errno.ENOSPC: NO_ROOM, errno.EDQUOT: NO_ROOM}
MAX_PATH = 1024  # letters; the longest useful path has two names of 215


class Route(NamedTuple):
    method: str
    path: str
    action: str | None  # who may: see AUTHENTICATE; None: everybody
    handler: Handler


NO_PROJECTS = ("/favicon.ico", "/robots.txt")  # browsers and crawlers ask for these
UPLOADS = ("/", "/legacy/", "/simple/", "/pypi/")  # where clients send them
ROUTES = (
    Route("GET", "/", None, start_page),
    Route("GET", "/_ah/warmup", None, warm_up),
    Route("GET", "/simple/", "list", simple_index),
    Route("GET", "/simple/{project}/", "list", simple_project),
    Route("GET", "/+simple/{project}/", "list", simple_project),  # hatch publish asks
    Route("GET", "/packages/", "list", all_files),
    Route("GET", "/packages/{file}", "download", download),
    Route("GET", "/packages/{project}/{file}", "download", download),
    Route("GET", "/packages/{project}/{digest}/{file}", "download", download),
    Route("GET", "/pypi/{project}/json", "list", project_json),
    Route("GET", "/pypi/{project}/{version}/json", "list", project_json),
    Route("GET", "/{project}/json", "list", project_json),
    Route("GET", "/{project}/", None, to_simple),
    Route("POST", "/RPC2/", "list", search),
    *(Route("POST", path, "update", upload) for path in UPLOADS),
)


# A route, the project and the other words of the path, and where to redirect to; "" if
# the path is as it should be.
Match = tuple[Route, Project, Mapping[str, str], str]


class Router:
    """Finds the route of a path, and remembers it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(_pattern(route.path), route) for route in routes]
        self.match = lru_cache(maxsize=1024)(self._match)

    def _match(self, method: str, path: str) -> Match:
        if len(path) > MAX_PATH:
            why = f"The path has {len(path)} letters; the most is {MAX_PATH}."
            raise HTTPError(414, why)
        # Uploads work with and without the slash: their clients follow no redirect.
        fits = (path, path if path.endswith("/") else path + "/")
        for candidate in fits:
            for pattern, route in self._routes:
                match = pattern.fullmatch(candidate)
                if match and route.method == method:
                    return _describe_match(route, path, match.groupdict())
        methods = {r.method for p, r in self._routes if any(map(p.fullmatch, fits))}
        if not methods:
            raise HTTPError(404, f"There is nothing at {quoted(path)}.")
        allow = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
        raise HTTPError(405, f"{method[:99]} is not allowed; {allow} is.", Allow=allow)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path)))


def _describe_match(route: Route, path: str, args: dict[str, str]) -> Match:
    project = to_project(args["project"]) if "project" in args else Project("")
    if project is None or path in NO_PROJECTS:
        raise HTTPError(404, f"{quoted(args['project'])} is not a project's name.")
    canonical = route.path.format(**args | {"project": project})
    if route.method != "GET" or route.action == "download" or canonical == path:
        return route, project, args, ""
    location = quote(canonical.encode("latin-1", "replace"), safe="/+!")
    return route, project, args, relative(path, location)


def _is_cross_site(request: Request) -> bool:
    """Did a page of another site send this? Browsers add the password by themselves."""
    if site := request.header("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin, host = request.header("Origin"), request.base_url().split("/")[2]
    return bool(origin) and origin.partition("://")[2].lower() != host.lower()


class App:
    """The WSGI application. `before` and `after` are hooks, yours to extend."""

    def __init__(self, settings: Settings, index: Index, users: Users) -> None:
        self.settings = settings
        self.index = index
        self.users = users
        self.before: list[Before] = [index.pull]
        self.after: list[After] = [index.push]
        self.verbose = False  # a log line for every request
        # Uploads to a bucket take half of its SLOTS, and of App Engine's memory.
        self.uploads = threading.Semaphore(4 if settings.bucket_name else 8)
        self.searches = threading.Semaphore(8)
        own = Route("GET", settings.health_endpoint, None, health)
        self._router = Router((own, *ROUTES))

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/"
        request = Request(environ, method, path, time.monotonic())
        request.behind_proxy = self.settings.behind_proxy
        response = self.respond(request)
        start_response(response.status, [*response.headers, NOSNIFF])
        return response.body if method != "HEAD" else ()

    def respond(self, request: Request) -> Response:
        """Answer a request, whatever happens."""
        try:
            response = self._respond(request)
        except HTTPError as refusal:
            # What is missing in an old listing may be there by now.
            unsure = refusal.status == 404 and request.stale_since is not None
            response = self._refuse(request, NOT_NOW if unsure else refusal)
        except OSError as fault:
            if not isinstance(fault, Away):
                self._log(logging.ERROR, request, f"the store failed: {fault}")
            response = self._refuse(request, BY_ERRNO.get(fault.errno, NO_DISK))
        except Exception:
            self._log(logging.ERROR, request, "fault", exc_info=True)
            why = "The server failed; its log says why."
            response = self._refuse(request, HTTPError(500, why))
        finally:
            for clean_up in request.cleanup:
                with contextlib.suppress(OSError):  # a disk may be read-only by now
                    clean_up()
        if self.verbose:
            self._log(logging.INFO, request, response.status)
        return response

    def _respond(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        match = self._router.match(method, request.path)
        route, request.project, request.args, location = match
        request.route = route
        if request.method == "POST" and _is_cross_site(request):
            raise HTTPError(403, "A page of another site sent this; nothing was done.")
        if route.action in self.settings.authenticate:
            self._authorize(request)
        if location:
            return redirect(with_query(location, request), 301)
        for before in self.before:
            before(request)
        response = route.handler(self, request)
        for after in self.after:
            response = after(request, response) or response
        for change in response.changes:
            self._log(logging.INFO, request, _in_words(change))
        if request.stale_since is not None:  # RFC 7234, 5.5
            age = f"{time.monotonic() - request.stale_since:.0f}"
            stale = ("Age", age), ("Warning", '110 - "Response is Stale"')
            response = replace(response, headers=response.headers + stale)
        return response

    def _authorize(self, request: Request) -> None:
        try:
            header = request.header("Authorization")
            request.user = self.users.verify(header, self._address(request))
        except (SettingsError, OSError) as fault:  # the file was edited, and is broken
            log.error("%s", fault)
            why = "The file of users cannot be used; the server's log says why."
            raise HTTPError(503, why, Retry_After="60") from fault

    def _address(self, request: Request) -> str:
        """The client's address: the last one, as a proxy adds it at the end."""
        value = request.environ.get(self.settings.address_key, "")
        return one_line(value[-100:]).rpartition(",")[2].strip()

    def _refuse(self, request: Request, why: HTTPError) -> Response:
        if why.status in (401, 403) or request.method == "POST":
            self._log(logging.WARNING, request, f"refused with {why.status}: {why}")
        answer = text_response(why.status, why.message, *why.headers)
        environ = request.environ
        sends = environ.get("CONTENT_LENGTH") or environ.get("HTTP_TRANSFER_ENCODING")
        if sends and request.unread != 0 and (connection := connection_of(request)):
            return replace(answer, body=answer_early(answer.body, connection))
        return answer

    def _log(self, level: int, request: Request, what: str, **more: Any) -> None:
        who = request.user or self._address(request)
        trace = request.environ.get("HTTP_X_CLOUD_TRACE_CONTEXT", "")[:99].split("/")[0]
        if trace and self.settings.cloud_project:
            trace = f"projects/{self.settings.cloud_project}/traces/{trace}"
        extra = {"cloud": {"logging.googleapis.com/trace": trace}}
        line = (request.method[:20], quoted(request.path), who, one_line(what)[:2000])
        log.log(level, "%s %s by %s: %s", *line, extra=extra, **more)


def _in_words(change: Addition | Removal) -> str:
    if isinstance(change, Addition):
        return f"added {change.filename} sha256={change.facts.sha256}"
    return f"removed {change.distribution.filename} {change.distribution.hashes}"


class CloudFormatter(logging.Formatter):
    """One JSON object a line, as App Engine and Cloud Run read them from stderr."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"severity": record.levelname, "message": super().format(record)}
        return json.dumps(entry | getattr(record, "cloud", {}))


def _set_up_log(*, hosted: bool) -> None:
    """Send log lines to stderr, unless the embedding program handles them."""
    if not log.hasHandlers():
        text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
        handler = logging.StreamHandler()
        handler.setFormatter(CloudFormatter() if hosted else text)
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def get_app(
    *, root: str | Path = "", users: Mapping[str, str] | None = None, **settings: object
) -> App:
    """Make the application from keywords and, where they are silent, the environment.

    `root` is short for `local_package_directory`; `users` maps names to hashes as
    hash_password() makes them, instead of a file. The other keywords are the words of
    the environment in lower case. Raises SettingsError for what cannot work.
    """
    if root:
        settings["local_package_directory"] = root
    values = {name.upper(): _as_text(name, it) for name, it in settings.items()}
    if unknown := sorted(values.keys() - DEFAULTS.keys()):
        why = f"get_app() takes no {unknown[0].lower()!r}"
        raise SettingsError(f"{why}, but {', '.join(DEFAULTS).lower()}.")
    checked = Settings({**os.environ, **values})
    if not isinstance(users, (Mapping, type(None))):
        raise SettingsError(f"users is a {type(users)}; it takes a dict, user to hash.")
    who = Users(users if users is not None else checked.password_file)
    if checked.authenticate - {"update"} and not who.logins().checks:
        actions = ", ".join(sorted(checked.authenticate))
        raise _bad("AUTHENTICATE", actions, f"there are no users. {who.advice}")
    _set_up_log(hosted=checked.hosted)
    store: Store = _cloud(checked) if checked.bucket_name else Directory(checked.root)
    if checked.remote and not checked.bucket_name:
        log.info("REMOTE_PACKAGE_DIRECTORY is served, as no BUCKET_NAME is set")
    log.info("pypi_ae %s serves %s", __version__, place_of(checked))
    app = App(checked, Index(store, checked.stale_seconds), who)
    look_at_start(app.index)
    if checked.root.exists() and not os.access(checked.root, os.W_OK):
        log.warning("%s cannot be written: uploads will fail", checked.root)
    return app


def look_at_start(index: Index) -> None:
    """Look at the root, so that the log says at once if it cannot be read."""
    if not index.store.gate:
        index.root(time.monotonic())
        return
    look = ThreadPoolExecutor(1).submit(index.root, time.monotonic())
    if os.name == "posix":
        os.register_at_fork(before=look.exception)  # a child would wait for its locks


def place_of(settings: Settings) -> str:
    root = str(settings.root.absolute())
    cloud = f"{settings.bucket_name}:{settings.remote}, cached in {root},"
    return cloud if settings.bucket_name else root


def _as_text(name: str, value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(_as_text(name, item) for item in value)
    if not isinstance(value, (str, Path, int, float, type(None))):
        raise _bad(name, repr(value), "it takes text, a path, a number, or a list")
    return "" if value is None else str(value)


def _cloud(settings: Settings) -> Cloud:
    try:
        import gcs_rest

        if not find_spec("google.auth"):  # imported with the first token, not before
            raise ImportError("No module named 'google.auth'")
    except ImportError as fault:
        need = "BUCKET_NAME needs gcs_rest.py beside this file, and the packages"
        install = "google-auth and requests (pip install google-auth requests)"
        raise SettingsError(f"{need} {install}: {fault}") from fault
    return Cloud(gcs_rest.Bucket(settings.bucket_name), settings)


# ---- 16. Command line ----------------------------------------------------------------
# The flags are those of pypiserver, as far as they make sense. Each one sets a keyword
# of get_app, so flags, keywords and environment are checked in the same way.

UNUSED = "--backend --cache-control --hash-algo --server"  # what they set is fixed here
FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("-p --port", {"help": "port (8080)"}),
    ("-i -H --interface --host", {"dest": "host", "help": "address (127.0.0.1)"}),
    ("-P --passwords", {"dest": "password_file", "help": "users, in htpasswd format"}),
    ("-a --authenticate", {"help": "actions that need a user, or ."}),
    ("--health-endpoint", {"help": "path that answers Ok (/health)"}),
    ("--welcome", {"dest": "welcome_file", "help": "HTML file of the start page"}),
    ("-o --overwrite", {"action": "store_true", "help": "uploads may replace files"}),
    ("-v --verbose", {"action": "store_true", "help": "log all requests"}),
    (UNUSED, {"dest": "unused", "help": "flags of pypiserver that change nothing"}),
    ("--log-file --server-base-url", {"dest": "more", "help": "refused, with advice"}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"run": run, "passwd": passwd, "tidy": tidy}
    name = arguments.pop(0) if arguments and arguments[0] in commands else "run"
    try:
        return commands[name](arguments)
    except (SettingsError, OSError, HTTPError) as fault:
        print(f"pypi_ae: {fault}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str]) -> int:
    """Serve until interrupted: python pypi_ae.py [run] [DIR] [flags]."""
    import argparse

    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    layout["argument_default"] = argparse.SUPPRESS  # a flag not given sets nothing
    parser = argparse.ArgumentParser("pypi_ae.py", description=__doc__, **layout)
    parser.add_argument("root", nargs="?", metavar="DIR", help="packages (./packages)")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    for names, options in FLAGS:
        parser.add_argument(*names.split(), **options)
    fallback = parser.add_mutually_exclusive_group()
    fallback.add_argument("--fallback-url", help="simple index of unknown projects")
    off: dict[str, Any] = {"action": "store_const", "const": "", "help": "the default"}
    fallback.add_argument("--disable-fallback", dest="fallback_url", **off)
    given = vars(parser.parse_args(arguments))
    if given.pop("more", None):
        why = "leave out a second DIR, --log-file (use 2>FILE) and --server-base-url"
        raise SettingsError(f"{why} (set BEHIND_PROXY).")
    if given.pop("unused", None):
        print(f"These change nothing here: {UNUSED}", file=sys.stderr)
    port = given.pop("port", os.environ.get("PORT", "8080"))
    host, verbose = given.pop("host", "127.0.0.1"), given.pop("verbose", False)
    app = get_app(**given)
    app.verbose = verbose
    return serve(app, host, port)


def serve(app: App, host: str, port: str) -> int:
    """Answer requests with wsgiref, each in a thread, until interrupted."""
    import socketserver
    from wsgiref import simple_server

    class Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
        daemon_threads = True
        request_queue_size = 128  # uv opens many connections at once; 5 are too few

    class QuietHandler(simple_server.WSGIRequestHandler):
        timeout = 60  # seconds; a client that is silent for longer is gone

        def get_environ(self) -> Any:
            return super().get_environ() | {SOCKET: self.connection}

        def log_message(self, *_: object) -> None:
            """Log nothing here: the app has its own log."""

    try:
        server = simple_server.make_server(host, int(port), app, Server, QuietHandler)
    except (OSError, ValueError, OverflowError) as fault:
        why = f"Cannot listen on {host!r}, port {port!r}: {fault}"
        raise SettingsError(f"{why}. Choose others with -i and -p.") from fault
    print(start_message(app, host, server.server_port), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def start_message(app: App, host: str, port: int) -> str:
    """Say what is served, where, who may upload, and which commands to use."""
    shown = "localhost" if host in ("", "0.0.0.0", "::") else host
    url, users = f"http://{shown}:{port}/", sorted(app.users.logins().checks)
    uploads = ", ".join(users) or f"nobody yet. {app.users.advice}"
    if "update" not in app.settings.authenticate:
        uploads = "anybody"
    return (
        f"pypi_ae {__version__} serves {place_of(app.settings)} at {url}\n"
        f"  install:  pip install --index-url {url}simple/ PROJECT\n"
        f"  publish:  twine upload --repository-url {url} dist/*\n"
        f"  uploads:  {uploads}"
    )


def tidy(arguments: Sequence[str]) -> int:
    """Compute missing facts, and move loose files to their folders."""
    import argparse

    parser = argparse.ArgumentParser("pypi_ae.py tidy", description=tidy.__doc__)
    parser.add_argument("root", nargs="?", metavar="DIR", default="")
    parser.add_argument("--dry-run", action="store_true", help="only say what to do")
    given = parser.parse_args(arguments)
    index, count = get_app(root=given.root).index, 0
    for count, line in enumerate(index.tidy(dry_run=given.dry_run), 1):
        print(f"{count:6} {line}", flush=True)
    print(f"{count} to do" if given.dry_run else f"{count} done")
    return 0


def passwd(arguments: Sequence[str]) -> int:
    """Add a user to a file, or change a password; it is hashed with scrypt."""
    import argparse
    import getpass

    parser = argparse.ArgumentParser("pypi_ae.py passwd", description=passwd.__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--stdin", action="store_true", help="read the password there")
    given = parser.parse_args(arguments)
    valid = re.fullmatch(r"[^\s:#]([^:]*[^\s:])?(?<!\.txt)", given.user)
    if not valid or not given.user.isprintable() or os.path.exists(given.user):
        rule = "a user is no file, has no colon, no # first, no space first or last"
        raise SettingsError(f"{given.user!r} cannot be USER: {rule}.")
    password = ""
    # Ctrl-C, Ctrl-D, and a standard input that is closed, which makes it None.
    with contextlib.suppress(KeyboardInterrupt, EOFError, AttributeError):
        if given.stdin:
            password = sys.stdin.readline().rstrip("\r\n")
        elif (typed := getpass.getpass()) == getpass.getpass("The same again: "):
            password = typed
    if not password:
        raise SettingsError("No password, or two that differ; nothing was changed.")
    _write_user(given.file, given.user, hash_password(password))
    print(f"{given.file}: user {given.user!r} is set.")
    return 0


def _write_user(path: Path, user: str, stored: str) -> None:
    """Set one user's line, and keep the others. The new file replaces the old one."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.partition(":")[0].strip() != user]
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    new = path.with_name(f"{path.name}.{os.urandom(8).hex()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in (*kept, f"{user}:{stored}"))
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
