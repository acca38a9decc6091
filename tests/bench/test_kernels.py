"""The product table: contenders that compute the same, and rates of the work that they do."""

from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from sparse_engine import kernels
from sparse_engine.bench import kernels as bench

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")


@pytest.mark.parametrize("widths", [(64, 96), (64, 256, 64)])
def test_all_contenders_compute_the_same(widths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    stack = [bench._random_layer(rng, depth, rows) for depth, rows in pairwise(widths)]
    x = rng.standard_normal((70, widths[0])).astype(np.float32)
    contenders = bench._contenders(x, stack, "fp32", 2)
    apart = {bench.APART} if len(widths) == 3 else set()
    assert set(contenders) == {bench.OURS, bench.ORT, bench.TORCH} | apart
    expected = np.asarray(contenders.pop(bench.TORCH)())
    for name, run in contenders.items():
        outputs = run()
        assert len(outputs) == bench.LAYERS_PER_CALL
        for found in outputs:
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max(), name


def test_rates_are_of_dense_work_at_the_median() -> None:
    cell = bench.Cell((4, 8, 2), 10, 2, "fp32", "avx2", 100.0, {"ours": [1e-9, 2e-9, 4e-9], "ORT": [4e-9] * 3})
    assert cell.gflops == {"ours": 2 * 10 * (32 + 16) / 2, "ORT": 2 * 10 * (32 + 16) / 4}
    row = bench.summary(cell)
    headings, rows = bench.table_cells({"cells": [row]})
    assert headings == ["layer", "M", "threads", "ours", "ORT", "over the best other", "of bound"]
    assert rows == [["4 → 8 → 2", "10", "2", "480", "240", "2.00x", "480%"]]
    assert bench.markdown({"cells": [row]}).splitlines()[1:] == ["|" + "---:|" * 7, "| " + " | ".join(rows[0]) + " |"]
    console = Console(record=True, width=120)
    console.print(bench.table({"cells": [row]}))
    shown = console.export_text()
    assert "4 → 8 → 2" in shown
    assert "50 GFLOP/s per core" in shown


def test_a_cell_for_every_combination() -> None:
    found = list(bench.measure([(64, 96), (64, 128, 64)], tokens=(3, 20), threads=(1,), seconds_per_cell=0.01))
    assert [(cell.widths, cell.M) for cell in found] == [
        ((64, 96), 3),
        ((64, 96), 20),
        ((64, 128, 64), 3),
        ((64, 128, 64), 20),
    ]
    for cell in found:
        assert all(rate > 0 for rate in cell.gflops.values())
        assert cell.tier == kernels.best_tier("fp32")
