"""Tests that use fuzz/: seeds of the harnesses, hostile requests, floods."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pypi_ae

MODULE = Path(pypi_ae.__file__)

# ---- Fuzzing and hostile requests ----------------------------------------------------
# The table of hostile requests stands in fuzz/hostile.py, as that also runs alone.


def load(name: str) -> ModuleType:
    """A module of fuzz/, which is no package."""
    spec = importlib.util.spec_from_file_location(
        name, MODULE.parent / f"fuzz/{name}.py"
    )
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz, hostile = load("fuzz"), load("hostile")


@pytest.mark.parametrize(
    ("name", "number"),
    [(n, i) for n, seeds in fuzz.SEEDS.items() for i in range(len(seeds))],
)
def test_what_fuzzing_found_is_right(name: str, number: int) -> None:
    fuzz.HARNESSES[name](fuzz.SEEDS[name][number])


@pytest.fixture(scope="module", params=["gunicorn", "wsgiref"])
def enemy(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A server, and another client that asks for a page all the time."""
    with hostile.watched(MODULE.parent, request.param) as server:
        before = server.memory()
        yield server
        assert server.memory() - before < 2 * hostile.GROWTH


@pytest.mark.parametrize("case", hostile.ROWS, ids=lambda case: case.name)
def test_hostile_requests_are_refused_in_time(enemy: Any, case: Any) -> None:
    result = hostile.try_row(enemy, case)
    assert not result.wrong, result


@pytest.mark.parametrize("name", hostile.FLOODS)
def test_a_flood_stops_nobody(name: str) -> None:
    effect, right = hostile.flood(MODULE.parent, name)
    assert right, effect


def test_a_bucket_is_seldom_listed_for_strangers() -> None:
    outcomes = list(hostile.list_bucket(MODULE.parent))
    assert all(right for _, _, right in outcomes), outcomes
