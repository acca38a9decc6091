"""What layers are given while they are pruned: states of the dense model's own trajectories, or noisy images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.artifact import SUFFIX
from sparse_engine.backends import BuildOptions
from sparse_engine.calibration.collect import CalibrationData, check_amounts, collect, load_calibration
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError
from sparse_engine.export.build import build_engine
from sparse_engine.export.model import Model
from sparse_engine.export.options import MaskOptions, ModelOptions
from sparse_engine.files import scratch_folder

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class StateOptions:
    """Where states come from.

    Attributes:
        calib: what ``sparse-engine calibrate`` wrote; None for the model's own trajectories.
        images, steps: trajectories and the steps of each, of which every fourth state is kept.
        sampler: of the trajectories; None is the model's own.
        conditioning, negative: what the network is told, by name: ``collect``.
        seed: of the noise.
    """

    calib: Path | None = None
    images: int = 64
    steps: int = 20
    sampler: str | None = None
    conditioning: Mapping[str, Any] | None = None
    negative: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(self.images, self.steps, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """What fixes the states, for a journal."""
        told = sorted({*(self.conditioning or {}), *(self.negative or {})})
        return {
            "calib": None if self.calib is None else str(self.calib),
            "images": self.images,
            "steps": self.steps,
            "sampler": self.sampler,
            "told": told,
            "seed": self.seed,
        }


def states_for(
    checkpoint: Path,
    model: Model,
    options: StateOptions,
    given: ModelOptions,
    progress: Progress = lambda done, total: None,
) -> CalibrationData:
    """States for a model, float32, in the order of time.

    Args:
        checkpoint: the model's path.
        model: what ``load_model`` read there.
        options: where they come from.
        given: what was said of the model, to build an engine of it.
        progress: told (steps done, steps in all).

    Raises:
        InputError: the calibration file cannot be used.
        NonFiniteError: the model diverges.
        UnsupportedError: no engine can be run here.
    """
    if options.calib is not None:
        return load_calibration(
            options.calib,
            checkpoint_sha256=model.checkpoint.sha256,
            data_shape=model.config.data_shape,
            conditions=model.conditions,
        )
    with scratch_folder() as folder:
        engine_file = folder / f"dense{SUFFIX}"
        build_engine(
            checkpoint,
            engine_file,
            model=given,
            masks=MaskOptions("none"),
            backend="onnxruntime",
            options=BuildOptions(),
        )
        with SparseEngine.load(engine_file, autotune=False) as engine:
            return collect(
                engine,
                images=options.images,
                steps=options.steps,
                sampler=options.sampler,
                conditioning=options.conditioning,
                negative=options.negative,
                seed=options.seed,
                progress=progress,
            )
