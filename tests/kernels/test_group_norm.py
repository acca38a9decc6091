"""Group normalisation on every tier of this machine: the function, and the operator sparse_engine::GroupNorm."""

import numpy as np
import onnxruntime
import pytest
from kernel_cases import AVX2, AVX512, defined_symbols, needs_compiler, relative_error
from onnx import TensorProto, helper

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError

FLAGS = {"group_norm_avx2.cpp": AVX2, "group_norm_avx512.cpp": AVX512}
TOLERANCE = 2e-6  # of the largest result
# Tails of any length, groups of one value, of a part of a block, of several, and one that is no multiple of any vector.
SHAPES = [
    ((2, 6, 1, 1), 3),
    ((2, 6, 1, 1), 6),
    ((3, 12, 5, 7), 4),
    ((2, 32, 8, 8), 32),
    ((1, 8, 17), 2),
    ((1, 4, 33, 31), 1),
    ((2, 28, 16, 16), 7),
    ((1, 8, 64, 65), 2),
]


@pytest.fixture(params=kernels.available_tiers() if kernels.is_available() else ())
def tier(request, monkeypatch):
    """Each tier of this machine, forced."""
    monkeypatch.setenv(kernels.ISA_VARIABLE, request.param)
    return request.param


def case(shape, mean=0.0, deviation=1.0, seed=0):
    """x, and the four that it may be told."""
    rng = np.random.default_rng(seed)
    batch, channels = shape[:2]
    x = (rng.standard_normal(shape) * deviation + mean).astype(np.float32)
    sizes = {"gamma": (channels,), "beta": (channels,), "scale": (batch, channels), "shift": (batch, channels)}
    return x, {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def reference(x, groups, epsilon=1e-5, gamma=1.0, beta=0.0, scale=0.0, shift=0.0, activation="none"):
    """In float64."""
    batch, channels = x.shape[:2]
    rows = x.astype(np.float64).reshape(batch, groups, -1)
    spread = np.sqrt(rows.var(axis=-1, keepdims=True) + epsilon)
    y = ((rows - rows.mean(axis=-1, keepdims=True)) / spread).reshape(batch, channels, -1)
    gamma, beta = (np.broadcast_to(each, channels)[:, None] for each in (gamma, beta))
    scale, shift = (np.broadcast_to(each, (batch, channels))[..., None] for each in (scale, shift))
    y = (y * gamma + beta) * (1.0 + scale) + shift
    return (y * 0.5 * (1 + np.tanh(y / 2)) if activation == "silu" else y).reshape(x.shape)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_it_normalises(tier, shape, groups, activation):
    x, told = case(shape)
    y = kernels.group_norm(x, groups, activation=activation, tier=tier, **told)
    assert relative_error(y, reference(x, groups, activation=activation, **told)) < TOLERANCE


@pytest.mark.parametrize("names", [(), ("gamma",), ("beta",), ("scale",), ("shift",), ("gamma", "shift")], ids=str)
def test_what_is_not_given_is_1_and_0(tier, names):
    x, told = case((2, 12, 5, 7))
    told = {name: told[name] for name in names}
    y = kernels.group_norm(x, 4, tier=tier, **told)
    assert relative_error(y, reference(x, 4, **told)) < TOLERANCE


@pytest.mark.parametrize("mean, deviation", [(1000, 1), (-1e5, 100), (1e-3, 1e-6), (0, 1e6)])
@pytest.mark.parametrize("size", [7, 64, 256])
def test_means_far_from_0_and_large_maps_keep_their_digits(tier, mean, deviation, size):
    x, told = case((1, 4, size, size), mean, deviation)
    y = kernels.group_norm(x, 2, epsilon=1e-14, tier=tier, **told)
    assert relative_error(y, reference(x, 2, 1e-14, **told)) < TOLERANCE


def test_one_value_far_from_the_others_spoils_no_statistics(tier):
    """Neither the first, by which a shifted sum would go, nor the first of a block."""
    for place in (0, 4096, 9999):
        x, _ = case((1, 1, 100, 100))
        x[0, 0].ravel()[place] = 1e4
        assert relative_error(kernels.group_norm(x, 1, tier=tier), reference(x, 1)) < TOLERANCE


def test_equal_values_are_centred(tier):
    y = kernels.group_norm(np.full((1, 4, 9, 9), 1234.567, np.float32), 2, tier=tier)
    assert np.abs(y).max() < 1e-3  # the deviation is 0: epsilon divides what the rounding of the mean left


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_spoils_its_group_alone(tier, bad):
    x, told = case((2, 12, 5, 7))
    clean = kernels.group_norm(x, 4, tier=tier, **told)
    x[1, 4, 2, 3] = bad
    y = kernels.group_norm(x, 4, tier=tier, **told)
    assert np.isnan(y[1, 4, 2, 3])
    if np.isnan(bad):
        assert np.isnan(y[1, 3:6]).all()
    y[1, 3:6] = clean[1, 3:6]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_the_bits_depend_on_neither_threads_nor_batch_nor_alignment(tier, shape, groups):
    x, told = case((5, *shape[1:]))
    whole = kernels.group_norm(x, groups, activation="silu", tier=tier, **told)
    for threads in (2, 3, 7):
        y = kernels.group_norm(x, groups, activation="silu", tier=tier, threads=threads, **told)
        np.testing.assert_array_equal(y, whole)
    for image in range(5):
        alone = {name: each[image : image + 1] if each.ndim == 2 else each for name, each in told.items()}
        moved = np.empty(x[0].size + 16, np.float32)[image + 1 :][: x[0].size].reshape(1, *shape[1:])
        moved[:] = x[image]
        y = kernels.group_norm(moved, groups, activation="silu", tier=tier, **alone)
        np.testing.assert_array_equal(y[0], whole[image])


@pytest.mark.parametrize("at", ["begin", "end"])
@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_arrays_next_to_a_page_without_access(tier, guarded_memory, shape, groups, at):
    x, told = case(shape)
    guarded, out = guarded_memory.copy(x, at), guarded_memory.copy(np.zeros_like(x), at)
    told = {name: guarded_memory.copy(each, at) for name, each in told.items()}
    kernels.group_norm(guarded, groups, activation="silu", tier=tier, threads=2, out=out, **told)
    assert relative_error(out, reference(x, groups, activation="silu", **told)) < TOLERANCE


def test_the_output_may_be_the_input(tier):
    x, told = case((2, 12, 33, 31))
    expected = kernels.group_norm(x, 4, tier=tier, **told)
    assert kernels.group_norm(x, 4, tier=tier, threads=2, out=x, **told) is x
    np.testing.assert_array_equal(x, expected)


def test_neighbours_of_the_output_are_left_alone(tier):
    x, _ = case((1, 6, 5, 7))
    canvas = np.full(16 + x.size + 16, 7, np.float32)
    kernels.group_norm(x, 3, tier=tier, out=canvas[16:-16].reshape(x.shape))
    assert (canvas[:16] == 7).all()
    assert (canvas[-16:] == 7).all()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"groups": 5}, "groups = 5, expected a divisor of the 12 channels"),
        ({"groups": 0}, "groups = 0, expected a divisor of the 12 channels"),
        ({"epsilon": -1.0}, "epsilon = -1.0+, expected a finite number, 0 or above"),
        ({"activation": "gelu"}, "followed by the activation none or silu alone"),
        ({"activation": "relu"}, "the activation is 'relu', expected one of"),
        ({"gamma": np.ones(11, np.float32)}, r"gamma is float32 \[11\], expected C-contiguous float32 \[12\]"),
        ({"scale": np.ones((1, 12), np.float32)}, r"scale is float32 \[1, 12\], expected .* \[2, 12\]"),
        ({"x": np.ones((2, 12), np.float32)}, r"x is of shape \[2, 12\], expected \[B, C, L\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(InputError, match=message):
        kernels.group_norm(**{"x": case((2, 12, 5, 7))[0], "groups": 4, **changed})


def test_a_tier_that_the_machine_lacks_is_refused():
    lacking = next(tier for tier in kernels.TIERS if tier not in kernels.available_tiers())
    with pytest.raises(UnsupportedError, match=f"asks for {lacking}"):
        kernels.group_norm(case((2, 12, 5, 7))[0], 4, tier=lacking)


def session_of(shapes, threads=2, **attributes):
    """A session of one GroupNorm; an input whose shape is None is left out."""
    node = helper.make_node(
        "GroupNorm",
        [name if shape is not None else "" for name, shape in shapes.items()],
        ["y"],
        domain="sparse_engine",
        **{"groups": 4, "epsilon": 1e-5, "threads": threads, **attributes},
    )
    told = {name: shape for name, shape in shapes.items() if shape is not None}
    model = helper.make_model(
        helper.make_graph(
            [node],
            "norm",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in told.items()],
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


def shapes_of(feed):
    """Of that many axes, any size."""
    return {name: [f"{name}{axis}" for axis in range(each.ndim)] for name, each in feed.items()}


@pytest.mark.parametrize("ones", [0, 1, 2])
def test_the_operator_gives_the_functions_bits(tier, ones):
    """With axes of size 1 behind what it is told, as a graph has them."""
    x, told = case((3, 12, 5, 7))
    feed = {"x": x, **{name: each.reshape(*each.shape, *[1] * ones) for name, each in told.items()}}
    y = session_of(shapes_of(feed), activation="silu").run(None, feed)[0]
    np.testing.assert_array_equal(y, kernels.group_norm(x, 4, activation="silu", tier=kernels.best_tier(), **told))


def test_one_scale_and_shift_for_all_images(tier):
    x, told = case((3, 12, 5, 7))
    told = {name: told[name][:1] for name in ("scale", "shift")}
    shapes = {"x": x.shape, "gamma": None, "beta": None, "scale": ("s", 12), "shift": (1, 12)}
    y = session_of(shapes).run(None, {"x": x, **told})[0]
    repeated = {name: np.repeat(each, 3, axis=0) for name, each in told.items()}
    np.testing.assert_array_equal(y, kernels.group_norm(x, 4, tier=kernels.best_tier(), **repeated))


def test_no_images_are_no_work():
    assert session_of({"x": ("b", 12, 5)}).run(None, {"x": np.zeros((0, 12, 5), np.float32)})[0].shape == (0, 12, 5)


def test_the_output_shape_is_inferred_with_its_names():
    assert session_of({"x": ("batch", 12, "height", 8)}).get_outputs()[0].shape == ["batch", 12, "height", 8]


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"groups": 0}, "GroupNorm: attribute groups = 0, expected 1 or more"),
        ({"activation": "relu"}, "the activation is 'relu'"),
    ],
    ids=["groups", "activation"],
)
def test_a_wrong_attribute_is_refused_when_the_session_is_created(attributes, message):
    with pytest.raises(Exception, match=message):
        session_of({"x": ("b", 12, 5)}, **attributes)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": (2, 12)}, r"GroupNorm: X has shape \[2, 12\], expected \[B, C, L\] or \[B, C, H, W\]"),
        ({"x": (2, 13, 5)}, "groups = 4, expected a divisor of the 13 channels"),
        ({"gamma": (12, 2)}, r"gamma has shape \[12, 2\], expected \[12\]"),
        ({"gamma": (1, 12, 1)}, r"gamma has shape \[1, 12\], expected \[12\]"),
        ({"scale": (3, 12)}, r"scale has shape \[3, 12\], expected \[2, 12\]"),
        ({"shift": (2, 11, 1)}, r"shift has shape \[2, 11\], expected \[2, 12\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_when_run(changed, message):
    shapes = {"x": (2, 12, 5), "gamma": (12,), "beta": (12,), "scale": (2, 12), "shift": (2, 12), **changed}
    if "x" in changed:
        shapes = {"x": changed["x"]}
    feed = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(Exception, match=message):
        session_of(shapes_of(feed)).run(None, feed)


@needs_compiler
@pytest.mark.parametrize("source", FLAGS)
def test_an_instruction_set_shares_no_code_with_the_others(source, tmp_path):
    assert len(defined_symbols(source, FLAGS[source], tmp_path)) == 1, "the kernel, and nothing else"
