#!/usr/bin/env python3
"""A private Python package index (PyPI) in one file of pure standard library.

    environ -> Request -> route -> authorize -> before -> handler -> after -> Response
                          ROUTES   Users        hooks                hooks

Contents, in the order a request meets them:

     1. Words and errors       the types of checked strings; one error with a status
     2. Settings               one table, one reader: environment or keywords
     3. Names and versions     PEP 503 names, file names, PEP 440 order
     4. Requests and responses what handlers are given and what they give back
     5. Users and passwords    htpasswd files, Basic auth, remembered logins
     6. Archives               core metadata, read out of wheels and sdists
     7. Listings               distributions, their facts, what a page is made of
     8. The directory          where distributions lie, and what is known of them
     9. In step with a bucket  the hooks pull and push; what is mirrored of a bucket
    10. Pages                  content negotiation, HTML and JSON
    11. Downloads              ranges, conditions, core metadata, signatures
    12. Uploads                the streaming multipart parser, and what is checked
    13. Other answers          JSON API, search, start page, health
    14. Routes and the app     who may do what; the WSGI application; get_app()
    15. Command line           run, passwd, tidy

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
    REMOTE_PACKAGE_DIRECTORY the prefix in it; or, without a bucket,        packages
                             a directory that stands for one
    SYNC_SECONDS             how old a listing of the bucket may be         1
    CACHE_MB                 bound of the local cache of a bucket           100
    PASSWORD_FILE            users, in htpasswd format                      htpasswd.txt
    AUTHENTICATE             actions that need a user: list, download,      update
                             update; or "." for none
    FALLBACK_URL             simple index to redirect unknown projects to   none
    PRIVATE_NAMES            glob patterns of names that never fall back    none
    OVERWRITE                may an upload replace a file?                  no
    MAX_UPLOAD_MB            larger uploads get 413; 0: no bound            0, hosted 32
    HEALTH_ENDPOINT          answers "Ok"                                   /health
    WELCOME_FILE             HTML of the start page                         built in

What it is not: a mirror or cache of another index, a place for documentation, or a
user database; it has no roles beyond the three actions.

Licence: MIT. Origin: the project pypi-ae; __version__ says which release this is.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import hmac
import html
import io
import json
import logging
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
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
from urllib.parse import parse_qs, quote

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

if sys.version_info < (3, 11):  # noqa: UP036 - anybody may start it with any Python
    why = f"pypi_ae needs Python 3.11 or later; this is {sys.version.split()[0]}."
    raise SystemExit(why) if __name__ == "__main__" else ImportError(why)

__version__ = "1.0.0"
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


# ---- 2. Settings ---------------------------------------------------------------------
# get_app turns its keywords into names of the environment, so that one function checks
# both. A variable that is empty has its default.

DEFAULTS = {
    "LOCAL_PACKAGE_DIRECTORY": "",
    "TIER": "dev",
    "BUCKET_NAME": "",
    "REMOTE_PACKAGE_DIRECTORY": "",
    "SYNC_SECONDS": "1",
    # App Engine's smallest class has 384 MB, for the workers, uploads and this cache.
    "CACHE_MB": "100",
    "PASSWORD_FILE": "",
    "AUTHENTICATE": "update",
    "FALLBACK_URL": "",
    "PRIVATE_NAMES": "",
    "OVERWRITE": "no",
    "MAX_UPLOAD_MB": "",
    "HEALTH_ENDPOINT": "/health",
    "WELCOME_FILE": "",
}
YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")
HOSTED = ("GAE_ENV", "K_SERVICE")  # set by App Engine and by Cloud Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The checked settings. Sizes are in bytes; 0 means no bound."""

    root: Path
    bucket_name: str
    remote: str  # prefix in the bucket; without a bucket, a directory in its place
    sync_seconds: float
    cache_bytes: int
    password_file: Path | None
    authenticate: frozenset[str]
    fallback_url: str
    private_names: tuple[str, ...]
    overwrite: bool
    max_upload: int
    health_endpoint: str
    welcome_file: Path | None
    hosted: bool
    cloud_project: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check all settings; raise SettingsError for one that cannot work."""
        values = {
            name: environ.get(name, "").strip() or default
            for name, default in DEFAULTS.items()
        }
        hosted = any(name in environ for name in HOSTED)
        # Google cuts off requests above 32 MB. Our own limit answers with a reason.
        values["MAX_UPLOAD_MB"] = values["MAX_UPLOAD_MB"] or ("32" if hosted else "0")
        root, remote = _directories(values)
        return cls(
            root=root,
            bucket_name=values["BUCKET_NAME"],
            remote=remote,
            sync_seconds=_number(values, "SYNC_SECONDS"),
            cache_bytes=int(_number(values, "CACHE_MB") * 1_000_000),
            password_file=_password_file(values),
            authenticate=_actions(values["AUTHENTICATE"]),
            fallback_url=_url(values, "FALLBACK_URL"),
            private_names=tuple(map(normalize, _split(values["PRIVATE_NAMES"]))),
            overwrite=_yes_or_no(values, "OVERWRITE"),
            max_upload=int(_number(values, "MAX_UPLOAD_MB") * 1_000_000),
            health_endpoint=_endpoint(values["HEALTH_ENDPOINT"]),
            welcome_file=_file(values, "WELCOME_FILE"),
            hosted=hosted,
            cloud_project=environ.get("GOOGLE_CLOUD_PROJECT", ""),
        )


def _directories(values: Mapping[str, str]) -> tuple[Path, str]:
    """Return the local directory and the remote one."""
    tier, bucket = values["TIER"], values["BUCKET_NAME"]
    if tier != "dev" and not bucket:
        need = "it needs a bucket: set BUCKET_NAME, or use TIER=dev for a directory"
        raise _bad("TIER", tier, need)
    default = "packages" if tier == "dev" else "/tmp/packages"
    root = Path(values["LOCAL_PACKAGE_DIRECTORY"] or default)
    remote = values["REMOTE_PACKAGE_DIRECTORY"]
    if remote and not bucket and Path(remote).absolute() == root.absolute():
        same = "LOCAL_PACKAGE_DIRECTORY and REMOTE_PACKAGE_DIRECTORY are both"
        raise SettingsError(f"{same} {remote!r}; leave the second out to serve it.")
    return root, remote or ("packages" if bucket else "")


def _bad(name: str, value: str, rule: str) -> SettingsError:
    return SettingsError(f"{name} is {value!r}; {rule}.")


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _actions(text: str) -> frozenset[str]:
    actions = frozenset(_split(text))
    if actions == {"."}:
        return frozenset()
    if not actions <= {"list", "download", "update"}:
        rule = 'it takes list, download and update, or "." if no action needs a user'
        raise _bad("AUTHENTICATE", text, rule)
    return actions


def _yes_or_no(values: Mapping[str, str], name: str) -> bool:
    if values[name].lower() not in YES + NO:
        raise _bad(name, values[name], "it takes yes or no")
    return values[name].lower() in YES


def _number(values: Mapping[str, str], name: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", values[name], re.ASCII):
        raise _bad(name, values[name], "it takes a number, 0 or more")
    return float(values[name])


def _url(values: Mapping[str, str], name: str) -> str:
    if values[name] and not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", values[name]):
        raise _bad(name, values[name], "it takes an http(s) URL without a query")
    return values[name].rstrip("/")


def _endpoint(path: str) -> str:
    if not re.fullmatch(r"/[a-z0-9/_-]*[a-z0-9_-]", path, re.I | re.ASCII):
        raise _bad("HEALTH_ENDPOINT", path, "it takes a path such as /health")
    if path.split("/")[1] in ("simple", "packages", "pypi", "legacy", "RPC2"):
        raise _bad("HEALTH_ENDPOINT", path, "this path is in use; take another")
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
MAX_VERSION = 200  # letters; a longer one is no version, so that int() stays fast
UPLOADABLE = (".whl", ".tar.gz", ".zip")  # wheels and sdists, as PyPI takes them


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
    """Split name-version at the last hyphen before a valid version, if there is one."""
    cuts = [match.start() for match in re.finditer("-", stem)]
    splits = [(stem[:cut], stem[cut + 1 :]) for cut in reversed(cuts)]
    of_project = [split for split in splits if normalize(split[0]) == project]
    valid = [split for split in splits if _VERSION.fullmatch(split[1])]
    return next(iter(of_project + valid + splits), None)


def version_key(version: str) -> tuple[Any, ...]:
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


def is_final(key: tuple[Any, ...]) -> bool:
    """Is this the key of a version that is neither a pre-release nor a dev release?"""
    return bool(key[0]) and key[3] == (2,) and key[5] == float("inf")


# ---- 4. Requests and responses -------------------------------------------------------
# A Request is a thin reading of the WSGI environ. A Response is a value: those of pages
# are made once and answered many times, so nothing may change one.

STATUS = {200: "OK", 301: "Moved Permanently", 302: "Found"}
TEXT = "text/plain; charset=utf-8"
CHUNK = 1 << 20  # bytes per read; gunicorn 27 receives as many, and copies leftovers
COMPANIONS = (".metadata", ".asc", ".yanked")  # of a distribution, by their suffix


class Addition(NamedTuple):
    """A distribution that a request added; `source` is its staged file."""

    filename: Filename
    project: Project
    version: str
    source: Path
    size: int
    facts: Facts
    signature: bytes
    uploader: str
    overwrite: bool


class Removal(NamedTuple):
    """A distribution that a request removed."""

    distribution: Distribution


@dataclass(frozen=True, slots=True)
class Response:
    """Status line, headers, body, and what the request changed (for after hooks)."""

    status: str
    headers: tuple[tuple[str, str], ...]
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
    args: Mapping[str, str] = field(default_factory=dict)  # what else the path names
    user: str = ""  # who is known to ask; "" if nobody had to say
    unread: int | None = None  # bytes of the body; None: none was asked for
    staged: list[Path] = field(default_factory=list)  # to be gone when it is over

    def header(self, name: str) -> str:
        return str(self.environ.get("HTTP_" + name.upper().replace("-", "_"), ""))

    def base_url(self) -> str:
        """The URL of this app as the client sees it, without a slash at the end."""
        environ = self.environ
        scheme = self._forwarded("Proto") or environ["wsgi.url_scheme"]
        host = self._forwarded("Host") or environ.get("HTTP_HOST")
        host = host or f"{environ['SERVER_NAME']}:{environ['SERVER_PORT']}"
        prefix = self._forwarded("Prefix").strip("/")
        path = quote(environ.get("SCRIPT_NAME", ""), encoding="latin-1").strip("/")
        return "/".join(filter(None, (f"{scheme}://{host}", prefix, path)))

    def _forwarded(self, what: str) -> str:
        # Set by a proxy in front; its first value is the client's side of the chain.
        value = self.header(f"X-Forwarded-{what}").split(",")[0].strip()
        return value if re.fullmatch(r"[\w.:/\[\]~%-]*", value, re.ASCII) else ""


def wanted(request: Request) -> tuple[Project | None, str]:
    """The project and, for a download, the distribution that a path is about."""
    name = distribution_of(request.args.get("file", ""))
    if request.project or not name:
        return request.project or None, name
    parsed = parse_filename(name)
    return parsed.project if parsed else None, name


def distribution_of(name: str) -> str:
    """The distribution that a companion belongs to; any other name as it is."""
    suffix = next(filter(name.endswith, COMPANIONS), "")
    return name.removesuffix(suffix)


def text_response(status: int, message: str, *headers: tuple[str, str]) -> Response:
    """A sentence for a person, in the body and, when refusing, in the reason phrase."""
    body = f"{message}\n".encode()
    reason = STATUS.get(status) or _reason(message)  # which is all that twine shows
    plain = (("Content-Type", TEXT), ("X-Content-Type-Options", "nosniff"))
    length = ("Content-Length", str(len(body)))
    return Response(f"{status} {reason}", (*headers, *plain, length), (body,))


def _reason(message: str) -> str:
    # A reason phrase is latin-1 without control characters (RFC 9112, 4); gunicorn
    # turns anything else into a 500. 400 letters keep any proxy's line limit.
    return one_line(message)[:400].encode("latin-1", "replace").decode("latin-1")


def one_line(text: str) -> str:
    """Text without control characters: what a stranger sent adds no line to a log."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)


def redirect(location: str, status: int = 302) -> Response:
    """A relative location survives every prefix that a proxy adds or strips."""
    return text_response(status, f"See {location}", ("Location", location))


def relative(here: str, there: str) -> str:
    """The way from one path to another that does not name the root."""
    return "../" * (here.count("/") - 1) + there[1:]


def with_query(path: str, request: Request) -> str:
    query = request.environ.get("QUERY_STRING", "")
    return f"{path}?{quote(query, safe='=&+%/')}" if query else path


def already_exists(request: Request, filename: str) -> HTTPError:
    # twine knows a duplicate by 400 and these words; uv, poetry and pdm by 409.
    return HTTPError(
        400 if "twine" in request.header("User-Agent") else 409,
        f"File already exists: {filename} is here with other bytes. "
        "Raise the version, or start the server with --overwrite.",
    )


# ---- 5. Users and passwords ----------------------------------------------------------
# The htpasswd file is read again when it changes, and all its lines are checked. One
# table maps each hash format to the function that computes it. Verified logins are
# remembered in memory, by a keyed hash, until the file changes.

# A check takes 16 MiB (2**14 * 8 * 128 bytes) and about 40 ms. Only one runs at a time.
SCRYPT_LN = 14
MAX_AUTHORIZATION = 4096  # bytes; sha-crypt takes longer for a longer password
NO_USERS = (
    "This needs a user, but there are no users. Add one on the server with: "
    "python pypi_ae.py passwd htpasswd.txt USER"
)
_ITOA64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

Compute = Callable[..., str]  # (password: bytes, *groups of the pattern) -> digest
Check = Callable[[bytes], bool]


def hash_password(password: str) -> str:
    """Hash a password with scrypt, for an htpasswd line or get_app(users=...)."""
    cost, salt = (str(SCRYPT_LN), "8", "1"), _b64(os.urandom(16))
    digest = _scrypt(password.encode(), *cost, salt, _b64(bytes(32)))
    return "$scrypt$ln={},r={},p={}$".format(*cost) + f"{salt}${digest}"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


def _scrypt(password: bytes, ln: str, r: str, p: str, salt: str, digest: str) -> str:
    """Compute $scrypt$ as passlib writes it; `digest` gives the length."""
    cost = {"n": 1 << int(ln), "r": int(r), "p": int(p)}
    memory = 128 * cost["r"] * (cost["n"] + cost["p"] + 2) + (1 << 20)  # 1 MiB spare
    size = len(_unb64(digest))
    key = hashlib.scrypt(password, salt=_unb64(salt), maxmem=memory, dklen=size, **cost)
    return _b64(key)


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
    third = len(hashed) // 3
    a, b, c = 0, third, 2 * third
    text = ""
    for _ in range(third):
        text += _to64(hashed, a, b, c)
        a, b, c = (c + 1, a + 1, b + 1) if kind == "5" else (b + 1, c + 1, a + 1)
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


# A check that needs more than 256 MB would kill the instance.
_SCRYPT_COST = r"ln=(1[0-7]|[1-9]),r=(1[0-6]|[1-9]),p=([1-9])"
_B64 = r"((?:[A-Za-z\d+/]{4})*[A-Za-z\d+/]{2,4})"
_SCHEMES: tuple[tuple[str, Compute], ...] = (
    (rf"\$scrypt\${_SCRYPT_COST}\${_B64}\${_B64}", _scrypt),
    (r"\{SHA\}([A-Za-z\d+/]{27}=)", _sha1),
    (r"\$(apr1|1)\$([^$]{0,8})\$([./\w]{22})", _md5_crypt),
    (r"\$(5)\$(?:rounds=(\d{1,7})\$)?([^$]{0,16})\$([./\w]{43})", _sha_crypt),
    (r"\$(6)\$(?:rounds=(\d{1,7})\$)?([^$]{0,16})\$([./\w]{86})", _sha_crypt),
    (r"(\$2[abxy]\$(?:0[4-9]|[12]\d|3[01])\$[./\w]{53})", _bcrypt),
)


def password_check(stored: str, where: str) -> Check:
    """Make the check of one stored hash; raise SettingsError if it cannot be used."""
    again = "set this password again with: python pypi_ae.py passwd FILE USER"
    for pattern, compute in _SCHEMES:
        if match := re.fullmatch(pattern, stored, re.ASCII):
            if compute is _bcrypt and not find_spec("bcrypt"):
                need = "a bcrypt hash needs the package bcrypt"
                raise SettingsError(f"{where}: {need}. pip install bcrypt, or {again}")
            return partial(_is_right, compute, match.groups())
    kind = "DES crypt hash" if re.fullmatch(r"[./\w]{13}", stored) else "plaintext"
    if match := re.match(r"\$[^$]*\$|\{\w+\}", stored):
        kind = f"{match[0]} hash"
    raise SettingsError(f"{where}: this {kind} cannot be used; {again}")


def _is_right(compute: Compute, groups: Sequence[str], password: bytes) -> bool:
    return hmac.compare_digest(compute(password, *groups), groups[-1])


class Logins(NamedTuple):
    """The users at one state of their file, and the logins verified since then."""

    state: object
    checks: dict[str, Check]  # by user
    verified: dict[bytes, str]  # user by keyed hash of the credentials


class Users:
    """Verifies users, from a mapping of user to hash or from an htpasswd file."""

    def __init__(self, source: Mapping[str, str] | Path | None) -> None:
        self._path = source if isinstance(source, Path) else None
        self._secret = os.urandom(32)
        self._one_at_a_time = threading.Lock()  # a check takes 16 MiB or more
        users = source.items() if isinstance(source, Mapping) else ()
        checks = {user: password_check(h, f"user {user!r}") for user, h in users}
        self._logins = Logins(None, checks, {})
        self.logins()

    def logins(self) -> Logins:
        """Return the users. A file that has changed is read again."""
        if self._path and (state := file_state(self._path)) != self._logins.state:
            text = self._path.read_text("utf-8", "replace") if state else ""
            checks = dict(_read_users(text, self._path.name))
            self._logins = Logins(state, checks, {})
        return self._logins

    def verify(self, header: str) -> str:
        """Return the user of a Basic Authorization header (RFC 7617).

        Raises 401 if the credentials are missing or wrong, 403 if there are no users.
        """
        logins = self.logins()
        if not logins.checks:
            raise HTTPError(403, NO_USERS)
        credentials = header.encode("latin-1", "replace")[: MAX_AUTHORIZATION + 1]
        key = hashlib.blake2b(credentials, key=self._secret, digest_size=16).digest()
        if user := logins.verified.get(key):
            return user
        user, password = _basic(credentials)
        # For an unknown user, the check of another user takes the same time.
        decoys = list(logins.checks.values())
        decoy = decoys[zlib.crc32(user.encode() + self._secret) % len(decoys)]
        with self._one_at_a_time:
            right = logins.checks.get(user, decoy)(password)
        if not right or user not in logins.checks:
            raise _unauthorized(f"The password for user {user!r} is not right.")
        logins.verified[key] = user
        return user


def file_state(path: Path | str) -> tuple[int, int, int] | None:
    """Return size, mtime and inode of a file; None if it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:  # no such file, a loop of links, or a closed folder
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


stamp_of = file_state  # TEMPORARY


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
    if not credentials:
        raise _unauthorized("This needs a user and a password (HTTP Basic).")
    scheme, _, encoded = credentials.partition(b" ")
    try:
        if scheme.lower() != b"basic" or len(credentials) > MAX_AUTHORIZATION:
            raise ValueError
        pair = _utf8(base64.b64decode(encoded.strip(), validate=True))
        user, password = pair.split(b":", 1)
        return user.decode(), password
    except ValueError:  # binascii.Error and UnicodeDecodeError are subclasses
        raise _unauthorized("The Authorization header is not HTTP Basic.") from None


def _utf8(sent: bytes) -> bytes:
    """Return UTF-8, as uv sends it (RFC 7617). pip and twine send Latin-1."""
    try:
        sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1").encode()
    return sent


def _unauthorized(message: str) -> HTTPError:
    challenge = 'Basic realm="pypi", charset="UTF-8"'
    return HTTPError(401, message, WWW_Authenticate=challenge)


# ---- 6. Archives ---------------------------------------------------------------------
# Core metadata comes from the distribution itself: METADATA of a wheel, PKG-INFO of an
# sdist. A stranger may have made the archive, so every read is bounded. What archive
# readers raise becomes ArchiveError. An OSError of the source means that the store
# failed, so it passes unchanged.

MAX_METADATA = 4 << 20  # bytes; with a long README, metadata on PyPI has up to 1 MiB
MAX_PIECE = 8 << 20  # bytes of one read; the directory of a zip with 80,000 files
MAX_MEMBERS = 100_000  # members of a tar file that are read to find its PKG-INFO
MAX_EXPANSION = 100  # times its packed size; source text unpacks to 3 to 10 times
MIN_EXPANDED = 64 << 20  # bytes; also a small archive may unpack to this size

_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
_PKG_INFO = re.compile(r"(\./)?[^/]+/PKG-INFO")


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

    def read(self, size: int | None = -1) -> bytes:
        most = MAX_PIECE + 1
        data = self._source.read(most if size is None or size < 0 else min(size, most))
        if len(data) > MAX_PIECE or self._source.tell() > self._end:
            raise ArchiveError("it unpacks to too many bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset <= self._end:
            raise ArchiveError("it refers to bytes beyond its end")
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def seekable(self) -> bool:
        return True


def read_core_metadata(source: IO[bytes], filename: str, size: int) -> CoreMetadata:
    """Read METADATA from a wheel or PKG-INFO from an sdist of `size` bytes.

    Raises ArchiveError if the archive is broken. Errors of `source` pass unchanged.
    """
    try:
        if filename.endswith((".whl", ".zip")):
            name = _METADATA if filename.endswith(".whl") else _PKG_INFO
            return _parse_metadata(_zip_member(source, size, name))
        return _parse_metadata(_tar_member(source, size))
    except (ArchiveError, HTTPError, MemoryError, OSError):
        raise
    except Exception as fault:  # zipfile, tarfile and zlib raise about ten kinds
        raise ArchiveError(f"it cannot be read: {fault}") from fault


def _zip_member(source: IO[bytes], size: int, name: re.Pattern[str]) -> bytes:
    import zipfile  # takes 10 ms; only uploads and new files need it

    try:
        archive = zipfile.ZipFile(BoundedFile(source, size))
    except zipfile.BadZipFile as fault:
        if isinstance(fault.__context__, OSError):  # zipfile hides errors of its source
            raise fault.__context__ from None
        raise
    members = [m for m in archive.infolist() if name.fullmatch(m.filename)]
    if len(members) != 1:
        raise ArchiveError(f"it has {len(members)} files like {name.pattern!r}, not 1")
    # Only stored and deflated members: the other methods unpack without a bound.
    if members[0].file_size > MAX_METADATA or members[0].compress_type not in (0, 8):
        raise ArchiveError(f"{members[0].filename} is too large, or packed unusually")
    with archive.open(members[0]) as member:
        return member.read(MAX_METADATA)


def _tar_member(source: IO[bytes], size: int) -> bytes:
    import gzip
    import tarfile

    end = max(MIN_EXPANDED, MAX_EXPANSION * size)
    unpacked = BoundedFile(gzip.GzipFile(fileobj=source), end)  # type: ignore[arg-type]
    try:
        with tarfile.open(fileobj=unpacked, mode="r:") as archive:
            last = -1
            for _ in range(MAX_MEMBERS):
                member = archive.next()
                if not member or member.offset <= last:  # CVE-2025-8194: a loop
                    break
                last = member.offset
                if _PKG_INFO.fullmatch(member.name) and member.isreg():
                    content = archive.extractfile(member)
                    if content and member.size <= MAX_METADATA:
                        return content.read()
                archive.members.clear()  # type: ignore[attr-defined]  # saves memory
    except gzip.BadGzipFile as fault:  # an OSError, but not one of the source
        raise ArchiveError(f"it cannot be read: {fault}") from fault
    raise ArchiveError("it has no PKG-INFO that can be read")


def _parse_metadata(text: bytes) -> CoreMetadata:
    """Read the header fields of core metadata (RFC 822 style, UTF-8)."""
    fields: dict[str, str] = {}
    for line in text.decode("utf-8", "replace").splitlines():
        if not line.strip():
            break
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields.setdefault(key.lower(), value.strip())
    name, version = fields.get("name"), fields.get("version")
    if not name or not version:
        raise ArchiveError("its metadata has no Name or no Version")
    return CoreMetadata(name, version, fields.get("requires-python", ""), text)


# ---- 7. Listings ---------------------------------------------------------------------
# A listing is what a project page is made of. It is immutable but for the answers that
# are rendered from it, so a page is rendered once for as long as nothing changes.

FILES_REMEMBERED = 10_000  # distributions in listings kept in memory: about 15 MB
METADATA_REMEMBERED = 4 << 20  # bytes of core metadata and keys: some 500 wheels


class Facts(NamedTuple):
    """What only the bytes of a distribution tell. Digests in hex; "" for none."""

    sha256: str
    requires_python: str = ""
    core_metadata: str = ""  # sha256 of the bytes that <file>.metadata answers


def facts_from(filename: str, sha256: str, metadata: CoreMetadata) -> Facts:
    is_wheel = filename.endswith(".whl")  # PEP 658 is for wheels
    digest = hashlib.sha256(metadata.text).hexdigest() if is_wheel else ""
    return Facts(sha256, metadata.requires_python, digest)


def read_facts(source: BinaryIO, filename: str, size: int) -> Facts:
    """Read a distribution once from end to end, and its metadata where it has any."""
    sha256 = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
    if not filename.endswith((*UPLOADABLE, ".tgz")):
        return Facts(sha256)
    try:
        source.seek(0)
        return facts_from(filename, sha256, read_core_metadata(source, filename, size))
    except ArchiveError:
        return Facts(sha256)


@dataclass(frozen=True, slots=True)
class Distribution:
    """One wheel or sdist as an index page shows it."""

    filename: Filename
    project: Project
    version: str
    size: int  # bytes
    uploaded: float  # POSIX seconds
    facts: Facts
    yanked: str | None  # the reason, which may be ""; None: not yanked
    signed: bool
    path: str  # where it lies
    stamp: tuple[int, ...]  # changes when its bytes do
    md5: str = ""  # all that is known of an object which was copied into a bucket

    @property
    def url(self) -> str:
        """Its address below the root of this app."""
        return f"packages/{self.project}/{quote(self.filename)}"

    @property
    def hashes(self) -> dict[str, str]:
        """The best hash that is known, in hex, by its name; {} if none is."""
        known = (
            {"sha256": self.facts.sha256} if self.facts.sha256 else {"md5": self.md5}
        )
        return known if any(known.values()) else {}

    @property
    def tag(self) -> str:
        """Its entity tag: the same bytes, the same tag, wherever they are served."""
        return f'"{self.facts.sha256 or self.md5 or self.stamp[0]}"'


Answer = tuple["Response", "Response"]  # in full, and 304
T = TypeVar("T")


class Listing:
    """The distributions of one project, in the order of their versions."""

    def __init__(self, project: Project, found: Iterable[Distribution]) -> None:
        self.project = project
        self.distributions = sorted(found, key=_by_version)
        self.by_name = {str(d.filename): d for d in self.distributions}
        self.answers: dict[tuple[str, bool], Answer] = {}

    def versions(self) -> dict[tuple[Any, ...], str]:
        """Each version once (PEP 700), oldest first; 1.0 and 1.0.0 are the same."""
        names: dict[tuple[Any, ...], str] = {}
        for found in self.distributions:
            names.setdefault(version_key(found.version), found.version)
        return names


def _by_version(found: Distribution) -> tuple[Any, ...]:
    return version_key(found.version), found.filename


class Catalog:
    """The names of all projects: their folders, and what lies loose beside these."""

    def __init__(
        self, folders: Mapping[Project, Any], loose: Mapping[Project, Any]
    ) -> None:
        self.folders, self.loose = folders, loose
        self.projects = sorted({*folders, *loose})
        self.answers: dict[tuple[str, bool], Answer] = {}


class Remembered(Generic[T]):
    """Values by key, bounded: what was kept first is forgotten first."""

    def __init__(self, most: int) -> None:
        self._most, self._total = most, 0  # of what sizes are counted in
        self._values: dict[Hashable, tuple[T, int]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        kept = self._values.get(key)
        return kept[0] if kept else None

    def keep(self, key: Hashable, value: T, size: int) -> None:
        with self._lock:
            self._total += size - self._drop(key)
            self._values[key] = value, size
            while self._total > self._most and len(self._values) > 1:
                self._total -= self._drop(next(iter(self._values)))

    def _drop(self, key: Hashable) -> int:
        dropped = self._values.pop(key, None)
        return dropped[1] if dropped else 0


class Locks:
    """A lock per project, striped: those who wait for one seldom wait for another."""

    def __init__(self) -> None:
        self._locks = [threading.Lock() for _ in range(64)]

    def of(self, project: Project) -> threading.Lock:
        return self._locks[hash(project) % len(self._locks)]


# ---- 8. The directory ----------------------------------------------------------------
#     <root>/<project>/<filename>   what uploads make
#     <root>/<filename>             loose files: listed and served, never written
#     <root>/.pypi_ae/              uploads in progress, and facts; may be deleted
# A listing is trusted while the folder's and the root's times stay as they were, for
# LOOK_SECONDS or, if the look took long, ten times as long as that took. Facts are
# computed once per file and kept as JSON lines, one file per project, keyed by name,
# size, mtime and inode: no start, and no other worker, hashes again.

LOOK_SECONDS = 1.0  # a file rewritten in place does not change its folder's time
LOOK_SHARE = 0.1  # of the time goes into looks: in thousands of files one takes long
LOOK_MOST = 30.0  # seconds; a look may have been slow for other reasons
ABANDONED_SECONDS = 600  # an upload not written to for so long has lost its process

Stamps = Mapping[str, tuple[int, int, int]]  # by path: size, mtime_ns, inode
FactsByKey = dict[tuple[Any, ...], Facts]  # (name, *stamp)


class Look(NamedTuple):
    """What was seen at one look, and until when (monotonic seconds) to trust it."""

    mtimes: dict[str, int]  # of the root, and of the project's folders
    until: float
    stamps: Stamps
    facts: FactsByKey
    listing: Listing
    whole: bool  # could every file be read?


class Directory:
    """Distributions in a directory: found, described, read, added and removed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        make_folder(self.root)
        self.staging = self.root / ".pypi_ae" / "staging"
        self._facts = self.root / ".pypi_ae" / "facts"
        self._catalog = (-1, Catalog({}, {}))  # and the mtime of the root
        self._looks: Remembered[Look] = Remembered(FILES_REMEMBERED)
        self._metadata: Remembered[bytes] = Remembered(METADATA_REMEMBERED)
        self._locks = Locks()

    # What is there...

    def listing(self, project: Project) -> Listing:
        if listing := self._trusted(project):
            return listing
        with self._locks.of(project):  # those who waited find what the first one saw
            return self._trusted(project) or self._look(project)

    current = listing

    def _trusted(self, project: Project) -> Listing | None:
        look = self._looks.get(project)
        young = look and time.monotonic() < look.until
        if look and young and _mtimes(look.mtimes) == look.mtimes:
            return look.listing
        return None

    def find(self, project: Project, filename: str) -> Distribution | None:
        """One distribution, its facts those of the bytes that lie there now."""
        found = self.listing(project).by_name.get(filename)
        if found and stamp_of(found.path) != found.stamp:
            with self._locks.of(project):
                found = self._look(project).by_name.get(filename)
        return found

    def catalog(self) -> Catalog:
        mtime, now = mtime_of(str(self.root)), time.time_ns()
        seen, catalog = self._catalog
        if seen == mtime:
            return catalog
        folders: dict[Project, list[str]] = {}
        loose: dict[Project, list[str]] = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.is_dir():
                    if owner := to_project(entry.name):
                        folders.setdefault(owner, []).append(entry.name)
                elif parsed := parse_filename(distribution_of(entry.name)):
                    loose.setdefault(parsed.project, []).append(entry.name)
        catalog = Catalog(folders, loose)
        self._catalog = (mtime if _is_settled(mtime, now) else -1, catalog)
        return catalog

    def everything(self) -> Iterator[Parsed]:
        """Every distribution there is, without its facts."""
        catalog = self.catalog()
        for project in catalog.projects:
            folders = self._folders(project, catalog)
            there = self._owners(project, folders, catalog).items()
            yield from sorted(p for path, p in there if not path.endswith(COMPANIONS))

    def _look(self, project: Project) -> Listing:
        last, now, began = self._looks.get(project), time.time_ns(), time.monotonic()
        # The times come before the names: what changes meanwhile shows next time.
        mtimes, catalog = _mtimes([str(self.root)]), self.catalog()
        folders = self._folders(project, catalog)
        mtimes |= _mtimes(folders)
        owners = self._owners(project, folders, catalog)
        found = {path: stamp_of(path) for path in owners}
        stamps = {path: stamp for path, stamp in found.items() if stamp}
        times = (*mtimes.values(), *(mtime for _, mtime, _ in stamps.values()))
        settled = all(_is_settled(mtime, now) for mtime in times)
        ended = time.monotonic()
        trust = min(max(LOOK_SECONDS, (ended - began) / LOOK_SHARE), LOOK_MOST)
        until = ended + trust if settled else 0.0
        if last and last.until and last.whole and last.stamps == stamps:
            look = last._replace(mtimes=mtimes, until=until)
        else:
            facts = self.facts_of(project, stamps, now)
            listing = Listing(project, _describe(owners, stamps, facts))
            # Within the tick of a clock a file may be rewritten: those are not kept.
            kept = {k: known for k, known in facts.items() if _is_settled(k[2], now)}
            whole = len(facts) == sum(not p.endswith(COMPANIONS) for p in stamps)
            look = Look(mtimes, until, stamps, kept, listing, whole)
        self._looks.keep(project, look, 1 + len(stamps))
        return look.listing

    def _folders(self, project: Project, catalog: Catalog) -> list[str]:
        """The project's folder, and others whose name is a spelling of it."""
        names = catalog.folders.get(project, ())
        return [
            str(self.root / name) for name in dict.fromkeys((project, *sorted(names)))
        ]

    def _owners(
        self, project: Project, folders: Sequence[str], catalog: Catalog
    ) -> dict[str, Parsed]:
        """The files of a project by path, companions too, each with whose it is.

        Of two with one name, the first folder's.
        """
        places = [(folder, _listdir(folder)) for folder in folders]
        places.append((str(self.root), catalog.loose.get(project, ())))
        owners: dict[str, tuple[str, Parsed]] = {}
        for folder, found in places:
            for name in found:
                parsed = parse_filename(distribution_of(name), project)
                if parsed and parsed.project == project:
                    owners.setdefault(name, (os.path.join(folder, name), parsed))
        return dict(owners.values())

    # What its bytes tell...

    def facts_of(self, project: Project, stamps: Stamps, now: int) -> FactsByKey:
        last = self._looks.get(project)
        wanted = {
            (os.path.basename(path), *stamp): path
            for path, stamp in stamps.items()
            if not path.endswith(COMPANIONS)
        }
        facts: FactsByKey = {}
        if last:
            facts |= {key: last.facts[key] for key in wanted if key in last.facts}
        if len(facts) < len(wanted):  # another worker, or an earlier start, may know
            kept = self._kept_facts(project)
            facts |= {key: kept[key] for key in wanted if key in kept}
        for key in [key for key in wanted if key not in facts]:
            if new := _compute_facts(wanted[key], key[1:]):
                facts[key] = new
                if _is_settled(key[2], now):
                    self._keep_facts(project, key, new)
        return facts

    def _kept_facts(self, project: Project) -> FactsByKey:
        facts: FactsByKey = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self._facts / f"{project}.jsonl").read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # torn by a crash
                    name, size, mtime, inode, *rest = json.loads(line)
                    facts[name, size, mtime, inode] = Facts(*rest)
        return facts

    def _keep_facts(
        self, project: Project, key: Sequence[object], facts: Facts
    ) -> None:
        line = json.dumps([*key, *facts]) + "\n"
        try:
            self._facts.mkdir(parents=True, exist_ok=True)
            with open(self._facts / f"{project}.jsonl", "ab", buffering=0) as file:
                file.write(line.encode())  # one write: lines of two workers do not mix
        except OSError as fault:  # a read-only directory is served all the same
            log.warning("facts are not kept, so a restart hashes again: %s", fault)

    # Reading...

    def content(self, found: Distribution, start: int, stop: int) -> BinaryIO:
        """The distribution's file, at byte `start`; the caller reads up to `stop`."""
        return open_at(found.path, start)

    def core_metadata(self, found: Distribution) -> bytes:
        text = self._metadata.get((found.path, found.stamp))
        if text is None:  # a zip file's directory is parsed for it: slower by far
            with open(found.path, "rb") as file:
                text = read_core_metadata(file, found.filename, found.size).text
            self._metadata.keep((found.path, found.stamp), text, 500 + len(text))
        return text

    def signature(self, found: Distribution) -> bytes:
        return Path(found.path + ".asc").read_bytes()

    # Changing...

    def add(self, new: Addition) -> bool:
        """Make a staged file a distribution, at one stroke.

        Returns False when the same bytes are there already; raises FileExistsError
        when others are and `new.overwrite` is not set.
        """
        target = self.root / new.project / new.filename
        key = (new.filename, *(stamp_of(new.source) or ()))
        changed = self._put(new, target)
        if changed:
            self._keep_facts(new.project, key, new.facts)
            Path(f"{target}.asc").unlink(missing_ok=True)  # it signed other bytes
        if new.signature and target.exists():  # a loose file's has no place
            source = new.source.with_suffix(".asc")
            source.write_bytes(new.signature)
            os.replace(source, f"{target}.asc")
        return changed

    def _put(self, new: Addition, target: Path) -> bool:
        for _ in range(3):  # what is in the way may vanish before it is looked at
            homes = [str(self.root), *self._folders(new.project, self.catalog())]
            taken = any(os.path.exists(f"{home}/{new.filename}") for home in homes)
            there = self.find(new.project, new.filename) if taken else None
            if there and there.facts.sha256 == new.facts.sha256:
                return False
            if there and not new.overwrite:
                break
            with contextlib.suppress(FileExistsError):  # at this moment: look again
                give_name(new.source, target, overwrite=new.overwrite)
                if there and Path(there.path) != target:
                    Path(there.path).unlink(missing_ok=True)  # replaced, though loose
                return True
        raise FileExistsError(target)

    def remove(self, found: Distribution) -> None:
        for path in (found.path, f"{found.path}.asc", f"{found.path}.yanked"):
            Path(path).unlink(missing_ok=True)
        folder = Path(found.path).parent
        if folder != self.root:
            with contextlib.suppress(OSError):  # it holds something else, and stays
                folder.rmdir()

    def tidy(self, *, dry_run: bool) -> Iterator[str]:
        """Compute all facts, move loose files to their folders, and say so."""
        for project, names in sorted(self.catalog().loose.items()):
            for name in names:
                loose, home = self.root / name, self.root / project / name
                if home.exists() and not _are_equal(loose, home):
                    yield f"{name} stays: other bytes are in {project}/"
                    continue
                yield f"{name} -> {project}/{name}"
                if not dry_run:
                    with contextlib.suppress(FileExistsError):  # interrupted last time
                        give_name(loose, home, overwrite=False)
                    loose.unlink()
        for project in () if dry_run else self.catalog().projects:
            self.listing(project)


def _are_equal(one: Path, other: Path) -> bool:
    import filecmp

    return filecmp.cmp(one, other, shallow=False)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        why = f"{str(path)!r} cannot be made a directory: {fault.strerror}"
        raise SettingsError(f"{why}. Set LOCAL_PACKAGE_DIRECTORY (DIR).") from fault


def mtime_of(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # it is not there, or as good as that
        return 0


def _listdir(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _describe(
    owners: Mapping[str, Parsed], stamps: Stamps, facts: FactsByKey
) -> Iterator[Distribution]:
    for path, stamp in stamps.items():
        if known := facts.get((os.path.basename(path), *stamp)):
            yield Distribution(  # all else is a companion, or not readable
                *owners[path],
                size=stamp[0],
                uploaded=stamp[1] / 1e9,
                facts=known,
                yanked=_read_yank(path) if path + ".yanked" in stamps else None,
                signed=path + ".asc" in stamps,
                path=path,
                stamp=stamp,
            )


def _mtimes(paths: Iterable[str]) -> dict[str, int]:
    return {path: mtime_of(path) for path in paths}


def _is_settled(mtime: int, now: int) -> bool:
    """Would a change after `now` show in this mtime (both in nanoseconds)?

    Linux stamps in ticks of at most 10 ms, FAT and some network file systems in full
    seconds: within the same tick a second change leaves the time as it was. Times that
    are still to come were set by hand, or by another clock.
    """
    tick = 20_000_000 if mtime % 1_000_000_000 else 2_000_000_000
    return mtime < now - tick or mtime > time.time_ns() + tick


def _read_yank(path: str) -> str:
    """The reason of a yank: the text of <file>.yanked, 1,000 letters at most."""
    try:
        with open(path + ".yanked", encoding="utf-8", errors="replace") as file:
            return " ".join(file.read(1000).split())
    except OSError:  # whatever it is, it says that the file is yanked
        return ""


def _compute_facts(path: str, stamp: tuple[int, ...]) -> Facts | None:
    """Read a file for its facts; None if it goes or changes while it is read."""
    try:
        with open(path, "rb") as file:
            facts = read_facts(file, os.path.basename(path), stamp[0])
            return facts if stamp_of(path) == stamp else None
    except OSError as fault:
        log.warning("%s is not listed, as it cannot be read: %s", path, fault)
        return None


def open_at(path: Path | str, start: int) -> BinaryIO:
    """Open a file at a byte of it; whoever gets it closes it."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - unbuffered, for a socket
    if start:
        file.seek(start)
    return file


def open_staged(folder: Path) -> BinaryIO:
    """Open a new file for an upload in progress, and sweep out those of the dead."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # swept by another worker
            if time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                os.unlink(entry.path)
    return open(folder / os.urandom(16).hex(), "xb", buffering=0)


def write_staged(folder: Path, chunks: Iterable[bytes]) -> Path:
    file = open_staged(folder)
    try:
        with file:
            for chunk in chunks:
                write_all(file, chunk)
    except BaseException:
        Path(file.name).unlink()
        raise
    return Path(file.name)


def write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # an unbuffered file may write less than it is given
        view = view[file.write(view) :]


def give_name(source: Path, target: Path, *, overwrite: bool) -> None:
    """Name a staged file, atomically; raise FileExistsError if the name is taken."""
    name_it = os.replace if overwrite else os.link
    try:
        name_it(source, target)
    except FileNotFoundError:  # the first file of its project, or the last just went
        target.parent.mkdir(exist_ok=True)
        name_it(source, target)
    if os.name == "posix":  # the name has to outlive a power cut, like the bytes
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- 9. In step with a bucket --------------------------------------------------------
#     <prefix>/<project>/<filename>   what uploads make; facts are custom metadata
#     <prefix>/<filename>             loose objects: listed and served, never written
# `pull`, a before hook, makes current what the request reads: its project's listing
# and, less often, that of the root. `push`, an after hook, commits what was changed
# before that is answered; a precondition decides between writers. Between the two,
# handlers see a Mirror: listings in memory, and a bounded cache of files on disk.

ROOT_SECONDS = 60  # times SYNC_SECONDS: to a project's page it only adds loose files
TAIL = 256 << 10  # bytes; nearly every wheel has its .dist-info in its last so many
NEVER = float("-inf")
ANY = "."  # the marker of any change is the folder of all markers
Object = Any  # gcs_rest.Object, or Stored below: they have the same attributes
Objects = list[Object]
Listed = tuple[Objects, list[str]]  # objects, and prefixes


class Bucket(Protocol):
    """What Mirror needs of a bucket: gcs_rest.Bucket has it, and Folder below.

    Raises FileNotFoundError, FileExistsError when a precondition fails, and other kinds
    of OSError when the bucket cannot be asked.
    """

    def list(self, prefix: str, *, delimiter: str = "") -> Listed:
        """Objects whose names begin so; with a delimiter, deeper ones as prefixes."""

    def get(self, name: str) -> Object: ...
    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]: ...
    def insert(
        self, name: str, source: Any, *, metadata: Mapping[str, str], if_generation: int
    ) -> Object: ...
    def patch(
        self, name: str, metadata: Any, *, generation: int, metageneration: int
    ) -> Object: ...
    def delete(self, name: str, *, generation: int) -> None: ...
    def rewrite(self, name: str, to: str, *, generation: int) -> Object: ...


class Known(NamedTuple):
    """What a list call told of a project, when, and which local change it knew of."""

    at: float  # monotonic seconds
    marker: int  # of this project
    any_marker: int  # of whatever changed last
    objects: list[Object]
    loose: list[Object]
    listing: Listing


class Root(NamedTuple):
    """The same of the root."""

    at: float
    marker: int
    catalog: Catalog  # its loose: lists of objects


class Mirror:
    """What is known here of the distributions in a bucket."""

    def __init__(self, settings: Settings, bucket: Bucket, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        own = settings.root.absolute() / ".pypi_ae"
        self.staging = own / "staging"
        self._cache, self._changes = own / "cache", own / "changes"
        for folder in (self._cache, self._changes):
            make_folder(folder)
        self._sync, self._cache_bytes = settings.sync_seconds, settings.cache_bytes
        self._root = Root(NEVER, -1, Catalog({}, {}))
        self._known: Remembered[Known] = Remembered(FILES_REMEMBERED)
        self._root_lock, self._locks = threading.Lock(), Locks()

    # Before a request...

    def pull(self, request: Request) -> None:
        """List what the request will read, unless that was done within SYNC_SECONDS."""
        now, sync = request.started, self._sync
        project, filename = wanted(request)
        if not request.route or not request.route.action:
            return  # a redirect or a start page: nothing has to be current for these
        if project:
            listing = self._listed(project, now - sync, now - ROOT_SECONDS * sync)
            if project in self._root.catalog.loose:  # as fresh as the root, no fresher
                listing = self._listed(project, now - sync, now - sync)
            if not (filename in listing.by_name if filename else listing.distributions):
                self._listed(project, now, now)  # never say no from memory
        elif request.route.action == "update":
            self._listed_root(now - ROOT_SECONDS * sync)
        elif request.route.path == "/simple/":
            self._listed_root(now - sync)

    def _listed(self, project: Project, since: float, root_since: float) -> Listing:
        """The listing of a project, no older than that; of those who wait, one asks."""
        known = self._known.get(project)
        young = known and known.at >= since and self._root.at >= root_since
        if known and young and known.any_marker == self._marker(ANY):
            return known.listing  # after one look at the disk, in nearly all cases
        with self._locks.of(project), asking():
            return self._list(project, since, root_since)

    def _is_fresh(self, known: Known | Root, marker: str, since: float) -> bool:
        return known.at >= since and known.marker == self._marker(marker)

    def _marker(self, name: str) -> int:
        return mtime_of(f"{self._changes}/{name}")

    def _list(self, project: Project, since: float, root_since: float) -> Listing:
        known = self._known.get(project)
        any_marker = self._marker(ANY)  # before the others, which it stands for
        at, marker = time.monotonic(), self._marker(project)
        if known and self._is_fresh(known, project, since):
            at, marker, objects = known.at, known.marker, known.objects
            root = self._listed_root(root_since)
        elif self._is_fresh(self._root, ".root", root_since):
            root, objects = self._root, self._objects(project)
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool:  # side by side, for a cold start
                pending = pool.submit(self._listed_root, root_since)
                objects = self._objects(project)
                root = pending.result()
        loose = root.catalog.loose.get(project, [])
        if known and (known.objects, known.loose) == (objects, loose):
            listing = known.listing  # and the pages rendered from it
        else:
            listing = Listing(project, self._describe(project, [*objects, *loose]))
        known = Known(at, marker, any_marker, objects, loose, listing)
        self._known.keep(project, known, 1 + len(listing.distributions))
        return listing

    def _objects(self, project: Project) -> list[Object]:
        return self.bucket.list(f"{self.prefix}{project}/")[0]

    def _listed_root(self, since: float) -> Root:
        with self._root_lock, asking():
            if self._is_fresh(self._root, ".root", since):
                return self._root
            at, marker = time.monotonic(), self._marker(".root")
            objects, prefixes = self.bucket.list(self.prefix, delimiter="/")
            loose: dict[Project, list[Object]] = {}
            for found in objects:
                if parsed := parse_filename(distribution_of(_base(found.name))):
                    loose.setdefault(parsed.project, []).append(found)
            names = (_base(prefix[:-1]) for prefix in prefixes)
            # A folder by another spelling of a project's name is not looked into.
            folders = {
                Project(name): name for name in names if to_project(name) == name
            }
            catalog = Catalog(folders, loose)
            if catalog.projects == self._root.catalog.projects:
                catalog.answers = self._root.catalog.answers  # the rendered pages
            self._root = Root(at, marker, catalog)
            return self._root

    def _describe(
        self, project: Project, objects: Iterable[Object]
    ) -> Iterator[Distribution]:
        """Distributions in a listing; of two with one name, the one in the folder."""
        names = {found.name for found in objects}
        seen: set[str] = set()
        for found in objects:
            parsed = parse_filename(_base(found.name), project)
            if parsed and parsed.project == project and parsed.filename not in seen:
                seen.add(parsed.filename)
                yield Distribution(
                    *parsed,
                    size=found.size,
                    uploaded=found.created,
                    facts=_stated_facts(found.metadata),
                    yanked=found.metadata.get("yanked"),
                    signed=found.name + ".asc" in names,
                    path=found.name,
                    stamp=(found.generation, found.metageneration),
                    md5=found.md5,
                )

    # What handlers read...

    def catalog(self) -> Catalog:
        return self._listed_root(NEVER).catalog

    def listing(self, project: Project) -> Listing:
        """What `pull` has just made current; without what this request pushed."""
        known = self._known.get(project)
        return known.listing if known else self._listed(project, NEVER, NEVER)

    def current(self, project: Project) -> Listing:
        now = time.monotonic()
        return self._listed(project, now, now)

    def find(self, project: Project, filename: str) -> Distribution | None:
        return self.listing(project).by_name.get(filename)

    def everything(self) -> Iterator[Parsed]:
        with asking():
            objects, _ = self.bucket.list(self.prefix)
        for found in objects:
            *folder, name = found.name[len(self.prefix) :].split("/")
            parsed = parse_filename(name, *folder[:1])
            if parsed and folder in ([], [parsed.project]):
                yield parsed

    def content(
        self, found: Distribution, start: int, stop: int
    ) -> BinaryIO | Iterator[bytes]:
        """Bytes out of the cache; else of the bucket, and kept if they are all."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._cached(found))  # the least recently used go first
            return open_at(self._cached(found), start)
        chunks = self._read(found, start, stop)
        useful = found.size <= self._cache_bytes or not found.facts.sha256
        whole = stop - start == found.size
        return self._keep(found, chunks) if whole and useful else chunks

    def _cached(self, found: Distribution, suffix: str = "") -> Path:
        # The generation is in the name: what was replaced elsewhere is never found.
        return self._cache / f"{found.stamp[0]}-{found.filename}{suffix}"

    def _read(self, found: Distribution, start: int, stop: int) -> Iterator[bytes]:
        if not found.size:  # no Range can say "nothing"
            return iter(())
        end = None if stop == found.size else stop  # whole: then its md5 is compared
        generation = found.stamp[0]
        with asking():
            try:
                return self.bucket.read(
                    found.path, generation=generation, start=start, stop=end
                )
            except FileNotFoundError:
                self._touch(found.project)  # list again: it was replaced or removed
                raise changed_meanwhile(found) from None

    def _keep(self, found: Distribution, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass chunks on while they are written; the cache has them when all have come.

        The bucket's checksum is compared before the last chunk is passed on, so neither
        a client nor the cache ever has a damaged file that looks whole.
        """
        file = open_staged(self.staging)
        try:
            with file:
                for chunk in chunks:
                    write_all(file, chunk)
                    yield chunk
            if not found.facts.sha256:
                self._learn(found, file.name)
            self._cache_file(found, Path(file.name))
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _cache_file(self, found: Distribution, source: Path, suffix: str = "") -> None:
        """Move a file into the cache, and the least recently used out of it."""
        if source.stat().st_size > self._cache_bytes:
            return
        os.replace(source, self._cached(found, suffix))
        with contextlib.suppress(FileNotFoundError):  # another worker does the same
            states = [(e.stat(), e.path) for e in os.scandir(self._cache)]
            excess = sum(state.st_size for state, _ in states) - self._cache_bytes
            for state, path in sorted(states, key=lambda pair: pair[0].st_mtime):
                if excess > 0:
                    os.unlink(path)
                    excess -= state.st_size

    def _learn(self, found: Distribution, path: str) -> None:
        """Write the facts of an object that was copied in by hand to its metadata."""
        generation, metageneration = found.stamp
        try:
            with open(path, "rb") as file:
                facts = read_facts(file, found.filename, found.size)
            self.bucket.patch(
                found.path,
                object_metadata(facts),
                generation=generation,
                metageneration=metageneration,
            )
        except OSError as fault:  # the file is served all the same; its facts can wait
            log.warning("the facts of %s were not written: %s", found.path, fault)
        self._touch(found.project)

    def core_metadata(self, found: Distribution) -> bytes:
        """From the cache; else out of the wheel's tail: one ranged read, rarely two."""
        path = self._cached(found, ".metadata")
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        source: Any = Ranged(found.size, partial(self._read, found))
        with contextlib.suppress(FileNotFoundError):
            source = open(self._cached(found), "rb")  # noqa: SIM115 - closed below
        with source, asking():
            text = read_core_metadata(source, found.filename, found.size).text
        staged = write_staged(self.staging, [text])
        self._cache_file(found, staged, ".metadata")
        staged.unlink(missing_ok=True)  # the cache did not want it
        return text

    def signature(self, found: Distribution) -> bytes:
        with asking():
            there = self.bucket.get(f"{found.path}.asc")
            return b"".join(self.bucket.read(there.name, generation=there.generation))

    # What handlers change, which is nothing until it is pushed...

    def add(self, new: Addition) -> bool:
        return True

    def remove(self, found: Distribution) -> None:
        return None

    # After a request...

    def push(self, request: Request, response: Response) -> Response | None:
        """Commit what a request changed to the bucket, before it is answered."""
        for change in response.changes:
            if isinstance(change, Removal):
                with asking():
                    self._delete(change.distribution)
            elif not self._insert(request, change):
                response = text_response(
                    200, f"OK: {change.filename} was here already."
                )
        return response

    def _insert(self, request: Request, new: Addition) -> bool:
        """Store a distribution; False if the same bytes are there already."""
        name = f"{self.prefix}{new.project}/{new.filename}"
        with asking():
            try:
                changed, replaced = self._replace(new, name)
            except FileExistsError:
                raise already_exists(request, new.filename) from None
            self._sign(f"{name}.asc", new.signature, anew=changed and replaced)
        is_new = new.project not in self._root.catalog.folders
        self._touch(new.project, root=is_new or replaced)
        return changed

    def _replace(self, new: Addition, name: str) -> tuple[bool, bool]:
        """Did the bucket change, and was something in the way?"""
        there = self._loose_object(new)
        if not there:
            try:
                self._store(new, name, 0)
                return True, False
            except FileExistsError:
                there = self.bucket.get(name)
        if _is_same(there, new):
            return False, True
        if not new.overwrite:
            raise FileExistsError(name)
        self._store(new, name, there.generation if there.name == name else 0)
        if there.name != name:
            self.bucket.delete(there.name, generation=there.generation)
        return True, True

    def _loose_object(self, new: Addition) -> Object | None:
        loose = self._root.catalog.loose.get(new.project, ())
        return next((o for o in loose if _base(o.name) == new.filename), None)

    def _store(self, new: Addition, name: str, if_generation: int) -> None:
        metadata = object_metadata(new.facts, new.uploader)
        with open(new.source, "rb") as file:
            stored = self.bucket.insert(
                name, file, metadata=metadata, if_generation=if_generation
            )
        self._cache_file(next(self._describe(new.project, [stored])), new.source)

    def _sign(self, name: str, signature: bytes, *, anew: bool) -> None:
        """Store a signature; when the bytes are others, in place of the last one."""
        generation = 0
        if anew:
            with contextlib.suppress(FileNotFoundError):
                generation = self.bucket.get(name).generation
        if signature:
            source = io.BytesIO(signature)
            with contextlib.suppress(FileExistsError):  # signed before
                self.bucket.insert(name, source, metadata={}, if_generation=generation)
        elif generation:
            self.bucket.delete(name, generation=generation)

    def _delete(self, found: Distribution) -> None:
        try:
            self.bucket.delete(found.path, generation=found.stamp[0])
            if found.signed:
                signature = self.bucket.get(f"{found.path}.asc")
                self.bucket.delete(signature.name, generation=signature.generation)
        except FileNotFoundError:
            pass  # somebody else was quicker
        except FileExistsError:
            raise changed_meanwhile(found) from None
        finally:
            self._touch(found.project)

    def _touch(self, project: Project, *, root: bool = True) -> None:
        """Tell all workers of this instance to list a project again, and the root."""
        for name in (project, ".root", ANY) if root else (project, ANY):
            (self._changes / name).touch()
            os.utime(self._changes / name, ns=(time.time_ns(),) * 2)

    def tidy(self, *, dry_run: bool) -> Iterator[str]:
        """Give each object its facts, and loose ones their folder; say what is done."""
        with asking():
            objects = {there.name: there for there in self.bucket.list(self.prefix)[0]}
        for name, there in sorted(objects.items()):
            folder, base = name[len(self.prefix) : -len(_base(name))], _base(name)
            parsed = parse_filename(distribution_of(base), folder.rstrip("/"))
            if not parsed or folder not in ("", f"{parsed.project}/"):
                continue
            if base == parsed.filename and not there.metadata.get("sha256"):
                yield f"facts of {name}"
                if not dry_run:
                    self._fetch(next(self._describe(parsed.project, [there])))
                    there = self.bucket.get(name)
            if not folder:
                home = f"{self.prefix}{parsed.project}/{base}"
                yield from self._move(there, home, objects.get(home), dry_run=dry_run)

    def _fetch(self, found: Distribution) -> None:
        for _ in self._keep(found, self._read(found, 0, found.size)):
            pass  # on its way into the cache it is learned from

    def _move(
        self, there: Object, home: str, other: Object | None, *, dry_run: bool
    ) -> Iterator[str]:
        if other and not _have_same_bytes(there, other):
            yield f"{there.name} stays: other bytes are at {home}"
            return
        yield f"{there.name} -> {home}"
        if not dry_run:
            if not other:  # else it was interrupted last time
                self.bucket.rewrite(there.name, home, generation=there.generation)
            self.bucket.delete(there.name, generation=there.generation)
            self._touch(Project(_base(home.rpartition("/")[0])))


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turn what the bucket's driver raises into an answer."""
    try:
        yield
    except OSError as fault:
        log.error("the bucket cannot be asked: %s", fault)
        why = "The bucket cannot be reached now. Try again."
        raise HTTPError(503, why, Retry_After="5") from fault


def changed_meanwhile(found: Distribution) -> HTTPError:
    why = f"{found.filename} changed in the bucket at this moment. Try again."
    return HTTPError(503, why, Retry_After="1")


METADATA_KEYS = ("sha256", "requires-python", "core-metadata")  # Facts, in their order


def object_metadata(facts: Facts, uploader: str = "") -> dict[str, str]:
    """Facts as the custom metadata of an object: the README names the keys."""
    found = dict(zip((*METADATA_KEYS, "uploader"), (*facts, uploader), strict=True))
    return {key: value for key, value in found.items() if value}


def _stated_facts(metadata: Mapping[str, str]) -> Facts:
    """Facts out of custom metadata, which anybody may have written there by hand."""
    sha256, requires_python, core_metadata = (
        metadata.get(key, "") for key in METADATA_KEYS
    )
    hexes = re.compile(r"[0-9a-f]{64}")
    return Facts(
        sha256 if hexes.fullmatch(sha256) else "",
        requires_python,
        core_metadata if hexes.fullmatch(core_metadata) else "",
    )


def _is_same(there: Object, new: Addition) -> bool:
    if sha256 := there.metadata.get("sha256"):
        return bool(sha256 == new.facts.sha256)
    with open(new.source, "rb") as file:
        return bool(there.md5 == hashlib.file_digest(file, "md5").hexdigest())


def _have_same_bytes(one: Object, other: Object) -> bool:
    known = [(o.metadata.get("sha256"), o.md5) for o in (one, other)]
    return one.size == other.size and any(
        a and a == b for a, b in zip(*known, strict=True)
    )


def _base(name: str) -> str:
    return name.rpartition("/")[2]


class Ranged(io.RawIOBase):
    """A file read in ranges, its tail first: enough for zipfile to find a member."""

    def __init__(self, size: int, fetch: Callable[[int, int], Iterable[bytes]]) -> None:
        self._size, self._fetch = size, fetch
        self._at, self._start, self._window = 0, size, b""

    def seekable(self) -> bool:
        return True

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
            self._window = b"".join(self._fetch(self._start, end))
        data = self._window[self._at - self._start : stop - self._start]
        self._at += len(data)
        return data


class Stored(NamedTuple):
    """An object of a Folder."""

    name: str
    size: int
    generation: int
    created: float
    metadata: Mapping[str, str]
    metageneration: int = 1
    md5: str = ""


class Folder:
    """A plain directory that stands for a bucket: development, network disks, tests.

    Its facts are those of a Directory, so it needs no place for metadata, and its
    generations are mtimes.
    """

    def __init__(self, root: Path) -> None:
        self._files = Directory(root)
        self._lock = threading.Lock()

    def list(self, prefix: str, *, delimiter: str = "") -> Listed:
        if prefix:
            return self._objects(prefix), []
        spellings = self._files.catalog().folders.values()
        folders = [f"{name}/" for names in spellings for name in names]
        if delimiter:
            return self._objects(""), folders
        return [o for folder in ("", *folders) for o in self._objects(folder)], []

    def _objects(self, folder: str) -> Objects:
        by_project: dict[Project, dict[str, tuple[int, int, int]]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self._files.root / folder)):
                parsed = parse_filename(distribution_of(name), folder.rstrip("/"))
                stamp = stamp_of(self._files.root / folder / name)
                if parsed and stamp and not name.endswith(".metadata"):
                    path = str(self._files.root / folder / name)
                    by_project.setdefault(parsed.project, {})[path] = stamp
        found: Objects = []
        for project, stamps in by_project.items():
            facts = self._files.facts_of(project, stamps, time.time_ns())
            found += (
                self._object(folder, path, stamps, facts)
                for path in stamps
                if not path.endswith(".yanked")
            )
        return found

    def _object(
        self, folder: str, path: str, stamps: Stamps, known: FactsByKey
    ) -> Stored:
        name, (size, mtime, _) = os.path.basename(path), stamps[path]
        facts = known.get((name, *stamps[path]))
        metadata = object_metadata(facts) if facts else {}
        if f"{path}.yanked" in stamps:
            metadata["yanked"] = _read_yank(path)
        return Stored(folder + name, size, mtime, mtime / 1e9, metadata)

    def get(self, name: str) -> Object:
        for found in self._objects(name[: -len(_base(name))]):
            if found.name == name:
                return found
        raise FileNotFoundError(name)

    def _check(self, name: str, generation: int) -> Path:
        there = self.get(name)
        if generation and there.generation != generation:
            raise FileExistsError(f"{name} has generation {there.generation} by now")
        return self._files.root / name

    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        file = open_at(self._check(name, generation), start)
        return slice_of(file, (sys.maxsize if stop is None else stop) - start)

    def insert(
        self, name: str, source: Any, *, metadata: Mapping[str, str], if_generation: int
    ) -> Object:
        source.seek(0)
        staged = write_staged(
            self._files.staging, iter(partial(source.read, CHUNK), b"")
        )
        try:
            with self._lock:
                if if_generation:
                    self._check(name, if_generation)
                target = self._files.root / name
                give_name(staged, target, overwrite=bool(if_generation))
                return self.get(name)
        finally:
            staged.unlink(missing_ok=True)

    def patch(
        self, name: str, metadata: Any, *, generation: int, metageneration: int
    ) -> Object:
        return self.get(name)  # its facts are those of its bytes: nothing to write

    def delete(self, name: str, *, generation: int) -> None:
        with self._lock:
            self._check(name, generation).unlink()

    def rewrite(self, name: str, to: str, *, generation: int) -> Object:
        with open(self._check(name, generation), "rb") as file:
            return self.insert(to, file, metadata={}, if_generation=0)


def slice_of(file: Any, length: int) -> Iterator[bytes]:
    with file:
        while length > 0 and (chunk := file.read(min(CHUNK, length))):
            length -= len(chunk)
            yield chunk


# ---- 10. Pages -----------------------------------------------------------------------
# HTML and JSON are two renderers of the same listing. Each representation is rendered,
# compressed and hashed once and kept with its listing; a warm page is one look-up.

API_VERSION = "1.4"  # of the simple repository API
JSON = "application/vnd.pypi.simple.v1+json"
HTML_V1 = "application/vnd.pypi.simple.v1+html"
HTML = "text/html"
OFFERS = (JSON, HTML_V1, HTML)  # in the order we like to be asked for them by name
LATEST = {
    "application/vnd.pypi.simple.latest+json": JSON,
    "application/vnd.pypi.simple.latest+html": HTML_V1,
}
Source = TypeVar("Source", Listing, Catalog)  # what pages are rendered from


@lru_cache(maxsize=256)  # clients send a handful of different headers
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
    return wild, 0, rank  # by wildcard: HTML, which is what browsers can show


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


def requested_type(request: Request) -> str:
    """What ?format= says, else what Accept says."""
    if query := request.environ.get("QUERY_STRING"):
        formats = parse_qs(query.replace("+", "%2B")).get("format")  # v1+json
        if formats:
            return negotiate(formats[-1])
    return negotiate(request.environ.get("HTTP_ACCEPT", ""))


def page_response(
    request: Request,
    source: Source,
    to_html: Callable[[Source], str],
    to_json: Callable[[Source], str],
) -> Response:
    """Answer a page in the representation that is asked for, or 304."""
    kind = requested_type(request)
    gzip = takes_gzip(request.environ.get("HTTP_ACCEPT_ENCODING", ""))
    answer = source.answers.get((kind, gzip))
    if answer is None:
        text = to_json(source) if kind == JSON else to_html(source)
        answer = source.answers[kind, gzip] = _represent(text.encode(), kind, gzip=gzip)
    tags = request.environ.get("HTTP_IF_NONE_MATCH")
    return (
        answer[1] if tags and _names_tag(tags, answer[0].headers[0][1]) else answer[0]
    )


def _represent(body: bytes, kind: str, *, gzip: bool) -> Answer:
    tag = hashlib.sha256(body).hexdigest()[:32]
    kept = (
        ("ETag", f'"{tag}-{OFFERS.index(kind)}{"z" if gzip else ""}"'),
        # Asked again each time, answered 304: a new upload is seen at once.
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept, Accept-Encoding"),
    )
    headers = [
        *kept,
        ("Content-Type", kind if kind == JSON else f"{kind}; charset=utf-8"),
    ]
    if gzip:
        body = zlib.compress(body, 6, wbits=31)  # 31: with gzip's header
        headers.append(("Content-Encoding", "gzip"))
    headers.append(("Content-Length", str(len(body))))
    return Response("200 OK", tuple(headers), (body,)), Response(
        "304 Not Modified", kept
    )


def _names_tag(header: str, tag: str) -> bool:
    """Does If-None-Match name this tag (RFC 9110, 13.1.2: weak comparison)?"""
    return header.strip() == "*" or tag in re.findall(r'"[^"]*"', header)


def escape(text: str) -> Html:
    return Html(html.escape(text))


def html_page(title: str, body: str, head: str = "") -> Html:
    """The frame of every page. The empty icon keeps browsers from asking for one."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'{head}<link rel="icon" href="data:,"><title>{escape(title)}</title></head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _simple_page(title: str, links: Iterable[str]) -> Html:
    version = f'<meta name="pypi:repository-version" content="{API_VERSION}">\n'
    return html_page(title, "\n".join(links), version)


def _link(found: Distribution) -> Html:
    fragment = "".join(f"#{name}={digest}" for name, digest in found.hashes.items())
    digest = found.facts.core_metadata
    core_metadata = f"sha256={digest}" if digest else None
    attributes = {
        "href": f"../../{found.url}{fragment}",
        "data-requires-python": found.facts.requires_python or None,
        "data-core-metadata": core_metadata,
        "data-dist-info-metadata": core_metadata,  # its name in PEP 658, for older pip
        "data-yanked": found.yanked,
        "data-gpg-sig": "true" if found.signed else None,
    }
    text = "".join(
        f' {k}="{escape(v)}"' for k, v in attributes.items() if v is not None
    )
    return Html(f"<a{text}>{escape(found.filename)}</a><br>")


def _file_json(found: Distribution) -> dict[str, Any]:
    """One file of the JSON API; uv refuses a whole project for a null in it."""
    facts = found.facts
    entry: dict[str, Any] = {
        "filename": found.filename,
        "url": f"../../{found.url}",
        "hashes": found.hashes,
        "size": found.size,
        "upload-time": utc(found.uploaded),
        "yanked": found.yanked is not None and (found.yanked or True),
    }
    if facts.requires_python:
        entry["requires-python"] = facts.requires_python
    if facts.core_metadata:
        entry["core-metadata"] = {"sha256": facts.core_metadata}
    if found.signed:
        entry["gpg-sig"] = True
    return entry


def utc(seconds: float) -> str:
    """A POSIX time as PEP 700 wants it: 2026-01-31T12:00:00.123456Z."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{micros:06}Z"


def _json(content: Mapping[str, Any]) -> str:
    meta = {"api-version": API_VERSION}
    return json.dumps({"meta": meta, **content}, separators=(",", ":"))


def _project_html(listing: Listing) -> Html:
    return _simple_page(
        f"Links for {listing.project}", map(_link, listing.distributions)
    )


def _project_json(listing: Listing) -> str:
    versions = list(listing.versions().values())
    files = list(map(_file_json, listing.distributions))
    return _json({"name": listing.project, "versions": versions, "files": files})


def _index_html(catalog: Catalog) -> Html:
    links = (f'<a href="{name}/">{name}</a><br>' for name in catalog.projects)
    return _simple_page("Simple index", links)


def _index_json(catalog: Catalog) -> str:
    return _json({"projects": [{"name": name} for name in catalog.projects]})


def simple_index(app: App, request: Request) -> Response:
    """/simple/"""
    return page_response(request, app.files.catalog(), _index_html, _index_json)


def simple_project(app: App, request: Request) -> Response:
    """/simple/<project>/"""
    listing = app.files.listing(request.project)
    if listing.distributions:
        return page_response(request, listing, _project_html, _project_json)
    return _fall_back(app.settings, request)


def _fall_back(settings: Settings, request: Request) -> Response:
    """Send it to the fallback index, unless the name is one that must stay here."""
    project = request.project
    private = any(fnmatch.fnmatchcase(project, p) for p in settings.private_names)
    if private or not settings.fallback_url:
        raise HTTPError(404, f"There is no project {project!r} here.")
    return redirect(with_query(f"{settings.fallback_url}/{project}/", request))


# ---- 11. Downloads -------------------------------------------------------------------
# Every decision is made from the facts before a byte is read: conditions first, then a
# range (RFC 9110, 13.2.2). A distribution never changes under its name, so clients may
# keep it for good; it never has a Content-Encoding, as pip hashes what arrives.

SMALL = 64 << 10  # bytes; reading so few is quicker than setting sendfile up
TYPES = {
    ".zip": "application/zip",
    ".gz": "application/gzip",
    ".tgz": "application/gzip",
}


def download(app: App, request: Request) -> Response:
    """/packages/<project>/<filename>, and <filename>.metadata and .asc beside it."""
    project, filename = wanted(request)
    found = app.files.find(project, filename) if project else None
    suffix = request.args["file"][len(filename) :]
    if found and not suffix:
        return _file_response(app, request, found)
    if found and suffix == ".metadata" and found.facts.core_metadata:
        with contextlib.suppress(ArchiveError):
            body = app.files.core_metadata(found)
            return _whole(app, request, body, f'"{found.facts.core_metadata}"')
    if found and suffix == ".asc" and found.signed:
        body = app.files.signature(found)
        return _whole(app, request, body, f'"{hashlib.sha256(body).hexdigest()}"')
    raise HTTPError(404, f"There is no file {request.path!r} here.")


def _whole(app: App, request: Request, body: bytes, tag: str) -> Response:
    headers = (("ETag", tag), ("Cache-Control", _lifetime(app)))
    if (tags := request.header("If-None-Match")) and _names_tag(tags, tag):
        return Response("304 Not Modified", headers)
    plain = (("Content-Type", TEXT), ("X-Content-Type-Options", "nosniff"))
    length = ("Content-Length", str(len(body)))
    return Response("200 OK", (*headers, *plain, length), (body,))


def _lifetime(app: App) -> str:
    # With overwriting allowed, a name may get other bytes: then clients have to ask.
    return "no-cache" if app.settings.overwrite else "max-age=31536000, immutable"


def _file_response(app: App, request: Request, found: Distribution) -> Response:
    tag, modified, size = found.tag, _http_date(found.uploaded), found.size
    headers = [
        ("ETag", tag),
        ("Last-Modified", modified),
        ("Cache-Control", _lifetime(app)),
    ]
    if _is_unchanged(request, tag, modified):
        return Response("304 Not Modified", tuple(headers))
    kind = TYPES.get(os.path.splitext(found.filename)[1], "application/octet-stream")
    headers += [("Content-Type", kind), ("Accept-Ranges", "bytes")]
    status, start, stop = "200 OK", 0, size
    if span := _requested_range(request, size, (tag, modified)):
        status, (start, stop) = "206 Partial Content", span
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
    headers.append(("Content-Length", str(stop - start)))
    if request.method == "HEAD":
        return Response(status, tuple(headers))
    body: Iterable[bytes] = app.files.content(found, start, stop)
    if isinstance(body, io.IOBase):
        body = _file_body(request, body, stop - start, to_end=stop == size)
    return Response(status, tuple(headers), body)


@lru_cache(maxsize=1024)
def _http_date(seconds: float) -> str:
    from email.utils import formatdate

    return formatdate(seconds, usegmt=True)


def _is_unchanged(request: Request, tag: str, modified: str) -> bool:
    if tags := request.header("If-None-Match"):
        return _names_tag(tags, tag)
    return request.header("If-Modified-Since") == modified  # as clients send it back


def _requested_range(
    request: Request, size: int, validators: tuple[str, str]
) -> tuple[int, int] | None:
    """The one range asked for, as [start, stop); None for the whole; 416 beyond it."""
    text, if_range = request.header("Range"), request.header("If-Range")
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", text, re.ASCII)
    if not match or text == "bytes=-" or (if_range and if_range not in validators):
        return None
    first, last = match.groups()
    if first and last and int(last) < int(first):
        return None  # not a range (RFC 9110, 14.1.1): ignored
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size:
        why = f"The file has {size} bytes; the range {text!r} lies beyond them."
        raise HTTPError(416, why, Content_Range=f"bytes */{size}")
    return start, stop


def _file_body(
    request: Request, file: io.IOBase, length: int, *, to_end: bool
) -> Iterable[bytes]:
    if length <= SMALL:
        return (b"".join(slice_of(file, length)),)
    wrapper = request.environ.get("wsgi.file_wrapper")
    if wrapper and to_end:  # wsgiref's sends a file to its end, whatever we say
        return wrapper(file, CHUNK)  # type: ignore[no-any-return]
    return slice_of(file, length)


# ---- 12. Uploads ---------------------------------------------------------------------
# The legacy upload form is multipart/form-data (RFC 7578). Its bytes go into the parser
# as they arrive, and events come out. Form hashes the content and writes it to a
# staging file. All other fields are small, and bounded. A staged file gets its name
# when all checks have passed.

MAX_PART_HEADERS = 8 << 10  # bytes; clients send about 150
MAX_FIELD = 4 << 20  # bytes; a description may be as long as all core metadata
MAX_FIELDS = 2000  # each classifier, requirement and URL is a field of its own
MAX_FORM = 8 << 20  # bytes of all fields together, without the file
MAX_DRAIN = 32 << 20  # bytes; some clients read the answer only after they sent all
DIGESTS: dict[str, Callable[[], Any]] = {
    "sha256_digest": hashlib.sha256,
    "md5_digest": partial(hashlib.md5, usedforsecurity=False),
    "blake2_256_digest": partial(hashlib.blake2b, digest_size=32),
}
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
    pass


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
        at = self._rest.find(self._mark)
        if at >= 0:
            self._at, self._step = at + len(self._mark), self._after_mark
        elif len(self._rest) > MAX_PART_HEADERS:
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
        if len(head) > MAX_PART_HEADERS or self._parts >= MAX_FIELDS:
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


_DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data[ \t]*(;.*)", re.I)
_PARAMETER = re.compile(rb';[ \t]*(name|filename)=(?:"([^"\r\n]*)"|([^;"\s]+))')
_ENCODED = re.compile(
    rb"content-transfer-encoding:[ \t]*(?!(binary|7bit|8bit)[ \t]*$)", re.I
)


def _part(head: bytes) -> PartBegins:
    """Read the headers of a part (RFC 7578, 4.2)."""
    lines = head.split(b"\r\n")
    matches = [match for line in lines if (match := _DISPOSITION.fullmatch(line))]
    if len(matches) != 1 or any(map(_ENCODED.match, lines)):
        raise HTTPError(400, "A part of the form is not plain form-data with a name.")
    values = {
        key: (quoted or token).decode("utf-8", "replace")
        for key, quoted, token in _PARAMETER.findall(matches[0][1])
    }
    if b"name" not in values:
        raise HTTPError(400, "A part of the form has no name.")
    return PartBegins(values[b"name"], values.get(b"filename"))


class Form:
    """The fields of an upload, and its file, which is staged as it arrives."""

    def __init__(self, staging: Path) -> None:
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.staged: Path | None = None
        self.size = 0
        self.digests: dict[str, Any] = {}  # hashes of the file, by name of their field
        self._staging = staging
        self._file: BinaryIO | None = None
        self._field = ""
        self._value = bytearray()
        self._total = 0
        self._hashing: threading.Thread | None = None

    signature = b""  # TEMPORARY

    def take(self, event: Event) -> None:
        if isinstance(event, PartBegins):
            self._begin(event)
        elif isinstance(event, PartEnds):
            self._end()
        elif self._file:
            self._write(self._file, event.data)
        else:
            self._collect(event.data)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        self._wait_for_hash()

    def _begin(self, part: PartBegins) -> None:
        self._field, self._value = part.name, bytearray()
        if part.name != "content":
            return
        if self.staged:
            raise HTTPError(400, "The form has two files in 'content'; send only one.")
        self.filename = part.filename or ""
        self._file = open_staged(self._staging)
        self.staged = Path(self._file.name)
        # Most clients send digests first. Others are computed from the staged file.
        names = {"sha256_digest"} | self.fields.keys() & DIGESTS.keys()
        self.digests = {name: DIGESTS[name]() for name in names}

    def _write(self, file: BinaryIO, data: bytes) -> None:
        """Write a chunk. A thread hashes a large one while the next one arrives.

        Hashing takes most of the time of an upload, and it can use another processor.
        """
        self._wait_for_hash()
        if len(data) > SMALL:
            hashing = threading.Thread(target=self._hash, args=(data,))
            hashing.start()
            self._hashing = hashing
        else:
            self._hash(data)
        write_all(file, data)
        self.size += len(data)

    def _hash(self, data: bytes) -> None:
        for digest in self.digests.values():
            digest.update(data)

    def _wait_for_hash(self) -> None:
        if self._hashing:
            self._hashing.join()
            self._hashing = None

    def _collect(self, data: bytes) -> None:
        self._total += len(data)
        if self._total > MAX_FORM or len(self._value) + len(data) > MAX_FIELD:
            raise HTTPError(413, f"The field {self._field!r} makes the form too long.")
        if self._field in KEPT_FIELDS:
            self._value += data

    def _end(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())  # an acknowledged upload survives a power cut
            self.close()
        elif self._field in KEPT_FIELDS:
            if self._field in self.fields:
                raise HTTPError(400, f"The form has two fields {self._field!r}.")
            try:
                self.fields[self._field] = self._value.decode()
            except UnicodeDecodeError:
                why = f"The field {self._field!r} is not UTF-8."
                raise HTTPError(400, why) from None


def read_form(app: App, request: Request) -> Form:
    """Read an upload's form. Its staged file is deleted after the request."""
    length, limit = content_length(request), app.settings.max_upload
    if limit and length > limit:
        why = f"The upload has {length} bytes; MAX_UPLOAD_MB allows {limit} bytes."
        raise HTTPError(413, why)
    parser = MultipartParser(_boundary(request.environ.get("CONTENT_TYPE", "")))
    form = Form(app.files.staging)
    try:
        for chunk in read_body(request, length):
            for event in parser.feed(chunk):
                form.take(event)
        parser.close()
    finally:
        if form.staged:
            request.staged.append(form.staged)
        form.close()
    return form


def content_length(request: Request) -> int:
    text = request.environ.get("CONTENT_LENGTH") or ""
    if not text:
        raise HTTPError(411, "Send the request with a Content-Length.")
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
        raise HTTPError(400, f"Content-Length is {text!r}, which is not a length.")
    return int(text)


_MULTIPART = re.compile(  # a boundary has up to 70 letters (RFC 2046, 5.1.1)
    r'multipart/form-data *;(?:.*;)? *boundary=("?)([^\s";]{1,70})\1 *(?:;.*)?',
    re.I | re.ASCII,
)


def _boundary(content_type: str) -> bytes:
    match = _MULTIPART.fullmatch(content_type)
    if not match:
        need = "send multipart/form-data with a boundary"
        raise HTTPError(400, f"Content-Type is {content_type!r}; {need}.")
    return match[2].encode()


def read_body(request: Request, length: int) -> Iterator[bytes]:
    """Read a request's body of exactly `length` bytes, in chunks."""
    request.unread = length
    while request.unread:
        try:
            chunk = request.environ["wsgi.input"].read(min(request.unread, CHUNK))
        except OSError as fault:  # the client is gone; gunicorn has its own kinds
            raise HTTPError(400, f"The body cannot be read: {fault}.") from fault
        if not chunk:
            short = f"The body ends {request.unread} bytes before its Content-Length."
            raise HTTPError(400, short)
        request.unread -= len(chunk)
        yield chunk


def drain(request: Request) -> None:
    """Read the rest of a refused body: a client that still sends sees no answer."""
    with contextlib.suppress(HTTPError):  # there is no body, or the client is gone
        left = content_length(request) if request.unread is None else request.unread
        if left <= MAX_DRAIN:
            for _ in read_body(request, left):
                pass


def upload(app: App, request: Request) -> Response:
    """POST of the legacy upload API: what it does depends on the field :action."""
    form = read_form(app, request)
    action = form.fields.get(":action")
    if not action:
        raise HTTPError(400, "Missing ':action' field!")
    if action == "file_upload":
        return _upload_file(app, request, form)
    if action == "remove_pkg":
        return _remove(app, form)
    if action in ("verify", "submit", "doc_upload"):
        return text_response(200, f"OK: nothing is done for {action!r}.")
    raise HTTPError(400, f"Unsupported ':action' field: {action!r}.")


def _upload_file(app: App, request: Request, form: Form) -> Response:
    if not form.staged or not form.filename:
        raise HTTPError(400, "Missing 'content' file-field!")
    parsed = _check_filename(form)
    _check_digests(form, form.staged)
    new = Addition(
        *parsed,
        source=form.staged,
        size=form.size,
        facts=_check_archive(form, form.staged, parsed),
        signature=form.signature,
        uploader=request.user,
        overwrite=app.settings.overwrite,
    )
    try:
        changed = app.files.add(new)
    except FileExistsError:
        raise already_exists(request, parsed.filename) from None
    if not changed:
        return text_response(200, f"OK: {parsed.filename} was here already.")
    return replace(
        text_response(200, f"OK: {parsed.filename} is stored."), changes=(new,)
    )


def _check_filename(form: Form) -> Parsed:
    """The name is that of a wheel or sdist, and agrees with the rest of the form."""
    name, fields = form.filename, form.fields
    parsed = parse_filename(name, normalize(fields.get("name", "")))
    if not parsed or not name.endswith(UPLOADABLE):
        why = (
            f"not that of a wheel or sdist ({', '.join(UPLOADABLE)}; PEP 427, PEP 625)"
        )
        raise HTTPError(400, f"Bad filename: {name!r} is {why}.")
    kind = fields.get("filetype")
    if kind and kind != ("bdist_wheel" if name.endswith(".whl") else "sdist"):
        raise HTTPError(400, f"The filetype {kind!r} does not fit {name!r}.")
    if not version_key(parsed.version)[0]:
        raise HTTPError(
            400, f"{name!r} has the version {parsed.version!r}: see PEP 440."
        )
    _check_agreement(parsed, "form", fields.get("name"), fields.get("version"))
    return parsed


def _check_agreement(
    parsed: Parsed, where: str, name: str | None, version: str | None
) -> None:
    filename = parsed.filename
    if name is not None and normalize(name) != parsed.project:
        raise HTTPError(
            400, f"The {where} names {name!r}, but the file is {filename!r}."
        )
    if version is not None and version_key(version) != version_key(parsed.version):
        why = f"The {where} has version {version!r}, but the file is {filename!r}."
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
            why = f"The {name} of {form.filename} is {came}, but the form says {sent!r}"
            raise HTTPError(400, f"{why}: the file changed on its way. Send it again.")


def _check_archive(form: Form, staged: Path, parsed: Parsed) -> Facts:
    """What the archive says of itself agrees with its name."""
    try:
        with open(staged, "rb") as file:
            metadata = read_core_metadata(file, parsed.filename, form.size)
    except ArchiveError as fault:
        raise HTTPError(400, f"{parsed.filename} is broken: {fault}.") from fault
    _check_agreement(parsed, "archive's metadata", metadata.name, metadata.version)
    return facts_from(
        parsed.filename, form.digests["sha256_digest"].hexdigest(), metadata
    )


def _remove(app: App, form: Form) -> Response:
    """Remove every distribution of one version of a project."""
    name, version = form.fields.get("name", ""), form.fields.get("version", "")
    project = to_project(name)
    if not project or not version:
        sent = f"name={name!r}, version={version!r}"
        raise HTTPError(400, f"Missing 'name'/'version' fields: {sent}")
    key, listing = version_key(version), app.files.current(project)
    found = [d for d in listing.distributions if version_key(d.version) == key]
    if not found:
        raise HTTPError(404, f"{name} ({version}) not found")
    for distribution in found:
        app.files.remove(distribution)
    done = text_response(200, f"OK: {project} {version} is removed.")
    return replace(done, changes=tuple(map(Removal, found)))


# ---- 13. Other answers ---------------------------------------------------------------
# What pypiserver's users and PyPI's tools ask for beside the simple index.


def plain_response(kind: str, text: str) -> Response:
    """An answer that is not worth remembering."""
    body = text.encode()
    length = ("Content-Length", str(len(body)))
    headers = (("Content-Type", kind), ("Cache-Control", "no-cache"), length)
    return Response("200 OK", headers, (body,))


def project_json(app: App, request: Request) -> Response:
    """/pypi/<project>[/<version>]/json, and pypiserver's /<project>/json."""
    listing, base = app.files.listing(request.project), request.base_url()
    names, wanted_version = listing.versions(), request.args.get("version")
    shown = names.get(version_key(wanted_version or _latest(listing)))
    if shown is None:
        raise HTTPError(404, f"There is nothing at {request.path!r}.")
    releases: dict[str, list[Any]] = {version: [] for version in names.values()}
    for found in listing.distributions:
        releases[names[version_key(found.version)]].append(_release_json(found, base))
    urls = releases[shown]
    info = {"name": listing.project, "version": shown}
    info["requires_python"] = urls[0]["requires_python"]
    content = {"info": info, "urls": urls}
    if wanted_version is None:
        content["releases"] = releases
    return plain_response("application/json", json.dumps(content))


def _latest(listing: Listing) -> str:
    """The newest; one that is yanked or no final release only if there is no other."""

    def rank(found: Distribution) -> tuple[Any, ...]:
        key = version_key(found.version)
        return found.yanked is None, is_final(key), key

    best = max(listing.distributions, key=rank, default=None)
    return best.version if best else ""


def _release_json(found: Distribution, base: str) -> dict[str, Any]:
    extension = os.path.splitext(found.filename)[1]
    kinds = {".whl": "bdist_wheel", ".egg": "bdist_egg", ".exe": "bdist_wininst"}
    python = found.filename.split("-")[-3] if extension == ".whl" else "source"
    return {
        "filename": found.filename,
        "url": f"{base}/{found.url}",
        "digests": found.hashes,
        "size": found.size,
        "packagetype": kinds.get(extension, "sdist"),
        "python_version": python,
        "requires_python": found.facts.requires_python or None,
        "upload_time": utc(found.uploaded)[:19],
        "upload_time_iso_8601": utc(found.uploaded),
        "yanked": found.yanked is not None,
        "yanked_reason": found.yanked or None,
    }


def all_files(app: App, request: Request) -> Response:
    """/packages/: every file, for people and for pip --find-links."""
    links = (
        f'<a href="{project}/{quote(name)}">{escape(name)}</a><br>'
        for name, project, _ in app.files.everything()
    )
    return plain_response(f"{HTML}; charset=utf-8", _simple_page("All files", links))


def start_page(app: App, request: Request) -> Response:
    """/: the commands to copy, or the file that WELCOME_FILE names."""
    base, mount = request.base_url() + "/", request.environ.get("SCRIPT_NAME", "")
    if mount and not request.environ.get("PATH_INFO"):  # relative links need the slash
        return redirect(quote(mount.rpartition("/")[2], encoding="latin-1") + "/")
    if app.settings.welcome_file:
        page = _welcome(app, app.settings.welcome_file, base)
    else:
        install = escape(f"pip install --index-url {base}simple/ PROJECT")
        publish = escape(f"twine upload --repository-url {base} dist/*")
        body = (
            f"<p>Install:</p>\n<pre>{install}</pre>\n"
            f"<p>Publish:</p>\n<pre>{publish}</pre>\n"
            '<p>Look at the <a href="simple/">projects</a> or at '
            f'<a href="packages/">all files</a>.</p>\n<p>pypi_ae {__version__}</p>'
        )
        page = html_page("Private Python packages", body)
    return plain_response(f"{HTML}; charset=utf-8", page)


def _welcome(app: App, path: Path, base: str) -> str:
    """pypiserver's placeholders keep their names; NUMPKGS counts projects."""
    text = path.read_text("utf-8")
    values = {"URL": base, "VERSION": __version__}
    values |= {"PACKAGES": f"{base}packages/", "SIMPLE": f"{base}simple/"}
    if "{{NUMPKGS}}" in text:
        values["NUMPKGS"] = str(len(app.files.catalog().projects))
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", escape(value))
    return text


def health(app: App, request: Request) -> Response:
    """/health: the process answers."""
    return text_response(200, "Ok")


def warm_up(app: App, request: Request) -> Response:
    """/_ah/warmup: App Engine asks before it sends an instance its first request.

    To list the root takes credentials and a connection: the first request finds both.
    """
    app.files.catalog()
    return text_response(200, "Ok")


def to_simple(app: App, request: Request) -> Response:
    """/<project>: where people guess that a project's page is."""
    return redirect(relative(request.path, f"/simple/{request.project}/"))


def search(app: App, request: Request) -> Response:
    """/RPC2: XML-RPC `search` as pip sends it, substrings of project names."""
    import xmlrpc.client

    length = content_length(request)
    if length > MAX_PART_HEADERS:
        raise HTTPError(413, f"A search of {length} bytes is too long.")
    body = b"".join(read_body(request, length))
    try:
        if b"<!" in body or b"\0" in body:  # a DTD, perhaps in UTF-16: it can explode
            raise ValueError("a DTD is not accepted")
        parameters, method = xmlrpc.client.loads(body)
        words = _search_words(method, parameters)
    except Exception as fault:  # expat's, struct's and type errors of a stranger's XML
        raise HTTPError(400, f"Invalid XML-RPC payload: {fault}.") from fault
    answer = xmlrpc.client.dumps((_search(app, words),), methodresponse=True)
    return plain_response("text/xml", answer)


def _search_words(method: str | None, parameters: Sequence[Any]) -> list[str]:
    if method != "search":
        raise ValueError(f"there is no method {method!r}, only search")
    words = dict(parameters[0]).get("name", [])
    return [normalize(w) for w in ([words] if isinstance(words, str) else words) if w]


def _search(app: App, words: Sequence[str]) -> list[dict[str, str]]:
    latest: dict[str, str] = {}
    for _, project, version in app.files.everything():
        if any(word in project for word in words):
            latest[project] = max(latest.get(project, ""), version, key=version_key)
    return [{"name": p, "version": v, "summary": ""} for p, v in latest.items()]


# ---- 14. Routes and the app ----------------------------------------------------------
# ROUTES says who may do what. HEAD, 405, a missing slash and un-normalised names are
# the router's; each answer is a plain function of the app and a request.

Handler = Callable[["App", Request], Response]
Before = Callable[[Request], None]
After = Callable[[Request, Response], "Response | None"]
MAX_PATH = 1024  # letters; the longest path that means something has two names of 215


class Files(Protocol):
    """What handlers need of the place where distributions are: Directory and Mirror."""

    staging: Path

    def catalog(self) -> Catalog: ...
    def listing(self, project: Project) -> Listing: ...
    def current(self, project: Project) -> Listing:
        """The listing as it is at this moment, for what changes it."""

    def find(self, project: Project, filename: str) -> Distribution | None: ...
    def everything(self) -> Iterator[Parsed]: ...
    def content(
        self, found: Distribution, start: int, stop: int
    ) -> BinaryIO | Iterator[bytes]: ...
    def core_metadata(self, found: Distribution) -> bytes: ...
    def signature(self, found: Distribution) -> bytes: ...
    def add(self, new: Addition) -> bool: ...
    def remove(self, found: Distribution) -> None: ...
    def tidy(self, *, dry_run: bool) -> Iterator[str]: ...


class Route(NamedTuple):
    method: str
    path: str
    action: str | None  # who may: see AUTHENTICATE; None: everybody
    handler: Handler


ROUTES = (
    Route("GET", "/", None, start_page),
    Route("GET", "/_ah/warmup", None, warm_up),
    Route("GET", "/simple/", "list", simple_index),
    Route("GET", "/simple/{project}/", "list", simple_project),
    Route("GET", "/+simple/{project}/", "list", simple_project),  # hatch publish asks
    Route("GET", "/packages/", "list", all_files),
    Route("GET", "/packages/{file}", "download", download),
    Route("GET", "/packages/{project}/{file}", "download", download),
    Route("GET", "/pypi/{project}/json", "list", project_json),
    Route("GET", "/pypi/{project}/{version}/json", "list", project_json),
    Route("GET", "/{project}/json", "list", project_json),
    Route("GET", "/{project}/", None, to_simple),
    Route("POST", "/", "update", upload),
    Route("POST", "/legacy/", "update", upload),
    Route("POST", "/simple/", "update", upload),
    Route("POST", "/pypi/", "update", upload),
    Route("POST", "/RPC2/", "list", search),
)


class Match(NamedTuple):
    route: Route
    project: Project
    args: Mapping[str, str]
    location: str  # where to redirect to; "" if the path is as it should be


class Router:
    """Finds the route of a path, and remembers it."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = [(_pattern(route.path), route) for route in routes]
        self.match = lru_cache(maxsize=1024)(self._match)

    def _match(self, method: str, path: str) -> Match:
        if len(path) > MAX_PATH:
            raise HTTPError(
                414, f"The path has {len(path)} letters; {MAX_PATH} will do."
            )
        slashed = path if path.endswith("/") else path + "/"
        # Uploads are answered with and without the slash: their clients do not follow.
        for candidate in (path, slashed):
            for pattern, route in self._routes:
                found = pattern.fullmatch(candidate)
                if found and route.method == method:
                    return _describe_match(route, path, found.groupdict())
        fits = (path, slashed)
        methods = {r.method for p, r in self._routes if any(map(p.fullmatch, fits))}
        if not methods:
            raise HTTPError(404, f"There is nothing at {path!r}.")
        allow = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
        raise HTTPError(405, f"{method} is not allowed here; {allow} is.", Allow=allow)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path)))


def _describe_match(route: Route, path: str, args: dict[str, str]) -> Match:
    project = to_project(args["project"]) if "project" in args else Project("")
    if project is None:
        raise HTTPError(404, f"{args['project']!r} is not a project's name (PEP 508).")
    canonical = route.path.format(**args | {"project": project})
    if route.method != "GET" or route.action == "download" or canonical == path:
        return Match(route, project, args, "")
    location = quote(canonical.encode("latin-1", "replace"), safe="/+!")
    return Match(route, project, args, relative(path, location))


class App:
    """The WSGI application. `before` and `after` are hooks, yours to extend."""

    def __init__(self, settings: Settings, files: Files, users: Users) -> None:
        self.settings = settings
        self.files = files
        self.users = users
        self.before: list[Before] = []
        self.after: list[After] = []
        self.verbose = False  # a log line for every request
        own = Route("GET", settings.health_endpoint, None, health)
        self._router = Router((own, *ROUTES))

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/"
        request = Request(environ, method, path, time.monotonic())
        response = self.respond(request)
        start_response(response.status, list(response.headers))
        return response.body if method != "HEAD" else ()

    def respond(self, request: Request) -> Response:
        """Answer a request, whatever happens."""
        try:
            response = self._respond(request)
        except HTTPError as refusal:
            response = self._refuse(request, refusal)
        except Exception:
            self._log(logging.ERROR, request, "fault", exc_info=True)
            why = "The server failed; its log says why."
            response = self._refuse(request, HTTPError(500, why))
        finally:
            for path in request.staged:
                path.unlink(missing_ok=True)
        if self.verbose:
            self._log(logging.INFO, request, response.status)
        return response

    def _respond(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        route, request.project, request.args, location = self._router.match(
            method, request.path
        )
        request.route = route
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
        return response

    def _authorize(self, request: Request) -> None:
        try:
            request.user = self.users.verify(request.header("Authorization"))
        except (SettingsError, OSError) as fault:  # the file was edited, and is broken
            log.error("%s", fault)
            why = "The file of users cannot be used; the server's log says why."
            raise HTTPError(503, why, Retry_After="60") from fault

    def _refuse(self, request: Request, why: HTTPError) -> Response:
        if request.method not in ("GET", "HEAD"):
            drain(request)
        if why.status in (401, 403) or request.method == "POST":
            self._log(logging.WARNING, request, f"refused with {why.status}: {why}")
        return text_response(why.status, why.message, *why.headers)

    def _log(self, level: int, request: Request, what: str, **more: Any) -> None:
        who = request.user or request.environ.get("REMOTE_ADDR", "")
        extra = {"cloud": _cloud_fields(self.settings, request)}
        line = (request.method, request.path, who, one_line(what))
        log.log(level, "%s %r by %s: %s", *line, extra=extra, **more)


def _in_words(change: Addition | Removal) -> str:
    if isinstance(change, Addition):
        return f"added {change.filename} sha256={change.facts.sha256}"
    return f"removed {change.distribution.filename} {change.distribution.hashes}"


def _cloud_fields(settings: Settings, request: Request) -> dict[str, Any]:
    """What Cloud Logging reads of an entry (LogEntry: httpRequest, trace)."""
    trace = request.header("X-Cloud-Trace-Context").split("/")[0]
    if trace and settings.cloud_project:
        trace = f"projects/{settings.cloud_project}/traces/{trace}"
    fields = {
        "requestMethod": request.method,
        "requestUrl": request.path,
        "userAgent": request.header("User-Agent"),
        "remoteIp": request.header("X-Forwarded-For").split(",")[0],
        "latency": f"{time.monotonic() - request.started:.6f}s",
    }
    return {"httpRequest": fields, "logging.googleapis.com/trace": trace}


class CloudFormatter(logging.Formatter):
    """One JSON object a line, as App Engine and Cloud Run read them from stderr."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"severity": record.levelname, "message": super().format(record)}
        return json.dumps(entry | getattr(record, "cloud", {}))


def _set_up_log(*, hosted: bool) -> None:
    """Make what we log visible, unless whoever embeds the app has seen to that."""
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
    said = {name.upper(): _as_text(value) for name, value in settings.items()}
    if unknown := sorted(said.keys() - DEFAULTS.keys()):
        known = ", ".join(DEFAULTS).lower()
        raise SettingsError(
            f"get_app() knows no {unknown[0].lower()!r}; it has {known}."
        )
    checked = Settings.from_env({**os.environ, **said})
    who = Users(users if users is not None else checked.password_file)
    if checked.authenticate - {"update"} and not who.logins().checks:
        actions = ", ".join(sorted(checked.authenticate))
        raise SettingsError(
            f"AUTHENTICATE is {actions}, but there are no users: name their file with "
            "PASSWORD_FILE (-P), made by: python pypi_ae.py passwd FILE USER"
        )
    _set_up_log(hosted=checked.hosted)
    remote = checked.bucket_name or checked.remote
    files = _mirror(checked) if remote else Directory(checked.root)
    app = App(checked, files, who)
    if isinstance(files, Mirror):
        app.before.append(files.pull)
        app.after.append(files.push)
    log.info("pypi_ae %s serves %s", __version__, place_of(checked))
    return app


def place_of(settings: Settings) -> str:
    root = str(settings.root.absolute())
    if not settings.bucket_name and not settings.remote:
        return root
    return f"{settings.bucket_name or 'directory'}:{settings.remote}, cached in {root},"


def _as_text(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _mirror(settings: Settings) -> Mirror:
    if not settings.bucket_name:
        return Mirror(settings, Folder(Path(settings.remote)), "")
    try:
        import gcs_rest

        if not find_spec("google.auth"):  # imported with the first token, not before
            raise ImportError("No module named 'google.auth'")
    except ImportError as fault:
        raise SettingsError(
            "BUCKET_NAME needs gcs_rest.py beside this file, and the packages "
            f"google-auth and requests (pip install google-auth requests): {fault}"
        ) from fault
    prefix = settings.remote.strip("/") + "/"  # "/" is the root of the bucket
    return Mirror(settings, gcs_rest.Bucket(settings.bucket_name), prefix.lstrip("/"))


# ---- 15. Command line ----------------------------------------------------------------
# The flags are those of pypiserver, as far as they make sense. Each one sets a keyword
# of get_app, so flags, keywords and environment are checked in the same way.

FLAGS = (
    (("-P", "--passwords"), "password_file", "file of users, in htpasswd format"),
    (("-a", "--authenticate"), "authenticate", "actions that need a user, or ."),
    (("--health-endpoint",), "health_endpoint", "path that answers Ok (/health)"),
    (("--welcome",), "welcome_file", "HTML file of the start page"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"run": run, "passwd": set_password, "tidy": tidy}
    name = arguments.pop(0) if arguments and arguments[0] in commands else "run"
    try:
        return commands[name](arguments)
    except (SettingsError, OSError, HTTPError) as fault:
        print(f"pypi_ae: {fault}", file=sys.stderr)
        return 2


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text, re.ASCII) or int(text) > 65535:
        raise SettingsError(f"The port is {text!r}; it takes a number up to 65535.")
    return int(text)


def run(arguments: Sequence[str]) -> int:
    """Serve until interrupted: python pypi_ae.py [run] [DIR] [flags]."""
    import argparse

    parser = argparse.ArgumentParser(
        "pypi_ae.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # a flag that is not given sets nothing
    )
    parser.add_argument("root", nargs="?", metavar="DIR", help="packages (./packages)")
    port = os.environ.get("PORT", "8080")
    parser.add_argument("-p", "--port", default=port, help="port (8080)")
    host = ("-i", "-H", "--interface", "--host")
    parser.add_argument(*host, dest="host", default="127.0.0.1", help="127.0.0.1")
    for names, setting, text in FLAGS:
        parser.add_argument(*names, dest=setting, help=text, metavar="VALUE")
    fallback = parser.add_mutually_exclusive_group()
    text = "redirect unknown projects to this index"
    fallback.add_argument("--fallback-url", help=text, metavar="VALUE")
    fallback.add_argument(
        "--disable-fallback",
        dest="fallback_url",
        action="store_const",
        const="",
        help="the default",
    )
    parser.add_argument("-o", "--overwrite", action="store_const", const="yes")
    parser.add_argument("-v", "--verbose", action="store_true", help="log all requests")
    given = vars(parser.parse_args(arguments))
    address = given.pop("host"), _port(given.pop("port"))
    verbose = given.pop("verbose", False)
    app = get_app(**given)
    app.verbose = verbose
    return serve(app, *address)


def serve(app: App, host: str, port: int) -> int:
    """Answer requests with wsgiref, each in a thread, until interrupted."""
    import socketserver
    from wsgiref import simple_server

    class Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
        daemon_threads = True
        request_queue_size = 128  # uv opens many connections at once; 5 are too few

    class QuietHandler(simple_server.WSGIRequestHandler):
        timeout = 60  # seconds; a client that is silent for longer is gone

        def log_message(self, *_: object) -> None:
            """Log nothing here: the app has its own log."""

    server = simple_server.make_server(host, port, app, Server, QuietHandler)
    print(start_message(app, host, server.server_port), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def start_message(app: App, host: str, port: int) -> str:
    """Say what is served, where, who may upload, and which commands to use."""
    shown = "localhost" if host in ("", "0.0.0.0", "::") else host
    url, users = f"http://{shown}:{port}/", sorted(app.users.logins().checks)
    uploads = ", ".join(users[:5]) + (" ..." if users[5:] else "")
    if "update" not in app.settings.authenticate:
        uploads = "anybody"
    elif not users:
        uploads = "nobody yet; python pypi_ae.py passwd htpasswd.txt USER  adds a user"
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
    count = 0
    files = get_app(root=given.root).files
    for count, line in enumerate(files.tidy(dry_run=given.dry_run), 1):
        print(f"{count:6} {line}", flush=True)
    print(f"{count} to do" if given.dry_run else f"{count} done")
    return 0


def set_password(arguments: Sequence[str]) -> int:
    """Add a user to a file, or change a password; it is hashed with scrypt."""
    import argparse
    import getpass

    about = set_password.__doc__
    parser = argparse.ArgumentParser("pypi_ae.py passwd", description=about)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--stdin", action="store_true", help="read the password there")
    given = parser.parse_args(arguments)
    valid = re.fullmatch(r"[^\s:#]([^:]*[^\s:])?", given.user)
    if not valid or not given.user.isprintable():
        rule = "a user has no colon, no # first, and no space first or last"
        raise SettingsError(f"{given.user!r} cannot be a user: {rule}.")
    if given.stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass(f"Password for {given.user}: ")
        if password != getpass.getpass("The same again: "):
            raise SettingsError("The two passwords differ; nothing was changed.")
    if not password:
        raise SettingsError("The password is empty; nothing was changed.")
    _write_user(given.file, given.user, hash_password(password))
    print(f"{given.file}: user {given.user!r} is set.")
    return 0


def _write_user(path: Path, user: str, stored: str) -> None:
    """Set one user's line, and keep the others. The new file replaces the old one."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.partition(":")[0].strip() != user]
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in (*kept, f"{user}:{stored}"))
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
