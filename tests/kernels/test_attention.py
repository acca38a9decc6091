"""The operators sparse_engine::SelfAttention and Attention in ONNX Runtime sessions, on every tier of this machine."""

import numpy as np
import onnxruntime
import pytest
from kernel_cases import AVX2, AVX512, AVX512_BF16, defined_symbols, needs_compiler
from onnx import TensorProto, helper

from sparse_engine import kernels

HEADS = 2
FLAGS = {"attention_avx2.cpp": AVX2, "attention_avx512.cpp": AVX512, "attention_avx512_bf16.cpp": AVX512_BF16}
LENGTHS = (1, 2, 15, 16, 17, 18, 65, 257, 300)
# Relative to the largest result. bf16 against a reference whose q, k and v are rounded too: what is left is the
# rounding of the probabilities.
TOLERANCE = {"scalar": 4e-6, "avx2": 4e-6, "avx512": 4e-6, "avx512-bf16": 4e-3, "neon": 4e-6}


@pytest.fixture(params=kernels.available_tiers() if kernels.is_available() else ())
def tier(request, monkeypatch):
    """Each tier of this machine, forced."""
    monkeypatch.setenv(kernels.ISA_VARIABLE, request.param)
    return request.param


def compute_of(tier):
    return "bf16" if tier.endswith("bf16") else "fp32"


def attention(width=None, threads=2, shape=None, **attributes):
    """A session of one SelfAttention. width: D, or any size if None."""
    if shape is None:
        shape = ("batch", "tokens", "width" if width is None else 3 * width)
    return session_of("SelfAttention", {"qkv": shape}, threads, **attributes)


def session_of(operator, shapes, threads=2, **attributes):
    """A session of one operator whose inputs have these shapes."""
    attributes = {"heads": HEADS, "threads": threads, **attributes}
    node = helper.make_node(operator, list(shapes), ["y"], domain="sparse_engine", **attributes)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "attention",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [helper.make_empty_tensor_value_info("y")],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("sparse_engine", 1)],
        ir_version=9,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session, qkv):
    return session.run(None, {"qkv": qkv})[0]


def sample(batch, tokens, head_dim, heads=HEADS, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, tokens, 3 * heads * head_dim)).astype(np.float32)


def round_to_bf16(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def reference(qkv, heads=HEADS, scale=None):
    """In float64: [B, L, 3 D] -> [B, L, D]."""
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    q, k, v = qkv.astype(np.float64).reshape(batch, tokens, 3, heads, head_dim).transpose(2, 0, 3, 1, 4)
    scores = (head_dim**-0.5 if scale is None else scale) * (q @ k.swapaxes(-1, -2))
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = weights / weights.sum(axis=-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(batch, tokens, width // 3)


def relative_error(y, expected):
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    return np.abs(y - expected).max() / np.abs(expected).max()


def assert_attention(tier, y, qkv, heads=HEADS, scale=None, slack=1):
    """Asserts that y is the attention of qkv, within the precision of the tier."""
    operands = round_to_bf16(qkv) if compute_of(tier) == "bf16" else qkv
    assert relative_error(y, reference(operands, heads, scale)) < slack * TOLERANCE[tier]


@pytest.mark.parametrize("head_dim", [16, 20, 64, 128])
def test_it_computes_attention(tier, head_dim):
    session = attention(HEADS * head_dim, compute=compute_of(tier))
    for tokens in LENGTHS:
        for batch in (1, 3):
            qkv = sample(batch, tokens, head_dim, seed=tokens)
            assert_attention(tier, run(session, qkv), qkv)


@pytest.mark.parametrize("head_dim", [1, 7, 33, 72])
def test_any_head_dim(tier, head_dim):
    qkv = sample(2, 50, head_dim)
    assert_attention(tier, run(attention(compute=compute_of(tier)), qkv), qkv)


def test_bf16_products_are_rounded():
    if "avx512-bf16" not in kernels.available_tiers():
        pytest.skip("this machine lacks avx512-bf16")
    qkv = sample(1, 257, 64)
    assert 1e-4 < relative_error(run(attention(compute="bf16"), qkv), reference(qkv)) < 1e-2


@pytest.mark.parametrize("scale", [0.01, 0.125, 2.0])
def test_scale(tier, scale):
    qkv = sample(1, 100, 32) / 2
    y = run(attention(compute=compute_of(tier), scale=scale), qkv)
    assert_attention(tier, y, qkv, scale=scale, slack=2)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_scores(tier, offset):
    """Scores of +-1e4 whose differences are small: softmax does not see what they have in common."""
    qkv = sample(2, 200, 16).reshape(2, 200, 3, HEADS, 16)
    qkv[:, :, 0, :, 0] = 128.0
    qkv[:, :, 1, :, 0] = offset / 128 * 4
    qkv[:, :, :2, :, 1:] = np.round(qkv[:, :, :2, :, 1:] * 4) / 4  # exact in bf16
    qkv = qkv.reshape(2, 200, -1)
    assert_attention(tier, run(attention(compute=compute_of(tier)), qkv), qkv)


def test_the_largest_score_may_come_late(tier):
    """Each key outdoes the ones before it by far, so that the running maximum rises in every block."""
    qkv = np.zeros((1, 300, 3, 1, 16), np.float32)
    qkv[:, :, 0, :, 0] = 8
    qkv[0, :, 1, 0, 0] = np.arange(300) // 4 * 32
    qkv[:, :, 2] = sample(1, 300, 16, heads=1)[..., :16].reshape(1, 300, 1, 16)
    qkv = qkv.reshape(1, 300, -1)
    assert_attention(tier, run(attention(heads=1, compute=compute_of(tier)), qkv), qkv, heads=1)


def test_a_query_that_is_not_finite_spoils_no_other(tier):
    qkv = sample(1, 120, 64, heads=1)
    session = attention(heads=1, compute=compute_of(tier))
    clean = run(session, qkv)
    qkv[0, 50, 0] = np.nan
    qkv[0, 70, 0] = np.inf
    y = run(session, qkv)
    assert np.isnan(y[0, 50]).all()
    assert np.isnan(y[0, 70]).all()
    others = np.delete(np.arange(120), [50, 70])
    np.testing.assert_array_equal(y[0, others], clean[0, others])


@pytest.mark.parametrize("key", [0, 119])
def test_a_key_that_is_not_a_number_spoils_its_head(tier, key):
    qkv = sample(1, 120, 16)
    clean = run(attention(compute=compute_of(tier)), qkv)
    qkv[0, key, 32] = np.nan  # the first head's k
    y = run(attention(compute=compute_of(tier)), qkv)
    assert np.isnan(y[..., :16]).all()
    np.testing.assert_array_equal(y[..., 16:], clean[..., 16:])


def test_scores_of_minus_infinity_have_no_weight(tier):
    """Also where a whole block of keys is so: the first keys, which the online softmax sees first."""
    qkv = np.abs(sample(1, 300, 16, heads=1))
    qkv[0, :150, 16] = -np.inf  # q is positive
    assert_attention(tier, run(attention(heads=1, compute=compute_of(tier)), qkv), qkv, heads=1)


@pytest.mark.parametrize("batch, tokens", [(1, 257), (3, 65), (1, 1025)])
def test_the_bits_do_not_depend_on_threads(tier, batch, tokens):
    if tier == "scalar" and tokens > 1000:
        pytest.skip("slow")
    qkv = sample(batch, tokens, 64)
    one, *others = (run(attention(threads=threads, compute=compute_of(tier)), qkv) for threads in (1, 2, 3, 7, 16))
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("tokens, head_dim", [(17, 20), (49, 64)])
def test_it_stays_within_its_tensors(tier, guarded_memory, tokens, head_dim, at):
    qkv = guarded_memory.copy(sample(1, tokens, head_dim), at)
    y = guarded_memory.copy(np.zeros((1, tokens, HEADS * head_dim), np.float32), at)
    session = attention(compute=compute_of(tier))
    binding = session.io_binding()
    for bind, name, array in ((binding.bind_input, "qkv", qkv), (binding.bind_output, "y", y)):
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    assert_attention(tier, y, qkv)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_is_no_work(shape):
    assert run(attention(), np.zeros((*shape, 96), np.float32)).shape == (*shape, 32)


def test_the_output_shape_is_inferred_with_its_names():
    assert attention(width=64).get_outputs()[0].shape == ["batch", "tokens", 64]


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"heads": 0}, "SelfAttention: attribute heads = 0, expected 1 or more"),
        ({"scale": 0.0}, "attribute scale = 0.0+, expected a finite number above 0"),
        ({"scale": float("nan")}, "attribute scale = nan"),
        ({"compute": "int4"}, "compute precision is 'int4', expected one of: fp32, bf16"),
    ],
    ids=["heads", "scale", "nan", "compute"],
)
def test_a_wrong_attribute_is_refused_when_the_session_is_created(attributes, message):
    with pytest.raises(Exception, match=message):
        attention(**attributes)


def test_bf16_is_refused_where_the_tier_is_forced_lower(monkeypatch):
    monkeypatch.setenv(kernels.ISA_VARIABLE, "scalar")
    with pytest.raises(Exception, match="SelfAttention: bf16 .* the highest tier here is scalar"):
        attention(compute="bf16")


@pytest.mark.parametrize("shape", [(4, 96), (1, 4, 95), (1, 4, 0), (1, 1, 4, 96)])
def test_a_wrong_shape_is_refused_when_run(shape):
    session = attention(shape=[f"size{i}" for i in range(len(shape))])
    with pytest.raises(Exception, match=r"SelfAttention: qkv has shape \[.*\], expected \[B, L, 3 D\]"):
        run(session, np.zeros(shape, np.float32))


def separate(tensors, **attributes):
    """A session of one Attention over q, k, v and perhaps a bias, of those ranks and any size."""
    shapes = {name: [f"{name}{axis}" for axis in range(array.ndim)] for name, array in tensors.items()}
    return session_of("Attention", shapes, **attributes)


def three(batch, queries, keys, head_dim, seed=0):
    """q, k and v, [B, L, D] each; rounded, so that bf16 has the same."""
    rng = np.random.default_rng(seed)
    shapes = {"q": queries, "k": keys, "v": keys}
    return {
        name: round_to_bf16(rng.standard_normal((batch, tokens, HEADS * head_dim), np.float32))
        for name, tokens in shapes.items()
    }


def heads_first(x):
    """[B, L, D] -> [B, H, L, D/H]."""
    return np.ascontiguousarray(x.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3))


def reference_of_three(q, k, v, bias=0.0):
    """In float64: [B, L, D], [B, S, D], [B, S, D] -> [B, L, D]."""
    q, k, v = (heads_first(x.astype(np.float64)) for x in (q, k, v))
    scores = q.shape[-1] ** -0.5 * (q @ k.swapaxes(-1, -2)) + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    y = weights / weights.sum(axis=-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(*y.shape[:1], y.shape[2], -1)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72])
def test_keys_of_any_length(tier, head_dim):
    session = separate(three(1, 1, 1, head_dim), compute=compute_of(tier))
    for queries in (1, 7, 77, 256, 333):
        for keys in {1, 7, 77, 256, 333} - {queries}:
            if queries * keys > (5000 if tier == "scalar" else 30000) and head_dim != 24:
                continue  # slow
            told = three(2, queries, keys, head_dim, seed=queries + keys)
            assert relative_error(session.run(None, told)[0], reference_of_three(**told)) < TOLERANCE[tier]


@pytest.mark.parametrize("head_dim", [24, 72])
@pytest.mark.parametrize("rows", [(1, 1, 1), (2, 1, 1), (2, HEADS, 1), (1, 1, 77), (2, HEADS, 77)], ids=str)
def test_a_bias_is_added_to_the_scores(tier, head_dim, rows):
    for keys in (1, 7, 120, 256):
        told = three(2, 77, keys, head_dim)
        bias = 2 * np.random.default_rng(1).standard_normal((*rows, keys)).astype(np.float32)
        y = separate({**told, "bias": bias}, compute=compute_of(tier)).run(None, {**told, "bias": bias})[0]
        expected = reference_of_three(**told, bias=bias.astype(np.float64))
        assert relative_error(y, expected) < TOLERANCE[tier]
        assert relative_error(y, reference_of_three(**told)) > 0.05 or keys == 1


@pytest.mark.parametrize("masked", [-1e4, -np.inf])
@pytest.mark.parametrize("whole_block", [False, True])
def test_keys_that_a_bias_masks_have_no_weight(tier, masked, whole_block):
    """None that shows: at most 2^-126 of the largest, also where the online softmax sees only such keys first."""
    told, bias = three(2, 50, 200, 24), np.zeros((2, 1, 1, 200), np.float32)
    bias[..., :150] = masked
    if not whole_block:
        bias[..., 3] = 0
    session = separate({**told, "bias": bias}, compute=compute_of(tier))
    y = session.run(None, {**told, "bias": bias})[0]
    assert relative_error(y, reference_of_three(**told, bias=bias.astype(np.float64))) < TOLERANCE[tier]
    told["v"][:, bias[0, 0, 0] != 0] = 1e6
    assert relative_error(session.run(None, {**told, "bias": bias})[0], y) < 1e-6


@pytest.mark.parametrize("first", ["q", "k", "v", "qkv"])
def test_heads_may_come_before_tokens(tier, first):
    told = three(2, 77, 33, 24)
    plain = separate(told, compute=compute_of(tier)).run(None, told)[0]
    other = {name: heads_first(x) if name in first else x for name, x in told.items()}
    np.testing.assert_array_equal(separate(other, compute=compute_of(tier)).run(None, other)[0], plain)


def test_three_tensors_give_the_bits_that_one_gives(tier):
    qkv = sample(2, 257, 64)
    q, k, v = (np.ascontiguousarray(part) for part in np.split(qkv, 3, axis=-1))
    y = separate({"q": q, "k": k, "v": v}, compute=compute_of(tier)).run(None, {"q": q, "k": k, "v": v})[0]
    np.testing.assert_array_equal(y, run(attention(compute=compute_of(tier)), qkv))


@pytest.mark.parametrize("bias_rows", [0, 1, 130])
def test_the_bits_depend_on_neither_threads_nor_batch(tier, bias_rows):
    told = three(5, 130, 77, 24)
    if bias_rows:
        told["bias"] = np.random.default_rng(1).standard_normal((5, HEADS, bias_rows, 77)).astype(np.float32)
    sessions = [separate(told, threads=threads, compute=compute_of(tier)) for threads in (1, 2, 3, 7)]
    whole = sessions[0].run(None, told)[0]
    for session in sessions:
        np.testing.assert_array_equal(session.run(None, told)[0], whole)
        alone = [session.run(None, {name: x[i : i + 1] for name, x in told.items()})[0] for i in range(5)]
        np.testing.assert_array_equal(np.concatenate(alone), whole)


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("bias_rows", [1, 17])
@pytest.mark.parametrize("keys, head_dim", [(7, 20), (49, 24)])
def test_it_stays_within_each_of_its_tensors(tier, guarded_memory, bias_rows, keys, head_dim, at):
    told = three(1, 17, keys, head_dim)
    told["bias"] = np.random.default_rng(1).standard_normal((1, HEADS, bias_rows, keys)).astype(np.float32)
    guarded = {name: guarded_memory.copy(x, at) for name, x in told.items()}
    y = guarded_memory.copy(np.zeros((1, 17, HEADS * head_dim), np.float32), at)
    session = separate(told, compute=compute_of(tier))
    binding = session.io_binding()
    for name, array in guarded.items():
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    assert relative_error(y, reference_of_three(**told)) < TOLERANCE[tier]


def test_no_queries_are_no_work():
    told = three(2, 0, 5, 8)
    assert separate(told).run(None, told)[0].shape == (2, 0, 16)


def test_the_shape_of_heads_first_is_inferred_with_its_names():
    shapes = {name: ("batch", HEADS, name, 8) for name in "qkv"}
    assert session_of("Attention", shapes).get_outputs()[0].shape == ["batch", "q", 16]


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"q": (1, 4, 15)},
            r"Attention: q has shape \[1, 4, 15\], expected \[B, L, D\] with D a multiple of heads = 2",
        ),
        ({"q": (1, 3, 4, 8)}, r"q has shape \[1, 3, 4, 8\], expected .* or \[B, 2, L, D / 2\]"),
        ({"k": (2, 6, 16)}, r"k has shape \[2, 6, 16\], expected the batch and the heads of q, \[1, 4, 16\]"),
        ({"k": (1, 0, 16), "v": (1, 0, 16)}, r"k has shape \[1, 0, 16\], expected .* and 1 token or more"),
        ({"v": (1, 5, 16)}, r"v has shape \[1, 5, 16\], expected the batch, tokens and heads of k, \[1, 6, 16\]"),
        ({"bias": (1, 3, 1, 6)}, r"bias has shape \[1, 3, 1, 6\], expected \[1, 2, 4, 6\], or 1 for any but the last"),
        ({"bias": (1, 1, 4, 1)}, r"bias has shape \[1, 1, 4, 1\], expected \[1, 2, 4, 6\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_when_run(changed, message):
    shapes = {"q": (1, 4, 16), "k": (1, 6, 16), "v": (1, 6, 16), "bias": (1, 1, 1, 6), **changed}
    told = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception, match=message):
        separate(told).run(None, told)


@needs_compiler
@pytest.mark.parametrize("source", FLAGS)
def test_an_instruction_set_shares_no_code_with_the_others(source, tmp_path):
    expected = 2 if "bf16" in source else 1  # in bf16 q, k and v may be bfloat16
    assert len(defined_symbols(source, FLAGS[source], tmp_path)) == expected, "the kernels, and nothing else"
