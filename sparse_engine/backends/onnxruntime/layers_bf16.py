"""Layers in bf16 with what surrounds them: from nodes of single layers to nodes ``LayersBf16``.

One of those normalises or joins its input, rounds it, multiplies it with one layer or with two in a row, and may take
the layer before those and the residual along: a transformer's block is its attention and two of them. Between them and
an attention of ours go bfloat16. Made where an engine is loaded, never stored in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper

from sparse_engine.backends.onnx_graph import GraphView

from .int8 import Norm
from .layers import DOMAIN, PAIR, FusedLayer

BF16_OP = "LayersBf16"
KERNELS = {True: "r-lanes", False: "dense-bf16"}  # what reports call it, by whether a layer is 2:4


@dataclass(frozen=True)
class Bf16Unit:
    """What one node computes. Absent inputs are empty strings.

    Attributes:
        layers: one or two.
        x, beside: floats that it reads; ``beside`` are more numbers of each token.
        rank: of x.
        halves: bfloat16 that it reads in their place.
        norm: of x, or of the front's output.
        before: nodes of the graph that it takes the place of, beside its layers'.
        front: a layer before those, whose output, with its residual, they are given and is added to theirs; ``x``,
            ``beside`` and ``halves`` are then what it reads.
        result: name of what it gives, where that is bfloat16.
    """

    layers: tuple[FusedLayer, ...]
    x: str
    rank: int
    beside: str = ""
    halves: str = ""
    norm: Norm | None = None
    before: tuple[NodeProto, ...] = ()
    front: FusedLayer | None = None
    result: str = ""

    @property
    def all_layers(self) -> tuple[FusedLayer, ...]:
        """The front too."""
        return (self.front, *self.layers) if self.front else self.layers

    @property
    def entry(self) -> FusedLayer:
        """The layer that reads what the node is given."""
        return self.all_layers[0]

    @property
    def last(self) -> FusedLayer:
        """The layer whose output it gives."""
        return self.layers[-1]

    @property
    def name(self) -> str:
        """Of the node."""
        return PAIR.join(layer.name for layer in self.all_layers)

    def node(self, threads: int) -> NodeProto:
        """It as one node."""
        first, second = self.layers[0], self.layers[1] if len(self.layers) > 1 else None
        gamma, beta = (self.norm.gamma, self.norm.beta) if self.norm else ("", "")
        inputs = [self.x, self.beside, self.halves, *_weights(first), *(_weights(second) if second else [""] * 3)]
        inputs += ["" if self.front else self.last.residual, gamma, beta]
        inputs += [*_weights(self.front), self.front.residual] if self.front else []
        while not inputs[-1]:
            inputs.pop()
        attributes: dict[str, Any] = {
            "N": self.last.rows,
            "H": first.rows,
            "K": first.depth,
            "layers": len(self.all_layers),
            "activation": first.activation,
            "threads": threads,
            "output": int(bool(self.result)),
        }
        if self.front:
            attributes["F"] = self.front.depth
        if self.norm:
            attributes["epsilon"] = self.norm.epsilon
        outputs = ["", self.result] if self.result else [self.last.output]
        return helper.make_node(BF16_OP, inputs, outputs, name=self.name, domain=DOMAIN, **attributes)

    def nodes(self, graph: GraphProto) -> list[NodeProto]:
        """What it takes the place of, in the order of the graph."""
        layers = {layer.name for layer in self.all_layers}
        before = [node.output[0] for node in self.before]
        return [
            node
            for node in graph.node
            if (node.domain == DOMAIN and node.name in layers) or (node.output and node.output[0] in before)
        ]

    def words(self) -> str:
        """What its time depends on."""
        layers = ", ".join(
            f"{'2:4' if layer.is_sparse else 'dense'} {layer.rows}x{layer.depth} {layer.activation}"
            for layer in self.all_layers
        )
        given = "two parts" if self.beside else "floats"
        given += ", norm" if self.norm else ""
        return f"{layers} of {given}, {'residual' if self.added.residual else 'no residual'}"

    @property
    def added(self) -> FusedLayer:
        """The layer whose residual it reads."""
        return self.front if self.front else self.last

    def feed(self, tokens: int, beside: int) -> dict[str, np.ndarray]:
        """Random inputs of so many tokens, of whose numbers ``beside`` stand in the second part."""
        rng = np.random.default_rng(1)
        lead = (1, tokens) if self.rank > 2 else (tokens,)
        widths = {self.x: self.entry.depth - beside, self.beside: beside, self.added.residual: self.added.rows}
        return {name: rng.standard_normal((*lead, width), np.float32) for name, width in widths.items() if name}

    def constants(self) -> dict[str, int]:
        """The vectors of its normalisation, and their lengths."""
        names = (self.norm.gamma, self.norm.beta) if self.norm else ()
        return {name: self.layers[0].depth for name in names if name}


def _weights(layer: FusedLayer) -> list[str]:
    return [layer.values, layer.positions, layer.bias]


def bf16_units(view: GraphView, layers: Sequence[FusedLayer]) -> list[Bf16Unit]:
    """What of some layers, nodes of ours in a graph, one node each may compute; in the graph's order."""
    by_input = {layer.x: layer for layer in layers}
    units, seconds = [], set[str]()
    for first in layers:
        if first.name in seconds:
            continue
        unit = _with_what_comes_before(view, first)
        second = by_input.get(first.output)
        if second is not None and view.only_reader(first.output) is not None and _follows(first, second):
            seconds.add(second.name)
            unit = replace(unit, layers=(first, second))
        units.append(unit)
    return _with_fronts(view, units)


def _follows(first: FusedLayer, second: FusedLayer) -> bool:
    return not first.residual and second.activation == "none" and second.residual != first.output


def _with_what_comes_before(view: GraphView, layer: FusedLayer) -> Bf16Unit:
    """A layer, and the node that one kernel computes before it."""
    unit = Bf16Unit((layer,), layer.x, len(view.sizes(layer.x)) or 2)
    before = view.producers.get(layer.x)
    if before is None or view.only_reader(layer.x) is None:
        return unit
    axis = next((entry.i for entry in before.attribute if entry.name == "axis"), -1)
    if axis not in (-1, len(view.sizes(layer.x)) - 1):
        return unit
    if before.op_type == "LayerNormalization" and len([name for name in before.output if name]) == 1:
        epsilon = next((entry.f for entry in before.attribute if entry.name == "epsilon"), 1e-5)
        gamma, beta = [*before.input[1:], ""][:2]
        if all(not name or name in view.constants for name in (gamma, beta)):
            return replace(unit, x=before.input[0], norm=Norm(gamma, beta, epsilon), before=(before,))
    if before.op_type == "Concat" and len(before.input) == 2 and view.sizes(before.input[1])[-1:] > (0,):
        return replace(unit, x=before.input[0], beside=before.input[1], before=(before,))
    return unit


def _with_fronts(view: GraphView, units: Sequence[Bf16Unit]) -> list[Bf16Unit]:
    """Units of two layers with the layer before them, where nobody else reads what lies between."""
    by_output = {unit.last.output: unit for unit in units}
    made, fronts = [], set[str]()
    for unit in units:
        front = by_output.get(unit.x) if unit.norm and len(unit.layers) > 1 and unit.last.residual == unit.x else None
        if (
            front is None
            or front.norm
            or len(front.layers) > 1
            or front.last.activation != "none"
            or view.leaves(unit.x)
            or len(view.readers(unit.x)) != 2  # the normalisation, and the sum
        ):
            made.append(unit)
            continue
        fronts.add(front.name)
        before = (*front.before, *unit.before)
        made.append(replace(unit, x=front.x, beside=front.beside, rank=front.rank, front=front.last, before=before))
    return [unit for unit in made if unit.name not in fronts]


def connect_attention(units: Sequence[Bf16Unit], view: GraphView) -> list[Bf16Unit]:
    """Let units, and attentions of ours between them, exchange bfloat16; the attentions are changed."""
    made = []
    for unit in units:
        reader = view.only_reader(unit.last.output)
        if reader is not None and _takes_halves(reader):
            name = f"{unit.last.output}.bf16"
            reader.input[:] = ["", name]
            unit = replace(unit, result=name)
        maker = view.producers.get(unit.x) if not unit.beside and (unit.front or not unit.norm) else None
        if maker is not None and _takes_halves(maker) and view.only_reader(unit.x) is not None:
            name = f"{unit.x}.bf16"
            maker.output[:] = ["", name]
            maker.attribute.append(helper.make_attribute("output", 1))
            unit = replace(unit, x="", halves=name)
        made.append(unit)
    return made


def _takes_halves(node: NodeProto) -> bool:
    compute = next((entry.s for entry in node.attribute if entry.name == "compute"), b"")
    return node.domain == DOMAIN and node.op_type == "SelfAttention" and compute == b"bf16"
