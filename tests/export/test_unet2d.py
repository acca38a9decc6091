"""UNet2DModel against diffusers' own in float64, ermongroup's names for it; what is read, assumed and refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from sparse_engine.export.bake import bake
from sparse_engine.export.families.unet2d import FAMILY
from sparse_engine.export.model import Model, load_model
from tests.export.diffusers_networks import inputs_of, randomised, step_errors
from tests.export.references import Array, relative_error
from tests.export.test_unet_ddpm import two_of_four_along_inputs

GOOGLE: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
DEFAULTS = {**GOOGLE, "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "google/ddpm": GOOGLE,
    "class-conditional, heads of 8, 2 layers": {
        **DEFAULTS,
        "attention_head_dim": 8,
        "num_class_embeds": 5,
        "layers_per_block": 2,
        "time_embedding_dim": 48,
    },
    "scale and shift, centred, not square": {
        **DEFAULTS,
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True,
        "sample_size": (8, 12),
        "attn_norm_num_groups": 8,
    },
    "one stage, odd, heads that do not fill it": {
        **DEFAULTS,
        "sample_size": (5, 7),
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 6,
    },
    "no attention": {
        **DEFAULTS,
        "add_attention": False,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    },
}
TIMES = ("time_embedding", "time_emb_proj", "conv_in", "conv_out", "class_embedding")


def saved(folder: Path, sizes: dict[str, Any]) -> Any:
    """diffusers' network, and its pipeline's folder."""
    network = randomised(UNet2DModel(**sizes))
    network.conv_out.weight.mul_(0.3)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return network


def masked_state(state: dict[str, Array]) -> dict[str, Array]:
    """2:4 in all but ends and times, which the family leaves dense."""
    baked = two_of_four_along_inputs(state)
    return {name: state[name] if any(part in name for part in TIMES) else each for name, each in baked.items()}


def predicted(network: Any, x: Array, t: Array, told: dict[str, Array]) -> Array:
    """diffusers' prediction in float64."""
    labels = {"class_labels": torch.from_numpy(told["y"])} if told else {}
    return network.double()(torch.from_numpy(x).double(), torch.from_numpy(t).double(), return_dict=False, **labels)[
        0
    ].numpy()


def told_to(model: Model, batch: int) -> tuple[Array, Array, dict[str, Array]]:
    x, t, told = inputs_of(model, batch)
    return x, t, {name: np.arange(batch) % model.num_classes for name in told}


def found_by(network: Any, x: Array, t: Array, told: dict[str, Array]) -> Array:
    return network(
        torch.from_numpy(x), torch.from_numpy(t), **{k: torch.from_numpy(v) for k, v in told.items()}
    ).numpy()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
def test_network_is_that_of_diffusers(
    sizes: dict[str, Any], sparse: bool, tmp_path: Path, one_torch_thread: None
) -> None:
    reference = saved(tmp_path, sizes)
    model = load_model(tmp_path)
    assert model.family is FAMILY
    network = model.network(bake(model, "magnitude" if sparse else "none").state)
    if sparse:
        baked = masked_state({name: each.numpy() for name, each in reference.state_dict().items()})
        reference.load_state_dict({name: torch.from_numpy(each) for name, each in baked.items()})
    for batch in (1, 3, 17):
        told = told_to(model, batch)
        assert relative_error(found_by(network, *told), predicted(reference, *told)) < 1e-4


def test_exported_step_is_diffusers_network_and_the_solver(tmp_path: Path) -> None:
    reference = saved(tmp_path, GOOGLE)
    baked = masked_state({name: each.numpy() for name, each in reference.state_dict().items()})
    reference.load_state_dict({name: torch.from_numpy(each) for name, each in baked.items()})
    errors = step_errors(load_model(tmp_path), lambda *told: predicted(reference, *told), tmp_path)
    assert max(errors) < 1e-4
