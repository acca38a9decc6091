"""A small network with what a U-Net has: convolutions of every kind, group norms, time, attention over places."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.backends.base import StepGraph
from sparse_engine.export.masks import magnitude_mask
from sparse_engine.export.precision import lower
from sparse_engine.export.step_graph import export_step_graph

WIDTH = 32
ENDS = ("first", "last")  # dense, and float32
SPARSE = ("block.conv1", "block.conv2", "block.skip", "block.time", "down", "mid.qkv", "mid.out", "up")
CONVOLUTIONS = ("block.conv1", "block.conv2", "block.skip", "down", "mid.qkv", "mid.out", "up")


@dataclass(frozen=True)
class Config:
    """Of ``Network``."""

    data_shape = (3, 8, 8)
    conditions = ()
    guided_channels = None


class Block(nn.Module):
    """Norm, SiLU, convolution, twice, with time between; and what came in, at another width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, WIDTH), nn.GroupNorm(8, 2 * WIDTH)
        self.conv1 = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)
        self.skip = nn.Conv2d(WIDTH, 2 * WIDTH, 1)
        self.time = nn.Linear(16, 4 * WIDTH)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """[B, C, H, W], [B, 16] -> [B, 2 C, H, W]."""
        scale, shift = self.time(told)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        y: Tensor = self.conv2(F.silu(h)) + self.skip(x)
        return y


class Middle(nn.Module):
    """Attention over the places of a map, by 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, 2 * WIDTH)
        self.qkv, self.out = nn.Conv2d(2 * WIDTH, 6 * WIDTH, 1), nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype)
        y: Tensor = x + self.out((weights @ v).transpose(1, 2).unflatten(2, x.shape[2:]))
        return y


class Network(nn.Module):
    """Down, middle, up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(2 * WIDTH, 3, 3, padding=1)
        self.block, self.mid = Block(), Middle()
        self.down, self.up = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, stride=2), nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> the same."""
        told = torch.sin(t[:, None] * torch.arange(1, 17))
        h = self.mid(self.down(F.pad(self.block(self.first(x), told), (0, 1, 0, 1))))
        y: Tensor = self.last(self.up(F.interpolate(h, scale_factor=2.0, mode="nearest")))
        return y


def network() -> Network:
    """Random weights; those of ``SPARSE`` are 2:4."""
    torch.manual_seed(0)
    made = Network().eval().requires_grad_(False)
    for name in SPARSE:
        weight = made.get_submodule(name).weight
        kept, _ = magnitude_mask(weight.numpy())  # type: ignore[operator]
        weight.mul_(torch.from_numpy(kept))  # type: ignore[operator]
    return made


@functools.cache
def graph_of(precision: str) -> StepGraph:
    """Its step graph, with its weights."""
    state = {name: value.numpy() for name, value in network().state_dict().items()}
    graph = export_step_graph(lower(network(), ENDS, precision), Config())
    return StepGraph(graph.proto, graph.weights, graph.layers, state)
