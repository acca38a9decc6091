"""An engine that is told a text, on every backend: built, sampled, calibrated and verified as any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine, sampling
from sparse_engine.artifact import EngineFile
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.cli.main import run
from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.assets import AssetOptions
from sparse_engine.export.families.uvit_t2i import UViTT2I, UViTT2IConfig
from sparse_engine.export.verify import verify_engine
from tests.conftest import save_network

LENGTH, WIDTH = 7, 12
CONFIG = UViTT2IConfig(8, 2, 3, 32, 2, 4, context_dim=WIDTH, context_length=LENGTH)
OPTIONS: dict[str, Any] = {"sparse": True, "context_length": LENGTH}
FAST: dict[str, Any] = {"steps": 4, "sampler": "dpm-solver++", "output": "float"}
CONTEXTS = sampling.normal(9, np.arange(3), 0, (LENGTH, WIDTH))
NULL = sampling.normal(9, np.arange(1), 1, (LENGTH, WIDTH))[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("t2i") / "t2i.pth", UViTT2I(CONFIG))


@pytest.fixture(scope="module")
def null_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("null") / "empty_context.npy"
    np.save(path, NULL)
    return path


@pytest.fixture(scope="module")
def engine_file(checkpoint: Path, null_context: Path, build: Callable[..., Path]) -> Path:
    return build(checkpoint, assets=AssetOptions(null_context=null_context), **OPTIONS)


@pytest.fixture(scope="module")
def engine(engine_file: Path) -> Iterator[SparseEngine]:
    with SparseEngine.load(engine_file, threads=1) as loaded:
        yield loaded


def reference(checkpoint: Path, x: np.ndarray, t: np.ndarray, context: np.ndarray) -> np.ndarray:
    network = UViTT2I(CONFIG).eval()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    with torch.no_grad():
        predicted: np.ndarray = network(*map(torch.from_numpy, (x, t, context))).numpy()
    return predicted


def close_to(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> bool:
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= tolerance * np.abs(expected).max()


def test_the_manifest_says_what_it_is_told(engine_file: Path) -> None:
    file = EngineFile(engine_file)
    (condition,) = file.manifest.conditions
    assert (condition.name, condition.shape, condition.null) == ("context", (LENGTH, WIDTH), "stored")
    assert "null/context.npy" in file.manifest.files


def test_guidance_leads_away_from_the_stored_context(engine: SparseEngine, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 3, 8, 8), np.float32)
    told, null = (engine.predict(x, 0.4, conditioning={"context": each}) for each in (CONTEXTS, NULL))
    guided = engine.predict(x, 0.4, conditioning={"context": CONTEXTS}, guidance=3.0)
    assert close_to(guided, 3 * told - 2 * null)
    other = engine.predict(x, 0.4, conditioning={"context": CONTEXTS}, negative={"context": CONTEXTS[0]}, guidance=3.0)
    first = engine.predict(x, 0.4, conditioning={"context": CONTEXTS[0]})
    assert close_to(other, 3 * told - 2 * first)
    assert not close_to(other, guided, 1e-3)


def test_a_row_of_a_batch_is_drawn_as_alone(engine: SparseEngine) -> None:
    whole = engine.sample(3, conditioning={"context": CONTEXTS}, guidance=2.0, batch_size=2, **FAST)
    for index in range(3):
        alone = engine.sample(1, first=index, conditioning={"context": CONTEXTS[index]}, guidance=2.0, **FAST)
        assert np.array_equal(alone, whole[index : index + 1])
    assert not close_to(whole[:1], engine.sample(1, conditioning={"context": CONTEXTS[1]}, guidance=2.0, **FAST))


def test_what_it_needs_to_be_told(engine: SparseEngine, checkpoint: Path, build: Callable[..., Path]) -> None:
    with pytest.raises(OptionError, match=r"(?s)conditioning\['context'\] is missing.*float32 \[7, 12\] for all"):
        engine.sample(2, **FAST)
    with pytest.raises(OptionError, match=r"(?s)holds no text encoder.*rebuild with --text-encoder"):
        engine.sample(2, prompt="a cat", **FAST)
    with pytest.raises(OptionError, match=r"prompt and conditioning\['context'\] say the same thing twice"):
        engine.sample(2, prompt="a cat", conditioning={"context": NULL}, **FAST)
    engine.warmup(2)
    with SparseEngine.load(build(checkpoint, **OPTIONS), threads=1) as without:
        with pytest.raises(OptionError, match=r"has no null for it.*\n.*negative=\{'context': array\}"):
            without.sample(1, conditioning={"context": NULL}, guidance=2.0, **FAST)
        found = without.sample(
            1, conditioning={"context": CONTEXTS[0]}, negative={"context": NULL}, guidance=2.0, **FAST
        )
        assert np.array_equal(found, engine.sample(1, conditioning={"context": CONTEXTS[0]}, guidance=2.0, **FAST))


@pytest.mark.parametrize(
    "array,message",
    [
        (np.zeros((LENGTH, WIDTH + 1)), r"has shape \[7, 13\]; expected \[7, 12\]"),
        (np.full((LENGTH, WIDTH), np.nan), "holds NaN or infinite values"),
        (np.zeros((LENGTH, WIDTH), complex), "holds no array of numbers"),
    ],
)
def test_a_null_context_that_does_not_fit(
    checkpoint: Path, build: Any, tmp_path: Path, array: Any, message: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(InputError, match=message):
        build(checkpoint, assets=AssetOptions(null_context=tmp_path / "x.npy"), **OPTIONS)


def test_a_null_context_for_a_model_without(conditional_checkpoint: Path, null_context: Path, build: Any) -> None:
    with pytest.raises(OptionError, match="--null-context is given, but the model is told y and no context"):
        build(conditional_checkpoint, assets=AssetOptions(null_context=null_context))


def test_the_torch_backend_draws_the_same(
    engine: SparseEngine, checkpoint: Path, null_context: Path, build: Callable[..., Path]
) -> None:
    path = build(checkpoint, backend="torch", assets=AssetOptions(null_context=null_context), **OPTIONS)
    said = {"conditioning": {"context": CONTEXTS}, "guidance": 2.0, "seed": [4, 5, 6], **FAST}
    with SparseEngine.load(path) as other:
        assert close_to(other.sample(3, **said), engine.sample(3, **said), 1e-4)


def test_verify_tells_both_the_same(engine_file: Path, checkpoint: Path) -> None:
    assert verify_engine(engine_file, checkpoint).passed


def test_int8_is_calibrated_on_what_it_is_told(
    engine: SparseEngine, checkpoint: Path, tmp_path: Path, build: Callable[..., Path]
) -> None:
    with pytest.raises(OptionError, match=r"conditioning\['context'\] is missing"):
        collect(engine, images=16, steps=8)
    told = np.concatenate([CONTEXTS] * 6)[:16]
    data = collect(engine, images=16, steps=8, conditioning={"context": told}, guidance=[1.0, 2.0])
    guided = data.conditioning["context"][data.guidance == 2]
    nulls = np.all(guided == NULL, axis=(1, 2))
    assert 0.3 < nulls.mean() < 0.7
    assert not np.all(data.conditioning["context"][data.guidance == 1] == NULL, axis=(1, 2)).any()
    data.save(tmp_path / "calib.npz")
    path = build(checkpoint, precision="int8", quantisation=Quantisation(tmp_path / "calib.npz"), **OPTIONS)
    assert EngineFile(path).manifest.quantisation["quality_loss"] < 0.1
    x = sampling.normal(1, np.arange(3), 0, (3, 8, 8))
    with SparseEngine.load(path, threads=1) as quantised:
        found = quantised.predict(x, 0.4, conditioning={"context": CONTEXTS})
    expected = engine.predict(x, 0.4, conditioning={"context": CONTEXTS})
    assert 0 < np.abs(found - expected).max() < 0.15 * np.abs(expected).max()


def test_a_plan_of_tensorrt_rtx_is_built(checkpoint: Path, build: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    path = build(checkpoint, backend="tensorrt-rtx", precision="fp16", **OPTIONS)
    assert any(name.endswith(".plan") for name in EngineFile(path).manifest.files)


def test_on_the_command_line(
    checkpoint: Path, null_context: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    engine, picture = tmp_path / "t.sengine", tmp_path / "x.png"
    built = ["build", str(checkpoint), "--sparse", "--heads", "4", "--context-length", "7", "-o", str(engine)]
    assert run([*built, "--null-context", str(null_context)]) == 0
    assert run(["inspect", str(engine)]) == 0
    assert "context 7x12" in capsys.readouterr().out.replace("\n", " ")
    np.savez(tmp_path / "told.npz", context=CONTEXTS)
    said = ["sample", str(engine), "-n", "3", "--steps", "3", "-o", str(picture), "--guidance", "2"]
    assert run([*said, "--conditioning", str(tmp_path / "told.npz")]) == 0
    assert picture.stat().st_size > 0
    np.savez(tmp_path / "told.npz", **{"context": CONTEXTS, "negative/context": NULL})
    assert run([*said, "--conditioning", str(tmp_path / "told.npz"), "--first", "5"]) == 0
    for wrong in (said, [*said, "--prompt", "a cat"], [*said, "--conditioning", str(tmp_path / "none.npz")]):
        assert run(wrong) == 2
