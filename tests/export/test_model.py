"""What is read off a checkpoint's keys and shapes, what is looked up, and what is refused."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.families import Recipe
from sparse_engine.export.families.uvit import FAMILY, UViT, UViTConfig
from sparse_engine.export.model import load_model
from sparse_engine.sampling import make_trajectory, schedule_from_dict
from tests.conftest import TINY, TINY_CONDITIONAL, TINY_LATENT, random_state, save_checkpoint


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY_CONDITIONAL,
        TINY_LATENT,
        UViTConfig(16, 4, 3, 32, 0, 4, mlp_hidden=256, qkv_bias=True),
        UViTConfig(8, 1, 3, 32, 4, 4, mlp_hidden=32, skip=False),
        UViTConfig(8, 2, 1, 48, 2, 4, num_classes=11, mlp_time_embed=True),
        UViTConfig(8, 2, 3, 44, 2, 4, mlp_hidden=60),
    ],
    ids=["pixels", "conditional", "latents", "mid block only, qkv bias", "no skips, patch 1", "time mlp", "60 of 44"],
)
def test_configuration_is_read_off_the_shapes(tmp_path: Path, config: UViTConfig) -> None:
    model = load_model(save_checkpoint(tmp_path / "x.pth", config), heads=4)
    assert model.config == config


@pytest.mark.parametrize("embed_dim,depth,heads", [(512, 0, 8), (768, 0, 12), (1024, 0, 16), (1152, 28, 16)])
def test_heads_of_the_published_sizes(embed_dim: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        network = UViT(UViTConfig(32, 2, 3, embed_dim, depth, heads))
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    config, notes = FAMILY.read_config(shapes, {})
    assert (config.heads, config.depth) == (heads, depth)
    assert "not in the weights" in notes[0]


def test_heads_of_an_unpublished_size_must_be_said(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"attention heads cannot be read off.*\n.*--heads N"):
        load_model(tiny_checkpoint)


def test_wrong_head_count(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="heads = 5 does not divide embed_dim = 32"):
        load_model(tiny_checkpoint, heads=5)


def test_a_stored_configuration_speaks_the_authors_names(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", TINY_CONDITIONAL)
    (tmp_path / "x.json").write_text(
        '{"nnet": {"num_heads": 8, "img_size": 8}, "null_class": 4, "schedule": "vp-cosine"}'
    )
    model = load_model(checkpoint)
    assert model.config.heads == 8
    assert (model.recipe.null_class, model.recipe.schedule) == (4, "vp-cosine")
    assert load_model(checkpoint, heads=2).config.heads == 2  # the command line wins over the file


def test_a_configuration_that_contradicts_the_weights(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", TINY)
    (tmp_path / "x.json").write_text('{"heads": 4, "embed_dim": 64}')
    with pytest.raises(CheckpointError, match="embed_dim is 64 in the given configuration, but the weights have 32"):
        load_model(checkpoint)


def test_null_class_is_the_last_of_an_odd_looking_table_and_said_aloud(tmp_path: Path) -> None:
    eleven = save_checkpoint(tmp_path / "a.pth", UViTConfig(8, 2, 3, 32, 0, 4, num_classes=11))
    model = load_model(eleven, heads=4)
    assert model.recipe.null_class == 10
    assert any("null class = 10" in note for note in model.notes)
    ten = save_checkpoint(tmp_path / "b.pth", UViTConfig(8, 2, 3, 32, 0, 4, num_classes=10))
    assert load_model(ten, heads=4).recipe.null_class is None
    with pytest.raises(OptionError, match="null class 10 is outside the 10 rows"):
        load_model(ten, heads=4, null_class=10)


S, M, L, H = (512, 12), (768, 16), (1024, 20), (1152, 28)  # embed_dim, depth
# The authors' models and how their README evaluates each, 50 network calls: (t, the network's time) of the first call
# and of the end. eval.py and eval_ldm.py: DPM-Solver-fast on the VP-SDE down to 1e-4, the network told 999 t.
# eval_ldm_discrete.py: DPM-Solver++ on Stable Diffusion's betas down to 1/1000, the network told 1000 t.
CONTINUOUS = ("vp-linear", "dpm-solver", 999.0, 999 * 1e-4)
DISCRETE = ("stable-diffusion", "dpm-solver++-singlestep", 1000.0, 1.0)
PUBLISHED = {
    "CIFAR-10 S/2": (UViTConfig(32, 2, 3, *S, 8), CONTINUOUS, (-1.0, 1.0)),
    "CelebA S/4": (UViTConfig(64, 4, 3, *S, 8), CONTINUOUS, (-1.0, 1.0)),
    "ImageNet-64 M/4": (UViTConfig(64, 4, 3, *M, 12, num_classes=1000), CONTINUOUS, (-1.0, 1.0)),
    "ImageNet-64 L/4": (UViTConfig(64, 4, 3, *L, 16, num_classes=1000), CONTINUOUS, (-1.0, 1.0)),
    "ImageNet-256 L/2": (UViTConfig(32, 2, 4, *L, 16, num_classes=1001), CONTINUOUS, None),
    "ImageNet-256 H/2": (UViTConfig(32, 2, 4, *H, 16, final_conv=False, num_classes=1001), DISCRETE, None),
    "ImageNet-512 L/4": (UViTConfig(64, 4, 4, *L, 16, num_classes=1001), CONTINUOUS, None),
    "ImageNet-512 H/4": (UViTConfig(64, 4, 4, *H, 16, final_conv=False, num_classes=1001), DISCRETE, None),
}


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_are_sampled_as_their_authors_evaluate_them(published: tuple) -> None:
    expected, (name, sampler, first, end), value_range = published
    config, notes = FAMILY.read_config(shapes_of(expected), {})
    assert config == expected
    assert not any("schedule" in note for note in notes)
    recipe = FAMILY.recipe(config)
    assert recipe == Recipe(name, "eps", value_range, 1000 if config.num_classes == 1001 else None, sampler)
    schedule = schedule_from_dict({"name": name})
    trajectory = make_trajectory(sampler, schedule, 50)
    assert trajectory.network_times[0] == first
    assert trajectory.network_times[-1] == pytest.approx(last_call(name, first, end), rel=1e-9)


def last_call(name: str, first: float, end: float) -> float:
    """The network's time of the 50th call: of 50 equal steps of time, or the middle, in lambda, of the 17th of 17."""
    if name == "stable-diffusion":
        return first - 49 * (first - end) / 50

    def log_alpha(time: float) -> float:
        return -(time**2) * 19.9 / 4 - time * 0.1 / 2

    def half_log_snr(time: float) -> float:
        return log_alpha(time) - 0.5 * np.log(-np.expm1(2 * log_alpha(time)))

    start, stop = half_log_snr(1.0), half_log_snr(end / 999)
    wanted = stop - (stop - start) / 17 / 2
    low, high = 1e-5, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if half_log_snr(middle) > wanted else (low, middle)
    return 999 * low


def test_a_latent_model_of_no_published_width_is_taken_as_h_and_said_aloud(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", TINY_LATENT)
    model = load_model(checkpoint, heads=4)
    assert model.recipe == Recipe("stable-diffusion", "eps", None, None, "dpm-solver++-singlestep")
    said = "taken from latent U-ViT-H (embed_dim 1152), since none of embed_dim 32 is published"
    assert any(said in note for note in model.notes)
    model = load_model(checkpoint, heads=4, schedule="vp-linear", sampler="dpm-solver")
    assert model.recipe == Recipe("vp-linear", "eps", None, None, "dpm-solver")
    assert not any("U-ViT-H" in note for note in model.notes)


def test_missing_unexpected_and_misshapen_keys(tmp_path: Path) -> None:
    state = random_state(TINY)
    file = tmp_path / "x.pth"
    del state["mid_block.norm1.bias"]
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"1 missing key\(s\) for a uvit model: mid_block.norm1.bias"):
        load_model(file, heads=4)
    torch.save({**random_state(TINY), "extra.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"1 unexpected key\(s\) for a uvit model: extra.weight"):
        load_model(file, heads=4)
    torch.save({**random_state(TINY), "norm.weight": torch.ones(31)}, file)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[31\]; expected \[32\]"):
        load_model(file, heads=4)
    torch.save({**random_state(TINY), "pos_embed": torch.ones(1, 16, 32)}, file)
    with pytest.raises(CheckpointError, match="16 positions, which leaves 15 patches: not a square image"):
        load_model(file, heads=4)


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 8, 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"its 2 keys \(weight, bias, ...\) are of no known model family"):
        load_model(tmp_path / "x.pth")


def test_settings_that_cannot_be_used(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="family 'gan' is not known"):
        load_model(tiny_checkpoint, "gan", heads=4)
    with pytest.raises(OptionError, match="prediction 'noise' is not known"):
        load_model(tiny_checkpoint, heads=4, prediction="noise")
    with pytest.raises(OptionError, match="schedule"):
        load_model(tiny_checkpoint, heads=4, schedule="linearish")


def test_network_is_the_authors_architecture(rng: np.random.Generator) -> None:
    """Against the published forward pass, written out once more from the paper with plain tensor operations."""
    config = TINY_CONDITIONAL
    state = random_state(config)
    network = UViT(config)
    network.load_state_dict(state)
    x = torch.from_numpy(rng.standard_normal((2, 3, 8, 8), np.float32))
    t, y = torch.tensor([5.0, 700.0]), torch.tensor([1, 3])
    with torch.no_grad():
        found = network.eval()(x, t, y)
    assert torch.allclose(found, published_forward(state, config, x, t, y), atol=1e-4, rtol=1e-4)


def published_forward(
    w: dict[str, torch.Tensor], config: UViTConfig, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    dim, patch, side = config.embed_dim, config.patch_size, config.image_size // config.patch_size

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        out = h @ w[f"{name}.weight"].T
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def norm(name: str, h: torch.Tensor) -> torch.Tensor:
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(name: str, h: torch.Tensor) -> torch.Tensor:
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", h))
        heads = qkv.reshape(len(h), -1, 3, config.heads, dim // config.heads)
        q, k, v = (heads[:, :, i].transpose(1, 2) for i in range(3))
        attention = (q @ k.transpose(2, 3) / (dim // config.heads) ** 0.5).softmax(-1) @ v
        h = h + linear(f"{name}.attn.proj", attention.transpose(1, 2).flatten(2))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))
        return h + linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))

    frequencies = 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = t[:, None] * frequencies
    time_token = torch.cat([angles.cos(), angles.sin()], 1)[:, None]
    patches = x.reshape(len(x), 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(len(x), side**2, -1)
    tokens = patches @ w["patch_embed.proj.weight"].reshape(dim, -1).T + w["patch_embed.proj.bias"]
    h = torch.cat([w["label_emb.weight"][y][:, None], time_token, tokens], 1) + w["pos_embed"]
    h = skip = block("in_blocks.0", h)
    h = block("mid_block", h)
    h = block("out_blocks.0", linear("out_blocks.0.skip_linear", torch.cat([h, skip], -1)))
    pixels = linear("decoder_pred", norm("norm", h))[:, 2:].reshape(len(x), side, side, patch, patch, 3)
    image = pixels.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, 8, 8)
    return torch.nn.functional.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)


@pytest.mark.parametrize(
    "entry,message",
    [
        ('"heads": "4"', "heads is '4'; expected int"),
        ('"heads": 4.0', "heads is 4.0; expected int"),
        ('"null_class": "4"', "null_class is '4'; expected int"),
        ('"sampler": "fast"', "sampler 'fast' is not known"),
        ('"value_range": [1, -1]', r"value_range is \[1, -1\]; expected two finite numbers, the lower first"),
        ('"value_range": "abc"', "value_range is 'abc'"),
        ('"schedule": 3', "schedule is 3; expected str or Mapping"),
    ],
)
def test_a_stored_configuration_is_checked(tmp_path: Path, entry: str, message: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", TINY)
    (tmp_path / "x.json").write_text("{" + entry + "}")
    with pytest.raises(CheckpointError, match=f"the configuration of .*: {message}"):
        load_model(checkpoint)


def test_a_number_that_no_float_holds(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="expected two finite numbers"):
        load_model(tiny_checkpoint, heads=4, value_range=(-1, 10**400))


def test_settings_that_no_family_knows(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="spares: no setting of a uvit model"):
        load_model(tiny_checkpoint, heads=4, spares=True)


def test_sparsedm_layers_have_a_bias_whatever_the_configuration_says(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", UViTConfig(8, 2, 3, 32, 0, 4, qkv_bias=True))
    (tmp_path / "x.json").write_text('{"heads": 4, "qkv_bias": false}')
    assert load_model(checkpoint).config.qkv_bias


def shapes_of(config: UViTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in UViT(config).state_dict().items()}


@pytest.mark.parametrize("hidden", [60, 61, 59, 163, 44, 1])
def test_a_width_is_read_off_the_shapes(tmp_path: Path, hidden: int) -> None:
    config = UViTConfig(8, 2, 3, 44, 2, 4, mlp_hidden=hidden)
    checkpoint = save_checkpoint(tmp_path / "x.pth", config)
    model = load_model(checkpoint, heads=4)
    assert model.config == config
    assert model.network(model.checkpoint.state).mid_block.mlp.fc1.weight.shape == (hidden, 44)  # type: ignore[union-attr]


@pytest.mark.parametrize("ratio", [60 / 44, 1.3636, 1.364, 1.36, 1.4, 1.363, 1.37])
def test_a_rounded_ratio_agrees_with_what_it_rounds(ratio: float) -> None:
    config, _ = FAMILY.read_config(
        shapes_of(UViTConfig(8, 2, 3, 44, 2, 4, mlp_hidden=60)), {"heads": 4, "mlp_ratio": ratio}
    )
    assert config.mlp_hidden == 60


@pytest.mark.parametrize("ratio", [4, 1, 1.0, 2.0, 1.3, 1.5])
def test_a_ratio_that_does_not_is_refused_saying_both(ratio: float) -> None:
    with pytest.raises(
        CheckpointError, match=rf"mlp_ratio is {ratio!r} in the .* but the weights have 60 \(1\.36364\)"
    ):
        FAMILY.read_config(shapes_of(UViTConfig(8, 2, 3, 44, 2, 4, mlp_hidden=60)), {"heads": 4, "mlp_ratio": ratio})


@pytest.mark.parametrize("ratio", ["4", True, float("nan"), [4]])
def test_a_ratio_that_is_no_number(ratio: object) -> None:
    with pytest.raises(CheckpointError, match="mlp_ratio is .* expected a number"):
        FAMILY.read_config(shapes_of(TINY), {"heads": 4, "mlp_ratio": ratio})


def test_manifests_of_earlier_versions_have_the_ratio() -> None:
    for hidden in range(1, 400):
        values = {**dataclasses.asdict(UViTConfig(8, 2, 3, 44, 2, 4)), "mlp_ratio": hidden / 44}
        del values["mlp_hidden"]
        assert FAMILY.config_from_dict(values).mlp_hidden == hidden


@pytest.mark.parametrize(
    "key,message",
    [
        ("context_embed.weight", r"this is a text-to-image U-ViT; expected one that .*\n.*--family uvit-t2i"),
        ("clip_img_embed.weight", r"this is UniDiffuser, which is not offered: it denoises an image and its text"),
        ("text_embed.weight", "this is UniDiffuser"),
        ("in_blocks.0.norm3.weight", "this is UniDiffuser"),
    ],
)
def test_relatives_of_a_uvit_are_named(key: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(key)} is there: {message}"):
        FAMILY.read_config({**shapes_of(TINY), key: (32, 768), "pos_embed": (1, 334, 32)}, {"heads": 4})


def test_what_is_missing_and_what_is_there_instead_are_both_said(tmp_path: Path) -> None:
    state = random_state(TINY)
    state["mid_block.norm1.beta"] = state.pop("mid_block.norm1.bias")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"1 missing key.*norm1\.bias; 1 unexpected key.*norm1\.beta"):
        load_model(tmp_path / "x.pth", heads=4)


def test_a_null_class_of_a_model_without_labels(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="null class 4 is given, and the model has no labels"):
        load_model(tiny_checkpoint, heads=4, null_class=4)
