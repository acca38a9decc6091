"""What pruning has to know of a layer: sums of products of its inputs, in float64.

For inputs X [T, n] of the layer in the pruned network and the outputs Y [T, out] that are wanted of it, without bias:
G = X^T X and B = Y^T X. Every method and every error is a function of these, so states are looked at once. Y are the
outputs of the dense network's layer and, where they are added to something else, what that lacks in the pruned network:
a residual's branch makes up for what its trunk has lost.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import NonFiniteError

from .graph import Layer
from .walk import Given

CHUNK = 1 << 26  # bytes of float64 rows that are multiplied at once
TILE = 512  # columns of G that are computed together; of the tiles, those above the diagonal are mirrored


@dataclasses.dataclass
class Work:
    """How much was multiplied in float64, and how long that took: floating point operations, seconds."""

    flops: float = 0.0
    seconds: float = 0.0

    def add(self, flops: float, since: float) -> None:
        """Count operations that began at ``since``, by ``time.perf_counter``."""
        self.flops += flops
        self.seconds += time.perf_counter() - since


@dataclasses.dataclass(frozen=True)
class Sums:
    """One layer's sums over all rows that it was given.

    Attributes:
        gram: G, float64 [n, n].
        cross: B, float64 [out, n].
        wanted: sum of the squares of Y.
        energy: sum of the squares of the dense network's outputs alone.
        rows: how many rows.
    """

    gram: Tensor
    cross: Tensor
    wanted: float
    energy: float
    rows: int

    def error(self, weight: Tensor) -> float:
        """||Y - X W^T||^2 for weights [out, n] in float64, in parts of the dense outputs' energy; 0 where that is."""
        if not self.energy:
            return 0.0
        missed = self.wanted - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()
        return max(0.0, float(missed) / self.energy)


def columns_of(weight: Tensor) -> Tensor:
    """A weight as [out, n], in the order in which the mask groups it: taps, then channels."""
    return (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).flatten(1)


def weight_of(columns: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of ``columns_of``."""
    if len(shape) != 4:
        return columns.reshape(tuple(shape)).contiguous()
    out, inputs, height, width = shape
    return columns.reshape(out, height, width, inputs).permute(0, 3, 1, 2).contiguous()


def rows_of(x: Tensor, module: nn.Linear | nn.Conv2d) -> Tensor:
    """What a layer multiplies with its columns: [T, n] of its input."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    kernel, padding = module.kernel_size, module.padding
    assert not isinstance(padding, str)  # noqa: S101 - no family has "same"
    unfolded = F.unfold(x, kernel, module.dilation, padding, module.stride)  # [B, in * taps, places]
    batch, _, places = unfolded.shape
    by_tap = unfolded.reshape(batch, x.shape[1], kernel[0] * kernel[1], places).permute(0, 3, 2, 1)
    return by_tap.reshape(batch * places, -1)


def outputs_of(x: Tensor, module: nn.Linear | nn.Conv2d) -> Tensor:
    """A layer's outputs without its bias: [T, out]."""
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight).reshape(-1, module.weight.shape[0])
    y = F.conv2d(x, module.weight, None, module.stride, module.padding, module.dilation, module.groups)
    return _by_place(y)


def _by_place(y: Tensor) -> Tensor:
    """[B, C, H, W] -> [B H W, C]."""
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


def collect(group: Sequence[Layer], given: Iterable[Given], work: Work) -> list[Sums]:
    """The sums of each layer of a group, which are given the same.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    first, rows, n = group[0], 0, group[0].columns
    outs = [layer.rows for layer in group]
    gram = torch.zeros(n, n, dtype=torch.float64)
    # Y^T X, or W (X_dense^T X), whichever is less to multiply.
    by_inputs = sum(outs) > n and isinstance(first.module, nn.Linear) and not any(layer.beside for layer in group)
    cross = torch.zeros(n if by_inputs else sum(outs), n, dtype=torch.float64)
    wanted, energy = (torch.zeros(sum(outs), dtype=torch.float64) for _ in range(2))
    for both in given:
        dense = [outputs_of(both.dense, layer.module) for layer in group]
        energy += torch.cat([each.double().square().sum(0) for each in dense])
        for outputs, missing in zip(dense, both.missing, strict=False):
            if missing is not None:
                outputs += missing.reshape(-1, outputs.shape[1]) if missing.ndim < 4 else _by_place(missing)
        y = torch.cat(dense, dim=1)
        x = rows_of(both.pruned, first.module)
        left = rows_of(both.dense, first.module) if by_inputs else y
        rows += len(x)
        for part in _chunks(len(x), n):
            wide, target = x[part].double(), y[part].double()
            started = time.perf_counter()
            flops = _add_products(gram, wide)
            cross.addmm_((left[part].double() if by_inputs else target).T, wide)
            work.add(flops + 2.0 * len(wide) * cross.numel(), started)
            wanted += target.square().sum(0)
    _mirror(gram)
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all() and torch.isfinite(wanted).all()):
        raise NonFiniteError(
            f"{first.name} is given NaN or infinite values: the states, or the network on them, are not finite",
            "check the states that are given with --calib or --data, and the checkpoint",
            (),
        )
    found, at = [], 0
    for layer, out in zip(group, outs, strict=True):
        own = slice(at, at + out)
        mine = columns_of(layer.module.weight).double() @ cross if by_inputs else cross[own].clone()
        found.append(Sums(gram, mine, float(wanted[own].sum()), float(energy[own].sum()), rows))
        at += out
    return found


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, CHUNK // (8 * columns))
    for first in range(0, rows, size):
        yield slice(first, first + size)


def _add_products(gram: Tensor, x: Tensor) -> float:
    """Add X^T X to the lower triangle of G, tile by tile. Returns the operations."""
    n = x.shape[1]
    for first in range(0, n, TILE):
        last = min(first + TILE, n)
        gram[first:last, :last].addmm_(x[:, first:last].T, x[:, :last])
    return sum(2.0 * len(x) * (min(first + TILE, n) - first) * min(first + TILE, n) for first in range(0, n, TILE))


def _mirror(gram: Tensor) -> None:
    """Make the lower triangle the upper one too."""
    lower = torch.tril(gram)
    gram.copy_(lower + torch.tril(lower, -1).T)
