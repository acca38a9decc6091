"""Why a masked layer stays dense: the reason that holds, in the manifest, in a loaded engine's report and in errors."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends.base import BUILT_DENSE, with_kernel
from sparse_engine.errors import CheckpointError, UnsupportedError
from sparse_engine.export.write import check_all_sparse
from tests.conftest import TINY_LATENT, build_with, save_checkpoint

# A convolution with three inputs is no 2:4 one, whatever a backend says; one with four, and a product of one row, are.
MASKED = ["time_embed.0", "patch_embed.proj", "mid_block.mlp.fc1"]
BY_DEFAULT = "not timed: ours by default"


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("latent") / "latent.pth", TINY_LATENT)


def reasons(path: Path) -> dict[str, str | None]:
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        loaded = {layer["name"]: layer.get("why") for layer in engine.info["layers"] if layer["masked"]}
        stored = {layer["name"]: layer.get("why") for layer in engine.manifest.layers if layer["masked"]}
    assert all(loaded[name] == why for name, why in stored.items() if why)
    return loaded


def test_convolutions_and_products_of_one_row_have_kernels(latent: Path, build: Callable[..., Path]) -> None:
    path = build(latent, sparse=True, mask_layers=MASKED)
    assert reasons(path) == dict.fromkeys(MASKED, BY_DEFAULT)


def test_layers_whose_weights_rule_it_out_say_so(tiny_checkpoint: Path, build: Callable[..., Path]) -> None:
    path = build(tiny_checkpoint, sparse=True, mask_layers=MASKED[1:])
    assert reasons(path)["patch_embed.proj"] == "3 inputs are no multiple of 4"


def test_a_dense_build_of_masked_weights_says_so(tiny_checkpoint: Path, build: Callable[..., Path]) -> None:
    assert set(reasons(build(tiny_checkpoint, mask="magnitude")).values()) == {BUILT_DENSE}


@pytest.mark.parametrize(
    "layer,sparse,why",
    [
        ({"masked": False, "hardware_24": False, "reason": None}, True, "dense weights"),
        ({"masked": True, "hardware_24": True, "reason": None}, True, "dense weights"),
        ({"masked": True, "hardware_24": True, "reason": None}, False, BUILT_DENSE),
        ({"masked": True, "hardware_24": False, "reason": "30 inputs are no multiple of 4"}, False, "30 inputs"),
    ],
)
def test_of_two_causes_the_layers_own_comes_first(layer: dict, sparse: bool, why: str) -> None:
    report = with_kernel({"name": "fc", **layer}, {"chosen": False, "kernel": "gemm", "why": "dense weights"}, sparse)
    assert report["why"].startswith(why)
    if layer["masked"]:
        with pytest.raises(UnsupportedError, match=f"such as fc \\({why}"):
            check_all_sparse([report])


@pytest.mark.parametrize(
    "options,why",
    [
        ({"mask_layers": ["final_layer"]}, "final_layer: 81 weights are no multiple of 4"),
        ({"mask_layers": ["patch_embed.proj"]}, r"patch_embed\.proj: 3 inputs are no multiple of 4"),
        ({"mask": "none"}, "--mask none leaves the weights as they are"),
    ],
)
def test_why_none_of_the_layers_can_be_24(tiny_checkpoint: Path, tmp_path: Path, options: dict, why: str) -> None:
    with pytest.raises(CheckpointError, match=f"none of the 16 layers can be 2:4 \\({why}\\)"):
        build_with(tiny_checkpoint, tmp_path / "x.sengine", sparse=True, heads=4, **options)
