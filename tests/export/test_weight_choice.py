"""Which weights of a training checkpoint are taken, under which names, and that nothing is passed over in silence."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_engine.errors import CheckpointError
from sparse_engine.export.checkpoint import Checkpoint, load_checkpoint
from sparse_engine.export.model import load_model
from tests.conftest import TINY, random_state

RAW = random_state(TINY, 1)
AVERAGED = random_state(TINY, 2)
OTHER = random_state(TINY, 3)


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def without_dots(prefix: str, state: Mapping[str, Tensor], instead: str = "") -> dict[str, Tensor]:
    return {prefix + name.replace(".", instead): tensor for name, tensor in state.items()}


def shadow(state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    return {"decay": 0.999, "num_updates": 7, "shadow_params": list(state.values()), "collected_params": None, **more}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], Checkpoint]:
    """Save, and read back as a model of a known family has to be read."""

    def save_and_load(held: Any) -> Checkpoint:
        torch.save(held, tmp_path / "x.pt")
        return load_model(tmp_path / "x.pt", heads=4).checkpoint

    return save_and_load


def assert_same(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    assert checkpoint.state.keys() == state.keys()
    assert all(np.array_equal(checkpoint.state[name], tensor.numpy()) for name, tensor in state.items())


BESIDE_RAW: dict[str, dict[str, Any]] = {
    **{
        f"{averaged} beside {raw}": {
            raw: RAW,
            averaged: AVERAGED,
            "optimizer": {"state": {0: {"exp_avg": RAW["norm.bias"]}}},
        }
        for raw, averaged in [
            ("model", "ema_model"),
            ("model", "ema_state_dict"),
            ("state_dict", "state_dict_ema"),
            ("model", "model_ema"),
            ("nnet", "nnet_ema"),
            ("model", "ema"),
            ("params", "params_ema"),
            ("net", "EMA"),
            ("G", "g_ema"),
            ("model", "swa_model"),
            ("model_state_dict", "averaged_model"),
            ("model", "ema_0.9999"),
        ]
    },
    "nested two deep": {"state_dict": RAW, "ema": {"shadow": AVERAGED, "decay": 0.99}},
    "a Lightning callback": {
        "state_dict": under("model.", RAW),
        "callbacks": {"EMACallback{'decay': 0.9}": {"weights": AVERAGED}},
    },
    "Lightning's WeightAveraging": {
        "state_dict": AVERAGED,
        "current_model_state": RAW,
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "MMEngine's EMAHook, which exchanges the two": {
        "meta": {"mmengine_version": "0.10.7", "epoch": 3},
        "state_dict": AVERAGED,
        "ema_state_dict": {**under("module.", RAW), "steps": torch.tensor(9)},
    },
    "in a list of algorithms": {
        "state": {"model": RAW, "algorithms": [["EMA", {"ema_model": {"named_parameters_dict": AVERAGED}}]]}
    },
    "CompVis' LitEma": {
        "state_dict": {
            **under("model.diffusion_model.", RAW),
            **without_dots("model_ema.diffusion_model", AVERAGED),
            "model_ema.decay": torch.tensor(0.999),
            "model_ema.num_updates": torch.tensor(5),
        }
    },
    "dots become underscores": {"model": RAW, "ema": without_dots("", AVERAGED, "_")},
    "lucidrains": {
        **under("online_model.", RAW),
        **under("ema_model.", AVERAGED),
        "initted": torch.tensor(True),
        "step": torch.tensor(9),
    },
    "lucidrains in an entry": {"model": RAW, "ema": {**under("online_model.", RAW), **under("ema_model.", AVERAGED)}},
    "prefixes of one dictionary": {**under("model.", RAW), **under("model_ema.", AVERAGED)},
    "a prefix beside plain names": {**RAW, **under("ema.", AVERAGED)},
    "a list in order": {"model": RAW, "ema": shadow(AVERAGED)},
    "a list at the top": {"model": under("module.", RAW), "ema": list(AVERAGED.values())},
    "wrapped by DataParallel": {"model": under("module.", RAW), "ema": under("module.", AVERAGED)},
}


@pytest.mark.parametrize("held", BESIDE_RAW.values(), ids=BESIDE_RAW.keys())
def test_averaged_weights_are_taken_where_raw_ones_lie_beside_them(load: Callable, held: dict[str, Any]) -> None:
    checkpoint = load(held)
    assert_same(checkpoint, AVERAGED)
    [note] = [note for note in checkpoint.notes if "taken from" in note]
    assert note.startswith("averaged weights taken from ")
    assert ", not from " in note


@pytest.mark.parametrize(
    "ema",
    [{}, None, 0.999, {"decay": 0.999}, {"decay": torch.tensor(0.999), "num_updates": torch.tensor(1)}, [], shadow({})],
    ids=["empty", "None", "a number", "decay", "decay as tensors", "an empty list", "an empty shadow"],
)
def test_an_average_that_holds_nothing_hides_nothing(load: Callable, ema: object) -> None:
    checkpoint = load({"model": RAW, "ema": ema})
    assert_same(checkpoint, RAW)
    assert "weights taken from the entry 'model' of x.pt" in checkpoint.notes


@pytest.mark.parametrize(
    "ema",
    [
        shadow(dict(list(AVERAGED.items())[:-1])),
        {"shadow_params": list(reversed(AVERAGED.values()))},
        {f"{index}": tensor for index, tensor in enumerate(AVERAGED.values())},
        {**without_dots("", AVERAGED), "another": torch.ones(3), "in_blocks0norm1weight": torch.ones(7)},
    ],
    ids=["one is lacking", "in another order", "names of another kind", "another shape"],
)
def test_averages_that_cannot_be_matched_are_refused_naming_both(load: Callable, ema: object) -> None:
    with pytest.raises(CheckpointError, match="'ema.* averaged tensors, which cannot be matched with .*'model'"):
        load({"model": RAW, "ema": ema})


def test_several_sets_of_weights_are_refused_by_name(load: Callable) -> None:
    with pytest.raises(CheckpointError, match="several sets of weights.*'teacher'; the entry 'student'"):
        load({"teacher": RAW, "student": OTHER})
    with pytest.raises(CheckpointError, match="'ema_0.999'; the entry 'ema_0.9999'"):
        load({"ema_0.999": AVERAGED, "ema_0.9999": OTHER, "model": RAW})
    with pytest.raises(CheckpointError, match="the names under 'teacher.'; the names under 'student.'"):
        load({**under("teacher.", RAW), **under("student.", OTHER)})


def test_what_is_not_averaged_is_that_of_the_raw_weights(load: Callable) -> None:
    frozen = "pos_embed"
    some = {name: tensor for name, tensor in AVERAGED.items() if name != frozen}
    checkpoint = load({"state_dict": {**under("model.", RAW), **without_dots("model_ema.", some)}})
    assert_same(checkpoint, {**some, frozen: RAW[frozen]})
    assert any(note.startswith("not averaged, and taken from the names under 'model.'") for note in checkpoint.notes)


def test_masks_of_the_raw_weights_serve_the_averaged_ones(load: Callable) -> None:
    name = "mid_block.mlp.fc1.weight"
    mask = (torch.rand(RAW[name].shape) > 0.5).float()
    pruned = {f"{own}_orig" if own == name else own: tensor for own, tensor in RAW.items()} | {f"{name}_mask": mask}
    averaged = {f"{own}_orig" if own == name else own: tensor for own, tensor in AVERAGED.items()}
    checkpoint = load({"model": pruned, "ema": averaged})
    assert_same(checkpoint, AVERAGED)
    assert np.array_equal(checkpoint.masks[name], mask.bool().numpy())


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "net.",
        "nnet.",
        "model._orig_mod.",
        "model.module.",
        "_forward_module.model.",
        "model.diffusion_model.",
        "a.b.c.d.",
    ],
)
def test_a_prefix_is_taken_off_where_a_family_is_then_recognised(load: Callable, prefix: str) -> None:
    checkpoint = load({"state_dict": under(prefix, RAW), "pytorch-lightning_version": "2.5"})
    assert_same(checkpoint, RAW)
    assert any("the names under '" in note for note in checkpoint.notes)


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"])
def test_wrappers_inside_names_are_taken_off(load: Callable, part: str) -> None:
    wrapped = {
        name.replace("blocks.0.", f"blocks.0.{part}.").replace("mid_block.", f"mid_block.{part}."): t
        for name, t in RAW.items()
    }
    assert wrapped.keys() != RAW.keys()
    assert_same(load(under(f"{part}.", wrapped)), RAW)


def test_a_prefix_that_leads_to_no_family_is_in_the_sentence(tmp_path: Path) -> None:
    torch.save({"net.body.a": torch.ones(2), "net.body.b": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"all under 'net\.body\.'\) are of no known model family"):
        load_model(tmp_path / "x.pt", heads=4)


def test_two_names_that_become_one_are_refused_naming_both(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2), "module.a.weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"a\.weight and module\.a\.weight are both a\.weight"):
        load_checkpoint(tmp_path / "x.pt")


def test_both_a_wrapped_and_a_plain_network_are_refused(load: Callable) -> None:
    with pytest.raises(CheckpointError, match="norm.weight and module.norm.weight are both norm.weight"):
        load({**RAW, "module.norm.weight": OTHER["norm.weight"]})


@pytest.mark.parametrize(
    "held,where",
    [
        (
            {"state_dict": {**under("model.", RAW), "loss.vgg.weight": torch.ones(3)}},
            "1 tensor of the entry 'state_dict': loss.vgg.weight",
        ),
        ({"model": RAW, "vae": {"decoder.weight": torch.ones(2)}}, "1 tensor of the entry 'vae': decoder.weight"),
        ({"model": RAW, "betas": torch.ones(9)}, "1 tensor of the file itself: betas"),
        ({"model": RAW, "ema_losses": [torch.ones(9), torch.ones(9)]}, "2 tensors of the entry 'ema_losses': [0], [1]"),
        ({"n_averaged": torch.tensor(2), **under("module.", RAW)}, "1 tensor of the file itself: n_averaged"),
    ],
    ids=["outside the prefix", "another entry", "beside the entries", "a list", "a counter"],
)
def test_tensors_that_nothing_uses_are_named(load: Callable, held: dict[str, Any], where: str) -> None:
    checkpoint = load(held)
    assert_same(checkpoint, RAW)
    assert f"not used: {where}" in checkpoint.notes


def test_a_file_of_one_network_needs_no_note(load: Callable) -> None:
    assert load(RAW).notes == []


def test_dictionaries_that_hold_each_other_come_to_an_end(load: Callable) -> None:
    held: dict[str, Any] = {"model": RAW}
    held |= {str(index): held for index in range(200)}
    assert_same(load(held), RAW)
