"""Results as tables: in the terminal, and as Markdown for the README."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .compare import DENSE, SPARSE

Rows = list[list[str]]


def rich_table(results: dict[str, Any]) -> Table:
    """For the terminal."""
    headers, rows = _grid_rows(results) if results["kind"] == "grid" else _model_rows(results)
    table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: dict[str, Any]) -> str:
    """For a document."""
    headers, rows = _grid_rows(results) if results["kind"] == "grid" else _model_rows(results)
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _label(name: str, precision: str) -> str:
    if name == SPARSE:
        return f"**{name}, {precision}**"
    return "our own dense engine, fp32" if name == DENSE else f"{name}, {precision}"


def _ratio(value: dict[str, Any], unit: str = "") -> str:
    text = f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]{unit}"
    return f"{text} tie" if value["tie"] else text


def _grid_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    ours = f"2:4 {results['precision']}, ms"
    headers = ["patch", "mlp_ratio", "dense fp32, ms", ours, "speed-up [99 %]", "paper (A40, CUTLASS)"]
    rows = []
    for cell in results["cells"]:
        times = cell["milliseconds"]
        rows.append(
            [
                str(cell["patch"]),
                str(cell["mlp_ratio"]),
                f"{times[DENSE]['median']:.1f}",
                f"{times[SPARSE]['median']:.1f}",
                _ratio(cell["speedup"][DENSE]),
                f"{cell['paper']:.2f}",
            ]
        )
    return headers, rows


def _model_rows(results: dict[str, Any]) -> tuple[list[str], Rows]:
    batches = [f"batch {row['batch']}" for row in results["rows"]]
    names = list(dict.fromkeys(name for row in results["rows"] for name in row["milliseconds"]))
    rows = []
    for name in names:
        label = _label(name, results["precision"])
        cells = []
        for row in results["rows"]:
            times = row["milliseconds"].get(name)
            if times is None:
                cells.append("-")
            elif name == SPARSE:
                cells.append(f"{times['median']:.1f} ms")
            else:
                cells.append(f"{times['median']:.1f} ms, {_ratio(row['speedup'][name], 'x')}")
        rows.append([label, *cells])
    return ["", *batches], rows
