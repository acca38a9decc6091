"""Singlestep DPM-Solver and DPM-Solver++: a solver step of order k makes k network calls.

A step from s to t sets ``base`` to x_s with its first call. Each call but the last yields the x of an
intermediate time; all are linear in base, the call's model output m and those of the calls before it, h1 and
h2.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from sparse_engine.sampling.grid import grid
from sparse_engine.sampling.schedules import Float64, Schedule
from sparse_engine.sampling.trajectory import Form, Options, Trajectory, assemble

Row = tuple[float, float, float, float]  # coefficients of base, m, h1 and h2


def dpm_solver(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, eq. 3.7 and algorithms 1, 2: DPM-Solver-1, -2, -3).

    Third-order steps of equal length in the chosen spacing, with one of second or first order at the end
    so that ``steps`` network calls are made exactly; intermediate times at 1/3 and 2/3 (1/2) of a step's
    lambda. The evaluation of U-ViT's pixel models and latent L. ``order`` 2 and 1 use shorter steps throughout.
    """
    orders = _orders(steps - options.denoise_to_zero, options.order)
    ends = grid(schedule, options, len(orders) + options.denoise_to_zero)
    blocks = []
    for k, s, t in zip(orders, ends, ends[1:], strict=False):
        lambda_s, lambda_t = schedule.lambda_([s, t])
        between = schedule.inverse_lambda(lambda_s + np.arange(1, k) / k * (lambda_t - lambda_s))
        blocks.append(np.array([s, *between, t]))
    return _assemble_blocks("dpm-solver", schedule, options, "eps", blocks)


def dpm_solver_pp_singlestep(schedule: Schedule, steps: int, options: Options) -> Trajectory:
    """Singlestep DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 1; 3S as in its code).

    All calls lie on one grid of ``steps`` intervals, cut into steps of order 3, 3, ..., and one or two of
    lower order at the end: the evaluation of U-ViT's latent H and text-to-image models.
    """
    orders = _orders(steps - options.denoise_to_zero, options.order)
    times = grid(schedule, options, steps)
    starts = np.concatenate([[0], np.cumsum(orders, dtype=int)])
    blocks = [times[i : j + 1] for i, j in pairwise(starts)]
    return _assemble_blocks("dpm-solver++-singlestep", schedule, options, "x0", blocks)


def _orders(calls: int, order: int) -> list[int]:
    """The orders of the solver steps that spend ``calls`` network calls."""
    if calls == 0:
        return []
    if order == 3:
        whole, rest = divmod(calls, 3)
        return [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]
    whole, rest = divmod(calls, order)
    return [order] * whole + [1] * rest


def _assemble_blocks(
    sampler: str, schedule: Schedule, options: Options, form: Form, blocks: list[Float64]
) -> Trajectory:
    """One trajectory of solver steps, each given by its times [k + 1]; then the row to t = 0, if any."""
    rows: list[Row] = []
    times: list[float] = []
    rebase: list[bool] = []
    for block in blocks:
        rows += _ROWS[form](schedule, block)
        times += block[:-1].tolist()
        rebase += [True] + [False] * (len(block) - 2)
    if options.denoise_to_zero:
        last = float(blocks[-1][-1]) if blocks else options.t_start
        rows.append(_to_zero(schedule, last, form))
        times.append(last)
        rebase.append(True)
    base, m, h1, h2 = np.array(rows).T
    return assemble(sampler, schedule, options, form, times, base=base, m=m, h1=h1, h2=h2, rebase=rebase)


def _to_zero(schedule: Schedule, t: float, form: Form) -> Row:
    """x0 itself: the first-order step of either solver as its end goes to t = 0."""
    if form == "x0":
        return 0.0, 1.0, 0.0, 0.0
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return 1.0 / alpha, -sigma / alpha, 0.0, 0.0


def _eps_rows(schedule: Schedule, times: Float64) -> list[Row]:
    """The k rows of a DPM-Solver-k step from times[0] over times[1:-1] to times[-1]."""
    log_alpha, sigma, lambdas = schedule.log_alpha(times), schedule.sigma(times)[1:], schedule.lambda_(times)
    h = lambdas[1:] - lambdas[0]
    phi = np.expm1(h)
    return _stages(h, np.exp(log_alpha[1:] - log_alpha[0]), -sigma * phi, -sigma * (phi / h - 1.0))


def _x0_rows(schedule: Schedule, times: Float64) -> list[Row]:
    """The k rows of a DPM-Solver++(kS) step from times[0] over times[1:-1] to times[-1]."""
    alpha, sigma, lambdas = schedule.alpha(times)[1:], schedule.sigma(times), schedule.lambda_(times)
    h = lambdas[1:] - lambdas[0]
    phi = np.expm1(-h)
    return _stages(h, sigma[1:] / sigma[0], -alpha * phi, alpha * (phi / h + 1.0))


def _stages(h: Float64, carry: Float64, first: Float64, second: Float64) -> list[Row]:
    """Both solvers' stages, at the lambda distances h [k] from the step's start.

    With D = (m_later - m_0) / r, x at a stage is ``carry * base + first * m_0 + second * D``, where a
    second-order step has first/2 in the place of second.
    """
    k, r = len(h), h / h[-1]
    rows: list[Row] = [(carry[0], first[0], 0.0, 0.0)]
    if k == 2:
        weight = 0.5 * first[1] / r[0]
        rows.append((carry[1], weight, first[1] - weight, 0.0))
    if k == 3:
        weight = second[1] * r[1] / r[0]
        rows.append((carry[1], weight, first[1] - weight, 0.0))
        weight = second[2] / r[1]
        rows.append((carry[2], weight, 0.0, first[2] - weight))
    return rows


_ROWS = {"eps": _eps_rows, "x0": _x0_rows}
