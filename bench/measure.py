"""What is read off: processes in /proc, windows of wrk, single requests."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# ---- Processes -----------------------------------------------------------------------

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20


class Process(NamedTuple):
    pid: int
    parent: int
    cpu: float  # seconds, user and system


def group(leader: int) -> list[Process]:
    """List the processes of a process group, which is all that one server started."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _process(int(entry), leader)):
            found.append(process)
    return found


def _process(pid: int, leader: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it ended between the listing and the reading
        return None
    fields = text.rpartition(")")[2].split()
    if int(fields[2]) != leader:
        return None
    return Process(pid, int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS)


def busy_cpu() -> float:
    """Tell the CPU seconds that the whole machine used, and those stolen from it."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS


def memory(leader: int) -> tuple[float, float]:
    """Tell the PSS and the RSS of a process group in MiB."""
    pss = rss = 0.0
    for process in group(leader):
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        pss += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) * 1024 / MIB  # type: ignore[index]
        rss += _rss(process.pid)
    return pss, rss


def _rss(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


class Peak:
    """The most memory a group held above what it held at the start, in MiB.

    The kernel's own high-water marks are reset and read: sampling would miss peaks and
    steal time from what is measured.
    """

    def __init__(self, leader: int) -> None:
        self.before = {process.pid: _rss(process.pid) for process in group(leader)}
        for pid in self.before:
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def read(self) -> float:
        return sum(_high_water(pid) - rss for pid, rss in self.before.items())


def _high_water(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^VmHWM:\s+(\d+)", status, re.M)[1]) * 1024 / MIB  # type: ignore[index]


# ---- wrk -----------------------------------------------------------------------------

CONNECTIONS = 8
# A request of a slow server must be able to finish within its window and count.
TIMEOUT = 30
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass(frozen=True)
class Load:
    """What one wrk window says; latencies in ms."""

    rate: float
    p50: float
    p99: float
    errors: int


def wrk(url: str, headers: dict[str, str], seconds: int) -> Load:
    """Run one window of keep-alive requests."""
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{seconds}s",
        f"--timeout={TIMEOUT}s",
    ]
    command += ["--latency"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    done = subprocess.run([*command, url], capture_output=True, text=True, check=True)
    return _read_wrk(done.stdout)


def _read_wrk(text: str) -> Load:
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rate, text
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    errors = (int(bad[1]) if bad else 0) + (
        sum(map(int, broken.groups())) if broken else 0
    )
    return Load(float(rate[1]), _percentile(text, 50), _percentile(text, 99), errors)


def _percentile(text: str, percent: int) -> float:
    match = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)$", text, re.M)
    return float(match[1]) * UNITS[match[2]] if match else float("nan")


# ---- Single requests -----------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def get(port: int, path: str, headers: dict[str, str] | None = None) -> Answer:
    """Fetch once, on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        # Just these headers: wrk sends no Accept-Encoding either.
        connection.putrequest("GET", path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        return Answer(reply.status, dict(reply.getheaders()), reply.read())
    finally:
        connection.close()


class Wire:
    """One keep-alive connection that does next to nothing itself.

    Requests are bytes made beforehand and files go out by sendfile: what the client
    costs bounds what can be measured.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket: socket.socket | None = None
        self.buffer = bytearray(1 << 20)

    def ask(self, *parts: bytes | Path) -> tuple[int, int]:
        """Send a request; tell the status and the length of the answer's body."""
        wire = self.socket or self._connect()
        for part in parts:
            if isinstance(part, bytes):
                wire.sendall(part)
            else:
                with part.open("rb") as file:
                    wire.sendfile(file)
        reply = http.client.HTTPResponse(wire)
        reply.begin()
        size = 0
        while count := reply.readinto(self.buffer):
            size += count
        if reply.will_close:
            self.close()
        return reply.status, size

    def _connect(self) -> socket.socket:
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=300)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.socket

    def close(self) -> None:
        if self.socket:
            self.socket.close()
        self.socket = None
