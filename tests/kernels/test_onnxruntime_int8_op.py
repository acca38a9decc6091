"""The operator LayersInt8 of the domain sparse_engine in ONNX Runtime sessions."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_int8 import random_codes

from sparse_engine import kernels
from sparse_engine.kernels.int8 import Codes, LayerNorm, MatMulInt8

INPUTS = ["x", "x2", "codes"]
WEIGHTS = ["values{}", "positions{}", "scales{}", "bias{}"]
ORDER = [
    *INPUTS,
    *(name.format(1) for name in WEIGHTS),
    *(name.format(2) for name in WEIGHTS),
    *("residual", "gamma", "beta"),
    *(name.format(0) for name in WEIGHTS),
    "residual0",
]
GIVEN, BETWEEN, FRONT = Codes(0.03, 110), Codes(0.02, 12), Codes(0.05, 128)


def layer(rng, number, rows, depth, given, kind="2:4"):
    """The arrays of a layer's inputs, and the layer."""
    codes = random_codes(rng, rows, depth, kind)
    values, positions = kernels.pack_codes(codes) if kind == "2:4" else (codes, None)
    scales, bias = rng.uniform(5e-4, 2e-3, rows).astype(np.float32), rng.standard_normal(rows).astype(np.float32)
    arrays = {f"values{number}": values, f"scales{number}": scales, f"bias{number}": bias}
    if positions is not None:
        arrays[f"positions{number}"] = positions
    return arrays, MatMulInt8(values, scales, positions, x=given)


def run(feed, arrays, output=0, threads=2, **attributes):
    """What one node gives; bfloat16 as floats."""
    present = {*feed, *arrays}
    inputs = [name if name in present else "" for name in ORDER]
    outputs = [""] * output + ["y"]
    attributes = {"output": output, "threads": threads, "x_scale": GIVEN.scale, "x_zero": GIVEN.zero, **attributes}
    nodes = [helper.make_node("LayersInt8", inputs, outputs, domain="sparse_engine", **attributes)]
    if output == 1:
        nodes.append(helper.make_node("Cast", ["y"], ["floats"], to=TensorProto.FLOAT))
    result = helper.make_tensor_value_info(
        "floats" if output == 1 else "y", TensorProto.UINT8 if output == 2 else TensorProto.FLOAT, None
    )
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feed.items()}
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feed.items()],
        [result],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)[0]


@pytest.mark.parametrize("kind", ["2:4", "dense"])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_layer_gives_the_bits_of_the_kernel(kind, output):
    rng = np.random.default_rng(0)
    arrays, product = layer(rng, 1, 40, 68, GIVEN, kind)
    x = rng.standard_normal((2, 9, 68)).astype(np.float32)
    told = {"N": 40, "H": 40, "K": 68, "activation": "gelu", "y_scale": 0.01, "y_zero": 20}
    names = ("fp32", "bf16", "codes")
    flat = product(x.reshape(18, 68), bias=arrays["bias1"], activation="gelu", out=names[output], y=Codes(0.01, 20))
    expected = flat.view(ml_dtypes.bfloat16).astype(np.float32) if output == 1 else flat
    np.testing.assert_array_equal(run({"x": x}, arrays, output, **told), expected.reshape(2, 9, 40))


def test_codes_and_parts_in_place_of_floats():
    rng = np.random.default_rng(1)
    arrays, product = layer(rng, 1, 24, 64, GIVEN)
    told = {"N": 24, "H": 24, "K": 64}
    codes = rng.integers(0, 256, (5, 64), np.uint8)
    np.testing.assert_array_equal(run({"codes": codes}, arrays, **told), product(codes, bias=arrays["bias1"]))
    x = rng.standard_normal((5, 64)).astype(np.float32)
    parts = {"x": x[:, :20].copy(), "x2": x[:, 20:].copy()}
    np.testing.assert_array_equal(run(parts, arrays, **told), product(x, bias=arrays["bias1"]))


@pytest.mark.parametrize("tokens", [1, 8, 130, 257])
@pytest.mark.parametrize("threads", [1, 3])
def test_two_layers_and_a_front_before_them(tokens, threads):
    rng = np.random.default_rng(tokens)
    front, before = layer(rng, 0, 64, 36, FRONT)
    first, hidden = layer(rng, 1, 132, 64, GIVEN)
    second, last = layer(rng, 2, 64, 132, BETWEEN)
    gamma, beta = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    x, residual = (rng.standard_normal((tokens, 64)).astype(np.float32) for _ in range(2))
    told = {"N": 64, "H": 132, "K": 64, "activation": "gelu", "epsilon": 1e-5, "threads": threads}
    told |= {"h_scale": BETWEEN.scale, "h_zero": BETWEEN.zero}
    pair = {**first, **second, "gamma": gamma, "beta": beta}
    norm = LayerNorm(gamma, beta, 1e-5)
    more = {"after_bias": first["bias1"], "activation": "gelu", "norm": norm, "bias": second["bias2"]}
    expected = last(x, after=hidden, residual=residual, **more)
    np.testing.assert_array_equal(run({"x": x, "residual": residual}, pair, **told), expected)

    codes = rng.integers(0, 256, (tokens, 36), np.uint8)
    between = before(codes, bias=front["bias0"], residual=residual)
    expected = last(between, after=hidden, residual=between, **more)
    told |= {"F": 36, "f_scale": FRONT.scale, "f_zero": FRONT.zero}
    found = run({"codes": codes, "residual0": residual}, {**pair, **front}, **told)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"K": 66}, "a layer of N = 40, K = 66, expected N >= 1 and K a positive multiple of 4"),
        ({"K": 72}, r"values has shape \[40, 34\], expected \[40, 36\]"),
        ({"x_scale": 0.0}, "codes of X have scale 0.0*"),
        ({"activation": "relu"}, "the activation is 'relu', expected one of: none, gelu"),
    ],
)
def test_nodes_that_are_wrong_are_refused(changed, message):
    arrays, _ = layer(np.random.default_rng(0), 1, 40, 68, GIVEN)
    told = {"N": 40, "H": 40, "K": 68, **changed}
    with pytest.raises(Exception, match=message):
        run({"x": np.zeros((1, 68), np.float32)}, arrays, **told)


@pytest.mark.parametrize(
    "feed, message",
    [
        ({"x": (3, 64)}, r"X has shape \[3, 64\], expected \[..., K\] with K = 68"),
        ({"x": (3, 20), "x2": (3, 40)}, r"X2 has shape \[3, 40\], expected \[3, 48\]"),
        ({"x": (3, 68), "residual": (3, 68)}, r"residual has shape \[3, 68\], expected \[3, 40\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_when_run(feed, message):
    arrays, _ = layer(np.random.default_rng(0), 1, 40, 68, GIVEN)
    with pytest.raises(Exception, match=message):
        run({name: np.zeros(shape, np.float32) for name, shape in feed.items()}, arrays, N=40, H=40, K=68)
