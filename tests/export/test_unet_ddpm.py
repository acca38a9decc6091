"""SparseDM's U-Net against rosinality's formulas, written out in float64; what is read, assumed, asked for, refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine.cli.main import run
from sparse_engine.errors import CheckpointError
from sparse_engine.export.bake import bake
from sparse_engine.export.families import recognise
from sparse_engine.export.families.unet_ddpm import FAMILY, SPARSEDM, DDPMConfig, DDPMUNet
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower
from tests.export.diffusers_networks import inputs_of, randomised, step_errors
from tests.export.references import Array, relative_error

AFFINE = DDPMConfig((8, 8), 3, 16, (1, 2), 1, (1,), 4, 4, True)
CONFIGS = {
    "affine time": AFFINE,
    "added time, one head": DDPMConfig((8, 8), 3, 16, (1, 1, 2), 2, (0, 2), 1, 4, False),
    "folded, one channel more, not square": DDPMConfig((8, 12), 3, 16, (1, 2), 1, (), 2, 4, True, fold=2),
    "one size, odd": DDPMConfig((5, 7), 1, 16, (1,), 1, (0,), 2, 4, True),
}
TRAINING: dict[str, Any] = {"schedule": "vp-linear", "prediction": "eps"}


def save(path: Path, config: DDPMConfig) -> Path:
    torch.save(randomised(DDPMUNet(config)).state_dict(), path)
    return path


def load(folder: Path, config: DDPMConfig, **given: Any) -> Model:
    told = {"heads": config.heads, "image_size": config.image_size, **TRAINING, **given}
    return load_model(save(folder / "nnet_ema.pth", config), **told)


def published_forward(state: dict[str, Array], config: DDPMConfig, x: Array, t: Array) -> Array:
    """rosinality's forward pass, from the names of its weights alone."""
    w = {name: torch.from_numpy(np.asarray(value)).double() for name, value in state.items()}

    def conv(name: str, h: Tensor, **options: Any) -> Tensor:
        padding = w[f"{name}.weight"].shape[2] // 2
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding, **options)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        groups = h.reshape(len(h), config.width // 4, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        h = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
        if f"{name}.weight" not in w:
            return h
        return h * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def silu(h: Tensor) -> Tensor:
        return h / (1 + torch.exp(-h))

    def block(name: str, h: Tensor, emb: Tensor) -> Tensor:
        part = f"{name}.resblocks"
        out = conv(f"{part}.conv1", silu(norm(f"{part}.norm1", h)))
        time = linear(f"{part}.time.1", silu(emb))[:, :, None, None]
        if time.shape[1] == 2 * out.shape[1]:
            gamma, beta = time.chunk(2, dim=1)
            out = (1 + gamma) * norm(f"{part}.norm2", out) + beta
        else:
            out = norm(f"{part}.norm2", out + time)
        out = conv(f"{part}.conv2", silu(out)) + (conv(f"{part}.skip", h) if f"{part}.skip.weight" in w else h)
        return attention(f"{name}.attention", out) if f"{name}.attention.qkv.weight" in w else out

    def attention(name: str, h: Tensor) -> Tensor:
        batch, channel, height, width = h.shape
        head_dim = channel // config.heads
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm", h)).reshape(batch, config.heads, head_dim * 3, height, width)
        query, key, value = qkv.chunk(3, dim=2)
        scores = torch.einsum("bnchw,bncyx->bnhwyx", query, key) / math.sqrt(channel)
        weights = scores.flatten(4).softmax(-1).reshape(scores.shape)
        out = torch.einsum("bnhwyx,bncyx->bnchw", weights, value)
        return conv(f"{name}.out", out.reshape(h.shape)) + h

    fold, levels = config.fold, len(config.multipliers)
    h = torch.from_numpy(x).double()
    batch, channel, height, width = h.shape
    h = h.reshape(batch, channel, height // fold, fold, width // fold, fold).permute(0, 1, 3, 5, 2, 4)
    h = h.reshape(batch, -1, height // fold, width // fold)
    angles = torch.from_numpy(t).double()[:, None] * w["time.0.inv_freq"]
    emb = linear("time.3", silu(linear("time.1", torch.cat([angles.sin(), angles.cos()], dim=-1))))
    h = conv("down.0", h)
    kept, number = [h], 1
    for level in range(levels):
        for _ in range(config.layers):
            h = block(f"down.{number}", h, emb)
            kept.append(h)
            number += 1
        if level < levels - 1:
            h = conv(f"down.{number}.0", h, stride=2)
            kept.append(h)
            number += 1
    h = block("mid.1", block("mid.0", h, emb), emb)
    number = 0
    for level in reversed(range(levels)):
        for _ in range(config.layers + 1):
            h = block(f"up.{number}", torch.cat([h, kept.pop()], dim=1), emb)
            number += 1
        if level:
            h = conv(f"up.{number}.1", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
            number += 1
    h = conv("out.2", silu(norm("out.0", h)))
    h = h.reshape(batch, channel, fold, fold, height // fold, width // fold).permute(0, 1, 4, 2, 5, 3)
    return h.reshape(x.shape).numpy()


def two_of_four_along_inputs(state: dict[str, Array]) -> dict[str, Array]:
    """Every convolution and linear masked as SparseDM's ``SparseConv`` and ``SparseLinear`` do in each forward."""
    masked = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            masked[name] = weight
            continue
        order = weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
        groups = np.abs(order).reshape(-1, 4)
        pruned = np.argsort(groups, axis=1, kind="stable")[:, :2]
        kept = np.ones_like(groups)
        np.put_along_axis(kept, pruned, 0, axis=1)
        kept = kept.reshape(order.shape)
        masked[name] = weight * (kept.transpose(0, 3, 1, 2) if weight.ndim == 4 else kept)
    return masked


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_network_is_rosinalitys(config: DDPMConfig, sparse: bool, tmp_path: Path, one_torch_thread: None) -> None:
    model = load(tmp_path, config)
    assert (model.family, model.config) == (FAMILY, config)
    network = model.network(bake(model, "magnitude" if sparse else "none").state)
    state = two_of_four_along_inputs(model.checkpoint.state) if sparse else model.checkpoint.state
    for batch in (1, 3, 17):
        x, t, _ = inputs_of(model, batch)
        found = network(torch.from_numpy(x), torch.from_numpy(t)).numpy()
        assert relative_error(found, published_forward(state, config, x, t)) < 1e-4


def test_exported_step_is_the_network_and_the_solver(tmp_path: Path) -> None:
    model = load(tmp_path, AFFINE)
    state = two_of_four_along_inputs(model.checkpoint.state)
    errors = step_errors(model, lambda x, t, _: published_forward(state, AFFINE, x, t), tmp_path)
    assert max(errors) < 1e-4


def test_every_layer_is_masked_and_all_but_the_first_are_hardware(tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in bake(load(tmp_path, AFFINE), "magnitude").layers}
    assert all(layer.masked for layer in layers.values())
    assert [name for name, layer in layers.items() if not layer.hardware_24] == ["down.0"]
    assert layers["down.0"].reason == "3 inputs are no multiple of 4"
    assert layers["down.1.resblocks.conv1"].macs == 9 * 16 * 16 * 64
    assert layers["down.2.0"].macs == 9 * 16 * 16 * 16  # of the halved map
    assert layers["mid.0.attention.qkv"].macs == 32 * 96 * 16
    assert layers["down.1.resblocks.time.1"].macs == 64 * 32
    assert layers["down.1.resblocks.conv1"].macs_nonzero == layers["down.1.resblocks.conv1"].macs // 2


def test_sparsedms_own_is_known_by_its_sizes() -> None:
    sizes = {**SPARSEDM, "channels": 3, "image_size": (32, 32), "heads": 4, "groups": 28}
    with torch.device("meta"):
        network = DDPMUNet(DDPMConfig(**sizes))
    state = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    assert 92.6e6 < sum(math.prod(shape) for shape in state.values()) < 92.8e6
    config, notes = FAMILY.read_config(state, {})
    assert config == DDPMConfig(**sizes)
    assert [note.split(":")[0] for note in notes] == ["heads = 4", "image_size = 32", "groups = 28"]
    recipe = FAMILY.recipe(config)
    assert (recipe.schedule, recipe.prediction, recipe.sampler, recipe.unknown) == (
        "vp-linear",
        "eps",
        "dpm-solver",
        None,
    )
    macs = sum(FAMILY.positions(config, name) * math.prod(state[f"{name}.weight"]) for name in weighted(network))
    assert 4.9e9 < macs < 5.1e9


def weighted(network: torch.nn.Module) -> list[str]:
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def test_what_the_weights_do_not_say_is_asked_for(tmp_path: Path) -> None:
    file = save(tmp_path / "x.pth", AFFINE)
    with pytest.raises(CheckpointError, match="number of attention heads cannot be read off.*\n.*--heads N"):
        load_model(file, image_size=8)
    with pytest.raises(CheckpointError, match="size of the image cannot be read off.*\n.*--image-size"):
        load_model(file, heads=4)
    for training in ({}, {"schedule": "vp-linear"}, {"prediction": "eps"}):
        with pytest.raises(CheckpointError, match="how the network was trained is not known.*\n.*--schedule and"):
            load_model(file, heads=4, image_size=8, **training)
    said = {"heads": 4, "image_size": 8, "prediction": "v"}
    schedule = {"name": "discrete", "betas": "cosine", "steps": 1024, "time_scale": 1.0}
    (tmp_path / "x.json").write_text(json.dumps(said | {"schedule": schedule}))
    recipe = load_model(file).recipe
    assert (recipe.schedule, recipe.prediction, recipe.sampler) == (schedule, "v", "ddim")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, engine = str(save(tmp_path / "nnet_ema.pth", AFFINE)), str(tmp_path / "m.sengine")
    assert run(["inspect", file, "--heads", "4", "--image-size", "8"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
    said = ["--heads", "4", "--image-size", "8", "--schedule", "vp-linear", "--prediction", "eps"]
    assert run(["inspect", file, *said]) == 0
    assert run(["build", file, "--sparse", "-o", engine, *said]) == 0
    assert run(["verify", engine, "--against", file]) == 0
    assert run(["sample", engine, "-n", "2", "--steps", "2", "--sampler", "ddim", "-o", str(tmp_path / "x.npz")]) == 0


@pytest.mark.parametrize("wrap", [lambda w: {"G": w, "n_timesteps": 1024}, lambda w: {"model": w, "ema": w}])
def test_checkpoints_of_the_other_projects(wrap: Any, tmp_path: Path) -> None:
    state = randomised(DDPMUNet(AFFINE)).state_dict()
    torch.save(wrap(state), tmp_path / "teacher.pt")
    model = load_model(tmp_path / "teacher.pt", heads=4, image_size=8, **TRAINING)
    assert model.config == AFFINE
    assert all(np.array_equal(model.checkpoint.state[name], each.numpy()) for name, each in state.items())


def test_a_configuration_speaks_the_authors_names(tmp_path: Path) -> None:
    file = save(tmp_path / "x.pth", AFFINE)
    authors = {"channel": 16, "channel_multiplier": [1, 2], "n_res_blocks": 1, "attn_strides": [2], "attn_heads": 4}
    (tmp_path / "x.json").write_text(json.dumps({**authors, "use_affine_time": True, "img_size": 8, **TRAINING}))
    assert load_model(file).config == AFFINE
    for change, message in (
        ({"attn_strides": [1]}, r"attn_strides .* not those of the weights, \[2\]"),
        ({"channel_multiplier": [1, 4]}, r"multipliers is \(1, 4\) in the given configuration.* have \(1, 2\)"),
        ({"attn_heads": 3}, "heads is 3; expected a divisor of the network's 16 channels"),
        ({"groups": 5}, "groups is 5; expected a divisor"),
        ({"img_size": 9}, "size of the image is 9; expected a multiple of 2.*\n.*take 10"),
    ):
        (tmp_path / "x.json").write_text(json.dumps({**authors, "img_size": 8, **TRAINING, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_model(file)


def test_a_manifest_holds_the_configuration() -> None:
    for config in CONFIGS.values():
        assert DDPMConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_keys_are_recognised_and_incomplete_ones_refused(tmp_path: Path) -> None:
    state = randomised(DDPMUNet(AFFINE)).state_dict()
    assert recognise({name: tuple(each.shape) for name, each in state.items()}, "x") is FAMILY
    for name, message in (
        ("down.1.resblocks.conv1.weight", r"missing key\(s\) for a unet-ddpm model"),
        ("up.0.resblocks.conv2.weight", r"1 missing key\(s\) for a unet-ddpm model: up\.0"),
    ):
        torch.save({key: each for key, each in state.items() if key != name}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "x.pth", heads=4, image_size=8, **TRAINING)


@pytest.mark.parametrize("precision, bound", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_lower_precisions(precision: str, bound: float, tmp_path: Path) -> None:
    model = load(tmp_path, AFFINE)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    x, t, _ = inputs_of(model, 3)
    found = network(torch.from_numpy(x), torch.from_numpy(t)).float().numpy()
    assert 0 < relative_error(found, published_forward(model.checkpoint.state, AFFINE, x, t)) < bound
