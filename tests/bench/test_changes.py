"""What became faster or slower between two runs."""

import copy
from typing import Any

import pytest

from sparse_engine.bench.arms import SPARSE
from sparse_engine.bench.changes import compare_results
from sparse_engine.errors import InputError


def slower(results: dict[str, Any], factor: float) -> dict[str, Any]:
    changed = copy.deepcopy(results)
    changed["cells"][0]["milliseconds"][SPARSE]["median"] *= factor
    return changed


def test_times_on_the_same_machine(grid_results: dict[str, Any]) -> None:
    verdicts = [compare_results(grid_results, slower(grid_results, f), 0.1)[0].verdict for f in (0.8, 1.05, 1.2)]
    assert verdicts == ["faster", "as before", "slower"]


def test_another_machine_has_ratios_only(grid_results: dict[str, Any]) -> None:
    other = slower(grid_results, 3.0)
    other["machine"]["processor"] = "another"
    (change,) = compare_results(grid_results, other, 0.1)
    assert not change.lost
    ratio = grid_results["cells"][0]["speedup"]
    other["cells"][0]["speedup"] = {"median": ratio["low"] / 2, "low": 0.1, "high": ratio["low"] * 0.9, "tie": False}
    assert compare_results(grid_results, other, 0.1)[0].lost


def test_nothing_in_common(grid_results: dict[str, Any], digits_results: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no sparse measurement in common"):
        compare_results(grid_results, digits_results, 0.1)
