"""Folders that diffusers writes: which weights are taken, what the network is, and what its scheduler says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import save_file

from sparse_engine.errors import CheckpointError
from sparse_engine.export.checkpoint import load_checkpoint
from sparse_engine.export.families import FAMILIES, class_of
from sparse_engine.export.families.uvit import UViT, UViTConfig
from sparse_engine.export.model import load_model
from sparse_engine.sampling import make_trajectory, schedule_from_dict

WEIGHTS = "diffusion_pytorch_model"
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "num_layers": 1,
    "patch_size": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 5,
}


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**SIZES)


@pytest.fixture
def pipeline(network: Any, tmp_path: Path) -> Path:
    """A pipeline's folder with a network and no scheduler."""
    folder = tmp_path / "pipeline"
    network.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (folder / "vae").mkdir()
    (folder / "vae" / f"{WEIGHTS}.safetensors").write_bytes(b"not looked at")
    return folder


def is_of(state: dict[str, np.ndarray], network: Any) -> bool:
    expected = {name: value.numpy() for name, value in network.state_dict().items()}
    return state.keys() == expected.keys() and all(np.array_equal(state[name], expected[name]) for name in expected)


def test_a_pipeline_its_network_and_its_file_are_one_checkpoint(pipeline: Path, network: Any) -> None:
    part = pipeline / "transformer"
    found = [load_checkpoint(path) for path in (pipeline, part, part / f"{WEIGHTS}.safetensors")]
    assert all(is_of(each.state, network) for each in found)
    assert {each.path for each in found} == {part / f"{WEIGHTS}.safetensors"}
    assert {each.config["_class_name"] for each in found} == {"DiTTransformer2DModel"}
    assert found[0].notes == ["the network is transformer/ of pipeline"]
    assert load_model(pipeline).family.name == "dit-diffusers"


def test_files_at_the_root(network: Any, tmp_path: Path) -> None:
    """As google/ddpm-* have them, with the scheduler's configuration among them."""
    network.save_pretrained(tmp_path)
    DDIMScheduler(beta_start=2e-4).save_pretrained(tmp_path)
    (tmp_path / "unet").mkdir()  # something else's
    model = load_model(tmp_path)
    assert is_of(model.checkpoint.state, network)
    assert isinstance(model.recipe.schedule, dict)
    assert model.recipe.schedule["beta_start"] == 2e-4


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards(safe: bool, network: Any, tmp_path: Path) -> None:
    part = tmp_path / "transformer"
    network.save_pretrained(part, max_shard_size="20KB", safe_serialization=safe)
    suffix = "safetensors" if safe else "bin"
    shards = sorted(part.glob(f"{WEIGHTS}-*.{suffix}"))
    assert len(shards) > 2
    assert is_of(load_checkpoint(tmp_path).state, network)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lists 1 files that are not beside it: {shards[1].name}\n.*download"):
        load_checkpoint(tmp_path)
    (part / f"{WEIGHTS}.{suffix}.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"is one of {len(shards)} shards.*\n.*{suffix}\.index\.json beside it"):
        load_checkpoint(tmp_path)


def test_full_weights_come_before_variants_and_safetensors_before_pickles(network: Any, tmp_path: Path) -> None:
    half = DiTTransformer2DModel(**SIZES).half()
    half.save_pretrained(tmp_path, variant="fp16")
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    half.bfloat16().save_pretrained(tmp_path, variant="bf16")
    taken = load_checkpoint(tmp_path)
    assert taken.path.name == f"{WEIGHTS}.fp16.safetensors"
    assert f"{taken.path.name} taken, not {WEIGHTS}.bf16.safetensors" in taken.notes
    assert any(note.startswith("only fp16 weights are there") for note in taken.notes)
    network.save_pretrained(tmp_path, safe_serialization=False)
    assert load_checkpoint(tmp_path).path.name == f"{WEIGHTS}.bin"
    network.save_pretrained(tmp_path)
    taken = load_checkpoint(tmp_path)
    assert taken.path.name == f"{WEIGHTS}.safetensors"
    assert is_of(taken.state, network)
    assert f"{WEIGHTS}.safetensors taken, not {WEIGHTS}.bin" in taken.notes
    assert not any("only" in note for note in taken.notes)


def test_shards_of_a_variant(network: Any, tmp_path: Path) -> None:
    network.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    taken = load_checkpoint(tmp_path)
    assert taken.path.name == f"{WEIGHTS}.safetensors.index.fp16.json"
    assert all(array.dtype == np.float32 for array in taken.state.values())


def test_averaged_weights_of_a_training_come_first(pipeline: Path) -> None:
    averaged = DiTTransformer2DModel(**SIZES)
    averaged.save_pretrained(pipeline / "transformer_ema")
    taken = load_checkpoint(pipeline)
    assert is_of(taken.state, averaged)
    assert taken.notes[0] == "the network is transformer_ema/ of pipeline"


def test_folders_without_one_network(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "unet").mkdir()
    with pytest.raises(CheckpointError, match="holds transformer and unet: two networks\n.*name one"):
        load_checkpoint(pipeline)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has model_index.json and no network; expected transformer/ or unet/"):
        load_checkpoint(empty)


def test_the_configuration_is_demanded(pipeline: Path) -> None:
    (pipeline / "transformer" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"transformer has no config\.json; expected .*\n.*download it too"):
        load_checkpoint(pipeline)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_networks_that_are_not_offered_are_named(pipeline: Path) -> None:
    config = pipeline / "transformer" / "config.json"
    change(config, _class_name="FluxTransformer2DModel")
    with pytest.raises(CheckpointError, match="is a FluxTransformer2DModel, which is not offered") as caught:
        load_model(pipeline)
    for family in FAMILIES:
        assert all(name in str(caught.value) for name in family.class_names)
    change(config, _class_name="Transformer2DModel", norm_type="layer_norm")
    with pytest.raises(CheckpointError, match="is a Transformer2DModel:layer_norm, which is not offered"):
        load_model(pipeline)
    change(config, norm_type="ada_norm_zero")
    assert load_model(pipeline).family.name == "dit-diffusers"


def test_no_two_families_take_one_class() -> None:
    names = [name for family in FAMILIES for name in family.class_names]
    assert len(names) == len(set(names))
    assert class_of({}) is None


def test_foreign_entries_are_no_matter(pipeline: Path) -> None:
    change(
        pipeline / "transformer" / "config.json",
        _name_or_path="x/y",
        _use_default_values=["norm_eps"],
        decay=0.9999,
        step=3,
    )
    load_model(pipeline)


BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize(
    "scheduler, schedule, prediction, sampler",
    [
        (DDPMScheduler(), {"betas": "linear", **BETAS}, "eps", "ddpm"),
        (
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample"),
            {"betas": "scaled-linear", "beta_start": 0.00085, "beta_end": 0.012},
            "x0",
            "ddim",
        ),
        (DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"), {"betas": "cosine"}, "eps", "dpm-solver++"),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"),
            {"betas": "linear", **BETAS},
            "v",
            "sde-dpm-solver++",
        ),
        (EulerDiscreteScheduler(num_train_timesteps=500), {"betas": "linear", **BETAS, "steps": 500}, "eps", "ddim"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), {"name": "flow", "shift": 3.0}, "flow", "euler-ode"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0, prediction_type="flow_prediction"),
            {"name": "flow", "shift": 2.0},
            "flow",
            "dpm-solver++",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, DDPMScheduler) else None,
)
def test_schedulers(scheduler: Any, schedule: dict[str, Any], prediction: str, sampler: str, pipeline: Path) -> None:
    scheduler.save_pretrained(pipeline / "scheduler")
    model = load_model(pipeline)
    steps = schedule.pop("steps", 1000)
    expected = {"name": "discrete", "steps": steps, "time_scale": float(steps), "time_shift": -1.0}
    if schedule.get("name") == "flow":
        expected = {"time_scale": 1000.0}
    assert model.recipe.schedule == expected | schedule
    assert (model.recipe.prediction, model.recipe.sampler) == (prediction, sampler)
    assert any(f"from {type(scheduler).__name__} in" in note for note in model.notes)
    assert load_model(pipeline / "transformer").recipe == model.recipe
    # The times that the network was trained at, first and last.
    found = schedule_from_dict(model.recipe.schedule)
    if schedule.get("name") != "flow":
        assert found.network_time(found.t_min) == pytest.approx(0.0)
        assert found.network_time(1.0) == steps - 1
        expected_alpha = scheduler.alphas_cumprod.double().numpy()
        np.testing.assert_allclose(found.alpha((np.arange(steps) + 1) / steps) ** 2, expected_alpha, rtol=1e-4)
    make_trajectory(model.recipe.sampler, found, 4, prediction=prediction)


def test_what_is_said_wins_over_the_scheduler(pipeline: Path) -> None:
    DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_pretrained(pipeline / "scheduler")
    recipe = load_model(pipeline, schedule="vp-linear", prediction="eps", sampler="ddim").recipe
    assert (recipe.schedule, recipe.prediction, recipe.sampler) == ("vp-linear", "eps", "ddim")


@pytest.mark.parametrize(
    "cls, values, message",
    [
        (
            DDPMScheduler,
            {"trained_betas": [0.1, 0.2]},
            r"trained_betas is \[0.1, 0.2\], which is not offered\n.*--schedule",
        ),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, which is not offered"),
        (DDPMScheduler, {"thresholding": True}, "thresholding is set, which is not offered.*\n.*set it to false"),
        (DDPMScheduler, {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'.*one of linear, scaled_linear"),
        (DDPMScheduler, {"beta_start": "0"}, "beta_start is '0'; expected a number"),
        (DDPMScheduler, {"num_train_timesteps": 0.5}, "num_train_timesteps is 0.5; expected a number"),
        (DDPMScheduler, {"prediction_type": "score"}, "prediction_type is 'score'.*one of epsilon"),
        (FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}, "use_dynamic_shifting is set"),
        (FlowMatchEulerDiscreteScheduler, {"shift_terminal": 0.1}, "shift_terminal is 0.1, which is not offered"),
        (FlowMatchEulerDiscreteScheduler, {"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler has no betas"),
    ],
)
def test_schedulers_that_are_not_offered(cls: Any, values: dict[str, Any], message: str, pipeline: Path) -> None:
    cls().save_pretrained(pipeline / "scheduler")
    change(pipeline / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(pipeline)
    if "thresholding" not in values:
        assert load_model(pipeline, schedule="vp-linear", prediction="eps", sampler="ddim").recipe.prediction == "eps"


@pytest.mark.parametrize(
    "name, sampler, said",
    [
        ("PNDMScheduler", "dpm-solver++", "PNDMScheduler is not offered: dpm-solver++ is the nearest"),
        ("EulerAncestralDiscreteScheduler", "ddpm", "ddpm is the nearest; say another with --sampler"),
        ("LCMScheduler", "ddim", "LCMScheduler is not offered: no sampler here is near it"),
    ],
)
def test_the_nearest_sampler_is_said_aloud(name: str, sampler: str, said: str, pipeline: Path) -> None:
    DDIMScheduler().save_pretrained(pipeline / "scheduler")
    change(pipeline / "scheduler" / "scheduler_config.json", _class_name=name)
    model = load_model(pipeline)
    assert model.recipe.sampler == sampler
    assert any(said in note for note in model.notes)


def test_what_has_to_be_said_at_each_call_is_noted(pipeline: Path) -> None:
    DDPMScheduler(variance_type="fixed_large", clip_sample=False).save_pretrained(pipeline / "scheduler")
    notes = load_model(pipeline).notes
    assert "variance_type is fixed_large: sample with --variance large" in notes
    assert "clip_sample is false: of pixels, sample with --no-clip" in notes


def test_times_that_only_diffusers_visits_are_noted(pipeline: Path) -> None:
    DPMSolverMultistepScheduler(use_karras_sigmas=True).save_pretrained(pipeline / "scheduler")
    assert any(note.startswith("use_karras_sigmas of scheduler_config.json") for note in load_model(pipeline).notes)


@pytest.mark.parametrize("content, message", [("{", "is not JSON"), ("[]", "holds a list; expected an object")])
def test_a_scheduler_that_cannot_be_read(content: str, message: str, pipeline: Path) -> None:
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(pipeline)


def test_a_folder_of_our_own_network_under_diffusers_name(tmp_path: Path) -> None:
    """A file's name alone demands no configuration: its keys say what it is."""
    state = UViT(UViTConfig(8, 4, 3, 32, 2, 2)).state_dict()
    save_file(state, tmp_path / f"{WEIGHTS}.safetensors")
    assert load_model(tmp_path, heads=2).family.name == "uvit"
