"""``sparse-engine calibrate``: calibration data for int8 and fp8 builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sparse_engine.artifact import SUFFIX, EngineFile
from sparse_engine.backends import BuildOptions
from sparse_engine.calibration.collect import CalibrationData, check_amounts, collect
from sparse_engine.conditioning import read_conditioning
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError
from sparse_engine.files import check_writable, in_folder, scratch_folder
from sparse_engine.plots import check_plot

from .groups import grouped
from .options import ConditioningFile, Model, Trajectories
from .terminal import errors, export_module, progress

CALIBRATION = "calib.npz"


@grouped
def command(
    model: Annotated[Path, typer.Argument(help="A checkpoint, or an engine built in a float precision.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="File, or its folder.")] = Path(CALIBRATION),
    trajectories: Trajectories,
    guidance: Annotated[
        str | None, typer.Option(help="Guidance weights, taken in turn.", show_default="1, and 2 with a null class")
    ] = None,
    conditioning: ConditioningFile = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Of a checkpoint: with its 2:4 masks, as build does.")
    ] = False,
    of_model: Model,
    plot: Annotated[Path | None, typer.Option(help="Draw what layers are given against time: PNG, SVG or PDF.")] = None,
) -> None:
    """Collect what the network is given along its own sampling trajectories."""
    given = of_model.options()
    weights = _weights(guidance)
    output = in_folder(output, CALIBRATION)
    check_writable(output, ".npz")
    if plot is not None:
        plot = in_folder(plot, f"{model.stem}.png")
        check_plot(plot)
    check_amounts(trajectories.images, trajectories.steps, seed)
    of_a_checkpoint = [
        name for name, value in {**vars(of_model), "sparse": sparse or None}.items() if value is not None
    ]
    if model.suffix.lower() == SUFFIX and of_a_checkpoint:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in of_a_checkpoint)
        raise OptionError(f"{model} is an engine: {names} is for a checkpoint", "leave it out")
    told, negative = read_conditioning(conditioning)
    with scratch_folder() as folder, progress(bar=True) as display:
        task = display.add_task("building a float engine", total=None)

        def advance(done: int, total: int) -> None:
            display.update(task, completed=done, total=total)

        engine_file = model
        if model.suffix.lower() != SUFFIX:
            build = export_module("build").build_engine
            temporary = folder / f"float{SUFFIX}"
            engine_file, _ = build(model, temporary, model=given, backend="onnxruntime", options=BuildOptions(sparse))
        display.update(task, description="sampling")
        with SparseEngine.load(engine_file) as engine:
            data = collect(
                engine,
                **vars(trajectories),
                conditioning=told,
                negative=negative,
                guidance=weights,
                seed=seed,
                progress=advance,
            )
        data.save(output)
        if plot is not None:
            display.update(task, description="observing layers", completed=0)
            _plot(engine_file, data, plot, advance)
    errors.print(f"{len(data)} samples: {output}", highlight=False, markup=False)


def _plot(engine: Path, data: CalibrationData, path: Path, progress: Callable[[int, int], None]) -> None:
    from sparse_engine.calibration.engine_graph import step_graph_of  # which load onnx
    from sparse_engine.calibration.observe import layer_inputs, observe
    from sparse_engine.calibration.plot import plot_ranges

    graph = step_graph_of(EngineFile(engine))
    plot_ranges(observe(graph, data, layer_inputs(graph.proto, list(graph.layers)), progress), data, path)


def _weights(text: str | None) -> list[float] | None:
    """ "1,2.5" -> [1.0, 2.5]."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--guidance {text!r}: expected numbers", "for example --guidance 1,2") from error
