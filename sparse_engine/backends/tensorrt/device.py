"""A TensorRT engine as the trajectory loop's device: execution contexts, and the step."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from sparse_engine.backends.cuda.device import OUTPUTS, Buffer, CudaDevice, Recording, tensors
from sparse_engine.backends.cuda.runtime import Cuda
from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError, StepBuffers
from sparse_engine.errors import BackendError

MAX_CONTEXTS = 4  # shapes with an execution context of their own


class TensorRTDevice(CudaDevice):
    """A ``StepDevice`` that runs an engine.

    Each shape has an execution context of its own: what was recorded on a context holds only so long as the context's
    shapes stay. They work one after the other, so they share their scratch memory.

    Args:
        cuda: the GPU.
        engine: TensorRT's ``ICudaEngine`` of a step graph.
        index: the GPU's number, for DLPack.
        settings: what its execution contexts are created with; see ``Library.context_settings``.
        owner: what has to live as long as the engine.
    """

    def __init__(self, cuda: Cuda, engine: Any, index: int, settings: Any, owner: Any = None) -> None:
        super().__init__(cuda, index)
        self._engine, self._settings, self._owner = engine, settings, owner
        self._scratch_bytes = max(int(engine.device_memory_size_v2), 1)
        self._scratch: int | None = None
        self._contexts: collections.OrderedDict[tuple[tuple[int, ...], ...], Any] = collections.OrderedDict()
        self._names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}

    def step(self, buffers: StepBuffers[Buffer]) -> None:
        """See ``StepDevice``."""
        named = {name: buffer for name, buffer in tensors(buffers).items() if name in self._names}
        context = self._context(named)
        for name, buffer in named.items():
            if not context.set_tensor_address(name, buffer.address):
                raise BackendError(f"TensorRT does not take a buffer for {name}")
        if not context.execute_async_v3(self._cuda.stream_address(self._stream)):
            raise BackendError("TensorRT could not enqueue a step", "run with --debug for its own messages")

    def capture(self, work: Callable[[], None]) -> Recording:
        """See ``StepDevice``. TensorRT for RTX says of a context whether it can be recorded."""
        stream = self._cuda.stream_address(self._stream)
        for context in self._contexts.values():
            capturable = getattr(context, "is_stream_capturable", None)
            if capturable is not None and not capturable(stream):
                raise CaptureError("TensorRT cannot record this engine's steps: its context is not stream capturable")
        return super().capture(work)

    def _context(self, named: dict[str, Buffer]) -> Any:
        """The execution context of a step's shapes."""
        key = tuple(buffer.shape for buffer in named.values())
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = self._create_context(named)
        self._contexts.move_to_end(key)
        while len(self._contexts) > MAX_CONTEXTS:
            self._cuda.synchronize(self._stream)
            self._contexts.popitem(last=False)
        return context

    def _create_context(self, named: dict[str, Buffer]) -> Any:
        if self._scratch is None:
            self._scratch = self._cuda.allocate(self._scratch_bytes)
        context = self._engine.create_execution_context(self._settings)
        if context is None:
            raise OutOfDeviceMemoryError("TensorRT cannot create an execution context", "use a smaller batch")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        for name, buffer in named.items():
            if name not in OUTPUTS and not context.set_input_shape(name, buffer.shape):
                raise BackendError(
                    f"TensorRT does not take {name} of shape {list(buffer.shape)}", "stay inside the engine's profile"
                )
        return context

    def _in_use(self) -> tuple[Any, ...]:
        return tuple(self._contexts.values())

    def _release(self) -> None:
        self._contexts.clear()
        if self._scratch is not None:
            self._cuda.free(self._scratch)
            self._scratch = None
        self._engine = self._settings = self._owner = None  # weights go with the last that holds the engine
