"""``sparse-engine prune``: a dense checkpoint made 2:4 in one shot."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from sparse_engine.conditioning import read_conditioning
from sparse_engine.errors import OptionError
from sparse_engine.files import in_folder, scratch_folder
from sparse_engine.plots import check_plot

from .groups import grouped
from .options import ConditioningFile, MaskLayers, Model, Trajectories
from .terminal import (
    console,
    errors,
    export_module,
    make_table,
    parse_globs,
    print_json,
    progress,
    pruning_module,
    tell,
)

if TYPE_CHECKING:
    from sparse_engine.pruning.oneshot import Pruned

MEMORY = (0.001, 1e6)  # GiB
SHOWN = 12  # layers in the table: those that pruning damaged most


@dataclass(frozen=True)
class Choices:
    """What is pruned, and how."""

    method: Annotated[str, typer.Option(help="full, sparsegpt, wanda or magnitude.")] = "full"
    mask_layers: MaskLayers = None
    dense_layers: Annotated[int, typer.Option(help="Leave so many layers dense: those damaged most.")] = 0
    pattern: Annotated[str, typer.Option(help="N:M; only 2:4 has sparse kernels.")] = "2:4"
    max_memory: Annotated[
        float | None,
        typer.Option(help="GiB for states between layers; the others go to disk.", show_default="half of the memory"),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Prune layers that are pruned already, too.")] = False

    def options(self) -> Any:
        """The same for ``pruning``. Raises OptionError."""
        return pruning_module("oneshot").PruneOptions(
            self.method,
            export_module("masks").Pattern.parse(self.pattern),
            parse_globs(self.mask_layers),
            self.dense_layers,
            _memory(self.max_memory),
            self.force,
        )


@grouped
def command(
    checkpoint: Annotated[Path, typer.Argument(help="A dense checkpoint, or a folder of diffusers'.")],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A .safetensors file; of a folder of diffusers', a new folder.")
    ],
    choices: Choices,
    calib: Annotated[Path | None, typer.Option(help="States that `sparse-engine calibrate` wrote.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Images to put noise on, in place of trajectories: a folder, or an .npz.")
    ] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out pictures that cannot be read.")] = False,
    trajectories: Trajectories,
    conditioning: ConditioningFile = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    model: Model,
    plot: Annotated[Path | None, typer.Option(help="Draw each layer's error: PNG, SVG or PDF.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report of all layers.")] = False,
) -> None:
    """Make a dense checkpoint 2:4 in one shot, without training."""
    given = model.options()
    writer, source = pruning_module("write"), pruning_module("states")
    told, negative = read_conditioning(conditioning)
    states = source.StateOptions(
        calib, data, skip_broken, conditioning=told, negative=negative, seed=seed, **vars(trajectories)
    )
    options = choices.options()
    if plot is not None:
        plot = in_folder(plot, f"{checkpoint.stem}.png")
        check_plot(plot)
    path = writer.output_for(checkpoint, output)
    job = pruning_module("job")
    try:
        with progress(bar=True) as display, scratch_folder() as folder:
            pruned = job.run_job(
                checkpoint, path, given=given, states=states, options=options, folder=folder, progress=_shown(display)
            )
    except KeyboardInterrupt:
        partial = pruning_module("journal").folder_of(path)
        if partial.exists():
            errors.print(f"{partial} has what is done: the same command goes on with it", markup=False)
        raise
    if plot is not None:
        pruning_module("plot").plot_errors(pruned.layers, choices.method, plot)
    if as_json:
        print_json(pruned.report(path))
    else:
        _print(path, pruned)


def _memory(gib: float | None) -> int:
    """GiB -> bytes; half of the machine's where None. Raises OptionError on what is no such size."""
    if gib is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 << 30
    least, most = MEMORY
    if not least <= gib <= most:
        raise OptionError(f"--max-memory {gib:g}: expected {least} to {most:.0f} GiB", "for example --max-memory 4")
    return int(gib * 2**30)


def _shown(display: Progress) -> Callable[[int, int, str], None]:
    """Progress as a bar: what is at work, so much of so many."""
    task = display.add_task("reading the checkpoint", total=None)

    def show(done: int, total: int, what: str) -> None:
        display.update(task, completed=done, total=total, description=what or None)

    return show


def _print(path: Path, pruned: Pruned) -> None:
    for note in pruned.notes:
        tell(f"note: {note}")
    layers = [layer for layer in pruned.layers if layer.pruned]
    table = make_table("layer", "error", "had the smallest been cut", "inherited")
    for layer in sorted(layers, key=lambda each: -each.damage)[:SHOWN]:
        table.add_row(layer.name, *(f"{value:.2%}" for value in (layer.error, layer.by_magnitude, layer.inherited)))
    console.print(table)
    if len(layers) > SHOWN:
        tell(f"the {SHOWN} of {len(layers)} pruned layers that were damaged most; --json and --plot have all")
    dense: dict[str, list[str]] = {}
    for layer in pruned.layers:
        if not layer.pruned:
            dense.setdefault(str(layer.reason), []).append(layer.name)
    for reason, names in dense.items():
        tell(f"dense: {', '.join(names)} ({reason})")
    options: Any = pruned.options
    mean = sum(layer.error for layer in layers) / len(layers)
    cut = sum(layer.by_magnitude for layer in layers) / len(layers)
    tell(
        f"{path}: {len(layers)} of {len(pruned.layers)} layers {options.pattern} by {options.method} in "
        f"{pruned.seconds:.1f} s; mean error of their outputs {mean:.2%}, {cut:.2%} had the smallest been cut"
    )
