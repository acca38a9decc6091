"""The product table: one 2:4 layer at a time, ours against ONNX Runtime's and PyTorch's dense products.

    sparse-engine bench --kernels                     # the layers of U-ViT-S, one thread and two
    sparse-engine bench --kernels --precision bf16

All contenders of a cell compute ``x @ weight.T + bias`` with the same numbers, in one process, interleaved.
GFLOP/s are dense-equivalent: 2 M N K per product, whether or not the zeros are multiplied. "Bound" is twice
the machine's measured peak of multiply-adds: pairs of rows share loads, so loads no longer bound a 2:4 kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from sparse_engine import kernels

from .timing import interleave

UVIT_S_LAYERS = ((512, 1536), (512, 512), (512, 2048), (2048, 512))  # (K, N) of qkv, proj, fc1, fc2
UVIT_S_TOKENS = (257, 1028, 4112)  # 256 patches and the time token; batches of 1, 4 and 16
Initializers = dict[str, NDArray[Any]]

LAYERS_PER_CALL = 4  # in a row, as a network runs them: waking the threads is paid once, not by each layer
OURS, ORT, TORCH = "ours", "ORT", "torch"


@dataclass(frozen=True)
class Cell:
    """One product, timed."""

    K: int
    N: int
    M: int
    threads: int
    compute: str
    tier: str
    lanes: str
    bound: float  # dense-equivalent GFLOP/s
    seconds: dict[str, list[float]]  # of each contender

    @property
    def gflops(self) -> dict[str, float]:
        """Dense-equivalent GFLOP/s of each contender's median time."""
        return {name: self._gflops(times, 0.5) for name, times in self.seconds.items()}

    def quantiles(self) -> dict[str, list[float]]:
        """Dense-equivalent GFLOP/s of each contender: 5%, median, 95%."""
        return {
            name: [round(self._gflops(times, 1 - q), 1) for q in (0.05, 0.5, 0.95)]
            for name, times in self.seconds.items()
        }

    def _gflops(self, times: list[float], quantile: float) -> float:
        return 2 * self.M * self.N * self.K / float(np.quantile(times, quantile)) / 1e9

    @property
    def fraction_of_bound(self) -> float:
        """What our kernel reaches of twice the peak of multiply-adds."""
        return self.gflops[OURS] / self.bound

    def speedup_over(self, contender: str) -> float:
        """Our median time against the contender's."""
        return self.gflops[OURS] / self.gflops[contender]


def measure(
    layers: Sequence[tuple[int, int]] = UVIT_S_LAYERS,
    tokens: Sequence[int] = UVIT_S_TOKENS,
    threads: Sequence[int] = (1, 2),
    compute: str = "fp32",
    seconds_per_cell: float = 1.0,
) -> Iterator[Cell]:
    """Time every combination; yields a cell as soon as it is measured.

    Args:
        layers: (K, N) of each layer.
        tokens: numbers of rows of x, M.
        threads: numbers of threads.
        compute: ``fp32`` or ``bf16``, the precision of the products. ONNX Runtime has no dense bf16 product on
            CPUs and is timed in fp32 then.
        seconds_per_cell: time spent on each cell, over all contenders.

    Raises:
        UnsupportedError: the machine has no bf16 tier, or the kernels are not built.
    """
    tier = kernels.best_tier("bf16" if compute == "bf16" else "fp32")
    peak = kernels.peak_flops(tier) / 1e9
    rng = np.random.default_rng(0)
    for K, N in layers:
        weight = two_of_four(rng.standard_normal((N, K)).astype(np.float32))
        bias = rng.standard_normal(N).astype(np.float32)
        for M in tokens:
            x = rng.standard_normal((M, K)).astype(np.float32)
            for count in threads:
                contenders = _contenders(x, weight, bias, compute, count)
                runs = interleave(contenders, repeats=1, seconds=seconds_per_cell).runs
                seconds = {name: (times / LAYERS_PER_CALL).ravel().tolist() for name, times in runs.items()}
                lanes = kernels.MatMul24(*kernels.pack(weight), tier=tier).lanes_for(M)
                yield Cell(K, N, M, count, compute, tier, lanes, 2 * peak * count, seconds)


def two_of_four(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of ``weight`` ``[N, K]`` that keeps the two largest of each group of four."""
    groups = weight.reshape(weight.shape[0], -1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=-1)[..., :2], 0, axis=-1)
    return groups.reshape(weight.shape)


def _contenders(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], compute: str, threads: int
) -> dict[str, Callable[[], object]]:
    contenders = {
        OURS: _onnxruntime_call(_sparse_graph(weight, bias, compute, threads), x, threads),
        ORT: _onnxruntime_call(_dense_graph(weight, bias), x, threads),
    }
    torch_call = _torch_call(x, weight, bias, compute, threads)
    if torch_call is not None:
        contenders[TORCH] = torch_call
    return contenders


def _onnxruntime_call(graph: onnx.ModelProto, x: NDArray[np.float32], threads: int) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The layers of a call are equal, and must not be merged into one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads spin while the session runs, but not into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _sparse_graph(
    weight: NDArray[np.float32], bias: NDArray[np.float32], compute: str, threads: int
) -> onnx.ModelProto:
    values, positions = kernels.pack(weight)
    N, K = weight.shape
    attributes: dict[str, Any] = {"N": N, "K": K, "compute": compute, "threads": threads}
    initializers: Initializers = {"values": values, "positions": positions, "bias": bias}
    return _graph("MatMul24", "sparse_engine", attributes, weight.shape, initializers)


def _dense_graph(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> onnx.ModelProto:
    """``Gemm`` adds the bias inside the product, which is ONNX Runtime's fastest form of the layer."""
    return _graph("Gemm", "", {}, weight.shape, {"weight": np.ascontiguousarray(weight.T), "bias": bias})


def _graph(
    op: str,
    domain: str,
    attributes: dict[str, Any],
    shape: tuple[int, ...],
    initializers: Initializers,
) -> onnx.ModelProto:
    """LAYERS_PER_CALL copies of a node, whose inputs are x and the initializers."""
    N, K = shape
    outputs = [f"y{i}" for i in range(LAYERS_PER_CALL)]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(op, ["x", *initializers], [y], domain=domain, **attributes) for y in outputs],
            "layers",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", K])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["M", N]) for y in outputs],
            [numpy_helper.from_array(array, name) for name, array in initializers.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
        ir_version=9,
    )


def _torch_call(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32], compute: str, threads: int
) -> Callable[[], object] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    operands = [torch.from_numpy(a).to(dtype) for a in (x, weight, bias)]

    def call() -> object:
        with torch.inference_mode():
            return [torch.nn.functional.linear(*operands) for _ in range(LAYERS_PER_CALL)]

    return call


def table(cells: Sequence[Cell]) -> Table:
    """The cells as a rich table."""
    contenders = list(dict.fromkeys(name for cell in cells for name in cell.gflops))
    first = cells[0]
    result = Table(
        title=f"2:4 products, {first.compute} on {first.tier}: dense-equivalent GFLOP/s (median)",
        caption=f"bound: twice the peak of multiply-adds, {first.bound / first.threads:.0f} GFLOP/s per core",
    )
    for heading in ("K", "N", "M", "threads", *contenders, f"over {ORT}", "of bound"):
        result.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        numbers = [cell.K, cell.N, cell.M, cell.threads]
        rates = [f"{cell.gflops[name]:.0f}" if name in cell.gflops else "-" for name in contenders]
        ratio, fraction = f"{cell.speedup_over(ORT):.2f}x", f"{cell.fraction_of_bound:.0%}"
        result.add_row(*map(str, numbers), *rates, ratio, fraction)
    return result


def summary(cell: Cell) -> dict[str, Any]:
    """A cell as results files hold it."""
    numbers = {key: value for key, value in asdict(cell).items() if key != "seconds"}
    return {**numbers, "bound": round(cell.bound, 1), "gflops_p5_p50_p95": cell.quantiles()}
