"""A client of the Google Cloud Storage JSON API on google-auth and requests alone.

    Bucket.<operation> -> Call -> Client.send -> Client.send_once -> session -> GCS
       (one method per   (request  (repeats it    (sends it once,
        API method)       as data)  while safe)    translates errors)

Contents
    1. Objects and errors         what is returned, what is raised
    2. Endpoint and credentials   root URL, access tokens, HTTP session
    3. Sending                    one request: its timeouts, retries and errors
    4. Downloads                  a stream that reconnects and checks its md5
    5. Uploads                    one request up to 8 MiB, a resumable session above
    6. The bucket                 list, get, read, insert, patch, delete, rewrite

How to use it
    with Bucket("my-bucket") as bucket, open("a.whl", "rb") as file:
        stored = bucket.insert("packages/a.whl", file, metadata={"sha256": "..."})
        for chunk in bucket.read(stored.name, generation=stored.generation):
            ...
    Any number of threads may share one Bucket. Importing this module does no I/O, and
    no request is sent before the first call.

Environment
    STORAGE_EMULATOR_HOST            URL of an emulator; requests are then anonymous
    GOOGLE_APPLICATION_CREDENTIALS   a key file, as for all Google libraries
    GAE_ENV, K_SERVICE               set by App Engine and Cloud Run: tokens come from
                                     the metadata server, without a search for keys
    HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE   read once, when a Bucket is made

What it promises
    A request is repeated only if repeating it is safe, and only until `deadline`
    seconds have passed without progress; the caller chooses the deadline. It covers
    all from the access token to the last byte of the answer, however slowly that comes.
    The bytes of a file may take longer, as long as they come and go at LEAST_RATE. An
    access token that is still good is used while a new one cannot be had, and goes to
    no host but the endpoint. Bodies are streamed in constant memory. A file that was
    stored, and an object that was read whole, have the right size and md5. Composite
    objects have no md5, and a part of an object has none: of these only the length is
    checked. Every error is a StorageError and also the built-in error that it resembles
    (FileNotFoundError, ...).

What it is not: no buckets, ACLs, compose, signed URLs or batches.
Part of pypi-ae (MIT licence), which tests it; it may be copied and used alone.
"""

# ruff: noqa: N818 (an error's name says what happened, as FileNotFoundError's does)

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from http.client import HTTPException, HTTPResponse
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import quote, urlencode

import requests
from requests import Response, Session
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import Timeout

__all__ = [
    "Bucket",
    "Corrupted",
    "NotFound",
    "Object",
    "PreconditionFailed",
    "Refused",
    "StorageError",
    "Unavailable",
]
__version__ = "1.2"

DEADLINE = 8.0  # s without progress; hatch waits 10 s for the answer to an upload
BACKOFF, BACKOFF_MAX = 0.5, 4.0  # s; pauses are random, up to 0.5, 1, 2, 4, 4, ...
CONNECT_TIMEOUT = 4.0  # s; urllib3 also applies it to each block of a body it sends
READ_TIMEOUT = 5.0  # s; less than DEADLINE, so that there is time for a second try
READ_TIMEOUT_MIN = 1.0  # s; what the last try before the deadline gets at least
FINAL_TIMEOUT = 20.0  # s; GCS may need this long to finish a large object
TOKEN_PAUSE = 5.0  # s between tries to replace a good token; each may delay one call

LEAST_RATE = 16 << 10  # bytes/s; 9 MiB take the 10 minutes that App Engine allows
MULTIPART_MAX = 8 << 20  # bytes sent in one request; Google's library has this limit
BLOCK = int(CONNECT_TIMEOUT * LEAST_RATE)  # bytes sent at once; 64 KiB
CHUNK = 256 << 10  # bytes read at once; larger is no faster, and two are in memory
POOL = 64  # connections that are kept; with more threads, requests logs a warning
PAGE_SIZE = 1000  # items on a page of a listing; GCS returns no more
REASON_MAX = 300  # characters quoted from an error answer; some are whole HTML pages


# ---- 1. Objects and errors -----------------------------------------------------------
# GCS sends sizes and generations as strings, and digests in base64; an Object has ints
# and hex digits. Each error is a StorageError with the HTTP status, and also the
# built-in error of the same meaning. So callers that also work on directories need one
# `except` for both, and need not import this module to write it.


Metadata = Mapping[str, str | None]  # in a patch, None removes a key


class Object(NamedTuple):
    """One generation of an object; `created` in POSIX seconds, `md5` in hex."""

    name: str
    size: int
    generation: int
    metageneration: int
    md5: str  # "" for composite objects, which have none
    created: float
    metadata: Mapping[str, str]


Listing = tuple[list[Object], list[str]]  # objects, and prefixes ("folders")


class StorageError(OSError):
    """An operation failed; the message says which one, why, and what to do.

    `status` is the HTTP status, or 0 if there was no answer. `tries` says how often the
    request was sent; if more than once, an earlier try may have succeeded.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.tries = status, retry_after, 1

    def __str__(self) -> str:
        return f"{self.args[0]} (tries: {self.tries})"


class NotFound(StorageError, FileNotFoundError):
    """404: no such object, generation or bucket."""


class PreconditionFailed(StorageError, FileExistsError):
    """412: the object exists already, or has changed since the caller read it."""


class Refused(StorageError, PermissionError):
    """401, 403, or no usable credentials."""


class Unavailable(StorageError, ConnectionError):
    """408, 429, 5xx, a lost connection or a timeout, until the deadline."""


class Corrupted(StorageError):
    """A size or a checksum is wrong, or an answer cannot be understood."""


ERRORS: Mapping[int, tuple[type[StorageError], str]] = {
    401: (Refused, "check the clock, and the credentials, which are those of"),
    403: (Refused, "check the bucket's name; grant roles/storage.objectUser on it to"),
    404: (NotFound, "check the names of the bucket and of the object"),
    412: (PreconditionFailed, "another writer changed the object; get it again"),
}
FIELDS = "name,size,generation,metageneration,md5Hash,timeCreated,metadata"


def read_object(item: Mapping[str, Any]) -> Object:
    """Returns the Object of an API resource; raises Corrupted if a value is missing."""
    try:
        # fake-gcs-server's answer to a patch has `created` and no metageneration.
        created = item.get("timeCreated") or item["created"]
        return Object(
            name=item["name"],
            size=int(item["size"]),
            generation=int(item["generation"]),
            metageneration=int(item.get("metageneration", 1)),
            md5=base64.b64decode(item.get("md5Hash", "")).hex(),
            created=datetime.fromisoformat(created).timestamp(),
            metadata=item.get("metadata") or {},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Corrupted(f"not an object: {str(item)[:REASON_MAX]}", 200) from error


def has_metadata(stored: Object, sent: Metadata) -> bool:
    """Tells whether an object has the values that were sent; None means no such key."""
    return all(stored.metadata.get(key) == value for key, value in sent.items())


# ---- 2. Endpoint and credentials -----------------------------------------------------
# google.auth is imported when the first token is needed, and never for an emulator: it
# imports cryptography, and takes longer than all other imports together. App Engine and
# Cloud Run have a metadata server, so it is used directly: google.auth.default() would
# first look for key files and for gcloud, and then test whether the server is there.
#
# google-auth wants a new token 225 s before the old one expires, tries for 30 s, and
# then fails. So Tokens asks in its place: once, in the time that the call has left. If
# it fails, a token that is still good is used. Client.send repeats the rest.

ROOT = "https://storage.googleapis.com"
UNIVERSE = "googleapis.com"  # given, so that the metadata server is not asked
SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)  # IAM roles set the limits
Credentials = Any  # google.auth.credentials.Credentials, which has no annotations


def find_emulator(environ: Mapping[str, str]) -> str:
    """Returns the emulator's root URL, or ""; adds the scheme if it is missing."""
    host = environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    return host if not host or "://" in host else f"http://{host}"


def find_credentials(environ: Mapping[str, str]) -> Credentials:
    on_platform = environ.get("GAE_ENV") or environ.get("K_SERVICE")
    if on_platform and not environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        from google.auth import compute_engine

        return compute_engine.Credentials(scopes=SCOPES, universe_domain=UNIVERSE)  # type: ignore[no-untyped-call]
    import google.auth

    return google.auth.default(scopes=SCOPES)[0]


class TimedSocket(io.RawIOBase):
    """Reads an answer from a socket, whose timeout is for the answer as a whole.

    Only the time spent in waiting for bytes counts, not the pauses of who reads them.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.source = sock, sock.makefile("rb", buffering=0)
        self.left, self.is_file = sock.gettimeout() or READ_TIMEOUT, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.left <= 0:
            raise TimeoutError("the answer comes too slowly")
        started = time.monotonic()
        self.sock.settimeout(self.left)
        count = self.source.readinto(buffer)
        self.left -= time.monotonic() - started
        if self.is_file:  # bytes buy time, but a stream that stops gets READ_TIMEOUT
            self.left = min(self.left + (count or 0) / LEAST_RATE, READ_TIMEOUT)
        return count

    def close(self) -> None:
        self.source.close()
        super().close()


class TimedAnswer(HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.source = TimedSocket(sock)
        self.fp = io.BufferedReader(self.source)

    def expect_file(self) -> None:
        """The body may take longer, as long as its bytes come at LEAST_RATE."""
        self.source.left, self.source.is_file = READ_TIMEOUT, True


class TimedConnection(HTTPConnection):
    response_class = TimedAnswer


class TimedTLSConnection(HTTPSConnection):
    response_class = TimedAnswer


class TimedAdapter(HTTPAdapter):
    """Gives each answer one timeout; requests gives one to each packet of it."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        tls = pool.scheme == "https"
        pool.ConnectionCls = TimedTLSConnection if tls else TimedConnection
        return pool


def new_session(root: str) -> Session:
    session = Session()
    # With trust_env, requests would read the proxy variables again for each request,
    # and replace our Authorization header if ~/.netrc has an entry for the host.
    session.trust_env = False
    session.proxies.update(requests.utils.get_environ_proxies(root))
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    # Google compresses answers only if the user agent contains "gzip".
    session.headers["User-Agent"] = f"gcs_rest/{__version__} (gzip)"
    session.mount(root, TimedAdapter(pool_connections=1, pool_maxsize=POOL))
    return session


class Tokens:
    """The access tokens of google-auth's credentials; one thread at a time gets one.

    It is called by google-auth as `google.auth.transport.Request` is.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials  # None: they are found when they are needed
        self.lock = threading.Lock()
        self.ends = self.next_try = 0.0
        self.session = Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, TimedAdapter())

    def value(self) -> Any:
        return self.credentials and self.credentials.token

    def sign(self, headers: dict[str, str], left: float) -> None:
        """Adds a token to the headers; takes at most `left` seconds.

        google-auth calls a good token STALE when it should be replaced.
        """
        state = self.credentials.token_state.name if self.credentials else "INVALID"
        if state == "INVALID":
            self.replace(self.value(), left)
        elif state == "STALE" and time.monotonic() >= self.next_try:
            self.next_try = time.monotonic() + TOKEN_PAUSE
            with contextlib.suppress(StorageError):
                self.replace(self.value(), READ_TIMEOUT_MIN)
        self.credentials.apply(headers)

    def replace(self, bad: str | None, left: float) -> None:
        """Gets a new token, unless another thread already replaced the bad one."""
        ends = time.monotonic() + left
        if not self.lock.acquire(timeout=left):
            raise Unavailable(f"no access token in {left:.1f} s; try again later")
        try:
            if self.value() == bad:
                self.ends = ends
                self.refresh()
        finally:
            self.lock.release()

    def refresh(self) -> None:
        from google.auth.exceptions import GoogleAuthError

        try:
            if self.credentials is None:
                self.credentials = find_credentials(os.environ)
            self.credentials.refresh(self)
        except requests.RequestException as error:
            raise Unavailable(f"no access token: {error}; try again later") from error
        except (GoogleAuthError, PermissionError, ValueError) as error:
            advice = "use gcloud auth application-default login, or a service account"
            raise Refused(f"no access token: {error}; {advice}") from error

    def __call__(self, url: str, method: str = "GET", **options: Any) -> Any:
        """Sends a request of google-auth's, but fails where that would repeat it."""
        options["timeout"] = min(time_until(self.ends), READ_TIMEOUT)
        data = options.pop("body", None)
        reply = self.session.request(method, url, data=data, **options)
        status = reply.status_code
        if is_temporary(status):
            raise Unavailable(f"no access token: {status} from {url}; try again later")
        return SimpleNamespace(status=status, headers=reply.headers, data=reply.content)


def time_until(ends: float) -> float:
    return max(ends - time.monotonic(), READ_TIMEOUT_MIN)


def is_temporary(status: int) -> bool:
    return status in (408, 429) or status >= 500


# ---- 3. Sending ----------------------------------------------------------------------
# A Call is one request as data. `Client.send_once` sends it with a timeout and turns
# every failure into a StorageError; `Client.send` repeats it after a pause.
# - A call is repeated after 408, 429, 5xx or a lost connection, if it is idempotent by
#   nature or by a precondition: https://docs.cloud.google.com/storage/docs/retry-strategy
# - After a 401, the token is refreshed and the request is sent once more. Its body is
#   an iterable that starts again, not a file that the first try has read to its end.
# - A 412 to a retry may mean that the first try succeeded: see section 6.


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes [start, size) of a file, after `head` and before `tail`.

    It can be iterated over again: each time it seeks to `start` first.
    """

    source: BinaryIO
    start: int
    size: int
    head: bytes = b""
    tail: bytes = b""

    def __len__(self) -> int:  # requests sends it as Content-Length
        return len(self.head) + self.size - self.start + len(self.tail)

    def __iter__(self) -> Iterator[bytes]:
        self.source.seek(self.start)
        left, head = self.size - self.start, self.head
        while left > BLOCK:
            yield head + self.read_block(BLOCK)
            left, head = left - BLOCK, b""
        yield head + self.read_block(left) + self.tail

    def read_block(self, count: int) -> bytes:
        block = self.source.read(count)
        if len(block) < count:  # urllib3 would take an OSError for a lost connection
            raise EOFError("the file became shorter while it was being sent")
        return block


Headers = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """One request as data; `what` names the operation and object in messages."""

    what: str
    method: str
    url: str
    headers: Headers | None = None
    body: bytes | Body | None = None
    idempotent: bool = True
    stream: bool = False
    timeout: float = READ_TIMEOUT


class Retries:
    """Counts the tries of a call, and sleeps between them until a deadline."""

    def __init__(self, deadline: float, backoff: float) -> None:
        self.deadline, self.backoff, self.tries = deadline, backoff, 1
        self.restart()

    def restart(self) -> None:
        """Starts a new deadline, because progress was made."""
        self.ends, self.max_pause = time.monotonic() + self.deadline, self.backoff

    def wait(self, error: StorageError) -> bool:
        """Sleeps before the next try; returns False if the deadline comes first.

        The pause is random, and at least what the server asked for in Retry-After.
        """
        error.tries = self.tries
        pause = max(random.uniform(0, self.max_pause), error.retry_after)
        if pause > self.ends - time.monotonic():
            return False
        time.sleep(pause)
        self.tries += 1
        self.max_pause = min(2 * self.max_pause, BACKOFF_MAX)
        return True


# Raised when a connection is lost: before the answer, within it, or in a streamed body.
# HTTPError is the base class of urllib3's errors; it does not mean an HTTP status.
LOST_CONNECTION = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    HTTPError,
    HTTPException,
)


class Client:
    """Sends requests about one bucket, with an access token and with retries."""

    def __init__(
        self, bucket: str, session: Session | None, creds: Credentials, deadline: float
    ) -> None:
        emulator = find_emulator(os.environ)
        self.bucket, self.root = bucket, emulator or ROOT
        self.session = session or new_session(self.root)
        self.owns_session = session is None
        anonymous = emulator and creds is None
        self.tokens = None if anonymous else Tokens(creds)
        self.deadline, self.backoff = deadline, BACKOFF

    def close(self) -> None:
        if self.owns_session:
            self.session.close()
        if self.tokens:
            self.tokens.session.close()

    def path(self, name: str = "") -> str:
        """Returns the URL path of an object, or that of the bucket's objects."""
        path = f"/b/{quote(self.bucket, safe='')}/o"
        return f"{path}/{quote(name, safe='')}" if name else path

    def new_call(
        self,
        operation: str,
        name: str,
        method: str,
        params: Mapping[str, object],
        *,
        path: str = "",
        service: str = "",
    ) -> Call:
        """Returns a call about an object, or a `path`; leaves out empty params.

        `service` is "/upload" or "/download" where the body is the object's data.
        """
        query = {k: value for k, value in params.items() if value not in (None, "")}
        query["prettyPrint"] = "false"
        url = f"{self.root}{service}/storage/v1{path or self.path(name)}"
        what = f"{operation} gs://{self.bucket}/{name}"
        return Call(what, method, f"{url}?{urlencode(query)}")

    def new_retries(self) -> Retries:
        return Retries(self.deadline, self.backoff)

    def send(self, call: Call) -> Response:
        """Sends a call, again while that is safe and useful; raises the last error."""
        retries = self.new_retries()
        while True:
            try:
                return self.send_once(call, retries.ends)
            except StorageError as error:
                error.tries = retries.tries
                retry = call.idempotent and isinstance(error, Unavailable)
                if not (retry and retries.wait(error)):
                    raise

    def fetch_json(self, call: Call) -> dict[str, Any]:
        return read_json(call, self.send(call))

    def send_once(self, call: Call, ends: float) -> Response:
        """Sends a call once, which ends in time; raises a StorageError if it fails."""
        try:
            response = self.request(call, ends)
            status = response.status_code
            # 308 means "resume"; only calls to an upload session use PUT.
            if status // 100 == 2 or (status == 308 and call.method == "PUT"):
                return response
            # This reads the body, so the connection may be lost here too.
            error = self.error_of(call, response)
        except LOST_CONNECTION as lost:
            raise connection_lost(call, lost) from lost
        except requests.RequestException as invalid:  # for example, a wrong URL
            raise StorageError(f"{call.what}: {invalid!r}") from invalid
        raise error

    def request(self, call: Call, ends: float) -> Response:
        """Sends with a token; if the answer is 401, once more with a new token."""
        response = self.request_with_token(call, ends)
        if response.status_code == 401 and self.tokens:
            response.close()
            used = response.request.headers.get("Authorization", "")
            self.tokens.replace(used.removeprefix("Bearer "), time_until(ends))
            response = self.request_with_token(call, ends)
        return response

    def request_with_token(self, call: Call, ends: float) -> Response:
        headers = dict(call.headers or {})
        if self.tokens:
            self.tokens.sign(headers, time_until(ends))
        total: float | None = time_until(ends) + len(call.body or b"") / LEAST_RATE
        if call.method == "PUT" and call.body:  # GCS finishes it in FINAL_TIMEOUT
            total = None
        timeout: Any = Timeout(total, connect=CONNECT_TIMEOUT, read=call.timeout)
        return self.session.request(
            call.method,
            call.url,
            data=call.body,
            headers=headers,
            timeout=timeout,
            stream=call.stream,
            allow_redirects=False,  # GCS sends none, and 308 has another meaning here
        )

    def error_of(self, call: Call, response: Response) -> StorageError:
        status = response.status_code
        kind, advice = ERRORS.get(status, (StorageError, "check the arguments"))
        if is_temporary(status):
            kind, advice = Unavailable, "try again later"
        if kind is Refused:
            creds = self.tokens and self.tokens.credentials
            advice += f" {getattr(creds, 'service_account_email', 'you')}"
        after = response.headers.get("Retry-After", "")  # as a date, it is ignored
        message = f"{call.what}: {status} {error_reason(response)}; {advice}"
        return kind(message, status, float(after) if after.isdecimal() else 0)


def connection_lost(call: Call, error: Exception) -> Unavailable:
    # Whoever knows the URL of an upload session can write to it, and urllib3's errors
    # contain the URL. So its secret part is removed.
    reason = re.sub(r"upload_id=[^&\s'\"]+", "upload_id=...", repr(error))
    return Unavailable(f"{call.what}: connection lost: {reason}; try again later")


def error_reason(response: Response) -> str:
    """Returns the server's explanation; its body is JSON, XML, plain text or empty."""
    try:
        error = response.json()["error"]
        return f"{error['errors'][0]['reason']}: {error['message']}"
    except (ValueError, LookupError, TypeError):
        text = response.content[: 4 * REASON_MAX].decode("utf-8", "replace")
        return " ".join(text.split())[:REASON_MAX] or str(response.reason or "")


def read_json(call: Call, response: Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(answer := response.json(), dict):
            return answer
    where = call.url.partition("?")[0]
    message = f"{call.what}: the answer is not JSON; is {where} Cloud Storage?"
    raise Corrupted(message, response.status_code)


# ---- 4. Downloads --------------------------------------------------------------------
# When the connection is lost, a Range of the same generation asks for the rest, so all
# bytes are those of one object. A short body is detected by its length, a wrong byte
# only by the md5. The last chunk is yielded after that check, so that nobody takes a
# corrupted object for a complete one.
# Without `Accept-Encoding: gzip`, GCS would unpack an object that has Content-Encoding,
# and ignore Range. So that header is sent, and the body is read without decoding:
# https://docs.cloud.google.com/storage/docs/transcoding

CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
MD5 = re.compile(r"\bmd5=([^, ]+)")
UNKNOWN_SIZE = sys.maxsize  # when the answer has no Content-Length


@dataclass(slots=True)
class Download:
    """Reads bytes [position, end) of one generation; `call` is for all of it."""

    client: Client
    call: Call
    position: int
    end: int
    response: Response | None = None

    def call_for_rest(self) -> Call:
        headers = {"Accept-Encoding": "gzip"}
        if self.position or self.end < UNKNOWN_SIZE:
            last = self.end - 1 if self.end < UNKNOWN_SIZE else ""
            headers["Range"] = f"bytes={self.position}-{last}"
        return replace(self.call, headers=headers)

    def open(self, send: Callable[[Call], Response]) -> Response:
        self.response = response = send(self.call_for_rest())
        first, size = parse_extent(response)
        if first != self.position:
            raise Corrupted(f"{self.call.what}: the answer starts at byte {first}")
        answer = getattr(response.raw, "_original_response", None)
        if isinstance(answer, TimedAnswer):  # not if the session is the caller's
            answer.expect_file()
        self.end = min(self.end, size)
        return response

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes; sends a new request when the connection is lost."""
        retries, reached = self.client.new_retries(), self.position
        while self.position < self.end:
            try:
                chunk = self.read_chunk(retries.ends)
            except Unavailable as error:
                self.close()
                if self.position > reached:
                    reached = self.position
                    retries.restart()
                if not retries.wait(error):
                    raise
                continue
            if not chunk:
                return
            yield chunk

    def read_chunk(self, ends: float) -> bytes:
        send = partial(self.client.send_once, ends=ends)
        response = self.response or self.open(send)
        try:
            chunk: bytes = response.raw.read(CHUNK, decode_content=False)
        except LOST_CONNECTION as error:
            raise connection_lost(self.call, error) from error
        if not chunk and self.end < UNKNOWN_SIZE:
            end = EOFError(f"at byte {self.position} of {self.end}")
            raise connection_lost(self.call, end)
        chunk = chunk[: self.end - self.position]  # in case Range's end was ignored
        self.position += len(chunk)
        return chunk

    def checked_chunks(self) -> Generator[bytes, None, None]:
        """Opens the stream, yields b"", then the chunks; the last after the check."""
        md5, held = hashlib.md5(usedforsecurity=False), b""
        with contextlib.closing(self):
            response = self.open(self.client.send)
            whole = self.position == 0 and self.end == parse_extent(response)[1]
            expected = parse_md5(response) if whole else ""
            yield b""
            for chunk in self.chunks():
                if expected:
                    md5.update(chunk)
                if held:
                    yield held
                held = chunk
            if expected and expected != md5.hexdigest():
                raise Corrupted(f"{self.call.what}: md5 is not {expected}; try again")
            if held:
                yield held

    def close(self) -> None:
        """Returns the connection to the pool, or closes it if it was not read whole."""
        if self.response is not None:
            self.response.close()
            self.response = None


def parse_extent(response: Response) -> tuple[int, int]:
    """Returns the position of a body's first byte, and the size of the whole object."""
    if match := CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "")):
        return int(match[1]), int(match[2])
    return 0, int(response.headers.get("Content-Length", UNKNOWN_SIZE))


def parse_md5(response: Response) -> str:
    """Returns the md5 of `x-goog-hash: crc32c=...,md5=...` in hex, or ""."""
    match = MD5.search(response.headers.get("x-goog-hash", ""))
    return base64.b64decode(match[1]).hex() if match else ""


# ---- 5. Uploads ----------------------------------------------------------------------
# A small file is one multipart request, the only kind that can carry metadata as well.
# A larger one opens a session, then sends all its bytes in one PUT. GCS keeps what
# arrived before a failure, so smaller PUTs would only add round trips. After a failure
# an empty PUT asks the session how many bytes it has, and the upload continues there:
# https://docs.cloud.google.com/storage/docs/performing-resumable-uploads
#
#     PUT the rest ---> 200 done
#         \-----------> 308 bytes up to N are stored: PUT the rest from N + 1
#         \-----------> 408, 429, 5xx, connection lost: empty PUT ---> 200, 308 as above
#         \-----------> 200 without its object: empty PUT, as after a lost connection
#         \-----------> 404, 410 the session is gone: open another one, start at 0
#         \-----------> anything else: raise the error

JSON = {"Content-Type": "application/json; charset=UTF-8"}


@dataclass(frozen=True, slots=True)
class Upload:
    client: Client
    name: str
    source: BinaryIO
    size: int
    md5: str
    metadata: Mapping[str, str]
    content_type: str
    if_generation: int | None

    def new_call(self, kind: str, headers: Headers, body: bytes | Body) -> Call:
        params: dict[str, object] = {"uploadType": kind, "name": self.name}
        params |= {"ifGenerationMatch": self.if_generation, "fields": FIELDS}
        path = self.client.path()
        call = self.client.new_call(
            "insert", self.name, "POST", params, path=path, service="/upload"
        )
        # Opening a session stores nothing, so it is always safe to repeat.
        safe = self.if_generation is not None or kind == "resumable"
        return replace(call, headers=headers, body=body, idempotent=safe)

    def resource(self) -> bytes:
        """Returns the object's attributes; GCS stores nothing if the md5 is wrong."""
        resource = {
            "name": self.name,
            "contentType": self.content_type,
            "md5Hash": base64.b64encode(bytes.fromhex(self.md5)).decode(),
            "metadata": dict(self.metadata),
        }
        return json.dumps(resource).encode()

    def send_multipart(self) -> Object:
        mark = os.urandom(16).hex()  # 128 random bits: no file contains them by chance
        part = f"--{mark}\r\nContent-Type: {JSON['Content-Type']}\r\n\r\n".encode()
        media = f"\r\n--{mark}\r\nContent-Type: {self.content_type}\r\n\r\n".encode()
        head, tail = part + self.resource() + media, f"\r\n--{mark}--".encode()
        headers = {"Content-Type": f"multipart/related; boundary={mark}"}
        body = Body(self.source, 0, self.size, head, tail)
        call = self.new_call("multipart", headers, body)
        return read_object(self.client.fetch_json(call))

    def send_resumable(self) -> Object:
        """Follows the diagram above, until the deadline passes without new bytes."""
        retries, session = self.client.new_retries(), self.open_session()
        position: int | None = 0  # None: unknown, so the session is asked
        reached = 0
        while True:
            call, started = self.put_call(session, position), time.monotonic()
            try:
                answer = self.client.send_once(call, retries.ends)
                if answer.status_code != 308:
                    return read_object(read_json(call, answer))
                position = bytes_stored(answer)
                failure: StorageError = Unavailable(f"{call.what}: stuck at {position}")
            except StorageError as error:
                failure, failure.tries = error, retries.tries
                session, position = self.recover(error, session)
                if call.body:  # the time that sending took does not count
                    retries.ends += time.monotonic() - started
            if position is not None and position > reached:
                reached = position
                retries.restart()
            elif not retries.wait(failure):
                raise failure

    def recover(self, error: StorageError, session: str) -> tuple[str, int | None]:
        """Returns the session and position to continue with, or raises the error."""
        if isinstance(error, Unavailable | Corrupted):
            return session, None
        if error.status not in (404, 410) or self.if_generation is None:
            raise error
        try:
            return self.open_session(), 0
        except PreconditionFailed as failed:
            failed.tries += 1  # the session that is gone may have created the object
            raise

    def open_session(self) -> str:
        headers = JSON | {"X-Upload-Content-Type": self.content_type}
        headers["X-Upload-Content-Length"] = str(self.size)
        call = self.new_call("resumable", headers, self.resource())
        session = self.client.send(call).headers.get("Location", "")
        if not session.startswith(f"{self.client.root}/"):  # it would get the token
            where = session.partition("?")[0][:REASON_MAX]
            advice = f"it must be at {self.client.root}/; check STORAGE_EMULATOR_HOST"
            raise Corrupted(f"{call.what}: Location is {where!r}; {advice}")
        return session

    def put_call(self, session: str, position: int | None) -> Call:
        """Returns the PUT of the bytes from `position`, or the empty one if None."""
        what = f"insert gs://{self.client.bucket}/{self.name}"
        if position is None or position == self.size:
            return Call(what, "PUT", session, {"Content-Range": f"bytes */{self.size}"})
        headers = {"Content-Range": f"bytes {position}-{self.size - 1}/{self.size}"}
        body = Body(self.source, position, self.size)
        return Call(what, "PUT", session, headers, body, timeout=FINAL_TIMEOUT)


def bytes_stored(answer: Response) -> int:
    """Returns how many bytes an upload session has; without a Range header, none."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    return int(last) + 1 if last else 0


# ---- 6. The bucket -------------------------------------------------------------------
# The public part: one method for each method of the API, each with its precondition. A
# write whose answer was lost is sent again, and then its precondition fails because the
# first try succeeded. So after a 412 to a retry the object is read: if it is what we
# sent, the write is a success. The same holds for a retried delete that finds nothing.
# A 412 to the first try means another writer, and costs no further request.


class Bucket:
    """The objects of one bucket; threads may share it.

    `session` replaces our own: its proxies, adapters and trust_env are the caller's.
    Its answers end by the deadline only if a TimedAdapter is mounted.
    `credentials` are google-auth's; without them, see "Environment" at the top.
    `deadline` is how many seconds each request may take without progress; the last try
    may end a second or two later. Who needs two deadlines makes two Buckets, which may
    share a session.
    """

    def __init__(
        self,
        name: str,
        *,
        session: Session | None = None,
        credentials: Credentials = None,
        deadline: float = DEADLINE,
    ) -> None:
        self.client = Client(name, session, credentials, deadline)
        self.multipart_max, self.page_size = MULTIPART_MAX, PAGE_SIZE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the kept connections, except those of a session the caller gave."""
        self.client.close()

    def pages(self, prefix: str = "", *, delimiter: str = "") -> Iterator[Listing]:
        """Yields the pages of a listing; each is requested when the caller wants it."""
        params: dict[str, object] = {"prefix": prefix, "delimiter": delimiter}
        params |= {"maxResults": self.page_size, "pageToken": ""}
        params["fields"] = f"items({FIELDS}),prefixes,nextPageToken"
        path = self.client.path()
        while True:
            call = self.client.new_call("list", prefix, "GET", params, path=path)
            page = self.client.fetch_json(call)
            objects = [read_object(item) for item in page.get("items", ())]
            yield objects, page.get("prefixes", [])
            params["pageToken"] = page.get("nextPageToken")
            # Only a missing token means the end: any page may be short, or empty.
            if not params["pageToken"]:
                return

    def list(self, prefix: str = "", *, delimiter: str = "") -> Listing:
        """Returns all objects under a prefix and, with a delimiter, the "folders"."""
        pages = tuple(self.pages(prefix, delimiter=delimiter))
        objects = [item for page in pages for item in page[0]]
        return objects, [name for page in pages for name in page[1]]

    def get(self, name: str) -> Object:
        """Returns the live generation of an object; raises NotFound."""
        call = self.client.new_call("get", name, "GET", {"fields": FIELDS})
        return read_object(self.client.fetch_json(call))

    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Generator[bytes, None, None]:
        """Returns the chunks of bytes [start, stop) of one generation.

        The request is sent at once, so NotFound is raised here and not by the first
        chunk. If the md5 of a whole object is wrong, Corrupted is raised instead of the
        last chunk. `.close()` of the result frees the connection early.
        """
        if stop is not None and stop <= start:  # Range cannot express it
            raise ValueError(f"empty range of {name!r}: from {start} to {stop}")
        params = {"alt": "media", "generation": generation}
        call = self.client.new_call("read", name, "GET", params, service="/download")
        end = UNKNOWN_SIZE if stop is None else stop
        download = Download(self.client, replace(call, stream=True), start, end)
        chunks = download.checked_chunks()
        next(chunks)
        return chunks

    def insert(
        self,
        name: str,
        source: BinaryIO,
        *,
        metadata: Mapping[str, str],
        if_generation: int | None = 0,
        content_type: str = "application/octet-stream",
        md5: str = "",
    ) -> Object:
        """Stores a seekable binary file, from its first byte to its last.

        `if_generation` is the generation to replace; 0 means that there must be none,
        None any or none; with None a failed request is not repeated, as that is unsafe.
        `md5` in hex saves reading the file twice. Raises PreconditionFailed, Corrupted.
        """
        md5, size = md5 or file_md5(source), source.seek(0, os.SEEK_END)
        upload = Upload(
            self.client, name, source, size, md5, metadata, content_type, if_generation
        )
        small = size <= self.multipart_max
        try:
            stored = upload.send_multipart() if small else upload.send_resumable()
        except PreconditionFailed as error:
            return self.confirm_write(error, name, lambda it: is_copy(it, upload))
        if (stored.size, stored.md5) != (size, md5):
            # The error below matters more than a failure to delete.
            with contextlib.suppress(StorageError):
                self.delete(name, generation=stored.generation)
            raise Corrupted(f"insert {name}: stored {stored}, not {md5}; send it again")
        return stored

    def confirm_write(
        self, error: StorageError, name: str, is_ours: Callable[[Object], bool]
    ) -> Object:
        """Returns the object if our first try wrote it; otherwise raises the error."""
        if error.tries == 1:
            raise error
        try:
            stored = self.get(name)
        except NotFound:
            raise error from None
        if not is_ours(stored):
            raise error
        return stored

    def patch(
        self, name: str, metadata: Metadata, *, generation: int, metageneration: int
    ) -> Object:
        """Changes the given keys of the custom metadata; None removes a key."""
        params: dict[str, object] = {"generation": generation, "fields": FIELDS}
        params["ifMetagenerationMatch"] = metageneration

        def is_ours(stored: Object) -> bool:
            return stored.generation == generation and has_metadata(stored, metadata)

        call = self.client.new_call("patch", name, "PATCH", params)
        body = json.dumps({"metadata": dict(metadata)}).encode()
        try:
            answer = self.client.fetch_json(replace(call, headers=JSON, body=body))
            return read_object(answer)
        except PreconditionFailed as error:
            return self.confirm_write(error, name, is_ours)

    def delete(self, name: str, *, generation: int) -> None:
        """Deletes an object, if it is still of this generation."""
        params = {"ifGenerationMatch": generation}
        call = self.client.new_call("delete", name, "DELETE", params)
        try:
            self.client.send(call)
        except (NotFound, PreconditionFailed) as error:
            if error.tries == 1:
                raise

    def rewrite(
        self, name: str, to: str, *, generation: int, if_generation: int | None = 0
    ) -> Object:
        """Copies one generation to another name, with its metadata, inside GCS."""
        path = f"{self.client.path(name)}/rewriteTo{self.client.path(to)}"
        params: dict[str, object] = {"sourceGeneration": generation}
        params["ifGenerationMatch"] = if_generation
        params["fields"] = f"done,rewriteToken,resource({FIELDS})"
        while True:
            call = self.client.new_call("rewrite", name, "POST", params, path=path)
            call = replace(call, idempotent=if_generation is not None)
            try:
                answer = self.client.fetch_json(call)
            except PreconditionFailed as error:
                return self.confirm_write(
                    error, to, lambda it: is_copy(it, self.get(name))
                )
            if not answer.get("rewriteToken"):
                return read_object(answer.get("resource", {}))
            params["rewriteToken"] = answer["rewriteToken"]  # GCS needs another request


def is_copy(stored: Object, sent: Upload | Object) -> bool:
    same_bytes = (stored.size, stored.md5) == (sent.size, sent.md5)
    return same_bytes and has_metadata(stored, sent.metadata)


def file_md5(source: BinaryIO) -> str:
    source.seek(0)
    md5 = partial(hashlib.md5, usedforsecurity=False)
    return hashlib.file_digest(source, md5).hexdigest()  # type: ignore[arg-type]
