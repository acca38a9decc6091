"""DiT against Meta's formulas in float64 NumPy and against diffusers' own module; what is read, assumed, refused."""

import argparse
import copy
import dataclasses
import fractions
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.checkpoint import load_checkpoint
from sparse_engine.export.families import FAMILIES, dit, dit_diffusers, recognise
from sparse_engine.export.families.dit import DiT, DiTConfig
from sparse_engine.export.families.dit_diffusers import DiffusersDiT, DiffusersDiTConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower
from sparse_engine.export.step_graph import check_graph, export_step_graph
from sparse_engine.sampling import make_trajectory, schedule_from_dict
from tests.export.references import Array, relative_error, two_of_four
from tests.export.test_step_graph import session_of

LATENT = DiTConfig(8, 2, 4, 64, 2, 4, 11, out_channels=8, null_row=True)
PIXEL = DiTConfig(6, 1, 3, 96, 3, 3, 5, mlp_hidden=160)
CONFIGS = {"latents, learned variance": LATENT, "pixels, eps alone": PIXEL}
MASKED = (".attn.qkv.weight", ".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight")
DIFFUSERS_MASKED = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", ".proj.weight", ".net.2.weight")


def scaled(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random weights of which every one shows in the output, none drowning another."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator) * (tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)
        for name, tensor in state.items()
    }


def random_state(config: DiTConfig) -> dict[str, torch.Tensor]:
    network = DiT(config)
    return {**scaled(network.state_dict()), "pos_embed": network.pos_embed}


def save(folder: Path, config: DiTConfig) -> Path:
    torch.save(random_state(config), folder / "x.pt")
    return folder / "x.pt"


def shapes_of(network: Callable[[Any], torch.nn.Module], config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in network(config).state_dict().items()}


def published_forward(w: Mapping[str, Array], config: DiTConfig, x: Array, t: Array, y: Array) -> Array:
    """Meta's forward pass, from the paper and the key names: [B, out_channels, H, W], in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    dim, patch, channels = config.embed_dim, config.patch_size, config.channels
    batch, side = len(x), config.image_size // patch

    def linear(name: str, h: Array) -> Array:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(h: Array) -> Array:
        return h / (1 + np.exp(-h))

    def norm(h: Array) -> Array:
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    def attention(name: str, h: Array) -> Array:
        each = dim // config.heads
        q, k, v = linear(f"{name}.qkv", h).reshape(batch, -1, 3, config.heads, each).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(each))
        seen = scores / scores.sum(-1, keepdims=True) @ v
        return linear(f"{name}.proj", seen.transpose(0, 2, 1, 3).reshape(h.shape))

    def mlp(name: str, h: Array) -> Array:
        h = linear(f"{name}.fc1", h)
        return linear(f"{name}.fc2", h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))

    angles = t[:, None].astype(np.float64) * 10000 ** (-np.arange(128) / 128)
    time = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time)))
    c = silu(c + w["y_embedder.embedding_table.weight"][y])
    cut = x.reshape(batch, channels, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    h = cut @ w["x_embedder.proj.weight"].reshape(dim, -1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    for i in range(config.depth):
        parts = np.split(linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None], 6, axis=-1)
        h = h + parts[2] * attention(f"blocks.{i}.attn", norm(h) * (1 + parts[1]) + parts[0])
        h = h + parts[5] * mlp(f"blocks.{i}.mlp", norm(h) * (1 + parts[4]) + parts[3])
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", c)[:, None], 2, axis=-1)
    pixels = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    image = pixels.reshape(batch, side, side, patch, patch, config.out_channels).transpose(0, 5, 1, 3, 2, 4)
    return image.reshape(batch, config.out_channels, *x.shape[2:])


def inputs(config: Any, batch: int, passes: int = 1) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, *config.data_shape), np.float32)
    t = np.resize(np.array([999.0, 0.0, 20.98, 500.5, 333.25], np.float32), batch)
    return x, t, rng.integers(0, config.num_classes, (passes, batch))


def run(network: torch.nn.Module, x: Array, t: Array, y: Array) -> Array:
    with torch.no_grad():
        return network(torch.from_numpy(x), torch.from_numpy(t), y=torch.from_numpy(y)).numpy()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_network_is_metas_architecture(config: DiTConfig, sparse: bool, tmp_path: Path, one_torch_thread: None) -> None:
    model = load_model(save(tmp_path, config), heads=config.heads)
    assert model.config == config
    network = model.network(bake(model, "magnitude" if sparse else "none").state)
    weights = {
        name: two_of_four(tensor.numpy()) if sparse and name.endswith(MASKED) else tensor.numpy()
        for name, tensor in random_state(config).items()
    }
    for batch in (1, 3, 17):
        x, t, y = inputs(config, batch)
        assert relative_error(run(network, x, t, y[0]), published_forward(weights, config, x, t, y[0])) < 1e-4


@pytest.fixture(scope="module", params=[None, 3], ids=["all channels", "3 channels"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("dit")
    guided = "all" if request.param is None else request.param
    model = load_model(save(folder, LATENT), heads=LATENT.heads, guidance_channels=guided)
    assert model.config.guided_channels == request.param
    baked = bake(model, "magnitude")
    graph = export_step_graph(model.network(baked.state), model.config)
    return baked, graph, session_of(graph, folder), request.param


@pytest.mark.parametrize("batch,guidance", [(1, [4.0, -3.0]), (3, [1.0]), (17, [4.0, -3.0])])
def test_exported_step_is_metas_network_and_the_solver(
    exported: tuple[Baked, Any, Any, int | None], batch: int, guidance: list[float]
) -> None:
    baked, _, session, guided = exported
    rng = np.random.default_rng(1)
    x, t, y = inputs(LATENT, batch, len(guidance))
    y[-1] = 10 if len(guidance) == 2 else y[-1]
    others = {name: rng.standard_normal(x.shape, np.float32) for name in ("base", "h1", "h2", "z")}
    coef, clip = rng.standard_normal(8).astype(np.float32), np.array([-9, 9], np.float32)
    feed = {"x": x, "t": t, "y": y, "guidance": np.array(guidance, np.float32), "coef": coef, "clip": clip}
    assert [entry.name for entry in session.get_inputs()] == [*feed, *others]
    x_next, m = session.run(["x_next", "m"], feed | others)
    passes = [published_forward(baked.state, LATENT, x, t, each)[:, :4] for each in y]
    eps = np.tensordot(guidance, np.stack(passes), 1)
    if guided is not None:
        eps = np.concatenate([eps[:, :guided], passes[0][:, guided:]], axis=1)
    expected_m = (coef[0] * x + coef[1] * eps).clip(*clip)
    terms = (x, others["base"], expected_m, others["h1"], others["h2"], others["z"])
    assert relative_error(m, expected_m) < 1e-4
    assert relative_error(x_next, sum(c * term for c, term in zip(coef[2:], terms, strict=True))) < 1e-4


def test_the_graph_holds_the_baked_weights(exported: tuple[Baked, Any, Any, int | None]) -> None:
    baked, graph, _, _ = exported
    check_graph(graph, baked.state)
    assert set(graph.layers) == {layer.name for layer in baked.layers}
    assert {f"{layer.name}.weight" for layer in baked.sparse_layers} == {n for n in baked.state if n.endswith(MASKED)}


@pytest.mark.parametrize("precision,allowed", [("fp16", 5e-3), ("bf16", 4e-2)])
def test_a_lower_precision_keeps_the_ends_in_float32(precision: str, allowed: float, tmp_path: Path) -> None:
    model = load_model(save(tmp_path, LATENT), heads=LATENT.heads)
    network = lower(model.network(model.checkpoint.state), model.family.float32_layers, precision)
    kept = {name for name, part in network.named_parameters() if part.ndim > 1 and part.dtype == torch.float32}
    ends = {name for name in model.checkpoint.state if name.endswith("weight") and not name.startswith("blocks.")}
    assert kept == ends
    x, t, y = inputs(LATENT, 3)
    expected = published_forward(model.checkpoint.state, LATENT, x, t, y[0])
    assert 1e-5 < relative_error(run(network, x, t, y[0]), expected) < allowed


SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_read_off_their_shapes(size: str, patch: int) -> None:
    dim, depth, heads = SIZES[size]
    config = DiTConfig(32, patch, 4, dim, depth, heads, 1001, out_channels=8, null_row=True)
    shapes = shapes_of(DiT, config)
    assert recognise(shapes, "x.pt") is dit.FAMILY
    found, notes = dit.FAMILY.read_config(shapes, {})
    assert found == config
    assert [note.split(":")[0].split(" =")[0] for note in notes] == ["heads", "masked layers", "family"]
    assert found.conditions == (Condition("y", (), "int64", classes=1001),)


def test_a_new_network_begins_at_zero_and_its_positions_are_not_trained() -> None:
    network = DiT(LATENT)
    x, t, y = inputs(LATENT, 2)
    assert not run(network, x, t, y[0]).any()
    assert network.blocks[0].attn.qkv.weight.any()
    assert "pos_embed" in network.state_dict()
    assert "pos_embed" not in dict(network.named_parameters())
    side = network.pos_embed.reshape(4, 4, 64)  # rows and columns of patches
    assert torch.equal(side[0, :, 32:], side[0, :1, 32:].expand(4, -1))  # the second half is of the row
    assert torch.equal(side[:, 0, :32], side[:1, 0, :32].expand(4, -1))
    np.testing.assert_allclose(side[3, 2, :16], np.sin(2 * 10000 ** (-np.arange(16) / 16)), atol=1e-6)
    np.testing.assert_allclose(side[3, 2, 48:], np.cos(3 * 10000 ** (-np.arange(16) / 16)), atol=1e-6)


def test_arithmetic_and_recipe_of_dit_xl_2() -> None:
    """118.6 Gflop as the paper counts them (multiply-adds), of which products of tokens with tokens are 28 x 2."""
    config = DiTConfig(32, 2, 4, 1152, 28, 16, 1001, out_channels=8, null_row=True)
    layers = {name.removesuffix(".weight"): s for name, s in shapes_of(DiT, config).items() if name.endswith("weight")}
    counted = sum(
        math.prod(shape) * dit.FAMILY.positions(config, layer)
        for layer, shape in layers.items()
        if "table" not in layer
    )
    assert counted + 28 * 2 * 256**2 * 1152 == pytest.approx(118.64e9, rel=2e-3)
    recipe = dit.FAMILY.recipe(config)
    assert (recipe.prediction, recipe.value_range, recipe.null_class, recipe.sampler) == ("eps", None, 1000, "ddim")
    assert isinstance(recipe.schedule, dict)
    schedule = schedule_from_dict(recipe.schedule)
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(schedule.alpha(np.arange(1, 1001) / 1000) ** 2, np.cumprod(1 - betas), rtol=1e-9)
    np.testing.assert_allclose(schedule.network_time(np.arange(1, 1001) / 1000), np.arange(1000), atol=1e-9)
    assert make_trajectory("ddim", schedule, 50).network_times[0] == 999
    assert "variances" in recipe.excluded["ddpm"]


def test_a_model_without_learned_variance_is_offered_every_sampler() -> None:
    assert dit.FAMILY.recipe(PIXEL).excluded == {}
    assert dit.FAMILY.recipe(PIXEL).value_range == (-1.0, 1.0)
    assert dit.FAMILY.recipe(PIXEL).null_class is None


@pytest.mark.parametrize(
    "rows,given,null",
    [
        (1001, {}, True),
        (11, {}, True),
        (101, {}, False),
        (101, {"num_classes": 100}, True),
        (101, {"num_classes": 101}, False),
    ],
)
def test_which_row_is_no_label(rows: int, given: dict[str, Any], null: bool) -> None:
    config = dataclasses.replace(LATENT, num_classes=rows, null_row=null)
    found, notes = dit.FAMILY.read_config(shapes_of(DiT, config), {"heads": 4, **given})
    assert found == config
    assert dit.FAMILY.recipe(found).null_class == (rows - 1 if null else None)
    assert any("null class = none" in note for note in notes) is not null


def trained(folder: Path, config: DiTConfig, **line: Any) -> Path:
    """A file as Meta's train.py writes it; the raw weights are not those to be used."""
    state = random_state(config)
    raw = {name: tensor + 1 for name, tensor in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    args = argparse.Namespace(data_path="/data", vae="ema", global_seed=0, resume=None, **line)
    torch.save({"model": raw, "ema": state, "opt": optimizer, "args": args}, folder / "0400000.pt")
    return folder / "0400000.pt"


def test_a_training_checkpoint_is_read_with_its_command_line(tmp_path: Path) -> None:
    small = DiTConfig(16, 8, 4, 384, 12, 6, 21, out_channels=8, null_row=True)
    path = trained(tmp_path, small, model="DiT-S/8", image_size=128, num_classes=20)
    model = load_model(path)
    assert (model.family, model.config, model.recipe.null_class) == (dit.FAMILY, small, 20)
    expected = random_state(small)["blocks.3.attn.qkv.weight"].numpy()
    assert np.array_equal(model.checkpoint.state["blocks.3.attn.qkv.weight"], expected)
    assert any("averaged weights taken from the entry 'ema'" in note for note in model.notes)
    assert not any("heads" in note or "args" in note for note in model.notes)


def test_a_command_line_that_does_not_fit_is_said_and_the_weights_count(tmp_path: Path) -> None:
    path = trained(tmp_path, LATENT, model="DiT-XL/2", image_size=512, num_classes=1000)
    with pytest.raises(CheckpointError, match="no published size"):
        load_model(path)
    model = load_model(path, heads=4)
    assert model.config == LATENT
    about = [note for note in model.notes if note.startswith("args:")]
    assert len(about) == 2
    assert "DiT-XL/2, which the weights are not" in about[0]
    assert "512 pixels, and the weights are for 8 a side" in about[1]


@pytest.mark.parametrize(
    "foreign", [fractions.Fraction(1, 2), pathlib.PurePosixPath("/x"), argparse.ArgumentParser, copy.deepcopy]
)
def test_no_other_object_of_python_is_taken(foreign: Any, tmp_path: Path) -> None:
    for holder in (foreign, argparse.Namespace(inner=foreign)):
        torch.save({"ema": random_state(LATENT), "args": holder}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="holds Python objects that are not weights; they were not run"):
            load_model(tmp_path / "x.pt", heads=4)


def test_a_namespace_alone_is_no_checkpoint_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save(argparse.Namespace(a=1), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a Namespace; expected a dictionary of tensors"):
        load_checkpoint(tmp_path / "x.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


def test_stored_positions_are_used_and_held_against_the_formula(tmp_path: Path) -> None:
    state = random_state(LATENT)
    torch.save(state, tmp_path / "x.pt")
    assert not any("pos_embed" in note for note in load_model(tmp_path / "x.pt", heads=4).notes)
    state["pos_embed"] = state["pos_embed"] + 0.25
    torch.save(state, tmp_path / "x.pt")
    model = load_model(tmp_path / "x.pt", heads=4)
    assert any("pos_embed is not the published formula's (they differ by up to 0.25)" in n for n in model.notes)
    x, t, y = inputs(LATENT, 3)
    found = run(model.network(model.checkpoint.state), x, t, y[0])
    weights = {name: tensor.numpy() for name, tensor in state.items()}
    assert relative_error(found, published_forward(weights, LATENT, x, t, y[0])) < 1e-4


def test_a_configuration_survives_the_manifest() -> None:
    for config in (LATENT, PIXEL, dataclasses.replace(LATENT, guidance_channels=3)):
        stored = json.loads(json.dumps(dataclasses.asdict(config)))
        assert dit.FAMILY.config_from_dict({**stored, "family": "dit"}) == config
        assert dit.FAMILY.read_config(shapes_of(DiT, config), stored)[0] == config


@pytest.mark.parametrize(
    "change,given,error,message",
    [
        ({}, {}, CheckpointError, r"embed_dim 64 with depth 2 is no published size\n.*--heads N"),
        ({}, {"num_heads": 5}, OptionError, "heads = 5 does not divide embed_dim = 64"),
        ({}, {"hidden_size": 384}, CheckpointError, "embed_dim is 384 in the given .* weights have 64"),
        ({}, {"num_classes": 1000}, CheckpointError, "num_classes is 1000 in the given .* have 11 rows"),
        ({}, {"guidance_channels": 5}, OptionError, r"guidance_channels is 5; expected 'all', or .* from 1 to 4\n"),
        ({}, {"guidance_channels": 0}, OptionError, "guidance_channels is 0"),
        ({}, {"guidance_channels": True}, OptionError, "guidance_channels is True"),
        ({}, {"guidance_channels": "three"}, OptionError, "guidance_channels is 'three'"),
        ({"pos_embed": (1, 15, 64)}, {}, CheckpointError, "pos_embed has 15 positions: not a square image"),
        ({"pos_embed": None}, {}, CheckpointError, "pos_embed is missing; a DiT has it"),
        ({"x_embedder.proj.weight": (66, 4, 2, 2)}, {}, CheckpointError, "embed_dim is 66; expected a multiple of 4"),
        ({"final_layer.linear.weight": (24, 64)}, {}, CheckpointError, "has 24 rows; expected 16, .* or twice that"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, tuple[int, ...] | None], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    shapes = {name: shape for name, shape in {**shapes_of(DiT, LATENT), **change}.items() if shape is not None}
    with pytest.raises(error, match=message):
        dit.FAMILY.read_config(shapes, given if given.keys() & {"num_heads"} or not given else {"heads": 4, **given})


def theirs(**options: Any) -> Any:
    """diffusers' own module with random weights, each block with embedders of its own."""
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    build: Any = DiTTransformer2DModel
    module = build(**{**sizes, "in_channels": 4, "out_channels": 8, **options}).eval()
    module.load_state_dict(scaled(module.state_dict()))
    return module


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "other options": {"attention_bias": False, "norm_eps": 0.1, "out_channels": None, "num_embeds_ada_norm": 7},
}


def store(folder: Path, module: Any) -> Path:
    module.save_pretrained(folder / "transformer")
    return folder / "transformer"


def load_theirs(folder: Path, module: Any, **given: Any) -> Model:
    return load_model(store(folder, module), **given)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_network_is_diffusers(options: dict[str, Any], sparse: bool, tmp_path: Path, one_torch_thread: None) -> None:
    module = theirs(**options)
    model = load_theirs(tmp_path, module)
    assert model.family is dit_diffusers.FAMILY
    assert model.recipe.null_class == module.config.num_embeds_ada_norm
    baked = bake(model, "magnitude" if sparse else "none")
    if sparse:
        state = module.state_dict()
        masked = {n for n in state if n.endswith(DIFFUSERS_MASKED) and n.startswith("transformer_blocks.")}
        assert {f"{layer.name}.weight" for layer in baked.layers if layer.masked} == masked
        assert len(masked) == 12
        module.load_state_dict(
            {n: torch.from_numpy(two_of_four(w.numpy())) if n in masked else w for n, w in state.items()}
        )
    network = model.network(baked.state)
    for batch in (1, 3, 17):
        x, t, y = inputs(model.config, batch)
        with torch.no_grad():
            expected = module(*(torch.from_numpy(each) for each in (x, t, y[0]))).sample.numpy()
        assert relative_error(run(network, x, t, y[0]), expected) < 1e-4


def test_exported_step_of_diffusers_network(tmp_path: Path) -> None:
    module = theirs()
    model = load_theirs(tmp_path, module, guidance_channels=3)
    baked = bake(model, "none")
    graph = export_step_graph(model.network(baked.state), model.config)
    check_graph(graph, baked.state)
    assert set(graph.layers) == {layer.name for layer in baked.layers}
    x, t, y = inputs(model.config, 3, 2)
    zeros = {name: np.zeros_like(x) for name in ("base", "h1", "h2", "z")}
    coef, clip = np.array([0, 1, 0, 0, 1, 0, 0, 0], np.float32), np.array([-1e9, 1e9], np.float32)
    feed = {"x": x, "t": t, "y": y, "guidance": np.array([1.5, -0.5], np.float32), "coef": coef, "clip": clip}
    (m,) = session_of(graph, tmp_path).run(["m"], feed | zeros)
    with torch.no_grad():
        first, second = (
            module(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(each)).sample[:, :4].numpy() for each in y
        )
    expected = 1.5 * first - 0.5 * second
    expected[:, 3] = first[:, 3]
    assert relative_error(m, expected) < 1e-4


def test_a_lower_precision_of_diffusers_network(tmp_path: Path) -> None:
    module = theirs()
    model = load_theirs(tmp_path, module)
    network = lower(model.network(model.checkpoint.state), model.family.float32_layers, "fp16")
    x, t, y = inputs(model.config, 3)
    with torch.no_grad():
        expected = module(*(torch.from_numpy(each) for each in (x, t, y[0]))).sample.numpy()
    assert 1e-5 < relative_error(run(network, x, t, y[0]), expected) < 5e-3
    kept = {n for n, p in network.named_parameters() if p.ndim > 1 and p.dtype == torch.float32}
    assert {n for n in kept if n.startswith("transformer_blocks.")} == {
        n for n in model.checkpoint.state if ".norm1.emb." in n and n.endswith("weight")
    }


def test_diffusers_published_model_is_read_off_its_shapes_and_configuration() -> None:
    config = DiffusersDiTConfig(32, 2, 4, 1152, 28, 16, 1001, out_channels=8, null_row=True)
    shapes = shapes_of(DiffusersDiT, config)
    hub = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 32,
    }
    assert [family for family in FAMILIES if family.recognises(shapes)] == [dit_diffusers.FAMILY]
    found, notes = dit_diffusers.FAMILY.read_config(shapes, hub)
    assert found == config
    assert [note.partition(" =")[0] for note in notes] == ["norm_eps", "masked layers"]
    recipe = dit_diffusers.FAMILY.recipe(found)
    assert (recipe.null_class, recipe.sampler, list(recipe.excluded)) == (1000, "ddim", ["ddpm"])
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert dit_diffusers.FAMILY.config_from_dict(stored) == config
    assert dit_diffusers.FAMILY.read_config(shapes, stored)[0] == config
    once = {"transformer_blocks.3.norm1.emb.timestep_embedder.linear_1", "transformer_blocks.3.norm1.linear"}
    assert {dit_diffusers.FAMILY.positions(found, layer) for layer in (*once, "proj_out_1")} == {1}
    assert {dit_diffusers.FAMILY.positions(found, f"transformer_blocks.3.{n}") for n in ("attn1.to_q", "ff.net.2")} == {
        256
    }


@pytest.mark.parametrize(
    "given,error,message",
    [
        ({"sample_size": None}, CheckpointError, r"size of the image cannot be read off the weights.*\n.*config.json"),
        ({"sample_size": 7}, CheckpointError, "image_size is 7 in the .* expected a multiple of the patch size 2"),
        ({"_class_name": "PixArtTransformer2DModel"}, CheckpointError, "_class_name is 'PixArt.*; expected DiTTransfo"),
        ({"norm_type": "ada_norm_single"}, CheckpointError, "norm_type is 'ada_norm_single' .* expected 'ada_norm_ze"),
        ({"activation_fn": "geglu"}, CheckpointError, "activation_fn is 'geglu'"),
        ({"norm_elementwise_affine": True}, CheckpointError, "norm_elementwise_affine is True"),
        ({"norm_eps": 0}, CheckpointError, "norm_eps is 0 in the given configuration; expected a number above 0"),
        ({"num_embeds_ada_norm": 999}, CheckpointError, "num_embeds_ada_norm is 999 in the given .* have 11 rows"),
        ({"num_layers": 3}, CheckpointError, "depth is 3 in the given .* weights have 2"),
        ({"attention_head_dim": 72}, CheckpointError, "attention_head_dim is 72 .* have embed_dim 64"),
        ({"num_attention_heads": None}, CheckpointError, "no published size"),
        ({"guidance_channels": 9}, OptionError, "guidance_channels is 9"),
    ],
)
def test_diffusers_configurations_that_do_not_fit(given: dict[str, Any], error: type[Exception], message: str) -> None:
    config = DiffusersDiTConfig(8, 2, 4, 64, 2, 2, 11)
    with pytest.raises(error, match=message):
        dit_diffusers.FAMILY.read_config(
            shapes_of(DiffusersDiT, config), {"sample_size": 8, "num_attention_heads": 2, **given}
        )
