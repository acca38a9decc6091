"""Two networks side by side: what each layer is given is what hooks see in whole networks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_engine.export.bake import chosen_layers
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning.graph import Traced, trace
from sparse_engine.pruning.walk import Walk, inputs_of
from tests.export import test_unet2d
from tests.pruning.states import states_of
from tests.test_families import SMALL_UNET

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module", params=["uvit", "unet"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, conditional_checkpoint: Path
) -> Model:
    if request.param == "uvit":
        return load_model(conditional_checkpoint, heads=4, null_class=4)
    folder = tmp_path_factory.mktemp("unet2d")
    test_unet2d.saved(folder, SMALL_UNET)
    return load_model(folder, image_size=8)


@pytest.fixture(scope="module")
def traced(model: Model) -> Traced:
    network = model.network(model.checkpoint.state)
    return trace(network, model.config, {name: network.get_submodule(name) for name in chosen_layers(model)})


def test_residuals_are_found(model: Model, traced: Traced) -> None:
    ends = ("attn.proj", "mlp.fc2", "resnets.0.conv2", "resnets.1.conv2", "to_out.0")
    for group in traced.groups:
        for layer in group:
            assert (layer.beside is not None) == layer.name.endswith(ends), layer.name


def seen_by(network: nn.Module, names: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.__setitem__(name, given[0])
        )
        for name in names
    ]
    network(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["in memory", "on disk"])
def test_layers_are_given_what_both_networks_give_them(
    model: Model, traced: Traced, tmp_path: Path, budget: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("sparse_engine.pruning.walk.SPILL_FROM", 1)
    states, network, names = states_of(model, 40), traced.network, chosen_layers(model)
    pruned = copy.deepcopy(network)
    for name in names[1:]:  # the first stays as it is
        pruned.get_submodule(name).weight.mul_(0.9)
    folder = tmp_path / "spilled"
    folder.mkdir()
    walk = Walk(traced, names[1:], states, 16, budget, folder)
    inputs = inputs_of(states, walk.traced)
    expected = [seen_by(each, names, inputs) for each in (network, pruned)]
    found: list[str] = []
    batches = 0

    def count() -> None:
        nonlocal batches
        batches += 1

    for group in walk.stop_before_each(count):
        given = list(walk.given(group))
        for layer in group:
            found.append(layer.name)
            lacking = [each.missing[group.index(layer)] for each in given]
            assert all(each is None for each in lacking) or all(
                each.numel() // len(each) == math.prod(layer.node.meta["val"].shape[1:]) and bool(each.any())
                for each in lacking
            )
            for side, of_side in zip(("dense", "pruned"), expected, strict=True):
                whole = torch.cat([getattr(each, side) for each in given])
                assert torch.allclose(whole, of_side[layer.name], atol=1e-5), (layer.name, side)
            if layer.name in names[1:]:
                walk.replace(layer.name, pruned.get_submodule(layer.name).weight)
    assert sorted(found) == sorted(names)
    assert batches == 3 * len(walk.stops)
    assert bool(walk.kept.spilled) == (budget == 0)
    assert len(list(folder.iterdir())) == len(walk.kept.files)  # what nothing uses any more is gone
