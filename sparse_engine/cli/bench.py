"""``sparse-engine bench``: sparse against dense, and against other runtimes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_engine.arguments import MOST_THREADS
from sparse_engine.errors import EXIT_FAILED, EXIT_INTERRUPTED, OptionError
from sparse_engine.files import check_writable, in_folder

from .groups import grouped
from .options import Threads
from .terminal import bench_module, console, errors, make_table, print_json, progress, tell

GRID, CHECKPOINT, RANDOM = "--compare-dense", "--checkpoint", "--random"
PIPELINE, KERNELS, EARLIER = "--pipeline", "--kernels", "--results"
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


@dataclass(frozen=True)
class Subject:
    """What is measured: one of six, and which part of it."""

    compare_dense: Annotated[bool, typer.Option("--compare-dense", help="The paper's grid: patch x mlp_ratio.")] = False
    kernels: Annotated[bool, typer.Option("--kernels", help="The CPU kernels alone, layer by layer.")] = False
    checkpoint: Annotated[Path | None, typer.Option(help="Your own model instead of the grid.")] = None
    random: Annotated[str | None, typer.Option(help="Random weights: uvit-s, dit-b2, ... (any other lists them).")] = (
        None
    )
    pipeline: Annotated[
        Path | None, typer.Option(help="A diffusers pipeline's folder: whole calls, and where their time goes.")
    ] = None
    prompt: Annotated[str | None, typer.Option(help="Of the pipeline's call.")] = None
    earlier: Annotated[Path | None, typer.Option("--results", help="Show an earlier run's file: no measuring.")] = None
    preset: Annotated[str, typer.Option(help="Size of the networks: quick, quick-1024, uvit-s or paper.")] = "quick"
    cells: Annotated[str | None, typer.Option(help="Part of the grid, such as patch=1,mlp=4.")] = None
    batch: Annotated[str | None, typer.Option(help="Batch sizes.", show_default="the preset's, else 1,4,16")] = None
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")] = None

    def settled(self, self_test: bool) -> tuple[str, Subject]:
        """(which of the six by its option's name, with the grid where only a test of itself is asked for)."""
        subject = self
        if self_test and self.checkpoint is None and self.random is None:
            subject = replace(self, compare_dense=True)
        modes = {GRID: subject.compare_dense, CHECKPOINT: self.checkpoint is not None, RANDOM: self.random is not None}
        modes |= {PIPELINE: self.pipeline is not None, KERNELS: self.kernels, EARLIER: self.earlier is not None}
        chosen = [name for name, given in modes.items() if given]
        if len(chosen) != 1:
            raise OptionError(
                f"bench: expected one of {', '.join(modes)}; found {' and '.join(chosen) or 'none'}",
                "for example sparse-engine bench --compare-dense",
            )
        return chosen[0], subject

    def given(self) -> dict[str, bool]:
        """Whether a part is named, by options of ``BELONGS``."""
        named = {f"--{name}": getattr(self, name) is not None for name in ("cells", "batch", "heads", "prompt")}
        return {"--preset": self.preset != "quick", **named}


@dataclass(frozen=True)
class Timing:
    """How it is timed, and judged."""

    backend: Annotated[str, typer.Option(help="Backends, the one that counts first, such as onnxruntime,torch.")] = (
        "auto"
    )
    precision: Annotated[str, typer.Option(help="fp32, tf32, fp16, bf16 or int8.")] = "fp32"
    threads: Threads = None
    repeat: Annotated[int, typer.Option(help="Repeats, the engines loaded afresh in each.")] = 5
    seconds: Annotated[float, typer.Option(help="Timing per repeat.")] = 0.4
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Time whole samples too.")] = False
    steps: Annotated[int, typer.Option(help="Of a whole sample.")] = 50
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time the other runtimes too.")] = False
    self_test: Annotated[bool, typer.Option("--self-test", help="Dense against dense: what the noise alone does.")] = (
        False
    )
    quality: Annotated[Path | None, typer.Option(help="Folder of reference images, for FID.")] = None
    samples: Annotated[int, typer.Option(help="Images that quality is judged by.")] = 500

    def given(self) -> dict[str, bool]:
        """Whether more than times is asked for, by options of ``BELONGS``."""
        return {"--peers": self.peers, "--end-to-end": self.end_to_end, "--quality": self.quality is not None}

    def check(self) -> None:
        """Raise OptionError on numbers that are out of range, and a precision that is none."""
        counts = {"threads": (self.threads, 1, MOST_THREADS), "repeat": (self.repeat, 1, 1000)}
        counts |= {"steps": (self.steps, 1, 100_000), "samples": (self.samples, 16, 1_000_000)}
        for name, (value, least, most) in counts.items():
            if value is not None and not least <= value <= most:
                raise OptionError(f"--{name} {value}: expected {least} to {most}")
        if not 0 < self.seconds <= MOST_SECONDS:
            raise OptionError(f"--seconds {self.seconds}: expected more than 0, and {MOST_SECONDS} at most")

    def settings(self) -> Any:
        """The same for ``bench``. Raises OptionError."""
        backends = tuple(name.strip() for name in self.backend.split(","))
        whole = self.steps if self.end_to_end else None
        return bench_module("settings").Settings(
            self.precision, self.threads, self.repeat, self.seconds, self.peers, backends, whole, self.self_test
        )


@dataclass(frozen=True)
class Shown:
    """What is made of the results."""

    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, by layer and kernel.")] = False
    report: Annotated[Path | None, typer.Option(help="Folder for a page and its figures.")] = None
    compare_to: Annotated[Path | None, typer.Option(help="An earlier run's file: what became faster or slower.")] = None
    max_loss: Annotated[float, typer.Option(help="With --compare-to: exit 1 past this loss.")] = 0.1
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the results to a JSON file.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False

    def settled(self) -> Shown:
        """With the name of a file in a folder that is given. Raises OptionError, OutputError on what cannot be used."""
        if not self.max_loss >= 0:
            raise OptionError(f"--max-loss {self.max_loss}: expected 0 or more, such as 0.1 for a tenth")
        output = None if self.output is None else in_folder(self.output, RESULTS)
        if output is not None:
            check_writable(output, ".json")
        if self.report is not None:
            bench_module("report.page").check_folder(self.report)
        return replace(self, output=output)

    def save(self, results: dict[str, Any]) -> None:
        """Write the results so far, where they are to be written."""
        if self.output is not None:
            bench_module("results_file").write_results(self.output, results)


@grouped
def command(*, subject: Subject, timing: Timing, shown: Shown) -> None:
    """Measure 2:4 sparse against dense: interleaved, with intervals."""
    mode, subject = subject.settled(timing.self_test)
    _check_belongs(mode, subject.given() | timing.given())
    timing.check()
    files, known = bench_module("results_file"), bench_module("settings")
    if timing.precision not in known.PRECISIONS:
        raise OptionError(f"--precision {timing.precision!r}: expected one of {', '.join(known.PRECISIONS)}")
    shown = shown.settled()
    old = files.read_comparison(shown.compare_to) if shown.compare_to is not None else None
    results = files.describe_run("sparse-engine " + " ".join(sys.argv[1:]), timing.threads)
    if mode == KERNELS:
        _kernels(results, timing, shown)
        return
    if mode == PIPELINE:
        _pipeline(results, subject, timing, shown)
        return
    if subject.earlier is not None:
        results = files.read_comparison(subject.earlier)
    else:
        _measure(results, subject, timing, shown.save)
    _show(results, shown)
    if shown.report is not None:
        bench_module("report.page").write_report(shown.report, results)
    if results.get("interrupted") and mode != EARLIER:
        raise typer.Exit(EXIT_INTERRUPTED)
    rows = files.rows_of(results)
    failed = all("failed" in row for row in rows) and mode != EARLIER
    failed |= results.get("self_test", False) and not bench_module("report").self_test_verdict(rows)[0]
    if failed or (old is not None and _lost(old, results, shown.max_loss)):
        raise typer.Exit(EXIT_FAILED)


def _measure(results: dict[str, Any], subject: Subject, timing: Timing, save: Any) -> None:
    """Fill ``results`` with the grid, a checkpoint's batches or those of random weights."""
    settings, batch, run = timing.settings(), subject.batch, bench_module("run")
    with progress() as display:
        task = display.add_task("", total=None)

        def show(stage: str) -> None:
            display.update(task, description=stage)

        if subject.checkpoint is not None:
            judged = {"quality": timing.quality, "samples": timing.samples, "heads": subject.heads}
            run.run_checkpoint(results, subject.checkpoint, batch, settings, save, show, **judged)
        elif subject.random is not None:
            run.run_random(results, subject.random, batch, settings, save, show)
        else:
            parts = {"batch": batch, "heads": subject.heads}
            run.run_grid(results, subject.preset, subject.cells, settings, save, show, **parts)


def _check_belongs(mode: str, given: dict[str, bool]) -> None:
    """Raise OptionError on an option that says nothing to what is measured."""
    for name, modes in BELONGS.items():
        if given[name] and mode not in modes:
            raise OptionError(f"{name} goes with {' or '.join(modes)}, not with {mode}", f"leave {name} out")


def _kernels(results: dict[str, Any], timing: Timing, shown: Shown) -> None:
    """Time the CPU kernels alone, and show the layers."""
    precision, threads = timing.precision, (timing.threads,) if timing.threads else (1, 2)
    if precision not in ("fp32", "bf16", "int8"):
        raise OptionError(f"--kernels --precision {precision}: the CPU kernels compute in fp32, bf16 or int8")
    layers = bench_module("kernels")
    with progress() as display:
        task = display.add_task("timing layers", total=None)
        measured = []
        for cell in layers.measure(threads=threads, compute=precision, seconds_per_cell=timing.seconds):
            measured.append(cell)
            display.update(task, description=f"{len(measured)} layers timed")
    results |= {"kind": "kernels", "precision": precision, "cells": [cell.summary() for cell in measured]}
    made = layers.tables(results)
    shown.save(results)
    print_json(results) if shown.as_json else console.print(*made)


def _pipeline(results: dict[str, Any], subject: Subject, timing: Timing, shown: Shown) -> None:
    """Time whole calls of a pipeline, and show them."""
    settings = timing.settings()  # ``BELONGS`` has refused what makes the others of them
    timed = bench_module("pipelines")
    sizes = bench_module("run").parse_batches(subject.batch or "1")
    prompt = {"prompt": subject.prompt} if subject.prompt else {}
    with progress() as display:
        task = display.add_task("", total=None)

        def show(stage: str) -> None:
            display.update(task, description=stage)

        timed.run_pipeline(results, subject.pipeline, sizes, timing.steps, settings, shown.save, show, **prompt)
    if shown.as_json:
        print_json(results)
        return
    headers, rows = timed.table(results)
    table = make_table(*headers, title="Whole calls of the pipeline")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    tell(*timed.remarks(results))


def _show(results: dict[str, Any], shown: Shown) -> None:
    """Tables and what they do not say; or JSON."""
    if shown.as_json:
        print_json(results)
        return
    tables = bench_module("report")
    for table in [*tables.rich_tables(results), *(tables.profile_tables(results) if shown.profile else [])]:
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
