"""Layers in bf16 with what surrounds them: from nodes of single layers to nodes ``LayersBf16``.

One of those normalises or joins its input, rounds it, multiplies it with one layer or with two in a row, and may take
the layer before those and the residual along: a transformer's block is its attention and two of them. Between them and
an attention of ours go bfloat16. Made where an engine is loaded, never stored in its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from onnx import GraphProto, NodeProto, helper

from sparse_engine.backends.onnx_graph import GraphView

from .layers import DOMAIN, FusedLayer
from .units import Unit, exchanges, with_fronts

BF16_OP = "LayersBf16"
KERNELS = {True: "r-lanes", False: "dense-bf16"}  # what reports call it, by whether a layer is 2:4


@dataclass(frozen=True)
class Bf16Unit(Unit[FusedLayer]):
    """Layers in bf16 as one node. What it reads and gives may be bfloat16.

    Attributes:
        rank: of x.
    """

    rank: int = 2

    def node(self, threads: int) -> NodeProto:
        """It as one node."""
        attributes = {**self.attributes(threads), "layers": len(self.all_layers), "output": int(bool(self.result))}
        outputs = ["", self.result] if self.result else [self.last.output]
        return helper.make_node(BF16_OP, self.inputs(), outputs, name=self.name, domain=DOMAIN, **attributes)

    def behind(self, front: Self) -> Self:
        """See ``Unit.behind``."""
        return replace(super().behind(front), rank=front.rank)

    def nodes(self, graph: GraphProto) -> list[NodeProto]:
        """What it takes the place of, in the order of the graph."""
        layers = {layer.name for layer in self.all_layers}
        before = [node.output[0] for node in self.before]
        return [
            node
            for node in graph.node
            if (node.domain == DOMAIN and node.name in layers) or (node.output and node.output[0] in before)
        ]

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


def bf16_units(view: GraphView, layers: Sequence[FusedLayer]) -> list[Bf16Unit]:
    """What of some layers, nodes of ours in a graph, one node each may compute; in the graph's order."""
    by_input = {layer.x: layer for layer in layers}
    units, seconds = [], set[str]()
    for first in layers:
        if first.name in seconds:
            continue
        rank = len(view.sizes(first.x)) or 2
        unit = Bf16Unit((first,), first.x, rank=rank).with_what_comes_before(view, rank)
        second = by_input.get(first.output)
        if second is not None and view.only_reader(first.output) is not None and _follows(first, second):
            seconds.add(second.name)
            unit = replace(unit, layers=(first, second))
        units.append(unit)
    return with_fronts(view, units, lambda unit: len(view.readers(unit.x)) == 2)  # the normalisation, and the sum


def _follows(first: FusedLayer, second: FusedLayer) -> bool:
    return not first.residual and second.activation == "none" and second.residual != first.output


def connect_attention(units: Sequence[Bf16Unit], view: GraphView) -> list[Bf16Unit]:
    """Let units, and attentions of ours between them, exchange bfloat16; the attentions are changed."""
    made = []
    for unit in units:
        reader = view.only_reader(unit.last.output)
        if reader is not None and exchanges(reader, b"bf16"):
            name = f"{unit.last.output}.bf16"
            reader.input[:] = ["", name]
            unit = replace(unit, result=name)
        maker = view.producers.get(unit.x) if unit.reads_one else None
        if maker is not None and exchanges(maker, b"bf16") and view.only_reader(unit.x) is not None:
            name = f"{unit.x}.bf16"
            maker.output[:] = ["", name]
            maker.attribute.append(helper.make_attribute("output", 1))
            unit = replace(unit, x="", rounded=name)
        made.append(unit)
    return made
