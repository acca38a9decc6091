"""Results as tables: in the terminal, and as Markdown for the README."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..arms import AGAIN, DENSE, SPARSE
from ..changes import Change
from ..results_file import place, rows_of
from ..statistics import CONFIDENCE

Row = dict[str, Any]
Rows = list[list[str]]
SMALL = 0.005  # of the dense step: less is summed up
ALLOWED_OUTSIDE = 1 - CONFIDENCE  # of the cells of a self-test


def tables(results: Row, *, wide: bool) -> list[tuple[str, tuple[list[str], Rows]]]:
    """(title, (headers, rows)) of the step, and of the whole sample where it was timed."""
    found = [("One solver step", _table(results, rows_of(results), wide=wide))]
    step_only = ("gflops", "peak_memory_mib", "amdahl", "quality")
    whole = [
        {name: value for name, value in row.items() if name not in step_only} | row["end_to_end"]
        for row in rows_of(results)
        if row.get("end_to_end")
    ]
    if whole:
        title = f"A whole sample: {whole[0]['steps']} steps of {whole[0]['sampler']}"
        found.append((title, _table(results, whole, wide=wide)))
    return found


def rich_tables(results: Row) -> list[Table]:
    """For the terminal."""
    return [_rich(title, *table) for title, table in tables(results, wide=True)]


def markdown(results: Row) -> str:
    """The step's table, for a document."""
    return markdown_table(*_table(results, rows_of(results), wide=False))


def markdown_table(headers: list[str], rows: Rows) -> str:
    """Any table, for a document."""
    lines = ["| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def profile_tables(results: Row) -> list[Table]:
    """Where a step's time goes: one table for each batch or cell whose layers were timed."""
    return [_rich(title, *layer_rows(row)) for title, row in titled_rows(results) if row.get("layers")]


def change_table(changes: list[Change]) -> Table:
    """What became faster or slower since an earlier run."""
    headers = ["", "then, ms", "now, ms", "change", "speed-up then", "speed-up now", ""]
    rows = [
        [
            change.where,
            f"{change.old_ms:.1f}",
            f"{change.new_ms:.1f}",
            f"{change.slowdown - 1:+.1%}",
            ratio_text(change.old_speedup),
            ratio_text(change.new_speedup),
            change.verdict,
        ]
        for change in changes
    ]
    return _rich("Since the earlier run", headers, rows)


def remarks(results: Row) -> list[str]:
    """What the table does not say: ties, noise, limits, what failed, what was left out and why."""
    rows = rows_of(results)
    measured = [row for row in rows if "speedup" in row]
    lines = [f"{place(results, row)}: not measured, {row['failed']}" for row in rows if "failed" in row]
    if results.get("self_test"):
        lines.append(self_test_verdict(measured)[1])
    elif measured:
        ties = sum(row["speedup"]["tie"] for row in measured)
        lines.append(f"{ties} of {len(measured)} are ties: their {CONFIDENCE:.0%} interval spans 1.")
    noisy = [row["noise"] for row in measured if "noise" in row]
    if noisy:
        widest = max((each["same"] for each in noisy), key=lambda same: same["high"] - same["low"])
        drift = max(each["drift"] for each in noisy)
        lines.append(
            f"Noise: the dense engine's first call of a turn against its second is {ratio_text(widest)} at its widest; "
            f"its median drifted by up to {drift - 1:.0%} between repeats."
        )
    if any("amdahl" in row for row in measured):
        lines.append(
            "Limit: the speed-up were every 2:4 layer exactly twice as fast (Amdahl, from the dense engine's times by "
            "layer); the percentage is how much of that saving is reached, beyond 100 % where fused kernels save more."
        )
    for row in measured[-1:]:
        lines += [f"Left out: {name}: {why}." for name, why in row["skipped"].items()]
    if results.get("interrupted"):
        lines.append("Interrupted: what was finished is above.")
    return lines + list(results.get("notes", []))


def self_test_verdict(rows: list[Row]) -> tuple[bool, str]:
    """Whether the dense engine ties with itself as often as its intervals promise, and the line that says so."""
    rows = [row for row in rows if "speedup" in row]
    inside = sum(row["speedup"]["tie"] for row in rows)
    allowed = math.ceil(ALLOWED_OUTSIDE * len(rows))
    passed = len(rows) - inside <= allowed
    verdict = "passed" if passed else "failed"
    return (
        passed,
        f"Self-test {verdict}: 1.00 is inside the interval in {inside} of {len(rows)}, {allowed} may miss it.",
    )


def titled_rows(results: Row) -> list[tuple[str, Row]]:
    """What was measured, each with its place in words."""
    return [(place(results, row), row) for row in rows_of(results) if "speedup" in row]


def layer_rows(row: Row) -> tuple[list[str], Rows]:
    """By layer and kernel: milliseconds of the dense and of the other engine, the longest first."""
    name, times = next((name, times) for name, times in row["layers"].items() if name != DENSE)
    dense = {entry["name"]: entry for entry in row["layers"][DENSE]}
    ours = {entry["name"]: entry for entry in times}
    whole = _sum(dense)
    longest = {layer: max(_ms(dense.get(layer)), _ms(ours.get(layer))) for layer in {**dense, **ours}}
    shown = sorted((layer for layer in longest if longest[layer] >= SMALL * whole), key=lambda layer: -longest[layer])
    rows = [_layer_row(layer, dense.get(layer), ours.get(layer)) for layer in shown]
    rest = [
        {"kernel": "", "milliseconds": _sum({layer: side[layer] for layer in side if layer not in shown})}
        for side in (dense, ours)
    ]
    rows.append(_layer_row("everything else", *rest))
    rows.append(_layer_row("all", *({"kernel": "", "milliseconds": _sum(side)} for side in (dense, ours))))
    return ["layer", "dense: kernel", "ms", f"{name}: kernel", "ms", "ratio"], rows


def _layer_row(name: str, dense: Row | None, ours: Row | None) -> list[str]:
    cells = [name]
    for entry in (dense, ours):
        cells += [entry["kernel"], f"{entry['milliseconds']:.2f}"] if entry else ["-", "-"]
    comparable = dense and ours and ours["milliseconds"] > 0
    return [*cells, f"{_ms(dense) / _ms(ours):.2f}" if comparable else "-"]


def _ms(entry: Row | None) -> float:
    return float(entry["milliseconds"]) if entry else 0.0


def _sum(entries: dict[str, Row]) -> float:
    return sum(_ms(entry) for entry in entries.values())


def label(name: str, facts: Row) -> str:
    """A candidate as tables call it."""
    precision = facts["precision"]
    if name.startswith((DENSE, AGAIN)):
        name = name.replace(DENSE, "our own dense engine", 1)
    return name if name.endswith(f", {precision}") else f"{name}, {precision}"


def ratio_text(value: Row, unit: str = "") -> str:
    """ "1.40 [1.34, 1.48]", and "tie" where it is one."""
    text = f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]{unit}"
    return f"{text} tie" if value["tie"] else text


def _rich(title: str, headers: list[str], rows: Rows) -> Table:
    table = Table(*headers, box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(cell.replace("**", "") for cell in row))
    return table


def _table(results: Row, rows: list[Row], *, wide: bool) -> tuple[list[str], Rows]:
    if results["kind"] == "grid":
        return _grid_rows(results, rows, wide=wide)
    return _model_rows(rows, wide=wide)


def _grid_rows(results: Row, rows: list[Row], *, wide: bool) -> tuple[list[str], Rows]:
    measured = [row for row in rows if "speedup" in row]
    ours = AGAIN if results.get("self_test") else SPARSE
    kinds = measured[0]["candidates"] if measured else {}
    dense_in, ours_in = (kinds.get(name, {}).get("precision", results["precision"]) for name in (DENSE, ours))
    title = "dense again" if results.get("self_test") else "2:4"
    columns: dict[str, Callable[[Row], str]] = {
        "patch": lambda row: str(row["patch"]),
        "mlp_ratio": lambda row: str(row["mlp_ratio"]),
        f"dense {dense_in}, ms": partial(_milliseconds, DENSE),
        f"{title} {ours_in}, ms": partial(_milliseconds, ours),
        "speed-up [99 %]": lambda row: ratio_text(row["speedup"]),
    }
    if any("amdahl" in row for row in measured):
        columns["limit, reached"] = _limit
    if any(row.get("best_peer_in_any_precision") for row in measured):
        columns["over the best other"] = lambda row: _over(row, row["best_peer"] or row["best_peer_in_any_precision"])
        columns["over ONNX Runtime"] = lambda row: _over(row, row.get("plain_onnxruntime"))
    if any("images_per_second" in row for row in measured):
        columns["images/s"] = lambda row: f"{row['images_per_second'][ours]:.2f}"
    if wide:
        for name in (name for name, facts in kinds.items() if "backend" in facts and name not in (DENSE, ours)):
            columns[f"{name}, ms"] = partial(_milliseconds, name)
        if any(row.get("gflops") for row in measured):
            columns["GFLOP/s"] = lambda row: f"{row['gflops'][DENSE]:.0f} → {row['gflops'][ours]:.0f}"
        if any(row.get("peak_memory_mib") for row in measured):
            columns["MiB"] = lambda row: f"{_memory(row, DENSE)} → {_memory(row, ours)}"
    columns["paper (A40, CUTLASS)"] = lambda row: f"{row['paper']:.2f}"
    return list(columns), [[_cell(row, cell, name) for name, cell in columns.items()] for row in rows]


def _cell(row: Row, text: Any, column: str) -> str:
    if "speedup" in row or column in ("patch", "mlp_ratio", "paper (A40, CUTLASS)"):
        return str(text(row))
    return "failed" if column.startswith("speed-up") else "-"


def _milliseconds(name: str, row: Row) -> str:
    return f"{row['milliseconds'][name]['median']:.1f}" if name in row["milliseconds"] else "-"


def _limit(row: Row) -> str:
    if "amdahl" not in row:
        return "-"
    reached = row["amdahl"]["reached"]
    return f"{row['amdahl']['limit']:.2f}, {reached:.0%}" if reached is not None else f"{row['amdahl']['limit']:.2f}"


def _over(row: Row, name: str | None) -> str:
    return f"{ratio_text(row['speedups'][name])} ({name})" if name else "-"


def _memory(row: Row, name: str) -> str:
    found = row["peak_memory_mib"].get(name)
    return f"{found.get('device', found['host']):.0f}" if found else "-"


def _model_rows(rows: list[Row], *, wide: bool) -> tuple[list[str], Rows]:
    headers = ["", *(f"batch {row['batch']}" for row in rows)]
    quality: Row = next((row["quality"]["rows"] for row in rows if row.get("quality")), {})
    if quality:
        headers.append("quality")
    candidates = {name: facts for row in rows for name, facts in row["candidates"].items()}
    table = []
    for name, facts in candidates.items():
        ours = name in (SPARSE, AGAIN)
        cells = [f"**{label(name, facts)}**" if ours else label(name, facts)]
        cells += [_model_cell(row, name, ours, wide) for row in rows]
        if quality:
            cells.append(quality_text(quality.get(name, {})))
        table.append(cells)
    if wide and any("amdahl" in row for row in rows):
        table.append(["limit, reached", *(_limit(row) for row in rows), *([""] if quality else [])])
    return headers, table


def _model_cell(row: Row, name: str, ours: bool, wide: bool) -> str:
    times = row["milliseconds"].get(name)
    if times is None:
        return "-"
    text = f"{times['median']:.1f} ms" + ("" if ours else f", {ratio_text(row['speedups'][name], 'x')}")
    if wide and row.get("gflops"):
        text += f"; {row['gflops'][name]:.0f} GFLOP/s"
    if wide and name in row.get("peak_memory_mib", {}):
        text += f", {_memory(row, name)} MiB"
    if "images_per_second" in row:
        text += f"; {row['images_per_second'][name]:.2f} images/s"
    return text


def quality_text(found: Row) -> str:
    """PSNR, and what the judges said."""
    if "nonfinite" in found:
        return f"NaN in {found['nonfinite']} images"
    parts = []
    if "psnr" in found:
        parts.append(f"{found['psnr']:.0f} dB" if found["psnr"] is not None else "identical")
    if "accuracy" in found:
        parts.append(f"{found['accuracy']:.1%} read right")
    parts += [f"{title} {found[key]:.2f}" for key, title in (("frechet", "Fréchet"), ("fid", "FID")) if key in found]
    return ", ".join(parts) or "-"
