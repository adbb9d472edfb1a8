"""A client of the Google Cloud Storage JSON API on google-auth and requests alone.

    Bucket.<operation> -> Ask -> Client.call -> Client.send -> session -> GCS
       (one method per     (a request,  (again, while   (once; errors
        API method)         as data)     it is safe)     become ours)

Contents
    1. Objects and errors   what comes back, what is raised
    2. Who and where        endpoint, credentials, session
    3. Sending              one request, its timeouts, its retries
    4. Downloads            a stream that heals itself and checks its md5
    5. Uploads              one request up to 8 MiB, a resumable session above
    6. The bucket           list, get, read, insert, patch, delete, rewrite

How to use it
    bucket = Bucket("my-bucket")
    with open("a.whl", "rb") as file:
        stored = bucket.insert("packages/a.whl", file, metadata={"sha256": "..."})
    for chunk in bucket.read(stored.name, generation=stored.generation):
        ...
    One Bucket may be shared by any number of threads. Nothing happens at import, and
    nothing is sent before the first call.

Environment
    STORAGE_EMULATOR_HOST            an emulator's URL; requests are then anonymous
    GOOGLE_APPLICATION_CREDENTIALS   as everywhere: Application Default Credentials
    GAE_ENV, K_SERVICE               set by App Engine and Cloud Run: credentials come
                                     from the metadata server, without probing for it
    HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE   read once, when a Bucket is made

What it promises
    A call is repeated only if repeating it cannot change what it means, and no longer
    than `deadline` without progress. Bodies are streamed in constant memory. What was
    stored, and what was read whole, agreed with its md5. Every error is a StorageError
    and also the built-in it resembles (FileNotFoundError, FileExistsError, ...).

What it is not: no buckets, ACLs, compose, signed URLs or batches.
Part of pypi-ae (MIT licence), whose tests cover it; made to be copied on its own too.
"""

# ruff: noqa: N818 (an error's name says what happened, as FileNotFoundError's does)

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from http.client import HTTPException
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlencode

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

__version__ = "1.0"

DEADLINE = 8.0  # s without progress; hatch hangs up 10 s after it has sent its body
BACKOFF, BACKOFF_MAX = 0.5, 4.0  # s; full jitter: a pause is uniform(0, 0.5, 1, 2, 4)
CONNECT_TIMEOUT = 4.0  # s; urllib3 also gives each block of a body this long to leave
READ_TIMEOUT = 5.0  # s; below DEADLINE, so that a lost answer is asked for once more
READ_TIMEOUT_MIN = 1.0  # s; what the last try before the deadline gets at least
FINAL_TIMEOUT = 20.0  # s; GCS may need a while to finish a large object

MULTIPART_MAX = 8 << 20  # as Google's library: one request below, a session above
BLOCK = 64 << 10  # sent at once: it leaves within CONNECT_TIMEOUT at 16 KiB/s
CHUNK = 256 << 10  # read at once: larger is no faster, and two of them are held
POOL = 64  # kept connections; threads beyond that reconnect, with a warning in the log
PAGE = 1000  # items on a page of a listing: the most GCS gives
REASON_MAX = 300  # characters of a server's explanation; some send pages of HTML


# ---- 1. Objects and errors -----------------------------------------------------------
# GCS tells sizes and generations as strings and digests in base64; here they are what
# Python uses. Each error is a StorageError, which knows its HTTP status, and also the
# built-in error that means the same for a file: callers that work on directories too
# need one `except`, and need not import this module to write it.


class Object(NamedTuple):
    """One generation of an object; `created` in POSIX seconds, `md5` in hex."""

    name: str
    size: int
    generation: int
    metageneration: int
    md5: str  # "" for composite objects, which have none
    created: float
    metadata: Mapping[str, str]


class StorageError(OSError):
    """An operation failed: says which, on what, why, and what to do about it.

    `status` is the HTTP status, 0 if there was no answer. `tries` counts how often the
    request was sent; if more than once, an earlier try may have had its effect.
    """

    def __init__(self, message: str, status: int = 0, retry_after: float = 0) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.tries = status, retry_after, 1

    def __str__(self) -> str:
        return f"{self.args[0]} (tries: {self.tries})"


class NotFound(StorageError, FileNotFoundError):
    """404: no such object, generation or bucket."""


class PreconditionFailed(StorageError, FileExistsError):
    """412: the object is not, or no longer, as the caller believed."""


class Refused(StorageError, PermissionError):
    """401, 403, or no usable credentials."""


class Unavailable(StorageError, ConnectionError):
    """408, 429, 5xx, broken connections and timeouts, until patience ran out."""


class Corrupted(StorageError):
    """Sizes or checksums disagree, or an answer makes no sense."""


ERRORS: Mapping[int, tuple[type[StorageError], str]] = {
    401: (Refused, "these credentials are not accepted:"),
    403: (Refused, "grant roles/storage.objectUser on the bucket to"),
    404: (NotFound, "check the names of the bucket and of the object"),
    412: (PreconditionFailed, "somebody else changed it: look at it again"),
}
FIELDS = "name,size,generation,metageneration,md5Hash,timeCreated,metadata"


def read_object(item: Mapping[str, Any]) -> Object:
    """Makes an Object of a resource; raises Corrupted if it is none."""
    try:
        # fake-gcs-server answers a patch in a shape of its own: hence two fallbacks.
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
        raise Corrupted(f"no object: {str(item)[:REASON_MAX]}", 200) from error


def holds(found: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    """Tells whether `found` is what a write of `wanted` leaves; None: no such key."""
    return all(found.get(key) == value for key, value in wanted.items())


# ---- 2. Who and where ----------------------------------------------------------------
# google.auth is imported with the first token, and never for an emulator: as it brings
# cryptography along, it costs more than all the rest. On App Engine and Cloud Run there
# is a metadata server; google.auth.default() would look for key files and for gcloud,
# then ping it, before it believes that.

ROOT = "https://storage.googleapis.com"
UNIVERSE = "googleapis.com"  # ROOT's: said here, the metadata server is not asked
SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)  # roles set the limits
Credentials = Any  # google.auth.credentials.Credentials, which has no annotations


def find_emulator(environ: Mapping[str, str]) -> str:
    """Returns the emulator's root, or ""; with a scheme or, as Go's client, without."""
    host = environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    return host if not host or "://" in host else f"http://{host}"


def find_credentials(environ: Mapping[str, str]) -> Credentials:
    served = environ.get("GAE_ENV") or environ.get("K_SERVICE")
    if served and not environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        from google.auth import compute_engine

        of_metadata_server: Any = compute_engine.Credentials  # no annotations
        return of_metadata_server(scopes=SCOPES, universe_domain=UNIVERSE)
    import google.auth

    return google.auth.default(scopes=SCOPES)[0]


@contextlib.contextmanager
def auth_errors() -> Iterator[None]:
    """Turns google-auth's errors into ours."""
    from google.auth import exceptions

    try:
        yield
    except exceptions.GoogleAuthError as error:
        if isinstance(error.__cause__ or error, exceptions.TransportError):
            raise Unavailable(f"get a token: {error}; try again later") from error
        advice = "gcloud auth application-default login, or a service account"
        raise Refused(f"get a token: {error}; use {advice}") from error


def new_session(root: str) -> requests.Session:
    session = requests.Session()
    # With trust_env, each request would search the environment for proxies again, and
    # read ~/.netrc, where an entry for the host would displace our own Authorization.
    session.trust_env = False
    session.proxies.update(requests.utils.get_environ_proxies(root))
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    # Google compresses its answers for user agents that say gzip.
    session.headers["User-Agent"] = f"gcs_rest/{__version__} (gzip)"
    session.mount(root, HTTPAdapter(pool_connections=1, pool_maxsize=POOL))
    return session


# ---- 3. Sending ----------------------------------------------------------------------
# An Ask is a request as data. `Client.send` is the one place where requests are sent,
# timed out and have their errors translated; `Client.call` repeats it after a pause.
# - Repeated are 408, 429, 5xx and broken connections, of asks that are idempotent by
#   nature or by a precondition: https://docs.cloud.google.com/storage/docs/retry-strategy
# - A 401 means that a token died early: one refresh, then the same request again. Its
#   body is an iterable that starts over, never a file that the first try has used up.
# - What a retry makes ambiguous (a 412 may be our own first try's), callers settle.


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes `start` to `size` of a file between two strings; may be sent again."""

    source: BinaryIO
    start: int
    size: int
    head: bytes = b""
    tail: bytes = b""

    def __len__(self) -> int:  # for requests, which makes it the Content-Length
        return len(self.head) + self.size - self.start + len(self.tail)

    def __iter__(self) -> Iterator[bytes]:
        self.source.seek(self.start)
        left, head = self.size - self.start, self.head
        while left > BLOCK:
            yield head + self.take(BLOCK)
            left, head = left - BLOCK, b""
        yield head + self.take(left) + self.tail

    def take(self, count: int) -> bytes:
        block = self.source.read(count)
        if len(block) < count:  # not an OSError: urllib3 would call the network broken
            raise EOFError("the source shrank while it was being sent")
        return block


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, as data: what it is about (for messages), and how it is sent."""

    what: str
    method: str
    url: str
    headers: Mapping[str, str] | None = None
    body: bytes | Body | None = None
    idempotent: bool = True
    stream: bool = False
    timeout: float = READ_TIMEOUT


class Patience:
    """How long to go on trying: pauses with full jitter, until a deadline."""

    def __init__(self, seconds: float, backoff: float) -> None:
        self.seconds, self.backoff, self.tries = seconds, backoff, 1
        self.renew()

    def renew(self) -> None:
        """Starts again, since progress was made."""
        self.ends, self.ceiling = time.monotonic() + self.seconds, self.backoff

    def left(self) -> float:
        return self.ends - time.monotonic()

    def wait(self, error: StorageError) -> bool:
        """Sleeps, at least as long as the server asked for; False: there is no time."""
        error.tries = self.tries
        pause = max(random.uniform(0, self.ceiling), error.retry_after)
        if pause > self.left():
            return False
        time.sleep(pause)
        self.tries, self.ceiling = self.tries + 1, min(2 * self.ceiling, BACKOFF_MAX)
        return True


# What a broken connection raises: before the answer, within it, in a streamed body
# (HTTPError is urllib3's base class and has nothing to do with a status).
BROKEN = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    HTTPError,
    HTTPException,
)


class Client:
    """Sends requests about one bucket, with a token, until they are answered."""

    def __init__(
        self,
        bucket: str,
        session: requests.Session | None,
        credentials: Credentials | None,
        deadline: float,
    ) -> None:
        emulator = find_emulator(os.environ)
        self.bucket, self.root = bucket, emulator or ROOT
        self.session = session or new_session(self.root)
        self.anonymous = bool(emulator) and credentials is None
        self.credentials = credentials
        self.transport: Any = None  # what google-auth gets its tokens with
        self.lock = threading.Lock()  # of these two: only one thread gets a token
        self.deadline, self.backoff = deadline, BACKOFF

    def path(self, name: str = "") -> str:
        """Returns the path of an object, or of all."""
        path = f"/b/{quote(self.bucket, safe='')}/o"
        return f"{path}/{quote(name, safe='')}" if name else path

    def ask(
        self,
        operation: str,
        name: str,
        method: str,
        params: Mapping[str, object],
        *,
        path: str = "",
        service: str = "",
    ) -> Ask:
        """Returns a request about an object or a `path`; skips params that are None."""
        query = {key: value for key, value in params.items() if value is not None}
        query["prettyPrint"] = "false"
        url = f"{self.root}{service}/storage/v1{path or self.path(name)}"
        what = f"{operation} gs://{self.bucket}/{name}"
        return Ask(what, method, f"{url}?{urlencode(query)}")

    def patience(self) -> Patience:
        return Patience(self.deadline, self.backoff)

    def call(self, ask: Ask) -> requests.Response:
        """Sends until it is answered; raises the last error."""
        patience = self.patience()
        while True:
            try:
                return self.send(ask, patience.left())
            except StorageError as error:
                error.tries = patience.tries
                again = ask.idempotent and isinstance(error, Unavailable)
                if not (again and patience.wait(error)):
                    raise

    def call_json(self, ask: Ask) -> dict[str, Any]:
        return read_json(ask, self.call(ask))

    def send(self, ask: Ask, left: float = sys.maxsize) -> requests.Response:
        """Sends once; raises a StorageError for whatever is not a success."""
        timeout = (CONNECT_TIMEOUT, min(ask.timeout, max(left, READ_TIMEOUT_MIN)))
        try:
            response = self.exchange(ask, timeout)
            status = response.status_code
            if status // 100 == 2 or (status == 308 and ask.method == "PUT"):
                return response  # 308: "resume", of sessions, which alone are PUT
            error = self.refusal(ask, response)  # reads the body, which may break too
        except BROKEN as broken:
            raise lost(ask, broken) from broken
        except requests.RequestException as invalid:  # a URL or a proxy that is none
            raise StorageError(f"{ask.what}: {invalid!r}") from invalid
        raise error

    def exchange(self, ask: Ask, timeout: tuple[float, float]) -> requests.Response:
        """Sends with a token and, if that is answered 401, once more with a new one."""
        response = self.request(ask, timeout)
        if response.status_code == 401 and not self.anonymous:
            response.close()
            self.renew(response.request.headers.get("Authorization"))
            response = self.request(ask, timeout)
        return response

    def request(self, ask: Ask, timeout: tuple[float, float]) -> requests.Response:
        headers = dict(ask.headers or {})
        if not self.anonymous:
            with self.lock, auth_errors():
                credentials = self.identity()
                credentials.before_request(self.transport, ask.method, ask.url, headers)
        return self.session.request(
            ask.method,
            ask.url,
            data=ask.body,
            headers=headers,
            timeout=timeout,
            stream=ask.stream,
            allow_redirects=False,  # there are none: 308 means something else here
        )

    def renew(self, used: str | None) -> None:
        """Gets a new token, unless another thread has replaced the used one already."""
        with self.lock, auth_errors():
            credentials = self.identity()
            if used == f"Bearer {credentials.token}":
                credentials.refresh(self.transport)

    def identity(self) -> Credentials:
        """Returns the credentials, found on first use; called under the lock."""
        if self.transport is None:
            from google.auth.transport.requests import Request

            # With a session of its own, as it closes that in the end. Its timeouts and
            # retries are google-auth's: 3 s and 5 times for the metadata server.
            self.transport = Request()
        if self.credentials is None:
            self.credentials = find_credentials(os.environ)
        return self.credentials

    def refusal(self, ask: Ask, response: requests.Response) -> StorageError:
        status = response.status_code
        kind, advice = ERRORS.get(status, (StorageError, "this is a bug or a setting"))
        if status in (408, 429) or status >= 500:
            kind, advice = Unavailable, "try again later"
        if kind is Refused:
            advice += f" {getattr(self.credentials, 'service_account_email', 'you')}"
        after = response.headers.get("Retry-After", "")  # as a date: not worth parsing
        message = f"{ask.what}: {status} {reason(response)}; {advice}"
        return kind(message, status, float(after) if after.isdecimal() else 0)


def lost(ask: Ask, error: Exception) -> Unavailable:
    # Who knows a session's URL can write to it, and urllib3 tells it to every log.
    told = re.sub(r"upload_id=[^&\s'\"]+", "upload_id=...", repr(error))
    return Unavailable(f"{ask.what}: no answer: {told}; try again later")


def reason(response: requests.Response) -> str:
    """Returns the server's explanation, which is JSON, XML, plain text or missing."""
    try:
        error = response.json()["error"]
        return f"{error['errors'][0]['reason']}: {error['message']}"
    except (ValueError, LookupError, TypeError):
        text = response.content[: 4 * REASON_MAX].decode("utf-8", "replace")
        return " ".join(text.split())[:REASON_MAX] or str(response.reason or "")


def read_json(ask: Ask, response: requests.Response) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(answer := response.json(), dict):
            return answer
    where = ask.url.partition("?")[0]
    message = f"{ask.what}: the answer is not JSON; is {where} Cloud Storage?"
    raise Corrupted(message, response.status_code)


# ---- 4. Downloads --------------------------------------------------------------------
# A stream that breaks is continued with a Range of the same generation, so its bytes
# are of one object. `Accept-Encoding: gzip` and raw reads are how GCS is told to send
# the bytes as they are stored: without, it unpacks objects with a Content-Encoding, and
# ignores Range (https://docs.cloud.google.com/storage/docs/transcoding). A broken or
# short body is noticed by its length, a wrong byte by the md5 only, and before the last
# chunk is given away: nobody can take a corrupted body for a complete one.

CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
UNKNOWN = sys.maxsize  # the size of a body that came without one


class Download:
    """Bytes [position, stop) of one generation."""

    def __init__(self, client: Client, ask: Ask, start: int, stop: int | None) -> None:
        self.client, self.basis = client, ask
        self.position, self.end = start, UNKNOWN if stop is None else stop
        self.response: requests.Response | None = None

    def ask(self) -> Ask:
        headers = {"Accept-Encoding": "gzip"}
        if self.position or self.end < UNKNOWN:
            last = self.end - 1 if self.end < UNKNOWN else ""
            headers["Range"] = f"bytes={self.position}-{last}"
        return replace(self.basis, headers=headers)

    def open(self, send: Callable[[Ask], requests.Response]) -> requests.Response:
        self.response = response = send(self.ask())
        first, size = extent(response)
        if first != (asked := self.position):
            raise Corrupted(f"{self.basis.what}: asked for {asked}, got {first}")
        self.end = min(self.end, size)
        return response

    def chunks(self) -> Iterator[bytes]:
        """Yields the bytes, opening the stream again where it broke."""
        patience, mark = self.client.patience(), self.position
        while self.position < self.end:
            try:
                chunk = self.take()
            except Unavailable as error:
                self.close()
                if self.position > mark:
                    mark = self.position
                    patience.renew()
                if not patience.wait(error):
                    raise
                continue
            if not chunk:
                return
            yield chunk

    def take(self) -> bytes:
        response = self.response or self.open(self.client.send)
        try:
            chunk: bytes = response.raw.read(CHUNK, decode_content=False)
        except BROKEN as error:
            raise lost(self.basis, error) from error
        if not chunk and self.end < UNKNOWN:
            raise lost(self.basis, EOFError(f"at {self.position} of {self.end}"))
        chunk = chunk[: self.end - self.position]  # should the Range's end be ignored
        self.position += len(chunk)
        return chunk

    def checked(self) -> Generator[bytes, None, None]:
        """Opens the stream, yields b"", then the chunks, the last one when checked."""
        md5, held = hashlib.md5(usedforsecurity=False), b""
        with contextlib.closing(self):
            response = self.open(self.client.call)
            whole = self.position == 0 and self.end == extent(response)[1]
            stated = stated_md5(response) if whole else ""
            yield b""
            for chunk in self.chunks():
                if stated:
                    md5.update(chunk)  # in a thread beside, it would take as long
                if held:
                    yield held
                held = chunk
            if stated and stated != md5.hexdigest():
                raise Corrupted(f"{self.basis.what}: md5 is not {stated}; try again")
            if held:
                yield held

    def close(self) -> None:
        """Gives the connection back, or closes it if there is more to come on it."""
        if self.response is not None:
            self.response.close()
            self.response = None


def extent(response: requests.Response) -> tuple[int, int]:
    """Returns where a body starts in its object, and the size of the whole object."""
    headers = response.headers
    if found := CONTENT_RANGE.fullmatch(headers.get("Content-Range", "")):
        return int(found[1]), int(found[2])
    return 0, int(headers.get("Content-Length", UNKNOWN))


def stated_md5(response: requests.Response) -> str:
    """Returns the md5 of `x-goog-hash: crc32c=...,md5=...` in hex, or ""."""
    for part in response.headers.get("x-goog-hash", "").split(","):
        kind, _, value = part.strip().partition("=")
        if kind == "md5":
            return base64.b64decode(value).hex()
    return ""


# ---- 5. Uploads ----------------------------------------------------------------------
# Small files go in one multipart request, the only one that carries metadata as well.
# Larger ones open a session, then PUT all that remains in one request, streamed: GCS
# keeps what arrived before a failure, so sending piece by piece would only add round
# trips. After a failure the session tells how far it got, and we continue there:
# https://docs.cloud.google.com/storage/docs/performing-resumable-uploads
#
#     PUT the rest ---> 200 done
#         \-----------> 308 stored up to N: PUT the rest from N + 1
#         \-----------> 408, 429, 5xx, broken: ask (an empty PUT) ---> 200, 308: above
#         \-----------> 404, 410 the session is gone: open another, start from 0
#         \-----------> anything else: give up

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

    def ask(self, kind: str, headers: Mapping[str, str], body: bytes | Body) -> Ask:
        params: dict[str, object] = {"uploadType": kind, "name": self.name}
        params |= {"ifGenerationMatch": self.if_generation, "fields": FIELDS}
        path = self.client.path()
        ask = self.client.ask(
            "insert", self.name, "POST", params, path=path, service="/upload"
        )
        # Opening a session twice is harmless: by itself it stores nothing.
        safe = self.if_generation is not None or kind == "resumable"
        return replace(ask, headers=headers, body=body, idempotent=safe)

    def resource(self) -> bytes:
        """Returns what is stored beside the bytes; GCS refuses them if md5 differs."""
        resource = {
            "name": self.name,
            "contentType": self.content_type,
            "md5Hash": base64.b64encode(bytes.fromhex(self.md5)).decode(),
            "metadata": dict(self.metadata),
        }
        return json.dumps(resource).encode()

    def in_one_request(self) -> Object:
        mark = os.urandom(16).hex()  # 128 random bits, which no file contains
        part = f"--{mark}\r\nContent-Type: {JSON['Content-Type']}\r\n\r\n".encode()
        media = f"\r\n--{mark}\r\nContent-Type: {self.content_type}\r\n\r\n".encode()
        head, tail = part + self.resource() + media, f"\r\n--{mark}--".encode()
        headers = {"Content-Type": f"multipart/related; boundary={mark}"}
        body = Body(self.source, 0, self.size, head, tail)
        return read_object(self.client.call_json(self.ask("multipart", headers, body)))

    def in_a_session(self) -> Object:
        """Walks through the states drawn above, for as long as bytes get through."""
        patience, session = self.client.patience(), self.open()
        position: int | None = 0  # None: ask the session
        reached = 0
        while True:
            ask, started = self.put(session, position), time.monotonic()
            try:
                answer = self.client.send(ask)
                if answer.status_code != 308:
                    return read_object(read_json(ask, answer))
                position = persisted(answer)
                trouble: StorageError = lost(ask, EOFError(f"stuck at byte {position}"))
            except StorageError as error:
                trouble, trouble.tries = error, patience.tries
                session, position = self.recover(error, session)
                if ask.body:  # the time that a large body took is not held against it
                    patience.ends += time.monotonic() - started
            if position is not None and position > reached:
                reached = position
                patience.renew()
            elif not patience.wait(trouble):
                raise trouble

    def recover(self, error: StorageError, session: str) -> tuple[str, int | None]:
        """Returns the session to go on with and the position, or raises the error."""
        if isinstance(error, Unavailable):
            return session, None
        if error.status not in (404, 410) or self.if_generation is None:
            raise error
        try:
            return self.open(), 0
        except PreconditionFailed as late:
            late.tries += 1  # the session that is gone may have been the one that won
            raise

    def open(self) -> str:
        headers = {
            "X-Upload-Content-Type": self.content_type,
            "X-Upload-Content-Length": str(self.size),
        }
        ask = self.ask("resumable", JSON | headers, self.resource())
        session = self.client.call(ask).headers.get("Location")
        if not session:
            raise Corrupted(f"{ask.what}: the new session has no Location")
        return session

    def put(self, session: str, position: int | None) -> Ask:
        """Returns the request for the rest or, empty, for how far the session got."""
        what = f"insert gs://{self.client.bucket}/{self.name}"
        if position is None or position == self.size:
            return Ask(what, "PUT", session, {"Content-Range": f"bytes */{self.size}"})
        headers = {"Content-Range": f"bytes {position}-{self.size - 1}/{self.size}"}
        body = Body(self.source, position, self.size)
        return Ask(what, "PUT", session, headers, body, timeout=FINAL_TIMEOUT)


def persisted(answer: requests.Response) -> int:
    """Returns how many bytes a session has stored: none if it tells no Range."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    return int(last) + 1 if last else 0


# ---- 6. The bucket -------------------------------------------------------------------
# What others call: one method per method of the API, each with its precondition. What a
# lost answer leaves open is settled here. A create answered 412 at the second try may
# have succeeded at the first: it has, if what is there now is what we wanted to put
# there. Likewise a patch, a rewrite, and a removal that finds nothing left to remove.
# A 412 at the first try is another's doing, and costs no further request.


class Bucket:
    """The objects of one bucket; may be shared by threads.

    `session` replaces ours (its proxies, adapters and trust_env are then the caller's),
    `credentials` are google-auth's; without, see "Environment" at the top. `deadline`
    bounds in seconds how long a call that makes no progress is repeated.
    """

    def __init__(
        self,
        name: str,
        *,
        session: requests.Session | None = None,
        credentials: Credentials | None = None,
        deadline: float = DEADLINE,
    ) -> None:
        self.client = Client(name, session, credentials, deadline)
        self.multipart_max, self.page = MULTIPART_MAX, PAGE

    def list(
        self, prefix: str = "", *, delimiter: str = ""
    ) -> tuple[list[Object], list[str]]:
        """Returns all objects under a prefix and, with a delimiter, the "folders"."""
        objects: list[Object] = []
        prefixes: list[str] = []
        token: str | None = None
        params = {"prefix": prefix or None, "delimiter": delimiter or None}
        params["fields"] = f"items({FIELDS}),prefixes,nextPageToken"
        path, size = self.client.path(), {"maxResults": self.page}
        while True:
            paging = params | size | {"pageToken": token}
            ask = self.client.ask("list", prefix, "GET", paging, path=path)
            page = self.client.call_json(ask)
            objects += map(read_object, page.get("items", ()))
            prefixes += page.get("prefixes", ())
            token = page.get("nextPageToken")
            if not token:  # the only sign of the end: a page may be short, or empty
                return objects, prefixes

    def get(self, name: str) -> Object:
        """Returns what is known of the live generation; raises NotFound."""
        ask = self.client.ask("get", name, "GET", {"fields": FIELDS})
        return read_object(self.client.call_json(ask))

    def read(
        self, name: str, *, generation: int, start: int = 0, stop: int | None = None
    ) -> Generator[bytes, None, None]:
        """Opens bytes [start, stop) of one generation, and returns their chunks.

        The request is sent now: what it raises (NotFound, ...) is raised here. If the
        md5 of a whole object disagrees, Corrupted comes instead of the last chunk.
        `.close()` of what is returned frees the connection before the end.
        """
        if stop is not None and stop <= start:  # no Range can say "nothing"
            raise ValueError(f"an empty range of {name!r}: {start} to {stop}")
        params = {"alt": "media", "generation": generation}
        ask = self.client.ask("read", name, "GET", params, service="/download")
        download = Download(self.client, replace(ask, stream=True), start, stop)
        chunks = download.checked()
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

        `if_generation` is the generation to replace; 0: there must be none; None:
        whatever is there, and then a failure is not retried, as that would not be safe.
        `md5` in hex saves reading the file twice. Raises PreconditionFailed, Corrupted.
        """
        md5, size = md5 or digest(source), source.seek(0, os.SEEK_END)
        upload = Upload(
            self.client, name, source, size, md5, metadata, content_type, if_generation
        )
        small = size <= self.multipart_max
        try:
            stored = upload.in_one_request() if small else upload.in_a_session()
        except PreconditionFailed as error:
            if error.tries == 1:
                raise
            return self.settle(error, name, upload)
        if (stored.size, stored.md5) != (size, md5):
            with contextlib.suppress(StorageError):  # the damage is what must be told
                self.delete(name, generation=stored.generation)  # before others read it
            raise Corrupted(f"insert {name}: stored {stored}, not {md5}; send it again")
        return stored

    def settle(self, error: StorageError, name: str, wanted: Upload | Object) -> Object:
        """Returns the object if a write that seems to have failed did make it."""
        try:
            found = self.get(name)
        except NotFound:  # removed since: the caller may try again
            raise error from None
        same = (found.size, found.md5) == (wanted.size, wanted.md5)
        if not (same and holds(found.metadata, wanted.metadata)):
            raise error
        return found

    def patch(
        self,
        name: str,
        metadata: Mapping[str, str | None],
        *,
        generation: int,
        metageneration: int,
    ) -> Object:
        """Changes custom metadata, key by key: None removes a key."""
        params: dict[str, object] = {"generation": generation, "fields": FIELDS}
        params["ifMetagenerationMatch"] = metageneration
        ask = self.client.ask("patch", name, "PATCH", params)
        body = json.dumps({"metadata": dict(metadata)}).encode()
        try:
            answer = self.client.call_json(replace(ask, headers=JSON, body=body))
            return read_object(answer)
        except PreconditionFailed as error:
            if error.tries == 1:
                raise
            found = self.get(name)
            if found.generation != generation or not holds(found.metadata, metadata):
                raise error from None
            return found

    def delete(self, name: str, *, generation: int) -> None:
        """Removes an object, if it still is of this generation."""
        params = {"ifGenerationMatch": generation}
        ask = self.client.ask("delete", name, "DELETE", params)
        try:
            self.client.call(ask)
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
            ask = self.client.ask("rewrite", name, "POST", params, path=path)
            ask = replace(ask, idempotent=if_generation is not None)
            try:
                answer = self.client.call_json(ask)
            except PreconditionFailed as error:
                if error.tries == 1:
                    raise
                return self.settle(error, to, self.get(name))
            if not answer.get("rewriteToken"):
                return read_object(answer.get("resource", {}))
            params["rewriteToken"] = answer["rewriteToken"]  # large: several calls


def digest(source: BinaryIO) -> str:
    source.seek(0)
    md5 = partial(hashlib.md5, usedforsecurity=False)
    return hashlib.file_digest(source, md5).hexdigest()  # type: ignore[arg-type]
