"""PyTorch as it is out of the box, whatever the calling program has set: an engine's numbers are its own.

Autocast, the default type and device, and the precision of float32 products belong to the program that calls us. Left
as they are, they would change what is traced, verified and drawn, without a word.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Without gradients and autocast, and with float32 products in float32; as it was before, afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_full_precision)
        yield


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """``plain_torch``, and what new tensors are made as: float32 on the CPU. For work that is done once.

    The default type is the process's own, not a thread's: other threads see float32 as long as this lasts.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), plain_torch():
            yield
    finally:
        torch.set_default_dtype(dtype)


class _FullPrecision:
    """Float32 products in float32, as long as anyone is inside: the setting is the process's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found = [(place, place.fp32_precision) for place in _precisions()]
                _set([(place, "ieee") for place, found in self._found if found != "ieee"])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _set([(place, found) for place, found in self._found if found != "ieee"])


class _Legacy:
    """The one setting of PyTorch before 2.9, in the newer ones' words."""

    @property
    def fp32_precision(self) -> str:
        found = torch.get_float32_matmul_precision()
        return "ieee" if found == "highest" else found

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


def _precisions() -> list[Any]:
    """Where PyTorch keeps how float32 products are computed."""
    backends = torch.backends
    return [backends.cuda.matmul, backends.mkldnn.matmul] if hasattr(backends.mkldnn, "matmul") else [_Legacy()]


def _set(values: list[tuple[Any, str]]) -> None:
    for place, value in values:
        place.fp32_precision = value


_full_precision = _FullPrecision()
