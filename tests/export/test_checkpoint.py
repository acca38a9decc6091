"""Every form a checkpoint comes in, and every kind of damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparse_engine.errors import CheckpointError
from sparse_engine.export.checkpoint import load_checkpoint
from tests.export import damage
from tests.export.damage import Damage, trace_of


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(4, 8), "a.bias": torch.randn(4)}


def assert_same(loaded: dict[str, np.ndarray], state: dict[str, torch.Tensor]) -> None:
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert np.array_equal(loaded[name], tensor.numpy())


@pytest.mark.parametrize("key", ["nnet_ema", "ema", "model", "state_dict"])
def test_nested_weights_are_found(tmp_path: Path, state: dict[str, torch.Tensor], key: str) -> None:
    torch.save({key: state, "step": 3, "optimizer": {"lr": 0.1}}, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert_same(checkpoint.state, state)
    assert any(key in note for note in checkpoint.notes)


def test_averaged_weights_win(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"nnet": other, "nnet_ema": state}, tmp_path / "x.pt")
    assert_same(load_checkpoint(tmp_path / "x.pt").state, state)


def test_sparsedm_folder(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    torch.save({name: tensor + 1 for name, tensor in state.items()}, folder / "nnet.pth")
    assert load_checkpoint(folder).notes == ["500000.ckpt has no nnet_ema.pth: using nnet.pth"]
    torch.save(state, folder / "nnet_ema.pth")
    assert_same(load_checkpoint(folder).state, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(tmp_path: Path, state: dict[str, torch.Tensor], prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "x.pth")
    assert_same(load_checkpoint(tmp_path / "x.pth").state, state)


def test_safetensors_with_configuration_in_its_metadata(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "x.safetensors", {"config": json.dumps({"heads": 4})})
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert_same(checkpoint.state, state)
    assert checkpoint.config == {"heads": 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"w": torch.randn(4, 4).to(dtype)}, tmp_path / "x.pth")
    assert load_checkpoint(tmp_path / "x.pth").state["w"].dtype == np.float32


def test_old_format_without_zip(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(tmp_path / "x.pth").state, state)


def test_configuration_beside_the_file_wins_over_the_one_inside(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"nnet_ema": state, "config": {"heads": 2, "depth": 4}}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text('{"heads": 8}')
    assert load_checkpoint(tmp_path / "x.pth").config == {"heads": 8, "depth": 4}
    (tmp_path / "x.json").write_text('{"heads": 16}')
    assert load_checkpoint(tmp_path / "x.pth").config["heads"] == 16


@pytest.mark.parametrize(
    "names",
    [("w_orig", "w_mask"), ("w", "w_mask"), ("a.weight", "a.__weight_mma_mask")],
    ids=["torch prune", "plain mask", "NVIDIA ASP"],
)
def test_explicit_masks_are_found(tmp_path: Path, names: tuple[str, str]) -> None:
    weight, mask = torch.randn(4, 8), (torch.rand(4, 8) > 0.5).float()
    torch.save({names[0]: weight, names[1]: mask}, tmp_path / "x.pth")
    checkpoint = load_checkpoint(tmp_path / "x.pth")
    owner = names[0].removesuffix("_orig")
    assert np.array_equal(checkpoint.state[owner], weight.numpy())
    assert np.array_equal(checkpoint.masks[owner], mask.bool().numpy())


def test_mask_without_its_weight(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "v_mask": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a mask of shape .* for v, where there is nothing"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("case", damage.FILES.values(), ids=damage.FILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_file(case: Damage, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / f"x{case.suffix}"
    case.write(file, state)
    with pytest.raises(CheckpointError, match=case.message) as caught:
        load_checkpoint(file)
    assert str(file) in str(caught.value) or file.name in str(caught.value)
    assert not trace_of(file).exists()  # code in a pickle is never run


def test_non_finite_weights_name_their_tensor(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    damage.FILES["nan"].write(tmp_path / "x.pth", state)
    with pytest.raises(CheckpointError, match=r"a\.weight has 1 of 32 values that are NaN or infinite"):
        load_checkpoint(tmp_path / "x.pth")


def test_missing_and_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="folder without nnet_ema.pth or nnet.pth"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content, message", damage.CONFIGURATIONS.values(), ids=damage.CONFIGURATIONS)
def test_a_damaged_configuration(content: bytes, message: str, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "x.pth")
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json.* {message}"):
        load_checkpoint(tmp_path / "x.pth")


def test_parameters_are_weights_too(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2, 4))}, tmp_path / "x.pth")
    assert np.array_equal(load_checkpoint(tmp_path / "x.pth").state["w"], np.ones((2, 4)))
