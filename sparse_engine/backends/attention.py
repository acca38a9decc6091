"""Attention in an exported step graph -> one fused node, of whatever operator a runtime has for it.

The exporter writes attention out in its plain form, which every runtime reads. The pattern:

    q [B, H, L, D/H] -> Mul(scale) -> MatMul -> Add(bias) -> Softmax -> MatMul -> Transpose -> Reshape
    k [B, H, S, D/H] -> Transpose ---/                                /
    v [B, H, S, D/H] ------------------------------------------------/

with a Cast before the Add and after the Softmax where the rest is in a lower precision, and no Add where there is no
bias. q, k and v may come from anywhere. Where they are a Reshape and a Transpose of [B, L, D], the two go; where all
three are parts of one product [B, L, 3D], their Split goes too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from .onnx_graph import GraphView, replace_patterns

Layout = Literal["tokens", "tokens-heads", "heads"]
SPLIT_HEADS, TURNED_KEYS, SPLIT_AND_TURNED = [0, 2, 1, 3], [0, 1, 3, 2], [0, 2, 3, 1]  # permutations


class Operand(NamedTuple):
    """q, k or v: a tensor [B, L, D] ("tokens"), [B, L, H, D/H] ("tokens-heads") or [B, H, L, D/H] ("heads")."""

    name: str
    layout: Layout

    def as_tokens(self, name: str, width: int) -> tuple[str, list[NodeProto]]:
        """It as [B, L, D], and the nodes that make it so, named after ``name``."""
        source, nodes = self.name, list[NodeProto]()
        if self.layout == "heads":
            source = f"{name}.turned"
            nodes.append(helper.make_node("Transpose", [self.name], [source], name=source, perm=SPLIT_HEADS))
        if self.layout != "tokens":
            shape = numpy_helper.from_array(np.array([0, 0, width], np.int64))  # 0: as it is
            nodes.append(helper.make_node("Constant", [], [f"{name}.shape"], name=f"{name}.shape", value=shape))
            nodes.append(helper.make_node("Reshape", [source, f"{name}.shape"], [name], name=name))
            source = name
        return source, nodes


class Attention(NamedTuple):
    """One attention: softmax(scale q k^T + bias) v of each head -> ``output`` [B, L, D].

    Attributes:
        qkv: where q, k and v are parts, in this order, of one tensor [B, L, 3D]: its name.
        q, k, v: what is read where they are not; named after the parts where they are.
        output: name of the result.
        queries, keys: tokens.
        scale: of the scores.
        bias: name of a tensor that is added to the scores, or None.
        bias_sizes: its shape, [1 or B, 1 or H, 1 or L, S], 0 where an axis is dynamic; empty without one.
        lowered: the products are in a lower precision than scores and softmax.
    """

    qkv: str | None
    q: Operand
    k: Operand
    v: Operand
    output: str
    queries: int
    keys: int
    heads: int
    head_dim: int
    scale: float
    bias: str | None
    bias_sizes: tuple[int, ...]
    lowered: bool

    @property
    def name(self) -> str:
        """Of the node that it becomes."""
        return f"{self.output}.attention"

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_dim

    def inputs(self) -> tuple[list[str], list[NodeProto]]:
        """q, k and v as [B, L, D], and the nodes that make them so."""
        if self.qkv is not None:
            parts = [f"{self.name}.{part}" for part in "qkv"]
            return parts, [
                helper.make_node("Split", [self.qkv], parts, name=f"{self.name}.split", axis=-1, num_outputs=3)
            ]
        made = [
            each.as_tokens(f"{self.name}.{part}", self.width)
            for part, each in zip("qkv", (self.q, self.k, self.v), strict=True)
        ]
        return [name for name, _ in made], [node for _, nodes in made for node in nodes]

    def nodes(self, operator: str, domain: str = "", bias: Sequence[str] = (), **attributes: Any) -> list[NodeProto]:
        """An operator that takes q, k and v as [B, L, D], and ``bias`` after them; with the nodes that it needs."""
        inputs, nodes = self.inputs()
        fused = helper.make_node(operator, [*inputs, *bias], [self.output], name=self.name, domain=domain, **attributes)
        return [*nodes, fused]


def fuse_attention(model: ModelProto, replace: Callable[[Attention], Sequence[NodeProto] | None]) -> int:
    """Replace each attention in place by ``replace``'s nodes; return how many were replaced.

    Those for which ``replace`` returns None are left as they are. The domains of the new nodes are imported. Anything
    that only resembles an attention is left alone.
    """
    graph = GraphView(model)
    found = [match for node in model.graph.node if node.op_type == "Softmax" and (match := _match(graph, node))]
    return replace_patterns(model, found, replace)


Match = tuple[Attention, list[NodeProto], list[NodeProto]]


def _match(graph: GraphView, softmax: NodeProto) -> Match | None:
    """The attention around a Softmax; the nodes that make it up, the last at the end; those that made its inputs."""
    front = _scores(graph, softmax)
    if front is None:
        return None
    scaled, scores, raised, add, bias = front
    lowered = graph.consumer(softmax, "Cast")
    context = graph.consumer(lowered if lowered is not None else softmax, "MatMul")
    merged = graph.consumer(context, "Transpose")
    out = graph.consumer(merged, "Reshape")
    if context is None or merged is None or out is None or _permutation(merged) != SPLIT_HEADS:
        return None
    if (raised is None) != (lowered is None) or context.input[0] != (lowered or softmax).output[0]:
        return None
    q, k, v = _operand(graph, scaled.input[0]), _keys(graph, scores.input[1]), _operand(graph, context.input[1])
    if q is None or k is None or v is None or k.sizes != v.sizes or not _fit(q.sizes, k.sizes):
        return None
    _, queries, heads, head_dim = q.sizes
    keys = k.sizes[1]
    if graph.sizes(out.output[0])[1:] not in ((), (queries, heads * head_dim)):
        return None
    if bias and not _bias_fits(graph.sizes(bias), q.sizes, keys):
        return None
    split = _split(graph, q, k, v)
    scale = float(numpy_helper.to_array(graph.constants[scaled.input[1]]).reshape(()))
    attention = Attention(
        qkv=split.input[0] if split is not None else None,
        q=q.operand,
        k=k.operand,
        v=v.operand,
        output=out.output[0],
        queries=queries,
        keys=keys,
        heads=heads,
        head_dim=head_dim,
        scale=scale,
        bias=bias,
        bias_sizes=graph.sizes(bias) if bias else (),
        lowered=raised is not None,
    )
    inner = [node for node in (scaled, scores, raised, add, softmax, lowered, context, merged, out) if node is not None]
    before = [*q.nodes, *k.nodes, *v.nodes, *([split] if split is not None else [])]
    return attention, inner, before


class _Scores(NamedTuple):
    """What comes before a Softmax: scale, product, Cast, Add, and the name of what is added."""

    scaled: NodeProto
    product: NodeProto
    raised: NodeProto | None
    add: NodeProto | None
    bias: str | None


def _scores(graph: GraphView, softmax: NodeProto) -> _Scores | None:
    axis = next((entry.i for entry in softmax.attribute if entry.name == "axis"), -1)
    if axis not in (-1, 3):
        return None
    add = graph.producer(softmax.input[0], "Add")
    sides = [(add.input[0], add.input[1]), (add.input[1], add.input[0])] if add is not None else []
    for scores, bias in sides or [(softmax.input[0], None)]:
        raised = graph.producer(scores, "Cast")
        product = graph.producer(raised.input[0] if raised is not None else scores, "MatMul")
        scaled = graph.producer(product.input[0], "Mul") if product is not None else None
        if product is None or scaled is None or not _is_number(graph, scaled.input[1]):
            continue
        chain = [node for node in (scaled, product, raised, add, softmax) if node is not None]
        if all(graph.feeds(node, after) for node, after in pairwise(chain)):
            return _Scores(scaled, product, raised, add, bias)
    return None


def _is_number(graph: GraphView, name: str) -> bool:
    constant = graph.constants.get(name)
    return constant is not None and int(np.prod(constant.dims)) == 1


class _Heads(NamedTuple):
    """q, k or v: what to read, [B, L, H, D/H] (0 where B is dynamic), and the nodes that came after what is read."""

    operand: Operand
    sizes: tuple[int, ...]
    nodes: list[NodeProto]


def _keys(graph: GraphView, name: str) -> _Heads | None:
    """k, of which the product reads [B, H, D/H, L]."""
    turned = graph.producer(name, "Transpose")
    if turned is None or _permutation(turned) not in (TURNED_KEYS, SPLIT_AND_TURNED):
        return None
    if _permutation(turned) == SPLIT_AND_TURNED:
        return _unmerged(graph, turned.input[0], [turned])
    found = _operand(graph, turned.input[0])
    return found._replace(nodes=[turned, *found.nodes]) if found is not None else None


def _operand(graph: GraphView, name: str) -> _Heads | None:
    """q or v, of which the product reads [B, H, L, D/H]."""
    transpose = graph.producer(name, "Transpose")
    if transpose is not None and _permutation(transpose) == SPLIT_HEADS:
        return _unmerged(graph, transpose.input[0], [transpose])
    found = graph.sizes(name)
    if len(found) != 4 or min(found[1:]) < 1:
        return None
    batch, heads, tokens, head_dim = found
    return _Heads(Operand(name, "heads"), (batch, tokens, heads, head_dim), [])


def _unmerged(graph: GraphView, name: str, after: list[NodeProto]) -> _Heads | None:
    """From [B, L, H, D/H], or from [B, L, D] where that is what it was."""
    found = graph.sizes(name)
    if len(found) != 4 or min(found[1:]) < 1:
        return None
    _, tokens, heads, head_dim = found
    reshape = graph.producer(name, "Reshape")
    if reshape is not None and graph.sizes(reshape.input[0])[1:] == (tokens, heads * head_dim):
        return _Heads(Operand(reshape.input[0], "tokens"), found, [*after, reshape])
    return _Heads(Operand(name, "tokens-heads"), found, after)


def _fit(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
    """Of one batch and of the same heads: a batch of 1 would be repeated, which fused operators do not do."""
    return q[0] == k[0] and q[2:] == k[2:]


def _bias_fits(bias: tuple[int, ...], q: tuple[int, ...], keys: int) -> bool:
    batch, queries, heads, _ = q
    if len(bias) != 4 or bias[3] != keys:
        return False
    return all(size in (1, full) for size, full in zip(bias, (batch, heads, queries), strict=False))


def _split(graph: GraphView, *parts: _Heads) -> NodeProto | None:
    """The node that cuts one tensor [B, L, 3D] into q, k and v, in this order; None where there is none."""
    split = graph.producer(parts[0].operand.name, "Split")
    if split is None or list(split.output) != [each.operand.name for each in parts]:
        return None
    axis = next((entry.i for entry in split.attribute if entry.name == "axis"), 0)
    whole = all(each.operand.layout == "tokens" for each in parts) and len({each.sizes for each in parts}) == 1
    return split if whole and axis in (-1, 2) else None


def _permutation(transpose: NodeProto) -> list[int]:
    return next((list(entry.ints) for entry in transpose.attribute if entry.name == "perm"), [])
