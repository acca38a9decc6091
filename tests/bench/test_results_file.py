"""Files of this schema, of the first, and of others."""

import json
from pathlib import Path
from typing import Any

import pytest

from sparse_engine.bench.arms import DENSE, SPARSE
from sparse_engine.bench.results_file import SCHEMA, read_comparison, read_results, rows_of, write_results
from sparse_engine.errors import InputError

RATIO = {"median": 1.5, "low": 1.4, "high": 1.6, "tie": False}


def test_the_first_schema_is_still_read(tmp_path: Path) -> None:
    times = {name: {"median": 1.0, "p5": 1.0, "p95": 1.0, "p99": 1.0} for name in (SPARSE, DENSE, "OpenVINO")}
    row = {"batch": 1, "milliseconds": times, "speedup": {DENSE: RATIO, "OpenVINO": RATIO}, "skipped": {}}
    old = {"schema": "sparse-engine-bench/1", "kind": "model", "precision": "bf16", "rows": [row]}
    write_results(tmp_path / "old.json", old)
    (found,) = rows_of(read_results(tmp_path / "old.json"))
    assert found["speedup"] == RATIO
    assert found["speedups"]["OpenVINO"] == RATIO
    assert [found["candidates"][name]["precision"] for name in (SPARSE, DENSE, "OpenVINO")] == ["bf16", "fp32", "bf16"]


def test_the_committed_results_are_read() -> None:
    """Every run of the bench, of one model or of the grid; runs of whole engines carry a ratio for each engine."""
    kinds = set()
    for file in sorted((Path(__file__).parents[2] / "bench" / "results").glob("cpu-*.json")):
        results = read_results(file)
        kinds.add(results["kind"])
        for row in rows_of(results):
            ratios = row["speedups"].values() if results["kind"] == "engines" else [row["speedup"]]
            assert ratios
            assert all("median" in ratio for ratio in ratios), file.name
    assert {"grid", "model"} <= kinds


@pytest.mark.parametrize("name", ["cpu-uvit-s-fp32.json", "cpu-grid-quick-fp32.json"])
def test_the_committed_results_can_be_compared_with(name: str) -> None:
    assert rows_of(read_comparison(Path(__file__).parents[2] / "bench" / "results" / name))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threads": ...}, "it has no threads"),
        ({"precision": ..., "machine": ...}, "it has no machine, precision"),
        ({"precision": ["fp32"]}, "its precision is no name"),
        ({"machine": {}}, "its machine has no processor"),
        ({"rows": ...}, "it has no list of rows"),
        ({"rows": {"batch": 1}}, "it has no list of rows"),
        ({"rows": [1]}, "it has no list of rows"),
        ({"rows": [{"batch": 1, "milliseconds": 3}]}, r"rows\[0\] is not what a run writes"),
        ({"rows": [{"batch": 1, "milliseconds": {SPARSE: {"median": 0}}, "speedup": RATIO}]}, r"rows\[0\] is not"),
        ({"rows": [{"batch": 1, "milliseconds": {}, "speedup": RATIO | {"low": float("nan")}}]}, r"rows\[0\] is not"),
        ({"rows": [{"batch": 1, "milliseconds": {}, "speedup": RATIO, "model": [1]}]}, r"rows\[0\] is not"),
        ({"schema": "sparse-engine-bench/1", "rows": [{}]}, "it lacks what its schema has"),
    ],
)
def test_an_edited_run_is_not_compared_with(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    whole = {"schema": SCHEMA, "kind": "model", "precision": "fp32", "threads": 1, "machine": {"processor": "p"}}
    edited = {name: value for name, value in (whole | {"rows": []} | changes).items() if value is not ...}
    (tmp_path / "x.json").write_text(json.dumps(edited))
    with pytest.raises(InputError, match=rf"x\.json is damaged: {message}"):
        read_comparison(tmp_path / "x.json")


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"schema": "other/2"}))
    with pytest.raises(InputError, match=f"has schema 'other/2'; expected '{SCHEMA}'"):
        read_results(file)
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"x\.json"):
            read_results(file)
