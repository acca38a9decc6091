"""Engines on a GPU out of host memory: buffers, staging, contexts, CUDA graphs, what is given back."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sparse_engine import sampling
from sparse_engine.backends.cuda.device import Staging
from sparse_engine.backends.cuda.dlpack import CPU, SharedArray
from sparse_engine.backends.cuda.runner import CudaRunner
from sparse_engine.backends.device_loop import OutOfDeviceMemoryError
from sparse_engine.backends.tensorrt.device import TensorRTDevice
from sparse_engine.errors import BackendError, EngineClosedError, UnsupportedError
from tests.backends.fake_cuda import FakeCuda, FakeEngine

SHAPE = (3, 4, 4)
GUIDANCE = np.array([1.5, -0.5], np.float32)
ONE = np.ones(1, np.float32)


def step(x, t, coef, clip, base, h1, h2, z, y=None, guidance=None) -> tuple[np.ndarray, np.ndarray]:
    """A network that depends on every input, and the solver's lines."""
    shift = 0.0 if y is None else np.einsum("g,gb->b", guidance, y)[:, None, None, None]
    eps = 0.5 * np.tanh(x) + 0.01 * shift + 1e-3 * t[:, None, None, None]
    m = np.clip(coef[0] * x + coef[1] * eps, *clip)
    return coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z, m


def make_runner(cuda: FakeCuda, labels: bool = True, profile: tuple = (1, 4, 16)) -> CudaRunner:
    engine = FakeEngine(cuda, step, labels, smallest=profile[0])
    return CudaRunner([TensorRTDevice(cuda, engine, 0, "user managed")], profile, {"library": "fake"})


def trajectory(sampler: str = "euler-sde", steps: int = 30) -> sampling.Trajectory:
    return sampling.make_trajectory(sampler, sampling.schedule_from_dict({"name": "vp-linear"}), steps)


def draws(batch: int) -> dict:
    return {
        "x": sampling.normal(0, np.arange(batch), 0, SHAPE),
        "labels": np.stack([np.arange(batch) % 3, np.full(batch, 3)]),
        "guidance": GUIDANCE,
        "noise": lambda draw: sampling.normal(0, np.arange(batch), draw, SHAPE),
    }


def reference(table: sampling.Trajectory, x, labels, guidance, noise) -> np.ndarray:
    fixed = {} if labels is None else {"y": labels, "guidance": guidance}

    def host(x, t, coef, clip, base, h1, h2, z):
        return step(x, t, coef, clip, base, h1, h2, z, **fixed)

    return sampling.walk(table, host, x, noise=noise)


def close_to(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("sampler", ["euler-sde", "dpm-solver++", "dpm-solver", "ddpm"])
@pytest.mark.parametrize("batch", [1, 5])
def test_runs_as_the_loop_on_the_host_does(sampler: str, batch: int) -> None:
    cuda, table, inputs = FakeCuda(), trajectory(sampler), draws(batch)
    runner = make_runner(cuda)
    expected = reference(table, **inputs)
    for _ in range(3):
        assert close_to(runner.run(table, **inputs), expected)
    assert cuda.launches > 0
    assert runner.describe()["steps"].startswith("recorded")
    runner.close()
    assert cuda.leaks() == {}


def test_unconditional() -> None:
    cuda, table, inputs = FakeCuda(), trajectory(), draws(4) | {"labels": None, "guidance": ONE}
    runner = make_runner(cuda, labels=False)
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))


def test_network_alone() -> None:
    cuda, inputs = FakeCuda(), draws(3)
    runner = make_runner(cuda)
    t = np.array([0.1, 0.5, 0.9], np.float32)
    found = runner.network(inputs["x"], t, labels=inputs["labels"], guidance=GUIDANCE)
    shift = np.einsum("g,gb->b", GUIDANCE, inputs["labels"])[:, None, None, None]
    assert close_to(found, 0.5 * np.tanh(inputs["x"]) + 0.01 * shift + 1e-3 * t[:, None, None, None])


@pytest.mark.parametrize("profile", [(4, 4, 4), (2, 3, 4)])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_batches_outside_the_profile_are_filled_up_or_run_in_parts(profile: tuple, batch: int) -> None:
    cuda, table, inputs = FakeCuda(), trajectory("euler-sde", 5), draws(batch)
    seen: list[tuple[int, int]] = []
    runner = make_runner(cuda, profile=profile)
    found = runner.run(table, **inputs, callback=lambda step, time, x: seen.append((step, len(x))))
    assert close_to(found, reference(table, **inputs))
    assert sum(count for step, count in seen if step == 4) == batch
    t = np.linspace(0, 1, batch, dtype=np.float32)
    assert len(runner.network(inputs["x"], t, labels=inputs["labels"], guidance=GUIDANCE)) == batch


def test_a_batch_too_large_for_memory_is_split() -> None:
    table, inputs = trajectory("dpm-solver++", 8), draws(16)
    cuda = FakeCuda(memory=16 * 1024)
    runner = make_runner(cuda)
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert runner.describe()["largest_batch"] < 16
    runner.close()
    assert cuda.leaks() == {}


@pytest.mark.parametrize("smallest", [4, 7, 16])
def test_a_batch_is_not_split_below_the_profile(smallest: int) -> None:
    table, inputs = trajectory("dpm-solver++", 8), draws(16)
    cuda = FakeCuda(memory=16 * 1024)
    runner = make_runner(cuda, profile=(smallest, 16, 16))
    if smallest == 16:
        with pytest.raises(OutOfDeviceMemoryError, match="out of memory"):
            runner.run(table, **inputs)
    else:
        for _ in range(2):
            assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    runner.close()
    assert cuda.leaks() == {}


def test_no_memory_for_one_sample_is_said_and_nothing_leaks() -> None:
    cuda = FakeCuda(memory=700)
    runner = make_runner(cuda)
    with pytest.raises(OutOfDeviceMemoryError, match="out of memory"):
        runner.run(trajectory(), **draws(2))
    runner.close()
    assert cuda.leaks() == {}


def test_steps_that_cannot_be_recorded_run_one_by_one_and_it_is_said() -> None:
    cuda, table, inputs = FakeCuda(captures=False), trajectory(), draws(2)
    runner = make_runner(cuda)
    for _ in range(2):
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert runner.describe()["steps"] == "one by one: this driver cannot record"


def test_each_shape_has_a_context_of_its_own_and_recordings_keep_theirs() -> None:
    cuda, table = FakeCuda(), trajectory("dpm-solver++", 24)
    runner = make_runner(cuda)
    for _ in range(3):
        for batch in (1, 2, 3, 4, 5, 6):
            inputs = draws(batch)
            assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    runner.close()
    assert cuda.leaks() == {}


def test_several_lanes_serve_several_threads() -> None:
    table = trajectory("dpm-solver++", 10)
    cudas = [FakeCuda(), FakeCuda()]
    devices = [TensorRTDevice(cuda, FakeEngine(cuda, step, True), 0, "user managed") for cuda in cudas]
    runner = CudaRunner(devices, (1, 4, 16), {})
    together = threading.Barrier(2, timeout=20)

    def call(batch: int) -> np.ndarray:
        return runner.run(table, **draws(batch), callback=lambda step, time, x: together.wait() if step == 0 else None)

    with ThreadPoolExecutor(2) as pool:
        for batch, found in zip((2, 3), pool.map(call, (2, 3)), strict=True):
            assert close_to(found, reference(table, **draws(batch)))
    assert runner.describe()["lanes"] == 2


def test_closed_runner_says_so() -> None:
    runner = make_runner(FakeCuda())
    runner.close()
    runner.close()
    with pytest.raises(EngineClosedError):
        runner.run(trajectory(), **draws(1))


def test_result_stays_on_the_device() -> None:
    cuda, table, inputs = FakeCuda(), trajectory("dpm-solver++", 6), draws(4)
    runner = make_runner(cuda)
    shared = runner.run(table, **inputs, on_device=True)
    assert shared.__dlpack_device__() == (2, 0)
    assert shared.shape == (4, *SHAPE)
    with pytest.raises(UnsupportedError, match="a batch of 20 cannot stay on the device"):
        runner.run(table, **draws(20), on_device=True)
    runner.close()
    assert cuda.leaks() == {"device": 1}
    del shared
    gc.collect()
    assert cuda.leaks() == {}


def test_dlpack_shares_memory_and_gives_it_back_once() -> None:
    memory, released = np.arange(6, dtype=np.float32), []
    shared = SharedArray(memory.ctypes.data, (2, 3), np.float32, (CPU, 0), lambda: released.append(True))
    taken = np.from_dlpack(shared)
    assert taken.tolist() == [[0, 1, 2], [3, 4, 5]]
    memory[0] = 9
    assert taken[0, 0] == 9
    shared.__dlpack__()  # a capsule that nobody takes
    del shared
    gc.collect()
    assert not released
    del taken
    gc.collect()
    assert released == [True]


def test_staging_waits_rather_than_grow_and_never_overwrites_what_is_not_copied() -> None:
    cuda = FakeCuda()
    stream = cuda.create_stream()
    staging = Staging(cuda, stream, limit=4096)
    targets = [cuda.allocate(1024) for _ in range(12)]
    array = np.zeros(256, np.float32)
    for index, target in enumerate(targets):
        array[:] = index
        staging.upload(target, array)
    assert cuda.waits == 8
    assert sum(len(block) for block in cuda.pinned.values()) == 4096
    cuda.synchronize(stream)
    assert [cuda.device[target].view(np.float32)[0] for target in targets] == list(range(12))
    staging.close()
    assert not cuda.pinned
    assert not cuda.events


def test_an_upload_that_does_not_fit_is_refused() -> None:
    cuda = FakeCuda()
    device = TensorRTDevice(cuda, FakeEngine(cuda, step, True), 0, "user managed")
    buffer = device.allocate((2, 4), np.float32)
    with pytest.raises(BackendError, match=r"float64 \[2, 4\] does not fit a buffer of float32"):
        device.upload(buffer, np.zeros((2, 4)))
    with pytest.raises(BackendError, match="does not fit"):
        device.upload(buffer, np.zeros((3, 4), np.float32))
