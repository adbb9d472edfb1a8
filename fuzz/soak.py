#!/usr/bin/env python3
"""Let two instances work on one bucket whose wire is bad, and compare with a model.

    python fuzz/soak.py [OPERATIONS] [SEED]

The bucket is the played Cloud Storage of the tests, served over HTTP. A quarter of its
answers are spoiled: see FAULTS. The instances are gunicorn processes, so memory and
descriptors are theirs alone. Each client has projects of its own, and sends each
request to either instance. SYNC_SECONDS is 0, so both must know what either did.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_pypi_ae as lab

CLIENTS, PROJECTS, VERSIONS = 8, 2, 4  # few files, so the bucket stays as it is
SIZES = (500, 5_000, 5_000, 60_000, 300_000)  # the largest needs a session
SHARE = 0.25  # of all calls to the bucket that have a fault
STALL = 1.5  # seconds; more than an instance waits for a byte
BEFORE = ("503", "429", "401", "reset before")  # the call takes no effect
AFTER = ("reset after", "truncated", "corrupted")  # it does, and its answer is spoiled
FAULTS = (*BEFORE, *AFTER, *BEFORE, *AFTER, "stalled")  # which take the most time
METADATA = ("Metadata-Flavor: Google", "Content-Type: application/json")
lab.SERVERS["soak"] = (
    *("-m", "gunicorn", "-w", "1", "--threads", "8", "-b", "127.0.0.1:0"),
    *("--pythonpath", str(Path(__file__).parent), "instance:make()"),
)


class Bucket(ThreadingHTTPServer):
    """The played Cloud Storage and its metadata server, on a wire with faults."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Wire)
        self.google, self.dice, self.share = lab.Google(), random.Random(seed), SHARE
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token, self.counts, self.lock = 0, Counter[str](), threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that hang up, and resets, are what this is for."""

    def draw(self) -> str:
        with self.lock:
            hit = self.dice.random() < self.share
            fault = self.dice.choice(FAULTS) if hit else ""
            self.counts.update(["calls"], faults=hit)
            self.token += fault == "401"  # all tokens until now have expired
            return fault

    def answer(self, call: requests.PreparedRequest) -> requests.Response:
        answer = self.google.answer(call)
        if where := answer.headers.get("Location"):
            answer.headers["Location"] = where.replace(lab.GCS, self.url)
        for _, _, media in self.google.sessions[-99:-64]:
            media.clear()  # they are over
        return answer


class Wire(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.path.startswith("/computeMetadata/"):
            return self.send(200, self.metadata(), *METADATA)
        fault = "reset" if len(body) < size or self.is_gone() else self.server.draw()
        if self.headers["Authorization"] != f"Bearer t{self.server.token}":
            fault = "401"
        if fault.isdigit():
            return self.send(int(fault), b'{"error": "a fault"}')
        if fault in ("reset", "reset before"):
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


Digest = str  # of a file's bytes; "" if there is no such file


class Key(NamedTuple):
    """One file: each version has one wheel."""

    project: str
    version: str

    @property
    def filename(self) -> str:
        return f"{self.project}-{self.version}-py3-none-any.whl"

    @property
    def url(self) -> str:
        return lab.url(self.filename, self.project)


class Client:
    """Sends requests about projects of its own, and knows what the answers may be."""

    def __init__(self, number: int, servers: list[lab.Server], bucket: Bucket) -> None:
        self.servers, self.bucket = servers, bucket
        self.dice, self.counts = random.Random(number), Counter[str]()
        names = [f"c{number}p{project}" for project in range(PROJECTS)]
        self.keys = [Key(n, f"{v}.0") for n in names for v in range(VERSIONS)]
        self.may: dict[Key, set[Digest]] = {k: {""} for k in self.keys}
        self.bytes: dict[Digest, bytes] = {}
        self.yanked: dict[Key, bool | None] = {}  # None: unknown

    def act(self) -> None:
        acts: list[Callable[[Key], None]] = [self.upload, self.download, self.page]
        acts += [*acts, self.upload, self.upload, self.remove]
        acts += [self.metadata, self.index, self.yank]
        self.dice.choice(acts)(self.dice.choice(self.keys))

    def ask(self, method: str, path: str, **options: Any) -> requests.Response | None:
        """Ask either instance; None if its answer tells nothing of the present.

        It may be 503, break off, or say that it is old.
        """
        try:
            answer = self.dice.choice(self.servers).ask(method, path, **options)
        except requests.RequestException as fault:
            late = isinstance(fault, requests.exceptions.ChunkedEncodingError)
            self.counts["broken off" if late else "no answer"] += 1
            return None
        self.counts[f"{answer.status_code}"] += 1
        assert answer.status_code in (200, 404, 503), (path, answer.text)
        old = answer.status_code == 503 or "Warning" in answer.headers
        return None if old else answer

    def learn(self, key: Key, found: set[Digest], what: str) -> None:
        """An answer says that one of these is there."""
        assert self.may[key] & found, f"{what} of {key}: {found}, not {self.may[key]}"
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
        wheel = lab.make_wheel(*key, code=code)
        self.bytes[lab.sha256(wheel)] = wheel
        return lab.sha256(wheel)

    def upload(self, key: Key) -> None:
        """Upload to one instance, or at once to both: the same bytes, or not."""
        servers = self.dice.sample(self.servers, self.dice.choice((1, 1, 2)))
        sent = [self.make(key) for _ in servers]
        if self.dice.random() < 0.5:
            sent[-1] = sent[0]

        def send(server: lab.Server, digest: Digest) -> int:
            return server.upload(key.filename, self.bytes[digest]).status_code

        with ThreadPoolExecutor(2) as pool:
            statuses = list(pool.map(send, servers, sent))
        if "" in self.may[key]:
            self.may[key] |= set(sent)
        for status, digest in zip(statuses, sent, strict=True):
            self.counts[f"{status}"] += 1
            assert status in (200, 400, 409, 503), f"upload of {key}: {status}"
            if status == 200:
                self.learn(key, {digest}, "stored")
            elif status != 503:
                self.learn(key, self.may[key] - {"", digest}, "already exists")

    def remove(self, key: Key) -> None:
        form = [lab.REMOVE, lab.field("name", key[0]), lab.field("version", key[1])]
        options = {"data": lab.encode(form), "headers": lab.FORM_HEADERS}
        answer = self.ask("POST", "/", **options)
        if answer is None:
            self.may[key].add("")
            self.yanked[key] = None
            return
        self.learn(key, self.may[key] - {""} if answer.ok else {""}, "removal")
        self.may[key] = {""}
        self.yanked.pop(key, None)

    def download(self, key: Key) -> None:
        if (answer := self.ask("GET", key.url)) is not None:
            found = lab.sha256(answer.content) if answer.ok else ""
            self.learn(key, {found}, "download")

    def metadata(self, key: Key) -> None:
        if (answer := self.ask("GET", f"{key.url}.metadata")) is not None:
            assert not answer.ok or answer.content == lab.make_metadata(*key), key
            self.learn(key, self.may[key] - {""} if answer.ok else {""}, "metadata")

    def page(self, key: Key) -> None:
        options = {"headers": {"Accept": lab.JSON}}
        answer = self.ask("GET", f"/simple/{key.project}/", **options)
        if answer is None:
            return
        files = {f["filename"]: f for f in answer.json()["files"]} if answer.ok else {}
        for each in (each for each in self.keys if each.project == key.project):
            file, yanked = files.pop(each.filename, None), self.yanked.get(each, False)
            self.learn(each, {file["hashes"]["sha256"] if file else ""}, "page")
            if file and yanked is not None:
                assert bool(file["yanked"]) == yanked, f"{each} has {yanked=}"
        assert not files, f"page of {key.project}: phantoms: {[*files]}"

    def index(self, key: Key) -> None:
        answer = self.ask("GET", "/simple/", headers={"Accept": lab.JSON})
        if answer is None:
            return
        listed = {project["name"] for project in answer.json()["projects"]}
        states = [self.may[each] for each in self.keys if each.project == key.project]
        must, may = any("" not in s for s in states), any(s != {""} for s in states)
        assert must <= (key.project in listed) <= may, f"/simple/: {key.project}"

    def yank(self, key: Key) -> None:
        """The owner yanks a file by hand, at the bucket."""
        if "" in self.may[key] or len(self.may[key]) > 1:
            return
        path, google = f"packages/{key.project}/{key.filename}", self.bucket.google
        with google.lock:
            old = google.kept[path]
            new = old._replace(metadata={**old.metadata, "yanked": "bad"})
            google.kept[path] = new._replace(metageneration=old.metageneration + 1)
        self.yanked[key] = True

    def check(self) -> None:
        """When the wire is good again, both instances and the bucket agree."""
        for server in self.servers:  # each may pause for 30 s after its last failure
            assert any(lab.wait_until(lambda: is_well(server)) for _ in "12")  # noqa: B023
        for key, look in itertools.product(self.keys * 2, (self.page, self.download)):
            look(key)  # at either instance, at random
        for key, (digest,) in self.may.items():
            kept = self.bucket.google.kept.get(key.url.replace("/", "", 1))
            assert digest == (lab.sha256(kept.data) if kept else ""), f"{key}: bucket"


def is_well(server: lab.Server) -> bool:
    """Does it answer what the bucket has now, and nothing older?"""
    answer = server.ask("GET", "/simple/")
    return answer.ok and "Warning" not in answer.headers


def measure(servers: list[lab.Server]) -> list[int]:
    """MB and descriptors of each instance; gunicorn's first process has some 25 MB."""
    memory = [server.memory("VmRSS") for server in servers]
    folders = [[f"/proc/{pid}/fd" for pid in server.pids()] for server in servers]
    return memory + [sum(len(os.listdir(f)) for f in each) for each in folders]


def has_grown(samples: list[list[int]]) -> bool:
    """Did a number grow by more than 16 in the second half of the operations?

    Buffers of 1 MiB come and go in each of 8 threads, and so do connections.
    """
    half = len(samples) // 2
    columns = zip(*samples, strict=True)
    return any(max(each[half:]) - max(each[:half]) > 16 for each in columns)


@contextlib.contextmanager
def instances(folder: Path, bucket: Bucket) -> Any:
    settings = {"STORAGE_EMULATOR_HOST": bucket.url, "BUCKET_NAME": "b"}
    settings |= {"GCE_METADATA_HOST": bucket.url.removeprefix("http://")}
    settings |= {"TIER": "prod", "SYNC_SECONDS": "0", "CACHE_MB": "2"}
    settings |= {"PASSWORD_FILE": "htpasswd.txt", "PYTHONPATH": str(lab.MODULE.parent)}
    settings |= {"LOCAL_PACKAGE_DIRECTORY": "packages"}
    one, two = folder / "one", folder / "two"
    with (
        lab.running("soak", one, **settings) as first,
        lab.running("soak", two, **settings) as second,
    ):
        yield [first, second]


def soak(
    folder: Path, operations: int, seed: int, steps: int
) -> tuple[list[list[int]], Counter[str]]:
    """Send so many operations; return what was measured between, and what came.

    Raises AssertionError for a broken promise.
    """
    with Bucket(seed) as bucket:
        threading.Thread(target=bucket.serve_forever, daemon=True).start()
        with instances(folder, bucket) as servers:
            clients = [Client(number, servers, bucket) for number in range(CLIENTS)]
            samples = list[list[int]]()
            for step in range(1, steps + 1):
                run(clients, operations // steps)
                samples.append(measure(servers))
                print(step * operations // steps, *samples[-1], sep="\t", flush=True)
            bucket.share = 0
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(Client.check, clients))
            left = folder.rglob
            assert lab.wait_until(lambda: not [*left("staging/*")]), "staged files"
        bucket.shutdown()
        counts = sum((client.counts for client in clients), bucket.counts)
        assert not counts["no answer"], f"connections closed unanswered: {counts}"
        return samples, counts


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
    print(f"seed {seed}\noperations\tMB\tMB\tdescriptors", flush=True)
    with tempfile.TemporaryDirectory() as name:
        samples, counts = soak(Path(name), operations, seed, max(2, operations // 500))
    print(dict(counts))
    return has_grown(samples)


if __name__ == "__main__":
    sys.exit(main())
