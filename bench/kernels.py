"""The tables of the CPU kernels: 2:4 products and convolutions by themselves, ours against dense ones of others.

    sparse-engine bench --kernels                     # layers of U-ViT-S and of U-Nets, one thread and two
    sparse-engine bench --kernels --precision bf16
    sparse-engine bench --kernels --precision int8  # floats in and floats out

All contenders of a cell compute the same with the same numbers, in one process, interleaved: ``x @ weight.T + bias``,
two of those with a GELU between (an MLP), or ``conv(x, weight) + bias``. Of every contender the fastest form counts:
of ours the lanes that an engine would try; of ONNX Runtime's convolutions either layout; of PyTorch plain functions, or
the operators that its compiler would run, with weights laid out beforehand.

GFLOP/s are dense-equivalent: 2 M N K per product, whether or not the zeros are multiplied; of a convolution, M are
output pixels and K channels x taps. "Bound" is twice the machine's measured peak of multiply-adds: pairs of rows share
loads, so loads do not bound a 2:4 kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from sparse_engine import kernels
from sparse_engine.cores import pool_size
from sparse_engine.kernels.library import Compute

from .contenders import (
    LAYERS_PER_CALL,
    ONE_NODE,
    ONE_NODE_BF16,
    ORT,
    ORT_PLAIN,
    TORCH,
    TORCH_PACKED,
    Shape,
    make_contenders,
    random_input,
    random_layers,
)
from .contenders_int8 import make_int8_contenders
from .timing import interleave

OURS, APART = "ours", "ours, apart"

# qkv, proj, fc1, fc2, and the MLP that the last two are.
UVIT_S_LAYERS = tuple(map(Shape, ((512, 1536), (512, 512), (512, 2048), (2048, 512), (512, 2048, 512))))
UVIT_S_TOKENS = (257, 1028, 4112)  # 256 patches and the time token; batches of 1, 4 and 16
UNET_CONVOLUTIONS = (
    Shape((128, 128), 3, 32),
    Shape((256, 256), 3, 32),
    Shape((256, 256), 3, 16),
    Shape((512, 256), 3, 16),
    Shape((256, 256), 3, 8),
    Shape((256, 256), 3, 4),
    Shape((256, 256), 1, 16),
)
UNET_BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class Cell:
    """One shape timed, at one size and number of threads."""

    shape: Shape
    count: int  # rows of x, or images
    threads: int
    compute: str
    tier: str
    bound: float  # dense-equivalent GFLOP/s
    seconds: dict[str, list[float]]  # of each kernel, see ``make_contenders``

    @property
    def kernels(self) -> dict[str, str]:
        """The fastest kernel of each contender, at the median."""
        others = {ORT: (ORT, ORT_PLAIN), TORCH: (TORCH, TORCH_PACKED)}
        ours = [name for name in self.seconds if name not in (*others[ORT], *others[TORCH])]
        apart = [name for name in ours if name not in (ONE_NODE, ONE_NODE_BF16)] if ONE_NODE in ours else []
        named = {OURS: ours, APART: apart} | {
            contender: [name for name in names if name in self.seconds] for contender, names in others.items()
        }
        return {contender: min(names, key=self._median) for contender, names in named.items() if names}

    @property
    def gflops(self) -> dict[str, float]:
        """Dense-equivalent GFLOP/s of each contender's median time."""
        return {name: self._gflops(self.seconds[kernel], 0.5) for name, kernel in self.kernels.items()}

    def summary(self) -> dict[str, Any]:
        """As results files hold it."""
        window = {"taps": self.shape.taps, "side": self.shape.side, "batch": self.count} if self.shape.side else {}
        return {
            "widths": list(self.shape.widths),
            **window,
            "M": self.shape.rows_of_x(self.count),
            "threads": self.threads,
            "compute": self.compute,
            "tier": self.tier,
            "bound": round(self.bound, 1),
            "kernels": self.kernels,
            "gflops_by_kernel": {name: round(self._gflops(times, 0.5), 1) for name, times in self.seconds.items()},
            "gflops_p5_p50_p95": {
                name: [round(self._gflops(self.seconds[kernel], 1 - q), 1) for q in (0.05, 0.5, 0.95)]
                for name, kernel in self.kernels.items()
            },
        }

    def _median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def _gflops(self, times: list[float], quantile: float) -> float:
        weights = self.shape.taps**2 * sum(before * after for before, after in pairwise(self.shape.widths))
        operations = 2 * self.shape.rows_of_x(self.count) * weights
        return operations / float(np.quantile(times, quantile)) / 1e9


def measure(
    shapes: Sequence[Shape] = (*UVIT_S_LAYERS, *UNET_CONVOLUTIONS),
    tokens: Sequence[int] = UVIT_S_TOKENS,
    batches: Sequence[int] = UNET_BATCHES,
    threads: Sequence[int] = (1, 2),
    compute: Compute = "fp32",
    seconds_per_cell: float = 1.0,
) -> Iterator[Cell]:
    """Time every combination; yields a cell as soon as it is measured.

    Args:
        shapes: what is computed.
        tokens: numbers of rows of x, M, of products.
        batches: numbers of images, of convolutions.
        threads: numbers of threads, on no more than the cores that this process may use.
        compute: ``fp32``, ``bf16`` or ``int8``, the precision of the products. ONNX Runtime has no dense bf16 product
            on CPUs and is timed in fp32 then.
        seconds_per_cell: time spent on each cell, over all contenders.

    Raises:
        UnsupportedError: the machine has no bf16 or int8 tier, or the kernels are not built.
    """
    tier = kernels.best_tier(compute)
    peak = kernels.peak_flops(tier) / 1e9
    rng = np.random.default_rng(0)
    for shape in shapes:
        stack = random_layers(rng, shape)
        for count in tokens if shape.side is None else batches:
            x = random_input(rng, stack, shape.rows_of_x(count))
            for cores in dict.fromkeys(pool_size(each) for each in threads):
                in_int8 = compute == "int8"
                calls = make_int8_contenders(stack, x, cores) if in_int8 else make_contenders(stack, x, compute, cores)
                runs = interleave(calls, repeats=1, seconds=seconds_per_cell).runs
                seconds = {name: (times / LAYERS_PER_CALL).ravel().tolist() for name, times in runs.items()}
                yield Cell(shape, count, cores, compute, tier, 2 * peak * cores, seconds)


def tables(results: dict[str, Any]) -> list[Table]:
    """The cells of a results file as rich tables: products, and convolutions."""
    made = []
    for kind, headings, rows in table_cells(results):
        made.append(Table(title=_title(kind, results), caption=_caption(results)))
        for heading in headings:
            made[-1].add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            made[-1].add_row(*row)
    return made


def markdown(results: dict[str, Any]) -> str:
    """The same for a page."""
    made = []
    for _, headings, rows in table_cells(results):
        lines = ["| " + " | ".join(row) + " |" for row in (headings, *rows)]
        made.append("\n".join([lines[0], "|" + "---:|" * len(headings), *lines[1:]]))
    return "\n\n".join(made)


def table_cells(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table's kind, headings and rows, of products and of convolutions, where there are such.

    Dense-equivalent GFLOP/s, ours over the fastest of the others, share of the bound; and the lanes that ours are in,
    of files that say it.
    """
    kinds = {
        "products": [cell for cell in results["cells"] if "side" not in cell],
        "convolutions": [cell for cell in results["cells"] if "side" in cell],
    }
    return [(kind, *_one_table(kind, cells)) for kind, cells in kinds.items() if cells]


def _one_table(kind: str, cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    contenders = list(dict.fromkeys(name for cell in cells for name in cell["gflops_p5_p50_p95"]))
    headings, size = (["layer", "M"], "M") if kind == "products" else (["convolution", "batch"], "batch")
    headings = [*headings, "threads", *(["lanes"] if "kernels" in cells[0] else [])]
    rows = []
    for cell in cells:
        medians = {name: rates[1] for name, rates in cell["gflops_p5_p50_p95"].items()}
        best = max(rate for name, rate in medians.items() if name not in (OURS, APART))
        rows.append(
            [
                str(Shape(tuple(cell["widths"]), cell.get("taps", 1), cell.get("side"))),
                str(cell[size]),
                str(cell["threads"]),
                *([_lanes(cell["kernels"][OURS], cell["compute"])] if "kernels" in cell else []),
                *(f"{medians[name]:.0f}" if name in medians else "-" for name in contenders),
                f"{medians[OURS] / best:.2f}x",
                f"{medians[OURS] / cell['bound']:.0%}",
            ]
        )
    return [*headings, *contenders, "over the best other", "of bound"], rows


def _lanes(kernel: str, compute: str) -> str:
    """T, N or R, in one letter; in 8 bits there is R alone."""
    if kernel in (ONE_NODE, ONE_NODE_BF16):
        return "R" if compute == "int8" or kernel == ONE_NODE_BF16 else "T"
    return kernel[0].upper()


def _title(kind: str, results: dict[str, Any]) -> str:
    first = results["cells"][0]
    return f"2:4 {kind}, {first['compute']} on {first['tier']}: dense-equivalent GFLOP/s (median)"


def _caption(results: dict[str, Any]) -> str:
    first = results["cells"][0]
    return f"bound: twice the peak of multiply-adds, {first['bound'] / first['threads']:.0f} GFLOP/s per core"
