"""A loaded engine: trajectories run on the GPU, their steps replayed from CUDA graphs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sparse_engine.backends.base import NoiseSource, StepCallback
from sparse_engine.backends.device_loop import DeviceLoop, noise_of, part_of
from sparse_engine.backends.device_noise import DeviceNoise
from sparse_engine.errors import EngineClosedError, UnsupportedError
from sparse_engine.sampling import Trajectory
from sparse_engine.tactics import TacticCache

from .device import Buffer, CudaDevice
from .dlpack_in import DeviceArray


class CudaRunner:
    """A ``StepRunner``. Each lane is a stream with execution contexts of its own; a caller waits for a free one.

    A callback may use the engine, and close it: it runs on its caller's lane, which the caller's thread keeps until the
    outermost call ends.

    Args:
        lanes: one device each.
        profile: (smallest, usual, largest) batch that the engine takes.
        description: what ``describe`` says.
        release: called when all is given back.
    """

    def __init__(
        self,
        lanes: list[CudaDevice],
        profile: tuple[int, int, int],
        description: dict[str, Any],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._devices, self._profile, self._description, self._release = lanes, profile, description, release
        tactics = TacticCache(**{key: description[key] for key in ("device", "library") if key in description})
        self._loops: list[DeviceLoop[Buffer]] = [
            DeviceLoop(device, smallest=profile[0], noise=DeviceNoise(device, tactics)) for device in lanes
        ]
        self._idle: queue.Queue[DeviceLoop[Buffer]] = queue.Queue()
        for loop in self._loops:
            self._idle.put(loop)
        self._own = threading.local()  # .loop: the lane that a thread is on; .closes: a callback has closed the runner
        self._closed = False

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """See ``DeviceLoop.dlpack_device``."""
        return self._devices[0].dlpack_device

    @property
    def records(self) -> bool:
        """See ``DeviceLoop``."""
        return self._loops[0].records

    @records.setter
    def records(self, value: bool) -> None:
        for loop in self._loops:
            loop.records = value

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

        A batch beyond the profile runs in parts, each of which counts as a batch for the callback; one below it is
        filled up.
        """
        if on_device and not self._profile[0] <= len(x) <= self._profile[2]:
            raise UnsupportedError(
                f"a batch of {len(x)} cannot stay on the device: the engine takes {self._profile[0]} to "
                f"{self._profile[2]} at once",
                "set batch_size",
            )

        def part(loop: DeviceLoop[Buffer], rows: np.ndarray, count: int) -> Any:
            def tell(step: int, time: float, x: np.ndarray) -> object:
                return callback(step, time, x[:count]) if callback is not None else None

            return loop.run(
                trajectory,
                x[rows],
                conditioning=part_of(conditioning, rows),
                guidance=guidance,
                noise=noise_of(noise, rows),
                callback=None if callback is None else tell,
                callback_every=callback_every,
                on_device=on_device,
            )

        with self._lane() as loop:
            if on_device:
                return part(loop, np.arange(len(x)), len(x))
            return np.concatenate([part(loop, rows, count)[:count] for rows, count in self._parts(len(x))])

    def network(
        self,
        x: np.ndarray | DeviceArray,
        t: np.ndarray,
        *,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
    ) -> np.ndarray:
        """See ``StepRunner.network``."""
        with self._lane() as loop:
            results = []
            for rows, count in self._parts(len(x)):
                told = part_of(conditioning, rows)
                results.append(loop.network(x[rows], t[rows], conditioning=told, guidance=guidance)[:count])
            return np.concatenate(results)

    def describe(self) -> dict[str, Any]:
        """See ``StepRunner.describe``."""
        return {**self._description, "lanes": len(self._loops), **self._loops[0].describe()}

    def close(self) -> None:
        """Stop what runs at its next chunk, and give the GPU's memory back. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for loop in self._loops:
            loop.close()
        if getattr(self._own, "loop", None) is None:
            self._give_back()
        else:
            self._own.closes = True  # the lane under this callback still has buffers to free

    def _give_back(self) -> None:
        for device in self._devices:
            device.close()
        self._release()

    @contextlib.contextmanager
    def _lane(self) -> Iterator[DeviceLoop[Buffer]]:
        if self._closed:
            raise EngineClosedError("the engine was closed by another thread", "load it again with SparseEngine.load")
        own = self._own
        if getattr(own, "loop", None) is not None:
            yield own.loop
            return
        own.loop = self._idle.get()
        try:
            yield own.loop
        finally:
            loop, own.loop = own.loop, None
            self._idle.put(loop)
            if getattr(own, "closes", False):
                self._give_back()

    def _parts(self, size: int) -> list[tuple[np.ndarray, int]]:
        """(rows, how many of them count) of each part of a batch; the last row fills the smallest batch up."""
        smallest, _, largest = self._profile
        parts = []
        for first in range(0, size, largest):
            rows = np.arange(first, min(first + largest, size))
            filled = np.concatenate([rows, np.full(max(smallest - len(rows), 0), rows[-1])])
            parts.append((filled, len(rows)))
        return parts
