"""The torch backend on a GPU: what no CPU can show."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.backends.torch.layers import QuantisedLayer
from sparse_engine.backends.torch.products import CusparseltProduct, CutlassProduct, ObstacleError
from sparse_engine.backends.torch.quantised import CusparseltCodesProduct, DenseCodesProduct, DequantisedProduct
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.images import psnr
from tests.backends.test_torch_packing import two_of_four
from tests.backends.test_torch_quantised import eight_bits
from tests.conftest import save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

# Wide enough for every sparse product.
CONFIG = UViTConfig(image_size=16, patch_size=2, channels=3, embed_dim=256, depth=2, heads=4, num_classes=5)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, build: Callable[..., Path]) -> dict[str, Path]:
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("gpu") / "gpu.pth", CONFIG)
    options: dict[str, Any] = {"sparse": True, "backend": "torch", "null_class": 4, "batch": (1, 4, 16)}
    return {precision: build(checkpoint, precision=precision, **options) for precision in ("fp32", "fp16", "bf16")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 257, 4112])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [CusparseltProduct, CutlassProduct])
def test_sparse_products_against_float64(kind: type, dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight = two_of_four(192, 256, dtype).cuda()
    offset = torch.randn(192, device="cuda", dtype=dtype) if bias else None
    x = torch.randn(rows, 256, device="cuda", dtype=dtype)
    try:
        product = kind(weight, offset)
        found = product(x)
    except (ObstacleError, RuntimeError) as error:
        pytest.skip(f"not on this GPU: {error}")
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() / scale < (2e-3 if dtype == torch.float16 else 1.6e-2)
    if kind is CusparseltProduct:
        product.algorithm = product.search(x)
        assert (product(x).double() - expected).abs().max() / scale < 1.6e-2


@pytest.mark.parametrize("rows", [1, 16, 257, 4112])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("kind", [DequantisedProduct, DenseCodesProduct, CusparseltCodesProduct])
def test_products_of_codes_against_float32(kind: Any, precision: str, rows: int) -> None:
    stored = eight_bits(precision, outputs=192, inputs=256).to(torch.device("cuda"))
    bias = torch.randn(192, device="cuda", dtype=torch.float16)
    linear = QuantisedLayer(stored, bias, torch.float16, sparse=True)
    x = torch.randn(rows, 256, device="cuda", dtype=torch.float16)
    try:
        product = kind(stored, bias, torch.float16)
        found = product(x)
    except (ObstacleError, RuntimeError) as error:
        pytest.skip(f"not on this GPU: {error}")
    expected = linear.expected(x)
    scale = expected.abs().max()
    assert (found.float() - expected).abs().max() / scale < 5e-3
    if kind is CusparseltCodesProduct:
        product.algorithm = product.search(x)
        assert (product(x).float() - expected).abs().max() / scale < 5e-3


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_engine_in_8_bits_draws_what_a_cpu_draws(precision: str, tmp_path: Path, build: Callable[..., Path]) -> None:
    checkpoint = save_checkpoint(tmp_path / "gpu.pth", CONFIG)
    options: dict[str, Any] = {"sparse": True, "null_class": 4, "batch": (1, 4, 16)}
    with SparseEngine.load(build(checkpoint, backend="onnxruntime", **options)) as engine:
        data = collect(engine, images=20, steps=8, sampler="ddim")
    data.save(tmp_path / "calib.npz")
    wanted = Quantisation(tmp_path / "calib.npz")
    path = build(checkpoint, backend="torch", precision=precision, quantisation=wanted, **options)
    predictions = []
    for device in ("cuda", "cpu"):
        with SparseEngine.load(path, device=device) as engine:
            predictions.append(engine.predict(data.x, data.times, conditioning=data.conditioning))
            layers = engine.info["layers"]
            if device == "cuda":
                assert all(layer["timed_by_tokens"] for layer in layers if layer["quantised"])
                assert any(layer["kernel"] != "dense" for layer in layers if layer["quantised"])
    assert relative_error(*predictions) < 0.03


def test_a_gpu_draws_what_a_cpu_draws(engines: dict[str, Path]) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16), np.float32)
    with SparseEngine.load(engines["fp32"], device="cpu") as engine:
        expected = engine.denoise(x, 0.4, labels=1)
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 5e-2)):
        with SparseEngine.load(engines[precision], device="cuda") as engine:
            found = engine.denoise(x, 0.4, labels=1)
        assert np.abs(found - expected).max() / np.abs(expected).max() < tolerance


@pytest.mark.parametrize("sampler", ["dpm-solver", "euler-sde"])
def test_recorded_steps_are_the_steps(engines: dict[str, Path], sampler: str) -> None:
    options: dict[str, Any] = {"steps": 50, "sampler": sampler, "output": "float", "labels": 1, "batch_size": 4}
    with SparseEngine.load(engines["fp16"]) as engine:
        first = engine.sample(4, **options)
        again = [engine.sample(4, **options) for _ in range(2)]
        assert engine.info["runtime"]["recordings"] >= 1
        seen: list[int] = []
        each = engine.sample(4, callback=lambda step, t, x: seen.append(step), **options)
    value_range = (float(first.min()), float(first.max()))
    assert all(psnr(other, first, value_range) > 50 for other in (*again, each))
    assert seen == list(range(50))


def test_every_layer_is_timed_and_reported(engines: dict[str, Path]) -> None:
    with SparseEngine.load(engines["fp16"]) as engine:
        masked = [layer for layer in engine.info["layers"] if layer["masked"]]
        assert engine.info["runtime"]["device"].startswith("cuda")
    assert all(layer["timed_by_tokens"] for layer in masked)
    for layer in masked:
        for timed in layer["timed_by_tokens"].values():
            assert len(timed["milliseconds"]) > 1
            assert timed["milliseconds"][timed["fastest"]] == min(timed["milliseconds"].values())


def test_threads_take_turns(engines: dict[str, Path]) -> None:
    options: dict[str, Any] = {"steps": 24, "sampler": "ddim", "output": "float", "labels": 1}
    with SparseEngine.load(engines["fp16"]) as engine:
        expected = [engine.sample(2, seed=seed, **options) for seed in range(4)]
        found: dict[int, np.ndarray] = {}

        def work(seed: int) -> None:
            found[seed] = engine.sample(2, seed=seed, **options)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(np.allclose(found[seed], expected[seed], atol=1e-2) for seed in range(4))


def test_a_result_stays_on_the_gpu(engines: dict[str, Path]) -> None:
    with SparseEngine.load(engines["fp16"]) as engine:
        tensor = engine.sample(2, steps=4, labels=1, output="dlpack")
        assert tensor.device.type == "cuda"
        assert np.array_equal(tensor.cpu().numpy(), engine.sample(2, steps=4, labels=1, output="float"))


def test_memory_comes_back(engines: dict[str, Path]) -> None:
    def load_and_sample() -> int:
        with SparseEngine.load(engines["fp16"]) as engine:
            for _ in range(2):
                engine.sample(16, steps=12, labels=1, batch_size=16)
        del engine
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    before = load_and_sample()
    assert load_and_sample() <= before + (1 << 20)
