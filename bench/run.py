"""A run from the request to the results, written as they come."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_engine.errors import MissingDependencyError, OptionError
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning.data import Canvas

from .arms import check_backends
from .compare import Progress, compare_model
from .grid import parse_cells, run_cell
from .judges import digits_judge, fid_judge, is_digits
from .presets import network_named, preset_named
from .quality import Judge
from .settings import Settings

Row = dict[str, Any]
Save = Callable[[Row], None]
MOST_SAMPLES = 65536  # in a batch
DEFAULT_BATCHES = "1,4,16"


def run_grid(
    results: Row,
    preset: str,
    cells: str | None,
    settings: Settings,
    save: Save,
    progress: Progress,
    *,
    batch: str | None = None,
    heads: int | None = None,
) -> None:
    """Fill ``results`` with the paper's grid, cell by cell; ``save`` is called after each.

    Args:
        results: what ``describe_run`` gave.
        preset, cells: as ``preset_named`` and ``parse_cells`` take them.
        settings: how to measure.
        save: given the results so far.
        progress: told each stage as it begins.
        batch, heads: in place of the preset's.

    Raises:
        OptionError: a preset or a cell that is none.
        KeyboardInterrupt: before the first cell was finished; later the finished ones are kept, and marked.
    """
    check_backends(settings.backends)
    size = preset_named(preset)
    if batch is not None:
        size = dataclasses.replace(size, batch=parse_batches(batch)[0])
    if heads is not None:
        size = dataclasses.replace(size, heads=heads)
    wanted = parse_cells(cells)

    def rows() -> Iterable[Row]:
        for index, (patch, mlp_ratio) in enumerate(wanted):
            where = f"cell {index + 1} of {len(wanted)}, patch {patch}, mlp_ratio {mlp_ratio}"
            yield run_cell(size, patch, mlp_ratio, settings, _prefixed(where, progress))

    shared = {"kind": "grid", "preset": preset, "precision": settings.precision, "self_test": settings.self_test}
    results.update({**shared, "cells": []})
    _collect(results, results["cells"], rows(), save)


def run_checkpoint(
    results: Row,
    checkpoint: Path,
    batches: str | None,
    settings: Settings,
    save: Save,
    progress: Progress,
    *,
    quality: Path | None = None,
    samples: int = 500,
    **given: Any,
) -> None:
    """Fill ``results`` with a model's batches, and with its samples' quality.

    Args:
        results, settings, save, progress: as ``run_grid`` takes them.
        checkpoint, **given: as ``load_model`` takes them.
        batches: sizes, with commas between; None is 1, 4 and 16.
        quality: a folder of reference images for FID.
        samples: how many images are judged.

    Raises:
        InputError: something asked for cannot be had; said before anything is timed.
    """
    check_backends(settings.backends)
    sizes = parse_batches(batches or DEFAULT_BATCHES)
    model = load_model(checkpoint, **given)
    judges, notes = _judges(model, quality, samples)
    _run_model(results, model, sizes, settings, save, progress, judges, {"notes": notes})


def run_random(
    results: Row, network: str, batches: str | None, settings: Settings, save: Save, progress: Progress
) -> None:
    """Fill ``results`` with a network of random weights, by its name in ``presets``; arguments as ``run_checkpoint``'s.

    Raises OptionError on a name that is none.
    """
    check_backends(settings.backends)
    sizes = parse_batches(batches or DEFAULT_BATCHES)
    model = network_named(network).model()
    _run_model(results, model, sizes, settings, save, progress, [], {"random": network})


def parse_batches(text: str) -> list[int]:
    """ "1,4,16" -> the sizes. Raises OptionError on anything else."""
    if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text):
        raise OptionError(f"--batch {text!r}: expected whole numbers of 1 or more", "for example --batch 1,4,16")
    sizes = [int(size) for size in text.split(",")]
    if max(sizes) > MOST_SAMPLES:
        raise OptionError(f"--batch {text!r}: expected at most {MOST_SAMPLES}")
    return sizes


def _run_model(
    results: Row,
    model: Model,
    batches: list[int],
    settings: Settings,
    save: Save,
    progress: Progress,
    judges: Sequence[Judge],
    extra: Row,
) -> None:
    shared = {"kind": "model", "precision": settings.precision, "self_test": settings.self_test}
    results.update({**shared, **extra, "rows": []})
    _collect(results, results["rows"], compare_model(model, batches, settings, progress, judges), save)


def _collect(results: Row, into: list[Row], rows: Iterable[Row], save: Save) -> None:
    try:
        for row in rows:
            into.append(row)
            save(results)
    except KeyboardInterrupt:
        if not into:
            raise
        results["interrupted"] = True
        save(results)


def _judges(model: Model, references: Path | None, samples: int) -> tuple[list[Judge], list[str]]:
    """What a model's samples are held against, and what was left out and why."""
    judges, notes = [], []
    canvas = Canvas(model.config.data_shape, model.recipe.value_range)
    if is_digits(canvas, model.num_classes):
        try:
            judges.append(digits_judge(samples))
        except MissingDependencyError as error:
            notes.append(f"Left out: {error.what}.")
    if references is not None:
        judges.append(fid_judge(canvas, references, samples))
    return judges, notes


def _prefixed(where: str, progress: Progress) -> Progress:
    return lambda stage: progress(f"{where}: {stage}")
