"""What tables say, and what stands under them."""

import copy
from typing import Any

import pytest
from rich.console import Console

from sparse_engine.bench.arms import DENSE, SPARSE
from sparse_engine.bench.report import markdown, profile_tables, remarks, rich_tables, self_test_verdict

Results = dict[str, Any]


def text(results: Results) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as shown:
        for table in rich_tables(results):
            console.print(table)
    return shown.get()


def test_the_papers_number_stands_beside_ours(grid_results: Results) -> None:
    ratio = grid_results["cells"][0]["speedup"]
    line = next(line for line in markdown(grid_results).splitlines() if line.startswith("| 4 | 1 |"))
    assert f"| {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" in line
    assert line.endswith("| 1.01 |")
    shown = text(grid_results)
    assert "images/s" in shown
    assert "GFLOP/s" in shown
    assert "A whole sample: 2 steps of euler-sde" in shown


def test_three_ratios_where_there_are_peers(digits_results: Results, grid_results: Results) -> None:
    results = copy.deepcopy(grid_results)
    cell = results["cells"][0]
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3, "tie": False}
    cell["speedups"] |= {"OpenVINO": ratio, "ONNX Runtime": {**ratio, "median": 1.5}}
    cell |= {"best_peer": None, "best_peer_in_any_precision": "OpenVINO", "plain_onnxruntime": "ONNX Runtime"}
    assert "| 1.25 [1.20, 1.30] (OpenVINO) | 1.50 [1.20, 1.30] (ONNX Runtime) |" in markdown(results)
    rows = markdown(digits_results)
    assert "| **2:4 sparse, fp32** |" in rows
    assert "| torch eager, bf16 |" in rows
    assert "dB, 9" in rows  # quality beside speed


def test_a_cell_that_failed(grid_results: Results) -> None:
    results = copy.deepcopy(grid_results)
    results["cells"].append({"patch": 1, "mlp_ratio": 8, "paper": 1.22, "batch": 4, "failed": "needs about 61 GiB"})
    assert "| 1 | 8 | - | - | failed |" in markdown(results)
    assert "patch 1, mlp_ratio 8: not measured, needs about 61 GiB" in remarks(results)
    assert "failed" in text(results)


def test_ties_are_called_ties(grid_results: Results) -> None:
    results = copy.deepcopy(grid_results)
    for tie, ending in ((True, "1.10] tie"), (False, "1.10]")):
        results["cells"][0]["speedup"] = {"median": 1.05, "low": 0.9, "high": 1.1, "tie": tie}
        assert f"{ending} |" in markdown(results)
        assert f"{tie:d} of 1 are ties: their 99% interval spans 1." in remarks(results)


def test_what_was_left_out_is_said(digits_results: Results) -> None:
    lines = "\n".join(remarks(digits_results))
    assert "Left out: absent: not installed." in lines
    assert "Noise: the dense engine's first call of a turn against its second is" in lines


@pytest.mark.parametrize("outside,passed", [(1, True), (2, False)])
def test_verdict_of_a_self_test(outside: int, passed: bool) -> None:
    rows = [{"speedup": {"tie": index >= outside}} for index in range(12)]
    assert self_test_verdict(rows)[0] == passed
    assert f"{12 - outside} of 12" in self_test_verdict(rows)[1]


def test_time_by_layer_sums_up(grid_results: Results) -> None:
    (table,) = profile_tables(grid_results)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0][-2:] == ["everything else", "all"]
    for side, engine in ((2, DENSE), (4, SPARSE)):
        milliseconds = [float(cell) for cell in columns[side][:-1] if cell != "-"]
        whole = sum(entry["milliseconds"] for entry in grid_results["cells"][0]["layers"][engine])
        assert sum(milliseconds) == pytest.approx(whole, abs=0.01 * len(milliseconds))
    kernels = dict(zip(columns[0], columns[3], strict=True))
    assert kernels["mid_block.mlp.fc1"] in ("dense", "t-lanes", "n-lanes", "auto", "MatMul")
