"""The shipped model: trained for real, masked the way it was trained, and still drawing digits."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.export.bake import bake
from sparse_engine.export.masks import TWO_FOUR
from sparse_engine.export.model import load_model
from sparse_engine.export.write import ENERGY_WARNING
from sparse_engine.pruning.finetune import masked_layers
from sparse_engine.pruning.masking import MaskedWeights
from sparse_engine.pruning.settings import Settings
from tests.conftest import build_with

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
RESULTS = sorted(DIGITS.parent.glob("*/results.json"))


def script(name: str, folder: Path = DIGITS) -> ModuleType:
    """A file of an example as a module; they import one another by name, as scripts do."""
    if str(DIGITS) not in sys.path:
        sys.path.insert(0, str(DIGITS))
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its data classes look themselves up
    spec.loader.exec_module(module)
    return module


def test_training_masks_what_the_engine_masks() -> None:
    model = load_model(DIGITS / "sparsedm.pth")
    network = model.network({name: array.copy() for name, array in model.checkpoint.state.items()})
    masks = MaskedWeights(network, masked_layers(model, Settings())[0], TWO_FOUR)
    baked = bake(model)
    assert masks.names == [layer.name for layer in baked.layers if layer.masked]
    for name, weight in network.state_dict().items():
        assert np.array_equal(weight.numpy(), baked.state[name])


def test_checkpoint_holds_dense_weights_that_the_mask_hardly_hurts() -> None:
    model = load_model(DIGITS / "sparsedm.pth")
    layers = [layer for layer in bake(model).layers if layer.masked]
    assert len(layers) == 20
    assert all(np.count_nonzero(model.checkpoint.state[f"{layer.name}.weight"]) == layer.parameters for layer in layers)
    assert max(layer.energy_removed for layer in layers) < ENERGY_WARNING / 2
    one_shot = [layer for layer in bake(load_model(DIGITS / "dense.pth")).layers if layer.masked]
    assert min(layer.energy_removed for layer in one_shot) > ENERGY_WARNING


def test_a_short_training_run_learns_and_stores_what_sparsedm_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_torch_thread: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--dense-steps", "8", "--sparse-steps", "2", "--out", str(tmp_path)])
    script("train").main()
    dense, sparse = (torch.load(tmp_path / name, weights_only=True) for name in ("dense.pth", "sparsedm.pth"))
    assert dense.keys() == sparse.keys() == torch.load(DIGITS / "dense.pth", weights_only=True).keys()
    assert not torch.equal(dense["mid_block.mlp.fc1.weight"], sparse["mid_block.mlp.fc1.weight"])
    assert "000008.ckpt: 8 steps" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.pth", "sparsedm.pth"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("digits")
    return {
        name: build_with(DIGITS / checkpoint, folder / f"{name}.sengine", sparse=sparse)[0]
        for name, checkpoint, sparse in (("sparsedm", "sparsedm.pth", True), ("one-shot", "dense.pth", True))
    }


@cache
def classifier() -> Any:
    machine, unseen = script("evaluate").classifier()
    assert unseen > 0.95
    return machine


def judged(path: Path) -> tuple[float, float]:
    """Of 200 samples: how many a classifier reads right, and the Fréchet distance to the real digits."""
    labels = np.resize(np.arange(10), 200)
    with SparseEngine.load(path) as engine:
        drawn = engine.sample(200, steps=15, sampler="dpm-solver++", labels=labels, output="float", batch_size=100)
    pixels = drawn.clip(-1, 1).reshape(200, 64)
    right = float((classifier().predict(pixels) == labels).mean())
    return right, frechet_distance(pixels, script("data").load()[0].reshape(-1, 64))


def test_it_draws_digits_that_a_classifier_reads(engines: dict[str, Path]) -> None:
    """As results.json says, within what 200 samples allow; and clearly better than pruning in one shot."""
    accuracy, distance = judged(engines["sparsedm"])
    assert accuracy > 0.9
    assert distance < 2.0 < judged(engines["one-shot"])[1]


@pytest.mark.parametrize("file", RESULTS, ids=[file.parent.name for file in RESULTS])
def test_readme_table_is_the_results_file(file: Path) -> None:
    evaluate = script("evaluate")
    results = json.loads(file.read_text())
    text = file.with_name("README.md").read_text()
    assert f"{evaluate.BEGIN}\n{evaluate.table(results)}\n{evaluate.END}" in text
    dense, trained, one_shot = results["models"]
    assert trained["frechet_w1"] < one_shot["frechet_w1"]
    assert all(abs(trained[name] - dense[name]) <= 0.02 for name in ("accuracy_w1", "accuracy_w2"))


def test_sampler_table_is_its_results_file() -> None:
    samplers = script("samplers")
    results = json.loads((samplers.DOCS / "samplers.json").read_text())
    text = (samplers.DOCS / "samplers.md").read_text()
    assert f"{samplers.BEGIN}\n{samplers.table(results)}\n{samplers.END}" in text
    from sparse_engine.sampling import SAMPLERS

    assert list(results["samplers"]) == list(SAMPLERS)
