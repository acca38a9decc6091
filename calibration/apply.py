"""A float model, calibration data and a backend's scheme -> a quantised step graph, with what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.backends.base import StepGraph
from sparse_engine.errors import OptionError, QualityLimitError

from .collect import CalibrationData
from .observe import layer_inputs, observe
from .quantize import Scheme, observed_tensors, quantize
from .ranges import range_method
from .sensitivity import Quality, layers_to_keep_float, measure
from .smooth import check_strength, migrate, smoothing_factors


@dataclass(frozen=True)
class Quantisation:
    """What a quantised build is asked for.

    Attributes:
        calibration: the file that ``sparse-engine calibrate`` wrote.
        ranges: how activation ranges are found: "mse", "max", "percentile" or "entropy".
        smooth: strength of SmoothQuant's migration, 0 to 1; None is without.
        keep_float: globs over the names of layers that stay float.
        max_quality_loss: put the most sensitive layers back to float until the loss is within this; None is no limit.

    Raises OptionError on a method that is none, and on numbers out of range.
    """

    calibration: Path
    ranges: str = "mse"
    smooth: float | None = None
    keep_float: tuple[str, ...] = ()
    max_quality_loss: float | None = None

    def __post_init__(self) -> None:
        range_method(self.ranges)
        check_strength(self.smooth)
        if self.max_quality_loss is not None:
            arguments.real_number("--max-quality-loss", self.max_quality_loss, above=0)


@dataclass(frozen=True)
class Quantised:
    """A quantised step graph.

    Attributes:
        graph: what the engine is built from.
        layers: the layers in 8 bits.
        quality: against the float32 network, on samples that no range was found on.
        facts: what was done, for the manifest.
    """

    graph: StepGraph
    layers: list[str]
    quality: Quality
    facts: dict[str, Any]


def quantize_model(
    reference: StepGraph,
    graph: StepGraph,
    data: CalibrationData,
    scheme: Scheme,
    wanted: Quantisation,
    *,
    always_float: Sequence[str] = (),
    sparse: Sequence[str] = (),
    progress: Callable[[str], None] = lambda stage: None,
) -> Quantised:
    """Find ranges on the float model and put Q/DQ into the graph that the engine is built from.

    Args:
        reference: the model's step graph in float32.
        graph: the same in the precision that the backend wants; may be ``reference``.
        data: calibration data of this model.
        scheme: the backend's formats.
        wanted: ranges, smoothing, and what stays float.
        always_float: globs that the family keeps in float: the ends of the network, the embedding of time.
        sparse: layers with 2:4 weights.
        progress: told each stage.

    Raises:
        OptionError: a glob that matches nothing, no layer left to quantise.
        QualityLimitError: the limit cannot be met.
        InputError: an activation is NaN or infinite.
    """
    find_range = range_method(wanted.ranges)
    layers = _chosen_layers(list(reference.layers), always_float, wanted.keep_float)
    fitted, held_out = data.split()
    smoothed = reference
    if wanted.smooth is not None:
        progress("observing activations for smoothing")
        seen = observe(reference, fitted, layer_inputs(reference.proto, layers))
        factors = smoothing_factors(reference, seen, layers, wanted.smooth)
        smoothed, graph = migrate(reference, factors), migrate(graph, factors)
    tensors = observed_tensors(smoothed, layers, sparse, scheme)
    stage = "observing activations"
    seen = observe(smoothed, fitted, tensors, lambda done, total: progress(f"{stage}: sample {done} of {total}"))
    progress("finding ranges")
    ranges = {key: find_range(activation, scheme.activations) for key, activation in seen.items()}

    def make(some: Sequence[str]) -> StepGraph:
        return quantize(graph, ranges, some, sparse, scheme)

    kept: list[str] = []
    if wanted.max_quality_loss is not None:
        kept = layers_to_keep_float(make, layers, reference, held_out, wanted.max_quality_loss, progress)
    layers = [name for name in layers if name not in set(kept)]
    progress("quantising")
    made = make(layers)
    progress("measuring the quantised network")
    quality = measure(reference, made, held_out, layers)
    if not np.isfinite(quality.loss):
        raise QualityLimitError(
            "the quantised network predicts NaN or infinite values",
            "keep the layers that 8 bits break in float with --keep-float, or have them found with --max-quality-loss",
        )
    facts = {**_facts(scheme, wanted, kept, quality), "samples": {"ranges": len(fitted), "quality": quality.samples}}
    return Quantised(made, layers, quality, facts)


def _facts(scheme: Scheme, wanted: Quantisation, kept: list[str], quality: Quality) -> dict[str, Any]:
    """What was done, for the manifest."""
    return {
        "weights": scheme.weights.name,
        "activations": scheme.activations.name,
        "ranges": wanted.ranges,
        "smooth": wanted.smooth,
        "max_quality_loss": wanted.max_quality_loss,
        "kept_float_for_quality": kept,
        "calibration_sha256": hashlib.sha256(wanted.calibration.read_bytes()).hexdigest(),
        "quality_loss": quality.loss,
        "quality_loss_by_time": quality.by_time,
    }


def _chosen_layers(layers: list[str], always_float: Sequence[str], keep_float: Sequence[str]) -> list[str]:
    for glob in keep_float:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise OptionError(
                f"--keep-float {glob!r} matches none of the {len(layers)} layers",
                f"names look like {', '.join(layers[:3])}; `sparse-engine inspect` lists them",
            )
    globs = (*always_float, *keep_float)
    chosen = [name for name in layers if not any(fnmatchcase(name, glob) for glob in globs)]
    if not chosen:
        raise OptionError("--keep-float leaves no layer to quantise", "build in fp32, fp16 or bf16")
    return chosen
