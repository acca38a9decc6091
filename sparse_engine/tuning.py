"""Timing an engine's kernels again: a choice that was made while the machine was busy is not for good."""

from __future__ import annotations

from pathlib import Path

from sparse_engine.engine import SparseEngine
from sparse_engine.errors import UnsupportedError
from sparse_engine.tactics import Timed, timing_afresh


def tune(path: str | Path, *, threads: int | None = None, device: str | None = None) -> list[Timed]:
    """Load an engine as ``SparseEngine.load`` does, time all candidates of its layers anew and store the choices.

    Args:
        path: the ``.sengine`` file.
        threads: that it will run on: choices are remembered for each number of threads.
        device: as for ``SparseEngine.load``.

    Returns:
        What was timed, with what was remembered before.

    Raises:
        UnsupportedError: nothing of it is chosen where it is loaded.
        As ``SparseEngine.load``.
    """
    with timing_afresh() as timed, SparseEngine.load(path, threads=threads, device=device) as engine:
        name = engine.manifest.backend["name"]
    if not timed:
        raise UnsupportedError(
            f"{path} has no kernels to choose where it is loaded: it is an engine for {name}",
            "a plan's tactics are chosen when it is built: build it again" if "tensorrt" in name else None,
        )
    return list(timed.values())
