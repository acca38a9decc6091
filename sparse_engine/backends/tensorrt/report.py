"""What TensorRT chose for each layer: read off the builder's log and the engine inspector.

``HasSparseWeights`` in the inspector describes the weights, not the kernel, and is not looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPARSE_KERNEL = re.compile(r"sparse|sptensor|spmma", re.IGNORECASE)
# Up to TensorRT 10.3, once; from 10.14 with a count, and again for each part of the network that is compiled as one.
_ELIGIBLE = (
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics(?::(?P<names>.*))?"),
)
_CHOSEN = (
    re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics(?::(?P<names>.*))?"),
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Sparsity:
    """What a builder's log says of sparsity.

    Attributes:
        reported: whether it says anything.
        eligible, chosen: names of TensorRT layers, which may each be several of the graph's joined by " + ".
        eligible_count, chosen_count: summed over the lines, which name layers only in a verbose log.
    """

    reported: bool
    eligible: tuple[str, ...]
    chosen: tuple[str, ...]
    eligible_count: int
    chosen_count: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sparsity:
        """Out of ``dataclasses.asdict`` by way of JSON."""
        return cls(**{**values, "eligible": tuple(values["eligible"]), "chosen": tuple(values["chosen"])})


def parse_log(lines: Iterable[str]) -> Sparsity:
    """Read a builder's log, of either format."""
    eligible: dict[str, None] = {}
    chosen: dict[str, None] = {}
    counts = [0, 0]
    reported = False
    for line in lines:
        for index, (patterns, names) in enumerate(((_ELIGIBLE, eligible), (_CHOSEN, chosen))):
            for match in filter(None, (pattern.search(line) for pattern in patterns)):
                found = [name.strip() for name in (match["names"] or "").split(", ") if name.strip()]
                reported = True
                names.update(dict.fromkeys(found))
                counts[index] += int(match.groupdict().get("count") or len(found))
    return Sparsity(reported, tuple(eligible), tuple(chosen), *counts)


def parse_inspector(text: str) -> dict[str, tuple[str, ...]]:
    """Layer of the graph -> the kernels that run it, from ``get_engine_information`` in JSON (profiling verbosity
    DETAILED).

    A kernel that several layers were fused into is each one's. Empty where the text lists names only.
    """
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {}
    kernels: dict[str, dict[str, None]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not entry.get("TacticName"):
            continue
        names = _ONNX_LAYER.findall(entry.get("Metadata") or "") or entry.get("Name", "").split(" + ")
        for name in names:
            kernels.setdefault(name.strip(), {})[entry["TacticName"]] = None
    return {name: tuple(found) for name, found in kernels.items()}


def layer_reports(
    layers: Iterable[str], sparse_layers: Sequence[str], log: Sparsity, kernels: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, Any]]:
    """Layer -> {"chosen", "kernel", "why"}: a layer counts as sparse by its kernel's name, or by the builder's word.

    "chosen" is None where neither says anything.
    """
    picked = {part.strip() for name in log.chosen for part in name.split(" + ")}
    reports: dict[str, dict[str, Any]] = {}
    for name in layers:
        own = kernels.get(name, ())
        sparse = next((kernel for kernel in own if SPARSE_KERNEL.search(kernel)), None)
        if name not in sparse_layers:
            reports[name] = {"chosen": False, "kernel": own[0] if own else None, "why": "dense weights"}
        elif sparse or name in picked:
            reports[name] = {
                "chosen": True,
                "kernel": sparse or "sparse",
                "why": "faster than dense in TensorRT's timing",
            }
        elif own or (log.reported and not log.chosen_count):
            reports[name] = {
                "chosen": False,
                "kernel": own[0] if own else None,
                "why": "dense was faster in TensorRT's timing",
            }
        else:
            reports[name] = {"chosen": None, "kernel": None, "why": "TensorRT does not say which kernel it chose"}
    return reports
