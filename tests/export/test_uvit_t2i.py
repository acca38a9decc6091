"""The text-to-image U-ViT against the authors' formulas in float64 NumPy, and what is read, assumed and refused."""

import dataclasses
import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.families import FAMILIES, Recipe, family_named, recognise
from sparse_engine.export.families.uvit import UViT, UViTConfig
from sparse_engine.export.families.uvit_t2i import FAMILY, UViTT2I, UViTT2IConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower
from sparse_engine.export.step_graph import check_graph, export_step_graph
from sparse_engine.sampling import make_trajectory, schedule_from_dict
from tests.export.references import Array, relative_error, two_of_four
from tests.export.test_step_graph import session_of

SHORT = UViTT2IConfig(8, 2, 4, 64, 4, 2, context_dim=24, context_length=7)
CLIP = UViTT2IConfig(
    6, 1, 3, 96, 4, 3, 160, qkv_bias=True, mlp_time_embed=True, final_conv=False, context_dim=40, context_length=77
)
PLAIN = UViTT2IConfig(8, 4, 4, 64, 4, 4, skip=False, context_dim=16, context_length=7)
CONFIGS = {"latents, 7 vectors": SHORT, "pixels, 77 vectors, every option": CLIP, "no skips": PLAIN}
S2 = UViTT2IConfig(32, 2, 4, 512, 12, 8)
DEEP = dataclasses.replace(S2, depth=16)


def random_state(config: UViTT2IConfig) -> dict[str, torch.Tensor]:
    """Weights of which every one shows in the output, none drowning another."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in UViTT2I(config).state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim >= 2 and name != "pos_embed":
            value *= tensor[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * value
        state[name] = value
    return state


def save(folder: Path, config: UViTT2IConfig) -> Path:
    torch.save(random_state(config), folder / "x.pth")
    return folder / "x.pth"


def load(folder: Path, config: UViTT2IConfig, **given: Any) -> Model:
    return load_model(save(folder, config), heads=config.heads, context_length=config.context_length, **given)


def shapes_of(config: UViTT2IConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in UViTT2I(config).state_dict().items()}


def published_forward(w: Mapping[str, Array], config: UViTT2IConfig, x: Array, t: Array, context: Array) -> Array:
    """The authors' forward pass, from the paper and the key names: [B, C, H, W], in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    dim, patch, channels = config.embed_dim, config.patch_size, config.channels
    batch, side = len(x), config.image_size // patch

    def linear(name: str, h: Array) -> Array:
        return h @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name: str, h: Array) -> Array:
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name: str, h: Array) -> Array:
        each = dim // config.heads
        q, k, v = linear(f"{name}.qkv", h).reshape(batch, -1, 3, config.heads, each).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(each))
        seen = scores / scores.sum(-1, keepdims=True) @ v
        return linear(f"{name}.proj", seen.transpose(0, 2, 1, 3).reshape(h.shape))

    def block(name: str, h: Array, skip: Array | None = None) -> Array:
        if skip is not None:
            h = linear(f"{name}.skip_linear", np.concatenate([h, skip], -1))
        h = h + attention(f"{name}.attn", norm(f"{name}.norm1", h))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))
        return h + linear(f"{name}.mlp.fc2", hidden * (1 + erf(hidden / math.sqrt(2))) / 2)

    angles = t[:, None] / 10000 ** (np.arange(dim // 2) / (dim // 2))
    time = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    if "time_embed.0.weight" in w:
        hidden = linear("time_embed.0", time)
        time = linear("time_embed.2", hidden / (1 + np.exp(-hidden)))
    cut = x.reshape(batch, channels, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    patches = cut @ w["patch_embed.proj.weight"].reshape(dim, -1).T + w["patch_embed.proj.bias"]
    h = np.concatenate([time[:, None], linear("context_embed", context), patches], 1) + w["pos_embed"]
    skips: list[Array] = []
    for i in range(config.depth // 2):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(config.depth // 2):
        h = block(f"out_blocks.{i}", h, skips.pop() if config.skip else None)
    pixels = linear("decoder_pred", norm("norm", h))[:, 1 + config.context_length :]
    image = pixels.reshape(batch, side, side, patch, patch, channels).transpose(0, 5, 1, 3, 2, 4).reshape(x.shape)
    if "final_layer.weight" not in w:
        return image
    height, width = x.shape[2:]
    padded = np.pad(image, [(0, 0), (0, 0), (1, 1), (1, 1)])
    taps = [[padded[:, :, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
    return np.einsum("ijbchw,ocij->bohw", taps, w["final_layer.weight"]) + w["final_layer.bias"][:, None, None]


def inputs(config: UViTT2IConfig, batch: int, passes: int = 1) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, *config.data_shape), np.float32)
    t = np.resize(np.array([1.0, 1000.0, 20.98, 500.5, 333.25], np.float32), batch)
    return x, t, rng.standard_normal((passes, batch, config.context_length, config.context_dim), np.float32)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_network_is_the_authors_architecture(
    config: UViTT2IConfig, sparse: bool, tmp_path: Path, one_torch_thread: None
) -> None:
    model = load(tmp_path, config)
    assert model.config == config
    network = model.network(bake(model, "magnitude" if sparse else "none").state)
    masked = (".attn.qkv.weight", ".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")
    weights = {
        name: two_of_four(tensor.numpy()) if sparse and name.endswith(masked) else tensor.numpy()
        for name, tensor in random_state(config).items()
    }
    for batch in (1, 3, 17):
        x, t, context = inputs(config, batch)
        found = network(*(torch.from_numpy(each) for each in (x, t, context[0]))).numpy()
        assert relative_error(found, published_forward(weights, config, x, t, context[0])) < 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Baked, Any, Any]:
    folder = tmp_path_factory.mktemp("t2i")
    model = load(folder, SHORT)
    baked = bake(model, "magnitude")
    graph = export_step_graph(model.network(baked.state), model.config)
    return baked, graph, session_of(graph, folder)


@pytest.mark.parametrize("batch,guidance", [(1, [2.0, -1.0]), (3, [1.0]), (17, [2.0, -1.0])])
def test_exported_step_is_the_authors_network_and_the_solver(
    exported: tuple[Baked, Any, Any], batch: int, guidance: list[float]
) -> None:
    baked, _, session = exported
    rng = np.random.default_rng(1)
    x, t, context = inputs(SHORT, batch, len(guidance))
    others = {name: rng.standard_normal(x.shape, np.float32) for name in ("base", "h1", "h2", "z")}
    coef, clip = rng.standard_normal(8).astype(np.float32), np.array([-1.5, 1.5], np.float32)
    feed = {"x": x, "t": t, "context": context, "guidance": np.array(guidance, np.float32), "coef": coef, "clip": clip}
    assert [entry.name for entry in session.get_inputs()] == [*feed, *others]
    x_next, m = session.run(["x_next", "m"], feed | others)
    eps = sum(w * published_forward(baked.state, SHORT, x, t, each) for w, each in zip(guidance, context, strict=True))
    expected_m = (coef[0] * x + coef[1] * eps).clip(*clip)
    terms = (x, others["base"], expected_m, others["h1"], others["h2"], others["z"])
    assert relative_error(m, expected_m) < 1e-4
    assert relative_error(x_next, sum(c * term for c, term in zip(coef[2:], terms, strict=True))) < 1e-4


def test_the_graph_holds_the_baked_weights_of_sparsedms_layers(exported: tuple[Baked, Any, Any]) -> None:
    baked, graph, _ = exported
    check_graph(graph, baked.state)
    assert set(graph.layers) == {layer.name for layer in baked.layers}
    sparse = {layer.name for layer in baked.sparse_layers}
    assert len(sparse) == 4 * (SHORT.depth + 1)
    assert all(name.endswith((".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2")) for name in sparse)
    weight = baked.state["mid_block.mlp.fc1.weight"]
    assert np.array_equal(weight, two_of_four(random_state(SHORT)["mid_block.mlp.fc1.weight"].numpy()))


@pytest.mark.parametrize("precision,allowed", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_a_lower_precision_keeps_the_ends_in_float32(precision: str, allowed: float, tmp_path: Path) -> None:
    model = load(tmp_path, SHORT)
    network = lower(model.network(model.checkpoint.state), FAMILY.float32_layers, precision)
    products = {
        n: m.weight.dtype for n, m in network.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }
    kept = {name for name, dtype in products.items() if dtype == torch.float32}
    assert kept == {"context_embed", "patch_embed.proj", "decoder_pred", "final_layer"}
    x, t, context = inputs(SHORT, 3)
    found = network(*(torch.from_numpy(each) for each in (x, t, context[0]))).numpy()
    error = relative_error(found, published_forward(model.checkpoint.state, SHORT, x, t, context[0]))
    assert 1e-5 < error < allowed


@pytest.mark.parametrize("config", [S2, DEEP], ids=["S/2", "S/2 deep"])
def test_published_models_are_read_off_their_shapes(config: UViTT2IConfig) -> None:
    shapes = shapes_of(config)
    assert shapes["context_embed.weight"] == (512, 768)
    assert shapes["pos_embed"] == (1, 334, 512)
    assert recognise(shapes, "x.pth") is FAMILY
    found, notes = FAMILY.read_config(shapes, {})
    assert found == config
    assert [note.partition(":")[0] for note in notes] == ["context_length = 77", "heads = 8"]
    assert found.conditions == (Condition("context", (77, 768), "float32"),)
    recipe = FAMILY.recipe(found)
    assert recipe == Recipe("stable-diffusion", "eps", None, None, "dpm-solver++-singlestep")
    told = make_trajectory(str(recipe.sampler), schedule_from_dict({"name": recipe.schedule}), 50).network_times
    assert (told[0], told[-1]) == (
        1000.0,
        pytest.approx(1000 - 49 * 999 / 50),
    )  # eval_t2i_discrete.py: 1000 t, down to 1


@pytest.mark.parametrize("config,blocks,skips", [(S2, 13, 6), (DEEP, 17, 8)], ids=["S/2", "S/2 deep"])
def test_arithmetic_of_the_published_models(config: UViTT2IConfig, blocks: int, skips: int) -> None:
    """Multiply-adds of linears and convolutions: 334 tokens in the blocks and at the head, 77 and 256 at the ends."""
    layers = {key.removesuffix(".weight"): shape for key, shape in shapes_of(config).items() if key.endswith("weight")}
    products = {layer: math.prod(shape) for layer, shape in layers.items() if len(shape) > 1}
    masked = {layer for layer in products for glob in FAMILY.sparse_layers if fnmatchcase(layer, glob)}
    counted = {layer: product * FAMILY.positions(config, layer) for layer, product in products.items()}
    in_blocks, ends = 12 * blocks * 512**2 * 334, 768 * 512 * 77 + 16 * 512 * (256 + 334) + 9 * 4 * 4 * 32**2
    assert sum(counted.values()) == in_blocks + 2 * skips * 512**2 * 334 + ends
    assert sum(counted[layer] for layer in masked) == in_blocks


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_survives_the_manifest(config: UViTT2IConfig) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert FAMILY.config_from_dict({**stored, "family": "uvit-t2i"}) == config
    assert FAMILY.read_config(shapes_of(config), stored)[0] == config


def test_pixels_have_a_range() -> None:
    assert FAMILY.recipe(CLIP).value_range == (-1.0, 1.0)
    assert FAMILY.recipe(SHORT).value_range is None


def test_a_stored_configuration_speaks_the_authors_names(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, SHORT)
    nnet = {"name": "uvit_t2i", "img_size": 8, "in_chans": 4, "num_heads": 2, "mlp_ratio": 4, "qkv_bias": False}
    (tmp_path / "x.json").write_text(json.dumps({"nnet": {**nnet, "clip_dim": 24, "num_clip_token": 7}}))
    model = load_model(checkpoint)
    assert (model.family, model.config) == (FAMILY, SHORT)
    assert not any("context_length" in note or "heads" in note for note in model.notes)
    assert load_model(checkpoint, heads=4).config.heads == 4  # the command line wins over the file


def test_families_are_told_apart() -> None:
    with torch.device("meta"):
        label = {name: tuple(tensor.shape) for name, tensor in UViT(UViTConfig(8, 2, 3, 32, 2, 4)).state_dict().items()}
    for shapes, name in ((label, "uvit"), (shapes_of(SHORT), "uvit-t2i")):
        assert [family.name for family in FAMILIES if family.recognises(shapes)] == [name]
    with pytest.raises(CheckpointError, match=r"text-to-image U-ViT; expected one .*\n.*--family uvit-t2i"):
        family_named("uvit").read_config(shapes_of(SHORT), {"heads": 2})
    with pytest.raises(CheckpointError, match=r"context_embed.weight is missing; a U-ViT has it"):
        FAMILY.read_config(label, {"heads": 4})


@pytest.mark.parametrize("key", ["clip_img_embed.weight", "text_embed.bias", "in_blocks.11.norm3.weight"])
def test_unidiffuser_is_refused_by_name(key: str, tmp_path: Path) -> None:
    state = random_state(SHORT)
    torch.save({**state, key: torch.zeros(4)}, tmp_path / "both.pth")
    del state["context_embed.weight"], state["context_embed.bias"]
    torch.save({**state, key: torch.zeros(4)}, tmp_path / "x.pth")
    for file in ("both.pth", "x.pth"):
        with pytest.raises(
            CheckpointError, match=f"{key} is there: this is UniDiffuser, which is not offered: it denoi"
        ):
            load_model(tmp_path / file, heads=2)


@pytest.mark.parametrize(
    "given,error,message",
    [
        (
            {},
            CheckpointError,
            r"24 positions, which leaves -54 patches: not a square.*\n.*77 was taken.*--context-length",
        ),
        ({"context_length": 6}, CheckpointError, r"leaves 17 patches: not a square image\n.*a text of 6 was taken"),
        ({"context_length": 23}, CheckpointError, "leaves 0 patches"),
        ({"context_length": 0}, CheckpointError, "context_length is 0 in the .*; expected a whole number above 0"),
        ({"context_length": True}, CheckpointError, "context_length is True"),
        ({"context_length": 7.0}, CheckpointError, "context_length is 7.0"),
        ({"num_clip_token": "7"}, CheckpointError, "context_length is '7'"),
        ({"context_length": 7}, CheckpointError, r"embed_dim 64 with depth 4 is no published size\n.*--heads N"),
        ({"context_length": 7, "heads": 5}, OptionError, "heads = 5 does not divide embed_dim = 64"),
        ({"context_length": 7, "clip_dim": 768}, CheckpointError, "context_dim is 768 in the given .* weights have 24"),
        ({"context_length": 7, "image_size": 16}, CheckpointError, "image_size is 16 in the given .* weights have 8"),
        ({"context_length": 7, "mlp_ratio": 2}, CheckpointError, "mlp_ratio is 2 in the given configuration"),
    ],
)
def test_configurations_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FAMILY.read_config(shapes_of(SHORT), given)


def test_another_length_of_text_that_leaves_a_square_is_taken_at_its_word() -> None:
    """The weights know the sum alone: 24 positions are 7 vectors and 16 patches, and 14 and 9 as well."""
    found, notes = FAMILY.read_config(shapes_of(SHORT), {"context_length": 14, "heads": 2})
    assert (found.context_length, found.image_size, notes) == (14, 6, [])


def test_keys_and_settings_that_are_not_its_own(tmp_path: Path) -> None:
    torch.save({**random_state(SHORT), "label_emb.weight": torch.zeros(11, 64)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"1 unexpected key\(s\) for a uvit-t2i model: label_emb.weight"):
        load_model(tmp_path / "x.pth", heads=2, context_length=7)
    state = random_state(SHORT)
    del state["context_embed.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"1 missing key\(s\) for a uvit-t2i model: context_embed.bias"):
        load_model(tmp_path / "x.pth", heads=2, context_length=7)
    torch.save({**state, "context_embed.weight": torch.zeros(64)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"context_embed.weight has shape \[64\]; expected 2 dimensions"):
        load_model(tmp_path / "x.pth", heads=2)
    with pytest.raises(OptionError, match="classes: no setting of a uvit-t2i model"):
        load_model(save(tmp_path, SHORT), heads=2, context_length=7, classes=3)
    with pytest.raises(OptionError, match="null class 3 is given, and the model has no labels"):
        load_model(tmp_path / "x.pth", heads=2, context_length=7, null_class=3)
