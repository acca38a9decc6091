"""What a backend that keeps the state on its device offers to the loop: buffers, one step, and recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from sparse_engine.errors import BackendError

if TYPE_CHECKING:
    from .cuda.dlpack_in import DeviceArray

B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)


class OutOfDeviceMemoryError(BackendError):
    """The device has no memory left for a batch; the loop halves it."""


class CaptureError(Exception):
    """Steps cannot be recorded here; the message says why. The loop enqueues them one by one."""


@dataclass(frozen=True)
class StepBuffers(Generic[B]):
    """The buffers of one solver step; ``docs/engine-file.md`` has its lines.

    ``conditioning`` is name -> [G, B, ...], empty for a network that is told x and t alone; ``guidance`` [G], ``coef``
    [8] and ``clip`` [2] are float32, ``t`` is float32 [B], all others float32 [B, C, H, W]. The step reads all but
    ``x_next`` and ``m``, which it writes; none of them overlap.
    """

    x: B
    t: B
    conditioning: Mapping[str, B]
    guidance: B
    coef: B
    clip: B
    base: B
    h1: B
    h2: B
    z: B
    x_next: B
    m: B


class Recording(Protocol):
    """Recorded work."""

    def launch(self) -> None:
        """Enqueue it all on the device's stream."""
        ...

    def release(self) -> None:
        """Give its memory back."""
        ...


class StepDevice(Protocol[B]):
    """A device with one stream, on which everything is enqueued in order.

    Any method but ``free`` may raise OutOfDeviceMemoryError, or BackendError for what else goes wrong.
    """

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> B:
        """A buffer, its contents undefined."""
        ...

    def free(self, buffer: B) -> None:
        """Give a buffer back; work that uses it has been waited for."""
        ...

    def row(self, buffer: B, index: int) -> B:
        """A view of ``buffer[index]``, valid as long as the buffer."""
        ...

    def upload(self, buffer: B, array: np.ndarray) -> None:
        """Enqueue a copy to the front of a buffer; the array may be overwritten as soon as this returns."""
        ...

    def copy(self, target: B, source: B) -> None:
        """Enqueue a copy between two buffers of one shape. Recordable."""
        ...

    def download(self, buffer: B) -> np.ndarray:
        """Wait for the stream and return a buffer's contents, in memory of their own."""
        ...

    def share(self, buffer: B) -> Any:
        """A copy of a buffer that stays on the device, as an object with ``__dlpack__``."""
        ...

    def step(self, buffers: StepBuffers[B]) -> None:
        """Enqueue one solver step. Recordable once it has run with buffers of these shapes."""
        ...

    def capture(self, work: Callable[[], None]) -> Recording:
        """Record what ``work`` enqueues, without running it. Raises CaptureError."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...


@runtime_checkable
class TakingDevice(Protocol[B_contra]):
    """What a ``StepDevice`` may offer: to take x from where another library has it on the same device.

    Attributes:
        dlpack_device: (DLDeviceType, number).
    """

    dlpack_device: tuple[int, int]

    def take(self, buffer: B_contra, array: DeviceArray) -> None:
        """Copy an array of this device to a buffer of its shape; done when this returns."""
        ...
