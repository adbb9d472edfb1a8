#!/usr/bin/env python3
"""A private Python package index (PyPI) in one file of pure standard library.

    environ -> Request -> route -> authorize -> before -> handler -> after -> Response
                          ROUTES   Users        hooks     below      hooks

Contents, in the order a request meets them:

     1. Words and errors       the types of checked strings; one error with a status
     2. Settings               one table, one reader: environment or keywords
     3. Names and versions     PEP 503 names, file names, PEP 440 order
     4. Requests and responses what handlers are given and what they give back
     5. Users and passwords    htpasswd files, Basic auth, remembered logins
     6. Archives               core metadata, read out of wheels and sdists
     7. Listings               distributions, their facts, what a page is made of
     8. The directory          where distributions lie, and what is known of them
     9. In step with a bucket  pull and push hooks; what is mirrored of a bucket
    10. Pages                  content negotiation, HTML and JSON
    11. Downloads              ranges, conditions, core metadata, signatures
    12. Uploads                the streaming multipart parser, and what is checked
    13. Other answers          JSON API, search, start page, health, fallback
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
    LOCAL_PACKAGE_DIRECTORY  where the distributions lie, or a bucket's cache
                             (/tmp/packages unless TIER is dev)        ./packages
    TIER                     dev: a local directory will do; else a bucket  dev
    BUCKET_NAME              the bucket; gcs_rest.py talks to it       none
    REMOTE_PACKAGE_DIRECTORY the prefix in it; with no bucket, a directory that
                             stands for one                            packages
    SYNC_SECONDS             how old a listing of the bucket may be    1
    CACHE_MB                 bound of the local cache of a bucket      100
    PASSWORD_FILE            users, in htpasswd format                 htpasswd.txt
    AUTHENTICATE             actions that need a user: list, download, update
                             ("." for none)                            update
    FALLBACK_URL             simple index to redirect unknown projects to      none
    PRIVATE_NAMES            glob patterns of names that never fall back       none
    OVERWRITE                may an upload replace a file?             no
    MAX_UPLOAD_MB            larger uploads get 413                    no bound
    HEALTH_ENDPOINT          answers "Ok"                              /health
    WELCOME_FILE             HTML of the start page                    built in

What it is not: a mirror or cache of another index, a place for documentation, or a
user database; it has no roles beyond the three actions.

Licence: MIT. Origin: the pypi-ae project, "pypi_ae.py"; see __version__.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
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
from urllib.parse import parse_qs, parse_qsl, quote

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

__version__ = "1.0.0"
__all__ = ["App", "HTTPError", "Request", "Response", "get_app", "hash_password"]

log = logging.getLogger("pypi_ae")

# ---- 1. Words and errors -------------------------------------------------------------
# A string that was checked has its own type, made in one place: a name is joined to a
# path only as Filename or Project, markup leaves only as Html. Errors know their own
# status.

Project = NewType("Project", str)  # a normalised project name (PEP 503): "acme-tools"
Filename = NewType("Filename", str)  # a distribution's name, safe to join to a path
Html = NewType("Html", str)  # text in which everything foreign is escaped


class HTTPError(Exception):
    """An answer that is not a success: its status (int) and a sentence for a person."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = tuple((k.replace("_", "-"), v) for k, v in headers.items())


class SettingsError(ValueError):
    """A setting that cannot work; says which, its value, and what to change."""


class ArchiveError(ValueError):
    """A wheel or sdist out of which core metadata cannot be read; says why."""


# ---- 2. Settings ---------------------------------------------------------------------
# Keywords of get_app are turned into the words of the environment, so that one reader
# checks both. Nothing else in this file looks at the environment.

ACTIONS = frozenset({"list", "download", "update"})
WORDS = (
    *("LOCAL_PACKAGE_DIRECTORY", "PASSWORD_FILE", "AUTHENTICATE", "FALLBACK_URL"),
    *("TIER", "BUCKET_NAME", "REMOTE_PACKAGE_DIRECTORY", "SYNC_SECONDS", "CACHE_MB"),
    *("PRIVATE_NAMES", "OVERWRITE", "MAX_UPLOAD_MB", "HEALTH_ENDPOINT", "WELCOME_FILE"),
)
YES, NO = {"1", "yes", "true", "on"}, {"", "0", "no", "false", "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says, checked. Sizes in bytes; 0 means no bound."""

    root: Path
    bucket_name: str
    remote: str  # prefix in the bucket; without one, a directory that stands for it
    sync_seconds: float
    cache: int
    password_file: Path | None
    authenticate: frozenset[str]
    fallback_url: str
    private_names: tuple[str, ...]
    overwrite: bool
    max_upload: int
    health_endpoint: str
    welcome_file: Path | None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read all settings; raise SettingsError for one that cannot work."""
        return cls(
            **_places(environ),
            sync_seconds=_number(environ, "SYNC_SECONDS", 1),
            cache=int(_number(environ, "CACHE_MB", 100) * 1_000_000),
            password_file=_password_file(environ),
            authenticate=_actions(environ.get("AUTHENTICATE", "update")),
            fallback_url=_url(environ, "FALLBACK_URL"),
            private_names=tuple(
                map(normalize, _words(environ.get("PRIVATE_NAMES", "")))
            ),
            overwrite=_yes_or_no(environ, "OVERWRITE"),
            max_upload=_max_upload(environ),
            health_endpoint=_endpoint(environ.get("HEALTH_ENDPOINT") or "/health"),
            welcome_file=_file(environ, "WELCOME_FILE"),
        )


def _places(environ: Mapping[str, str]) -> dict[str, Any]:
    """Where distributions lie. The ancestor's words and their meaning are kept."""
    dev = environ.get("TIER", "dev") in ("dev", "")
    bucket, remote = (
        environ.get("BUCKET_NAME", ""),
        environ.get("REMOTE_PACKAGE_DIRECTORY"),
    )
    if not dev and not bucket:
        raise SettingsError(
            f"TIER is {environ['TIER']!r}, so a bucket is needed: set BUCKET_NAME, or leave "
            "TIER out to serve a local directory."
        )
    root = environ.get("LOCAL_PACKAGE_DIRECTORY") or (
        "packages" if dev else "/tmp/packages"
    )
    if not bucket and remote and Path(remote).absolute() == Path(root).absolute():
        raise SettingsError(
            f"LOCAL_PACKAGE_DIRECTORY and REMOTE_PACKAGE_DIRECTORY are both {remote!r}; "
            "the one is kept in step with the other, so they have to differ."
        )
    return {
        "root": Path(root),
        "bucket_name": bucket,
        "remote": remote or ("packages" if bucket else ""),
    }


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _actions(text: str) -> frozenset[str]:
    words = frozenset(_words(text)) - {"."}
    if unknown := words - ACTIONS:
        raise SettingsError(
            f"AUTHENTICATE names {', '.join(sorted(unknown))!r}; it takes list, "
            'download and update (separated by commas), or "." for none.'
        )
    if "." in _words(text) and words:
        raise SettingsError(
            f'AUTHENTICATE is {text!r}: "." means that nothing needs a user and '
            "stands alone; leave it out or leave the others out."
        )
    return words


def _yes_or_no(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value not in YES | NO:
        raise SettingsError(f"{name} is {value!r}; say yes or no.")
    return value in YES


def _number(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "").strip()
    if not re.fullmatch(r"(\d{1,9}(\.\d{1,9})?)?", text, re.ASCII):
        raise SettingsError(f"{name} is {text!r}; it takes a number, 0 or more.")
    return float(text) if text else default


def _max_upload(environ: Mapping[str, str]) -> int:
    # App Engine and Cloud Run end any request above 32 MB themselves, with an answer
    # that names no reason; refusing first lets us say why.
    hosted = "GAE_ENV" in environ or "K_SERVICE" in environ
    return int(_number(environ, "MAX_UPLOAD_MB", 32 if hosted else 0) * 1_000_000)


def _url(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip().rstrip("/")
    if value and not re.fullmatch(r"https?://[^\s/?#]+[^\s?#]*", value):
        raise SettingsError(f"{name} is {value!r}; it takes an http(s) URL.")
    return value


def _endpoint(path: str) -> str:
    if not re.fullmatch(r"/[a-z0-9/_-]*[a-z0-9_-]", path, re.I | re.ASCII):
        raise SettingsError(
            f"HEALTH_ENDPOINT is {path!r}; it takes a path such as /health."
        )
    if path.split("/")[1] in ("simple", "packages", "pypi", "legacy", "RPC2"):
        raise SettingsError(f"HEALTH_ENDPOINT is {path!r}, which has another use here.")
    return path


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    if not (value := environ.get(name, "")):
        return None
    if not os.access(value, os.R_OK) or not os.path.isfile(value):
        raise SettingsError(f"{name} is {value!r}, which is not a readable file.")
    return Path(value)


def _password_file(environ: Mapping[str, str]) -> Path | None:
    """The file of users: as set, or htpasswd.txt here or beside this module.

    The default need not exist: it is used from the moment somebody makes it.
    """
    if environ.get("PASSWORD_FILE") == ".":  # pypiserver's word for "no passwords"
        if environ.get("AUTHENTICATE") != ".":
            raise SettingsError("-P . (no passwords) needs -a . (nothing needs a user)")
        return None
    here = Path("htpasswd.txt").absolute()
    beside = Path(__file__).with_name("htpasswd.txt")
    default = beside if beside.is_file() and not here.is_file() else here
    return _file(environ, "PASSWORD_FILE") or default


# ---- 3. Names and versions -----------------------------------------------------------
# A file name is taken apart once, here, into project and version; what does not come
# apart is not a distribution and is never listed, served or stored.

_NAME = re.compile(r"[A-Z0-9]([A-Z0-9._-]*[A-Z0-9])?", re.I | re.ASCII)
# 255 bytes is the longest name common file systems take; ".metadata" has to fit too.
_SAFE = re.compile(r"[A-Z0-9][A-Z0-9._+!-]{0,239}", re.I | re.ASCII)
_WHEEL = re.compile(r"([^-]+)-([^-]+)(?:-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl", re.I)
_EGG = re.compile(r"([^-]+)-([^-]+)(?:-py\d[\d.]*(?:-.+)?)?\.egg", re.I)
_INSTALLER = re.compile(
    r"(.+?)-(\d[^-]*?)(?:\.(?:win|linux)[\w-]*?)?(?:-py\d[\d.]*)?\.(?:exe|msi)", re.I
)
_ARCHIVE = re.compile(r"(.+)\.(?:tar\.gz|zip|tgz|tar\.bz2|tar\.xz|tar\.Z|tar)", re.I)
_VERSION = re.compile(
    r"""v? (?:(?P<epoch>\d+)!)? (?P<release>\d+(?:\.\d+)*)
    (?:[-_.]? (?P<pre>alpha|a|beta|b|preview|pre|c|rc) [-_.]? (?P<pre_n>\d*))?
    (?P<post>-(?P<post_n>\d+) | [-_.]?(?:post|rev|r)[-_.]?(?P<post_m>\d*))?
    (?P<dev>[-_.]?dev[-_.]?(?P<dev_n>\d*))?
    (?:\+(?P<local>[a-z0-9]+(?:[-_.][a-z0-9]+)*))?""",
    re.X | re.I | re.ASCII,
)
UPLOADABLE = (".whl", ".tar.gz", ".zip")  # what PyPI takes: wheels and sdists


class Parsed(NamedTuple):
    filename: Filename
    project: Project
    version: str


def normalize(name: str) -> str:
    """Fold the spellings of a project's name into one (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def to_project(name: str) -> Project | None:
    """Check and normalise a project's name; None if it is not one (PEP 508)."""
    return Project(normalize(name)) if _NAME.fullmatch(name) else None


def parse_filename(name: str, project: str = "") -> Parsed | None:
    """Take a distribution's file name apart (PEP 427, PEP 625 and older spellings).

    An old sdist's name can be read in more than one way; `project` says which is meant.
    """
    if not _SAFE.fullmatch(name):
        return None
    parts: Sequence[str] | None = None
    built = (_WHEEL, _EGG, _INSTALLER)
    if match := next(filter(None, (p.fullmatch(name) for p in built)), None):
        parts = match.groups()
    elif match := _ARCHIVE.fullmatch(name):
        parts = _split_sdist(match[1], project)
    owner = to_project(parts[0]) if parts else None
    return Parsed(Filename(name), owner, parts[1]) if parts and owner else None


def _split_sdist(stem: str, project: str) -> tuple[str, str] | None:
    """Split name-version at the last hyphen that leaves a version (PEP 440)."""
    cuts = [match.start() for match in re.finditer("-", stem)]
    splits = [(stem[:cut], stem[cut + 1 :]) for cut in reversed(cuts)]
    meant = [split for split in splits if normalize(split[0]) == project]
    valid = [split for split in splits if _VERSION.fullmatch(split[1])]
    return next(iter(meant + valid + splits), None)


def version_key(version: str) -> tuple[Any, ...]:
    """The order of PEP 440, equal for equal versions; what is none sorts first."""
    match = _VERSION.fullmatch(version.strip())
    if not match or len(version) > 200:  # longer is no version; int() stays cheap
        return (False, version)
    part = match.groupdict()
    release = tuple(int(n) for n in part["release"].split("."))
    while len(release) > 1 and not release[-1]:
        release = release[:-1]
    post = int(part["post_n"] or part["post_m"] or 0) if part["post"] else -1
    dev = int(part["dev_n"] or 0) if part["dev"] else float("inf")
    return (True, int(part["epoch"] or 0), release, _pre(part), post, dev, _local(part))


def is_final(key: tuple[Any, ...]) -> bool:
    """Is this the key of a version that is neither a pre-release nor a dev release?"""
    return bool(key[0]) and key[3] == (2,) and key[5] == float("inf")


def _pre(part: Mapping[str, str | None]) -> tuple[Any, ...]:
    if letters := part["pre"]:
        # alpha < beta < candidate: the first letters are in order once c, pre and
        # preview are read as rc.
        kind = letters[0].lower()
        return (1, kind if kind in "ab" else "rc", int(part["pre_n"] or 0))
    return (0,) if part["dev"] and not part["post"] else (2,)


def _local(part: Mapping[str, str | None]) -> tuple[Any, ...]:
    segments = re.split(r"[-_.]", (part["local"] or "").lower())
    return tuple((1, int(s), "") if s.isdigit() else (0, 0, s) for s in segments if s)


# ---- 4. Requests and responses -------------------------------------------------------
# A Request is a thin reading of the WSGI environ. A Response is a value: those of pages
# are made once and answered many times, so nothing may change one.

STATUS = {
    200: "OK",
    206: "Partial Content",
    301: "Moved Permanently",
    302: "Found",
    304: "Not Modified",
}
TEXT = "text/plain; charset=utf-8"


CHUNK = 256 << 10  # bytes per read; larger ones gain nothing measurable
DIGESTS: dict[str, Callable[[], Any]] = {
    "sha256_digest": hashlib.sha256,
    "md5_digest": partial(hashlib.md5, usedforsecurity=False),
    "blake2_256_digest": partial(hashlib.blake2b, digest_size=32),
}


class Addition(NamedTuple):
    """A distribution that a request added. `source` is its staged file."""

    filename: Filename
    project: Project
    version: str
    source: Path
    size: int
    sha256: str
    requires_python: str
    core_metadata: str
    uploader: str
    signature: bytes
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


NOTHING: Mapping[str, str] = {}


class Request:
    """One request: environ, method, path (decoded, below SCRIPT_NAME), route, user."""

    __slots__ = (
        "args",
        "environ",
        "method",
        "path",
        "project",
        "route",
        "staged",
        "started",
        "unread",
        "user",
    )

    def __init__(self, environ: WSGIEnvironment) -> None:
        self.environ = environ
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ.get("PATH_INFO") or "/"
        self.route: Route | None = None
        self.project = Project("")  # the one that the path names, if it names one
        self.args: Mapping[str, str] = NOTHING  # what else the path names
        self.started = time.monotonic()
        self.user = ""  # who is known to ask; "" if nobody had to say
        self.unread: int | None = None  # bytes of the body; None: none was asked for
        self.staged: list[Path] = []  # files to be gone when the request is over

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
    name = request.args.get("file", "").removesuffix(".metadata").removesuffix(".asc")
    if request.project or not name:
        return request.project or None, name
    parsed = parse_filename(name)
    return parsed.project if parsed else None, name


def text_response(status: int, message: str, *headers: tuple[str, str]) -> Response:
    """A sentence for a person, in the reason phrase (for twine) and in the body."""
    body = f"{message}\n".encode()
    reason = STATUS[status] if status < 400 else _reason(message)
    length = ("Content-Length", str(len(body)))
    kinds = (("Content-Type", TEXT), ("X-Content-Type-Options", "nosniff"), length)
    return Response(f"{status} {reason}", (*kinds, *headers), (body,))


def _reason(message: str) -> str:
    # A reason phrase is latin-1 without control characters (RFC 9112, 4); gunicorn
    # turns anything else into a 500. 400 letters keep any proxy's line limit.
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", message)[:400]
    return line.encode("latin-1", "replace").decode("latin-1")


def redirect(location: str, status: int = 302) -> Response:
    """A relative location survives every prefix that a proxy adds or strips."""
    headers = (("Location", location), ("Content-Length", "0"))
    return Response(f"{status} {STATUS[status]}", headers)


# ---- 5. Users and passwords ----------------------------------------------------------
# An htpasswd file is read when it changes, every line checked at once. One table maps
# each format to the function that computes its digest. A login that was verified is
# remembered by a keyed hash, in memory, until the file changes.

ITOA64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SCRYPT_LN = 14  # 2**14 x 8 x 128 bytes = 16 MiB and some 40 ms a check: fits a 384 MB
# instance with two workers, as one check at a time runs in each.
MAX_AUTHORIZATION = 4096  # bytes; sha-crypt's time grows with the password's length

Groups = Mapping[str, str | Any]
Scheme = tuple[re.Pattern[str], Callable[[bytes, Groups], str]]


def hash_password(password: str) -> str:
    """Hash a password for an htpasswd line or get_app(users=...), with scrypt."""
    salt = _b64(os.urandom(16))
    stem = f"$scrypt$ln={SCRYPT_LN},r=8,p=1${salt}$"
    group = {"ln": SCRYPT_LN, "r": 8, "p": 1, "salt": salt, "digest": "A" * 43}
    return stem + _scrypt(password.encode(), group)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return base64.b64decode(text.replace(".", "+") + "=" * (-len(text) % 4))


def _scrypt(password: bytes, group: Groups) -> str:
    n, r, p = 1 << int(group["ln"]), int(group["r"]), int(group["p"])
    size = len(_unb64(group["digest"]))
    memory = 128 * n * r + 128 * r * p + (1 << 20)  # what OpenSSL asks for, and slack
    key = hashlib.scrypt(
        password, salt=_unb64(group["salt"]), n=n, r=r, p=p, maxmem=memory, dklen=size
    )
    return _b64(key)


def _pbkdf2(password: bytes, group: Groups) -> str:
    size = len(_unb64(group["digest"]))
    name, salt, rounds = group["hash"], _unb64(group["salt"]), int(group["rounds"])
    key = hashlib.pbkdf2_hmac(name or "sha1", password, salt, rounds, size)
    return _b64(key).replace("+", ".")


def _sha1(password: bytes, group: Groups) -> str:
    return base64.b64encode(hashlib.sha1(password).digest()).decode()


def _bcrypt(password: bytes, group: Groups) -> str:
    import bcrypt

    # bcrypt has always ignored what follows the 72nd byte; its package now refuses it.
    return str(bcrypt.hashpw(password[:72], group["digest"].encode()).decode())


def _md5_crypt(password: bytes, group: Groups) -> str:
    """$1$ and $apr1$, after the description of FreeBSD's crypt and Apache's."""
    salt, magic = group["salt"].encode(), f"${group['magic']}$".encode()
    first = hashlib.md5(password + salt + password).digest()
    start = password + magic + salt + _fill(first, len(password))
    for bit in _bits(len(password)):
        start += b"\0" if bit else password[:1]
    digest = _rounds("md5", hashlib.md5(start).digest(), password, salt, 1000)
    triples = [(i, i + 6, i + 12 if i < 4 else 5) for i in range(5)]
    return "".join(_to64(digest, *t) for t in triples) + _to64(digest, 11, size=2)


def _sha_crypt(password: bytes, group: Groups) -> str:
    """$5$ and $6$ (Drepper, "Unix crypt using SHA-256 and SHA-512")."""
    name = "sha256" if group["kind"] == "5" else "sha512"
    salt, length = group["salt"].encode(), len(password)
    first = hashlib.new(name, password + salt + password).digest()
    start = password + salt + _fill(first, length)
    for bit in _bits(length):
        start += first if bit else password
    digest = hashlib.new(name, start).digest()
    p = _fill(hashlib.new(name, password * length).digest(), length)
    s = _fill(hashlib.new(name, salt * (16 + digest[0])).digest(), len(salt))
    rounds = min(max(int(group["rounds"] or 5000), 1000), 999_999_999)
    return _sha_crypt_text(_rounds(name, digest, p, s, rounds))


def _sha_crypt_text(digest: bytes) -> str:
    third = len(digest) // 3
    a, b, c = 0, third, 2 * third
    text = ""
    for _ in range(third):
        text += _to64(digest, a, b, c)
        a, b, c = (c + 1, a + 1, b + 1) if third == 10 else (b + 1, c + 1, a + 1)
    return text + (
        _to64(digest, 31, 30, size=3) if third == 10 else _to64(digest, 63, size=2)
    )


def _rounds(name: str, digest: bytes, p: bytes, s: bytes, rounds: int) -> bytes:
    for i in range(rounds):
        odd = i & 1
        middle = (s if i % 3 else b"") + (p if i % 7 else b"")
        text = (p if odd else digest) + middle + (digest if odd else p)
        digest = hashlib.new(name, text).digest()
    return digest


def _fill(digest: bytes, length: int) -> bytes:
    return (digest * (length // len(digest) + 1))[:length]


def _bits(number: int) -> Iterator[int]:
    while number:
        yield number & 1
        number >>= 1


def _to64(digest: bytes, *places: int, size: int = 4) -> str:
    value = int.from_bytes(bytes(digest[i] for i in places), "big")
    return "".join(ITOA64[value >> 6 * i & 63] for i in range(size))


_B64 = "[A-Za-z0-9./+]+"
SCHEMES: tuple[Scheme, ...] = tuple(
    (re.compile(pattern, re.ASCII), compute)
    for pattern, compute in (
        (rf"\$scrypt\$ln=(?P<ln>\d|1\d|20),r=(?P<r>\d\d?),p=(?P<p>\d\d?)"
         rf"\$(?P<salt>{_B64})\$(?P<digest>{_B64})", _scrypt),
        (rf"\$pbkdf2(?:-(?P<hash>sha1|sha256|sha512))?\$(?P<rounds>[1-9]\d{{0,7}})"
         rf"\$(?P<salt>{_B64})\$(?P<digest>{_B64})", _pbkdf2),
        (r"\{SHA\}(?P<digest>[A-Za-z0-9+/]{27}=)", _sha1),
        (r"\$(?P<magic>apr1|1)\$(?P<salt>[^$]{0,8})\$(?P<digest>[./\w]{22})", _md5_crypt),
        (r"\$(?P<kind>5)\$(?:rounds=(?P<rounds>\d{1,9})\$)?(?P<salt>[^$]{0,16})"
         r"\$(?P<digest>[./\w]{43})", _sha_crypt),
        (r"\$(?P<kind>6)\$(?:rounds=(?P<rounds>\d{1,9})\$)?(?P<salt>[^$]{0,16})"
         r"\$(?P<digest>[./\w]{86})", _sha_crypt),
        (r"(?P<digest>\$2[abxy]\$\d\d\$[./\w]{53})", _bcrypt),
    )
)  # fmt: skip
Check = Callable[[bytes], bool]


def password_check(stored: str, where: str) -> Check:
    """Make the check of one stored hash; raise SettingsError if it cannot be used."""
    for pattern, compute in SCHEMES:
        if match := pattern.fullmatch(stored):
            if compute is _bcrypt:
                _need_bcrypt(where)
            return partial(_is_right, compute, match.groupdict())
    if match := re.match(r"\$[^$]*\$|\{\w+\}", stored):
        kind = f"the format {match[0]}"
    else:
        kind = "DES crypt" if re.fullmatch(r"[./\w]{13}", stored) else "plaintext"
    raise SettingsError(
        f"{where}: {kind} is not accepted. Set that password anew with: "
        "python pypi_ae.py passwd FILE USER"
    )


def _is_right(
    compute: Callable[[bytes, Groups], str], group: Groups, password: bytes
) -> bool:
    return hmac.compare_digest(compute(password, group), str(group["digest"]))


def _need_bcrypt(where: str) -> None:
    try:
        import bcrypt  # noqa: F401 - only whether it is there
    except ImportError:
        raise SettingsError(
            f"{where}: a bcrypt hash needs the package bcrypt. Install it (pip install "
            "bcrypt), or set that password anew: python pypi_ae.py passwd FILE USER"
        ) from None


class Logins(NamedTuple):
    """One reading of the users: its stamp, a check per user, logins that were right."""

    stamp: object
    checks: dict[str, Check]
    verified: dict[bytes, str]


class Users:
    """Who is who, from a mapping of user to hash or from a file in htpasswd format."""

    def __init__(self, source: Mapping[str, str] | Path | None) -> None:
        self._path = source if isinstance(source, Path) else None
        self._secret = os.urandom(32)
        self._one_at_a_time = threading.Lock()  # see SCRYPT_LN
        table = {} if source is None or self._path else dict(source)  # type: ignore[arg-type]
        checks = {u: password_check(h, f"user {u!r}") for u, h in table.items()}
        self._logins = Logins(None, checks, {})
        self.logins()

    def logins(self) -> Logins:
        """The users as they are now; the file is read again when it has changed."""
        if self._path and (stamp := _stamp(self._path)) != self._logins.stamp:
            text = self._path.read_text("utf-8") if stamp else ""
            checks = dict(_read_users(text, self._path.name))
            self._logins = Logins(stamp, checks, {})
        return self._logins

    def verify(self, header: str) -> str:
        """Return the user of a Basic Authorization header (RFC 7617), or raise 401."""
        logins = self.logins()
        credentials = header.encode("latin-1", "replace")[: MAX_AUTHORIZATION + 1]
        key = hashlib.blake2b(credentials, key=self._secret, digest_size=16).digest()
        if user := logins.verified.get(key):
            return user
        user, password = _basic(credentials)
        check = logins.checks.get(user) or self._decoy(logins, user)
        with self._one_at_a_time:
            right = check(password)
        if not right or user not in logins.checks:
            raise _unauthorized(f"The password for user {user!r} is not right.")
        logins.verified[key] = user
        return user

    def _decoy(self, logins: Logins, user: str) -> Check:
        # An unknown user costs what a known one does: somebody else's check is run.
        checks = list(logins.checks.values())
        return checks[zlib.crc32(user.encode() + self._secret) % len(checks)]


def _stamp(path: Path | str) -> tuple[int, int, int] | None:
    """What tells one state of a file from the next; None when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _read_users(text: str, name: str) -> Iterator[tuple[str, Check]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        user, colon, stored = line.strip().partition(":")
        where = f"{name}, line {number} (user {user!r})"
        if not colon or not user:
            raise SettingsError(f"{name}, line {number}: it should read USER:HASH.")
        yield user, password_check(stored, where)


def _basic(credentials: bytes) -> tuple[str, bytes]:
    """Take Basic credentials apart; raise 401 for what are none."""
    scheme, _, encoded = credentials.partition(b" ")
    if not credentials:
        raise _unauthorized("This needs a user and a password (HTTP Basic).")
    try:
        if scheme.lower() != b"basic" or len(credentials) > MAX_AUTHORIZATION:
            raise ValueError
        user, colon, password = base64.b64decode(
            encoded.strip(), validate=True
        ).partition(b":")
        if not colon:
            raise ValueError
        return user.decode(), password
    except ValueError:  # binascii.Error and UnicodeDecodeError are kinds of it
        raise _unauthorized("The Authorization header is not HTTP Basic.") from None


def _unauthorized(message: str) -> HTTPError:
    return HTTPError(
        401, message, WWW_Authenticate='Basic realm="pypi", charset="UTF-8"'
    )


# ---- 6. Archives ---------------------------------------------------------------------
# Core metadata comes out of the distribution itself: METADATA of a wheel, PKG-INFO of
# an sdist. The archive is a stranger's: nothing is read further, or in larger pieces,
# than an honest one needs, and whatever its readers raise becomes ArchiveError.

MAX_METADATA = 4 << 20  # bytes; the largest README-laden ones on PyPI are near 1 MiB
MAX_PIECE = 8 << 20  # bytes; a zip directory of some 80,000 files
MAX_EXPANSION = 100  # times its size; source text packs 3 to 10 times
MIN_EXPANDED = 64 << 20  # bytes that any archive may expand to, however small

_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
_PKG_INFO = re.compile(r"(\./)?[^/]+/PKG-INFO")


class CoreMetadata(NamedTuple):
    """The fields of core metadata that an index needs, and its bytes."""

    name: str
    version: str
    requires_python: str
    text: bytes


class Bounded(io.BufferedIOBase):
    """A file that refuses to be read in one large piece, or beyond an end."""

    def __init__(self, source: IO[bytes], end: int) -> None:
        self._source, self._end = source, end

    def read(self, size: int | None = -1) -> bytes:
        least = MAX_PIECE + 1 if size is None or size < 0 else min(size, MAX_PIECE + 1)
        data = self._source.read(least)
        if len(data) > MAX_PIECE or self._source.tell() > self._end:
            raise ArchiveError("it expands to more than an honest archive would")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset > self._end:
            raise ArchiveError("it points beyond its end")
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()

    def seekable(self) -> bool:
        return True


def read_core_metadata(source: IO[bytes], filename: str, size: int) -> CoreMetadata:
    """Read METADATA out of a wheel or PKG-INFO out of an sdist, or raise ArchiveError."""
    try:
        if filename.endswith(".whl"):
            text = _zip_member(source, size, _METADATA)
        elif filename.endswith(".zip"):
            text = _zip_member(source, size, _PKG_INFO)
        else:
            text = _tar_member(source, size)
    except (ArchiveError, MemoryError):
        raise
    except OSError as fault:
        if fault.errno:  # the disk's fault, not the archive's
            raise
        raise ArchiveError(f"it cannot be read: {fault}") from fault
    except Exception as fault:  # zipfile, tarfile and zlib raise some ten kinds
        raise ArchiveError(f"it cannot be read: {fault}") from fault
    return _parse_metadata(text)


def _zip_member(source: IO[bytes], size: int, name: re.Pattern[str]) -> bytes:
    import zipfile  # 10 ms, and only uploads and new files need it

    with zipfile.ZipFile(Bounded(source, size)) as archive:
        found = [i for i in archive.infolist() if name.fullmatch(i.filename)]
        if len(found) != 1:
            raise ArchiveError(
                f"it holds {len(found)} files like {name.pattern!r}, not 1"
            )
        if found[0].file_size > MAX_METADATA:
            raise ArchiveError(
                f"{found[0].filename} is larger than {MAX_METADATA} bytes"
            )
        with archive.open(found[0]) as member:
            return member.read(MAX_METADATA)


def _tar_member(source: IO[bytes], size: int) -> bytes:
    import gzip
    import tarfile

    end = max(MIN_EXPANDED, MAX_EXPANSION * size)
    plain = Bounded(gzip.GzipFile(fileobj=source), end)  # type: ignore[arg-type]
    with tarfile.open(fileobj=plain, mode="r:") as archive:
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all
            if _PKG_INFO.fullmatch(member.name) and (
                content := archive.extractfile(member)
            ):
                if member.size > MAX_METADATA:
                    raise ArchiveError(
                        f"{member.name} is larger than {MAX_METADATA} bytes"
                    )
                return content.read()
    raise ArchiveError("it holds no PKG-INFO")


def _parse_metadata(text: bytes) -> CoreMetadata:
    """Read the header fields of core metadata (RFC 822 style, UTF-8)."""
    fields: dict[str, str] = {}
    for line in text.decode("utf-8", "replace").splitlines():
        if not line.strip():
            break
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace():
            fields.setdefault(key.lower(), value.strip())
    if not fields.get("name") or not fields.get("version"):
        raise ArchiveError("its metadata has no Name or no Version")
    return CoreMetadata(
        fields["name"], fields["version"], fields.get("requires-python", ""), text
    )


# ---- 7. Listings ---------------------------------------------------------------------
# A listing is what a project page is made of. It is immutable but for the answers that
# are rendered from it, so a page is rendered once for as long as nothing changes.


class Facts(NamedTuple):
    """What only the bytes of a distribution tell. Digests in hex; "" for none."""

    sha256: str
    requires_python: str
    core_metadata: str  # sha256 of the bytes that <file>.metadata answers


def read_facts(source: IO[bytes], filename: str, size: int) -> Facts:
    """Read a distribution once from end to end, and its metadata where it has any."""
    sha256 = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
    if not filename.endswith((*UPLOADABLE, ".tgz")):
        return Facts(sha256, "", "")
    try:
        source.seek(0)
        metadata = read_core_metadata(source, filename, size)
    except ArchiveError:
        return Facts(sha256, "", "")
    digest = (
        hashlib.sha256(metadata.text).hexdigest() if filename.endswith(".whl") else ""
    )
    return Facts(sha256, metadata.requires_python, digest)


@dataclass(frozen=True, slots=True)
class Distribution:
    """One wheel or sdist as an index page shows it."""

    filename: Filename
    project: Project
    version: str
    size: int  # bytes
    uploaded: float  # POSIX seconds
    sha256: str
    requires_python: str
    core_metadata: str  # sha256 of its metadata; "" if that cannot be served
    yanked: str | None  # the reason, which may be ""; None: not yanked
    signed: bool
    path: str  # where it lies
    stamp: tuple[int, ...]  # changes when its bytes do
    md5: str = ""  # all that is known of an object which was copied into a bucket

    @property
    def hashes(self) -> dict[str, str]:
        """The best hash that is known, in hex, by its name; often the only one."""
        if self.sha256:
            return {"sha256": self.sha256}
        return {"md5": self.md5} if self.md5 else {}

    @property
    def tag(self) -> str:
        """Its entity tag: the same bytes, the same tag, wherever they are served."""
        return f'"{self.sha256 or self.md5 or self.stamp[0]}"'

    @property
    def url(self) -> str:
        """Its address below the root of this app."""
        return f"packages/{self.project}/{quote(self.filename)}"


FILES_REMEMBERED = 10_000  # distributions in listings kept in memory: about 15 MB
Answer = tuple[Response, Response]  # in full, and 304
T = TypeVar("T")
Source = TypeVar("Source", "Listing", "Catalog")  # what pages are rendered from


class Listing:
    """The distributions of one project, in the order of their versions."""

    __slots__ = ("answers", "by_name", "distributions", "project")

    def __init__(self, project: Project, found: Iterable[Distribution]) -> None:
        key = lambda d: (version_key(d.version), d.filename)  # noqa: E731
        self.project = project
        self.distributions = tuple(sorted(found, key=key))
        self.by_name = {str(d.filename): d for d in self.distributions}
        self.answers: dict[tuple[str, bool], Answer] = {}

    def versions(self) -> list[str]:
        """Every version once (PEP 700), oldest first; 1.0 and 1.0.0 are the same."""
        return list(
            {version_key(d.version): d.version for d in self.distributions}.values()
        )


class Catalog:
    """The names of all projects, and the loose files that lie beside their folders."""

    __slots__ = ("answers", "folders", "loose", "projects")

    def __init__(
        self, folders: Mapping[Project, list[str]], loose: Mapping[Project, list[str]]
    ) -> None:
        self.folders, self.loose = folders, loose
        self.projects = sorted({*folders, *loose})
        self.answers: dict[tuple[str, bool], Answer] = {}


class Remembered(Generic[T]):
    """Values by project, bounded: what was kept first is forgotten first."""

    def __init__(self) -> None:
        self._values: dict[Project, tuple[T, int]] = {}
        self._files = 0
        self._lock = threading.Lock()

    def get(self, project: Project) -> T | None:
        kept = self._values.get(project)
        return kept[0] if kept else None

    def keep(self, project: Project, value: T, files: int) -> None:
        """Keep a value that holds the facts of so many files."""
        with self._lock:
            self._files += files + 1 - self._drop(project)
            self._values[project] = value, files
            while self._files > FILES_REMEMBERED and len(self._values) > 1:
                self._files -= self._drop(next(iter(self._values)))

    def _drop(self, project: Project) -> int:
        dropped = self._values.pop(project, None)
        return dropped[1] + 1 if dropped else 0


# ---- 8. The directory ----------------------------------------------------------------
#     <root>/<project>/<filename>   what uploads make
#     <root>/<filename>             loose files: listed and served, never written
#     <root>/.pypi_ae/              uploads in progress, and facts; may be deleted
# A listing is trusted while the folder's and the root's times stay as they were, and
# for LOOK_SECONDS at most. Facts are computed once per file and kept as JSON lines, one
# file per project, keyed by size, mtime and inode: no start and no worker hashes again.

LOOK_SECONDS = 1.0  # a file rewritten in place does not change its folder's time
ABANDONED_SECONDS = 600  # an upload not written to for so long has lost its process


class Look(NamedTuple):
    """What was seen at one look, and until when (monotonic seconds) to trust it."""

    times: list[int]  # of the root and the folders, nanoseconds
    until: float
    folders: list[str]
    stamps: dict[str, object]
    facts: dict[tuple[object, ...], Facts]
    listing: Listing


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _mtimes(paths: Iterable[str]) -> list[int]:
    return [_mtime(path) for path in paths]


def _is_settled(mtime: int, now: int) -> bool:
    """Would a change after `now` show in this time of a folder (both nanoseconds)?

    Linux stamps in ticks of at most 10 ms, FAT and some network file systems in full
    seconds: within the same tick a second change leaves the time as it was.
    """
    tick = 20_000_000 if mtime % 1_000_000_000 else 2_000_000_000
    return now - mtime > tick


def _distribution_of(name: str) -> str:
    """The distribution that a companion belongs to; any other name as it is."""
    return name.removesuffix(".yanked").removesuffix(".asc")


def _read_yank(path: str) -> str | None:
    """The reason of a yank: the text of <file>.yanked, 1,000 letters at most."""
    try:
        with open(path + ".yanked", encoding="utf-8", errors="replace") as file:
            return " ".join(file.read(1000).split())
    except FileNotFoundError:
        return None


def _compute_facts(path: str, stamp: tuple[object, ...]) -> Facts | None:
    """Read a file for its facts; None if it goes or changes while it is read."""
    try:
        with open(path, "rb") as file:
            facts = read_facts(
                file, os.path.basename(path), os.fstat(file.fileno()).st_size
            )
            return facts if _stamp(path) == stamp else None
    except OSError as fault:
        log.warning("%s is not listed, as it cannot be read: %s", path, fault)
        return None


def _slice(file: Any, length: int) -> Iterator[bytes]:
    with file:
        while length > 0 and (chunk := file.read(min(CHUNK, length))):
            length -= len(chunk)
            yield chunk


def open_staged(folder: Path) -> BinaryIO:
    """Open a new file for an upload in progress, and sweep out those of the dead."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # swept by another worker
            if time.time() - entry.stat().st_mtime > ABANDONED_SECONDS:
                os.unlink(entry.path)
    return open(folder / os.urandom(16).hex(), "xb", buffering=0)


def _move(source: Path, target: Path, *, overwrite: bool) -> None:
    """Give a staged file its name, atomically; raise FileExistsError if it is taken."""
    act = os.replace if overwrite else os.link
    try:
        act(source, target)
    except FileNotFoundError:  # the first file of its project, or the last just went
        target.parent.mkdir(exist_ok=True)
        act(source, target)
    if os.name == "posix":  # the name has to outlive a power cut, like the bytes
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class Directory:
    """Distributions in a directory: found, described, read, added and removed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(parents=True, exist_ok=True)
        self.staging = self.root / ".pypi_ae" / "staging"
        self._facts = self.root / ".pypi_ae" / "facts"
        self._catalog: tuple[int, Catalog] | None = None
        self._looks: Remembered[Look] = Remembered()
        # Striped: projects that are looked at for the first time do not all wait for
        # one that has gigabytes to hash.
        self._locks = [threading.Lock() for _ in range(64)]

    # What is there...

    def listing(self, project: Project) -> Listing:
        look = self._looks.get(project)
        if (
            look
            and time.monotonic() < look.until
            and _mtimes(look.folders) == look.times
        ):
            return look.listing
        return self._look(project)

    def current(self, project: Project) -> Listing:
        return self.listing(project)

    def find(self, project: Project, filename: str) -> Distribution | None:
        """One distribution, its facts those of the bytes that lie there now."""
        found = self.listing(project).by_name.get(filename)
        if found and _stamp(found.path) != found.stamp:
            found = self._look(project).by_name.get(filename)
        return found

    def catalog(self) -> Catalog:
        known, mtime, now = self._catalog, _mtime(str(self.root)), time.time_ns()
        if known and known[0] == mtime:
            return known[1]
        folders: dict[Project, list[str]] = {}
        loose: dict[Project, list[str]] = {}
        with os.scandir(self.root) as entries:
            for entry in entries:
                if entry.is_dir():
                    if owner := to_project(entry.name):
                        folders.setdefault(owner, []).append(entry.name)
                elif parsed := parse_filename(_distribution_of(entry.name)):
                    loose.setdefault(parsed.project, []).append(entry.name)
        catalog = Catalog(folders, loose)
        self._catalog = (mtime if _is_settled(mtime, now) else -1, catalog)
        return catalog

    def everything(self) -> Iterator[tuple[Project, Filename]]:
        """Every distribution there is, without its facts."""
        catalog = self.catalog()
        for project in catalog.projects:
            for path in sorted(self._paths(project, catalog)):
                if parsed := parse_filename(os.path.basename(path), project):
                    yield project, parsed.filename

    def _look(self, project: Project) -> Listing:
        with self._locks[hash(project) % len(self._locks)]:
            return self._look_now(project, self._looks.get(project))

    def _look_now(self, project: Project, last: Look | None) -> Listing:
        catalog, now = self.catalog(), time.time_ns()
        folders = [
            str(self.root),
            *(str(self.root / f) for f in self._folders(project, catalog)),
        ]
        times = _mtimes(
            folders
        )  # before reading: what changes meanwhile shows next time
        stamps = {path: _stamp(path) for path in self._paths(project, catalog)}
        settled = all(_is_settled(mtime, now) for mtime in times)
        until = time.monotonic() + LOOK_SECONDS if settled else 0.0
        if last and last.stamps == stamps:
            look = last._replace(times=times, until=until)
            self._looks.keep(project, look, len(stamps))
            return last.listing
        facts = self._facts_of(project, stamps, last.facts if last else {})
        listing = Listing(project, self._describe(project, stamps, facts))
        look = Look(times, until, folders, dict(stamps), facts, listing)
        self._looks.keep(project, look, len(stamps))
        return listing

    def _folders(self, project: Project, catalog: Catalog) -> list[str]:
        spellings = catalog.folders.get(project, [])
        return [project, *(name for name in sorted(spellings) if name != project)]

    def _paths(self, project: Project, catalog: Catalog) -> dict[str, None]:
        """The files of a project; of two with one name, the first folder's."""
        names: dict[str, str] = {}
        for folder in self._folders(project, catalog):
            try:
                for name in os.listdir(self.root / folder):
                    parsed = parse_filename(_distribution_of(name), project)
                    if parsed and parsed.project == project:
                        names.setdefault(name, str(self.root / folder / name))
            except (FileNotFoundError, NotADirectoryError):
                continue
        for name in catalog.loose.get(project, ()):
            names.setdefault(name, str(self.root / name))
        return dict.fromkeys(names.values())

    def _describe(
        self, project: Project, stamps: Mapping[str, Any], facts: Mapping[Any, Facts]
    ) -> Iterator[Distribution]:
        for path, stamp in stamps.items():
            parsed = parse_filename(os.path.basename(path), project)
            known = facts.get((os.path.basename(path), *(stamp or ())))
            if not parsed or not known:
                continue  # a companion, or gone since the folder was read
            yield Distribution(
                parsed.filename,
                project,
                parsed.version,
                stamp[0],
                stamp[1] / 1e9,
                *known,
                yanked=_read_yank(path) if path + ".yanked" in stamps else None,
                signed=path + ".asc" in stamps,
                path=path,
                stamp=stamp,
            )

    # What its bytes tell...

    def _facts_of(
        self, project: Project, stamps: Mapping[str, Any], known: Mapping[Any, Facts]
    ) -> dict[tuple[object, ...], Facts]:
        names = {
            path: os.path.basename(path) for path, stamp in stamps.items() if stamp
        }
        wanted = {
            (name, *stamps[path]): path
            for path, name in names.items()
            if _distribution_of(name) == name
        }
        facts: dict[tuple[object, ...], Facts]
        facts = {key: known[key] for key in wanted if key in known}
        if len(facts) < len(wanted):  # another worker, or an earlier start, may know
            loaded = self._load_facts(project)
            facts |= {key: loaded[key] for key in wanted if key in loaded}
        for key in [key for key in wanted if key not in facts]:
            if new := _compute_facts(wanted[key], key[1:]):
                facts[key] = new
                self._store_facts(project, key, new)
        return facts

    def _load_facts(self, project: Project) -> dict[tuple[object, ...], Facts]:
        try:
            lines = (self._facts / f"{project}.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        facts: dict[tuple[object, ...], Facts] = {}
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a line torn by a crash
                name, size, mtime, inode, *rest = json.loads(line)
                facts[name, size, mtime, inode] = Facts(*rest)
        return facts

    def _store_facts(
        self, project: Project, key: tuple[object, ...], facts: Facts
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
        file = open(found.path, "rb")  # noqa: SIM115 - the server closes it, when sent
        file.seek(start)
        return file

    def core_metadata(self, found: Distribution) -> bytes:
        with open(found.path, "rb") as file:
            return read_core_metadata(file, found.filename, found.size).text

    def signature(self, found: Distribution) -> bytes:
        return Path(found.path + ".asc").read_bytes()

    # Changing...

    def add(self, new: Addition) -> bool:
        """Make a staged file a distribution, at one stroke.

        Returns False when the same bytes are there already; raises FileExistsError
        when others are and `new.overwrite` is not set.
        """
        target = self.root / new.project / new.filename
        key = (new.filename, *(_stamp(new.source) or ()))
        changed = self._put(new, target)
        if changed:
            facts = Facts(new.sha256, new.requires_python, new.core_metadata)
            self._store_facts(new.project, key, facts)
        if new.signature:
            self._sign(new, target)
        return changed

    def _put(self, new: Addition, target: Path) -> bool:
        for _ in range(3):  # what is in the way may vanish before it is looked at
            taken = new.overwrite or (self.root / new.filename).exists()
            there = self.find(new.project, new.filename) if taken else None
            if there and there.sha256 == new.sha256:
                return False
            if there and not new.overwrite:
                break
            try:
                _move(new.source, target, overwrite=new.overwrite)
            except FileExistsError:
                there = self.find(new.project, new.filename)
                if there and there.sha256 == new.sha256:
                    return False
                continue
            if there and there.path != str(target):
                Path(there.path).unlink(missing_ok=True)  # it was loose: replaced, too
            return True
        raise FileExistsError(target)

    def _sign(self, new: Addition, target: Path) -> None:
        source = new.source.with_suffix(".asc")
        source.write_bytes(new.signature)
        os.replace(source, f"{target}.asc")

    def remove(self, found: Distribution) -> None:
        for path in (found.path, f"{found.path}.asc", f"{found.path}.yanked"):
            Path(path).unlink(missing_ok=True)
        folder = Path(found.path).parent
        if folder != self.root:
            with contextlib.suppress(OSError):  # it holds something else: it stays
                folder.rmdir()

    def tidy(self, *, dry_run: bool) -> Iterator[str]:
        """Compute all facts, and move loose files into their folders; say what is done."""
        catalog = self.catalog()
        for project in catalog.projects:
            for name in catalog.loose.get(project, ()):
                yield f"{name} -> {project}/{name}"
                if not dry_run:
                    _move(self.root / name, self.root / project / name, overwrite=False)
                    (self.root / name).unlink()
            if not dry_run:
                self.listing(project)

    def warm(self) -> None:
        """Nothing is slow the first time."""


# ---- 9. In step with a bucket --------------------------------------------------------
#     <prefix>/<project>/<filename>  what uploads make; facts ride in custom metadata
#     <prefix>/<filename>            loose objects: listed and served, never written
# `pull`, a before hook, makes current what the request reads: its project's listing
# and, less often, that of the root. `push`, an after hook, commits what was changed
# before it is answered; a precondition decides between writers. Between the two, handlers
# see a Mirror: listings in memory, and a bounded cache of files on the local disk.

ROOT_SECONDS = (
    60  # times SYNC_SECONDS; the root only adds loose files to a project page
)
TAIL = 256 << 10  # bytes; the .dist-info of nearly every wheel lies in its last so many
NEVER = float("-inf")


class Object(Protocol):
    """What a bucket tells of an object; generations tell its states apart."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def metageneration(self) -> int: ...
    @property
    def md5(self) -> str: ...
    @property
    def created(self) -> float: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


class Bucket(Protocol):
    """What Mirror needs of a bucket: gcs_rest.Bucket has it, and Folder below.

    Raises FileNotFoundError, FileExistsError when a precondition fails, and other kinds
    of OSError when the bucket cannot be asked.
    """

    def list(
        self, prefix: str, *, delimiter: str = ""
    ) -> tuple[list[Any], list[str]]: ...
    def get(self, name: str) -> Object: ...
    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]: ...
    def insert(
        self,
        name: str,
        source: BinaryIO,
        *,
        metadata: Mapping[str, str],
        if_generation: int | None = 0,
    ) -> Object: ...
    def patch(
        self,
        name: str,
        metadata: Mapping[str, str | None],
        *,
        generation: int,
        metageneration: int,
    ) -> Object: ...
    def delete(self, name: str, *, generation: int) -> None: ...
    def rewrite(self, name: str, to: str, *, generation: int) -> Object: ...
    def warm(self) -> None: ...


class Root(NamedTuple):
    """What listing the root told, when (monotonic seconds), and what it knew of."""

    at: float
    marker: int
    loose: Mapping[Project, list[Object]]
    catalog: Catalog


class Known(NamedTuple):
    """The same for one project."""

    at: float
    marker: int
    objects: list[Object]
    loose: list[Object]
    listing: Listing


class Mirror:
    """What is known here of the distributions in a bucket."""

    def __init__(
        self, root: Path, bucket: Bucket, prefix: str, sync_seconds: float, cache: int
    ) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.staging = root.absolute() / ".pypi_ae" / "staging"
        self._cache = root.absolute() / ".pypi_ae" / "cache"
        self._changes = root.absolute() / ".pypi_ae" / "changes"
        for folder in (self._cache, self._changes):
            folder.mkdir(parents=True, exist_ok=True)
        self._sync, self._cache_bytes = sync_seconds, cache
        self._root: Root | None = None
        self._known: Remembered[Known] = Remembered()
        self._root_lock = threading.Lock()
        self._locks = [threading.Lock() for _ in range(64)]

    # Before a request...

    def pull(self, request: Request) -> None:
        """List what the request will read, unless that was done within SYNC_SECONDS."""
        started, sync = request.started, self._sync
        project, filename = wanted(request)
        if project:
            self._since(project, started - sync, started - ROOT_SECONDS * sync)
            known = self._known.get(project)
            if known and known.loose:  # they are only as fresh as the root
                self._since(project, started - sync, started - sync)
            listing = self.listing(project)
            if not (filename in listing.by_name if filename else listing.distributions):
                self._since(project, started, started)  # never say no from memory
        elif request.route and request.route.action == "update":
            self._root_since(started - ROOT_SECONDS * sync)
        elif request.route and request.route.action == "list":
            self._root_since(started - sync)

    def _since(self, project: Project, since: float, root_since: float) -> Listing:
        """The listing of a project, no older than that; of those who wait, one asks."""
        known = self._known.get(project)
        if known and self._is_current(known, project, since):
            root = self._root
            if root and self._is_current(root, ".root", root_since):
                return known.listing
        with self._locks[hash(project) % len(self._locks)], asking():
            return self._list(project, since, root_since)

    def _is_current(self, known: Known | Root, marker: str, since: float) -> bool:
        return known.at >= since and known.marker == self._marker(marker)

    def _marker(self, name: str) -> int:
        return _mtime(f"{self._changes}/{name}")

    def _list(self, project: Project, since: float, root_since: float) -> Listing:
        known = self._known.get(project)
        marker, at = self._marker(project), time.monotonic()
        if known and self._is_current(known, project, since):
            root, objects = self._root_since(root_since), known.objects
            marker, at = known.marker, known.at
        elif self._root and self._is_current(self._root, ".root", root_since):
            root, objects = self._root, self._objects(project)
        else:
            from concurrent.futures import ThreadPoolExecutor

            with ThreadPoolExecutor(1) as pool:  # side by side, for a cold start
                pending = pool.submit(self._root_since, root_since)
                objects = self._objects(project)
                root = pending.result()
        loose = root.loose.get(project, [])
        if known and (known.objects, known.loose) == (objects, loose):
            listing = known.listing
        else:
            listing = Listing(project, self._describe(project, [*objects, *loose]))
        files = len(listing.distributions)
        self._known.keep(project, Known(at, marker, objects, loose, listing), files)
        return listing

    def _objects(self, project: Project) -> list[Object]:
        return self.bucket.list(f"{self.prefix}{project}/")[0]

    def _root_since(self, since: float) -> Root:
        with self._root_lock:
            marker, at, root = self._marker(".root"), time.monotonic(), self._root
            if root and self._is_current(root, ".root", since):
                return root
            with asking():
                objects, prefixes = self.bucket.list(self.prefix, delimiter="/")
            loose: dict[Project, list[Object]] = {}
            for found in objects:
                if parsed := parse_filename(_distribution_of(_base(found.name))):
                    loose.setdefault(parsed.project, []).append(found)
            names = (to_project(_base(prefix.rstrip("/"))) for prefix in prefixes)
            catalog = Catalog({n: [n] for n in names if n}, {n: [] for n in loose})
            if root and root.catalog.projects == catalog.projects:
                catalog = root.catalog  # and the pages rendered from it
            self._root = Root(at, marker, loose, catalog)
            return self._root

    def _describe(
        self, project: Project, objects: Iterable[Object]
    ) -> Iterator[Distribution]:
        """Distributions from a listing; of two with one name, the one in the folder."""
        names = {found.name for found in objects}
        seen: set[str] = set()
        for found in objects:
            parsed = parse_filename(_base(found.name), project)
            if not parsed or parsed.project != project or parsed.filename in seen:
                continue
            seen.add(parsed.filename)
            facts = found.metadata
            yield Distribution(
                *parsed,
                found.size,
                found.created,
                facts.get("sha256", ""),
                facts.get("requires-python", ""),
                facts.get("core-metadata", ""),
                facts.get("yanked"),
                signed=found.name + ".asc" in names,
                path=found.name,
                stamp=(found.generation, found.metageneration),
                md5=found.md5,
            )

    # What handlers read...

    def catalog(self) -> Catalog:
        return (self._root or self._root_since(NEVER)).catalog

    def listing(self, project: Project) -> Listing:
        known = self._known.get(project)
        return known.listing if known else self._since(project, NEVER, NEVER)

    def current(self, project: Project) -> Listing:
        now = time.monotonic()
        return self._since(project, now, now)

    def find(self, project: Project, filename: str) -> Distribution | None:
        return self.listing(project).by_name.get(filename)

    def everything(self) -> Iterator[tuple[Project, Filename]]:
        with asking():
            objects, _ = self.bucket.list(self.prefix)
        for found in objects:
            *folder, name = found.name[len(self.prefix) :].split("/")
            parsed = parse_filename(name, *folder[:1])
            if parsed and folder in ([], [parsed.project]):
                yield parsed.project, parsed.filename

    def content(
        self, found: Distribution, start: int, stop: int
    ) -> BinaryIO | Iterator[bytes]:
        """Bytes from the cache; else from the bucket, kept on their way if they are all."""
        path = self._cached(found)
        with contextlib.suppress(FileNotFoundError):
            file = open(path, "rb")  # noqa: SIM115 - the server closes it, when sent
            os.utime(path)  # the least recently used go first
            file.seek(start)
            return file
        chunks = self._read(found, start, stop)
        whole = (start, stop) == (0, found.size) and found.size <= self._cache_bytes
        return self._keep(found, chunks) if whole else chunks

    def _cached(self, found: Distribution, suffix: str = "") -> Path:
        # The generation is in the name: what was replaced elsewhere is never found.
        return self._cache / f"{_generation(found)}-{found.filename}{suffix}"

    def _read(self, found: Distribution, start: int, stop: int) -> Iterator[bytes]:
        try:
            with asking():
                return self.bucket.read(
                    found.path, generation=_generation(found), start=start, stop=stop
                )
        except (FileNotFoundError, FileExistsError):
            self._touch(
                found.project
            )  # list again: it was replaced or removed elsewhere
            raise changed_meanwhile(found.filename) from None

    def _keep(self, found: Distribution, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass chunks on while they are written; the cache gets them when all have come.

        The bucket's checksum is compared before the last chunk is passed on, so neither
        a client nor the cache ever has a damaged file that looks whole.
        """
        file = open_staged(self.staging)
        try:
            with file:
                for chunk in chunks:
                    file.write(chunk)
                    yield chunk
            if not found.sha256:
                self._learn(found, file.name)
            self._cache_file(found, Path(file.name))
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _cache_file(self, found: Distribution, source: Path, suffix: str = "") -> None:
        """Move a file into the cache, and the least recently used out of it."""
        os.replace(source, self._cached(found, suffix))
        with contextlib.suppress(FileNotFoundError):  # another worker does the same
            states = [
                (e.stat().st_mtime, e.stat().st_size, e.path)
                for e in os.scandir(self._cache)
            ]
            excess = sum(size for _, size, _ in states) - self._cache_bytes
            for _, size, path in sorted(states):
                if excess <= 0:
                    break
                os.unlink(path)
                excess -= size

    def _learn(self, found: Distribution, path: str) -> None:
        """Write the facts of an object that was copied in by hand to its metadata."""
        try:
            with open(path, "rb") as file:
                self._annotate(found, read_facts(file, found.filename, found.size))
        except OSError as fault:  # the file was served; its facts can wait
            log.warning("the facts of %s were not written: %s", found.path, fault)

    def _annotate(self, found: Distribution, facts: Facts) -> None:
        generation, metageneration = found.stamp
        self.bucket.patch(
            found.path,
            object_metadata(facts),
            generation=generation,
            metageneration=metageneration,
        )
        self._touch(found.project)

    def core_metadata(self, found: Distribution) -> bytes:
        """From the cache; else out of the wheel's tail: one ranged read, rarely two."""
        path = self._cached(found, ".metadata")
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        source: IO[bytes] = Ranged(found.size, partial(self._read, found))  # type: ignore[assignment]
        with contextlib.suppress(FileNotFoundError):
            source = open(self._cached(found), "rb")  # noqa: SIM115
        with source, asking():
            text = read_core_metadata(source, found.filename, found.size).text
        with open_staged(self.staging) as file:
            file.write(text)
        self._cache_file(found, Path(file.name), ".metadata")
        return text

    def signature(self, found: Distribution) -> bytes:
        with asking():
            name = found.path + ".asc"
            return b"".join(
                self.bucket.read(name, generation=self.bucket.get(name).generation)
            )

    def warm(self) -> None:
        """Fetch credentials and open a connection before the first request needs them."""
        with asking():
            self.bucket.warm()

    # What handlers change, which is nothing until it is pushed...

    def add(self, new: Addition) -> bool:
        return True

    def remove(self, found: Distribution) -> None:
        return None

    # After a request...

    def push(self, request: Request, response: Response) -> Response | None:
        """Commit what a request changed to the bucket, before it is answered."""
        for change in response.changes:
            try:
                with asking():
                    if isinstance(change, Removal):
                        self._delete(change.distribution)
                    elif not self._insert(change):
                        here = f"OK: {change.filename} was here already."
                        response = text_response(200, here)
            except FileExistsError:
                if isinstance(change, Addition):
                    raise already_exists(request, change.filename) from None
                raise changed_meanwhile(change.distribution.filename) from None
        return response

    def _insert(self, new: Addition) -> bool:
        """Store a distribution; False if the same bytes are there already."""
        name = f"{self.prefix}{new.project}/{new.filename}"
        stored, there = None, self._loose_object(new)
        if not there:
            try:
                stored = self._store(new, name, 0)
            except FileExistsError:
                there = self.bucket.get(name)
        if there and not _is_same(there, new):
            if not new.overwrite:
                raise FileExistsError(name)
            stored = self._store(
                new, name, there.generation if there.name == name else 0
            )
            if there.name != name:
                self.bucket.delete(there.name, generation=there.generation)
        if new.signature:
            self._sign(name, new.signature)
        known = self._root and new.project in self._root.catalog.folders
        self._touch(new.project, root=not known or bool(there))
        if stored:
            self._cache_file(next(self._describe(new.project, [stored])), new.source)
        return stored is not None

    def _loose_object(self, new: Addition) -> Object | None:
        loose = self._root.loose.get(new.project, ()) if self._root else ()
        return next((o for o in loose if _base(o.name) == new.filename), None)

    def _store(self, new: Addition, name: str, if_generation: int) -> Object:
        facts = Facts(new.sha256, new.requires_python, new.core_metadata)
        metadata = object_metadata(facts, uploader=new.uploader)
        with open(new.source, "rb") as file:
            return self.bucket.insert(
                name, file, metadata=metadata, if_generation=if_generation
            )

    def _sign(self, name: str, signature: bytes) -> None:
        with contextlib.suppress(FileExistsError):  # signed before
            self.bucket.insert(f"{name}.asc", io.BytesIO(signature), metadata={})

    def _delete(self, found: Distribution) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
            self.bucket.delete(found.path, generation=_generation(found))
            if found.signed:
                signature = self.bucket.get(found.path + ".asc")
                self.bucket.delete(signature.name, generation=signature.generation)
        self._touch(found.project)

    def _touch(self, project: Project, *, root: bool = True) -> None:
        """Tell all workers of this instance to list a project again, and the root."""
        for name in (project, ".root") if root else (project,):
            (self._changes / name).touch()
            os.utime(self._changes / name, ns=(time.time_ns(),) * 2)

    def tidy(self, *, dry_run: bool) -> Iterator[str]:
        """Give every object its facts, and loose ones their folder; say what is done."""
        for project, filename in sorted(self.everything()):
            found = self.listing(project).by_name[filename]
            home = f"{self.prefix}{project}/{filename}"
            if not found.sha256:
                yield f"facts of {found.path}"
                if not dry_run:
                    self._annotate(found, self._facts(found))
            if found.path != home:
                yield f"{found.path} -> {home}"
                if not dry_run:
                    generation = _generation(found)
                    self.bucket.rewrite(found.path, home, generation=generation)
                    self.bucket.delete(found.path, generation=generation)
                    self._touch(project)

    def _facts(self, found: Distribution) -> Facts:
        with open_staged(self.staging) as file:
            file.writelines(self._read(found, 0, found.size))
        try:
            with open(file.name, "rb") as staged:
                return read_facts(staged, found.filename, found.size)
        finally:
            os.unlink(file.name)


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Turn the bucket's faults into 503; what it says of one object passes."""
    try:
        yield
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as fault:
        log.error("the bucket cannot be asked: %s", fault)
        why = "The bucket cannot be reached now; nothing was changed. Try again."
        raise HTTPError(503, why, Retry_After="5") from fault


def already_exists(request: Request, filename: Filename) -> HTTPError:
    # twine knows a duplicate by 400 and these words; uv, poetry and pdm by 409.
    status = 400 if "twine" in request.header("User-Agent") else 409
    return HTTPError(
        status,
        f"File already exists: {filename} is here with other bytes. "
        "Raise the version, or start the server with --overwrite.",
    )


def changed_meanwhile(filename: str) -> HTTPError:
    why = f"{filename} changed in the bucket at this moment. Try again."
    return HTTPError(503, why, Retry_After="1")


def object_metadata(facts: Facts, uploader: str = "") -> dict[str, str]:
    """Facts as an object's custom metadata: the README names the keys."""
    found = dict(
        zip(("sha256", "requires-python", "core-metadata"), facts, strict=True)
    )
    return {
        key: value for key, value in {**found, "uploader": uploader}.items() if value
    }


def _is_same(there: Object, new: Addition) -> bool:
    if sha256 := there.metadata.get("sha256"):
        return sha256 == new.sha256
    with open(new.source, "rb") as file:
        return there.md5 == hashlib.file_digest(file, DIGESTS["md5_digest"]).hexdigest()


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _generation(found: Distribution) -> int:
    return found.stamp[0]


class Ranged(io.RawIOBase):
    """A file read through ranges, its tail first: enough for zipfile to find a member."""

    def __init__(self, size: int, fetch: Callable[[int, int], Iterable[bytes]]) -> None:
        self._size, self._fetch = size, fetch
        self._at = 0
        self._start, self._window = size, b""

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
            tail = max(0, self._size - TAIL)
            self._start = tail if self._at >= tail else self._at
            end = self._size if self._at >= tail else max(stop, self._at + TAIL)
            self._window = b"".join(self._fetch(self._start, min(end, self._size)))
        data = self._window[self._at - self._start : stop - self._start]
        self._at += len(data)
        return data


class StoredFile(NamedTuple):
    """An Object of a Folder."""

    name: str
    size: int
    generation: int
    metageneration: int
    created: float
    metadata: Mapping[str, str]
    md5: str = ""


class Folder:
    """A plain directory that stands for a bucket: development, network disks, tests.

    Metadata lie in <root>/.pypi_ae/metadata, a JSON file each; a generation is an mtime.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._own = self.root / ".pypi_ae"
        self._lock = threading.Lock()
        (self._own / "metadata").mkdir(parents=True, exist_ok=True)

    def list(self, prefix: str, *, delimiter: str = "") -> tuple[list[Any], list[str]]:
        objects: list[Any] = []
        prefixes: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.root / prefix)):
                if name.startswith("."):
                    continue
                if (self.root / prefix / name).is_file():
                    objects.append(self.get(prefix + name))
                elif delimiter:
                    prefixes.append(f"{prefix}{name}/")
                else:
                    objects += self.list(f"{prefix}{name}/")[0]
        return objects, prefixes

    def get(self, name: str) -> StoredFile:
        found = os.stat(self.root / name)
        try:
            metadata = json.loads(self._metadata(name).read_bytes())
        except FileNotFoundError:
            metadata = {}
        kept = metadata if metadata.get("generation") == found.st_mtime_ns else {}
        times = (found.st_mtime_ns, kept.get("metageneration", 1), found.st_mtime)
        return StoredFile(name, found.st_size, *times, kept.get("metadata", {}))

    def _metadata(self, name: str) -> Path:
        return self._own / "metadata" / (quote(name, safe="") + ".json")

    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Iterator[bytes]:
        self._check(name, generation)
        file = open(self.root / name, "rb")  # noqa: SIM115 - _slice closes it
        file.seek(start)
        return _slice(file, (self.get(name).size if stop is None else stop) - start)

    def _check(self, name: str, generation: int, metageneration: int = 0) -> StoredFile:
        there = self.get(name)
        if there.generation != generation:
            raise FileExistsError(f"{name} has generation {there.generation} by now")
        if metageneration and there.metageneration != metageneration:
            raise FileExistsError(f"{name} has metageneration {there.metageneration}")
        return there

    def insert(
        self,
        name: str,
        source: BinaryIO,
        *,
        metadata: Mapping[str, str],
        if_generation: int | None = 0,
    ) -> StoredFile:
        source.seek(0)
        with open_staged(self._own / "staging") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
        try:
            with self._lock:
                if if_generation:
                    self._check(name, if_generation)
                target, replaces = self.root / name, if_generation != 0
                _move(Path(file.name), target, overwrite=replaces)
                return self._annotate(self.get(name), metadata)
        finally:
            Path(file.name).unlink(missing_ok=True)

    def _annotate(
        self, there: StoredFile, metadata: Mapping[str, str | None]
    ) -> StoredFile:
        kept = {
            k: v for k, v in {**there.metadata, **metadata}.items() if v is not None
        }
        number = there.metageneration + 1
        content = {"generation": there.generation, "metageneration": number}
        self._metadata(there.name).write_text(json.dumps({**content, "metadata": kept}))
        return there._replace(metageneration=number, metadata=kept)

    def patch(
        self,
        name: str,
        metadata: Mapping[str, str | None],
        *,
        generation: int,
        metageneration: int,
    ) -> StoredFile:
        with self._lock:
            there = self._check(name, generation, metageneration)
            return self._annotate(there, metadata)

    def delete(self, name: str, *, generation: int) -> None:
        with self._lock:
            self._check(name, generation)
            (self.root / name).unlink()
            self._metadata(name).unlink(missing_ok=True)

    def rewrite(self, name: str, to: str, *, generation: int) -> StoredFile:
        there = self._check(name, generation)
        with open(self.root / name, "rb") as file:
            return self.insert(to, file, metadata=there.metadata)

    def warm(self) -> None:
        """Nothing is slow the first time."""


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


@lru_cache(maxsize=256)  # clients send a handful of different headers
def negotiate(accept: str) -> str:
    """Choose a content type for an Accept header (PEP 691, RFC 9110); or raise 406.

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
        weights = [p[2:].strip() for p in parameters if p.startswith("q=")]
        q = weights[0] if weights else "1"
        if name:
            yield (
                name,
                float(q) if re.fullmatch(r"[01](\.\d{0,3})?", q, re.ASCII) else 0.0,
            )


@lru_cache(maxsize=256)
def takes_gzip(accept_encoding: str) -> bool:
    weights = dict(_weighted(accept_encoding))
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def requested_type(request: Request) -> str:
    """What ?format= says, else what Accept says."""
    query = request.environ.get("QUERY_STRING")
    if query and (formats := parse_qs(query).get("format")):
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
        render = to_json if kind == JSON else to_html
        answer = _represent(render(source).encode(), kind, gzip=gzip)
        source.answers[kind, gzip] = answer
    tags = request.environ.get("HTTP_IF_NONE_MATCH")
    return (
        answer[1] if tags and _names_tag(tags, answer[0].headers[0][1]) else answer[0]
    )


def _represent(body: bytes, kind: str, *, gzip: bool) -> Answer:
    tag = hashlib.sha256(body).hexdigest()[:32]
    content_type = kind if kind == JSON else f"{kind}; charset=utf-8"
    kept = (
        ("ETag", f'"{tag}-{OFFERS.index(kind)}{"z" if gzip else ""}"'),
        # Asked again each time, answered 304: a new upload is seen at once.
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept, Accept-Encoding"),
    )
    headers = [*kept, ("Content-Type", content_type)]
    if gzip:
        body = zlib.compress(body, 6, wbits=31)  # 31: with gzip's header
        headers.append(("Content-Encoding", "gzip"))
    headers.append(("Content-Length", str(len(body))))
    return Response("200 OK", tuple(headers), (body,)), Response(
        "304 Not Modified", kept
    )


def _names_tag(header: str, tag: str) -> bool:
    """Does If-None-Match name this tag (RFC 9110, 13.1.2: weak comparison)?"""
    if header.strip() == "*":
        return True
    return tag in re.findall(r'"[^"]*"', header)


def escape(text: str) -> Html:
    return Html(html.escape(text))


def html_page(title: str, body: Html, head: Html = Html("")) -> Html:
    """The frame of every page. The empty icon keeps browsers from asking for one."""
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'{head}<link rel="icon" href="data:,"><title>{escape(title)}</title></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _simple_page(title: str, lines: Iterable[str]) -> Html:
    version = f'<meta name="pypi:repository-version" content="{API_VERSION}">\n'
    body = Html(f"<h1>{escape(title)}</h1>\n" + "\n".join(lines))
    return html_page(title, body, Html(version))


def _link(found: Distribution) -> Html:
    fragment = "".join(f"#{name}={digest}" for name, digest in found.hashes.items())
    attributes = {
        "href": f"../../{found.url}{fragment}",
        "data-requires-python": found.requires_python or None,
        "data-core-metadata": _sha256(found.core_metadata),
        "data-dist-info-metadata": _sha256(found.core_metadata),  # for pip before 23.2
        "data-yanked": found.yanked,
        "data-gpg-sig": "true" if found.signed else None,
    }
    text = "".join(
        f' {k}="{escape(v)}"' for k, v in attributes.items() if v is not None
    )
    return Html(f"<a{text}>{escape(found.filename)}</a><br>")


def _sha256(digest: str) -> str | None:
    return f"sha256={digest}" if digest else None


def _file_json(found: Distribution) -> dict[str, Any]:
    """One file of the JSON API; uv refuses a whole project for a null in it."""
    entry: dict[str, Any] = {
        "filename": found.filename,
        "url": f"../../{found.url}",
        "hashes": found.hashes,
        "size": found.size,
        "upload-time": utc(found.uploaded),
        "yanked": found.yanked is not None and (found.yanked or True),
    }
    if found.requires_python:
        entry["requires-python"] = found.requires_python
    if found.core_metadata:
        entry["core-metadata"] = {"sha256": found.core_metadata}
    if found.signed:
        entry["gpg-sig"] = True
    return entry


def utc(seconds: float) -> str:
    """A POSIX time as PEP 700 wants it: 2026-01-31T12:00:00.123456Z."""
    whole, micros = divmod(round(seconds * 1e6), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{micros:06}Z"


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(
        {"meta": {"api-version": API_VERSION}, **content}, separators=(",", ":")
    )


def _project_html(listing: Listing) -> Html:
    return _simple_page(
        f"Links for {listing.project}", map(_link, listing.distributions)
    )


def _project_json(listing: Listing) -> str:
    files = [_file_json(found) for found in listing.distributions]
    return _json(
        {"name": listing.project, "versions": listing.versions(), "files": files}
    )


def _index_html(catalog: Catalog) -> Html:
    links = (f'<a href="{name}/">{name}</a><br>' for name in catalog.projects)
    return _simple_page("Simple index", links)


def _index_json(catalog: Catalog) -> str:
    return _json({"projects": [{"name": name} for name in catalog.projects]})


def simple_index(app: App, request: Request) -> Response:
    """/simple/"""
    catalog = app.files.catalog()
    return page_response(request, catalog, _index_html, _index_json)


def simple_project(app: App, request: Request) -> Response:
    """/simple/<project>/"""
    listing = app.files.listing(request.project)
    if not listing.distributions:
        return _unknown_project(app, request)
    return page_response(request, listing, _project_html, _project_json)


def _unknown_project(app: App, request: Request) -> Response:
    """Send it to the fallback index, unless the name is one that must stay here."""
    settings, project = app.settings, request.project
    private = any(fnmatch.fnmatchcase(project, p) for p in settings.private_names)
    if private or not settings.fallback_url:
        raise HTTPError(404, f"There is no project {project!r} here.")
    query = request.environ.get("QUERY_STRING", "")
    suffix = f"?{quote(query, safe='=&+%/')}" if query else ""
    return redirect(f"{settings.fallback_url}/{project}/{suffix}")


# ---- 11. Downloads -------------------------------------------------------------------
# Every decision is made from the facts before a byte is read: conditions first, then a
# range (RFC 9110, 13.2.2). A distribution never changes under its name, so clients may
# keep it for good; it never has a Content-Encoding, as pip hashes what arrives.

TYPES = {
    ".zip": "application/zip",
    ".gz": "application/gzip",
    ".tgz": "application/gzip",
}


def download(app: App, request: Request) -> Response:
    """/packages/<project>/<filename>, and <filename>.metadata and .asc beside it."""
    name, (project, filename) = request.args["file"], wanted(request)
    found = app.files.find(project, filename) if project else None
    if not found:
        raise HTTPError(404, f"There is no file {request.path!r} here.")
    if name.endswith(".metadata"):
        return _core_metadata_response(app, request, found)
    if name.endswith(".asc"):
        return _signature_response(app, request, found)
    return _file_response(app, request, found)


def _core_metadata_response(
    app: App, request: Request, found: Distribution
) -> Response:
    """PEP 658: the bytes whose hash the page promises, or 404."""
    if not found.core_metadata:
        raise HTTPError(404, f"{found.filename!r} has no readable core metadata.")
    body = app.files.core_metadata(found)
    return _whole_response(app, request, body, f'"{found.core_metadata}"')


def _signature_response(app: App, request: Request, found: Distribution) -> Response:
    if not found.signed:
        raise HTTPError(404, f"{found.filename!r} has no signature.")
    body = app.files.signature(found)
    return _whole_response(app, request, body, f'"{hashlib.sha256(body).hexdigest()}"')


def _whole_response(app: App, request: Request, body: bytes, tag: str) -> Response:
    headers = (("ETag", tag), ("Cache-Control", _lifetime(app)))
    if (tags := request.header("If-None-Match")) and _names_tag(tags, tag):
        return Response("304 Not Modified", headers)
    plain = (("Content-Type", TEXT), ("X-Content-Type-Options", "nosniff"))
    return Response(
        "200 OK", (*headers, *plain, ("Content-Length", str(len(body)))), (body,)
    )


def _lifetime(app: App) -> str:
    # With overwriting allowed, a name may get other bytes: then clients have to ask.
    return "no-cache" if app.settings.overwrite else "max-age=31536000, immutable"


def _file_response(app: App, request: Request, found: Distribution) -> Response:
    tag, modified = found.tag, _http_date(found.uploaded)
    headers = [
        ("ETag", tag),
        ("Last-Modified", modified),
        ("Cache-Control", _lifetime(app)),
    ]
    if _is_unchanged(request, tag, modified):
        return Response("304 Not Modified", tuple(headers))
    extension = os.path.splitext(found.filename)[1]
    headers.append(("Content-Type", TYPES.get(extension, "application/octet-stream")))
    headers.append(("Accept-Ranges", "bytes"))
    status, start, stop = "200 OK", 0, found.size
    if span := _requested_range(request, found, tag, modified):
        status, (start, stop) = "206 Partial Content", span
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{found.size}"))
    headers.append(("Content-Length", str(stop - start)))
    if request.method == "HEAD":
        return Response(status, tuple(headers))
    content = app.files.content(found, start, stop)
    return Response(
        status, tuple(headers), _body(request, content, start, stop, found.size)
    )


def _http_date(seconds: float) -> str:
    from email.utils import formatdate

    return formatdate(seconds, usegmt=True)


def _is_unchanged(request: Request, tag: str, modified: str) -> bool:
    if tags := request.header("If-None-Match"):
        return _names_tag(tags, tag)
    return request.header("If-Modified-Since") == modified  # as clients send it back


def _requested_range(
    request: Request, found: Distribution, tag: str, modified: str
) -> tuple[int, int] | None:
    """The one range asked for, as [start, stop); None for the whole; 416 beyond it."""
    validator = request.header("If-Range")
    match = re.fullmatch(
        r"bytes=(\d{0,18})-(\d{0,18})", request.header("Range"), re.ASCII
    )
    if (
        not match
        or match[0] == "bytes=-"
        or (validator and validator not in (tag, modified))
    ):
        return None
    first, last, size = match[1], match[2], found.size
    if not first:  # the last so many bytes
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last or size) + 1, size)
        if last and int(last) < int(first):
            return None  # not a range (RFC 9110, 14.1.1): ignored
    if start >= size:
        message = f"{found.filename!r} has {size} bytes; {match[0]!r} is beyond them."
        raise HTTPError(416, message, Content_Range=f"bytes */{size}")
    return start, stop


def _body(
    request: Request,
    content: BinaryIO | Iterator[bytes],
    start: int,
    stop: int,
    size: int,
) -> Iterable[bytes]:
    if not isinstance(content, io.IOBase):
        return content
    wrapper = request.environ.get("wsgi.file_wrapper")
    if wrapper and stop == size:  # wsgiref's sends a file to its end, whatever we say
        return wrapper(content, CHUNK)  # type: ignore[no-any-return]
    return _slice(content, stop - start)


# ---- 12. Uploads ---------------------------------------------------------------------
# The legacy form (multipart/form-data, RFC 7578) streams: bytes go into the parser,
# events come out, and one loop hashes and writes the file as it arrives. All else in
# the form is small, and bounded. A file gets its name when every check has passed.

MAX_PART_HEADERS = 8 << 10  # bytes; clients send some 150
MAX_FIELD = 4 << 20  # bytes; a description may be as long as the metadata it comes from
MAX_FIELDS = 2000  # classifiers, requirements and URLs repeat, each a field of its own
MAX_FORM = 8 << 20  # bytes of all fields but the file together
MAX_DRAIN = (
    32 << 20
)  # bytes read after a refusal, for clients that listen only when done
KEPT_FIELDS = {":action", "name", "version", "filetype", "gpg_signature"}


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
    """Bytes in, events out; holds no more than a chunk and a boundary.

    States follow RFC 2046, 5.1.1: preamble, then per part headers and body, then the
    epilogue. Raises HTTPError 400 for what is malformed and 413 for too much of it.
    """

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        self._rest = b"\r\n"  # so that the first boundary looks like all others
        self._step: Callable[[], Event | None] | None = self._preamble
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        self._rest += data
        while self._step:
            step = self._step
            if event := step():
                yield event
            elif step is self._step:
                return  # it needs more bytes
        self._rest = b""  # the epilogue is nobody's

    def close(self) -> None:
        """Say that no bytes follow."""
        if self._step:
            raise HTTPError(400, "The form ends before its closing boundary.")

    def _preamble(self) -> None:
        at = self._rest.find(self._mark)
        if at >= 0:
            self._rest = self._rest[at + len(self._mark) :]
            self._step = self._after_mark
        elif len(self._rest) > MAX_PART_HEADERS:
            raise HTTPError(400, "The form does not begin with its boundary.")

    def _after_mark(self) -> None:
        if len(self._rest) < 2:
            return
        if self._rest.startswith(b"--"):
            self._step = None
            return
        padding, end, rest = self._rest.partition(b"\r\n")
        if not end:
            padding = padding.removesuffix(b"\r")
        if padding.strip(b" \t") or len(padding) > 200:  # RFC 2046 lets spaces follow
            raise HTTPError(400, "A boundary of the form is followed by other text.")
        if end:
            self._rest, self._step = b"\r\n" + rest, self._headers

    def _headers(self) -> Event | None:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if len(head) > MAX_PART_HEADERS:
            raise HTTPError(
                413, f"A part has more than {MAX_PART_HEADERS} bytes of headers."
            )
        if not end:
            return None
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise HTTPError(413, f"The form has more than {MAX_FIELDS} fields.")
        self._rest, self._step = rest, self._body
        return _part(head)

    def _body(self) -> Event | None:
        at = self._rest.find(self._mark)
        if at == 0:
            self._rest, self._step = self._rest[len(self._mark) :], self._after_mark
            return PartEnds()
        safe = at if at > 0 else len(self._rest) - len(self._mark) + 1
        if safe <= 0:
            return None
        data, self._rest = self._rest[:safe], self._rest[safe:]
        return PartData(data)


_DISPOSITION = re.compile(rb"content-disposition:[ \t]*form-data[ \t]*(;.*)", re.I)
_PARAMETER = re.compile(
    rb';[ \t]*(name|filename)="([^"\r\n]*)"|;[ \t]*(name|filename)=([^;"\s]+)'
)
_ENCODING = re.compile(
    rb"content-transfer-encoding:[ \t]*(?!(?:binary|7bit|8bit)[ \t]*$)", re.I
)


def _part(head: bytes) -> PartBegins:
    """Read the headers of a part (RFC 7578, 4.2)."""
    lines = head.split(b"\r\n")
    found = [match[1] for line in lines if (match := _DISPOSITION.fullmatch(line))]
    if len(found) != 1 or any(_ENCODING.match(line) for line in lines):
        raise HTTPError(400, "A part of the form is not plain form-data with a name.")
    matches = _PARAMETER.findall(found[0])
    values = {
        (m[0] or m[2]).decode(): (m[1] or m[3]).decode("utf-8", "replace")
        for m in matches
    }
    if "name" not in values:
        raise HTTPError(400, "A part of the form has no name.")
    return PartBegins(values["name"], values.get("filename"))


@dataclass(slots=True)
class Form:
    """What an upload said, and the staged file of its content."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    staged: Path | None = None
    size: int = 0
    digests: dict[str, str] = field(default_factory=dict)  # by the name of their field

    def set(self, name: str, value: bytes) -> None:
        if name in self.fields:
            raise HTTPError(400, f"The field {name!r} is there twice.")
        try:
            self.fields[name] = (
                value.decode() if name != "gpg_signature" else value.decode("latin-1")
            )
        except UnicodeDecodeError:
            raise HTTPError(400, f"The field {name!r} is not UTF-8.") from None


class FormReader:
    """Turns the events of one form into a Form; writes its file as it arrives."""

    def __init__(self, staging: Path) -> None:
        self.form = Form()
        self._staging = staging
        self._file: BinaryIO | None = None
        self._hashes: dict[str, Any] = {}
        self._field: str | None = None
        self._value = bytearray()
        self._total = 0

    def take(self, event: Event) -> None:
        if isinstance(event, PartData):
            (self._write if self._file else self._collect)(event.data)
        elif isinstance(event, PartBegins):
            self._begin(event)
        else:
            self._end()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _begin(self, part: PartBegins) -> None:
        self._field = part.name
        if part.name != "content":
            return
        if self.form.staged:
            raise HTTPError(
                400, "The form has two files in 'content'; send one a request."
            )
        self.form.filename = part.filename
        self._file = open_staged(self._staging)
        self.form.staged = Path(self._file.name)
        # A digest that follows the file is rare; it is computed from the staged file.
        names = {"sha256_digest", *self.form.fields} & set(DIGESTS)
        self._hashes = {name: DIGESTS[name]() for name in names}

    def _write(self, data: bytes) -> None:
        assert self._file
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        for digest in self._hashes.values():
            digest.update(data)
        self.form.size += len(data)

    def _collect(self, data: bytes) -> None:
        self._total += len(data)
        if self._total > MAX_FORM or len(self._value) + len(data) > MAX_FIELD:
            raise HTTPError(413, f"The field {self._field!r} makes the form too long.")
        if self._field in KEPT_FIELDS or self._field in DIGESTS:
            self._value += data

    def _end(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
            self.close()
            self.form.digests = {n: h.hexdigest() for n, h in self._hashes.items()}
        elif self._field in KEPT_FIELDS or self._field in DIGESTS:
            self.form.set(self._field, bytes(self._value))
        self._value.clear()


def read_form(app: App, request: Request) -> Form:
    """Read an upload's form; its file is staged, and gone when the request is over."""
    length = _content_length(request.environ)
    limit = app.settings.max_upload
    if limit and length > limit:
        raise HTTPError(
            413,
            f"The upload has {length} bytes; MAX_UPLOAD_MB allows {limit}.",
        )
    content_type = request.environ.get("CONTENT_TYPE", "")
    if (
        content_type.split(";")[0].strip().lower()
        == "application/x-www-form-urlencoded"
    ):
        return _read_small_form(request, length)
    parser = MultipartParser(_boundary(content_type))
    reader = FormReader(app.files.staging)
    try:
        for chunk in read_body(request, length):
            for event in parser.feed(chunk):
                reader.take(event)
        parser.close()
    finally:
        reader.close()
        if reader.form.staged:
            request.staged.append(reader.form.staged)
    return reader.form


def _read_small_form(request: Request, length: int) -> Form:
    if length > MAX_FIELD:
        raise HTTPError(
            413, f"The form has {length} bytes; a file comes as multipart/form-data."
        )
    body = b"".join(read_body(request, length)).decode("utf-8", "replace")
    try:
        return Form(dict(parse_qsl(body, max_num_fields=MAX_FIELDS)))
    except ValueError as fault:
        raise HTTPError(413, f"The form cannot be read: {fault}.") from None


def _content_length(environ: WSGIEnvironment) -> int:
    text = environ.get("CONTENT_LENGTH") or ""
    if not text:
        raise HTTPError(411, "Send the upload with a Content-Length.")
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII):
        raise HTTPError(400, f"Content-Length is {text!r}, which is not a length.")
    return int(text)


def _boundary(content_type: str) -> bytes:
    match = re.fullmatch(
        r"multipart/form-data\s*;.*?boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70}))\s*(?:;.*)?",
        content_type,
        re.I | re.ASCII,
    )
    if not match:  # 70 bytes: RFC 2046, 5.1.1
        raise HTTPError(
            400, f"Content-Type is {content_type!r}, not multipart/form-data."
        )
    return (match[1] or match[2]).encode("latin-1", "replace")


def read_body(request: Request, length: int) -> Iterator[bytes]:
    """Read a request's body of exactly `length` bytes, in chunks."""
    request.unread = length
    while request.unread:
        chunk = request.environ["wsgi.input"].read(min(request.unread, CHUNK))
        if not chunk:
            short = f"The body ends {request.unread} bytes before its Content-Length."
            raise HTTPError(400, short)
        request.unread -= len(chunk)
        yield chunk


def drain(request: Request) -> None:
    """Read what is left of a refused body: clients that still send see no answer."""
    with contextlib.suppress(HTTPError, OSError):  # no body, or its client is gone
        length = _content_length(request.environ)
        left = length if request.unread is None else request.unread
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
    parsed = _check_filename(form, form.filename)
    _check_digests(form, form.staged)
    overwrite = app.settings.overwrite
    new = _addition(form, form.staged, parsed, user=request.user, overwrite=overwrite)
    try:
        changed = app.files.add(new)
    except FileExistsError:
        raise already_exists(request, parsed.filename) from None
    if not changed:
        return text_response(200, f"OK: {parsed.filename} was here already.")
    done = text_response(200, f"OK: {parsed.filename} is stored.")
    return replace(done, changes=(new,))


def _check_filename(form: Form, name: str) -> Parsed:
    """The name is that of a wheel or sdist, and agrees with the rest of the form."""
    fields = form.fields
    parsed = parse_filename(name, normalize(fields.get("name", "")))
    if not parsed or not name.endswith(UPLOADABLE):
        kinds = ", ".join(UPLOADABLE)
        why = f"not that of a wheel or sdist ({kinds}; PEP 427, PEP 625)"
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
        raise HTTPError(
            400, f"The {where} has version {version!r}, but the file is {filename!r}."
        )


def _check_digests(form: Form, staged: Path) -> None:
    """Compare every digest that the client sent with that of the bytes that came."""
    for name in sorted(set(DIGESTS) & set(form.fields)):
        if name not in form.digests:
            with open(staged, "rb") as file:
                came = hashlib.file_digest(file, DIGESTS[name]).hexdigest()
            form.digests[name] = came
        sent, came = form.fields[name].strip().lower(), form.digests[name]
        if sent != came:
            raise HTTPError(
                400,
                f"The {name} of {form.filename} is {came}, but the form says {sent!r}: "
                "the file changed on its way. Send it again.",
            )


def _addition(
    form: Form, staged: Path, parsed: Parsed, *, user: str, overwrite: bool
) -> Addition:
    """Check what the archive says of itself, and gather what its page will say."""
    try:
        with open(staged, "rb") as file:
            metadata = read_core_metadata(file, parsed.filename, form.size)
    except ArchiveError as fault:
        raise HTTPError(400, f"{parsed.filename} is broken: {fault}.") from fault
    _check_agreement(parsed, "archive's metadata", metadata.name, metadata.version)
    is_wheel = parsed.filename.endswith(".whl")
    return Addition(
        *parsed,
        source=staged,
        size=form.size,
        sha256=form.digests["sha256_digest"],
        requires_python=metadata.requires_python,
        core_metadata=hashlib.sha256(metadata.text).hexdigest() if is_wheel else "",
        uploader=user,
        signature=form.fields.get("gpg_signature", "").encode("latin-1"),
        overwrite=overwrite,
    )


def _remove(app: App, form: Form) -> Response:
    """Remove every distribution of one version of a project."""
    name, version = form.fields.get("name", ""), form.fields.get("version", "")
    project = to_project(name)
    if not project or not version:
        sent = f"name={name!r}, version={version!r}"
        raise HTTPError(400, f"Missing 'name'/'version' fields: {sent}")
    listing, key = app.files.current(project), version_key(version)
    found = [d for d in listing.distributions if version_key(d.version) == key]
    if not found:
        raise HTTPError(404, f"{name} ({version}) not found")
    for distribution in found:
        app.files.remove(distribution)
    done = text_response(200, f"OK: {project} {version} is removed.")
    return replace(done, changes=tuple(map(Removal, found)))


# ---- 13. Other answers ---------------------------------------------------------------
# What pypiserver's users and PyPI's tools ask for beside the simple index.


def project_json(app: App, request: Request) -> Response:
    """/pypi/<project>[/<version>]/json, and pypiserver's /<project>/json."""
    listing = app.files.listing(request.project)
    wanted, base = request.args.get("version"), request.base_url()
    names = {version_key(version): version for version in listing.versions()}
    releases: dict[str, list[Any]] = {version: [] for version in names.values()}
    for found in listing.distributions:
        releases[names[version_key(found.version)]].append(_release_json(found, base))
    shown = names.get(version_key(wanted or latest_version(listing)))
    if shown is None:
        what = f"{request.project} {wanted}" if wanted else request.project
        raise HTTPError(404, f"There is no {what!r} here.")
    info = {
        "name": listing.project,
        "version": shown,
        "requires_python": releases[shown][0]["requires_python"],
    }
    content: dict[str, Any] = {"info": info, "urls": releases[shown]}
    if wanted is None:
        content["releases"] = releases
    return _page("application/json", json.dumps(content))


def latest_version(listing: Listing) -> str:
    """The newest; one that is yanked or no final release only if there is no other."""

    def rank(found: Distribution) -> tuple[bool, bool, tuple[Any, ...]]:
        key = version_key(found.version)
        return found.yanked is None, is_final(key), key

    best = max(listing.distributions, key=rank, default=None)
    return best.version if best else ""


def _release_json(found: Distribution, base: str) -> dict[str, Any]:
    extension = os.path.splitext(found.filename)[1]
    kinds = {".whl": "bdist_wheel", ".egg": "bdist_egg", ".exe": "bdist_wininst"}
    kind = kinds.get(extension, "sdist")
    python = found.filename.split("-")[-3] if extension == ".whl" else "source"
    return {
        "filename": found.filename,
        "url": f"{base}/{found.url}",
        "digests": found.hashes,
        "size": found.size,
        "packagetype": kind,
        "python_version": python,
        "requires_python": found.requires_python or None,
        "upload_time": utc(found.uploaded)[:19],
        "upload_time_iso_8601": utc(found.uploaded),
        "yanked": found.yanked is not None,
        "yanked_reason": found.yanked or None,
    }


def _page(kind: str, text: str) -> Response:
    """An answer that is not worth remembering."""
    body = text.encode()
    headers = (
        ("Content-Type", kind),
        ("Cache-Control", "no-cache"),
        ("Content-Length", str(len(body))),
    )
    return Response("200 OK", headers, (body,))


def all_files(app: App, request: Request) -> Response:
    """/packages/: every file, for people and for pip --find-links."""
    links = (
        f'<a href="{project}/{quote(name)}">{escape(name)}</a><br>'
        for project, name in app.files.everything()
    )
    return _page(f"{HTML}; charset=utf-8", _simple_page("All files", links))


def start_page(app: App, request: Request) -> Response:
    """/: the commands to copy, or the file that WELCOME_FILE names."""
    base = request.base_url() + "/"
    if app.settings.welcome_file:
        return _page(f"{HTML}; charset=utf-8", _welcome(app, base))
    install = escape(f"pip install --index-url {base}simple/ PROJECT")
    publish = escape(f"twine upload --repository-url {base} dist/*")
    body = (
        "<h1>Private Python packages</h1>\n"
        f"<p>Install:</p>\n<pre>{install}</pre>\n"
        f"<p>Publish:</p>\n<pre>{publish}</pre>\n"
        '<p>Look at the <a href="simple/">projects</a> or at '
        f'<a href="packages/">all files</a>.</p>\n<p>pypi_ae {__version__}</p>'
    )
    page = html_page("Private Python packages", Html(body))
    return _page(f"{HTML}; charset=utf-8", page)


def _welcome(app: App, base: str) -> str:
    """pypiserver's placeholders keep their names; NUMPKGS counts projects."""
    assert app.settings.welcome_file
    text = app.settings.welcome_file.read_text("utf-8")
    values = {
        "URL": base,
        "VERSION": __version__,
        "PACKAGES": f"{base}packages/",
        "SIMPLE": f"{base}simple/",
    }
    if "{{NUMPKGS}}" in text:
        values["NUMPKGS"] = str(len(app.files.catalog().projects))
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", escape(value))
    return text


def warm_up(app: App, request: Request) -> Response:
    """/_ah/warmup: App Engine asks before it sends an instance its first request."""
    app.files.warm()
    return text_response(200, "Ok")


def health(app: App, request: Request) -> Response:
    """/health: the process answers."""
    return text_response(200, "Ok")


def to_simple(app: App, request: Request) -> Response:
    """/<project>: where people guess that a project's page is."""
    return redirect(relative(request.path, f"/simple/{request.project}/"))


def relative(here: str, there: str) -> str:
    """The way from one path to another that does not name the root."""
    return "../" * (here.count("/") - 1) + there[1:]


def search(app: App, request: Request) -> Response:
    """/RPC2: XML-RPC `search` as pip sends it, substrings of project names."""
    import xmlrpc.client

    length = _content_length(request.environ)
    if length > MAX_PART_HEADERS:
        raise HTTPError(413, f"A search of {length} bytes is too long.")
    body = b"".join(read_body(request, length))
    try:
        if b"<!" in body:  # a DTD: nobody needs one, and its entities can explode
            raise ValueError("a DTD is not accepted")
        parameters, method = xmlrpc.client.loads(body)
        words = _search_words(method, parameters)
    except Exception as fault:  # expat's, struct's and type errors of a stranger's XML
        raise HTTPError(400, f"Invalid XML-RPC payload: {fault}.") from fault
    answer = xmlrpc.client.dumps((_search(app, words),), methodresponse=True)
    return _page("text/xml", answer)


def _search_words(method: str | None, parameters: Sequence[Any]) -> list[str]:
    if method != "search":
        raise ValueError(f"there is no method {method!r}, only search")
    words = dict(parameters[0]).get("name", [])
    return [normalize(w) for w in ([words] if isinstance(words, str) else words) if w]


def _search(app: App, words: Iterable[str]) -> list[dict[str, Any]]:
    latest: dict[Project, str] = {}
    for project, filename in app.files.everything():
        parsed = parse_filename(filename, project)
        if parsed and any(word in project for word in words):
            latest[project] = max(
                latest.get(project, ""), parsed.version, key=version_key
            )
    return [
        {"name": project, "version": version, "summary": ""}
        for project, version in latest.items()
    ]


# ---- 14. Routes and the app ----------------------------------------------------------
# ROUTES says who may do what. HEAD, 405, a missing slash and un-normalised names are
# the router's; each answer is a plain function of the app and a request.

Handler = Callable[["App", Request], Response]
Before = Callable[[Request], None]
After = Callable[[Request, Response], "Response | None"]


class Files(Protocol):
    """What handlers need of the place where distributions are."""

    staging: Path

    def catalog(self) -> Catalog: ...
    def listing(self, project: Project) -> Listing: ...
    def current(self, project: Project) -> Listing: ...
    def find(self, project: Project, filename: str) -> Distribution | None: ...
    def everything(self) -> Iterator[tuple[Project, Filename]]: ...
    def content(
        self, found: Distribution, start: int, stop: int
    ) -> BinaryIO | Iterator[bytes]: ...
    def core_metadata(self, found: Distribution) -> bytes: ...
    def signature(self, found: Distribution) -> bytes: ...
    def add(self, new: Addition) -> bool: ...
    def remove(self, found: Distribution) -> None: ...
    def tidy(self, *, dry_run: bool) -> Iterator[str]: ...
    def warm(self) -> None: ...


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
MAX_PATH = 1024  # letters; the longest path that means something has two names of 240


class Match(NamedTuple):
    route: Route
    project: Project
    args: Mapping[str, str]
    canonical: str  # where to redirect to; "" if the path is as it should be


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
        methods = {r.method for p, r in self._routes if p.fullmatch(slashed)}
        if methods:
            allow = ", ".join(
                sorted(methods | ({"HEAD"} if "GET" in methods else set()))
            )
            raise HTTPError(
                405, f"{method} is not allowed here; {allow} is.", Allow=allow
            )
        raise HTTPError(404, f"There is nothing at {path!r}.")


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path)))


def _describe_match(route: Route, path: str, args: Mapping[str, str]) -> Match:
    project = to_project(args["project"]) if "project" in args else Project("")
    if project is None:
        raise HTTPError(404, f"{args['project']!r} is not a project's name (PEP 508).")
    canonical = route.path.format(**{**args, "project": project})
    moved = route.method == "GET" and route.action != "download" and canonical != path
    return Match(route, project, args, relative(path, canonical) if moved else "")


class App:
    """The WSGI application; `before` and `after` are lists of hooks, yours to extend."""

    def __init__(self, settings: Settings, files: Files, users: Users | None) -> None:
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
        request = Request(environ)
        response = self.respond(request)
        start_response(response.status, list(response.headers))
        return response.body if request.method != "HEAD" else ()

    def respond(self, request: Request) -> Response:
        """Answer a request, whatever happens."""
        try:
            response = self._respond(request)
        except HTTPError as refusal:
            response = self._refuse(request, refusal)
        except Exception:
            log.exception("fault: %s %r", request.method, request.path)
            why = "The server failed; its log says why. Nothing was changed."
            response = self._refuse(request, HTTPError(500, why))
        finally:
            for path in request.staged:
                path.unlink(missing_ok=True)
        if self.verbose:
            log.info("%s %s: %s", request.method, request.path, response.status)
        return response

    def _respond(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        match = self._router.match(method, request.path)
        route = request.route = match.route
        request.project, request.args = match.project, match.args
        if route.action in self.settings.authenticate:
            self._authorize(request)
        if match.canonical:
            return redirect(_with_query(match.canonical, request), 301)
        for before in self.before:
            before(request)
        response = route.handler(self, request)
        for after in self.after:
            response = after(request, response) or response
        for change in response.changes:
            _log_change(request, change)
        return response

    def _authorize(self, request: Request) -> None:
        try:
            if not self.users or not self.users.logins().checks:
                raise HTTPError(403, NO_USERS)
            request.user = self.users.verify(request.header("Authorization"))
        except SettingsError as fault:  # the file was edited, and cannot be used now
            log.error("%s", fault)
            why = "The file of users cannot be used; the server's log says why."
            raise HTTPError(503, why, Retry_After="60") from fault

    def _refuse(self, request: Request, why: HTTPError) -> Response:
        if request.method not in ("GET", "HEAD"):
            drain(request)
        if why.status in (401, 403) or request.method == "POST":
            who = request.user or request.environ.get("REMOTE_ADDR", "")
            log.warning(
                "refused: %s %r for %s: %s", request.method, request.path, who, why
            )
        return text_response(why.status, why.message, *why.headers)


NO_USERS = (
    "Nobody may do this, as there are no users. Make one on the server with: "
    "python pypi_ae.py passwd htpasswd.txt USER"
)


def _with_query(path: str, request: Request) -> str:
    query = request.environ.get("QUERY_STRING", "")
    return f"{path}?{quote(query, safe='=&+%/')}" if query else path


def _log_change(request: Request, change: Addition | Removal) -> None:
    if isinstance(change, Addition):
        name, sha256 = change.filename, change.sha256
        log.info("upload: %s sha256=%s user=%s", name, sha256, request.user)
    else:
        found = change.distribution
        log.info("removal: %s %s user=%s", found.filename, found.hashes, request.user)


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
    words = {name.upper(): _as_text(value) for name, value in settings.items()}
    if unknown := sorted(words.keys() - set(WORDS)):
        known = ", ".join(WORDS).lower()
        raise SettingsError(
            f"get_app() knows no {unknown[0].lower()!r}; it has {known}."
        )
    checked = Settings.from_env({**os.environ, **words})
    who = Users(users if users is not None else checked.password_file)
    if checked.authenticate - {"update"} and not who.logins().checks:
        raise SettingsError(
            f"AUTHENTICATE lets only users {', '.join(sorted(checked.authenticate))}, but "
            "there are none: name a file of users with PASSWORD_FILE (-P), and add one "
            "with: python pypi_ae.py passwd FILE USER"
        )
    _set_up_log()
    app = App(checked, _files(checked), who)
    if isinstance(app.files, Mirror):
        app.before.append(app.files.pull)
        app.after.append(app.files.push)
    return app


def _files(settings: Settings) -> Directory | Mirror:
    if not settings.bucket_name and not settings.remote:
        return Directory(settings.root)
    bucket: Bucket = Folder(Path(settings.remote))
    prefix = ""
    if settings.bucket_name:
        prefix = settings.remote.strip("/") + "/"
        bucket = _bucket(settings.bucket_name)
    return Mirror(settings.root, bucket, prefix, settings.sync_seconds, settings.cache)


def _bucket(name: str) -> Bucket:
    try:
        import gcs_rest
    except ImportError as fault:
        raise SettingsError(
            f"BUCKET_NAME is {name!r}, which needs gcs_rest.py beside this file and the "
            f"packages google-auth and requests (pip install google-auth requests): {fault}"
        ) from fault
    return gcs_rest.Bucket(name)


def _as_text(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _set_up_log() -> None:
    """Make what we log visible, unless whoever embeds the app has seen to that."""
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


# ---- 15. Command line ----------------------------------------------------------------
# pypiserver's flags where they make sense; each is a setting under another name, so the
# environment, keywords and flags cannot disagree about what is allowed.

FLAGS = (
    (("-P", "--passwords"), "password_file", "file of users, in htpasswd format"),
    (("-a", "--authenticate"), "authenticate", "actions that need a user, or ."),
    (("--fallback-url",), "fallback_url", "redirect unknown projects to this index"),
    (("--health-endpoint",), "health_endpoint", "path that answers Ok (/health)"),
    (("--welcome",), "welcome_file", "HTML file of the start page"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["passwd"]:
            return set_password(arguments[1:])
        if arguments[:1] == ["tidy"]:
            return tidy(arguments[1:])
        return run(arguments[1:] if arguments[:1] == ["run"] else arguments)
    except (SettingsError, OSError) as fault:
        print(f"pypi_ae: {fault}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str]) -> int:
    """Serve until interrupted: python pypi_ae.py [run] [DIR] [flags]."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="pypi_ae.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", nargs="?", metavar="DIR", help="packages (./packages)")
    port = int(os.environ.get("PORT", "8080"))
    parser.add_argument("-p", "--port", type=int, default=port, help="port (8080)")
    parser.add_argument(
        *("-i", "-H", "--interface", "--host"), default="127.0.0.1", dest="host"
    )
    for names, setting, text in FLAGS:
        parser.add_argument(*names, dest=setting, help=text, metavar="VALUE")
    parser.add_argument("-o", "--overwrite", action="store_const", const="yes")
    parser.add_argument("--disable-fallback", action="store_true", help="the default")
    parser.add_argument("-v", dest="verbose", action="count", default=0)
    given = vars(parser.parse_args(arguments))
    host, port, verbose = given.pop("host"), given.pop("port"), given.pop("verbose")
    if given.pop("disable_fallback"):
        if given["fallback_url"]:
            raise SettingsError(
                "--disable-fallback and --fallback-url exclude each other."
            )
        given["fallback_url"] = ""
    app = get_app(**{k: v for k, v in given.items() if v is not None})
    app.verbose = verbose > 0
    return serve(app, host, port)


def serve(app: App, host: str, port: int) -> int:
    """Answer requests with wsgiref, a thread each, until interrupted."""
    import socketserver
    from wsgiref import simple_server

    class Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
        daemon_threads = True
        request_queue_size = 128  # uv opens dozens of connections at once; 5 lose some

    class Handler(simple_server.WSGIRequestHandler):
        timeout = 60  # seconds; a client that is silent for longer is gone

        def log_message(self, *_: object) -> None:
            """Say nothing: the app logs what matters."""

    server = simple_server.make_server(host, port, app, Server, Handler)
    print(start_message(app, host, server.server_port), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def start_message(app: App, host: str, port: int) -> str:
    """What is served, where, who may upload, and the commands to copy."""
    shown = "localhost" if host in ("", "0.0.0.0", "::") else host
    url = f"http://{shown}:{port}/"
    users = sorted(app.users.logins().checks) if app.users else []
    uploads = f"{', '.join(users[:5])}{' ...' if len(users) > 5 else ''}"
    if "update" not in app.settings.authenticate:
        uploads = "anybody"
    elif not users:
        uploads = "nobody yet; python pypi_ae.py passwd htpasswd.txt USER  adds a user"
    return (
        f"pypi_ae {__version__} serves {app.settings.root.absolute()} at {url}\n"
        f"  install:  pip install --index-url {url}simple/ PROJECT\n"
        f"  publish:  twine upload --repository-url {url} dist/*\n"
        f"  uploads:  {uploads}"
    )


def tidy(arguments: Sequence[str]) -> int:
    """Compute missing facts, move loose files: python pypi_ae.py tidy [DIR] [--dry-run]."""
    import argparse

    parser = argparse.ArgumentParser(prog="pypi_ae.py tidy")
    parser.add_argument("root", nargs="?", metavar="DIR", default="")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be done"
    )
    given = parser.parse_args(arguments)
    count = 0
    for line in get_app(root=given.root).files.tidy(dry_run=given.dry_run):
        count += 1
        print(f"{count:6} {line}", flush=True)
    print(f"{count} changes{' would be' if given.dry_run else ''} made")
    return 0


def set_password(arguments: Sequence[str]) -> int:
    """Add or change a user: python pypi_ae.py passwd FILE USER [--stdin]."""
    import argparse
    import getpass

    parser = argparse.ArgumentParser(prog="pypi_ae.py passwd")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--stdin", action="store_true", help="read the password there")
    given = parser.parse_args(arguments)
    if not given.user or ":" in given.user or not given.user.isprintable():
        raise SettingsError(
            f"{given.user!r} cannot be a user: no colon, no control letters."
        )
    if given.stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = getpass.getpass(f"Password for {given.user}: ")
        if password != getpass.getpass("Once more: "):
            raise SettingsError("The two passwords differ; nothing was changed.")
    if not password:
        raise SettingsError("An empty password is none; nothing was changed.")
    _write_user(given.file, given.user, hash_password(password))
    print(f"{given.file}: user {given.user!r} is set.")
    return 0


def _write_user(path: Path, user: str, stored: str) -> None:
    """Put one line into the file, in one stroke; other lines stay as they are."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.partition(":")[0].strip() != user]
    text = "".join(f"{line}\n" for line in (*kept, f"{user}:{stored}"))
    new = path.with_name(path.name + ".new")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
