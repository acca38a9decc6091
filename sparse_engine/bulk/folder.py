"""A job's folder: made once, and the same job's ever after."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from sparse_engine import arguments
from sparse_engine.errors import InputError, OutputError
from sparse_engine.files import NOT_CONTENT, create, output_error
from sparse_engine.temporaries import SUFFIX

from .job import CHUNKS, JOB, KERNELS, LOCK, Job


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
