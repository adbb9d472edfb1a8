"""The limits: WSGI apps that do the least there is to do.

`get_hello` answers with bytes recorded beforehand from our own server, so that both
send the same and only the work differs. `get_sink` hashes and writes what is sent.
"""

from __future__ import annotations

import hashlib
import marshal  # and not json: a cold start should not pay for an import it can avoid
import os
import tempfile
from collections.abc import Callable
from typing import Any

App = Callable[[dict[str, Any], Any], list[bytes]]
UNKNOWN = ("404 Not Found", [("Content-Length", "0")], b"")
CHUNK = 1 << 20  # as much as gunicorn receives at once; it copies what is left over


def get_hello() -> App:
    """Make the limit for reads. HELLO_ANSWERS names a file of recorded answers."""
    with open(os.environ["HELLO_ANSWERS"], "rb") as file:
        answers = marshal.load(file)  # {(path, variant): (status, headers, body)}

    def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        get = environ.get
        variant = "json" if "json" in get("HTTP_ACCEPT", "") else "html"
        if "gzip" in get("HTTP_ACCEPT_ENCODING", ""):
            variant = "json gzip" if variant == "json" else "gzip"
        if "HTTP_IF_NONE_MATCH" in environ:
            variant = "304"
        path = environ["PATH_INFO"]
        status, headers, body = answers.get((path, variant), UNKNOWN)
        start_response(status, list(headers))
        return [body]

    return hello


def get_sink() -> App:
    """Make the limit for uploads. SINK_DIRECTORY is where they go."""
    directory = os.environ["SINK_DIRECTORY"]

    def sink(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """Store the body. Nothing is parsed, checked or synced to disk."""
        left = int(environ.get("CONTENT_LENGTH") or 0)  # 0: a GET that asks if it is up
        body, digest = environ["wsgi.input"], hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            while left and (chunk := body.read(min(CHUNK, left))):
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        os.replace(file.name, os.path.join(directory, digest.hexdigest()))
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    return sink
