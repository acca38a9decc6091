"""A layer that products are chosen for: what it computes, and the products that it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import QuantisedWeight, rounded
from .products import CusparseltProduct, CutlassProduct, DenseProduct
from .quantised import NAMES, CusparseltCodesProduct, DenseCodesProduct, DequantisedProduct

DENSE, CUSPARSELT, CUTLASS = "dense", "cusparselt", "cutlass"
SPARSE = (CUSPARSELT, CUTLASS)
Makers = Mapping[str, Callable[[], nn.Module]]


class Layer(Protocol):
    """A linear layer, its weight [N, K] and its bias [N] on the device."""

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
        """Name -> what makes another product, or raises; the first that can be made is taken where none is timed."""
        ...

    def expected(self, x: Tensor) -> Tensor:
        """The product for x [M, K], in float32."""
        ...


@dataclass(frozen=True)
class FloatLayer:
    """A 2:4 layer in a float type."""

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """See ``Layer``."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """See ``Layer``."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """See ``Layer``."""
        return self.weight.dtype

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
class QuantisedLayer:
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
