"""What the transformers that diffusers stores have in common: small modules, and how ``config.json`` is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError

from .base import Shapes
from .parts import Attends, timestep_embedding
from .reading import PublishedHeads, settle

TIME_DIM = 256  # sinusoids of a time, and of other numbers
BLOCKS = "transformer_blocks"
# What diffusers called the projections of attention before, and calls them now.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# Of a transformer's blocks, what is masked by analogy: to a layer's own tokens and its MLP; and to others.
BLOCK_LAYERS = ("*.attn1.to_[qkv]", "*.attn1.to_out.0", "*.ff.net.0.proj", "*.ff.net.2")
CROSS_LAYERS = ("*.attn2.to_[qkv]", "*.attn2.to_out.0")
BY_ANALOGY = "by analogy with the layers that SparseDM masks in a U-ViT: none of this family was published 2:4"


class TwoLinears(nn.Module):
    """A linear, an activation, a linear."""

    def __init__(self, width: int, dim: int, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., D]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class NumberEmbedder(TwoLinears):
    """A time, or another number of a row, as a vector: sinusoids, then two linears."""

    def __init__(self, dim: int, freq_shift: int = 0) -> None:
        super().__init__(TIME_DIM, dim)
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return super().forward(timestep_embedding(t, TIME_DIM, freq_shift=self.freq_shift))


class GELU(nn.Module):
    """A linear, then a tanh-GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, hidden]."""
        return F.gelu(self.proj(x), approximate="tanh")


class GEGLU(nn.Module):
    """A linear of which one half is multiplied by an erf-GELU of the other (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linears with a tanh-GELU between them, or what else ``first`` makes."""

    def __init__(self, dim: int, hidden: int, first: Callable[[int, int], nn.Module] = GELU) -> None:
        super().__init__()
        self.net = nn.Sequential(first(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))  # a dropout in the middle

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.net(x)


class Heads(nn.Module):
    """Splits channels into heads, and merges them again."""

    heads: int

    def split(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, H, L, D/H]."""
        length, dim = x.shape[1:]
        return x.reshape(-1, length, self.heads, dim // self.heads).transpose(1, 2)

    def merged(self, x: Tensor) -> Tensor:
        """[B, H, L, D/H] -> [B, L, D]."""
        length, width = x.shape[2:]
        return x.transpose(1, 2).reshape(-1, length, self.heads * width)


class SelfAttention(Heads, Attends):
    """Multi-head attention of an image to itself, with three projections; ``inner`` is the width of all heads."""

    def __init__(self, dim: int, heads: int, bias: bool = True, inner: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        inner = dim if inner is None else inner
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.to_out[0](self.merged(self.attend(*self.split_image(x))))

    def split_image(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v [B, H, L, D/H]."""
        q, k, v = (self.split(part(x)) for part in (self.to_q, self.to_k, self.to_v))
        return q, k, v


class CrossAttention(Heads, Attends):
    """Multi-head attention of an image to something else, with three projections."""

    def __init__(self, dim: int, heads: int, other_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k, self.to_v = (nn.Linear(other_dim, dim, bias=bias) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [B, P, D]; context: [B, L, D of it]; bias: [B, 1, 1, L], added to the scores -> [B, P, D]."""
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context))
        return self.to_out[0](self.merged(self.attend(q, k, v, bias=bias)))


class RMSNorm(nn.Module):
    """Each vector over the root of its mean square, in float32, times a weight (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], of x's type."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


def today_named(name: str) -> str:
    """A tensor's name, attention's projections as diffusers calls them today."""
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name


def depth_of(shapes: Shapes) -> int:
    """How many transformer blocks there are."""
    return len({match[1] for key in shapes if (match := re.match(rf"{BLOCKS}\.(\d+)\.", key))})


def out_channels_of(shapes: Shapes, patch: int) -> int:
    """What ``proj_out`` makes of a token, for each of a patch's places. Raises CheckpointError."""
    rows = shapes["proj_out.weight"][0] if "proj_out.weight" in shapes else 0
    if rows == 0 or rows % patch**2:
        raise CheckpointError(
            f"proj_out.weight has {rows} rows; expected a multiple of the {patch**2} places of a patch",
            "check that the checkpoint is complete",
        )
    return rows // patch**2


def settled_heads(
    given: dict[str, Any], read: Mapping[str, Any], published: PublishedHeads, kind: str
) -> tuple[int, list[str]]:
    """The number of heads, held against ``attention_head_dim``; everything else of ``given`` against what was read.

    Returns:
        (heads, notes).

    Raises:
        CheckpointError, OptionError: see ``uvit.settle``.
    """
    head_dim, embed_dim = given.pop("attention_head_dim", None), read["embed_dim"]
    heads, notes = settle(given, read, published, kind)
    if head_dim is not None and head_dim * heads != embed_dim:
        raise CheckpointError(
            f"attention_head_dim is {head_dim!r} in the given configuration, which {heads} heads make "
            f"{head_dim * heads}, but the weights have embed_dim {embed_dim}",
            "correct the configuration, or leave that entry out: it follows from the number of heads",
        )
    return heads, notes


def side_of(given: Any, patch: int, name: str = "the size of the image") -> int:
    """The side of what is denoised, which the weights do not say. Raises CheckpointError where nothing does."""
    if given is None:
        raise CheckpointError(
            "the size of the image cannot be read off the weights, and no config.json of diffusers says it",
            "keep config.json beside the weights (its sample_size), or say --image-size N, in latents",
        )
    return positive(given, name, patch)


def positive(given: Any, name: str, multiple: int = 1) -> int:
    """A whole number above 0. Raises CheckpointError."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1 or given % multiple:
        what = f"a multiple of the patch size {multiple}" if multiple > 1 else "a whole number above 0"
        raise CheckpointError(f"{name} is {given!r} in the given configuration; expected {what}")
    return given


def check_fixed(given: Mapping[str, Any], fixed: Mapping[str, Any], kind: str) -> None:
    """Refuse options of a configuration whose values make another network. Raises CheckpointError."""
    for option, expected in fixed.items():
        value = given.get(option)
        if value is not None and value != expected:
            raise CheckpointError(
                f"{option} is {value!r} in the given configuration; expected {expected!r}, as in the published {kind}",
                "no other is offered; correct the configuration if the weights were not trained so",
            )
