"""What the field's pruning tools leave in a state dict: the right weights, or a refusal that names the way out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from sparse_engine.errors import CheckpointError
from sparse_engine.export.bake import bake
from sparse_engine.export.checkpoint import Checkpoint, load_checkpoint
from sparse_engine.export.masks import is_n_of_m, magnitude_mask
from sparse_engine.export.model import load_model
from tests.conftest import TINY, random_state

LAYER = "mid_block.mlp.fc1"
STATE = random_state(TINY)
WEIGHT = STATE[f"{LAYER}.weight"]
MASK = torch.from_numpy(magnitude_mask(WEIGHT.numpy())[0])
OTHERS = {name: tensor for name, tensor in STATE.items() if name != f"{LAYER}.weight"}


def bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def packed_rows(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """As compressed-tensors stores a 2:4 weight: values [out, in / 2]."""
    values = weight[mask].reshape(len(weight), -1)
    return {
        f"{LAYER}.compressed": values,
        f"{LAYER}.bitmask": bits(mask),
        f"{LAYER}.shape": torch.tensor([[128], [32]]),
    }


def packed_values(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """As it stores any other sparse weight: values in a row, and where each row of them begins."""
    counts = mask.sum(1)
    return {
        f"{LAYER}.compressed": weight[mask],
        f"{LAYER}.bitmask": bits(mask),
        f"{LAYER}.shape": torch.tensor([128, 32]),
        f"{LAYER}.row_offsets": torch.cumsum(counts, 0) - counts,
    }


CARRIERS: dict[str, dict[str, Tensor]] = {
    "apex ASP": {f"{LAYER}.weight": WEIGHT * MASK, f"{LAYER}.__weight_mma_mask": MASK},
    "apex ASP, masks to be computed again": {
        f"{LAYER}.weight": WEIGHT * MASK,
        f"{LAYER}.__weight_mma_mask": MASK,
        f"{LAYER}.__weight_mma_pruned_p": WEIGHT * ~MASK,
    },
    "ModelOpt": {f"{LAYER}.weight": WEIGHT, f"{LAYER}._weight_mask": MASK},
    "ModelOpt, then quantised": {
        f"{LAYER}.weight": WEIGHT,
        f"{LAYER}._weight_mask": MASK,
        f"{LAYER}.input_quantizer._amax": torch.tensor(3.0),
        f"{LAYER}.weight_quantizer._amax": torch.ones(128, 1),
    },
    "torch.nn.utils.prune": {f"{LAYER}.weight_orig": WEIGHT, f"{LAYER}.weight_mask": MASK.float()},
    "torch.ao.pruning with its mask": {
        f"{LAYER}.parametrizations.weight.original": WEIGHT,
        f"{LAYER}.parametrizations.weight.0.mask": MASK.float(),
    },
    "two masks of one weight": {
        f"{LAYER}.parametrizations.weight.original": WEIGHT,
        f"{LAYER}.parametrizations.weight.0.mask": torch.ones_like(MASK),
        f"{LAYER}.parametrizations.weight.1.mask": MASK,
    },
    "a plain mask": {f"{LAYER}.weight": WEIGHT, f"{LAYER}.weight_mask": MASK.to(torch.uint8)},
    "llm-compressor, 2:4": packed_rows(WEIGHT, MASK),
    "llm-compressor, sparse": packed_values(WEIGHT, MASK),
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[dict[str, Tensor]], Checkpoint]:
    def save_and_load(own: dict[str, Tensor]) -> Checkpoint:
        torch.save({**OTHERS, **own}, tmp_path / "x.pth")
        return load_checkpoint(tmp_path / "x.pth")

    return save_and_load


@pytest.mark.parametrize("own", CARRIERS.values(), ids=CARRIERS.keys())
def test_a_pruned_layer_is_what_its_tool_multiplies_with(tmp_path: Path, own: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in {**OTHERS, **own}.items()}, tmp_path / "x.safetensors")
    baked = bake(load_model(tmp_path / "x.safetensors", heads=4))
    assert np.array_equal(baked.state[f"{LAYER}.weight"], (WEIGHT * MASK).numpy())
    assert [layer.name for layer in baked.layers if layer.masked] == [LAYER]  # the others were left dense
    assert all(np.array_equal(baked.state[name], tensor.numpy()) for name, tensor in OTHERS.items())


@pytest.mark.parametrize("columns", [4, 12, 20])
def test_bitmasks_of_a_width_that_is_no_multiple_of_eight(tmp_path: Path, columns: int) -> None:
    weight = torch.randn(3, columns)
    mask = torch.from_numpy(magnitude_mask(weight.numpy())[0])
    held = {"a.compressed": weight[mask], "a.bitmask": bits(mask), "a.shape": torch.tensor([3, columns])}
    torch.save(held, tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert np.array_equal(loaded.state["a.weight"], (weight * mask).numpy())
    assert is_n_of_m(loaded.state["a.weight"])
    assert loaded.notes == ["weights unpacked from the bitmasks of compressed-tensors"]


def test_torch_prune_on_weights_and_biases(tmp_path: Path) -> None:
    layer = nn.Linear(32, 128)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.25)
    others = {name: tensor for name, tensor in STATE.items() if not name.startswith(f"{LAYER}.")}
    own = {f"{LAYER}.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save({**others, **own}, tmp_path / "x.pth")
    baked = bake(load_model(tmp_path / "x.pth", heads=4), "none")
    assert np.array_equal(baked.state[f"{LAYER}.weight"], layer.weight.detach())
    assert np.array_equal(baked.state[f"{LAYER}.bias"], layer.bias.detach())


def test_helpers_that_are_not_used_are_named(load: Callable) -> None:
    notes = load(CARRIERS["apex ASP, masks to be computed again"]).notes
    assert notes == [f"not used: the values that apex ASP cut away, such as {LAYER}.__weight_mma_pruned_p (1 in all)"]
    notes = load(CARRIERS["ModelOpt, then quantised"]).notes
    assert notes == [f"not used: ModelOpt's quantisation ranges, such as {LAYER}.input_quantizer._amax (2 in all)"]


def test_modelopts_own_file(tmp_path: Path) -> None:
    """mto.save: {"modelopt_state", "model_state_dict"}."""
    held = {"modelopt_state": {"modelopt_version": "0.40"}, "model_state_dict": {**OTHERS, **CARRIERS["ModelOpt"]}}
    torch.save(held, tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth", heads=4).checkpoint.masks.keys() == {f"{LAYER}.weight"}


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "spectral_norm": (
        {f"{LAYER}.{name}": t for name, t in nn.utils.spectral_norm(nn.Linear(32, 128)).state_dict().items()},
        "weight_u is spectral_norm's.*remove_spectral_norm",
    ),
    "parametrized spectral_norm": (
        {
            f"{LAYER}.{name}": t
            for name, t in nn.utils.parametrizations.spectral_norm(nn.Linear(32, 128)).state_dict().items()
        },
        "parametrizations.weight.0._u is spectral_norm's",
    ),
    "weight_norm": (
        {f"{LAYER}.weight_g": torch.ones(128, 1), f"{LAYER}.weight_v": WEIGHT},
        "weight_g is weight_norm's",
    ),
    "parametrized weight_norm": (
        {
            f"{LAYER}.{name}": t
            for name, t in nn.utils.parametrizations.weight_norm(nn.Linear(32, 128)).state_dict().items()
        },
        "parametrizations.weight.original0 is weight_norm's.*remove_parametrizations",
    ),
    "pack-quantized": (
        {f"{LAYER}.weight_packed": torch.ones(2, dtype=torch.int32)},
        "weight_packed is a quantised weight's",
    ),
    "marlin-24": ({f"{LAYER}.scale_packed": torch.ones(2)}, "scale_packed is a quantised weight's"),
    "naive-quantized": (
        {f"{LAYER}.weight": WEIGHT.to(torch.int8), f"{LAYER}.weight_scale": torch.ones(1)},
        "weight_scale is a quantised weight's.*dequantise",
    ),
    "SmoothQuant": (
        {f"{LAYER}.weight": WEIGHT, f"{LAYER}.input_quantizer._pre_quant_scale": torch.ones(32)},
        "_pre_quant_scale is ModelOpt's SmoothQuant",
    ),
    "FSDP": ({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, "_flat_param is FSDP's.*FULL_STATE_DICT"),
    "LoRA": (
        {f"{LAYER}.base_layer.weight": WEIGHT, f"{LAYER}.lora_A.default.weight": torch.ones(4, 32)},
        "is an adapter's.*merge",
    ),
    "torch.nn.utils.prune without its mask": (
        {f"{LAYER}.weight_orig": WEIGHT},
        "weight_orig is a weight that something is applied to",
    ),
    "a mask of other numbers": (
        {f"{LAYER}.weight": WEIGHT, f"{LAYER}.weight_mask": torch.full((128, 32), 0.5)},
        "the mask .* has values other than 0 and 1",
    ),
    "a mask of another shape": (
        {f"{LAYER}.weight": WEIGHT, f"{LAYER}._weight_mask": torch.ones(32, 128)},
        r"a mask of shape \[32, 128\] for .*fc1.weight, where there is \[128, 32\]",
    ),
    "one weight twice": (
        {f"{LAYER}.weight": WEIGHT, f"{LAYER}.weight_orig": WEIGHT, f"{LAYER}.weight_mask": MASK},
        "weight_orig and .*fc1.weight are the same weight",
    ),
    "one weight twice, packed": (
        {f"{LAYER}.weight": WEIGHT, **packed_rows(WEIGHT, MASK)},
        "are the same weight, stored twice",
    ),
    "a bitmask without its shape": (
        {name: t for name, t in packed_rows(WEIGHT, MASK).items() if not name.endswith(".shape")},
        "compressed has no shape beside it",
    ),
    "a bitmask of another shape": (
        {**packed_rows(WEIGHT, MASK), f"{LAYER}.shape": torch.tensor([128, 48])},
        r"bitmask does not fit its shape \[128, 48\]",
    ),
    "a bitmask of another number": (
        {**packed_rows(WEIGHT, MASK), f"{LAYER}.compressed": torch.ones(128, 15)},
        "bitmask keeps 2048 weights, and .* holds 1920",
    ),
    "a quantised weight alone": ({f"{LAYER}.weight": WEIGHT.to(torch.int8)}, "fc1.weight is int8; expected floats"),
}


@pytest.mark.parametrize("own,message", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_is_refused_by_name(tmp_path: Path, own: dict[str, Tensor], message: str) -> None:
    torch.save({**OTHERS, **own}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_model(tmp_path / "x.pth", heads=4)


def test_a_sparsifier_that_keeps_its_masks_to_itself_is_refused(load: Callable) -> None:
    """PyTorch's stores the dense weight and leaves the mask in the sparsifier's own state."""
    layer = nn.Sequential(nn.Linear(32, 128))
    sparsifier = WeightNormSparsifier(sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(layer, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    own = {name.replace("0.", f"{LAYER}.", 1): tensor for name, tensor in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"parametrizations\.weight\.original is a weight(?s:.*)squash_mask"):
        load(own)


@pytest.mark.parametrize(
    "tensor,message",
    [
        (torch.ones(4, 4, device="meta"), r"w holds no data \(on the meta device\)"),
        (torch.ones(0), r"w holds no data \(of shape \[0\]\)"),
        (torch.eye(4).to_sparse(), "w is torch.sparse_coo, torch.float32; expected plain real weights"),
        (torch.full((2, 2), 1e300, dtype=torch.float64), "w has 4 of 4 values beyond the range of float32"),
    ],
    ids=["meta", "empty", "sparse", "float64 beyond float32"],
)
def test_tensors_that_hold_no_weights(tmp_path: Path, tensor: Tensor, message: str) -> None:
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_a_mask_that_holds_no_data(load: Callable) -> None:
    with pytest.raises(CheckpointError, match="__weight_mma_mask holds no data"):
        load({f"{LAYER}.weight": WEIGHT, f"{LAYER}.__weight_mma_mask": MASK.to("meta")})


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_semi_structured_tensors_are_refused_by_name(tmp_path: Path) -> None:
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    half = torch.zeros(128, 64).half()
    tensor = kind(torch.Size((128, 128)), half, torch.zeros(128, 8, dtype=torch.int16), None, None, None)
    torch.save({"w": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="semi-structured sparse tensors(?s:.*)to_dense"):
        load_checkpoint(tmp_path / "x.pth")


def test_tensors_of_another_kind_are_refused_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distributed or quantised tensor looks like a plain one until it is computed with."""
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pth")
    with FakeTensorMode():
        fake = torch.ones(2)
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"w": fake})
    with pytest.raises(CheckpointError, match="w is a FakeTensor; expected a plain tensor(?s:.*)full_tensor"):
        load_checkpoint(tmp_path / "x.pth")
