"""What lower precisions cost the shipped digit models: dense and 2:4, fp32, fp16, bf16 and int8.

    python examples/digits/quantisation.py --write

calibrates each model, builds an engine of it in each precision (fp16 and bf16 with the torch backend, which rounds on a
CPU as it does on a GPU), draws 2,000 samples (200 of each digit, no guidance) from the same seed, and prints what the
classifier and the Fréchet distance say of them, how far they are from the fp32 engine's samples (PSNR), and how far
the predicted noise is from fp32's at states of trajectories that were not calibrated on. ``--write`` puts the table
into this folder's README.md and the numbers into quantisation.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import data
import evaluate
import numpy as np

from sparse_engine import SparseEngine, __version__
from sparse_engine.backends import BuildOptions
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import CalibrationData, collect
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.export.build import build_engine
from sparse_engine.images import psnr

MODELS = {
    "dense": ("dense.pth", False),
    "SparseDM, 2:4": ("sparsedm.pth", True),
}
REFERENCE = "fp32"
BACKENDS = {REFERENCE: "onnxruntime", "fp16": "torch", "bf16": "torch", "int8": "onnxruntime"}
LATE, EARLY = 0.8, 0.25  # of the noise: the states above and below
RESULTS = evaluate.HERE / "quantisation.json"
BEGIN = "<!-- table: quantisation.py --write -->"
PIXELS = (-1.0, 1.0)


def measure(samples: int) -> dict[str, Any]:
    """Measure each model in each precision. Returns what quantisation.json holds."""
    real = data.load()[0].reshape(-1, 64)
    machine, _ = evaluate.classifier()
    labels = np.resize(np.arange(data.NUM_DIGITS), samples)
    rows = []
    for model, (checkpoint, sparse) in MODELS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            expected: tuple[np.ndarray, np.ndarray] | None = None
            calibration, held_out = calibrate(evaluate.HERE / checkpoint, folder, sparse)
            for precision, backend in BACKENDS.items():
                path, manifest = build_engine(
                    evaluate.HERE / checkpoint,
                    folder / f"{precision}.sengine",
                    backend=backend,
                    options=BuildOptions(sparse, precision),
                    quantisation=calibration if precision == "int8" else None,
                )
                with SparseEngine.load(path, autotune=False) as engine:  # int8 in 8 bits, though floats be faster
                    eps = engine.predict(held_out.x, held_out.times, conditioning=held_out.conditioning)
                    drawn = draw(engine, labels)
                expected = expected or (eps, drawn)
                pixels = drawn.clip(*PIXELS).reshape(samples, 64)
                rows.append(
                    {
                        "model": model,
                        "precision": precision,
                        "backend": manifest.backend["name"],
                        "accuracy": float((machine.predict(pixels) == labels).mean()),
                        "frechet": frechet_distance(pixels, real),
                        "psnr": None if precision == REFERENCE else psnr(drawn, expected[1], PIXELS),
                        "eps_error": errors(eps, expected[0], held_out),
                        "sqnr_db": {each["name"]: each["sqnr_db"] for each in manifest.layers if each.get("sqnr_db")},
                    }
                )
    return {
        "command": "python examples/digits/quantisation.py --write",
        "tool_version": __version__,
        "samples": samples,
        "sampler": evaluate.SAMPLER,
        "steps": evaluate.STEPS,
        "held_out_states": len(held_out),
        "rows": rows,
    }


def calibrate(checkpoint: Path, folder: Path, sparse: bool) -> tuple[Quantisation, CalibrationData]:
    """Calibration data of a model, in a file; and the part of it that no range is found on."""
    output = folder / "calibrated.sengine"
    path, _ = build_engine(checkpoint, output, backend="onnxruntime", options=BuildOptions(sparse))
    with SparseEngine.load(path) as engine:
        found = collect(engine)
    found.save(folder / "calib.npz")
    return Quantisation(folder / "calib.npz"), found.split()[1]


def draw(engine: SparseEngine, labels: np.ndarray) -> np.ndarray:
    """One sample a label, float32 [n, 1, 8, 8]."""
    settings: dict[str, Any] = {"steps": evaluate.STEPS, "sampler": evaluate.SAMPLER, "batch_size": 100}
    return engine.sample(len(labels), labels=labels, output="float", **settings)


def errors(found: np.ndarray, expected: np.ndarray, states: CalibrationData) -> dict[str, float]:
    """Relative errors of the predicted noise: over all times, and where there is most noise and least."""
    parts = {"all": states.times >= 0, "late": states.times > LATE, "early": states.times < EARLY}
    return {name: relative_error(found[part], expected[part]) for name, part in parts.items()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"| model | precision | accuracy | Fréchet | PSNR | eps error | t > {LATE} | t < {EARLY} | worst layer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        error = row["eps_error"]
        cells = [row["model"], row["precision"], f"{row['accuracy']:.1%}", f"{row['frechet']:.3f}"]
        if row["precision"] == REFERENCE:
            cells += ["-"] * 5
        else:
            cells += [f"{row['psnr']:.1f} dB", *(f"{error[part]:.2%}" for part in ("all", "late", "early"))]
            worst = min(row["sqnr_db"], key=lambda name: row["sqnr_db"][name], default=None)
            cells.append(f"`{worst}` {row['sqnr_db'][worst]:.1f} dB" if worst else "-")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{results['samples']:,} samples each, {results['steps']} steps of {results['sampler']}, no guidance. PSNR of "
        "samples and error of eps are against fp32; the error is root mean square over root mean square, at "
        f"{results['held_out_states']} states of trajectories that were not calibrated on. Worst layer: the lowest "
        "ratio of a quantised layer's output to its error.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --write, put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results = measure(options.samples)
    print(table(results))
    if options.write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        evaluate.write_table(evaluate.HERE / "README.md", BEGIN, table(results))


if __name__ == "__main__":
    main()
