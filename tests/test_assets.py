"""An engine that holds a text encoder and a decoder: pictures of prompts, without torch."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.onnxruntime.session import Prepared, create_session
from sparse_engine.cli.main import run
from sparse_engine.errors import (
    EngineClosedError,
    EngineFileError,
    InputError,
    MissingDependencyError,
    OptionError,
)
from sparse_engine.export.assets import AssetOptions
from sparse_engine.export.families.uvit_t2i import UViTT2I, UViTT2IConfig
from sparse_engine.text import TextEncoder
from tests.clip import save_text_model, save_tokenizer
from tests.conftest import save_network
from tests.export.test_vae import SMALL, decoded, save_vae

LENGTH, WIDTH = 7, 16
CONFIG = UViTT2IConfig(8, 2, 4, 32, 2, 4, final_conv=False, context_dim=WIDTH, context_length=LENGTH)
OPTIONS: dict[str, Any] = {"sparse": True, "context_length": LENGTH}
FAST: dict[str, Any] = {"steps": 3, "sampler": "dpm-solver++", "guidance": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder, and a checkpoint."""
    made = tmp_path_factory.mktemp("pipeline")
    save_network(made / "t2i.pth", UViTT2I(CONFIG))
    save_text_model(save_tokenizer(made / "clip", length=LENGTH), LENGTH, WIDTH)
    return made


@pytest.fixture(scope="module")
def vae(folder: Path) -> Any:
    return save_vae(folder / "vae", **SMALL)


@pytest.fixture(scope="module")
def engine_file(folder: Path, vae: Any, build: Callable[..., Path]) -> Path:
    assets = AssetOptions(text_encoder=folder / "clip", vae=folder / "vae", vae_scale=0.2301)
    return build(folder / "t2i.pth", assets=assets, **OPTIONS)


@pytest.fixture(scope="module")
def engine(engine_file: Path) -> Iterator[SparseEngine]:
    with SparseEngine.load(engine_file, threads=1) as loaded:
        yield loaded


def contexts_of(engine: SparseEngine, prompts: list[str]) -> np.ndarray:
    found = engine._assets.with_prompt("conditioning", None, "prompt", prompts, len(prompts))
    assert found is not None
    return np.asarray(found["context"])


def test_prompts_are_what_the_encoder_makes_of_them(engine: SparseEngine, folder: Path) -> None:
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    prompts = ["a cat", "the dog", ""]
    tokens = CLIPTokenizer.from_pretrained(folder / "clip")(
        prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(folder / "clip").eval()(input_ids=tokens).last_hidden_state.numpy()
    found = contexts_of(engine, prompts)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.array_equal(contexts_of(engine, ["the dog"])[0], found[1])  # whatever is encoded with it
    null = engine._assets.nulls["context"]
    assert np.abs(null - expected[2]).max() <= 1e-4 * np.abs(expected).max()


def test_a_picture_of_a_prompt_is_that_of_its_context(engine: SparseEngine) -> None:
    pictures = engine.sample(2, prompt=["a cat", "the dog"], negative_prompt="a", **FAST)
    assert (pictures.shape, pictures.dtype) == ((2, 16, 16, 3), np.uint8)
    told = {"context": contexts_of(engine, ["a cat", "the dog"])}
    negative = {"context": contexts_of(engine, ["a"])[0]}
    assert np.array_equal(engine.sample(2, conditioning=told, negative=negative, **FAST), pictures)
    assert not np.array_equal(engine.sample(2, prompt=["a cat", "the dog"], **FAST), pictures)
    assert np.array_equal(engine.sample(1, prompt="the dog", negative_prompt="a", first=1, **FAST), pictures[1:])


def test_latents_are_decoded_as_diffusers_does(engine: SparseEngine, vae: Any) -> None:
    latents = engine.sample(2, prompt="a cat", output="float", **FAST)
    assert latents.shape == (2, 4, 8, 8)
    expected = decoded(vae, latents * np.float32(vae.config.scaling_factor / 0.2301))
    found = engine.decode(latents)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.array_equal(engine.decode(latents[1:]), found[1:])
    rounded = np.rint((expected.clip(-1, 1) + 1) * 127.5).astype(int).transpose(0, 2, 3, 1)
    assert np.abs(engine.sample(2, prompt="a cat", **FAST).astype(int) - rounded).max() <= 1


@pytest.mark.skipif(not kernels.is_available(), reason="the kernels are not built")
def test_the_decoders_norms_run_in_our_kernel(
    engine_file: Path, engine: SparseEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    expected, opened = engine.decode(latents), list[Prepared]()

    def create(prepared: Prepared, *arguments: Any) -> Any:
        opened.append(prepared)
        return create_session(prepared, *arguments)

    monkeypatch.setattr("sparse_engine.backends.onnxruntime.assets.create_session", create)
    for tier in (kernels.TIERS[0], kernels.available_tiers()[-1]):
        monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
        with SparseEngine.load(engine_file, threads=1, autotune=False) as other:
            found = other.decode(latents)
        kinds = {node.op_type for node in opened.pop().model.graph.node}
        assert kinds & {"GroupNorm", "ReduceMean"} == {"ReduceMean" if tier == "scalar" else "GroupNorm"}
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_prompt_that_is_too_long_is_cut_aloud(engine: SparseEngine) -> None:
    with pytest.warns(UserWarning, match="a prompt has 9 tokens and the text encoder reads 5"):
        engine.sample(1, prompt="dog " * 9, **FAST)


def test_threads_share_encoder_and_decoder(engine_file: Path) -> None:
    with SparseEngine.load(engine_file, threads=1) as engine:
        found: list[np.ndarray] = []

        def draw() -> None:
            found.append(engine.sample(1, prompt="a cat", **FAST))

        threads = [threading.Thread(target=draw) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2
    assert np.array_equal(found[0], found[1])


def test_without_torch(engine_file: Path, tmp_path: Path) -> None:
    script = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["diffusers"] = None
from sparse_engine import SparseEngine, kernels
with SparseEngine.load(sys.argv[1]) as engine:
    print(engine.sample(1, steps=2, sampler="dpm-solver++", prompt="a cat", guidance=2.0).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(engine_file)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.stdout.strip() == "(1, 16, 16, 3)", done.stderr


def test_without_the_tokenizers_library(engine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with SparseEngine.load(engine_file, threads=1) as engine:
        with pytest.raises(MissingDependencyError, match=r"needs tokenizers.*\n.*pip install 'sparse-engine\[text\]'"):
            engine.sample(1, prompt="a cat", **FAST)
        context = np.zeros((LENGTH, WIDTH), np.float32)
        assert engine.sample(1, conditioning={"context": context}, **FAST).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"pad": -1}, "its text encoder's pad is -1"),
        ({"length": None}, "its text encoder's length is None"),
        ({"width": 17}, r"its manifest says .*'context': \(7, 17\)"),
    ],
)
def test_an_encoder_that_its_manifest_does_not_describe(
    engine_file: Path, changed: dict[str, Any], message: str
) -> None:
    file = EngineFile(engine_file)
    file.manifest.assets["text"] |= changed
    with pytest.raises(EngineFileError, match=message):
        TextEncoder(file, 1)


def test_a_closed_engine_lets_its_sessions_go(engine_file: Path) -> None:
    engine = SparseEngine.load(engine_file, threads=1)
    engine.sample(1, prompt="a cat", **FAST)
    sessions = [weakref.ref(each) for each in engine._assets._loaded.values()]
    assert len(sessions) == 2
    engine.close()
    gc.collect()
    assert [each() for each in sessions] == [None, None]
    with pytest.raises(EngineClosedError):
        engine.sample(1, prompt="a cat", **FAST)


def test_on_the_command_line(engine_file: Path, folder: Path, vae: Any, tmp_path: Path) -> None:
    engine = tmp_path / "t.sengine"
    said = ["build", str(folder / "t2i.pth"), "--heads", "4", "--context-length", "7", "-o", str(engine)]
    assert run([*said, "--text-encoder", str(folder / "clip"), "--vae", str(folder / "vae")]) == 0
    manifest = EngineFile(engine).manifest
    assert manifest.assets["vae"]["scaling_factor"] == vae.config.scaling_factor
    drawn = ["sample", str(engine), "-n", "2", "--steps", "3", "-o", str(tmp_path / "x.png")]
    assert run([*drawn, "--prompt", "a cat", "--negative-prompt", "the", "--guidance", "2"]) == 0
    assert (tmp_path / "x.png").stat().st_size > 0
    assert run([*said, "--vae-scale", "0.2"]) == 2


def test_assets_that_do_not_fit(folder: Path, vae: Any, tiny_checkpoint: Path, tmp_path: Path, build: Any) -> None:
    save_text_model(save_tokenizer(tmp_path / "long", length=9), 9, WIDTH)
    with pytest.raises(InputError, match=r"makes \[9, 16\] of a text, and the model's context is \[7, 16\]"):
        build(folder / "t2i.pth", assets=AssetOptions(text_encoder=tmp_path / "long"), **OPTIONS)
    with pytest.raises(OptionError, match="--text-encoder is given, but the model is told nothing and no context"):
        build(tiny_checkpoint, assets=AssetOptions(text_encoder=folder / "clip"))
    with pytest.raises(OptionError, match="--vae is given, but the model draws pixels"):
        build(tiny_checkpoint, assets=AssetOptions(vae=folder / "vae"))
    save_vae(tmp_path / "wide", **{**SMALL, "latent_channels": 8})
    with pytest.raises(InputError, match="decodes latents of 8 channels; the model draws 4"):
        build(folder / "t2i.pth", assets=AssetOptions(vae=tmp_path / "wide"), **OPTIONS)


def test_decode_without_a_decoder(engine: SparseEngine, tiny_engine: Path) -> None:
    with SparseEngine.load(tiny_engine) as pixels, pytest.raises(OptionError, match=r"holds no decoder\n.*--vae"):
        pixels.decode(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(OptionError, match=r"latents has shape \[1, 3, 8, 8\]; expected \[B, 4, 8, 8\]"):
        engine.decode(np.zeros((1, 3, 8, 8), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.warmup(1)
