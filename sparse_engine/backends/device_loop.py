"""The trajectory loop of backends that keep the state on their device: chunks of steps, recorded once and replayed.

A chunk is a few consecutive rows of a trajectory. Its times, coefficients and noise are uploaded together, and its
steps are enqueued on the device's stream. A chunk that comes for the second time is recorded (a CUDA graph) and from
then on launched in one call, for every trajectory with the same pattern.

Chunks are a multiple of ``PERIOD`` long, and start at phase 0: their recordings' addresses (``device_state``) are then
good for all of them. Noise that the device draws is part of the recording: which seed, images and draws it is of is
read from buffers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal

import numpy as np

from sparse_engine import arguments
from sparse_engine.ending import stop_if_ending
from sparse_engine.errors import BackendError, EngineClosedError, SamplingCancelled
from sparse_engine.sampling import Trajectory
from sparse_engine.sampling.noise import SeededNoise

from .base import IDENTITY_ROW, NO_CLIP, NoiseSource, StepCallback
from .device_state import PERIOD, State, allocate, allocate_drawn, step_buffers
from .step_device import B, CaptureError, OutOfDeviceMemoryError, Recording, StepDevice, TakingDevice

if TYPE_CHECKING:
    from .cuda.dlpack_in import DeviceArray
    from .device_noise import DeviceNoise

CHUNK = 12  # steps: the host's part of a chunk (0.1 ms) disappears behind them
IN_FLIGHT = 4  # chunks of noise that the host may be ahead of the device: it waits in page-locked memory
MAX_STATES, MAX_RECORDINGS = 4, 16  # batch sizes with buffers of their own; recordings of each


def part_of(conditioning: Mapping[str, np.ndarray], rows: slice | np.ndarray) -> dict[str, np.ndarray]:
    """What a network is told for some rows of a batch."""
    return {name: array[:, rows] for name, array in conditioning.items()}


def noise_of(noise: NoiseSource, rows: slice | np.ndarray) -> NoiseSource:
    """The noise of some rows of a batch."""
    return noise.of(rows) if isinstance(noise, SeededNoise) else lambda draw: noise(draw)[rows]


@dataclass(frozen=True)
class _Chunk:
    """Rows [first, last) of a trajectory."""

    first: int
    last: int
    rebase: tuple[bool, ...]
    noise: Literal["none", "uploaded", "drawn"]

    @property
    def phase(self) -> int:
        return self.first % PERIOD

    @property
    def pattern(self) -> Hashable:
        """What a recording depends on."""
        return self.phase, self.rebase, self.noise


class DeviceLoop(Generic[B]):
    """A ``StepRunner`` on a device. Safe to call from several threads: one trajectory runs at a time.

    Args:
        device: buffers, the step, and recordings.
        chunk: steps that are enqueued together, a multiple of ``PERIOD``.
        smallest: batch that the device takes; none is halved below it.
        noise: draws noise on the device; None uploads it.

    Attributes:
        records: whether chunks are recorded and replayed; where not, steps are enqueued one by one.
    """

    def __init__(
        self, device: StepDevice[B], chunk: int = CHUNK, smallest: int = 1, noise: DeviceNoise[B] | None = None
    ) -> None:
        self.records = True
        self._device = device
        self._noise = noise
        self._chunk = chunk
        self._smallest = smallest
        self._lock = threading.RLock()  # a callback may use the engine
        self._closed = False
        self._states: dict[tuple[int, int], State[B]] = {}  # none that is in use
        self._recorded = 0
        self._largest: int | None = None  # batch that is known not to exhaust the device's memory
        self._eager: str | None = None  # why nothing is recorded

    @property
    def dlpack_device(self) -> tuple[int, int] | None:
        """The device whose arrays ``run`` and ``network`` take as x, as ``DeviceArray``; None: only the host's."""
        return self._device.dlpack_device if isinstance(self._device, TakingDevice) else None

    def run(
        self,
        trajectory: Trajectory,
        x: np.ndarray | DeviceArray,
        *,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
        noise: NoiseSource,
        callback: StepCallback | None = None,
        callback_every: int = 1,
        on_device: bool = False,
    ) -> Any:
        """See ``StepRunner.run``.

        With a callback that is called after every step they run one at a time; the state is downloaded for each call. A
        chunk ends where the callback is called, so it may be called more often than was asked. A batch that the device
        has no memory for is split in halves; each part then counts as a batch for the callback. With ``on_device`` the
        result is an object with ``__dlpack__``, and a batch is never split.
        """

        def walk(part: slice) -> Any:
            own = noise_of(noise, part)
            with self._prepared(x[part], part_of(conditioning, part), guidance) as state:
                for chunk in self._chunks(trajectory, state, own, None if callback is None else callback_every):
                    self._advance(state, trajectory, chunk, own)
                    if callback is not None:
                        self._tell(callback, trajectory, chunk, state)
                last = state.x[len(trajectory) % 2]
                return self._device.share(last) if on_device else self._device.download(last)

        with self._lock:
            if on_device:
                return walk(slice(0, len(x)))
            return np.concatenate(self._in_parts(len(x), walk))

    def network(
        self,
        x: np.ndarray | DeviceArray,
        t: np.ndarray,
        *,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
    ) -> np.ndarray:
        """See ``StepRunner.network``."""
        device = self._device

        def evaluate(part: slice) -> np.ndarray:
            with self._prepared(x[part], part_of(conditioning, part), guidance) as state:
                device.upload(state.clip, NO_CLIP)
                device.upload(state.t, np.ascontiguousarray(t[part])[None])
                device.upload(state.coef, IDENTITY_ROW[None])
                self._enqueue(state, _Chunk(0, 1, (False,), "none"))
                return device.download(state.m[0])

        with self._lock:
            return np.concatenate(self._in_parts(len(x), evaluate))

    def describe(self) -> dict[str, Any]:
        """How steps are enqueued, the largest batch where memory has set a limit, and what holds of an image's bits.

        The libraries choose a GPU's kernels by the batch too: an image is the same in any to rounding, not to the bit.
        """
        eager = self._eager or (None if self.records else "not asked for")
        how = f"one by one: {eager}" if eager else f"recorded, {self._chunk} at a time"
        noise = "uploaded" if self._noise is None else self._noise.describe()
        facts = {"steps": how, "recordings": self._recorded, "noise": noise, "largest_batch": self._largest}
        return {**facts, "batch_invariant": False}

    def close(self) -> None:
        """Stop what runs at its next chunk, and give everything back. A second call does nothing."""
        self._closed = True
        with self._lock:
            self._forget()

    def _in_parts(self, size: int, work: Callable[[slice], Any]) -> list[Any]:
        """Do ``work`` on a batch, or on halves of it where the device's memory does not hold it."""
        pending, done = [slice(0, size)], []
        while pending:
            part = pending.pop(0)
            count = part.stop - part.start
            divisible = count >= 2 * self._smallest
            if self._largest is None or count <= self._largest or not divisible:
                try:
                    done.append(work(part))
                    continue
                except OutOfDeviceMemoryError:
                    if self._states:  # of other batch sizes: their memory may be enough
                        self._forget()
                        pending.insert(0, part)
                        continue
                    if not divisible:
                        raise
                    self._largest = count // 2
            middle = part.start + (count + 1) // 2
            pending[:0] = [slice(part.start, middle), slice(middle, part.stop)]
        return done

    @contextlib.contextmanager
    def _prepared(
        self, x: np.ndarray | DeviceArray, conditioning: Mapping[str, np.ndarray], guidance: np.ndarray
    ) -> Iterator[State[B]]:
        """The state of a batch for one run, with x and what stays the same over a trajectory in place."""
        self._check_open()
        key = (len(x), len(guidance))
        state = self._states.pop(key, None) or allocate(self._device, x.shape, len(guidance), conditioning, self._chunk)
        try:
            self._fill(state, x, conditioning, guidance)
            yield state
        except BackendError:
            self._release(state)  # half-written
            raise
        except BaseException:
            self._keep(key, state)
            raise
        self._keep(key, state)

    def _keep(self, key: tuple[int, int], state: State[B]) -> None:
        """Keep a state for the next run of its batch size, the last used being the last to go."""
        present = self._states.pop(key, None)  # a callback's own
        if present is not None:
            self._release(present)
        self._states[key] = state
        while len(self._states) > (0 if self._closed else MAX_STATES):
            self._release(self._states.pop(next(iter(self._states))))

    def _fill(
        self,
        state: State[B],
        x: np.ndarray | DeviceArray,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
    ) -> None:
        device = self._device
        if isinstance(x, np.ndarray):
            device.upload(state.x[0], np.ascontiguousarray(x, np.float32))
        elif isinstance(device, TakingDevice):
            device.take(state.x[0], x)
        else:
            raise BackendError("x lies on a device that this one takes no arrays from", "pass a NumPy array")
        device.copy(state.base, state.x[0])
        for history in state.m[1:]:  # h2 and h1 of the first step: a diverged run may have left infinities there
            device.copy(history, state.zeros)
        device.upload(state.guidance, guidance)
        for name, rows in conditioning.items():
            device.upload(state.conditioning[name], np.ascontiguousarray(rows))

    def _chunks(self, trajectory: Trajectory, state: State[B], noise: NoiseSource, longest: int | None) -> list[_Chunk]:
        """The chunks of a trajectory; also puts its clipping range in place, and where its noise comes from."""
        self._device.upload(state.clip, np.array(trajectory.clip, np.float32))
        kind = self._ready_noise(state, noise) if trajectory.stochastic else "none"
        length = state.chunk if longest is None else min(longest, state.chunk)
        steps = len(trajectory)
        bounds = [(first, min(first + length, steps)) for first in range(0, steps, length)]
        rebase = trajectory.rebase.tolist()
        return [_Chunk(a, b, tuple(rebase[a:b]), kind) for a, b in bounds]

    def _ready_noise(self, state: State[B], noise: NoiseSource) -> Literal["uploaded", "drawn"]:
        """Have the buffers that a trajectory's noise passes through, once it is chosen how it gets there."""
        device, chunk = self._device, state.chunk
        if self._noise is not None and isinstance(noise, SeededNoise) and self._noise.ready():
            drawn = state.drawn = state.drawn or allocate_drawn(device, state)
            device.upload(drawn.origin, noise.origin)
            if self._noise.is_drawn(noise, drawn.z, drawn.origin, device.row(drawn.draws, 0)):
                return "drawn"
        if state.z is None:
            state.z = device.allocate(state.noise_shape, np.float32)
            for k in range(chunk):
                device.copy(device.row(state.z, k), state.zeros)  # a row that adds no noise is read all the same
        return "uploaded"

    def _advance(self, state: State[B], trajectory: Trajectory, chunk: _Chunk, noise: NoiseSource) -> None:
        """Upload a chunk's rows and enqueue its steps. The device may still be busy with the chunk before."""
        self._check_open()
        device, rows, batch = self._device, slice(chunk.first, chunk.last), state.noise_shape[1]
        times = trajectory.network_times[rows].astype(np.float32)
        uploads = np.flatnonzero(trajectory.coef[rows, 7]).tolist() if chunk.noise == "uploaded" else []
        drawn = {k: noise(chunk.first + k + 1) for k in uploads}
        if chunk.noise == "uploaded" and chunk.first % (IN_FLIGHT * state.chunk) == 0:
            device.synchronize()
        device.upload(state.t, np.repeat(times[:, None], batch, axis=1))
        device.upload(state.coef, trajectory.coef[rows].astype(np.float32))
        for k, array in drawn.items():
            device.upload(device.row(state.z, k), np.ascontiguousarray(array, np.float32))  # type: ignore[arg-type]
        if state.drawn is not None and chunk.noise == "drawn":
            device.upload(state.drawn.draws, np.arange(chunk.first + 1, chunk.last + 1, dtype=np.uint32)[:, None])
        self._enqueue(state, chunk)

    def _enqueue(self, state: State[B], chunk: _Chunk) -> None:
        """Launch a chunk's recording; the first time enqueue its steps, which also readies them to be recorded."""

        def steps() -> None:
            for k in range(chunk.last - chunk.first):
                buffers = step_buffers(self._device, state, chunk.phase + k, k, chunk.noise)
                if chunk.noise == "drawn" and state.drawn is not None and self._noise is not None:
                    self._noise.draw(buffers.z, state.drawn.origin, self._device.row(state.drawn.draws, k))
                if chunk.rebase[k]:
                    self._device.copy(buffers.base, buffers.x)
                self._device.step(buffers)

        if not self.records:
            steps()
            return
        recording = state.recordings.pop(chunk.pattern, None)
        if recording is None and chunk.pattern in state.seen and self._eager is None:
            recording = self._record(state, steps)
        if recording is None:
            state.seen.add(chunk.pattern)
            steps()
            return
        state.recordings[chunk.pattern] = recording  # the last used is the last to go
        recording.launch()

    def _record(self, state: State[B], steps: Callable[[], None]) -> Recording | None:
        if len(state.recordings) >= MAX_RECORDINGS:
            self._device.synchronize()
            state.recordings.pop(next(iter(state.recordings))).release()
        try:
            recording = self._device.capture(steps)
        except CaptureError as error:
            self._eager = str(error)
            return None
        self._recorded += 1
        return recording

    def _tell(self, callback: StepCallback, trajectory: Trajectory, chunk: _Chunk, state: State[B]) -> None:
        x = self._device.download(state.x[chunk.last % 2])
        if arguments.stops(callback(chunk.last - 1, float(trajectory.times[chunk.last - 1]), x)):
            raise SamplingCancelled(f"the callback stopped sampling after step {chunk.last} of {len(trajectory)}")

    def _check_open(self) -> None:
        stop_if_ending()
        if self._closed:
            raise EngineClosedError("the engine was closed by another thread", "load it again with SparseEngine.load")

    def _forget(self) -> None:
        """Give every buffer and recording back."""
        while self._states:
            self._release(self._states.popitem()[1])

    def _release(self, state: State[B]) -> None:
        with contextlib.suppress(BackendError):  # a device that has failed fails here again
            self._device.synchronize()
        for recording in state.recordings.values():
            recording.release()
        for buffer in state.buffers():
            self._device.free(buffer)
