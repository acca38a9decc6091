"""The noise in PyTorch's operators, against its definition, and in the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import sampling
from sparse_engine.backends.device_loop import DeviceLoop
from sparse_engine.backends.device_noise import DRAWN, UPLOADED, DeviceNoise
from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.backends.torch.noise import draw_noise
from sparse_engine.sampling.noise import SeededNoise
from sparse_engine.tactics import Choice

CPU = torch.device("cpu")


def drawn(noise: SeededNoise, number: int) -> np.ndarray:
    z = torch.full((len(noise.images), *noise.shape), torch.nan)
    draw_noise(z, torch.from_numpy(noise.origin), torch.from_numpy(np.array([number], np.uint32)))
    return z.numpy()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 12345, 2**64 - 1, "each"])
@pytest.mark.parametrize(
    "images,shape",
    [
        ([0], (1, 1, 1)),
        ([5, 2**32 - 1, 5], (3, 1, 1)),
        ([9, 8, 7, 6], (3, 7, 5)),
        (range(1000, 1016), (3, 32, 32)),
    ],
    ids=str,
)
def test_draws_what_the_definition_says(seed: Any, images: Any, shape: tuple[int, ...]) -> None:
    seeds = np.array([2**64 - 1 - 2**33 * i for i in range(len(images))], np.uint64) if seed == "each" else seed
    noise = SeededNoise(seeds, np.array(images), shape)
    for number in (0, 1, 50, 2**32 - 1):
        assert np.abs(drawn(noise, number) - noise(number)).max() <= 1e-5


def test_the_tails_agree_too() -> None:
    """A million numbers reach beyond 4.5."""
    noise = SeededNoise(7, np.arange(4), (4, 256, 256))
    found, expected = drawn(noise, 3), noise(3)
    assert np.abs(expected).max() > 4.5
    assert np.abs(found - expected).max() <= 1e-5


class Halving(torch.nn.Module):
    """A step that is linear in all that it is given."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, coef: torch.Tensor, *rest: torch.Tensor) -> Any:
        _, _, _, _, z = rest
        return 0.5 * x + coef[7] * z, x


@pytest.mark.parametrize("kernel", [DRAWN, UPLOADED])
def test_a_loop_draws_the_same_pictures_either_way(kernel: str) -> None:
    class Tactics:
        def choose(self, key: str, candidates: Callable[[], dict[str, Callable[[], object]]], names: Any) -> Any:
            for run in candidates().values():
                run()
            return Choice(kernel, {DRAWN: 1.0, UPLOADED: 2.0})

    device = TorchDevice(CPU, Halving(), compiled=False)
    loop = DeviceLoop(device, noise=DeviceNoise(device, Tactics()))  # type: ignore[arg-type]
    trajectory = sampling.make_trajectory("euler-sde", sampling.VPLinear(), 20)
    noise = SeededNoise(3, np.arange(5), (3, 4, 4))
    x, expected = noise(0), noise(0)
    for step in range(20):
        expected = 0.5 * expected + np.float32(trajectory.coef[step, 7]) * noise(step + 1)
    for _ in range(2):
        found = loop.run(trajectory, x, conditioning={}, guidance=np.ones(1, np.float32), noise=noise)
        assert np.abs(found - expected).max() <= 1e-5
    assert loop.describe()["noise"].startswith(kernel)
