"""Results as figures: matplotlib, in colours that the colour-blind tell apart, each value readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from sparse_engine.plots import encoded

from ..arms import DENSE
from ..grid import MLP_RATIOS, PAPER, PATCHES
from ..results_file import rows_of
from .tables import label, titled_rows

Row = dict[str, Any]
Rows = Sequence[tuple[str, Row]]
# Okabe and Ito's colours, with hatches and markers beside them.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#777777")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MARKERS = "osD^vPX*"
DIVERGING = "PuOr"  # orange below 1, purple above; also apart in grey
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear", "Attention")
DPI = 150


@dataclass(frozen=True)
class Plot:
    """A figure with what it is called in files, above it, and for those who do not see it."""

    name: str
    title: str
    text: str
    figure: Figure

    def png(self) -> bytes:
        """As a PNG file."""
        return encoded(self.figure, ".png", self.name, dpi=DPI)

    def svg(self) -> bytes:
        """As an SVG file, its letters as outlines: it looks the same everywhere."""
        return encoded(self.figure, ".svg", self.name)


def plots(results: Row) -> list[Plot]:
    """Every figure that the results have the numbers for."""
    rows = titled_rows(results)
    found = [_speedup_map(results)] if results["kind"] == "grid" else [_speedups(rows)]
    if any("layers" in row for _, row in rows):
        found.append(_layers([(title, row) for title, row in rows if "layers" in row]))
    if any("runs_milliseconds" in row for _, row in rows):
        found.append(_latencies([(title, row) for title, row in rows if "runs_milliseconds" in row]))
    judged = next((row for _, row in rows if row.get("quality")), None)
    measures = _measures(judged) if judged is not None else []
    if judged is not None and measures:
        found.append(_quality(judged, measures))
    return found


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _speedup_map(results: Row) -> Plot:
    """Two maps of the grid, ours and the paper's, on one scale of colours centred on 1."""
    cells = {(row["patch"], row["mlp_ratio"]): row for row in rows_of(results)}
    ours = {place: row["speedup"]["median"] for place, row in cells.items() if "speedup" in row}
    values = [*ours.values(), *PAPER.values()]
    norm = TwoSlopeNorm(1.0, min(0.9, *values), max(1.1, *values))
    figure = _figure(9.5, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    notes = {place: _map_note(cells[place]) if place in cells else "left out" for place in PAPER}
    image = _map(left, "this run, 99 % interval", ours, notes, norm)
    _map(right, "paper (A40, CUTLASS, fp16)", PAPER, {}, norm)
    left.set_ylabel("mlp_ratio")
    figure.colorbar(image, ax=(left, right), label="dense time / 2:4 time", shrink=0.85)
    text = "; ".join(f"patch {p}, mlp_ratio {m}: {ours.get((p, m), float('nan')):.2f}" for p, m in cells)
    return Plot("speedup", "Speed-up of 2:4 over dense", f"Heat map of speed-ups. {text}", figure)


def _map_note(row: Row) -> str:
    if "speedup" not in row:
        return "not measured"
    ratio = row["speedup"]
    return f"{ratio['low']:.2f} to {ratio['high']:.2f}" + ("\ntie" if ratio["tie"] else "")


def _map(
    axes: Axes, title: str, values: dict[tuple[int, int], float], notes: dict[tuple[int, int], str], norm: Any
) -> Any:
    grid = np.array([[values.get((patch, mlp), np.nan) for patch in PATCHES] for mlp in MLP_RATIOS])
    image = axes.imshow(grid, cmap=DIVERGING, norm=norm, aspect="auto")
    for row, mlp in enumerate(MLP_RATIOS):
        for column, patch in enumerate(PATCHES):
            value, note = values.get((patch, mlp)), notes.get((patch, mlp), "")
            ink = "white" if value is not None and abs(norm(value) - 0.5) > 0.33 else "black"
            if value is not None:
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="bottom" if note else "center",
                    color=ink,
                    weight="bold",
                )
            if note:
                axes.text(column, row, note, ha="center", va="top", color=ink, fontsize=8)
    axes.set(title=title, xlabel="patch size")
    axes.set_xticks(range(len(PATCHES)), [str(patch) for patch in PATCHES])
    axes.set_yticks(range(len(MLP_RATIOS)), [str(mlp) for mlp in MLP_RATIOS])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _speedups(rows: Rows) -> Plot:
    """How many times faster than each other runtime, by batch, with intervals."""
    names = list(dict.fromkeys(name for _, row in rows for name in row["speedups"]))
    figure = _figure(9.5, 1.2 + 0.24 * len(names) * len(rows))
    axes = figure.subplots()
    for index, (title, row) in enumerate(rows):
        places = [name for name in names if name in row["speedups"]]
        ratios = [row["speedups"][name] for name in places]
        medians = np.array([ratio["median"] for ratio in ratios])
        below = [max(0.0, ratio["median"] - ratio["low"]) for ratio in ratios]
        above = [max(0.0, ratio["high"] - ratio["median"]) for ratio in ratios]
        y = [names.index(name) + (index - (len(rows) - 1) / 2) * 0.8 / len(rows) for name in places]
        style: Any = {"color": COLOURS[index % 8], "marker": MARKERS[index % 8], "markeredgecolor": "black"}
        axes.errorbar(medians, y, xerr=[below, above], label=title, linestyle="none", capsize=2, **style)
        for where, ratio in zip(y, ratios, strict=True):
            axes.text(ratio["high"], where, f"  {ratio['median']:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    facts = {name: facts for _, row in rows for name, facts in row["candidates"].items()}
    axes.set_yticks(range(len(names)), [label(name, facts[name]) for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="times faster than it (99 % interval)")
    _log_axis(axes)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    _tidy(axes)
    ratios_of = [(title, name, ratio["median"]) for title, row in rows for name, ratio in row["speedups"].items()]
    text = "; ".join(f"{title}, {name}: {median:.2f}" for title, name, median in ratios_of)
    return Plot("speedup", "Speed-up of our 2:4 engine", f"Speed-ups over each runtime, with intervals. {text}", figure)


def _log_axis(axes: Axes) -> None:
    """A logarithmic axis with numbers in place of powers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _layers(rows: Rows) -> Plot:
    """Where the time of a step goes, as shares of the dense step: dense above, ours below."""
    figure = _figure(9.5, 1.2 + 0.52 * len(rows))
    axes = figure.subplots()
    drawn: dict[str, Any] = {}
    for index, (_, row) in enumerate(rows):
        whole = sum(entry["milliseconds"] for entry in row["layers"][DENSE])
        for side, times in enumerate(row["layers"].values()):
            start = 0.0
            for part, milliseconds in _parts(times).items():
                number = (*PARTS, "other").index(part)
                style: Any = {
                    "color": COLOURS[number],
                    "hatch": HATCHES[number],
                    "edgecolor": "white",
                    "linewidth": 0.4,
                }
                bar = axes.barh(index + 0.2 * (2 * side - 1), milliseconds / whole, 0.36, start, **style)
                drawn.setdefault(part, bar)
                start += milliseconds / whole
    axes.set_yticks(range(len(rows)), [f"{title}\ndense / 2:4" for title, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time by layer, as a share of the dense step")
    order = [part for part in (*PARTS, "other") if part in drawn]
    figure.legend(
        [drawn[part] for part in order], order, loc="outside upper center", ncols=7, frameon=False, fontsize=8
    )
    _tidy(axes)
    return Plot(
        "layers", "Where the time goes", "Stacked bars of time by layer; the tables below hold the numbers.", figure
    )


def _parts(times: Sequence[Row]) -> dict[str, float]:
    """Milliseconds by kind of layer, summed over the blocks."""
    sums = dict.fromkeys((*PARTS, "other"), 0.0)
    for entry in times:
        part = next((part for part in PARTS if entry["name"].endswith(part)), "other")
        sums[part] += entry["milliseconds"]
    return {part: value for part, value in sums.items() if value}


def _latencies(rows: Rows) -> Plot:
    """Every timed call: box from quartile to quartile, whiskers from p5 to p95, dots beyond."""
    names = list(dict.fromkeys(name for _, row in rows for name in row["runs_milliseconds"]))
    facts = {name: facts for _, row in rows for name, facts in row["candidates"].items()}
    figure = _figure(9.5, 1.2 + (0.14 + 0.2 * len(names)) * len(rows))
    axes = figure.subplots()
    thickness = 0.8 / len(names)
    for number, name in enumerate(names):
        boxes, places = [], []
        for index, (_, row) in enumerate(rows):
            if name in row["runs_milliseconds"]:
                boxes.append(_box(np.ravel(row["runs_milliseconds"][name])))
                places.append(index + (number - (len(names) - 1) / 2) * thickness)
        colour, hatch = COLOURS[number % 8], HATCHES[(number + number // 8) % 8]
        drawn = axes.bxp(
            boxes,
            positions=places,
            widths=0.7 * thickness,
            orientation="horizontal",
            patch_artist=True,
            boxprops={"facecolor": colour, "hatch": hatch, "linewidth": 0.6},
            medianprops={"color": "black", "linewidth": 1.4},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0.8},
            flierprops={
                "marker": MARKERS[number % 8],
                "markersize": 3,
                "markerfacecolor": colour,
                "markeredgewidth": 0.3,
            },
        )
        drawn["boxes"][0].set_label(label(name, facts[name]))
    axes.set_yticks(range(len(rows)), [title for title, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of one solver step")
    _log_axis(axes)
    axes.grid(axis="x", which="both", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    _tidy(axes)
    return Plot("latency", "Latency of a step", "Box plots of every timed call; the results file holds them.", figure)


def _box(milliseconds: np.ndarray) -> dict[str, Any]:
    p5, q1, median, q3, p95 = np.percentile(milliseconds, [5, 25, 50, 75, 95])
    beyond = milliseconds[(milliseconds < p5) | (milliseconds > p95)]
    return {"whislo": p5, "q1": q1, "med": median, "q3": q3, "whishi": p95, "fliers": beyond}


def _measures(row: Row) -> list[tuple[str, str]]:
    """What was measured of quality that a figure can show: (key, title)."""
    known = (("psnr", "PSNR to fp32, dB"), ("frechet", "Fréchet distance"), ("fid", "FID"))
    found = row["quality"]["rows"]
    return [
        (key, title) for key, title in known if any(found[name].get(key) is not None for name in row["milliseconds"])
    ]


def _quality(row: Row, measures: Sequence[tuple[str, str]]) -> Plot:
    """What each runtime's arithmetic costs, against the time it takes."""
    found, names = row["quality"]["rows"], list(row["milliseconds"])
    figure = _figure(9.5, 3.8)
    drawn: dict[str, Any] = {}
    for axes, (key, title) in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        for number, name in enumerate(names):
            value = found[name].get(key)
            if value is not None:
                marker = MARKERS[(number + number // 8) % 8]
                style: Any = {"color": COLOURS[number % 8], "marker": marker, "s": 55, "edgecolors": "black"}
                drawn[label(name, row["candidates"][name])] = axes.scatter(
                    row["milliseconds"][name]["median"], value, **style
                )
        axes.set(xlabel=f"ms per step at batch {row['batch']}", ylabel=title)
        axes.margins(0.15)
        axes.set_ylim(0, 1.15 * max(found[name].get(key) or 0 for name in names))
        _log_axis(axes)
        axes.grid(linewidth=0.3)
        _tidy(axes)
    figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    text = "; ".join(f"{name}: {found[name]}" for name in names)
    return Plot("quality", "Quality against speed", f"Scatter of quality against time. {text}", figure)
