"""Networks with random weights: what is in them, and that every runtime computes the same of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.bench import compare
from sparse_engine.bench.peers import EAGER, OPENVINO, PLAIN
from sparse_engine.bench.presets import NETWORKS, RandomNetwork, network_named
from sparse_engine.bench.results_file import read_results
from sparse_engine.cli.main import run
from sparse_engine.errors import OptionError

# Smaller ones of the same kinds: what is said of a network's conditions stays as it is.
SMALLER: dict[str, dict[str, Any]] = {
    "uvit-s": {"image_size": 8, "embed_dim": 64, "depth": 2, "heads": 4, "mlp_hidden": 128},
    "uvit-s-t2i": {"image_size": 8, "embed_dim": 64, "depth": 2, "heads": 4, "mlp_hidden": 128},
    "dit-b2": {"image_size": 8, "embed_dim": 64, "depth": 2, "heads": 4, "mlp_hidden": 128},
}
# In millions: of DiTs by table 1 of their paper, of U-ViT-S by table 6 of its own; U-Nets have 35.7, 92.7 and 859.5.
SIZES = {
    "uvit-s": 44,
    "uvit-s-t2i": 45,
    "dit-b2": 130,
    "dit-l2": 458,
    "ddpm-cifar10": 36,
    "sparsedm-cifar10": 93,
    "sd15": 860,
}


def small(name: str) -> RandomNetwork:
    config: Any = NETWORKS[name].config
    return dataclasses.replace(NETWORKS[name], config=dataclasses.replace(config, **SMALLER[name]))


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(each.numel() for each in NETWORKS[name].family.network(NETWORKS[name].config).parameters())


def test_sizes_are_the_published_ones() -> None:
    assert {name: round(parameters(name) / 1e6) for name in SIZES} == SIZES
    config: Any = NETWORKS["uvit-s-t2i"].config
    assert config.tokens == 77 + 1 + 256


def test_a_network_that_is_none() -> None:
    with pytest.raises(OptionError, match="--random 'dit-g2' is not known; expected one of quick.*dit-b2"):
        network_named("dit-g2")


@pytest.mark.parametrize("name", SMALLER)
def test_every_block_shows_in_the_output(name: str) -> None:
    """Of a DiT as it is initialised none does: gates and head are zero."""
    model = small(name).model()
    x, t = torch.randn(2, *model.config.data_shape), torch.full((2,), 500.0)
    told = {each: torch.from_numpy(rows) for each, rows in model.told(np.arange(2)).items()}
    whole = model.network(model.checkpoint.state)(x, t, **told)
    for layer in (each for each in model.checkpoint.state if each.endswith("attn.proj.weight")):
        without = model.network({**model.checkpoint.state, layer: np.zeros_like(model.checkpoint.state[layer])})
        assert float((without(x, t, **told) - whole).abs().max() / whole.abs().max()) > 1e-3, layer


@pytest.mark.parametrize("name", SMALLER)
def test_weights_are_the_same_every_time(name: str) -> None:
    first, second = (small(name).model().checkpoint.state for _ in range(2))
    assert all(np.array_equal(array, second[key]) for key, array in first.items())
    assert not any(array.ndim > 1 and not array.any() for array in first.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["uvit-s-t2i", "dit-b2"])
def test_other_runtimes_take_what_the_network_is_told(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, name, small(name))
    monkeypatch.setattr(compare, "PEERS", (PLAIN, OPENVINO, EAGER))
    file = tmp_path / "found.json"
    command = ["bench", "--random", name, "--precision", precision, "--peers", "--batch", "2", "--threads", "1"]
    assert run([*command, "--repeat", "1", "--seconds", "0.05", "-o", str(file)]) == 0
    results = read_results(file)
    (row,) = results["rows"]
    assert results["random"] == name
    assert set(row["skipped"]) <= {"OpenVINO", "OpenVINO, bf16"}  # not installed, or no bf16 here
    assert {"2:4 sparse", "dense", "torch eager"} <= row["milliseconds"].keys()
    assert set(row["peak_memory_mib"]) == {"2:4 sparse", "dense"}
