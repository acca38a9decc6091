"""2:4 weights packed for the payload: in any type, 9/16 of the dense bytes at 16 bits.

A weight [N, K] becomes ``values`` [N, K/2], the two kept weights of each group of four in order, and ``positions``
uint8 [N, ceil(K/8)]: two groups a byte, the even one in the low four bits; a group's bits are ``first | second << 2``.
A group with fewer than two nonzeros keeps zeros. It is the layout of ``LAYER.values`` and ``LAYER.positions`` in
``docs/engine-file.md``; the kernels' own layouts are made from it where an engine is loaded.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparse_engine.errors import EngineFileError, UnsupportedError

BLOCK = 1 << 24  # weights packed at once: bounds the memory of the int64 indices that torch gathers with


def as_matrix(weight: Tensor) -> Tensor:
    """A weight [N, K], or that of a convolution, [N, C, kh, kw], as [N, kh kw C]: 2:4 where it is so along channels."""
    return weight.movedim(1, -1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """What ``as_matrix`` was given, of that shape."""
    outputs, channels, *window = shape
    return matrix.reshape(outputs, *window, channels).movedim(-1, 1).contiguous()


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight [N, K] that is 2:4 along K, a multiple of 4. Raises UnsupportedError where it is not."""
    if weight.dtype == torch.float8_e4m3fn:
        values, positions = pack(_bytes(weight))
        return values.view(weight.dtype), positions
    if weight.ndim != 2 or weight.shape[1] % 4:
        raise UnsupportedError(f"weight is {list(weight.shape)}; expected [N, K] with K a multiple of 4")
    table = _kept_by_pattern().to(weight.device)
    parts = [_pack_rows(rows, table) for rows in weight.split(max(1, BLOCK // weight.shape[1]))]
    values, positions = (torch.cat(each) for each in zip(*parts, strict=True))
    return values, positions


def unpack(values: Tensor, positions: Tensor) -> Tensor:
    """The dense weight [N, K] of packed ``values`` [N, K/2] and ``positions`` [N, ceil(K/8)].

    Raises EngineFileError on shapes that do not belong together, and positions that are none.
    """
    if values.dtype == torch.float8_e4m3fn:
        return unpack(values.view(torch.uint8), positions).view(values.dtype)
    groups = values.shape[-1] // 2
    if values.ndim != 2 or positions.shape != (len(values), -(-groups // 2)) or positions.dtype != torch.uint8:
        raise EngineFileError(
            f"values {list(values.shape)} and positions {positions.dtype} {list(positions.shape)} do not belong "
            "together; expected [N, K/2] and uint8 [N, ceil(K/8)]",
            "rebuild the engine",
        )
    rows = max(1, BLOCK // (4 * groups))
    parts = [_unpack_rows(*each) for each in zip(values.split(rows), positions.split(rows), strict=True)]
    return torch.cat(parts)


def _bytes(weight: Tensor) -> Tensor:
    """float8, which PyTorch neither compares nor gathers, as bytes; -0 becomes 0, whose byte is 0."""
    stored = weight.view(torch.uint8)
    return stored.masked_fill(stored == 0x80, 0)


def _kept_by_pattern() -> Tensor:
    """uint8 [16]: pattern of nonzeros (bit i is weight i) -> ``first | second << 2``; 255 for more than two."""
    table = torch.full((16,), 255, dtype=torch.uint8)
    for first, second in itertools.combinations(range(4), 2):
        for pattern in (0, 1 << first, 1 << second, 1 << first | 1 << second):
            table[pattern] = min(int(table[pattern]), first | second << 2)
    return table


def _pack_rows(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.unflatten(1, (-1, 4))
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    kept = table[((groups != 0) * bits).sum(-1)]
    if (kept == 255).any():
        crowded = int((kept == 255).sum())
        raise UnsupportedError(
            f"weight is not 2:4: {crowded} of {kept.numel()} groups have more than 2 nonzeros",
            "bake the 2:4 mask into the weight first, or leave the layer dense",
        )
    values = groups.gather(-1, _places(kept)).flatten(1)
    padded = torch.nn.functional.pad(kept, (0, kept.shape[1] % 2))
    return values, padded[:, 0::2] | padded[:, 1::2] << 4


def _unpack_rows(values: Tensor, positions: Tensor) -> Tensor:
    pairs = values.unflatten(1, (-1, 2))
    kept = torch.stack([positions & 15, positions >> 4], -1).flatten(1)[:, : pairs.shape[1]]
    if ((kept & 3) >= (kept >> 2)).any():
        raise EngineFileError(
            "positions of a packed weight are not first | second << 2 with first < second", "rebuild the engine"
        )
    groups = torch.zeros(*pairs.shape[:2], 4, dtype=values.dtype, device=values.device)
    return groups.scatter_(-1, _places(kept), pairs).flatten(1)


def _places(kept: Tensor) -> Tensor:
    """``first | second << 2`` -> int64 [..., 2]."""
    return torch.stack([kept & 3, kept >> 2], -1).long()
