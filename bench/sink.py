"""The limit for uploads: a WSGI app that reads, hashes and writes a body, no more."""

from __future__ import annotations

import hashlib
import os
import tempfile
from typing import Any

DIRECTORY = os.environ["SINK_DIRECTORY"]
CHUNK = 1 << 20  # as much as gunicorn receives at once; it copies what is left over


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Store the body under its sha256. Nothing is parsed, checked or synced to disk."""
    left = int(environ.get("CONTENT_LENGTH") or 0)  # none: a GET that asks if we are up
    body, digest = environ["wsgi.input"], hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=DIRECTORY, delete=False) as file:
        while left and (chunk := body.read(min(CHUNK, left))):
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
    os.replace(file.name, os.path.join(DIRECTORY, digest.hexdigest()))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]
