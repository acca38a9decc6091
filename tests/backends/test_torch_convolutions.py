"""2:4 convolutions in the torch backend: packed, read back, dense on a CPU and said; and all kinds of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, backend_named
from sparse_engine.backends.torch.choose import Chooser
from sparse_engine.backends.torch.network import choose_products, map_sizes
from sparse_engine.backends.torch.packing import as_matrix, from_matrix, unpack
from sparse_engine.backends.torch.payload import NETWORK_FILE
from sparse_engine.export.families.uvit import UViTConfig
from tests.backends.convolutions import CONVOLUTIONS, SPARSE, graph_of, network
from tests.conftest import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread")
# Its first layer has a window of 2x2 and a stride of 2, its last one of 3x3: 4 channels, so that both are 2:4.
LATENT = UViTConfig(image_size=8, patch_size=2, channels=4, embed_dim=32, depth=2, heads=2)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1, 1), (6, 8, 3, 3), (2, 4, 1, 3)], ids=str)
def test_a_weight_as_a_matrix_and_back(shape: tuple[int, ...]) -> None:
    weight = torch.arange(float(np.prod(shape))).reshape(shape)
    matrix = as_matrix(weight)
    assert matrix.shape == (shape[0], weight[0].numel())
    assert torch.equal(from_matrix(matrix, weight.shape), weight)
    if len(shape) == 4:
        assert torch.equal(matrix[:, : shape[1]], weight[:, :, 0, 0])  # the channels of a tap lie side by side


def test_convolutions_are_stored_packed() -> None:
    options = BuildOptions(True, "fp16", (1, 2, 4))
    payload = backend_named("torch").build(graph_of("fp16"), options, list(SPARSE))
    assert {name: layer["chosen"] for name, layer in payload.layers.items() if name in SPARSE} == dict.fromkeys(SPARSE)
    stored = safetensors.torch.load(b"".join(bytes(chunk) for chunk in payload.files[0].chunks()))
    for name in CONVOLUTIONS:
        expected = torch.from_numpy(graph_of("fp16").state[f"{name}.weight"]).half()
        found = unpack(stored[f"{name}.weight.values"], stored[f"{name}.weight.positions"])
        assert torch.equal(from_matrix(found, expected.shape), expected)


def test_an_engine_with_them_is_the_same_network(build: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "latent.pth", LATENT)
    layers = ["*.fc*", "patch_embed.proj", "final_layer"]
    built = {
        name: build(checkpoint, sparse=True, backend=name, mask_layers=layers) for name in ("torch", "onnxruntime")
    }
    tensors = safetensors.torch.load(EngineFile(built["torch"]).read(NETWORK_FILE))
    assert {"patch_embed.proj.weight.values", "final_layer.weight.positions"} <= tensors.keys()
    x = np.random.default_rng(0).standard_normal((3, 4, 8, 8), np.float32)
    with SparseEngine.load(built["torch"]) as engine:
        found = engine.denoise(x, 0.4)
        told = {layer["name"]: layer for layer in engine.info["layers"]}
    with SparseEngine.load(built["onnxruntime"]) as engine:
        expected = engine.denoise(x, 0.4)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for name in ("patch_embed.proj", "final_layer"):
        assert (told[name]["eligible"], told[name]["chosen"]) == (True, False)
        assert (told[name]["kernel"], told[name]["why"]) == ("dense", "no CUDA: the engine runs on cpu")


def test_a_network_of_all_kinds_keeps_what_it_computes_on_a_cpu() -> None:
    whole = network()
    inputs = {"x": torch.randn(2, 3, 8, 8), "t": torch.rand(2)}
    expected = whole(**inputs)
    sizes = map_sizes(whole, ["block.conv1", "down", "up"], inputs)
    assert sizes == {"block.conv1": (8, 8), "down": (9, 9), "up": (8, 8)}
    chooser = Chooser(dict.fromkeys(SPARSE, 16), (1, 2, 4), torch.device("cpu"), autotune=True)
    report = choose_products(whole, list(SPARSE), chooser, inputs=inputs)
    assert {each["why"] for each in report.values()} == {"no CUDA: the engine runs on cpu"}
    torch.testing.assert_close(whole(**inputs), expected)
