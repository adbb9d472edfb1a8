"""Fuzzing of pypi_ae with atheris, which is a package of PyPI.

    python fuzz/fuzz.py NAME [SECONDS]   search for bytes that break a property
    python fuzz/fuzz.py NAME FILE        try the bytes of one file again

NAME is one of HARNESSES. A harness is a function of bytes. It says what has to be true
for all bytes, and raises AssertionError where this is not so. SEEDS has the inputs from
which the search begins; what it finds, and the inputs that broke a property, are kept
in .fuzz_cache/ beside this file. Each such input becomes a seed, as the tests try all
seeds. If the package `packaging` is there, versions are compared with its answers.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import itertools
import logging
import re
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
atheris: Any = importlib.import_module("atheris") if find_spec("atheris") else None
seen: Any = contextlib.nullcontext()
if atheris and __name__ == "__main__":  # only then is coverage of use
    seen = atheris.instrument_imports(include=["pypi_ae", "tarfile", "zipfile"])
with seen:
    import tarfile
    import zipfile

    import pypi_ae

WHEEL, SDIST = "acme-1.0-py3-none-any.whl", "acme-1.0.tar.gz"
METADATA = (
    b"Metadata-Version: 2.1\nName: acme\nVersion: 1.0\nRequires-Python: >=3.8\n\n"
)
PAGE, FILE = "/simple/acme/", f"/packages/acme/{WHEEL}"
TYPE = "multipart/form-data; boundary=b0"
LONGEST = 4000  # bytes; a sentence that quotes 200 letters several times, escaped
SECONDS = 5.0  # for inputs of a few KB; a loaded machine may need a while

# ---- A server in this process --------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Pieces(io.BytesIO):
    """A body that arrives in pieces of `step` bytes."""

    def __init__(self, data: bytes, step: int) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1, /) -> bytes:
        most = self._step
        return super().read(min(size, most) if size and size > 0 else most)


class LogChecker(logging.Handler):
    """Each log line is one line, and of bounded length."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        assert len(line) < LONGEST, f"a log line of {len(line)} letters"
        assert line.isprintable(), f"a log line with control characters: {line!r}"


@cache
def make_app(*, open_to_all: bool = True) -> pypi_ae.App:
    """An app with one wheel; it lets everybody in, or one user only."""
    pypi_ae.log.addHandler(LogChecker())
    pypi_ae.log.propagate = False
    shm = Path("/dev/shm")  # memory is faster than a disk
    root = tempfile.mkdtemp(prefix="fuzz", dir=shm if shm.is_dir() else None)
    actions = "." if open_to_all else "list,download,update"
    users = {"ci": "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="}  # the password is "password"
    app = pypi_ae.get_app(root=root, users=users, authenticate=actions)
    restock(app)
    return app


def restock(app: pypi_ae.App) -> None:
    """Let the root have one wheel, and nothing else."""
    for folder in app.settings.root.glob("[!.]*"):
        shutil.rmtree(folder)
    (folder := app.settings.root / "acme").mkdir()
    (folder / WHEEL).write_bytes(make_wheel())


def ask(
    app: pypi_ae.App,
    method: str,
    path: str,
    more: dict[str, str],
    body: bytes = b"",
    step: int = 1 << 20,
) -> Answer:
    """Send one request, and check what holds for every answer."""
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path, **more}
    environ |= {"wsgi.input": Pieces(body, step)}
    environ.setdefault("REMOTE_ADDR", "192.0.2.7")
    setup_testing_defaults(environ)
    started: list[tuple[str, list[tuple[str, str]]]] = []
    result: Any = app(environ, lambda *parts: started.append(parts))  # type: ignore
    content = b"".join(result)
    if hasattr(result, "close"):
        result.close()
    [(status, headers)] = started
    for text in (status, *itertools.chain(*headers)):
        assert re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", text), f"{text!r} in the head"
    answer = Answer(int(status[:3]), {k.lower(): v for k, v in headers}, content)
    if method == "POST" and answer.status == 200:  # something was stored, or removed
        restock(app)
    assert answer.status < 500, content
    assert len(status) < 500, f"a reason phrase of {len(status)} letters"
    if answer.status >= 400:
        assert len(content) < LONGEST, f"an answer of {len(content)} bytes"
        assert method == "HEAD" or len(content.split()) >= 3, content
    return answer


@contextlib.contextmanager
def smaller_limits(**limits: int) -> Iterator[None]:
    """Let the search reach limits with short inputs."""
    kept = {name: getattr(pypi_ae, name) for name in limits if hasattr(pypi_ae, name)}
    vars(pypi_ae).update({name: limits[name] for name in kept})
    try:
        yield
    finally:
        vars(pypi_ae).update(kept)


def expect(true: bool, why: str) -> None:
    if not true:
        raise AssertionError(why)


def as_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


# ---- Forms ---------------------------------------------------------------------------


def check_form(data: bytes) -> None:
    """Events and answers do not depend on how a form was cut into chunks.

    Only 400 and 413 are raised. Parts that are sent again are read as the same.
    """
    step, body = data[:1], data[1:]
    steps = (len(body) or 1, 1 + sum(step) % 80, 1)
    with smaller_limits(MAX_PART_HEADERS=100, MAX_FIELDS=8, MAX_FORM=200):
        readings = [read_parts(body, size) for size in steps]
        assert readings == readings[:1] * 3, readings
        answers = [post_form(body, size) for size in steps[:2]]
        assert answers[0] == answers[1], answers
    parts = readings[0]
    if parts and isinstance(parts[0], tuple) and is_simple(parts):
        again = b"".join(map(encode_part, parts)) + b"--b0--\r\n"
        assert read_parts(again, len(again)) == parts


def read_parts(body: bytes, step: int) -> list[Any]:
    """The parts of a form as (name, filename, data), or [status, message]."""
    parser, parts = pypi_ae.MultipartParser(b"b0"), list[Any]()
    try:
        for start in range(0, len(body), step):
            for event in parser.feed(body[start : start + step]):
                if isinstance(event, pypi_ae.PartBegins):
                    parts.append((event.name, event.filename, b""))
                elif isinstance(event, pypi_ae.PartData):
                    parts[-1] = (*parts[-1][:2], parts[-1][2] + event.data)
        parser.close()
    except pypi_ae.HTTPError as refusal:
        parts = [refusal.status, refusal.message]
        expect(refusal.status in (400, 413), refusal.message)
    return parts


def is_simple(parts: Sequence[tuple[str, str | None, bytes]]) -> bool:
    """Can the names stand in quotes as they are?"""
    names = "".join(f"{name}{filename or ''}" for name, filename, _ in parts)
    return re.fullmatch(r'[^"\\\r\n\ufffd]*', names) is not None


def encode_part(part: tuple[str, str | None, bytes]) -> bytes:
    name, filename, data = part
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--b0\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def post_form(body: bytes, step: int) -> Answer:
    more = {"CONTENT_TYPE": TYPE, "CONTENT_LENGTH": str(len(body))}
    return ask(make_app(), "POST", "/", more, body, step)


# ---- Names and versions --------------------------------------------------------------


def check_filename(data: bytes) -> None:
    """A name that is taken is safe to join, and agrees with its project and version."""
    for text in (as_text(data), as_names(data)):
        name, _, hint = text.partition("\n")
        check_name(name, hint)


NAMES = """
    - - - . _ + ! 0 1 9 10 a b c r v acme Beta post dev rc alpha preview rev py3 none
    .tar.gz .zip .whl .egg .tgz .tar -py3-none-any.whl -1.0 .metadata .yanked .dev1 rc1
"""


def as_names(data: bytes) -> str:
    """Each byte stands for a piece of a name; so most names are nearly right."""
    pieces = [*NAMES.split(), "\n"]
    return "".join(pieces[byte % len(pieces)] for byte in data)


def check_name(name: str, hint: str) -> None:
    for project in ("", pypi_ae.normalize(hint)):
        parsed = pypi_ae.parse_filename(name, project)
        if not parsed:
            continue
        assert parsed.filename == name
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,214}", name), name
        assert pypi_ae.to_project(parsed.project) == parsed.project
        assert pypi_ae.normalize(name).startswith(parsed.project)
        assert parsed.version
        assert parsed.version in name
        if not project and PACKAGING and name.count("-") != 3:
            compare_with_packaging(parsed)
    assert pypi_ae.distribution_of(name) in (name, *map(name.removesuffix, SIDECARS))


SIDECARS = (".metadata", ".yanked")


PACKAGING = find_spec("packaging") is not None


def compare_with_packaging(parsed: pypi_ae.Parsed) -> None:
    import packaging.utils
    import packaging.version

    name = parsed.filename
    try:
        if name.endswith(".whl"):
            project, version = packaging.utils.parse_wheel_filename(name)[:2]
        elif name.count("-") == 1:
            project, version = packaging.utils.parse_sdist_filename(name)
        else:
            return
        ours = packaging.version.Version(parsed.version)
    except ValueError:
        return
    assert (str(parsed.project), ours) == (str(project), version)


def check_version(data: bytes) -> None:
    """The order is total, and that of PEP 440."""
    check_order(as_text(data).split("\n")[:4])
    check_order(as_names(data).split("\n")[:4])


def check_order(versions: Sequence[str]) -> None:
    keys = [pypi_ae.version_key(version) for version in versions]
    for one, other in itertools.product(keys, keys):
        assert (one < other) + (one == other) + (one > other) == 1
        assert (one < other) == (other > one)
        assert one != other or hash(one) == hash(other)
    orders = {tuple(sorted(order)) for order in itertools.permutations(keys)}
    assert len(orders) == 1, orders
    assert all(not k[0] for v, k in zip(versions, keys, strict=True) if len(v) > 200)
    if PACKAGING:
        compare_order([v for v in versions if len(v) <= 200 and v.isascii()])


def compare_order(versions: Sequence[str]) -> None:
    from packaging.version import InvalidVersion, Version

    theirs: dict[str, Version | None] = {}
    for text in versions:
        try:
            theirs[text] = Version(text)
        except InvalidVersion:
            theirs[text] = None
        assert pypi_ae.version_key(text)[0] == (theirs[text] is not None), text
    valid = [(pypi_ae.version_key(t), v) for t, v in theirs.items() if v]
    for (our_one, one), (our_other, other) in itertools.product(valid, valid):
        assert (our_one < our_other, our_one == our_other) == (
            one < other,
            one == other,
        )


# ---- Headers -------------------------------------------------------------------------


def check_headers(data: bytes) -> None:
    """Lines: Accept, Accept-Encoding, If-None-Match, Range, If-Range, query.

    A page has a type that is offered, or is 406. A range has the bytes it says.
    """
    lines = data.decode("latin-1").replace("\r", "").split("\n")
    names = ("ACCEPT", "ACCEPT_ENCODING", "IF_NONE_MATCH", "RANGE", "IF_RANGE")
    more = {f"HTTP_{name}": text for name, text in zip(names, lines, strict=False)}
    more["QUERY_STRING"] = "".join(lines[len(names) : len(names) + 1])
    page = ask(make_app(), "GET", PAGE, more)
    assert page.status in (200, 304, 406), page
    if page.status == 200:
        assert page.headers["content-type"].split(";")[0] in pypi_ae.OFFERS
        packed = page.headers.get("content-encoding") == "gzip"
        text = gzip.decompress(page.body) if packed else page.body
        assert WHEEL.encode() in text
    file, whole = ask(make_app(), "GET", FILE, more), make_wheel()
    assert file.status in (200, 206, 304, 416), file
    if file.status == 200:
        assert file.body == whole
    if file.status == 206:
        numbers = re.findall(r"\d+", file.headers["content-range"])
        start, last, size = map(int, numbers)
        assert (size, file.body) == (len(whole), whole[start : last + 1])
        assert file.body


# ---- Archives ------------------------------------------------------------------------


def make_wheel(metadata: bytes = METADATA) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in (("acme.py", b""), ("acme-1.0.dist-info/METADATA", metadata)):
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6)), text)
    return buffer.getvalue()


def make_tar(metadata: bytes = METADATA, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        info = tarfile.TarInfo("acme-1.0/PKG-INFO")
        info.size = len(metadata)
        archive.addfile(info, io.BytesIO(metadata))
    return buffer.getvalue()[: 512 * 4]


def read_archive(content: bytes, filename: str) -> pypi_ae.CoreMetadata | None:
    """Read core metadata, in bounded time; None if the archive is refused."""
    began, source = time.monotonic(), io.BytesIO(content)
    try:
        found = pypi_ae.read_core_metadata(source, filename, len(content))
    except pypi_ae.ArchiveError as refusal:
        found = None
        expect(len(str(refusal)) < LONGEST, "a very long message")
    assert time.monotonic() - began < SECONDS
    return found


def check_zip(data: bytes) -> None:
    """A zip that is taken is read by zipfile in the same way, and has no prefix."""
    found = read_archive(data, WHEEL)
    if not found:
        return
    assert data.startswith(b"PK\3\4"), "bytes before the first member"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        [name] = [n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        assert archive.read(name) == found.text
        assert data.endswith(archive.comment), "bytes after the archive"
    assert not any(n.startswith("/") or ".." in n.split("/") for n in names), names
    assert len(names) == len(set(names)), names


def pack(tar: bytes) -> bytes:
    """Correct the checksums of what look like headers, and compress."""
    blocks = [bytearray(tar[at : at + 512]) for at in range(0, len(tar), 512)]
    for block in blocks:
        if block[257:262] == b"ustar" and len(block) == 512:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return gzip.compress(b"".join(blocks), 1, mtime=0)


def check_tar(data: bytes) -> None:
    """A tar file that is taken is read by tarfile in the same way."""
    packed = data if data.startswith(b"\x1f\x8b") else pack(data)
    found = read_archive(packed, SDIST)
    if not found:
        return
    texts = []
    with (
        contextlib.suppress(tarfile.TarError, OSError, EOFError, ValueError),
        tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            texts.append(content.read() if content else b"")
    assert found.text in texts


def check_metadata(data: bytes) -> None:
    """Name, version and Requires-Python are those of lines that line feeds end."""
    tar = gzip.compress(make_tar(data), 1, mtime=0)
    wheel, sdist = read_archive(make_wheel(data), WHEEL), None
    if len(data) <= 512:  # make_tar cuts what is longer
        sdist = read_archive(tar, SDIST)
        assert sdist == wheel
    if not wheel:
        return
    assert wheel.text == data
    lines = [line.partition(":") for line in as_text(data).split("\n")]
    fields = {(key.lower(), value.strip()) for key, _, value in lines}
    assert {("name", wheel.name), ("version", wheel.version)} <= fields
    python = wheel.requires_python
    assert not python or ("requires-python", python) in fields


# ---- Users ---------------------------------------------------------------------------


def check_htpasswd(data: bytes) -> None:
    """A file of users is taken, or refused with a sentence that tells no secret.

    No hash that is taken lets another password in.
    """
    file = users_file()
    file.write_bytes(data)
    try:
        users = pypi_ae.Users(file)
    except pypi_ae.SettingsError as refusal:
        lines = [line.partition(":") for line in as_text(data).splitlines()]
        names = "".join(user for user, _, _ in lines)
        for word in (word for _, _, hashed in lines for word in hashed.split("$")):
            secret = len(word.strip()) > 10 and word.strip() not in names
            expect(not (secret and word.strip() in str(refusal)), str(refusal))
        return
    for user, check in users.logins().checks.items():
        assert user
        assert ":" not in user
        if not re.search(rb"scrypt|rounds|\$2", data):  # the others take milliseconds
            assert not check(b"a password that nobody has")


@cache
def users_file() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz")) / "htpasswd.txt"


# ---- Requests ------------------------------------------------------------------------


def check_request(data: bytes) -> None:
    """Lines: a flag, method, path, query; headers, an empty line, the body.

    An answer is below 500; it and its log lines are bounded, without control letters.
    """
    head, _, body = data.partition(b"\n\n")
    lines = head.decode("latin-1").split("\n")
    flag, method, path, query = (*lines[:4], "", "", "", "")[:4]
    more = {"QUERY_STRING": query, "CONTENT_LENGTH": str(len(body))}
    for line in lines[4:]:
        key, _, value = line.partition(":")
        name = "".join(c if c in string.ascii_letters else "_" for c in key).upper()
        own = name.startswith("CONTENT_") or name in ("SCRIPT_NAME", "REMOTE_ADDR")
        more[name if own else f"HTTP_{name}"] = value.strip()
    app = make_app(open_to_all=not flag.startswith("u"))
    ask(app, method or "GET", path or "/", more, body)


# ---- Harnesses and seeds -------------------------------------------------------------

HARNESSES: dict[str, Callable[[bytes], None]] = {
    "form": check_form,
    "filename": check_filename,
    "headers": check_headers,
    "version": check_version,
    "zip": check_zip,
    "tar": check_tar,
    "metadata": check_metadata,
    "htpasswd": check_htpasswd,
    "request": check_request,
}


# Bytes. Longer names are all refused; longer forms take long, byte by byte.
LENGTHS = {"filename": 150, "version": 150, "form": 1200}


def make_form(*parts: tuple[str, str | None, bytes]) -> bytes:
    return b"".join(map(encode_part, parts)) + b"--b0--\r\n"


REMOVAL = make_form((":action", None, b"remove_pkg"), ("name", None, b"acme"))
UPLOAD = make_form((":action", None, b"file_upload"), ("content", WHEEL, make_wheel()))
DISPOSITION = b"Content-Disposition: form-data; name=a\r\n"
ENCODED = (
    b"--b0\r\n" + DISPOSITION + b"Content-Transfer-Encoding: 8bit\r\n\r\nx\r\n--b0--"
)
DOUBTFUL = (
    b'--b0\r\nContent-Disposition: form-data; x="; name=y"; name=a\r\n\r\n\r\n--b0--'
)
SEARCH = (
    b"<methodCall><methodName>search</methodName><params><param><value><struct><member>"
    b"<name>name</name><value><string>ac</string></value></member></struct></value>"
    b"</param></params></methodCall>"
)
USERS = b"""\
# users
ci:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=
a:$apr1$salt$0123456789012345678901
b:$5$salt$0123456789012345678901234567890123456789012
c:$scrypt$ln=14,r=8,p=1$c2FsdHNhbHRzYWx0$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
"""
PAX: dict[str, Any] = {
    "format": tarfile.PAX_FORMAT,
    "pax_headers": {"comment": "x" * 99},
}
SEEDS: dict[str, tuple[bytes, ...]] = {
    "form": (
        b"\x05" + REMOVAL,
        b"\x40" + UPLOAD,
        b"\x01--b0 \t\r\n" + DISPOSITION + b"\r\n\r\n--b0--\r\n",
        b"\x07" + ENCODED,
        b"\x0b" + DOUBTFUL,
        b"\x02" + b"p" * 101 + b"\r\n" + REMOVAL,  # a preamble at the bound
        b"\x03--b0\r\n" + DISPOSITION + b"X: " + b"x" * 57 + b"\r\n\r\n\r\n--b0--\r\n",
    ),
    "filename": (
        b"acme-1.0-py3-none-any.whl\nacme",
        b"acme_tools-1.0-1-cp311-cp311-manylinux_2_17_x86_64.whl",
        b"beta-1.0-1.tar.gz\nbeta",
        b"flup-1.0.3.dev-20110405.tar.gz",
        b"acme-1.0-py3.8.egg",
        b"acme-1!2.0+local.zip.metadata",
        b"beta-.tar.gz\nbeta",
        b"be1-.01t-.tar",
    ),
    "headers": (
        b"application/vnd.pypi.simple.v1+json;q=0.9, */*;q=0.1\ngzip\n\nbytes=0-99",
        b'text/html\n*;q=0\n"x", W/"y"\nbytes=-5\n"x"\nformat=text/html',
        b"\n\n*\nbytes=100-\n",
    ),
    "version": (
        b"1.0\n1.0.0\n1.0rc1\n1.0.post1",
        b"1!0.1\n1.0.dev1\n1.0a1.dev2\n1.0+local.7",
        b"1.0-1\nv1.0\n1.0c1\nnot one",
    ),
    "zip": (make_wheel(), b"#!x\n" + make_wheel(), make_wheel() + make_wheel()),
    "tar": (make_tar(), make_tar(**PAX), gzip.compress(make_tar(), mtime=0)),
    "metadata": (
        METADATA,
        b"Name: a\x0bName: b\r\nVersion: 1\n",
        b"Summary: x\x0bName: acme\nVersion: 1\n\nName: y",
        b"name:acme\n Name: b\nVERSION : 2\nVersion: 1",
    ),
    "htpasswd": (
        USERS,
        *USERS.splitlines(),
        b"u:$scrypt$ln=14,r=8,p=1$c2FsdA$AA",
        b"a:$a long secret$b",
    ),
    "request": (
        b"o\nGET\n/simple/acme/\nformat=text/html\nAccept: text/html\n\n",
        b"o\nGET\n/pypi/acme/1.0/json\n\nX-Forwarded-Host: a/\nHost: b\n\n",
        b"o\nPOST\n/RPC2\n\nContent-Type: text/xml\n\n" + SEARCH,
        b"u\nGET\n/packages/acme/\n\nAuthorization: Basic Y2k6cGFzc3dvcmQ=\n\n",
        f"o\nPOST\n/legacy/\n\nContent-Type: {TYPE}\n\n".encode() + REMOVAL,
        f"o\nPOST\n/\n\nContent-Type: {TYPE}\n\n".encode() + UPLOAD,
        b"o\nPOST\n/\n\nContent-Type: application/x-www-form-urlencoded\n\n%3Aaction=a",
        f"o\nHEAD\n{FILE}.metadata\n\nRange: bytes=1-\n\n".encode(),
    ),
}
WORDS = """
    --b0 ; name= filename= form-data Content-Disposition: Content-Transfer-Encoding:
    boundary= :action file_upload remove_pkg content version name .whl .tar.gz .zip .egg
    -py3-none-any .metadata .yanked -1.0 dev post rc .dev -1 +local 1! bytes= q=0 */* ,
    text/html gzip W/ PK path= size= GNU.sparse. Name: Version: Requires-Python:
    {SHA} $apr1$ $5$rounds= $6$ $2b$12$ $scrypt$ln= GET POST /simple/ /packages/ /pypi/
    /json /RPC2 Authorization:Basic Range: Accept: X-Forwarded-Host: .. / // %2e
"""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in HARNESSES:
        print(f"{__doc__}\nNAME: {', '.join(HARNESSES)}")
        return 2
    name, what = (*arguments, "600")[:2]
    if not what.isdigit():
        HARNESSES[name](Path(what).read_bytes())
        return 0
    if not atheris:
        print("This needs the package atheris. Install it: pip install atheris")
        return 2
    folder = HERE / ".fuzz_cache" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (folder / f"seed{number}").write_bytes(seed)
    bounds = [f"-max_total_time={what}", "-timeout=30", "-rss_limit_mb=2048"]
    (folder.parent / "words").write_text(
        "".join(f'"{word}"\n' for word in WORDS.split())
    )
    bounds += [
        f"-dict={folder.parent / 'words'}",
        f"-max_len={LENGTHS.get(name, 8192)}",
        f"-artifact_prefix={folder.parent}/{name}-",
    ]
    atheris.Setup(["fuzz.py", *bounds, str(folder)], HARNESSES[name])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
