"""What SparseDM's training makes of the digits, by steps: how far from the data, how far from the dense model.

    python examples/digits/finetuning.py --write

fine-tunes ``dense.pth`` for 150, 500 and 3,000 steps of 64 with the paper's loss (noise + 0.1 teacher), and for as many
with the teacher alone; draws 2,000 samples (200 of each digit) with each of three seeds, as ``sparse-engine evaluate``
does, and prints the Fréchet distance to the real digits in pixel space, the accuracy of a classifier trained on them,
and the PSNR to what the dense model draws from the same noise: mean and standard deviation over the seeds.
``--from FILE`` starts from other weights, such as those of ``sparse-engine prune``; ``--runs FOLDER`` keeps the runs,
and goes on with them. ``--write`` puts the numbers into finetuning.json.
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
import train

from sparse_engine import __version__
from sparse_engine.bench.evaluate import Drawing
from sparse_engine.bench.evaluate import evaluate as hold_against
from sparse_engine.cli.main import run

HERE = Path(__file__).parent
BATCH, SEEDS = 64, (0, 1, 2)
LOSSES = {"noise + 0.1 teacher": ("--noise-weight=1", "--teacher-weight=0.1"), "teacher": train.SPARSE[-2:]}
SHARED = (*train.SHARED[1:], f"--batch={BATCH}", "--lr=5e-4")


def fine_tuned(dense: Path, start: Path | None, steps: int, loss: str, runs: Path) -> tuple[Path, float]:
    """A run's folder, and the seconds that it took."""
    images, labels = data.load()
    file = runs / train.DATA
    np.savez(file, images=images, labels=labels)
    name = f"{start.stem if start else dense.stem}-{steps}-{loss.replace(' ', '')}"
    given = [
        f"--data={file}",
        f"--output={runs / name}",
        f"--steps={steps}",
        f"--warmup={min(train.WARMUP, steps // 10)}",
    ]
    began = time.perf_counter()
    code = run(["finetune", str(dense), *([f"--from={start}"] if start else []), *SHARED, *LOSSES[loss], *given])
    if code:
        raise SystemExit(code)
    return runs / name, time.perf_counter() - began


def rows_of(dense: Path, start: Path | None, steps: list[int], samples: int, runs: Path) -> list[dict[str, Any]]:
    """Each training, measured; the dense model first."""
    rows: list[dict[str, Any]] = []
    for loss in LOSSES:
        for each in steps:
            folder, seconds = fine_tuned(dense, start, each, loss, runs)
            drawing = Drawing(samples, SEEDS, evaluate.STEPS, evaluate.SAMPLER, batch_size=100)
            found = hold_against(folder, dense, drawing).results["metrics"]
            if not rows:
                own = {name: row["dense"] for name, row in found.items() if "dense" in row}
                rows.append({"model": "dense", **own})
                print(line(rows[-1]), flush=True)
            measured = {name: row["candidate"] for name, row in found.items()}
            rows.append({"model": f"{each} steps, {loss}", "seconds": seconds, **measured})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the table, as Markdown."""

    def shown(name: str, form: str) -> str:
        found = row.get(name)
        return f"{found['mean']:{form}} ± {found['spread']:{form}}" if found else "-"

    seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
    cells = (row["model"], shown("frechet", ".3f"), shown("accuracy", ".1%"), shown("psnr", ".1f"), seconds)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table; with --write, keep its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, default=HERE / "dense.pth")
    parser.add_argument("--from", dest="start", type=Path)
    parser.add_argument("--steps", default="150,500,3000")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    steps = [int(each) for each in options.steps.split(",")]
    print("| from dense | Fréchet | accuracy | PSNR to dense, dB | seconds |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        runs.mkdir(parents=True, exist_ok=True)
        rows = rows_of(options.dense, options.start, steps, options.samples, runs)
    if options.write:
        facts = {"tool_version": __version__, "samples": options.samples, "seeds": list(SEEDS), "batch": BATCH}
        facts |= {
            "sampler": evaluate.SAMPLER,
            "steps": evaluate.STEPS,
            "from": str(options.start or options.dense.name),
        }
        (HERE / "finetuning.json").write_text(json.dumps({**facts, "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
