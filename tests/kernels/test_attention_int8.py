"""Attention in 8 bits, and attention between layers in 8 bits: bfloat16 in, codes out."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from kernel_cases import AVX512, defined_symbols, needs_compiler
from onnx import TensorProto, helper

from sparse_engine import kernels

HEADS = 2
OUTPUTS = {"fp32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "codes": TensorProto.UINT8}
has_int8 = kernels.is_available() and "avx512-vnni" in kernels.available_tiers("int8")
has_bf16 = kernels.is_available() and "avx512-bf16" in kernels.available_tiers()
needs_int8 = pytest.mark.skipif(not has_int8, reason="this machine lacks AVX512-VNNI or AVX512-VBMI")
COMPUTES = [name for name, has in (("int8", has_int8), ("bf16", has_bf16)) if has]


def session(compute, output="fp32", halves=False, threads=2, heads=HEADS, **attributes):
    """A SelfAttention of floats or bfloat16 (cast from floats), giving what is asked for (bfloat16 as floats)."""
    index = list(OUTPUTS).index(output)
    inputs, nodes = (["", "half"], [helper.make_node("Cast", ["x"], ["half"], to=16)]) if halves else (["x"], [])
    outputs = [""] * index + ["y"]
    attributes = {"heads": heads, "compute": compute, "output": index, "threads": threads, **attributes}
    nodes.append(helper.make_node("SelfAttention", inputs, outputs, domain="sparse_engine", **attributes))
    result = "y"
    if output == "bf16":
        nodes.append(helper.make_node("Cast", ["y"], ["float"], to=1))
        result = "float"
    kind = TensorProto.UINT8 if output == "codes" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", "tokens", "width"))],
        [helper.make_tensor_value_info(result, kind, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sample(batch, tokens, head_dim, heads=HEADS, seed=0):
    """[B, L, 3 D] of numbers that bfloat16 holds."""
    x = np.random.default_rng(seed).standard_normal((batch, tokens, 3 * heads * head_dim))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def run(session, x):
    return session.run(None, {"x": x})[0]


def reference(x, heads=HEADS):
    batch, tokens, width = x.shape
    head_dim = width // (3 * heads)
    q, k, v = x.astype(np.float64).reshape(batch, tokens, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


@needs_int8
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 64, 80, 128, 200])
def test_it_computes_attention(head_dim):
    ours = session("int8")
    for tokens in (1, 2, 3, 4, 15, 16, 17, 47, 48, 49, 97, 257):
        x = sample(2, tokens, head_dim, seed=tokens)
        expected = reference(x)
        error = run(ours, x) - expected
        assert np.sqrt((error**2).mean() / (expected**2).mean()) < 0.025


@needs_int8
def test_a_head_of_zeros_is_zero():
    np.testing.assert_array_equal(run(session("int8"), np.zeros((1, 5, 3 * 2 * 16), np.float32)), 0)


@needs_int8
def test_scores_far_apart_and_far_from_zero():
    x = sample(1, 130, 64, seed=3)
    x[..., :128] *= 40  # q: one key takes all, most often
    error = run(session("int8"), x) - reference(x)
    assert np.sqrt((error**2).mean()) < 0.15  # a key that is nearly as near may win


@pytest.mark.parametrize("compute", COMPUTES)
def test_bfloat16_is_read_as_the_floats_that_it_is(compute):
    for tokens in (1, 18, 257):
        x = sample(2, tokens, 40)
        np.testing.assert_array_equal(run(session(compute, halves=True), x), run(session(compute), x))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("head_dim", [20, 64])
def test_what_it_gives(compute, head_dim):
    x = sample(2, 50, head_dim)
    floats = run(session(compute), x)
    np.testing.assert_array_equal(
        run(session(compute, "bf16"), x), floats.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    codes = run(session(compute, "codes", y_scale=0.01, y_zero=120), x)
    np.testing.assert_allclose(codes, np.clip(np.rint(floats / np.float32(0.01)) + 120, 0, 255), atol=1)


@pytest.mark.parametrize("compute", COMPUTES)
def test_an_image_depends_on_neither_batch_nor_threads(compute):
    x = sample(5, 70, 64)
    together = run(session(compute, "codes", True, 1, y_scale=0.02, y_zero=128), x)
    for threads in (1, 2, 3, 7):
        ours = session(compute, "codes", True, threads, y_scale=0.02, y_zero=128)
        np.testing.assert_array_equal(run(ours, x), together)
        np.testing.assert_array_equal(run(ours, x[3:4]), together[3:4])


@pytest.mark.parametrize("tier", ["scalar", "avx2", "avx512"])
def test_there_is_no_substitute(monkeypatch, tier):
    if tier not in kernels.available_tiers():
        pytest.skip(f"this machine lacks {tier}")
    monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
    with pytest.raises(Exception, match="attention in 8 bits needs AVX512-VNNI and AVX512-VBMI"):
        session("int8")
    with pytest.raises(Exception, match=f"attention on {tier} reads and writes floats"):
        run(session("fp32", "codes"), sample(1, 3, 16))


def test_an_output_that_is_none_is_refused():
    node = helper.make_node("SelfAttention", ["x"], ["y"], domain="sparse_engine", heads=1, output=3)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)]
    model = helper.make_model(helper.make_graph([node], "one", [x], [y]), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    with pytest.raises(Exception, match="attribute output = 3, expected 0, 1 or 2"):
        onnxruntime.InferenceSession(model.SerializeToString(), options)


@needs_compiler
def test_the_instruction_set_shares_no_code_with_the_others(tmp_path):
    flags = [*AVX512, "-mavx512vnni", "-mavx512vbmi"]
    assert len(defined_symbols("attention_avx512_vnni.cpp", flags, tmp_path)) == 2, "the kernels, and nothing else"
