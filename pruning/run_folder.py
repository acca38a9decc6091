"""A run's folder: what it was told, its checkpoints, its log. Written whole or not at all, so that it can be killed.

run.json            what the weights depend on; a run is resumed with the same alone
config.json         the network and its training, as ``build`` reads them beside a checkpoint
000500.ckpt/        nnet_ema.pth (averaged, what is used), nnet.pth, optimizer.pth, state.json; the last three
log.jsonl           one line each ``log_every`` steps
samples/000500.png  pictures
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_engine.errors import CheckpointError, OptionError, OutputError
from sparse_engine.export.weight_files import numbered_checkpoints, read_json
from sparse_engine.files import check_writable, filling, output_error, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = "sparse-engine-run/1"
RUN, CONFIG, LOG, SAMPLES, LOCK = "run.json", "config.json", "log.jsonl", "samples", ".lock"
AVERAGED, RAW, OPTIMIZER, STATE = "nnet_ema.pth", "nnet.pth", "optimizer.pth", "state.json"
MAY_CHANGE = frozenset({"tool_version"})


class RunFolder:
    """The folder of one training.

    Args:
        path: a folder of a run, an empty one, or one that is to be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, facts: Mapping[str, Any], config: Mapping[str, Any], endless: bool) -> None:
        """Make the folder, or hold one that is there against what is to be done.

        Args:
            facts: what the weights depend on.
            config: for ``build``.
            endless: whether the number of steps may differ.

        Raises:
            OptionError: it is the folder of another run, or of none; says what differs.
            OutputError: it cannot be written.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; expected a run's folder", "name a new folder with -o")
        if (path / RUN).is_file():
            self._check_same(facts, endless)
        elif path.is_dir() and any(not name.startswith(".") and name != CONFIG for name in os.listdir(path)):
            raise OptionError(f"{path} is there already, and holds no run", "name a new folder with -o")
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(path, error) from error
        check_writable(path / RUN)
        if not (path / RUN).is_file():
            self._write_json(CONFIG, config)
        self._write_json(RUN, {"format": FORMAT, **facts})  # last: a folder that has it is a run's

    def _check_same(self, facts: Mapping[str, Any], endless: bool) -> None:
        there = read_json(self.path / RUN)
        if there.get("format") != FORMAT:
            raise OptionError(f"{self.path / RUN} is of the format {there.get('format')!r}; expected {FORMAT!r}")
        free = MAY_CHANGE | {"format"} | ({"steps"} if endless else set())
        for name in dict.fromkeys((*there, *facts)):
            if name not in free and there.get(name) != json.loads(json.dumps(facts.get(name))):
                raise OptionError(
                    f"{self.path} is the folder of another run: its {name} is {there.get(name)!r}, "
                    f"and here {facts.get(name)!r}",
                    "give the same options to go on with it, or another folder with -o",
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For one process at a time. Raises OptionError where another trains in it."""
        if fcntl is None:
            yield
            return
        try:
            lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise output_error(self.path / LOCK, error) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OptionError(
                    f"another process trains in {self.path}", "wait until it ends, or name another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield
        finally:
            os.close(lock)

    def last(self) -> Path | None:
        """The newest checkpoint that is whole; None where there is none."""
        whole = [folder for folder in numbered_checkpoints(self.path) if (folder / STATE).is_file()]
        return whole[-1] if whole else None

    def save(
        self, step: int, averaged: Mapping[str, Tensor], raw: Mapping[str, Tensor], rest: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, whole or not at all; ``rest`` is the optimizer's. Raises OutputError."""
        path = self.path / f"{step:06d}.ckpt"
        if path.is_dir():  # one that was being deleted as its process was killed
            shutil.rmtree(path, ignore_errors=True)
        with filling(path) as temporary:
            try:
                for name, what in ((AVERAGED, averaged), (RAW, raw), (OPTIMIZER, rest)):
                    _write(temporary / name, what)
                (temporary / STATE).write_text(json.dumps({"step": step}) + "\n")
            except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
                number = getattr(error, "errno", None) or _errno_of(temporary, error)
                raise output_error(
                    path, OSError(number, os.strerror(number)) if number else OSError(str(error))
                ) from error
        return path

    def thin(self, keep: int) -> None:
        """Delete all checkpoints but the newest."""
        for folder in numbered_checkpoints(self.path)[:-keep]:
            (folder / STATE).unlink(missing_ok=True)  # first: what is half deleted is no checkpoint
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
        """(step, file name -> what it holds) of a checkpoint. Raises CheckpointError where it is damaged."""
        step = read_json(folder / STATE).get("step")
        try:
            held = {
                name: torch.load(folder / name, map_location="cpu", weights_only=True)
                for name in (AVERAGED, RAW, OPTIMIZER)
            }
        except Exception as error:  # of any kind, where a file is damaged
            raise CheckpointError(
                f"{folder} cannot be read: {error}", f"delete {folder}: the run goes on from the one before"
            ) from error
        if not isinstance(step, int):
            raise CheckpointError(f"{folder / STATE} says no step", f"delete {folder}")
        return step, held

    def rewind(self, step: int) -> None:
        """Take out of the log what was logged after ``step``: it is done again."""
        log = self.path / LOG
        if not log.is_file():
            return
        kept = []
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut short
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("step", 0) <= step:
                    kept.append(line)
        with replacing(log) as stream:
            stream.write("".join(f"{line}\n" for line in kept).encode())

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the log. Raises OutputError."""
        try:
            with (self.path / LOG).open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise output_error(self.path / LOG, error) from error

    def write_picture(self, step: int, png: bytes) -> Path:
        """Write a picture of samples. Raises OutputError."""
        folder = self.path / SAMPLES
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(folder, error) from error
        path = folder / f"{step:06d}.png"
        with replacing(path) as stream:
            stream.write(png)
        return path

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        with replacing(self.path / name) as stream:
            stream.write((json.dumps(values, indent=1) + "\n").encode())


def _write(path: Path, what: Mapping[str, Any]) -> None:
    with path.open("wb") as stream:
        torch.save(dict(what), stream)
        stream.flush()
        os.fsync(stream.fileno())


def _errno_of(folder: Path, error: BaseException) -> int | None:
    """The system's number of an error that torch has put into words: ENOSPC where there is no room."""
    import errno

    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__context__  # type: ignore[assignment]
    return errno.ENOSPC if shutil.disk_usage(folder).free < 1 << 16 else None
