"""Elementwise functions that are called where nothing is compiled, each as one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

RECOMPILE_LIMIT = 64  # of a function: types, batch sizes and optional arguments, past which PyTorch quietly stops
R = TypeVar("R")


def fused(function: Callable[..., R]) -> Callable[..., R]:
    """An elementwise function as the one kernel that torch.compile makes of it; where it is compiled already, itself.

    On a CPU, and where the compiler fails, it runs as PyTorch's own operators.
    """

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> R:
        if torch.compiler.is_compiling() or not x.is_cuda:
            return function(x, *rest)
        compiled = _compiled(function)
        with torch._dynamo.config.patch(suppress_errors=True, recompile_limit=RECOMPILE_LIMIT):
            return compiled(x, *rest)

    return run


@functools.cache
def _compiled(function: Callable[..., R]) -> Callable[..., R]:
    return torch.compile(function, dynamic=True)
