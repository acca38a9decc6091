"""What a worker does, wherever it runs: load the engine with the job's kernels, draw a chunk, commit it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparse_engine import __version__, kernels, tactics
from sparse_engine.artifact import EngineFile
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import InputError, SparseEngineError, UnsupportedError
from sparse_engine.kernels.library import Compute

from . import chunks
from .job import Chunk, Request
from .told import Told, labels_of

log = logging.getLogger(__name__)

COMPUTES: tuple[Compute, ...] = ("fp32", "bf16")
LIBRARIES = ("library", "gpu", "capability", "cuda", "cusparselt", "linear")  # of what ``StepRunner.describe`` says


@dataclass(frozen=True)
class Trouble:
    """What went wrong in a worker, as it crosses from one process to another.

    Attributes:
        what, fix: of the error.
        fatal: whether it is the user's input or disk: no other chunk would fare better.
    """

    what: str
    fix: str | None = None
    fatal: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Trouble:
        """Of an exception."""
        log.debug("a chunk failed", exc_info=error)
        if isinstance(error, SparseEngineError):
            return cls(error.what, error.fix, isinstance(error, InputError))
        if isinstance(error, MemoryError):
            return cls(f"out of memory: {error}", "fewer workers, or a smaller --batch-size")
        return cls(f"{type(error).__name__}: {error}")

    def error(self) -> SparseEngineError:
        """An exception again."""
        return (InputError if self.fatal else SparseEngineError)(self.what, self.fix)


@dataclass(frozen=True)
class Load:
    """How a worker loads the engine: nothing of this changes an image where the kernels are the same.

    Attributes:
        threads, device, autotune: as ``SparseEngine.load`` takes them.
        batch_size: images in a network call; None is the build's usual batch.
        choices: the job's kernels, as ``tactics.fixing`` takes them.
    """

    threads: int | None = None
    device: str | None = None
    autotune: bool = True
    batch_size: int | None = None
    choices: dict[str, dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)


class ChunkSampler:
    """An engine, loaded for a job.

    Attributes:
        kernels: what an image's bits depend on beside the job: {"facts": ..., "choices": ...}.

    Raises (on construction):
        InputError: the engine is not the job's, or its file or arguments cannot be used here.
        SparseEngineError: as ``SparseEngine.load``.
    """

    def __init__(self, asked: Request, load: Load) -> None:
        self._asked, self._load, self._out = asked, load, Path(asked.out)
        found = EngineFile(asked.engine).manifest_sha256
        if found != asked.job.engine:
            raise InputError(
                f"{asked.engine} on {socket.gethostname()} is not the engine that the job was begun with: its "
                f"manifest's sha256 is {found[:12]}..., expected {asked.job.engine[:12]}...",
                "copy the same file to every machine",
            )
        choices = {name: dict(known) for name, known in (load.choices or {}).items()}
        with tactics.fixing(choices):
            self._engine = SparseEngine.load(
                asked.engine, threads=load.threads, device=load.device, autotune=load.autotune
            )
        self._told = Told(asked, self._engine.manifest)
        self.kernels = {"facts": facts_of(self._engine), "choices": choices}

    def draw(self, chunk: Chunk) -> Iterator[int]:
        """Draw a chunk and commit it. Yields the images of each batch as it is done; when it ends, the file is there.

        Raises SparseEngineError: as ``SparseEngine.stream``; OutputError where it cannot be written.
        """
        started = time.perf_counter()
        told = self._told.of(chunk)
        batches: list[np.ndarray] = []
        for batch in self._engine.stream(chunk.images, batch_size=self._load.batch_size, **told):
            batches.append(batch)
            yield len(batch)
        images = batches[0] if len(batches) == 1 else np.concatenate(batches)
        runtime = self._engine.info["runtime"]
        drawn_by = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "seconds": round(time.perf_counter() - started, 3),
            "batch_size": self._load.batch_size or self._engine.manifest.batch[1],
            "threads": runtime.get("threads"),
            **self.kernels["facts"],
        }
        chunks.commit(self._out, chunk, images, labels_of(self._engine, chunk, told), drawn_by)

    def close(self) -> None:
        """Give the engine back."""
        self._engine.close()

    def __enter__(self) -> ChunkSampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def facts_of(engine: SparseEngine) -> dict[str, Any]:
    """What the bits of an engine's images depend on, beside the file and the call: versions, unit, kernels."""
    info = engine.info
    runtime = info["runtime"]
    device = str(runtime.get("device"))
    on_gpu = device.startswith("cuda")
    return {
        "sparse_engine": __version__,
        "backend": info["backend"]["name"],
        "device": re.sub(r"^cuda:\d+", "cuda", device),  # whichever of them it is
        **{name: runtime[name] for name in LIBRARIES if name in runtime},
        **({} if on_gpu else {"processor": tactics.processor_name(), "instructions": _tiers()}),
        "precision": info["precision"],
        "layers": {layer["name"]: layer["kernel"] for layer in info["layers"] if layer.get("kernel")},
        **{part: _kernels(runtime[part]) for part in ("attention", "group_norm") if part in runtime},
    }


def _tiers() -> list[str]:
    """What our own kernels run on here, in each type that they compute in."""
    found = []
    for compute in COMPUTES if kernels.is_available() else ():
        with contextlib.suppress(UnsupportedError):
            found.append(kernels.best_tier(compute))
    return found


def _kernels(report: Any) -> Any:
    """A part's report without its times: shape -> kernel."""
    if not isinstance(report, Mapping):
        return report
    shapes = report.get("shapes", report)
    return {shape: each["kernel"] for shape, each in shapes.items() if isinstance(each, Mapping) and "kernel" in each}
