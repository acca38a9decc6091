"""``sparse-engine build``: checkpoint -> engine file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError

from .terminal import console, export_module, parse_globs, print_json, progress


def command(
    checkpoint: Annotated[Path, typer.Argument(help=".pth, .pt, .safetensors, or a SparseDM N.ckpt folder.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Engine file [default: NAME.sengine].")] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Bake 2:4 masks and use sparse kernels.")] = False,
    mask: Annotated[
        str | None,
        typer.Option(help="auto, explicit, zeros, magnitude or none [default: auto with --sparse, else none]."),
    ] = None,
    mask_layers: Annotated[str | None, typer.Option(help="Globs over layer names, comma-separated.")] = None,
    pattern: Annotated[str, typer.Option(help="N:M for the magnitude rule.")] = "2:4",
    backend: Annotated[str, typer.Option(help="auto or a backend's name (see `sparse-engine doctor`).")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the network's products.")] = "fp32",
    batch: Annotated[str, typer.Option(help="MIN,USUAL,MAX batch.")] = "1,16,64",
    family: Annotated[str | None, typer.Option(help="Model family [default: read off the keys].")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")] = None,
    null_class: Annotated[int | None, typer.Option(help="Label that stands for 'no label'.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Noise schedule the model was trained on.")] = None,
    prediction: Annotated[str | None, typer.Option(help="What the network predicts: eps, x0 or v.")] = None,
    autotune: Annotated[
        bool, typer.Option("--autotune/--no-autotune", help="Time the kernels on this machine.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Build an engine from a checkpoint."""
    builder = export_module("build")
    masks = export_module("masks")
    with progress() as display:
        task = display.add_task("starting", total=None)
        path, manifest = builder.build_engine(
            checkpoint,
            output,
            sparse=sparse,
            mask=mask,
            pattern=masks.Pattern.parse(pattern),
            mask_layers=parse_globs(mask_layers),
            backend=backend,
            precision=precision,
            batch=_batch(batch),
            family=family,
            heads=heads,
            null_class=null_class,
            schedule=schedule,
            prediction=prediction,
            progress=lambda stage: display.update(task, description=stage),
        )
        display.update(task, description="choosing kernels")
        with SparseEngine.load(path, autotune=autotune) as engine:
            info = engine.info
    if as_json:
        print_json({"path": str(path), "bytes": path.stat().st_size, **info})
        return
    for note in manifest.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    masked = [layer for layer in info["layers"] if layer["masked"]]
    eligible = sum(layer["eligible"] for layer in masked)
    chosen = sum(bool(layer["chosen"]) for layer in masked)
    backend_line = f"{manifest.backend['name']} {manifest.backend['version']}, {manifest.precision}"
    console.print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {backend_line}; {len(masked)} of {len(manifest.layers)} layers "
        f"masked, {eligible} of them hardware 2:4, {chosen} run by a sparse kernel on this machine",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _batch(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise OptionError(f"--batch {text!r}: expected three whole numbers", "for example --batch 1,16,64")
    smallest, usual, largest = (int(part) for part in parts)
    return smallest, usual, largest
