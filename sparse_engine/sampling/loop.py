"""The one loop that walks a trajectory, for every sampler and every backend that steps on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparse_engine import arguments
from sparse_engine.errors import OptionError, SamplingCancelled
from sparse_engine.sampling.trajectory import Trajectory

Float32 = npt.NDArray[np.float32]
# (x, t [B], coef [8], clip [2], base, h1, h2, z) -> (x_next, m); x and all without a shape are [B, C, H, W].
StepFunction = Callable[
    [Float32, Float32, Float32, Float32, Float32, Float32, Float32, Float32], tuple[Float32, Float32]
]


def walk(
    trajectory: Trajectory,
    step: StepFunction,
    x: Float32,
    *,
    noise: Callable[[int], Float32] | None,
    callback: Callable[[int, float, Float32], object] | None = None,
    callback_every: int = 1,
) -> Float32:
    """Run a trajectory from its first state to its last.

    Args:
        trajectory: S calls.
        step: the step graph (see ``Trajectory``). It is given the same arrays again as base, h1 and h2, so it
            must neither write into its inputs nor return an array that it has returned before.
        x: float32 [B, C, H, W]: the state at ``trajectory.times[0]``.
        noise: draw number -> float32 of x's shape. Step i uses draw i + 1 (draw 0 made x); it is called
            only for the steps whose noise coefficient is not 0. None where nothing is drawn.
        callback: called after each step with its index, the schedule time of its network call, and the new
            x. Returning False stops.
        callback_every: it is called after each so many steps, and after the last.

    Returns:
        float32 [B, C, H, W], the last state.

    Raises:
        OptionError: the trajectory draws noise and ``noise`` is None.
        SamplingCancelled: the callback returned False.
    """
    if trajectory.stochastic and noise is None:
        raise OptionError(
            f"noise is None, and sampler {trajectory.sampler} draws noise at its steps",
            "pass a function of the draw's number",
        )
    steps = len(trajectory)
    times = np.repeat(trajectory.network_times.astype(np.float32)[:, None], len(x), axis=1)  # [S, B]
    rows = trajectory.coef.astype(np.float32)
    clip = np.array(trajectory.clip, np.float32)
    rebase, drawn = trajectory.rebase.tolist(), (trajectory.coef[:, 7] != 0).tolist()
    zeros = np.zeros_like(x)
    base, h1, h2 = x, zeros, zeros
    for i in range(steps):
        if rebase[i]:
            base = x
        z = noise(i + 1) if drawn[i] and noise is not None else zeros
        x, m = step(x, times[i], rows[i], clip, base, h1, h2, z)
        h1, h2 = m, h1
        told = (i + 1) % callback_every == 0 or i + 1 == steps
        if callback is not None and told and arguments.stops(callback(i, float(trajectory.times[i]), x)):
            raise SamplingCancelled(f"the callback stopped sampling after step {i + 1} of {steps}")
    return x
