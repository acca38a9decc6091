"""What pruning did to each layer's outputs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparse_engine.plots import drawn

from .oneshot import LayerResult

# Okabe and Ito's colours, which the colour-blind tell apart; and shapes, for print.
LINES = (
    ("by_magnitude", "the smallest cut away", "#999999", "v"),
    ("error", "pruned", "#0072b2", "o"),
    ("inherited", "dense weights, given the same", "#d55e00", "_"),
)
LEAST = 1e-7  # what is smaller is none, but for the rounding of float32


def plot_errors(layers: Sequence[LayerResult], method: str, path: Path) -> None:
    """Draw the error of each layer's outputs, as a share of the dense network's.

    Args:
        layers: what ``prune`` made of them; those that were left dense are named and have no points.
        method: how they were pruned.
        path: the picture: PNG, SVG or PDF.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError, OutputError: the file cannot be written, or is no figure's.
    """
    places = np.arange(len(layers))
    with drawn(path, max(6.0, 0.17 * len(layers) + 2.0), 4.2) as figure:
        axes = figure.subplots()
        for name, label, colour, marker in LINES:
            values = [value if (value := getattr(layer, name)) > LEAST else np.nan for layer in layers]
            axes.plot(places, values, marker, color=colour, label=label, markersize=4)
        axes.set_yscale("log")
        axes.set_ylabel("error of the outputs, share of their energy")
        axes.margins(x=0.01)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(places, [layer.name for layer in layers], rotation=90, fontsize=5 if len(layers) > 40 else 7)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=len(LINES))
        axes.set_title(f"Per layer, pruned by {method}", loc="left")
