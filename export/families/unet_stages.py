"""The skeleton of diffusers' U-Nets, under its names: what ``unet2d.py`` and ``unet_condition.py`` fill in and share.

Source: huggingface/diffusers, ``UNet2DModel`` and ``UNet2DConditionModel``: stages of residual blocks, in some of them
attention after each; the map halved between stages on the way down, doubled on the way up, where each block also takes
what the way down had left.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError

from .base import Shapes, StoredConfig
from .diffusers_parts import TwoLinears, check_fixed, positive
from .parts import timestep_embedding
from .reading import shape_of
from .unet_parts import Downsample, Resnet, Upsample

TIME = "time_embedding.linear_1.weight"
OWN_KEYS = frozenset(
    {TIME, "conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.norm1.weight"}
)
DIFFUSERS_NAMES = {
    "sample_size": "image_size",
    "in_channels": "channels",
    "block_out_channels": "widths",
    "layers_per_block": "layers",
    "time_embedding_dim": "time_dim",
    "norm_num_groups": "groups",
    "norm_eps": "eps",
    "downsample_padding": "padding",
    "flip_sin_to_cos": "cos_first",
    "center_input_sample": "center",
    "resnet_time_scale_shift": "scaled",
    "num_class_embeds": "num_classes",
}
# What the weights do not say, and diffusers' default where config.json is silent.
DEFAULTS: dict[str, Any] = {
    "groups": 32,
    "eps": 1e-5,
    "padding": 1,
    "cos_first": True,
    "freq_shift": 0,
    "center": False,
}
# Options of the configuration whose other values make another network, and what each has to be.
FIXED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
    "class_embed_type": None,
}
ACTIVATIONS = ("silu", "swish")  # two names of one
TIME_FORMS = {"default": False, "scale_shift": True}
# Every convolution and linear of the stages but those of the time.
SPARSE_LAYERS = (
    "*.resnets.*.conv1",
    "*.resnets.*.conv2",
    "*.resnets.*.conv_shortcut",
    "*.downsamplers.0.conv",
    "*.upsamplers.0.conv",
)
FLOAT32_LAYERS = ("conv_in", "conv_out", "time_embedding.*")
INPAINTING = 9  # channels of latents, of a masked picture's latents, and of the mask


@dataclasses.dataclass(frozen=True)
class UNetSizes(StoredConfig):
    """What fixes the graph of any of them.

    ``image_size`` is height and width; ``widths`` the channels of each stage, the largest map first; ``layers`` the
    blocks of each on the way down, one less than on the way up; ``down_attention``, ``up_attention`` and
    ``mid_attention`` how many layers attention has after each block of a stage, 0 for none; ``time_width`` the
    sinusoids of a time. ``padding`` is that of halving convolutions (``Downsample``); ``center`` says that x is taken
    from [0, 1]; ``scaled`` that the time scales and shifts (``Residual``).
    """

    image_size: tuple[int, int]
    channels: int
    widths: tuple[int, ...]
    layers: tuple[int, ...]
    down_attention: tuple[int, ...]
    up_attention: tuple[int, ...]
    mid_attention: int
    time_width: int
    time_dim: int
    scaled: bool
    groups: int
    eps: float
    padding: int
    cos_first: bool
    freq_shift: int
    center: bool
    num_classes: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of one sample, [C, H, W]."""
        return (self.channels, *self.image_size)


class Stage(nn.Module):
    """The blocks of one size of the map, each with attention after it or none of them."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions) if attentions else None

    def block(self, index: int, h: Tensor, emb: Tensor, told: Sequence[Tensor]) -> Tensor:
        """h: [B, C, H, W]; emb: [B, E]; told: what attention is given beside the map -> [B, C', H, W]."""
        h = self.resnets[index](h, emb)
        if self.attentions is None or index >= len(self.attentions):
            return h
        return self.attentions[index](h, *told)


class UNet(nn.Module, ABC):
    """All of a U-Net but what it is told: subclasses make its attention and its embedding."""

    def __init__(self, config: UNetSizes) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.time_embedding: nn.Module = TwoLinears(config.time_width, config.time_dim)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes, config.time_dim)
        down, up, skips, now = [], [], [widths[0]], widths[0]
        for level, width in enumerate(widths):
            inputs = [now, *[width] * (config.layers[level] - 1)]
            down.append(self._stage(level, inputs, config.down_attention[level]))
            skips += [width] * config.layers[level]
            now = width
            if level != last:
                down[-1].downsamplers = nn.ModuleList([Downsample(width, config.padding)])
                skips.append(width)
        self.down_blocks = nn.ModuleList(down)
        self.mid_block = self._stage(last, [now, now], config.mid_attention, attentions=1)
        for level in range(last, -1, -1):
            width = widths[level]
            inputs = [each + skips.pop() for each in (now, *[width] * config.layers[level])]
            up.append(self._stage(level, inputs, config.up_attention[last - level]))
            now = width
            if level:
                up[-1].upsamplers = nn.ModuleList([Upsample(width)])
        self.up_blocks = nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(config.groups, now, config.eps)
        self.conv_out = nn.Conv2d(now, config.channels, 3, padding=1)

    def _stage(self, level: int, inputs: Sequence[int], depth: int, attentions: int | None = None) -> Stage:
        config, width = self.config, self.config.widths[level]
        count = (len(inputs) if attentions is None else attentions) if depth else 0
        return Stage(
            [Resnet(each, width, config.time_dim, config.groups, config.eps, config.scaled) for each in inputs],
            [self.attention(level, depth, middle=attentions is not None) for _ in range(count)],
        )

    @abstractmethod
    def attention(self, level: int, depth: int, middle: bool) -> nn.Module:
        """What follows a block of a stage, or of the middle: (h [B, C, H, W], *told) -> the same shape."""

    def sinusoids(self, numbers: Tensor, width: int) -> Tensor:
        """[B] -> [B, width], in the configuration's order and spacing."""
        config = self.config
        return timestep_embedding(numbers, width, freq_shift=config.freq_shift, cos_first=config.cos_first)

    def predict(self, x: Tensor, emb: Tensor, *told: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, E], of the time and more; told: what attention is given -> [B, C, H, W]."""
        h = self.conv_in(2 * x - 1 if self.config.center else x).to(self.dtype)
        skips = [h]
        for stage in self.down_blocks:
            for index in range(len(stage.resnets)):  # type: ignore[arg-type]
                h = stage.block(index, h, emb, told)  # type: ignore[operator]
                skips.append(h)
            if hasattr(stage, "downsamplers"):
                h = stage.downsamplers[0](h)  # type: ignore[operator, index]
                skips.append(h)
        for index in range(2):
            h = self.mid_block.block(index, h, emb, told)
        for stage in self.up_blocks:
            for index in range(len(stage.resnets)):  # type: ignore[arg-type]
                h = stage.block(index, torch.cat([h, skips.pop()], dim=1), emb, told)  # type: ignore[operator]
            if hasattr(stage, "upsamplers"):
                height, width = skips[-1].shape[2:]
                h = stage.upsamplers[0](h, (height, width))  # type: ignore[operator, index]
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def own_names(given: Mapping[str, Any], names: Mapping[str, str], blocks: Mapping[str, bool]) -> dict[str, Any]:
    """A configuration under our names, without what is null or means no other network.

    Args:
        given: diffusers' ``config.json`` and what else is said.
        names: diffusers' names -> ours.
        blocks: the kinds of stages that the family has, without "Down" and "Up" -> whether they have attention.

    Raises:
        CheckpointError: it is of a network that is not offered.
    """
    _check_channels(given)
    check_fixed(given, FIXED, "U-Nets")
    for option in ("down_block_types", "up_block_types"):
        if option in given:
            _check_blocks(given[option], option, blocks)
    if given.get("act_fn") not in (None, *ACTIVATIONS):
        raise CheckpointError(f"act_fn is {given['act_fn']!r} in the given configuration; expected 'silu'")
    own = {names.get(name, name): value for name, value in given.items() if value is not None}
    own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    if not isinstance(own.get("scaled", False), bool):
        if own["scaled"] not in TIME_FORMS:
            raise CheckpointError(
                f"resnet_time_scale_shift is {own['scaled']!r} in the given configuration; "
                f"expected {' or '.join(TIME_FORMS)}"
            )
        own["scaled"] = TIME_FORMS[own["scaled"]]
    widths = own.get("widths")
    if isinstance(widths, tuple):
        own["layers"] = of_stages(own.get("layers"), len(widths))
        depths = of_stages(own.get("depths", 1), len(widths))
        for way, name in (("Down", "down_attention"), ("Up", "up_attention")):
            types = given.get(f"{way.lower()}_block_types")
            if isinstance(types, list | tuple) and len(types) == len(widths) == len(depths):
                along = depths if way == "Down" else depths[::-1]
                attended = {_block_name(kind, way) for kind, has in blocks.items() if has}
                own[name] = tuple(depth if kind in attended else 0 for kind, depth in zip(types, along, strict=True))
    return {name: value for name, value in own.items() if value is not None}


def of_stages(value: Any, stages: int) -> Any:
    """A number for all stages, or one for each: one for each."""
    return (value,) * stages if isinstance(value, int) and not isinstance(value, bool) else value


def _check_channels(given: Mapping[str, Any]) -> None:
    inputs, outputs = given.get("in_channels"), given.get("out_channels")
    if inputs is None or outputs is None or inputs == outputs:
        return
    what = (
        "an inpainting network, which is told a picture and a mask beside its latents"
        if inputs == INPAINTING
        else (
            "a network that is told a picture beside what it denoises (inpainting, editing, upscaling), or that learns "
            "variances"
        )
    )
    raise CheckpointError(
        f"in_channels is {inputs} and out_channels is {outputs}: {what}, and is not offered; expected as many of both",
        "build from a network that denoises alone, such as the one that this was trained from",
    )


def _check_blocks(types: Any, option: str, blocks: Mapping[str, bool]) -> None:
    way = "Down" if option.startswith("down") else "Up"
    known = {_block_name(kind, way) for kind in blocks}
    for name in types if isinstance(types, list | tuple) else [types]:
        if name not in known:
            raise CheckpointError(
                f"{option} has {name!r}, which is not offered; expected {' or '.join(sorted(known))}",
                "no other stages are offered",
            )


def _block_name(kind: str, way: str) -> str:
    return f"{kind}{way}Block2D"


def read_sizes(shapes: Shapes, kind: str) -> dict[str, Any]:
    """Everything of ``UNetSizes`` that the shapes say. Raises CheckpointError."""
    channels = shape_of(shapes, "conv_in.weight", 4, kind)[1]
    _check_channels({"in_channels": channels, "out_channels": shape_of(shapes, "conv_out.weight", 4, kind)[0]})
    down = _stages(shapes, "down_blocks")
    widths = tuple(shape_of(shapes, f"{stage}.resnets.0.conv1.weight", 4, kind)[0] for stage in down)
    time_dim, time_width = shape_of(shapes, TIME, 2, kind)
    rows = shape_of(shapes, f"{down[0]}.resnets.0.time_emb_proj.weight", 2, kind)[0]
    return {
        "channels": channels,
        "widths": widths,
        "layers": tuple(_count(shapes, rf"{stage}\.resnets\.(\d+)\.") for stage in down),
        "down_attention": tuple(_attention(shapes, stage) for stage in down),
        "up_attention": tuple(_attention(shapes, stage) for stage in _stages(shapes, "up_blocks")),
        "mid_attention": _attention(shapes, "mid_block"),
        "time_width": time_width,
        "time_dim": time_dim,
        "scaled": rows == 2 * widths[0],
        "num_classes": shapes["class_embedding.weight"][0] if "class_embedding.weight" in shapes else 0,
    }


def _stages(shapes: Shapes, way: str) -> list[str]:
    return [f"{way}.{level}" for level in range(_count(shapes, rf"{way}\.(\d+)\.resnets\."))]


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _attention(shapes: Shapes, stage: str) -> int:
    if not any(key.startswith(f"{stage}.attentions.") for key in shapes):
        return 0
    return _count(shapes, rf"{stage}\.attentions\.0\.transformer_blocks\.(\d+)\.") or 1


def settled(given: Mapping[str, Any], defaults: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], list[str]]:
    """What the weights do not say: as given, else diffusers' default, said aloud. Returns (values, notes).

    Raises:
        CheckpointError: no configuration of diffusers' is there at all, or a value that is none.
    """
    missing = [name for name in defaults if name not in given]
    if missing and "_class_name" not in given:
        raise CheckpointError(
            f"{', '.join(missing)}: the weights of a {kind} do not say them, and no config.json of diffusers does",
            "keep config.json beside the weights; a training script's network has it from save_pretrained",
        )
    values = {name: given.get(name, default) for name, default in defaults.items()}
    positive(values["groups"], "norm_num_groups")
    for name, kinds in (("eps", (int, float)), ("freq_shift", (int, float))):
        if isinstance(values[name], bool) or not isinstance(values[name], kinds) or not values[name] >= 0:
            raise CheckpointError(f"{name} is {values[name]!r} in the given configuration; expected a number from 0")
    for name in ("cos_first", "center"):
        if not isinstance(values[name], bool):
            raise CheckpointError(f"{name} is {values[name]!r} in the given configuration; expected true or false")
    if values["padding"] not in (0, 1):
        raise CheckpointError(
            f"downsample_padding is {values['padding']!r} in the given configuration; expected 0 or 1"
        )
    said = ", ".join(f"{name} = {values[name]}" for name in missing)
    return values, [f"{said}: not in config.json; diffusers' defaults"] if said else []


def check_groups(config: UNetSizes) -> None:
    """Raise CheckpointError unless the groups of the norms divide the channels of every stage."""
    for width in config.widths:
        if width % config.groups:
            raise CheckpointError(
                f"norm_num_groups is {config.groups}, which does not divide the {width} channels of a stage",
                "correct the configuration: it is not of these weights",
            )
