"""``sparse-engine tune``: time an engine's kernels again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.tuning import tune

from .terminal import console, make_table, print_json, progress


def command(
    engine: Annotated[Path, typer.Argument(help="A .sengine file.")],
    threads: Annotated[
        int | None, typer.Option(help="CPU threads: choices are made for each number.", show_default="one per core")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs, such as cuda:0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time every layer's kernels again on this machine, and remember the fastest: after a first load on a busy one."""
    with progress() as display:
        display.add_task("timing the kernels", total=None)
        timed = tune(engine, threads=threads, device=device)
    if as_json:
        print_json([each.to_dict() for each in timed])
        return
    table = make_table("layer", "was", "is", "margin", "remark")
    for each in timed:
        was = each.before.kernel if each.before else "-"
        remark = "within the noise" if each.now.within_noise else ""
        table.add_row(each.key, was, each.now.kernel, f"{each.now.margin:.2f}x", remark)
    console.print(table)
