"""What one-shot pruning costs: the dense digits, and each method of ``sparse-engine prune``.

    python examples/digits/pruning.py --write

prunes ``dense.pth`` by each method, draws 2,000 samples (200 of each digit) with each of three seeds, and prints the
Fréchet distance to the real digits in pixel space, the accuracy of a classifier trained on them, and the PSNR to what
the dense model draws from the same noise: the mean over the seeds, and half of what they differ by. ``--model PATH``
is another dense model, such as examples/digits_unet/dense. ``--write`` puts the numbers into pruning.json beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import data
import evaluate
import numpy as np

from sparse_engine import SparseEngine, __version__
from sparse_engine.backends import BuildOptions
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.export.build import build_engine
from sparse_engine.pruning.job import run_job
from sparse_engine.pruning.oneshot import PruneOptions
from sparse_engine.pruning.write import output_for

METHODS = ("full", "sparsegpt", "wanda", "magnitude")
SEEDS = (0, 1, 2)
RANGE = 2.0  # of a pixel, for the PSNR


def draw(checkpoint: Path, sparse: bool, samples: int, folder: Path) -> list[np.ndarray]:
    """Digits 0..9 in turn with each seed, unguided: float64 [n, 64]."""
    labels = np.resize(np.arange(data.NUM_DIGITS), samples)
    options: dict[str, Any] = {"steps": evaluate.STEPS, "sampler": evaluate.SAMPLER, "batch_size": 100}
    path, _ = build_engine(checkpoint, folder / "model.sengine", options=BuildOptions(sparse))
    with SparseEngine.load(path) as engine:
        drawn = [engine.sample(samples, labels=labels, seed=seed, output="float", **options) for seed in SEEDS]
    return [each.clip(-1, 1).reshape(samples, -1).astype(np.float64) for each in drawn]


def measure(drawn: list[np.ndarray], dense: list[np.ndarray]) -> dict[str, list[float]]:
    """What a model's samples are like, a number for each seed."""
    real = data.load()[0].reshape(-1, 64)
    machine, _ = evaluate.classifier()
    labels = np.resize(np.arange(data.NUM_DIGITS), len(drawn[0]))
    errors = [((own - other) ** 2).mean(axis=1) for own, other in zip(drawn, dense, strict=True)]
    return {
        "frechet": [frechet_distance(own, real) for own in drawn],
        "accuracy": [float((machine.predict(own) == labels).mean()) for own in drawn],
        "psnr": [float((10 * np.log10(RANGE**2 / error.clip(1e-12))).mean()) for error in errors],
    }


def pruning(model: Path, samples: int) -> dict[str, Any]:
    """Measure the dense model and each method. Returns what pruning.json holds."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dense = draw(model, False, samples, folder)
        rows.append({"model": "dense", **measure(dense, dense)})
        print(line(rows[-1]), flush=True)
        for method in METHODS:
            started = time.perf_counter()
            output = output_for(model, folder / (method if model.is_dir() else f"{method}.safetensors"))
            run_job(model, output, options=PruneOptions(method), folder=folder)
            seconds = time.perf_counter() - started
            rows.append({"model": method, "seconds": seconds, **measure(draw(output, True, samples, folder), dense)})
            print(line(rows[-1]), flush=True)
    facts = {"tool_version": __version__, "samples": samples, "seeds": list(SEEDS)}
    return {**facts, "sampler": evaluate.SAMPLER, "steps": evaluate.STEPS, "models": rows}


def line(row: dict[str, Any]) -> str:
    """One row of the table, as Markdown."""

    def shown(name: str, form: str) -> str:
        return f"{np.mean(row[name]):{form}} (± {np.ptp(row[name]) / 2:{form}})"

    psnr = "-" if row["model"] == "dense" else shown("psnr", ".1f")
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
    return f"| {row['model']} | {shown('frechet', '.3f')} | {shown('accuracy', '.1%')} | {psnr} | {seconds} |"


def main() -> None:
    """Print the table; with --write, keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=evaluate.HERE / "dense.pth")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    print("| model | Fréchet | accuracy | PSNR to dense, dB | seconds |\n|---|---|---|---|---|", flush=True)
    results = pruning(options.model, options.samples)
    if options.write:
        (options.model.parent / "pruning.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
