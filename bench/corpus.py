"""The corpus: tiny valid wheels, the same bytes on every machine, and upload forms."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FILES_PER_PROJECT = 20
DATE = (2020, 1, 1, 0, 0, 0)  # in every archive, so that its bytes never change
PAYLOAD = 8 * 1024  # makes the newest wheel of a project the 10 KB one we download
BIG = 200 * 1000 * 1000
BIG_PROJECT = "bench-big"


@dataclass(frozen=True)
class Wheel:
    """One wheel: what an upload form says of it, and its bytes or the file of them."""

    project: str
    version: str
    filename: str
    metadata: bytes
    data: bytes | Path

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digests twine sends, by form field."""
        digests: dict[str, Any] = {
            "sha256_digest": hashlib.sha256(),
            "blake2_256_digest": hashlib.blake2b(digest_size=32),
        }
        for chunk in self._chunks():
            for digest in digests.values():
                digest.update(chunk)
        return {field: digest.hexdigest() for field, digest in digests.items()}

    def _chunks(self) -> Iterator[bytes]:
        if isinstance(self.data, bytes):
            yield self.data
            return
        with self.data.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk

    def __len__(self) -> int:
        return (
            len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size
        )


@dataclass(frozen=True)
class Store:
    """A directory of wheels, `<project>/<filename>`; `files` of them."""

    path: Path
    files: int
    only: str = ""  # the project, where there is but one
    each: int = FILES_PER_PROJECT

    @property
    def projects(self) -> list[str]:
        if self.only:
            return [self.only]
        return [f"bench-{n:05d}" for n in range(max(1, self.files // self.each))]

    @property
    def project(self) -> str:
        """The project whose page is measured: one from the middle."""
        return self.projects[len(self.projects) // 2]

    @property
    def filename(self) -> str:
        """The file that is downloaded: the newest of that project."""
        return wheel_name(self.project, newest_version())

    def link_to(self, target: Path) -> Path:
        """Copy by hard links: servers replace files, none writes into one."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(
            self.path,
            target,
            copy_function=os.link,
            ignore=shutil.ignore_patterns(".*"),
        )
        return target


def version_of(number: int) -> str:
    return f"1.{number}.0"


def newest_version() -> str:
    return version_of(FILES_PER_PROJECT - 1)


def wheel_name(project: str, version: str) -> str:
    return f"{project.replace('-', '_')}-{version}-py3-none-any.whl"


# ---- Making wheels -------------------------------------------------------------------


def noise(size: int, seed: str) -> bytes:
    """Make bytes that do not compress, the same for the same seed."""
    return hashlib.shake_128(seed.encode()).digest(size)


def metadata_of(project: str, version: str) -> bytes:
    """Write a wheel's METADATA, which is also what `<file>.metadata` serves."""
    return (
        f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n"
        f"Summary: One of many\nRequires-Python: >=3.8\n"
    ).encode()


def _write(
    archive: zipfile.ZipFile, project: str, version: str, payload: bytes
) -> None:
    module = project.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/data.bin": payload,
        f"{module}/__init__.py": f"VERSION = {version!r}\n".encode(),
        f"{info}/METADATA": metadata_of(project, version),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: bench\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={_record_hash(data)},{len(data)}\n"
        for name, data in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    for name, data in files.items():
        # Stored, not deflated: zlib versions differ in their bytes.
        archive.writestr(zipfile.ZipInfo(name, DATE), data)


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def make_wheel(project: str, version: str, *, payload: bytes = b"") -> Wheel:
    """Build a small wheel in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        _write(archive, project, version, payload)
    name = wheel_name(project, version)
    return Wheel(
        project, version, name, metadata_of(project, version), buffer.getvalue()
    )


def big_wheel(work: Path, version: str) -> Wheel:
    """Build (once) a wheel of 200 MB as a file."""
    project = BIG_PROJECT
    path = work / "big" / wheel_name(project, version)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        block = noise(1 << 20, "big")  # repeated: nobody compresses, and shake is slow
        with zipfile.ZipFile(draft, "w") as archive:
            _write(archive, project, version, (block * (BIG // len(block) + 1))[:BIG])
        draft.rename(path)
    return Wheel(project, version, path.name, metadata_of(project, version), path)


# ---- Stores --------------------------------------------------------------------------


def build_store(work: Path, files: int, each: int = FILES_PER_PROJECT) -> Store:
    """Make (once) a store of so many files, so many `each` project."""
    name = str(files) if each == FILES_PER_PROJECT else f"{files}-by-{each}"
    store = Store(work / "corpus" / name, files, each=each)
    if store.path.exists():
        return store
    draft = store.path.with_suffix(".draft")
    shutil.rmtree(draft, ignore_errors=True)
    for project in store.projects:
        folder = draft / project
        folder.mkdir(parents=True)
        for number in range(each):
            version = version_of(number)
            payload = noise(PAYLOAD, project) if version == newest_version() else b""
            wheel = make_wheel(project, version, payload=payload)
            assert isinstance(wheel.data, bytes)
            (folder / wheel.filename).write_bytes(wheel.data)
    draft.rename(store.path)
    return store


def big_store(work: Path) -> Store:
    """Make (once) a store that holds nothing but the 200 MB wheel."""
    store = Store(work / "corpus" / "big", 1, only=BIG_PROJECT)
    folder = store.path / BIG_PROJECT
    if not folder.exists():
        wheel = big_wheel(work, newest_version())
        assert isinstance(wheel.data, Path)
        folder.mkdir(parents=True)
        os.link(wheel.data, folder / wheel.filename)
    return store


# ---- Upload forms --------------------------------------------------------------------

BOUNDARY = "bench5f0d1e9a7c3b42868d2e4a6c8b0f1e3d"


def upload_request(wheel: Wheel, path: str) -> list[bytes | Path]:
    """Make the request that twine makes, as parts to be sent one after the other."""
    fields = {
        ":action": "file_upload",
        "protocol_version": "1",
        "metadata_version": "2.1",
        "name": wheel.project,
        "version": wheel.version,
        "summary": "One of many",
        "requires_python": ">=3.8",
        "filetype": "bdist_wheel",
        "pyversion": "py3",
        **wheel.digests,
    }
    form = _fields(fields) + (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="content"; '
        f'filename="{wheel.filename}"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    end = f"\r\n--{BOUNDARY}--\r\n"
    head = _head(path, len(form) + len(wheel) + len(end))
    if isinstance(wheel.data, bytes):
        return [head + form.encode() + wheel.data + end.encode()]
    return [head + form.encode(), wheel.data, end.encode()]


def removal_request(wheel: Wheel, path: str) -> list[bytes | Path]:
    """Make the request that removes a version, as pypiserver takes it."""
    fields = {":action": "remove_pkg", "name": wheel.project, "version": wheel.version}
    form = f"{_fields(fields)}--{BOUNDARY}--\r\n".encode()
    return [_head(path, len(form)) + form]


def _fields(fields: dict[str, str]) -> str:
    return "".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'
        f"\r\n\r\n{value}\r\n"
        for name, value in fields.items()
    )


def _head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        "Accept: */*\r\nUser-Agent: bench\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()
