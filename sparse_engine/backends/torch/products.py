"""The products that a 2:4 linear layer can be: dense, cuSPARSELt's and CUTLASS's, as PyTorch has them.

Each is a module ``forward(x [M, K]) -> [M, N]`` made from a weight [N, K] (2:4 along K) and a bias [N]. Making one
raises ``ObstacleError`` where it cannot run, or what the library says when it refuses a first call: PyTorch's CUTLASS
kernel runs on compute capability 8.x alone. The message is what the layer report says. PyTorch takes a bias into both
sparse products, and no activation or residual: those stay with what torch.compile makes of their neighbours.

The private operators of PyTorch are called here and nowhere else. Their use in torch/sparse/semi_structured.py is the
reference, and for the algorithm search aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp. They are wrapped as
operators of our own, which torch.compile leaves alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

AMPERE = (8, 0)
ROWS = 8  # both libraries take 16-bit inputs by rows of this multiple
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
Algorithm = tuple[int, int, int]  # cuSPARSELt's algorithm, split of K (1: none), and how the parts are summed
DEFAULT_ALGORITHM: Algorithm = (0, 1, -1)


class ObstacleError(Exception):
    """A product cannot run; the message says why."""


class DenseProduct(nn.Module):
    """cuBLASLt's product on a GPU, oneDNN's on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class CusparseltProduct(nn.Module):
    """cuSPARSELt's product, which writes its result row by row: no transpose follows it.

    Args:
        weight, bias: of the layer.
        algorithm: one that ``search`` found for the number of rows that will come.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, algorithm: Algorithm = DEFAULT_ALGORITHM) -> None:
        super().__init__()
        _check(weight, SparseSemiStructuredTensorCUSPARSELT)
        if not torch.backends.cusparselt.is_available():
            raise ObstacleError(f"torch {torch.__version__} is built without cuSPARSELt")
        self.outputs, self.algorithm = weight.shape[0], algorithm
        self.register_buffer("packed", torch._cslt_compress(weight.contiguous()))
        self.register_buffer("bias", bias)
        self(weight.new_zeros(ROWS, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return cusparselt_linear(x, self.packed, self.bias, self.outputs, *self.algorithm)

    def search(self, x: Tensor) -> Algorithm:
        """The algorithm that cuSPARSELt's own search, by timing, finds fastest for inputs such as x."""
        columns = _padded(x).t()
        module = getattr(torch._C, "_cusparselt", None)
        if hasattr(module, "mm_search"):
            algorithm, split_k, mode, *_ = module.mm_search(self.packed, columns, self.bias, None, None, True)  # type: ignore[union-attr]
            return int(algorithm), int(split_k), int(mode)
        found = torch._cslt_sparse_mm_search(self.packed, columns, bias=self.bias, transpose_result=True)  # type: ignore[arg-type]
        return int(found), *DEFAULT_ALGORITHM[1:]


class CutlassProduct(nn.Module):
    """CUTLASS's product. Its result is column by column, and is transposed by a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        _check(weight, SparseSemiStructuredTensorCUTLASS)
        packed, meta = pack_for_cutlass(weight)
        self.outputs = weight.shape[0]
        self.register_buffer("packed", packed)
        self.register_buffer("meta", meta)
        self.register_buffer("bias", bias)
        self(weight.new_zeros(ROWS, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return cutlass_linear(x, self.packed, self.meta, self.bias, self.outputs)


def pack_for_cutlass(weight: Tensor) -> tuple[Tensor, Tensor]:
    """CUTLASS's layout: kept values [N, K/2], and positions int16 [N, K/16] in the order its threads load them."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return packed, meta


def _check(weight: Tensor, kind: Any) -> None:
    """Raise ObstacleError where a kind of PyTorch's semi-structured tensors does not take a weight."""
    if weight.device.type != "cuda":
        raise ObstacleError(f"no CUDA: the engine runs on {weight.device}")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < AMPERE:
        raise ObstacleError(
            f"the GPU has compute capability {capability[0]}.{capability[1]}; 2:4 needs 8.0 (Ampere) or newer"
        )
    obstacle = shape_obstacle(weight.shape, weight.dtype, kind)
    if obstacle:
        raise ObstacleError(obstacle)


def shape_obstacle(shape: torch.Size, dtype: torch.dtype, kind: Any) -> str | None:
    """Why PyTorch's ``kind`` of semi-structured tensor does not take a weight [N, K]; None where it does."""
    if dtype not in SIXTEEN_BITS:
        return f"no 2:4 product in {str(dtype).removeprefix('torch.')}: build with --precision fp16 or bf16"
    limits = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
    outputs, inputs = shape
    if outputs % limits.sparse_min_rows or inputs % limits.sparse_min_cols:
        return (
            f"{outputs} outputs and {inputs} inputs; {kind.BACKEND} takes multiples of {limits.sparse_min_rows} and "
            f"{limits.sparse_min_cols}"
        )
    return None


def _padded(x: Tensor) -> Tensor:
    """x [M, K], contiguous, with rows of zeros up to a multiple of ``ROWS``."""
    missing = -len(x) % ROWS
    return F.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


@torch.library.custom_op("sparse_engine::cusparselt_linear", mutates_args=())
def cusparselt_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, algorithm: int, split_k: int, split_k_mode: int
) -> Tensor:
    """X W^T + bias with a weight that ``torch._cslt_compress`` packed."""
    split: Any = {} if split_k == 1 else {"split_k": split_k, "split_k_mode": split_k_mode}
    columns = _padded(x).t()
    y = torch._cslt_sparse_mm(packed, columns, bias=bias, transpose_result=True, alg_id=algorithm, **split)
    return y[: len(x)]


@torch.library.custom_op("sparse_engine::cutlass_linear", mutates_args=())
def cutlass_linear(x: Tensor, packed: Tensor, meta: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """X W^T + bias with a weight of ``pack_for_cutlass``."""
    columns = _padded(x).t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(packed, meta, columns)
    else:
        y = torch._sparse_semi_structured_addmm(bias, packed, meta, columns)
    return y.t()[: len(x)].contiguous()


@cusparselt_linear.register_fake
def _(
    x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, algorithm: int, split_k: int, split_k_mode: int
) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@cutlass_linear.register_fake
def _(x: Tensor, packed: Tensor, meta: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
