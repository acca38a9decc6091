"""Every form a checkpoint comes in, and every kind of damage."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparse_engine.errors import CheckpointError
from sparse_engine.export.checkpoint import load_checkpoint


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_name_their_tensor(tmp_path: Path, state: dict[str, torch.Tensor], value: float) -> None:
    state["a.weight"][2, 3] = value
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"a\.weight has 1 of 32 values that are NaN or infinite"):
        load_checkpoint(tmp_path / "x.pth")


class Payload:
    """Pickles to a call; what a hostile checkpoint looks like."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.target),))


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, plain_pickle: bool) -> None:
    trace, file = tmp_path / "it-ran", tmp_path / "x.pth"
    if plain_pickle:
        file.write_bytes(pickle.dumps({"w": Payload(str(trace))}, protocol=2))
    else:
        torch.save({"w": Payload(str(trace))}, file)
    with pytest.raises(CheckpointError, match="holds Python objects that are not weights; they were not run"):
        load_checkpoint(file)
    assert not trace.exists()


def test_truncated(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    for length in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth is"):
            load_checkpoint(tmp_path / "cut.pth")


def test_truncated_safetensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(tmp_path / "cut.safetensors")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_text("hello, this is a text file\n" * 20)
    with pytest.raises(CheckpointError, match=r"x\.pth is"):
        load_checkpoint(tmp_path / "x.pth")


def test_empty_missing_and_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "x.pth").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="folder without nnet_ema.pth or nnet.pth"):
        load_checkpoint(tmp_path)


def test_no_tensors_inside(tmp_path: Path) -> None:
    torch.save({"step": 3, "lr": 0.1}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has no tensors; its entries are step, lr"):
        load_checkpoint(tmp_path / "x.pth")
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds a list; expected a dictionary"):
        load_checkpoint(tmp_path / "x.pth")


def test_configuration_that_is_no_json(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "x.pth")
    (tmp_path / "x.json").write_text("{heads: 4}")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_checkpoint(tmp_path / "x.pth")


def test_parameters_are_weights_too(tmp_path: Path) -> None:
    torch.save({"w": torch.nn.Parameter(torch.ones(2, 4))}, tmp_path / "x.pth")
    assert np.array_equal(load_checkpoint(tmp_path / "x.pth").state["w"], np.ones((2, 4)))


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_tensors_that_are_no_plain_weights(tmp_path: Path, kind: str) -> None:
    tensor = torch.eye(4).to_sparse() if kind == "sparse" else torch.ones(2, dtype=torch.complex64)
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="w is .*expected plain real weights"):
        load_checkpoint(tmp_path / "x.pth")


def test_configuration_that_is_no_text(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "x.pth")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_checkpoint(tmp_path / "x.pth")


def test_a_few_bytes_that_stand_for_many_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "expanded.pth"
    torch.save({**state, "pos_embed": torch.zeros(1).expand(1 << 40)}, file)
    with pytest.raises(CheckpointError, match=r"pos_embed has shape .*, expanded from the 4 bytes that are stored"):
        load_checkpoint(file)
