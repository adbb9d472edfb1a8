"""A bucket that can be listed, and no more: for pages and cold starts of a large one.

    python listed.py PORT DIRECTORY

It answers as the JSON API of Cloud Storage does (`objects.list`, 1,000 at a time) for
`packages/<project>/<filename>` in DIRECTORY. The emulator takes time quadratic in the
objects to load them and linear in them to list a folder, which the real one does not.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from corpus import metadata_of

PAGE = 1000  # objects and prefixes together: the most that the real API gives
ROOT = "packages/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    directory: Path
    folders: list[str]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        prefix = query.get("prefix", "")
        if not url.path.endswith("/o") or not prefix.startswith(ROOT):
            answer: dict[str, Any] = {}
        elif prefix == ROOT:
            start = int(query.get("pageToken", 0))
            answer = {"prefixes": self.folders[start : start + PAGE]}
            if start + PAGE < len(self.folders):
                answer["nextPageToken"] = str(start + PAGE)
        else:
            answer = {"items": items(self.directory, prefix.split("/")[1])}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@lru_cache(maxsize=1000)
def items(directory: Path, project: str) -> list[dict[str, Any]]:
    """The objects of a project, with the metadata that our server gives them."""
    folder = directory / project
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [_item(path) for path in paths]


def _item(path: Path) -> dict[str, Any]:
    project, version, *_ = path.name.split("-")
    metadata = metadata_of(project.replace("_", "-"), version)
    facts = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "requires-python": ">=3.8",
        "core-metadata": hashlib.sha256(metadata).hexdigest(),
    }
    return {
        "name": f"{ROOT}{path.parent.name}/{path.name}",
        "size": str(path.stat().st_size),
        "generation": "1",
        "metageneration": "1",
        "timeCreated": "2026-01-02T03:04:05.678Z",
        "metadata": facts,
    }


def main(port: int, directory: Path) -> None:
    Handler.directory = directory
    Handler.folders = sorted(f"{ROOT}{path.name}/" for path in directory.iterdir())
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
