"""What all U-Nets are made of: residual blocks that are told the time, maps halved and doubled, attention over a map.

Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020 (arXiv 2006.11239), appendix B; the variant
whose time scales and shifts: Nichol and Dhariwal 2021 (arXiv 2102.09672). Written for export: each convolution becomes
one Conv node, its padding an attribute, asymmetric padding too; doubling becomes one Resize; a group norm
InstanceNormalization over [B, groups, elements], in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError

from .base import FamilyConfig
from .diffusers_parts import SelfAttention, positive


class PlainNorm(nn.Module):
    """Group norm without weights, in float32."""

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> float32 [B, C, H, W]."""
        return F.group_norm(x.float(), self.groups, eps=self.eps)


class Residual(nn.Module, ABC):
    """Norm, SiLU, convolution, twice, with the time between them, and what came in.

    Subclasses name the parts as their checkpoints do. The time is added before the second norm, or (``scaled``) scales
    and shifts what comes out of it: h (1 + scale) + shift.
    """

    norm1: nn.Module
    norm2: nn.Module
    conv1: nn.Module
    conv2: nn.Module
    scaled: bool

    @abstractmethod
    def of_time(self, emb: Tensor) -> Tensor:
        """SiLU of the time's embedding [B, E] -> [B, C'], or [B, 2C'] of scale and shift."""

    @abstractmethod
    def beside(self, x: Tensor) -> Tensor:
        """What came in, [B, C, H, W], in as many channels as go out."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, E], of the time -> [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.of_time(F.silu(emb))[:, :, None, None]
        if self.scaled:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        return self.beside(x) + self.conv2(F.silu(h))


class Resnet(Residual):
    """A residual block under diffusers' names."""

    def __init__(self, inputs: int, outputs: int, time_dim: int, groups: int, eps: float, scaled: bool = False) -> None:
        super().__init__()
        self.scaled = scaled
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, 2 * outputs if scaled else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def of_time(self, emb: Tensor) -> Tensor:
        """See ``Residual``."""
        return self.time_emb_proj(emb)

    def beside(self, x: Tensor) -> Tensor:
        """See ``Residual``."""
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class Downsample(nn.Module):
    """A map halved by a convolution. ``padding`` 1 is one place on each side, 0 one below and one on the right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)], with padding 0 the floors."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """A map doubled by repeating its places, then convolved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> [B, C, *size]; size is twice that of x, or one less on either side."""
        return self.conv(doubled(x)[:, :, : size[0], : size[1]] if size != doubled_size(x) else doubled(x))


def doubled(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W], each place four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def doubled_size(x: Tensor) -> tuple[int, int]:
    """Twice the height and the width of a map."""
    return 2 * x.shape[2], 2 * x.shape[3]


class MapAttention(SelfAttention):
    """Attention of a map's places to each other, and what came in, under diffusers' names; ``groups`` 0 is no norm."""

    def __init__(self, channels: int, heads: int, inner: int, groups: int, eps: float) -> None:
        super().__init__(channels, heads, inner=inner)
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return x + as_map(super().forward(as_tokens(self.group_norm(x))), x)


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, HW, C]."""
    return x.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, HW, C] -> [B, C, H, W], of the height and width of ``like``."""
    return tokens.transpose(1, 2).reshape(-1, tokens.shape[2], *like.shape[2:])


def size_of(given: Any, multiple: int = 1) -> tuple[int, int]:
    """Height and width of what is denoised: of a number, a square's. Raises CheckpointError where nothing says it."""
    if given is None:
        raise CheckpointError(
            "the size of the image cannot be read off the weights, and no configuration beside them says it",
            "say --image-size N (in latents, of a latent model), or keep config.json beside the weights",
        )
    pair = tuple(given) if isinstance(given, list | tuple) else (given, given)
    if len(pair) != 2:
        raise CheckpointError(f"the size of the image is {given!r}; expected a number, or height and width")
    for side in pair:
        positive(side, "the size of the image")
        if side % multiple:
            raise CheckpointError(
                f"the size of the image is {given!r}; expected a multiple of {multiple}: the network halves it, and "
                "joins what it doubles again to what it had",
                f"take {-(-side // multiple) * multiple}",
            )
    return pair


def positions_with(network: Callable[[Any], nn.Module]) -> Callable[[Any, str], int]:
    """``Family.positions`` of a network: how many places each layer is applied to, of one run without data."""

    @cache
    def counted(config: Any) -> dict[str, int]:
        return _counted(network, config)

    return lambda config, layer: counted(config).get(layer, 1)


def _counted(network: Callable[[Any], nn.Module], config: FamilyConfig) -> dict[str, int]:
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[name] = output.numel() // (output.shape[1] if isinstance(module, nn.Conv2d) else output.shape[-1])

        return count

    with torch.device("meta"), torch.no_grad():
        made = network(config)
        for name, module in made.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(hook(name))
        told = {each.name: torch.zeros(1, *each.shape, dtype=getattr(torch, each.dtype)) for each in config.conditions}
        made(torch.zeros(1, *config.data_shape), torch.zeros(1), **told)
    return counts
