"""Samplers against steps on the shipped sparse digits model: the table and the picture of docs/samplers.md.

    python examples/digits/samplers.py --write

draws 1,000 samples (100 of each digit, no guidance, the same seed) for every sampler and number of network
evaluations, and measures the Fréchet distance to the real digits in pixel space and a classifier's accuracy.
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
from sparse_engine.export.build import build_engine
from sparse_engine.plots import save_figure
from sparse_engine.sampling import SAMPLERS

DOCS = evaluate.HERE.parents[1] / "docs"
STEPS = (5, 10, 20, 50)
BEGIN, END = "<!-- table: examples/digits/samplers.py --write -->", evaluate.END
# Okabe and Ito's colours, told apart by the colour-blind; markers tell them apart without any colour.
STYLES = list(
    zip(
        ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#777777"),
        "os^vD*Px",
        strict=True,
    )
)


def measure(samples: int) -> dict[str, Any]:
    """Measure every sampler. Returns what samplers.json holds."""
    real = data.load()[0].reshape(-1, 64)
    machine, _ = evaluate.classifier()
    labels = np.resize(np.arange(data.NUM_DIGITS), samples)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.sengine"
        path, _ = build_engine(evaluate.HERE / "sparsedm.pth", output, options=BuildOptions(sparse=True))
        with SparseEngine.load(path) as engine:
            for sampler in SAMPLERS:
                rows[sampler] = {}
                for steps in STEPS:
                    drawn = engine.sample(
                        samples, steps=steps, sampler=sampler, labels=labels, batch_size=100, output="float"
                    )
                    pixels = drawn.clip(-1, 1).reshape(samples, 64)
                    accuracy = float((machine.predict(pixels) == labels).mean())
                    rows[sampler][str(steps)] = {"frechet": frechet_distance(pixels, real), "accuracy": accuracy}
    command = "python examples/digits/samplers.py --write"
    return {"command": command, "tool_version": __version__, "samples": samples, "samplers": rows}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: Fréchet distance and, in brackets, accuracy."""
    lines = [
        "| sampler | " + " | ".join(f"{steps} evaluations" for steps in STEPS) + " |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for sampler, row in results["samplers"].items():
        cells = [f"{row[str(steps)]['frechet']:.2f} ({row[str(steps)]['accuracy']:.1%})" for steps in STEPS]
        lines.append(f"| `{sampler}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw distance and error against evaluations, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    distance, error = figure.subplots(1, 2)
    for (sampler, row), (colour, marker) in zip(results["samplers"].items(), STYLES, strict=True):
        style = {"color": colour, "marker": marker, "label": sampler, "markersize": 5, "linewidth": 1.2}
        distance.plot(STEPS, [row[str(steps)]["frechet"] for steps in STEPS], **style)
        error.plot(STEPS, [max(100 * (1 - row[str(steps)]["accuracy"]), 0.1) for steps in STEPS], **style)
    for axes, title in ((distance, "Fréchet distance to the real digits"), (error, "misread by the classifier, %")):
        axes.set(xscale="log", yscale="log", xlabel="network evaluations", title=title)
        axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = distance.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Print the table; with --write, put it into docs/samplers.md beside its picture and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results = measure(options.samples)
    print(table(results))
    if options.write:
        (DOCS / "samplers.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, DOCS / "samplers.png")
        evaluate.write_table(DOCS / "samplers.md", BEGIN, table(results))


if __name__ == "__main__":
    main()
