"""The per-layer report of a checkpoint, as a dictionary and as a chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.errors import MissingDependencyError
from sparse_engine.plots import save_figure

from .bake import bake
from .build import warnings_of
from .masks import Pattern
from .model import load_model
from .options import ModelOptions


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
    """Draw parameters per layer before and after masking, to a PNG, an SVG or a PDF.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OptionError, OutputError: the file cannot be written, or is no figure's.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--plot needs matplotlib", "pip install 'sparse-engine[bench]'") from error
    from matplotlib.figure import Figure

    names = [layer["name"] for layer in layers]
    before = np.array([layer["parameters"] for layer in layers])
    after = np.array([layer["nonzeros"] for layer in layers])
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(max(6.0, 0.17 * len(layers) + 2.0), 4.2), layout="constrained")
        axes = figure.add_subplot()
        positions = np.arange(len(layers))
        axes.bar(positions, before, width=0.85, color="#bbbbbb", label=f"stored: {before.sum() / 1e6:.2f} M")
        axes.bar(positions, after, width=0.85, color="#0072b2", label=f"after the mask: {after.sum() / 1e6:.2f} M")
        axes.set_xticks(positions, names, rotation=90, fontsize=5 if len(layers) > 40 else 7)
        axes.set_ylabel("parameters")
        axes.set_title("Parameters per layer, before and after the mask", loc="left")
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
        save_figure(figure, path)
