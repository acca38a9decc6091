"""What the script measured, as Markdown for the README: the paper's grid beside ours, and U-ViT-S."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_engine.bench.results_file import read_results

from .session import Row
from .ways import COMPILED, CUSPARSELT, CUTLASS, EAGER, OURS

WAYS = (EAGER, COMPILED, CUTLASS, CUSPARSELT, OURS)
RATIOS = (COMPILED, CUTLASS, CUSPARSELT)


def section(folder: Path) -> str:
    """Tables of every GPU whose results lie in a folder; empty where there are none."""
    parts = []
    for step, places in (("paper", ("patch", "mlp_ratio")), ("uvit-s", ("precision", "batch"))):
        for path in sorted(folder.glob(f"gpu-*-{step}.json")):
            results = read_results(path)
            rows = [row for row in results["rows"] if "milliseconds" in row]
            if rows:
                parts.append(f"{TITLES[step]}, on one {results['device']} (`{results['command']}`):")
                parts.append(table(rows, places))
    return "\n\n".join(parts)


TITLES = {
    "paper": "The paper's grid at its own size (embed 8192, depth 1, batch 64, fp16), one solver step",
    "uvit-s": "U-ViT-S, one solver step",
}


def table(rows: Sequence[Row], places: Sequence[str]) -> str:
    """Milliseconds of the five ways and ratios of ours, one line a row; ``places`` are what tells rows apart."""
    paper = any("paper" in row for row in rows)
    headers = [*places, *(f"{name}, ms" for name in WAYS), *(f"over {name}" for name in RATIOS)]
    lines = [_line([*headers, *(["paper (A40)"] if paper else [])])]
    lines.append("|---" * (len(headers) + paper) + "|")
    for row in sorted(rows, key=lambda row: tuple(str(row[place]) for place in reversed(places))):
        times = [_milliseconds(row["milliseconds"].get(name)) for name in WAYS]
        ratios = [_ratio(row["speedups"].get(name)) for name in RATIOS]
        lines.append(
            _line([*(str(row[p]) for p in places), *times, *ratios, *([f"{row['paper']:.2f}"] if paper else [])])
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f}"


def _ratio(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    text = f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{text} tie" if found["tie"] else text
