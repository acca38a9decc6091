"""Group norms as the exporter writes them: found in the graph with what follows them, fused, the same step."""

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
import torch.nn.functional as F
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sparse_engine import kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import StepGraph
from sparse_engine.backends.onnxruntime import session
from sparse_engine.backends.onnxruntime.choose import Chooser
from sparse_engine.backends.onnxruntime.group_norm import GroupNorm, fuse_group_norms
from sparse_engine.export.step_graph import export_step_graph
from sparse_engine.export.vae import Norm
from sparse_engine.tactics import Choice
from tests.backends.conftest import EVERY_LAYER, open_session
from tests.conftest import save_checkpoint

CHANNELS, GROUPS, SIDE = 12, 3, 5
TIERS = kernels.available_tiers() if kernels.is_available() else ()
needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")
# Form -> what is found of it.
FORMS = {
    "affine": {"gamma", "beta"},
    "not affine": {"gamma", "beta"},  # of ones and zeros, which the exporter writes
    "silu": {"gamma", "beta", "silu"},
    "written silu": {"gamma", "beta", "silu"},
    "modulated": {"gamma", "beta", "scale", "shift", "silu"},
    "modulated late": {"gamma", "beta", "scale", "shift", "silu"},
    "not affine, modulated": {"gamma", "beta", "scale", "shift"},
    "shifted": {"gamma", "beta", "shift", "silu"},
    "factor": {"gamma", "beta"},
    "read twice": {"gamma", "beta"},
    "tokens": {"gamma", "beta"},
    "written out": {"gamma", "beta", "silu"},
}


@dataclass(frozen=True)
class Config:
    """Of ``Network``."""

    data_shape = (CHANNELS, SIDE, SIDE)
    conditions = ()
    guided_channels = None


class Network(nn.Module):
    """One norm of each form between two convolutions, far from 0."""

    def __init__(self, forms: tuple[str, ...]) -> None:
        super().__init__()
        self.forms = forms
        self.first, self.last = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.time = nn.Parameter(torch.randn(2 * CHANNELS))
        self.norms = nn.ModuleList(
            Norm(GROUPS, CHANNELS)
            if form == "written out"
            else nn.GroupNorm(GROUPS, CHANNELS, affine="not affine" not in form)
            for form in forms
        )
        for parameter in self.norms.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        h, told = self.first(x) + 20, t[:, None] * self.time
        parts = [
            normed(form, norm, h + index, told)  # the exporter writes norms of one tensor as one
            for index, (form, norm) in enumerate(zip(self.forms, self.norms, strict=True))
        ]
        y: Tensor = self.last(torch.stack(parts).sum(0))
        return y


def normed(form: str, norm: nn.Module, h: Tensor, told: Tensor) -> Tensor:
    """[B, C, H, W], [B, 2 C] -> [B, C, H, W]."""
    scale, shift = told[:, :, None, None].chunk(2, dim=1)
    if form == "tokens":
        return norm(h.flatten(2)).unflatten(2, (SIDE, SIDE))
    h = norm(h)
    if form == "read twice":
        return F.silu(h) + h
    if form == "written silu":
        return torch.sigmoid(h) * h
    if form == "factor":
        return h * scale
    if form == "shifted":
        return F.silu(h + shift)
    if form == "modulated late":
        late, later = told.chunk(2, dim=1)
        return F.silu((1 + late[..., None, None]) * h + later[..., None, None])
    if form.endswith("modulated"):
        h = h * (1 + scale) + shift
    return F.silu(h) if "silu" in FORMS[form] else h


@functools.cache
def graph_of(*forms: str) -> StepGraph:
    torch.manual_seed(0)
    return export_step_graph(Network(forms).eval(), Config())


def fused(*forms: str, replace: Callable[[GroupNorm], Any] = lambda norm: [norm.node(2)]) -> tuple[StepGraph, int]:
    graph = graph_of(*forms)
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    count = fuse_group_norms(proto, replace)
    return StepGraph(proto, graph.weights, graph.layers), count


def found_in(*forms: str) -> dict[str, GroupNorm]:
    """By form: the exporter keeps their order."""
    found = list[GroupNorm]()
    assert fused(*forms, replace=found.append)[1] == 0
    return dict(zip(forms, found, strict=True))


def run(graph: StepGraph, folder: Path, images: slice = slice(None)) -> np.ndarray:
    """m of five images, or of some of them."""
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((5, *Config.data_shape), np.float32) for name in ("x", "base", "h1", "h2", "z")}
    feed["t"] = rng.uniform(0, 6, 5).astype(np.float32)
    feed = {name: each[images] for name, each in feed.items()}
    feed |= {"coef": np.array([0, *[1] * 7], np.float32), "clip": np.array([-np.inf, np.inf], np.float32)}
    found: np.ndarray = open_session(graph, folder).run(["m"], feed)[0]
    return found


def kinds(graph: StepGraph) -> Counter[str]:
    return Counter(node.op_type for node in graph.proto.graph.node)


def test_norms_are_found_with_what_follows_them() -> None:
    for form, norm in found_in(*FORMS).items():
        parts = {name for name in ("gamma", "beta", "scale", "shift") if getattr(norm, name)}
        assert parts | ({norm.activation} - {"none"}) == FORMS[form], form
        sizes = (CHANNELS, SIDE * SIDE) if form == "tokens" else (CHANNELS, SIDE, SIDE)
        assert (norm.sizes, norm.groups) == ((0, *sizes), GROUPS)
        assert norm.epsilon == pytest.approx(1e-6 if form == "written out" else 1e-5)


@needs_kernels
@pytest.mark.parametrize("tier", TIERS)
def test_our_operator_is_the_same_step(tier: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
    graph, count = fused(*FORMS)
    assert (count, kinds(graph)["GroupNorm"]) == (len(FORMS), len(FORMS))
    assert kinds(graph)["InstanceNormalization"] == kinds(graph)["ReduceMean"] == kinds(graph)["Shape"] == 0
    expected = run(graph_of(*FORMS), tmp_path)
    assert np.abs(run(graph, tmp_path) - expected).max() < 1e-5 * np.abs(expected).max()


@needs_kernels
@pytest.mark.parametrize("way", [*TIERS, "onnxruntime"])
def test_an_image_does_not_depend_on_its_batch(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, TIERS[0] if way == "onnxruntime" else way)
    graph = graph_of(*FORMS) if way == "onnxruntime" else fused(*FORMS)[0]
    whole = run(graph, tmp_path)
    for size in (1, 2, 4):
        parts = [run(graph, tmp_path, slice(first, first + size)) for first in range(0, 5, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def changed(form: str, change: Callable[[NodeProto, dict[str, TensorProto]], None]) -> ModelProto:
    proto = ModelProto()
    proto.CopyFrom(graph_of(form).proto)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        change(node, constants)
    return proto


def not_only_ones(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    if node.op_type == "InstanceNormalization":
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.array([1, 2, 1], np.float32), node.input[1]))


def of_another_shape(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    if node.op_type == "Shape":
        node.input[0] = "base"


def over_groups_too(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    if node.op_type == "ReduceMean":
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.array([1]), node.input[1]))


def cubed(node: NodeProto, constants: dict[str, TensorProto]) -> None:
    if node.op_type == "Pow":
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(np.array(3.0, np.float32), node.input[1]))


@pytest.mark.parametrize(
    "form, change",
    [
        ("affine", not_only_ones),
        ("affine", of_another_shape),
        ("written out", over_groups_too),
        ("written out", cubed),
    ],
    ids=["ones", "shape", "axes", "power"],
)
def test_what_only_resembles_a_norm_is_left_alone(form: str, change: Any) -> None:
    model = changed(form, change)
    before = model.SerializeToString()
    assert fuse_group_norms(model, lambda norm: [norm.node(1)]) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("form", ["modulated", "written out"])
def test_a_value_that_is_read_elsewhere_is_still_made(form: str) -> None:
    plain, whole = found_in(form)[form].plain, 0
    for node in plain:
        model = changed(form, lambda *_: None)
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
        whole += fuse_group_norms(model, lambda norm: [norm.node(1)])
        made = [name for each in model.graph.node for name in each.output]
        assert node.output[0] in made
        assert len(made) == len(set(made))
    assert 0 < whole < len(plain)  # what of it can be fused is


@needs_kernels
def test_each_shape_is_timed_once_and_remembered(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    timed = list[str]()

    def choose(candidates: Any) -> Choice:
        own, plain = (each()[0] for each in candidates.values())
        np.testing.assert_allclose(own, plain, atol=1e-4)
        timed.append(" or ".join(candidates))
        return Choice("own", dict.fromkeys(candidates, 1.0))

    monkeypatch.setattr("sparse_engine.tactics.fastest", choose)
    manifest = EngineFile(build(save_checkpoint(tmp_path / "small.pth", EVERY_LAYER))).manifest
    shapes = set[str]()
    for _ in range(2):
        chooser = Chooser(manifest, 1, autotune=True)
        for norm in found_in(*FORMS).values():
            shapes.add(norm.words())
            assert chooser.group_norm(norm) == Choice("own", {"own": 1.0, "onnxruntime": 1.0})
    assert timed == ["own or onnxruntime"] * len(shapes)
    assert {"12x5x5 3 groups", "12x25 3 groups", "12x5x5 3 groups scale shift silu"} <= shapes
    assert Chooser(manifest, 1, autotune=False).group_norm(norm) == Choice("own", {})
    monkeypatch.setenv(kernels.ISA_VARIABLE, "scalar")
    assert Chooser(manifest, 1, autotune=True).group_norm(norm) is None


@pytest.mark.parametrize("kernel", ["own", "onnxruntime"])
def test_the_report_says_what_each_shape_runs(kernel: str) -> None:
    class Choosing:
        def group_norm(self, norm: GroupNorm) -> Choice:
            return Choice(kernel, {"own": 1.0, "onnxruntime": 2.0})

    proto = ModelProto()
    proto.CopyFrom(graph_of("affine").proto)
    prepared = session.Prepared(proto)
    session._fuse_group_norms(prepared, Choosing(), 1)
    timed, count = {"own": 1.0, "onnxruntime": 2.0}, int(kernel == "own")
    assert prepared.group_norm == {
        "kernel": kernel,
        "milliseconds": timed,
        "shapes": {"12x5x5 3 groups": {"kernel": kernel, "milliseconds": timed, "fused": count}},
        "fused": count,
    }
    assert prepared.has_own_nodes == (kernel == "own")
