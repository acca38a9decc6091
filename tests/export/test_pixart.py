"""PixArt-alpha and -Sigma against diffusers' own network in float64, and what is read, assumed and refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from sparse_engine.errors import CheckpointError
from sparse_engine.export.bake import bake
from sparse_engine.export.families import recognise
from sparse_engine.export.families.pixart import FAMILY, PixArtConfig
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
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2"),
    )
)
SIGMA: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "cross_attention_dim": 48,
    "caption_channels": 32,
}
ALPHA = {**SIGMA, "use_additional_conditions": True, "interpolation_scale": 2}
NETWORKS = {
    "sigma": SIGMA,
    "alpha": ALPHA,
    "plain": {
        **SIGMA,
        "out_channels": None,
        "caption_channels": None,
        "cross_attention_dim": 24,
        "attention_bias": False,
    },
}


def saved(folder: Path, sizes: dict[str, Any], **options: Any) -> Any:
    """diffusers' network, and its pipeline's folder as far as it is read."""
    network = randomised(PixArtTransformer2DModel(**sizes))
    network.save_pretrained(folder / "transformer", **options)
    return network


def load(folder: Path, **given: Any) -> Model:
    return load_model(folder, **{"context_length": LENGTH, **given})


def inputs(model: Model, batch: int) -> tuple[Array, Array, dict[str, Array]]:
    """With the mask of a text of another length in each row, and pictures of several sizes."""
    x, t, told = inputs_of(model, batch)
    rows = {name: each[0] for name, each in told.items()}
    rows["context_mask"] = (np.arange(LENGTH) <= np.arange(batch)[:, None] % LENGTH).astype(np.float32)
    if "resolution" in rows:
        rows["resolution"] = np.resize(np.array([[1024, 1024], [512, 768], [64, 64]], np.float32), (batch, 2))
        rows["aspect_ratio"] = rows["resolution"][:, :1] / rows["resolution"][:, 1:]
    return x, t, rows


def predicted(network: Any, x: Array, t: Array, told: dict[str, Array], channels: int | None = 4) -> Array:
    """diffusers' prediction in float64; its first channels."""
    wide = {name: torch.from_numpy(each).double() for name, each in told.items()}
    sizes = {name: wide.get(name) for name in ("resolution", "aspect_ratio")}
    return network.double()(
        torch.from_numpy(x).double(),
        encoder_hidden_states=wide["context"],
        timestep=torch.from_numpy(t),
        added_cond_kwargs=sizes,
        encoder_attention_mask=wide["context_mask"],
        return_dict=False,
    )[0].numpy()[:, :channels]


def own(network: Any, x: Array, t: Array, rows: dict[str, Array]) -> Array:
    told = {name: torch.from_numpy(each) for name, each in rows.items()}
    return network(torch.from_numpy(x), torch.from_numpy(t), **told).float().numpy()


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
        x, t, rows = inputs(model, batch)
        expected = predicted(reference, x, t, rows, None)
        assert expected.shape[1] == (sizes["out_channels"] or 4)
        assert relative_error(own(network, x, t, rows), expected) < 1e-4


def test_exported_step_is_diffusers_network_and_the_solver(tmp_path: Path) -> None:
    reference = masked(saved(tmp_path, {**ALPHA, "num_layers": 1}), MASKED)
    errors = step_errors(load(tmp_path), lambda *told: predicted(reference, *told), tmp_path)
    assert max(errors) < 1e-4


def test_what_is_masked_out_does_not_count(tmp_path: Path) -> None:
    saved(tmp_path, SIGMA)
    model = load(tmp_path)
    network = model.network(model.checkpoint.state)
    x, t, rows = inputs(model, 3)
    other = rows | {"context": rows["context"] + 5 * (1 - rows["context_mask"])[..., None]}
    np.testing.assert_array_equal(own(network, x, t, rows), own(network, x, t, other))
    assert relative_error(own(network, x, t, rows | {"context": rows["context"] + 5}), own(network, x, t, rows)) > 1e-2


@pytest.mark.parametrize("size", [4, 16])
def test_another_size_stretches_the_positions(size: int, tmp_path: Path) -> None:
    reference = saved(tmp_path, ALPHA)
    model = load(tmp_path, image_size=size)
    x, t, rows = inputs(model, 2)
    assert x.shape == (2, 4, size, size)
    network = model.network(model.checkpoint.state)
    assert relative_error(own(network, x, t, rows), predicted(reference, x, t, rows, None)) < 1e-4


def test_shards_and_the_older_class_are_the_same_network(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole", SIGMA)
    folder = tmp_path / "shards" / "transformer"
    whole.save_pretrained(folder, max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_type"] == "ada_norm_single"
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    models = [load(tmp_path / name) for name in ("whole", "shards")]
    assert models[0].config == models[1].config
    states = [model.checkpoint.state for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "sizes, length, note",
    [
        (ALPHA, 120, "that of PixArt-alpha; say"),
        (SIGMA, 120, "that of PixArt-alpha; PixArt-Sigma has 300; say"),
        ({**SIGMA, "sample_size": 128, "use_additional_conditions": False}, 300, "that of PixArt-Sigma; say"),
    ],
)
def test_the_length_of_a_text(sizes: dict[str, Any], length: int, note: str, tmp_path: Path) -> None:
    saved(tmp_path, sizes)
    model = load_model(tmp_path)
    assert model.conditions[0].shape == (length, 32)
    assert any(note in each and f"context_length = {length}" in each for each in model.notes)


def test_what_it_is_told(tmp_path: Path) -> None:
    saved(tmp_path, ALPHA)
    context, mask, resolution, ratio = load(tmp_path).conditions
    assert (context.name, context.shape, context.null, context.mask) == ("context", (LENGTH, 32), None, mask.name)
    assert (mask.shape, mask.default, mask.null) == ((LENGTH,), 1.0, "ones")
    assert (resolution.name, resolution.shape, resolution.default) == ("resolution", (2,), 64.0)  # 8 pixels a latent
    assert (ratio.name, ratio.shape, ratio.default, ratio.null) == ("aspect_ratio", (1,), 1.0, "same")
    assert not any(each.needed for each in (mask, resolution, ratio))


def test_how_it_was_trained(tmp_path: Path) -> None:
    saved(tmp_path, SIGMA)
    recipe = load(tmp_path).recipe
    assert recipe.schedule == {"name": "discrete", "betas": "linear", "time_shift": -1.0}
    assert (recipe.prediction, recipe.sampler, recipe.value_range) == ("eps", "dpm-solver++", None)
    DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=2e-4).save_pretrained(tmp_path / "scheduler")
    schedule = load(tmp_path).recipe.schedule
    assert isinstance(schedule, dict)
    assert (schedule["beta_start"], schedule["beta_end"], schedule["time_shift"]) == (2e-4, 0.02, -1.0)


def test_a_manifest_holds_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path, ALPHA)
    config = load(tmp_path).config
    assert PixArtConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_without_a_configuration(tmp_path: Path) -> None:
    saved(tmp_path, SIGMA)
    state = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "alone.safetensors")
    assert recognise({name: tuple(each.shape) for name, each in state.items()}, "x") is FAMILY
    with pytest.raises(CheckpointError, match="size of the image cannot be read off the weights.*\n.*config.json"):
        load(tmp_path / "alone.safetensors")
    assert load(tmp_path / "alone.safetensors", image_size=8, heads=3).config == load(tmp_path).config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 4}, "depth is 4 in the given configuration, but the weights have 2"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05.*expected 1e-06"),
        ({"caption_channels": 64}, "context_dim is 64 in the given configuration, but the weights have 32"),
        ({"use_additional_conditions": True}, "use_additional_conditions is True.*the weights lack adaln_single"),
        ({"interpolation_scale": 0}, "interpolation_scale is 0 .*expected a number above 0"),
        ({"sample_size": 7}, "the size of the image is 7 .*multiple of the patch size 2"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, SIGMA)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("precision, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_lower_precisions(precision: str, bound: float, tmp_path: Path) -> None:
    reference = saved(tmp_path, ALPHA)
    model = load(tmp_path)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    x, t, rows = inputs(model, 3)
    assert 0 < relative_error(own(network, x, t, rows), predicted(reference, x, t, rows, None)) < bound


def test_how_often_a_layers_weights_are_applied(tmp_path: Path) -> None:
    saved(tmp_path, ALPHA)
    config = load(tmp_path).config
    block = "transformer_blocks.0"
    assert {FAMILY.positions(config, f"{block}.{name}") for name in ("attn1.to_q", "attn2.to_q", "ff.net.2")} == {16}
    assert {FAMILY.positions(config, f"{block}.attn2.{name}") for name in ("to_k", "to_v")} == {LENGTH}
    assert FAMILY.positions(config, "adaln_single.linear") == 1
    assert FAMILY.positions(config, "caption_projection.linear_1") == LENGTH
