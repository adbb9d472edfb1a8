#!/usr/bin/env python3
"""Measure our server beside its peers and its limits, and print a table.

    python bench/run.py                        everything: an hour, on an idle machine
    python bench/run.py page cold --rounds 7   some scenarios
    python bench/run.py page --servers ours hello --sizes 100 10000
    python bench/run.py --quick                does it still run? not for figures

Needs wrk, nginx and openssl (Debian: apt-get install wrk nginx openssl) and, to install
the servers, a working pip. Everything it builds lies in a work directory; the table and
the raw figures go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from report import markdown
from scenarios import SCENARIOS, Run
from servers import HERE, KINDS, Lab

TOOLS = {
    "wrk": "wrk",
    "nginx": "nginx",
    "openssl": "openssl",
}  # program: Debian package
QUICK = {"rounds": 2, "seconds": 1, "sizes": (100,)}


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(SCENARIOS)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {names}")
    parser.add_argument("--rounds", type=int, help="rounds over all servers (5)")
    parser.add_argument("--seconds", type=int, help="seconds of a window of wrk (2)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="corpora, by number of files"
    )
    parser.add_argument("--servers", nargs="+", choices=KINDS, metavar="SERVER")
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of 1 s, 100 files"
    )
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default=time.strftime("%Y-%m-%d-%H%M"))
    found = parser.parse_args(argv)
    if unknown := set(found.scenarios) - set(SCENARIOS):
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))} (of {names})")
    return found


def missing_tools() -> list[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"  # where Debian has nginx
    return [
        package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)
    ]


def about(run: Run) -> dict[str, str]:
    """Say what the figures were taken with."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "Python": platform.python_version(),
        "rounds": f"{run.rounds}, windows of {run.seconds} s",
        "versions": ", ".join(sorted(run.lab.versions())),
    }


def save(run: Run, out: Path, name: str) -> None:
    """Write raw figures and table."""
    facts = about(run)
    text = markdown(run.rows, run.notes, facts)
    out.mkdir(parents=True, exist_ok=True)
    raw = {
        "about": facts,
        "notes": run.notes,
        "rows": [row._asdict() for row in run.rows],
    }
    (out / f"{name}.json").write_text(json.dumps(raw, indent=0) + "\n")
    (out / f"{name}.md").write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    wanted = read_arguments(argv)
    if missing := missing_tools():
        print(f"missing: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    chosen = dict(QUICK) if wanted.quick else {"rounds": 5, "seconds": 2, "sizes": None}
    given = {"rounds": wanted.rounds, "seconds": wanted.seconds, "sizes": wanted.sizes}
    chosen |= {name: value for name, value in given.items() if value}
    # So that whoever ends us ends the servers, too: leaving the Lab does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0
    with Lab(wanted.work.resolve()) as lab:
        run = Run(lab, servers=wanted.servers, **chosen)
        for name in wanted.scenarios or SCENARIOS:
            failed += not measure(run, name)
            save(run, wanted.out, wanted.name)  # each time: the whole takes an hour
    print((wanted.out / f"{wanted.name}.md").read_text())
    return 1 if failed else 0


def measure(run: Run, name: str) -> bool:
    """Run a scenario; one that fails, why ever, is noted: the others go on."""
    try:
        SCENARIOS[name](run)
    except Exception as error:
        traceback.print_exc()
        # The message may hold paths of this machine; it went to stderr.
        run.note(f"{name}: stopped by a {type(error).__name__}")
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
