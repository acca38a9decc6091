"""Layers in 8 bits: from the Q/DQ graph in an engine file to nodes of our own.

The file holds the standard form, which any runtime runs,

    x -> QuantizeLinear -> DequantizeLinear -> MatMul -> Add(bias) -> Gelu -> Add(residual)
                          codes -> DequantizeLinear --/

but for one thing: codes of a 2:4 weight are packed, and come out of a node ``sparse_engine.Codes24``. Where an engine
is loaded that node goes: either the layer becomes one of our ``LayersInt8``, together with what comes before (a
LayerNormalization, a Concat) and after it (a second layer), or the codes are written out and ONNX Runtime runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.kernels.int8 import Codes
from sparse_engine.kernels.packing import matrix_as_conv

from .layers import DOMAIN, GELU_FORMS, approximation, other_input
from .units import Unit, exchanges, with_fronts

CODES_OP, LAYERS_OP = "Codes24", "LayersInt8"
OUTPUTS = ("fp32", "bf16", "codes")  # of the operator, in its order
ANY_CODES = Codes(1.0)


def codes_node(
    name: str,
    shape: tuple[int, int],
    values: str,
    positions: str,
    output: str,
    axis: int,
    kernel: tuple[int, int] | None = None,
) -> NodeProto:
    """The node that stands in a file for codes [N, K] (axis 1) or [K, N] (axis 0), ``shape`` being (N, K).

    Those of a convolution are [N, C, *kernel]; K then runs over (C / 4, kernel, 4).
    """
    rows, depth = shape
    inputs, name = [values, positions], f"{name}.codes"
    taps: dict[str, Any] = {} if kernel is None else {"kernel_h": kernel[0], "kernel_w": kernel[1]}
    return helper.make_node(CODES_OP, inputs, [output], name=name, domain=DOMAIN, N=rows, K=depth, axis=axis, **taps)


class PackedCodes(NamedTuple):
    """A ``Codes24`` node: [N, K] from ``values`` and ``positions``; K along ``axis``, or as a convolution has it."""

    node: NodeProto
    rows: int
    depth: int
    axis: int
    values: str
    positions: str
    kernel: tuple[int, int] | None = None

    def parts(self) -> tuple[tuple[str, type], tuple[str, type]]:
        """Its inputs, and the types of their numbers."""
        return (self.values, np.int8), (self.positions, np.uint8)

    def plain(self, codes: np.ndarray) -> np.ndarray:
        """Codes [N, K] as the graph reads them."""
        if self.kernel is not None:
            return matrix_as_conv(codes, self.kernel)
        return np.ascontiguousarray(codes if self.axis else codes.T)


def packed_codes(graph: GraphProto) -> dict[str, PackedCodes]:
    """The ``Codes24`` nodes of a graph, by what they give."""
    found = {}
    for node in graph.node:
        if node.op_type == CODES_OP and node.domain == DOMAIN:
            told = {entry.name: entry.i for entry in node.attribute}
            values, positions = node.input
            kernel = (told["kernel_h"], told["kernel_w"]) if "kernel_h" in told else None
            found[node.output[0]] = PackedCodes(node, told["N"], told["K"], told["axis"], values, positions, kernel)
    return found


@dataclass(frozen=True)
class Int8Layer:
    """A layer in 8 bits as a graph has it. Absent inputs are empty strings.

    Attributes:
        name: of its product.
        rows, depth: N and K.
        codes: name of the weight's codes.
        axis: of K in them.
        packed: the codes are 2:4, and packed.
        scales: name of the scales of the rows.
        x: what is rounded to codes: name of what QuantizeLinear reads.
        quantised: what it gives.
        given: the codes of x.
        bias, activation, residual, output: of the product.
        nodes: all of these, in the order of the graph, without the QuantizeLinear.
        rank: of x.
    """

    name: str
    rows: int
    depth: int
    codes: str
    axis: int
    packed: PackedCodes | None
    scales: str
    x: str
    quantised: str
    given: Codes
    bias: str
    activation: str
    residual: str
    output: str
    nodes: tuple[NodeProto, ...]
    rank: int

    @property
    def is_sparse(self) -> bool:
        """Whether the weights are 2:4."""
        return self.packed is not None

    @property
    def values(self) -> str:
        """Name of the codes as our operator takes them: [N, K], or what is kept of them."""
        return self.packed.values if self.packed else f"{self.name}.codes.rows"

    @property
    def arguments(self) -> list[str]:
        """The operator's inputs of this layer."""
        positions = self.packed.positions if self.packed else ""
        return [self.values, positions, self.scales, self.bias]


@dataclass(frozen=True)
class Int8Unit(Unit[Int8Layer]):
    """Layers in 8 bits as one node. What it reads may be codes; what it gives is of one of ``OUTPUTS``.

    Attributes:
        output: which.
        gives: the codes that it gives.
    """

    output: str = "fp32"
    gives: Codes = ANY_CODES

    @property
    def nodes(self) -> tuple[NodeProto, ...]:
        """All that it takes the place of, in the order of the graph."""
        return (*self.before, *(node for layer in self.layers for node in layer.nodes))

    def node(self, threads: int) -> NodeProto:
        """It as one node."""
        attributes = self.attributes(threads) | codes_as("x", self.layers[0].given)
        if len(self.layers) > 1:
            attributes |= codes_as("h", self.layers[1].given)
        if self.front:
            attributes |= codes_as("f", self.front.given)
        if self.output == "codes":
            attributes |= codes_as("y", self.gives)
        index = OUTPUTS.index(self.output)
        outputs = [""] * index + [self.result or self.last.output]
        attributes["output"] = index
        return helper.make_node(LAYERS_OP, self.inputs(), outputs, name=self.name, domain=DOMAIN, **attributes)

    def behind(self, front: Self) -> Self:
        """See ``Unit.behind``: the front's own nodes come before."""
        return replace(super().behind(front), before=(*front.nodes, *self.before))

    def feed(self, tokens: int, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Random inputs of so many tokens; ``sizes`` says how wide the two parts are."""
        rng = np.random.default_rng(1)
        first = self.entry
        lead = (1, tokens) if first.rank > 2 else (tokens,)
        given = {}
        if self.rounded:
            given[self.rounded] = rng.integers(0, 256, (*lead, first.depth), np.uint8)
        for part in filter(None, (self.x, self.beside)):
            width = sizes[part][-1] if self.beside else first.depth
            given[part] = rng.standard_normal((*lead, width), np.float32)
        if self.added.residual:
            given[self.added.residual] = rng.standard_normal((*lead, self.added.rows), np.float32)
        return given


def codes_as(prefix: str, codes: Codes) -> dict[str, float | int]:
    """Scale and zero point as a node's attributes."""
    return {f"{prefix}_scale": codes.scale, f"{prefix}_zero": codes.zero}


def int8_layers(view: GraphView, graph: GraphProto) -> list[Int8Layer]:
    """The layers in 8 bits of a graph, in its order."""
    packed = packed_codes(graph)
    return [layer for node in graph.node if (layer := _layer(view, node, packed)) is not None]


def int8_units(view: GraphView, graph: GraphProto) -> list[Int8Unit]:
    """What of a graph our operator may compute, in the graph's order; layers in a row are one unit."""
    found = int8_layers(view, graph)
    by_input = {layer.quantised: layer for layer in found}
    units, seconds = [], set[str]()
    for first in found:
        if first.name in seconds:
            continue
        quantise = _only_quantised(view, first.output)
        second = by_input.get(quantise.output[0]) if quantise is not None else None
        unit = _with_what_comes_before(view, first)
        if (
            quantise is not None
            and second is not None
            and not first.residual
            and _is_private(view, second)
            and second.activation == "none"
        ):
            seconds.add(second.name)
            between = replace(second, nodes=(quantise, *second.nodes))
            unit = replace(unit, layers=(first, between))
        units.append(unit)
    return with_fronts(view, units, partial(_feeds_itself, view))


def _feeds_itself(view: GraphView, unit: Int8Unit) -> bool:
    """Whether nobody reads what a unit reads but its normalisation and its sum."""
    return view.readers(unit.x) == [*unit.before[:1], unit.last.nodes[-1]]


def _layer(view: GraphView, node: NodeProto, packed: Mapping[str, PackedCodes]) -> Int8Layer | None:
    """The layer whose product a node is."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    given, weight = (view.producer(name, "DequantizeLinear") for name in node.input[:2])
    quantise = view.producer(given.input[0], "QuantizeLinear") if given is not None else None
    if given is None or weight is None or quantise is None or len(quantise.input) < 3:
        return None
    axis = 0 if node.op_type == "MatMul" else 1
    told = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if axis and (
        told.get("transB", 0) != 1 or told.get("transA", 0) or told.get("alpha", 1) != 1 or told.get("beta", 1) != 1
    ):
        return None
    codes = packed.get(weight.input[0])
    shape = (codes.rows, codes.depth) if codes else _matrix(view, weight.input[0], axis)
    given_codes = codes_of(view, quantise)
    if shape is None or given_codes is None or list(given.input[1:]) != list(quantise.input[1:]):
        return None
    if shape[1] % 4 or not scales_rows(view, weight, shape[0], 1 - axis):
        return None
    if view.only_reader(weight.output[0]) is None:
        return None
    absorbed, bias, activation, residual = _what_follows(view, node, shape[0])
    return Int8Layer(
        name=node.name,
        rows=shape[0],
        depth=shape[1],
        codes=weight.input[0],
        axis=axis,
        packed=codes,
        scales=weight.input[1],
        x=quantise.input[0],
        quantised=quantise.output[0],
        given=given_codes,
        bias=bias,
        activation=activation,
        residual=residual,
        output=absorbed[-1].output[0],
        nodes=(weight, given, *absorbed) if view.only_reader(given.output[0]) is not None else (weight, *absorbed),
        rank=2 if axis else 3,
    )


def _matrix(view: GraphView, name: str, axis: int) -> tuple[int, int] | None:
    """N and K of dense int8 codes."""
    tensor = view.constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.INT8 or len(tensor.dims) != 2:
        return None
    return tensor.dims[1 - axis], tensor.dims[axis]


def scales_rows(view: GraphView, weight: NodeProto, rows: int, axis: int) -> bool:
    """Whether a weight has one scale a row, and no zero points."""
    scales = view.constants.get(weight.input[1])
    if scales is None or tuple(scales.dims) != (rows,):
        return False
    zeros = view.constants.get(weight.input[2]) if len(weight.input) > 2 else None
    if zeros is not None and np.any(numpy_helper.to_array(zeros)):
        return False
    return next((entry.i for entry in weight.attribute if entry.name == "axis"), 1) in (axis, axis - 2)


def codes_of(view: GraphView, quantise: NodeProto) -> Codes | None:
    """The codes that a QuantizeLinear gives, one scale a tensor."""
    scale, zero = (view.constants.get(name) for name in quantise.input[1:3])
    if scale is None or zero is None or zero.data_type != TensorProto.UINT8:
        return None
    if int(np.prod(scale.dims)) != 1 or scale.data_type != TensorProto.FLOAT:
        return None
    return Codes(float(numpy_helper.to_array(scale).reshape(())), int(numpy_helper.to_array(zero).reshape(())))


def _what_follows(view: GraphView, node: NodeProto, rows: int) -> tuple[list[NodeProto], str, str, str]:
    """The product and the nodes that one kernel computes with it; bias, activation and residual."""
    absorbed, bias, activation, residual = [node], node.input[2] if len(node.input) > 2 else "", "none", ""
    follower = view.consumer(node, "Add")
    if not bias and follower is not None:
        other = other_input(follower, node)
        if other in view.constants and tuple(view.constants[other].dims) == (rows,):
            absorbed, bias = [*absorbed, follower], other
    gelu = view.consumer(absorbed[-1], "Gelu")
    if gelu is not None:
        absorbed, activation = [*absorbed, gelu], GELU_FORMS[approximation(gelu)]
    add = view.consumer(absorbed[-1], "Add")
    if add is not None:
        other, shape = other_input(add, absorbed[-1]), view.sizes(add.output[0])
        if other not in view.constants and shape and view.sizes(other) == shape == view.sizes(node.output[0]):
            absorbed, residual = [*absorbed, add], other
    return absorbed, bias, activation, residual


def _only_quantised(view: GraphView, name: str) -> NodeProto | None:
    """The QuantizeLinear that alone reads a value."""
    reader = view.only_reader(name)
    return reader if reader is not None and reader.op_type == "QuantizeLinear" else None


def _is_private(view: GraphView, layer: Int8Layer) -> bool:
    """Whether nobody else reads the codes of a layer's input."""
    given = view.only_reader(layer.quantised)
    return given is not None and view.only_reader(given.output[0]) is not None


def _with_what_comes_before(view: GraphView, layer: Int8Layer) -> Int8Unit:
    """A layer, and the nodes that one kernel computes before it."""
    if not _is_private(view, layer):
        return Int8Unit((layer,), x="", rounded=layer.quantised)
    unit = Int8Unit((layer,), x=layer.x, before=(view.producers[layer.quantised],))
    return unit.with_what_comes_before(view, layer.rank)


def connect_attention(units: Sequence[Int8Unit], view: GraphView) -> list[Int8Unit]:
    """Let units, and attentions of ours between them, exchange bfloat16 and codes; the attentions are changed."""
    made = []
    for unit in units:
        reader = view.only_reader(unit.last.output)
        if reader is not None and exchanges(reader, b"bf16", b"int8"):
            name = f"{unit.last.output}.bf16"
            reader.input[:] = ["", name]
            unit = replace(unit, output="bf16", result=name)
        maker = view.producers.get(unit.x) if unit.reads_one else None
        if maker is not None and exchanges(maker, b"bf16", b"int8") and _only_quantised(view, unit.x) is not None:
            name = f"{unit.x}.codes"
            maker.output[:] = ["", "", name]
            for key, value in {"output": 2, **codes_as("y", unit.entry.given)}.items():
                maker.attribute.append(helper.make_attribute(key, value))
            unit = replace(unit, x="", rounded=name)
        made.append(unit)
    return made
