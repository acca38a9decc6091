"""``sparse-engine verify``: an engine against the checkpoint it was built from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Threads
from .terminal import console, export_module, make_table, print_json, progress, tell


def command(
    engine: Annotated[Path, typer.Argument(help="A .sengine file.")],
    against: Annotated[Path, typer.Option("--against", help="The checkpoint.")],
    tolerance: Annotated[
        float | None, typer.Option(help="For the relative error of eps.", show_default="by precision: fp32 1e-4")
    ] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare eps and a short trajectory with the torch network; exit 1 past the tolerance."""
    with progress() as display:
        display.add_task("comparing with the checkpoint", total=None)
        found = export_module("verify").verify_engine(engine, against, tolerance=tolerance, threads=threads)
    if as_json:
        print_json(found.to_dict())
    else:
        table = make_table("t", "max |error|", "relative error")
        for row in found.times:
            table.add_row(f"{row.t:.3f}", f"{row.max_abs:.2e}", f"{row.relative:.2e}")
        console.print(table)
        tell(f"PSNR of a {found.steps}-step trajectory: {found.psnr:.1f} dB")
        if not found.same_checkpoint:
            tell("note: the engine was built from another checkpoint file")
    found.check()
