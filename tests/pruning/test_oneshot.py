"""Whole models pruned: what comes out, what stays dense, what is refused; and the same after a stop at any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.errors import CheckpointError, NonFiniteError, OptionError
from sparse_engine.export.masks import Pattern, is_n_of_m
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning import oneshot
from sparse_engine.pruning.graph import trace
from sparse_engine.pruning.journal import Journal
from sparse_engine.pruning.oneshot import KEPT_DENSE, Pruned, PruneOptions, prune, worst
from tests.conftest import TINY, random_state
from tests.pruning.states import states_of

pytestmark = pytest.mark.usefixtures("without_gradients")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def model(conditional_checkpoint: Path) -> Model:
    return load_model(conditional_checkpoint, heads=4, null_class=4)


@pytest.fixture(autouse=True)
def traced_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes longer than the rest of these tests."""

    def again(network: Any, config: Any, selected: Any) -> Any:
        key = tuple(selected), config
        if key not in TRACED:
            TRACED[key] = trace(network, config, selected)
        kept = TRACED[key]
        modules = {layer.name: network.get_submodule(layer.name) for group in kept.groups for layer in group}
        groups = [[dataclasses.replace(each, module=modules[each.name]) for each in group] for group in kept.groups]
        return dataclasses.replace(kept, groups=groups, network=network)

    monkeypatch.setattr(oneshot, "trace", again)


TRACED: dict[Any, Any] = {}


def pruned_by(
    model: Model, folder: Path, progress: Callable[[int, int, str], None] = lambda *at: None, **options: Any
) -> Pruned:
    states = options.pop("states", None) or states_of(model)
    journal = Journal(folder / "out", {"a": 1})
    return prune(model, states, PruneOptions(**options), journal, folder, progress)


def prediction(model: Model, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    states = states_of(model, 16, seed=9)
    state = {**model.checkpoint.state, **{name: tensor.numpy() for name, tensor in tensors.items()}}
    network = model.network(state)
    told = {name: torch.from_numpy(rows) for name, rows in states.conditioning.items()}
    return network(torch.from_numpy(states.x), torch.from_numpy(states.network_times), **told)


def test_all_selected_layers_are_24_and_the_prediction_is_close(model: Model, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    full = pruned_by(model, tmp_path, lambda *at: seen.append(at))
    assert [layer.pruned for layer in full.layers] == [True] * 12
    weights = {name: each for name, each in full.tensors.items() if name.endswith(".weight")}
    assert len(weights) == 12
    assert all(is_n_of_m(weight.numpy()) for weight in weights.values())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert {what for _, _, what in seen} >= {layer.name for layer in full.layers}
    dense = prediction(model, {})
    error = {"full": (prediction(model, full.tensors) - dense).norm()}
    for method in ("sparsegpt", "magnitude"):
        other = pruned_by(model, tmp_path / method, method=method) if (tmp_path / method).mkdir() is None else full
        error[method] = (prediction(model, other.tensors) - dense).norm()
    assert error["full"] < 0.7 * error["sparsegpt"] < 0.7 * error["magnitude"]


def test_the_report_is_of_each_layer(model: Model, tmp_path: Path) -> None:
    full = pruned_by(model, tmp_path)
    for layer in full.layers:
        assert 0 < layer.error < layer.by_magnitude
        assert layer.states > 0
        assert layer.damping > 0
    assert full.layers[0].inherited == pytest.approx(0, abs=1e-6)
    assert full.layers[-1].inherited > 1e-4
    assert full.report(tmp_path)["layers"][0]["shape"] == [96, 32]
    assert full.work.flops > 1e6


def test_the_most_damaged_stay_dense_and_the_rest_is_pruned_without_them(model: Model, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    everything = pruned_by(model, tmp_path / "all")
    some = pruned_by(model, tmp_path, dense_layers=3)
    dense = [layer.name for layer in some.layers if not layer.pruned]
    assert sorted(dense) == sorted(worst(everything.layers, 3))
    assert some.record()["dense"] == dict.fromkeys(dense, KEPT_DENSE)
    assert not {name for name in some.tensors if name.rpartition(".")[0] in dense}
    (tmp_path / "globs").mkdir()
    globs = [layer.name for layer in some.layers if layer.pruned]
    alone = pruned_by(model, tmp_path / "globs", layers=globs)
    assert all(torch.allclose(alone.tensors[name], some.tensors[name], atol=1e-5) for name in some.tensors)


@pytest.mark.parametrize("dense_layers", [0, 2])
def test_a_stopped_job_goes_on_and_gives_the_same_bits(model: Model, tmp_path: Path, dense_layers: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = pruned_by(model, tmp_path / "whole", dense_layers=dense_layers)
    for last in (3, 9):

        def stop(done: int, total: int, what: str, last: int = last) -> None:
            if done >= last * total // 12:
                raise Stop

        with pytest.raises(Stop):
            pruned_by(model, tmp_path, stop, dense_layers=dense_layers)
    found = {path.stem for path in (tmp_path / "out.partial").rglob("*.npz")}
    assert len(found) >= 6
    again = pruned_by(model, tmp_path, dense_layers=dense_layers)
    assert again.work.flops < whole.work.flops  # what was done was not done again
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert again.layers == whole.layers


def test_a_damaged_layer_of_a_journal_is_pruned_anew(model: Model, tmp_path: Path) -> None:
    whole = pruned_by(model, tmp_path)
    for name in ("mid_block.mlp.fc1", "out_blocks.0.attn.proj"):
        (tmp_path / "out.partial" / "first" / f"{name}.npz").write_bytes(b"PK")
    again = pruned_by(model, tmp_path)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_journal_of_another_job_is_not_gone_on_with(tmp_path: Path) -> None:
    Journal(tmp_path / "x.safetensors", {"method": "full", "seed": 0})
    with pytest.raises(OptionError, match=r"x.safetensors.partial was begun with method = 'full', and this is 'wanda'"):
        Journal(tmp_path / "x.safetensors", {"method": "wanda", "seed": 0})
    (tmp_path / "x.safetensors.partial" / "job.json").write_text("{")
    with pytest.raises(OptionError, match="is no job of prune"):
        Journal(tmp_path / "x.safetensors", {"method": "full", "seed": 0})


def test_states_on_disk_give_the_same(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    whole = pruned_by(model, tmp_path / "memory")
    monkeypatch.setattr("sparse_engine.pruning.walk.SPILL_FROM", 1)
    monkeypatch.setattr(oneshot, "MATRICES", 0)
    monkeypatch.setattr(oneshot, "OF_BUDGET", 0.01)
    spilled = pruned_by(model, tmp_path, memory=100_000)
    assert spilled.spilled > 0
    assert all(torch.equal(spilled.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_other_patterns_and_layers(model: Model, tmp_path: Path) -> None:
    found = pruned_by(model, tmp_path, pattern=Pattern(1, 8), layers=["mid_block.*", "patch_embed.proj"])
    assert {layer.name for layer in found.layers if layer.pruned} == {
        f"mid_block.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert found.record()["dense"] == {"patch_embed.proj": "3 inputs are no multiple of 8"}
    assert is_n_of_m(found.tensors["mid_block.mlp.fc2.weight"].numpy(), Pattern(1, 8))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"method": "best"}, "method 'best' is not known; expected one of full, sparsegpt, wanda, magnitude"),
        ({"dense_layers": -1}, "dense_layers is -1"),
        ({"dense_layers": 12}, "12 of the 12 selected layers can be pruned, and 12 are to stay dense"),
        ({"layers": ["encoder.*"]}, "matches none of the"),
        ({"memory": 1000}, "mlp.fc2 sums 128 products: its matrices take"),
    ],
)
def test_options_that_cannot_be(model: Model, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pruned_by(model, tmp_path, **options)


def test_too_few_states_are_said(model: Model, tmp_path: Path) -> None:
    found = pruned_by(model, tmp_path, states=states_of(model, 2))
    assert any("mid_block.mlp.fc2 36 of 128" in note or "36 of 128" in note for note in found.notes)


def test_states_that_are_nan_are_refused(model: Model, tmp_path: Path) -> None:
    states = states_of(model)
    states.x[3, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"in_blocks.0.attn.qkv is given NaN"):
        pruned_by(model, tmp_path, states=states)


def test_what_is_24_already_is_refused_but_by_force(tmp_path: Path) -> None:
    state = random_state(TINY)
    state["mid_block.mlp.fc1.weight"].view(-1, 4)[:, :2] = 0
    torch.save(state, tmp_path / "x.pth")
    model = load_model(tmp_path / "x.pth", heads=4)
    with pytest.raises(CheckpointError, match="1 of the 12 selected layers are 2:4 already: mid_block.mlp.fc1"):
        oneshot.check_prunable(model, PruneOptions())
    names, spared = oneshot.check_prunable(model, PruneOptions(force=True))
    assert (len(names), spared) == (12, {})
