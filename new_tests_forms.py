"""New tests of sections 3, 6 and 13, of reading bodies, and of early answers."""

# ruff: noqa: F401, F811 - fixtures are imported
from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

import pypi_ae
import test_pypi_ae
from test_pypi_ae import (
    ACTION,
    ARCHIVES,
    FILE,
    GOOD,
    HEAD,
    INFO,
    JSON,
    META,
    METADATA2,
    MULTIPART,
    NAME,
    PUBLISH,
    REMOVE,
    S2,
    SDIST,
    SERVERS,
    URLENCODED,
    VERSION,
    W2,
    WHEEL,
    WHEEL2,
    Bad,
    Body,
    Client,
    Clients,
    Log,
    Patch,
    Server,
    Start,
    _alone,
    add_user,
    bad_part,
    bad_upload,
    basic,
    client,
    clients,
    cut,
    each_publisher,
    encode,
    field,
    login,
    make_app,
    make_metadata,
    make_sdist,
    make_tar,
    make_wheel,
    make_zip,
    now,
    patience,
    read_parts,
    root,
    server,
    shared_server,
    start,
    stocked,
    test_upload_of_a_bad_archive_is_refused,
    upload_form,
    watch,
    words,
    write_sdist,
    write_wheel,
)

# ---- 3. Names and versions -----------------------------------------------------------


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
    assert client.upload(WHEEL, make_wheel(requires_python=python)).status == 200
    assert client.page()["files"][WHEEL]["requires-python"] == python.strip()


@pytest.mark.parametrize("python", BAD_PYTHONS)
def test_requires_python_that_is_not_valid(client: Client, python: str) -> None:
    """It is refused. In a file that was dropped by hand, it is left out."""
    wheel = make_wheel(requires_python=python)
    answer = client.upload(WHEEL, wheel)
    assert (answer.status, "Requires-Python" in answer.reason) == (400, True)
    assert len(answer.body) < 500
    client.drop(WHEEL, wheel)
    entry = client.page()["files"][WHEEL]
    assert ("requires-python" in entry, "core-metadata" in entry) == (False, True)


# ---- 6. Archives ---------------------------------------------------------------------


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


def record(key: str, value: str) -> bytes:
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
        extended(b"g", record("comment", "x" * 8_000_000)),
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
        extended(b"x", record("GNU.sparse.map", "0,1," * 9000)), INFO_MEMBER
    ),
    "pax-size.tar.gz": lambda: tar_of(extended(b"x", record("size", "0")), INFO_MEMBER),
    "renamed-by-pax.tar.gz": lambda: tar_of(
        extended(b"x", record("path", "acme-2.0/other")), INFO_MEMBER
    ),
    "renamed-by-gnu.tar.gz": lambda: tar_of(LONG_NAME, INFO_MEMBER),
    "renamed-twice.tar.gz": lambda: tar_of(
        LONG_NAME, extended(b"x", record("mtime", "1.5")), INFO_MEMBER
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


def large_wheel() -> bytes:
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
    "large.whl": large_wheel,
    "gnu.tar.gz": lambda: make_tar({**LONG, INFO: METADATA2}, **GNU),
    "pax.tar.gz": lambda: make_tar({**LONG, INFO: METADATA2}, **PAX),
    "pax-times.tar.gz": lambda: tar_of(
        extended(b"x", record("mtime", "1.5") + record("comment", "a\nb")), INFO_MEMBER
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


# ---- 9. A directory ------------------------------------------------------------------

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


# ---- 13. Uploads ---------------------------------------------------------------------

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
    hypothesis: Any = pytest.importorskip("hypothesis")
    st: Any = pytest.importorskip("hypothesis.strategies")
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
        multipart: Any = pytest.importorskip("multipart")
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
    return test_pypi_ae.sha256(data).encode()


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


def urlencoded(client: Client, body: str | bytes) -> test_pypi_ae.Answer:
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
    assert test_pypi_ae.wait_until(lambda: len(client.staged) == 8)
    answer = client.send("POST", "/", Unread(form, 0), **MULTIPART)
    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
    assert client.get("/simple/").status == 200
    assert client.send("POST", "/RPC2", test_pypi_ae.call({"name": "a"})).status == 200
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


# ---- Clients and servers -------------------------------------------------------------


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
    who = f"{test_pypi_ae.USER}:{test_pypi_ae.PASSWORD}" if user else ""
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
