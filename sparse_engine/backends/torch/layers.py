"""A layer that products are chosen for: what it computes, and the products that it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import QuantisedWeight, rounded
from .convolutions import DenseConvolution, PatchProduct, Window
from .packing import as_matrix
from .products import CusparseltProduct, CutlassProduct, DenseProduct
from .quantised import NAMES, CusparseltCodesProduct, DenseCodesProduct, DequantisedProduct

DENSE, CUSPARSELT, CUTLASS = "dense", "cusparselt", "cutlass"
SPARSE = (CUSPARSELT, CUTLASS)
Makers = Mapping[str, Callable[[], nn.Module]]


class Layer(Protocol):
    """A linear layer or a convolution, its weight [N, K] and its bias [N] on the device."""

    @property
    def bias(self) -> Tensor | None:
        """[N]."""
        ...

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes in and comes out."""
        ...

    @property
    def weights(self) -> str:
        """In words, what the weights are: a timing is valid for others that are the same."""
        ...

    def dense(self) -> nn.Module:
        """The product that runs everywhere."""
        ...

    def others(self) -> Makers:
        """Name -> what makes another product, or raises."""
        ...

    @property
    def only_where_timed(self) -> bool:
        """Whether it stays dense where nothing is timed; else the first of ``others`` that can be made is taken."""
        ...

    def sample(self, rows: int) -> Tensor:
        """A random input of so many rows."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """The matrix [M, K] that the weight is multiplied with, for such an input."""
        ...

    def expected(self, x: Tensor) -> Tensor:
        """What the layer gives for such an input, in float32."""
        ...


class _OverRows:
    """What linear layers have in common: their input is the matrix."""

    @property
    def only_where_timed(self) -> bool:
        """See ``Layer``."""
        return False

    def sample(self: Layer, rows: int) -> Tensor:
        """See ``Layer``."""
        return torch.randn(rows, self.shape[1], device=self.device, dtype=self.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """See ``Layer``."""
        return x


class _Float:
    """What there is to say of a weight that stands in the type which it is computed in."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        """See ``Layer``."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """See ``Layer``."""
        return self.weight.dtype


@dataclass(frozen=True)
class FloatLayer(_Float, _OverRows):
    """A 2:4 layer in a float type."""

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """See ``Layer``."""
        return self.weight.shape

    @property
    def weights(self) -> str:
        """See ``Layer``."""
        return str(self.weight.dtype)

    def dense(self) -> nn.Module:
        """See ``Layer``."""
        return DenseProduct(self.weight, self.bias)

    def others(self) -> Makers:
        """See ``Layer``."""
        return {
            CUSPARSELT: lambda: CusparseltProduct(self.weight, self.bias),
            CUTLASS: lambda: CutlassProduct(self.weight, self.bias),
        }

    def expected(self, x: Tensor) -> Tensor:
        """See ``Layer``."""
        return F.linear(x.float(), self.weight.float(), _float(self.bias))


@dataclass(frozen=True)
class ConvolutionLayer(_Float):
    """A 2:4 convolution in a float type, its weight [N, C, kh, kw], over maps of one size [H, W].

    Its sparse products are those of a linear layer over its window's patches, which are laid out first: an
    implicit product of matrices where torch.compile makes that one kernel. What is dense is PyTorch's own, which has no
    such copy to make, so that dense stays wherever nothing is timed.
    """

    weight: Tensor
    bias: Tensor | None
    window: Window
    size: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """See ``Layer``."""
        return torch.Size((len(self.weight), self.weight[0].numel()))

    @property
    def weights(self) -> str:
        """See ``Layer``."""
        return f"{self.weight.dtype} {self.window.words} over {'x'.join(map(str, self.size))}"

    @property
    def places(self) -> int:
        """Of a map that it gives."""
        return math.prod(self.window.output(self.size))

    @property
    def only_where_timed(self) -> bool:
        """See ``Layer``."""
        return True

    def dense(self) -> nn.Module:
        """See ``Layer``."""
        return DenseConvolution(self.weight, self.bias, self.window)

    def others(self) -> Makers:
        """See ``Layer``."""
        return {
            CUSPARSELT: lambda: PatchProduct(CusparseltProduct(self._matrix(), self.bias), self.window),
            CUTLASS: lambda: PatchProduct(CutlassProduct(self._matrix(), self.bias), self.window),
        }

    def sample(self, rows: int) -> Tensor:
        """See ``Layer``. Channels last, as compiled networks have it and as both kinds of product like it best."""
        shape = (max(1, rows // self.places), self.weight.shape[1], *self.size)
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last)

    def rows(self, x: Tensor) -> Tensor:
        """See ``Layer``."""
        return self.window.patches(x).flatten(0, 2)

    def expected(self, x: Tensor) -> Tensor:
        """See ``Layer``."""
        return self.window.convolve(x.float(), self.weight.float(), _float(self.bias))

    def _matrix(self) -> Tensor:
        return as_matrix(self.weight).contiguous()


@dataclass(frozen=True)
class QuantisedLayer(_OverRows):
    """A layer in 8 bits, between layers of type ``dtype``; ``sparse`` where its codes are 2:4."""

    weight: QuantisedWeight
    bias: Tensor | None
    dtype: torch.dtype
    sparse: bool

    @property
    def shape(self) -> torch.Size:
        """See ``Layer``."""
        return self.weight.codes.shape

    @property
    def device(self) -> torch.device:
        """See ``Layer``."""
        return self.weight.codes.device

    @property
    def weights(self) -> str:
        """See ``Layer``."""
        return f"{self.dtype} {'2:4' if self.sparse else 'dense'} {self.weight.codes.dtype}"

    def dense(self) -> nn.Module:
        """See ``Layer``."""
        return DequantisedProduct(self.weight, self.bias, self.dtype)

    def others(self) -> Makers:
        """See ``Layer``."""
        made: dict[str, Callable[[], nn.Module]] = {}
        if self.sparse:
            made[CUSPARSELT] = lambda: CusparseltCodesProduct(self.weight, self.bias, self.dtype)
        made[f"{DENSE} {NAMES[self.weight.codes.dtype]}"] = lambda: DenseCodesProduct(
            self.weight, self.bias, self.dtype
        )
        return made

    def expected(self, x: Tensor) -> Tensor:
        """See ``Layer``."""
        values = rounded(x, self.weight.input_scale, self.weight.codes.dtype, torch.float32)
        return F.linear(values, self.weight.dequantised(torch.float32), _float(self.bias))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
