"""Noise that a device draws itself, where that is faster than uploading what the host has drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.sampling.noise import SeededNoise
from sparse_engine.tactics import Choice, TacticCache

B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)
DRAWN, UPLOADED = "drawn on the device", "uploaded"
DRAWS_TIMED = 6  # enqueued together, as a chunk's are


class NoiseDevice(Protocol[B_contra]):
    """What a ``StepDevice`` may offer: noise as ``sampling.noise`` defines it, to 1e-5."""

    def ready_noise(self) -> None:
        """Get ready to draw. Raises UnsupportedError where it cannot; a second call does nothing."""
        ...

    def draw(self, z: B_contra, origin: B_contra, draw: B_contra) -> None:
        """Enqueue one draw. Recordable once it has run: all that it depends on is read from buffers.

        Args:
            z: float32 [B, C, H, W], to fill.
            origin: uint32 [B, 3], ``SeededNoise.origin``.
            draw: uint32, the draw's number.
        """
        ...

    def upload(self, buffer: B_contra, array: np.ndarray) -> None:
        """See ``StepDevice``."""
        ...

    def synchronize(self) -> None:
        """See ``StepDevice``."""
        ...


class DeviceNoise(Generic[B]):
    """Whether a device draws a batch's noise or is sent it: both are timed, once, and the faster stays.

    Args:
        device: that draws.
        tactics: where choices are remembered, of this device.
    """

    def __init__(self, device: NoiseDevice[B], tactics: TacticCache) -> None:
        self._device, self._tactics = device, tactics
        self._chosen: Choice | None = None  # for the last batch
        self._why: str | None = None  # nothing is drawn

    def ready(self) -> bool:
        """Whether the device can draw at all."""
        if self._why is None:
            try:
                self._device.ready_noise()
            except (UnsupportedError, BackendError) as error:
                self._why = error.what
        return self._why is None

    def is_drawn(self, noise: SeededNoise, z: B, origin: B, draw: B) -> bool:
        """Choose for a batch, once ready; the buffers are those of ``NoiseDevice.draw``, and z is overwritten."""
        key = f"noise {len(noise.images)}x{math.prod(noise.shape)}"
        self._chosen = self._tactics.choose(key, lambda: self._candidates(noise, z, origin, draw), (DRAWN, UPLOADED))
        return self._chosen.kernel == DRAWN

    def _candidates(self, noise: SeededNoise, z: B, origin: B, draw: B) -> dict[str, Callable[[], object]]:
        device = self._device

        def drawn() -> None:
            for _ in range(DRAWS_TIMED):
                device.draw(z, origin, draw)
            device.synchronize()

        def uploaded() -> None:
            for index in range(DRAWS_TIMED):
                device.upload(z, noise(index))
            device.synchronize()

        return {DRAWN: drawn, UPLOADED: uploaded}

    def describe(self) -> str:
        """How the last batch got its noise, and why."""
        if self._why is not None:
            return f"{UPLOADED}: {self._why}"
        if self._chosen is None:
            return "none drawn yet"
        times = (f"{name} {value / DRAWS_TIMED:.3g} ms" for name, value in self._chosen.milliseconds.items())
        return f"{self._chosen.kernel} ({', '.join(times)})"

    def draw(self, z: B, origin: B, draw: B) -> None:
        """See ``NoiseDevice``."""
        self._device.draw(z, origin, draw)
