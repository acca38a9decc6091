"""DiT: a transformer over the patches of an image, told time and class through its normalisations.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (arXiv 2212.09748). Module names are
those of Meta's checkpoints (facebookresearch/DiT), so a state dict loads as it is. ``dit_diffusers.py`` has the same
network under diffusers' names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import CheckpointError, OptionError

from . import uvit
from .base import Family, Recipe, Shapes, SquareConfig
from .parts import timestep_embedding, unpatchify
from .reading import PublishedHeads, settle, shape_of
from .uvit import LATENT_CHANNELS

TIME_DIM = 256  # of the sinusoidal embedding, in every published size
EPS = 1e-6  # of the normalisations, which have no weights

# DiT-S, B, L, XL: embed_dim -> (depth, heads).
PUBLISHED_SIZES = {384: (12, 6), 768: (12, 12), 1024: (24, 16), 1152: (28, 16)}
PUBLISHED_HEADS: PublishedHeads = {dim: heads for dim, (_, heads) in PUBLISHED_SIZES.items()}
PUBLISHED_NAMES = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
# Rows of a label table whose last one is known to stand for "no label": ten classes and it, a thousand and it.
ROWS_WITH_NULL = (11, 1001)
VAE_FACTOR = 8  # pixels of an image to one latent, along a side

AUTHORS_NAMES = {
    "input_size": "image_size",
    "in_channels": "channels",
    "hidden_size": "embed_dim",
    "num_heads": "heads",
}

SCHEDULE = {"name": "discrete", "betas": "linear", "time_shift": -1.0}  # 1e-4..0.02, the network's time is 0..999
LEARNED_VARIANCE = (
    "it was trained with the variances that it predicts beside eps, which are not used here; ddpm with fixed ones "
    "is another sampler than the authors'. Use ddim or one of the DPM-Solvers, which need no variance"
)
OR_SIT = "family = dit: SiT has the same keys and is trained to flow matching; if this is one, its pictures are wrong"
BY_ANALOGY = "by analogy with U-ViT, since SparseDM published no DiT; say others with --mask-layers"


@dataclasses.dataclass(frozen=True)
class DiTConfig(SquareConfig):
    """Everything that fixes a DiT's graph.

    ``image_size`` is the side of what is denoised, latents or pixels. ``out_channels`` is that of the prediction:
    ``channels``, or twice that with learned variances; 0 becomes ``channels``. ``num_classes`` counts every row of the
    label table; where ``null_row``, the last one stands for "no label". ``guidance_channels``: None is all.
    """

    embed_dim: int
    depth: int
    heads: int
    num_classes: int
    out_channels: int = 0
    mlp_hidden: int = 0
    null_row: bool = False
    guidance_channels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_channels", self.out_channels or self.channels)
        object.__setattr__(self, "mlp_hidden", self.mlp_hidden or 4 * self.embed_dim)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """See ``FamilyConfig``."""
        return class_condition(self.num_classes)

    @property
    def guided_channels(self) -> int | None:
        """See ``FamilyConfig``."""
        return self.guidance_channels


def sincos_positions(dim: int, side: int, spacing: float = 1.0) -> np.ndarray:
    """The fixed embedding of a square of patches: float32 [1, side * side, dim], dim a multiple of 4.

    The first half of the channels says the column, the second the row; of each half, sines come before cosines.
    """
    quarter = dim // 4
    angles = np.arange(side)[:, None] * spacing / 10000 ** (np.arange(quarter) / quarter)  # [side, dim / 4]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table = np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, axis=0)], axis=1)
    return table[None].astype(np.float32)


def modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then what time and class make of it; float32. h: [B, L, D], the others [B, 1, D]."""
    return norm(h) * (1 + scale) + shift


def norm(h: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm without weights, in float32."""
    return F.layer_norm(h.float(), h.shape[-1:], eps=eps)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then two linears."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t: [B], in the network's own units -> [B, D]."""
        return self.mlp(timestep_embedding(t, TIME_DIM))


class LabelEmbedding(nn.Module):
    """A row of the table for each class."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        """y: [B] int64 -> [B, D]."""
        return self.embedding_table(y)


class Mlp(uvit.Mlp):
    """Two linears with a tanh-GELU between them."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block whose norms are shifted and scaled, and whose branches are gated, by time and class."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.attn = uvit.Attention(dim, config.heads, qkv_bias=True)
        self.mlp = Mlp(dim, config.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h: [B, L, D], c: [B, D] -> [B, L, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).float()[:, None].chunk(6, dim=-1)
        h = h + (gate1 * self.attn(modulated(h, shift1, scale1))).to(h.dtype)
        return h + (gate2 * self.mlp(modulated(h, shift2, scale2))).to(h.dtype)


class FinalLayer(nn.Module):
    """The head: modulated as the blocks are, then a linear to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h: [B, L, D], c: [B, D] -> [B, L, p * p * out_channels]."""
        shift, scale = self.adaLN_modulation(c).float()[:, None].chunk(2, dim=-1)
        return self.linear(modulated(h, shift, scale))


class DiT(nn.Module):
    """The network: (x, t, y) -> prediction of ``out_channels`` channels, of x's height and width."""

    pos_embed: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        dim = config.embed_dim
        self.x_embedder = uvit.PatchEmbed(config.channels, dim, config.patch_size)
        self.t_embedder = TimeEmbedding(dim)
        self.y_embedder = LabelEmbedding(config.num_classes, dim)
        positions = sincos_positions(dim, config.image_size // config.patch_size)
        self.register_buffer("pos_embed", torch.from_numpy(positions))  # fixed: no optimizer may have it
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict eps and, where learned, the variance.

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            y: [B] int64 labels.
        """
        c = self.t_embedder(t) + self.y_embedder(y)
        h = (self.x_embedder(x) + self.pos_embed).to(self.dtype)
        for block in self.blocks:
            h = block(h, c)
        config = self.config
        return unpatchify(self.final_layer(h, c), config.out_channels, config.image_size, config.patch_size)

    def _initialise(self) -> None:
        """The paper's: every block begins as the identity, and the head as zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _recognises(shapes: Shapes) -> bool:
    return {
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "y_embedder.embedding_table.weight",
        "blocks.0.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    } <= set(shapes)


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[DiTConfig, list[str]]:
    given = {AUTHORS_NAMES.get(name, name): value for name, value in given.items()}
    read = _read_sizes(shapes)
    line, notes = given.get("args"), []
    if isinstance(line, Mapping):
        notes += _take_command_line(line, read, given)
    rows = read["num_classes"]
    null_row, more = null_row_of(given, rows)
    heads, of_heads = settle(given, read, PUBLISHED_HEADS, "DiT")
    config = DiTConfig(heads=heads, null_row=null_row, guidance_channels=guidance_of(given, read["channels"]), **read)
    masked = f"masked layers = attn.qkv, attn.proj, mlp.fc1, mlp.fc2: {BY_ANALOGY}"
    return config, [*notes, *more, *of_heads, masked, *([] if given.get("family") == FAMILY.name else [OR_SIT])]


def _read_sizes(shapes: Shapes) -> dict[str, Any]:
    """Everything of ``DiTConfig`` that the shapes say. Raises CheckpointError."""
    embed_dim, channels, patch_size, _ = shape_of(shapes, "x_embedder.proj.weight", 4, "DiT")
    patches = shape_of(shapes, "pos_embed", 3, "DiT")[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(
            f"pos_embed has {patches} positions: not a square image",
            "only square images are offered; check that this is a DiT's checkpoint",
        )
    depth = len({match[1] for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))})
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "channels": channels,
        "embed_dim": width_of(embed_dim),
        "depth": depth,
        "mlp_hidden": shape_of(shapes, "blocks.0.mlp.fc1.weight", 2, "DiT")[0],
        "num_classes": shape_of(shapes, "y_embedder.embedding_table.weight", 2, "DiT")[0],
        "out_channels": out_channels_of(shapes, "final_layer.linear.weight", patch_size, channels),
    }


def width_of(embed_dim: int) -> int:
    """A width of which sines and cosines of row and column are a quarter each. Raises CheckpointError."""
    if embed_dim % 4:
        raise CheckpointError(f"embed_dim is {embed_dim}; expected a multiple of 4, for the embedding of positions")
    return embed_dim


def out_channels_of(shapes: Shapes, head: str, patch: int, channels: int) -> int:
    """Channels of the prediction: x's, or twice that with learned variances. Raises CheckpointError."""
    rows = shape_of(shapes, head, 2, "DiT")[0]
    if rows not in (patch**2 * channels, 2 * patch**2 * channels):
        raise CheckpointError(
            f"{head} has {rows} rows; expected {patch**2 * channels}, patches of {patch}x{patch} and {channels} "
            "channels, or twice that with learned variances",
            "check that the checkpoint is complete",
        )
    return rows // patch**2


def null_row_of(given: dict[str, Any], rows: int) -> tuple[bool, list[str]]:
    """Whether the last row of the label table stands for "no label", and a note where that was assumed.

    ``num_classes`` may count the rows, or the classes without it; it is taken out of ``given``.
    """
    classes = given.pop("num_classes", None)
    if classes not in (None, rows, rows - 1):
        raise CheckpointError(
            f"num_classes is {classes!r} in the given configuration, but the weights have {rows} rows of labels",
            "correct the configuration, or leave that entry out: it is read off the weights",
        )
    if classes == rows - 1 or given.pop("null_row", False):
        return True, []
    if rows in ROWS_WITH_NULL:
        return True, []
    return False, [
        f"null class = none: that the last of {rows} rows stands for no label is known of {ROWS_WITH_NULL[0]} and "
        f"{ROWS_WITH_NULL[1]} rows alone; guidance needs one: say it with --null-class"
    ]


def guidance_of(given: Mapping[str, Any], channels: int) -> int | None:
    """How many channels guidance acts on; None is all. Raises OptionError."""
    wanted = given.get("guidance_channels")
    if wanted is None or wanted == "all":
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= channels:
        raise OptionError(
            f"guidance_channels is {wanted!r}; expected 'all', or a whole number from 1 to {channels}",
            "Meta's own sampling guides 3 of the 4 channels, diffusers' all",
        )
    return wanted


def _take_command_line(line: Mapping[str, Any], read: Mapping[str, Any], given: dict[str, Any]) -> list[str]:
    """Put what the command line of Meta's training says of the model into ``given``; notes where it does not fit.

    Its image_size is of pixels, and its num_classes counts classes. Weights that are not what it says count.
    """
    notes = []
    name = re.fullmatch(r"DiT-(S|B|L|XL)/(\d+)", str(line.get("model")))
    if name:
        dim = PUBLISHED_NAMES[name[1]]
        if (dim, PUBLISHED_SIZES[dim][0], int(name[2])) == (read["embed_dim"], read["depth"], read["patch_size"]):
            given.setdefault("heads", PUBLISHED_HEADS[dim])
        else:
            notes.append(f"args: the file's command line says {name[0]}, which the weights are not; the weights count")
    pixels = line.get("image_size")
    if pixels is not None and pixels not in (read["image_size"], VAE_FACTOR * read["image_size"]):
        notes.append(
            f"args: the file's command line says images of {pixels} pixels, and the weights are for "
            f"{read['image_size']} a side; the weights count"
        )
    if line.get("num_classes") in (read["num_classes"], read["num_classes"] - 1):
        given.setdefault("num_classes", line["num_classes"])
    return notes


def recipe(config: DiTConfig) -> Recipe:
    """The authors' own: linear betas, times 0..999, latents of Stable Diffusion's VAE (scale 0.18215)."""
    pixels = None if config.channels == LATENT_CHANNELS else (-1.0, 1.0)
    excluded = {"ddpm": LEARNED_VARIANCE} if config.out_channels > config.channels else {}
    null_class = config.num_classes - 1 if config.null_row else None
    return Recipe(SCHEDULE, "eps", pixels, null_class, "ddim", excluded)


def positions_of(config: DiTConfig, layer: str) -> int:
    """See ``Family``: what makes something of time and class is applied once, all else to each patch."""
    once = ("t_embedder", "y_embedder", "adaLN_modulation", "norm1", "proj_out_1")
    return 1 if any(part in once for part in layer.split(".")) else config.patches


def _remarks(config: DiTConfig, state: Mapping[str, np.ndarray]) -> list[str]:
    """Whether the stored positions are the published formula's."""
    formula = sincos_positions(config.embed_dim, config.image_size // config.patch_size)
    furthest = float(np.abs(state["pos_embed"] - formula).max())
    if furthest < 1e-3:  # fp16 rounds them by 2.4e-4
        return []
    return [f"pos_embed is not the published formula's (they differ by up to {furthest:.3g}); the stored one is used"]


SETTINGS = frozenset({field.name for field in dataclasses.fields(DiTConfig)} - {"null_row"} | {"mlp_ratio"})

FAMILY = Family(
    name="dit",
    sparse_layers=uvit.SPARSE_LAYERS,
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=DiTConfig.from_dict,
    network=DiT,
    recipe=recipe,
    positions=positions_of,
    float32_layers=("x_embedder.*", "t_embedder.*", "final_layer.*"),
    settings=SETTINGS | frozenset(AUTHORS_NAMES),
    remarks=_remarks,
)
