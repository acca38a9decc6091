"""ONNX Runtime's ways to run an attention: our own SelfAttention, or its MultiHeadAttention.

Its own optimiser does not recognise attention in graphs that come from ``torch.export``.
"""

from __future__ import annotations

from onnx import NodeProto, helper

from sparse_engine.backends.attention import Attention

from .layers import DOMAIN

MICROSOFT = "com.microsoft"


def own_node(attention: Attention, compute: str, threads: int) -> list[NodeProto]:
    """Our kernel, which reads qkv as it lies."""
    name = f"{attention.output}.attention"
    return [
        helper.make_node(
            "SelfAttention",
            [attention.qkv],
            [attention.output],
            name=name,
            domain=DOMAIN,
            heads=attention.heads,
            scale=attention.scale,
            compute=compute,
            threads=threads,
        )
    ]


def runtime_nodes(attention: Attention) -> list[NodeProto]:
    """ONNX Runtime's kernel, after a split."""
    return attention.nodes("MultiHeadAttention", MICROSOFT, num_heads=attention.heads, scale=attention.scale)
