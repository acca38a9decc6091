"""Convolutions in 8 bits in an engine: a U-Net of diffusers', 2:4, from its files to its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_engine import SparseEngine, kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE
from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.backends.onnxruntime import choose
from sparse_engine.backends.onnxruntime.int8 import codes_node, packed_codes
from sparse_engine.backends.onnxruntime.int8_convolutions import connect_group_norms, int8_convs
from sparse_engine.backends.onnxruntime.layers import DOMAIN
from sparse_engine.backends.onnxruntime.session import prepare
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.calibration.engine_graph import step_graph_of
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.images import psnr
from sparse_engine.kernels.packing import conv_as_matrix
from tests.backends.conftest import open_session
from tests.conftest import build_with

MODEL = Path(__file__).parents[2] / "examples" / "digits_unet" / "sparsedm"
CONVOLUTIONS = 22  # 2:4 and in 8 bits: of two resnets a stage, their shortcuts, and one to go down and one up
needs_kernel = pytest.mark.skipif(
    not kernels.is_available() or kernels.best_tier("int8 convolutions") == "scalar",
    reason="this machine has no vector kernel for convolutions in 8 bits",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The engine, in fp32 and in int8."""
    folder = tmp_path_factory.mktemp("unet")
    made = {"fp32": build_with(MODEL, folder / "fp32.sengine", sparse=True)[0]}
    with SparseEngine.load(made["fp32"], threads=1, autotune=False) as engine:
        collect(engine, images=16, steps=8, sampler="ddim").save(folder / "calib.npz")
    wanted = Quantisation(folder / "calib.npz")
    made["int8"] = build_with(MODEL, folder / "int8.sengine", sparse=True, precision="int8", quantisation=wanted)[0]
    return made


def predict(engine: SparseEngine, batch: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((batch, *engine.manifest.data_shape)).astype(np.float32)
    return engine.predict(x, 0.5, labels=np.arange(batch))


def convolutions_of(engine: SparseEngine) -> list[dict[str, Any]]:
    return [layer for layer in engine.info["layers"] if layer["masked"] and "conv" in layer["name"]]


def test_codes_of_convolutions_are_packed_and_the_rest_is_plain(built: dict[str, Path], tmp_path: Path) -> None:
    engine = EngineFile(built["int8"])
    model = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    packed = [each for each in packed_codes(model.graph).values() if each.kernel is not None]
    assert len(packed) == CONVOLUTIONS
    assert {each.kernel for each in packed} == {(1, 1), (3, 3)}
    sizes = {each.name: int(np.prod(each.dims)) for each in model.graph.initializer}
    for each in packed:
        assert sizes[each.values] + sizes[each.positions] == each.rows * each.depth * 5 // 8
    plain = step_graph_of(engine)  # what a peer is given
    assert {node.domain for node in plain.proto.graph.node} <= {"", "ai.onnx"}
    x = np.random.default_rng(0).standard_normal((3, *engine.manifest.data_shape)).astype(np.float32)
    zeros, told = np.zeros_like(x), np.arange(3)[None]
    row, clip = np.array([0, 1, 0, 0, 0, 0, 0, 0], np.float32), np.array([-1e30, 1e30], np.float32)
    feed = {"x": x, "coef": row, "clip": clip, "y": told, "guidance": np.ones(1, np.float32)}
    with SparseEngine.load(built["int8"], autotune=False) as loaded:
        expected = predict(loaded)
        feed["t"] = np.full(3, loaded.schedule.network_time(0.5), np.float32)
    session = open_session(plain, tmp_path)
    names = {entry.name for entry in session.get_inputs()}
    (found,) = session.run(["m"], {**feed, **{name: zeros for name in ("base", "h1", "h2", "z") if name in names}})
    assert relative_error(found, expected) < 0.01  # a code here and there is the next one


@needs_kernel
def test_ours_computes_what_onnxruntime_computes(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with SparseEngine.load(built["int8"], autotune=False) as engine:
        found = predict(engine)
        ran = convolutions_of(engine)
        assert [layer["kernel"] for layer in ran] == ["r-lanes int8"] * CONVOLUTIONS
        assert all(layer["chosen"] for layer in ran)
    monkeypatch.setenv(kernels.ISA_VARIABLE, "avx2")
    with SparseEngine.load(built["int8"], autotune=False) as engine:
        expected = predict(engine)
        ran = convolutions_of(engine)
        assert [layer["kernel"] for layer in ran] == ["dense int8"] * CONVOLUTIONS
        assert {layer["why"] for layer in ran} == {f"no kernel of ours: {choose.LACKING}"}
    assert relative_error(found, expected) < 0.01


@needs_kernel
def test_norms_give_codes_and_nothing_is_rounded_beside_them(built: dict[str, Path]) -> None:
    graph = prepare(EngineFile(built["int8"]), 2, autotune=False).model.graph
    nodes = {kind: [node for node in graph.node if node.op_type == kind] for kind in ("ConvInt8", "GroupNorm")}
    assert len(nodes["ConvInt8"]) == CONVOLUTIONS
    given = [node.input[1] for node in nodes["ConvInt8"] if node.input[1]]
    gives = [node.output[2] for node in nodes["GroupNorm"] if len(node.output) == 3]
    assert sorted(given) == sorted(gives)
    assert len(given) == 16  # two of each resnet
    left = {node.op_type for node in graph.node}
    assert not left & {"Codes24", "Resize", "InstanceNormalization"}
    assert sum(len(node.input) > 7 and bool(node.input[7]) for node in nodes["ConvInt8"]) == 8  # residuals


@needs_kernel
def test_an_image_depends_on_neither_batch_nor_threads(built: dict[str, Path]) -> None:
    drawn = {}
    for threads in (1, 2):
        with SparseEngine.load(built["int8"], threads=threads, autotune=False) as engine:
            drawn[threads] = predict(engine, 5)
            np.testing.assert_array_equal(predict(engine, 2), drawn[threads][:2])
    np.testing.assert_array_equal(drawn[1], drawn[2])


def test_it_says_and_draws_what_fp32_does(built: dict[str, Path]) -> None:
    told: dict[str, Any] = {"labels": np.arange(10), "steps": 12, "sampler": "dpm-solver++", "seed": 0}
    predicted, drawn = {}, {}
    for name, path in built.items():
        with SparseEngine.load(path, autotune=False) as engine:
            predicted[name] = predict(engine)
            drawn[name] = engine.sample(10, output="float", **told)
    assert relative_error(predicted["int8"], predicted["fp32"]) < 0.02
    assert np.median(psnr(drawn["int8"], drawn["fp32"], (-1, 1))) > 25


@needs_kernel
def test_the_faster_of_the_candidates_is_taken(
    built: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))

    def last(candidates: Any) -> choose.Choice:
        names = tuple(candidates)
        for run in candidates.values():
            run()  # each can be run alone
        return choose.Choice(names[-1], dict.fromkeys(names, 1.0))

    monkeypatch.setattr("sparse_engine.tactics.fastest", last)
    with SparseEngine.load(built["int8"], threads=1) as engine:
        predict(engine)
        ran = convolutions_of(engine)
    assert [(layer["kernel"], layer["chosen"]) for layer in ran] == [("dense int8", False)] * CONVOLUTIONS
    (times,) = ran[0]["timed_by_tokens"].values()
    assert set(times["milliseconds"]) == {"own", "dense int8"}


def small_graph(**window: Any) -> tuple[onnx.ModelProto, np.ndarray]:
    """x -> a group norm of ours -> Q/DQ -> two convolutions, which are summed; and the codes of the first."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"xs": np.float32(0.02), "xz": np.uint8(120)}
    norm = helper.make_node("GroupNorm", ["x"], ["n"], domain=DOMAIN, groups=2, epsilon=1e-5, activation="silu")
    nodes = [
        norm,
        helper.make_node("QuantizeLinear", ["n", "xs", "xz"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["d"]),
    ]
    codes = {}
    for name in ("a", "b"):
        weight = rng.integers(-127, 128, (12, 2, 4, 3, 3)).astype(np.int8)
        weight[:, :, ::2] = 0
        codes[name] = weight = weight.reshape(12, 8, 3, 3)
        values, positions = kernels.pack_codes(conv_as_matrix(weight))
        arrays |= {f"{name}.v": values, f"{name}.p": positions}
        arrays |= {f"{name}.s": rng.random(12).astype(np.float32), f"{name}.z": np.zeros(12, np.int8)}
        nodes += [
            codes_node(name, (12, 72), f"{name}.v", f"{name}.p", f"{name}.w", 1, (3, 3)),
            helper.make_node("DequantizeLinear", [f"{name}.w", f"{name}.s", f"{name}.z"], [f"{name}.f"], axis=0),
            helper.make_node("Conv", ["d", f"{name}.f"], [f"{name}.y"], name=name, kernel_shape=[3, 3], **window),
        ]
    nodes.append(helper.make_node("Add", ["a.y", "b.y"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 8, 6, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", channels, 6, 5])
            for name, channels in (("n", 8), ("a.y", 12), ("b.y", 12))
        ],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), codes["a"]


def test_one_of_two_convolutions_takes_their_sum_and_both_the_norms_codes() -> None:
    model, weight = small_graph(pads=[1, 1, 1, 1])
    view = GraphView(model)
    first, second = int8_convs(model, view)
    assert (first.conv.residual, first.conv.output, second.conv.residual, second.conv.output) == ("b.y", "y", "", "b.y")
    assert first.conv.size == (6, 5)
    np.testing.assert_array_equal(first.packed.plain(conv_as_matrix(weight)), weight)
    assert [conv.codes for conv in connect_group_norms([first, second], view)] == ["n.codes"] * 2
    model, _ = small_graph(pads=[1, 1, 1, 1])
    view = GraphView(model)
    first, _ = int8_convs(model, view)
    assert connect_group_norms([first], view)[0].codes == ""  # the other one wants floats


def test_codes_of_either_layout_are_refused_where_they_do_not_fit() -> None:
    model, _ = small_graph(pads=[1, 1, 1, 1])
    view = GraphView(model)
    conv = int8_convs(model, view)[0]
    node = conv.node(1)
    node.input[0] = "x"
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "C", "H", "W"]),
            helper.make_tensor_value_info("b.y", TensorProto.FLOAT, ["B", "N", "H", "W"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(arrays[name], name) for name in ("a.v", "a.p", "a.s")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    x, residual = np.zeros((2, 8, 6, 5), np.float32), np.ones((2, 12, 6, 5), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x, "b.y": residual})[0], residual, atol=1e-4)
    with pytest.raises(Exception, match=r"X has shape \[2, 4, 6, 5\], expected \[B, C, H, W\] with C = 8"):
        session.run(None, {"x": x[:, :4], "b.y": residual})
    with pytest.raises(Exception, match=r"residual has shape \[1, 12, 6, 5\], expected \[2, 12, 6, 5\]"):
        session.run(None, {"x": x, "b.y": residual[:1]})
