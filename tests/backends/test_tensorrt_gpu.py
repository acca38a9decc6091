"""TensorRT engines on a GPU: what no CPU can show."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends import backend_named
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.images import psnr
from tests.conftest import save_checkpoint

LIBRARIES = [name for name in ("tensorrt", "tensorrt-rtx") if backend_named(name).availability().usable]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARIES, reason="neither TensorRT nor TensorRT for RTX can run here"),
]

CONFIG = UViTConfig(image_size=16, patch_size=2, channels=3, embed_dim=256, depth=2, heads=4, num_classes=5)
OPTIONS: dict[str, Any] = {"sparse": True, "null_class": 4, "batch": (1, 4, 16)}
WORST = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 1e-2, "bf16": 6e-2}  # relative error of eps


@pytest.fixture(scope="module", params=LIBRARIES or ["none"])
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("gpu") / "gpu.pth", CONFIG)


@pytest.fixture(scope="module")
def reference(checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(checkpoint, mask="auto", backend="onnxruntime", **{**OPTIONS, "sparse": False})


@pytest.fixture(scope="module")
def fp16(library: str, checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(checkpoint, backend=library, precision="fp16", **OPTIONS)


@pytest.mark.parametrize("precision", WORST)
def test_parity_with_float32(
    library: str, precision: str, checkpoint: Path, reference: Path, build: Callable[..., Path]
) -> None:
    path = build(checkpoint, backend=library, precision=precision, **OPTIONS)
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16), np.float32)
    with SparseEngine.load(path) as engine, SparseEngine.load(reference) as exact:
        for t in (0.9, 0.5, 0.1):
            for guidance in (1.0, 2.0):
                found, expected = (each.denoise(x, t, labels=1, guidance=guidance) for each in (engine, exact))
                assert np.abs(found - expected).max() <= WORST[precision] * np.abs(expected).max()
        settings: dict[str, Any] = {"steps": 50, "sampler": "dpm-solver++", "labels": 2, "output": "float"}
        drawn, wanted = (each.sample(4, **settings) for each in (engine, exact))
        assert psnr(drawn, wanted, (-1.0, 1.0)) > (25 if precision == "bf16" else 35)


@pytest.mark.parametrize("linear", ["matmul", "gemm", "conv1x1"])
def test_each_form_of_a_linear(
    library: str, linear: str, checkpoint: Path, reference: Path, build: Callable[..., Path]
) -> None:
    from sparse_engine.backends import TensorRTOptions

    path = build(checkpoint, backend=library, precision="fp16", tensorrt=TensorRTOptions(linear=linear), **OPTIONS)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    with SparseEngine.load(path) as engine, SparseEngine.load(reference) as exact:
        found, expected = (each.denoise(x, 0.5, labels=1) for each in (engine, exact))
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()


def test_recorded_steps_are_the_steps(fp16: Path) -> None:
    with SparseEngine.load(fp16) as engine:
        settings: dict[str, Any] = {"steps": 30, "sampler": "euler-sde", "labels": 1, "output": "float"}
        first = engine.sample(5, batch_size=5, **settings)  # one by one: nothing is recorded yet
        again = [engine.sample(5, batch_size=5, **settings) for _ in range(3)]
        runtime = engine.info["runtime"]
    assert runtime["steps"].startswith("recorded")
    assert runtime["recordings"] > 0
    assert all(np.array_equal(each, again[0]) for each in again)
    assert psnr(first, again[0], (-1.0, 1.0)) > 60


def test_batches_beyond_the_profile_and_shapes_in_turn(fp16: Path) -> None:
    with SparseEngine.load(fp16) as engine:
        settings: dict[str, Any] = {"steps": 10, "labels": 1, "output": "float"}
        whole = engine.sample(40, batch_size=40, **settings)
        for size in (1, 3, 16, 7, 40):
            assert psnr(engine.sample(40, batch_size=size, **settings), whole, (-1.0, 1.0)) > 35


def test_two_lanes_serve_two_threads(fp16: Path) -> None:
    with SparseEngine.load(fp16, threads=2) as engine:
        alone = [engine.sample(4, steps=20, seed=seed, output="float") for seed in range(4)]
        together: dict[int, np.ndarray] = {}

        def call(seed: int) -> None:
            together[seed] = engine.sample(4, steps=20, seed=seed, output="float")

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(psnr(together[seed], alone[seed], (-1.0, 1.0)) > 40 for seed in range(4))


def test_the_result_stays_on_the_gpu(fp16: Path) -> None:
    torch = pytest.importorskip("torch")
    with SparseEngine.load(fp16) as engine:
        shared = engine.sample(4, steps=5, batch_size=4, labels=1, output="dlpack")
        host = engine.sample(4, steps=5, batch_size=4, labels=1, output="float")
    assert shared.__dlpack_device__()[0] == 2
    if torch.cuda.is_available():
        assert psnr(torch.from_dlpack(shared).cpu().numpy(), host, (-1.0, 1.0)) > 60


def test_the_builder_says_what_each_layer_runs(library: str, fp16: Path) -> None:
    with SparseEngine.load(fp16) as engine:
        info = engine.info
    masked = [layer for layer in info["layers"] if layer["masked"]]
    assert all(layer["eligible"] for layer in masked)
    assert all(layer["why"] for layer in masked)
    if library == "tensorrt":
        assert info["backend"]["sparsity"]["reported"]
        assert set(info["backend"]["timed"]) == {"sparse matmul", "sparse gemm", "sparse conv1x1", "dense matmul"}
        assert min(info["backend"]["timed"], key=info["backend"]["timed"].get).endswith(info["backend"]["linear"])


def test_stripped_weights_are_put_back(library: str, checkpoint: Path, fp16: Path, build: Callable[..., Path]) -> None:
    from sparse_engine.backends import TensorRTOptions

    options = TensorRTOptions(strip_weights=True, linear="matmul")
    path = build(checkpoint, backend=library, precision="fp16", tensorrt=options, **OPTIONS)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    with SparseEngine.load(path) as engine, SparseEngine.load(fp16) as whole:
        found, expected = (each.denoise(x, 0.5, labels=1) for each in (engine, whole))
    assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()
