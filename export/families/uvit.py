"""U-ViT: the ViT with long skip connections that SparseDM sparsifies first.

Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (arXiv 2209.12152).
Module names are those of the authors' checkpoints (baofff/U-ViT), so a state dict loads as it is; the code is
written for export: static reshapes, no data-dependent Python, a dynamic batch. ``uvit_t2i.py`` has the same network
told a text.
"""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import CheckpointError

from .base import Family, Recipe, Shapes, SquareConfig
from .parts import Attends, timestep_embedding, unpatchify
from .reading import PublishedHeads, settle, shape_of

# embed_dim (and depth, where one size alone does not settle it) -> heads, from the authors' published configurations.
PUBLISHED_HEADS: PublishedHeads = {512: 8, 768: 12, 1024: 16, (1152, 28): 16}

# embed_dim -> (schedule, sampler) of the authors' latent models, by the scripts that their README trains and evaluates
# them with: *_ldm.py for L, *_ldm_discrete.py for H. It names the latter as its script for latents.
LATENT_CHANNELS = 4
LATENT_RECIPES = {
    1024: ("vp-linear", "dpm-solver"),
    1152: ("stable-diffusion", "dpm-solver++-singlestep"),
}
OTHER_LATENTS = LATENT_RECIPES[1152]

# The layers that SparseDM masks in a U-ViT (its skip_linear, embeddings and head stay dense).
SPARSE_LAYERS = ("*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2")

# The ends of the network: next to no arithmetic, and every rounding there is one of the picture itself.
FLOAT32_LAYERS = ("patch_embed.*", "time_embed.*", "decoder_pred", "final_layer")

CONTEXT_KEY = "context_embed.weight"  # of a U-ViT that is told a text

# The names under which the authors' configuration files have the same settings.
AUTHORS_NAMES = {"img_size": "image_size", "in_chans": "channels", "num_heads": "heads", "conv": "final_conv"}


@dataclasses.dataclass(frozen=True)
class UViTSizes(SquareConfig, ABC):
    """What every U-ViT's graph is fixed by, whatever the network is told.

    ``depth`` counts the in- and out-blocks and not the middle one (12 is 6 + 1 + 6), as the authors' does.
    ``mlp_hidden`` is the width between the two linears of an MLP; 0 becomes four times ``embed_dim``, as the authors'.
    """

    embed_dim: int
    depth: int
    heads: int
    mlp_hidden: int = 0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    final_conv: bool = True
    skip: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_hidden", self.mlp_hidden or 4 * self.embed_dim)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """See ``SquareConfig``; an earlier version's manifest has the exact quotient ``mlp_ratio``."""
        if "mlp_ratio" in values:
            values = {"mlp_hidden": round(values["mlp_ratio"] * values["embed_dim"]), **values}
        return super().from_dict(values)

    @property
    @abstractmethod
    def extras(self) -> int:
        """Tokens that are not patches; they come first."""

    @property
    @abstractmethod
    def conditions(self) -> tuple[Condition, ...]:
        """See ``FamilyConfig``."""

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.extras + self.patches


@dataclasses.dataclass(frozen=True)
class UViTConfig(UViTSizes):
    """Everything that fixes the graph of a U-ViT that is told a label, or nothing.

    ``num_classes`` counts every row of the label table, the null class too; 0 is unconditional.
    """

    num_classes: int = 0

    @property
    def extras(self) -> int:
        """The time, and the label of a conditional model."""
        return 2 if self.num_classes else 1

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See ``FamilyConfig``."""
        return class_condition(self.num_classes)


class Attention(Attends):
    """Multi-head self-attention with one fused q, k, v projection."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        length, dim = x.shape[1:]
        split = (-1, length, self.heads, dim // self.heads)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))  # [B, H, L, D/H]
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(-1, length, dim))


class Mlp(nn.Module):
    """Two linears with an erf-GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; an out-block first merges its long skip."""

    def __init__(self, config: UViTSizes, skip: bool) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, config.mlp_hidden)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]; skip is the matching in-block's output."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Image to tokens by a strided convolution."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, (H/p)(W/p), D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class UViTBase(nn.Module):
    """All of a U-ViT but what it is told: from a time and an image to tokens, and from all tokens to the prediction.

    Args:
        config: sizes.
        told: what makes the modules that make tokens of what the network is told, under the checkpoint's names: made in
            their turn, for the initialisation draws in that order.
    """

    def __init__(self, config: UViTSizes, **told: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        dim, half = config.embed_dim, config.depth // 2
        self.patch_embed = PatchEmbed(config.channels, dim, config.patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
            if config.mlp_time_embed
            else nn.Identity()
        )
        for name, make in told.items():
            self.add_module(name, make())
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.in_blocks = nn.ModuleList(Block(config, skip=False) for _ in range(half))
        self.mid_block = Block(config, skip=False)
        self.out_blocks = nn.ModuleList(Block(config, skip=config.skip) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.channels)
        self.final_layer = (
            nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.final_conv else nn.Identity()
        )
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def time_token(self, t: Tensor) -> Tensor:
        """t: [B], in the network's own units -> [B, 1, D]."""
        return self.time_embed(timestep_embedding(t, self.config.embed_dim))[:, None]

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens in their order, [B, n, D] each, the patches last -> prediction [B, C, H, W]."""
        h = (torch.cat(list(tokens), dim=1) + self.pos_embed).to(self.dtype)
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        h = self.decoder_pred(self.norm(h))[:, self.config.extras :]
        return self.final_layer(unpatchify(h, self.config.channels, self.config.image_size, self.config.patch_size))


class UViT(UViTBase):
    """The network: (x, t, y) -> prediction of x's shape."""

    config: UViTConfig
    label_emb: nn.Embedding

    def __init__(self, config: UViTConfig) -> None:
        def label_emb() -> nn.Module:
            return nn.Embedding(config.num_classes, config.embed_dim)

        super().__init__(config, **({"label_emb": label_emb} if config.num_classes else {}))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what the network was trained for (eps, x0 or v).

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            y: [B] int64 labels; None for an unconditional model.
        """
        tokens = [self.time_token(t), self.patch_embed(x)]
        if self.config.num_classes:
            tokens.insert(0, self.label_emb(y)[:, None])
        return self.decode(tokens)


def _initialise(module: nn.Module) -> None:
    """The authors' initialisation: truncated normal of 0.02 for linears, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def has_uvit_keys(shapes: Shapes) -> bool:
    """Whether a state dict has what all U-ViTs have, text-to-image ones and UniDiffuser too."""
    return {"pos_embed", "patch_embed.proj.weight", "mid_block.attn.qkv.weight", "decoder_pred.weight"} <= set(shapes)


def _recognises(shapes: Shapes) -> bool:
    return has_uvit_keys(shapes) and CONTEXT_KEY not in shapes


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[UViTConfig, list[str]]:
    given = {AUTHORS_NAMES.get(name, name): value for name, value in given.items()}
    if (given.get("num_classes") or 0) < 0:  # the authors write -1 for unconditional
        given["num_classes"] = 0
    refuse_unidiffuser(shapes)
    if CONTEXT_KEY in shapes:
        raise CheckpointError(
            f"{CONTEXT_KEY} is there: this is a text-to-image U-ViT; expected one that is told no more than a label",
            "build it as --family uvit-t2i",
        )
    num_classes = shape_of(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else 0
    read = {**read_sizes(shapes, 2 if num_classes else 1), "num_classes": num_classes}
    heads, notes = settle(given, read, PUBLISHED_HEADS)
    config = UViTConfig(heads=heads, **read)
    if config.channels == LATENT_CHANNELS and config.embed_dim not in LATENT_RECIPES and "schedule" not in given:
        notes.append(
            f"schedule = {OTHER_LATENTS[0]}: taken from latent U-ViT-H (embed_dim 1152), since none of embed_dim "
            f"{config.embed_dim} is published; L (1024) is on {LATENT_RECIPES[1024][0]}; say it with --schedule"
        )
    return config, notes


def refuse_unidiffuser(shapes: Shapes) -> None:
    """UniDiffuser has a U-ViT's keys and is another network. Raises CheckpointError where it is one."""
    own = re.compile(r"(clip_img|text)_embed\.|in_blocks\.\d+\.norm3\.")
    key = next((key for key in shapes if own.match(key)), None)
    if key is not None:
        raise CheckpointError(
            f"{key} is there: this is UniDiffuser, which is not offered: it denoises an image and its text together, "
            "at a time of each, in blocks with a third norm; expected a U-ViT that denoises an image alone",
            "build from an unconditional, class-conditional or text-to-image U-ViT",
        )


def read_sizes(shapes: Shapes, extras: int, fix: str | None = None) -> dict[str, Any]:
    """Everything of ``UViTSizes`` that a U-ViT's shapes say; heads are not among it.

    Args:
        shapes: of the state dict.
        extras: tokens that are not patches.
        fix: what to do where the others are no square.

    Raises:
        CheckpointError: a key is missing, or the patches are no square.
    """
    embed_dim, channels, patch_size, _ = shape_of(shapes, "patch_embed.proj.weight", 4)
    tokens = shape_of(shapes, "pos_embed", 3)[1]
    patches = tokens - extras
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise CheckpointError(
            f"pos_embed has {tokens} positions, which leaves {patches} patches: not a square image",
            fix or "a U-ViT's image is square; check that this is an image model",
        )
    in_blocks = {int(match[1]) for key in shapes if (match := re.match(r"in_blocks\.(\d+)\.", key))}
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "channels": channels,
        "embed_dim": embed_dim,
        "depth": 2 * len(in_blocks),
        "mlp_hidden": shape_of(shapes, "mid_block.mlp.fc1.weight", 2)[0],
        "qkv_bias": "mid_block.attn.qkv.bias" in shapes,
        "mlp_time_embed": "time_embed.0.weight" in shapes,
        "final_conv": "final_layer.weight" in shapes,
        "skip": not in_blocks or "out_blocks.0.skip_linear.weight" in shapes,
    }


def _recipe(config: UViTConfig) -> Recipe:
    """The authors' own: the continuous VP-SDE for pixels, and for latents what their width was trained on."""
    null_class = config.num_classes - 1 if config.num_classes in (11, 1001) else None
    if config.channels == LATENT_CHANNELS:
        schedule, sampler = LATENT_RECIPES.get(config.embed_dim, OTHER_LATENTS)
        return Recipe(schedule, "eps", None, null_class, sampler)
    return Recipe("vp-linear", "eps", (-1.0, 1.0), null_class, "dpm-solver")


def positions(config: UViTSizes, layer: str) -> int:
    """See ``Family``."""
    if layer.startswith("time_embed"):
        return 1
    if layer.startswith("patch_embed"):
        return config.patches
    if layer.startswith("final_layer"):
        return config.image_size**2
    return config.tokens


def settings_of(config: type[UViTSizes], authors_names: Mapping[str, str]) -> frozenset[str]:
    """See ``Family.settings``: a configuration's own names, and the authors' for them."""
    return frozenset(authors_names) | {"mlp_ratio"} | {entry.name for entry in dataclasses.fields(config)}


FAMILY = Family(
    name="uvit",
    sparse_layers=SPARSE_LAYERS,
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=UViTConfig.from_dict,
    network=UViT,
    recipe=_recipe,
    positions=positions,
    float32_layers=FLOAT32_LAYERS,
    settings=settings_of(UViTConfig, AUTHORS_NAMES),
)
