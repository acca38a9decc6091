"""SD3 and SD3.5 against diffusers' own network in float64, and what is read, assumed and refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import bake
from sparse_engine.export.families import recognise
from sparse_engine.export.families.sd3 import FAMILY, SD3Config
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower
from tests.export.diffusers_networks import (
    SHARD,
    inputs_of,
    masked,
    randomised,
    step_errors,
)
from tests.export.references import Array, relative_error

LENGTH = 7
MASKED = tuple(
    f"{layer}.weight"
    for layer in (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
)
SIZES: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 32,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 9,
}
SD35 = {**SIZES, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
NETWORKS = {
    "3": SIZES,
    "3.5": SD35,
    "3.5 large": {**SIZES, "qk_norm": "rms_norm", "patch_size": 1, "pos_embed_max_size": 8, "out_channels": None},
}


def saved(folder: Path, sizes: dict[str, Any], **options: Any) -> Any:
    """diffusers' network, and its pipeline's folder as far as it is read."""
    network = randomised(SD3Transformer2DModel(**sizes))
    network.save_pretrained(folder / "transformer", **options)
    return network


def load(folder: Path, **given: Any) -> Model:
    return load_model(folder, **{"context_length": LENGTH, **given})


def predicted(network: Any, x: Array, t: Array, told: dict[str, Array]) -> Array:
    """diffusers' prediction in float64."""
    wide = {name: torch.from_numpy(each).double() for name, each in told.items()}
    return network.double()(
        torch.from_numpy(x).double(),
        encoder_hidden_states=wide["context"],
        pooled_projections=wide["pooled"],
        timestep=torch.from_numpy(t),
        return_dict=False,
    )[0].numpy()


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
        masked(reference, MASKED)
    for batch in (1, 3, 17):
        x, t, told = inputs_of(model, batch)
        rows = {name: each[0] for name, each in told.items()}
        found = network(
            *(torch.from_numpy(each) for each in (x, t)), **{k: torch.from_numpy(v) for k, v in rows.items()}
        )
        assert relative_error(found.numpy(), predicted(reference, x, t, rows)) < 1e-4


def test_exported_step_is_diffusers_network_and_the_solver(tmp_path: Path) -> None:
    sizes = {**SD35, "num_layers": 2, "dual_attention_layers": (0,)}
    reference = masked(saved(tmp_path, sizes), MASKED)
    errors = step_errors(load(tmp_path), lambda *told: predicted(reference, *told), tmp_path)
    assert max(errors) < 1e-4


def test_another_size_takes_the_middle_of_the_positions(tmp_path: Path) -> None:
    reference = saved(tmp_path, SIZES)
    for size in (4, 16):
        model = load(tmp_path, image_size=size)
        x, t, told = inputs_of(model, 2)
        assert x.shape == (2, 4, size, size)
        rows = {name: each[0] for name, each in told.items()}
        network = model.network(model.checkpoint.state)
        assert network.pos_embed.pos_embed.shape == (1, (size // 2) ** 2, 48)  # not the whole table
        found = network(
            *(torch.from_numpy(each) for each in (x, t)), **{k: torch.from_numpy(v) for k, v in rows.items()}
        )
        assert relative_error(found.numpy(), predicted(reference, x, t, rows)) < 1e-4
    with pytest.raises(CheckpointError, match="image_size 20 is 10 patches wide.* positions for 9\n.*take 18 or less"):
        load(tmp_path, image_size=20)
    with pytest.raises(CheckpointError, match="expected a multiple of the patch size 2"):
        load(tmp_path, image_size=7)


def test_shards_are_the_same_network(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", SIZES)
    whole.save_pretrained(tmp_path / "shards" / "transformer", max_shard_size=SHARD)
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 2
    states = [load(tmp_path / name).checkpoint.state for name in ("whole", "shards")]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_manifest_holds_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path, SD35)
    config = load(tmp_path).config
    assert SD3Config.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert (config.dual_layers, config.qk_norm, config.heads, config.table_side) == ((0, 1), True, 3, 9)


def test_how_it_was_trained(tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    recipe = load(tmp_path).recipe
    assert (recipe.schedule, recipe.prediction, recipe.sampler) == ({"name": "flow", "shift": 3.0}, "flow", "euler-ode")
    assert recipe.value_range is None
    FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(tmp_path / "scheduler")
    model = load(tmp_path)
    assert model.recipe.schedule == {"name": "flow", "shift": 2.5, "time_scale": 1000.0}
    assert any("FlowMatchEulerDiscreteScheduler" in note for note in model.notes)
    with pytest.raises(OptionError, match="sampler ddim is not offered on schedule flow"):
        load(tmp_path, sampler="ddim")
    with pytest.raises(OptionError, match="prediction 'eps' on schedule flow, expected one of flow, x0"):
        load(tmp_path, prediction="eps")


def test_the_text_has_to_be_given_with_its_none(tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    assert [(each.name, each.shape, each.null, each.needed) for each in load(tmp_path).conditions] == [
        ("context", (LENGTH, 32), None, True),
        ("pooled", (20,), None, True),
    ]
    model = load_model(tmp_path)
    assert model.conditions[0].shape == (333, 32)
    assert any(note.startswith("context_length = 333: 77 vectors of CLIP and 256 of T5") for note in model.notes)


def test_without_a_configuration(tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    state = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "alone.safetensors")
    assert recognise({name: tuple(each.shape) for name, each in state.items()}, "x") is FAMILY
    with pytest.raises(CheckpointError, match="size of the image cannot be read off the weights.*\n.*config.json"):
        load(tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="number of attention heads cannot be read"):
        load(tmp_path / "alone.safetensors", image_size=8)
    assert load(tmp_path / "alone.safetensors", image_size=8, heads=3).config == load(tmp_path).config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 4}, "depth is 4 in the given configuration, but the weights have 3"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'.*expected 'rms_norm'"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8 .*3 heads make 24, but the weights have embed_dim 48"),
        ({"sample_size": "8"}, "the size of the image is '8' in the given configuration"),
        ({"dual_attention_layers": [1]}, r"dual_layers is \(1,\)"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("precision, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_lower_precisions(precision: str, bound: float, tmp_path: Path) -> None:
    reference = saved(tmp_path, SD35)
    model = load(tmp_path)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    x, t, told = inputs_of(model, 3)
    rows = {name: each[0] for name, each in told.items()}
    found = network(*(torch.from_numpy(each) for each in (x, t)), **{k: torch.from_numpy(v) for k, v in rows.items()})
    assert 0 < relative_error(found.float().numpy(), predicted(reference, x, t, rows)) < bound


def test_how_often_a_layers_weights_are_applied(tmp_path: Path) -> None:
    saved(tmp_path, SD35)
    config = load(tmp_path).config
    block = "transformer_blocks.0"
    assert {FAMILY.positions(config, f"{block}.{name}") for name in ("attn.to_q", "attn2.to_k", "ff.net.2")} == {16}
    of_text = ("attn.add_k_proj", "attn.to_add_out", "ff_context.net.0.proj")
    assert {FAMILY.positions(config, f"{block}.{name}") for name in of_text} == {LENGTH}
    ones = (f"{block}.norm1.linear", f"{block}.norm1_context.linear", "norm_out.linear", "time_text_embed.x")
    assert {FAMILY.positions(config, name) for name in ones} == {1}
    assert (FAMILY.positions(config, "context_embedder"), FAMILY.positions(config, "pos_embed.proj")) == (LENGTH, 16)
