"""``build --bundle``: a pipeline's folder as one file, which draws the pipeline's pictures of a prompt without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sparse_engine import SparseEngine, sampling
from sparse_engine.artifact import EngineFile
from sparse_engine.cli.main import run
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export import hub
from sparse_engine.export.assets import AssetOptions, bundled
from sparse_engine.export.bake import bake
from sparse_engine.export.model import load_model
from tests.clip import fill, save_text_model, save_tokenizer, text_config
from tests.export.diffusers_networks import randomised
from tests.export.test_vae import SMALL, save_vae
from tests.pipelines.pipeline_cases import CASES, LENGTH, SD, SD_BETAS, SDXL, tamed

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:a prompt has"),  # which is cut by both
]
PROMPT, NEGATIVE = "a cat, the dog!!", "all the"
NOISE = sampling.normal(5, np.arange(2), 0, (4, 8, 8))
# (sampler, options of ours, diffusers' scheduler): the same times, to the same end
SHARED: dict[str, tuple[dict[str, Any], Any]] = {
    "ddim": ({"spacing": "trailing"}, DDIMScheduler(**SD_BETAS, timestep_spacing="trailing", clip_sample=False)),
    "dpm-solver++": (
        {"spacing": "trailing", "order": 2},
        DPMSolverMultistepScheduler(**SD_BETAS, timestep_spacing="trailing", final_sigmas_type="zero"),
    ),
}


def text_parts(
    folder: Path, number: str, width: int, pad: str, projection: int = 0, length: int = LENGTH
) -> tuple[Any, Any]:
    """A text model with its tokenizer, in a pipeline's folder, as transformers read them."""
    tokenizer = save_tokenizer(folder / f"tokenizer{number}", pad=pad, length=length)
    encoder = folder / f"text_encoder{number}"
    if projection:
        model = CLIPTextModelWithProjection(text_config(length, width, projection_dim=projection)).eval()
        fill(model, seed=3)
        model.save_pretrained(encoder)
        return model, CLIPTokenizer.from_pretrained(tokenizer)
    save_text_model(encoder, length, width)
    return CLIPTextModel.from_pretrained(encoder), CLIPTokenizer.from_pretrained(tokenizer)


def make_sd(folder: Path, length: int = LENGTH) -> Any:
    encoder, tokenizer = text_parts(folder / "parts", "", 24, "!", length=length)
    return StableDiffusionPipeline(
        vae=save_vae(folder / "parts" / "vae", **SMALL),
        unet=tamed(randomised(UNet2DConditionModel(**SD))),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=SHARED["ddim"][1],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_sdxl(folder: Path) -> Any:
    encoder, tokenizer = text_parts(folder / "parts", "", 8, "<|endoftext|>")
    encoder_2, tokenizer_2 = text_parts(folder / "parts", "_2", 16, "!", projection=20)
    return StableDiffusionXLPipeline(
        vae=save_vae(folder / "parts" / "vae", **SMALL),
        unet=tamed(randomised(UNet2DConditionModel(**SDXL))),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=SHARED["ddim"][1],
        add_watermarker=False,
    )


MADE = {"SD": make_sd, "SDXL": make_sdxl}


@pytest.fixture(scope="module", params=MADE)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """(the pipeline with the baked network, its folder, the engine)."""
    made = tmp_path_factory.mktemp(request.param)
    pipe, folder, engine = MADE[request.param](made), made / "pipeline", made / "m.sengine"
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    options = ["--sparse", "--bundle", "--context-length", str(LENGTH), "-o", str(engine)]
    assert run(["build", str(folder), *options]) == 0
    state = bake(load_model(folder, context_length=LENGTH), "auto").state
    pipe.unet.load_state_dict({name: torch.from_numpy(each) for name, each in state.items()})
    return pipe, folder, engine


@pytest.mark.parametrize("negative", [None, NEGATIVE], ids=["nothing", "a text"])
@pytest.mark.parametrize("sampler", SHARED)
def test_the_picture_is_the_pipelines(
    sampler: str, negative: str | None, bundle: tuple[Any, Path, Path], one_torch_thread: None
) -> None:
    pipe, _, path = bundle
    options, pipe.scheduler = SHARED[sampler]
    told: dict[str, Any] = {"negative_prompt": None if negative is None else [negative] * 2, "guidance_scale": 3.0}
    expected = pipe(
        [PROMPT] * 2, latents=torch.from_numpy(NOISE), num_inference_steps=5, output_type="np", **told
    ).images
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        told = {"prompt": PROMPT, "negative_prompt": negative, "guidance": 3.0}
        found = engine.sample(2, sampler=sampler, steps=5, noise=NOISE, **told, **options)
    assert found.shape == expected.shape == (2, 16, 16, 3)
    assert np.abs(found - np.rint(255 * expected)).max() <= 1
    assert found.std() > 5


def test_on_the_command_line(bundle: tuple[Any, Path, Path], tmp_path: Path, one_torch_thread: None) -> None:
    """The noise of a seed is the same in Python: it is what the pipeline starts from."""
    pipe, _, path = bundle
    pipe.scheduler = SHARED["ddim"][1]
    out = tmp_path / "x.npz"
    options = ["--sampler", "ddim", "--spacing", "trailing", "--steps", "3", "--guidance", "2", "--no-autotune"]
    assert run(["sample", str(path), "-n", "2", "--seed", "5", "--prompt", PROMPT, *options, "-o", str(out)]) == 0
    images = next(iter(np.load(out).values()))
    told: dict[str, Any] = {"guidance_scale": 2.0, "latents": torch.from_numpy(NOISE), "output_type": "np"}
    expected = pipe([PROMPT] * 2, num_inference_steps=3, **told).images
    assert np.abs(images - np.rint(255 * expected)).max() <= 1


def test_what_is_stored(bundle: tuple[Any, Path, Path]) -> None:
    pipe, folder, path = bundle
    manifest = EngineFile(path).manifest
    assert set(manifest.assets) == {"text", "vae"}
    text = manifest.assets["text"]
    assert (text["length"], text["width"]) == (LENGTH, 24)
    nulls = {each.name: each.null for each in manifest.conditions}
    if isinstance(pipe, StableDiffusionXLPipeline):
        assert nulls == {"context": "zeros", "pooled": "zeros", "time_ids": "same"}
        assert text["told"] == {"time_ids": [16, 16, 0, 0, 16, 16]}
        index = json.loads((folder / "model_index.json").read_text())
        assert index["force_zeros_for_empty_prompt"] is True
    else:
        assert nulls == {"context": "stored"}
    assert any(note.startswith("bundled: vae/") for note in manifest.notes)


def copied(folder: Path, to: Path, *without: str) -> Path:
    shutil.copytree(folder, to, ignore=lambda _, names: [name for name in names if name in without])
    return to


def test_a_text_encoder_of_another_kind_is_left_out(bundle: tuple[Any, Path, Path], tmp_path: Path) -> None:
    folder = copied(bundle[1], tmp_path / "p")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    taken, notes = bundled(load_model(folder, context_length=LENGTH), AssetOptions(bundle=True))
    assert taken.vae == folder / "vae"
    assert taken.text_encoder is None
    assert notes[-1] == "text_encoder/ is a T5EncoderModel: not bundled; prompts are encoded outside"


def test_what_is_named_comes_before_the_folder(bundle: tuple[Any, Path, Path], tmp_path: Path) -> None:
    model = load_model(bundle[1], context_length=LENGTH)
    taken, _ = bundled(model, AssetOptions(bundle=True, vae=tmp_path, vae_scale=0.5))
    assert (taken.vae, taken.vae_scale) == (tmp_path, 0.5)


def test_nothing_to_bundle(tmp_path: Path) -> None:
    case = CASES["DDPM"]
    case.pipeline(case.network()).save_pretrained(tmp_path / "p")
    assert run(["build", str(tmp_path / "p"), "--bundle", "-o", str(tmp_path / "m.sengine")]) == 2
    assert not (tmp_path / "m.sengine").exists()
    with pytest.raises(OptionError, match=r"--bundle: .*p holds no vae/ and no text encoder.*\n.*--vae"):
        bundled(load_model(tmp_path / "p"), AssetOptions(bundle=True))


# --- the Hub's names


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of huggingface_hub's, with somebody's pipeline in it; there is no network."""
    import huggingface_hub

    case = CASES["DDPM"]
    snapshot = tmp_path / "models--somebody--tiny-ddpm" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    case.pipeline(case.network()).save_pretrained(snapshot)
    refs = tmp_path / "models--somebody--tiny-ddpm" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("there is no network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    return snapshot


def test_a_name_on_the_hub_is_found_in_the_cache(hub_cache: Path) -> None:
    model = load_model("somebody/tiny-ddpm")
    assert model.checkpoint.path.parent == hub_cache / "unet"
    assert model.recipe.sampler == "ddpm"  # from scheduler/ beside it


def test_a_name_that_is_not_in_the_cache(
    hub_cache: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="somebody/other does not exist\n.*--download"):
        load_model("somebody/other")
    assert run(["build", "somebody/other", "--download"]) == 2
    said = capfd.readouterr().err
    assert "somebody/other cannot be fetched from the Hub" in said
    assert run(["build", str(hub_cache), "--download"]) == 2
    assert "is no name on the Hub" in capfd.readouterr().err


def test_a_download_fetches_what_a_build_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}
    names = ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5-pruned.ckpt"]
    names += [
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    ]

    def fetched(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: names)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert hub.download(Path("somebody/sd")) == tmp_path
    assert asked["name"] == "somebody/sd"
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    assert kept == [names[0], names[3], names[5]]
