"""The CUDA runner on a GPU, with no library behind it: a step is a copy, so that what it was given shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import sampling, tactics
from sparse_engine.backends.cuda.device import Buffer, CudaDevice
from sparse_engine.backends.cuda.dlpack_in import DeviceArray, receive
from sparse_engine.backends.cuda.runner import CudaRunner
from sparse_engine.backends.cuda.runtime import Cuda, find_gpu
from sparse_engine.backends.device_noise import DRAWN, UPLOADED
from sparse_engine.backends.step_device import StepBuffers
from sparse_engine.errors import SparseEngineError
from sparse_engine.sampling.noise import SeededNoise

pytestmark = pytest.mark.gpu
SHAPE = (3, 7, 5)


class Copying(CudaDevice):
    """A ``StepDevice`` whose x_next is one of a step's inputs."""

    source = "z"

    def step(self, buffers: StepBuffers[Buffer]) -> None:
        for target in (buffers.x_next, buffers.m):
            self.copy(target, getattr(buffers, self.source))


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copying:
    try:
        gpu = find_gpu()
    except SparseEngineError as error:
        pytest.skip(error.what)
    monkeypatch.setenv(tactics.CACHE_VARIABLE, str(tmp_path))
    return Copying(Cuda(gpu.index), gpu.index)


def runner_of(device: CudaDevice) -> CudaRunner:
    return CudaRunner([device], (1, 4, 16), {"library": "none", "device": "a GPU"})


def run(runner: CudaRunner, steps: int, x: Any, noise: Any, sampler: str) -> np.ndarray:
    trajectory = sampling.make_trajectory(sampler, sampling.VPLinear(), steps)
    if trajectory.stochastic:
        trajectory = dataclasses.replace(trajectory, coef=np.ones_like(trajectory.coef))  # the last step draws, too
    found: np.ndarray = runner.run(trajectory, x, conditioning={}, guidance=np.ones(1, np.float32), noise=noise)
    return found


@pytest.mark.parametrize("winner", [DRAWN, UPLOADED, None])
def test_noise_in_recorded_steps(device: Copying, winner: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, and what is chosen by timing them; by the same recordings for other seeds, images and steps."""
    if winner is not None:
        choice = tactics.Choice(winner, {DRAWN: 1.0, UPLOADED: 1.0})
        monkeypatch.setattr(tactics.TacticCache, "choose", lambda self, key, candidates: choice)
    runner = runner_of(device)
    for seed, first, steps in ((0, 0, 24), (0, 0, 24), (2**63 + 5, 7, 24), (9, 2**32 - 9, 48)):
        noise = SeededNoise(seed, np.arange(first, first + 5), SHAPE)
        found = run(runner, steps, noise(0), noise, "euler-sde")
        assert np.abs(found - noise(steps)).max() <= 1e-5
    described = runner.describe()
    assert described["recordings"] > 0
    assert described["noise"].startswith(tuple(f"{name} (" for name in ([winner] if winner else [DRAWN, UPLOADED])))
    runner.close()


def test_a_torch_tensor_is_copied_on_the_gpu(device: Copying) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    device.source = "x"
    runner = runner_of(device)
    x = torch.randn(6, *SHAPE, device=f"cuda:{device.dlpack_device[1]}")
    for scale in (1.0, 2.0):
        scaled = x * scale  # still under way on torch's stream
        array = receive("noise", scaled, runner.dlpack_device)
        assert isinstance(array, DeviceArray)
        assert np.array_equal(run(runner, 6, array[1:], None, "ddim"), scaled.cpu().numpy()[1:])
        assert np.array_equal(receive("noise", scaled, None), scaled.cpu().numpy())  # type: ignore[arg-type]
    runner.close()
