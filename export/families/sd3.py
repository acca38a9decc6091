"""SD3 and SD3.5: transformers over the tokens of an image and of its text at once, trained by flow matching.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (MMDiT), ICML 2024
(arXiv 2403.03206), as diffusers stores it (``SD3Transformer2DModel``). A text is 77 vectors of CLIP and 256 of T5, one
after the other and without a mask, and one pooled vector of CLIP. SD3.5 normalises queries and keys, and its medium
size attends to the image a second time in the first blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError

from .base import Family, Recipe, Shapes, SquareConfig
from .diffusers_parts import (
    BLOCKS,
    BY_ANALOGY,
    FeedForward,
    NumberEmbedder,
    RMSNorm,
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

KIND = "SD3"
CONTEXT_LENGTH = 333  # 77 vectors of CLIP and 256 of T5
PUBLISHED_HEADS: PublishedHeads = {1536: 24, 2432: 38}  # medium, and 3.5's large
SHIFT = 3.0  # of the published models' schedule
DIFFUSERS_NAMES = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "num_attention_heads": "heads",
    "num_layers": "depth",
    "joint_attention_dim": "context_dim",
    "pooled_projection_dim": "pooled_dim",
    "caption_projection_dim": "embed_dim",
    "pos_embed_max_size": "table_side",
    "dual_attention_layers": "dual_layers",
}
TEXT = "time_text_embed.text_embedder.linear_1.weight"
OWN_KEYS = frozenset({TEXT, "context_embedder.weight", "pos_embed.pos_embed", f"{BLOCKS}.0.attn.add_k_proj.weight"})


@dataclasses.dataclass(frozen=True)
class SD3Config(SquareConfig):
    """Everything that fixes an SD3's graph.

    ``table_side`` is the side of the stored table of positions, of which the middle is used; ``dual_layers`` are the
    blocks that attend to the image a second time.
    """

    out_channels: int
    embed_dim: int
    depth: int
    heads: int
    mlp_hidden: int
    context_dim: int
    pooled_dim: int
    table_side: int
    context_length: int = CONTEXT_LENGTH
    qk_norm: bool = False
    dual_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_layers", tuple(self.dual_layers))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The text's vectors and its pooled one; what none is has to be given."""
        return (
            Condition("context", (self.context_length, self.context_dim), null=None),
            Condition("pooled", (self.pooled_dim,), null=None),
        )


class Patches(nn.Module):
    """Image to tokens, with the middle of a table of positions, which is cut to it once weights are loaded."""

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        self.proj = nn.Conv2d(config.channels, config.embed_dim, config.patch_size, stride=config.patch_size)
        self.register_buffer("pos_embed", torch.zeros(1, config.table_side**2, config.embed_dim))
        self.register_load_state_dict_post_hook(_cut_table)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, (H/p)(W/p), D]."""
        return self.proj(x).flatten(2).transpose(1, 2) + middle(self.pos_embed, self.side)


def middle(table: Tensor, side: int) -> Tensor:
    """The middle of a square table: [1, s*s, D] -> [1, side*side, D]."""
    whole = math.isqrt(table.shape[1])
    if whole == side:
        return table
    first = (whole - side) // 2
    square = table.unflatten(1, (whole, whole))
    return square[:, first : first + side, first : first + side].flatten(1, 2)


def _cut_table(patches: Patches, incompatible: Any) -> None:
    patches.pos_embed = middle(patches.pos_embed, patches.side).clone()  # the table of SD3.5 is 0.9 GB


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, out of time and pooled text."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> float32 [B, 1, D] each."""
        return self.linear(F.silu(c)).float()[:, None].chunk(self.parts, dim=-1)


class NormedAttention(SelfAttention):
    """Multi-head attention of the image to itself, queries and keys normed where SD3.5 does."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__(config.embed_dim, config.heads)
        self.norm_q, self.norm_k = _head_norm(config), _head_norm(config)

    def split_image(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> q, k, v [B, H, L, D/H]."""
        q, k, v = super().split_image(x)
        return self.norm_q(q), self.norm_k(k), v


def _head_norm(config: SD3Config) -> nn.Module:
    return RMSNorm(config.embed_dim // config.heads) if config.qk_norm else nn.Identity()


class JointAttention(NormedAttention):
    """Multi-head attention over image and text, each with projections of its own; the image comes first."""

    def __init__(self, config: SD3Config, last: bool) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = _head_norm(config), _head_norm(config)
        self.to_add_out = None if last else nn.Linear(dim, dim)

    def both(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, P, D], [B, L, D] -> the same; nothing of the text in the last block, where no one reads it."""
        q, k, v = self.split_image(x)
        added = (self.split(part(context)) for part in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        text_q, text_k, text_v = added
        q = torch.cat([q, self.norm_added_q(text_q)], dim=2)
        k = torch.cat([k, self.norm_added_k(text_k)], dim=2)
        seen = self.merged(self.attend(q, k, torch.cat([v, text_v], dim=2)))
        image, text = seen[:, : x.shape[1]], seen[:, x.shape[1] :]
        return self.to_out[0](image), None if self.to_add_out is None else self.to_add_out(text)


class Block(nn.Module):
    """A block of both streams."""

    def __init__(self, config: SD3Config, index: int) -> None:
        super().__init__()
        dim, hidden, last = config.embed_dim, config.mlp_hidden, index == config.depth - 1
        dual = index in config.dual_layers
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(config, last)
        self.attn2 = NormedAttention(config) if dual else None
        self.ff = FeedForward(dim, hidden)
        self.ff_context = None if last else FeedForward(dim, hidden)

    def forward(self, h: Tensor, context: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """h: [B, P, D] of the image; context: [B, L, D]; c: [B, D] of time and pooled text -> (h, context)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = self.norm1(c)
        of_text = self.norm1_context(c)
        if self.ff_context is None:
            text_scale, text_shift = of_text  # the other way round here
        else:
            text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = of_text
        image, text = self.attn.both(modulated(h, shift, scale), modulated(context, text_shift, text_scale))
        out = h + (gate * image).to(h.dtype)
        if self.attn2 is not None:
            shift, scale, gate = second
            out = out + (gate * self.attn2(modulated(h, shift, scale))).to(h.dtype)
        h = out + (mlp_gate * self.ff(modulated(out, mlp_shift, mlp_scale))).to(h.dtype)
        if self.ff_context is None or text is None:
            return h, context
        context = context + (text_gate * text).to(h.dtype)
        hidden = self.ff_context(modulated(context, text_mlp_shift, text_mlp_scale))
        return h, context + (text_mlp_gate * hidden).to(h.dtype)


class TimeAndText(nn.Module):
    """Time and pooled text as one vector."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = NumberEmbedder(config.embed_dim)
        self.text_embedder = TwoLinears(config.pooled_dim, config.embed_dim)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """t: [B]; pooled: [B, pooled_dim] -> [B, D]."""
        return self.timestep_embedder(t) + self.text_embedder(pooled)


class SD3(nn.Module):
    """The network: (x, t, context, pooled) -> prediction of ``out_channels`` channels, of x's height and width."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        dim = config.embed_dim
        self.pos_embed = Patches(config)
        self.time_text_embed = TimeAndText(config)
        self.context_embedder = nn.Linear(config.context_dim, dim)
        self.transformer_blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Predict noise - x0.

        Args:
            x: [B, C, H, W].
            t: [B], 1000 times the share of noise.
            context: [B, context_length, context_dim], of the text.
            pooled: [B, pooled_dim], of the text as a whole.
        """
        h, text = self.pos_embed(x).to(self.dtype), self.context_embedder(context).to(self.dtype)
        c = self.time_text_embed(t, pooled)
        for block in self.transformer_blocks:
            h, text = block(h, text, c)
        scale, shift = self.norm_out(c)
        config = self.config
        return unpatchify(
            self.proj_out(norm(h) * (1 + scale) + shift), config.out_channels, config.image_size, config.patch_size
        )


def _recognises(shapes: Shapes) -> bool:
    return set(shapes) >= OWN_KEYS


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[SD3Config, list[str]]:
    given = {DIFFUSERS_NAMES.get(name, name): value for name, value in given.items()}
    read = _read_sizes(shapes)
    if given.get("out_channels") is None:  # "as in_channels", which the weights say
        given.pop("out_channels", None)
    _settle_own(given, read)
    image_size = side_of(given.pop("image_size", None), read["patch_size"])
    if image_size // read["patch_size"] > read["table_side"]:
        raise CheckpointError(
            f"image_size {image_size} is {image_size // read['patch_size']} patches wide, but the weights have "
            f"positions for {read['table_side']}",
            f"take {read['table_side'] * read['patch_size']} or less, in latents",
        )
    notes, length = [], given.get("context_length")
    if length is None:
        length = CONTEXT_LENGTH
        notes.append(f"context_length = {length}: 77 vectors of CLIP and 256 of T5; without T5's say --context-length")
    heads, of_heads = settled_heads(given, read, PUBLISHED_HEADS, KIND)
    config = SD3Config(image_size=image_size, heads=heads, context_length=positive(length, "context_length"), **read)
    masked = "masked layers = all projections of attention, and both linears of the MLPs, of image and text"
    return config, [*notes, *of_heads, f"{masked}: {BY_ANALOGY}"]


def _read_sizes(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes say. Raises CheckpointError."""
    embed_dim, channels, patch_size, _ = shape_of(shapes, "pos_embed.proj.weight", 4, KIND)
    places = shape_of(shapes, "pos_embed.pos_embed", 3, KIND)[1]
    if math.isqrt(places) ** 2 != places:
        raise CheckpointError(f"pos_embed.pos_embed has {places} positions; expected a square of them")
    depth = depth_of(shapes)
    return {
        "patch_size": patch_size,
        "channels": channels,
        "out_channels": out_channels_of(shapes, patch_size),
        "embed_dim": embed_dim,
        "depth": depth,
        "mlp_hidden": shape_of(shapes, f"{BLOCKS}.0.ff.net.0.proj.weight", 2, KIND)[0],
        "context_dim": shape_of(shapes, "context_embedder.weight", 2, KIND)[1],
        "pooled_dim": shape_of(shapes, TEXT, 2, KIND)[1],
        "table_side": math.isqrt(places),
        "qk_norm": f"{BLOCKS}.0.attn.norm_q.weight" in shapes,
        "dual_layers": tuple(index for index in range(depth) if f"{BLOCKS}.{index}.attn2.to_q.weight" in shapes),
    }


def _settle_own(given: dict[str, Any], read: Mapping[str, Any]) -> None:
    """Bring what diffusers writes in another form into that of the weights. Raises CheckpointError."""
    check_fixed(given, {"qk_norm": "rms_norm"} if not isinstance(given.get("qk_norm"), bool) else {}, KIND)
    if "qk_norm" in given:
        given["qk_norm"] = bool(given["qk_norm"])
    if isinstance(given.get("dual_layers"), list | tuple):
        given["dual_layers"] = tuple(given["dual_layers"])
    else:
        given.pop("dual_layers", None)


def _recipe(config: SD3Config) -> Recipe:
    return Recipe({"name": "flow", "shift": SHIFT}, "flow", None, None, "euler-ode")


def _positions(config: SD3Config, layer: str) -> int:
    if layer.startswith(("time_text_embed", "norm_out")) or ".norm1" in layer:
        return 1
    of_text = (".add_", ".to_add_out", ".ff_context.")
    if layer == "context_embedder" or any(part in layer for part in of_text):
        return config.context_length
    return config.patches


FAMILY = Family(
    name="sd3",
    sparse_layers=(
        "*.attn.to_[qkv]",
        "*.attn.to_out.0",
        "*.attn.add_[qkv]_proj",
        "*.attn.to_add_out",
        "*.attn2.to_[qkv]",
        "*.attn2.to_out.0",
        "*.ff.net.0.proj",
        "*.ff.net.2",
        "*.ff_context.net.0.proj",
        "*.ff_context.net.2",
    ),
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=SD3Config.from_dict,
    network=SD3,
    recipe=_recipe,
    positions=_positions,
    float32_layers=("pos_embed.*", "time_text_embed.*", "context_embedder", "proj_out"),
    settings=frozenset(DIFFUSERS_NAMES)
    | {field.name for field in dataclasses.fields(SD3Config)}
    | {"attention_head_dim"},
    class_names=frozenset({"SD3Transformer2DModel"}),
)
