"""Which layers get which mask, and what the report says of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import bake
from sparse_engine.export.build import calibrated_otherwise
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.masks import Pattern, is_n_of_m, magnitude_mask
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.write import warnings_of
from tests.conftest import TINY, TINY_CONDITIONAL, random_state, save_checkpoint


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return load_model(tiny_checkpoint, heads=4)


def test_sparsedm_masks_these_layers_and_no_others(model: Model) -> None:
    baked = bake(model)
    masked = {layer.name for layer in baked.layers if layer.masked}
    blocks = ("in_blocks.0", "mid_block", "out_blocks.0")
    assert masked == {
        f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for name, array in baked.state.items():
        stored = model.checkpoint.state[name]
        layer = name.removesuffix(".weight")
        expected = stored * magnitude_mask(stored)[0] if layer in masked and name.endswith(".weight") else stored
        assert np.array_equal(array, expected)


def test_a_uvit_s_has_52_masked_layers() -> None:
    """Depth 12 is 6 + 1 + 6 blocks of 4 layers."""
    from sparse_engine.export.families.uvit import FAMILY, UViT

    with torch.device("meta"):
        network = UViT(UViTConfig(32, 2, 3, 512, 12, 8))
    names = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    from fnmatch import fnmatchcase

    assert sum(any(fnmatchcase(name, glob) for glob in FAMILY.sparse_layers) for name in names) == 52


def test_report_counts_parameters_macs_and_energy(model: Model) -> None:
    layer = next(layer for layer in bake(model).layers if layer.name == "mid_block.mlp.fc1")
    assert layer.shape == (128, 32)
    assert (layer.parameters, layer.nonzeros) == (4096, 2048)
    assert (layer.macs, layer.macs_nonzero) == (4096 * 17, 2048 * 17)  # 16 patches and the time token
    assert layer.energy_removed == pytest.approx(0.133, abs=0.02)
    assert (layer.source, layer.pattern, layer.hardware_24, layer.reason) == ("magnitude", "2:4", True, None)


def test_weights_never_trained_with_a_mask_are_warned_of(model: Model) -> None:
    assert any("warning: the mask removes 1" in note for note in warnings_of(bake(model)))
    assert not any("warning" in note for note in warnings_of(bake(model, "none")))


def test_weights_that_are_24_already_are_left_alone(tmp_path: Path, model: Model) -> None:
    baked = bake(model)
    torch.save({name: torch.from_numpy(array) for name, array in baked.state.items()}, tmp_path / "x.pth")
    again = bake(load_model(tmp_path / "x.pth", heads=4))
    assert {layer.source for layer in again.layers if layer.masked} == {"zeros"}
    assert all(np.array_equal(again.state[name], array) for name, array in baked.state.items())
    assert all(layer.energy_removed == 0 for layer in again.layers)


def test_explicit_masks_are_multiplied_in_whatever_the_rule(tmp_path: Path) -> None:
    state = random_state(TINY)
    weight = state.pop("mid_block.mlp.fc1.weight")
    mask = torch.tensor([0.0, 1, 1, 0]).repeat(weight.numel() // 4).reshape(weight.shape)
    torch.save(
        {**state, "mid_block.mlp.fc1.weight_orig": weight, "mid_block.mlp.fc1.weight_mask": mask}, tmp_path / "x.pth"
    )
    for rule in ("auto", "none", "magnitude"):
        baked = bake(load_model(tmp_path / "x.pth", heads=4), rule)
        assert np.array_equal(baked.state["mid_block.mlp.fc1.weight"], (weight * mask).numpy())
        assert next(layer for layer in baked.layers if layer.name == "mid_block.mlp.fc1").source == "explicit"


def test_rules_that_a_checkpoint_does_not_bear(model: Model) -> None:
    with pytest.raises(CheckpointError, match="carries no explicit mask"):
        bake(model, "explicit")
    with pytest.raises(CheckpointError, match="its stored weights are not 2:4"):
        bake(model, "zeros")
    with pytest.raises(OptionError, match="mask rule 'best' is not known"):
        bake(model, "best")


def test_layers_by_glob(model: Model) -> None:
    baked = bake(model, layers=["*.skip_linear", "patch_embed.*"])
    assert [layer.name for layer in baked.layers if layer.masked] == ["patch_embed.proj", "out_blocks.0.skip_linear"]
    patch_embed = baked.layers[0]
    assert (patch_embed.hardware_24, patch_embed.reason) == (False, "3 inputs are no multiple of 4")
    assert any("patch_embed.proj is not 2:4" in note for note in warnings_of(baked))
    with pytest.raises(OptionError, match=r"'encoder.\*' matches none of the"):
        bake(model, layers=["encoder.*"])


def test_a_layer_that_cannot_be_cut_into_groups_stays_dense(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", UViTConfig(6, 2, 1, 34, 0, 2))
    baked = bake(load_model(checkpoint, heads=2), layers=["final_layer", "mid_block.mlp.fc1"])
    final = next(layer for layer in baked.layers if layer.name == "final_layer")
    assert (final.masked, final.reason) == (False, "9 weights are no multiple of 4")


def test_other_patterns_are_baked_but_never_called_24(tmp_path: Path) -> None:
    model = load_model(save_checkpoint(tmp_path / "x.pth", TINY_CONDITIONAL), heads=4)
    baked = bake(model, pattern=Pattern(7, 8))
    fc1 = baked.state["mid_block.mlp.fc1.weight"]
    assert is_n_of_m(fc1, Pattern(7, 8))
    assert not baked.sparse_layers
    assert "7:8 is baked in but is not 2:4: no sparse kernel takes it" in warnings_of(baked)
    one_of_16 = bake(model, pattern=Pattern(1, 16))
    assert one_of_16.sparse_layers  # at most one of 16 is also at most two of 4
    said = warnings_of(one_of_16)
    assert "1:16 is baked in but is not 2:4: 2:4 kernels run it, and skip half of the weights" in said
    assert not any("baked in" in note for note in warnings_of(bake(model, "none", Pattern(7, 8))))


@pytest.mark.parametrize(
    "rule,collected,warning",
    [
        ("auto", False, "built with masks and the calibration data was collected without: calibrate with --sparse"),
        ("none", True, "built without masks and the calibration data was collected with them: calibrate without"),
        ("auto", True, None),
        ("none", False, None),
        ("auto", None, None),  # collected by an earlier version, which did not say
    ],
)
def test_calibration_with_other_masks_is_said(
    rule: str, collected: bool | None, warning: str | None, tmp_path: Path
) -> None:
    baked = bake(load_model(save_checkpoint(tmp_path / "x.pth", TINY_CONDITIONAL), heads=4), rule)
    nothing = np.zeros(0)
    facts = {} if collected is None else {"masked": collected}
    notes = calibrated_otherwise(CalibrationData(nothing, nothing, nothing, None, nothing, facts), baked)
    assert [warning in note for note in notes] == ([True] if warning else [])


def test_an_explicit_mask_on_a_bias_is_multiplied_in_too(tmp_path: Path) -> None:
    state = random_state(TINY)
    bias = state.pop("mid_block.mlp.fc1.bias")
    torch.save(
        {**state, "mid_block.mlp.fc1.bias_orig": bias, "mid_block.mlp.fc1.bias_mask": bias * 0}, tmp_path / "x.pth"
    )
    assert not bake(load_model(tmp_path / "x.pth", heads=4), "none").state["mid_block.mlp.fc1.bias"].any()


def with_masks(path: Path, masks: dict[str, torch.Tensor]) -> Model:
    """A tiny model some of whose layers carry masks."""
    torch.save({**random_state(TINY), **{f"{name}.weight_mask": mask for name, mask in masks.items()}}, path)
    return load_model(path, heads=4)


TWO_OF_FOUR = torch.tensor([0.0, 1, 1, 0])


@pytest.mark.parametrize("stored", ["explicit", "zeros"])
def test_layers_that_a_pruned_checkpoint_kept_dense_stay_dense(tmp_path: Path, stored: str) -> None:
    mask = TWO_OF_FOUR.repeat(1024).reshape(128, 32)
    if stored == "explicit":
        model = with_masks(tmp_path / "x.pth", {"mid_block.mlp.fc1": mask})
    else:
        state = random_state(TINY)
        state["mid_block.mlp.fc1.weight"] *= mask
        torch.save(state, tmp_path / "x.pth")
        model = load_model(tmp_path / "x.pth", heads=4)
    baked = bake(model)
    assert {layer.name: layer.source for layer in baked.layers if layer.masked} == {"mid_block.mlp.fc1": stored}
    assert np.array_equal(baked.state["mid_block.mlp.fc2.weight"], model.checkpoint.state["mid_block.mlp.fc2.weight"])
    (note,) = warnings_of(baked)
    assert note.startswith("in_blocks.0.attn.proj, in_blocks.0.attn.qkv")
    assert "are not 2:4: dense weights, in a checkpoint of which other layers are pruned" in note
    assert len([layer for layer in bake(model, "magnitude").layers if layer.masked]) == 12


def test_masks_and_weights_that_say_nothing_of_pruning(tmp_path: Path) -> None:
    model = with_masks(tmp_path / "x.pth", {"mid_block.mlp.fc1": torch.ones(128, 32)})
    model.checkpoint.state["mid_block.attn.proj.weight"][:] = 0
    layers = {layer.name: layer for layer in bake(model).layers}
    assert layers["mid_block.mlp.fc1"].reason == "its stored mask keeps every weight"
    assert layers["mid_block.mlp.fc2"].source == "magnitude"


@pytest.mark.parametrize(
    "layers,pattern,reason",
    [
        ("patch_embed.proj", Pattern(2, 4), "3 inputs are no multiple of 4"),
        ("patch_embed.proj", Pattern(1, 4), "3 inputs are no multiple of 4"),
        ("patch_embed.proj", Pattern(3, 4), "3 inputs are no multiple of 4 and 3:4 is not 2:4"),
        ("mid_block.mlp.fc1", Pattern(3, 4), "3:4 is not 2:4"),
        ("mid_block.mlp.fc1", Pattern(2, 3), "4096 weights are no multiple of 3"),
    ],
)
def test_every_reason_that_holds_is_given(model: Model, layers: str, pattern: Pattern, reason: str) -> None:
    baked = bake(model, "magnitude", pattern, [layers])
    assert next(layer for layer in baked.layers if layer.name == layers).reason == reason


def test_the_pattern_asked_for_says_nothing_of_an_explicit_mask(tmp_path: Path) -> None:
    dense_groups = torch.tensor([1.0, 1, 1, 0]).repeat(1024).reshape(128, 32)
    layers = {
        layer.name: layer
        for layer in bake(
            with_masks(tmp_path / "x.pth", {"mid_block.mlp.fc1": dense_groups}), pattern=Pattern(7, 8)
        ).layers
    }
    layer = layers["mid_block.mlp.fc1"]
    assert (layer.source, layer.pattern, layer.reason) == ("explicit", "7:8", "more than 2 of 4 along the inputs")
    layers = {
        layer.name: layer for layer in bake(with_masks(tmp_path / "x.pth", {"mid_block.mlp.fc1": dense_groups})).layers
    }
    assert layers["mid_block.mlp.fc1"].pattern is None


def test_a_layer_that_has_no_groups_is_not_said_to_lack_zeros(model: Model) -> None:
    with pytest.raises(CheckpointError, match="final_layer: 81 weights are no multiple of 4(?s:.*)--mask-layers"):
        bake(model, "zeros", layers=["final_layer"])


class Grouped(torch.nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 8, 1, groups=4)


def test_a_convolution_in_groups(model: Model) -> None:
    family = dataclasses.replace(model.family, network=Grouped, positions=lambda config, layer: 1, sparse_layers=("*",))
    state = {"conv.weight": np.ones((8, 2, 1, 1), np.float32), "conv.bias": np.ones(8, np.float32)}
    grouped = dataclasses.replace(model, family=family, checkpoint=dataclasses.replace(model.checkpoint, state=state))
    (layer,) = bake(grouped, "magnitude").layers
    assert (layer.kind, layer.reason) == ("conv", "2 inputs in each of 4 groups are no multiple of 4")
