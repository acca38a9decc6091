"""SparseDM's DDPM U-Net, and rosinality's and diffusion_distiller's, which are the same network.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239), as
rosinality/denoising-diffusion-pytorch writes it, which Hramchenko/diffusion_distiller and then wangkafeng/SparseDM
(``libs/unet_ddpm_sparse.py``) took over. Heads lie one after the other in ``qkv``, each with its own q, k and v, and
scores are divided by the root of all channels. Its checkpoints do not say how they were trained, and were trained in
several ways: only SparseDM's own configuration is known.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError

from .base import Family, Recipe, Shapes, StoredConfig
from .parts import Attends, sinusoids, whole_lanes
from .reading import agree, shape_of
from .unet_parts import PlainNorm, Residual, doubled, positions_with, size_of

KIND = "DDPM U-Net"
EPS = 1e-5
# What SparseDM trains on CIFAR-10 and, by its published code, on nothing else.
SPARSEDM: dict[str, Any] = {
    "width": 112,
    "multipliers": (1, 2, 2, 4, 4),
    "layers": 2,
    "attended": (3, 4),
    "affine_time": True,
    "fold": 1,
}
SPARSEDM_HEADS, SPARSEDM_SIZE = 4, 32
AUTHORS_NAMES = {
    "channel": "width",
    "channel_multiplier": "multipliers",
    "n_res_blocks": "layers",
    "attn_heads": "heads",
    "use_affine_time": "affine_time",
    "in_channel": "channels",
    "img_size": "image_size",
}
OWN_KEYS = frozenset({"down.0.weight", "time.1.weight", "mid.0.resblocks.conv1.weight", "out.2.weight"})
SAY_TRAINING = (
    "networks of this layout were trained on several schedules (SparseDM's CIFAR-10: vp-linear, eps; rosinality's: "
    "linear betas, eps; diffusion_distiller's: cosine betas, v), and the weights do not say which"
)


@dataclasses.dataclass(frozen=True)
class DDPMConfig(StoredConfig):
    """Everything that fixes the graph.

    ``image_size`` is height and width; ``width`` the channels that ``multipliers`` multiply, one for each size of the
    map; ``layers`` the blocks of each; ``attended`` the sizes with attention, 0 the largest; ``fold`` how many pixels
    of a side become channels first.
    """

    image_size: tuple[int, int]
    channels: int
    width: int
    multipliers: tuple[int, ...]
    layers: int
    attended: tuple[int, ...]
    heads: int
    groups: int
    affine_time: bool
    fold: int = 1

    def __post_init__(self) -> None:
        for name in ("image_size", "multipliers", "attended"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of one sample, [C, H, W]."""
        return (self.channels, *self.image_size)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Nothing."""
        return ()


class Block(Residual):
    """A residual block under rosinality's names."""

    def __init__(self, config: DDPMConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.scaled = config.affine_time
        self.norm1 = nn.GroupNorm(config.groups, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        scale_and_shift = 2 if self.scaled else 1
        self.time = nn.Sequential(nn.Identity(), nn.Linear(4 * config.width, scale_and_shift * outputs))
        self.norm2 = PlainNorm(config.groups, EPS) if self.scaled else nn.GroupNorm(config.groups, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def of_time(self, emb: Tensor) -> Tensor:
        """See ``Residual``."""
        return self.time(emb)

    def beside(self, x: Tensor) -> Tensor:
        """See ``Residual``."""
        return x if self.skip is None else self.skip(x)


class Attention(Attends):
    """Attention of a map's places to each other, and what came in."""

    def __init__(self, config: DDPMConfig, channels: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.GroupNorm(config.groups, channels, EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        channels, height, width = x.shape[1:]
        split = (-1, self.heads, 3 * channels // self.heads, height * width)
        q, k, v = self.qkv(self.norm(x)).reshape(split).transpose(2, 3).chunk(3, dim=-1)  # [B, H, HW, C/H]
        seen = self.attend(q, k, v, channels**-0.5).transpose(1, 2).reshape(-1, height * width, channels)
        return x + self.out(seen.transpose(1, 2).reshape(-1, channels, height, width))


class AttendedBlock(nn.Module):
    """A residual block and, at some sizes of the map, attention."""

    def __init__(self, config: DDPMConfig, inputs: int, outputs: int, attended: bool) -> None:
        super().__init__()
        self.resblocks = Block(config, inputs, outputs)
        self.attention = Attention(config, outputs) if attended else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, E], of the time -> [B, C', H, W]."""
        h = self.resblocks(x, emb)
        return h if self.attention is None else self.attention(h)


class Doubling(nn.Sequential):
    """A map doubled, then convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Identity(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return super().forward(doubled(x))


class Halving(nn.Sequential):
    """A map halved by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, stride=2, padding=1))


class Times(nn.Module):
    """Sinusoids of a time at stored frequencies, sines first."""

    inv_freq: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000) / width)
        self.register_buffer("inv_freq", torch.exp(exponents))

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, width]."""
        count = self.inv_freq.shape[0]
        return sinusoids(t, F.pad(self.inv_freq, (0, whole_lanes(count) - count)), count, cos_first=False)


class DDPMUNet(nn.Module):
    """The network: (x, t) -> prediction of x's shape."""

    def __init__(self, config: DDPMConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        width, ends = config.width, config.channels * config.fold**2
        self.time = nn.Sequential(Times(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        down: list[nn.Module] = [nn.Conv2d(ends, width, 3, padding=1)]
        skips, now, smallest = [width], width, len(config.multipliers) - 1
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.layers):
                down.append(AttendedBlock(config, now, width * multiplier, level in config.attended))
                now = width * multiplier
                skips.append(now)
            if level != smallest:
                down.append(Halving(now))
                skips.append(now)
        self.down = nn.ModuleList(down)
        self.mid = nn.ModuleList([AttendedBlock(config, now, now, attended) for attended in (True, False)])
        up: list[nn.Module] = []
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.layers + 1):
                up.append(AttendedBlock(config, now + skips.pop(), width * multiplier, level in config.attended))
                now = width * multiplier
            if level:
                up.append(Doubling(now))
        self.up = nn.ModuleList(up)
        self.out = nn.Sequential(nn.GroupNorm(config.groups, now, EPS), nn.SiLU(), nn.Conv2d(now, ends, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict what the network was trained for.

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
        """
        emb, fold = self.time(t), self.config.fold
        h = F.pixel_unshuffle(x, fold) if fold > 1 else x
        h = self.down[0](h).to(self.dtype)
        skips = [h]
        for layer in self.down[1:]:
            h = layer(h, emb) if isinstance(layer, AttendedBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb)
        for layer in self.up:
            joins = isinstance(layer, AttendedBlock)
            h = layer(torch.cat([h, skips.pop()], dim=1), emb) if joins else layer(h)
        h = self.out(h)
        return F.pixel_shuffle(h, fold) if fold > 1 else h


def _recognises(shapes: Shapes) -> bool:
    return set(shapes) >= OWN_KEYS


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[DDPMConfig, list[str]]:
    given = {AUTHORS_NAMES.get(name, name): _frozen(value) for name, value in given.items()}
    read = _read_sizes(shapes)
    if given.pop("attn_strides", None) not in (None, strides := tuple(2**level for level in read["attended"])):
        raise CheckpointError(
            f"attn_strides in the given configuration are not those of the weights, {list(strides)}",
            "correct the configuration, or leave that entry out: it is read off the weights",
        )
    agree(given, read)
    notes = []
    heads, size, groups = given.get("heads"), given.get("image_size"), given.get("groups")
    if is_sparsedm(read):
        if heads is None:
            heads = SPARSEDM_HEADS
            notes.append(f"heads = {heads}: not in the weights; those of SparseDM's U-Net")
        if size is None:
            size = SPARSEDM_SIZE
            notes.append(f"image_size = {size}: not in the weights; that of SparseDM's CIFAR-10; say --image-size")
    if heads is None:
        raise CheckpointError(
            "the number of attention heads cannot be read off the weights: rosinality's configurations have 4 or 1",
            "say it with --heads N, or in a configuration file beside the checkpoint",
        )
    if groups is None:
        groups = read["width"] // 4
        notes.append(f"groups = {groups}: not in the weights; a quarter of the {read['width']} channels")
    _check_divides(heads, "heads", read)
    _check_divides(groups, "groups", read)
    multiple = read["fold"] * 2 ** (len(read["multipliers"]) - 1)
    return DDPMConfig(image_size=size_of(size, multiple), heads=heads, groups=groups, **read), notes


def is_sparsedm(sizes: Mapping[str, Any]) -> bool:
    """Whether a network is the one that SparseDM publishes."""
    return all(sizes[name] == value for name, value in SPARSEDM.items())


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_divides(number: Any, name: str, read: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless it divides the channels of every map."""
    width = read["width"]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1 or width % number:
        raise CheckpointError(
            f"{name} is {number!r}; expected a divisor of the network's {width} channels",
            "give the number the model was trained with",
        )


def _read_sizes(shapes: Shapes) -> dict[str, Any]:
    """Everything that the shapes say. Raises CheckpointError."""
    width, ends = shape_of(shapes, "down.0.weight", 4, KIND)[:2]
    fold = math.isqrt(ends // 3) if ends % 3 == 0 else 0
    channels = 3 if fold and 3 * fold**2 == ends else ends
    runs = _blocks_of_levels(shapes)
    outputs = [shape_of(shapes, f"down.{run[0]}.resblocks.conv1.weight", 4, KIND)[0] for run in runs]
    if any(len(run) != len(runs[0]) for run in runs) or any(each % width for each in outputs):
        raise CheckpointError(
            f"the blocks between halvings are {[len(run) for run in runs]}, of {outputs} channels; expected equally "
            f"many, of multiples of the {width} of down.0",
            "check that the checkpoint is complete",
        )
    rows = shape_of(shapes, "mid.0.resblocks.time.1.weight", 2, KIND)[0]
    return {
        "channels": channels,
        "width": width,
        "multipliers": tuple(each // width for each in outputs),
        "layers": len(runs[0]),
        "attended": tuple(level for level, run in enumerate(runs) if f"down.{run[0]}.attention.qkv.weight" in shapes),
        "affine_time": rows == 2 * outputs[-1],
        "fold": fold if channels == 3 and fold else 1,
    }


def _blocks_of_levels(shapes: Shapes) -> list[list[int]]:
    """The numbers in ``down`` of the residual blocks of each size of the map, the largest first."""
    blocks = sorted(
        {int(match[1]) for key in shapes if (match := re.match(r"down\.(\d+)\.resblocks\.conv1\.weight$", key))}
    )
    runs: list[list[int]] = []
    for before, number in zip([-1, *blocks], blocks, strict=False):
        if number == before + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if not runs:
        raise CheckpointError(f"down.1.resblocks.conv1.weight is missing; a {KIND} has it", "check the checkpoint")
    return runs


def _recipe(config: DDPMConfig) -> Recipe:
    """SparseDM's own: trained from scratch on the VP-SDE, and evaluated with DPM-Solver."""
    if is_sparsedm(dataclasses.asdict(config)):
        return Recipe("vp-linear", "eps", (-1.0, 1.0), None, "dpm-solver")
    return Recipe("vp-linear", "eps", (-1.0, 1.0), None, "ddim", unknown=SAY_TRAINING)


FAMILY = Family(
    name="unet-ddpm",
    sparse_layers=("*",),
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=DDPMConfig.from_dict,
    network=DDPMUNet,
    recipe=_recipe,
    positions=positions_with(DDPMUNet),
    float32_layers=("down.0", "time.*", "out.2"),
    settings=frozenset(AUTHORS_NAMES)
    | {field.name for field in dataclasses.fields(DDPMConfig)}
    | {"attn_strides", "dropout"},
)
