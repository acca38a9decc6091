"""PixArt-alpha and PixArt-Sigma: a DiT that reads a text by cross-attention.

Source: Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis",
ICLR 2024 (arXiv 2310.00426), and "PixArt-Sigma" (arXiv 2403.04692), as diffusers stores them
(``PixArtTransformer2DModel``, and the ``Transformer2DModel`` that it was before). A text is what T5 makes of it, of
which a mask says how much counts. Time modulates all blocks by one projection, to which each adds a table of its own.
PixArt-alpha of 1024 pixels is told the size of the picture, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError

from . import dit, uvit
from .base import Family, Recipe, Shapes, SquareConfig
from .diffusers_parts import (
    BLOCK_LAYERS,
    BLOCKS,
    BY_ANALOGY,
    CROSS_LAYERS,
    CrossAttention,
    FeedForward,
    NumberEmbedder,
    SelfAttention,
    TwoLinears,
    check_fixed,
    depth_of,
    out_channels_of,
    positive,
    settled_heads,
    side_of,
)
from .dit import modulated, norm
from .parts import unpatchify
from .reading import PublishedHeads, shape_of

KIND = "PixArt"
ALPHA_LENGTH, SIGMA_LENGTH = 120, 300  # vectors of T5
PUBLISHED_HEADS: PublishedHeads = {1152: 16}
PIXELS = 8  # of a side of a latent: of the VAE that the published models are trained in
MASKED_OUT = -10000.0  # is added to the scores of what does not count
DIFFUSERS_NAMES = {
    "in_channels": "channels",
    "num_attention_heads": "heads",
    "num_layers": "depth",
    "caption_channels": "context_dim",
}
# Options of the configuration whose other values make another network, and what each has to be.
FIXED = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_type": "default",
    "norm_eps": 1e-6,
}
CAPTION = "caption_projection.linear_1.weight"
SIZE_EMBEDDER = "adaln_single.emb.resolution_embedder.linear_1.weight"
OWN_KEYS = frozenset({"adaln_single.linear.weight", "scale_shift_table", f"{BLOCKS}.0.attn2.to_k.weight"})


@dataclasses.dataclass(frozen=True)
class PixArtConfig(SquareConfig):
    """Everything that fixes a PixArt's graph.

    ``sample_size`` is the side, in latents, that it was trained at, and ``interpolation_scale`` how much further than
    one apart the patches' positions then are not; ``told_size`` says whether it is told the picture's size;
    ``projected`` whether the text goes through two linears first.
    """

    sample_size: int
    out_channels: int
    embed_dim: int
    depth: int
    heads: int
    mlp_hidden: int
    context_dim: int
    context_length: int
    interpolation_scale: float = 1.0
    told_size: bool = False
    projected: bool = True
    attention_bias: bool = True

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The text with its mask, of which what none is has to be given; the picture's height, width and their ratio.

        A picture is square, so one number is the default of its height and its width.
        """
        text = (
            Condition("context", (self.context_length, self.context_dim), null=None, mask="context_mask"),
            Condition("context_mask", (self.context_length,), null="ones", default=1.0),
        )
        if not self.told_size:
            return text
        return (
            *text,
            Condition("resolution", (2,), null="same", default=float(PIXELS * self.image_size)),
            Condition("aspect_ratio", (1,), null="same", default=1.0),
        )


class Block(nn.Module):
    """Attention to the image, attention to the text, an MLP; time modulates the first and the last."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, config.embed_dim))
        self.attn1 = SelfAttention(config.embed_dim, config.heads, config.attention_bias)
        of_text = config.embed_dim if config.projected else config.context_dim
        self.attn2 = CrossAttention(config.embed_dim, config.heads, of_text, config.attention_bias)
        self.ff = FeedForward(config.embed_dim, config.mlp_hidden)

    def forward(self, h: Tensor, context: Tensor, bias: Tensor, c: Tensor) -> Tensor:
        """h: [B, P, D]; context, bias: as for ``CrossAttention``; c: float32 [B, 6, D], of the time -> [B, P, D]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + c).chunk(6, dim=1)
        h = h + (gate * self.attn1(modulated(h, shift, scale))).to(h.dtype)
        h = h + self.attn2(h, context, bias).to(h.dtype)  # without a norm before it
        return h + (mlp_gate * self.ff(modulated(h, mlp_shift, mlp_scale))).to(h.dtype)


class Embedding(nn.Module):
    """Time, and where it is told the picture's size, as one vector."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.timestep_embedder = NumberEmbedder(dim)
        self.resolution_embedder = NumberEmbedder(dim // 3) if config.told_size else None
        self.aspect_ratio_embedder = NumberEmbedder(dim // 3) if config.told_size else None

    def forward(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """t: [B]; resolution: [B, 2]; aspect_ratio: [B, 1] -> [B, D]."""
        c = self.timestep_embedder(t)
        if self.resolution_embedder is None or self.aspect_ratio_embedder is None:
            return c
        sides = self.resolution_embedder(resolution.flatten()).unflatten(0, (-1, 2)).flatten(1)  # type: ignore[union-attr]
        return c + torch.cat([sides, self.aspect_ratio_embedder(aspect_ratio.flatten())], dim=1)  # type: ignore[union-attr]


class SharedModulation(nn.Module):
    """What time is for all blocks: the vector itself, and six of it."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.emb = Embedding(config)
        self.linear = nn.Linear(config.embed_dim, 6 * config.embed_dim)

    def forward(self, t: Tensor, resolution: Tensor | None, aspect_ratio: Tensor | None) -> tuple[Tensor, Tensor]:
        """As ``Embedding`` -> float32 [B, 6, D], [B, D]."""
        c = self.emb(t, resolution, aspect_ratio)
        return self.linear(F.silu(c)).float().unflatten(1, (6, c.shape[1])), c.float()


class PixArt(nn.Module):
    """The network: (x, t, context, context_mask, ...) -> prediction of ``out_channels`` channels, of x's size."""

    positions: Tensor

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        dim, patch = config.embed_dim, config.patch_size
        self.pos_embed = uvit.PatchEmbed(config.channels, dim, patch)
        spacing = config.sample_size // patch / (config.image_size // patch) / config.interpolation_scale
        positions = dit.sincos_positions(dim, config.image_size // patch, spacing)
        self.register_buffer("positions", torch.from_numpy(positions), persistent=False)
        self.adaln_single = SharedModulation(config)
        if config.projected:
            gelu = partial(F.gelu, approximate="tanh")
            self.caption_projection = TwoLinears(config.context_dim, dim, gelu)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = nn.Linear(dim, patch**2 * config.out_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        context_mask: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> Tensor:
        """Predict eps and, where learned, the variance.

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            context: [B, context_length, context_dim], of the text.
            context_mask: [B, context_length], 1 where a vector counts and 0 where not.
            resolution: [B, 2], height and width in pixels; for a network that is told them.
            aspect_ratio: [B, 1], height over width; likewise.
        """
        h = (self.pos_embed(x) + self.positions).to(self.dtype)
        six, c = self.adaln_single(t, resolution, aspect_ratio)
        text = (self.caption_projection(context) if self.config.projected else context).to(self.dtype)
        bias = ((1.0 - context_mask.float()) * MASKED_OUT)[:, None, None]
        for block in self.transformer_blocks:
            h = block(h, text, bias, six)
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)
        config = self.config
        return unpatchify(
            self.proj_out(norm(h) * (1 + scale) + shift), config.out_channels, config.image_size, config.patch_size
        )


def _recognises(shapes: Shapes) -> bool:
    return set(shapes) >= OWN_KEYS


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[PixArtConfig, list[str]]:
    given = {DIFFUSERS_NAMES.get(name, name): value for name, value in given.items()}
    check_fixed(given, FIXED, KIND)
    read = _read_sizes(shapes)
    if given.get("out_channels") is None:  # "as in_channels", which the weights say
        given.pop("out_channels", None)
    if given.get("context_dim") is None:  # a text that is not projected
        given.pop("context_dim", None)
    if given.pop("use_additional_conditions", None) not in (None, read["told_size"]):
        raise CheckpointError(
            f"use_additional_conditions is {not read['told_size']} in the given configuration, but the weights "
            f"{'have' if read['told_size'] else 'lack'} {SIZE_EMBEDDER}",
            "correct the configuration, or leave that entry out: it is read off the weights",
        )
    stored, patch = given.pop("sample_size", None), read["patch_size"]
    image_size = side_of(given.pop("image_size", None) or stored, patch)
    sample_size = image_size if stored is None else positive(stored, "sample_size", patch)
    heads, notes = settled_heads(given, read, PUBLISHED_HEADS, KIND)
    length, of_length = _context_length(given.get("context_length"), read["told_size"], sample_size)
    config = PixArtConfig(
        image_size=image_size,
        sample_size=sample_size,
        heads=heads,
        context_length=length,
        interpolation_scale=_scale(given.get("interpolation_scale"), sample_size),
        **read,
    )
    masked = "masked layers = all projections of both attentions, and both linears of the MLPs"
    return config, [*notes, *of_length, f"{masked}: {BY_ANALOGY}"]


def _read_sizes(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes say. Raises CheckpointError."""
    embed_dim, channels, patch_size, _ = shape_of(shapes, "pos_embed.proj.weight", 4, KIND)
    told_size = SIZE_EMBEDDER in shapes
    if embed_dim % 4 or (told_size and embed_dim % 3):
        raise CheckpointError(
            f"pos_embed.proj.weight has {embed_dim} rows; expected a multiple of {12 if told_size else 4}",
            "check that this is a PixArt",
        )
    text = CAPTION if CAPTION in shapes else f"{BLOCKS}.0.attn2.to_k.weight"
    return {
        "patch_size": patch_size,
        "channels": channels,
        "out_channels": out_channels_of(shapes, patch_size),
        "embed_dim": embed_dim,
        "depth": depth_of(shapes),
        "mlp_hidden": shape_of(shapes, f"{BLOCKS}.0.ff.net.0.proj.weight", 2, KIND)[0],
        "context_dim": shape_of(shapes, text, 2, KIND)[1],
        "told_size": told_size,
        "projected": CAPTION in shapes,
        "attention_bias": f"{BLOCKS}.0.attn1.to_q.bias" in shapes,
    }


def _context_length(given: Any, told_size: bool, sample_size: int) -> tuple[int, list[str]]:
    if given is not None:
        return positive(given, "context_length"), []
    sigma = sample_size >= 128 and not told_size
    length, name = (SIGMA_LENGTH, "PixArt-Sigma") if sigma else (ALPHA_LENGTH, "PixArt-alpha")
    other = f"; PixArt-Sigma has {SIGMA_LENGTH}" if not sigma and not told_size else ""
    return length, [f"context_length = {length}: not in the weights; that of {name}{other}; say --context-length"]


def _scale(given: Any, sample_size: int) -> float:
    if given is None:
        return float(max(sample_size // 64, 1))
    if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
        raise CheckpointError(f"interpolation_scale is {given!r} in the given configuration; expected a number above 0")
    return float(given)


def _recipe(config: PixArtConfig) -> Recipe:
    schedule = {"name": "discrete", "betas": "linear", "time_shift": -1.0}
    return Recipe(schedule, "eps", None, None, "dpm-solver++")


def _positions(config: PixArtConfig, layer: str) -> int:
    if layer.startswith("adaln_single"):
        return 1
    if layer.startswith("caption_projection") or layer.endswith(("attn2.to_k", "attn2.to_v")):
        return config.context_length
    return config.patches


FAMILY = Family(
    name="pixart",
    sparse_layers=(*BLOCK_LAYERS, *CROSS_LAYERS),
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=PixArtConfig.from_dict,
    network=PixArt,
    recipe=_recipe,
    positions=_positions,
    float32_layers=("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out"),
    settings=frozenset(DIFFUSERS_NAMES)
    | {field.name for field in dataclasses.fields(PixArtConfig)}
    | {"attention_head_dim"},
    class_names=frozenset({"PixArtTransformer2DModel", "Transformer2DModel:ada_norm_single"}),
)
