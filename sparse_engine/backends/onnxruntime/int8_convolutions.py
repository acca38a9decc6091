"""Convolutions in 8 bits: from the Q/DQ graph in an engine file to nodes of our own.

The file holds the standard form,

    x -> [Resize] -> QuantizeLinear -> DequantizeLinear -> Conv -> [Add(time)] -> [Add(residual)]
                              codes -> DequantizeLinear --/

the codes of a 2:4 weight packed (``int8.codes_node``). Where an engine is loaded it becomes one ``ConvInt8``, which
rounds x itself, or is given the codes by the group norm that makes x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.kernels.int8 import Codes

from .convolutions import FusedConv, with_neighbours
from .group_norm import OPERATOR as GROUP_NORM
from .int8 import PackedCodes, codes_as, codes_of, packed_codes, scales_rows
from .layers import DOMAIN, PATTERNS

CONV_INT8_OP = "ConvInt8"


@dataclass(frozen=True)
class Int8Conv:
    """A convolution in 8 bits as a graph has it.

    Attributes:
        conv: what it computes, ``x`` being the floats that are rounded.
        packed: its weight's codes.
        scales: name of the scales of its rows.
        given: the codes of x.
        nodes: what it takes the place of, in the graph's order, from a DequantizeLinear of the weight on.
        before: what makes its input from x, the last first: it goes where nobody else reads it.
        codes: name of codes of x [B, H, W, C], where somebody makes them; else empty.
    """

    conv: FusedConv
    packed: PackedCodes
    scales: str
    given: Codes
    nodes: tuple[NodeProto, ...]
    before: tuple[NodeProto, ...]
    codes: str = ""

    @property
    def name(self) -> str:
        """Of the Conv."""
        return self.conv.name

    def node(self, threads: int) -> NodeProto:
        """It as one node."""
        conv = self.conv
        x = ["", self.codes] if self.codes else [conv.x, ""]
        inputs = [*x, conv.values, conv.positions, self.scales, conv.bias, conv.image_bias, conv.residual]
        while not inputs[-1]:
            inputs.pop()
        told: dict[str, Any] = {**conv.told, **codes_as("x", self.given), "codes": int(bool(self.codes))}
        return helper.make_node(
            CONV_INT8_OP, inputs, [conv.output], name=conv.name, domain=DOMAIN, threads=threads, **told
        )

    def plain(self) -> list[NodeProto]:
        """The nodes as the graph has them, all that the node takes the place of."""
        return [*reversed(self.before), *self.nodes]

    def words(self) -> str:
        """What its time depends on."""
        residual = "residual" if self.conv.residual else "no residual"
        return f"2:4 {self.conv.rows}x{self.conv.depth}{self.conv.geometry}, {residual}"

    def arrays(self, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Random codes: as our operator takes them, and as the graph reads them."""
        conv = self.conv
        own = {
            conv.values: rng.integers(-127, 128, (conv.rows, conv.depth // 2), np.int8),
            conv.positions: rng.choice(np.array(PATTERNS, np.uint8), (conv.rows, conv.depth // 4)),
        }
        plain = rng.integers(-127, 128, (conv.rows, conv.depth), np.int8)
        return own, {self.packed.node.output[0]: self.packed.plain(plain)}


def int8_convs(model: ModelProto, view: GraphView) -> list[Int8Conv]:
    """The convolutions of a graph that our operator may compute, in the graph's order."""
    packed = packed_codes(model.graph)
    made: list[Int8Conv] = []
    for node in model.graph.node:
        found = _conv(model.graph, view, node, packed) if node.op_type == "Conv" else None
        if found is not None:
            made.append(_without_sum(found) if any(_same_sum(found, other) for other in made) else found)
    return made


def _same_sum(conv: Int8Conv, other: Int8Conv) -> bool:
    """Whether both would take one Add with them: the sum of two convolutions."""
    return bool(conv.conv.residual) and conv.conv.output == other.conv.output


def _without_sum(conv: Int8Conv) -> Int8Conv:
    *nodes, _ = conv.nodes
    return replace(conv, conv=replace(conv.conv, residual="", output=nodes[-1].output[0]), nodes=tuple(nodes))


def _conv(graph: GraphProto, view: GraphView, node: NodeProto, packed: dict[str, PackedCodes]) -> Int8Conv | None:
    given, weight = (view.producer(name, "DequantizeLinear") for name in node.input[:2])
    quantise = view.producer(given.input[0], "QuantizeLinear") if given is not None else None
    if given is None or weight is None or quantise is None or len(quantise.input) < 3:
        return None
    codes, given_codes = packed.get(weight.input[0]), codes_of(view, quantise)
    if codes is None or codes.kernel is None or given_codes is None:
        return None
    if list(given.input[1:]) != list(quantise.input[1:]) or not scales_rows(view, weight, codes.rows, 0):
        return None
    if view.only_reader(weight.output[0]) is None:
        return None
    shape, names = (codes.rows, codes.depth), (codes.values, codes.positions)
    conv, absorbed = with_neighbours(graph, node, quantise.input[0], shape, names)
    if 0 in conv.size:
        return None
    enlarging = [each for each in absorbed if each.op_type == "Resize"]
    followers = [each for each in absorbed if each.op_type != "Resize"]
    return Int8Conv(
        conv=conv,
        packed=codes,
        scales=weight.input[1],
        given=given_codes,
        nodes=(weight, *followers),
        before=(given, quantise, *enlarging),
    )


def connect_group_norms(convs: Sequence[Int8Conv], view: GraphView) -> list[Int8Conv]:
    """Let group norms of ours give codes to convolutions that alone read them; the norms are changed."""
    made = []
    named: dict[str, str] = {}  # what a norm makes -> the codes that it makes instead
    for conv in convs:
        name = named.get(conv.conv.x)
        norm = view.producers.get(conv.conv.x)
        if name is None and norm is not None and _reads_codes_alone(convs, view, norm):
            name = named[conv.conv.x] = f"{conv.conv.x}.codes"
            norm.output[:] = ["", "", name]
            for key, value in {"output": 2, **codes_as("y", conv.given)}.items():
                norm.attribute.append(helper.make_attribute(key, value))
        made.append(replace(conv, codes=name) if name is not None else conv)
    return made


def _reads_codes_alone(convs: Sequence[Int8Conv], view: GraphView, norm: NodeProto) -> bool:
    """Whether all that is done with what a group norm makes is that some of these convolutions read its codes."""
    if norm.op_type != GROUP_NORM or norm.domain != DOMAIN:
        return False
    name = norm.output[0]
    quantise = view.only_reader(name)
    if quantise is None or quantise.op_type != "QuantizeLinear":
        return False
    ours = {conv.nodes[1].name for conv in convs if conv.conv.x == name}
    floats = view.readers(quantise.output[0])
    readers = [reader for each in floats for reader in view.readers(each.output[0])]
    return all(each.op_type == "DequantizeLinear" for each in floats) and {each.name for each in readers} <= ours
