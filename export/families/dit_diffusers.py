"""DiT as diffusers stores it: ``DiTTransformer2DModel``, and the ``Transformer2DModel`` that it was before.

Source: huggingface/diffusers, and facebook/DiT-XL-2-256 on the Hub. It is the network of ``dit.py`` under other names,
and differs in what it computes: the frequencies of the time are one step further apart, each block has its own
embedders of time and class (the head uses the first block's), one of a block's norms has an epsilon of its own, and
the positions are not stored. So the same weights give slightly other pictures than Meta's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError

from . import dit, uvit
from .base import Family, Shapes
from .diffusers_parts import (
    BLOCK_LAYERS,
    FeedForward,
    NumberEmbedder,
    SelfAttention,
    check_fixed,
    depth_of,
    settled_heads,
    side_of,
)
from .dit import DiTConfig, modulated, norm
from .parts import unpatchify
from .reading import shape_of

KIND = "diffusers' DiT"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
LABELS = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
DIFFUSERS_NAMES = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "num_layers": "depth",
}
# Options of the configuration whose other values make another network, and what each has to be.
FIXED = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
NORM_EPS = 1e-5  # diffusers' default


@dataclasses.dataclass(frozen=True)
class DiffusersDiTConfig(DiTConfig):
    """Everything that fixes the graph; ``norm_eps`` is that of the norm before the MLP."""

    attention_bias: bool = True
    norm_eps: float = NORM_EPS


class Embedding(nn.Module):
    """Time and class as one vector."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.timestep_embedder = NumberEmbedder(config.embed_dim, freq_shift=1)
        self.class_embedder = dit.LabelEmbedding(config.num_classes, config.embed_dim)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """t, y: [B] -> [B, D]."""
        return self.timestep_embedder(t) + self.class_embedder(y)


class Modulation(nn.Module):
    """A block's shifts, scales and gates."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.emb = Embedding(config)
        self.linear = nn.Linear(config.embed_dim, 6 * config.embed_dim)

    def forward(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """t, y: [B] -> shift, scale, gate of the attention, and of the MLP: float32 [B, 1, D] each."""
        return self.linear(F.silu(self.emb(t, y))).float()[:, None].chunk(6, dim=-1)


class Block(nn.Module):
    """A transformer block whose norms are shifted and scaled, and whose branches are gated, by time and class."""

    def __init__(self, config: DiffusersDiTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.norm1 = Modulation(config)
        self.attn1 = SelfAttention(config.embed_dim, config.heads, config.attention_bias)
        self.ff = FeedForward(config.embed_dim, config.mlp_hidden)

    def forward(self, h: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """h: [B, L, D]; t, y: [B] -> [B, L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(t, y)
        h = h + (gate1 * self.attn1(modulated(h, shift1, scale1))).to(h.dtype)
        return h + (gate2 * self.ff(norm(h, self.eps) * (1 + scale2) + shift2)).to(h.dtype)


class DiffusersDiT(nn.Module):
    """The network: (x, t, y) -> prediction of ``out_channels`` channels, of x's height and width."""

    positions: Tensor

    def __init__(self, config: DiffusersDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        dim = config.embed_dim
        self.pos_embed = uvit.PatchEmbed(config.channels, dim, config.patch_size)
        positions = dit.sincos_positions(dim, config.image_size // config.patch_size)
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict eps and, where learned, the variance.

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            y: [B] int64 labels.
        """
        h = (self.pos_embed(x) + self.positions).to(self.dtype)
        for block in self.transformer_blocks:
            h = block(h, t, y)
        c = self.transformer_blocks[0].norm1.emb(t, y)  # type: ignore[union-attr, operator]
        shift, scale = self.proj_out_1(F.silu(c)).float()[:, None].chunk(2, dim=-1)
        h, config = self.proj_out_2(modulated(h, shift, scale)), self.config
        return unpatchify(h, config.out_channels, config.image_size, config.patch_size)


def _recognises(shapes: Shapes) -> bool:
    return {LABELS, "pos_embed.proj.weight", "proj_out_1.weight", "proj_out_2.weight"} <= set(shapes)


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[DiffusersDiTConfig, list[str]]:
    given = {DIFFUSERS_NAMES.get(name, name): value for name, value in given.items()}
    _check_kind(given)
    read = _read_sizes(shapes, given)
    if given.get("out_channels") is None:  # "as in_channels", which the weights say
        given.pop("out_channels", None)
    notes, eps = [], given.get("norm_eps")
    if eps is None:
        notes.append(f"norm_eps = {NORM_EPS}: not in the weights; taken from diffusers' default")
    heads, of_heads = settled_heads(given, read, dit.PUBLISHED_HEADS, KIND)
    config = DiffusersDiTConfig(
        heads=heads,
        null_row=True,  # diffusers' table always has a row more than there are classes
        guidance_channels=dit.guidance_of(given, read["channels"]),
        norm_eps=NORM_EPS if eps is None else float(eps),
        **read,
    )
    return config, [
        *notes,
        *of_heads,
        f"masked layers = attn1.to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2: {dit.BY_ANALOGY}",
    ]


def _check_kind(given: Mapping[str, Any]) -> None:
    """Refuse a configuration of another network. Raises CheckpointError."""
    name = given.get("_class_name")
    if name is not None and name not in CLASSES:
        raise CheckpointError(f"_class_name is {name!r} in the given configuration; expected {' or '.join(CLASSES)}")
    check_fixed(given, FIXED, "DiT")
    eps = given.get("norm_eps")
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or eps <= 0):
        raise CheckpointError(f"norm_eps is {eps!r} in the given configuration; expected a number above 0")


def _read_sizes(shapes: Shapes, given: dict[str, Any]) -> dict[str, Any]:
    """Everything that the shapes say, and the image's size, which they do not. Raises CheckpointError."""
    embed_dim, channels, patch_size, _ = shape_of(shapes, "pos_embed.proj.weight", 4, KIND)
    rows = shape_of(shapes, LABELS, 2, KIND)[0]
    _check_classes(given, rows)
    return {
        "image_size": side_of(given.pop("image_size", None), patch_size, "image_size"),
        "patch_size": patch_size,
        "channels": channels,
        "embed_dim": dit.width_of(embed_dim),
        "depth": depth_of(shapes),
        "mlp_hidden": shape_of(shapes, "transformer_blocks.0.ff.net.0.proj.weight", 2, KIND)[0],
        "num_classes": rows,
        "out_channels": dit.out_channels_of(shapes, "proj_out_2.weight", patch_size, channels),
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in shapes,
    }


def _check_classes(given: dict[str, Any], rows: int) -> None:
    classes = given.pop("num_embeds_ada_norm", None)
    if classes is not None and classes != rows - 1:
        raise CheckpointError(
            f"num_embeds_ada_norm is {classes!r} in the given configuration, but the weights have {rows} rows of "
            "labels; expected one row more than classes",
            "correct the configuration, or leave that entry out: it is read off the weights",
        )


FAMILY = Family(
    name="dit-diffusers",
    sparse_layers=BLOCK_LAYERS,
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=DiffusersDiTConfig.from_dict,
    network=DiffusersDiT,
    recipe=dit.recipe,
    positions=dit.positions_of,
    float32_layers=("pos_embed.*", "*.norm1.emb.*", "proj_out_*"),
    settings=dit.SETTINGS | frozenset(DIFFUSERS_NAMES) | {"norm_eps", "attention_head_dim", "num_embeds_ada_norm"},
    class_names=frozenset({"DiTTransformer2DModel", "Transformer2DModel:ada_norm_zero"}),
)
