"""A counting proxy that adds latency: what stands between a server and its bucket.

    python proxy.py PORT UPSTREAM_PORT DELAY_MS

Each request waits DELAY_MS before it is passed on, bodies stream through. GET /-/calls
answers, as JSON, the calls counted since the last time it was asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from urllib.parse import parse_qs, urlsplit

BLOCK = 1 << 18
HEAD_LIMIT = 1 << 16  # asyncio's own buffer, and more than any head of these APIs


class Proxy:
    def __init__(self, upstream: int, delay: float) -> None:
        self.upstream, self.delay = upstream, delay
        self.calls: Counter[str] = Counter()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry one client's connection over one connection of its own."""
        upstream: asyncio.StreamWriter | None = None
        try:
            back, upstream = await asyncio.open_connection(
                "127.0.0.1", self.upstream, limit=BLOCK
            )
            while head := await _read_head(reader):
                if head.startswith(b"GET /-/calls "):
                    await self._report(writer)
                    continue
                self.calls[classify(head)] += 1
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._exchange(head, reader, writer, back, upstream)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # one side hung up: so does the other
        finally:
            writer.close()
            if upstream:
                upstream.close()

    async def _exchange(
        self,
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        upstream: asyncio.StreamWriter,
    ) -> None:
        await _copy_body(head, reader, upstream)
        answer = await _read_head(back)
        if not answer:
            raise ConnectionError("the bucket hung up")
        status = int(answer.split(b" ", 2)[1])
        if head.startswith(b"HEAD ") or status in (204, 304) or status < 200:
            writer.write(answer)
            await writer.drain()
        else:
            await _copy_body(answer, back, writer)

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        body = json.dumps(self.calls).encode()
        self.calls.clear()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return b""


async def _copy_body(
    head: bytes, source: asyncio.StreamReader, target: asyncio.StreamWriter
) -> None:
    """Send a head and the body it announces."""
    target.write(head)
    if re.search(rb"\r\ntransfer-encoding:\s*chunked", head, re.I):
        await _copy_chunked(source, target)
    elif match := re.search(rb"\r\ncontent-length:\s*(\d+)", head, re.I):
        await _copy_exactly(int(match[1]), source, target)
    await target.drain()


async def _copy_exactly(
    left: int, source: asyncio.StreamReader, target: asyncio.StreamWriter
) -> None:
    while left:
        block = await source.read(min(BLOCK, left))
        if not block:
            raise ConnectionError("cut short")
        target.write(block)
        await target.drain()
        left -= len(block)


async def _copy_chunked(
    source: asyncio.StreamReader, target: asyncio.StreamWriter
) -> None:
    size = 1
    while size:
        line = await source.readline()
        size = int(line.split(b";")[0], 16)
        target.write(line)
        await _copy_exactly(size + 2, source, target)


def classify(head: bytes) -> str:
    """Name the call: list, get, read, insert, patch, delete or its method."""
    method, target, _ = head.split(b" ", 2)
    url = urlsplit(target.decode("latin-1"))
    query = parse_qs(url.query)
    if method == b"POST" and url.path.startswith("/upload/"):
        return "start session" if query.get("uploadType") == ["resumable"] else "insert"
    if method == b"PUT" and "upload_id" in query:
        return "send part"
    if method == b"GET" and url.path.endswith("/o"):
        return "list"
    if method == b"GET":
        media = query.get("alt") == ["media"] or url.path.startswith("/download/")
        return "read" if media else "get"
    return method.decode("latin-1").lower()


async def main(port: int, upstream: int, delay_ms: float) -> None:
    proxy = Proxy(upstream, delay_ms / 1000)
    server = await asyncio.start_server(
        proxy.serve, "127.0.0.1", port, limit=HEAD_LIMIT, backlog=1024
    )
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
