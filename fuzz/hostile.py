"""Hostile requests against a real server, and what each of them costs.

    python fuzz/hostile.py [--path DIR] [--server gunicorn|wsgiref] [WORD ...]

Starts the pypi_ae.py of DIR (this one), and sends it the rows of ROWS and the floods of
FLOODS whose names have one of the words (all). While it answers, another client asks
for a page all the time. One line for each says: the answer, its seconds, the longest
wait of the other client, by how much the server's memory grew, and what is wrong.

A row is right if its answer has the status and the word that the row names, within two
seconds for a megabyte sent and one more, and if the other client waited no longer. On a
busy machine all times are longer, so they are multiplied by FACTOR.
"""

# ruff: noqa: E501 - in the tables a row is a line

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import io
import itertools
import json
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import psutil

HERE = Path(__file__).resolve().parent
FACTOR = float(os.environ.get("HOSTILE_FACTOR", "4"))
MB = 1_000_000
PATIENCE = 60.0  # seconds; then a request counts as not answered
GROWTH = 60 * MB  # bytes by which one row may make the server grow

# ---- The server ----------------------------------------------------------------------


@dataclass
class Server:
    """A server in a process of its own, with one wheel and the users ci and eve."""

    port: int
    root: Path
    log: Path
    process: psutil.Process
    longest: float = 0.0  # seconds that the other client waited since the last reset
    asked: float = 0.0  # when it asked for the page that it waits for; 0: it does not
    since: float = 0.0  # of the last reset
    peak: int = 0  # bytes of memory since then
    stop: threading.Event = field(default_factory=threading.Event)

    def memory(self) -> int:
        """Resident bytes of the process that answers."""
        processes = [self.process, *self.process.children(recursive=True)]
        sizes = [0]
        for process in processes:
            with contextlib.suppress(psutil.Error):
                sizes.append(process.memory_info().rss)
        return max(sizes)

    def watch(self) -> None:
        """Ask for a page until told to stop, as another client does."""
        while not self.stop.wait(0.02):
            self.asked = time.monotonic()
            status, _ = send(self.port, get("/simple/acme/"))
            waited = self.waiting() if status else PATIENCE
            self.longest, self.asked = max(self.longest, waited), 0.0
            self.peak = max(self.peak, self.memory())

    def waiting(self) -> float:
        """Seconds for which it waits now, since the last reset."""
        asked = self.asked
        return time.monotonic() - max(asked, self.since) if asked else 0.0

    def reset(self) -> None:
        self.since, self.longest, self.peak = time.monotonic(), 0.0, self.memory()

    def staged(self) -> int:
        files = (self.root / ".pypi_ae" / "staging").glob("*")
        return sum(file.stat().st_size for file in files if file.exists())


@contextlib.contextmanager
def serve(path: Path, kind: str = "gunicorn", **settings: str) -> Iterator[Server]:
    """Start a server, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        here, port = Path(folder), free_port()
        (here / "packages" / "acme").mkdir(parents=True)
        (here / "packages" / "acme" / WHEEL).write_bytes(wheel())
        environ = {**os.environ, "PYTHONPATH": str(path), "MAX_UPLOAD_MB": "100"}
        environ |= {"LOCAL_PACKAGE_DIRECTORY": str(here / "packages")}
        environ |= {"PASSWORD_FILE": str(here / "users"), **settings}
        for user in ("ci", "eve"):
            command = [sys.executable, f"{path}/pypi_ae.py", "passwd", f"{here}/users"]
            subprocess.run(
                [*command, user, "--stdin"], input=b"secret\n", check=True, stdout=-3
            )
        command = [sys.executable, f"{path}/pypi_ae.py", "run", "-p", str(port)]
        if kind == "gunicorn":
            command = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}"]
            command += ["-w", "1", "--threads", "16", "pypi_ae:get_app()"]
        with open(here / "log", "wb") as log:
            options: dict[str, Any] = {"cwd": folder, "env": environ, "stdout": log}
            process = subprocess.Popen(command, stderr=log, **options)
        server = Server(
            port, here / "packages", here / "log", psutil.Process(process.pid)
        )
        try:
            wait_for(server)
            yield server
        finally:
            server.stop.set()
            end(process)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(server: Server) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError):
            if send(server.port, get("/simple/acme/"))[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError(server.log.read_text())


def end(process: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()


def send(port: int, data: bytes, patience: float = PATIENCE) -> tuple[int, bytes]:
    """Send raw bytes, reading all the while; return status and body, 0 for no answer.

    A server may answer and hang up before it has read everything.
    """
    answer, end_at, view = b"", time.monotonic() + patience, memoryview(data)
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.setblocking(False)
        poll = select.poll()
        while (left := end_at - time.monotonic()) > 0:
            poll.register(sock, select.POLLIN | (select.POLLOUT if view else 0))
            for _, event in poll.poll(left * 1000):
                if event & select.POLLOUT:
                    view = send_some(sock, view)
                if event & ~select.POLLOUT:
                    chunk = receive(sock)
                    if not chunk:
                        return split(answer)
                    answer += chunk
    return split(answer)


def send_some(sock: socket.socket, view: memoryview) -> memoryview:
    try:
        return view[sock.send(view[: 1 << 20]) :]
    except BlockingIOError:
        return view
    except OSError:  # the server does not take more
        return view[:0]


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except OSError:
        return b""


def split(answer: bytes) -> tuple[int, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    match = re.match(rb"HTTP/1\.\d (\d{3})", head)
    return int(match[1]) if match else 0, body


# ---- Requests ------------------------------------------------------------------------

WHEEL, SDIST = "acme-1.0-py3-none-any.whl", "acme-1.0.tar.gz"
NEW = "acme-2.0-py3-none-any.whl"  # it is not there
METADATA = b"Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n\n"
INFO = "acme-2.0.dist-info/METADATA"
MULTIPART = "multipart/form-data; boundary=b0"
URLENCODED = "application/x-www-form-urlencoded"
FILE = f"/packages/acme/{WHEEL}"


def basic(login: str) -> str:
    return "Authorization: Basic " + base64.b64encode(login.encode()).decode()


LOGIN = basic("ci:secret")


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(
    body: bytes,
    *headers: str,
    path: str = "/",
    kind: str = MULTIPART,
    login: str = LOGIN,
) -> bytes:
    lines = [f"Content-Type: {kind}", f"Content-Length: {len(body)}", login, *headers]
    return get(path, *filter(None, lines), method="POST") + body


def part(name: str, value: bytes | str, *more: str, file: str | None = None) -> bytes:
    filename = "" if file is None else f'; filename="{file}"'
    head = (f'Content-Disposition: form-data; name="{name}"{filename}', *more, "", "")
    data = value if isinstance(value, bytes) else value.encode()
    return b"--b0\r\n" + "\r\n".join(head).encode() + data + b"\r\n"


END = b"--b0--\r\n"
REMOVE, ACTION = part(":action", "remove_pkg"), part(":action", "file_upload")


def form(*parts: bytes) -> bytes:
    return b"".join([*parts, END])


def upload(content: bytes, filename: str = NEW, /, **fields: str | bytes) -> bytes:
    parts = [part(key, value) for key, value in fields.items()]
    return post(form(ACTION, *parts, part("content", content, file=filename)))


def rpc(body: bytes) -> bytes:
    return post(body, path="/RPC2", kind="text/xml", login="")


# ---- Archives ------------------------------------------------------------------------


def wheel(
    metadata: bytes = b"Name: acme\nVersion: 1.0\n\n", info: str = "", **files: bytes
) -> bytes:
    return zipped({**files, info or "acme-1.0.dist-info/METADATA": metadata})


def zipped(files: Mapping[str, bytes], packing: int = 0, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in files.items():
            archive.writestr(
                zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6)), data, packing
            )
        archive.comment = comment
    return buffer.getvalue()


GOOD = zipped({INFO: METADATA})


def two_of(first: str, second: str) -> bytes:
    """A good wheel with two more members, of these names."""
    longer = zipped({INFO: METADATA, "name-one": b"1", "name-two": b"2"})
    for old, new in (("name-one", first), ("name-two", second)):
        assert len(old) == len(new)
        longer = longer.replace(old.encode(), new.encode())
    return longer


def with_flag(data: bytes, flag: int) -> bytes:
    """Set a flag in all headers of a zip."""
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for match in reversed(list(re.finditer(re.escape(mark), data))):
            start = match.start() + at
            data = data[:start] + struct.pack("<H", flag) + data[start + 2 :]
    return data


def directory(data: bytes, **values: int) -> bytes:
    """Change numbers in the end record of a zip."""
    names = ("disk", "start_disk", "here", "entries", "size", "offset")
    at = data.rindex(b"PK\5\6") + 4
    kept = dict(zip(names, struct.unpack("<4H2L", data[at : at + 16]), strict=True))
    packed = struct.pack("<4H2L", *(kept | values).values())
    return data[:at] + packed + data[at + 16 :]


def unlisted() -> bytes:
    """A good wheel with a member that its directory does not list."""
    extra = zipped({"evil.py": b"1"})
    extra = extra[: extra.index(b"PK\1\2")]
    at = GOOD.index(b"PK\1\2")
    return directory(GOOD[:at] + extra + GOOD[at:], offset=at + len(extra))


def other_local_name() -> bytes:
    at = GOOD.index(b"PK\1\2")
    return GOOD[:at].replace(b"acme-2.0.dist", b"evil-2.0.dist") + GOOD[at:]


def overlapping() -> bytes:
    """Two entries of the directory that share one member (a better zip bomb)."""
    data = two_of("evil.py1", "evil.py2")
    first = data.index(b"evil.py1", data.index(b"PK\1\2"))
    second = data.index(b"evil.py2", first)
    offset = data[first - 4 : first]
    return data[: second - 4] + offset + data[second:]


def member(name: str, data: bytes = b"", kind: bytes = b"0", **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    padding = bytes(-len(data) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + data + padding


def sdist(*blocks: bytes) -> bytes:
    """A packed tar file of headers and members, with PKG-INFO last."""
    packer = zlib.compressobj(1, wbits=31)
    every = itertools.chain(blocks, [PKG_INFO, bytes(1024)])
    return b"".join(map(packer.compress, every)) + packer.flush()


PKG_INFO = member("acme-2.0/PKG-INFO", METADATA)


def bad_sdist(*blocks: bytes) -> bytes:
    return upload(sdist(*blocks), "acme-2.0.tar.gz")


def only(*blocks: bytes) -> bytes:
    """An upload of a tar file that has only these blocks."""
    return upload(gzip.compress(b"".join(blocks) + bytes(1024)), "acme-2.0.tar.gz")


def pax(data: bytes, kind: bytes = b"x") -> bytes:
    return member("pax", data, kind)


def record(key: str, value: str) -> bytes:
    """A record of a pax header; its length counts its own digits."""
    text, size = f" {key}={value}\n".encode(), 0
    while size != len(text) + len(str(size)):
        size = len(text) + len(str(size))
    return str(size).encode() + text


def many_records(total: int) -> bytes:
    records = [record(f"k{number}", "x") for number in range(total // 12)]
    return pax(b"".join(records)[: 8 << 20], b"g")


def sparse(entries: int) -> bytes:
    """A sparse member (GNU, 1.0) whose map has many entries."""
    values = {"major": "1", "minor": "0", "name": "a", "realsize": "9"}
    head = b"".join(record(f"GNU.sparse.{k}", v) for k, v in values.items())
    return pax(head) + member("a", b"%d\n" % entries + b"0\n" * 2 * entries)


def changed(header: bytes, at: int, value: bytes) -> bytes:
    """Write a value into a header of a tar file, and correct the checksum."""
    head = bytearray(header)
    head[at : at + len(value)] = value
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head)


def raw_size(size: bytes) -> bytes:
    return changed(member("acme-2.0/a"), 124, size.ljust(12, b"\0"))


def random_bytes(size: int) -> bytes:
    return random.Random(0).randbytes(size)


# ---- The rows ------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    make: bytes | Callable[[], bytes]
    statuses: tuple[int, ...]
    word: str  # a pattern that the sentence has, in lower case


def row(name: str, make: Any, status: int | tuple[int, ...], word: str) -> Row:
    return Row(name, make, status if isinstance(status, tuple) else (status,), word)


LARGE = (400, 413)
SERVERS_OWN = (400, 414, 431)  # gunicorn and wsgiref refuse some by themselves
HUGE = "9" * 4_000_000
META = METADATA.replace


def of(metadata: bytes) -> bytes:
    """An upload of a wheel with this METADATA."""
    return upload(zipped({INFO: metadata}))


BROKEN_ZIPS: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: upload(b""),
    "no zip": lambda: upload(b"<html>not a zip</html>"),
    "half a zip": lambda: upload(GOOD[: len(GOOD) // 2]),
    "end record cut": lambda: upload(GOOD[:-4]),
    "no METADATA": lambda: upload(zipped({"a.py": b""})),
    "METADATA too deep": lambda: upload(zipped({f"a/{INFO}": METADATA})),
    "two METADATA": lambda: upload(zipped({INFO: METADATA, "b-1.dist-info/METADATA": b""})),
    "METADATA twice": lambda: upload(zipped({INFO: METADATA, INFO.replace("acme", "evil"): METADATA}).replace(b"evil", b"acme")),
    "METADATA of 4 MiB": lambda: of(METADATA + bytes(4 << 20)),
    "METADATA that unpacks to 400 MB": lambda: upload(zipped({INFO: METADATA + bytes(400 * MB)}, 8)),
    "METADATA with a wrong size": lambda: upload(zipped({INFO: METADATA * 1000}, 8).replace(struct.pack("<L", len(METADATA) * 1000), struct.pack("<L", len(METADATA)))),
    "METADATA in bzip2": lambda: upload(zipped({INFO: METADATA}, 12)),
    "METADATA in lzma": lambda: upload(zipped({INFO: METADATA}, 14)),
    "a wrong checksum": lambda: upload(GOOD.replace(b"2.1", b"2.2", 1)),
    "encrypted members": lambda: upload(with_flag(GOOD, 1)),
    "strongly encrypted": lambda: upload(with_flag(GOOD, 0x41)),
    "patched data": lambda: upload(with_flag(GOOD, 0x20)),
    "bytes before a zip": lambda: upload(b"#!/bin/sh\n" + GOOD),
    "a tar before a zip": lambda: upload(sdist() + GOOD),
    "bytes after a zip": lambda: upload(GOOD + b"more"),
    "a zip after a zip": lambda: upload(GOOD + GOOD),
    "a zip in the comment": lambda: upload(zipped({INFO: METADATA}, comment=GOOD)),
    "an end record in the comment": lambda: upload(zipped({INFO: METADATA}, comment=GOOD[GOOD.index(b"PK\5\6") :])),
    "a member ../": lambda: upload(two_of("../../ab", "a.py-abc")),
    "a member a/../b": lambda: upload(two_of("aa/../bb", "a.py-abc")),
    "an absolute member": lambda: upload(two_of("/etc/abc", "abcdefgh")),
    "a member twice": lambda: upload(two_of("evil.py1", "evil.py1")),
    "an unlisted member": lambda: upload(unlisted()),
    "another local name": lambda: upload(other_local_name()),
    "members that overlap": lambda: upload(overlapping()),
    "directory elsewhere": lambda: upload(directory(GOOD, offset=1)),
    "directory beyond the end": lambda: upload(directory(GOOD, offset=2**31)),
    "directory of 4 GB": lambda: upload(directory(GOOD, size=2**32 - 2)),
    "directory of 0 bytes": lambda: upload(directory(GOOD, size=0)),
    "a directory that counts wrong": lambda: upload(directory(GOOD, here=9, entries=9)),
    "zip64 without its record": lambda: upload(directory(GOOD, offset=2**32 - 1)),
    "a directory of 12 MB": lambda: upload(zipped({f"{n:0>400}": b"" for n in range(26_000)} | {INFO: METADATA})),
}  # fmt: skip


def requiring(python: bytes) -> bytes:
    return of(META(b"\n\n", b"\nRequires-Python: " + python + b"\n\n"))


ZIPS = [
    *(row(name, make, 400, "broken") for name, make in BROKEN_ZIPS.items()),
    row("no Name", lambda: of(b"Version: 2.0\n\n"), 400, "name"),
    row("no Version", lambda: of(b"Name: acme\n\n"), 400, "version"),
    row("an empty METADATA", lambda: of(b""), 400, "name"),
    row("METADATA of NUL", lambda: of(bytes(5000)), 400, "name"),
    row("METADATA in UTF-16", lambda: of(METADATA.decode().encode("utf-16")), 400, "name"),
    row("another Name", lambda: of(META(b"acme", b"evil")), 400, "evil"),
    row("another Version", lambda: of(META(b"2.0", b"9.0")), 400, "9.0"),
    row("Name of 1 MB", lambda: of(META(b"acme", b"a" * MB)), 400, "metadata"),
    row("Version of 1 MB", lambda: of(META(b"2.0", b"9" * MB)), 400, "metadata"),
    row("a Name after a vertical tab", lambda: of(b"S: a\x0bName: acme\nVersion: 2.0"), 400, "name"),
    row("a Name after a form feed", lambda: of(b"S: a\x0cName: acme\nVersion: 2.0"), 400, "name"),
    row("a Name after U+2028", lambda: of(b"S: a\xe2\x80\xa8Name: acme\nVersion: 2.0"), 400, "name"),
    row("a Name in the text", lambda: of(b"S: a\n\nName: acme\nVersion: 2.0"), 400, "name"),
    *(
        row(f"Requires-Python {what}", partial(requiring, text), 400, "python")
        for what, text in (
            ("of 3 MB", b">=3.8" + b",!=3.9" * 500_000),
            ("of 2 KB", b">=3.8" + b",!=3.9" * 330),
            ("in words", b"three and a bit"),
            ("with markup", b">=3.8<script>"),
            ("without an operator", b"3.8"),
            ("with a bad operator", b"=>3.8"),
        )
    ),
]  # fmt: skip

BROKEN_TARS: dict[str, Callable[[], bytes]] = {
    "an sdist of no bytes": lambda: upload(b"", "acme-2.0.tar.gz"),
    "an sdist of text": lambda: upload(b"text " * 99, "acme-2.0.tar.gz"),
    "a tar not packed": lambda: upload(PKG_INFO * 3, "acme-2.0.tar.gz"),
    "a cut gzip": lambda: upload(sdist()[:60], "acme-2.0.tar.gz"),
    "a damaged gzip": lambda: upload(sdist()[:40] + b"\xff" * 90, "acme-2.0.tar.gz"),
    "only a gzip header": lambda: upload(sdist()[:10], "acme-2.0.tar.gz"),
    "an empty tar": lambda: only(),
    "no PKG-INFO": lambda: only(member("acme-2.0/a")),
    "PKG-INFO too deep": lambda: only(member("a/b/PKG-INFO", METADATA)),
    "PKG-INFO at the top": lambda: only(member("PKG-INFO", METADATA)),
    "../PKG-INFO": lambda: only(member("../PKG-INFO", METADATA)),
    "/a/PKG-INFO": lambda: only(member("/a/PKG-INFO", METADATA)),
    "PKG-INFO is a link": lambda: only(member("a/PKG-INFO", kind=b"2", linkname="/etc/passwd")),
    "PKG-INFO is a hard link": lambda: only(member("a/PKG-INFO", kind=b"1", linkname="b")),
    "PKG-INFO is a device": lambda: only(member("a/PKG-INFO", kind=b"3")),
    "PKG-INFO is a FIFO": lambda: only(member("a/PKG-INFO", kind=b"6")),
    "PKG-INFO of 5 MB": lambda: only(member("a/PKG-INFO", METADATA + bytes(5 * MB))),
    "pax of 8 MiB of digits": lambda: bad_sdist(pax(b"1" * (8 << 20))),
    "global pax of digits": lambda: bad_sdist(pax(b"1" * (1 << 20), b"g")),
    "Solaris pax of digits": lambda: bad_sdist(pax(b"1" * (1 << 20), b"X")),
    "pax of spaces": lambda: bad_sdist(pax(b" " * (1 << 20))),
    "pax with a size below 0": lambda: bad_sdist(pax(record("size", "-512"))),
    "pax with a huge size": lambda: bad_sdist(pax(record("size", "9" * 4000))),
    "pax that names PKG-INFO": lambda: only(pax(record("path", "../PKG-INFO")), PKG_INFO),
    "global pax, 2,000 members": lambda: bad_sdist(many_records(8 << 20), *[member("acme-2.0/a")] * 2000),
    "pax headers in a row": lambda: bad_sdist(*[pax(record("a", "b"))] * 20_000),
    "nested long names": lambda: bad_sdist(*[member("n", bytes(8 << 20), b"L")] * 40, member("r", random_bytes(4 * MB))),
    "nested long links": lambda: bad_sdist(*[member("n", bytes(8 << 20), b"K")] * 40, member("r", random_bytes(4 * MB))),
    "short long names in a row": lambda: bad_sdist(*[member("n", b"a", b"L")] * 20_000),
    "a long name of 1 MB": lambda: bad_sdist(member("n", b"a" * MB, b"L")),
    "a sparse map of 60 MB": lambda: bad_sdist(sparse(15_000_000)),
    "a small sparse map": lambda: bad_sdist(sparse(3)),
    "an old sparse member": lambda: only(changed(member("a", kind=b"S"), 482, b"\1"), PKG_INFO),
    "a size below 0": lambda: bad_sdist(raw_size(b"\xff" * 12)),
    "a size of 2**80": lambda: bad_sdist(raw_size(b"\x80\1" + bytes(10))),
    "a size in words": lambda: bad_sdist(raw_size(b"large")),
    "200,000 members": lambda: bad_sdist(*[member("acme-2.0/a")] * 200_000),
    "a tar of 900 MB of zeros": lambda: bad_sdist(member("z", bytes(90 * MB)), *[bytes(90 * MB)] * 9),
    "a zip as an sdist": lambda: upload(GOOD, "acme-2.0.tar.gz"),
    "a wheel as a .zip": lambda: upload(GOOD, "acme-2.0.zip"),
}  # fmt: skip

TARS = [
    row("pax of a huge record", lambda: bad_sdist(pax(b"9" * 4000 + b" a=b\n")), (200, 400), "broken|stored"),
    row("pax of records of no length", lambda: bad_sdist(pax(b"0 a=b\n" * 9999)), (200, 400), "broken|stored"),
    row("pax of 60 KB of digits", lambda: bad_sdist(pax(b"1" * 60_000)), (200, 400), "broken|stored"),
    *(row(name, make, 400, "broken") for name, make in BROKEN_TARS.items()),
    row("PKG-INFO of another", lambda: only(member("a/PKG-INFO", META(b"acme", b"evil"))), 400, "evil"),
]  # fmt: skip

NAMES = [
    row(f"the file name {name[:30]!r}", partial(upload, GOOD, name), 400, "pep")
    for name in (
        "../../etc/passwd", "..", ".", "/etc/passwd", "a\\..\\b.whl", "C:\\acme-2.0.tar.gz",
        ".htaccess", ".pypi_ae/facts", "acme.whl", "acme-2.0.whl", "a-b-c-d.whl", "-2.0.zip",
        "acme-2.0.exe", "acme-2.0.tar.bz2", "acme-2.0-py3.8.egg", "acme-2.0.tar.gz.asc",
        "acme-2.0.tar.gz.yanked", f"{NEW}.metadata", "acme-two.tar.gz", "acme-1..0.tar.gz",
        "acme 2.0.tar.gz", "acme-2.0.tar.gz\0.whl", "acm\u00e9-2.0.tar.gz", "a" * 300 + "-1.0.zip",
        "acme-" + "9" * 190 + ".tar.gz.", "<script>-1.0.zip", "%2e%2e-1.0.zip",
        "acme-1.0-py3-none-any.WHL", "_acme-1.0.zip", "acme-2.0.tar.gz ", "acme--2.0-.zip",
    )
]  # fmt: skip

DISPOSITION = "Content-Disposition: form-data; name="
FORMS = [
    row("no Content-Type", lambda: post(form(REMOVE), kind=""), 400, "content-type"),
    row("a form of JSON", lambda: post(b"{}", kind="application/json"), 400, "content-type"),
    row("no boundary", lambda: post(form(REMOVE), kind="multipart/form-data"), 400, "multipart"),
    row("an empty boundary", lambda: post(form(REMOVE), kind='multipart/form-data; boundary=""'), 400, "boundary"),
    row("a boundary of 71 letters", lambda: post(form(REMOVE), kind=f"multipart/form-data; boundary={'b' * 71}"), 400, "boundary"),
    row("a boundary of 4 KB", lambda: post(form(REMOVE), kind=f"multipart/form-data; boundary={'b' * 4000}"), 400, "boundary"),
    row("a boundary after 8 KB of ;", lambda: post(b"", kind="multipart/form-data;" + "; " * 4000 + "x"), SERVERS_OWN, ""),
    row("4 KB of boundary=", lambda: post(b"", kind="multipart/form-data" + ";boundary= " * 390), 400, "boundary"),
    row("a boundary after 8 KB of spaces", lambda: post(b"", kind="multipart/form-data;" + " " * 8000 + "x"), SERVERS_OWN, ""),
    row("another boundary", lambda: post(form(REMOVE), kind="multipart/form-data; boundary=b1"), 400, "form"),
    row("a form of no bytes", lambda: post(b""), 400, "form"),
    row("a form without an end", lambda: post(REMOVE), 400, "form"),
    row("a form that is only its end", lambda: post(END), 400, "action"),
    row("a preamble of 9 MB", lambda: post(b"p" * 9 * MB + b"\r\n" + form(REMOVE)), LARGE, "form"),
    row("8 MB of line breaks", lambda: post(b"\r\n" * 4 * MB), LARGE, "form"),
    row("8 MB of half boundaries", lambda: post(b"\r\n--b" * (8 * MB // 5)), LARGE, "form"),
    row("10 MB of half boundaries in a field", lambda: post(form(part("x", b"\r\n--b" * 2 * MB))), 413, "field"),
    row("text after the boundary", lambda: post(b"--b0 text\r\n" + form(REMOVE)), 400, "boundary"),
    row("300 spaces after the boundary", lambda: post(b"--b0" + b" " * 300 + b"\r\n" + form(REMOVE)), 400, "boundary"),
    row("a part without headers", lambda: post(b"--b0\r\n\r\nx\r\n" + END), 400, "part"),
    row("a part without a name", lambda: post(b"--b0\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END), 400, "part"),
    row("a name only inside quotes", lambda: post(b'--b0\r\nContent-Disposition: form-data; x="; name=y"\r\n\r\nx\r\n' + END), 400, "part"),
    row("an attachment", lambda: post(b"--b0\r\nContent-Disposition: attachment; name=x\r\n\r\nx\r\n" + END), 400, "part"),
    row("two dispositions", lambda: post(form(part("x", "1", f"{DISPOSITION}y"))), 400, "part"),
    row("a part in base64", lambda: post(form(part("x", "1", "Content-Transfer-Encoding: base64"))), 400, "part"),
    row("a part in quoted-printable", lambda: post(form(part("x", "1", "Content-Transfer-Encoding: quoted-printable"))), 400, "part"),
    row("an encoding of 8 KB of spaces", lambda: post(form(part("x", "1", "Content-Transfer-Encoding:" + " " * 8000 + "x"))), LARGE, "part"),
    row("a disposition of 8 KB of ;", lambda: post(form(part("x", "1", f"{DISPOSITION}y{'; ' * 3900}"))), LARGE, "part"),
    row("9 KB of part headers", lambda: post(form(part("x", "1", "X: " + "x" * 9000))), 413, "form"),
    row("9 MB of part headers", lambda: post(form(part("x", "1", "X: " + "x" * 9 * MB))), 413, "form"),
    row("4,000 headers of a part", lambda: post(form(part("x", "1", *["X:"] * 4000))), 413, "form"),
    row("3,000 parts", lambda: post(form(*[part("x", "1")] * 3000)), 413, "form"),
    row("100,000 parts", lambda: post(form(*[part("x", "1")] * 100_000)), 413, "form"),
    row("a field of 5 MB", lambda: post(form(part("version", b"x" * 5 * MB))), 413, "field"),
    row("9 MB of fields", lambda: post(form(*[part("x", b"x" * MB)] * 9)), 413, "field"),
    row("an upload of no file", lambda: post(form(ACTION)), 400, "content"),
    row("a file without a name", lambda: post(form(ACTION, part("content", GOOD))), 400, "content|filename"),
    row("a file with an empty name", lambda: upload(GOOD, ""), 400, "content|filename"),
    row("two files", lambda: post(form(ACTION, *[part("content", GOOD, file=NEW)] * 2)), 400, "two files"),
    row("no :action", lambda: post(form(part("name", "acme"))), 400, "action"),
    row("an unknown :action", lambda: post(form(part(":action", "format_disk"))), 400, "action"),
    row("an :action of 4 MB", lambda: post(form(part(":action", "x" * 4_000_000))), LARGE, "action"),
    row("an :action of 3 MB of NUL", lambda: post(form(part(":action", bytes(3 * MB)))), LARGE, "action"),
    row("two :action", lambda: post(form(REMOVE, ACTION)), 400, "action"),
    row("an :action in Latin-1", lambda: post(form(part(":action", b"\xe9"))), 400, "action"),
    row("a field name of 8 KB", lambda: post(form(part("x" * 8000, b"x" * 9 * MB))), 413, "field"),
    row("remove: no version", lambda: post(form(REMOVE, part("name", "acme"))), 400, "version"),
    row("remove: no name", lambda: post(form(REMOVE, part("version", "1.0"))), 400, "name"),
    row("remove: name ../..", lambda: post(form(REMOVE, part("name", "../.."), part("version", "1"))), 400, "name"),
    row("remove: name of 4 MB", lambda: post(form(REMOVE, part("name", "a" * 4_000_000), part("version", "1"))), LARGE, "name"),
    row("remove: name of 4 MB of dots", lambda: post(form(REMOVE, part("name", "a" + "." * 4_000_000), part("version", "1"))), LARGE, "name"),
    row("remove: version of 4 MB", lambda: post(form(REMOVE, part("name", "acme"), part("version", HUGE))), (400, 404, 413), "not found|too long"),
    row("remove: version 1.1.1...", lambda: post(form(REMOVE, part("name", "acme"), part("version", "1." * 2_000_000))), (400, 404, 413), "not found|too long"),
    row("remove: unknown project", lambda: post(form(REMOVE, part("name", "nobody"), part("version", "1"))), 404, "nobody"),
    row("upload: name of 4 MB", lambda: upload(GOOD, name=b"a" * 4_000_000), LARGE, "name"),
    row("upload: version of 4 MB", lambda: upload(GOOD, version=HUGE), LARGE, "version"),
    row("upload: another name", lambda: upload(GOOD, name="evil"), 400, "evil"),
    row("upload: another version", lambda: upload(GOOD, version="9.9"), 400, "9.9"),
    row("upload: another filetype", lambda: upload(GOOD, filetype="sdist"), 400, "filetype"),
    row("upload: filetype of 4 MB", lambda: upload(GOOD, filetype="x" * 4_000_000), LARGE, "filetype"),
    row("upload: a wrong sha256", lambda: upload(GOOD, sha256_digest="0" * 64), 400, "sha256"),
    row("upload: a wrong md5", lambda: upload(GOOD, md5_digest="0" * 32), 400, "md5"),
    row("upload: sha256 of 4 MB", lambda: upload(GOOD, sha256_digest="0" * 4_000_000), LARGE, "sha256"),
    row("upload: blake2 in words", lambda: upload(GOOD, blake2_256_digest="none"), 400, "blake2"),
    row("upload: other bytes of a file", lambda: upload(wheel(b"Name: acme\nVersion: 1.0\nX: 1\n\n"), WHEEL), (400, 409), "already exists"),
    row("urlencoded: an upload", lambda: post(b":action=file_upload&content=x", kind=URLENCODED), 400, "content|filename"),
    row("urlencoded: nothing", lambda: post(b"", kind=URLENCODED), 400, "action"),
    row("urlencoded: 9 MB", lambda: post(b"a=" + b"x" * 9 * MB, kind=URLENCODED), LARGE, "form"),
    row("urlencoded: a million fields", lambda: post(b"a=1&" * MB, kind=URLENCODED), LARGE, "form"),
    row("urlencoded: 4 MB of %", lambda: post(b"%" * 4 * MB, kind=URLENCODED), LARGE, ""),
    row("no Content-Length", lambda: get("/", LOGIN, f"Content-Type: {MULTIPART}", method="POST"), 411, "content-length"),
    row("a Content-Length in words", lambda: get("/", LOGIN, "Content-Length: many", method="POST"), SERVERS_OWN, ""),
    row("a Content-Length below 0", lambda: get("/", LOGIN, "Content-Length: -1", method="POST"), SERVERS_OWN, ""),
    row("a Content-Length of 1 TB", lambda: get("/", LOGIN, f"Content-Type: {MULTIPART}", "Content-Length: 1000000000000", method="POST"), 413, "upload"),
    row("a Content-Length of 1 TB without a user", lambda: get("/", f"Content-Type: {MULTIPART}", "Content-Length: 1000000000000", method="POST"), 401, "user"),
    row("a search of 9 KB", lambda: rpc(b" " * 9000), 413, "long"),
    row("a search of text", lambda: rpc(b"text"), 400, "xml"),
    row("a search with a DTD", lambda: rpc(b'<!DOCTYPE a [<!ENTITY b "' + b"x" * 999 + b'">]><a>' + b"&b;" * 999 + b"</a>"), 400, "xml"),
    row("a search in UTF-16", lambda: rpc("<!DOCTYPE a><a/>".encode("utf-16")), 400, "xml"),
    row("a search 1,000 deep", lambda: rpc(b"<methodCall><params><param>" + b"<value><array><data>" * 390), 400, "xml"),
    row("a search for a huge number", lambda: rpc(b"<methodCall><methodName>search</methodName><params><param><value><int>" + b"9" * 7000 + b"</int></value></param></params></methodCall>"), 400, "xml"),
    row("a search for another method", lambda: rpc(b"<methodCall><methodName>system.listMethods</methodName><params/></methodCall>"), 400, "xml"),
]  # fmt: skip

ACCEPTS = (
    "text/plain",
    "text/html;q=0",
    "*/*;q=0",
    "image/*, text/css",
    "text/html;q=x",
    ";;;,",
    "a" * 900,
)
HEADERS = [
    *(row(f"Accept: {text[:30]}", get("/simple/acme/", f"Accept: {text}"), 406, "accept") for text in ACCEPTS),
    row("Accept of 7 KB", lambda: get("/simple/acme/", "Accept: " + "a/b," * 1800), (406, *SERVERS_OWN), ""),
    row("Accept of 60 KB", lambda: get("/simple/acme/", "Accept: " + "a/b," * 15_000), (406, *SERVERS_OWN), ""),
    row("Accept of 5 MB, folded", lambda: get("/simple/acme/", "Accept: a" + "\r\n b" * 20 + ("\r\n " + "x" * 60_000) * 70), (406, *SERVERS_OWN), ""),
    row("?format of another type", get("/simple/acme/?format=text/css"), 406, "accept"),
    row("a range beyond the end", get(FILE, "Range: bytes=999999-"), 416, "range"),
    row("a range far beyond the end", get(FILE, f"Range: bytes={'9' * 18}-"), 416, "range"),
    row("a range of the last 0 bytes", get(FILE, "Range: bytes=-0"), 416, "range"),
    row("a range of 4,000 digits", get(FILE, f"Range: bytes={'9' * 4000}-"), (200, 416), ""),
    row("1,000 ranges", get(FILE, "Range: bytes=" + ",".join(["0-"] * 1000)), 200, ""),
    row("a range of 7 KB of digits and -", get(FILE, "Range: bytes=" + "1-" * 3500), 200, ""),
    row("If-None-Match of 7 KB of quotes", get(FILE, "If-None-Match: " + '"' * 7000), (200, *SERVERS_OWN), ""),
    row("If-None-Match of 5 MB, folded", lambda: get(FILE, "If-None-Match: a" + ("\r\n " + '"' * 60_000) * 70), (200, *SERVERS_OWN), ""),
    row("200 headers", lambda: get("/", *(f"X-{n}: 1" for n in range(200))), SERVERS_OWN, ""),
    row("a header of 1 MB", lambda: get("/simple/acme/", "X: " + "x" * MB), (*SERVERS_OWN, 200), ""),
    row("a header without a colon", get("/simple/none/", "nonsense"), (400, 404), ""),
    row("no user", post(form(REMOVE), login=""), 401, "user"),
    row("another scheme", post(form(REMOVE), login="Authorization: Bearer abc"), 401, "basic"),
    row("Basic of no base64", post(form(REMOVE), login="Authorization: Basic $$$$"), 401, "basic"),
    row("Basic without a colon", post(form(REMOVE), login="Authorization: Basic YWJj"), 401, "basic"),
    row("Basic of 6 KB", post(form(REMOVE), login=basic("u:" + "x" * 4500)), 401, "basic"),
    row("an unknown user", post(form(REMOVE), login=basic("mallory:x")), (401, 429), "password"),
    row("a wrong password", post(form(REMOVE), login=basic("eve:x")), (401, 429), "password"),
    row("a password with NUL", post(form(REMOVE), login=basic("eve:sec\0ret")), (401, 429), "password"),
    row("a user of 2 KB", post(form(REMOVE), login=basic("e" * 2000 + ":x")), (401, 429), "password"),
    row("a user of control letters", post(form(REMOVE), login=basic("\r\n\x1b[2J:x")), (401, 429), "password"),
    row("a post from another site", post(form(REMOVE, part("name", "acme"), part("version", "9")), "Origin: https://evil.example"), 403, "site"),
    row("a post that says cross-site", post(form(REMOVE, part("name", "acme"), part("version", "9")), "Sec-Fetch-Site: cross-site"), 403, "site"),
    row("a post from Origin null", post(form(REMOVE, part("name", "acme"), part("version", "9")), "Origin: null"), 403, "site"),
]  # fmt: skip

PATHS = [
    *(
        row(f"the path {path[:40]}", get(path), (*SERVERS_OWN, 404), "")
        for path in (
            "/packages/acme/../../etc/passwd", "/packages/../users", "/packages/%2e%2e/users",
            "/packages/acme/..%2f..%2fusers", "/packages/acme/%2e%2e%2f%2e%2e%2fusers",
            "/packages/acme/..%5c..%5cusers", "/packages/acme/%252e%252e%252fusers",
            "/packages/acme/%c0%ae%c0%ae%c0%afusers", "/packages/acme/%00", "/packages/%00/x",
            f"{FILE}%00", f"{FILE}%0d%0aX-Evil:1", f"{FILE}/", f"{FILE}.metadata.metadata",
            f"{FILE}.yanked", f"{FILE}.asc", f"/packages/evil/{WHEEL}",
            "/packages/.pypi_ae/facts", "/packages/.pypi_ae/staging", "/packages/acme/.pypi_ae",
            "/packages/htpasswd.txt", "/packages/acme/", "/packages/acme/" + "a" * 900,
            "/simple/../users/", "/simple/%2e%2e/", "/simple/.pypi_ae/", "/simple/-acme/",
            "/simple/acme%00/", "/simple/acme%0a/", "/simple/acm%e9/", "/simple/%ff%fe/",
            "/simple/acme/more/", "/simple/nobody/", "/simple/" + "a" * 300 + "/", "/simple//",
            "/simple/<script>/", "/simple/%3Cscript%3E/", "/pypi/acme/9.9/json", "/pypi/nobody/json",
            "/pypi/acme/" + "9" * 900 + "/json", "/pypi/acme/" + "1." * 400 + "/json", "/pypi/../json",
            "/" + "a" * 1500, "/" + "%41" * 1200, "/" + "a/" * 500, "/favicon.ico",
            "/robots.txt", "/.git/config", "/.env", "/packages/packages/x-1.zip",
        )
    ),
    row("two slashes first", get(f"/{FILE}"), (200, 404), ""),  # wsgiref makes them one
    row("1,000 slashes", get("/" * 1000), (200, 404), ""),
    row("a path of 60 KB", lambda: get("/" + "a" * 60_000), SERVERS_OWN, ""),
    row("a path of 5 MB", lambda: get("/" + "a" * 5 * MB), SERVERS_OWN, ""),
    row("a path without a slash", get("simple"), (*SERVERS_OWN, 404), ""),
    row("a query of 3 KB of an unknown name", get("/simple/nobody/?" + "a=1&" * 700), 404, "nobody"),
    row("a format of 3 KB", get("/simple/acme/?format=" + "a" * 3000), (406, *SERVERS_OWN), ""),
    *(
        row(f"the method {method[:20]}", get("/simple/acme/", method=method), (400, 405, 501), "")
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "G" * 900)
    ),
    row("POST to a page", post(form(REMOVE), path="/simple/acme/"), 405, "not allowed"),
    row("POST to a file", post(form(REMOVE), path=FILE), 405, "not allowed"),
    row("PUT of a file", get(f"/packages/acme/{NEW}", LOGIN, method="PUT"), 405, "not allowed"),
    row("DELETE of a file", get(FILE, LOGIN, method="DELETE"), 405, "not allowed"),
    row("POST to nowhere", post(form(REMOVE), path="/upload/x"), (404, 405), ""),
    row("HTTP/9.9", b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", (0, 400, 505), ""),
    row("no HTTP at all", b"\x16\x03\x01" + bytes(300) + b"\r\n\r\n", (0, 400, 404, 405), ""),
]  # fmt: skip

ROWS = [*ZIPS, *TARS, *NAMES, *FORMS, *HEADERS, *PATHS]


class Result(NamedTuple):
    status: int
    seconds: float
    waited: float  # by the other client
    grown: int  # bytes
    peak: int  # bytes more than before while it was answered
    sentence: str
    wrong: list[str]


def try_row(server: Server, case: Row) -> Result:
    data = case.make if isinstance(case.make, bytes) else case.make()
    server.reset()
    before = server.peak
    status, body = send(server.port, data)
    seconds, waited = time.monotonic() - server.since, server.waiting()
    waited, bound = max(server.longest, waited), FACTOR * (1 + 2 * len(data) / MB)
    grown, peak = server.memory() - before, max(server.peak - before, 0)
    sentence = body.decode("utf-8", "replace")
    checks = {
        f"status {status}, not {case.statuses}": status in case.statuses,
        f"no {case.word!r} in {sentence[:150]!r}": re.search(
            case.word, sentence.lower()
        ),
        f"a sentence of {len(body)} bytes": status == 200 or len(body) < 4000,
        f"{seconds:.1f} s, not {bound:.1f}": seconds < bound,
        f"another client waited {waited:.1f} s": waited < bound,
        f"memory grew by {grown / MB:.0f} MB": grown < GROWTH + 5 * len(data),
        f"memory grew for a while by {peak / MB:.0f} MB": peak < GROWTH + 9 * len(data),
    }
    wrong = [why for why, right in checks.items() if not right]
    if status == 200:  # it was taken, so the next row would find the file there
        send(
            server.port,
            post(form(REMOVE, part("name", "acme"), part("version", "2.0"))),
        )
    return Result(status, seconds, waited, grown, peak, sentence[:100], wrong)


# ---- Floods --------------------------------------------------------------------------
# Many requests at once, or one after another. Each function says what it costs, and
# whether that is right.

Effect = tuple[str, bool]


def times(server: Server, data: bytes, count: int, at_once: int = 8) -> list[int]:
    """Send the same request again and again; return the statuses."""
    with ThreadPoolExecutor(at_once) as pool:
        return [s for s, _ in pool.map(lambda _: send(server.port, data), range(count))]


def pages_in_time(server: Server) -> int:
    """How many of six pages are answered within ten seconds each?"""
    page = get("/simple/acme/")
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda _: send(server.port, page, 10), range(6))
        return sum(status == 200 for status, _ in answers)


@contextlib.contextmanager
def trickling(server: Server, head: bytes) -> Iterator[None]:
    """100 posts that send a byte every five seconds."""
    with contextlib.ExitStack() as stack:
        address, done = ("127.0.0.1", server.port), threading.Event()
        socks = [socket.create_connection(address) for _ in range(100)]
        for sock in socks:
            stack.enter_context(sock)
            sock.sendall(head)

        def trickle() -> None:
            while not done.wait(5):
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        stack.callback(thread.join)
        stack.callback(done.set)
        time.sleep(2)
        yield


def trickle_without_user(server: Server) -> Effect:
    head = get(
        "/", f"Content-Type: {MULTIPART}", "Content-Length: 99999", method="POST"
    )
    with trickling(server, head):
        answered = pages_in_time(server)
    return f"{answered} of 6 pages answered", answered == 6


def trickle_with_user(server: Server) -> Effect:
    """A body has a least rate, so the threads are free again after a while."""
    fields = (f"Content-Type: {MULTIPART}", "Content-Length: 99999", LOGIN)
    with trickling(server, get("/", *fields, method="POST")):
        began = time.monotonic()
        status, _ = send(server.port, get("/simple/acme/"), 120)
        seconds = time.monotonic() - began
    return f"a page after {seconds:.0f} s: {status}", status == 200 and seconds < 100


def guess_passwords(server: Server) -> Effect:
    began, statuses = time.monotonic(), []
    while time.monotonic() - began < 5:
        statuses += times(server, post(form(REMOVE), login=basic("eve:guess")), 16)
    rate = statuses.count(401) / (time.monotonic() - began)
    right = send(server.port, post(form(REMOVE)))[0]
    text = f"{rate:.0f} guesses a second, {statuses.count(429)} refused as too many"
    return (
        f"{text}; a right login: {right}",
        429 in statuses and right == 400 and rate < 10,
    )


def guess_many_users(server: Server) -> Effect:
    before, rest = server.memory(), 600
    with ThreadPoolExecutor(200) as pool:
        logins = (basic(f"{n}{'u' * 900}:x") for n in range(rest))
        posts = (post(form(REMOVE), login=login) for login in logins)
        statuses = [s for s, _ in pool.map(lambda data: send(server.port, data), posts)]
    grown, waited = server.memory() - before, server.longest
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    text = f"{counts}; {grown / MB:.0f} MB; another client waited {waited:.1f} s"
    return text, waited < 2 * FACTOR and grown < 30 * MB


def post_long_versions(server: Server) -> Effect:
    before, statuses = server.memory(), set()
    for number in range(20):
        for key in ("version", "name"):
            values = {"name": part("name", "acme"), "version": part("version", "1")}
            values[key] = part(key, f"{number}" + "1" * 4_000_000)
            statuses.add(send(server.port, post(form(REMOVE, *values.values())))[0])
    grown = server.memory() - before
    return f"{grown / MB:.0f} MB for good; answers {statuses}", grown < GROWTH


def fold_headers(server: Server) -> Effect:
    """What is kept for long grows with each; the C library keeps 40 MB of the first."""
    before, statuses = server.memory(), set()
    for number in range(10, 70):
        lines = ("\r\n " + f"{number}x" * 20_000) * 75
        data = get("/simple/acme/", f"Accept: */*,a{lines}")
        statuses.add(send(server.port, data)[0])
    grown = server.memory() - before
    return f"{grown / MB:.0f} MB for good; answers {statuses}", grown < 2 * GROWTH


def require_python(server: Server) -> Effect:
    status, _ = send(server.port, requiring(b">=3.8" + b",!=3.9" * 500_000))
    page = len(send(server.port, get("/simple/acme/"))[1])
    return f"{status}; a page of {page:,} bytes", status == 400 and page < 9999


def list_all_files(server: Server) -> Effect:
    """20,000 files in 200 projects."""
    for project in range(200):
        (folder := server.root / f"p{project}").mkdir()
        for version in range(100):
            (folder / f"p{project}-{version}.tar.gz").touch()
    body = b"<methodCall><methodName>search</methodName><params><param><value><struct>"
    body += b"<member><name>name</name><value><string>p199</string></value></member>"
    body += b"</struct></value></param></params></methodCall>"
    files, search = least(server, get("/packages/")), least(server, rpc(body))
    text = f"/packages/ {files * 1000:.0f} ms, a search {search * 1000:.0f} ms each"
    return text, max(files, search) < 0.03 * FACTOR


def least(server: Server, data: bytes) -> float:
    """The least seconds of ten requests, as other work makes some slower."""
    seconds = []
    for _ in range(10):
        began = time.monotonic()
        assert send(server.port, data)[0] == 200
        seconds.append(time.monotonic() - began)
    return min(seconds)


def stage_bad_name(server: Server) -> Effect:
    """30 MB, in pieces, under a file name that cannot be right."""
    data, most = upload(random_bytes(30 * MB), "acme-2.0.exe"), 0
    with socket.create_connection(("127.0.0.1", server.port), 30) as sock:
        for start in range(0, len(data), MB):
            with contextlib.suppress(OSError):  # it has answered
                sock.sendall(data[start : start + MB])
            most = max(most, server.staged())
        answer = sock.recv(999)[:12].decode()
    return f"{answer}; {most / MB:.0f} MB staged", "400" in answer and most < MB


def act_at_length(server: Server) -> Effect:
    before = server.log.stat().st_size
    status, body = send(server.port, post(form(part(":action", bytes(4_000_000)))))
    logged = server.log.stat().st_size - before
    text = f"{status}; an answer of {len(body):,} and a log of {logged:,} bytes"
    return text, len(body) < 4000 and logged < 4000


class PlayedBucket(BaseHTTPRequestHandler):
    """A bucket with one object, which counts how often it is listed."""

    lists = 0

    def do_GET(self) -> None:
        type(self).lists += 1
        item = {"name": f"packages/acme/{WHEEL}", "size": "9", "generation": "1"}
        item |= {"metageneration": "1", "updated": "2026-01-01T00:00:00Z"}
        item |= {
            "timeCreated": "2026-01-01T00:00:00Z",
            "md5Hash": "kAFQmDzST7DWlj99KOF/cg==",
        }
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        answer: dict[str, Any] = {"items": [item] if prefix in item["name"] else []}
        if prefix == "packages/":
            answer["prefixes"] = ["packages/acme/"]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def list_bucket(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Unknown names, /packages/ and searches, and how often each lists the bucket."""
    with contextlib.ExitStack() as stack:
        bucket = ThreadingHTTPServer(("127.0.0.1", 0), PlayedBucket)
        stack.callback(bucket.server_close)
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        stack.callback(bucket.shutdown)
        host = f"http://127.0.0.1:{bucket.server_port}"
        yield from ask_bucket(path, host)


def ask_bucket(path: Path, host: str) -> Iterator[tuple[str, str, bool]]:
    names = (get(f"/simple/nobody{number}/") for number in range(500))
    body = b"<methodCall><methodName>search</methodName><params><param><value><struct/>"
    body += b"</value></param></params></methodCall>"
    cases = {
        "500 unknown names": list(names),
        "50 times /packages/": [get("/packages/")] * 50,
        "50 searches": [rpc(body)] * 50,
    }
    with serve(path, BUCKET_NAME="b", STORAGE_EMULATOR_HOST=host) as server:
        for name, requests in cases.items():
            before, began = PlayedBucket.lists, time.monotonic()
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda data: send(server.port, data), requests))
            seconds, lists = time.monotonic() - began, PlayedBucket.lists - before
            statuses = {status for status, _ in answers}
            text = f"{lists} lists in {seconds:.1f} s; {statuses}"
            yield f"a bucket: {name}", text, lists <= 4 + 2 * seconds


FLOODS: dict[str, Callable[[Server], Effect]] = {
    "100 posts that trickle, without a user": trickle_without_user,
    "100 posts that trickle, with a user": trickle_with_user,
    "guesses of one password": guess_passwords,
    "guesses for many users": guess_many_users,
    "40 names and versions of 4 MB": post_long_versions,
    "60 folded headers of 4 MB (wsgiref)": fold_headers,
    "Requires-Python of 3 MB": require_python,
    "20,000 files": list_all_files,
    "a bad file name": stage_bad_name,
    "an :action of 4 MB of NUL": act_at_length,
}


def flood(path: Path, name: str) -> Effect:
    """Run one flood against a server of its own."""
    kind = "wsgiref" if "wsgiref" in name else "gunicorn"
    with watched(path, kind) as server:
        return FLOODS[name](server)


@contextlib.contextmanager
def watched(path: Path, kind: str = "gunicorn") -> Iterator[Server]:
    """A server, and another client that asks for a page all the time."""
    with serve(path, kind) as server:
        watcher = threading.Thread(target=server.watch)
        watcher.start()
        try:
            yield server
        finally:
            server.stop.set()
            watcher.join()


def try_rows(path: Path, kind: str, rows: list[Row]) -> Iterator[tuple[str, str, bool]]:
    """Send rows to one server, and say of each what it did."""
    if not rows:
        return
    with watched(path, kind) as server:
        start = server.memory()
        for case in rows:
            result = try_row(server, case)
            text = (
                f"{result.status} {result.seconds:5.2f} s, other {result.waited:.2f} s"
            )
            text += f", {result.grown / MB:+.0f} MB, peak {result.peak / MB:+.0f} MB  {'; '.join(result.wrong)}"
            yield case.name, text, not result.wrong
        grown = server.memory() - start
        yield "memory after all rows", f"{grown / MB:+.0f} MB", grown < 2 * GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=HERE.parent)
    parser.add_argument("--server", choices=("gunicorn", "wsgiref"), default="gunicorn")
    parser.add_argument("words", nargs="*", metavar="WORD", help="of names")
    given, bad = parser.parse_args(), 0
    path = given.path.resolve()

    def is_wanted(name: str) -> bool:
        return not given.words or any(word in name for word in given.words)

    outcomes = itertools.chain(
        try_rows(path, given.server, [case for case in ROWS if is_wanted(case.name)]),
        ((name, *flood(path, name)) for name in filter(is_wanted, FLOODS)),
        list_bucket(path) if is_wanted("a bucket") else (),
    )
    for name, text, good in outcomes:
        print(f"{'ok ' if good else 'BAD'} {name[:44]:44} {text}", flush=True)
        bad += not good
    print(f"{bad} are wrong")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
