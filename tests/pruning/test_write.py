"""What a pruned checkpoint looks like on disk, and that a build obeys what it says of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_engine.errors import CheckpointError, OptionError, OutputError
from sparse_engine.export.bake import bake, chosen_layers
from sparse_engine.export.masks import TWO_FOUR, Pattern, magnitude_mask
from sparse_engine.export.model import Model, load_model
from sparse_engine.pruning.gram import Work
from sparse_engine.pruning.oneshot import KEPT_DENSE, LayerResult, Pruned, PruneOptions
from sparse_engine.pruning.write import output_for, write_pruned
from tests.conftest import TINY, TINY_CONDITIONAL, random_state, save_checkpoint
from tests.export import test_unet2d
from tests.test_families import SMALL_UNET


def cut(model: Model, dense: tuple[str, ...] = (), pattern: Pattern = TWO_FOUR) -> Pruned:
    """A model whose smallest weights are cut away: what is written does not depend on how it was pruned."""
    layers, tensors = [], {}
    for name in chosen_layers(model):
        weight = model.checkpoint.state[f"{name}.weight"]
        reason = KEPT_DENSE if name in dense else f"no multiple of {pattern.m}" if weight.shape[1] % pattern.m else None
        layers.append(LayerResult(name, "linear", weight.shape, reason is None, reason))
        if reason is None:
            tensors[f"{name}.weight"] = torch.from_numpy(weight * magnitude_mask(weight, pattern)[0])
    return Pruned(tensors, layers, PruneOptions(pattern=pattern), Work(), 1.0)


def written(checkpoint: Path, output: Path, *dense: str, pattern: Pattern = TWO_FOUR, **given: Any) -> Path:
    model = load_model(checkpoint, **given)
    path = output_for(checkpoint, output)
    write_pruned(checkpoint, path, model, cut(model, dense, pattern))
    return path


def test_names_types_and_what_is_not_pruned_stay(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor.half() for name, tensor in random_state(TINY).items()}
    torch.save({"step": 7, "nnet_ema": state, "optimizer": {"lr": torch.ones(3)}}, tmp_path / "x.pth")
    path = written(tmp_path / "x.pth", tmp_path / "y.safetensors", heads=4)
    found = load_file(path)
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        kept = tensor != 0
        assert torch.equal(tensor[kept], state[name][kept])
        pruned = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) and "embed" not in name
        assert int(kept.sum()) == (kept.numel() // 2 if pruned else int((state[name] != 0).sum())), name
    again = load_model(path)  # heads and all are in the configuration beside it
    assert again.config == load_model(tmp_path / "x.pth", heads=4).config
    assert {layer.source for layer in bake(again).layers if layer.masked} == {"zeros"}


def test_the_record_is_in_the_file_itself(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = written(tiny_checkpoint, tmp_path / "y.safetensors", "mid_block.mlp.fc1", heads=4)
    with safe_open(path, framework="pt") as opened:
        record = json.loads(opened.metadata()["config"])["pruning"]
    assert record["dense"] == {"mid_block.mlp.fc1": KEPT_DENSE}
    assert (record["pattern"], len(record["pruned"])) == ("2:4", 11)
    moved = tmp_path / "elsewhere.safetensors"
    path.rename(moved)
    assert load_model(moved, heads=4).checkpoint.config["pruning"] == record


def test_auto_obeys_the_record(tmp_path: Path, tiny_checkpoint: Path) -> None:
    spared = ("mid_block.mlp.fc1", "in_blocks.0.attn.qkv")
    model = load_model(written(tiny_checkpoint, tmp_path / "y.safetensors", *spared, heads=4))
    layers = {layer.name: layer for layer in bake(model).layers}
    for name in spared:
        assert (layers[name].masked, layers[name].reason) == (False, KEPT_DENSE)
    assert sum(layer.source == "zeros" for layer in layers.values()) == 10
    assert bake(model, "magnitude").layers != bake(model).layers  # which masks all, as it is told to
    trained = dict(model.checkpoint.state)  # a layer that was pruned, and trained on without its zeros
    trained["mid_block.mlp.fc2.weight"] = np.random.default_rng(0).standard_normal((32, 128), np.float32)
    checkpoint = dataclasses.replace(model.checkpoint, state=trained)
    again = {layer.name: layer for layer in bake(dataclasses.replace(model, checkpoint=checkpoint)).layers}
    assert again["mid_block.mlp.fc2"].source == "magnitude"
    assert not again["mid_block.mlp.fc1"].masked


def test_another_pattern_is_known_by_the_record(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = load_model(written(tiny_checkpoint, tmp_path / "y.safetensors", pattern=Pattern(7, 8), heads=4))
    baked = bake(model)
    assert {(layer.source, layer.pattern) for layer in baked.layers if layer.masked} == {("zeros", "7:8")}
    assert all(np.array_equal(baked.state[name], array) for name, array in model.checkpoint.state.items())


@pytest.mark.parametrize("record", [7, {"pattern": "2:4"}, {"pattern": "4:2", "pruned": [], "dense": {}}])
def test_a_record_that_is_none_is_refused(tmp_path: Path, record: Any) -> None:
    save_file(random_state(TINY), tmp_path / "x.safetensors", {"config": json.dumps({"pruning": record})})
    with pytest.raises(CheckpointError, match='the configuration\'s "pruning"'):
        bake(load_model(tmp_path / "x.safetensors", heads=4))


def test_explicit_masks_become_zeros_under_plain_names(tmp_path: Path) -> None:
    state = random_state(TINY)
    weight = state.pop("out_blocks.0.skip_linear.weight")
    mask = torch.ones_like(weight)
    mask[:, 0] = 0
    torch.save(
        {**state, "out_blocks.0.skip_linear.weight_orig": weight, "out_blocks.0.skip_linear.weight_mask": mask},
        tmp_path / "x.pth",
    )
    found = load_file(written(tmp_path / "x.pth", tmp_path / "y.safetensors", heads=4))
    assert torch.equal(found["out_blocks.0.skip_linear.weight"], weight * mask)
    assert not any(name.endswith(("_orig", "_mask")) for name in found)


def test_another_projects_names_and_shapes_stay(tmp_path: Path) -> None:
    state = test_unet2d.ermongroup_state((32, 64), 1, 1)
    torch.save(state, tmp_path / "model.ckpt")
    path = written(tmp_path / "model.ckpt", tmp_path / "y.safetensors")
    found = load_file(path)
    assert {name: each.shape for name, each in found.items()} == {name: each.shape for name, each in state.items()}
    attention = [name for name in found if ".attn" in name and name.endswith("q.weight")]
    assert attention
    assert all(int((found[name] == 0).sum()) == found[name].numel() // 2 for name in attention)
    assert {layer.source for layer in bake(load_model(path)).layers if layer.masked} == {"zeros"}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_diffusers_is_one_again(tmp_path: Path, sharded: bool) -> None:
    from diffusers import UNet2DModel

    folder, out = tmp_path / "unet2d", tmp_path / "pruned"
    network = test_unet2d.saved(folder, SMALL_UNET)
    if sharded:
        for file in (folder / "unet").glob("diffusion_pytorch_model*"):
            file.unlink()
        network.save_pretrained(folder / "unet", max_shard_size="30KB")
    (folder / "notes.txt").write_text("kept")
    written(folder, out, "up_blocks.0.resnets.0.conv1", image_size=8)
    assert (out / "notes.txt").read_text() == "kept"
    assert [file.name for file in (out / "unet").glob("diffusion*")] == ["diffusion_pytorch_model.safetensors"]
    loaded = UNet2DModel.from_pretrained(out / "unet")
    dense = {name for name, each in loaded.state_dict().items() if torch.equal(each, network.state_dict()[name])}
    assert "up_blocks.0.resnets.0.conv1.weight" in dense
    assert "up_blocks.0.resnets.0.conv2.weight" not in dense
    assert not load_model(out, image_size=8).family.class_names.isdisjoint({"UNet2DModel"})
    layers = {layer.name: layer for layer in bake(load_model(out, image_size=8)).layers}
    assert layers["up_blocks.0.resnets.0.conv1"].reason == KEPT_DENSE
    with pytest.raises(OutputError, match="is there already and is not an empty folder"):
        output_for(folder, out)


def test_averaged_weights_of_a_pipeline_take_the_place_of_the_raw(tmp_path: Path) -> None:
    folder = tmp_path / "unet2d"
    test_unet2d.saved(folder, SMALL_UNET)
    (folder / "unet").rename(folder / "unet_ema")
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"raw")
    out = written(folder, tmp_path / "pruned", image_size=8)
    assert not (out / "unet_ema").exists()
    assert sorted(file.name for file in (out / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_where_the_result_may_go(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "x.pth", TINY_CONDITIONAL)
    assert output_for(checkpoint, tmp_path) == tmp_path / "x.safetensors"
    with pytest.raises(OptionError, match=r"ends in .safetensors"):
        output_for(checkpoint, tmp_path / "x.pth")
    same = tmp_path / "y.safetensors"
    save_file(random_state(TINY), same)
    with pytest.raises(OptionError, match="is the dense checkpoint itself"):
        output_for(same, same)
    with pytest.raises(OutputError, match="does not exist"):
        output_for(checkpoint, tmp_path / "no" / "y.safetensors")
