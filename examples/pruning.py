"""The ways from a dense model to a 2:4 one, held against it: one table of a model that is shipped.

    python examples/pruning.py digits --write      # or digits_unet, or emoji

prunes the folder's dense model by each method of ``sparse-engine prune``, trains what ``full`` has made, and the dense
model itself, with ``sparse-engine finetune``: by the paper's loss (noise + 0.1 teacher), and by the teacher alone. Each
draws as many pictures of each class with each of three seeds, unguided, in 25 steps of DPM-Solver++. Printed are the
Fréchet distance to the real pictures in pixel space, the accuracy of a classifier trained on real digits, the PSNR to
what the dense model draws from the same noise (mean and standard deviation over the seeds), and the seconds of a
processor that the pruning and the training took. ``--write`` keeps each row in the folder's pruning.json as it comes,
goes on with those that are there, and puts the table where it is shown; ``--ways`` says which rows. What has been
pruned and trained is thrown away, unless ``--runs FOLDER`` keeps it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "digits"))

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402

from sparse_engine import SparseEngine, __version__  # noqa: E402
from sparse_engine.backends import BuildOptions  # noqa: E402
from sparse_engine.bench.judges import digits_judge, frechet_judge  # noqa: E402
from sparse_engine.bench.quality import Judge  # noqa: E402
from sparse_engine.bench.similarity import paired  # noqa: E402
from sparse_engine.export.build import build_engine  # noqa: E402

SEEDS, RANGE = (0, 1, 2), (-1.0, 1.0)
LOSSES = {"noise + 0.1 teacher": ("--noise-weight=1", "--teacher-weight=0.1"), "teacher": train.SPARSE[-2:]}
SHARED = (*train.SHARED[1:], "--lr=5e-4")
RESULTS = "pruning.json"
SHOWN_IN = {
    "digits": [HERE / "digits" / "README.md", HERE.parent / "docs" / "pruning.md"],
    "digits_unet": [HERE / "digits_unet" / "README.md", HERE.parent / "docs" / "pruning.md"],
    "emoji": [HERE / "emoji" / "README.md", HERE.parent / "docs" / "pruning.md"],
}


@dataclass(frozen=True)
class Subject:
    """A dense model and what it is held against.

    Attributes:
        dense: its checkpoint.
        data: an ``.npz`` of its images and labels.
        real: images, float32 [n, C, H, W] in -1..1.
        classes: that are drawn in turn.
        each: pictures of each class and seed.
        training: options of its training.
        judge: of samples.
    """

    dense: Path
    data: Path
    real: np.ndarray
    classes: int
    each: int
    training: tuple[str, ...]
    judge: Judge

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples]: every class in turn."""
        return np.resize(np.arange(self.classes), self.classes * self.each)


@dataclass(frozen=True)
class Way:
    """From the dense model to another: pruned by a method, or not; then trained for some steps by a loss, or not.

    Or a model that lies beside it.
    """

    prune: str | None = None
    steps: int = 0
    loss: str = "teacher"
    shipped: str = ""

    @property
    def name(self) -> str:
        """As the table says it."""
        if self.shipped:
            return f"the shipped `{self.shipped}`"
        if not self.steps:
            return self.prune or "dense"
        return f"{self.prune or 'dense'} + {self.steps:,} steps, {self.loss}"


PRUNED = [Way(method) for method in ("magnitude", "wanda", "sparsegpt", "full")]
TRAINED = [Way(*each, loss) for loss in LOSSES for each in (("full", 150), ("full", 500), (None, 150), (None, 500))]
LONG = [Way(None, 3000, "noise + 0.1 teacher")]
SHIPPED = {"digits": "sparsedm.pth", "digits_unet": "sparsedm", "emoji": "sparse.pth"}
WAYS = {name: [*PRUNED, *TRAINED, *LONG, Way(shipped=file)] for name, file in SHIPPED.items()}
WAYS["emoji"] = [way for way in WAYS["emoji"] if way.loss != "teacher" or not way.steps]  # an hour less


def of_digits(dense: str) -> Callable[[Path, int], Subject]:
    """The digits' images with a model of theirs."""

    def subject(runs: Path, each: int) -> Subject:
        images, labels = data.load()
        file = runs / train.DATA
        np.savez(file, images=images, labels=labels)
        samples = data.NUM_DIGITS * each
        return Subject(HERE / dense, file, images, data.NUM_DIGITS, each, ("--batch=64",), digits_judge(samples))

    return subject


def of_emoji(runs: Path, each: int) -> Subject:
    """The emoji, their model, and the 99 groups that it knows them by."""
    folder = HERE / "emoji"
    file = folder / "emoji.npz"
    held = np.load(file)
    real = held["images"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    classes = int(held["labels"].max()) + 1
    training = ("--batch=32", "--precision=bf16")
    judge = frechet_judge(real, RANGE, classes * each)
    return Subject(folder / "dense.pth", file, real, classes, each, training, judge)


SUBJECTS: dict[str, Callable[[Path, int], Subject]] = {
    "digits": of_digits("digits/dense.pth"),
    "digits_unet": of_digits("digits_unet/dense"),
    "emoji": of_emoji,
}
EACH = {"digits": 200, "digits_unet": 200, "emoji": 2}


def made(way: Way, subject: Subject, runs: Path) -> tuple[Path, dict[str, float]]:
    """Go a way. Returns what is built, and the processor's seconds that it took, if it was gone now."""
    if way.shipped:
        return subject.dense.parent / way.shipped, {}
    began = time.process_time()
    start, slug = subject.dense, way.name.replace(" ", "")
    if way.prune:
        start = runs / f"{slug}-pruned{'' if subject.dense.is_dir() else '.safetensors'}"
        if not start.exists():
            train.command("prune", subject.dense, "-o", start, f"--method={way.prune}")
    if not way.steps:
        return start, {"seconds": time.process_time() - began}
    folder = runs / slug
    given = [f"--data={subject.data}", f"--output={folder}", f"--steps={way.steps}", *subject.training]
    given.append(f"--warmup={min(train.WARMUP, way.steps // 10)}")
    train.command("finetune", subject.dense, f"--from={start}", *SHARED, *LOSSES[way.loss], *given)
    return folder, {"seconds": time.process_time() - began}


def draw(checkpoint: Path, sparse: bool, subject: Subject) -> list[np.ndarray]:
    """Every class in turn with each seed: float32 [samples, C, H, W] in -1..1."""
    options: dict[str, Any] = {"steps": evaluate.STEPS, "sampler": evaluate.SAMPLER, "batch_size": 100}
    with tempfile.TemporaryDirectory() as scratch:
        path, _ = build_engine(checkpoint, Path(scratch) / "model.sengine", options=BuildOptions(sparse))
        with SparseEngine.load(path) as engine:
            labels = subject.labels
            drawn = [engine.sample(len(labels), labels=labels, seed=seed, output="float", **options) for seed in SEEDS]
    return [each.clip(*RANGE) for each in drawn]


def measured(drawn: list[np.ndarray], dense: list[np.ndarray], subject: Subject) -> dict[str, list[float]]:
    """What a model's samples are like, a number for each seed."""
    found: dict[str, list[float]] = {}
    for own, other in zip(drawn, dense, strict=True):
        values = subject.judge.judge(own, subject.labels)
        if own is not other:
            values["psnr"] = float(paired(own, other, RANGE)["psnr"].mean())
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def rows_of(subject: Subject, ways: list[Way], runs: Path, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for the dense model and for each way, those that are known as they are."""
    rows = {row["model"]: row for row in known}
    dense = draw(subject.dense, False, subject)
    yield {"model": Way().name, **measured(dense, dense, subject)}
    for way in ways:
        if way.name in rows:
            yield rows[way.name]
            continue
        checkpoint, seconds = made(way, subject, runs)
        yield {"model": way.name, **seconds, **measured(draw(checkpoint, True, subject), dense, subject)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = {"Fréchet": ("frechet", ".3f"), "accuracy": ("accuracy", ".1%"), "PSNR to dense, dB": ("psnr", ".1f")}
    shown = {title: each for title, each in columns.items() if any(each[0] in row for row in results["models"])}
    lines = [f"| model | {' | '.join(shown)} | CPU seconds |", "|---" * (len(shown) + 2) + "|"]
    for row in results["models"]:
        cells = [_spread(row.get(name), form) for name, form in shown.values()]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {seconds} |")
    samples = f"{results['samples']:,} samples of each of {len(results['seeds'])} seeds"
    lines += ["", f"{samples}, {results['steps']} steps of {results['sampler']}, no guidance; `{results['command']}`."]
    return "\n".join(lines)


def _spread(values: list[float] | None, form: str) -> str:
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}" if values else "-"


def begin(name: str) -> str:
    """What stands before a model's table in a document."""
    return f"<!-- table: pruning.py {name} --write -->"


def facts_of(name: str, subject: Subject) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "command": f"python examples/pruning.py {name} --write",
        "samples": len(subject.labels),
        "seeds": list(SEEDS),
        "training": list(subject.training),
        "sampler": evaluate.SAMPLER,
        "steps": evaluate.STEPS,
    }


def main() -> None:
    """Print the table; with --write, keep its numbers and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SUBJECTS)
    parser.add_argument("--each", type=int, help="pictures of each class and seed")
    parser.add_argument("--ways", help="names of rows, separated by semicolons (default: all)")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    ways = {way.name: way for way in WAYS[given.name]}
    chosen = [ways[name.strip()] for name in given.ways.split(";")] if given.ways else list(ways.values())
    file = HERE / given.name / RESULTS
    with tempfile.TemporaryDirectory() as scratch:
        runs = given.runs or Path(scratch)
        runs.mkdir(parents=True, exist_ok=True)
        subject = SUBJECTS[given.name](runs, given.each or EACH[given.name])
        facts = facts_of(given.name, subject)
        kept = json.loads(file.read_text()) if given.write and file.exists() else {}
        known = kept["models"] if facts.items() <= kept.items() else []
        results: dict[str, Any] = {**facts, "tool_version": __version__, "models": []}
        for row in rows_of(subject, chosen, runs, known):
            results["models"].append(row)
            print(table(results).splitlines()[len(results["models"]) + 1], flush=True)
            if given.write:
                left = [each for each in known if each["model"] not in {row["model"] for row in results["models"]}]
                file.write_text(json.dumps({**results, "models": [*results["models"], *left]}, indent=1) + "\n")
    if given.write:
        for document in SHOWN_IN[given.name]:
            evaluate.write_table(document, begin(given.name), table(results))


if __name__ == "__main__":
    main()
