"""The corpus: tiny valid wheels, the same bytes on every machine, and upload forms."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

FILES_PER_PROJECT = 20
DATE = (2020, 1, 1, 0, 0, 0)  # in every archive, so that its bytes never change
DOWNLOAD = 8 * 1024  # bytes in the wheel of a project that is downloaded
BIG = 200 * 1000 * 1000
INSTALLED = 30  # projects that the installers install
NEWEST = f"1.{FILES_PER_PROJECT - 1}.0"


class Wheel(NamedTuple):
    project: str
    version: str
    data: bytes

    @property
    def filename(self) -> str:
        return wheel_name(self.project, self.version)


class Store(NamedTuple):
    """A directory of wheels, `<project>/<filename>`; `files` of them."""

    path: Path
    files: int
    each: int = FILES_PER_PROJECT

    @property
    def projects(self) -> list[str]:
        return [f"bench-{n:05d}" for n in range(self.files // self.each)]

    @property
    def project(self) -> str:
        """The project whose page is measured: one from the middle."""
        return self.projects[len(self.projects) // 2]

    @property
    def newest(self) -> str:
        """The file of that project that is downloaded."""
        return wheel_name(self.project, NEWEST)

    @property
    def asked(self) -> list[str]:
        """The projects that the limits must know."""
        return [*self.projects[:INSTALLED], self.project]

    def link_to(self, target: Path) -> Store:
        """Copy by hard links: servers replace files, none writes into one."""
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(self.path, target, copy_function=os.link, ignore=hidden)
        return self._replace(path=target)


def wheel_name(project: str, version: str) -> str:
    return f"{project.replace('-', '_')}-{version}-py3-none-any.whl"


def noise(size: int, seed: str) -> bytes:
    """Make bytes that do not compress, the same for the same seed."""
    block = hashlib.shake_128(seed.encode()).digest(min(size, 1 << 20))
    return (block * (size // max(1, len(block)) + 1))[:size]


def make_wheel(project: str, version: str, size: int = 0) -> Wheel:
    """Build a wheel with a module of so many bytes of noise."""
    module = project.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/data.bin": noise(size, project),
        f"{module}/__init__.py": f"VERSION = {version!r}\n".encode(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\n"
        f"Version: {version}\nRequires-Python: >=3.8\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: bench\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [f"{name},{describe(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = f"{''.join(lines)}{info}/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            # Stored, not deflated: zlib versions differ in their bytes.
            archive.writestr(zipfile.ZipInfo(name, DATE), data)
    return Wheel(project, version, buffer.getvalue())


def describe(data: bytes) -> str:
    """Write what RECORD says of a file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={digest.decode().rstrip('=')},{len(data)}"


def make_project(project: str, each: int = FILES_PER_PROJECT) -> list[Wheel]:
    """Build the wheels that a corpus has of a project."""
    versions = [f"1.{number}.0" for number in range(each)]
    return [make_wheel(project, v, DOWNLOAD * (v == NEWEST)) for v in versions]


def build_store(work: Path, files: int, each: int = FILES_PER_PROJECT) -> Store:
    """Make (once) a store of so many files, so many `each` project."""
    store = Store(work / "corpus" / f"{files}-by-{each}", files, each)
    draft = store.path.with_suffix(".draft")
    if not store.path.exists():
        shutil.rmtree(draft, ignore_errors=True)
        for project in store.projects:
            (draft / project).mkdir(parents=True)
            for wheel in make_project(project, each):
                (draft / project / wheel.filename).write_bytes(wheel.data)
        draft.rename(store.path)
    return store


BOUNDARY = "bench5f0d1e9a7c3b42868d2e4a6c8b0f1e3d"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def upload_form(wheel: Wheel) -> bytes:
    """Make the form that twine sends."""
    fields = {
        ":action": "file_upload",
        "protocol_version": "1",
        "metadata_version": "2.1",
        "name": wheel.project,
        "version": wheel.version,
        "requires_python": ">=3.8",
        "filetype": "bdist_wheel",
        "pyversion": "py3",
        "sha256_digest": hashlib.sha256(wheel.data).hexdigest(),
        "blake2_256_digest": hashlib.blake2b(wheel.data, digest_size=32).hexdigest(),
    }
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
    parts.append(
        f'{head}"content"; filename="{wheel.filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    end = f"\r\n--{BOUNDARY}--\r\n"
    return b"".join(("".join(parts).encode(), wheel.data, end.encode()))
