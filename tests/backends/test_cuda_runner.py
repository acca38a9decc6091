"""Engines on a GPU out of host memory: buffers, staging, contexts, CUDA graphs, what is given back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sparse_engine import sampling, tactics
from sparse_engine.backends.cuda.device import Staging
from sparse_engine.backends.cuda.dlpack import CPU, SharedArray
from sparse_engine.backends.cuda.dlpack_in import receive
from sparse_engine.backends.cuda.runner import CudaRunner
from sparse_engine.backends.device_noise import DRAWN, UPLOADED
from sparse_engine.backends.step_device import OutOfDeviceMemoryError
from sparse_engine.backends.tensorrt.device import TensorRTDevice
from sparse_engine.errors import BackendError, EngineClosedError, UnsupportedError
from sparse_engine.sampling.noise import SeededNoise
from tests.backends.fake_cuda import FakeCuda, FakeEngine

SHAPE = (3, 4, 4)
GUIDANCE = np.array([1.5, -0.5], np.float32)
ONE = np.ones(1, np.float32)
LABELS = {"y": np.int64}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tactics.CACHE_VARIABLE, str(tmp_path / "cache"))


def step(x, t, coef, clip, base, h1, h2, z, y=None, guidance=None) -> tuple[np.ndarray, np.ndarray]:
    """A network that depends on every input, and the solver's lines."""
    shift = 0.0 if y is None else np.einsum("g,gb->b", guidance, y)[:, None, None, None]
    eps = 0.5 * np.tanh(x) + 0.01 * shift + 1e-3 * t[:, None, None, None]
    m = np.clip(coef[0] * x + coef[1] * eps, *clip)
    return coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z, m


def make_runner(cuda: FakeCuda, labels: bool = True, profile: tuple = (1, 4, 16)) -> CudaRunner:
    engine = FakeEngine(cuda, step, LABELS if labels else {}, smallest=profile[0])
    return CudaRunner([TensorRTDevice(cuda, engine, 0, "user managed")], profile, {"library": "fake"})


def trajectory(sampler: str = "euler-sde", steps: int = 30) -> sampling.Trajectory:
    return sampling.make_trajectory(sampler, sampling.schedule_from_dict({"name": "vp-linear"}), steps)


def draws(batch: int) -> dict:
    return {
        "x": sampling.normal(0, np.arange(batch), 0, SHAPE),
        "conditioning": {"y": np.stack([np.arange(batch) % 3, np.full(batch, 3)])},
        "guidance": GUIDANCE,
        "noise": lambda draw: sampling.normal(0, np.arange(batch), draw, SHAPE),
    }


def reference(table: sampling.Trajectory, x, conditioning, guidance, noise) -> np.ndarray:
    fixed = {**conditioning, "guidance": guidance} if conditioning else {}

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
    cuda, table, inputs = FakeCuda(), trajectory(), draws(4) | {"conditioning": {}, "guidance": ONE}
    runner = make_runner(cuda, labels=False)
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))


def test_network_alone() -> None:
    cuda, inputs = FakeCuda(), draws(3)
    runner = make_runner(cuda)
    t = np.array([0.1, 0.5, 0.9], np.float32)
    found = runner.network(inputs["x"], t, conditioning=inputs["conditioning"], guidance=GUIDANCE)
    shift = np.einsum("g,gb->b", GUIDANCE, inputs["conditioning"]["y"])[:, None, None, None]
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
    assert len(runner.network(inputs["x"], t, conditioning=inputs["conditioning"], guidance=GUIDANCE)) == batch


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


def choose(monkeypatch: pytest.MonkeyPatch, winner: str) -> list[str]:
    """Have every candidate timed, and one win; the list fills with what is timed."""
    timed: list[str] = []

    def fastest(candidates: dict[str, Callable[[], object]]) -> tactics.Choice:
        for name, run in candidates.items():
            run()
            timed.append(name)
        return tactics.Choice(winner, {name: 0.6 if name == winner else 6.0 for name in candidates})

    monkeypatch.setattr(tactics, "fastest", fastest)
    return timed


def seeded(batch: int, seed: int = 0, first: int = 0) -> dict:
    images = np.arange(first, first + batch)
    return draws(batch) | {"noise": SeededNoise(seed, images, SHAPE)}


@pytest.mark.parametrize("sampler", ["euler-sde", "ddpm"])
@pytest.mark.parametrize("profile", [(1, 4, 16), (4, 4, 4)])
def test_recorded_noise_is_of_the_seed_images_and_draws_of_each_run(
    sampler: str, profile: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seeds, other images and other numbers of steps through the recordings of the first."""
    choose(monkeypatch, DRAWN)
    cuda = FakeCuda()
    runner = make_runner(cuda, profile=profile)
    for seed, first, steps in ((0, 0, 30), (0, 0, 30), (2**63 + 5, 7, 30), (3, 2**32 - 9, 42)):
        table, inputs = trajectory(sampler, steps), seeded(5, seed, first)
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert cuda.launches > 0
    assert cuda.draws > 4 * 30
    assert cuda.pinned
    largest = max(len(block) for block in cuda.pinned.values())
    assert largest <= 1 << (5 * int(np.prod(SHAPE)) * 4 - 1).bit_length()  # no chunk of noise was ever staged
    assert runner.describe()["noise"] == "drawn on the device (drawn on the device 0.1 ms, uploaded 1 ms)"
    runner.close()
    assert cuda.leaks() == {}


def test_noise_steps_with_a_callback_are_of_their_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, DRAWN)
    runner, table, inputs = make_runner(FakeCuda()), trajectory("euler-sde", 14), seeded(3)
    for _ in range(2):
        assert close_to(runner.run(table, **inputs, callback=lambda step, time, x: None), reference(table, **inputs))


def test_noise_is_uploaded_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = choose(monkeypatch, UPLOADED)
    cuda, table, inputs = FakeCuda(), trajectory("euler-sde"), seeded(4)
    runner = make_runner(cuda)
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    drawn = cuda.draws
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert cuda.draws == drawn
    assert timed == [DRAWN, UPLOADED]
    assert runner.describe()["noise"].startswith("uploaded (")
    again = make_runner(FakeCuda())
    again.run(table, **inputs)
    assert timed == [DRAWN, UPLOADED]  # it is remembered
    again.run(table, **seeded(5))
    assert len(timed) == 4  # for each batch size


def test_noise_is_timed_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, table, inputs = make_runner(FakeCuda()), trajectory("euler-sde", 5), seeded(2)
    assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert " ms" in runner.describe()["noise"]


def test_without_nvrtc_noise_is_uploaded_and_it_is_said() -> None:
    cuda, table, inputs = FakeCuda(compiles=False), trajectory("euler-sde"), seeded(4)
    runner = make_runner(cuda)
    assert runner.describe()["noise"] == "none drawn yet"
    for _ in range(3):
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert runner.describe()["noise"] == "uploaded: NVRTC is not there: no libnvrtc.so"
    runner.close()
    assert cuda.leaks() == {}


def test_no_noise_is_readied_for_a_deterministic_sampler() -> None:
    cuda, table, inputs = FakeCuda(), trajectory("dpm-solver++"), seeded(4)
    runner = make_runner(cuda)
    runner.run(table, **inputs)
    assert not cuda.kernels


def within(seconds: float, work: Callable[[], object]) -> object:
    """Run on a thread, and fail rather than wait for it any longer."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return result[0]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_callback_may_use_the_engine(lanes: int) -> None:
    table, inputs, cudas = trajectory("euler-sde", 6), draws(3), [FakeCuda() for _ in range(lanes)]
    devices = [TensorRTDevice(cuda, FakeEngine(cuda, step, LABELS), 0, "user managed") for cuda in cudas]
    runner = CudaRunner(devices, (1, 4, 16), {})
    expected, other = reference(table, **inputs), trajectory("ddim", 4)
    inner: list[np.ndarray] = []

    def nested(index: int, time: float, x: np.ndarray) -> None:
        runner.network(x, np.ones(3, np.float32), conditioning=inputs["conditioning"], guidance=GUIDANCE)
        inner.append(runner.run(other, **inputs))

    for _ in range(2):
        assert close_to(within(20, lambda: runner.run(table, **inputs, callback=nested)), expected)  # type: ignore[arg-type]
    assert len(inner) == 12
    assert all(close_to(found, reference(other, **inputs)) for found in inner)
    assert runner._idle.qsize() == lanes
    runner.close()
    assert all(cuda.leaks() == {} for cuda in cudas)


def test_a_callback_may_close_the_engine() -> None:
    cuda = FakeCuda()
    runner = make_runner(cuda)

    def work() -> bool:
        with pytest.raises(EngineClosedError):
            runner.run(trajectory(), **draws(2), callback=lambda step, time, x: runner.close())
        return True

    assert within(20, work)
    assert cuda.leaks() == {}


def test_recording_can_be_switched_off_and_on_again() -> None:
    cuda, table, inputs = FakeCuda(), trajectory("dpm-solver++", 24), draws(2)
    runner = make_runner(cuda)
    runner.records = False
    for _ in range(3):
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert cuda.launches == 0
    assert runner.describe()["steps"] == "one by one: not asked for"
    runner.records = True
    for _ in range(3):
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert cuda.launches > 0


class Elsewhere:
    """An array of another library on this GPU: nothing but the protocol."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (2, 0)) -> None:
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> object:
        self.streams.append(stream)
        address, shape = self.array.ctypes.data, self.array.shape
        return SharedArray(address, shape, self.array.dtype.type, self.device, lambda: None).__dlpack__()


@pytest.mark.parametrize("profile", [(1, 4, 16), (4, 4, 4)])
def test_an_array_on_the_same_gpu_is_copied_there(profile: tuple) -> None:
    """Also in parts, and filled up: rows out of the middle, and one several times."""
    cuda, table, inputs = FakeCuda(), trajectory("dpm-solver++", 6), draws(7)
    runner = make_runner(cuda, profile=profile)
    owner = Elsewhere(inputs["x"])
    x = receive("noise", owner, runner.dlpack_device)
    staged: list[tuple[int, ...]] = []

    class Counting(Staging):
        def upload(self, target: int, array: np.ndarray) -> None:
            staged.append(array.shape)
            super().upload(target, array)

    runner._devices[0]._staging = Counting(cuda, runner._devices[0]._stream)  # type: ignore[arg-type]
    assert close_to(runner.run(table, **inputs | {"x": x}), reference(table, **inputs))
    rest = {**inputs, "x": inputs["x"][3:], "conditioning": {"y": inputs["conditioning"]["y"][:, 3:]}}
    assert close_to(runner.run(table, **rest | {"x": x[np.arange(3, 7)]}), reference(table, **rest))
    t = np.linspace(0, 1, 7, dtype=np.float32)
    found = runner.network(x, t, conditioning=inputs["conditioning"], guidance=GUIDANCE)
    of_arrays = [shape for shape in staged if shape[1:] == SHAPE]
    assert len(of_arrays) == len(runner._loops[0]._states)  # the zeros of each batch size, nothing else
    assert close_to(found, runner.network(inputs["x"], t, conditioning=inputs["conditioning"], guidance=GUIDANCE))
    stream = next(iter(cuda.streams))
    assert owner.streams == [1, *[stream] * (len(owner.streams) - 1)]


def test_several_lanes_serve_several_threads() -> None:
    table = trajectory("dpm-solver++", 10)
    cudas = [FakeCuda(), FakeCuda()]
    devices = [TensorRTDevice(cuda, FakeEngine(cuda, step, LABELS), 0, "user managed") for cuda in cudas]
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
    device = TensorRTDevice(cuda, FakeEngine(cuda, step, LABELS), 0, "user managed")
    buffer = device.allocate((2, 4), np.float32)
    with pytest.raises(BackendError, match=r"float64 \[2, 4\] does not fit a buffer of float32"):
        device.upload(buffer, np.zeros((2, 4)))
    with pytest.raises(BackendError, match="does not fit"):
        device.upload(buffer, np.zeros((3, 4), np.float32))
