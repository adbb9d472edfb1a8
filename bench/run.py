#!/usr/bin/env python3
"""Measure our server beside its peers and its limits, and print a table.

    python bench/run.py                        everything: an hour, on an idle machine
    python bench/run.py page cold --rounds 7   some scenarios
    python bench/run.py page --servers ours hello --sizes 100 10000
    python bench/run.py --quick                does it still run? not for figures
    python bench/run.py --table bench/results/measurements.md     for a commit

Needs psutil, wrk, nginx and hyperfine (pip install psutil; Debian: apt-get install wrk
nginx hyperfine) and, to install the servers, a working pip. All that it builds, the raw
figures (JSON) and the table lie in a work directory outside of the repository.
`bench/inprocess.py` measures without any server.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from lab import PATH, Lab
from report import markdown
from scenarios import SCENARIOS, Row, Run
from servers import SERVERS

TOOLS = ("wrk", "nginx", "hyperfine")  # programs, and Debian's packages
WORK = Path(tempfile.gettempdir(), "pypi-ae-bench")


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, names = parser.add_argument, ", ".join(SCENARIOS)
    add("scenarios", nargs="*", metavar="SCENARIO", help=f"of {names}")
    add("--rounds", type=int, default=5, help="rounds over all servers (5)")
    add("--seconds", type=int, default=2, help="seconds of a window of wrk (2)")
    add("--sizes", type=int, nargs="+", help="corpora, by number of files")
    add("--servers", nargs="+", choices=SERVERS, default=SERVERS, metavar="")
    add("--quick", action="store_true", help="1 round of 1 s, 100 files")
    add("--work", type=Path, default=WORK, help=f"the work directory ({WORK})")
    add("--table", type=Path, help="a file to write the table to")
    wanted = parser.parse_args(argv)
    if unknown := set(wanted.scenarios) - set(SCENARIOS):
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))} (of {names})")
    if wanted.quick:
        wanted.rounds, wanted.seconds, wanted.sizes = 1, 1, [100]
    return wanted


def save(run: Run, rows: Sequence[Row], stem: Path) -> str:
    """Write raw figures and table; return the table."""
    installed = {name for names in run.lab.installed.values() for name in names}
    about = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "Python": platform.python_version(),
        "rounds": f"{run.rounds}, windows of {run.seconds} s",
        "installed": ", ".join(sorted(installed)),
    }
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}))
    text = markdown(rows, about)
    stem.with_suffix(".md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    wanted = read_arguments(argv)
    if missing := [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]:
        print(f"missing: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    # So that whoever ends us ends the servers, too: leaving the Lab does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    failed, text = 0, ""
    with Lab(wanted.work) as lab:
        stem = lab.work / time.strftime("%Y-%m-%d-%H%M%S")
        run = Run(lab, wanted.rounds, wanted.seconds, wanted.sizes, wanted.servers)
        for name in wanted.scenarios or SCENARIOS:
            try:
                for row in SCENARIOS[name](run):
                    figure = f"{row.value:,.4g} {row.unit}"
                    print(*row[:3], row.server, figure, row.extra, file=sys.stderr)
                    rows.append(row)
            except Exception:  # the others go on
                traceback.print_exc()
                failed += 1
            text = save(run, rows, stem)  # each time: the whole takes an hour
    print(text)
    if wanted.table:
        wanted.table.write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
