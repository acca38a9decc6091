"""The product table: 2:4 layers by themselves, ours against ONNX Runtime's and PyTorch's dense products.

    sparse-engine bench --kernels                     # the layers of U-ViT-S, one thread and two
    sparse-engine bench --kernels --precision bf16

All contenders of a cell compute ``x @ weight.T + bias`` with the same numbers, in one process, interleaved; an MLP is
two such layers with a GELU between. GFLOP/s are dense-equivalent: 2 M N K per product, whether or not the zeros are
multiplied. "Bound" is twice the machine's measured peak of multiply-adds: pairs of rows share loads, so loads do not
bound a 2:4 kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from rich.table import Table

from sparse_engine import kernels
from sparse_engine.backends.onnxruntime.library import load_onnxruntime
from sparse_engine.cores import pool_size

from .timing import interleave

# Widths (K, N) of qkv, proj, fc1, fc2, and (K, H, N) of the MLP that the last two are.
UVIT_S_LAYERS: tuple[tuple[int, ...], ...] = ((512, 1536), (512, 512), (512, 2048), (2048, 512), (512, 2048, 512))
UVIT_S_TOKENS = (257, 1028, 4112)  # 256 patches and the time token; batches of 1, 4 and 16

LAYERS_PER_CALL = 4  # in a row, as a network runs them: waking the threads is paid once, not by each layer
OURS, APART, ORT, TORCH = "ours", "ours, apart", "ORT", "torch"


class Layer(NamedTuple):
    """One product: weight [N, K] and bias [N]."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Cell:
    """One product, or two in a row, timed."""

    widths: tuple[int, ...]
    M: int
    threads: int
    compute: str
    tier: str
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
        operations = 2 * self.M * sum(before * after for before, after in pairwise(self.widths))
        return operations / float(np.quantile(times, quantile)) / 1e9


def measure(
    layers: Sequence[tuple[int, ...]] = UVIT_S_LAYERS,
    tokens: Sequence[int] = UVIT_S_TOKENS,
    threads: Sequence[int] = (1, 2),
    compute: str = "fp32",
    seconds_per_cell: float = 1.0,
) -> Iterator[Cell]:
    """Time every combination; yields a cell as soon as it is measured.

    Args:
        layers: widths of each: (K, N), or (K, H, N) of two in a row with a GELU between.
        tokens: numbers of rows of x, M.
        threads: numbers of threads, on no more than the cores that this process may use.
        compute: ``fp32`` or ``bf16``, the precision of the products. ONNX Runtime has no dense bf16 product on
            CPUs and is timed in fp32 then.
        seconds_per_cell: time spent on each cell, over all contenders.

    Raises:
        UnsupportedError: the machine has no bf16 tier, or the kernels are not built.
    """
    tier = kernels.best_tier("bf16" if compute == "bf16" else "fp32")
    peak = kernels.peak_flops(tier) / 1e9
    rng = np.random.default_rng(0)
    for widths in layers:
        stack = [_random_layer(rng, depth, rows) for depth, rows in pairwise(widths)]
        for M in tokens:
            x = rng.standard_normal((M, widths[0])).astype(np.float32)
            for count in dict.fromkeys(pool_size(each) for each in threads):
                contenders = _contenders(x, stack, compute, count)
                runs = interleave(contenders, repeats=1, seconds=seconds_per_cell).runs
                seconds = {name: (times / LAYERS_PER_CALL).ravel().tolist() for name, times in runs.items()}
                yield Cell(widths, M, count, compute, tier, 2 * peak * count, seconds)


def _random_layer(rng: np.random.Generator, depth: int, rows: int) -> Layer:
    weight = two_of_four(rng.standard_normal((rows, depth)).astype(np.float32) / np.float32(depth**0.5))
    return Layer(weight, rng.standard_normal(rows).astype(np.float32))


def two_of_four(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of ``weight`` ``[N, K]`` that keeps the two largest of each group of four."""
    groups = weight.reshape(weight.shape[0], -1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), axis=-1)[..., :2], 0, axis=-1)
    return groups.reshape(weight.shape)


def _contenders(
    x: NDArray[np.float32], stack: Sequence[Layer], compute: str, threads: int
) -> dict[str, Callable[[], object]]:
    attributes = {"compute": compute, "threads": threads}
    apart = _onnxruntime_call(x, stack, _sparse_nodes(stack, attributes), threads)
    contenders = {OURS: apart}
    if len(stack) == 2:
        contenders = {OURS: _onnxruntime_call(x, stack, _mlp_nodes(stack, attributes), threads), APART: apart}
    contenders[ORT] = _onnxruntime_call(x, stack, _dense_nodes(stack), threads)
    torch_call = _torch_call(x, stack, compute, threads)
    return contenders if torch_call is None else {**contenders, TORCH: torch_call}


def _sparse_nodes(stack: Sequence[Layer], attributes: dict[str, Any]) -> list[NodeProto]:
    """One MatMul24 a layer; all but the last with a GELU."""
    nodes = []
    for index, (weight, _) in enumerate(stack):
        N, K = weight.shape
        inputs = [f"x{index}", f"values{index}", f"positions{index}", f"bias{index}"]
        activation = "gelu" if index + 1 < len(stack) else "none"
        sizes = {"N": N, "K": K, "activation": activation, "tactic": "t-lanes"}
        outputs = [f"x{index + 1}"]
        nodes.append(helper.make_node("MatMul24", inputs, outputs, domain="sparse_engine", **sizes, **attributes))
    return nodes


def _mlp_nodes(stack: Sequence[Layer], attributes: dict[str, Any]) -> list[NodeProto]:
    """Both layers in one node."""
    inputs = ["x0", *(f"{name}{index}" for index in range(2) for name in ("values", "positions", "bias"))]
    (H, K), (N, _) = (layer.weight.shape for layer in stack)
    sizes = {"N": N, "H": H, "K": K, "activation": "gelu"}
    return [helper.make_node("Mlp24", inputs, ["x2"], domain="sparse_engine", **sizes, **attributes)]


def _dense_nodes(stack: Sequence[Layer]) -> list[NodeProto]:
    """``Gemm`` adds the bias inside the product, which is ONNX Runtime's fastest form of a layer."""
    nodes = []
    for index in range(len(stack)):
        last = index + 1 == len(stack)
        output = f"x{index + 1}" if last else f"h{index}"
        nodes.append(helper.make_node("Gemm", [f"x{index}", f"weight{index}", f"bias{index}"], [output]))
        if not last:
            nodes.append(helper.make_node("Gelu", [output], [f"x{index + 1}"]))
    return nodes


def _onnxruntime_call(
    x: NDArray[np.float32], stack: Sequence[Layer], nodes: Sequence[NodeProto], threads: int
) -> Callable[[], object]:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The copies in a call are equal, and must not be merged into one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads spin while the session runs, but not into the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    model = _model(stack, nodes).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x0", x)
    shape = (len(x), stack[-1].weight.shape[0])
    outputs = [np.empty(shape, np.float32) for _ in range(LAYERS_PER_CALL)]  # as a network has them: there already
    for entry, output in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(entry.name, "cpu", 0, np.float32, shape, output.ctypes.data)

    def call() -> object:
        session.run_with_iobinding(binding)
        return outputs

    return call


def _model(stack: Sequence[Layer], nodes: Sequence[NodeProto]) -> onnx.ModelProto:
    """LAYERS_PER_CALL copies of some nodes from x0 to the last x, with those of the weights that they read."""
    copies, last = [], f"x{len(stack)}"
    for copy in range(LAYERS_PER_CALL):
        for node in nodes:
            copies.append(NodeProto())
            copies[-1].CopyFrom(node)
            made = {name: f"{name}.{copy}" for other in nodes for name in other.output}
            copies[-1].input[:] = [made.get(name, name) for name in node.input]
            copies[-1].output[:] = [made[name] for name in node.output]
    used = {name for node in nodes for name in node.input}
    constants = {name: array for name, array in _constants(stack).items() if name in used}
    shape = ["M", stack[-1].weight.shape[0]]
    return helper.make_model(
        helper.make_graph(
            copies,
            "layers",
            [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["M", stack[0].weight.shape[1]])],
            [
                helper.make_tensor_value_info(f"{last}.{copy}", TensorProto.FLOAT, shape)
                for copy in range(LAYERS_PER_CALL)
            ],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
        ir_version=9,
    )


def _constants(stack: Sequence[Layer]) -> dict[str, NDArray[Any]]:
    constants: dict[str, NDArray[Any]] = {}
    for index, (weight, bias) in enumerate(stack):
        values, positions = kernels.pack(weight)
        constants |= {f"values{index}": values, f"positions{index}": positions, f"bias{index}": bias}
        constants[f"weight{index}"] = np.ascontiguousarray(weight.T)
    return constants


def _torch_call(
    x: NDArray[np.float32], stack: Sequence[Layer], compute: str, threads: int
) -> Callable[[], object] | None:
    try:
        import torch
        from torch.nn import functional as F
    except ImportError:
        return None
    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    given = torch.from_numpy(x).to(dtype)
    layers = [tuple(torch.from_numpy(array).to(dtype) for array in layer) for layer in stack]

    def call() -> object:
        with torch.inference_mode():
            for _ in range(LAYERS_PER_CALL):
                y = F.linear(given, *layers[0])
                for weight, bias in layers[1:]:
                    y = F.linear(F.gelu(y), weight, bias)
            return y

    return call


HEADINGS = ("layer", "M", "threads")


def table(results: dict[str, Any]) -> Table:
    """The cells of a results file as a rich table."""
    result = Table(title=_title(results), caption=_caption(results))
    headings, rows = table_cells(results)
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def markdown(results: dict[str, Any]) -> str:
    """The same for a page."""
    headings, rows = table_cells(results)
    lines = ["| " + " | ".join(row) + " |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---:|" * len(headings), *lines[1:]])


def table_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: dense-equivalent GFLOP/s, ours over the fastest of the others, share of the bound."""
    cells = results["cells"]
    contenders = list(dict.fromkeys(name for cell in cells for name in cell["gflops_p5_p50_p95"]))
    rows = []
    for cell in cells:
        medians = {name: rates[1] for name, rates in cell["gflops_p5_p50_p95"].items()}
        best = max(rate for name, rate in medians.items() if name not in (OURS, APART))
        rows.append(
            [
                " → ".join(map(str, cell["widths"])),
                str(cell["M"]),
                str(cell["threads"]),
                *(f"{medians[name]:.0f}" if name in medians else "-" for name in contenders),
                f"{medians[OURS] / best:.2f}x",
                f"{medians[OURS] / cell['bound']:.0%}",
            ]
        )
    return [*HEADINGS, *contenders, "over the best other", "of bound"], rows


def _title(results: dict[str, Any]) -> str:
    first = results["cells"][0]
    return f"2:4 products, {first['compute']} on {first['tier']}: dense-equivalent GFLOP/s (median)"


def _caption(results: dict[str, Any]) -> str:
    first = results["cells"][0]
    return f"bound: twice the peak of multiply-adds, {first['bound'] / first['threads']:.0f} GFLOP/s per core"


def summary(cell: Cell) -> dict[str, Any]:
    """A cell as results files hold it."""
    numbers = {key: value for key, value in asdict(cell).items() if key != "seconds"}
    return {**numbers, "bound": round(cell.bound, 1), "gflops_p5_p50_p95": cell.quantiles()}
