"""What pruning has changed in a model's pictures: what ``sparse-engine evaluate`` and ``bench --quality`` measure.

Two engines draw the same seeds, and each picture is held against its twin: 64 pairs say what pruning alone has changed,
where a distance between distributions needs thousands. Distances to reference pictures are given of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.artifact import SUFFIX
from sparse_engine.backends import BuildOptions
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import MissingDependencyError, OptionError, UnsupportedError
from sparse_engine.export.build import build_engine
from sparse_engine.export.options import ModelOptions
from sparse_engine.files import scratch_folder
from sparse_engine.manifest import Manifest
from sparse_engine.pruning.data import Canvas
from sparse_engine.results import to_uint8

from .judges import digits_judge, fid_judge, frechet_judge, is_digits, reference_pictures
from .quality import Judge
from .similarity import lpips, lpips_weights, paired

MOST_PIXELS = 3 * 32 * 32  # of a picture that a Fréchet distance in pixels says something of
SAMPLER, STEPS = "dpm-solver++", 25
SHOWN = 16  # pairs on the page, and as many of those that differ most
Row = dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """What is drawn, by both.

    Attributes:
        images: of each seed.
        seeds: whose spread is given.
        steps, sampler, guidance, batch_size: as ``SparseEngine.sample`` takes them.
        labels: [images]; None is every class in turn.
        conditioning, negative: as ``SparseEngine.sample`` takes them.
    """

    images: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = STEPS
    sampler: str | None = None
    guidance: float | None = None
    batch_size: int | None = None
    labels: np.ndarray | None = None
    conditioning: Mapping[str, np.ndarray] = field(default_factory=dict)
    negative: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments.whole_number("--count", self.images, 2, 10_000_000, "a whole number of 2 or more")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise OptionError(f"--seeds: found {list(self.seeds)}; expected one or more, each once")
        for seed in self.seeds:
            arguments.seed(seed)


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        results: as ``--json`` prints it.
        pairs: (name of the group, dense uint8 [n, H, W, C], candidate's, PSNR [n]) for the page.
    """

    results: Row
    pairs: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]


def evaluate(
    candidate: Path,
    dense: Path,
    drawing: Drawing,
    *,
    reference: Path | None = None,
    fid: bool = True,
    sparse: bool = True,
    model: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    threads: int | None = None,
    device: str | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Evaluation:
    """Hold a pruned model's pictures against the dense one's, and both against reference pictures.

    Args:
        candidate, dense: engines, or checkpoints, of which engines are built for this.
        drawing: what is drawn.
        reference: a folder of pictures, or an ``.npz``.
        fid: whether FID is measured where it can be.
        sparse: whether a candidate's checkpoint is built with its masks.
        model: what checkpoints do not say of their models.
        threads, device: as ``SparseEngine.load`` takes them.
        progress: told each stage.

    Raises:
        InputError: one of them cannot be used, or the two draw different things.
        NonFiniteError: one of them diverges.
    """
    with contextlib.ExitStack() as held:
        folder = held.enter_context(scratch_folder())
        engines: dict[str, SparseEngine] = {}
        for name, path, masked in (("dense", dense, False), ("candidate", candidate, sparse)):
            progress(f"loading {path.name}")
            file = _engine_file(path, folder / f"{name}{SUFFIX}", masked, model)
            engines[name] = held.enter_context(SparseEngine.load(file, threads=threads, device=device))
        manifests = {name: engine.manifest for name, engine in engines.items()}
        canvas = canvas_of(manifests["dense"])
        _check_alike(manifests, candidate, dense)
        drawing = _labelled(drawing, manifests["dense"])
        judges, tools, notes = _judges(canvas, manifests["dense"], drawing.images, reference, fid)
        drawn = {name: _Drawn(engine, drawing, canvas, progress, name) for name, engine in engines.items()}
        measured, pairs = _measured(drawn["candidate"], drawn["dense"], drawing, canvas, judges, tools, progress)
    results: Row = {
        "kind": "evaluation",
        "candidate": _described(candidate, manifests["candidate"]),
        "dense": _described(dense, manifests["dense"]),
        "reference": None if reference is None else str(reference),
        "images": drawing.images,
        "seeds": list(drawing.seeds),
        "steps": drawing.steps,
        "sampler": drawing.sampler or manifests["dense"].sampler,
        "guidance": drawing.guidance or 1.0,
        "metrics": {name: _summary(tools.get(name, name), values) for name, values in measured.items()},
        "notes": notes,
    }
    return Evaluation(results, pairs)


def canvas_of(manifest: Manifest) -> Canvas:
    """What an engine's results are: pixels in the model's range, those that its decoder makes, or latents."""
    if manifest.value_range is None and "vae" in manifest.assets:
        return Canvas(manifest.picture_shape, (0.0, 255.0))
    return Canvas(manifest.data_shape, manifest.value_range)


def _engine_file(path: Path, built: Path, sparse: bool, model: ModelOptions) -> Path:
    if path.suffix.lower() == SUFFIX:
        return path
    build_engine(path, built, model=model, backend="onnxruntime", options=BuildOptions(sparse=sparse))
    return built


def _check_alike(manifests: Mapping[str, Manifest], candidate: Path, dense: Path) -> None:
    shapes = [canvas_of(manifests[name]).data_shape for name in ("candidate", "dense")]
    told = [[each.name for each in manifests[name].conditions] for name in ("candidate", "dense")]
    if shapes[0] != shapes[1] or told[0] != told[1]:
        raise OptionError(
            f"{candidate} draws {list(shapes[0])} and is told {told[0] or 'nothing'}, {dense} draws {list(shapes[1])} "
            f"and is told {told[1] or 'nothing'}",
            "name the dense model that the other was made from",
        )


def _labelled(drawing: Drawing, manifest: Manifest) -> Drawing:
    """With every class in turn where no labels are given."""
    classes = [label for label in range(manifest.num_classes) if label != manifest.null_class]
    sampler = drawing.sampler or (SAMPLER if SAMPLER not in manifest.excluded_samplers else None)
    labels = drawing.labels
    if labels is None and classes and "y" not in drawing.conditioning:
        labels = np.resize(np.array(classes, np.int64), drawing.images)
    given = {name: getattr(drawing, name) for name in drawing.__dataclass_fields__}
    return Drawing(**{**given, "labels": labels, "sampler": sampler})


class _Drawn:
    """An engine's pictures of a seed, float32 [n, C, H, W] in the canvas' range."""

    def __init__(
        self, engine: SparseEngine, drawing: Drawing, canvas: Canvas, progress: Callable[[str], None], name: str
    ) -> None:
        self._engine, self._drawing, self._canvas = engine, drawing, canvas
        self._progress, self._name = progress, name

    def __call__(self, seed: int) -> np.ndarray:
        drawing, decoded = self._drawing, self._canvas.value_range == (0.0, 255.0)
        self._progress(f"{self._name}: drawing {drawing.images} images of seed {seed}")
        found = self._engine.sample(
            drawing.images,
            steps=drawing.steps,
            sampler=drawing.sampler,
            seed=seed,
            labels=drawing.labels,
            conditioning=drawing.conditioning or None,
            negative=drawing.negative or None,
            guidance=drawing.guidance,
            batch_size=drawing.batch_size,
            output="uint8" if decoded else "float",
        )
        if decoded:
            return found.transpose(0, 3, 1, 2).astype(np.float32)
        return found if self._canvas.value_range is None else found.clip(*self._canvas.value_range)


def _judges(
    canvas: Canvas, manifest: Manifest, images: int, reference: Path | None, fid: bool
) -> tuple[list[Judge], dict[str, str], list[str]]:
    """What both are held against, by which tools, and what is left out and why."""
    judges, notes = [], []
    tools = {"psnr": "sparse-engine", "ssim": "sparse-engine (Wang et al. 2004)"}
    if canvas.value_range is not None and canvas.data_shape[0] == 3 and lpips() is None:
        lacking = " and ".join(path.name for path in lpips_weights())
        notes.append(f"LPIPS is left out: it needs torch-fidelity, and {lacking} in {lpips_weights()[0].parent}.")
    if is_digits(canvas, manifest.num_classes):
        try:
            judges.append(_of_digits(digits_judge(images), reference))
            tools |= {"accuracy": "scikit-learn, a support vector machine on the real digits"}
            tools |= (
                {"frechet": "sparse-engine, in pixels, to all of scikit-learn's digits"} if reference is None else {}
            )
        except MissingDependencyError as error:
            notes.append(f"Left out: {error.what}.")
    if reference is None:
        return judges, tools, [*notes, *([] if judges else ["No reference pictures: distances to them are left out."])]
    if canvas.value_range is None:
        raise OptionError("--reference: this is a latent model, whose samples have no pixels", "build with --vae")
    if np.prod(canvas.data_shape) <= MOST_PIXELS:
        judges.append(frechet_judge(reference_pictures(canvas, reference), canvas.value_range, images))
        tools["frechet"] = "sparse-engine, in pixels"
    if fid:
        try:
            judges.append(fid_judge(canvas, reference, images, "--reference"))
            tools["fid"] = "torch-fidelity"
        except (MissingDependencyError, UnsupportedError) as error:
            notes.append(f"FID is left out: {error.what}.")
    return judges, tools, notes


def _of_digits(judge: Judge, reference: Path | None) -> Judge:
    """The digits' own, without their distance where other pictures are the reference."""
    if reference is None:
        return judge
    return Judge(judge.images, lambda drawn, labels: {"accuracy": judge.judge(drawn, labels)["accuracy"]})


Values = dict[str, dict[str, list[float]]]  # metric -> "candidate" or "dense" -> a value for each seed


def _measured(
    candidate: _Drawn,
    dense: _Drawn,
    drawing: Drawing,
    canvas: Canvas,
    judges: Sequence[Judge],
    tools: dict[str, str],
    progress: Callable[[str], None],
) -> tuple[Values, list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]]:
    perceptual = lpips() if canvas.value_range is not None and canvas.data_shape[0] == 3 else None
    if perceptual is not None:
        tools["lpips"] = "torch-fidelity, VGG-16"
    values: Values = {}
    pairs: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    for seed in drawing.seeds:
        expected, found = dense(seed), candidate(seed)
        progress(f"measuring seed {seed}")
        apart = paired(found, expected, canvas.value_range, perceptual)
        for name, each in apart.items():
            values.setdefault(name, {"candidate": []})["candidate"].append(float(each.mean()))
        for name, pictures in (("candidate", found), ("dense", expected)):
            for judge in judges:
                for metric, value in judge.judge(pictures, drawing.labels).items():
                    values.setdefault(metric, {}).setdefault(name, []).append(value)
        if not pairs and canvas.value_range is not None:
            pairs = _pairs(found, expected, apart["psnr"], canvas.value_range)
    return values, pairs


def _pairs(
    found: np.ndarray, expected: np.ndarray, psnr: np.ndarray, value_range: tuple[float, float]
) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    if found.shape[1] not in (1, 3, 4):
        return []
    groups = {"The first pictures of the first seed": np.arange(min(SHOWN, len(found)))}
    if len(found) > SHOWN:
        groups["Those that differ most"] = np.argsort(psnr)[:SHOWN]
    return [
        (name, to_uint8(expected[rows], value_range), to_uint8(found[rows], value_range), psnr[rows])
        for name, rows in groups.items()
    ]


def _summary(tool: str, values: Mapping[str, Sequence[float]]) -> Row:
    """Mean and spread over the seeds: the standard deviation, of n - 1; None of one seed."""
    row: Row = {"tool": tool}
    for whose, each in values.items():
        spread = float(np.std(each, ddof=1)) if len(each) > 1 else None
        row[whose] = {"mean": float(np.mean(each)), "spread": spread, "values": list(each)}
    return row


def _described(path: Path, manifest: Manifest) -> Row:
    return {
        "path": str(path),
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "backend": manifest.backend["name"],
        "precision": manifest.precision,
        "sparse": manifest.sparse,
        "masked_layers": sum(bool(layer["masked"]) for layer in manifest.layers),
    }
