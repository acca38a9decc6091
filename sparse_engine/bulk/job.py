"""The job: what fixes every image of a folder, written there first, and held against every later command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from sparse_engine import arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.assets import Assets
from sparse_engine.backends import StepRunner
from sparse_engine.conditioning import LABELS, read_conditioning
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import InputError, OptionError, OutputError
from sparse_engine.files import NOT_CONTENT, check_readable, create, output_error, parsed_json
from sparse_engine.manifest import Manifest
from sparse_engine.temporaries import SUFFIX

JOB, CHUNKS, KERNELS, LOCK = "job.json", "chunks", "kernels.json", "lock."
FORMAT = 1
CHUNK = 500
DRAWN, BALANCED, REPEATED, LISTED = "drawn", "balanced", "repeated", "listed"
LARGEST_LABELS = 1 << 35  # bytes of a file of them: one for each image that a seed has
_HASHED = 1 << 24


@dataclass(frozen=True)
class Shard:
    """One of N parts of a job: its chunks are every N-th, from the first with this index (from 0) on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        arguments.whole_number("the number of shards", self.count, 1)
        expected = f"0 to {self.count - 1}: shards are counted from 0"
        arguments.whole_number("shard", self.index, 0, self.count - 1, expected)

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass(frozen=True, order=True)
class Chunk:
    """The images from ``first`` up to ``last``, which is not one of them."""

    first: int
    last: int

    @property
    def images(self) -> int:
        """How many."""
        return self.last - self.first

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"{self.first:010d}-{self.last:010d}"

    def __str__(self) -> str:
        return f"{self.first}-{self.last - 1}"


@dataclass(frozen=True)
class Job:
    """What fixes the images. ``job.json`` is this.

    Attributes:
        engine: sha256 of the engine's manifest, which holds the sha256 of the rest of it.
        n: images, numbered from 0.
        seed, steps, sampler, guidance, prompt, negative_prompt: as ``SparseEngine.sample`` takes them.
        options: the sampler's own, those that were given.
        labels: {"kind": "drawn"}, {"kind": "balanced"}, {"kind": "repeated", "classes": [...]} or
            {"kind": "listed", "sha256": ...}.
        conditioning: sha256 of the file; None without.
        output: "uint8" for [H, W, C] pixels, "float" for float32 [C, H, W] latents.
        shape: of one image, as stored.
        chunk: images in a chunk.
        format: of the folder.
    """

    engine: str
    n: int
    seed: int
    steps: int
    sampler: str
    options: dict[str, Any]
    guidance: float | None
    labels: dict[str, Any]
    prompt: str | None
    negative_prompt: str | None
    conditioning: str | None
    output: str
    shape: list[int]
    chunk: int
    format: int = FORMAT

    def chunks(self, shard: Shard | None = None) -> list[Chunk]:
        """The chunks, or those of a shard, in order."""
        starts = range(0, self.n, self.chunk)
        mine = starts if shard is None else starts[shard.index :: shard.count]
        return [Chunk(first, min(first + self.chunk, self.n)) for first in mine]

    @property
    def image_bytes(self) -> int:
        """Of one image, as stored."""
        return int(np.prod(self.shape)) * (1 if self.output == "uint8" else 4)

    @property
    def array(self) -> tuple[str, tuple[int, ...]]:
        """(type, shape) of one image in NumPy's words."""
        return ("|u1" if self.output == "uint8" else "<f4"), tuple(self.shape)

    def to_json(self) -> bytes:
        """As the folder holds it."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job of a folder. Raises InputError where there is none, or one of a newer version."""
        path = folder / JOB
        check_readable(path, InputError, missing="name a folder that sample-many has written to")
        names = {field.name for field in dataclasses.fields(cls)}
        try:
            values = parsed_json(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}", "remove it, if no job is running there") from error
        if not isinstance(values, dict) or values.keys() != names or values["format"] != FORMAT:
            raise InputError(
                f"{path} is no job of this version of sparse-engine", "go on with the version that began it"
            )
        return cls(**values)


@dataclass(frozen=True)
class Request:
    """A job as it was asked for, and where to find what it names; this goes to every worker.

    Attributes:
        job: what fixes the images.
        engine: path of the engine file.
        out: the folder.
        labels: path of the ``.npy`` file, where labels are listed in one.
        conditioning: path of the ``.npz`` file.
    """

    job: Job
    engine: str
    out: str
    labels: str | None = None
    conditioning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Back from ``to_dict``."""
        return cls(**{**values, "job": Job(**values["job"])})


def request(
    engine: str | Path,
    out: str | Path,
    n: int,
    *,
    chunk: int | None = None,
    seed: int = 0,
    steps: int = 50,
    sampler: str | None = None,
    labels: str | int | Sequence[int] | Path | None = None,
    conditioning: str | Path | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Request:
    """What ``sample_many`` is asked for, all of it checked; nothing is drawn or written.

    Args and Raises: as ``sample_many``.
    """
    out = arguments.path("out", out)
    n = arguments.whole_number("n", n, 1, arguments.MOST_IMAGES)
    chunk = arguments.whole_number("chunk", _known_chunk(out) if chunk is None else chunk, 1)
    file = EngineFile(engine)
    manifest, others = file.manifest, {key: value for key, value in (options or {}).items() if value is not None}
    latents = manifest.value_range is None and "vae" not in manifest.assets
    channels, *area = manifest.picture_shape
    spec, label_file = _label_spec(labels, n)
    job = Job(
        engine=file.manifest_sha256,
        n=n,
        seed=arguments.seed(seed),
        steps=arguments.whole_number("steps", steps, 1),
        sampler=manifest.sampler if sampler is None else sampler,
        options={key: arguments.plain(value) for key, value in others.items()},
        guidance=None if guidance is None else arguments.real_number("guidance", guidance, arguments.MOST_GUIDANCE),
        labels=spec,
        prompt=prompt,
        negative_prompt=negative_prompt,
        conditioning=None if conditioning is None else sha256_of(Path(conditioning)),
        output="float" if latents else "uint8",
        shape=list(manifest.data_shape) if latents else [*area, channels],
        chunk=chunk,
    )
    asked = Request(
        job,
        str(Path(engine).absolute()),
        str(out.absolute()),
        label_file and str(Path(label_file).absolute()),
        None if conditioning is None else str(Path(conditioning).absolute()),
    )
    _check(asked, file)
    return asked


def _known_chunk(out: Path) -> int:
    """Where no size is asked for: that of the job which is there already."""
    return Job.read(out).chunk if (out / JOB).is_file() else CHUNK


def _label_spec(labels: Any, n: int) -> tuple[dict[str, Any], str | None]:
    """(how labels come about, the file that lists them)."""
    if labels is None or labels in (DRAWN, BALANCED):
        return {"kind": labels or DRAWN}, None
    if isinstance(labels, (str, Path)):
        return {"kind": LISTED, "sha256": sha256_of(Path(labels))}, str(labels)
    classes = arguments.array("labels", labels, "array: {}; expected classes, which are repeated").reshape(-1)
    if classes.dtype.kind not in "iu" or not 0 < len(classes) <= n:
        raise OptionError(
            f"labels are {len(classes)} of {classes.dtype}; expected 1 to {n} classes, which are repeated",
            'or "balanced", or the path of a .npy file with one for each image',
        )
    return {"kind": REPEATED, "classes": classes.tolist()}, None


def _check(asked: Request, file: EngineFile) -> None:
    """Say before the work what ``SparseEngine.stream`` would refuse: an engine that is not loaded checks as much."""
    unloaded = SparseEngine(file.manifest, cast(StepRunner, _Unloaded()), Assets(file.manifest, file, 1))
    told = Told(asked, file.manifest)
    unloaded.stream(1, **told.of(Chunk(0, 1)))
    if told.listed is not None:
        unloaded.told(asked.job.n, labels=told.listed, conditioning=told.first_row())


class _Unloaded:
    """In the place of a runner, for an engine whose arguments are checked and that draws nothing."""


class Told:
    """What the network is told for each chunk of a job.

    Raises (on construction):
        InputError: a file is missing, damaged, or not the one that the job was begun with.
        OptionError: it does not have a row for each image.
    """

    def __init__(self, asked: Request, manifest: Manifest) -> None:
        self._job, self._manifest = asked.job, manifest
        job = self._job
        for path, digest in ((asked.conditioning, job.conditioning), (asked.labels, job.labels.get("sha256"))):
            if path is not None and sha256_of(Path(path)) != digest:
                raise InputError(f"{path} is not the file that the job was begun with", "put that one there")
        self.listed = None if asked.labels is None else _listed(Path(asked.labels), job.n)
        self._rows = read_conditioning(None if asked.conditioning is None else Path(asked.conditioning))
        self._ranks = {each.name: len(each.shape) for each in manifest.conditions}
        for rows in self._rows:
            for name, array in rows.items():
                if array.ndim > self._ranks.get(name, array.ndim) and len(array) not in (1, job.n):
                    raise OptionError(
                        f"conditioning[{name!r}] has {len(array)} rows; expected one for all or {job.n}",
                        "as many as -n says",
                    )

    def of(self, chunk: Chunk) -> dict[str, Any]:
        """The arguments of ``SparseEngine.stream`` for a chunk."""
        job = self._job
        conditioning, negative = ({name: self._cut(name, rows[name], chunk) for name in rows} for rows in self._rows)
        return {
            "steps": job.steps,
            "sampler": job.sampler,
            "seed": job.seed,
            "first": chunk.first,
            "labels": self.labels(chunk),
            "conditioning": conditioning,
            "negative": negative,
            "prompt": job.prompt,
            "negative_prompt": job.negative_prompt,
            "guidance": job.guidance,
            "output": job.output,
            **job.options,
        }

    def first_row(self) -> dict[str, np.ndarray]:
        """What all images could be told beside labels: to check those alone."""
        return {
            name: array[0] if array.ndim > self._ranks.get(name, array.ndim) else array
            for name, array in self._rows[0].items()
        }

    def labels(self, chunk: Chunk) -> np.ndarray | None:
        """int64 [chunk.images]; None where they are drawn from the seed, or the network is told none."""
        spec, numbers = self._job.labels, np.arange(chunk.first, chunk.last)
        if spec["kind"] == REPEATED:
            return np.asarray(spec["classes"], np.int64)[numbers % len(spec["classes"])]
        if spec["kind"] == LISTED and self.listed is not None:
            return self.listed[chunk.first : chunk.last]
        if spec["kind"] == BALANCED:
            null, classes = self._manifest.null_class, self._manifest.num_classes
            if not classes:
                raise OptionError("labels are given, but the model is told none", "leave --labels out")
            label = numbers % (classes - (null is not None))
            return label if null is None else label + (label >= null)
        return None

    def _cut(self, name: str, array: np.ndarray, chunk: Chunk) -> np.ndarray:
        per_image = array.ndim > self._ranks.get(name, array.ndim) and len(array) == self._job.n
        return array[chunk.first : chunk.last] if per_image else array


def labels_of(engine: SparseEngine, chunk: Chunk, told: Mapping[str, Any]) -> np.ndarray | None:
    """The classes that a chunk's images are told, drawn ones too: int64 [chunk.images]; None without classes."""
    if not engine.manifest.num_classes:
        return None
    if told["labels"] is not None:
        return np.asarray(told["labels"])
    if LABELS in told["conditioning"]:
        return np.broadcast_to(np.asarray(told["conditioning"][LABELS], np.int64), chunk.images)
    drawn = engine.told(
        chunk.images,
        conditioning=told["conditioning"],
        draw=(told["seed"], np.arange(chunk.first, chunk.last)),
    )
    return drawn.arrays[LABELS][0]


def _listed(path: Path, n: int) -> np.ndarray:
    check_readable(path, InputError)
    fix = "save it with numpy.save(path, labels), int64 [n]"
    try:
        if path.stat().st_size > LARGEST_LABELS:
            raise ValueError("it is too large")
        found: np.ndarray = np.load(path, allow_pickle=False)
    except Exception as error:  # of any kind, where a file is damaged
        raise InputError(f"{path} is no .npy file of labels: {error}", fix) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.shape != (n,):
        shape = f"{list(found.shape)} of {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise InputError(f"{path} holds {shape}; expected [{n}] whole numbers, a label for each image", fix)
    return found.astype(np.int64)


def sha256_of(path: Path) -> str:
    """A file's digest. Raises InputError where it cannot be read."""
    check_readable(path, InputError)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_HASHED):
            digest.update(part)
    return digest.hexdigest()


def open_folder(out: Path, job: Job) -> bool:
    """Make a job's folder, or find the same job there. Returns whether it was made, or its job was, here.

    Raises:
        InputError: another job's; says which field differs.
        OutputError: it cannot be written, or has other things in it.
    """
    try:
        out.mkdir(exist_ok=True)
        if not (out / JOB).exists():
            strangers = [each for each in os.listdir(out) if not _is_ours(each)]
            if strangers:
                raise OutputError(
                    f"{out} is there already and holds no job: {sorted(strangers)[0]}", "name a new folder"
                )
        made = create(out / JOB, job.to_json())
        (out / CHUNKS).mkdir(exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"{error.filename} is there already and is no folder", "name a new folder") from error
    except OSError as error:
        raise output_error(out, error) from error
    if not made:
        check_same(out, job)
    return made


def _is_ours(name: str) -> bool:
    return name in (JOB, CHUNKS, KERNELS, *NOT_CONTENT) or name.startswith(LOCK) or name.endswith(SUFFIX)


def check_same(out: Path, job: Job) -> None:
    """Raise InputError where a folder is another job's; says in what."""
    there = Job.read(out)
    for field in dataclasses.fields(Job):
        found, asked = getattr(there, field.name), getattr(job, field.name)
        if found != asked:
            raise InputError(
                f"{out} is another job's: its {field.name} is {_words(found)}, this command's {_words(asked)}",
                "give the same, or name a new folder",
            )


def _words(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= arguments.SHOWN else text[: arguments.SHOWN] + "..."
