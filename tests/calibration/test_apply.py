"""The whole way from a float graph and calibration data to a quantised one; what is wanted, and what cannot be."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sparse_engine.backends import StepGraph
from sparse_engine.calibration.apply import Quantisation, Quantised, quantize_model
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.quantize import SCHEMES
from sparse_engine.errors import OptionError

ENDS = ("patch_embed.*", "time_embed.*", "decoder_pred", "final_layer")
INT8 = SCHEMES["onnxruntime", "int8"]


@pytest.fixture
def wanted(calibration_file: Path) -> Quantisation:
    return Quantisation(calibration_file)


def apply(graph: StepGraph, data: CalibrationData, wanted: Quantisation, **options: Any) -> Quantised:
    return quantize_model(graph, graph, data, INT8, wanted, always_float=ENDS, **options)


def test_ends_stay_float_and_quality_is_measured_on_other_samples(
    graph: StepGraph, data: CalibrationData, wanted: Quantisation, inner_layers: list[str]
) -> None:
    told: list[str] = []
    done = apply(graph, data, wanted, progress=told.append)
    assert done.layers == inner_layers
    assert 0 < done.quality.loss < 0.05
    assert done.facts["samples"] == {"ranges": 32, "quality": 8}
    assert "observing activations: sample 32 of 32" in told


@pytest.mark.parametrize("ranges", ["max", "percentile", "mse", "entropy"])
def test_every_range_method_works(graph: StepGraph, data: CalibrationData, wanted: Quantisation, ranges: str) -> None:
    assert apply(graph, data, dataclasses.replace(wanted, ranges=ranges)).quality.loss < 0.2


def test_smoothing_costs_nothing_by_itself(graph: StepGraph, data: CalibrationData, wanted: Quantisation) -> None:
    plain, smoothed = (apply(graph, data, dataclasses.replace(wanted, smooth=strength)) for strength in (None, 0.5))
    assert smoothed.quality.loss < 1.5 * plain.quality.loss
    assert (plain.facts["smooth"], smoothed.facts["smooth"]) == (None, 0.5)


def test_a_limit_puts_layers_back_to_float(graph: StepGraph, data: CalibrationData, wanted: Quantisation) -> None:
    limit = 0.7 * apply(graph, data, wanted).quality.loss
    done = apply(graph, data, dataclasses.replace(wanted, max_quality_loss=limit))
    kept = done.facts["kept_float_for_quality"]
    assert kept
    assert not set(kept) & set(done.layers)
    assert done.quality.loss <= limit


def test_globs_that_match_nothing_and_everything(graph: StepGraph, data: CalibrationData, wanted: Quantisation) -> None:
    with pytest.raises(OptionError, match=r"--keep-float '\*.fc9' matches none of the 16 layers"):
        apply(graph, data, dataclasses.replace(wanted, keep_float=("*.fc9",)))
    with pytest.raises(OptionError, match="--keep-float leaves no layer to quantise"):
        apply(graph, data, dataclasses.replace(wanted, keep_float=("*",)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranges": "median"}, "range method 'median' is not known; expected one of max, percentile, mse, entropy"),
        ({"smooth": 1.5}, "--smooth 1.5; expected 0 to 1"),
        ({"max_quality_loss": -1.0}, "--max-quality-loss = -1.0; expected a number above 0"),
        ({"max_quality_loss": float("nan")}, "--max-quality-loss = nan; expected a number above 0"),
    ],
)
def test_settings_out_of_range(calibration_file: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantisation(calibration_file, **change)
