"""Train a text-to-image U-ViT on scikit-learn's digits, then make it 2:4 sparse the SparseDM way.

    python examples/digits_text/train_text.py

A text is what a text encoder makes of it, some vectors. Here each digit has a code of seven fixed random vectors in its
place, and "no text" has another, so the whole of a text-to-image model can be tried with no encoder and no download.
The images and the training are those of examples/digits. Beside ``dense.pth`` and ``sparsedm.pth`` it writes
``contexts.npz``, the codes of the digits 0..9 (``context`` [10, 7, 32]), and ``null_context.npy``, that of "no text".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "digits"))

import data  # noqa: E402
import train  # noqa: E402

from sparse_engine.export.families.uvit_t2i import UViTT2IConfig  # noqa: E402


def codes(config: UViTT2IConfig) -> np.ndarray:
    """What the network is told of the digits 0..9 and, in the last row, of no text: float32 [11, length, dim]."""
    shape = (data.NULL_CLASS + 1, config.context_length, config.context_dim)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def main() -> None:
    """Train both models, and write what they are told."""
    chosen = train.options(__doc__, dense_steps=3000, sparse_steps=1500, out=HERE)
    config = UViTT2IConfig.from_dict(json.loads((HERE / "config.json").read_text()))
    told = codes(config)
    chosen.out.mkdir(parents=True, exist_ok=True)
    null = chosen.out / "null_context.npy"
    np.savez(chosen.out / "contexts.npz", context=told[: data.NUM_DIGITS])
    np.save(null, told[data.NULL_CLASS])
    _, digits = data.load()
    train.train_both(
        train.anew(HERE / "config.json"),
        chosen.dense_steps,
        chosen.sparse_steps,
        chosen.out,
        told={"context": told[digits]},
        given=[f"--null-context={null}"],
    )


if __name__ == "__main__":
    main()
