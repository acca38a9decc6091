"""A chunk's file: written aside, flushed, renamed; what is there under its name is whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.errors import InputError
from sparse_engine.files import replacing

from .job import CHUNKS, Chunk, Job

IMAGES, LABELS = "arr_0", "labels"


def path_of(out: Path, chunk: Chunk) -> Path:
    """Where a chunk's images are."""
    return out / CHUNKS / f"{chunk.name}.npz"


def sidecar_of(out: Path, chunk: Chunk) -> Path:
    """Where it stands who drew them, and how."""
    return out / CHUNKS / f"{chunk.name}.json"


def commit(out: Path, chunk: Chunk, images: np.ndarray, labels: np.ndarray | None, drawn_by: Mapping[str, Any]) -> None:
    """Write a chunk and, before it, its sidecar. The clock is in neither name nor bytes of the images.

    Args:
        out: the job's folder.
        chunk: which.
        images: uint8 [n, H, W, C] or float32 [n, C, H, W].
        labels: int64 [n]; None where the network is told none.
        drawn_by: the sidecar.

    Raises OutputError where it cannot be written, as on a full disk; nothing of it is left behind.
    """
    with replacing(sidecar_of(out, chunk)) as stream:
        stream.write(json.dumps(drawn_by, indent=1).encode() + b"\n")
    members = {IMAGES: images} if labels is None else {IMAGES: images, LABELS: labels}
    with replacing(path_of(out, chunk)) as stream:
        np.savez(stream, **members)  # type: ignore[arg-type]


def missing(out: Path, job: Job, chunks: Iterable[Chunk]) -> list[Chunk]:
    """Those that are not there, or not whole: cut short by a copy, say."""
    return [chunk for chunk in chunks if not _fits(path_of(out, chunk), chunk, job)]


def _fits(path: Path, chunk: Chunk, job: Job) -> bool:
    """Whether a file has a chunk's images, by its headers."""
    kind, shape = job.array
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version != (1, 0):
                return False
            found, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    except Exception:  # not there, or damaged in any way
        return False
    return found == (chunk.images, *shape) and dtype == np.dtype(kind) and not fortran


def read(out: Path, chunk: Chunk, job: Job) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels) of a chunk, every byte checked. Raises InputError where it is damaged."""
    path = path_of(out, chunk)
    try:
        with np.load(path, allow_pickle=False) as members:
            images = members[IMAGES]
            labels = members[LABELS] if LABELS in members.files else None
    except Exception as error:  # of any kind, where a file is damaged
        raise InputError(f"{path} is damaged: {error}", "remove it, and run the sample-many command again") from error
    kind, shape = job.array
    if images.shape != (chunk.images, *shape) or images.dtype != np.dtype(kind):
        raise InputError(
            f"{path} holds {images.dtype} {list(images.shape)}; expected {np.dtype(kind)} {[chunk.images, *shape]}",
            "remove it, and run the sample-many command again",
        )
    return images, labels
