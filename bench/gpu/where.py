"""Step 8: where the time of the slowest and of the best cell goes, layer by layer, against what bounds each layer."""

from __future__ import annotations

from typing import Any

import torch

from sparse_engine.export.families.uvit import FAMILY, UViTConfig
from sparse_engine.export.precision import lower

from .ceilings import ceilings
from .measure import device_time
from .session import Results, Row, Session
from .ways import COMPILED, OURS, Ways, masked_network

TOP_KERNELS = 15


def run(session: Session, results: Results) -> None:
    """Fill in a row for the cell with the least speed-up over compiled dense, and one for that with the most."""
    cells = [row for step in ("paper", "uvit-s") for row in session.results(step).rows if _ratio(row) is not None]
    if not cells:
        raise RuntimeError("no cell has been measured yet: run steps 3 and 4 first")
    limits = ceilings(session.results("device"))
    cells.sort(key=lambda row: _ratio(row) or 0.0)
    for which, cell in {"slowest": cells[0], "best": cells[-1]}.items():
        place = {name: cell[name] for name in ("patch", "mlp_ratio", "precision", "batch") if name in cell}
        if results.wants(which=which, **place):
            with results.row(which=which, **place) as row:
                row |= {"speedup": cell["speedups"][COMPILED], "milliseconds": cell["milliseconds"]}
                row["layers"] = [layer_against_bound(layer, limits) for layer in cell["layers"]]
                _profile(session, cell, row)


def layer_against_bound(layer: Row, limits: tuple[float, float]) -> Row:
    """A layer's measured products beside the least time that arithmetic and memory allow them.

    Args:
        layer: {"shape": [N, K], "tokens", "timed_by_tokens"} as step 3 and 4 report it.
        limits: operations and bytes a second that step 1 measured, dense.
    """
    operations_per_second, bytes_per_second = limits
    (outputs, inputs), tokens = layer["shape"], layer["tokens"]
    operations = 2 * tokens * outputs * inputs
    moved = 2 * tokens * (inputs + outputs)
    bounds = {}
    for name, share, weight in (("dense", 1.0, 1.0), ("sparse", 0.5, 9 / 16)):
        arithmetic = share * operations / operations_per_second
        memory = (moved + 2 * weight * outputs * inputs) / bytes_per_second
        bounds[name] = {
            "milliseconds": 1e3 * max(arithmetic, memory),
            "by": "arithmetic" if arithmetic > memory else "memory",
        }
    timed = layer["timed_by_tokens"].get(str(tokens), {"milliseconds": {}})
    return {**layer, "bounds": bounds, "of_bound": _of_bound(timed["milliseconds"], bounds)}


def _of_bound(milliseconds: dict[str, float], bounds: dict[str, Any]) -> dict[str, float]:
    kinds = {name: "dense" if name == "dense" else "sparse" for name in milliseconds}
    return {name: bounds[kinds[name]]["milliseconds"] / value for name, value in milliseconds.items()}


def _ratio(row: Row) -> float | None:
    found = row.get("speedups", {}).get(COMPILED)
    return None if found is None else float(found["median"])


def _profile(session: Session, cell: Row, row: Row) -> None:
    """The kernels that a step's time goes to, dense and ours."""
    config = UViTConfig(**cell["config"])
    network = lower(masked_network(config, session.device), FAMILY.float32_layers, cell["precision"])
    x = torch.randn(cell["batch"], *config.data_shape, device=session.device)
    ways = Ways(session, network, config, cell["batch"], x, opponents=(COMPILED,))
    for name in (COMPILED, OURS):
        ways.arms[name].prediction()
        times = device_time(ways.arms[name], session.device)
        total = sum(times.values()) / ways.steps
        top = {kernel: value / ways.steps for kernel, value in list(times.items())[:TOP_KERNELS]}
        row[f"kernels of {name}"] = {"milliseconds_of_a_step": total, "top": top}
