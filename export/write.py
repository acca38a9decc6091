"""A step graph -> a payload and the engine file around it, with what its manifest says of masks and layers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_engine.artifact import write_engine
from sparse_engine.backends import Backend, BuildOptions, Payload, StepGraph
from sparse_engine.backends.base import with_kernel
from sparse_engine.calibration.apply import Quantised
from sparse_engine.errors import UnsupportedError
from sparse_engine.manifest import Manifest
from sparse_engine.sampling import schedule_from_dict
from sparse_engine.version import __version__

from .assets import AssetFiles, AssetOptions, asset_files
from .bake import Baked
from .masks import TWO_FOUR, is_n_of_m
from .model import Model
from .names import listed
from .quantise import describe_quantised

# Share of a layer's weight energy that a mask may remove, on average over the layers, before the build warns: between
# what models lost that were trained under it (0.2 % of a U-ViT, 1.6 % of a U-Net, one of whose layers lost 11 %) and
# the 12 to 16 % of others (examples/digits, examples/digits_unet).
ENERGY_WARNING = 0.05


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
