"""Tests of gcs_rest: the deadline of a whole call, tokens, sessions, Google's table.

To be pasted into test_pypi_ae.py, each part at the end of the section named by its bar.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from google.auth.exceptions import RefreshError

import gcs_rest
from gcs_rest import Bucket, Corrupted, Object, Refused, StorageError, Unavailable
from test_pypi_ae import (
    DATA,
    OBJECT,
    ONE,
    UPLOAD,
    Act,
    Clock,
    Cloud,
    Credentials,
    Go,
    Mock,
    Patch,
    Steps,
    break_after,
    bucket,
    clock,
    credentials_of,
    gcs,
    impatient,
    insert,
    item,
    play,
    played,
    reply,
    stored,
    tokens,
    wired,
)

__all__ = ["bucket", "clock", "gcs", "played", "stored", "wired"]  # fixtures

# ---- Helpers: a server that speaks slowly --------------------------------------------

Talk = Callable[[socket.socket, int], object]  # a connection, and its number


@contextlib.contextmanager
def talking(talk: Talk) -> Iterator[str]:
    """A server; `talk` answers each request, in a thread for each connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor() as pool,
    ):
        connections = set[socket.socket]()

        def answer(connection: socket.socket, number: int) -> None:
            with connection, contextlib.suppress(OSError):
                while connection.recv(65536) and not talk(connection, number):
                    pass
            connections.discard(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    connections.add(connection := listener.accept()[0])
                    pool.submit(answer, connection, number)

        pool.submit(accept)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for each in (listener, *list(connections)):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


def trickle(*parts: bytes) -> Talk:
    """Sends the first part at once, the second a byte at a time, for 20 s."""

    def talk(connection: socket.socket, _: int) -> None:
        connection.sendall(parts[0])
        for number in range(200):
            connection.sendall(parts[1][number % len(parts[1]) :][:1])
            time.sleep(0.1)

    return talk


@pytest.fixture
def hurry(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT_MIN", 0.1)
    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT", 0.5)


def at(root: str, monkeypatch: Patch, deadline: float = 0.5, **more: Any) -> Bucket:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", root)
    return impatient(Bucket("bkt", deadline=deadline, **more), deadline, 0.01)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


# ---- gcs_rest: 2. Endpoint and credentials -------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n"


@pytest.mark.parametrize(("first", "then"), [
    (b"", b"HTTP/1.1 200 OK"), (HEAD, b"x: y\r\n"), (HEAD + b"\r\n", b"{"),
    (b"HTTP/1.1 503 Busy\r\nContent-Length: 9999\r\n\r\n", b"x"),
], ids=["status", "headers", "body", "body of an error"])  # fmt: skip
@pytest.mark.parametrize("run", [
    lambda b: b.get(OBJECT), insert, lambda b: list(b.read(OBJECT, generation=7)),
], ids=["get", "insert", "read"])  # fmt: skip
@pytest.mark.usefixtures("hurry")
def test_answer_that_trickles_ends(
    monkeypatch: Patch, first: bytes, then: bytes, run: Callable[[Bucket], object]
) -> None:
    """A byte comes within each timeout, but the answer as a whole does not."""
    with (
        talking(trickle(first, then)) as root,
        at(root, monkeypatch) as bucket,
        within(10),
        pytest.raises(Unavailable, match="tries: "),
    ):
        run(bucket)


class Source:
    """Stands for the bytes of a socket: a read takes some time, and gets some bytes."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.reads = clock, list[tuple[float, int]]()

    def readinto(self, _: object) -> int:
        seconds, count = self.reads.pop(0)
        self.clock.sleep(seconds)
        return count


@pytest.mark.parametrize(("is_file", "reads", "good"), [
    (False, [(2, 1 << 20)] * 9, 3), (False, [(0, 1)] * 9, 9),
    (True, [(2, 1)] * 9, 3), (True, [(2, 16 << 10)] * 9, 5),
    (True, [(2, 32 << 10)] * 9, 9),
    (True, [(0, 1 << 30), (4.9, 1), (0, 1), (0.2, 1), (0, 1)], 4),
], ids=["object", "at once", "trickle", "half of it", "rate", "no credit"])  # fmt: skip
def test_time_of_an_answer(
    clock: Clock, is_file: bool, reads: list[tuple[float, int]], good: int
) -> None:
    """It is 5 s; bytes of a file buy more. The pauses of the reader do not count."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    with ours, theirs, gcs_rest.TimedSocket(ours) as timed:
        source: Any = Source(clock)
        source.reads, source.close = list(reads), timed.source.close
        timed.source, timed.is_file = source, is_file
        done = 0
        with contextlib.suppress(TimeoutError):
            while source.reads:
                timed.readinto(bytearray(1))
                done += 1
                clock.sleep(60)
    assert done == good


@pytest.mark.usefixtures("hurry")
def test_slow_file_arrives(monkeypatch: Patch) -> None:
    """It takes longer than the deadline, but it has the least rate."""
    data, head = (
        os.urandom(64 << 10),
        b"HTTP/1.1 200 OK\r\nContent-Length: 524288\r\n\r\n",
    )

    def talk(connection: socket.socket, _: int) -> None:
        connection.sendall(head)
        for _ in range(8):
            connection.sendall(data)
            time.sleep(0.1)

    monkeypatch.setattr(gcs_rest, "READ_TIMEOUT", 5.0)
    with talking(talk) as root, at(root, monkeypatch, 0.4) as bucket:
        assert b"".join(bucket.read(OBJECT, generation=7)) == data * 8


@contextlib.contextmanager
def renewing(bucket: Bucket, monkeypatch: Patch) -> Iterator[threading.Event]:
    """Another thread is renewing the token, and hangs until the block ends."""
    hangs, go_on = threading.Event(), threading.Event()

    def refresh(_: object) -> None:
        hangs.set()
        go_on.wait(20)

    monkeypatch.setattr(credentials_of(bucket), "refresh", refresh)
    other = threading.Thread(target=lambda: bucket.get(OBJECT))
    other.start()
    assert hangs.wait(20)
    try:
        yield go_on
    finally:
        credentials_of(bucket).token = "late"
        go_on.set()
        other.join(20)


def test_good_token_waits_for_nobody(
    gcs: Mock, bucket: Bucket, monkeypatch: Patch
) -> None:
    credentials = credentials_of(bucket)
    credentials.token, credentials.stale = "old", True
    gcs.get(ONE, json=item())
    with renewing(bucket, monkeypatch) as go_on:
        bucket.get(OBJECT)
        assert not go_on.is_set()
        assert tokens(gcs) == ["Bearer old"]


@pytest.mark.usefixtures("hurry")
def test_call_without_a_token_ends(
    gcs: Mock, bucket: Bucket, monkeypatch: Patch
) -> None:
    gcs.get(ONE, json=item())
    impatient(bucket, deadline=0.3)
    refused = pytest.raises(Unavailable, match=r"no access token in 0\.\d s; try again")
    with renewing(bucket, monkeypatch), within(15), refused:
        bucket.get(OBJECT)


def test_good_token_outlives_failures(
    gcs: Mock, bucket: Bucket, clock: Clock, monkeypatch: Patch
) -> None:
    """Getting a new one is tried once in 5 s; its failure is nobody's."""
    tries, credentials = list[float](), credentials_of(bucket)
    credentials.token, credentials.stale = "old", True

    def refresh(_: object) -> None:
        tries.append(clock.now)
        raise RefreshError("down")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(credentials, "refresh", refresh)
    gcs.get(ONE, json=item())
    for _ in range(12):
        clock.sleep(1)
        bucket.get(OBJECT)
    assert tries == [1, 6, 11]
    assert set(tokens(gcs)) == {"Bearer old"}


@pytest.mark.parametrize("talk", [
    lambda *_: True, lambda connection, _: connection.recv(1),
    trickle(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
], ids=["drops", "hangs", "trickles"])  # fmt: skip
@pytest.mark.usefixtures("hurry")
def test_metadata_server_costs_no_more_than_the_deadline(
    monkeypatch: Patch, talk: Talk
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    found = gcs_rest.find_credentials({"K_SERVICE": "s"})
    with talking(talk) as root, Bucket("bkt", credentials=found) as bucket:
        host = ("google.auth.compute_engine._metadata._GCE_METADATA_HOST", root[7:])
        monkeypatch.setattr(*host)
        with within(15), pytest.raises(Unavailable, match=r"no access token: .*; try"):
            impatient(bucket, deadline=0.5).get(OBJECT)


def test_key_file_that_cannot_be_read(bucket: Bucket, monkeypatch: Patch) -> None:
    def find(_: object) -> None:
        raise PermissionError(13, "Permission denied", "key.json")

    monkeypatch.setattr(gcs_rest, "find_credentials", find)
    bucket.client.tokens = gcs_rest.Tokens(None)
    with pytest.raises(
        Refused, match=r"no access token: .*key\.json.*; use gcloud auth"
    ):
        bucket.get(OBJECT)


# ---- gcs_rest: 3. Sending ------------------------------------------------------------
# Google's table of what is retried, as far as it is about calls that we have:
# googleapis/conformance-tests, storage/v1/retry_tests.json. A "?" is a call without its
# precondition. Its case 4 is about calls that we have not.

RESET, BUSY = "return-reset-connection", "return-503"
TWICE = [[BUSY, BUSY], [RESET, RESET], [RESET, BUSY]]
READS, WRITES = (
    ["list", "get", "read"],
    ["insert", "session", "patch", "delete", "copy"],
)
UNCONDITIONAL = ["insert?", "copy?"]
ALL_CALLS = READS + WRITES
RETRY_TABLE: list[tuple[int, list[str], list[list[str]], bool]] = [
    (1, READS, TWICE, True),
    (2, WRITES, TWICE, True),
    (3, UNCONDITIONAL, [[BUSY], [RESET]], False),
    (5, ALL_CALLS, [["return-400"], ["return-401"]], False),
    (6, ALL_CALLS, [[BUSY, "return-400"], [RESET, "return-401"]], False),
    (7, ["session"], [
        [RESET, BUSY], ["return-408"], ["return-503-after-256K"],
        ["return-503-after-8192K", "return-408"],
        ["return-broken-stream-final-chunk-after-0B"],
    ], True),
    (8, ["read"],
     [["return-broken-stream"] * 2, ["return-broken-stream-after-256K"]], True),
]  # fmt: skip
RETRY_CASES = {
    f"{number}-{call}-{','.join(steps).replace('return-', '')}": (call, steps, success)
    for number, calls, cases, success in RETRY_TABLE
    for call in calls
    for steps in cases
}
LARGE = bytes(9 << 20)
RETRIED: dict[str, Callable[[Bucket, Object], object]] = {
    "list": lambda b, it: b.list(),
    "get": lambda b, it: b.get(it.name),
    "read": lambda b, it: b"".join(b.read(it.name, generation=it.generation)),
    "insert": lambda b, it: b.insert("new", io.BytesIO(DATA), metadata={}),
    "insert?": lambda b, it: b.insert(
        "new", io.BytesIO(DATA), metadata={}, if_generation=None
    ),
    "session": lambda b, it: b.insert("new", io.BytesIO(LARGE), metadata={}),
    "patch": lambda b, it: b.patch(
        it.name, {"a": "b"}, generation=it.generation, metageneration=1
    ),
    "delete": lambda b, it: b.delete(it.name, generation=it.generation),
    "copy": lambda b, it: b.rewrite(it.name, "new", generation=it.generation),
    "copy?": lambda b, it: b.rewrite(
        it.name, "new", generation=it.generation, if_generation=None
    ),
}


def obey(played: Cloud, instruction: str) -> Act:
    """Does what an instruction of the table says; its count is of 1024 bytes."""
    words = instruction.removeprefix("return-").split("-")
    count = int(words[-1][:-1]) << 10 if words[-1][-1] in "KB" else 100

    def act(go: Go) -> requests.Response:
        if words[0] == "reset":
            raise requests.ConnectionError("reset")
        if words[0] == "broken":
            answer = go()
            if "final" not in words:
                return break_after(count)(lambda: answer)
            return reply(200, b"")
        if len(words) > 1 and played.google:
            played.google.sessions[-1][2].extend(LARGE[:count])
        return reply(int(words[0]))

    return act


def calls_that_fit(instruction: str) -> str:
    return "put" if "after" in instruction and "stream-after" not in instruction else ""


@pytest.mark.parametrize(
    ("call", "steps", "success"), RETRY_CASES.values(), ids=RETRY_CASES
)
def test_google_retry_table(
    played: Cloud, wired: Bucket, call: str, steps: list[str], success: bool
) -> None:
    data = LARGE if call == "read" else DATA
    existing = played.hand.insert(OBJECT, io.BytesIO(data), metadata={})
    for step in steps:
        lasting = step == "return-401"  # one alone is answered by a new token
        times = sys.maxsize if lasting else 1
        played.wire.on(calls_that_fit(step), obey(played, step), times)
    wired.multipart_max = 8 << 20
    with contextlib.nullcontext() if success else pytest.raises(StorageError):
        done = RETRIED[call](wired, existing)
    sent = len(played.wire.calls)
    if not success:
        assert sent == len(steps) + ("return-401" in steps)
        assert "new" not in [each.name for each in played.hand.list()[0]]
    elif call == "read":
        assert done == LARGE
    elif call == "session":
        assert played.hand.get("new").size == len(LARGE)


# ---- gcs_rest: 5. Uploads ------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_session_is_asked_again(
    played: Cloud, wired: Bucket, status: int, times: int
) -> None:
    steps: Steps = [(100, 503), *[(0, status)] * times]
    play(played, wired, *steps)
    assert insert(wired).size == len(DATA)
    assert played.wire.calls[1:] == ["put"] * (times + 3)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_session_is_asked_within_the_deadline(
    played: Cloud, wired: Bucket, clock: Clock, monkeypatch: Patch, status: int
) -> None:
    """With the longest pauses, and a first PUT of which nothing was stored."""
    monkeypatch.setattr("gcs_rest.random.uniform", lambda low, high: high)
    impatient(wired, gcs_rest.DEADLINE, gcs_rest.BACKOFF)
    play(played, wired, (0, 503), (0, status))
    assert insert(wired).size == len(DATA)
    assert clock.now < 8


@pytest.mark.parametrize("body", [b"", b'{"name": "a', b"{}"])
def test_final_answer_that_breaks_off(
    played: Cloud, wired: Bucket, body: bytes
) -> None:
    """The session is asked what became of the upload."""

    def cut(go: Go) -> requests.Response:
        go()
        return reply(200, body)

    wired.multipart_max = 10
    played.wire.on("put", cut, 1)
    assert insert(wired) == played.hand.get(OBJECT)
    assert played.wire.calls[1:] == ["put", "put"]


@pytest.mark.parametrize("location", [
    "https://evil.example/upload?upload_id=s1", "http://storage.googleapis.com/upload",
    "https://storage.googleapis.com.evil.example/", "https://storage.googleapis.com:444/",
    "https://storage.googleapis.com@evil.example/", "//evil.example/", "/upload", "x",
    "https://evil.example\\@storage.googleapis.com/",
    "https://storage.googleapis.com\\@evil.example/", "https://[", "",
])  # fmt: skip
def test_session_elsewhere_is_refused(gcs: Mock, bucket: Bucket, location: str) -> None:
    """Its PUT would carry the access token and the file."""
    bucket.multipart_max = 10
    gcs.post(UPLOAD, headers={"Location": location})
    with pytest.raises(
        Corrupted, match=r"Location is .*; it must be at https://"
    ) as no:
        insert(bucket)
    assert "s1" not in str(no.value)
    assert len(gcs.calls) == 1


# ---- gcs_rest: 6. The bucket ---------------------------------------------------------


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY_NOW = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
CLOSING = [HEAD + b"\r\n{", b"", b"x"]


def mixed_answers() -> Talk:
    """Good answers, errors, resets and broken bodies in turn."""
    turn = itertools.cycle([WHOLE, WHOLE, BUSY_NOW, *CLOSING])

    def talk(connection: socket.socket, _: int) -> bool:
        answer = next(turn)
        connection.sendall(answer)
        return answer in CLOSING

    return talk


def use(bucket: Bucket, count: int) -> tuple[int, int]:
    """Lists, and begins downloads; returns the memory and the open files then."""
    for number in range(count):
        with contextlib.suppress(StorageError):
            if number % 3:
                bucket.list()
            else:
                with contextlib.closing(bucket.read(OBJECT, generation=7)) as chunks:
                    next(chunks, b"")
    gc.collect()
    return tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_calls_leave_nothing_behind(monkeypatch: Patch) -> None:
    """With GROWTH_CALLS=5000 it is the long run."""
    count = int(os.environ.get("GROWTH_CALLS", "200"))
    tracemalloc.start()
    try:
        with talking(mixed_answers()) as root, at(root, monkeypatch, 5) as bucket:
            impatient(bucket, 5, 0.0001)
            bucket.client.tokens = gcs_rest.Tokens(Credentials())
            use(bucket, 200)
            (before, files), (after, more) = use(bucket, count), use(bucket, count)
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
    assert more - files < 20
