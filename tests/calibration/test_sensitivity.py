"""Measured cost: per layer, over time; and the search for the layers that must stay float."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from sparse_engine.backends import StepGraph
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.observe import observe, predictions
from sparse_engine.calibration.quantize import SCHEMES, observed_tensors, quantize
from sparse_engine.calibration.ranges import max_range
from sparse_engine.calibration.sensitivity import layers_to_keep_float, measure, rank_layers, relative_error
from sparse_engine.errors import QualityLimitError

SCHEME = SCHEMES["onnxruntime", "int8"]
Make = Callable[[Sequence[str]], StepGraph]


@pytest.fixture(scope="module")
def few(inner_layers: list[str]) -> list[str]:
    return [name for name in inner_layers if name.startswith("mid_block")]


@pytest.fixture(scope="module")
def make(graph: StepGraph, data: CalibrationData, few: list[str]) -> Make:
    """Quantise some layers; the range of one of them is far too narrow, so that layer is the sensitive one."""
    seen = observe(graph, data, observed_tensors(graph, few, [], SCHEME))
    ranges = {key: max_range(activation, SCHEME.activations) for key, activation in seen.items()}
    low, high = ranges["mid_block.mlp.fc1"]
    ranges["mid_block.mlp.fc1"] = (low / 8, high / 8)
    return lambda layers: quantize(graph, ranges, layers, [], SCHEME)


def test_relative_error() -> None:
    expected = np.array([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert relative_error(1.1 * expected, expected) == pytest.approx(0.1)


def test_quality_is_the_error_of_prediction_and_layers(
    graph: StepGraph, data: CalibrationData, make: Make, few: list[str]
) -> None:
    quantised = make(few)
    quality = measure(graph, quantised, data, few)
    expected = relative_error(predictions(quantised, data), predictions(graph, data))
    assert quality.loss == pytest.approx(expected)
    assert quality.samples == len(data)
    assert [t for t, _ in quality.by_time] == sorted((t for t, _ in quality.by_time), reverse=True)
    squares = [error**2 for _, error in quality.by_time]
    assert min(squares) <= quality.loss**2 <= max(squares)
    assert quality.sqnr["mid_block.attn.qkv"] > 30 > 20 > quality.sqnr["mid_block.mlp.fc1"]


def test_an_exact_graph_costs_nothing(graph: StepGraph, data: CalibrationData, few: list[str]) -> None:
    quality = measure(graph, graph, data, few)
    assert quality.loss == 0
    assert set(quality.sqnr.values()) == {np.inf}


def test_the_sensitive_layer_ranks_first_and_goes_back_to_float(
    graph: StepGraph, data: CalibrationData, make: Make, few: list[str]
) -> None:
    ranking = rank_layers(make, few, graph, data)
    assert ranking[0] == "mid_block.mlp.fc1"
    assert sorted(ranking) == sorted(few)
    others = [name for name in few if name != "mid_block.mlp.fc1"]
    expected = predictions(graph, data)
    without, whole = (relative_error(predictions(make(some), data), expected) for some in (others, few))
    assert without < whole / 2
    assert layers_to_keep_float(make, few, graph, data, 2 * without) == ["mid_block.mlp.fc1"]
    assert layers_to_keep_float(make, few, graph, data, 1.01 * whole) == []


def test_what_is_kept_is_no_more_than_needed(
    graph: StepGraph, data: CalibrationData, make: Make, few: list[str]
) -> None:
    expected, ranking = predictions(graph, data), rank_layers(make, few, graph, data)
    limit = relative_error(predictions(make(ranking[2:]), data), expected)
    told: list[str] = []
    assert layers_to_keep_float(make, few, graph, data, limit, told.append) == ranking[:2]
    assert "sensitivity of layer 4 of 4" in told


def test_a_limit_that_cannot_be_met(graph: StepGraph, data: CalibrationData, make: Make, few: list[str]) -> None:
    with pytest.raises(QualityLimitError, match="--max-quality-loss 1e-09: no layer can be quantised within it"):
        layers_to_keep_float(make, few, graph, data, 1e-9)
