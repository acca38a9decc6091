"""The products that a 2:4 linear layer can be: dense, cuSPARSELt's and CUTLASS's, as PyTorch has them.

Each is a module ``forward(x [M, K]) -> [M, N]`` made from a weight [N, K] (2:4 along K) and a bias [N]. Making one
raises ``ObstacleError`` where it cannot run, or what the library says when it refuses a first call: PyTorch's CUTLASS
kernel runs on compute capability 8.x alone. The message is what the layer report says. PyTorch takes a bias into both
sparse products, and no activation or residual: those stay with what torch.compile makes of their neighbours.

The private operators of PyTorch are called here and nowhere else. Their use in torch/sparse/semi_structured.py is the
reference, and for the algorithm search aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp. They are wrapped as
operators of our own, which torch.compile leaves alone.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

AMPERE = (8, 0)
ROWS = {2: 8, 1: 16}  # bytes of a value -> the libraries take rows of inputs in this multiple
SPARSE_TYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
Algorithm = tuple[int, int, int]  # cuSPARSELt's algorithm, split of K (1: none), and how the parts are summed
DEFAULT_ALGORITHM: Algorithm = (0, 1, -1)
MOST_WORDS = 200  # characters


class ObstacleError(Exception):
    """A product cannot run; the message says why."""


def first_line(error: Exception) -> str:
    """The first line that says what went wrong, and no more than a reader reads: what follows is a library's dump."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    line = lines[1] if len(lines) > 1 and lines[0].endswith("raised:") else lines[0]  # "backend='inductor' raised:"
    return line if len(line) <= MOST_WORDS else f"{line[:MOST_WORDS]}..."


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
        self.outputs, self.algorithm = weight.shape[0], algorithm
        self.register_buffer("packed", pack_for_cusparselt(weight))
        self.register_buffer("bias", bias)
        self(weight.new_zeros(1, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return cusparselt_linear(x, self.packed, self.bias, self.outputs, *self.algorithm)

    def search(self, x: Tensor) -> Algorithm:
        """The algorithm that cuSPARSELt's own search, by timing, finds fastest for inputs such as x."""
        return search_algorithm(x, self.packed, self.bias)  # type: ignore[arg-type]


class CutlassProduct(nn.Module):
    """CUTLASS's product. Its result is column by column, and is transposed by a copy."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        _check(weight, SparseSemiStructuredTensorCUTLASS)
        try_cutlass(weight.device, weight.dtype)
        packed, meta = pack_for_cutlass(weight)
        self.outputs = weight.shape[0]
        self.register_buffer("packed", packed)
        self.register_buffer("meta", meta)
        self.register_buffer("bias", bias)
        self(weight.new_zeros(1, weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        return cutlass_linear(x, self.packed, self.meta, self.bias, self.outputs)


def pack_for_cusparselt(weight: Tensor) -> Tensor:
    """cuSPARSELt's layout of a weight [N, K], values and positions in one. Raises ObstacleError where it takes none."""
    _check(weight, SparseSemiStructuredTensorCUSPARSELT)
    if not torch.backends.cusparselt.is_available():
        raise ObstacleError(f"torch {torch.__version__} is built without cuSPARSELt")
    return torch._cslt_compress(weight.contiguous())


def search_algorithm(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Algorithm:
    """cuSPARSELt's search, by timing, for inputs such as x; arguments as ``cusparselt_linear``."""
    columns = _padded(x).t()
    module = getattr(torch._C, "_cusparselt", None)
    if hasattr(module, "mm_search"):
        algorithm, split_k, mode, *_ = module.mm_search(packed, columns, bias, alpha, out_dtype, True)  # type: ignore[union-attr]
        return int(algorithm), int(split_k), int(mode)
    found = torch._cslt_sparse_mm_search(
        packed, columns, bias=bias, alpha=alpha, out_dtype=out_dtype, transpose_result=True
    )
    return int(found), *DEFAULT_ALGORITHM[1:]


def pack_for_cutlass(weight: Tensor) -> tuple[Tensor, Tensor]:
    """CUTLASS's layout: kept values [N, K/2], and positions int16 [N, K/16] in the order its threads load them."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    return packed, meta


def try_cutlass(device: torch.device, dtype: torch.dtype) -> None:
    """Run CUTLASS's smallest product. Raises what PyTorch says where the GPU is not one of its kernel's."""
    zeros = torch.zeros(128, 128, dtype=dtype, device=device)
    packed, meta = pack_for_cutlass(zeros)
    cutlass_linear(zeros, packed, meta, None, len(zeros))


def _check(weight: Tensor, kind: Any) -> None:
    """Raise ObstacleError where a kind of PyTorch's semi-structured tensors does not take a weight."""
    check_capability(weight.device, AMPERE, "2:4")
    obstacle = shape_obstacle(weight.shape, weight.dtype, kind)
    if obstacle:
        raise ObstacleError(obstacle)


def check_capability(device: torch.device, needed: tuple[int, int], what: str) -> None:
    """Raise ObstacleError where a device is no GPU, or one too old for ``what``."""
    if device.type != "cuda":
        raise ObstacleError(f"no CUDA: the engine runs on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < needed:
        found, wanted = (".".join(map(str, each)) for each in (capability, needed))
        raise ObstacleError(f"the GPU has compute capability {found}; {what} needs {wanted} or newer")


def shape_obstacle(shape: torch.Size, dtype: torch.dtype, kind: Any) -> str | None:
    """Why PyTorch's ``kind`` of semi-structured tensor does not take a weight [N, K]; None where it does."""
    limits = kind._DTYPE_SHAPE_CONSTRAINTS.get(dtype) if dtype in SPARSE_TYPES else None
    if limits is None:
        return f"no 2:4 product in {str(dtype).removeprefix('torch.')}: build with --precision fp16 or bf16"
    outputs, inputs = shape
    if outputs % limits.sparse_min_rows or inputs % limits.sparse_min_cols:
        return (
            f"{outputs} outputs and {inputs} inputs; {kind.BACKEND} takes multiples of {limits.sparse_min_rows} and "
            f"{limits.sparse_min_cols}"
        )
    return None


def _padded(x: Tensor) -> Tensor:
    """x [M, K], contiguous, with rows of zeros up to a multiple of ``ROWS``."""
    missing = -len(x) % ROWS.get(x.itemsize, 8)
    if not missing:
        return x.contiguous()
    if x.dtype == torch.float8_e4m3fn:  # which not every PyTorch pads; its 0 is the byte 0
        return F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype)
    return F.pad(x, (0, 0, 0, missing))


def split_arguments(split_k: int, mode: int) -> dict[str, Any]:
    """How ``torch._cslt_sparse_mm`` is told of a split: PyTorch 2.7 had a flag, later ones number the ways to sum."""
    if split_k == 1:
        return {}
    if "split_k_mode" in _sparse_mm_arguments():
        return {"split_k": split_k, "split_k_mode": mode}
    return {"split_k": split_k, "split_k_one_kernel": bool(mode)}


@functools.cache
def _sparse_mm_arguments() -> frozenset[str]:
    return frozenset(argument.name for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments)


@torch.library.custom_op("sparse_engine::cusparselt_linear", mutates_args=())
def cusparselt_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha[N] * X W^T + bias, as ``out_dtype``, with a weight of ``pack_for_cusparselt``.

    8-bit weights take an alpha, float32, and a type; others neither.
    """
    options: dict[str, Any] = split_arguments(split_k, split_k_mode)
    if out_dtype is not None:
        options |= {"alpha": alpha, "out_dtype": out_dtype}
    columns = _padded(x).t()
    y = torch._cslt_sparse_mm(packed, columns, bias=bias, transpose_result=True, alg_id=algorithm, **options)
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
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=out_dtype or x.dtype)


@cutlass_linear.register_fake
def _(x: Tensor, packed: Tensor, meta: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
