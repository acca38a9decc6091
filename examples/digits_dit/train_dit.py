"""Train a class-conditional DiT on scikit-learn's digits, then make it 2:4 sparse the SparseDM way.

    python examples/digits_dit/train_dit.py

The images and the training are those of examples/digits. The network predicts eps alone, and no variance.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "digits"))

import train  # noqa: E402


def main() -> None:
    """Train both models."""
    chosen = train.options(__doc__, dense_steps=3000, sparse_steps=1500, out=HERE)
    train.train_both(train.anew(HERE / "config.json"), chosen.dense_steps, chosen.sparse_steps, chosen.out)


if __name__ == "__main__":
    main()
