"""Figures as files, in the format that their name says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_engine.errors import MissingDependencyError
from sparse_engine.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
NO_DATE: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def check_plot(path: Path) -> None:
    """Say before the work that a figure cannot be drawn. Raises OptionError, OutputError, MissingDependencyError."""
    check_writable(path, *KINDS)
    if find_spec("matplotlib") is None:
        raise _missing()


def _missing() -> MissingDependencyError:
    return MissingDependencyError("--plot needs matplotlib", "pip install 'sparse-engine[bench]'")


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, in small print; written to a file once it is drawn.

    Raises MissingDependencyError where matplotlib is not installed, and as ``save_figure``.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise _missing() from error
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, as PNG, SVG or PDF: what the path's name ends in.

    Raises:
        OptionError: its name ends in none of them.
        OutputError: the file cannot be written.
    """
    check_writable(path, *KINDS)
    with replacing(path) as stream:
        stream.write(encoded(figure, path.suffix.lower(), path.stem))


def encoded(figure: Figure, kind: str, name: str, **options: Any) -> bytes:
    """A figure as the bytes of a file: of the same figure and name, the same bytes.

    Args:
        figure: one that belongs to no window.
        kind: one of ``KINDS``.
        name: keeps the identifiers of two figures in one page apart.
        **options: of matplotlib's ``savefig``, such as ``dpi``.
    """
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format=kind.removeprefix("."), metadata=NO_DATE.get(kind), **options)
    return stream.getvalue()
