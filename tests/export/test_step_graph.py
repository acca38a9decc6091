"""The exported step against the torch module, for every sampler's kind of row."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from sparse_engine.backends.base import StepGraph, weight_offsets
from sparse_engine.errors import BackendError
from sparse_engine.export.bake import bake
from sparse_engine.export.masks import is_n_of_m
from sparse_engine.export.model import load_model
from sparse_engine.export.step_graph import check_graph, export_step_graph, step_of
from tests.conftest import TINY, TINY_CONDITIONAL, save_checkpoint


@pytest.fixture(scope="module", params=[TINY, TINY_CONDITIONAL], ids=["unconditional", "conditional"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tmp_path_factory.mktemp("graph")
    model = load_model(save_checkpoint(folder / "x.pth", request.param), heads=4)
    baked = bake(model)
    network = model.network(baked.state)
    return network, baked, export_step_graph(network, model.config), request.param


def session_of(graph: StepGraph, folder: Path) -> onnxruntime.InferenceSession:
    offsets, size = weight_offsets(graph.weights)
    buffer = bytearray(size)
    for name, array in graph.weights.items():
        buffer[offsets[name] : offsets[name] + array.nbytes] = array.tobytes()
    (folder / "weights.bin").write_bytes(buffer)
    (folder / "step.onnx").write_bytes(graph.proto.SerializeToString())
    return onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("batch,passes", [(1, 1), (1, 2), (5, 1), (4, 2)])
def test_graph_is_the_torch_step(
    exported: tuple, tmp_path: Path, batch: int, passes: int, rng: np.random.Generator
) -> None:
    network, _, graph, config = exported
    state = {
        name: rng.standard_normal((batch, *config.data_shape), np.float32) for name in ("x", "base", "h1", "h2", "z")
    }
    scalars = {"coef": rng.standard_normal(8).astype(np.float32), "clip": np.array([-1.5, 1.5], np.float32)}
    feed = {**state, **scalars, "t": rng.uniform(0, 999, batch).astype(np.float32)}
    order, told = ["x", "t", "coef", "clip", "base", "h1", "h2", "z"], {}
    if config.num_classes:
        feed["y"] = rng.integers(0, config.num_classes, (passes, batch))
        feed["guidance"] = np.array([2.0, -1.0][:passes], np.float32)
        order = ["x", "t", "y", "guidance", *order[2:]]
        told = {"conditioning": {"y": torch.from_numpy(feed["y"])}}
    given = {name: torch.from_numpy(array) for name, array in feed.items() if name != "y"}
    with torch.no_grad():
        expected = step_of(network, config)(**given, **told)
    session = session_of(graph, tmp_path)
    assert [entry.name for entry in session.get_inputs()] == order
    found = session.run(["x_next", "m"], feed)
    for ours, reference in zip(found, expected, strict=True):
        assert np.abs(ours - reference.numpy()).max() <= 1e-5 * np.abs(reference.numpy()).max()


def test_infinite_clip_is_no_clip(exported: tuple, tmp_path: Path, rng: np.random.Generator) -> None:
    _, _, graph, config = exported
    x = 100 * rng.standard_normal((2, *config.data_shape), np.float32)
    feed = dict.fromkeys(("base", "h1", "h2", "z"), np.zeros_like(x)) | {"x": x, "t": np.ones(2, np.float32)}
    feed |= {"coef": np.array([1, 0, 0, 0, 1, 0, 0, 0], np.float32), "clip": np.array([-np.inf, np.inf], np.float32)}
    if config.num_classes:
        feed |= {"y": np.zeros((1, 2), np.int64), "guidance": np.ones(1, np.float32)}
    assert np.array_equal(session_of(graph, tmp_path).run(["m"], feed)[0], x)


def test_initializers_are_the_baked_weights_and_24_along_the_reduction_axis(exported: tuple) -> None:
    _, baked, graph, _ = exported
    check_graph(graph, baked.state)
    assert set(graph.layers) == {layer.name for layer in baked.layers}
    for layer in baked.sparse_layers:
        initializer, axis = graph.layers[layer.name]
        assert is_n_of_m(graph.weights[initializer], axis=axis)
    tampered = {**baked.state, "mid_block.attn.proj.weight": baked.state["mid_block.attn.proj.weight"] + 1}
    with pytest.raises(BackendError, match=r"mid_block.attn.proj: the exported graph does not hold the weight"):
        check_graph(graph, tampered)


def test_graph_says_nothing_of_the_machine_it_was_made_on(exported: tuple) -> None:
    text = exported[2].proto.SerializeToString()
    assert b".py" not in text
    assert b"/" + str(Path.home()).encode()[1:] not in text


def test_nodes_are_named_after_modules(exported: tuple) -> None:
    by_name = {node.name: node for node in exported[2].proto.graph.node}
    node = by_name["mid_block.mlp.fc1"]
    assert node.op_type == "MatMul"
    assert node.input[1] == "mid_block.mlp.fc1.weight"
