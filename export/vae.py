"""An autoencoder's decoder as a graph beside the network: latents [B, C, H, W] -> pixels [B, 3, f H, f W].

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752), as
diffusers' ``AutoencoderKL``, whose module names these are. It stays float32: its activations pass float16's range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.artifact import PayloadFile
from sparse_engine.decoder import GRAPH, WEIGHTS
from sparse_engine.errors import InputError
from sparse_engine.files import check_readable

from .asset_graph import graph_files, load_float32, read_tensors
from .families.diffusers_parts import today_named
from .weight_files import read_json

CLASS = "AutoencoderKL"
BLOCK = "UpDecoderBlock2D"
EPS = 1e-6
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
PARTS = ("decoder.", "post_quant_conv.")
FIX = "name the folder of a diffusers AutoencoderKL, or a pipeline's that has one in vae/"
KNOWN_SCALES = "0.18215 for Stable Diffusion's latents and U-ViT's of ImageNet, 0.23010 for U-ViT's of MS-COCO"


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the decoder's graph; ``channels`` are those of its blocks, the smallest map first."""

    latent_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: int
    groups: int
    attention: bool
    post_quant: bool

    @property
    def upscale(self) -> int:
        """Side of the pixels over that of the latents."""
        return 2 ** (len(self.channels) - 1)


class Norm(nn.GroupNorm):
    """Group norm, means of rows first: a runtime that adds up a map in one go loses digits (1e-4 of 4 million)."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        channels, height, width = x.shape[1:]
        rows = x.reshape(-1, self.num_groups, channels // self.num_groups * height, width)
        centred = rows - _mean(rows)
        normed = (centred * torch.rsqrt(_mean(centred.square()) + self.eps)).reshape(-1, channels, height, width)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def _mean(rows: Tensor) -> Tensor:
    """[B, G, N, W] -> [B, G, 1, 1]."""
    return rows.mean(-1, keepdim=True).mean(-2, keepdim=True)


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, and what came in."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(groups, inputs), Norm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """One head over all places of a map."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.group_norm = Norm(groups, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        channels, height, width = x.shape[1:]
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        weights = ((q * channels**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return x + self.to_out[0](weights @ v).transpose(1, 2).reshape(-1, channels, height, width)


class Middle(nn.Module):
    """Two residual blocks at the smallest map, attention between them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.channels[0]
        self.resnets = nn.ModuleList(Resnet(config.groups, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(config.groups, width)] if config.attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        h = self.resnets[0](x)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Upsampler(nn.Module):
    """Each place four times, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """Residual blocks, then twice the side in all blocks but the last."""

    def __init__(self, config: DecoderConfig, inputs: int, outputs: int, upsamples: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * config.layers]
        self.resnets = nn.ModuleList(Resnet(config.groups, width, outputs) for width in widths)
        self.upsamplers = nn.ModuleList([Upsampler(outputs)] if upsamples else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H or 2 H, W or 2 W]."""
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class Body(nn.Module):
    """What the checkpoint calls ``decoder``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        widths, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, widths[max(index - 1, 0)], width, index < last) for index, width in enumerate(widths)
        )
        self.conv_norm_out = Norm(config.groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, f H, f W]."""
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Latents as the network draws them -> pixels in -1..1.

    Args:
        config: of the autoencoder.
        scale, shift: the network's latents are (z - shift) * scale.
    """

    def __init__(self, config: DecoderConfig, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.post_quant_conv = (
            nn.Conv2d(config.latent_channels, config.latent_channels, 1) if config.post_quant else nn.Identity()
        )
        self.decoder = Body(config)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 3, f H, f W]."""
        return self.decoder(self.post_quant_conv(latents / self.scale + self.shift))


@dataclass(frozen=True)
class DecoderFiles:
    """A decoder as an engine takes it.

    Attributes:
        files: of the payload.
        entry: the manifest's ``assets["vae"]``.
    """

    files: list[PayloadFile]
    entry: dict[str, Any]


def decoder_files(folder: Path, latent_shape: tuple[int, int, int], scale: float | None = None) -> DecoderFiles:
    """Make an engine's decoder of an autoencoder.

    Args:
        folder: diffusers' AutoencoderKL (``config.json`` and weights), or a pipeline's with ``vae/``.
        latent_shape: [C, H, W] of what the network draws.
        scale: what latents were multiplied by, in place of what config.json says.

    Raises:
        InputError: no such autoencoder, one of another kind or for other latents, or no scale.
        BackendError: torch cannot export it.
    """
    network, config, entry = read_decoder(folder, scale)
    if config.latent_channels != latent_shape[0]:
        raise InputError(
            f"{folder} decodes latents of {config.latent_channels} channels; the model draws {latent_shape[0]}",
            "name the autoencoder that the model was trained with",
        )
    _, height, width = latent_shape
    entry["picture"] = [config.out_channels, config.upscale * height, config.upscale * width]
    files = graph_files(network, {"latents": torch.zeros(2, *latent_shape)}, ["pixels"], GRAPH, WEIGHTS)
    return DecoderFiles(files, entry)


def read_decoder(folder: Path, scale: float | None = None) -> tuple[Decoder, DecoderConfig, dict[str, Any]]:
    """The decoder in evaluation mode, its configuration, and facts of it; arguments and errors as ``decoder_files``."""
    check_readable(folder, InputError, folder=True, missing=FIX)
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: no autoencoder of diffusers", FIX)
    given = read_json(folder / "config.json")
    if given.get("_class_name") != CLASS:
        raise InputError(f"{folder / 'config.json'} is of {given.get('_class_name')}; expected {CLASS}", FIX)
    config = _read_config(folder, given)
    scaling, shift = _scale(folder, given, scale)
    tensors, sha256 = read_tensors(folder, WEIGHT_FILES)
    network = Decoder(config, scaling, shift)
    load_float32(network, _renamed(tensors, network.state_dict()), str(folder))
    entry = {"model": CLASS, "scaling_factor": scaling, "shift_factor": shift, "weights_sha256": sha256}
    return network.eval().requires_grad_(False), config, entry


def _renamed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's own tensors, under today's names; attention was written as 1x1 convolutions once."""
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(PARTS):
            continue
        name = today_named(name)
        if name in expected and tensor.ndim == 4 and expected[name].ndim == 2:
            tensor = tensor.flatten(1)
        state[name] = tensor
    return state


def _read_config(folder: Path, given: Mapping[str, Any]) -> DecoderConfig:
    where = folder / "config.json"
    blocks = given.get("up_block_types", [BLOCK])
    if not isinstance(blocks, list) or any(block != BLOCK for block in blocks):
        raise InputError(f"{where}: up_block_types is {blocks!r}; expected {BLOCK} alone", FIX)
    if given.get("act_fn", "silu") != "silu":
        raise InputError(f"{where}: act_fn is {given['act_fn']!r}; expected silu", FIX)
    widths = given.get("block_out_channels", [64])
    numbers = {
        name: given.get(name, default)
        for name, default in (
            ("latent_channels", 4),
            ("out_channels", 3),
            ("layers_per_block", 1),
            ("norm_num_groups", 32),
        )
    }
    found = [*numbers.items(), *(("block_out_channels", width) for width in (widths or [None]))]
    for name, value in found:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{where}: {name} is {value!r}; expected a whole number above 0", FIX)
    if any(width % numbers["norm_num_groups"] for width in widths):
        raise InputError(f"{where}: norm_num_groups {numbers['norm_num_groups']} does not divide {widths}", FIX)
    return DecoderConfig(
        latent_channels=numbers["latent_channels"],
        out_channels=numbers["out_channels"],
        channels=tuple(reversed(widths)),
        layers=numbers["layers_per_block"],
        groups=numbers["norm_num_groups"],
        attention=bool(given.get("mid_block_add_attention", True)),
        post_quant=bool(given.get("use_post_quant_conv", True)),
    )


def _scale(folder: Path, given: Mapping[str, Any], scale: float | None) -> tuple[float, float]:
    """(scaling factor, shift). Raises InputError where nobody says it."""
    shift = given.get("shift_factor")
    found = given.get("scaling_factor") if scale is None else scale
    if found is None:
        raise InputError(f"{folder / 'config.json'} has no scaling_factor", f"say it with --vae-scale: {KNOWN_SCALES}")
    for name, value in (("scaling_factor", found), ("shift_factor", shift or 0.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
            raise InputError(f"{folder / 'config.json'}: {name} is {value!r}; expected a number", FIX)
    if found <= 0:
        raise InputError(f"{folder / 'config.json'}: scaling_factor is {found!r}; expected a number above 0", FIX)
    if given.get("latents_mean") is not None or given.get("latents_std") is not None:
        raise InputError(f"{folder / 'config.json'} scales each channel by its own mean and deviation", FIX)
    return float(found), float(shift or 0.0)
