"""What is read off: processes, windows of wrk, runs of hyperfine, single requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

CONNECTIONS = 8
TIMEOUT = 30  # seconds: a request of a slow server must be able to finish and count


def cpu_of(processes: Iterable[psutil.Process]) -> dict[int, float]:
    """Tell the CPU seconds of each process, user and system, by its id."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def others_cpu() -> float:
    """Tell the CPU seconds of the whole machine, less those of this harness."""
    times = psutil.cpu_times()
    unused = times.idle + times.iowait + times.guest + times.guest_nice
    return sum(times) - unused - sum(os.times()[:4])


def memory_of(processes: Iterable[psutil.Process]) -> float:
    """Tell the PSS in MiB: what processes share is counted once."""
    return sum(process.memory_full_info().pss for process in processes) / (1 << 20)


def wrk(url: str, headers: Mapping[str, str], seconds: int) -> tuple[float, int]:
    """Run one window of keep-alive requests; tell the rate, and how many failed."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s"]
    command.append(f"--timeout={TIMEOUT}s")
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    done = subprocess.run([*command, url], capture_output=True, text=True, check=True)
    rate = re.findall(r"Requests/sec:\s+([\d.]+)", done.stdout)
    bad = re.findall(r"Non-2xx or 3xx responses: (\d+)", done.stdout)
    broken = re.findall(r"(?:connect|read|write|timeout) (\d+)", done.stdout)
    return float(rate[0]), sum(map(int, [*bad, *broken]))


def hyperfine(command: str, scratch: Path, env: Mapping[str, str]) -> float:
    """Time one run of a command of bash; tell the seconds, without bash's own start."""
    report = scratch / "hyperfine.json"
    call = ["hyperfine", "--runs", "1", "--style", "none", "--shell", "bash --norc"]
    call += ["--export-json", str(report), command]
    subprocess.run(call, cwd=scratch, env=env, stdout=subprocess.DEVNULL, check=True)
    return float(json.loads(report.read_text())["results"][0]["times"][0])


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # by name in lower case
    body: bytes


def ask(
    connection: http.client.HTTPConnection,
    path: str,
    headers: Mapping[str, str],
    form: bytes = b"",
) -> Answer:
    """Send a request, with no header but the named ones: wrk sends none either."""
    method = "POST" if form else "GET"
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if form:
        connection.putheader("Content-Length", str(len(form)))
    connection.endheaders(form or None)
    reply = connection.getresponse()
    fields = {name.lower(): value for name, value in reply.getheaders()}
    return Answer(reply.status, fields, reply.read())
