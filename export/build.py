"""Checkpoint -> step graph -> backend -> ``.sengine``: what ``sparse-engine build`` calls."""

from __future__ import annotations

import os
from pathlib import Path

from sparse_engine import arguments
from sparse_engine.artifact import SUFFIX
from sparse_engine.backends import Backend, BuildOptions, TensorRTOptions, usable_backend
from sparse_engine.backends.torch.plain import plain_defaults
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.files import check_writable
from sparse_engine.manifest import Manifest

from .assets import AssetOptions, asset_files
from .bake import Baked, bake
from .fastest import fastest_within
from .graphs import graph_for
from .model import load_model
from .options import MaskOptions, ModelOptions
from .quantise import calibration_of, check_quantisation
from .weight_files import name_without_suffixes
from .write import write_built


def default_output(checkpoint: Path) -> Path:
    """``model.pt`` and ``model.ckpt/`` become ``model.sengine`` in the working directory; a link gives its own name."""
    name = name_without_suffixes(Path(os.path.abspath(checkpoint)))
    if not name:
        raise OptionError(f"{checkpoint} gives no name for the engine", "say where to write it with -o")
    return Path(name + SUFFIX)


def output_for(checkpoint: str | Path, output: str | Path | None) -> Path:
    """The engine file that is asked for as ``output``: where that is a folder, ``default_output`` in it."""
    if output is None or os.path.isdir(output):
        return Path(output or "") / default_output(Path(checkpoint))
    return Path(output)


@plain_defaults()
def build_engine(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    model: ModelOptions = ModelOptions(),  # noqa: B008 - all of these are frozen
    masks: MaskOptions = MaskOptions(),  # noqa: B008
    backend: str = "auto",
    options: BuildOptions = BuildOptions(),  # noqa: B008
    quantisation: Quantisation | None = None,
    assets: AssetOptions = AssetOptions(),  # noqa: B008
) -> tuple[Path, Manifest]:
    """Build an engine file.

    Args:
        checkpoint: as ``load_checkpoint`` takes it.
        output: the file to write, or a folder for it; ``default_output`` where None.
        model: what the checkpoint does not say of its model.
        masks: how weights are masked.
        backend: "auto" or a backend's name.
        options: sparse or dense, precision, batch, and what else the backend is asked for; the precision "auto" is the
            fastest that stays within ``quantisation``'s limit. Its ``progress`` is told each stage as it begins.
        quantisation: calibration data and how to use it, for int8, fp8 and "auto".
        assets: what to store beside the network.

    Returns:
        The path written and its manifest.

    Raises:
        CheckpointError, OptionError, OutputError, UnsupportedError: bad input; nothing is left behind.
        BackendError: the graph could not be exported or built.
    """
    checkpoint = arguments.path("checkpoint", checkpoint)
    path = output_for(checkpoint, None if output is None else arguments.path("output", output))
    sparse, precision, progress = options.sparse, options.precision, options.progress
    check_writable(path)
    chosen = usable_backend(backend, to_build=True)
    _check_options(chosen, options, quantisation)
    progress("reading the checkpoint")
    loaded = load_model(checkpoint, model.family, **model.given())
    beside = asset_files(loaded, assets)
    data = calibration_of(loaded, quantisation) if quantisation else None
    progress("baking masks")
    baked = bake(loaded, masks.rule or ("auto" if sparse else "none"), masks.pattern, masks.layers)
    if sparse:
        _check_sparse(baked)
    notes = calibrated_otherwise(data, baked)
    if precision == "auto":
        best = fastest_within(loaded, baked, chosen, options, data, quantisation)
        options, graph, quantised, notes = best.options, best.graph, best.quantised, [*notes, best.note]
    else:
        graph, quantised = graph_for(loaded, baked, chosen, options, data, quantisation)
    progress(f"building for {chosen.name}")
    progress("writing the engine file")
    return path, write_built(path, loaded, baked, graph, chosen, options, quantised, notes, beside)


def _check_options(chosen: Backend, options: BuildOptions, quantisation: Quantisation | None) -> None:
    """Raise OptionError or UnsupportedError on what does not go together, or not with the backend."""
    if options.precision != "auto":
        chosen.check(options)
    check_quantisation(options.precision, quantisation)
    if options.tensorrt != TensorRTOptions() and not chosen.name.startswith("tensorrt"):
        raise OptionError(
            f"options of the TensorRT backends are given, and the {chosen.name} backend builds",
            "leave them out, or build with --backend tensorrt or tensorrt-rtx",
        )
    if options.require_sparse and not options.sparse:
        raise OptionError("--require-sparse is given without --sparse: no layer would be sparse", "give both")


def calibrated_otherwise(data: CalibrationData | None, baked: Baked) -> list[str]:
    """A warning where ranges are found on what the network is given with other masks than it is built with."""
    masked = any(layer.source for layer in baked.layers)
    if data is None or data.facts.get("masked", masked) == masked:
        return []
    with_masks, without = ("with masks", "without") if masked else ("without masks", "with them")
    return [
        f"warning: the engine is built {with_masks} and the calibration data was collected {without}: "
        f"calibrate {'with --sparse' if masked else 'without --sparse'}"
    ]


def _check_sparse(baked: Baked) -> None:
    if baked.sparse_layers:
        return
    refused = [f"{layer.name}: {layer.reason}" for layer in baked.layers if layer.reason]
    if baked.rule == "none":
        refused = ["--mask none leaves the weights as they are"]
    why = "; ".join(refused[:3]) or "no layer was selected for a mask"
    raise CheckpointError(
        f"--sparse: none of the {len(baked.layers)} layers can be 2:4 ({why})",
        "build without --sparse, or choose layers with --mask-layers, --mask auto and the pattern 2:4",
    )
