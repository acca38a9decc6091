"""Work in a CUDA graph, to be timed as it will run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Recorder:
    """Records CUDA graphs that share their memory: no two run at a time, and nobody wants what they compute.

    PyTorch shares a pool's memory among the recordings of one stream, so there is one. After a recording that failed
    another pool is taken: PyTorch may not have closed that one.

    Args:
        device: a CUDA device.
        stream: to record on; None makes one.
    """

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if stream is None else stream
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, calls: Sequence[Callable[[], Any]]) -> Recorded:
        """Calls in a row as one graph; the first is run once before. Raises what the calls and PyTorch raise."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.no_grad():
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # a recording that fails leaves its stream current: not past this
                calls[0]()  # libraries make their handles and load their kernels outside the graph
                self.stream.synchronize()
                try:
                    result = _capture(graph, calls, self.stream, self._pool)
                except Exception:
                    self._pool = torch.cuda.graph_pool_handle()
                    raise
        return Recorded(graph, calls, self.device, result)


class Recorded:
    """Calls as one CUDA graph; calling it runs them and waits. Made by ``Recorder.record``."""

    def __init__(self, graph: Any, calls: Sequence[Callable[[], Any]], device: torch.device, result: Any) -> None:
        self._graph, self._device, self._result = graph, device, result
        self._calls = calls  # which hold the tensors that the graph works on

    def __call__(self) -> None:
        """Run the graph to its end."""
        with torch.cuda.device(self._device):
            self._graph.replay()
            torch.cuda.synchronize()

    def take_result(self) -> Any:
        """What the last call returned, whose memory the next recording gets once this is let go of; only once."""
        result, self._result = self._result, None
        return result


def _capture(graph: Any, calls: Sequence[Callable[[], Any]], stream: Any, pool: Any) -> Any:
    """Record calls; what the last one returns."""
    result = None
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            result = None  # its memory is the next call's
            result = call()
    return result


def repeats(operations: float) -> int:
    """How many calls of so many operations a timed graph holds: by arithmetic, so that all candidates get as many."""
    return int(min(max(GRAPH_SECONDS * SUSTAINED / operations, 1), MAX_REPEATS))


GRAPH_SECONDS, SUSTAINED = 2e-3, 2e14  # a timed graph lasts about this long at this many operations a second
MAX_REPEATS = 32
