"""The onnxruntime backend: sparse layers packed, fused, chosen by timing, and equal to the dense ones."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparse_engine import SparseEngine, kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.attention import fuse_attention
from sparse_engine.backends.onnxruntime import choose, session
from sparse_engine.backends.onnxruntime.attention import runtime_nodes
from sparse_engine.backends.onnxruntime.compress import layers_in
from sparse_engine.backends.onnxruntime.layers import FusedLayer, from_nibbles, to_nibbles
from sparse_engine.backends.onnxruntime.session import prepare
from sparse_engine.errors import UnsupportedError
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.kernels.packing import pack, unpack
from sparse_engine.tactics import Choice
from tests.conftest import save_checkpoint

needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")
WIDE = UViTConfig(image_size=8, patch_size=2, channels=3, embed_dim=64, depth=2, heads=4, qkv_bias=True, num_classes=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("wide") / "wide.pth", WIDE)


@pytest.fixture(scope="module")
def sparse_file(checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(checkpoint, sparse=True)


@pytest.fixture(scope="module")
def dense_file(checkpoint: Path, build: Callable[..., Path]) -> Path:
    """The same masked weights, run by dense kernels."""
    return build(checkpoint, mask="auto")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def graph_of(path: Path) -> onnx.ModelProto:
    return onnx.load_model_from_string(EngineFile(path).read("step.onnx"))


def otherwise(candidates: Mapping[str, object]) -> str:
    return "t-lanes" if "t-lanes" in candidates else next(iter(candidates))


def force(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(choose, "fastest", None, raising=False)
    monkeypatch.setattr(
        "sparse_engine.tactics.fastest",
        lambda candidates: Choice(
            kernel if kernel in candidates else otherwise(candidates), dict.fromkeys(candidates, 1.0)
        ),
    )


def test_engine_stores_packed_weights_and_one_node_a_layer(sparse_file: Path, dense_file: Path) -> None:
    proto = graph_of(sparse_file)
    layers = {layer.name: layer for layer in layers_in(proto)}
    assert len(layers) == 12
    assert layers["mid_block.mlp.fc1"].activation == "gelu"
    assert layers["mid_block.mlp.fc1"].bias
    assert layers["mid_block.mlp.fc2"].residual
    assert layers["mid_block.attn.proj"].residual
    assert layers["mid_block.attn.qkv"].bias
    assert not layers["mid_block.attn.qkv"].residual
    assert not {node.op_type for node in proto.graph.node} & {"Gelu"}
    sizes = [EngineFile(path).span("weights.bin")[1] for path in (sparse_file, dense_file)]
    assert sizes[0] < 0.7 * sizes[1]


@needs_kernels
@pytest.mark.parametrize("kernel", ["t-lanes", "n-lanes", "dense"])
def test_every_kernel_gives_the_dense_result(
    sparse_file: Path, dense_file: Path, kernel: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    force(monkeypatch, kernel)
    with SparseEngine.load(sparse_file) as sparse, SparseEngine.load(dense_file) as dense:
        used = {layer["kernel"] for layer in sparse.info["layers"] if layer["masked"]}
        assert used <= {kernel, "t-lanes"}
        for batch in (1, 3, 16):
            x = rng.standard_normal((batch, 3, 8, 8), np.float32)
            expected = dense.denoise(x, 0.4, labels=1)
            assert np.abs(sparse.denoise(x, 0.4, labels=1) - expected).max() <= 1e-5 * np.abs(expected).max()
        assert np.abs(sparse.sample(4, steps=5).astype(int) - dense.sample(4, steps=5)).max() <= 1


@needs_kernels
def test_choices_are_measured_once_reported_and_remembered(
    sparse_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SparseEngine.load(sparse_file, threads=1) as engine:
        layers = [layer for layer in engine.info["layers"] if layer["masked"]]
    for layer in layers:
        for timed in layer["timed_by_tokens"].values():
            assert timed["milliseconds"][timed["fastest"]] == min(timed["milliseconds"].values())
            assert timed["margin"] >= 1
        assert layer["kernel"] in {"dense", "t-lanes", "n-lanes"}
        assert layer["chosen"] == (layer["kernel"] != "dense")
    assert len(list(own_cache.glob("tactics-*.json"))) == 1
    monkeypatch.setattr(choose, "_product", lambda *_: pytest.fail("measured again"))
    with SparseEngine.load(sparse_file, threads=1) as engine:
        again = [layer for layer in engine.info["layers"] if layer["masked"]]
    assert again == layers


@needs_kernels
@pytest.mark.parametrize("kernel", ["together", "apart"])
def test_two_layers_become_one_node_where_that_is_faster(
    sparse_file: Path, dense_file: Path, kernel: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    timed: list[tuple[str, ...]] = []

    def fastest(candidates: Mapping[str, Callable[[], object]]) -> Choice:
        timed.append(tuple(candidates))
        for run in candidates.values():
            run()
        return Choice(kernel if kernel in candidates else otherwise(candidates), dict.fromkeys(candidates, 1.0))

    monkeypatch.setattr("sparse_engine.tactics.fastest", fastest)
    prepared = prepare(EngineFile(sparse_file), 2, autotune=True)
    operators = [node.op_type for node in prepared.model.graph.node]
    pairs = 3 if kernel == "together" else 0
    assert (operators.count("Mlp24"), operators.count("MatMul24")) == (pairs, 12 - 2 * pairs)
    assert timed.count(("apart", "together")) == 1  # three of one shape
    assert prepared.report["mid_block.mlp.fc1"]["pair"] == {
        "with": "mid_block.mlp.fc2",
        "chosen": kernel,
        "milliseconds": {"apart": 1.0, "together": 1.0},
    }
    assert "pair" not in prepared.report["mid_block.attn.qkv"]
    x = rng.standard_normal((3, 3, 8, 8), np.float32)
    with SparseEngine.load(sparse_file) as sparse, SparseEngine.load(dense_file) as dense:
        found, expected = (engine.denoise(x, 0.4, labels=1) for engine in (sparse, dense))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_what_may_be_computed_with_the_layer_before() -> None:
    first = FusedLayer("fc1", 8, 4, "gelu", "x", "v1", "p1", "b1", "", "h")
    second = FusedLayer("fc2", 8, 8, "none", "h", "v2", "p2", "b2", "r", "y")
    assert first.feeds(second)
    for other in (
        dataclasses.replace(second, x="z"),
        dataclasses.replace(second, positions=""),
        dataclasses.replace(second, activation="gelu"),
        dataclasses.replace(second, residual="h"),  # what lies between would be gone
    ):
        assert not first.feeds(other)
    assert not dataclasses.replace(first, residual="r").feeds(second)


@needs_kernels
def test_a_layer_that_others_read_stays_a_node(sparse_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "together")
    first = next(node for node in graph_of(sparse_file).graph.node if node.name == "mid_block.mlp.fc1")
    monkeypatch.setattr(session, "only_consumer", lambda graph, name: None if name == first.output[0] else ...)
    prepared = prepare(EngineFile(sparse_file), 2, autotune=True)
    assert [node.op_type for node in prepared.model.graph.node].count("Mlp24") == 2
    assert "pair" not in prepared.report["mid_block.mlp.fc1"]


@needs_kernels
def test_a_damaged_cache_is_measured_anew(sparse_file: Path, own_cache: Path) -> None:
    SparseEngine.load(sparse_file, threads=1).close()
    (file,) = own_cache.glob("tactics-*.json")
    file.write_text("{ not json")
    SparseEngine.load(sparse_file, threads=1).close()
    assert file.read_text().startswith("{\n")


@needs_kernels
def test_an_unwritable_cache_costs_time_only(
    sparse_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "file"))
    with SparseEngine.load(sparse_file) as engine:
        assert engine.sample(1, steps=2).shape == (1, 8, 8, 3)


@needs_kernels
def test_without_autotune_the_stated_rule(sparse_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_product", lambda *_: pytest.fail("timed"))
    with SparseEngine.load(sparse_file, autotune=False) as engine:
        layers = [layer for layer in engine.info["layers"] if layer["masked"]]
    assert {layer["kernel"] for layer in layers} == {"t-lanes"}
    assert {layer["why"] for layer in layers} == {"not timed: ours by default"}


def test_without_compiled_kernels_layers_run_dense_with_one_warning(
    sparse_file: Path, dense_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    x = np.ones((2, 3, 8, 8), np.float32)
    with caplog.at_level(logging.WARNING), SparseEngine.load(sparse_file) as sparse:
        layers = [layer for layer in sparse.info["layers"] if layer["masked"]]
        found = sparse.denoise(x, 0.4)
    assert [record.getMessage() for record in caplog.records] == [
        "sparse layers run dense: the compiled kernels are not installed"
    ]
    assert {layer["kernel"] for layer in layers} == {"dense"}
    with SparseEngine.load(dense_file) as dense:
        assert np.abs(found - dense.denoise(x, 0.4)).max() <= 1e-5 * np.abs(found).max()


@needs_kernels
@pytest.mark.skipif("avx512-bf16" not in kernels.available_tiers(), reason="no AVX512-BF16")
def test_a_block_in_bf16_is_its_attention_and_two_nodes(checkpoint: Path, build: Callable[..., Path]) -> None:
    path = build(checkpoint, sparse=True, mask="auto", precision="bf16")
    prepared = prepare(EngineFile(path), 2, autotune=False)
    nodes = {node.name: node for node in prepared.model.graph.node}
    block = nodes["mid_block.attn.proj+mid_block.mlp.fc1+mid_block.mlp.fc2"]
    qkv = nodes["mid_block.attn.qkv"]
    (attention,) = (node for node in nodes.values() if node.op_type == "SelfAttention" and qkv.output[1] in node.input)
    assert {block.op_type, qkv.op_type} == {"LayersBf16"}
    assert block.input[2] == attention.output[1]  # bfloat16 on both sides
    assert "LayerNormalization" not in {nodes[name].op_type for name in nodes if "mid_block" in name}


@needs_kernels
@pytest.mark.parametrize("sparse", [True, False])
def test_bf16_is_close(
    checkpoint: Path, dense_file: Path, build: Callable[..., Path], sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_engine.backends.onnxruntime.FEWEST_BF16_WEIGHTS", 8000)
    if "avx512-bf16" not in kernels.available_tiers():
        with pytest.raises(UnsupportedError, match="bf16 products need AVX512-BF16; the highest tier here is"):
            build(checkpoint, sparse=sparse, mask="auto", precision="bf16")
        return
    path = build(checkpoint, sparse=sparse, mask="auto", precision="bf16")
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    with SparseEngine.load(path, autotune=False) as engine, SparseEngine.load(dense_file) as dense:
        kernels_used = {layer["name"]: layer["kernel"] for layer in engine.info["layers"]}
        assert kernels_used["mid_block.attn.qkv"] == ("r-lanes" if sparse else "dense-bf16")
        assert kernels_used["out_blocks.0.skip_linear"] == "dense-bf16"
        assert kernels_used["decoder_pred"] == "dense"
        found, expected = engine.denoise(x, 0.4), dense.denoise(x, 0.4)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 3e-2


def test_attention_is_fused_and_lookalikes_are_left_alone(dense_file: Path) -> None:
    proto = graph_of(dense_file)
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    assert fuse_attention(proto, runtime_nodes) == 3
    assert [node.op_type for node in proto.graph.node].count("MultiHeadAttention") == 3
    assert "Softmax" not in {node.op_type for node in proto.graph.node}
    onnx.checker.check_model(_bare(proto))
    merge = next(node for node in other.graph.node if node.op_type == "Softmax")
    merge.op_type = "LogSoftmax"
    assert fuse_attention(other, runtime_nodes) == 2


def _bare(proto: onnx.ModelProto) -> onnx.ModelProto:
    from sparse_engine.export.step_graph import _without_weights

    return _without_weights(proto)


@pytest.mark.parametrize("depth", [4, 8, 12, 64])
def test_packing_survives_the_file(depth: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((5, depth)).astype(np.float32)
    weight.reshape(-1, 4)[:, rng.permutation(4)[:2]] = 0
    values, positions = pack(weight)
    stored = to_nibbles(positions)
    assert stored.shape == (5, -(-depth // 8))
    assert np.array_equal(unpack(values, from_nibbles(stored, depth)), weight)
