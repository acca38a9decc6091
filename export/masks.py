"""N:M masks in NumPy: derive them as SparseDM does, apply them, check them, measure what they cost.

SparseDM stores dense weights and computes the mask in every forward pass, so the mask has to be derived here
exactly as there. "Masked" and "hardware 2:4" are two things: the training mask groups a flattened weight, the
hardware wants each aligned group of four *along the reduction axis* to hold at most two nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_engine.errors import CheckpointError, OptionError

MAX_GROUP = 64  # the widest N:M of the literature is 1:16; ranks are counted pair by pair
GROUPS_AT_ONCE = 1 << 14  # whose weights and ranks stay in a core's own cache


@dataclass(frozen=True)
class Pattern:
    """Keep ``n`` of each ``m`` consecutive weights."""

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= MAX_GROUP:
            raise OptionError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m} weights; expected 0 < N < M <= {MAX_GROUP}",
                "write it as N:M, for example 2:4",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4". Raises OptionError on anything else."""
        n, colon, m = text.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal()):
            raise OptionError(f"pattern {text!r} is not of the form N:M", "write it as N:M, for example 2:4")
        return cls(int(n), int(m))


TWO_FOUR = Pattern(2, 4)


def magnitude_mask(weight: np.ndarray, pattern: Pattern = TWO_FOUR) -> tuple[np.ndarray, int]:
    """Derive the mask that SparseDM's forward pass derives from a dense weight.

    Args:
        weight: float32 [out, in], grouped as it lies in memory, or [out, in, kh, kw], grouped along the input
            channels of each output channel and tap. Use the stored float32 values: a cast before this flips bits.
        pattern: how many of how many to keep.

    Returns:
        bool mask of the weight's shape, True where kept; and the number of groups in which a tie between
        nonzero weights decided (the lower index is pruned first).

    Raises:
        CheckpointError: the weight's size is not a multiple of ``pattern.m``.

    Source: SparseDM (arXiv 2404.10445) section 3; ``sparse_ops_mask.py`` of the authors' code.
    """
    magnitudes = np.abs(_flattened(weight))
    if magnitudes.size % pattern.m:
        raise CheckpointError(
            f"a weight of shape {list(weight.shape)} has {weight.size} elements: not a multiple of {pattern.m}, "
            f"so it cannot be cut into groups for a {pattern} mask",
            "leave this layer out with --mask-layers",
        )
    groups = magnitudes.reshape(-1, pattern.m)
    kept_columns, tied = _keep_largest(groups, pattern.n)
    return _unflattened(kept_columns.reshape(magnitudes.shape), weight.shape), tied


def is_n_of_m(weight: np.ndarray, pattern: Pattern = TWO_FOUR, axis: int = 1) -> bool:
    """Whether each aligned group of ``m`` along ``axis`` holds at most ``n`` nonzeros.

    This is what sparse tensor cores and the CPU kernels ask, for any dtype. ``axis`` is the reduction axis: 1 for
    a Linear [out, in], a Gemm with transB and a Conv [out, in, kh, kw] (groups of input channels for each output
    channel and tap); 0 for a MatMul weight [in, out]. A length along ``axis`` that ``m`` does not divide is False.
    """
    if weight.ndim < 2 or weight.shape[axis] % pattern.m:
        return False
    groups = np.moveaxis(weight, axis, -1) != 0
    per_group = groups.reshape(*groups.shape[:-1], -1, pattern.m).sum(axis=-1, dtype=np.uint8)
    return bool(per_group.max(initial=0) <= pattern.n)


def obeys_training_groups(weight: np.ndarray, pattern: Pattern = TWO_FOUR) -> bool:
    """Whether a weight already has at most ``n`` nonzeros in each group that the training mask forms."""
    flat = _flattened(weight)
    if flat.size % pattern.m:
        return False
    return bool((flat.reshape(-1, pattern.m) != 0).sum(axis=1).max(initial=0) <= pattern.n)


def energy_removed(weight: np.ndarray, mask: np.ndarray) -> float:
    """Share of the sum of squares that the mask takes away, in float64 (0 for an all-zero weight)."""
    total = float(np.einsum("i,i->", weight.ravel(), weight.ravel(), dtype=np.float64))
    pruned = np.where(mask, np.float32(0), weight).ravel()
    return float(np.einsum("i,i->", pruned, pruned, dtype=np.float64)) / total if total else 0.0


def _flattened(weight: np.ndarray) -> np.ndarray:
    """The order in which the training code groups: [out, in], or [out, kh, kw, in] for a convolution."""
    return (weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight).reshape(-1)


def _unflattened(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) != 4:
        return flat.reshape(shape)
    out, in_, kh, kw = shape
    return flat.reshape(out, kh, kw, in_).transpose(0, 3, 1, 2)


def _keep_largest(groups: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """True for the ``n`` largest of each row, and how many rows a tie decided; some rows at a time, within caches."""
    kept, tied = np.empty(groups.shape, bool), 0
    for start in range(0, len(groups), GROUPS_AT_ONCE):
        rows = slice(start, start + GROUPS_AT_ONCE)
        columns, of_columns = _keep_largest_of(np.ascontiguousarray(groups[rows].T), n)
        kept[rows] = columns.T
        tied += of_columns
    return kept, tied


def _keep_largest_of(columns: np.ndarray, n: int) -> tuple[np.ndarray, int]:
    """The same of groups that stand in columns; rank by pairwise comparison, the higher index winning a tie."""
    m = len(columns)
    rank = np.zeros(columns.shape, np.uint8)  # how many of its group each element beats
    for low in range(m):
        for high in range(low + 1, m):
            low_wins = columns[low] > columns[high]
            rank[low] += low_wins
            rank[high] += ~low_wins
    kept = rank >= m - n
    smallest_kept = np.where(kept, columns, np.inf).min(axis=0)
    largest_pruned = np.where(kept, 0, columns).max(axis=0)
    return kept, int(np.count_nonzero((smallest_kept == largest_pruned) & (largest_pruned > 0)))
