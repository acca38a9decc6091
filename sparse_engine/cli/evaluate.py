"""``sparse-engine evaluate``: what pruning has changed in a model's pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_engine.conditioning import read_conditioning
from sparse_engine.errors import OptionError
from sparse_engine.files import check_writable, in_folder

from .options import (
    ConditioningFile,
    ContextLength,
    FamilyName,
    GuidanceChannels,
    Heads,
    ImageSize,
    NullClass,
    Prediction,
    ScheduleName,
    model_options,
)
from .sample import filling_labels
from .terminal import bench_module, console, make_table, print_json, progress, tell

PAGE, RESULTS = "evaluation.html", "evaluation.json"  # in a folder that is given


def command(
    model: Annotated[Path, typer.Argument(help="The pruned model: an engine, a checkpoint or a run's folder.")],
    against: Annotated[Path, typer.Option("--against", help="The dense model it was made from: engine or checkpoint.")],
    reference: Annotated[
        Path | None, typer.Option(help="Real pictures, a folder or an .npz: Fréchet distance and FID to them.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Images of each seed.")] = 64,
    seeds: Annotated[str, typer.Option(help="Seeds, whose spread is given, such as 0,1,2.")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="Network evaluations per image.")] = 25,
    sampler: Annotated[
        str | None, typer.Option(help="See `sparse-engine samplers`.", show_default="dpm-solver++, if it is offered")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Classes such as 3, 0,1,2 or 0-9.", show_default="every class in turn")
    ] = None,
    conditioning: ConditioningFile = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance weight w; 1 is without.")] = None,
    fid: Annotated[bool, typer.Option("--fid/--no-fid", help="Measure FID where its network is here.")] = True,
    sparse: Annotated[
        bool, typer.Option("--sparse/--no-sparse", help="Of a checkpoint: with its 2:4 masks, as build does.")
    ] = True,
    batch_size: Annotated[int | None, typer.Option(help="Images per network call.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per core")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="the backend's own")] = None,
    family: FamilyName = None,
    heads: Heads = None,
    null_class: NullClass = None,
    schedule: ScheduleName = None,
    prediction: Prediction = None,
    image_size: ImageSize = None,
    context_length: ContextLength = None,
    guidance_channels: GuidanceChannels = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with the pictures side by side.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the results to a JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Hold a pruned model's pictures against the dense one's, seed by seed, and both against real ones."""
    given = model_options({**locals(), "sampler": None})  # ``sampler`` is what is drawn with, not the model's
    page = None if page is None else in_folder(page, PAGE)
    output = None if output is None else in_folder(output, RESULTS)
    for path, kind in ((page, ".html"), (output, ".json")):
        if path is not None:
            check_writable(path, kind)
    told, negative = read_conditioning(conditioning)
    measuring, files = bench_module("evaluate"), bench_module("results_file")
    drawing = measuring.Drawing(
        count, _seeds(seeds), steps, sampler, guidance, batch_size, filling_labels(labels, count), told, negative
    )
    with progress() as display:
        task = display.add_task("starting", total=None)
        found = measuring.evaluate(
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
    results: dict[str, Any] = files.describe_run("sparse-engine " + " ".join(sys.argv[1:]), threads) | found.results
    report = bench_module("report.pairs")
    if output is not None:
        files.write_results(output, results)
    if page is not None:
        report.write_page(page, found)
    if as_json:
        print_json(results)
        return
    headers, rows = report.evaluation_table(results)
    table = make_table(*headers)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    tell(*report.remarks(results))


def _seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" -> (0, 1, 2). Raises OptionError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 20 for part in parts):
        raise OptionError(f"--seeds {text!r}: expected whole numbers", "for example --seeds 0,1,2")
    return tuple(int(part) for part in parts)
