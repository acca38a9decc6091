"""Work in a CUDA graph, to be timed as it will run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Recorded:
    """Calls in a row as one CUDA graph; calling it runs them and waits.

    Args:
        calls: what to record; the first is run once before.
        device: a CUDA device.
        pool: of memory, as ``torch.cuda.graph`` takes it.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device, pool: Any = None) -> None:
        self._device, self._calls = device, calls  # which hold the tensors that the graph works on
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # a recording that fails leaves its stream current: not past this block
                calls[0]()  # libraries make their handles and load their kernels outside the graph
                stream.synchronize()
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    for call in calls:
                        call()

    def __call__(self) -> None:
        """Run the graph to its end."""
        with torch.cuda.device(self._device):
            self._graph.replay()
            torch.cuda.synchronize()


def repeats(operations: float) -> int:
    """How many calls of so many operations a timed graph holds: by arithmetic, so that all candidates get as many."""
    return int(min(max(GRAPH_SECONDS * SUSTAINED / operations, 1), MAX_REPEATS))


GRAPH_SECONDS, SUSTAINED = 2e-3, 2e14  # a timed graph lasts about this long at this many operations a second
MAX_REPEATS = 32
