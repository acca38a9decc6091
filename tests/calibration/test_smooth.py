"""SmoothQuant's migration: the same function, easier to quantise."""

import numpy as np

from sparse_engine.backends import StepGraph
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.observe import layer_inputs, observe, predictions
from sparse_engine.calibration.smooth import migrate, smoothing_factors


def test_the_function_stays_and_so_do_the_zeros(
    graph: StepGraph, data: CalibrationData, inner_layers: list[str]
) -> None:
    seen = observe(graph, data, layer_inputs(graph.proto, inner_layers))
    factors = smoothing_factors(graph, seen, inner_layers, 0.5)
    assert set(factors) == {name for name in inner_layers if name.endswith(("qkv", "fc1"))}  # those behind a norm
    smoothed = migrate(graph, factors)
    expected = predictions(graph, data)
    assert np.abs(predictions(smoothed, data) - expected).max() < 1e-4 * np.abs(expected).max()
    for name in factors:
        before, after = graph.weights[graph.layers[name][0]], smoothed.weights[smoothed.layers[name][0]]
        assert np.array_equal(before == 0, after == 0)
        assert not np.array_equal(before, after)


def test_activations_become_as_even_as_asked(graph: StepGraph, data: CalibrationData, inner_layers: list[str]) -> None:
    inputs = layer_inputs(graph.proto, inner_layers)
    seen = observe(graph, data, inputs)
    smoothed = migrate(graph, smoothing_factors(graph, seen, inner_layers, 1.0))
    after = observe(smoothed, data, layer_inputs(smoothed.proto, inner_layers))
    assert np.allclose(
        after["mid_block.mlp.fc1"].channel_max, 1, rtol=1e-3
    )  # strength 1: all of it goes to the weights
    assert np.ptp(seen["mid_block.mlp.fc1"].channel_max) > 0.5
