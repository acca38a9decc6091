from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles import Gaussian, bent, relative_error, run

from sparse_engine.errors import OptionError, SamplingCancelled
from sparse_engine.sampling import SAMPLERS, VPLinear, make_trajectory, normal, walk

Float32 = npt.NDArray[np.float32]

SHAPE = (3, 8, 8)
IMAGES = np.arange(2)
SCHEDULE = VPLinear()


def _step(
    x: Float32, t: Float32, coef: Float32, clip: Float32, base: Float32, h1: Float32, h2: Float32, z: Float32
) -> tuple[Float32, Float32]:
    """The step graph in float32, as a backend computes it."""
    eps = bent(x, t[:, None, None, None])
    m = np.clip(coef[0] * x + coef[1] * eps, clip[0], clip[1])
    return coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z, m


def _noise(draw: int) -> Float32:
    return normal(1, IMAGES, draw, SHAPE)


def _unused(draw: int) -> Float32:
    pytest.fail(f"draw {draw} was asked for")


@pytest.mark.parametrize("value_range", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_the_loop_walks_the_rows(sampler: str, steps: int, value_range: tuple[float, float] | None) -> None:
    trajectory = make_trajectory(sampler, SCHEDULE, steps, value_range=value_range)
    start = _noise(0)
    found = walk(trajectory, _step, start, noise=_noise)
    expected = run(trajectory, lambda x, t: bent(x, 999 * t), start, _noise)
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 1e-4
    np.testing.assert_array_equal(start, _noise(0))


@pytest.mark.parametrize("sampler", [name for name, info in SAMPLERS.items() if info.deterministic])
def test_deterministic_samplers_draw_nothing(sampler: str) -> None:
    trajectory = make_trajectory(sampler, SCHEDULE, 10)
    assert not trajectory.stochastic
    walk(trajectory, _step, _noise(0), noise=_unused)
    walk(trajectory, _step, _noise(0), noise=None)


@pytest.mark.parametrize("sampler", ["ddpm", "euler-sde", "sde-dpm-solver++"])
def test_step_i_uses_draw_i_plus_one_and_the_step_to_the_image_none(sampler: str) -> None:
    draws: list[int] = []

    def noise(draw: int) -> Float32:
        draws.append(draw)
        return _noise(draw)

    walk(make_trajectory(sampler, SCHEDULE, 6), _step, _noise(0), noise=noise)
    assert draws == [1, 2, 3, 4, 5]


def test_noise_is_asked_for_before_it_is_missed() -> None:
    with pytest.raises(OptionError, match="noise is None, and sampler ddpm draws noise"):
        walk(make_trajectory("ddpm", SCHEDULE, 5), _step, _noise(0), noise=None)


def test_the_callback_sees_every_state() -> None:
    trajectory = make_trajectory("ddim", SCHEDULE, 5)
    seen: list[tuple[int, float, Float32]] = []
    result = walk(trajectory, _step, _noise(0), noise=None, callback=lambda i, t, x: seen.append((i, t, x)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in seen] == trajectory.times.tolist()
    assert seen[-1][2] is result


@pytest.mark.parametrize("every, expected", [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_the_callback_is_called_as_often_as_was_asked(every: int, expected: list[int]) -> None:
    seen: list[int] = []
    trajectory = make_trajectory("ddim", SCHEDULE, 5)
    walk(trajectory, _step, _noise(0), noise=None, callback=lambda i, t, x: seen.append(i), callback_every=every)
    assert seen == expected


def test_the_callback_stops_sampling() -> None:
    calls: list[Any] = []

    def step(*arguments: Any) -> tuple[Float32, Float32]:
        calls.append(arguments)
        return _step(*arguments)

    with pytest.raises(SamplingCancelled, match="after step 3 of 10"):
        walk(make_trajectory("ddim", SCHEDULE, 10), step, _noise(0), noise=None, callback=lambda i, t, x: i < 2)
    assert len(calls) == 3


def test_a_callback_that_returns_nothing_goes_on() -> None:
    seen: list[int] = []
    walk(make_trajectory("ddim", SCHEDULE, 3), _step, _noise(0), noise=None, callback=lambda i, t, x: seen.append(i))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_float32_rows_are_within_1e_5_of_float64(sampler: str, steps: int) -> None:
    """The solver lines alone in float32, the network in float64, as DESIGN.md section 4 has it."""
    gaussian = Gaussian(SCHEDULE, std=0.5)
    trajectory = make_trajectory(sampler, SCHEDULE, steps)
    start = _noise(0)
    exact = run(trajectory, gaussian.eps, start, _noise)
    rounded = run(trajectory, gaussian.eps, start, _noise, dtype=np.float32)
    assert rounded.dtype == np.float32
    assert relative_error(rounded, exact) < 1e-5
