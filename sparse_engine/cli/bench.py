"""``sparse-engine bench``: sparse against dense, and against other runtimes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparse_engine.arguments import MOST_THREADS
from sparse_engine.errors import EXIT_FAILED, EXIT_INTERRUPTED, OptionError
from sparse_engine.files import check_writable, in_folder

from .terminal import bench_module, console, errors, make_table, print_json, progress, tell

GRID, CHECKPOINT, RANDOM, PIPELINE = "--compare-dense", "--checkpoint", "--random", "--pipeline"
BELONGS = {
    "--preset": (GRID,),
    "--cells": (GRID,),
    "--batch": (GRID, CHECKPOINT, RANDOM, PIPELINE),
    "--heads": (GRID, CHECKPOINT),
    "--peers": (GRID, CHECKPOINT, RANDOM, PIPELINE),
    "--end-to-end": (GRID, CHECKPOINT, RANDOM),
    "--prompt": (PIPELINE,),
    "--quality": (CHECKPOINT,),  # random weights draw nothing that could be judged
}
MOST_SECONDS = 3600
RESULTS = "results.json"  # in a folder that is given as -o


def command(
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="The paper's grid: patch x mlp_ratio.")
    ] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="The CPU kernels alone, layer by layer.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Your own model instead of the grid.")] = None,
    random: Annotated[
        str | None, typer.Option(help="Random weights: uvit-s, dit-b2, ... (any other lists them).")
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="A diffusers pipeline's folder: whole calls, and where their time goes.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Of the pipeline's call.")] = None,
    earlier: Annotated[Path | None, typer.Option("--results", help="Show an earlier run's file: no measuring.")] = None,
    preset: Annotated[str, typer.Option(help="Size of the networks: quick, quick-1024, uvit-s or paper.")] = "quick",
    cells: Annotated[str | None, typer.Option(help="Part of the grid, such as patch=1,mlp=4.")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes.", show_default="the preset's, else 1,4,16")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")] = None,
    backend: Annotated[
        str, typer.Option(help="Backends, the one that counts first, such as onnxruntime,torch.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16 or int8.")] = "fp32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per core")] = None,
    repeat: Annotated[int, typer.Option(help="Repeats, the engines loaded afresh in each.")] = 5,
    seconds: Annotated[float, typer.Option(help="Timing per repeat.")] = 0.4,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Time whole samples too.")] = False,
    steps: Annotated[int, typer.Option(help="Of a whole sample.")] = 50,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other runtimes too.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, by layer and kernel.")] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Dense against dense: what the noise alone does.")
    ] = False,
    quality: Annotated[Path | None, typer.Option(help="Folder of reference images, for FID.")] = None,
    samples: Annotated[int, typer.Option(help="Images that quality is judged by.")] = 500,
    report: Annotated[Path | None, typer.Option(help="Folder for a page and its figures.")] = None,
    compare_to: Annotated[
        Path | None, typer.Option(help="An earlier run's file: what became faster or slower.")
    ] = None,
    max_loss: Annotated[float, typer.Option(help="With --compare-to: exit 1 past this loss.")] = 0.1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the results to a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure 2:4 sparse against dense: interleaved, with intervals."""
    compare_dense |= self_test and checkpoint is None and random is None
    modes = {"--compare-dense": compare_dense, "--checkpoint": checkpoint is not None, "--random": random is not None}
    modes |= {"--pipeline": pipeline is not None, "--kernels": kernels, "--results": earlier is not None}
    chosen = [name for name, given in modes.items() if given]
    if len(chosen) != 1:
        raise OptionError(
            f"bench: expected one of {', '.join(modes)}; found {' and '.join(chosen) or 'none'}",
            "for example sparse-engine bench --compare-dense",
        )
    _check_belongs(
        chosen[0],
        {
            "--preset": preset != "quick",
            "--cells": cells is not None,
            "--batch": batch is not None,
            "--heads": heads is not None,
            "--peers": peers,
            "--end-to-end": end_to_end,
            "--prompt": prompt is not None,
            "--quality": quality is not None,
        },
    )
    counts = {"threads": (threads, 1, MOST_THREADS), "repeat": (repeat, 1, 1000)}
    counts |= {"steps": (steps, 1, 100_000), "samples": (samples, 16, 1_000_000)}
    _check_numbers(counts, seconds=seconds, max_loss=max_loss)
    files, known = bench_module("results_file"), bench_module("settings")
    if precision not in known.PRECISIONS:
        raise OptionError(f"--precision {precision!r}: expected one of {', '.join(known.PRECISIONS)}")
    if output is not None:
        output = in_folder(output, RESULTS)
        check_writable(output, ".json")
    if report is not None:
        bench_module("report.page").check_folder(report)
    old = files.read_comparison(compare_to) if compare_to is not None else None
    results = files.describe_run("sparse-engine " + " ".join(sys.argv[1:]), threads)

    def save(done: dict[str, Any]) -> None:
        if output is not None:
            files.write_results(output, done)

    if kernels:
        made = _kernels(results, precision, (threads,) if threads else (1, 2), seconds)
        save(results)
        print_json(results) if as_json else console.print(*made)
        return
    if pipeline is not None:
        settings = known.Settings(precision, threads, repeat, seconds, peers, tuple(backend.split(",")))
        _pipeline(results, pipeline, batch, steps, settings, save, {"prompt": prompt} if prompt else {}, as_json)
        return
    if earlier is not None:
        results = files.read_comparison(earlier)
    else:
        whole = steps if end_to_end else None
        backends = tuple(name.strip() for name in backend.split(","))
        settings = known.Settings(precision, threads, repeat, seconds, peers, backends, whole, self_test)
        with progress() as display:
            task = display.add_task("", total=None)

            def show(stage: str) -> None:
                display.update(task, description=stage)

            run = bench_module("run")
            if checkpoint is not None:
                judged = {"quality": quality, "samples": samples, "heads": heads}
                run.run_checkpoint(results, checkpoint, batch, settings, save, show, **judged)
            elif random is not None:
                run.run_random(results, random, batch, settings, save, show)
            else:
                run.run_grid(results, preset, cells, settings, save, show, batch=batch, heads=heads)
    _show(results, as_json, profile)
    if report is not None:
        bench_module("report.page").write_report(report, results)
    if results.get("interrupted") and earlier is None:
        raise typer.Exit(EXIT_INTERRUPTED)
    rows = files.rows_of(results)
    failed = all("failed" in row for row in rows) and earlier is None
    failed |= results.get("self_test", False) and not bench_module("report").self_test_verdict(rows)[0]
    if failed or (old is not None and _lost(old, results, max_loss)):
        raise typer.Exit(EXIT_FAILED)


def _check_belongs(mode: str, given: dict[str, bool]) -> None:
    """Raise OptionError on an option that says nothing to what is measured."""
    for name, modes in BELONGS.items():
        if given[name] and mode not in modes:
            raise OptionError(f"{name} goes with {' or '.join(modes)}, not with {mode}", f"leave {name} out")


def _check_numbers(counts: dict[str, tuple[int | None, int, int]], *, seconds: float, max_loss: float) -> None:
    for name, (value, least, most) in counts.items():
        if value is not None and not least <= value <= most:
            raise OptionError(f"--{name} {value}: expected {least} to {most}")
    if not 0 < seconds <= MOST_SECONDS:
        raise OptionError(f"--seconds {seconds}: expected more than 0, and {MOST_SECONDS} at most")
    if not max_loss >= 0:
        raise OptionError(f"--max-loss {max_loss}: expected 0 or more, such as 0.1 for a tenth")


def _kernels(results: dict[str, Any], precision: str, threads: tuple[int, ...], seconds: float) -> list[Table]:
    if precision not in ("fp32", "bf16", "int8"):
        raise OptionError(f"--kernels --precision {precision}: the CPU kernels compute in fp32, bf16 or int8")
    layers = bench_module("kernels")
    with progress() as display:
        task = display.add_task("timing layers", total=None)
        measured = []
        for cell in layers.measure(threads=threads, compute=precision, seconds_per_cell=seconds):
            measured.append(cell)
            display.update(task, description=f"{len(measured)} layers timed")
    results |= {"kind": "kernels", "precision": precision, "cells": [cell.summary() for cell in measured]}
    made: list[Table] = layers.tables(results)
    return made


def _pipeline(
    results: dict[str, Any],
    folder: Path,
    batch: str | None,
    steps: int,
    settings: Any,
    save: Any,
    given: dict[str, str],
    as_json: bool,
) -> None:
    timed = bench_module("pipelines")
    sizes = bench_module("run").parse_batches(batch or "1")
    with progress() as display:
        task = display.add_task("", total=None)
        timed.run_pipeline(
            results,
            folder,
            sizes,
            steps,
            settings,
            save,
            lambda stage: display.update(task, description=stage),
            **given,
        )
    if as_json:
        print_json(results)
        return
    headers, rows = timed.table(results)
    shown = make_table(*headers, title="Whole calls of the pipeline")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    tell(*timed.remarks(results))


def _show(results: dict[str, Any], as_json: bool, profile: bool = False) -> None:
    """Tables and what they do not say; or JSON."""
    if as_json:
        print_json(results)
        return
    tables = bench_module("report")
    for table in [*tables.rich_tables(results), *(tables.profile_tables(results) if profile else [])]:
        console.print(table)
    tell(*tables.remarks(results))


def _lost(old: dict[str, Any], new: dict[str, Any], allowed: float) -> bool:
    """Show what changed on the error stream, which JSON leaves free; whether anything became slower than allowed."""
    changes = bench_module("changes").compare_results(old, new, allowed)
    errors.print(bench_module("report").change_table(changes))
    lost = [change for change in changes if change.lost]
    if lost:
        errors.print(f"slower by more than {allowed:.0%}: {', '.join(change.where for change in lost)}", markup=False)
    return bool(lost)
