"""The decoder of an autoencoder against diffusers' own, in folders as diffusers saves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL

from sparse_engine.decoder import WEIGHTS
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.export.asset_graph import graph_files
from sparse_engine.export.vae import EPS, Norm, decoder_files, read_decoder

SMALL: dict[str, Any] = {"block_out_channels": (4, 8), "norm_num_groups": 2}
LARGE: dict[str, Any] = {"block_out_channels": (16, 32, 32), "norm_num_groups": 8, "layers_per_block": 2}
BARE: dict[str, Any] = {**SMALL, "use_post_quant_conv": False, "use_quant_conv": False, "latent_channels": 16}
BARE |= {"shift_factor": 0.0609, "scaling_factor": 1.5305}
PLAIN: dict[str, Any] = {**SMALL, "mid_block_add_attention": False}


def save_vae(folder: Path, **settings: Any) -> AutoencoderKL:
    """An autoencoder of random weights, saved as diffusers does."""
    count = len(settings["block_out_channels"])
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}
    vae = AutoencoderKL(**{**kinds, "latent_channels": 4, **settings}).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0, 0.2)
    vae.save_pretrained(folder)
    return vae


def decoded(vae: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    z = torch.from_numpy(latents) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.no_grad():
        pixels: np.ndarray = vae.decode(z).sample.numpy()
    return pixels


@pytest.mark.parametrize("settings", [SMALL, LARGE, BARE, PLAIN], ids=["small", "large", "bare", "no attention"])
def test_pixels_are_those_of_diffusers(tmp_path: Path, settings: dict[str, Any], rng: np.random.Generator) -> None:
    vae = save_vae(tmp_path, **settings)
    network, config, entry = read_decoder(tmp_path)
    latents = rng.standard_normal((3, config.latent_channels, 6, 6), np.float32)
    expected = decoded(vae, latents)
    found = network(torch.from_numpy(latents)).numpy()
    assert found.shape == (3, 3, 6 * config.upscale, 6 * config.upscale)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert entry["scaling_factor"] == vae.config.scaling_factor


def test_a_large_picture_makes_no_larger_file(tmp_path: Path) -> None:
    save_vae(tmp_path, **SMALL)
    sizes = [
        {file.name: file.size for file in decoder_files(tmp_path, (4, side, side)).files}[WEIGHTS] for side in (8, 32)
    ]
    assert sizes[0] == sizes[1]


def test_an_old_file_names_its_attention_otherwise(tmp_path: Path, rng: np.random.Generator) -> None:
    vae = save_vae(tmp_path, **SMALL)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in vae.state_dict().items():
        for ours, theirs in new.items():
            if f".{ours}." in name:
                name = name.replace(ours, theirs)
                tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        state[name] = tensor
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    latents = rng.standard_normal((1, 4, 6, 6), np.float32)
    found = read_decoder(tmp_path)[0](torch.from_numpy(latents)).numpy()
    expected = decoded(vae, latents)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_scale_is_said_and_never_guessed(tmp_path: Path) -> None:
    save_vae(tmp_path, **SMALL)
    assert read_decoder(tmp_path, 0.2301)[2]["scaling_factor"] == 0.2301
    changed(tmp_path, scaling_factor=None)
    with pytest.raises(InputError, match=r"(?s)has no scaling_factor.*--vae-scale: 0\.18215 .* 0\.23010"):
        read_decoder(tmp_path)
    assert read_decoder(tmp_path, 0.2301)[2]["scaling_factor"] == 0.2301


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"_class_name": "VQModel"}, r"config\.json is of VQModel; expected AutoencoderKL"),
        ({"_class_name": None}, "config.json is of None"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types is .*; expected UpDecoder"),
        ({"act_fn": "relu"}, "act_fn is 'relu'; expected silu"),
        ({"block_out_channels": [4, "8"]}, "block_out_channels is '8'; expected a whole number"),
        ({"block_out_channels": []}, "block_out_channels is None"),
        ({"norm_num_groups": 3}, r"norm_num_groups 3 does not divide \[4, 8\]"),
        ({"scaling_factor": "0.18"}, "scaling_factor is '0.18'; expected a number"),
        ({"scaling_factor": -1}, "scaling_factor is -1; expected a number above 0"),
        ({"latents_mean": [0.0]}, "scales each channel by its own mean"),
    ],
)
def test_what_it_does_not_take(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_vae(tmp_path, **SMALL)
    changed(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        read_decoder(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_decoder(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no config\.json"):
        read_decoder(tmp_path)
    save_vae(tmp_path / "whole" / "vae", **SMALL)
    (tmp_path / "whole" / "model_index.json").write_text("{}")
    assert read_decoder(tmp_path / "whole")[1].upscale == 2
    shutil.rmtree(tmp_path / "whole" / "vae")
    with pytest.raises(InputError, match=r"vae has no config\.json"):
        read_decoder(tmp_path / "whole")


def test_weights_of_another_autoencoder(tmp_path: Path) -> None:
    save_vae(tmp_path, **SMALL)
    changed(tmp_path, layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"lacks decoder\.up_blocks\.0\.resnets\.2"):
        read_decoder(tmp_path)


def test_norms_of_large_maps_lose_no_digits(tmp_path: Path, rng: np.random.Generator) -> None:
    """Where the runtime adds up two million numbers one after the other, 3e-5 are lost."""
    norm, side = Norm(2, 4), 1024
    graph, weights = graph_files(norm, {"x": torch.zeros(2, 4, side, side)}, "y", "norm.onnx", "norm.bin")
    for file in (graph, weights):
        (tmp_path / file.name).write_bytes(b"".join(file.chunks()))
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    x = (3 * rng.standard_normal((1, 4, side, side)) + 2).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, -1)
    centred = groups - groups.mean(1, keepdims=True)
    expected = (centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPS)).reshape(x.shape)
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() <= 1e-6 * np.abs(expected).max()
