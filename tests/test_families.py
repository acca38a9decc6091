"""Families through the whole way: the command line, each backend, lower precisions, int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, sampling
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.cli.main import run
from sparse_engine.export.build import build_engine
from sparse_engine.export.options import ModelOptions
from sparse_engine.export.verify import verify_engine
from tests.export import test_dit, test_pixart, test_sd3, test_unet2d, test_unet_condition

# Few blocks, for each takes its time to trace.
SMALL_UNET = {
    **test_unet2d.GOOGLE,
    "num_class_embeds": 5,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}
SMALL_TEXT_UNET = {
    **test_unet_condition.SD15,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
FAST: dict[str, Any] = {"steps": 3, "output": "float"}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "dit": lambda folder: test_dit.save(folder, test_dit.LATENT),
    "pixart": lambda folder: saved(test_pixart, folder, test_pixart.ALPHA),
    "sd3": lambda folder: saved(test_sd3, folder, test_sd3.SD35),
    "unet2d": lambda folder: saved_unet(test_unet2d, folder, SMALL_UNET),
    "unet-text": lambda folder: saved_unet(test_unet_condition, folder, SMALL_TEXT_UNET),
}


OPTIONS = {
    "dit": {"heads": 4},
    "pixart": {"context_length": 7},
    "sd3": {"context_length": 7},
    "unet2d": {"image_size": 8},
    "unet-text": {"context_length": 7},
}


def options_of(checkpoint: Path) -> dict[str, int]:
    """What its own folder does not say; the folder is named after the family."""
    return next(options for name, options in OPTIONS.items() if name in str(checkpoint))


def saved(module: Any, folder: Path, sizes: dict[str, Any]) -> Path:
    """A network whose predictions are small, so that its trajectories stay where noise is."""
    network = module.saved(folder, sizes)
    network.proj_out.weight.mul_(0.1)
    network.save_pretrained(folder / "transformer")
    return folder


def saved_unet(module: Any, folder: Path, sizes: dict[str, Any]) -> Path:
    """A U-Net, which its own tests save with small predictions."""
    module.saved(folder, sizes)
    return folder


@pytest.fixture(scope="module", params=list(MAKERS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built on the command line."""
    engine = tmp_path_factory.mktemp("engine") / "m.sengine"
    (option, value) = next(iter(options_of(checkpoint).items()))
    said = ["build", str(checkpoint), "--sparse", f"--{option.replace('_', '-')}", str(value), "-o", str(engine)]
    assert run(said) == 0
    return engine


def build(checkpoint: Path, folder: Path, backend: str = "onnxruntime", precision: str = "fp32", **others: Any) -> Path:
    output = folder / f"{backend}-{precision}.sengine"
    told = {"model": ModelOptions(**options_of(checkpoint)), "options": BuildOptions(True, precision)}
    return build_engine(checkpoint, output, backend=backend, **told, **others)[0]


def told_to(engine: SparseEngine, n: int, seed: int) -> dict[str, np.ndarray]:
    """Something for each condition that has to be said, and a label."""
    told: dict[str, np.ndarray] = {}
    for index, each in enumerate(engine.manifest.conditions):
        if each.classes is not None:
            told[each.name] = np.arange(n) % 3
        elif each.needed:
            told[each.name] = sampling.normal(seed + index, np.arange(n), 0, each.shape)
    return told


def said(engine: SparseEngine, n: int = 3) -> dict[str, Any]:
    return {"conditioning": told_to(engine, n, 1), "negative": told_to(engine, n, 50), "guidance": 2.0}


def close_to(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= tolerance * np.abs(expected).max()


def test_verified_and_the_same_in_any_batch(engine_file: Path, checkpoint: Path) -> None:
    assert verify_engine(engine_file, checkpoint).passed
    with SparseEngine.load(engine_file, threads=1, autotune=False) as engine:
        layers = [layer for layer in engine.info["layers"] if layer["masked"]]
        assert layers
        assert all(layer["hardware_24"] for layer in layers)
        assert engine.info["runtime"]["attention"]["fused"] > 0
        whole = engine.sample(3, seed=5, **said(engine), **FAST)
        told, negative = told_to(engine, 3, 1), told_to(engine, 3, 50)
        for image in range(3):
            own = {name: rows[image] for name, rows in told.items()}
            other = {name: rows[image] for name, rows in negative.items()}
            alone = engine.sample(
                1, seed=5, first=image, conditioning=own, negative=other, guidance=2.0, batch_size=1, **FAST
            )
            assert np.array_equal(alone, whole[image : image + 1])


@pytest.mark.parametrize("backend,precision,tolerance", [("torch", "fp32", 1e-3), ("onnxruntime", "bf16", 0.1)])
def test_another_backend_or_precision_draws_the_same(
    engine_file: Path, checkpoint: Path, tmp_path: Path, backend: str, precision: str, tolerance: float
) -> None:
    with SparseEngine.load(engine_file, threads=1) as engine:
        x = sampling.normal(3, np.arange(3), 0, engine.manifest.data_shape)
        expected = engine.predict(x, 0.5 * engine.schedule.t_max, **said(engine))
    with SparseEngine.load(build(checkpoint, tmp_path, backend, precision)) as other:
        found = other.predict(x, 0.5 * other.schedule.t_max, **said(other))
    assert close_to(found, expected, tolerance)


def test_int8(engine_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    with SparseEngine.load(engine_file, threads=1) as engine:
        data = collect(engine, images=16, steps=8, conditioning=told_to(engine, 16, 1), guidance=[1.0])
        expected = engine.predict(data.x[:4], data.times[:4], conditioning=part(data.conditioning))
    data.save(tmp_path / "calib.npz")
    path = build(checkpoint, tmp_path, precision="int8", quantisation=Quantisation(tmp_path / "calib.npz"))
    assert EngineFile(path).manifest.quantisation is not None
    with SparseEngine.load(path, threads=1) as quantised:
        found = quantised.predict(data.x[:4], data.times[:4], conditioning=part(data.conditioning))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9  # random weights: outliers that no training makes


def part(conditioning: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows[:4] for name, rows in conditioning.items()}


def test_a_plan_of_tensorrt_rtx_is_built(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    path = build(checkpoint, tmp_path, "tensorrt-rtx", "fp16")
    assert any(name.endswith(".plan") for name in EngineFile(path).manifest.files)


def test_on_the_command_line(engine_file: Path, tmp_path: Path) -> None:
    with SparseEngine.load(engine_file, threads=1) as loaded:
        named = told_to(loaded, 2, 1)
        named |= {f"negative/{name}": rows for name, rows in told_to(loaded, 2, 50).items()}
    np.savez(tmp_path / "told.npz", **named)
    drawn = ["sample", str(engine_file), "-n", "2", "--steps", "2", "-o", str(tmp_path / "x.npz"), "--guidance", "2"]
    assert run([*drawn, "--conditioning", str(tmp_path / "told.npz")]) == 0
    assert np.isfinite(np.load(tmp_path / "x.npz")["samples"]).all()
    assert run([*drawn, "--prompt", "a cat"]) == 2
