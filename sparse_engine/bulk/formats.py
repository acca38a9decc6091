"""From chunks to what others read: an array, pictures, WebDataset's tars or Parquet; a chunk in memory at a time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.cores import usable_cores
from sparse_engine.errors import InputError, MissingDependencyError, OptionError
from sparse_engine.files import check_fillable, filling, replacing
from sparse_engine.images import PNG_CHANNELS, encode_png

from . import chunks
from .job import Chunk, Job

ARRAY, PICTURES, TARS, TABLE = "samples.npz", "png", "webdataset", "samples.parquet"
IN_A_TAR = 10_000  # images: its readers shuffle and share tars out
NAMED = 5  # chunks in an error
DIGITS = 6  # of a picture's name, at least


def finish(out: str | Path, format: str = "npz") -> Path:
    """Put the images of a job together.

    Args:
        out: the folder that ``sample_many`` has filled.
        format: "npz": ``samples.npz`` with ``arr_0`` and, of classes, ``arr_1``; "png": ``png/000000.png`` and so on;
            "webdataset": ``webdataset/samples-000000.tar`` of ``.png``, ``.cls``, ``.json``; "parquet":
            ``samples.parquet`` with ``image`` as a struct of bytes and path, ``label``, ``index``.

    Returns:
        The file or folder. The chunks stay.

    Raises:
        InputError: chunks are missing or damaged; they are named.
        OptionError: the format is none, or cannot hold such images.
        MissingDependencyError: the format needs what is not installed.
        OutputError: it cannot be written; nothing is left behind.
    """
    out = arguments.path("out", out)
    job = Job.read(out)
    check_format(job, format)
    lacking = chunks.missing(out, job, job.chunks())
    if lacking:
        names = ", ".join(str(chunk) for chunk in lacking[:NAMED])
        more = f" and {len(lacking) - NAMED} more chunks" if len(lacking) > NAMED else ""
        raise InputError(
            f"{out} is not complete: {len(lacking)} of {len(job.chunks())} chunks are missing, images {names}{more}",
            "run the sample-many command, or the shards that have them, again",
        )
    return FORMATS[format](out, job)


def check_format(job: Job, format: str) -> None:
    """Say before the work what ``finish`` would say after it. Raises OptionError, MissingDependencyError."""
    arguments.one_of("format", format, tuple(FORMATS))
    if format != "npz" and (job.output != "uint8" or job.shape[-1] not in PNG_CHANNELS):
        what = "latents" if job.output != "uint8" else f"{job.shape[-1]} channels; a PNG has 1, 3 or 4"
        raise OptionError(f"--format {format}: the images are {what}", "use --format npz")
    if format == "parquet":
        _pyarrow()


def _each(out: Path, job: Job) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray | None]]:
    for chunk in job.chunks():
        yield (chunk, *chunks.read(out, chunk, job))


def _write_array(out: Path, job: Job) -> Path:
    """``arr_0`` streamed into a zip: nothing but a chunk is in memory."""
    path = out / ARRAY
    kind, shape = job.array
    with replacing(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        labels: list[np.ndarray] = []
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            _write_header(member, kind, (job.n, *shape))
            for _, images, told in _each(out, job):
                member.write(np.ascontiguousarray(images).reshape(-1).view(np.uint8).data)
                labels += [] if told is None else [told]
        if labels:
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                _write_header(member, "<i8", (job.n,))
                member.write(np.concatenate(labels).astype("<i8").tobytes())
    return path


def _write_header(member: IO[bytes], kind: str, shape: tuple[int, ...]) -> None:
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


def _write_pictures(out: Path, job: Job) -> Path:
    folder = out / PICTURES
    with _made_once(folder, job.n) as temporary:
        if temporary is not None:
            for index, png, _ in _pngs(out, job):
                (temporary / f"{_name(job, index)}.png").write_bytes(png)
    return folder


def _write_tars(out: Path, job: Job) -> Path:
    folder = out / TARS
    with _made_once(folder, -(-job.n // IN_A_TAR)) as temporary:
        if temporary is None:
            return folder
        tar: tarfile.TarFile | None = None
        numbers = count()
        with contextlib.ExitStack() as opened:
            for index, png, label in _pngs(out, job):
                if index % IN_A_TAR == 0:
                    opened.close()
                    tar = opened.enter_context(tarfile.open(temporary / f"samples-{next(numbers):06d}.tar", "w"))
                about = {"index": index, "seed": job.seed} | ({} if label is None else {"label": label})
                members = {"png": png} | ({} if label is None else {"cls": str(label).encode()})
                for suffix, content in (members | {"json": json.dumps(about).encode()}).items():
                    info = tarfile.TarInfo(f"{_name(job, index)}.{suffix}")  # no clock, no user: the same bytes
                    info.size = len(content)
                    if tar is not None:
                        tar.addfile(info, io.BytesIO(content))
    return folder


def _write_table(out: Path, job: Job) -> Path:
    """A row group for each chunk; the columns are what ``datasets.load_dataset`` takes for images and labels."""
    arrow, parquet = _pyarrow()
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    features = {"image": {"_type": "Image"}, "index": {"dtype": "int64", "_type": "Value"}}
    fields = [("image", image), ("index", arrow.int64())]
    _, labels = chunks.read(out, job.chunks()[0], job)
    if labels is not None:
        fields.append(("label", arrow.int64()))
        features["label"] = {"dtype": "int64", "_type": "Value"}
    schema = arrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    path = out / TABLE
    with replacing(path) as stream, parquet.ParquetWriter(stream, schema) as writer:
        rows = _pngs(out, job)
        for chunk in job.chunks():
            part = [next(rows) for _ in range(chunk.images)]
            columns: dict[str, Any] = {
                "image": [{"bytes": png, "path": f"{_name(job, index)}.png"} for index, png, _ in part],
                "index": [index for index, _, _ in part],
                "label": [label for _, _, label in part],
            }
            writer.write_table(arrow.table({name: columns[name] for name, _ in fields}, schema=schema))
    return path


def _pngs(out: Path, job: Job) -> Iterator[tuple[int, bytes, int | None]]:
    """(number, PNG, label) of every image, in order; encoded on all cores, as zlib lets other threads run."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        for chunk, images, labels in _each(out, job):
            for row, png in enumerate(threads.map(encode_png, images)):
                yield chunk.first + row, png, None if labels is None else int(labels[row])


@contextlib.contextmanager
def _made_once(folder: Path, entries: int) -> Iterator[Path | None]:
    """A temporary folder that becomes ``folder``, flushed to disk first; None where that is there already, in full.

    Raises OutputError where something else is there.
    """
    if folder.is_dir() and len(os.listdir(folder)) == entries:
        yield None
        return
    check_fillable(folder)
    with filling(folder) as temporary:
        yield temporary
        if hasattr(os, "sync"):
            os.sync()  # once, for all of them: a picture that is cut off looks whole


def _name(job: Job, index: int) -> str:
    return f"{index:0{max(DIGITS, len(str(job.n - 1)))}d}"


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"--format parquet needs {error.name}; it is not installed", "pip install 'sparse-engine[parquet]'"
        ) from error
    return pyarrow, pyarrow.parquet


FORMATS: dict[str, Callable[[Path, Job], Path]] = {
    "npz": _write_array,
    "png": _write_pictures,
    "webdataset": _write_tars,
    "parquet": _write_table,
}
