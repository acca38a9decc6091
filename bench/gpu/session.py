"""What the steps share: the device, the sizes, the time that is left, and the file that each writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_engine.backends.torch.products import ObstacleError
from sparse_engine.bench.presets import PRESETS, Preset
from sparse_engine.bench.results_file import describe_run, read_results, write_results
from sparse_engine.errors import InputError, OptionError, SparseEngineError, UnsupportedError
from sparse_engine.export.families.uvit import UViTConfig

from .facts import describe_device

Row = dict[str, Any]
# The cells of the grid in the order in which they are wanted most: those where the paper won first.
GRID = [(1, 4), (1, 8), (2, 8), (2, 4), (4, 8), (4, 4), (1, 2), (2, 2), (4, 2), (1, 1), (2, 1), (4, 1)]
WORDS = 300  # characters of an error that are kept
UNFINISHED = "the process ended in the middle of it"
REHEARSED = Preset(embed_dim=64, depth=2, heads=2, batch=2)  # in place of every preset, where it is only rehearsed
REHEARSED_CELL = (4, 4)  # patch and mlp_ratio


@dataclass(frozen=True)
class Session:
    """One run of the script.

    Attributes:
        device: where everything runs.
        rehearsal: small sizes, and results marked as a rehearsal's.
        folder: for results.
        budget: seconds that a step may begin new measurements in.
        compiled: use torch.compile.
        command: as it was typed, for the results.
        keep_failed: leave rows that failed before as they are.
    """

    device: torch.device
    rehearsal: bool
    folder: Path
    budget: float
    compiled: bool
    command: str
    keep_failed: bool = False

    def preset(self, name: str) -> Preset:
        """A preset's size, or the rehearsal's."""
        return REHEARSED if self.rehearsal else PRESETS[name]

    def uvit_s(self) -> UViTConfig:
        """U-ViT-S."""
        return self.preset("uvit-s").config(*(REHEARSED_CELL if self.rehearsal else (2, 4)))

    def cells(self) -> list[tuple[int, int]]:
        """(patch, mlp_ratio) of the paper's grid."""
        return [REHEARSED_CELL] if self.rehearsal else GRID

    @property
    def seconds(self) -> float:
        """Of timing in each of a measurement's repeats."""
        return 0.05 if self.rehearsal else 2.0

    def batches(self, *sizes: int) -> tuple[int, ...]:
        """Batch sizes, or the rehearsal's one."""
        return (REHEARSED.batch,) if self.rehearsal else sizes

    def results(self, step: str) -> Results:
        """The file of a step."""
        prefix = "rehearsal" if self.rehearsal else "gpu"
        device = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        slug = "-".join(device.lower().replace("/", " ").split())
        header = {**describe_run(self.command, None), "kind": "gpu", "step": step}
        header |= {"rehearsal": self.rehearsal, "device": device, "describes": describe_device(self.device), "rows": []}
        return Results(self.folder / f"{prefix}-{slug}-{step}.json", header, self.budget, self.keep_failed)


class Results:
    """A step's results: rows by their keys, written after each. Rows that the file had already are not measured again.

    Args:
        path: of the file.
        header: everything but the rows.
        budget: seconds until no new row is begun.
        keep_failed: rows that failed are not measured again either.

    Attributes:
        not_begun: how many rows were left for want of time.

    Raises InputError (on construction) where the file at ``path`` is no results file of this script.
    """

    def __init__(self, path: Path, header: Row, budget: float, keep_failed: bool = False) -> None:
        self.path, self._results = path, header
        self._ends, self.not_begun = time.monotonic() + budget, 0
        if path.is_file():
            found = read_results(path)
            if found.get("kind") != header["kind"] or not isinstance(found.get("rows"), list):
                raise InputError(f"{path} holds no results of this script", "move it away, or write elsewhere with -o")
            self._results["rows"] = [row for row in found["rows"] if keep_failed or "failed" not in row]

    @property
    def rows(self) -> list[Row]:
        """Every row so far."""
        rows: list[Row] = self._results["rows"]
        return rows

    def wants(self, **key: Any) -> bool:
        """Whether a row is still to be measured, and there is time to begin it."""
        if self._has(key):
            return False
        in_time = time.monotonic() < self._ends
        self.not_begun += not in_time
        return in_time

    @contextlib.contextmanager
    def row(self, **key: Any) -> Iterator[Row]:
        """A row to fill in. It is written when the block ends, with the words of its error where it failed.

        It is there before, too, as one that failed: that is what is left of it should the process not survive it.
        Raises what has broken CUDA's context, in which nothing more can be measured.
        """
        row: Row = dict(key)
        started, broken = time.perf_counter(), None
        self._put(key, {**key, "failed": UNFINISHED})
        try:
            yield row
        except Exception as error:  # a failure is a result, and the next row may do better
            row["failed"] = failure(error)
            if self._is_unsupported(error):
                row["unsupported"] = True
            broken = error if has_broken_cuda(error) else None
        row["seconds"] = time.perf_counter() - started
        self._put(key, row)
        if broken is not None:
            raise broken

    def _put(self, key: Mapping[str, Any], row: Row) -> None:
        self._results["rows"] = [each for each in self.rows if not _is(each, key)] + [row]
        self.write()

    def _is_unsupported(self, error: Exception) -> bool:
        """Whether this machine is known not to do what failed; a rehearsal's CPU is also no device of some backends."""
        kinds = (UnsupportedError, ObstacleError, *((OptionError,) if self._results["rehearsal"] else ()))
        return isinstance(error, kinds)

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_results(self.path, self._results)

    def _has(self, key: Mapping[str, Any]) -> bool:
        return any(_is(row, key) for row in self.rows)


def has_broken_cuda(error: Exception) -> bool:
    """Whether an error is one after which every call to CUDA fails, such as an illegal access."""
    if not torch.cuda.is_initialized() or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _is(row: Row, key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def failure(error: Exception) -> str:
    """An error's words, cut where they become a dump."""
    what = error.what if isinstance(error, SparseEngineError) else f"{type(error).__name__}: {error}"
    return what if len(what) <= WORDS else f"{what[:WORDS]}..."
