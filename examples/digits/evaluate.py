"""How good the shipped digit models are: dense, SparseDM, and dense pruned in one shot.

    python examples/digits/evaluate.py --write

builds an engine of each, draws 2,000 samples (200 of each digit) with and without guidance, and prints, for every
one, the accuracy of a classifier trained on the real digits and the Fréchet distance to them in pixel space.
``--write`` puts the table into the folder's README.md and the numbers into results.json. ``--models FOLDER`` is
another folder with a ``dense.pth`` and a ``sparsedm.pth``, such as examples/digits_text, or with folders ``dense`` and
``sparsedm`` that diffusers wrote, as examples/digits_unet is; ``--weights FOLDER`` says that the weights lie elsewhere;
``--picture FILE`` draws ten of each digit by the 2:4 model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import data
import numpy as np

from sparse_engine import SparseEngine, __version__
from sparse_engine.backends import BuildOptions
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.export.assets import AssetOptions
from sparse_engine.export.build import build_engine
from sparse_engine.images import write_samples
from sparse_engine.manifest import Manifest

HERE = Path(__file__).parent
MODELS = {
    "dense": ("dense", BuildOptions()),
    "SparseDM, 2:4": ("sparsedm", BuildOptions(sparse=True)),
    "dense pruned in one shot, 2:4": ("dense", BuildOptions(sparse=True)),
}
GUIDANCE = (1.0, 2.0)
STEPS, SAMPLER = 25, "dpm-solver++"
BEGIN, END = "<!-- table: evaluate.py --write -->", "<!-- end of table -->"


def classifier() -> tuple[Any, float]:
    """A support vector machine on the real digits, and its accuracy on digits it has not seen (5-fold)."""
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import SVC

    images, labels = data.load()
    pixels = images.reshape(len(images), -1)
    machine = SVC(gamma=0.06)  # scikit-learn's 0.001 for pixels of 0..16, at our scale of -1..1
    return machine.fit(pixels, labels), float(cross_val_score(machine, pixels, labels, cv=5).mean())


def told(folder: Path, labels: np.ndarray) -> dict[str, Any]:
    """What a model is told so that it draws these digits: the labels, or the contexts that lie beside its weights."""
    contexts = folder / "contexts.npz"
    if not contexts.exists():
        return {"labels": labels}
    return {"conditioning": {"context": np.load(contexts)["context"][labels]}}


def build(folder: Path, name: str, options: BuildOptions, output: Path) -> tuple[Path, Manifest]:
    """An engine of a model that lies in a folder, with the null context beside it where there is one."""
    file, null = folder / f"{name}.pth", folder / "null_context.npy"
    checkpoint = file if file.exists() else folder / name
    assets = AssetOptions(null_context=null if null.exists() else None)
    return build_engine(checkpoint, output, options=options, assets=assets)


def evaluate(
    samples: int, folder: Path = HERE, command: str = "python examples/digits/evaluate.py --write"
) -> dict[str, Any]:
    """Measure each model of a folder. Returns what results.json holds."""
    real = data.load()[0].reshape(-1, 64)
    machine, unseen = classifier()
    labels = np.resize(np.arange(data.NUM_DIGITS), samples)
    halves = np.random.default_rng(0).permutation(len(real))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (checkpoint, options) in MODELS.items():
            path, manifest = build(folder, checkpoint, options, Path(scratch) / "model.sengine")
            masked = [layer["energy_removed"] for layer in manifest.layers if layer["masked"]]
            row = {"model": name, "energy_removed": max(masked, default=0.0)}
            with SparseEngine.load(path) as engine:
                for guidance in GUIDANCE:
                    drawn = engine.sample(
                        samples,
                        steps=STEPS,
                        sampler=SAMPLER,
                        guidance=guidance,
                        batch_size=100,
                        output="float",
                        **told(folder, labels),
                    )
                    pixels = drawn.clip(-1, 1).reshape(samples, 64)
                    row[f"accuracy_w{guidance:g}"] = float((machine.predict(pixels) == labels).mean())
                    row[f"frechet_w{guidance:g}"] = frechet_distance(pixels, real)
            rows.append(row)
    return {
        "command": command,
        "tool_version": __version__,
        "samples": samples,
        "sampler": SAMPLER,
        "steps": STEPS,
        "classifier_accuracy_on_unseen_digits": unseen,
        "frechet_between_halves_of_the_real_digits": frechet_distance(real[halves[::2]], real[halves[1::2]]),
        "models": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | accuracy, w = 1 | accuracy, w = 2 | Fréchet, w = 1 | Fréchet, w = 2 | most energy removed |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["models"]:
        removed = f"{row['energy_removed']:.1%}" if row["energy_removed"] else "-"
        lines.append(
            f"| {row['model']} | {row['accuracy_w1']:.1%} | {row['accuracy_w2']:.1%} "
            f"| {row['frechet_w1']:.2f} | {row['frechet_w2']:.2f} | {removed} |"
        )
    lines += [
        "",
        f"{results['samples']:,} samples each, {results['steps']} steps of {results['sampler']}. The classifier is "
        f"right on {results['classifier_accuracy_on_unseen_digits']:.1%} of real digits it has not seen; two halves of "
        f"the real digits are {results['frechet_between_halves_of_the_real_digits']:.2f} apart. Pixels are in -1..1.",
    ]
    return "\n".join(lines)


def write_table(document: Path, begin: str, text: str) -> None:
    """Put a table between its marks in a document."""
    before, _, rest = document.read_text().partition(begin)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{begin}\n{text}\n{END}{after}")


def main() -> None:
    """Print the table; with --write, put it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", type=Path, default=HERE)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    weights = options.weights or options.models
    other = "" if options.models == HERE else f" --models examples/{options.models.resolve().name}"
    results = evaluate(options.samples, weights, f"python examples/digits/evaluate.py{other} --write")
    print(table(results))
    if options.picture:
        draw(weights, options.picture)
    if options.write:
        (options.models / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        write_table(options.models / "README.md", BEGIN, table(results))


def draw(folder: Path, picture: Path) -> None:
    """Ten of each digit by the 2:4 model, guided, one digit a column."""
    labels = np.resize(np.arange(data.NUM_DIGITS), 10 * data.NUM_DIGITS)
    with tempfile.TemporaryDirectory() as scratch:
        path, _ = build(folder, *MODELS["SparseDM, 2:4"], Path(scratch) / "model.sengine")
        with SparseEngine.load(path) as engine:
            drawn = engine.sample(len(labels), steps=STEPS, sampler=SAMPLER, guidance=2.0, **told(folder, labels))
    write_samples(picture, [drawn])


if __name__ == "__main__":
    main()
