"""Where a step's time goes, by layer and kernel, and the most that 2:4 could save of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.onnxruntime.layers import PAIR
from sparse_engine.files import scratch_folder

RUNS = 2
PROFILED_BACKEND = "onnxruntime"  # the one whose runtime tells the time of each node
NODE_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class LayerTime:
    """One layer, or all nodes of one kind that belong to none.

    Attributes:
        name: the layer's, or the operator's.
        kernel: what ran: an operator, or the layout of a 2:4 kernel.
        milliseconds: in the least disturbed of a few steps.
        layer: whether it is a layer of the network with weights.
    """

    name: str
    kernel: str
    milliseconds: float
    layer: bool

    def to_dict(self) -> dict[str, Any]:
        """As results files hold it."""
        return asdict(self)


def profile_step(
    path: Path, feed: Mapping[str, np.ndarray], layers: Collection[str], threads: int | None
) -> list[LayerTime] | None:
    """Times of one engine's step by layer, from ONNX Runtime's own profiler; None for another backend.

    Args:
        path: the engine file.
        feed: of one step.
        layers: names of the network's layers.
        threads: of the session.
    """
    engine = EngineFile(path)
    if engine.manifest.backend["name"] != PROFILED_BACKEND:
        return None
    from sparse_engine.backends.onnxruntime.session import create_session
    from sparse_engine.backends.onnxruntime.step import fastest_step

    prepared = fastest_step(engine, threads, autotune=True)
    with scratch_folder() as folder:
        session = create_session(prepared, engine.path, threads, folder / "step")
        for _ in range(1 + RUNS):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = {name: choice["kernel"] for name, choice in prepared.report.items()}
    # Convolutions that ONNX Runtime lays out in its own way are named after what they make.
    convolutions = [node for node in prepared.model.graph.node if node.op_type == "Conv"]
    renamed = {f"{node.output[0]}_nchwc": node.name for node in convolutions}
    return _collect(events, layers, kernels, renamed)


def _collect(
    events: Sequence[dict[str, Any]],
    layers: Collection[str],
    kernels: Mapping[str, str],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> list[LayerTime]:
    """Sum the nodes of each run, and take the run that took least; the first is the warm-up.

    ``renamed``: the runtime's name of a node -> the layer's. Two layers in one node have the same number of
    multiply-adds: each is given half of its time.
    """
    seen: dict[str, int] = defaultdict(int)
    milliseconds: dict[str, np.ndarray] = {}
    ran: dict[str, str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(NODE_SUFFIX):
            continue
        node, operator = event["name"].removesuffix(NODE_SUFFIX), event["args"]["op_name"]
        node = renamed.get(node, node)
        run = seen[node]
        seen[node] += 1
        parts = node.split(PAIR) if all(part in layers for part in node.split(PAIR)) else [operator]
        for name in parts:
            ran[name] = operator if operator in ("MatMul", "Conv") else kernels.get(name, operator)
            milliseconds.setdefault(name, np.zeros(1 + RUNS))[run] += event["dur"] / 1e3 / len(parts)
    fastest = 1 + int(np.argmin(np.sum(list(milliseconds.values()), axis=0)[1:]))
    return [LayerTime(name, ran[name], float(times[fastest]), name in layers) for name, times in milliseconds.items()]


@dataclass(frozen=True)
class AmdahlLimit:
    """What 2:4 could give at best.

    Attributes:
        share: of the dense step's time that its 2:4 layers take.
        limit: the speed-up were each of them exactly twice as fast and the rest as it is.
    """

    share: float
    limit: float

    def reached(self, speedup: float) -> float | None:
        """How much of the time that could be saved is saved: 0 at no speed-up, 1 at the limit; None if none could."""
        return (1 - 1 / speedup) / (1 - 1 / self.limit) if self.limit > 1 else None


def amdahl_limit(dense: Sequence[LayerTime], sparse_layers: Collection[str]) -> AmdahlLimit:
    """From the dense engine's measured times and the names of the layers that are 2:4 (Amdahl, 1967)."""
    total = sum(entry.milliseconds for entry in dense)
    share = sum(entry.milliseconds for entry in dense if entry.name in sparse_layers) / total
    return AmdahlLimit(share, 1 / (1 - share / 2))
