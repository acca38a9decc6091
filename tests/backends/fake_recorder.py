"""In place of CUDA graphs: calls that are made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch


class FakeRecorder:
    """Stands in for ``recorded.Recorder``.

    Attributes:
        made: (device, stream) of each recorder.
    """

    made: ClassVar[list[tuple[torch.device, Any]]] = []

    def __init__(self, device: torch.device, stream: Any = None) -> None:
        self.device, self.stream = torch.device("cpu"), stream or f"stream {len(self.made)}"
        self.made.append((device, stream))

    def record(self, calls: Sequence[Callable[[], Any]]) -> FakeRecorded:
        return FakeRecorded(calls)


class FakeRecorded:
    """Stands in for ``recorded.Recorded``: a replay makes the calls, and fills in what the recording returned."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls, self.result = calls, calls[-1]()
        if isinstance(self.result, torch.Tensor):
            self.result = torch.full_like(self.result, float("nan"))

    def __call__(self) -> None:
        for call in self.calls:
            found = call()
        if isinstance(self.result, torch.Tensor):
            self.result.copy_(found)

    def take_result(self) -> Any:
        result, self.result = self.result, None
        return result
