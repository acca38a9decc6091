"""What the subcommands share: consoles, progress, tables, JSON, and options that more than one has."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sparse_engine import process
from sparse_engine.errors import MissingDependencyError

PIPE_WIDTH = 120  # columns where there is no terminal to ask

console = Console() if Console().is_terminal else Console(width=PIPE_WIDTH)
errors = Console(stderr=True, soft_wrap=True)


def export_module(name: str) -> ModuleType:
    """A module of ``sparse_engine.export``, which needs torch. Raises MissingDependencyError where it is not there."""
    try:
        with process.fragile():  # torch, while it is imported
            return import_module(f"sparse_engine.export.{name}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"this command reads checkpoints, which needs {error.name}; it is not installed",
            "pip install 'sparse-engine[export]'",
        ) from error


def pruning_module(name: str) -> ModuleType:
    """A module of ``sparse_engine.pruning``, which needs torch. Raises MissingDependencyError where it is not there."""
    try:
        with process.fragile():
            return import_module(f"sparse_engine.pruning.{name}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"pruning needs {error.name}; it is not installed",
            "pip install 'sparse-engine[export,cpu]'",
        ) from error


def bench_module(name: str) -> ModuleType:
    """A module of ``sparse_engine.bench``. Raises MissingDependencyError where something it needs is not there."""
    try:
        with process.fragile():
            return import_module(f"sparse_engine.bench.{name}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the bench needs {error.name}; it is not installed", "pip install 'sparse-engine[bench,export,cpu]'"
        ) from error


def tell(*lines: str) -> None:
    """Print each line to standard output as it is: neither wrapped nor coloured."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """For a program to read: plain, no colours, infinities as null."""
    console.out(json.dumps(_finite(value), indent=2), highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress(bar: bool = False) -> Iterator[Progress]:
    """A progress display on the error stream, with a bar for work of known length; silent where that is no terminal."""
    bars = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) if bar else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *bars, TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as display:
        yield display


def parse_globs(text: str | None) -> list[str] | None:
    """ "a.*,b.*" -> ["a.*", "b.*"]."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def human(count: float) -> str:
    """1234567 -> "1.23M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.3g}"


def make_table(*headers: str, **options: Any) -> Table:
    """A table that fits eighty columns as well as it can: one rule, no frame."""
    return Table(*headers, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **options)
