"""Convolutions as products of matrices: each output is a row of the input's patches times the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Where a convolution looks: rows and columns of its kernel, of its stride and of zeros on each side."""

    kernel: Pair
    stride: Pair
    padding: Pair

    @property
    def words(self) -> str:
        """It in words: a timing is valid for others that are the same."""
        kernel, stride, padding = ("x".join(map(str, each)) for each in (self.kernel, self.stride, self.padding))
        return f"convolution {kernel} stride {stride} padding {padding}"

    def output(self, size: Pair) -> Pair:
        """The size of a map that it gives, of one [H, W]."""
        height, width = (
            (whole + 2 * padding - kernel) // stride + 1
            for whole, kernel, stride, padding in zip(size, self.kernel, self.stride, self.padding, strict=True)
        )
        return height, width

    def patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H', W', kh kw C]: what each output sees, as ``packing.as_matrix`` has the weight."""
        height, width = self.output((x.shape[2], x.shape[3]))
        (rows, columns), (down, right) = self.padding, self.stride
        padded = F.pad(x, (columns, columns, rows, rows)).movedim(1, -1)
        taps = [
            padded[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * right + 1 : right]
            for i in range(self.kernel[0])
            for j in range(self.kernel[1])
        ]
        return torch.cat(taps, dim=-1)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W'], by PyTorch's own convolution."""
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class DenseConvolution(nn.Module):
    """cuDNN's convolution on a GPU, oneDNN's on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None, window: Window) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W']."""
        return self.window.convolve(x, self.weight, self.bias)  # type: ignore[arg-type]


class PatchProduct(nn.Module):
    """A product [M, K] -> [M, N] over a window's patches."""

    def __init__(self, product: nn.Module, window: Window) -> None:
        super().__init__()
        self.product, self.window = product, window

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W']."""
        patches = self.window.patches(x)
        y: Tensor = self.product(patches.flatten(0, 2))
        return y.unflatten(0, patches.shape[:3]).movedim(-1, 1)
