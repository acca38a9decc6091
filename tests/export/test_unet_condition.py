"""UNet2DConditionModel against diffusers' own in float64: SD1.5's form, SD2.1's, SDXL's, an LCM's; what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sparse_engine import SparseEngine
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import bake
from sparse_engine.export.build import build_engine
from sparse_engine.export.families import recognise
from sparse_engine.export.families.unet_condition import FAMILY, UNetConditionConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.options import ModelOptions
from sparse_engine.export.precision import lower
from sparse_engine.export.verify import verify_engine
from tests.export.diffusers_networks import inputs_of, randomised, step_errors
from tests.export.references import Array, relative_error
from tests.export.test_unet2d import TIMES, change, found_by
from tests.export.test_unet_ddpm import two_of_four_along_inputs

LENGTH = 7
SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SDXL = {
    **SD15,
    "use_linear_projection": True,
    "attention_head_dim": (2, 4),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "1.5": SD15,
    "2.1, linears, heads by stage": {
        **SD15,
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "upcast_attention": True,
    },
    "XL": SDXL,
    "an LCM": {**SD15, "time_cond_proj_dim": 12},
    "odd, a label": {
        **SD15,
        "sample_size": (11, 7),
        "block_out_channels": (16, 16, 32),
        "num_class_embeds": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
ENDS = (*TIMES, "add_embedding")


def saved(folder: Path, sizes: dict[str, Any]) -> Any:
    """diffusers' network, and its pipeline's folder as far as it is read."""
    network = randomised(UNet2DConditionModel(**sizes))
    network.conv_out.weight.mul_(0.3)
    network.save_pretrained(folder / "unet")
    return network


def load(folder: Path, **given: Any) -> Model:
    return load_model(folder, **{"context_length": LENGTH, **given})


def make_sparse(network: Any) -> Any:
    """2:4 in all but ends and times, which the family leaves dense."""
    state = {name: each.numpy() for name, each in network.state_dict().items()}
    baked = {
        name: state[name] if any(part in name for part in ENDS) else each
        for name, each in two_of_four_along_inputs(state).items()
    }
    network.load_state_dict({name: torch.from_numpy(each) for name, each in baked.items()})
    return network


def predicted(network: Any, x: Array, t: Array, told: dict[str, Array]) -> Array:
    """diffusers' prediction in float64."""
    wide = {name: torch.from_numpy(each) for name, each in told.items()}
    wide = {name: each.double() if each.is_floating_point() else each for name, each in wide.items()}
    added = {"text_embeds": wide["pooled"], "time_ids": wide["time_ids"]} if "pooled" in wide else None
    return network.double()(
        torch.from_numpy(x).double(),
        torch.from_numpy(t),
        wide["context"],
        class_labels=wide.get("y"),
        timestep_cond=wide.get("timestep_cond"),
        added_cond_kwargs=added,
        return_dict=False,
    )[0].numpy()


def told_to(model: Model, batch: int) -> tuple[Array, Array, dict[str, Array]]:
    x, t, told = inputs_of(model, batch)
    rows = {name: each[0] for name, each in told.items()}
    if "y" in rows:
        rows["y"] = np.arange(batch) % model.num_classes
    if "time_ids" in rows:
        rows["time_ids"] = np.resize(np.array([64, 48, 3, 0, 56, 40], np.float32), (batch, 6))
    return x, t, rows


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
def test_network_is_that_of_diffusers(
    sizes: dict[str, Any], sparse: bool, tmp_path: Path, one_torch_thread: None
) -> None:
    reference = saved(tmp_path, sizes)
    model = load(tmp_path)
    assert model.family is FAMILY
    network = model.network(bake(model, "magnitude" if sparse else "none").state)
    if sparse:
        make_sparse(reference)
    for batch in (1, 3, 17):
        told = told_to(model, batch)
        assert relative_error(found_by(network, *told), predicted(reference, *told)) < 1e-4


def test_exported_step_is_diffusers_network_and_the_solver(tmp_path: Path) -> None:
    """SDXL's form, of an odd size: what was doubled is cut."""
    sizes = {**SDXL, "layers_per_block": 1, "transformer_layers_per_block": 1, "sample_size": (7, 5)}
    sizes |= {"up_block_types": ("UpBlock2D", "UpBlock2D")}
    reference = make_sparse(saved(tmp_path, sizes))
    errors = step_errors(load(tmp_path), lambda *told: predicted(reference, *told), tmp_path)
    assert max(errors) < 1e-4


def test_what_it_is_told(tmp_path: Path) -> None:
    saved(tmp_path / "sdxl", SDXL)
    model = load_model(tmp_path / "sdxl")
    assert [(each.name, each.shape, each.null, each.needed) for each in model.conditions] == [
        ("context", (77, 24), None, True),
        ("pooled", (20,), None, True),
        ("time_ids", (6,), "same", True),
    ]
    assert any(note.startswith("context_length = 77: not in the weights; CLIP's") for note in model.notes)
    refiner = {**SDXL, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560}
    saved(tmp_path / "refiner", refiner)
    told = load_model(tmp_path / "refiner").conditions
    assert [(each.name, each.shape) for each in told[1:]] == [("pooled", (1280,)), ("time_ids", (5,))]
    saved(tmp_path / "lcm", NETWORKS["an LCM"])
    told = load_model(tmp_path / "lcm").conditions
    assert [(each.name, each.shape, each.null) for each in told[1:]] == [("timestep_cond", (12,), "same")]


def test_how_it_was_trained(tmp_path: Path) -> None:
    saved(tmp_path, SD15)
    recipe = load(tmp_path).recipe
    assert (recipe.schedule, recipe.prediction, recipe.value_range) == (
        {"name": "stable-diffusion", "time_shift": -1.0},
        "eps",
        None,
    )
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "scheduler")
    model = load(tmp_path)
    assert (model.recipe.prediction, model.recipe.sampler) == ("v", "ddim")
    assert any("from DDIMScheduler in" in note for note in model.notes)


def test_whether_2x_predicts_v_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, {**SD15, "cross_attention_dim": 1024})
    with pytest.raises(CheckpointError, match="768 predicts v, and their weights look alike\n.*--prediction"):
        load(tmp_path)
    given = {"schedule": "stable-diffusion", "prediction": "v"}
    assert load(tmp_path, **given).recipe.prediction == "v"
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    assert load(tmp_path).recipe.prediction == "v"


def test_an_lcms_engine_says_what_it_is_for(tmp_path: Path) -> None:
    """``network`` is diffusers' own; samplers are refused, for its own is none of them."""
    sizes = {**SD15, "time_cond_proj_dim": 12, "block_out_channels": (16,)}
    sizes |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    reference = saved(tmp_path, sizes)
    file = tmp_path / "lcm.sengine"
    build_engine(tmp_path, file, model=ModelOptions(context_length=LENGTH), backend="onnxruntime")
    assert verify_engine(file, tmp_path).passed
    with SparseEngine.load(file, threads=1) as engine:
        engine.warmup(1)
        x, t, told = told_to(load(tmp_path), 3)
        assert relative_error(engine.network(x, t, conditioning=told), predicted(reference, x, t, told)) < 1e-4
        for sampler in (None, "ddim"):
            with pytest.raises(OptionError, match="latent consistency model, whose own sampler is not offered: use"):
                engine.sample(3, steps=4, sampler=sampler, conditioning=told, output="float")


def test_which_layers_are_masked_and_their_macs(tmp_path: Path) -> None:
    saved(tmp_path, SDXL)
    layers = {each.name: each for each in bake(load(tmp_path), "magnitude").layers}
    dense = {name for name, each in layers.items() if not each.masked}
    assert dense == {name for name in layers if any(part in name for part in ENDS)}
    assert all(each.hardware_24 for each in layers.values() if each.masked)
    block = "down_blocks.1.attentions.0.transformer_blocks.1"
    assert layers[f"{block}.attn1.to_q"].macs == 32 * 32 * 16
    assert layers[f"{block}.attn2.to_k"].macs == 24 * 32 * LENGTH
    assert layers[f"{block}.ff.net.0.proj"].macs == 32 * 256 * 16


def test_a_manifest_holds_the_configuration(tmp_path: Path) -> None:
    for index, sizes in enumerate(NETWORKS.values()):
        saved(tmp_path / str(index), sizes)
        config = load(tmp_path / str(index)).config
        assert UNetConditionConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_its_configuration_is_demanded(tmp_path: Path) -> None:
    saved(tmp_path, SD15)
    state = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "alone.safetensors")
    assert recognise({name: tuple(each.shape) for name, each in state.items()}, "x") is FAMILY
    with pytest.raises(CheckpointError, match=r"groups, eps, .* do not say them.*\n.*keep config\.json beside"):
        load(tmp_path / "alone.safetensors", image_size=8)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"in_channels": 9}, r"in_channels is 9 and out_channels is 4: an inpainting network, .*\n.*denoises alone"),
        ({"in_channels": 8}, r"in_channels is 8 and out_channels is 4: .*\(inpainting, editing, upscaling\)"),
        ({"cross_attention_dim": 32}, "context_dim is 32 in the given configuration, but the weights have 24"),
        ({"use_linear_projection": True}, "linear_projection is True in the given configuration, .* have False"),
        ({"transformer_layers_per_block": 2}, r"down_attention is \(2, 0\) in the given .* have \(1, 0\)"),
        ({"attention_head_dim": 3}, r"attention_head_dim is \(3, 3\) .*expected the number of heads"),
        ({"attention_head_dim": [2, 2, 2]}, r"attention_head_dim is \(2, 2, 2\)"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}, "'SimpleCrossAttnDownBlock2D', which is"),
        ({"addition_embed_type": "image"}, "addition_embed_type is 'image'.*expected 'text_time'"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type is 'text_proj'.*expected None"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"downsample_padding": 0, "sample_size": 9}, "the size of the image is 9; expected a multiple of 2"),
    ],
)
def test_configurations_of_other_networks(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, SD15)
    change(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_sizes_that_leave_no_room_for_a_pooled_text(tmp_path: Path) -> None:
    saved(tmp_path, SDXL)
    change(tmp_path, addition_time_embed_dim=12)
    with pytest.raises(CheckpointError, match=r"has 68 columns, 6 x 12 of them of sizes.*\n.*addition_time_embed_dim"):
        load(tmp_path)


@pytest.mark.parametrize("precision, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_lower_precisions(precision: str, bound: float, tmp_path: Path) -> None:
    reference = saved(tmp_path, SDXL)
    model = load(tmp_path)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    told = told_to(model, 3)
    rows = {name: torch.from_numpy(each) for name, each in told[2].items()}
    found = network(torch.from_numpy(told[0]), torch.from_numpy(told[1]), **rows).float().numpy()
    assert 0 < relative_error(found, predicted(reference, *told)) < bound
