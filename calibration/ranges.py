"""From what a tensor held to the range that 8 bits cover: max, percentile, MSE, entropy.

A wider range rounds more coarsely, a narrower one cuts more off; the four methods weigh the two differently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparse_engine.errors import OptionError

from .formats import Format
from .observe import Activation

PERCENTILE = 99.99
SHRINKAGE = np.linspace(1.0, 0.2, 33)  # shares of the largest value that the searches try
HISTOGRAM_BINS = 2048
LEVELS = 128  # of a symmetric 8-bit quantiser, on one side

Range = tuple[float, float]
RangeMethod = Callable[[Activation, Format], Range]


def max_range(activation: Activation, form: Format) -> Range:
    """All that was seen: nothing is cut off."""
    return float(activation.lows.min()), float(activation.highs.max())


def percentile_range(activation: Activation, form: Format) -> Range:
    """All but one value in ten thousand: outliers are cut off.

    Source: Wu et al. 2020, arXiv:2004.09602, section 3.3.
    """
    low, high = np.percentile(activation.values, [100 - PERCENTILE, PERCENTILE])
    return float(low), float(high)


def mse_range(activation: Activation, form: Format) -> Range:
    """The range whose rounding and cutting cost the least mean square error.

    Both ends shrink together first, then, for a format with a zero point, each by itself.

    Source: Banner et al. 2019, arXiv:1810.05723, section 2, by search in place of a fitted distribution.
    """
    low, high = max_range(activation, form)
    low, high = _least_error(activation, form, [(share * low, share * high) for share in SHRINKAGE])
    if form.symmetric:
        return low, high
    low, high = _least_error(activation, form, [(share * low, high) for share in SHRINKAGE])
    return _least_error(activation, form, [(low, share * high) for share in SHRINKAGE])


def entropy_range(activation: Activation, form: Format) -> Range:
    """The threshold on |x| that loses the least information: the smallest Kullback-Leibler divergence.

    Source: Migacz 2017, "8-bit Inference with TensorRT", GTC S7310.
    """
    low, high = max_range(activation, form)
    counts, edges = np.histogram(np.abs(activation.values), HISTOGRAM_BINS, range=(0.0, max(-low, high) or 1.0))
    kept = np.arange(LEVELS, HISTOGRAM_BINS + 1, LEVELS // 8)
    threshold = edges[min(kept, key=lambda bins: _divergence(counts, int(bins)))]
    return max(low, -float(threshold)), min(high, float(threshold))


RANGE_METHODS: dict[str, RangeMethod] = {
    "max": max_range,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}


def range_method(name: str) -> RangeMethod:
    """Look a method up. Raises OptionError on a name that is none."""
    if name not in RANGE_METHODS:
        raise OptionError(f"range method {name!r} is not known; expected one of {', '.join(RANGE_METHODS)}")
    return RANGE_METHODS[name]


def _least_error(activation: Activation, form: Format, candidates: list[Range]) -> Range:
    return min(candidates, key=lambda ends: square_error(activation.values, form, ends))


def square_error(values: np.ndarray, form: Format, ends: Range) -> float:
    """Mean square error of values that are quantised to a range and back."""
    scale, zero = form.scale_and_zero(*ends)
    return float(np.mean((form.dequantize(form.quantize(values, scale, zero), scale, zero) - values) ** 2))


def _divergence(counts: np.ndarray, kept: int) -> float:
    """KL divergence between a histogram cut off after ``kept`` bins and the same in ``LEVELS`` levels."""
    reference = counts[:kept].astype(np.float64)
    starts = np.linspace(0, kept, LEVELS, endpoint=False).astype(int)
    level = np.repeat(np.arange(LEVELS), np.diff(np.append(starts, kept)))
    filled = reference > 0
    share = np.bincount(level, filled, LEVELS)
    quantised = np.where(filled, (np.bincount(level, reference, LEVELS) / np.maximum(share, 1))[level], 0.0)
    reference[-1] += counts[kept:].sum()  # what is cut off lands on the last level
    occupied = (reference > 0) & (quantised > 0)
    if not occupied.any():
        return np.inf
    p, q = reference / reference.sum(), quantised / quantised.sum()
    missing = p[(reference > 0) & (quantised == 0)].sum()  # the last bin, where it was empty before the cut
    return float(np.sum(p[occupied] * np.log(p[occupied] / q[occupied])) + missing * np.log(HISTOGRAM_BINS))
