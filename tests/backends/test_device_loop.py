"""The trajectory loop for devices, on a NumPy device whose recordings are lists of closures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from sparse_engine import sampling
from sparse_engine.backends import device_loop, device_state
from sparse_engine.backends.cuda.dlpack_in import DeviceArray
from sparse_engine.backends.device_loop import DeviceLoop
from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError, StepBuffers
from sparse_engine.errors import BackendError, EngineClosedError, SamplingCancelled

SHAPE = (3, 4, 4)
GUIDANCE = np.array([1.5, -0.5], np.float32)
LABELS = np.stack([np.arange(8) % 3, np.full(8, 3)])
CONTEXT = sampling.normal(5, np.arange(16), 0, (2, 3)).reshape(2, 8, 2, 3)
TOLD = {"y": LABELS, "context": CONTEXT}
TRAJECTORIES = {
    "deterministic": ("dpm-solver++", 25),
    "stochastic": ("euler-sde", 13),
    "rebases at irregular places": ("dpm-solver", 20),
    "both histories": ("dpm-solver++", 7),
    "one step": ("ddim", 1),
}


def network(x: np.ndarray, t: np.ndarray, told: Mapping[str, np.ndarray], guidance: np.ndarray) -> np.ndarray:
    """A contraction that depends on every input."""
    shift: Any = 0.0
    if told:
        rows = told["y"] + told["context"].mean((2, 3)) + told["context"][..., 0, 0]
        shift = np.einsum("g,gb->b", guidance, rows)[:, None, None, None]
    return (0.5 * np.tanh(x) + 0.01 * shift + 1e-3 * t[:, None, None, None]).astype(np.float32)


def step(x, t, told, guidance, coef, clip, base, h1, h2, z) -> tuple[np.ndarray, np.ndarray]:
    m = np.clip(coef[0] * x + coef[1] * network(x, t, told, guidance), *clip)
    return coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z, m


class Recorded:
    def __init__(self, device: NumpyDevice, work: list[Callable[[], None]]) -> None:
        self.device, self.work = device, work
        device.recordings.add(self)

    def launch(self) -> None:
        assert self in self.device.recordings, "launched after its release"
        for operation in self.work:
            operation()

    def release(self) -> None:
        self.device.recordings.remove(self)


class NumpyDevice:
    """Buffers are arrays; ``step`` and ``copy`` run at once, or join the recording that is being made."""

    def __init__(self, memory: int = 1 << 30, records: bool = True) -> None:
        self.memory, self.records = memory, records
        self.live: dict[int, np.ndarray] = {}
        self.recordings: set[Recorded] = set()
        self.recording: list[Callable[[], None]] | None = None
        self.steps = 0  # enqueued one by one
        self.fail: Exception | None = None
        self.waiting, self.most_waiting = 0, 0  # bytes uploaded since the device was last waited for

    def allocate(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        buffer = np.full(shape, 7, dtype) if dtype == np.int64 else np.full(shape, np.nan, dtype)
        if sum(each.nbytes for each in self.live.values()) + buffer.nbytes > self.memory:
            raise OutOfDeviceMemoryError(f"no memory for {buffer.nbytes} bytes")
        self.live[id(buffer)] = buffer
        return buffer

    def free(self, buffer: np.ndarray) -> None:
        del self.live[id(buffer)]

    def row(self, buffer: np.ndarray, index: int) -> np.ndarray:
        return buffer[index]

    def upload(self, buffer: np.ndarray, array: np.ndarray) -> None:
        assert self.recording is None, "an upload cannot be recorded"
        assert buffer.dtype == array.dtype
        buffer[: len(array)] = array
        self.waiting += array.nbytes
        self.most_waiting = max(self.waiting, self.most_waiting)

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        self._enqueue(lambda: np.copyto(target, source))

    def download(self, buffer: np.ndarray) -> np.ndarray:
        return buffer.copy()

    def share(self, buffer: np.ndarray) -> np.ndarray:
        return buffer.copy()

    def step(self, buffers: StepBuffers[np.ndarray]) -> None:
        if self.fail is not None:
            raise self.fail
        written = (buffers.x_next, buffers.m)
        read = [value for key, value in vars(buffers).items() if key not in ("x_next", "m", "conditioning")]
        read += buffers.conditioning.values()
        assert not any(np.shares_memory(a, b) for a in written for b in read)

        def run() -> None:
            assert all(np.isfinite(each).all() for each in (buffers.x, buffers.base, buffers.h1, buffers.h2, buffers.z))
            arguments = (getattr(buffers, name) for name in ("coef", "clip", "base", "h1", "h2", "z"))
            x_next, m = step(buffers.x, buffers.t, buffers.conditioning, buffers.guidance, *arguments)
            buffers.x_next[:], buffers.m[:] = x_next, m

        self.steps += self.recording is None
        self._enqueue(run)

    def _enqueue(self, operation: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(operation)
        else:
            operation()

    def capture(self, work: Callable[[], None]) -> Recorded:
        if not self.records:
            raise CaptureError("this device records nothing")
        self.recording = []
        try:
            work()
            return Recorded(self, self.recording)
        finally:
            self.recording = None

    def synchronize(self) -> None:
        self.waiting = 0


def make_trajectory(sampler: str, steps: int) -> sampling.Trajectory:
    return sampling.make_trajectory(sampler, sampling.VPLinear(), steps)


def noise(draw: int) -> np.ndarray:
    return sampling.normal(5, np.arange(8), draw, SHAPE)


def told_to(batch: int) -> dict[str, np.ndarray]:
    return {name: rows[:, :batch] for name, rows in TOLD.items()}


def expected(trajectory: sampling.Trajectory, batch: int = 8, conditional: bool = True) -> np.ndarray:
    def on_host(x, t, coef, clip, base, h1, h2, z):
        return step(x, t, told_to(batch) if conditional else {}, GUIDANCE, coef, clip, base, h1, h2, z)

    return sampling.walk(trajectory, on_host, noise(0)[:batch], noise=lambda draw: noise(draw)[:batch])


def run(loop: DeviceLoop[np.ndarray], trajectory: sampling.Trajectory, **options: Any) -> np.ndarray:
    found = loop.run(trajectory, noise(0), conditioning=TOLD, guidance=GUIDANCE, noise=noise, **options)
    assert isinstance(found, np.ndarray)
    return found


@pytest.mark.parametrize("sampler,steps", TRAJECTORIES.values(), ids=list(TRAJECTORIES))
@pytest.mark.parametrize("chunk", [6, 12])
def test_recorded_and_not_recorded_are_what_the_host_loop_gives(sampler: str, steps: int, chunk: int) -> None:
    trajectory = make_trajectory(sampler, steps)
    wanted = expected(trajectory)
    device = NumpyDevice()
    loop = DeviceLoop(device, chunk)
    for _ in range(4):
        assert np.array_equal(run(loop, trajectory), wanted)
    enqueued = device.steps
    assert np.array_equal(run(loop, trajectory), wanted)
    assert device.steps == enqueued  # by now every chunk is launched
    assert loop.describe()["recordings"] == len(device.recordings)
    loop.close()
    assert not device.live
    assert not device.recordings


def test_equal_chunks_share_a_recording_across_trajectories() -> None:
    device = NumpyDevice()
    loop = DeviceLoop(device, chunk=6)
    run(loop, make_trajectory("dpm-solver++", 24))
    assert len(device.recordings) == 1  # seen first, recorded second, launched third and fourth
    assert device.steps == 6
    other = make_trajectory("ddim", 12)
    assert np.array_equal(run(loop, other), expected(other))
    assert device.steps == 6


def test_a_callback_sees_every_step_and_its_state() -> None:
    trajectory = make_trajectory("dpm-solver", 20)
    loop = DeviceLoop(NumpyDevice())
    states: list[np.ndarray] = []
    on_host: list[np.ndarray] = []

    def step_on_host(x, t, coef, clip, base, h1, h2, z):
        return step(x, t, TOLD, GUIDANCE, coef, clip, base, h1, h2, z)

    sampling.walk(trajectory, step_on_host, noise(0), noise=noise, callback=lambda i, t, x: on_host.append(x))
    for _ in range(3):  # the third run launches all six phases
        states.clear()
        seen = []

        def note(i: int, t: float, x: np.ndarray) -> None:
            seen.append((i, t))  # noqa: B023 - called before the next run
            states.append(x)

        assert np.array_equal(run(loop, trajectory, callback=note), on_host[-1])
        assert seen == list(enumerate(trajectory.times.tolist()))
        assert all(np.array_equal(a, b) for a, b in zip(states, on_host, strict=True))


def test_a_callback_that_may_be_called_seldom_leaves_chunks_whole() -> None:
    trajectory = make_trajectory("ddim", 30)
    loop = DeviceLoop(NumpyDevice())
    for _ in range(3):
        seen: list[int] = []
        found = run(loop, trajectory, callback=lambda i, t, x: seen.append(i), callback_every=12)  # noqa: B023
        assert np.array_equal(found, expected(trajectory))
        assert seen == [11, 23, 29]
    assert loop.describe()["recordings"] == 2  # of twelve steps and of six, as without a callback
    with pytest.raises(SamplingCancelled, match="after step 24 of 30"):
        run(loop, trajectory, callback=lambda i, t, x: i < 20, callback_every=12)


def test_a_callback_can_stop_and_the_state_is_good_for_the_next_run() -> None:
    trajectory = make_trajectory("dpm-solver++", 13)
    loop = DeviceLoop(NumpyDevice())
    with pytest.raises(SamplingCancelled, match="after step 3 of 13"):
        run(loop, trajectory, callback=lambda i, t, x: i < 2)
    assert np.array_equal(run(loop, trajectory), expected(trajectory))


def test_a_callback_may_use_the_engine() -> None:
    trajectory = make_trajectory("euler-sde", 8)
    device = NumpyDevice()
    loop = DeviceLoop(device)

    def nested(i: int, t: float, x: np.ndarray) -> None:
        assert np.array_equal(run(loop, trajectory), expected(trajectory))

    assert np.array_equal(run(loop, trajectory, callback=nested), expected(trajectory))
    loop.close()
    assert not device.live


def test_infinities_of_a_diverged_run_do_not_reach_the_next() -> None:
    trajectory = make_trajectory("dpm-solver++", 7)
    loop = DeviceLoop(NumpyDevice())
    for buffer in _state(loop).buffers():
        if buffer.dtype == np.float32 and buffer is not _state(loop).zeros:
            buffer[...] = np.inf
    assert np.array_equal(run(loop, trajectory), expected(trajectory))


def _state(loop: DeviceLoop[np.ndarray]) -> device_state.State[np.ndarray]:
    if not loop._states:
        run(loop, make_trajectory("ddim", 1))
    return next(iter(loop._states.values()))


@pytest.mark.parametrize("largest", [1, 3, 4])
def test_a_batch_too_large_is_halved_with_the_same_result(largest: int) -> None:
    trajectory = make_trajectory("euler-sde", 13)
    probe = NumpyDevice()
    run(DeviceLoop(probe), trajectory)
    image = sum(buffer.nbytes for buffer in probe.live.values()) / 8
    device = NumpyDevice(memory=int(image * (largest + 0.5)))
    loop = DeviceLoop(device)
    batches: list[int] = []
    found = run(loop, trajectory, callback=lambda i, t, x: batches.append(len(x)))
    assert np.array_equal(found, expected(trajectory))
    assert max(batches) <= largest
    assert loop.describe()["largest_batch"] <= largest
    assert np.array_equal(run(loop, trajectory), found)


def test_memory_of_other_batch_sizes_is_given_back_before_a_batch_is_split() -> None:
    trajectory = make_trajectory("ddim", 3)
    probe = NumpyDevice()
    run(DeviceLoop(probe), trajectory)
    loop = DeviceLoop(NumpyDevice(memory=int(1.2 * sum(buffer.nbytes for buffer in probe.live.values()))))
    loop.run(trajectory, noise(0)[:4], conditioning=told_to(4), guidance=GUIDANCE, noise=noise)
    run(loop, trajectory)
    assert loop.describe()["largest_batch"] is None


def test_one_sample_too_large_is_an_error() -> None:
    device = NumpyDevice(memory=1000)
    with pytest.raises(OutOfDeviceMemoryError, match="no memory"):
        run(DeviceLoop(device), make_trajectory("ddim", 3))
    assert not device.live


def test_without_recording_the_steps_are_enqueued_and_it_is_said() -> None:
    device = NumpyDevice(records=False)
    loop = DeviceLoop(device)
    trajectory = make_trajectory("dpm-solver++", 25)
    for _ in range(3):
        assert np.array_equal(run(loop, trajectory), expected(trajectory))
    assert device.steps == 75
    assert loop.describe()["steps"] == "one by one: this device records nothing"


def test_recording_can_be_switched_off_and_on_again() -> None:
    device = NumpyDevice()
    loop = DeviceLoop(device)
    trajectory = make_trajectory("dpm-solver++", 25)
    loop.records = False
    for _ in range(3):
        assert np.array_equal(run(loop, trajectory), expected(trajectory))
    assert device.steps == 75
    assert loop.describe()["steps"] == "one by one: not asked for"
    loop.records = True
    for _ in range(3):
        assert np.array_equal(run(loop, trajectory), expected(trajectory))
    assert device.recordings


def test_a_device_that_takes_no_arrays_of_others_says_so() -> None:
    loop = DeviceLoop(NumpyDevice())
    assert loop.dlpack_device is None
    x: Any = DeviceArray(object(), (2, 0), np.arange(8), SHAPE)
    with pytest.raises(BackendError, match="x lies on a device that this one takes no arrays from"):
        loop.network(x, np.ones(8, np.float32), conditioning=TOLD, guidance=GUIDANCE)
    assert loop.describe()["noise"] == "uploaded"


def test_a_failing_device_gives_everything_back() -> None:
    device = NumpyDevice()
    loop = DeviceLoop(device)
    run(loop, make_trajectory("ddim", 3))
    device.fail = BackendError("the device fell over")
    with pytest.raises(BackendError, match="fell over"):
        run(loop, make_trajectory("ddim", 3))
    assert not device.live
    device.fail = None
    trajectory = make_trajectory("ddim", 3)
    assert np.array_equal(run(loop, trajectory), expected(trajectory))


def test_states_and_recordings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loop, "MAX_STATES", 2)
    monkeypatch.setattr(device_loop, "MAX_RECORDINGS", 2)
    device = NumpyDevice()
    loop = DeviceLoop(device, chunk=6)
    for batch in range(1, 9):
        for steps in (1, 2, 3, 4):
            trajectory = make_trajectory("ddim", steps)
            for _ in range(2):
                options = {"conditioning": told_to(batch), "guidance": GUIDANCE}
                found = loop.run(trajectory, noise(0)[:batch], noise=noise, **options)
                assert np.array_equal(found, expected(trajectory, batch))
    assert len(device.recordings) <= 4
    assert len(loop._states) == 2


def test_the_host_is_only_so_many_chunks_of_noise_ahead() -> None:
    device = NumpyDevice()
    loop = DeviceLoop(device, chunk=6)
    run(loop, make_trajectory("euler-sde", 200))
    chunk_of_noise = 6 * noise(0).nbytes
    assert device_loop.IN_FLIGHT * chunk_of_noise < device.most_waiting < (device_loop.IN_FLIGHT + 1) * chunk_of_noise


def test_large_noise_shortens_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "NOISE_BYTES", 7 * 8 * 4 * 48)
    device = NumpyDevice()
    loop = DeviceLoop(device)
    trajectory = make_trajectory("euler-sde", 13)
    assert np.array_equal(run(loop, trajectory), expected(trajectory))
    assert max(len(buffer) for buffer in device.live.values() if buffer.ndim == 5) == 6


def test_an_unconditional_model() -> None:
    loop = DeviceLoop(NumpyDevice())
    trajectory = make_trajectory("dpm-solver++", 5)
    found = loop.run(trajectory, noise(0), conditioning={}, guidance=GUIDANCE, noise=noise)
    assert np.array_equal(found, expected(trajectory, conditional=False))


def test_the_network_alone() -> None:
    loop = DeviceLoop(NumpyDevice())
    t = np.linspace(0, 999, 8, dtype=np.float32)
    for _ in range(3):
        predicted = loop.network(noise(0), t, conditioning=TOLD, guidance=GUIDANCE)
        assert np.array_equal(predicted, network(noise(0), t, TOLD, GUIDANCE))


def test_on_device_hands_out_memory_of_its_own() -> None:
    loop = DeviceLoop(NumpyDevice())
    trajectory = make_trajectory("ddim", 5)
    shared = run(loop, trajectory, on_device=True)
    run(loop, make_trajectory("euler-sde", 7))
    assert np.array_equal(np.from_dlpack(shared), expected(trajectory))


def test_several_threads_get_what_one_gets() -> None:
    loop = DeviceLoop(NumpyDevice())
    trajectories = [make_trajectory(sampler, steps) for sampler, steps in TRAJECTORIES.values()]
    found: list[bool] = []

    def work(trajectory: sampling.Trajectory) -> None:
        found.extend(np.array_equal(run(loop, trajectory), expected(trajectory)) for _ in range(3))

    threads = [threading.Thread(target=work, args=(each,)) for each in trajectories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 15


def test_close_stops_a_run_at_its_next_chunk() -> None:
    device = NumpyDevice()
    loop = DeviceLoop(device)
    with pytest.raises(EngineClosedError, match="closed"):
        run(loop, make_trajectory("ddim", 20), callback=lambda i, t, x: loop.close())
    assert not device.live
    with pytest.raises(EngineClosedError):
        run(loop, make_trajectory("ddim", 1))
