"""The four methods on sums of random inputs, against their formulas written out and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_engine.export.masks import TWO_FOUR, Pattern, is_n_of_m, magnitude_mask
from sparse_engine.pruning import solve
from sparse_engine.pruning.gram import Sums, Work
from sparse_engine.pruning.solve import METHODS, resolved

pytestmark = pytest.mark.usefixtures("without_gradients")

OUT, COLUMNS, ROWS = 12, 40, 300


def correlated(seed: int = 0, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64, generator=generator)
    return torch.randn(rows, COLUMNS, dtype=torch.float64, generator=generator) @ mixing + 0.5


def sums_of(x: Tensor, y: Tensor) -> Sums:
    return Sums(x.T @ x, y.T @ x, float(y.square().sum()), float(y.square().sum()), len(x))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def sums(weight: Tensor) -> Sums:
    """Of inputs that the layers before have changed."""
    x = correlated()
    dense = x + 0.2 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return sums_of(x, dense @ weight.T)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern(1, 8), Pattern(7, 8)])
def test_each_method_keeps_n_of_m(method: str, pattern: Pattern, weight: Tensor, sums: Sums) -> None:
    found = METHODS[method](weight, sums, pattern, Work()).weight
    assert is_n_of_m(found.numpy(), pattern)
    assert int((found != 0).sum()) == weight.numel() * pattern.n // pattern.m


def test_updated_weights_come_closer_and_solved_ones_closest(weight: Tensor, sums: Sums) -> None:
    error = {name: sums.error(METHODS[name](weight, sums, TWO_FOUR, Work()).weight) for name in METHODS}
    assert error["full"] < 0.8 * error["sparsegpt"]
    assert error["sparsegpt"] < 0.8 * min(error["wanda"], error["magnitude"])


def test_magnitude_is_the_rule_that_masks_have(weight: Tensor, sums: Sums) -> None:
    weight[0, :4] = torch.tensor([1.0, -1, 1, 1])
    found = METHODS["magnitude"](weight, sums, TWO_FOUR, Work()).weight
    assert np.array_equal(found.numpy() != 0, magnitude_mask(weight.float().numpy())[0])


def test_wanda_weighs_by_what_comes_in(weight: Tensor) -> None:
    x = correlated() * torch.tensor([1.0, 1.0, 1e6, 1e6]).repeat(COLUMNS // 4)
    found = METHODS["wanda"](weight, sums_of(x, x @ weight.T), TWO_FOUR, Work()).weight
    expected = weight.clone()
    expected.view(OUT, -1, 4)[:, :, :2] = 0
    assert torch.equal(found, expected)


def test_sparsegpt_is_the_authors_sweep(weight: Tensor, sums: Sums, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column by column, without blocks, as the paper's Algorithm 1 has it."""
    monkeypatch.setattr(solve, "BLOCK", 8)
    system = sums.gram + 0.01 * sums.gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(system)).T
    w, mask = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for j in range(COLUMNS):
        if j % 4 == 0:
            scores = w[:, j : j + 4] ** 2 / upper.diagonal()[j : j + 4] ** 2
            mask[:, j : j + 4].scatter_(1, scores.argsort(1)[:, :2], False)
        error = (w[:, j] - w[:, j] * mask[:, j]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    expected = w * mask
    found = METHODS["sparsegpt"](weight, sums, TWO_FOUR, Work())
    assert found.damping == 0.01
    assert torch.allclose(found.weight, expected, atol=1e-9)


def test_no_other_weights_on_the_support_are_closer(weight: Tensor, sums: Sums) -> None:
    found = METHODS["full"](weight, sums, TWO_FOUR, Work())
    ridge = found.damping * sums.gram.diagonal().mean()
    slope = found.weight @ sums.gram - sums.cross + ridge * (found.weight - weight)
    assert float(slope[found.weight != 0].abs().max()) < 1e-8 * float(sums.cross.abs().max())


def test_gradients_find_what_the_exact_solution_is(weight: Tensor, sums: Sums, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = METHODS["magnitude"](weight, sums, TWO_FOUR, Work()).weight != 0
    system = sums.gram + 0.01 * sums.gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    exact = resolved(system, sums.cross, mask, weight, Work())
    monkeypatch.setattr(solve, "EXACT_UP_TO", 1)
    near = resolved(system, sums.cross, mask, weight, Work())
    assert torch.allclose(near, exact, atol=1e-4 * float(exact.abs().max()))
    assert not bool(near[~mask].any())


def test_a_singular_matrix_is_damped(weight: Tensor) -> None:
    x = correlated(rows=5)
    found = METHODS["full"](weight, sums_of(x, x @ weight.T), TWO_FOUR, Work())
    assert found.damping >= 0.01
    assert torch.isfinite(found.weight).all()
    nothing = torch.zeros(5, COLUMNS, dtype=torch.float64)  # inputs that are always 0
    assert torch.isfinite(METHODS["full"](weight, sums_of(nothing, nothing @ weight.T), TWO_FOUR, Work()).weight).all()
