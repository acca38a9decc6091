"""What lower precisions cost: the emulation, and the table that is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparse_engine.bench.precision import compare, markdown, to_tf32
from sparse_engine.bench.results_file import read_results
from sparse_engine.export.bake import bake
from sparse_engine.export.model import load_model
from tests.conftest import TINY_CONDITIONAL, save_checkpoint

CHECKOUT = Path(__file__).parents[2]


def test_tf32_keeps_ten_bits_and_rounds_ties_to_even() -> None:
    ulp = 2.0**-10
    given = torch.tensor([1 + ulp, 1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.6 * ulp, -1 - ulp / 2, 0.0, 65504.0])
    expected = torch.tensor([1 + ulp, 1.0, 1 + 2 * ulp, 1 + ulp, -1.0, 0.0, 65504.0])
    assert torch.equal(to_tf32(given), expected)
    x = torch.randn(10_000)
    assert ((to_tf32(x) - x).abs() <= x.abs() * 2.0**-11).all()


def test_lower_precisions_err_in_their_order(tmp_path: Path) -> None:
    model = load_model(save_checkpoint(tmp_path / "x.pth", TINY_CONDITIONAL), heads=4, null_class=4)
    rows = {row["precision"]: row for row in compare(model, bake(model), 2, lambda what: None)}
    assert 1e-6 < rows["tf32"]["eps_error"] < rows["bf16"]["eps_error"] < 0.3
    assert rows["fp16"]["eps_error"] < rows["bf16"]["eps_error"]
    assert rows["bf16"]["psnr"] < rows["fp16"]["psnr"]
    assert np.isfinite([row["psnr"] for row in rows.values()]).all()


def test_published_table_is_the_results_file() -> None:
    table = markdown(read_results(CHECKOUT / "bench" / "results" / "precision.json"))
    assert table in (CHECKOUT / "docs" / "precision.md").read_text()
