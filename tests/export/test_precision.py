"""Lowered networks: what is rounded, what is not, and what it costs on the trained digits model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.masks import is_n_of_m
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import lower

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "sparsedm.pth"
LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def digits() -> tuple[Model, Baked]:
    model = load_model(DIGITS)
    return model, bake(model)


def lowered(digits: tuple[Model, Baked], precision: str) -> nn.Module:
    model, baked = digits
    return lower(model.network(baked.state), model.family.float32_layers, precision)


def predict(network: nn.Module, t: float) -> torch.Tensor:
    torch.manual_seed(0)
    x, times, labels = torch.randn(11, 1, 8, 8), torch.full((11,), t), torch.arange(11)
    with torch.no_grad():
        return network(x, times, labels)


def test_fp32_is_left_alone(digits: tuple[Model, Baked]) -> None:
    model, baked = digits
    plain = model.network(baked.state)
    network = lower(plain, model.family.float32_layers, "fp32")
    assert network is plain
    assert torch.equal(predict(network, 500.0), predict(model.network(baked.state), 500.0))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", LOW)
def test_large_products_are_low_and_the_rest_is_not(digits: tuple[Model, Baked], precision: str) -> None:
    network = lowered(digits, precision)
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    low = {name.rpartition(".")[0] for name, kind in kinds.items() if kind == LOW[precision]}
    masked = {layer.name for layer in digits[1].sparse_layers}
    skips = {name for name in low if name.endswith("skip_linear")}
    assert low == masked | skips
    assert len(skips) == 2
    assert {kind for name, kind in kinds.items() if name.rpartition(".")[0] not in low} == {torch.float32}
    assert predict(network, 500.0).dtype == torch.float32  # the network's end is


@pytest.mark.parametrize("precision", LOW)
def test_norms_and_embeddings_compute_in_float32(digits: tuple[Model, Baked], precision: str) -> None:
    network, seen = lowered(digits, precision), {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear)):
            module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.dtype}))
    predict(network, 500.0)
    assert {kind for name, kind in seen.items() if "norm" in name} == {torch.float32}
    assert seen["mid_block.mlp.fc1"] == LOW[precision]
    assert seen["decoder_pred"] == torch.float32


@pytest.mark.parametrize("precision,least,most", [("fp16", 1e-5, 2e-3), ("bf16", 1e-4, 2e-2)])
def test_error_on_the_trained_model(digits: tuple[Model, Baked], precision: str, least: float, most: float) -> None:
    model, baked = digits
    exact, network = model.network(baked.state), lowered(digits, precision)
    for t in (999.0, 500.0, 100.0, 10.0):
        expected = predict(exact, t)
        error = float((predict(network, t) - expected).abs().max() / expected.abs().max())
        assert least < error < most


@pytest.mark.parametrize("precision", LOW)
def test_24_survives_and_masks_are_those_of_float32(digits: tuple[Model, Baked], precision: str) -> None:
    state = lowered(digits, precision).state_dict()
    for layer in digits[1].sparse_layers:
        weight = state[f"{layer.name}.weight"].float().numpy()
        assert is_n_of_m(weight)
        baked = digits[1].state[f"{layer.name}.weight"]
        assert np.count_nonzero((weight != 0) & (baked == 0)) == 0


def test_a_weight_beyond_fp16_is_named(digits: tuple[Model, Baked]) -> None:
    model, baked = digits
    weight = baked.state["mid_block.attn.proj.weight"].copy()
    weight[0, 0] = -1e5
    network = model.network({**baked.state, "mid_block.attn.proj.weight": weight})
    with pytest.raises(CheckpointError, match=r"mid_block.attn.proj.weight holds 1e\+05, .* of fp16 \(65504\)\n.*bf16"):
        lower(network, model.family.float32_layers, "fp16")
    lower(network, model.family.float32_layers, "bf16")


def test_unknown_precision(digits: tuple[Model, Baked]) -> None:
    with pytest.raises(OptionError, match="precision 'fp4' is not known; expected one of fp32, fp16, bf16"):
        lowered(digits, "fp4")


@pytest.mark.parametrize(
    "precision,value,message",
    [
        ("fp16", 1e5, r"0\.weight holds 1e\+05, which is beyond the range of fp16 \(65504\)\n.*--precision bf16"),
        ("bf16", 3.4e38, r"beyond the range of bf16 \(3\.3895e\+38\)\n.*--precision fp32"),
    ],
)
def test_weights_beyond_a_range_name_it(precision: str, value: float, message: str) -> None:
    network = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    nn.init.constant_(network[0].weight, value)
    with pytest.raises(CheckpointError, match=message):
        lower(network, (), precision)
