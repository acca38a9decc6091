"""Train a class-conditional U-ViT on scikit-learn's digits, then make it 2:4 sparse the SparseDM way.

    python examples/digits/train.py

What is its own is the data and the settings; the training is ``sparse-engine finetune``, called twice: a dense model
from random weights, then a 2:4 one from the dense (arXiv 2404.10445): masked in every forward pass (straight-through
gradients, plus SR-STE's decay on the pruned weights, arXiv 2102.04010), with the dense model as its teacher. What is
stored is what SparseDM stores: the exponential average of the *dense* weights, without masks. Stopped, the same command
goes on where it was: the runs' folders lie in ``runs/``, until both models are there.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import data
import numpy as np

from sparse_engine.cli.main import run

HERE = Path(__file__).parent
SHARED = ("--batch=128", "--lr-decay=cosine", "--betas=0.9,0.99", "--weight-decay=0.01", "--ema=0.999", "--clip-norm=1")
DENSE = (*SHARED, "--method=dense", "--lr=1e-3")
SPARSE = (*SHARED, "--lr=5e-4", "--noise-weight=0", "--teacher-weight=1")  # a run this short learns from the teacher
WARMUP = 200
RUNS, DATA = "runs", "data.npz"


def train_both(
    start: Sequence[str],
    dense_steps: int,
    sparse_steps: int,
    out: Path,
    *,
    told: dict[str, np.ndarray] | None = None,
    given: Sequence[str] = (),
    keep: Callable[[Path, Path], object] | None = None,
) -> None:
    """Train a network, then a 2:4 one from it; write both, as ``dense`` and ``sparsedm``.

    Args:
        start: arguments of the first call: a checkpoint, or ``--from random`` with its configuration.
        dense_steps, sparse_steps: of each stage.
        out: the folder.
        told: what the network is told of each image, by name; None for the digit.
        given: further arguments of both calls.
        keep: (the run's folder, where to, without a suffix) -> writes the model; None copies the averaged weights.
    """
    runs = out / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    images, labels = data.load()
    np.savez(runs / DATA, images=images, **(told or {"labels": labels}))
    stages = (("dense", [*start, *DENSE], dense_steps), ("sparsedm", [str(runs / "dense"), *SPARSE], sparse_steps))
    for name, arguments, steps in stages:
        folder, warmup = runs / name, min(WARMUP, steps)
        named = [f"--data={runs / DATA}", f"--output={folder}", f"--steps={steps}", f"--warmup={warmup}", *given]
        command("finetune", *arguments, *named)
        (keep or copy_weights)(folder, out / name)
    shutil.rmtree(runs)


def command(*arguments: object) -> None:
    """One command of ``sparse-engine``; its failure ends the script."""
    if code := run([str(argument) for argument in arguments]):
        raise SystemExit(code)


def copy_weights(folder: Path, path: Path) -> None:
    """The averaged weights of a run's last checkpoint, as ``nnet_ema.pth`` holds them."""
    shutil.copyfile(last_checkpoint(folder), path.with_suffix(".pth"))


def last_checkpoint(folder: Path) -> Path:
    """The averaged weights of a run."""
    return max(folder.glob("*.ckpt"), key=lambda each: int(each.stem)) / "nnet_ema.pth"


def options(description: str | None, dense_steps: int, sparse_steps: int, out: Path) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense-steps", type=int, default=dense_steps)
    parser.add_argument("--sparse-steps", type=int, default=sparse_steps)
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def anew(config: Path) -> list[str]:
    """Arguments that make a network of random weights."""
    return ["--from=random", f"--config={config}"]


def main() -> None:
    """Train both models."""
    chosen = options(__doc__, dense_steps=6000, sparse_steps=3000, out=HERE)
    train_both(anew(HERE / "config.json"), chosen.dense_steps, chosen.sparse_steps, chosen.out)


if __name__ == "__main__":
    main()
