"""What a float network's layers are given, and give, over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from sparse_engine.backends.attention import fuse_attention
from sparse_engine.backends.base import IDENTITY_ROW, NO_CLIP, StepGraph
from sparse_engine.backends.onnxruntime.attention import runtime_nodes
from sparse_engine.backends.onnxruntime.compute import EXACT_PRODUCTS
from sparse_engine.backends.onnxruntime.library import load_onnxruntime
from sparse_engine.cores import pool_size
from sparse_engine.errors import BackendError, InputError

from .collect import CalibrationData

BATCH = 4  # samples at once: the activations of all layers are held for so many
VALUES_PER_SAMPLE = 2048  # drawn from each tensor for each sample: half a million of them settle any range


@dataclass(frozen=True, eq=False)
class Activation:
    """One tensor over calibration data of N samples.

    Attributes:
        lows, highs: float32 [N], the smallest and the largest value for each sample.
        values: float32 [N * VALUES_PER_SAMPLE], values drawn at random from all samples alike.
        channel_max: float32 [C], the largest absolute value of each input channel of the layer.
    """

    lows: np.ndarray
    highs: np.ndarray
    values: np.ndarray
    channel_max: np.ndarray


def layer_nodes(proto: ModelProto, layers: Sequence[str]) -> dict[str, NodeProto]:
    """The node of each layer: the one that carries its name."""
    wanted = set(layers)
    return {node.name: node for node in proto.graph.node if node.name in wanted}


def layer_inputs(proto: ModelProto, layers: Sequence[str]) -> dict[str, str]:
    """Layer -> the tensor that it is given."""
    return {name: node.input[0] for name, node in layer_nodes(proto, layers).items()}


def layer_outputs(proto: ModelProto, layers: Sequence[str]) -> dict[str, str]:
    """Layer -> the tensor that it gives, its bias added."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    outputs = {}
    for name, node in layer_nodes(proto, layers).items():
        adds = [
            each
            for each in proto.graph.node
            if each.op_type == "Add" and node.output[0] in each.input and constants & set(each.input)
        ]
        outputs[name] = adds[0].output[0] if adds else node.output[0]
    return outputs


def observe(
    graph: StepGraph,
    data: CalibrationData,
    tensors: Mapping[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Activation]:
    """Run a float step graph over calibration data.

    Args:
        graph: as exported in fp32.
        data: the inputs.
        tensors: key of the result -> name of a tensor of the graph.
        progress: told (samples done, samples in all).

    Raises:
        InputError: a tensor is NaN or infinite somewhere: it has no range.
        BackendError: ONNX Runtime refuses the graph.
    """
    names = list(dict.fromkeys(tensors.values()))
    convolved = {node.input[0] for node in graph.proto.graph.node if node.op_type == "Conv"}
    rng = np.random.default_rng(0)
    parts: dict[str, list[Activation]] = {name: [] for name in names}
    done = 0
    for batch, (_, *arrays) in run_network(graph, data, names):
        for name, array in zip(names, arrays, strict=True):
            parts[name].append(_summary(array, len(batch), 1 if name in convolved else -1, rng))
            if not np.isfinite(parts[name][-1].highs - parts[name][-1].lows).all():
                raise InputError(
                    f"{name} is NaN or infinite near t = {batch.times[0]:.3g}: it has no range to quantise",
                    "check the checkpoint with sparse-engine verify, and calibrate again",
                )
        done += len(batch)
        progress(done, len(data))
    merged = {name: _merge(found) for name, found in parts.items()}
    return {key: merged[name] for key, name in tensors.items()}


def _summary(array: np.ndarray, samples: int, channel_axis: int, rng: np.random.Generator) -> Activation:
    flat = array.reshape(samples, -1)
    others = tuple(axis for axis in range(array.ndim) if axis != channel_axis % array.ndim)
    drawn = flat[np.arange(samples)[:, None], rng.integers(flat.shape[1], size=(samples, VALUES_PER_SAMPLE))]
    channel_max = np.maximum(array.max(axis=others), -array.min(axis=others))
    return Activation(flat.min(axis=1), flat.max(axis=1), drawn.ravel(), channel_max)


def _merge(parts: Sequence[Activation]) -> Activation:
    return Activation(
        np.concatenate([part.lows for part in parts]),
        np.concatenate([part.highs for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.max([part.channel_max for part in parts], axis=0),
    )


def run_network(
    graph: StepGraph, data: CalibrationData, tensors: Sequence[str] = ()
) -> Iterator[tuple[CalibrationData, list[np.ndarray]]]:
    """Evaluate a step graph's network batch by batch: (inputs, [its prediction, then each of ``tensors``])."""
    session = _session(graph, tensors)
    taken = {entry.name for entry in session.get_inputs()}
    for batch in data.batches(BATCH):
        feed = {name: array for name, array in _feed(batch).items() if name in taken}
        yield batch, session.run(["m", *tensors], feed)


def predictions(graph: StepGraph, data: CalibrationData) -> np.ndarray:
    """What a step graph's network predicts, float32 [N, C, H, W]."""
    return np.concatenate([outputs[0] for _, outputs in run_network(graph, data)])


def _feed(batch: CalibrationData) -> dict[str, np.ndarray]:
    zeros = np.zeros_like(batch.x)
    feed = {"x": batch.x, "t": batch.network_times, "coef": IDENTITY_ROW, "clip": NO_CLIP}
    if batch.conditioning:
        told = {name: rows[None] for name, rows in batch.conditioning.items()}
        feed |= {**told, "guidance": np.ones(1, np.float32)}
    return feed | dict.fromkeys(("base", "h1", "h2", "z"), zeros)


def _session(graph: StepGraph, tensors: Sequence[str]) -> Any:
    """A session over a step graph in memory, with more of its tensors as outputs."""
    onnxruntime = load_onnxruntime()

    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    fuse_attention(model, runtime_nodes)
    known = {entry.name for entry in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = pool_size(None)
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_PRODUCTS)
    values = [_ort_value(graph.weights[t.name], t.data_type) for t in _external(model)]
    options.add_external_initializers([tensor.name for tensor in _external(model)], values)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common public base
        raise BackendError(f"ONNX Runtime {onnxruntime.__version__} refuses the graph: {error}") from error


def _external(model: ModelProto) -> list[TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]


def _ort_value(array: np.ndarray, onnx_type: int) -> Any:
    onnxruntime = load_onnxruntime()
    array = np.ascontiguousarray(array)  # what ONNX Runtime uses in place
    if array.dtype.kind in "fiu":  # a type that NumPy itself has
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.itemsize}"), onnx_type)
