"""From the graph in an engine file to a session on this machine: weights mapped in place, a kernel chosen per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from sparse_engine import kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.attention import Attention, fuse_attention
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE
from sparse_engine.backends.onnx_graph import GraphView, drop_unread, only_consumer, put_in_place
from sparse_engine.cores import pool_size
from sparse_engine.kernels.library import Compute

from .attention import own_nodes, runtime_nodes
from .choose import OWN_INT8, SPARSE_INT8, Chooser, LayerChoice, own_int8_kernel, shape_of
from .compress import layers_in
from .compute import EXACT_PRODUCTS, attention_in, products_in
from .convolutions import FusedConv
from .group_norm import GroupNorm, fuse_group_norms
from .int8 import Int8Layer, PackedCodes, connect_attention, int8_units, packed_codes
from .int8_convolutions import connect_group_norms, int8_convs
from .int8_in_floats import put_in_floats
from .layers import DOMAIN, FusedLayer, from_nibbles
from .layers_bf16 import KERNELS, bf16_units
from .layers_bf16 import connect_attention as connect_bf16_attention
from .library import load_onnxruntime


@dataclass
class Prepared:
    """A graph ready for this machine.

    Attributes:
        model: with external references into the engine file.
        overrides: initializer name -> array in memory that takes its place.
        report: layer -> what was chosen.
        attention: how many attentions were fused, and into what; of each shape too.
        group_norm: the same of group norms: those that run as they were written are not fused.
        step: of an int8 engine, in what its layers run here, and why (see ``fastest_step``).
    """

    model: ModelProto
    overrides: dict[str, np.ndarray] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    group_norm: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    @property
    def has_own_nodes(self) -> bool:
        """Whether the session needs the custom operators."""
        return any(node.domain == DOMAIN for node in self.model.graph.node)


def prepare(engine: EngineFile, threads: int | None, autotune: bool, precision: str | None = None) -> Prepared:
    """Read an engine's graph and choose a kernel for each 2:4 layer.

    Args:
        engine: of this backend.
        threads: that the session will have.
        autotune: time the candidates; otherwise the stated default: sparse wherever a vector kernel runs.
        precision: that it runs in; None is the engine's own. An int8 engine runs in bf16 and fp32 too.
    """
    precision = precision or engine.manifest.precision
    model = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    spans = weights_in_place(model, engine)
    prepared = Prepared(model)
    if precision != engine.manifest.precision:
        _leave_codes(prepared, engine.path, spans, products_in(precision))
    chooser = Chooser(engine.manifest, threads, autotune, precision)
    _fuse_attentions(prepared, chooser, threads, attention_in(precision))
    _fuse_group_norms(prepared, chooser, threads)
    layers = layers_in(model)
    for layer in layers:
        choice = chooser.choose(layer)
        values, positions = _weights_of(prepared, engine.path, spans, layer)
        if choice.kernel == "dense":
            _make_plain(
                prepared, engine.path, layer, values if positions is None else kernels.unpack(values, positions)
            )
        else:
            _make_own(prepared, layer, positions, choice, threads, products_in(precision))
        prepared.report[layer.name] = choice.to_dict()
    layers = _fuse_bf16(prepared, chooser, layers, threads)
    _join_pairs(prepared, chooser, layers, products_in(precision), threads)
    _fuse_int8(prepared, engine.path, spans, chooser, threads)
    return prepared


def _leave_codes(prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], compute: Compute) -> None:
    """Make float layers of those in 8 bits, their weights in memory."""
    weights, unread = put_in_floats(prepared.model, lambda name, kind: _mapped(path, spans[name], kind), compute)
    for name, array in weights.items():
        _in_memory(prepared, path, name, array)
    _forget(prepared, *unread)


def _weights_of(
    prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], layer: FusedLayer
) -> tuple[np.ndarray, np.ndarray | None]:
    """A float layer's values and positions, out of the engine file or out of memory; a dense one has no positions."""
    if layer.values in prepared.overrides:
        return prepared.overrides[layer.values], prepared.overrides.get(layer.positions)
    values = _mapped_rows(path, spans, layer.values, np.float32, layer.rows)
    if not layer.is_sparse:
        return values, None
    return values, from_nibbles(_mapped_rows(path, spans, layer.positions, np.uint8, layer.rows), layer.depth)


def create_session(
    prepared: Prepared,
    path: Path,
    threads: int | None,
    profile: Path | None = None,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    settings: Sequence[tuple[str, str]] = (),
) -> Any:
    """An ``onnxruntime.InferenceSession`` over weights that stay mapped in ``path``.

    ``profile`` starts the names of its traces; ``providers`` are ONNX Runtime's, with their options; ``settings``, its
    names and values, go beyond what every session of ours has.
    """
    onnxruntime = load_onnxruntime()

    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = pool_size(threads)  # its own default knows no quota
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for setting in (EXACT_PRODUCTS, *settings):
        options.add_session_config_entry(*setting)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.resolve().parent))
    if prepared.has_own_nodes:
        options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    if prepared.overrides:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in prepared.overrides.values()]
        options.add_external_initializers(list(prepared.overrides), values)
    data = prepared.model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=list(providers))


def _fuse_bf16(prepared: Prepared, chooser: Chooser, layers: list[FusedLayer], threads: int | None) -> list[FusedLayer]:
    """Make one node of layers in bf16 and what surrounds them wherever that is faster; return the other layers."""
    graph = prepared.model.graph
    view = GraphView(prepared.model)
    ours = [
        layer
        for layer in layers
        if not isinstance(layer, FusedConv) and prepared.report[layer.name]["kernel"] != "dense"
    ]
    chosen = []
    for unit in bf16_units(view, ours):
        choice = chooser.choose_bf16(unit, view, unit.nodes(graph))
        if choice is None:
            return layers
        if choice.kernel == "together":
            chosen.append(unit)
            for layer in unit.all_layers:
                others = [other.name for other in unit.all_layers if other is not layer]
                report = {"with": others, "chosen": "together", "milliseconds": choice.milliseconds}
                prepared.report[layer.name] |= {"kernel": KERNELS[layer.is_sparse], "surroundings": report}
    for unit in connect_bf16_attention(chosen, view):
        put_in_place(graph, unit.nodes(graph), unit.node(pool_size(threads)))
    fused = {layer.name for unit in chosen for layer in unit.all_layers}
    return [layer for layer in layers if layer.name not in fused]


def _join_pairs(
    prepared: Prepared, chooser: Chooser, layers: Sequence[FusedLayer], compute: str, threads: int | None
) -> None:
    """Make one node of two layers in a row wherever that is faster."""
    graph = prepared.model.graph
    by_input = {layer.x: layer for layer in layers}
    for first in layers:
        second = by_input.get(first.output)
        if second is None or only_consumer(graph, first.output) is None:
            continue
        kernels_chosen = {prepared.report[layer.name]["kernel"] for layer in (first, second)}
        kernel = kernels_chosen.pop()
        choice = None if kernels_chosen else chooser.together(first, second, kernel)
        if choice is None:
            continue
        report = {"with": second.name, "chosen": choice.kernel, "milliseconds": choice.milliseconds}
        prepared.report[first.name]["pair"] = report
        prepared.report[second.name]["pair"] = {**report, "with": first.name}
        if choice.kernel == "together":
            attributes = {"compute": compute, "tactic": kernel} if first.is_sparse else {}
            node = first.node_with(second, threads=pool_size(threads), **attributes)
            graph.node[_index_of(prepared, second)].CopyFrom(node)
            graph.node.remove(graph.node[_index_of(prepared, first)])


def _fuse_int8(
    prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], chooser: Chooser, threads: int | None
) -> None:
    """Give layers in 8 bits our kernel wherever it is faster, and write packed codes out where it is not."""
    graph = prepared.model.graph
    view = GraphView(prepared.model)
    units = []
    for unit in int8_units(view, graph):
        choice = chooser.choose_int8(unit, view)
        for layer in unit.all_layers:
            prepared.report[layer.name] = choice.to_dict()
        if choice.kernel == OWN_INT8:
            units.append(unit)
    for unit in connect_attention(units, view):
        put_in_place(graph, unit.nodes, unit.node(pool_size(threads)))
        for layer in unit.all_layers:
            prepared.report[layer.name] |= {"kernel": own_int8_kernel(layer), "chosen": layer.is_sparse}
            _lay_out_codes(prepared, path, spans, layer)
    ours = {layer.codes for unit in units for layer in unit.all_layers}
    ours |= _fuse_int8_convs(prepared, path, spans, chooser, threads)
    for name, packed in packed_codes(graph).items():
        graph.node.remove(packed.node)
        values, positions = (_mapped_rows(path, spans, part, kind, packed.rows) for part, kind in packed.parts())
        if name not in ours:
            codes = kernels.unpack_codes(values, from_nibbles(positions, packed.depth))
            _in_memory(prepared, path, name, packed.plain(codes))
            _forget(prepared, packed.values, packed.positions)


def _fuse_int8_convs(
    prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], chooser: Chooser, threads: int | None
) -> set[str]:
    """The same of convolutions; return the names of the codes that ours read packed."""
    view = GraphView(prepared.model)
    convs = []
    for conv in int8_convs(prepared.model, view):
        choice = chooser.choose_int8_conv(conv, view)
        prepared.report[conv.name] = choice.to_dict()
        if choice.kernel == OWN_INT8:
            convs.append(conv)
            prepared.report[conv.name] |= {"kernel": SPARSE_INT8, "chosen": True}
    for conv in connect_group_norms(convs, view):
        put_in_place(prepared.model.graph, conv.nodes, conv.node(pool_size(threads)))
        drop_unread(prepared.model.graph, conv.before)
        _lay_out_positions(prepared, path, spans, conv.packed)
    return {conv.packed.node.output[0] for conv in convs}


def _lay_out_codes(prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], layer: Int8Layer) -> None:
    """Give a layer's weights the form that our kernel reads."""
    if layer.packed is None:
        codes = _mapped_rows(path, spans, layer.codes, np.int8, layer.rows if layer.axis else layer.depth)
        _in_memory(prepared, path, layer.values, np.ascontiguousarray(codes if layer.axis else codes.T))
        _forget(prepared, layer.codes)
    else:
        _lay_out_positions(prepared, path, spans, layer.packed)


def _lay_out_positions(prepared: Prepared, path: Path, spans: dict[str, tuple[int, int]], packed: PackedCodes) -> None:
    positions = from_nibbles(_mapped_rows(path, spans, packed.positions, np.uint8, packed.rows), packed.depth)
    tensor = next(tensor for tensor in prepared.model.graph.initializer if tensor.name == packed.positions)
    tensor.dims[:] = positions.shape
    prepared.overrides[packed.positions] = positions


def _mapped_rows(path: Path, spans: dict[str, tuple[int, int]], name: str, dtype: type, rows: int) -> np.ndarray:
    return _mapped(path, spans[name], dtype).reshape(rows, -1)


def _fuse_attentions(prepared: Prepared, chooser: Chooser, threads: int | None, compute: str) -> None:
    shapes: dict[str, dict[str, Any]] = {}

    def replace(attention: Attention) -> list[NodeProto] | None:
        choice = chooser.attention(attention)
        kernel = choice.kernel if choice else "onnxruntime"
        nodes = own_nodes(attention, compute, pool_size(threads)) if kernel == "own" else runtime_nodes(attention)
        if nodes is not None:
            timed = choice.milliseconds if choice else {}
            report = shapes.setdefault(shape_of(attention), {"kernel": kernel, "milliseconds": timed, "fused": 0})
            report["fused"] += 1
        return nodes

    prepared.attention = _summary(shapes, fuse_attention(prepared.model, replace))


def _fuse_group_norms(prepared: Prepared, chooser: Chooser, threads: int | None) -> None:
    shapes: dict[str, dict[str, Any]] = {}

    def replace(norm: GroupNorm) -> list[NodeProto] | None:
        choice = chooser.group_norm(norm)
        kernel = choice.kernel if choice else "onnxruntime"
        timed = choice.milliseconds if choice else {}
        report = shapes.setdefault(norm.words(), {"kernel": kernel, "milliseconds": timed, "fused": 0})
        report["fused"] += kernel == "own"
        return [norm.node(pool_size(threads))] if kernel == "own" else None

    prepared.group_norm = _summary(shapes, fuse_group_norms(prepared.model, replace))


def _summary(shapes: dict[str, dict[str, Any]], fused: int) -> dict[str, Any]:
    """What was fused of one kind: which kernels, the times of the commonest shape, and each shape's."""
    if not shapes:
        return {"fused": fused}
    used = sorted({each["kernel"] for each in shapes.values()})
    largest = max(shapes.values(), key=lambda each: each["fused"])
    return {
        "kernel": " and ".join(used),
        "milliseconds": largest["milliseconds"],
        "shapes": shapes,
        "fused": fused,
    }


def weights_in_place(model: ModelProto, engine: EngineFile, member: str = WEIGHTS_FILE) -> dict[str, tuple[int, int]]:
    """Turn references into a file of weights to its place inside the engine file; return (offset, bytes) of each."""
    start, _ = engine.span(member)
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


def _make_own(
    prepared: Prepared,
    layer: FusedLayer,
    positions: np.ndarray | None,
    choice: LayerChoice,
    threads: int | None,
    precision: str,
) -> None:
    """Give a node its tactic, and its weights in the form that the kernel reads."""
    graph = prepared.model.graph
    node = layer.own_node(choice.kernel, precision, pool_size(threads))
    graph.node[_index_of(prepared, layer)].CopyFrom(node)
    if positions is not None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == layer.positions)
        tensor.dims[:] = positions.shape
        prepared.overrides[layer.positions] = positions


def _make_plain(prepared: Prepared, path: Path, layer: FusedLayer, weight: np.ndarray) -> None:
    """Write a node out in plain ONNX, its weight [N, K] laid out for that in memory."""
    graph = prepared.model.graph
    index = _index_of(prepared, layer)
    graph.node.remove(graph.node[index])
    name = f"{layer.name}.weight"
    for offset, node in enumerate(layer.plain_nodes(name)):
        graph.node.insert(index + offset, node)
    _forget(prepared, *filter(None, (layer.values, layer.positions)))
    _in_memory(prepared, path, name, layer.plain_weight(weight))


def _in_memory(prepared: Prepared, path: Path, name: str, array: np.ndarray) -> None:
    """Add an initializer whose contents are not in the engine file, but an array."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, dims=array.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", path.resolve().name), ("offset", 0), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    prepared.model.graph.initializer.append(tensor)
    prepared.overrides[name] = array


def _forget(prepared: Prepared, *names: str) -> None:
    for name in names:
        graph = prepared.model.graph
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == name))
        prepared.overrides.pop(name, None)


def _index_of(prepared: Prepared, layer: FusedLayer) -> int:
    nodes = prepared.model.graph.node
    return next(i for i, node in enumerate(nodes) if node.name == layer.name and node.domain == DOMAIN)
