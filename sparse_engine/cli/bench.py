"""``sparse-engine bench``: sparse against dense, and against other runtimes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from sparse_engine.errors import OptionError
from sparse_engine.files import check_writable

from .terminal import bench_module, console, print_json, progress


def command(
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="The paper's grid: patch x mlp_ratio.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="The CPU kernels alone, product by product.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Your own model instead of the grid.")] = None,
    random: Annotated[str | None, typer.Option(help="Random weights of a preset's size: patch 2, mlp_ratio 4.")] = None,
    preset: Annotated[str, typer.Option(help="Size of the grid's networks: quick, uvit-s or paper.")] = "quick",
    cells: Annotated[str | None, typer.Option(help="Part of the grid, such as patch=1,mlp=4.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes for --checkpoint and --random.")] = "1,4,16",
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: one per core].")] = None,
    repeat: Annotated[int, typer.Option(help="Repeats, each of several seconds.")] = 3,
    seconds: Annotated[float, typer.Option(help="Timing per repeat.")] = 1.5,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other runtimes too.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the results to a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure 2:4 sparse against dense: interleaved, with intervals."""
    if sum((compare_dense, kernels, checkpoint is not None, random is not None)) != 1:
        raise OptionError("bench: expected one of --compare-dense, --checkpoint FILE, --random PRESET, --kernels")
    if precision not in ("fp32", "bf16"):
        raise OptionError(f"--precision {precision!r}: expected fp32 or bf16")
    if repeat < 1 or not seconds > 0:
        raise OptionError(f"--repeat {repeat} --seconds {seconds}: expected 1 or more, and more than 0")
    if output is not None:
        check_writable(output)
    files = bench_module("results_file")
    results = files.describe_run("sparse-engine " + " ".join(sys.argv[1:]), threads)
    if kernels:
        products = bench_module("kernels")
        measured = _products(products, precision, (threads,) if threads else (1, 2), seconds)
        results |= {"kind": "kernels", "precision": precision, "cells": [products.summary(cell) for cell in measured]}
        table = products.table(measured)
    else:
        settings = bench_module("compare").Settings(precision, threads, repeat, seconds, peers)
        if compare_dense:
            results |= _grid(preset, cells, settings)
        else:
            results |= _model(checkpoint, random, batch, heads, settings)
        table = bench_module("report").rich_table(results)
    if output is not None:
        files.write_results(output, results)
    if as_json:
        print_json(results)
        return
    console.print(table)


def _products(products: ModuleType, precision: str, threads: tuple[int, ...], seconds: float) -> list[Any]:
    with progress() as display:
        task = display.add_task("timing products", total=None)
        cells = []
        for cell in products.measure(threads=threads, compute=precision, seconds_per_cell=seconds):
            cells.append(cell)
            display.update(task, description=f"{len(cells)} products timed")
    return cells


def _grid(preset: str, cells: str | None, settings: Any) -> dict[str, Any]:
    grid, size = bench_module("grid"), _preset(preset)
    wanted, done = grid.parse_cells(cells), []
    with progress() as display:
        task = display.add_task("", total=None)
        for index, (patch, mlp_ratio) in enumerate(wanted):
            place = f"cell {index + 1} of {len(wanted)}, patch {patch}, mlp_ratio {mlp_ratio}"

            def show(stage: str, place: str = place) -> None:
                display.update(task, description=f"{place}: {stage}")

            done.append(grid.run_cell(size, patch, mlp_ratio, settings, show))
    return {"kind": "grid", "preset": preset, "precision": settings.precision, "cells": done}


def _model(checkpoint: Path | None, random: str | None, batch: str, heads: int | None, settings: Any) -> dict[str, Any]:
    sizes = batch.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise OptionError(f"--batch {batch!r}: expected whole numbers of 1 or more", "for example --batch 1,4,16")
    batches, compare = [int(size) for size in sizes], bench_module("compare")
    with progress() as display:
        task = display.add_task("", total=None)

        def show(stage: str) -> None:
            display.update(task, description=stage)

        if checkpoint is not None:
            return {"kind": "model", **compare.compare_checkpoint(checkpoint, batches, settings, show, heads=heads)}
        model = bench_module("grid").random_model(_preset(random).config(patch=2, mlp_ratio=4))
        return {"kind": "model", "random": random, **compare.compare_model(model, batches, settings, show)}


def _preset(name: str | None) -> Any:
    presets = bench_module("grid").PRESETS
    if name not in presets:
        raise OptionError(f"preset {name!r} is not known; expected one of {', '.join(presets)}")
    return presets[name]
