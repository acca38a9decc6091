"""An image is the same, to the bit, whatever else is in its batch: every tier, every precision, every kernel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DModel
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_engine import SparseEngine, kernels
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.export.families.uvit import UViTConfig, timestep_embedding
from sparse_engine.tactics import Choice
from tests.conftest import save_checkpoint

# Widths that are no multiple of any vector: tails lie elsewhere in every batch.
ODD = UViTConfig(image_size=8, patch_size=2, channels=3, embed_dim=44, depth=2, heads=4, num_classes=5)
BATCHES = (1, 3, 5)
WAYS = [
    (tier, "bf16" if tier == "avx512-bf16" else "fp32", kernel)
    for tier in (kernels.available_tiers() if kernels.is_available() else ())
    for kernel in ("dense", "t-lanes", "n-lanes", "r-lanes", "untimed")
    if (tier, kernel) != ("scalar", "n-lanes") and (tier == "avx512-bf16" or kernel != "r-lanes")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("odd") / "odd.pth", ODD)


@pytest.fixture(scope="module")
def engines(checkpoint: Path, build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision."""
    built = {"fp32": build(checkpoint, sparse=True)}
    with SparseEngine.load(built["fp32"], threads=1, autotune=False) as engine:
        calibration = tmp_path_factory.mktemp("odd") / "calib.npz"
        collect(engine, images=32, steps=4, sampler="ddim").save(calibration)
    built["int8"] = build(checkpoint, sparse=True, precision="int8", quantisation=Quantisation(calibration))
    if "avx512-bf16" in kernels.available_tiers():
        built["bf16"] = build(checkpoint, sparse=True, precision="bf16")
    return built


def assert_same_in_every_batch(path: Path, autotune: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"steps": 3, "sampler": "ddim", "seed": 1, "output": "float"}
    with SparseEngine.load(path, threads=2, autotune=autotune) as engine:
        whole = engine.sample(8, batch_size=8, **options)
        for size in BATCHES:
            np.testing.assert_array_equal(engine.sample(8, batch_size=size, **options), whole)
        info = engine.info
    assert info["runtime"]["batch_invariant"]
    return info


@pytest.mark.parametrize("tier, precision, kernel", WAYS)
def test_an_image_does_not_depend_on_its_batch(
    engines: dict[str, Path], tier: str, precision: str, kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def choose(candidates: Any) -> Choice:
        if "apart" in candidates:  # R-lanes are of layers together with what surrounds them
            wanted = "together" if kernel == "r-lanes" else "apart"
            return Choice(wanted, {name: 1.0 if name == wanted else 2.0 for name in candidates})
        before = {"n-lanes", "dense-bf16"} & set(candidates) if kernel == "r-lanes" else set()
        chosen = kernel if kernel in candidates else next(iter([*before, *candidates]))
        return Choice(chosen, dict.fromkeys(candidates, 1.0))

    monkeypatch.setenv("SPARSE_ENGINE_ISA", tier)
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr("sparse_engine.tactics.fastest", choose)
    monkeypatch.setattr("sparse_engine.backends.onnxruntime.choose.N_LANES_UP_TO", {"fp32": 10**6, "bf16": 10**6})
    info = assert_same_in_every_batch(engines[precision], autotune=kernel != "untimed")
    used = {layer["kernel"] for layer in info["layers"] if layer["masked"]}
    if kernel != "untimed" and tier != "scalar":  # whose sparse layers are not chosen at all
        assert used == {kernel}


@pytest.fixture(scope="module")
def unets(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By precision: maps of 12, 6 and 3 pixels a side, one of them with attention."""
    folder = tmp_path_factory.mktemp("unet") / "unet"
    sizes = {"sample_size": 12, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    UNet2DModel(**sizes, **blocks).save_pretrained(folder)
    precisions = ["fp32", "bf16"] if "avx512-bf16" in kernels.available_tiers() else ["fp32"]
    told = {"sparse": True, "schedule": "vp-linear", "prediction": "eps", "heads": None}
    return {precision: build(folder, precision=precision, **told) for precision in precisions}


@pytest.mark.parametrize("kernel", ["dense", "t-lanes", "n-lanes", "r-lanes"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nor_does_one_of_a_unet(
    unets: dict[str, Path], precision: str, kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels of fewer lanes are the same code: what may depend on a batch is where its images and rows lie."""
    if precision not in unets or (precision, kernel) == ("fp32", "r-lanes"):
        pytest.skip("no such kernel here")

    def choose(candidates: Any) -> Choice:
        return Choice(kernel if kernel in candidates else next(iter(candidates)), dict.fromkeys(candidates, 1.0))

    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr("sparse_engine.tactics.fastest", choose)
    monkeypatch.setattr("sparse_engine.backends.onnxruntime.choose.N_LANES_UP_TO", {"fp32": 10**6, "bf16": 10**6})
    info = assert_same_in_every_batch(unets[precision], autotune=True)
    assert kernel in {layer["kernel"] for layer in info["layers"] if layer["masked"]}


def test_nor_does_a_prediction_at_times_of_its_own(engines: dict[str, Path], rng: np.random.Generator) -> None:
    x, t = rng.standard_normal((97, 3, 8, 8), np.float32), np.linspace(0.001, 1, 97)
    with SparseEngine.load(engines["fp32"], threads=2, autotune=False) as engine:
        whole = engine.predict(x, t, labels=1)
        alone = [engine.predict(x[i : i + 1], t[i], labels=1) for i in range(97)]
    np.testing.assert_array_equal(np.concatenate(alone), whole)


@pytest.mark.parametrize("kernel", ["own", "onnxruntime"])
def test_nor_does_one_in_int8(
    engines: dict[str, Path], kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "sparse_engine.tactics.fastest",
        lambda candidates: Choice(
            kernel if kernel in candidates else next(name for name in candidates if name.startswith(("dense", "int8"))),
            dict.fromkeys(candidates, 1.0),
        ),
    )
    info = assert_same_in_every_batch(engines["int8"], autotune=True)
    assert info["runtime"]["step"]["precision"] == "int8"
    assert info["runtime"]["attention"]["kernel"] == kernel


def session(nodes: list[NodeProto], constants: dict[str, np.ndarray], x: np.ndarray, threads: int) -> Any:
    graph = helper.make_graph(
        nodes,
        "operators",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def product(rng: np.random.Generator, K: int, N: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    weights = {"w": rng.standard_normal((K, N), np.float32), "b": rng.standard_normal(N, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Gelu", ["s"], ["y"]),
    ]
    return nodes, weights


def attention(rng: np.random.Generator, width: int, heads: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    split = helper.make_node("Split", ["x", "thirds"], ["q", "k", "v"], axis=2)
    merge = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=heads)
    return [split, merge], {"thirds": np.array([width] * 3, np.int64)}


def convolution(rng: np.random.Generator, C: int, N: int, size: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    weights = {"w": rng.standard_normal((N, C, size, size), np.float32), "b": rng.standard_normal(N, np.float32)}
    strides, pads = ([1, 1], [1] * 4) if size == 3 else ([size] * 2, [0] * 4)
    return [helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=strides, pads=pads)], weights


def normalised(rng: np.random.Generator, width: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    weights = {"s": rng.standard_normal(width, np.float32), "b": rng.standard_normal(width, np.float32)}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "s", "b"], ["n"], axis=-1),
        helper.make_node("Sigmoid", ["n"], ["g"]),
        helper.make_node("Mul", ["n", "g"], ["y"]),
    ]
    return nodes, weights


PRODUCTS = ((1, 64, 64), (1, 37, 5), (17, 44, 60), (1, 512, 2048), (65, 512, 100), (3, 2048, 33))  # tokens, K, N
ATTENTIONS = ((17, 44), (65, 256), (257, 64))  # tokens, width
CONVOLUTIONS = ((3, 44, 2), (4, 4, 3), (64, 3, 3))  # channels in and out, size
NORMS = ((1, 44), (17, 44), (65, 512))  # tokens, width
OPERATORS: dict[str, tuple[tuple[int, ...], Callable[..., Any], tuple[int, ...]]] = {
    **{f"product {T} {K} {N}": ((T, K), product, (K, N)) for T, K, N in PRODUCTS},
    **{f"attention {T} {D}": ((T, 3 * D), attention, (D, 4)) for T, D in ATTENTIONS},
    **{f"convolution {C} {N} {k}": ((C, 16, 16), convolution, (C, N, k)) for C, N, k in CONVOLUTIONS},
    **{f"norm {T} {D}": ((T, D), normalised, (D,)) for T, D in NORMS},
}


@pytest.mark.parametrize("name", OPERATORS)
def test_onnx_runtimes_operators_do_not_depend_on_the_batch(name: str, rng: np.random.Generator) -> None:
    """What the engine relies on where a layer is not ours: checked on every machine that runs the tests."""
    shape, make, arguments = OPERATORS[name]
    x = rng.standard_normal((16, *shape), np.float32)
    nodes, constants = make(rng, *arguments)
    found = [session(nodes, constants, x, threads) for threads in (1, 2)]
    (whole,) = found[1].run(None, {"x": x})
    for each in found:
        for size in (1, 2, 5, 16):
            parts = [each.run(None, {"x": x[first : first + size]})[0] for first in range(0, 16, size)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_time_is_embedded_as_its_definition_says_at_any_width() -> None:
    import torch

    t = torch.tensor([0.0, 1.0, 437.5, 999.0])
    for dim in (4, 44, 45, 64):
        half = dim // 2
        angles = t.double()[:, None] * torch.exp(-np.log(10000.0) * torch.arange(half).double() / half)
        expected = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
        found = timestep_embedding(t, dim)
        assert found.shape == (4, dim)
        torch.testing.assert_close(found[:, : 2 * half].double(), expected, atol=2e-4, rtol=0)
