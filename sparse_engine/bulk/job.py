"""The job: what fixes every image of a folder, written there first, and held against every later command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.errors import InputError
from sparse_engine.files import check_readable, parsed_json

JOB, CHUNKS, KERNELS, LOCK = "job.json", "chunks", "kernels.json", "lock."
FORMAT = 1
CHUNK = 500
DRAWN, BALANCED, REPEATED, LISTED = "drawn", "balanced", "repeated", "listed"


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
        job = cls(**values)
        if not job._is_sound():
            raise InputError(f"{path} was altered: it says what no job is", "remove it, if no job is running there")
        return job

    def _is_sound(self) -> bool:
        """Whether what the folder's layout follows from can be: the rest is compared, never used as it stands."""
        counts = [self.n, self.chunk, *(self.shape if isinstance(self.shape, list) else [None])]
        return (
            all(isinstance(each, int) and each is not True and 0 < each <= arguments.MOST_IMAGES for each in counts)
            and self.output in ("uint8", "float")
            and len(self.shape) == 3
        )


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
