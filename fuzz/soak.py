#!/usr/bin/env python3
"""Let two instances work on one bucket whose wire is bad, and compare with a model.

    python fuzz/soak.py [OPERATIONS] [SEED]

The bucket is the played Cloud Storage of the tests, served over HTTP. A quarter of its
answers are spoiled: see FAULTS. The instances are gunicorn processes: so memory and
descriptors are theirs alone. Each client has projects of its own, and sends each
request to either instance; SYNC_SECONDS is 0, so both must know what either did.

The promise: what was answered 2xx is in the store, whole, with the digest sent, and
stays; what was answered otherwise left no visible trace, and trying again works. One
case has no such answer. If every answer of the bucket to a write was lost until the
deadline, the instance cannot know whether the write took effect, and says 503. The file
is then there whole or not at all, and the same upload again is 200 in both cases. The
model keeps both possibilities, until an answer tells which one is true. It does not
admit a third one: other bytes, a part of them, an answer that contradicts an earlier
one, or a refusal ("already exists") of what cannot be there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_pypi_ae import (
    FORM_HEADERS,
    GCS,
    JSON,
    MODULE,
    REMOVE,
    SERVERS,
    Google,
    Server,
    encode,
    field,
    make_metadata,
    make_wheel,
    running,
    sha256,
    url,
    wait_until,
)

CLIENTS = 8
PROJECTS, VERSIONS = 2, 4  # of each client; so the bucket does not grow for ever
SIZES = (500, 5_000, 5_000, 60_000, 300_000)  # the largest needs a session
STALL = 2.0  # seconds; more than an instance waits for a byte
FAULTS = (  # what happens to a call; all but the first four happen after it took effect
    *("503", "429", "401", "reset before"),
    *("reset after", "truncated", "corrupted", "stalled"),
)
SERVERS["soak"] = (
    *("-m", "gunicorn", "-w", "1", "--threads", "8", "-b", "127.0.0.1:0"),
    *("--pythonpath", str(Path(__file__).parent), "instance:make()"),
)
METADATA = ("Metadata-Flavor: Google", "Content-Type: application/json")
Digest = str  # of a file's bytes; "" if there is no such file


class Key(NamedTuple):
    """One file: each version has one wheel."""

    project: str
    version: str

    @property
    def filename(self) -> str:
        return f"{self.project}-{self.version}-py3-none-any.whl"


class Bucket(ThreadingHTTPServer):
    """The played Cloud Storage and its metadata server, on a wire with faults."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, share: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Wire)
        self.google, self.dice, self.share = Google(), random.Random(seed), share
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token, self.counts, self.lock = 0, Counter[str](), threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that hang up, and resets, are what this is for."""

    def draw(self) -> str:
        with self.lock:
            hit = self.dice.random() < self.share
            fault = self.dice.choice(FAULTS) if hit else ""
            self.counts["calls"] += 1
            self.counts["faults"] += hit
            self.token += fault == "401"  # and all tokens until now have expired
            return fault

    def answer(self, call: requests.PreparedRequest) -> requests.Response:
        answer = self.google.answer(call)
        if where := answer.headers.get("Location"):
            answer.headers["Location"] = where.replace(GCS, self.url)
        for _, _, media in self.google.sessions[:-64]:
            media.clear()
        return answer


class Wire(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.path.startswith("/computeMetadata/"):
            return self.send(200, self.metadata(), *METADATA)
        if len(body) < size or self.is_gone():
            return self.reset()
        fault = self.server.draw()
        if self.headers["Authorization"] != f"Bearer t{self.server.token}":
            fault = "401"
        if fault.isdigit():
            return self.send(int(fault), b'{"error": "a fault"}')
        if fault == "reset before":
            return self.reset()
        call = requests.Request(self.command, self.server.url + self.path, data=body)
        call.headers = dict(self.headers)
        return self.spoil(fault, self.server.answer(call.prepare()))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def metadata(self) -> bytes:
        """What google-auth asks for: the account, and a token."""
        if "/token" not in self.path:
            return b'{"email": "soak@project.test", "scopes": []}'
        token = {"access_token": f"t{self.server.token}", "token_type": "Bearer"}
        return json.dumps({**token, "expires_in": 3600}).encode()

    def spoil(self, fault: str, answer: requests.Response) -> None:
        data = answer.raw.read()
        half = data[: len(data) // 2]
        if fault == "reset after" or (fault == "truncated" and not half):
            return self.reset()
        if fault == "corrupted" and "x-goog-hash" in answer.headers:
            data = half + bytes([data[len(half)] ^ 1]) + data[len(half) + 1 :]
        if fault in ("truncated", "stalled"):
            data = half
        headers = [f"{name}: {value}" for name, value in answer.headers.items()]
        self.send(answer.status_code, data, *headers)
        if fault == "stalled":
            time.sleep(STALL)
        if fault in ("truncated", "stalled"):
            self.reset()
        return None

    def send(self, status: int, body: bytes, *headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Played", *headers]
        if "content-length" not in "".join(headers).lower():
            lines.append(f"Content-Length: {len(body)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + body)

    def is_gone(self) -> bool:
        """Has the client given up? Then its call must not take effect later."""
        with contextlib.suppress(BlockingIOError):
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return not self.connection.recv(1, flags)
        return False

    def reset(self) -> None:
        self.close_connection, linger = True, struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class Broken(Exception):  # noqa: N818 - it says what happened
    """An instance broke a promise."""


class Client:
    """Sends requests about projects of its own, and knows what the answers may be."""

    def __init__(self, number: int, servers: list[Server], bucket: Bucket) -> None:
        self.servers, self.bucket = servers, bucket
        self.dice, self.counts = random.Random(number), Counter[str]()
        names = [f"c{number}p{project}" for project in range(PROJECTS)]
        self.keys = [Key(n, f"{v}.0") for n in names for v in range(VERSIONS)]
        self.may: dict[Key, set[Digest]] = {k: {""} for k in self.keys}
        self.bytes: dict[Digest, bytes] = {}
        self.yanked: dict[Key, bool | None] = {}  # None: unknown

    def act(self) -> None:
        acts = [self.upload] * 3 + [self.download, self.page] * 2
        acts += [self.race, self.remove, self.metadata, self.index, self.yank]
        self.dice.choice(acts)(self.dice.choice(self.keys))

    def ask(self, method: str, path: str, **options: Any) -> requests.Response | None:
        """Ask either instance; None if it says 503, or breaks a download off."""
        try:
            answer = self.dice.choice(self.servers).ask(method, path, **options)
        except requests.RequestException as fault:
            late = isinstance(fault, requests.exceptions.ChunkedEncodingError)
            self.counts["broken off" if late else "no answer"] += 1
            return None
        self.counts[f"{answer.status_code}"] += 1
        if answer.status_code not in (200, 400, 404, 409, 503):
            raise Broken(f"{method} {path}: {answer.status_code} {answer.text}")
        return None if answer.status_code == 503 else answer

    def learn(self, key: Key, found: set[Digest], what: str) -> None:
        """An answer says that one of these is there."""
        if not self.may[key] & found:
            raise Broken(f"{what} of {key}: {found} is none of {self.may[key]}")
        self.may[key] &= found
        if self.may[key] == {""}:
            self.yanked.pop(key, None)

    # Operations...

    def make(self, key: Key) -> Digest:
        """Make other bytes, or take those which may be there."""
        known = sorted(self.may[key] - {""})
        if known and self.dice.random() < 0.4:
            return self.dice.choice(known)
        code = self.dice.randbytes(self.dice.choice(SIZES))
        wheel = make_wheel(*key, code=code)
        self.bytes[sha256(wheel)] = wheel
        return sha256(wheel)

    def send(self, key: Key, digest: Digest, server: Server) -> int:
        answer = server.upload(key.filename, self.bytes[digest])
        self.counts[f"{answer.status_code}"] += 1
        if answer.status_code not in (200, 400, 409, 503):
            raise Broken(f"upload of {key}: {answer.status_code} {answer.text}")
        return answer.status_code

    def settle(self, key: Key, digest: Digest, status: int) -> None:
        """Learn from the answer to an upload."""
        if status == 200:
            if not self.may[key] & {"", digest}:
                raise Broken(f"upload of {key}: 200, but {self.may[key]} is there")
            self.may[key] = {digest}
        elif status == 503:
            self.may[key] |= {digest} if "" in self.may[key] else set()
        else:
            self.learn(key, self.may[key] - {"", digest}, "already exists")

    def upload(self, key: Key) -> None:
        digest = self.make(key)
        status = self.send(key, digest, self.dice.choice(self.servers))
        self.settle(key, digest, status)

    def race(self, key: Key) -> None:
        """Two uploads at once, one to each instance: of the same bytes, or not."""
        sent = [self.make(key), self.make(key)]
        if self.dice.random() < 0.5:
            sent[1] = sent[0]
        with ThreadPoolExecutor(2) as pool:
            statuses = [*pool.map(self.send, [key, key], sent, self.servers)]
        pairs = sorted(zip(statuses, sent, strict=True))  # what was stored, first
        if statuses == [503, 503]:
            self.may[key] |= set(sent) if "" in self.may[key] else set()
        elif pairs[0][0] == 200:
            for status, digest in pairs:
                if status != 503:
                    self.settle(key, digest, status)
        else:  # one is refused; what is there may have come with the other
            self.may[key] |= set(sent) if "" in self.may[key] else set()
            refused = {digest for status, digest in pairs if status != 503}
            self.learn(key, self.may[key] - {"", *refused}, "already exists")

    def remove(self, key: Key) -> None:
        form = encode(
            [REMOVE, field("name", key.project), field("version", key.version)]
        )
        answer = self.ask("POST", "/", data=form, headers=FORM_HEADERS)
        if answer is None:
            self.may[key].add("")
            self.yanked[key] = None
            return
        found = {""} if answer.status_code == 404 else self.may[key] - {""}
        self.learn(key, found, "removal")
        self.may[key] = {""}
        self.yanked.pop(key, None)

    def download(self, key: Key) -> None:
        answer = self.ask("GET", url(key.filename, key.project))
        if answer is not None and "Warning" not in answer.headers:
            self.learn(key, {sha256(answer.content) if answer.ok else ""}, "download")

    def metadata(self, key: Key) -> None:
        answer = self.ask("GET", url(key.filename, key.project) + ".metadata")
        if answer is None or "Warning" in answer.headers:
            return
        if answer.ok and answer.content != make_metadata(*key):
            raise Broken(f"metadata of {key}: {answer.text}")
        self.learn(key, self.may[key] - {""} if answer.ok else {""}, "metadata")

    def page(self, key: Key) -> None:
        project, headers = key.project, {"Accept": JSON}
        answer = self.ask("GET", f"/simple/{project}/", headers=headers)
        if answer is None or "Warning" in answer.headers:
            return
        files = {f["filename"]: f for f in answer.json()["files"]} if answer.ok else {}
        for key in (key for key in self.keys if key.project == project):
            file = files.pop(key.filename, None)
            self.learn(key, {file["hashes"]["sha256"] if file else ""}, "page")
            yanked = self.yanked.get(key, False)
            if file and yanked is not None and bool(file["yanked"]) != yanked:
                raise Broken(f"page of {key}: yanked is {file['yanked']}")
        if files:
            raise Broken(f"page of {project}: phantoms: {[*files]}")

    def index(self, _: Key) -> None:
        answer = self.ask("GET", "/simple/", headers={"Accept": JSON})
        if answer is None or "Warning" in answer.headers:
            return
        listed = {project["name"] for project in answer.json()["projects"]}
        for name in {key.project for key in self.keys}:
            states = [may for key, may in self.may.items() if key.project == name]
            if name not in listed and any("" not in may for may in states):
                raise Broken(f"/simple/ does not list {name}")
            if name in listed and all(may == {""} for may in states):
                raise Broken(f"/simple/ lists {name}")

    def yank(self, key: Key) -> None:
        """The owner yanks a file by hand, at the bucket."""
        path, google = f"packages/{key.project}/{key.filename}", self.bucket.google
        if "" in self.may[key] or len(self.may[key]) > 1:
            return
        with google.lock:
            old = google.kept[path]
            new = old._replace(metadata={**old.metadata, "yanked": "bad"})
            google.kept[path] = new._replace(metageneration=old.metageneration + 1)
        self.yanked[key] = True

    def check(self) -> None:
        """When the wire is good again, both instances and the bucket agree."""
        for _ in range(4):  # either instance, at random
            for key in self.keys:
                self.page(key)
                self.download(key)
                self.metadata(key)
        for key, (digest,) in self.may.items():
            kept = self.bucket.google.kept.get(f"packages/{key.project}/{key.filename}")
            if digest != (sha256(kept.data) if kept else ""):
                raise Broken(f"{key}: the bucket has other bytes")


class Sample(NamedTuple):
    """What the instances take after so many operations."""

    operations: int
    seconds: float
    memory: list[float]  # MB, of each instance
    descriptors: list[int]


def measure(servers: list[Server], operations: int, began: float) -> Sample:
    workers = [server.pids()[-1] for server in servers]
    texts = [Path(f"/proc/{pid}/statm").read_text().split() for pid in workers]
    memory = [int(text[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 for text in texts]
    descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in workers]
    return Sample(operations, time.monotonic() - began, memory, descriptors)


def soak(
    folder: Path, operations: int, seed: int, steps: int = 10
) -> tuple[list[Sample], Counter[str]]:
    """Send so many operations; return what was measured between, and what was counted.

    Raises Broken for a broken promise.
    """
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(Bucket(0.25, seed))
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        stack.callback(bucket.shutdown)
        settings = {"STORAGE_EMULATOR_HOST": bucket.url, "BUCKET_NAME": "b"}
        settings |= {"GCE_METADATA_HOST": bucket.url.removeprefix("http://")}
        settings |= {"TIER": "prod", "SYNC_SECONDS": "0", "CACHE_MB": "2"}
        settings |= {"PASSWORD_FILE": "htpasswd.txt", "PYTHONPATH": str(MODULE.parent)}
        homes = [folder / name for name in ("one", "two")]
        servers = [stack.enter_context(running("soak", h, **settings)) for h in homes]
        clients = [Client(number, servers, bucket) for number in range(CLIENTS)]
        began, samples = time.monotonic(), [measure(servers, 0, time.monotonic())]
        for step in range(1, steps + 1):
            run(clients, operations // steps)
            samples.append(measure(servers, step * operations // steps, began))
            print(samples[-1], flush=True)
        bucket.share = 0
        for client in clients:
            client.check()
        for home in homes:
            if not wait_until(lambda h=home: not [*h.rglob("staging/*")]):  # type: ignore[misc]
                raise Broken(f"staged files are left: {[*home.rglob('staging/*')]}")
        return samples, sum((c.counts for c in clients), bucket.counts)


def run(clients: list[Client], operations: int) -> None:
    left = itertools.count(operations, -1)

    def work(client: Client) -> None:
        while next(left) > 0:
            client.act()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, clients))


def main() -> int:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        counts = soak(Path(name), operations, seed)[1]
    print(dict(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
