"""The tables of the kernels: contenders that compute the same, and rates of the work that they do."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sparse_engine import kernels
from sparse_engine.bench import contenders
from sparse_engine.bench import kernels as bench
from sparse_engine.bench.contenders import Shape
from sparse_engine.bench.contenders_int8 import make_int8_contenders

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")


@needs_kernels
@pytest.mark.parametrize(
    "shape", [Shape((64, 96)), Shape((64, 256, 64)), Shape((32, 48), 3, 5), Shape((32, 16), 1, 4)], ids=str
)
def test_all_contenders_compute_the_same(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    stack = contenders.random_layers(rng, shape)
    x = contenders.random_input(rng, stack, shape.rows_of_x(3))
    calls = contenders.make_contenders(stack, x, "fp32", 2)
    alone = {"one node"} if len(shape.widths) == 3 else set()
    alone |= {"ORT, plain layout"} if shape.side else set()
    n_lanes = {"n-lanes"} if shape.rows_of_x(3) <= 64 else set()
    assert set(calls) - {"torch, packed weights"} == {"t-lanes", "ORT", "torch"} | n_lanes | alone
    expected = np.asarray(calls.pop("torch")())
    for name, run in calls.items():
        outputs = [np.asarray(run())] if name.startswith("torch") else run()
        assert len(outputs) == (1 if name.startswith("torch") else contenders.LAYERS_PER_CALL)
        for found in outputs:
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max(), name


@needs_kernels
def test_bf16_is_timed_in_every_lane() -> None:
    if "avx512-bf16" not in kernels.available_tiers():
        pytest.skip("no bf16 tier")
    rng = np.random.default_rng(0)
    one_node = {contenders.ONE_NODE, contenders.ONE_NODE_BF16}
    for shape, more in ((Shape((64, 96)), set()), (Shape((64, 128, 64)), one_node), (Shape((32, 48), 3, 5), set())):
        stack = contenders.random_layers(rng, shape)
        x = contenders.random_input(rng, stack, shape.rows_of_x(100))
        calls = contenders.make_contenders(stack, x, "bf16", 1)
        assert {*LANES, *more} == {name for name in calls if not name.startswith(("ORT", "torch"))}
        found = {name: np.asarray(run()[0]) for name, run in calls.items() if not name.startswith("torch")}
        for name, y in found.items():
            assert np.abs(y - found["ORT"]).max() < 1e-2 * np.abs(found["ORT"]).max(), name


@needs_kernels
@pytest.mark.parametrize("shape", [Shape((64, 96)), Shape((64, 256, 64))], ids=str)
def test_contenders_in_int8_compute_the_same(shape: Shape) -> None:
    rng = np.random.default_rng(0)
    stack = contenders.random_layers(rng, shape)
    x = contenders.random_input(rng, stack, 37)
    calls = make_int8_contenders(stack, x, 2)
    assert set(calls) == {"r-lanes", "ORT"} | ({"one node"} if len(shape.widths) == 3 else set())
    expected = np.asarray(contenders.make_contenders(stack, x, "fp32", 1)["torch"]())
    found = {name: np.asarray(run()[0][0] if name == "ORT" else run()) for name, run in calls.items()}
    largest = np.abs(expected).max()
    for values in found.values():
        assert np.abs(values - found["ORT"]).max() < 2e-3 * largest  # a code that lies half way rounds either way
        assert 1e-4 * largest < np.abs(values - expected).max() < 0.05 * largest


LANES = ("t-lanes", "n-lanes", "r-lanes")
PRODUCT = bench.Cell(
    Shape((4, 8, 2)),
    10,
    2,
    "fp32",
    "avx2",
    100.0,
    {"one node": [1e-9, 2e-9, 4e-9], "t-lanes": [9e-9], "n-lanes": [8e-9], "ORT": [4e-9] * 3},
)
CONVOLUTION = bench.Cell(
    Shape((4, 8), 3, 5),
    2,
    2,
    "fp32",
    "avx2",
    100.0,
    {
        "t-lanes": [8e-8],
        "n-lanes": [4e-8],
        "ORT": [1.6e-7],
        "ORT, plain layout": [1.2e-7],
        "torch": [1.2e-6],
        "torch, packed weights": [2.4e-7],
    },
)


def test_rates_are_of_dense_work_at_the_median_of_the_fastest() -> None:
    assert PRODUCT.gflops == {"ours": 480, "ours, apart": 120, "ORT": 240}  # 2 x 10 x (32 + 16) operations
    assert PRODUCT.kernels == {"ours": "one node", "ours, apart": "n-lanes", "ORT": "ORT"}
    assert CONVOLUTION.gflops == pytest.approx({"ours": 720, "ORT": 240, "torch": 120})  # 2 x 50 pixels x 8 x 36
    assert CONVOLUTION.kernels == {"ours": "n-lanes", "ORT": "ORT, plain layout", "torch": "torch, packed weights"}


def test_tables_of_products_and_of_convolutions() -> None:
    results = {"cells": [PRODUCT.summary(), CONVOLUTION.summary()]}
    products, convolutions = bench.table_cells(results)
    ends = ["over the best other", "of bound"]
    assert products[1] == ["layer", "M", "threads", "lanes", "ours", "ours, apart", "ORT", *ends]
    assert products[2] == [["4 → 8 → 2", "10", "2", "T", "480", "120", "240", "2.00x", "480%"]]
    assert convolutions[1] == ["convolution", "batch", "threads", "lanes", "ours", "ORT", "torch", *ends]
    assert convolutions[2] == [["4 → 8, 3x3 at 5x5", "2", "2", "N", "720", "240", "120", "3.00x", "720%"]]
    page = bench.markdown(results).split("\n\n")
    for (_, headings, rows), table in zip((products, convolutions), page, strict=True):
        expected = [
            "| " + " | ".join(headings) + " |",
            "|" + "---:|" * len(headings),
            "| " + " | ".join(rows[0]) + " |",
        ]
        assert table.splitlines() == expected
    console = Console(record=True, width=120)
    console.print(*bench.tables(results))
    shown = console.export_text()
    assert "4 → 8 → 2" in shown
    assert "2:4 convolutions, fp32 on avx2" in shown
    assert "50 GFLOP/s per core" in shown


def test_files_from_before_there_were_convolutions() -> None:
    row = {key: entry for key, entry in PRODUCT.summary().items() if key not in ("kernels", "gflops_by_kernel")}
    ((kind, headings, rows),) = bench.table_cells({"cells": [row]})
    assert kind == "products"
    assert headings[:5] == ["layer", "M", "threads", "ours", "ours, apart"]
    assert rows[0][:5] == ["4 → 8 → 2", "10", "2", "480", "120"]


def test_every_key_of_a_cell_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "bench-results.md").read_text()
    for key in json.loads(json.dumps(CONVOLUTION.summary())):
        assert f"`{key}`" in page, key


@needs_kernels
def test_a_cell_for_every_combination() -> None:
    shapes = (Shape((64, 96)), Shape((64, 128, 64)), Shape((16, 16), 3, 4))
    found = list(bench.measure(shapes, tokens=(3, 20), batches=(1, 2), threads=(1,), seconds_per_cell=0.01))
    assert [(cell.shape, cell.count) for cell in found] == [
        (shapes[0], 3),
        (shapes[0], 20),
        (shapes[1], 3),
        (shapes[1], 20),
        (shapes[2], 1),
        (shapes[2], 2),
    ]
    for cell in found:
        assert all(rate > 0 for rate in cell.gflops.values())
        assert cell.tier == kernels.best_tier("fp32")
        assert cell.kernels["ours"] in ("t-lanes", "n-lanes", "one node")
