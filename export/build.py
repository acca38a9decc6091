"""Checkpoint -> step graph -> backend -> ``.sengine``: what ``sparse-engine build`` calls."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_engine import __version__, arguments
from sparse_engine.artifact import SUFFIX, write_engine
from sparse_engine.backends import Backend, BuildOptions, Payload, StepGraph, TensorRTOptions, usable_backend
from sparse_engine.backends.base import with_kernel
from sparse_engine.backends.torch.plain import plain_defaults
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS
from sparse_engine.errors import CheckpointError, OptionError, UnsupportedError
from sparse_engine.files import check_writable
from sparse_engine.manifest import Manifest
from sparse_engine.sampling import schedule_from_dict

from .assets import AssetFiles, AssetOptions, asset_files
from .bake import Baked, bake
from .masks import TWO_FOUR, is_n_of_m
from .model import Model, load_model
from .names import listed
from .options import MaskOptions, ModelOptions
from .precision import lower
from .quantise import calibration_of, check_quantisation, describe_quantised, quantise
from .step_graph import check_graph, export_step_graph
from .weight_files import name_without_suffixes

# Share of a layer's weight energy that a mask may remove, on average over the layers, before the build warns: between
# what models lost that were trained under it (0.2 % of a U-ViT, 1.6 % of a U-Net, one of whose layers lost 11 %) and
# the 12 to 16 % of others (examples/digits, examples/digits_unet).
ENERGY_WARNING = 0.05


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
    if precision != "auto":
        chosen.check(options)
    check_quantisation(precision, quantisation)
    if options.tensorrt != TensorRTOptions() and not chosen.name.startswith("tensorrt"):
        raise OptionError(
            f"options of the TensorRT backends are given, and the {chosen.name} backend builds",
            "leave them out, or build with --backend tensorrt or tensorrt-rtx",
        )
    if options.require_sparse and not sparse:
        raise OptionError("--require-sparse is given without --sparse: no layer would be sparse", "give both")
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
        from .fastest import fastest_within  # which builds engines itself

        best = fastest_within(loaded, baked, chosen, options, data, quantisation)
        options, graph, quantised, notes = best.options, best.graph, best.quantised, [*notes, best.note]
    else:
        graph, quantised = graph_for(loaded, baked, chosen, options, data, quantisation)
    progress(f"building for {chosen.name}")
    progress("writing the engine file")
    return path, write_built(path, loaded, baked, graph, chosen, options, quantised, notes, beside)


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


def graph_for(
    model: Model,
    baked: Baked,
    backend: Backend,
    options: BuildOptions,
    data: CalibrationData | None,
    quantisation: Quantisation | None,
    exported: dict[str, StepGraph] | None = None,
) -> tuple[StepGraph, Quantised | None]:
    """The step graph that a backend builds from, in its precision; quantised for a precision that asks for it.

    ``exported`` keeps exports from one call to the next, by precision.
    """
    known = {} if exported is None else exported

    def export(precision: str) -> StepGraph:
        if precision not in known:
            options.progress("exporting the step graph")
            known[precision] = export_baked(model, baked, precision)
        return known[precision]

    graph = export(backend.graph_precision(options))
    if data is None or quantisation is None or options.precision not in QUANTISED_PRECISIONS:
        return graph, None
    quantised = quantise(model, baked, export("fp32"), graph, backend, options, data, quantisation)
    return quantised.graph, quantised


def export_baked(model: Model, baked: Baked, precision: str = "fp32") -> StepGraph:
    """The step graph of a baked model, lowered and checked against what was baked. Raises BackendError."""
    network = lower(model.network(baked.state), model.family.float32_layers, precision)
    graph = export_step_graph(network, model.config)
    _let_go(network)
    check_graph(graph, baked.state)
    return dataclasses.replace(graph, state=baked.state)


def _let_go(network: nn.Module) -> None:
    """Take a network's weights away: the exporter's libraries keep the modules of the last export for good."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def write_built(
    path: Path,
    model: Model,
    baked: Baked,
    graph: StepGraph,
    backend: Backend,
    options: BuildOptions,
    quantised: Quantised | None = None,
    notes: Sequence[str] = (),
    beside: AssetFiles | None = None,
) -> Manifest:
    """Build a step graph with a backend and write the engine file; errors as ``build_engine``."""
    payload = backend.build(graph, options, _proven_sparse(baked, graph) if options.sparse else [])
    beside = beside or asset_files(model, AssetOptions())
    manifest = _manifest(model, baked, graph, payload, options, beside)
    if quantised is not None:
        describe_quantised(manifest, quantised)
    manifest.notes += notes
    if options.require_sparse:
        check_all_sparse([layer for layer in manifest.layers if layer["chosen"] is not None])
    manifest.backend["version"] = backend.availability().version
    write_engine(path, manifest, [*payload.files, *beside.files])
    return manifest


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


def check_all_sparse(layers: Sequence[Mapping[str, Any]]) -> None:
    """Raise UnsupportedError where a masked layer runs a dense kernel. ``layers`` are as in ``engine.info``."""
    dense = [layer for layer in layers if layer["masked"] and not layer["chosen"]]
    if dense:
        why = dense[0].get("why") or f"kernel {dense[0].get('kernel') or 'dense'}"
        raise UnsupportedError(
            f"--require-sparse: {len(dense)} masked layers stay dense, such as {dense[0]['name']} ({why})",
            "build without --require-sparse, or leave them out with --mask-layers",
        )


def _proven_sparse(baked: Baked, graph: StepGraph) -> list[str]:
    """The layers whose initializers, as the backend will get them, are 2:4 along the reduction axis."""
    names = [layer.name for layer in baked.sparse_layers]
    return [name for name in names if is_n_of_m(graph.weights[graph.layers[name][0]], axis=graph.layers[name][1])]


def _manifest(
    model: Model, baked: Baked, graph: StepGraph, payload: Payload, options: BuildOptions, beside: AssetFiles
) -> Manifest:
    recipe = model.recipe
    schedule = recipe.schedule if isinstance(recipe.schedule, Mapping) else {"name": recipe.schedule}
    nothing = {"chosen": False, "kernel": None}
    return Manifest(
        tool_version=__version__,
        family=model.family.name,
        config=dataclasses.asdict(model.config),  # type: ignore[call-overload]
        data_shape=model.config.data_shape,
        value_range=recipe.value_range,
        schedule=schedule_from_dict(schedule).to_dict(),
        prediction=recipe.prediction,
        conditioning=[each.to_dict() for each in beside.conditions],
        sampler=recipe.sampler,
        precision=options.precision,
        sparse=options.sparse,
        mask=baked.recipe(),
        layers=[
            with_kernel(
                {**layer.to_dict(), "eligible": layer.hardware_24},
                payload.layers.get(layer.name, nothing),
                options.sparse,
            )
            for layer in baked.layers
        ],
        backend=payload.backend,
        batch=options.batch,
        checkpoint_sha256=model.checkpoint.sha256,
        graph_sha256=hashlib.sha256(graph.proto.SerializeToString(deterministic=True)).hexdigest(),  # as exported
        notes=[*model.notes, *beside.notes, *warnings_of(baked)],
        assets=beside.entries,
        excluded_samplers=dict(recipe.excluded),
    )


def warnings_of(baked: Baked) -> list[str]:
    """What a user should know of the masks: layers that lost much on average, layers left dense, ties."""
    notes = []
    # What an explicit mask takes away was no part of the network that was trained.
    derived = [layer for layer in baked.layers if layer.source == "magnitude"]
    average = sum(layer.energy_removed for layer in derived) / max(1, len(derived))
    if average > ENERGY_WARNING:
        worst = max(derived, key=lambda layer: layer.energy_removed)
        notes.append(
            f"warning: the mask removes {average:.1%} of the weight energy of {len(derived)} layers on average "
            f"(most in {worst.name}: {worst.energy_removed:.1%}): these weights were not trained under it, "
            "so expect worse pictures"
        )
    for reason in dict.fromkeys(layer.reason for layer in baked.layers if layer.reason):
        names = [layer.name for layer in baked.layers if layer.reason == reason]
        notes.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} not 2:4: {reason}")
    tied = sum(layer.tied_groups for layer in baked.layers)
    if tied:
        notes.append(f"{tied} groups had a tie between equal weights; the lower index was pruned")
    if baked.pattern != TWO_FOUR and any(layer.source for layer in baked.layers):
        notes.append(f"{baked.pattern} is baked in but is not 2:4: {_kernels_for(baked)}")
    return notes


def _kernels_for(baked: Baked) -> str:
    """What runs weights of a pattern that is not 2:4: one that keeps no more of each four is 2:4, too."""
    return (
        "no sparse kernel takes it" if not baked.sparse_layers else "2:4 kernels run it, and skip half of the weights"
    )
