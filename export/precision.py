"""A network in a lower precision: its large products in fp16 or bf16, float32 where rounding would show.

What stays float32: normalisations (their statistics are sums over hundreds of squares), softmax, the embedding of
time, the layers that a family names (its ends), and, in the step graph, the solver's lines. A backend that runs
attention as one fused kernel takes the softmax with it: in TensorRT its precision is the library's (docs/precision.md).
Masks are derived from the stored float32 weights before this; a zero rounds to zero, so weights that are 2:4 stay 2:4.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError, OptionError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRODUCTS = (nn.Linear, nn.Conv2d)
NORMALISATIONS = (nn.LayerNorm, nn.GroupNorm)


def lower(network: nn.Module, float32_layers: Sequence[str], precision: str) -> nn.Module:
    """Lower a network in place, and return it.

    Each product and each normalisation takes its input in the type of its own weight. What runs between them runs in
    the network's attribute ``dtype``, which is set here.

    Args:
        network: float32.
        float32_layers: globs over the names of products that stay float32.
        precision: "fp32" (nothing is changed), "fp16" or "bf16".

    Raises:
        OptionError: an unknown precision.
        CheckpointError: a weight is beyond the range of the precision.
    """
    if precision not in DTYPES:
        raise OptionError(f"precision {precision!r} is not known; expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return network
    for name, module in network.named_modules():
        if not isinstance(module, PRODUCTS + NORMALISATIONS):
            continue
        if isinstance(module, PRODUCTS) and not any(fnmatchcase(name, glob) for glob in float32_layers):
            _check_range(name, module, dtype)
            module.to(dtype)
        module.register_forward_pre_hook(_cast_input)
    network.dtype = dtype  # type: ignore[assignment]
    return network


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a layer its input in the type of its weight."""
    x, *rest = inputs
    weight: Any = module.weight
    return (x.to(weight.dtype), *rest)


def _check_range(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for part, value in module.named_parameters():
        found = _largest(value)
        if found > largest:
            lower, higher = ("fp16", "bf16") if dtype == torch.float16 else ("bf16", "fp32")
            raise CheckpointError(
                f"{name}.{part} holds {found:.3g}, which is beyond the range of {lower} ({largest:.5g})",
                f"build with --precision {higher}",
            )


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0
