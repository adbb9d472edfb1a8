"""From raw rows to the table: medians, spreads, ratios, and the goals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from scenarios import Row
from servers import PEERS

Where = tuple[str, int, str]  # scenario, files, variant

# What the ratios of a scenario are taken against.
AGAINST = {"upload": "sink", "install": "nginx", "auth": "", "gcs": "requests"}
BIG_DOWNLOAD = "200 MB"


class Spread(NamedTuple):
    """A median with the least and the greatest of what it was taken from."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return number(self.middle)
        return f"{number(self.middle)} ({number(self.low)} to {number(self.high)})"


def spread(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(median(found), found[0], found[-1])


def number(value: float) -> str:
    """Write three significant digits, and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or not value else f"{value:.4f}"


class Table:
    """The rows by place and server, unbalanced windows left out."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.series: dict[Where, dict[str, dict[int, Row]]] = {}
        self.left_out: dict[tuple[Where, str], int] = {}
        for row in rows:
            where = (row.scenario, row.files, row.variant)
            series = self.series.setdefault(where, {}).setdefault(row.server, {})
            if row.extra.get("balanced", True):
                series[row.round] = row
            else:
                key = where, row.server
                self.left_out[key] = self.left_out.get(key, 0) + 1

    def values(self, where: Where, server: str) -> dict[int, float]:
        rows = self.series.get(where, {}).get(server, {})
        return {round: row.value for round, row in rows.items()}

    def ratio(self, over: tuple[Where, str], under: tuple[Where, str]) -> Spread | None:
        """Divide round by round, so that what slowed a whole round cancels out."""
        above, below = self.values(*over), self.values(*under)
        both = [above[r] / below[r] for r in above if below.get(r)]
        if both:
            return spread(both)
        if not above or not below:
            return None
        # No round in common (windows left out): the medians, and the widest spread.
        a, b = spread(above.values()), spread(below.values())
        return Spread(a.middle / b.middle, a.low / b.high, a.high / b.low)

    def fastest_peer(self, where: Where) -> str:
        """Name the peer with the highest median, or nothing."""
        found = {peer: self.values(where, peer) for peer in PEERS}
        middles = {peer: median(v.values()) for peer, v in found.items() if v}
        return max(middles, key=lambda peer: middles[peer], default="")


# Scenarios of many short rows: one table, a column for each server.
PIVOTED = ("auth", "memory", "calls", "gcs")
# Scenarios whose columns are the sizes of the corpus.
BY_SIZE = {"scale": "20 files a project", "scale one": "all files in one project"}

INTRODUCTION = """
Medians, with the least and the greatest in brackets. Ratios are taken round by round,
against the limit named in the heading. Left out: windows in which one worker did all
the work, five times running. Other CPU: what other programs used during a window,
median.
"""

# ---- The tables ----------------------------------------------------------------------


def markdown(rows: Sequence[Row], notes: Sequence[str], about: dict[str, str]) -> str:
    """Write everything: the goals first, then each scenario, then the notes."""
    table = Table(rows)
    facts = (f"- {name}: {value}" for name, value in about.items())
    parts = ["# Measurements", "", *facts, INTRODUCTION, *goals(table)]
    for where, series in table.series.items():
        if where[0] not in (*PIVOTED, *BY_SIZE):
            parts += _section(table, where, series)
    for scenario in PIVOTED:
        parts += _pivot(table, scenario)
    for scenario, title in BY_SIZE.items():
        parts += _by_size(table, scenario, title)
    if notes:
        parts += ["## Not measured", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(parts)


def _section(
    table: Table, where: Where, series: dict[str, dict[int, Row]]
) -> list[str]:
    scenario, files, variant = where
    limit = AGAINST.get(scenario, "hello")
    if scenario == "download" and variant == BIG_DOWNLOAD:
        limit = "nginx"
    sample = next((row for rows in series.values() for row in rows.values()), None)
    title = f"## {scenario}, {variant}" + (f", {files:,} files" if files else "")
    if not sample:
        return [title, "", "All windows were unbalanced.", ""]
    beside = limit if limit in series and len(series) > 1 else ""
    share = f"/ {beside}" if beside else ""
    head = f"| server | {sample.unit} | {share} | rounds | left out | other CPU |"
    lines = [title, "", head, "|---|---|---|---|---|---|"]
    for server, found in series.items():
        lines.append(_line(table, where, server, found, beside))
    return [*lines, ""]


def _line(
    table: Table, where: Where, server: str, found: dict[int, Row], beside: str
) -> str:
    left_out = table.left_out.get((where, server), 0)
    if not found:
        return f"| {server} | | | 0 | {left_out} | |"
    value = spread(row.value for row in found.values())
    share = table.ratio((where, server), (where, beside)) if beside else None
    errors = sum(row.extra.get("errors", 0) for row in found.values())
    mark = f" ({errors} errors)" if errors else ""
    stolen = [
        row.extra["other_cpu_s"] for row in found.values() if "other_cpu_s" in row.extra
    ]
    other = f"{median(stolen):.2g} s" if stolen else ""
    figures = f"{value}{mark} | {share or ''} | {len(found)} | {left_out} | {other}"
    return f"| {server} | {figures} |"


def _pivot(table: Table, scenario: str) -> list[str]:
    found = {
        where: rows for where, rows in table.series.items() if where[0] == scenario
    }
    servers = list(dict.fromkeys(server for rows in found.values() for server in rows))
    if not found:
        return []
    lines = [f"## {scenario}", "", f"| | unit | {' | '.join(servers)} |"]
    lines.append("|---" * (len(servers) + 2) + "|")
    for (_, files, variant), series in found.items():
        rows = {server: list(series.get(server, {}).values()) for server in servers}
        unit = next((row.unit for some in rows.values() for row in some), "")
        cells = [
            str(spread(row.value for row in some)) if some else ""
            for some in rows.values()
        ]
        label = f"{variant}, {files:,} files" if files else variant
        lines.append(f"| {label} | {unit} | {' | '.join(cells)} |")
    return [*lines, ""]


def _by_size(table: Table, scenario: str, title: str) -> list[str]:
    found = [where for where in table.series if where[0] == scenario]
    if not found:
        return []
    sizes = sorted({files for _, files, _ in found})
    lines = [f"## {scenario}: {title}, ms", ""]
    lines.append(f"| | {' | '.join(f'{files:,} files' for files in sizes)} |")
    lines.append("|---" * (len(sizes) + 1) + "|")
    for variant in dict.fromkeys(variant for _, _, variant in found):
        values = [table.values((scenario, files, variant), "ours") for files in sizes]
        cells = [str(spread(some.values())) if some else "" for some in values]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return [*lines, ""]


# ---- The goals -----------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A ratio that is to be at least, or at most, so much. `*` is the fastest peer."""

    text: str
    over: tuple[Where, str]
    under: tuple[Where, str] | None  # None: the figure itself
    least: float = 0.0
    most: float = float("inf")


def _against(
    where: Where,
    server: str,
    under: str,
    *,
    least: float = 0.0,
    most: float = float("inf"),
) -> Goal:
    scenario, files, variant = where
    other = under.replace("*", "fastest peer")
    text = f"{scenario}, {variant}, {files:,} files: {server} / {other}"
    return Goal(text, (where, server), (where, under), least, most)


def _page_goals() -> list[Goal]:
    goals = []
    for files in (100, 10_000, 100_000):
        html = ("page", files, "html")
        goals.append(_against(html, "ours", "hello", least=0.85))
        goals.append(_against(html, "ours", "*", least=8))
        goals.append(_against(html, "ours-bucket-20ms", "hello", least=0.80))
        for variant in ("json", "gzip", "304"):
            # "Not slower", less what two equal servers differ by.
            over = ("page", files, variant), "ours"
            text = f"page, {files:,} files: ours {variant} / ours html"
            goals.append(Goal(text, over, (html, "ours"), least=0.95))
        if files > 100:
            base = ("page", 100, "html"), "ours"
            text = f"page, html: ours at {files:,} / at 100 files"
            goals.append(Goal(text, (html, "ours"), base, 0.9, 1.1))
    return goals


def _cold_goals() -> list[Goal]:
    goals = []
    for files in (100, 10_000, 100_000):
        where = ("cold", files, "facts known")
        goals.append(_against(where, "ours", "hello", most=1.5))
        goals.append(_against(where, "ours-bucket-20ms", "hello", most=3))
    return goals


def _auth_goals() -> list[Goal]:
    kinds = ("{SHA}", "$apr1$", "$5$", "$6$", "bcrypt", "$scrypt$", "$pbkdf2-sha256$")
    none = ("auth", 100, "none"), "ours"
    return [
        Goal(
            f"auth, {kind}: ours / without",
            (("auth", 100, kind), "ours"),
            none,
            least=0.9,
        )
        for kind in kinds
    ]


GCS = {
    "import and first call": "s",
    "memory after it": "MiB",
    "insert 10 KB": "/s",
    "list 100": "/s",
    "get": "/s",
    "up 200 MB": "MB/s",
    "down 200 MB": "MB/s",
    "peak memory": "MiB",
}


def _gcs_goals() -> list[Goal]:
    goals = []
    for what, unit in GCS.items():
        for other, factor in (("google", 1.0), ("requests", 1.2)):
            bound = {"least": 1 / factor} if unit.endswith("/s") else {"most": factor}
            where = ("gcs", 0, what)
            text = f"gcs, {what}: gcs_rest / {other}"
            goals.append(Goal(text, (where, "gcs_rest"), (where, other), **bound))
    return goals


SMALL_UPLOADS, BIG_UPLOAD = ("upload", 100, "50 small"), ("upload", 100, "200 MB")
PEAK = ("upload", 100, "200 MB: peak above idle")
GOALS = [
    *_page_goals(),
    _against(("root", 10_000, "html"), "ours", "hello", least=0.8),
    _against(("download", 10_000, "10 KB"), "ours", "hello", least=0.7),
    _against(("download", 1, BIG_DOWNLOAD), "ours", "pypiserver", least=1.0),
    _against(SMALL_UPLOADS, "ours", "*", least=3),
    _against(BIG_UPLOAD, "ours", "sink", least=0.6),
    _against(BIG_UPLOAD, "ours", "*", least=3),
    Goal("upload, 200 MB: MiB of ours above idle", (PEAK, "ours"), None, most=60),
    *_auth_goals(),
    *_cold_goals(),
    _against(("memory", 10_000, "after load"), "ours", "hello", most=1.3),
    _against(("install", 600, "pip"), "ours", "nginx", most=1.15),
    _against(("install", 600, "uv"), "ours", "nginx", most=1.15),
    _against(("install", 600, "uv"), "ours", "hello", most=1.15),
    *_gcs_goals(),
]


def goals(table: Table) -> list[str]:
    """List the goals that could be judged; medians decide, spreads stand beside."""
    lines = ["## Goals", "", "| goal | wanted | found | |", "|---|---|---|---|"]
    for goal in GOALS:
        found = _found(table, goal)
        if found is None:
            continue
        wanted = " and ".join(_bounds(goal))
        met = goal.least <= found.middle <= goal.most
        lines.append(
            f"| {goal.text} | {wanted} | {found} | {'met' if met else '**missed**'} |"
        )
    return [*lines, ""] if len(lines) > 4 else []


def _found(table: Table, goal: Goal) -> Spread | None:
    if goal.under is None:
        values = table.values(*goal.over).values()
        return spread(values) if values else None
    where, server = goal.under
    return table.ratio(
        goal.over, (where, server if server != "*" else table.fastest_peer(where))
    )


def _bounds(goal: Goal) -> list[str]:
    low = [f"≥ {number(goal.least)}"] if goal.least else []
    return low + ([f"≤ {number(goal.most)}"] if goal.most < float("inf") else [])
