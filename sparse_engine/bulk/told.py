"""What the network is told for each chunk of a job, and the files that say so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.conditioning import LABELS, read_conditioning
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import InputError, OptionError
from sparse_engine.files import check_readable
from sparse_engine.manifest import Manifest

from .job import BALANCED, LISTED, REPEATED, Chunk, Request

LARGEST_LABELS = 1 << 35  # bytes of a file of them: one for each image that a seed has
_HASHED = 1 << 24


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
