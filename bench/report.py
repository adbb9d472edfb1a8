"""From raw rows to the table: medians, spreads, ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from scenarios import Row

# What the ratios of a scenario are taken against.
AGAINST = {"upload": "sink", "install": "nginx"}

INTRODUCTION = """
Medians, with the least and the greatest in brackets. Ratios are taken round by round,
against the limit named in the heading. Left out: windows in which one worker did all
the work, five times running. Other CPU: what other programs used during a window,
median. A server is missing where it would take too long (`most` in servers.py).
"""

Series = dict[str, list[Row]]  # by server


def markdown(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """Write what was measured with, and a table for each scenario."""
    tables: dict[str, dict[tuple[str, int, str], Series]] = {}
    for row in rows:
        what = row.variant, row.files, row.unit
        series = tables.setdefault(row.scenario, {}).setdefault(what, {})
        series.setdefault(row.server, []).append(row)
    parts = ["# Measurements", ""]
    parts += [f"- {name}: {value}" for name, value in about.items()]
    parts.append(INTRODUCTION)
    for scenario, table in tables.items():
        limit = AGAINST.get(scenario, "hello")
        head = f"| | files | server | | / {limit} | rounds | left out | other CPU |"
        parts += [f"## {scenario}", "", head, "|---|--:|---|---|---|--:|--:|--:|"]
        for series in table.values():
            parts += [write_line(series, server, limit) for server in series]
        parts.append("")
    return "\n".join(parts)


def write_line(series: Series, server: str, limit: str) -> str:
    """Write the line of one server."""
    rows = series[server]
    good, below = keep_balanced(rows), keep_balanced(series.get(limit, []))
    figure = f"{spread(good.values())} {rows[0].unit}" if good else ""
    if errors := sum(row.extra.get("errors", 0) for row in rows):
        figure += f" ({errors} errors)"
    # Round by round, so that what slowed a whole round cancels out.
    ratios = [value / below[turn] for turn, value in good.items() if below.get(turn)]
    stolen = [row.extra["other_cpu_s"] for row in rows if "other_cpu_s" in row.extra]
    cells = [
        rows[0].variant,
        f"{rows[0].files:,}" if rows[0].files else "",
        server,
        figure,
        spread(ratios) if ratios and server != limit else "",
        str(len(good)),
        str(len(rows) - len(good) or ""),
        f"{median(stolen):.2g} s" if stolen else "",
    ]
    return f"| {' | '.join(cells)} |"


def keep_balanced(rows: Iterable[Row]) -> dict[int, float]:
    return {row.round: row.value for row in rows if row.extra.get("balanced", True)}


def spread(values: Iterable[float]) -> str:
    """Write the median, and the least and the greatest if they differ."""
    found = sorted(values)
    texts = [write_number(it) for it in (median(found), found[0], found[-1])]
    return texts[0] if len(found) == 1 else "{} ({} to {})".format(*texts)


def write_number(value: float) -> str:
    """Write three significant digits, and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else f"{value:.4f}"
