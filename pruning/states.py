"""What layers are given while they are pruned: states of the dense model's own trajectories, or noisy images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.artifact import SUFFIX
from sparse_engine.backends import BuildOptions
from sparse_engine.calibration.collect import EVERY, CalibrationData, check_amounts, collect, load_calibration
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError
from sparse_engine.export.build import build_engine
from sparse_engine.export.model import Model
from sparse_engine.export.options import MaskOptions, ModelOptions
from sparse_engine.files import scratch_folder

from .data import DataOptions, load_data
from .draws import Draws, times

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class StateOptions:
    """Where states come from.

    Attributes:
        calib: what ``sparse-engine calibrate`` wrote; None for the model's own trajectories.
        data: images, or latents, that noise is put on, as ``load_data`` takes them; in place of trajectories.
        skip_broken: whether pictures that cannot be read are left out.
        images, steps: trajectories and the steps of each, of which every fourth state is kept.
        sampler: of the trajectories; None is the model's own.
        conditioning, negative: what the network is told, by name: ``collect``.
        seed: of the noise.
    """

    calib: Path | None = None
    data: Path | None = None
    skip_broken: bool = False
    images: int = 64
    steps: int = 20
    sampler: str | None = None
    conditioning: Mapping[str, Any] | None = None
    negative: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_amounts(self.images, self.steps, self.seed)
        if self.calib is not None and self.data is not None:
            raise OptionError("--calib and --data are given: states come from one of them", "leave one out")
        if self.skip_broken and self.data is None:
            raise OptionError("--skip-broken is given without --data", "leave it out")

    def to_dict(self) -> dict[str, Any]:
        """What fixes the states, for a journal."""
        told = sorted({*(self.conditioning or {}), *(self.negative or {})})
        return {
            "calib": None if self.calib is None else str(self.calib),
            "data": None if self.data is None else str(self.data),
            "skip_broken": self.skip_broken,
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
        InputError: the calibration file, or the images, cannot be used.
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
    if options.data is not None:
        return _of_images(options.data, model, options, progress)
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


def _of_images(path: Path, model: Model, options: StateOptions, progress: Progress) -> CalibrationData:
    """As many states as trajectories would give: images in random order with noise of random times."""
    data = load_data(path, model, DataOptions(skip_broken=options.skip_broken), progress)
    count, schedule, shape = options.images * options.steps // EVERY, model.schedule, model.config.data_shape
    samples = np.arange(count)
    draws = Draws(options.seed, data.count, count)
    drawn = draws.of(0, samples)
    examples = data.examples(draws.rows(0, samples), drawn, draws, 0, samples)
    drawn_times = times(schedule, drawn.uniform)
    scale, spread = (of(drawn_times).astype(np.float32)[:, None, None, None] for of in (schedule.alpha, schedule.sigma))
    x = scale * examples.x0 + spread * draws.noise(samples, shape)(0)
    states = CalibrationData(
        x,
        drawn_times,
        schedule.network_time(drawn_times).astype(np.float32),
        {each.name: examples.told[each.name].astype(each.dtype) for each in model.conditions},
        np.ones(count, np.float32),
        {"checkpoint_sha256": model.checkpoint.sha256, "seed": options.seed, "images": data.count},
    )
    return states.take(np.argsort(-drawn_times, kind="stable"))
