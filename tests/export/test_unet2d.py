"""UNet2DModel against diffusers' own in float64, ermongroup's names for it; what is read, assumed and refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import bake
from sparse_engine.export.families import recognise
from sparse_engine.export.families.unet2d import FAMILY, UNet2DConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower
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


def ermongroup_state(widths: tuple[int, ...], layers: int, attended: int) -> dict[str, torch.Tensor]:
    """Random weights under the names that ermongroup/ddim's ``Model`` gives them."""
    shapes: dict[str, tuple[int, ...]] = {}
    time, first = 4 * widths[0], widths[0]

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, inputs: int, outputs: int) -> None:
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.temb_proj", outputs, time)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("temb.dense.0", time, first)
    layer("temb.dense.1", time, time)
    layer("conv_in", first, 3, 3, 3)
    now, skips, last = first, [first], len(widths) - 1
    for level, width in enumerate(widths):
        for index in range(layers):
            block(f"down.{level}.block.{index}", now, width)
            if level == attended:
                attention(f"down.{level}.attn.{index}", width)
            now = width
            skips.append(now)
        if level < last:
            layer(f"down.{level}.downsample.conv", now, now, 3, 3)
            skips.append(now)
    block("mid.block_1", now, now)
    attention("mid.attn_1", now)
    block("mid.block_2", now, now)
    for level in reversed(range(len(widths))):
        for index in range(layers + 1):
            block(f"up.{level}.block.{index}", now + skips.pop(), widths[level])
            now = widths[level]
            if level == attended:
                attention(f"up.{level}.attn.{index}", now)
        if level:
            layer(f"up.{level}.upsample.conv", now, now, 3, 3)
    layer("norm_out", now)
    layer("conv_out", 3, now, 3, 3)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = drawn * drawn[0].numel() ** -0.5 if drawn.ndim > 1 else around + 0.3 * drawn
    return state


def ermongroup_forward(state: dict[str, torch.Tensor], levels: int, layers: int, x: Array, t: Array) -> Array:
    """ermongroup/ddim's forward pass, from the names of its weights alone."""
    w = {name: each.double() for name, each in state.items()}

    def conv(name: str, h: torch.Tensor, **options: Any) -> torch.Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def block(name: str, h: torch.Tensor) -> torch.Tensor:
        out = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), padding=1)
        out = out + linear(f"{name}.temb_proj", F.silu(emb))[:, :, None, None]
        out = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", out)), padding=1)
        return out + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else h)

    def attended(name: str, h: torch.Tensor) -> torch.Tensor:
        if f"{name}.q.weight" not in w:
            return h
        q, k, v = (conv(f"{name}.{part}", norm(f"{name}.norm", h)).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(2)  # [B, of q, of k]
        return h + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(h.shape))

    half = w["conv_in.weight"].shape[0] // 2
    angles = torch.from_numpy(t).double()[:, None] * torch.exp(
        -np.log(10000) / (half - 1) * torch.arange(half).double()
    )
    emb = linear("temb.dense.1", F.silu(linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], dim=1))))
    kept = [conv("conv_in", torch.from_numpy(x).double(), padding=1)]
    for level in range(levels):
        for index in range(layers):
            kept.append(attended(f"down.{level}.attn.{index}", block(f"down.{level}.block.{index}", kept[-1])))
        if level < levels - 1:
            kept.append(conv(f"down.{level}.downsample.conv", F.pad(kept[-1], (0, 1, 0, 1)), stride=2))
    h = block("mid.block_2", attended("mid.attn_1", block("mid.block_1", kept[-1])))
    for level in reversed(range(levels)):
        for index in range(layers + 1):
            h = block(f"up.{level}.block.{index}", torch.cat([h, kept.pop()], dim=1))
            h = attended(f"up.{level}.attn.{index}", h)
        if level:
            h = conv(f"up.{level}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    return conv("conv_out", F.silu(norm("norm_out", h)), padding=1).numpy()


@pytest.mark.parametrize("widths, layers, attended", [((32, 64), 1, 1), ((32, 32, 64), 2, 0)])
def test_ermongroups_state_dicts(
    widths: tuple[int, ...], layers: int, attended: int, tmp_path: Path, one_torch_thread: None
) -> None:
    state = ermongroup_state(widths, layers, attended)
    torch.save(state, tmp_path / "model-790000.ckpt")
    model = load_model(tmp_path / "model-790000.ckpt")
    assert model.family is FAMILY
    assert model.config.image_size == (16 << attended,) * 2
    assert any("attention is where the map has a side of 16" in note for note in model.notes)
    assert (model.recipe.schedule, model.recipe.prediction) == (
        {"name": "discrete", "betas": "linear", "time_shift": -1.0},
        "eps",
    )
    model = load_model(tmp_path / "model-790000.ckpt", image_size=8)
    for rule in ("none", "magnitude"):
        network = model.network(bake(model, rule).state)
        x, t, told = inputs_of(model, 3)
        weights = {name: each.numpy() for name, each in state.items()}
        dense = ("temb", "conv_in", "conv_out")
        if rule == "magnitude":
            baked = two_of_four_along_inputs(weights)
            weights = {name: weights[name] if any(p in name for p in dense) else each for name, each in baked.items()}
        expected = ermongroup_forward(
            {name: torch.from_numpy(each) for name, each in weights.items()}, len(widths), layers, x, t
        )
        assert relative_error(found_by(network, x, t, told), expected) < 1e-4


def test_checkpoints_that_are_lists(tmp_path: Path) -> None:
    """[model, optimizer, epoch, step, ema], as ermongroup/ddim and PNDM save them while they train."""
    state = ermongroup_state((32, 32), 1, 1)
    raw = {f"module.{name}": each + 1 for name, each in state.items()}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save([raw, optimizer, 3, 1000, state], tmp_path / "ckpt.pth")
    model = load_model(tmp_path / "ckpt.pth")
    plain = tmp_path / "model.ckpt"
    torch.save(state, plain)
    expected = load_model(plain).checkpoint.state
    assert all(np.array_equal(model.checkpoint.state[name], each) for name, each in expected.items())
    assert any(note.startswith("averaged weights taken from the entry 'ema'") for note in model.notes)
    torch.save([raw, optimizer, 3, 1000], tmp_path / "ckpt.pth")
    found = load_model(tmp_path / "ckpt.pth").checkpoint.state
    assert np.array_equal(found["conv_in.weight"], state["conv_in.weight"].numpy() + 1)
    torch.save([state, 1], tmp_path / "ckpt.pth")
    with pytest.raises(CheckpointError, match="holds a list; expected a dictionary"):
        load_model(tmp_path / "ckpt.pth")


def test_whole_pickled_modules_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """As Diff-Pruning saves what it has pruned."""
    torch.save(UNet2DModel(**GOOGLE), tmp_path / "unet_pruned.pth")
    with pytest.raises(CheckpointError, match=r"Python objects that are not weights.*\n.*model\.state_dict\(\)"):
        load_model(tmp_path / "unet_pruned.pth")


def test_widths_that_a_pruning_left(tmp_path: Path, one_torch_thread: None) -> None:
    """Diff-Pruning takes channels away, but not sinusoids: their number is not that of the first convolution."""
    state = ermongroup_state((64, 64), 1, 1)
    state["temb.dense.0.weight"] = state["temb.dense.0.weight"][:, :32].clone()
    torch.save(state, tmp_path / "model.ckpt")
    config = load_model(tmp_path / "model.ckpt").config
    assert (config.widths, config.time_width, config.time_dim) == ((64, 64), 32, 256)


def test_old_names_of_attention(tmp_path: Path) -> None:
    saved(tmp_path, GOOGLE)
    expected = load_model(tmp_path).checkpoint.state
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        state = {name.replace(f".{new}.", f".{old}."): each for name, each in state.items()}
    assert any(".proj_attn." in name for name in state)
    save_file(state, file)
    found = load_model(tmp_path).checkpoint.state
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], each) for name, each in expected.items())


def test_explicit_masks_go_with_their_weights(tmp_path: Path) -> None:
    state = ermongroup_state((32, 32), 1, 1)
    weight = state.pop("down.1.attn.0.q.weight")
    state["down.1.attn.0.q.weight_orig"], state["down.1.attn.0.q.weight_mask"] = weight, torch.ones_like(weight)
    state["down.1.attn.0.q.weight_mask"][:, ::2] = 0
    torch.save(state, tmp_path / "model.ckpt")
    baked = bake(load_model(tmp_path / "model.ckpt"), "auto")
    layer = next(each for each in baked.layers if each.name == "down_blocks.1.attentions.0.to_q")
    assert (layer.source, layer.hardware_24, layer.shape) == ("explicit", True, (32, 32))


def test_which_layers_are_masked_and_their_macs(tmp_path: Path) -> None:
    saved(tmp_path, GOOGLE)
    layers = {each.name: each for each in bake(load_model(tmp_path), "magnitude").layers}
    dense = {name for name, each in layers.items() if not each.masked}
    assert dense == {name for name in layers if any(part in name for part in TIMES)}
    assert all(each.hardware_24 for each in layers.values() if each.masked)
    assert layers["conv_in"].macs == 9 * 3 * 16 * 64
    assert layers["down_blocks.0.downsamplers.0.conv"].macs == 9 * 16 * 16 * 16
    assert layers["up_blocks.0.upsamplers.0.conv"].macs == 9 * 32 * 32 * 64
    assert layers["mid_block.attentions.0.to_q"].macs == 32 * 32 * 16
    assert layers["mid_block.resnets.0.time_emb_proj"].macs == 64 * 32


def test_its_configuration_is_demanded(tmp_path: Path) -> None:
    saved(tmp_path, GOOGLE)
    state = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "alone.safetensors")
    assert recognise({name: tuple(each.shape) for name, each in state.items()}, "x") is FAMILY
    with pytest.raises(CheckpointError, match=r"groups, eps, .* do not say them.*\n.*keep config\.json beside"):
        load_model(tmp_path / "alone.safetensors", image_size=8)


def test_a_silent_configuration_is_diffusers_defaults(tmp_path: Path) -> None:
    saved(tmp_path, {**DEFAULTS, "norm_num_groups": 8, "attention_head_dim": 8})
    whole = load_model(tmp_path)
    change(tmp_path, norm_eps=..., attention_head_dim=..., layers_per_block=..., act_fn="swish")
    model = load_model(tmp_path)
    assert model.config == whole.config
    assert any(note == "eps = 1e-05, head_dim = 8: not in config.json; diffusers' defaults" for note in model.notes)


def change(folder: Path, **values: Any) -> None:
    """Entries of a network's configuration; ``...`` is taken out."""
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def test_a_manifest_holds_the_configuration(tmp_path: Path) -> None:
    for index, sizes in enumerate(NETWORKS.values()):
        saved(tmp_path / str(index), sizes)
        config = load_model(tmp_path / str(index)).config
        assert UNet2DConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"in_channels": 6}, r"in_channels is 6 and out_channels is 3: .*\(inpainting, editing, upscaling\)"),
        ({"block_out_channels": [16, 48]}, r"widths is \(16, 48\) in the given configuration, .* have \(16, 32\)"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types has 'SkipDownBlock2D'.*expected"),
        ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "up_block_types has 'KUpBlock2D', which is not offered"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'.*expected 'positional'"),
        ({"downsample_type": "resnet"}, "downsample_type is 'resnet'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'"),
        ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor is 1.4"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu' in the given configuration; expected 'silu'"),
        ({"norm_num_groups": 5}, "norm_num_groups is 5, which does not divide the 16 channels"),
        ({"norm_num_groups": "8"}, "norm_num_groups is '8' in the given configuration"),
        ({"norm_eps": "small"}, "eps is 'small' in the given configuration; expected a number"),
        ({"downsample_padding": 2}, "downsample_padding is 2 in the given configuration; expected 0 or 1"),
        ({"flip_sin_to_cos": 1}, "cos_first is 1 in the given configuration; expected true or false"),
        ({"attention_head_dim": 64}, "attention_head_dim is 64 .*expected null or 1 to 16 channels"),
        ({"sample_size": 9}, r"the size of the image is 9; expected a multiple of 2.*\n.*take 10"),
        ({"sample_size": [8, 8, 8]}, "expected a number, or height and width"),
        ({"sample_size": ...}, "size of the image cannot be read off the weights"),
        ({"sample_size": "8"}, "the size of the image is '8' in the given configuration"),
    ],
)
def test_configurations_of_other_networks(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, GOOGLE)
    change(tmp_path, **values)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_heads_are_no_setting_of_it(tmp_path: Path) -> None:
    saved(tmp_path, GOOGLE)
    with pytest.raises(OptionError, match=r"heads = 2 is given, and .* attention_head_dim.*\n.*leave it out"):
        load_model(tmp_path, heads=2)


@pytest.mark.parametrize("precision, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_lower_precisions(precision: str, bound: float, tmp_path: Path) -> None:
    reference = saved(tmp_path, GOOGLE)
    model = load_model(tmp_path)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    told = told_to(model, 3)
    assert 0 < relative_error(found_by(network, *told), predicted(reference, *told)) < bound
