"""ONNX Runtime's ways to run an attention: our own SelfAttention and Attention, or its MultiHeadAttention.

Its own optimiser does not recognise attention in graphs that come from ``torch.export``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from sparse_engine.backends.attention import Attention, Operand

from .compute import halves_or_floats
from .layers import DOMAIN

MICROSOFT = "com.microsoft"


def own_nodes(attention: Attention, compute: str, threads: int) -> list[NodeProto]:
    """Our kernel, which reads q, k and v as they lie: in one tensor, or tokens or heads first.

    There is one in int8 of those in one tensor, without a bias; others are then in bf16, or fp32.
    """
    if attention.qkv is not None and attention.bias is None:
        operator, inputs, nodes = "SelfAttention", [attention.qkv], list[NodeProto]()
    else:
        operator, (inputs, nodes) = "Attention", _own_inputs(attention)
        compute = halves_or_floats() if compute == "int8" else compute
    fused = helper.make_node(
        operator,
        inputs,
        [attention.output],
        name=attention.name,
        domain=DOMAIN,
        heads=attention.heads,
        scale=attention.scale,
        compute=compute,
        threads=threads,
    )
    return [*nodes, fused]


def _own_inputs(attention: Attention) -> tuple[list[str], list[NodeProto]]:
    bias = [attention.bias] if attention.bias is not None else []
    if attention.qkv is not None:
        inputs, nodes = attention.inputs()
        return [*inputs, *bias], nodes
    inputs, nodes = [], []
    for part, operand in zip("qkv", (attention.q, attention.k, attention.v), strict=True):
        name, made = _own_operand(operand, f"{attention.name}.{part}", attention.width)
        inputs.append(name)
        nodes += made
    return [*inputs, *bias], nodes


def _own_operand(operand: Operand, name: str, width: int) -> tuple[str, list[NodeProto]]:
    return (operand.name, []) if operand.layout == "heads" else operand.as_tokens(name, width)


def runtime_nodes(attention: Attention) -> list[NodeProto] | None:
    """ONNX Runtime's kernel, over [B, L, D] each; None where it would have to round the bias."""
    settings: dict[str, Any] = {"num_heads": attention.heads, "scale": attention.scale}
    if attention.bias is None:
        return attention.nodes("MultiHeadAttention", MICROSOFT, **settings)
    if attention.lowered:  # its bias is of the type of q
        return None
    bias, nodes = _bias_of_each_query(attention, attention.bias)
    optional = ["", "", bias]  # without a bias of the projections, and a mask of padding
    return [*nodes, *attention.nodes("MultiHeadAttention", MICROSOFT, bias=optional, **settings)]


def _bias_of_each_query(attention: Attention, bias: str) -> tuple[str, list[NodeProto]]:
    """[B, H, L, S]: MultiHeadAttention repeats a bias over batch and heads, and not over queries."""
    if attention.bias_sizes[2] == attention.queries:
        return bias, []
    name = f"{attention.name}.bias"
    shape = numpy_helper.from_array(np.array([1, 1, attention.queries, 1], np.int64))
    return name, [
        helper.make_node("Constant", [], [f"{name}.shape"], name=f"{name}.shape", value=shape),
        helper.make_node("Expand", [bias, f"{name}.shape"], [name], name=name),
    ]
