"""A GPU out of host memory: streams that run when they are waited for, allocations with bounds, an engine in NumPy.

What is enqueued runs late, as it may on a GPU: memory that is given back or written to too early shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError
from sparse_engine.errors import UnsupportedError
from sparse_engine.sampling import normal

Work = Callable[[], None]


class FakeCuda:
    """In place of ``sparse_engine.backends.cuda.runtime.Cuda``."""

    def __init__(self, memory: int = 1 << 30, captures: bool = True, late: bool = True, compiles: bool = True) -> None:
        self.memory, self.captures, self.late, self.compiles = memory, captures, late, compiles
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Work]] = {}
        self.events: set[int] = set()
        self.done: set[int] = set()
        self.graphs: dict[int, list[Work]] = {}
        self.kernels: set[int] = set()
        self.launches = 0
        self.draws = 0  # that have run
        self.waits = 0
        self.uses = 0
        self._recording: list[Work] | None = None
        self._next = 1

    def _number(self) -> int:
        self._next += 1
        return self._next

    def use(self) -> None:
        self.uses += 1

    def allocate(self, nbytes: int) -> int:
        if sum(len(each) for each in self.device.values()) + nbytes > self.memory:
            raise OutOfDeviceMemoryError("the GPU is out of memory")
        return self._place(self.device, nbytes)

    def _place(self, where: dict[int, np.ndarray], nbytes: int) -> int:
        block = np.full(nbytes, 0xFF, np.uint8)  # NaNs to a float32
        where[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        assert not any(self.streams.values()), "freed while work is under way"
        del self.device[address]

    def allocate_pinned(self, nbytes: int) -> int:
        return self._place(self.pinned, nbytes)

    def free_pinned(self, address: int) -> None:
        del self.pinned[address]

    def write_host(self, address: int, array: np.ndarray) -> None:
        assert array.nbytes <= len(self.pinned[address])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        def work() -> None:
            for address in (target, source):
                self.view(address, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.enqueue(work, stream)

    def view(self, address: int, nbytes: int) -> None:
        """Fail where memory of the GPU is read or written beyond an allocation, or after its end."""
        for start, block in (*self.device.items(), *self.pinned.items()):
            if start <= address < start + len(block):
                assert address + nbytes <= start + len(block), "beyond an allocation"
                return
        # memory of the caller's own, for a download

    def enqueue(self, work: Work, stream: int) -> None:
        if not self.late:
            work()
            return
        (self.streams[stream] if self._recording is None else self._recording).append(work)

    def create_stream(self) -> int:
        self.streams[number := self._number()] = []
        return number

    def stream_address(self, stream: int) -> int:
        return stream

    def synchronize(self, stream: int) -> None:
        assert self._recording is None, "a stream that is being recorded cannot be waited for"
        for work in self.streams[stream]:
            work()
        self.streams[stream].clear()

    def destroy_stream(self, stream: int) -> None:
        del self.streams[stream]

    def record_event(self, stream: int) -> int:
        event = self._number()
        self.events.add(event)
        self.streams[stream].append(lambda: self.done.add(event))
        return event

    def is_done(self, event: int) -> bool:
        return event in self.done

    def wait(self, event: int) -> None:
        self.waits += 1
        stream = next(iter(self.streams))
        while event not in self.done:
            self.streams[stream].pop(0)()

    def destroy_event(self, event: int) -> None:
        self.events.remove(event)

    def capture(self, stream: int, work: Work) -> int:
        if not self.captures:
            raise CaptureError("this driver cannot record")
        self._recording = []
        try:
            work()
            self.graphs[number := self._number()] = self._recording
        finally:
            self._recording = None
        return number

    def launch(self, graph: int, stream: int) -> None:
        self.launches += 1
        self.streams[stream] += self.graphs[graph]

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def compile(self, source: str, name: str) -> int:
        assert f"void {name}(" in source
        if not self.compiles:
            raise UnsupportedError("NVRTC is not there: no libnvrtc.so")
        self.kernels.add(number := self._number())
        return number

    def launch_kernel(
        self, kernel: int, blocks: int, threads: int, arguments: list[tuple[int, Any]], stream: int
    ) -> None:
        """The one that draws noise: what it depends on is read when it runs."""
        (z, origin, draw, elements, images), types = zip(*arguments, strict=True)
        assert types == (ctypes.c_void_p,) * 3 + (ctypes.c_uint,) * 2
        assert blocks * threads >= images * -(-elements // 4)

        def words(address: int, count: int) -> list[int]:
            self.view(address, 4 * count)
            return list((ctypes.c_uint32 * count).from_address(address))

        def work() -> None:
            assert kernel in self.kernels
            low, high, rows = np.array(words(origin, 3 * images), np.uint64).reshape(images, 3).T
            seeds = low | high << np.uint64(32)
            found = np.ascontiguousarray(normal(seeds, rows, words(draw, 1)[0], (elements,)))
            self.view(z, found.nbytes)
            ctypes.memmove(z, found.ctypes.data, found.nbytes)
            self.draws += 1

        self.enqueue(work, stream)

    def unload(self, kernel: int) -> None:
        self.kernels.remove(kernel)

    def leaks(self) -> dict[str, int]:
        """What was not given back."""
        held = {"device": self.device, "pinned": self.pinned, "streams": self.streams}
        held |= {"events": self.events, "graphs": self.graphs, "kernels": self.kernels}
        return {name: len(each) for name, each in held.items() if each}


class FakeEngine:
    """In place of ``ICudaEngine``: a step in NumPy, ``step(**inputs) -> (x_next, m)``, that runs from addresses.

    ``told`` is condition -> dtype.
    """

    device_memory_size_v2 = 256

    def __init__(
        self,
        cuda: FakeCuda,
        step: Callable[..., tuple[np.ndarray, np.ndarray]],
        told: Mapping[str, Any],
        smallest: int = 1,
    ) -> None:
        names = ["x", "t", *([*told, "guidance"] if told else []), "coef", "clip", "base", "h1", "h2", "z"]
        self.dtypes = dict(told)
        self.cuda, self.step_function, self._names = cuda, step, [*names, "x_next", "m"]
        self.num_io_tensors = len(self._names)
        self.contexts, self.smallest = 0, smallest
        self.information = ""  # in TensorRT's JSON

    def create_engine_inspector(self) -> FakeEngine:
        return self

    def get_engine_information(self, format: str) -> str:
        return self.information

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def create_execution_context(self, strategy: Any) -> FakeContext:
        assert strategy == "user managed"
        self.contexts += 1
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.scratch: int | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= FakeEngine.device_memory_size_v2
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        self.shapes[name] = shape
        return name != "x" or self.engine.smallest <= shape[0] <= 16

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda, addresses, shapes = self.engine.cuda, dict(self.addresses), dict(self.shapes)
        shapes |= {"x_next": shapes["x"], "m": shapes["x"]}

        def at(name: str) -> np.ndarray:
            kind, size = self.engine.dtypes.get(name, np.float32), int(np.prod(shapes[name]))
            cuda.view(addresses[name], size * np.dtype(kind).itemsize)
            raw = (ctypes.c_char * (size * np.dtype(kind).itemsize)).from_address(addresses[name])
            return np.frombuffer(raw, kind).reshape(shapes[name])

        def work() -> None:
            assert self.scratch in cuda.device
            inputs = {name: at(name) for name in self.engine._names[:-2]}
            at("x_next")[...], at("m")[...] = self.engine.step_function(**inputs)

        cuda.enqueue(work, stream)
        return True
