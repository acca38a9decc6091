"""Recording on a CUDA device, with PyTorch's streams and graphs replaced by fakes that note what is called."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.backends.cuda.dlpack_in import DeviceArray
from sparse_engine.backends.step_device import CaptureError, StepBuffers
from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.errors import EngineClosedError

EYE = torch.eye(64)


class FakeStream:
    fake: FakeCuda

    def __init__(self, *arguments: Any) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, stream: Any) -> None:
        self.waited_for.append(stream)
        self.fake.order.append(f"ours waits for {stream}")

    def synchronize(self) -> None:
        self.fake.order.append("the host waits for ours")


class FakeCuda:
    """Notes what happens, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.order: list[str] = []  # of streams
        self.streams: list[FakeStream] = []
        self.fail: Exception | None = None

    def graph(self, graph: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        assert options["capture_error_mode"] == "thread_local"
        assert options["pool"] == (0, 1)
        assert options["stream"] is self.streams[-1]

        @contextlib.contextmanager
        def recording() -> Iterator[None]:
            self.events.append("begin")
            yield
            self.events.append("end")
            if self.fail is not None:
                raise self.fail

        return recording()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    def current(self) -> str:
        return "ours" if self.streams else "the default stream"


class FakeGraph:
    fake: FakeCuda

    def replay(self) -> None:
        assert self.fake.streams, "launched outside the stream"
        self.fake.events.append("replay")

    def reset(self) -> None:
        self.fake.events.append("reset")


class Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for kind in (FakeGraph, FakeStream):
        monkeypatch.setattr(kind, "fake", fake, raising=False)
    handles = itertools.count(1)
    for name, value in {
        "Stream": FakeStream,
        "current_stream": lambda device=None: fake.current(),
        "graph_pool_handle": lambda: (0, next(handles)),
        "device": lambda device: contextlib.nullcontext(),
        "stream": fake.stream,
        "graph": fake.graph,
        "CUDAGraph": FakeGraph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def eye(*arguments: Any, **options: Any) -> torch.Tensor:
        fake.events.append("ready")
        return EYE

    monkeypatch.setattr(torch, "eye", eye)
    return fake


def make(compiled: Any = None) -> TorchDevice:
    device = TorchDevice(torch.device("cuda", 0), Identity(), compiled=False)
    device._compiled = compiled
    return device


def buffers() -> StepBuffers[torch.Tensor]:
    names = ("x", "t", "guidance", "coef", "clip", "base", "h1", "h2", "z", "x_next", "m")
    return StepBuffers(conditioning={}, **{name: torch.ones(2) for name in names})


def test_the_stream_waits_for_the_weights(cuda: FakeCuda) -> None:
    stream: Any = make()._stream
    assert stream.waited_for == ["the default stream"]


def test_rows_of_a_tensor_on_the_same_device_are_copied_there() -> None:
    device, owner = TorchDevice(torch.device("cpu"), Identity(), compiled=False), torch.arange(12.0).reshape(4, 3)
    array = DeviceArray(owner, device.dlpack_device, np.array([2, 3, 0]), (3,))
    buffer = torch.zeros(3, 3)
    device.take(buffer, array)
    assert buffer.tolist() == owner[[2, 3, 0]].tolist()


def test_a_cuda_device_takes_what_lies_on_its_own_gpu(cuda: FakeCuda) -> None:
    assert make().dlpack_device == (2, 0)


def test_a_recording_is_launched_on_the_stream_and_released(cuda: FakeCuda) -> None:
    device = make()
    recording = device.capture(lambda: device.step(buffers()))
    recording.launch()
    recording.launch()
    recording.release()
    assert cuda.events == ["ready", "begin", "end", "replay", "replay", "reset"]


def test_each_thread_makes_its_handles_once_and_before_recording(cuda: FakeCuda) -> None:
    device = make()
    for _ in range(2):
        device.capture(lambda: None)
    thread = threading.Thread(target=lambda: device.capture(lambda: None))
    thread.start()
    thread.join()
    assert cuda.events == ["ready", "begin", "end", "begin", "end", "ready", "begin", "end"]


def test_what_cannot_be_recorded_is_said_and_leaves_the_compiled_step(cuda: FakeCuda) -> None:
    compiled = []

    def step(**arguments: torch.Tensor) -> None:
        if cuda.events[-1] == "begin":
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be")
        compiled.append(arguments)

    device = make(step)
    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing$"):
        device.capture(lambda: device.step(buffers()))
    cuda.events.append("later")
    device.step(buffers())
    assert len(compiled) == 1


def test_an_invalidated_recording_is_an_error_too(cuda: FakeCuda) -> None:
    cuda.fail = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    device = make()
    with pytest.raises(CaptureError, match="previous error during capture"):
        device.capture(lambda: None)
    assert device._pool == (0, 2)  # PyTorch holds the first for one that is still being recorded into


def test_a_shared_copy_is_of_the_callers_memory_and_made_between_the_callers_work(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of our stream would go back to it, and be overwritten there, while the caller's work still reads it."""
    device, buffer = make(), torch.ones(2)
    empty_like, copy_ = torch.empty_like, torch.Tensor.copy_

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        cuda.order.append(f"memory of {cuda.current()}")
        return empty_like(tensor)

    def copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        cuda.order.append(f"copy on {cuda.current()}")
        return copy_(target, source)

    cuda.order.clear()
    monkeypatch.setattr(torch, "empty_like", allocate)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    shared = device.share(buffer)
    assert cuda.order == [
        "memory of the default stream",
        "ours waits for the default stream",
        "copy on ours",
        "the host waits for ours",
    ]
    assert shared.tolist() == [1, 1]
    assert shared.data_ptr() != buffer.data_ptr()


def test_a_closed_device_runs_nothing(cuda: FakeCuda) -> None:
    device = make()
    device.close()
    device.close()
    with pytest.raises(EngineClosedError):
        device.step(buffers())
