"""A folder that ``DDPMPipeline.save_pretrained`` wrote, through the whole way, and damaged in every way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from sparse_engine import SparseEngine
from sparse_engine.cli.main import run
from sparse_engine.errors import CheckpointError
from sparse_engine.export.bake import bake
from sparse_engine.export.model import load_model
from sparse_engine.sampling import normal
from tests.export import damage
from tests.export.damage import Damage, trace_of
from tests.export.test_unet2d import GOOGLE, saved

STEPS, IMAGES = 10, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet") / "pipeline"
    saved(path, GOOGLE)
    return path


@pytest.fixture(scope="module")
def engine_file(folder: Path) -> Path:
    path = folder.parent / "m.sengine"
    assert run(["build", str(folder), "--sparse", "-o", str(path)]) == 0
    return path


def test_the_pictures_are_those_of_diffusers_pipeline(
    folder: Path, engine_file: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None
) -> None:
    """The same start, the same times, the baked weights: DDIM, its predictions clipped."""
    network: Any = UNet2DModel.from_pretrained(folder / "unet")
    baked = bake(load_model(folder), "magnitude").state
    network.load_state_dict({name: torch.from_numpy(each) for name, each in baked.items()})
    start = normal(7, np.arange(IMAGES), 0, (3, 8, 8))
    monkeypatch.setattr(
        "diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: torch.from_numpy(start.copy())
    )
    scheduler = DDIMScheduler.from_config(DDPMScheduler.from_pretrained(folder / "scheduler").config)
    pipeline: Any = DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "use_clipped_model_output": True, "output_type": "np"}
    expected = np.rint(255 * pipeline(batch_size=IMAGES, **options).images)
    with SparseEngine.load(engine_file, threads=1, autotune=False) as engine:
        found = engine.sample(IMAGES, steps=STEPS, sampler="ddim", spacing="leading", noise=start, output="uint8")
    assert found.shape == expected.shape == (IMAGES, 8, 8, 3)
    assert np.abs(found.astype(float) - expected).max() <= 1
    assert found.std() > 20  # pictures, not one grey


def test_on_the_command_line(folder: Path, engine_file: Path, tmp_path: Path) -> None:
    plot, pictures = tmp_path / "layers.png", tmp_path / "x.npz"
    assert run(["inspect", str(folder), "--plot", str(plot)]) == 0
    assert plot.stat().st_size > 1000
    assert run(["verify", str(engine_file), "--against", str(folder)]) == 0
    assert run(["sample", str(engine_file), "-n", "2", "--steps", "2", "-o", str(pictures)]) == 0
    assert run(["inspect", str(engine_file)]) == 0


@pytest.mark.parametrize("part", ["unet", "root", "unet_ema"])
def test_wherever_its_files_lie(part: str, folder: Path, tmp_path: Path) -> None:
    """The pipeline's folder, the network's own, all files at the root (google/ddpm-*), the averaged ones first."""
    expected = load_model(folder)
    if part == "unet":
        path = folder / "unet"
    elif part == "root":
        path = tmp_path
        UNet2DModel.from_pretrained(folder / "unet").save_pretrained(path)
        DDPMScheduler.from_pretrained(folder / "scheduler").save_pretrained(path)
    else:
        path = tmp_path
        UNet2DModel(**GOOGLE).save_pretrained(path / "unet")
        UNet2DModel.from_pretrained(folder / "unet").save_pretrained(path / "unet_ema")
        DDPMScheduler.from_pretrained(folder / "scheduler").save_pretrained(path / "scheduler")
    model = load_model(path)
    assert (model.config, model.recipe) == (expected.config, expected.recipe)
    assert all(np.array_equal(model.checkpoint.state[name], each) for name, each in expected.checkpoint.state.items())


def test_latents_are_told_by_what_decodes_them(tmp_path: Path) -> None:
    """As CompVis/ldm-celebahq-256 is: three channels, and no pixels."""
    UNet2DModel(**GOOGLE).save_pretrained(tmp_path / "unet")
    assert load_model(tmp_path).recipe.value_range == (-1.0, 1.0)
    (tmp_path / "vqvae").mkdir()
    model = load_model(tmp_path)
    assert model.recipe.value_range is None
    assert "latents: vqvae/ beside the network decodes what it draws" in model.notes


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of the folder without its weights, and what they were."""
    network = tmp_path / "p" / "unet"
    network.mkdir(parents=True)
    (network / "config.json").write_bytes((folder / "unet" / "config.json").read_bytes())
    return tmp_path / "p", load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


CASES = {**damage.FILES, **damage.NETWORKS}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_damaged_weights(case: Damage, damaged: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, state = damaged
    file = path / "unet" / f"diffusion_pytorch_model{case.suffix}"
    case.write(file, state)
    with pytest.raises(CheckpointError, match=case.message):
        load_model(path)
    assert not trace_of(file).exists()


@pytest.mark.parametrize("content, message", damage.CONFIGURATIONS.values(), ids=damage.CONFIGURATIONS)
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_damaged_configurations(name: str, content: bytes, message: str, folder: Path, tmp_path: Path) -> None:
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (folder / part).iterdir():
            (tmp_path / part / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_damage_is_two_lines_on_the_command_line(
    damaged: tuple[Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = damaged
    damage.NETWORKS["a missing key"].write(path / "unet" / "diffusion_pytorch_model.bin", state)
    for command in (["inspect", str(path)], ["build", str(path), "--sparse"]):
        assert run(command) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 2
