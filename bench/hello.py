"""The limit for reads: a WSGI app that answers with bytes recorded beforehand.

HELLO_ANSWERS names a file of them, recorded from our own server, so that both send the
same bytes and only the work differs:
{(path, accept, encoding, etag): (status, headers, body)}, and by the path alone what
installers get, who all send other headers.
"""

from __future__ import annotations

import marshal  # and not json: a cold start should not pay for an import it can avoid
import os
from typing import Any

with open(os.environ["HELLO_ANSWERS"], "rb") as file:
    ANSWERS: dict[Any, Any] = marshal.load(file)
UNKNOWN = ("404 Not Found", [("Content-Length", "0")], b"")


def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Look the request up among the recorded answers."""
    get = environ.get
    request = (
        get("PATH_INFO"),
        get("HTTP_ACCEPT"),
        get("HTTP_ACCEPT_ENCODING"),
        get("HTTP_IF_NONE_MATCH"),
    )
    status, headers, body = ANSWERS.get(request) or ANSWERS.get(request[0], UNKNOWN)
    start_response(status, list(headers))
    return [body]
