"""Attention of every form that the families write: found in the graph, fused for each runtime, the same step."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_engine import kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.attention import Attention, fuse_attention
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnxruntime import session
from sparse_engine.backends.onnxruntime.attention import own_nodes, runtime_nodes
from sparse_engine.backends.onnxruntime.choose import Chooser, shape_of
from sparse_engine.backends.tensorrt.graph import with_attention_nodes
from sparse_engine.conditioning import Condition
from sparse_engine.export.precision import lower
from sparse_engine.export.step_graph import export_step_graph
from sparse_engine.tactics import Choice
from tests.backends.conftest import EVERY_LAYER, open_session
from tests.conftest import save_checkpoint

WIDTH, HEADS, TEXT = 24, 3, 7
FORMS = ("self", "cross", "masked", "each query", "joint", "split late")
TIERS = kernels.available_tiers() if kernels.is_available() else ()
needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")


@dataclass(frozen=True)
class Config:
    """Of ``Network``: 16 tokens of an image, 7 of a text with its mask."""

    data_shape = (3, 8, 8)
    conditions = (Condition("context", (TEXT, WIDTH), null="zeros"), Condition("context_mask", (TEXT,), default=1.0))
    guided_channels = None


class Network(nn.Module):
    """One attention of a form between two linears."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.dtype = form, torch.float32
        self.first, self.last = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 12)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.text = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> the same."""
        h = self.first(x.reshape(-1, 16, 12)).to(self.dtype) + t[:, None, None].to(self.dtype) / 1000
        h = self.last(self.attention(h, context.to(self.dtype), context_mask))
        return h.reshape(-1, 3, 8, 8)

    def attention(self, h: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """[B, 16, D], [B, 7, D], [B, 7] -> [B, 16, D]."""
        if self.form == "joint":
            of_image = normed(heads(self.q(h))), normed(heads(self.k(h))), heads(self.v(h))
            of_text = [heads(part(context)) for part in self.text]
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_image, of_text, strict=True))
            return merged(attend(q, k, v))[:, :16]
        if self.form == "split late":  # the norm comes before the heads are moved forward
            parts = [part(h).reshape(-1, 16, HEADS, WIDTH // HEADS) for part in (self.q, self.k, self.v)]
            q, k, v = normed(parts[0]), normed(parts[1]), parts[2]
            return merged(attend(*(part.transpose(1, 2) for part in (q, k, v))))
        told = h if self.form == "self" else context
        bias = None
        if self.form in ("masked", "each query"):
            bias = ((1 - mask.float()) * -10000.0)[:, None, None]
        if self.form == "each query" and bias is not None:
            bias = bias + torch.arange(16.0)[:, None] / 8
        return merged(attend(heads(self.q(h)), heads(self.k(told)), heads(self.v(told)), bias))


def heads(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[2], WIDTH)


def normed(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float()
    return (scores if bias is None else scores + bias).softmax(dim=-1).to(v.dtype) @ v


@functools.cache
def graph_of(form: str, precision: str = "fp32") -> StepGraph:
    torch.manual_seed(0)
    network = Network(form).eval()
    return export_step_graph(lower(network, (), precision), Config())


def fused(form: str, replace: Callable[[Attention], Any], precision: str = "fp32") -> tuple[StepGraph, int]:
    graph = graph_of(form, precision)
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    count = fuse_attention(proto, replace)
    return StepGraph(proto, graph.weights, graph.layers), count


def own(compute: str = "fp32", threads: int = 2) -> Callable[[Attention], list[NodeProto]]:
    return lambda attention: own_nodes(attention, compute, threads)


def feed_of(batch: int) -> dict[str, np.ndarray]:
    """Two passes; the mask leaves from one to all positions, as the image has it."""
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((batch, 3, 8, 8), np.float32) for name in ("x", "base", "h1", "h2", "z")}
    feed["context"] = rng.standard_normal((2, batch, TEXT, WIDTH), np.float32)
    count = rng.integers(1, TEXT + 1, (2, batch, 1))
    feed["context_mask"] = (np.arange(TEXT) < count).astype(np.float32)
    feed |= {"t": rng.uniform(0, 999, batch).astype(np.float32), "guidance": np.array([2, -1], np.float32)}
    feed |= {"coef": rng.standard_normal(8).astype(np.float32), "clip": np.array([-np.inf, np.inf], np.float32)}
    return feed


def run(session: Any, feed: dict[str, np.ndarray]) -> np.ndarray:
    """x_next and m, [2, B, C, H, W]."""
    names = {entry.name for entry in session.get_inputs()}
    return np.stack(session.run(["x_next", "m"], {name: value for name, value in feed.items() if name in names}))


def kinds(graph: StepGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.proto.graph.node)


@needs_kernels
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("form", FORMS)
def test_our_own_operator_is_the_same_step(
    form: str, tier: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
    compute = "bf16" if tier == "avx512-bf16" else "fp32"
    graph, count = fused(form, own(compute))
    assert (count, kinds(graph)["Attention"], kinds(graph)["Softmax"]) == (1, 1, 0)
    expected = run(open_session(graph_of(form), tmp_path), feed_of(3))
    error = np.abs(run(open_session(graph, tmp_path), feed_of(3)) - expected).max() / np.abs(expected).max()
    assert error < (2e-2 if compute == "bf16" else 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_onnx_runtimes_operator_is_the_same_step(form: str, tmp_path: Path) -> None:
    graph, count = fused(form, runtime_nodes)
    assert (count, kinds(graph)["MultiHeadAttention"], kinds(graph)["Softmax"]) == (1, 1, 0)
    expected = run(open_session(graph_of(form), tmp_path), feed_of(3))
    error = np.abs(run(open_session(graph, tmp_path), feed_of(3)) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_tensorrts_node_is_the_same_step(form: str, tmp_path: Path) -> None:
    graph, count = with_attention_nodes(graph_of(form))
    assert count == (form not in ("masked", "each query"))
    assert (kinds(graph)["Attention"], kinds(graph)["Softmax"]) == (count, 1 - count)
    expected = run(open_session(graph_of(form), tmp_path), feed_of(3))
    error = np.abs(run(open_session(graph, tmp_path), feed_of(3)) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_lower_precision_is_fused_where_no_bias_would_be_rounded(form: str) -> None:
    found = []
    for graph, count in (with_attention_nodes(graph_of(form, "bf16")), fused(form, runtime_nodes, "bf16")):
        assert kinds(graph)["Softmax"] == 1 - count
        found.append(count)
    assert found == ([0, 0] if form in ("masked", "each query") else [1, 1])
    _, count = fused(form, lambda attention: found.append(attention.lowered), "bf16")
    assert (count, found[2:]) == (0, [True])


@needs_kernels
@pytest.mark.parametrize("way", [*TIERS, "onnxruntime"])
@pytest.mark.parametrize("form", FORMS)
def test_an_image_does_not_depend_on_its_batch(
    form: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, TIERS[0] if way == "onnxruntime" else way)
    replace = runtime_nodes if way == "onnxruntime" else own("bf16" if way == "avx512-bf16" else "fp32")
    opened = open_session(fused(form, replace)[0], tmp_path)
    whole, feed = run(opened, feed_of(6)), feed_of(6)
    axes = {"context": 1, "context_mask": 1, **dict.fromkeys(("x", "t", "base", "h1", "h2", "z"), 0)}
    for size in (1, 2, 4):
        parts = []
        for first in range(0, 6, size):
            rows = range(first, min(first + size, 6))
            part = {name: value.take(rows, axes[name]) if name in axes else value for name, value in feed.items()}
            parts.append(run(opened, part))
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def small(softmax_axis: int = -1, k_batch: str | int = "B", bias: tuple[Any, ...] = ("B", 1, 1, 5)) -> ModelProto:
    """An attention of 4 tokens to 5, 2 heads of 8, with a bias; and what only resembles one."""
    perm = [0, 2, 1, 3]
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "turned"], ["scores"]),
        helper.make_node("Add", ["bias", "scores"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["p"], axis=softmax_axis),
        helper.make_node("MatMul", ["p", "v"], ["context"]),
        helper.make_node("Transpose", ["context"], ["merged"], perm=perm),
        helper.make_node("Reshape", ["merged", "shape"], ["y"]),
    ]
    shapes = {"q": ("B", 2, 4, 8), "k": (k_batch, 2, 5, 8), "v": (k_batch, 2, 5, 8), "bias": bias}
    constants = [
        numpy_helper.from_array(np.array(0.25, np.float32), "scale"),
        numpy_helper.from_array(np.array([-1, 4, 16]), "shape"),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4, 16])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("bias", [("B", 1, 1, 5), (1, 2, 4, 5), ("B", 2, 4, 5)], ids=str)
def test_a_bias_of_any_shape_that_repeats_is_found_on_either_side(bias: tuple[Any, ...]) -> None:
    assert fuse_attention(small(bias=bias), runtime_nodes) == 1


@pytest.mark.parametrize(
    "changed",
    [{"softmax_axis": 2}, {"k_batch": 1}, {"bias": ("B", 3, 1, 5)}, {"bias": ("B", 1, 1, 1)}, {"bias": (4, 5)}],
    ids=str,
)
def test_what_only_resembles_an_attention_is_left_alone(changed: dict[str, Any]) -> None:
    model = small(**changed)
    before = model.SerializeToString()
    assert fuse_attention(model, runtime_nodes) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("value", ["scaled", "scores", "biased", "p", "context", "merged"])
def test_so_is_one_of_which_a_value_is_read_elsewhere(value: str) -> None:
    model = small()
    model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    assert fuse_attention(model, runtime_nodes) == 0


def test_what_made_k_stays_where_it_is_read_elsewhere() -> None:
    model = small()
    model.graph.output.append(helper.make_tensor_value_info("turned", TensorProto.FLOAT, None))
    assert fuse_attention(model, runtime_nodes) == 1
    assert "turned" in {name for node in model.graph.node for name in node.output}


@needs_kernels
def test_each_shape_is_timed_once_and_remembered(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    timed = list[str]()

    def choose(candidates: Any) -> Choice:
        for each in candidates.values():
            each()  # both run
        timed.append(" or ".join(candidates))
        return Choice("own", dict.fromkeys(candidates, 1.0))

    monkeypatch.setattr("sparse_engine.tactics.fastest", choose)
    path = build(save_checkpoint(tmp_path / "small.pth", EVERY_LAYER))
    manifest = EngineFile(path).manifest
    shapes = set[str]()
    for _ in range(2):
        chooser = Chooser(manifest, 1, autotune=True)
        for form in FORMS:
            found = list[Attention]()
            fused(form, lambda attention, found=found: found.append(attention))
            shapes.add(shape_of(found[0]))
            assert chooser.attention(found[0]) == Choice("own", {"own": 1.0, "onnxruntime": 1.0})
    assert timed == ["own or onnxruntime"] * len(shapes)
    assert len(shapes) == len(FORMS) - 1  # "self" and "split late" lie in memory alike
    assert {"16 tokens to 7 3 heads of 8 bias Bx1x1x7", "23 tokens to 23 3 heads of 8 heads first in qkv"} <= shapes


@needs_kernels
def test_the_report_says_what_each_shape_runs() -> None:
    class Choosing:
        def attention(self, attention: Attention) -> Choice:
            kernel = "own" if attention.bias is None else "onnxruntime"
            return Choice(kernel, {"own": 1.0, "onnxruntime": 2.0})

    prepared = session.Prepared(fused("masked", lambda _: None)[0].proto)
    session._fuse_attentions(prepared, Choosing(), 1, "fp32")
    assert prepared.attention["kernel"] == "onnxruntime"
    (shape,) = prepared.attention["shapes"].values()
    assert shape == {"kernel": "onnxruntime", "milliseconds": {"own": 1.0, "onnxruntime": 2.0}, "fused": 1}
    assert prepared.attention["fused"] == 1
