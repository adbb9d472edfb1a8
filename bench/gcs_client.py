"""One client of the bucket API, measured by itself; prints JSON.

    python gcs_client.py CLIENT BUCKET BIG_FILE SECONDS

CLIENT is gcs_rest, google (google-cloud-storage) or requests (by hand: the limit). The
emulator is named by STORAGE_EMULATOR_HOST. run.py starts this in the environment of
each client, once per round.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import quote

SMALL = b"x" * 10_000
LISTED = 100  # objects under the prefix that is listed


class GcsRest:
    def __init__(self, bucket: str) -> None:
        import gcs_rest

        self.bucket = gcs_rest.Bucket(bucket)

    def insert(self, name: str, source: BinaryIO) -> None:
        self.bucket.insert(name, source, metadata={"sha256": "0" * 64})

    def list(self, prefix: str) -> int:
        return len(self.bucket.list(prefix)[0])

    def get(self, name: str) -> Any:
        return self.bucket.get(name)

    def read(self, name: str) -> int:
        found = self.bucket.get(name)
        return sum(map(len, self.bucket.read(name, generation=found.generation)))


class Google:
    def __init__(self, bucket: str) -> None:
        from google.cloud import storage

        self.client = storage.Client(project="bench")
        self.bucket = self.client.bucket(bucket)

    def insert(self, name: str, source: BinaryIO) -> None:
        blob = self.bucket.blob(name)
        blob.metadata = {"sha256": "0" * 64}
        blob.upload_from_file(
            source, rewind=True, if_generation_match=0, checksum="md5"
        )

    def list(self, prefix: str) -> int:
        return len(list(self.client.list_blobs(self.bucket, prefix=prefix)))

    def get(self, name: str) -> Any:
        return self.bucket.get_blob(name)

    def read(self, name: str) -> int:
        blob = self.bucket.get_blob(name)
        counter = Counter()
        blob.download_to_file(counter, checksum="md5")
        return counter.size


class ByHand:
    """The least a program on requests can do: no retries; md5 as the others do."""

    def __init__(self, bucket: str) -> None:
        import requests

        root = os.environ["STORAGE_EMULATOR_HOST"]
        self.session = requests.Session()
        self.objects = f"{root}/storage/v1/b/{bucket}/o"
        self.upload = f"{root}/upload/storage/v1/b/{bucket}/o"

    def insert(self, name: str, source: BinaryIO) -> None:
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        meta = {"name": name, "metadata": {"sha256": "0" * 64}}
        meta["md5Hash"] = base64.b64encode(md5_of(source)).decode()
        source.seek(0)
        if size > 8 << 20:  # where both others begin a session
            self._insert_big(meta, source)
        else:
            self._insert_small(meta, source)

    def _insert_small(self, meta: dict[str, Any], source: BinaryIO) -> None:
        head = b"--b\r\nContent-Type: application/json\r\n\r\n%s\r\n"
        body = head % json.dumps(meta).encode()
        body += b"--b\r\nContent-Type: application/octet-stream\r\n\r\n"
        body += source.read() + b"\r\n--b--"
        headers = {"Content-Type": "multipart/related; boundary=b"}
        params = {"uploadType": "multipart", "ifGenerationMatch": "0"}
        self.session.post(
            self.upload, params=params, data=body, headers=headers
        ).raise_for_status()

    def _insert_big(self, meta: dict[str, Any], source: BinaryIO) -> None:
        params = {"uploadType": "resumable", "ifGenerationMatch": "0"}
        start = self.session.post(self.upload, params=params, json=meta)
        start.raise_for_status()
        self.session.put(start.headers["Location"], data=source).raise_for_status()

    def list(self, prefix: str) -> int:
        found = self.session.get(self.objects, params={"prefix": prefix}).json()
        return len(found.get("items", ()))

    def get(self, name: str) -> Any:
        return self.session.get(self._url(name)).json()

    def read(self, name: str) -> int:
        digest, size = hashlib.md5(), 0
        with self.session.get(
            self._url(name), params={"alt": "media"}, stream=True
        ) as reply:
            for chunk in reply.iter_content(1 << 18):
                digest.update(chunk)
                size += len(chunk)
        return size

    def _url(self, name: str) -> str:
        return f"{self.objects}/{quote(name, safe='')}"


class Counter(io.RawIOBase):
    """A file that counts what is written to it."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


CLIENTS: dict[str, Callable[[str], Any]] = {
    "gcs_rest": GcsRest,
    "google": Google,
    "requests": ByHand,
}


def md5_of(source: BinaryIO) -> bytes:
    digest = hashlib.md5()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
    return digest.digest()


def memory() -> float:
    """Tell the most memory this process held, in MiB."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def rate(act: Callable[[int], Any], seconds: float) -> float:
    """Repeat an action for so long; tell how often a second."""
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        act(count)
        count += 1
    return count / taken


def main(kind: str, bucket: str, big: str, seconds: float) -> dict[str, float]:
    """Measure one client, from its import on."""
    start = time.perf_counter()
    client = CLIENTS[kind](bucket)
    client.list("none/")  # what is imported late counts, too
    found = {"import and first call, s": time.perf_counter() - start}
    found["memory after it, MiB"] = memory()
    run = f"{kind}-{os.getpid()}"
    for number in range(LISTED):
        client.insert(f"{run}/{number}", io.BytesIO(SMALL))
    # Insert under names of another prefix: what is listed stays the same.
    found["insert 10 KB, /s"] = rate(
        lambda n: client.insert(f"{run}-more/{n}", io.BytesIO(SMALL)), seconds
    )
    assert client.list(f"{run}/") == LISTED
    found["list 100, /s"] = rate(lambda n: client.list(f"{run}/"), seconds)
    found["get, /s"] = rate(lambda n: client.get(f"{run}/{n % LISTED}"), seconds)
    size = os.path.getsize(big) / 1e6
    with open(big, "rb") as file:
        start = time.perf_counter()
        client.insert(f"{run}-big/big", file)
    found["up 200 MB, MB/s"] = size / (time.perf_counter() - start)
    start = time.perf_counter()
    assert client.read(f"{run}-big/big") == os.path.getsize(big)
    found["down 200 MB, MB/s"] = size / (time.perf_counter() - start)
    found["peak memory, MiB"] = memory()
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))))
