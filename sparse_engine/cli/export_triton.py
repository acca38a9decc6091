"""``sparse-engine export-triton``: a TensorRT engine as a Triton model repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.triton import export_triton

from .terminal import errors


def command(
    engine: Annotated[Path, typer.Argument(help="A .sengine file of the tensorrt backend.")],
    repository: Annotated[Path, typer.Argument(help="The model repository: a folder.")],
    name: Annotated[str | None, typer.Option(help="The model's name.", show_default="the file's")] = None,
) -> None:
    """Write a model for NVIDIA's Triton Inference Server: plan, config.pbtxt and manifest."""
    errors.print(f"{export_triton(engine, repository, name)}", highlight=False, markup=False)
