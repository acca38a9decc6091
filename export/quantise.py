"""A baked model in 8 bits: what ``build`` does between export and backend for int8 and fp8."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from onnx import NodeProto, numpy_helper

from sparse_engine.backends import Backend, BuildOptions, StepGraph
from sparse_engine.calibration.apply import Quantisation, Quantised, quantize_model
from sparse_engine.calibration.collect import CalibrationData, load_calibration
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS, scheme_for
from sparse_engine.errors import BackendError, OptionError
from sparse_engine.manifest import Manifest

from .bake import Baked
from .masks import is_n_of_m
from .model import Model


def check_quantisation(precision: str, wanted: Quantisation | None) -> None:
    """Say before the work that calibration data is missing, or given for nothing. Raises OptionError."""
    needed = precision in QUANTISED_PRECISIONS
    if needed and wanted is None:
        raise OptionError(
            f"precision {precision} needs calibration data",
            "sparse-engine calibrate CHECKPOINT -o calib.npz, then build with --calib calib.npz",
        )
    if wanted is not None and not needed and precision != "auto":
        raise OptionError(
            f"calibration data is given, but precision {precision} uses none",
            f"build with --precision {' or '.join(QUANTISED_PRECISIONS)}, or leave --calib out",
        )


def calibration_of(model: Model, wanted: Quantisation) -> CalibrationData:
    """The calibration data of a model. Raises InputError where the file is none, or of another model."""
    return load_calibration(
        wanted.calibration,
        checkpoint_sha256=model.checkpoint.sha256,
        data_shape=model.config.data_shape,
        conditions=model.conditions,
    )


def quantise(
    model: Model,
    baked: Baked,
    reference: StepGraph,
    graph: StepGraph,
    backend: Backend,
    options: BuildOptions,
    data: CalibrationData,
    wanted: Quantisation,
) -> Quantised:
    """Quantise a step graph for a backend, and prove that its 2:4 layers are 2:4 still.

    Args:
        model, baked: what the graphs were exported from.
        reference: the step graph in float32.
        graph: the same in the precision that the backend asks for; may be ``reference``.
        backend, options: what it is built for.
        data: of this model.
        wanted: how to quantise.

    Raises:
        OptionError, InputError, UnsupportedError: as ``quantize_model`` and ``scheme_for``.
        BackendError: a quantised weight is not 2:4.
    """
    sparse = [layer.name for layer in baked.sparse_layers] if options.sparse else []
    quantised = quantize_model(
        reference,
        graph,
        data,
        scheme_for(backend.name, options.precision),
        wanted,
        always_float=model.family.float32_layers,
        sparse=sparse,
        progress=options.progress,
    )
    weights, places = quantised.graph.weights, quantised.graph.layers
    for name in sparse:
        initializer, axis = places[name]
        if not is_n_of_m(weights[initializer], axis=axis):
            raise BackendError(f"{name}: its quantised weights are not 2:4 along the inputs")
    if wanted.smooth is None:
        return quantised
    state = {**graph.state, **_migrated(graph, quantised.graph)}
    return dataclasses.replace(quantised, graph=dataclasses.replace(quantised.graph, state=state))


def _migrated(before: StepGraph, after: StepGraph) -> dict[str, np.ndarray]:
    """What smoothing changed of a network's float weights, under the checkpoint's keys, for who rebuilds the network.

    That is the normalisations, and the layers that were smoothed and then stay float; the others are in 8 bits.
    """
    changed = {}
    norms = _normalisations(before)
    for output, node in _normalisations(after).items():
        for old, new in zip(norms[output].input[1:], node.input[1:], strict=True):  # scale and bias
            if old != new:
                changed[old.removeprefix("network.")] = _constant(after, new)
    for name, (initializer, axis) in after.layers.items():
        weight = after.weights[initializer]
        if initializer != before.layers[name][0] and weight.dtype.itemsize > 1:
            changed[f"{name}.weight"] = (weight if axis == 1 else weight.T).astype(np.float32)
    return changed


def _normalisations(graph: StepGraph) -> dict[str, NodeProto]:
    return {node.output[0]: node for node in graph.proto.graph.node if node.op_type == "LayerNormalization"}


def _constant(graph: StepGraph, name: str) -> np.ndarray:
    if name in graph.weights:
        return graph.weights[name]
    return numpy_helper.to_array(next(tensor for tensor in graph.proto.graph.initializer if tensor.name == name))


def describe_quantised(manifest: Manifest, quantised: Quantised) -> None:
    """Enter into a manifest what was quantised, how, and what it cost."""
    manifest.quantisation = quantised.facts
    chosen = set(quantised.layers)
    for layer in manifest.layers:
        layer["quantised"] = manifest.precision if layer["name"] in chosen else None
        sqnr = quantised.quality.sqnr.get(layer["name"], math.nan)
        layer["sqnr_db"] = sqnr if math.isfinite(sqnr) else None  # JSON has no infinity
    kept = quantised.facts["kept_float_for_quality"]
    note = (
        f"{len(chosen)} of {len(manifest.layers)} layers are {manifest.precision}; the prediction differs from fp32 by "
    )
    note += f"{quantised.quality.loss:.2%} (RMS over {quantised.quality.samples} samples)"
    if kept:
        note += f"; {len(kept)} stay float for quality ({', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''})"
    manifest.notes.append(note)
