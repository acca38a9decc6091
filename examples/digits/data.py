"""scikit-learn's digits: 1,797 real handwritten digits of 8x8 pixels, which need no download."""

from __future__ import annotations

import numpy as np

NUM_DIGITS = 10
NULL_CLASS = 10  # the eleventh row of the label table: "no label", for classifier-free guidance


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return images float32 [1797, 1, 8, 8] in [-1, 1] and labels int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images.astype(np.float32) / 8.0 - 1.0)[:, None]  # pixel values are 0..16
    return images, digits.target.astype(np.int64)
