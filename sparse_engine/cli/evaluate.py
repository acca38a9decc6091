"""``sparse-engine evaluate``: what pruning has changed in a model's pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_engine.conditioning import read_conditioning
from sparse_engine.errors import OptionError
from sparse_engine.files import check_writable, in_folder

from .groups import grouped
from .options import ConditioningFile, Device, Guidance, Model, Threads
from .sample import filling_labels
from .terminal import bench_module, console, make_table, print_json, progress, tell

PAGE, RESULTS = "evaluation.html", "evaluation.json"  # in a folder that is given


@dataclass(frozen=True)
class Drawn:
    """What is drawn, by both models."""

    count: Annotated[int, typer.Option("-n", "--count", help="Images of each seed.")] = 64
    seeds: Annotated[str, typer.Option(help="Seeds, whose spread is given, such as 0,1,2.")] = "0,1,2"
    steps: Annotated[int, typer.Option(help="Network evaluations per image.")] = 25
    sampler: Annotated[
        str | None, typer.Option(help="See `sparse-engine samplers`.", show_default="dpm-solver++, if it is offered")
    ] = None
    labels: Annotated[
        str | None, typer.Option(help="Classes such as 3, 0,1,2 or 0-9.", show_default="every class in turn")
    ] = None
    conditioning: ConditioningFile = None
    guidance: Guidance = None
    batch_size: Annotated[int | None, typer.Option(help="Images per network call.")] = None

    def options(self) -> Any:
        """The same for ``bench.evaluate``. Raises OptionError, InputError."""
        told, negative = read_conditioning(self.conditioning)
        return bench_module("evaluate").Drawing(
            self.count,
            _seeds(self.seeds),
            self.steps,
            self.sampler,
            self.guidance,
            self.batch_size,
            filling_labels(self.labels, self.count),
            told,
            negative,
        )


@dataclass(frozen=True)
class Written:
    """Where what came out goes."""

    page: Annotated[Path | None, typer.Option(help="Write a page with the pictures side by side.")] = None
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the results to a JSON file.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False

    def settled(self) -> Written:
        """With the names of files in folders that are given. Raises OutputError where one cannot be written."""
        page = None if self.page is None else in_folder(self.page, PAGE)
        output = None if self.output is None else in_folder(self.output, RESULTS)
        for path, kind in ((page, ".html"), (output, ".json")):
            if path is not None:
                check_writable(path, kind)
        return Written(page, output, self.as_json)

    def write(self, found: Any, results: dict[str, Any]) -> None:
        """Files where they are asked for; on the screen JSON, or a table and what it does not say."""
        report = bench_module("report.pairs")
        if self.output is not None:
            bench_module("results_file").write_results(self.output, results)
        if self.page is not None:
            report.write_page(self.page, found)
        if self.as_json:
            print_json(results)
            return
        headers, rows = report.evaluation_table(results)
        table = make_table(*headers)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        tell(*report.remarks(results))


@grouped
def command(
    model: Annotated[Path, typer.Argument(help="The pruned model: an engine, a checkpoint or a run's folder.")],
    *,
    against: Annotated[Path, typer.Option("--against", help="The dense model it was made from: engine or checkpoint.")],
    reference: Annotated[
        Path | None, typer.Option(help="Real pictures, a folder or an .npz: Fréchet distance and FID to them.")
    ] = None,
    drawn: Drawn,
    fid: Annotated[bool, typer.Option("--fid/--no-fid", help="Measure FID where its network is here.")] = True,
    sparse: Annotated[
        bool, typer.Option("--sparse/--no-sparse", help="Of a checkpoint: with its 2:4 masks, as build does.")
    ] = True,
    threads: Threads = None,
    device: Device = None,
    of_model: Model,
    written: Written,
) -> None:
    """Hold a pruned model's pictures against the dense one's, seed by seed, and both against real ones."""
    given = of_model.options()
    written = written.settled()
    drawing = drawn.options()
    with progress() as display:
        task = display.add_task("starting", total=None)
        found = bench_module("evaluate").evaluate(
            model,
            against,
            drawing,
            reference=reference,
            fid=fid,
            sparse=sparse,
            model=given,
            threads=threads,
            device=device,
            progress=lambda stage: display.update(task, description=stage),
        )
    run = bench_module("results_file").describe_run("sparse-engine " + " ".join(sys.argv[1:]), threads)
    written.write(found, run | found.results)


def _seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2). Raises OptionError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 20 for part in parts):
        raise OptionError(f"--seeds {text!r}: expected whole numbers", "for example --seeds 0,1,2")
    return tuple(int(part) for part in parts)
