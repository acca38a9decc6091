"""The operators MatMul24, MatMulBf16, Mlp24 and MlpBf16 of the domain sparse_engine in ONNX Runtime sessions."""

import ctypes
import threading

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from kernel_cases import random_weight, relative_error
from onnx import TensorProto, helper, numpy_helper

from sparse_engine import kernels

ROWS, DEPTH = 72, 64
FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


@pytest.fixture(scope="module")
def weight():
    return random_weight(np.random.default_rng(0), ROWS, DEPTH)


@pytest.fixture(scope="module")
def bias():
    return np.random.default_rng(1).standard_normal(ROWS).astype(np.float32)


def tensor(name, kind=FLOAT, shape=("batch", "tokens", DEPTH)):
    return helper.make_tensor_value_info(name, kind, shape)


def graph(weight, bias=None, residual=False, initializers=None, operator="MatMul24", **attributes):
    """A model with one product. initializers: arrays that replace those of the weight."""
    if operator == "MatMul24":
        values, positions = kernels.pack(weight)
        arrays = {"values": values, "positions": positions, **(initializers or {})}
    else:
        arrays = {"weight": weight, **(initializers or {})}
    weights = list(arrays)
    if bias is not None:
        arrays["bias"] = bias
    inputs = ["x", *weights, "bias" if bias is not None else "", "residual" if residual else ""]
    while not inputs[-1]:
        inputs.pop()
    attributes = {"N": ROWS, "K": DEPTH, **attributes}
    node = helper.make_node(operator, inputs, ["y"], domain="sparse_engine", **attributes)
    shape = ("batch", "tokens", ROWS)
    return helper.make_model(
        helper.make_graph(
            [node],
            "one_layer",
            [tensor("x"), *([tensor("residual", shape=shape)] if residual else [])],
            [helper.make_empty_tensor_value_info("y")],
            [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
        ir_version=9,
    )


def session(model, threads=2):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def sample(tokens=257, batch=2):
    return np.random.default_rng(2).standard_normal((batch, tokens, DEPTH)).astype(np.float32)


def test_it_computes_the_layer(weight, bias):
    x = sample()
    (y,) = session(graph(weight, bias)).run(None, {"x": x})
    assert relative_error(y, x.astype(np.float64) @ weight.T + bias) < 4e-6


@pytest.mark.parametrize("tactic", ["t-lanes", "n-lanes"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_and_residual_are_optional_each(weight, bias, tactic, with_bias):
    x, residual = sample(5), np.random.default_rng(3).standard_normal((2, 5, ROWS)).astype(np.float32)
    model = graph(weight, bias if with_bias else None, residual=True, tactic=tactic)
    (y,) = session(model).run(None, {"x": x, "residual": residual})
    expected = x.astype(np.float64) @ weight.T + (bias if with_bias else 0) + residual
    assert relative_error(y, expected) < 4e-6


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu-tanh", "silu"])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_gives_the_bits_of_the_kernel(weight, bias, activation, threads):
    x = sample(100, 1)
    (y,) = session(graph(weight, bias, activation=activation), threads).run(None, {"x": x})
    expected = kernels.MatMul24(*kernels.pack(weight))(x[0], bias=bias, activation=activation)
    np.testing.assert_array_equal(y[0], expected)


def test_bf16_products(weight):
    if "avx512-bf16" not in kernels.available_tiers():
        pytest.skip("this machine lacks avx512-bf16")
    x = sample()
    (y,) = session(graph(weight, compute="bf16")).run(None, {"x": x})
    error = relative_error(y, x.astype(np.float64) @ weight.T)
    assert 1e-5 < error < 5e-3


@pytest.fixture
def needs_bf16():
    if "avx512-bf16" not in kernels.available_tiers():
        pytest.skip("this machine lacks avx512-bf16")


@pytest.mark.parametrize("depth", [4, 36, 128, 260])
@pytest.mark.parametrize("rows", [1, 37, 130])
def test_dense_products_in_bf16(needs_bf16, rows, depth):
    rng = np.random.default_rng(rows)
    dense, bias = rng.standard_normal((rows, depth)).astype(np.float32), rng.standard_normal(rows).astype(np.float32)
    model = graph(dense, bias, operator="MatMulBf16", residual=True, N=rows, K=depth)
    del model.graph.input[0].type.tensor_type.shape.dim[:], model.graph.input[1].type.tensor_type.shape.dim[:]
    layer = session(model)
    rounded = dense.astype(ml_dtypes.bfloat16).astype(np.float64)
    for tokens in (1, 95, 97, 260):
        x = rng.standard_normal((2, tokens, depth)).astype(np.float32)
        residual = rng.standard_normal((2, tokens, rows)).astype(np.float32)
        (y,) = layer.run(None, {"x": x, "residual": residual})
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float64) @ rounded.T + bias + residual
        assert relative_error(y, expected) < 4e-6


def test_a_wrong_dense_node_is_refused(needs_bf16):
    dense = np.ones((ROWS, DEPTH), np.float32)
    with pytest.raises(Exception, match=r"MatMulBf16: weight has shape \[72, 64\], expected \[73, 64\]"):
        session(graph(dense, operator="MatMulBf16", N=73))
    with pytest.raises(Exception, match="MatMulBf16: dense products are computed in bf16 only, not on"):
        session(graph(dense, operator="MatMulBf16", compute="fp32"))


def mlp(hidden, rows, sparse=True, biases=True, residual=True, compute="fp32", **attributes):
    """A model with two layers in one node, one with a node for each, and a feed for both. attributes: of the former."""
    rng = np.random.default_rng(8)
    arrays, inputs = {}, {"1": ["x"], "2": ["h"]}
    for layer, shape in (("1", (hidden, DEPTH)), ("2", (rows, hidden))):
        if sparse:
            values, positions = kernels.pack(random_weight(rng, *shape))
            arrays |= {f"values{layer}": values, f"positions{layer}": positions}
        else:
            arrays[f"weight{layer}"] = rng.standard_normal(shape).astype(np.float32)
        inputs[layer] += [name for name in arrays if name.endswith(layer)]
        inputs[layer].append(f"bias{layer}" if biases else "")
        if biases:
            arrays[f"bias{layer}"] = rng.standard_normal(shape[0]).astype(np.float32)
    inputs["2"].append("residual" if residual else "")
    shared = {"domain": "sparse_engine", "threads": 2, "compute": compute}
    kinds = ("Mlp24", "MatMul24") if sparse else ("MlpBf16", "MatMulBf16")
    tactic = {"tactic": "t-lanes"} if sparse else {}
    sizes = {"N": rows, "H": hidden, "K": DEPTH, "activation": "gelu", **attributes}
    together = helper.make_node(kinds[0], [*inputs["1"], *inputs["2"][1:]], ["y"], **sizes, **shared)
    apart = [
        helper.make_node(kinds[1], inputs["1"], ["h"], N=hidden, K=DEPTH, activation="gelu", **tactic, **shared),
        helper.make_node(kinds[1], inputs["2"], ["y"], N=rows, K=hidden, **tactic, **shared),
    ]
    feeds = [tensor("x"), *([tensor("residual", shape=("batch", "tokens", rows))] if residual else [])]
    models = [
        helper.make_model(
            helper.make_graph(
                nodes,
                "mlp",
                feeds,
                [helper.make_empty_tensor_value_info("y")],
                [numpy_helper.from_array(array, name) for name, array in arrays.items()],
            ),
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
            ir_version=9,
        )
        for nodes in ([together], apart)
    ]
    feed = {"x": sample(130)}
    if residual:
        feed["residual"] = rng.standard_normal((2, 130, rows)).astype(np.float32)
    return *models, feed


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("hidden, rows", [(96, 72), (300, 37)])
def test_two_layers_in_one_node_give_the_bits_of_two(hidden, rows, biases, residual):
    together, apart, feed = mlp(hidden, rows, biases=biases, residual=residual)
    one = session(together)
    assert one.get_outputs()[0].shape == ["batch", "tokens", rows]
    np.testing.assert_array_equal(*(each.run(None, feed)[0] for each in (one, session(apart))))


@pytest.mark.parametrize("sparse", [True, False])
def test_two_layers_in_one_node_in_bf16(needs_bf16, sparse):
    together, apart, feed = mlp(300, 37, sparse=sparse, compute="bf16")
    np.testing.assert_array_equal(*(session(each).run(None, feed)[0] for each in (together, apart)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"N": 38}, r"values has shape \[37, 48\], expected \[38, 48\]"),
        ({"H": 100}, r"values has shape \[96, 32\], expected \[100, 32\]"),
        ({"K": 66}, "K = 66, expected N >= 1 and K a positive multiple of 4"),
        ({"activation": "relu"}, "activation is 'relu', expected one of: none, gelu, gelu-tanh, silu"),
    ],
)
def test_a_wrong_node_of_two_layers_is_refused(change, message):
    together, _, _ = mlp(96, 37, **change)
    with pytest.raises(Exception, match=f"Mlp24: .*{message}"):
        session(together)


def test_two_layers_in_one_node_refuse_a_wrong_input():
    together, _, feed = mlp(96, 37)
    del together.graph.input[0].type.tensor_type.shape.dim[:]
    with pytest.raises(Exception, match=r"Mlp24: X has shape \[2, 130, 60\], expected \[..., K\] with K = 64"):
        session(together).run(None, {**feed, "x": feed["x"][:, :, :60]})
    with pytest.raises(Exception, match=r"Mlp24: residual has shape \[2, 129, 37\], expected \[2, 130, 37\]"):
        session(together).run(None, {**feed, "residual": feed["residual"][:, 1:]})


def test_the_scalar_tier_has_no_node_of_two_layers(monkeypatch):
    monkeypatch.setenv(kernels.ISA_VARIABLE, "scalar")
    together, _, feed = mlp(96, 37)
    with pytest.raises(Exception, match="Mlp24: two layers in a row have no scalar kernel"):
        session(together).run(None, feed)


def test_bf16_is_refused_where_the_tier_is_forced_lower(weight, monkeypatch):
    monkeypatch.setenv(kernels.ISA_VARIABLE, "scalar")
    with pytest.raises(Exception, match="MatMul24: bf16 products need AVX512-BF16; the highest tier here is scalar"):
        session(graph(weight, compute="bf16"))


def test_the_output_shape_is_inferred_with_its_names(weight):
    assert session(graph(weight)).get_outputs()[0].shape == ["batch", "tokens", ROWS]


def test_no_tokens_is_no_work(weight):
    (y,) = session(graph(weight)).run(None, {"x": sample(0)})
    assert y.shape == (2, 0, ROWS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "relu"}, "activation is 'relu', expected one of: none, gelu, gelu-tanh, silu"),
        ({"tactic": "fast"}, "tactic is 'fast', expected one of: t-lanes, n-lanes"),
        ({"compute": "int8"}, "compute precision is 'int8', expected one of: fp32, bf16"),
        ({"N": 73}, r"values has shape \[72, 32\], expected \[73, 32\]"),
        ({"K": 66}, "K = 66, expected N >= 1 and K a positive multiple of 4"),
        ({"initializers": {"positions": np.zeros((72, 16), np.uint8)}}, "row 0, group 0 are 0, expected first"),
        ({"initializers": {"positions": np.full((72, 8), 4, np.uint8)}}, r"positions has shape \[72, 8\]"),
        ({"initializers": {"values": np.zeros((72, 32))}}, r"Type 'tensor\(double\)' of input parameter \(values\)"),
    ],
    ids=["activation", "tactic", "compute", "N", "K", "pattern", "positions", "dtype"],
)
def test_a_wrong_node_is_refused_when_the_session_is_created(weight, change, message):
    with pytest.raises(Exception, match=message):
        session(graph(weight, **change))


def test_weights_must_be_initializers(weight):
    model = graph(weight, initializers={"values": None})
    model.graph.input.append(tensor("values", shape=(ROWS, DEPTH // 2)))
    with pytest.raises(Exception, match="MatMul24: input 'values' must be an initializer"):
        session(model)


def test_wrong_shapes_are_refused_when_run(weight, bias):
    model = graph(weight, residual=True)
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_param = "a"
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_param = "b"
    del model.graph.input[1].type.tensor_type.shape.dim[:]
    model.graph.input[1].type.tensor_type.shape.dim.add().dim_param = "c"
    model.graph.input[1].type.tensor_type.shape.dim.add().dim_param = "d"
    layer = session(model)
    with pytest.raises(Exception, match=r"MatMul24: X has shape \[3, 60\], expected \[..., K\] with K = 64"):
        layer.run(None, {"x": np.zeros((3, 60), np.float32), "residual": np.zeros((3, ROWS), np.float32)})
    with pytest.raises(Exception, match=r"MatMul24: residual has shape \[2, 72\], expected \[3, 72\]"):
        layer.run(None, {"x": np.zeros((3, DEPTH), np.float32), "residual": np.zeros((2, ROWS), np.float32)})


def test_several_sessions_and_threads_at_once(weight, bias):
    x = sample(130, 3)
    sessions = [session(graph(weight, bias, activation="silu")) for _ in range(2)]
    (expected,) = sessions[0].run(None, {"x": x})
    wrong = []

    def work(layer):
        for _ in range(40):
            (y,) = layer.run(None, {"x": x})
            if not np.array_equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in sessions * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_too_old_a_runtime_is_told_so():
    """A runtime without version 17 of the interface, played by two Python callbacks."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    version = ctypes.CFUNCTYPE(ctypes.c_char_p)
    said = []

    class ApiBase(ctypes.Structure):
        _fields_ = [("GetApi", get_api), ("GetVersionString", version)]

    creates = create_status(lambda code, message: said.append((code, message.decode())) or 1234)
    table = (ctypes.c_void_p * 1)(ctypes.cast(creates, ctypes.c_void_p))
    base = ApiBase(get_api(lambda wanted: ctypes.addressof(table) if wanted < 17 else None), version(lambda: b"1.16.3"))
    register = ctypes.CDLL(str(kernels.LIBRARY_PATH)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1234
    assert said == [
        (9, "sparse-engine kernels need ONNX Runtime 1.17 or newer, this is 1.16.3; pip install -U onnxruntime")
    ]


def load_and_run(model, times, x):
    for _ in range(times):
        session(model).run(None, {"x": x})


def test_loading_and_running_does_not_leak(weight, bias, resident_bytes):
    model = graph(weight, bias)
    large = onnx.ModelProto.FromString(model.SerializeToString())
    x = sample(64, 1)
    load_and_run(large, 50, x)
    before = resident_bytes()
    load_and_run(large, 400, x)
    assert resident_bytes() - before < 8e6  # one leaked kernel per load would be 40 KB x 400 = 16 MB


@pytest.mark.slow
def test_ten_thousand_loads_and_runs_do_not_leak(weight, bias, resident_bytes):
    model, x = graph(weight, bias), sample(16, 1)
    load_and_run(model, 200, x)
    before = resident_bytes()
    load_and_run(model, 10_000, x)
    assert resident_bytes() - before < 20e6  # 2 KB each
