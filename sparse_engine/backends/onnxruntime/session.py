"""From the graph in an engine file to a session on this machine: weights mapped in place, a kernel chosen per layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

from sparse_engine import kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE

from .attention import Attention, fuse_attention
from .choose import Chooser, LayerChoice, pool_size
from .layers import DOMAIN, OP, SparseLayer, from_nibbles


@dataclass
class Prepared:
    """A graph ready for this machine.

    Attributes:
        model: with external references into the engine file.
        overrides: initializer name -> array in memory that takes its place.
        report: layer -> what was chosen.
        attention: how many attentions were fused, and into what.
    """

    model: ModelProto
    overrides: dict[str, np.ndarray] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)

    @property
    def has_own_nodes(self) -> bool:
        """Whether the session needs the custom operators."""
        return any(node.domain == DOMAIN for node in self.model.graph.node)


def prepare(engine: EngineFile, threads: int | None, autotune: bool) -> Prepared:
    """Read an engine's graph and choose a kernel for each 2:4 layer.

    Args:
        engine: of this backend.
        threads: that the session will have.
        autotune: time the candidates; otherwise the stated default: sparse wherever a vector kernel runs.
    """
    model = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    spans = _weights_in_place(model, engine)
    prepared = Prepared(model)
    chooser = Chooser(engine.manifest, threads, autotune)
    _fuse_attentions(prepared, chooser, threads, engine.manifest.precision)
    for layer in [SparseLayer.of(node) for node in model.graph.node if node.op_type == OP]:
        choice = chooser.choose(layer)
        packed = _mapped(engine.path, spans[layer.positions], np.uint8).reshape(layer.rows, -1)
        positions = from_nibbles(packed, layer.depth)
        if choice.kernel == "dense":
            _make_dense(prepared, engine.path, layer, spans[layer.values], positions)
        else:
            _make_sparse(prepared, layer, positions, choice, threads, engine.manifest.precision)
        prepared.report[layer.name] = choice.to_dict()
    return prepared


def create_session(prepared: Prepared, path: Path, threads: int | None) -> Any:
    """An ``onnxruntime.InferenceSession`` over weights that stay mapped in ``path``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.resolve().parent))
    if prepared.has_own_nodes:
        options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    if prepared.overrides:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in prepared.overrides.values()]
        options.add_external_initializers(list(prepared.overrides), values)
    data = prepared.model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _fuse_attentions(prepared: Prepared, chooser: Chooser, threads: int | None, compute: str) -> None:
    def replace(attention: Attention) -> list[NodeProto]:
        choice = chooser.attention(attention)
        kernel = choice.kernel if choice else "onnxruntime"
        prepared.attention = {"kernel": kernel, "milliseconds": choice.milliseconds if choice else {}}
        return attention.own_node(compute, pool_size(threads)) if kernel == "own" else attention.runtime_nodes()

    fused = fuse_attention(prepared.model, replace)
    prepared.attention["fused"] = fused


def _weights_in_place(model: ModelProto, engine: EngineFile) -> dict[str, tuple[int, int]]:
    """Turn references into ``weights.bin`` to its place inside the engine file; return (offset, bytes) of each."""
    start, _ = engine.span(WEIGHTS_FILE)
    spans = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry for entry in tensor.external_data}
        if entries:
            offset = int(entries["offset"].value) + start
            entries["location"].value, entries["offset"].value = engine.path.resolve().name, str(offset)
            spans[tensor.name] = (offset, int(entries["length"].value))
    return spans


def _mapped(path: Path, span: tuple[int, int], dtype: type) -> np.ndarray:
    offset, size = span
    return np.memmap(path, dtype, "r", offset, (size // np.dtype(dtype).itemsize,))


def _make_sparse(
    prepared: Prepared,
    layer: SparseLayer,
    positions: np.ndarray,
    choice: LayerChoice,
    threads: int | None,
    precision: str,
) -> None:
    """Give a node its tactic, and its positions in the form that the kernel reads."""
    graph = prepared.model.graph
    index = next(i for i, node in enumerate(graph.node) if node.name == layer.name and node.op_type == OP)
    graph.node[index].CopyFrom(layer.node(tactic=choice.kernel, threads=pool_size(threads), compute=precision))
    tensor = next(tensor for tensor in graph.initializer if tensor.name == layer.positions)
    tensor.dims[:] = positions.shape
    prepared.overrides[layer.positions] = positions


def _make_dense(
    prepared: Prepared, path: Path, layer: SparseLayer, values: tuple[int, int], positions: np.ndarray
) -> None:
    """Write a node out in plain ONNX, its weight unpacked in memory."""
    graph = prepared.model.graph
    index = next(i for i, node in enumerate(graph.node) if node.name == layer.name and node.op_type == OP)
    graph.node.remove(graph.node[index])
    name = f"{layer.name}.weight"
    for offset, node in enumerate(layer.dense_nodes(name)):
        graph.node.insert(index + offset, node)
    for gone in (layer.values, layer.positions):
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == gone))
    kept = _mapped(path, values, np.float32).reshape(layer.rows, -1)
    weight = np.ascontiguousarray(kernels.unpack(kept, positions).T)
    tensor = TensorProto(name=name, dims=weight.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", path.resolve().name), ("offset", 0), ("length", weight.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    graph.initializer.append(tensor)
    prepared.overrides[name] = weight
