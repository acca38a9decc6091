"""Compare the sparse engine with the dense model it was fine-tuned from: pictures, quality, speed.

python examples/digits/compare.py out/digits.sengine
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import data
import evaluate
import numpy as np
from rich.console import Console
from rich.table import Table

from sparse_engine import SparseEngine
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.export.build import build_engine

SAMPLES, ROUNDS = 500, 7


def draw(engine: SparseEngine, n: int) -> np.ndarray:
    """Digits 0..9 in turn, float32 [n, 1, 8, 8]."""
    labels = np.resize(np.arange(data.NUM_DIGITS), n)
    options = {"sampler": evaluate.SAMPLER, "steps": evaluate.STEPS, "guidance": 2.0, "batch_size": 100}
    return engine.sample(n, labels=labels, output="float", **options)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sparse_engine", type=Path)
    options = parser.parse_args()
    real, labels = data.load()[0].reshape(-1, 64), np.resize(np.arange(data.NUM_DIGITS), SAMPLES)
    machine, _ = evaluate.classifier()
    table = Table("engine", "file", "accuracy", "Fréchet", "ms per step at batch 100", title="Dense and sparse")
    with tempfile.TemporaryDirectory() as folder:
        dense, _ = build_engine(evaluate.HERE / "dense.pth", Path(folder) / "dense.sengine")
        paths = {"dense": dense, "2:4 sparse": options.sparse_engine}
        engines = {name: SparseEngine.load(path) for name, path in paths.items()}
        seconds = time_in_turn(engines)
        for name, engine in engines.items():
            pixels = draw(engine, SAMPLES).clip(-1, 1).reshape(SAMPLES, 64)
            accuracy = float((machine.predict(pixels) == labels).mean())
            step = 1e3 * float(np.median(seconds[name])) / evaluate.STEPS
            size = f"{paths[name].stat().st_size / 1e6:.2f} MB"
            table.add_row(name, size, f"{accuracy:.1%}", f"{frechet_distance(pixels, real):.2f}", f"{step:.2f}")
            engine.close()
    Console().print(table)


def time_in_turn(engines: dict[str, SparseEngine]) -> dict[str, list[float]]:
    """Seconds of a 100-image sample, the engines taking turns so that a drifting machine hits both; warm-up apart."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        draw(engine, 100)
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            started = time.perf_counter()
            draw(engine, 100)
            seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
