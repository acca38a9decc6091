"""``sparse-engine inspect``: what a checkpoint or an engine holds, layer by layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sparse_engine.artifact import SUFFIX, EngineFile
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import EngineFileError, OptionError, UnsupportedError
from sparse_engine.files import in_folder
from sparse_engine.plots import check_plot

from .groups import grouped
from .options import MaskLayers, Model
from .terminal import console, export_module, human, make_table, parse_globs, print_json, tell


@grouped
def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint or a .sengine file.")],
    *,
    mask: Annotated[str, typer.Option(help="Mask rule: auto, explicit, zeros, magnitude or none.")] = "auto",
    mask_layers: MaskLayers = None,
    pattern: Annotated[str, typer.Option(help="N:M for the magnitude rule.")] = "2:4",
    model: Model,
    plot: Annotated[Path | None, typer.Option(help="Draw parameters per layer: PNG, SVG or PDF.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Of an engine, hash everything by sha256 too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a checkpoint's or an engine's layers: masked, 2:4, parameters and MACs before and after."""
    given = model.options()
    if plot is not None:
        plot = in_folder(plot, f"{path.stem}.png")
        check_plot(plot)
    if path.suffix.lower() == SUFFIX:
        if (mask, pattern) != ("auto", "2:4") or any(each is not None for each in (mask_layers, *vars(model).values())):
            raise OptionError(
                f"{path} is an engine: its masks and its network are settled",
                "leave out all options but --check and --plot",
            )
        report = _engine_report(path, check)
    elif check:
        raise OptionError(f"{path} is a checkpoint: --check is for an engine", f"an engine's name ends in {SUFFIX}")
    else:
        report = export_module("report").inspect_checkpoint(
            path,
            rule=mask,
            pattern=pattern,
            layers=parse_globs(mask_layers),
            model=given,
        )
    if plot is not None:
        export_module("report").plot_layers(report["layers"], plot)
    if as_json:
        print_json(report)
        return
    _print_summary(path, report)
    console.print(_layer_table(report))


def _engine_report(path: Path, check: bool) -> dict[str, Any]:
    """What an engine file says of itself and, where its backend runs here, which kernel each layer gets here."""
    file = EngineFile(path)
    if check:
        file.verify()
    try:
        with SparseEngine.load(path) as engine:
            return engine.info
    except (UnsupportedError, EngineFileError) as error:  # it was opened: what it does not fit is this machine
        return {**file.manifest.to_dict(), "notes": [*file.manifest.notes, f"cannot run here: {error.what}"]}


def _kernel(layer: dict[str, Any], against: str) -> str:
    """The kernel, how many times faster than dense it was at the usual batch, and the layer it is computed with."""
    timed = list(layer.get("timed_by_tokens", {}).values())
    kernel = layer.get("kernel") or "-"
    milliseconds = timed[-1]["milliseconds"] if timed else {}
    dense = next((name for name in ("dense", "dense int8") if name in milliseconds), None)
    if dense is None or kernel == dense:
        return kernel
    sparse = min(value for name, value in milliseconds.items() if name != dense)
    pair = layer.get("pair", {})
    other = f", with {pair['with'].rpartition('.')[2]}" if pair.get("chosen") == "together" else ""
    doubt = ", within the noise" if timed[-1].get("within_noise") else ""
    return f"{kernel} {milliseconds[dense] / sparse:.2f}x{against}{other}{doubt}"


def _print_summary(path: Path, report: dict[str, Any]) -> None:
    for note in report["notes"]:
        tell(f"note: {note}")
    shape = "x".join(map(str, report["data_shape"]))
    told = ", ".join(_told(entry) for entry in report["conditioning"]) or "unconditional"
    trained = f"schedule {report['schedule']['name']}, predicts {report['prediction']}"
    line = f"{path}: {report['family']}, {shape}, {told}, {trained}"
    if "backend" in report:
        backend = report["backend"]
        line += f"; engine for {backend['name']} {backend.get('version')}, {report['precision']}"
    tell(line)
    if "profile" in report.get("backend", {}):
        tell(_plan_line(report["backend"]))
    if "step" in report.get("runtime", {}):
        tell(_step_line(report["runtime"]["step"]))
    dense = [layer for layer in report["layers"] if layer["masked"] and not layer.get("chosen", True)]
    for why, count in Counter(layer["why"] for layer in dense if layer.get("why")).most_common():
        line = f"no sparse kernel in {count} masked layers: {why}"
        tell(line)


def _step_line(step: dict[str, Any]) -> str:
    """In what an int8 engine's layers run here."""
    timed = ", ".join(f"{name} {value:.3g} ms" for name, value in step.get("milliseconds", {}).items())
    doubt = ", within the noise" if step.get("within_noise") else ""
    return f"a step runs in {step['precision']} here: {step['why']}{f' ({timed}{doubt})' if timed else ''}"


def _told(condition: dict[str, Any]) -> str:
    """One thing that the network is told: "11 classes", "context 77x768"."""
    if condition["classes"] is not None:
        return f"{condition['classes']} classes"
    return " ".join([condition["name"], *(["x".join(map(str, condition["shape"]))] if condition["shape"] else [])])


def _plan_line(backend: dict[str, Any]) -> str:
    """How a TensorRT plan was built, and for what."""
    targets = ", ".join(backend["compute_capabilities"]) or backend["compute_capability"] or "any RTX GPU"
    built_on = f" ({backend['device']})" if backend["device"] else ""
    line = (
        f"plan for compute capability {targets}{built_on}, batch {'/'.join(map(str, backend['profile']))}, "
        f"Linears as {backend['linear']}, attention {backend['attention']}"
    )
    timed = [f"{name} {value:.3g} ms" for name, value in (backend["timed"] or {}).items()]
    failed = [f"; {name} left out: {why}" for name, why in (backend.get("failed") or {}).items()]
    return "".join([line, f"; timed: {', '.join(timed)}" if timed else "", *failed])


def _layer_table(report: dict[str, Any]) -> Table:
    layers = report["layers"]
    # ONNX Runtime has no dense bf16 product on a CPU: what a layer was timed against is float32 there.
    precision = report.get("runtime", {}).get("step", {}).get("precision", report.get("precision"))
    against = " fp32" if (report.get("backend", {}).get("name"), precision) == ("onnxruntime", "bf16") else ""
    built = any("kernel" in layer for layer in layers)
    totals = {key: sum(layer[key] for layer in layers) for key in ("parameters", "nonzeros", "macs", "macs_nonzero")}
    masked = sum(layer["masked"] for layer in layers)
    hardware = sum(layer["masked"] and layer["hardware_24"] for layer in layers)
    table = make_table(show_footer=True, footer_style="bold")
    table.add_column("layer", f"{len(layers)} layers", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("mask", str(masked), no_wrap=True)
    table.add_column("2:4", str(hardware), no_wrap=True)
    table.add_column("parameters", _change(totals["parameters"], totals["nonzeros"]), justify="right", no_wrap=True)
    table.add_column("MACs", _change(totals["macs"], totals["macs_nonzero"]), justify="right", no_wrap=True)
    table.add_column("energy", justify="right", no_wrap=True)
    table.add_column("kernel" if built else "remark")
    for layer in layers:
        table.add_row(
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["source"] or "-",
            "yes" if layer["masked"] and layer["hardware_24"] else "-",
            _change(layer["parameters"], layer["nonzeros"]),
            _change(layer["macs"], layer["macs_nonzero"]),
            f"-{layer['energy_removed']:.1%}" if layer["masked"] else "",
            _kernel(layer, against) if built else (layer["reason"] or ""),
        )
    return table


def _change(before: int, after: int) -> str:
    return human(before) if before == after else f"{human(before)} → {human(after)}"
