"""What a long pruning has done so far: a folder beside the result, one file a layer, so that a killed one goes on.

Each file is written whole or not at all, and holds what the same work would give again, so a layer that is there need
not be pruned anew; what is missing is. The folder goes once the result is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_engine.calibration.collect import CalibrationData, load_calibration
from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.model import Model
from sparse_engine.files import check_readable, check_writable, output_error, parsed_json, read_arrays, replacing

SUFFIX = ".partial"
JOB, STATES = "job.json", "states.npz"


def folder_of(output: Path) -> Path:
    """Where the journal of what ``output`` will be is."""
    return output.with_name(output.name + SUFFIX)


class Turn:
    """One walk's layers in a journal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> tuple[Tensor, dict[str, Any]] | None:
        """(weight, facts) of a layer that is done; None where it is not, or its file is damaged."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            members = read_arrays(path, "no layer of a journal", "remove it")
            weight, facts = torch.from_numpy(members["weight"]), parsed_json(str(members["facts"]))
        except (InputError, KeyError, ValueError):
            return None
        return weight, facts

    def write(self, name: str, weight: Tensor, facts: Mapping[str, Any]) -> None:
        """Note a layer as done. Raises OutputError."""
        with replacing(self.folder / f"{name}.npz") as stream:
            np.savez(stream, facts=np.array(json.dumps(dict(facts))), weight=weight.numpy())


class Journal:
    """The folder of one job.

    Args:
        output: what the job writes; the folder is beside it.
        job: what fixes the result, JSON-able: a folder of another job is not gone on with.

    Raises:
        OptionError: there is a folder of another job.
        OutputError: it cannot be written.
    """

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder_of(output)
        self.resumed = self.folder.exists()
        if self.resumed:
            self._check(job)
        else:
            self._make(self.folder)
        check_writable(self.folder / JOB)
        with replacing(self.folder / JOB) as stream:
            stream.write(json.dumps(dict(job), indent=1).encode())

    def of(self, turn: str) -> Turn:
        """One walk's layers."""
        folder = self.folder / turn
        if not folder.is_dir():
            self._make(folder)
        return Turn(folder)

    def states(self, model: Model) -> CalibrationData | None:
        """The states that were taken before; None where there are none yet."""
        path = self.folder / STATES
        if not path.is_file():
            return None
        return load_calibration(
            path,
            checkpoint_sha256=model.checkpoint.sha256,
            data_shape=model.config.data_shape,
            conditions=model.conditions,
        )

    def keep_states(self, states: CalibrationData) -> None:
        """Note the states, so that a later run sees the same. Raises OutputError."""
        states.save(self.folder / STATES)

    def remove(self) -> None:
        """The job is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """The job has failed; what took long is kept."""
        if not any(self.folder.rglob("*.npz")):
            self.remove()

    def _check(self, job: Mapping[str, Any]) -> None:
        path = self.folder / JOB
        fix = f"remove {self.folder} to begin anew, or run the command that began it"
        check_readable(path, OptionError, missing=fix)
        try:
            found = parsed_json(path.read_bytes())
        except ValueError as error:
            raise OptionError(f"{path} is no job of prune: {error}", fix) from error
        found = found if isinstance(found, dict) else {}
        other = [name for name, value in job.items() if found.get(name) != value]
        if other:
            name = other[0]
            raise OptionError(
                f"{self.folder} was begun with {name} = {found.get(name)!r}, and this is {job[name]!r}", fix
            )

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir()
        except OSError as error:
            raise output_error(folder, error) from error
