"""The unconditional and class-conditional U-Nets that diffusers stores (``UNet2DModel``), and those of ermongroup.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239), as huggingface/diffusers
stores it (google/ddpm-*, and what its training scripts save) and as ermongroup/ddim does (``model-N.ckpt``), whose
network PNDM and Diff-Pruning have, too: one network under two sets of names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import CheckpointError, OptionError

from .base import Family, Layout, Recipe, Shapes
from .diffusers_parts import BY_ANALOGY, check_fixed, today_named
from .reading import agree
from .unet_parts import MapAttention, positions_with, size_of
from .unet_stages import (
    DEFAULTS,
    DIFFUSERS_NAMES,
    FLOAT32_LAYERS,
    OWN_KEYS,
    SPARSE_LAYERS,
    UNet,
    UNetSizes,
    check_groups,
    own_names,
    read_sizes,
    settled,
)

KIND = "UNet2DModel"
NAMES = {**DIFFUSERS_NAMES, "attention_head_dim": "head_dim", "attn_norm_num_groups": "mid_groups"}
FIXED = {"downsample_type": "conv", "upsample_type": "conv", "mid_block_type": "UNetMidBlock2D"}
BLOCKS = {"": False, "Attn": True}
HEAD_DIM = 8  # diffusers' default
# ermongroup's networks, of which the weights say nothing else. Attention is at maps of 16 x 16 in all published ones.
ERMONGROUP = {
    "groups": 32,
    "eps": 1e-6,
    "padding": 0,
    "cos_first": False,
    "freq_shift": 1,
    "center": False,
    "head_dim": 0,
}
ERMONGROUP_KEYS = frozenset({"temb.dense.0.weight", "down.0.block.0.conv1.weight", "mid.attn_1.q.weight"})
ATTENDED = 16  # side of the maps with attention
ERMONGROUP_NAMES = (
    (r"temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"norm_out\.", "conv_norm_out."),
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
)
ERMONGROUP_PARTS = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}


@dataclasses.dataclass(frozen=True)
class UNet2DConfig(UNetSizes):
    """Everything that fixes the graph.

    ``head_dim`` is the width of a head of attention, 0 for one head of all channels; ``mid_groups`` the groups of the
    norm before the middle's attention, 0 where it has none.
    """

    head_dim: int
    mid_groups: int

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The label of a class-conditional network."""
        return class_condition(self.num_classes)


class UNet2D(UNet):
    """The network: (x, t, y) -> prediction of x's shape."""

    config: UNet2DConfig

    def attention(self, level: int, depth: int, middle: bool) -> nn.Module:
        """See ``UNet``."""
        config, width = self.config, self.config.widths[level]
        head_dim = config.head_dim or width
        heads = width // head_dim
        groups = config.mid_groups if middle else config.groups
        return MapAttention(width, heads, heads * head_dim, groups, config.eps)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict what the network was trained for (eps, x0 or v).

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            y: [B] int64 labels; None for an unconditional network.
        """
        emb = self.time_embedding(self.sinusoids(t, self.config.time_width))
        return self.predict(x, emb if y is None else emb + self.class_embedding(y))


def _recognises(shapes: Shapes) -> bool:
    own = set(shapes) >= OWN_KEYS and not any(".transformer_blocks." in key for key in shapes)
    return own or set(shapes) >= ERMONGROUP_KEYS


def _layout(shapes: Shapes) -> Layout | None:
    if set(shapes) >= ERMONGROUP_KEYS:
        return _of_ermongroup(shapes)
    return Layout({name: today_named(name) for name in shapes if ".attentions." in name})


def _of_ermongroup(shapes: Shapes) -> Layout:
    levels = len({match[1] for name in shapes if (match := re.match(r"up\.(\d+)\.", name))})
    names = {name: _own_name(name, levels) for name in shapes}
    # The projections of attention are convolutions of one place there, linears here.
    linear = {names[name]: shape[:2] for name, shape in shapes.items() if ".attn" in name and len(shape) == 4}
    attended = sorted({int(match[1]) for name in shapes if (match := re.match(r"down\.(\d+)\.attn\.", name))})
    notes = ["the layout is that of ermongroup/ddim: norms of 32 groups, one head, times 0 to 999"]
    settings: dict[str, Any] = dict(ERMONGROUP)
    if len(attended) == 1:
        settings["image_size"] = ATTENDED << attended[0]
        notes.append(
            f"image_size = {settings['image_size']}: not in the weights; attention is where the map has a side of "
            f"{ATTENDED}, as in all published ones; say --image-size"
        )
    return Layout(names, linear, settings, tuple(notes))


def _own_name(name: str, levels: int) -> str:
    for pattern, own in ERMONGROUP_NAMES:
        renamed, found = re.subn(rf"^{pattern}", own, name)
        if found:
            break
    else:
        return name
    parts = renamed.split(".")
    if parts[0] == "up_blocks":  # counted from the largest map there
        parts[1] = str(levels - 1 - int(parts[1]))
    kind = next((part for part in parts if part in ERMONGROUP_PARTS), None)
    return ".".join(ERMONGROUP_PARTS[kind].get(part, part) if kind else part for part in parts)


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[UNet2DConfig, list[str]]:
    check_fixed(given, FIXED, KIND)
    read = read_sizes(shapes, KIND)
    if given.get("heads") is not None:
        raise OptionError(
            f"heads = {given['heads']} is given, and a {KIND} has them by their width, attention_head_dim",
            "leave it out: config.json says it",
        )
    one_head = "attention_head_dim" in given and given["attention_head_dim"] is None
    given = own_names(given, NAMES, BLOCKS)
    if one_head:
        given.setdefault("head_dim", 0)
    agree(given, read)
    values, notes = settled(given, {**DEFAULTS, "head_dim": HEAD_DIM}, KIND)
    multiple = 1 << (len(read["widths"]) - 1)
    normed = "mid_block.attentions.0.group_norm.weight" in shapes
    config = UNet2DConfig(
        image_size=size_of(given.get("image_size"), multiple),
        mid_groups=given.get("mid_groups", values["groups"]) if normed else 0,
        **read,
        **values,
    )
    check_groups(config)
    _check_head_dim(config)
    masked = "masked layers = every convolution and linear of the stages, but for those of the time"
    return config, [*notes, f"{masked}: {BY_ANALOGY}"]


def _check_head_dim(config: UNet2DConfig) -> None:
    head_dim = config.head_dim
    least = min(config.widths)
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or not 0 <= head_dim <= least:
        raise CheckpointError(
            f"attention_head_dim is {head_dim!r} in the given configuration; expected null or 1 to {least} channels"
        )


def _recipe(config: UNet2DConfig) -> Recipe:
    return Recipe({"name": "discrete", "betas": "linear", "time_shift": -1.0}, "eps", (-1.0, 1.0), None, "ddim")


FAMILY = Family(
    name="unet2d",
    sparse_layers=(*SPARSE_LAYERS, "*.attentions.*.to_[qkv]", "*.attentions.*.to_out.0"),
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=UNet2DConfig.from_dict,
    network=UNet2D,
    recipe=_recipe,
    positions=positions_with(UNet2D),
    float32_layers=FLOAT32_LAYERS,
    settings=frozenset(NAMES) | {field.name for field in dataclasses.fields(UNet2DConfig)},
    class_names=frozenset({"UNet2DModel"}),
    layout=_layout,
)
