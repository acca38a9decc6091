"""The products that a layer in 8 bits can be: cuSPARSELt's, the dense one of codes, and that of what codes stand for.

Each is a module ``forward(x [M, K]) -> [M, N]`` in x's type, made from a ``QuantisedWeight`` and a bias [N]:

    y[m, n] = input_scale * scale[n] * sum over k of X[m, k] W[n, k] + bias[n]

where X are the codes of x. All compute this, the dequantised one too, so an engine draws the same pictures whichever is
the fastest. Making one raises ``ObstacleError`` where it cannot run, or what the library says when it refuses a first
call. cuSPARSELt takes int8 from compute capability 8.0 on; fp8 from 9.0, and from its version 0.8 on from 8.9. It takes
a scale for each output channel, and the bias is added behind it: for 8-bit inputs its type is the library's own affair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import QuantisedWeight, quantise, rescale, rounded
from .products import (
    DEFAULT_ALGORITHM,
    Algorithm,
    ObstacleError,
    check_capability,
    cusparselt_linear,
    pack_for_cusparselt,
    search_algorithm,
)

NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
# Of PyTorch's dense products: the compute capability, and what the numbers of inputs and outputs are multiples of.
DENSE_LIMITS = {torch.int8: ((7, 5), 8), torch.float8_e4m3fn: ((8, 9), 16)}
LEAST_ROWS = 32  # torch._int_mm wants more than 16


class _Quantising(nn.Module):
    """What rounds its input to codes."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.code_dtype, self.dtype = weight.codes.dtype, dtype
        self.register_buffer("input_scale", weight.input_scale)
        self.register_buffer("bias", bias)

    def quantise(self, x: Tensor) -> Tensor:
        """Values -> codes."""
        return quantise(x, self.input_scale, self.code_dtype)


class DequantisedProduct(_Quantising):
    """The dense product of the values that the codes stand for; in float32 on a CPU, where it is for correctness."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        compute = dtype if weight.codes.is_cuda else torch.float32
        super().__init__(weight, None if bias is None else bias.to(compute), dtype)
        self.register_buffer("weight", weight.dequantised(compute))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        values = rounded(x, self.input_scale, self.code_dtype, weight.dtype)
        return F.linear(values, weight, self.bias).to(self.dtype)  # type: ignore[arg-type]


class DenseCodesProduct(_Quantising):
    """cuBLASLt's product of codes: int8's adds up in int32; fp8's in the tensor cores' own precision."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        capability, multiple = DENSE_LIMITS[self.code_dtype]
        check_capability(weight.codes.device, capability, NAMES[self.code_dtype])
        outputs, inputs = weight.codes.shape
        if outputs % multiple or inputs % multiple:
            raise ObstacleError(
                f"{outputs} outputs and {inputs} inputs; {NAMES[self.code_dtype]} takes multiples of {multiple}"
            )
        self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("scale", weight.scale * weight.input_scale)
        self.register_buffer("one", torch.ones_like(weight.input_scale))
        self(torch.zeros(1, inputs, dtype=dtype, device=weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        multiply = self._int8 if self.code_dtype == torch.int8 else self._fp8
        return rescale(multiply(x), self.scale, self.bias, self.dtype)

    def _int8(self, x: Tensor) -> Tensor:
        missing = max(LEAST_ROWS - len(x), 0)
        codes = self.quantise(F.pad(x, (0, 0, 0, missing)) if missing else x)
        return torch._int_mm(codes, self.weight.t())[: len(x)]  # type: ignore[operator]

    def _fp8(self, x: Tensor) -> Tensor:
        columns, one = self.weight.t(), self.one  # type: ignore[operator]
        codes = self.quantise(x)
        return torch._scaled_mm(codes, columns, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)  # type: ignore[arg-type]


class CusparseltCodesProduct(_Quantising):
    """cuSPARSELt's product of codes with a 2:4 weight; scaled before it is rounded to ``dtype``."""

    def __init__(
        self,
        weight: QuantisedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        algorithm: Algorithm = DEFAULT_ALGORITHM,
    ) -> None:
        super().__init__(weight, bias, dtype)
        self.outputs, self.algorithm = len(weight.codes), algorithm
        self.register_buffer("packed", pack_for_cusparselt(weight.codes))
        self.register_buffer("alpha", weight.scale * weight.input_scale)
        self(torch.zeros(1, weight.codes.shape[1], dtype=dtype, device=weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        codes = self.quantise(x)
        y = cusparselt_linear(codes, self.packed, None, self.outputs, *self.algorithm, self.alpha, self.dtype)
        return y if self.bias is None else y + self.bias

    def search(self, x: Tensor) -> Algorithm:
        """The algorithm that cuSPARSELt's own search, by timing, finds fastest for inputs such as x."""
        return search_algorithm(self.quantise(x), self.packed, None, self.alpha, self.dtype)  # type: ignore[arg-type]
