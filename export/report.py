"""The per-layer report of a checkpoint, as a dictionary and as a chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.plots import drawn

from .bake import bake
from .masks import Pattern
from .model import load_model
from .options import ModelOptions
from .write import warnings_of

# What each half of the chart shows: all, what a mask leaves of it, and what it is.
PANELS = (("parameters", "nonzeros", "parameters"), ("macs", "macs_nonzero", "multiply-accumulates"))


def inspect_checkpoint(
    path: Path, *, rule: str, pattern: str, layers: Sequence[str] | None, model: ModelOptions
) -> dict[str, Any]:
    """What a checkpoint is and what masking it would do. Arguments and errors as ``bake`` and ``build_engine``."""
    loaded = load_model(path, model.family, **model.given())
    baked = bake(loaded, rule, Pattern.parse(pattern), layers)
    schedule = loaded.recipe.schedule
    return {
        "family": loaded.family.name,
        "config": dataclasses.asdict(loaded.config),  # type: ignore[call-overload]
        "data_shape": list(loaded.config.data_shape),
        "conditioning": [each.to_dict() for each in loaded.conditions],
        "schedule": dict(schedule) if isinstance(schedule, Mapping) else {"name": schedule},
        "prediction": loaded.recipe.prediction,
        "checkpoint_sha256": loaded.checkpoint.sha256,
        "mask": baked.recipe(),
        "layers": [layer.to_dict() for layer in baked.layers],
        "notes": [*loaded.notes, *warnings_of(baked)],
    }


def plot_layers(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw parameters and multiply-accumulates per layer, before and after masking, to a PNG, an SVG or a PDF.

    A layer's multiply-accumulates are those of one sample: its weights times the places that they are applied to.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError, OutputError: the file cannot be written, or is no figure's.
    """
    names = [layer["name"] for layer in layers]
    with drawn(path, max(6.0, 0.17 * len(layers) + 2.0), 6.4) as figure:
        above, below = figure.subplots(2, sharex=True)
        places = np.arange(len(layers))
        for axes, (all_of, kept, unit) in zip((above, below), PANELS, strict=True):
            before, after = (np.array([layer[name] for layer in layers], np.float64) for name in (all_of, kept))
            axes.bar(places, before, width=0.85, color="#bbbbbb", label=f"stored: {before.sum() / 1e6:.2f} M")
            axes.bar(places, after, width=0.85, color="#0072b2", label=f"after the mask: {after.sum() / 1e6:.2f} M")
            axes.set_ylabel(unit)
            axes.margins(x=0.01)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="upper left", frameon=False)
        below.set_xticks(places, names, rotation=90, fontsize=5 if len(layers) > 40 else 7)
        above.set_title("Per layer, before and after the mask", loc="left")
