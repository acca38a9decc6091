"""Activation ranges against time, layer by layer, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparse_engine.plots import drawn

from .collect import CalibrationData
from .observe import Activation

# Okabe and Ito's colours: extremes and middle are told apart by the colour-blind too.
EXTREME, TYPICAL = "#d55e00", "#0072b2"
COLUMNS = 4


def plot_ranges(activations: Mapping[str, Activation], data: CalibrationData, path: Path) -> None:
    """Draw what each layer is given, from the smallest to the largest value, against schedule time.

    Args:
        activations: layer -> what it was given over ``data``.
        data: the inputs, in order.
        path: the picture: PNG, SVG or PDF.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError, OutputError: the file cannot be written, or is no figure's.
    """
    rows = -(-len(activations) // COLUMNS)
    times = np.unique(data.times)
    at = [data.times == t for t in times]
    with drawn(path, 3.0 * COLUMNS, 1.7 * rows + 0.8) as figure:
        grid = figure.subplots(rows, COLUMNS, sharex=True, squeeze=False)
        for axes in grid.flat[len(activations) :]:
            axes.set_visible(False)
        for axes, (name, activation) in zip(grid.flat, activations.items(), strict=False):
            lows = np.array([[activation.lows[here].min(), np.median(activation.lows[here])] for here in at])
            highs = np.array([[activation.highs[here].max(), np.median(activation.highs[here])] for here in at])
            axes.fill_between(times, lows[:, 0], highs[:, 0], color=EXTREME, alpha=0.25, linewidth=0)
            axes.plot(times, lows[:, 1], times, highs[:, 1], color=TYPICAL, linewidth=1)
            axes.set_title(name, fontsize=7, loc="left")
            axes.tick_params(labelbottom=True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("schedule time t")
        figure.suptitle(
            f"What each layer is given over {len(data)} calibration samples: extremes (shaded), median sample (lines)",
            x=0.01,
            ha="left",
            fontsize=9,
        )
