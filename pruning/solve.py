"""Which weights of a layer go, and what becomes of the others: four methods on the sums of ``gram``.

Weights are float64 [out, n] here, in groups of M along n. Sources: Frantar and Alistarh, "SparseGPT", ICML 2023 (arXiv
2301.00774); Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), ICLR 2024 (arXiv
2306.11695); the dense target is GPTAQ's asymmetric calibration (Li et al., ICML 2025, arXiv 2504.02692); the exact
solution for the weights that stay is the last stage of ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_engine.export.masks import Pattern

from .gram import Sums, Work

DAMPING = 0.01  # of the mean of G's diagonal, which is added to it
MOST_DAMPING = 1e6
BLOCK = 128  # columns whose errors are carried over to those behind them at once
EXACT_UP_TO = 2048  # unknowns of a row; more are found by conjugate gradients, a product of matrices at a time
MOST_ITERATIONS, TOLERANCE = 200, 1e-6


@dataclasses.dataclass(frozen=True)
class Solved:
    """New weights [out, n], and how much of the mean of G's diagonal had to be added to it (0: G was not inverted)."""

    weight: Tensor
    damping: float = 0.0


def magnitude(weight: Tensor, sums: Sums, pattern: Pattern, work: Work) -> Solved:
    """The largest of each group stay, as they are."""
    return Solved(weight * largest(weight.abs(), pattern))


def wanda(weight: Tensor, sums: Sums, pattern: Pattern, work: Work) -> Solved:
    """Those stay that weigh most, times the norm of what they are given, as they are."""
    return Solved(weight * largest(weight.abs() * sums.gram.diagonal().sqrt(), pattern))


def sparsegpt(weight: Tensor, sums: Sums, pattern: Pattern, work: Work) -> Solved:
    """From left to right, the cheapest go, and the columns behind make up for them."""
    factor, damping, _ = _damped(sums.gram, work)
    return Solved(_swept(weight, factor, pattern, work)[0], damping)


def full(weight: Tensor, sums: Sums, pattern: Pattern, work: Work) -> Solved:
    """SparseGPT's choice for the weights that come closest to the dense network's outputs; what stays, solved exactly.

    The kept weights of a row minimise ||Y - X w||^2 + damping ||w - w_dense||^2.
    """
    factor, damping, ridge = _damped(sums.gram, work)
    target = sums.cross + ridge * weight
    started = time.perf_counter()
    closest = torch.cholesky_solve(target.T, factor).T
    work.add(2.0 * target.numel() * len(factor), started)
    swept, mask = _swept(closest, factor, pattern, work)
    system = sums.gram.clone()
    system.diagonal().add_(ridge)
    return Solved(resolved(system, target, mask, swept, work), damping)


METHODS: dict[str, Callable[[Tensor, Sums, Pattern, Work], Solved]] = {
    "full": full,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
    "magnitude": magnitude,
}


def largest(scores: Tensor, pattern: Pattern) -> Tensor:
    """True for the N largest scores of each M; of equals the lower index goes first. [out, n]."""
    groups = scores.reshape(-1, pattern.m)
    gone = groups.argsort(dim=1, stable=True)[:, : pattern.m - pattern.n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, gone, False).reshape(scores.shape)


def _damped(gram: Tensor, work: Work) -> tuple[Tensor, float, float]:
    """(lower Cholesky factor of G with something added to its diagonal, in parts of the diagonal's mean, how much).

    More is added where G is singular all the same, as it is of too few states.
    """
    mean = float(gram.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        system = gram.clone()
        system.diagonal().add_(damping * mean)
        started = time.perf_counter()
        factor, failed = torch.linalg.cholesky_ex(system)
        work.add(len(gram) ** 3 / 3, started)
        if not int(failed) or damping > MOST_DAMPING:
            return factor, damping, damping * mean
        damping *= 10


def _swept(weight: Tensor, factor: Tensor, pattern: Pattern, work: Work) -> tuple[Tensor, Tensor]:
    """SparseGPT's sweep over columns. Returns (weights, mask), both [out, n]."""
    n, m = len(factor), pattern.m
    started = time.perf_counter()
    inverse = torch.cholesky_inverse(factor)
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = weight.T.contiguous()  # [n, out]: a column is contiguous
    kept = torch.ones_like(w, dtype=torch.bool)
    step = max(m, BLOCK // m * m)
    for first in range(0, n, step):
        last = min(first + step, n)
        block, u = w[first:last].clone(), upper[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            if i % m == 0:
                scores = (block[i : i + m] / u.diagonal()[i : i + m, None]).square()
                kept[first + i : first + i + m] = largest(scores.T.contiguous(), pattern).T
            left = block[i] * kept[first + i]
            errors[i] = (block[i] - left) / u[i, i]
            block[i:] -= torch.outer(u[i, i:], errors[i])
            block[i] = left
        w[first:last] = block
        w[last:] -= upper[first:last, last:].T @ errors
    work.add(n**3 + float(n) * n * w.shape[1], started)
    return w.T.contiguous(), kept.T.contiguous()


def resolved(system: Tensor, target: Tensor, mask: Tensor, start: Tensor, work: Work) -> Tensor:
    """The kept weights w of each row that solve ``system`` [n, n] w = ``target`` [out, n] on the row's own support."""
    kept = int(mask[0].sum())  # of every row: N of each M
    if kept > EXACT_UP_TO:
        return _by_gradients(system, target, mask, start, work)
    solution = torch.zeros_like(target)
    places = mask.nonzero()[:, 1].reshape(-1, kept)
    started = time.perf_counter()
    for row, own in enumerate(places):  # one by one: LAPACK is given no more at once either, and nothing is copied
        factor = torch.linalg.cholesky(system.index_select(0, own).index_select(1, own), upper=True)
        solution[row, own] = torch.cholesky_solve(target[row, own, None], factor, upper=True)[:, 0]
    work.add(len(places) * (kept**3 / 3 + 2.0 * kept * kept), started)
    return solution


def _by_gradients(system: Tensor, target: Tensor, mask: Tensor, start: Tensor, work: Work) -> Tensor:
    """The same by conjugate gradients, all rows at once, preconditioned with the diagonal."""
    started, steps = time.perf_counter(), 0
    w, scale = start * mask, system.diagonal()
    residual = (target - w @ system) * mask
    limit = TOLERANCE**2 * (target * mask).square().sum(1)
    direction = z = residual / scale
    inner = (residual * z).sum(1)
    while steps < MOST_ITERATIONS and bool((residual.square().sum(1) > limit).any()):
        ahead = direction @ system
        curve = (direction * ahead).sum(1)
        length = torch.where(curve > 0, inner / curve, 0.0)[:, None]
        w = w + length * direction
        residual = residual - length * ahead * mask
        z = residual / scale
        before, inner = inner, (residual * z).sum(1)
        direction = z + torch.where(before > 0, inner / before, 0.0)[:, None] * direction
        steps += 1
    work.add(2.0 * (steps + 1) * target.shape[0] * target.shape[1] ** 2, started)
    return w
