"""What quantisation costs, measured: in the network's prediction over time, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparse_engine.backends.base import StepGraph
from sparse_engine.errors import QualityLimitError

from .collect import CalibrationData
from .observe import layer_outputs, predictions, run_network

TIME_STRATA = 5
SEARCH_SAMPLES = 16  # for the rank of each layer; what is decided is measured on all samples

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Quality:
    """How far a quantised network is from the float one, over calibration data.

    Attributes:
        loss: root mean square error of the prediction over its root mean square.
        by_time: (mean schedule time, the same for a fifth of the samples), latest time first.
        sqnr: layer -> signal to quantisation noise of its output in dB, the noise of the layers before it included;
            infinite where it has no noise, NaN where it has no signal either.
        samples: how many inputs this was measured on.
    """

    loss: float
    by_time: list[tuple[float, float]]
    sqnr: dict[str, float]
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """For manifests and results files."""
        return asdict(self)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error over the root mean square of what was expected; infinite where either is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2) / max(float(np.mean(expected.astype(np.float64) ** 2)), 1e-30)))


def measure(reference: StepGraph, quantised: StepGraph, data: CalibrationData, layers: Sequence[str]) -> Quality:
    """Hold a quantised graph against the float32 one that it was made of.

    Args:
        reference: float32.
        quantised: of the same model, its layers under the same names.
        data: inputs, best those that no range was found on.
        layers: whose outputs are compared.
    """
    ours, theirs = layer_outputs(quantised.proto, layers), layer_outputs(reference.proto, layers)
    signal, noise = np.zeros(len(layers)), np.zeros(len(layers))
    found, expected = [], []
    for (_, a), (_, b) in zip(
        run_network(quantised, data, [ours[name] for name in layers]),
        run_network(reference, data, [theirs[name] for name in layers]),
        strict=True,
    ):
        found.append(a[0])
        expected.append(b[0])
        signal += [_square_sum(outputs) for outputs in b[1:]]
        noise += [_square_sum(x.astype(np.float32) - y) for x, y in zip(a[1:], b[1:], strict=True)]
    prediction, true = np.concatenate(found), np.concatenate(expected)
    strata = np.array_split(np.arange(len(data)), min(TIME_STRATA, len(data)))
    by_time = [(float(data.times[part].mean()), relative_error(prediction[part], true[part])) for part in strata]
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels = 10 * np.log10(signal / noise)
    sqnr = {name: float(value) for name, value in zip(layers, decibels, strict=True)}
    return Quality(relative_error(prediction, true), by_time, sqnr, len(data))


def _square_sum(array: np.ndarray) -> float:
    flat = array.ravel()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def layers_to_keep_float(
    make: Callable[[Sequence[str]], StepGraph],
    layers: Sequence[str],
    reference: StepGraph,
    data: CalibrationData,
    max_loss: float,
    progress: Progress = lambda stage: None,
) -> list[str]:
    """The fewest most sensitive layers that must stay float for the loss to stay within bounds.

    Each layer is quantised alone and ranked by the loss that this brings; then the number of layers that go back to
    float is halved in on, with the loss measured anew each time.

    Args:
        make: the layers to quantise -> the graph.
        layers: those that may be quantised.
        reference: float32.
        data: inputs to measure on.
        max_loss: as ``Quality.loss``.
        progress: told each stage.

    Raises:
        QualityLimitError: not one layer can be quantised within ``max_loss``.
    """
    expected = predictions(reference, data)

    def loss_with_float(kept: Sequence[str]) -> float:
        graph = make([name for name in layers if name not in set(kept)])
        return relative_error(predictions(graph, data), expected)

    progress("measuring with all layers quantised")
    if loss_with_float([]) <= max_loss:
        return []
    ranking = rank_layers(make, layers, reference, data, progress)
    low, high = 1, len(ranking)
    while low < high:
        middle = (low + high) // 2
        progress(f"measuring with {middle} of {len(layers)} layers in float")
        if loss_with_float(ranking[:middle]) <= max_loss:
            high = middle
        else:
            low = middle + 1
    if low == len(ranking):
        raise QualityLimitError(
            f"--max-quality-loss {max_loss:g}: no layer can be quantised within it",
            "allow a larger loss, or build in fp32, fp16 or bf16",
        )
    return ranking[:low]


def rank_layers(
    make: Callable[[Sequence[str]], StepGraph],
    layers: Sequence[str],
    reference: StepGraph,
    data: CalibrationData,
    progress: Progress = lambda stage: None,
) -> list[str]:
    """Layers by the loss that each brings when it alone is quantised, the most sensitive first; arguments as above."""
    few = data.take(np.unique(np.linspace(0, len(data) - 1, SEARCH_SAMPLES).astype(int)))
    expected = predictions(reference, few)
    losses = {}
    for index, name in enumerate(layers):
        progress(f"sensitivity of layer {index + 1} of {len(layers)}")
        losses[name] = relative_error(predictions(make([name]), few), expected)
    return sorted(layers, key=lambda name: -losses[name])
