"""The digits of a DiT: a short run learns, and writes models that are read as what they are."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sparse_engine.export.bake import bake
from sparse_engine.export.families.dit import FAMILY, DiT, DiTConfig
from sparse_engine.export.model import load_model
from tests.examples.test_digits import script

FOLDER = Path(__file__).parents[2] / "examples" / "digits_dit"


@pytest.fixture
def train_dit() -> ModuleType:
    return script("train_dit", FOLDER)


def test_a_short_training_run_writes_both_models(
    train_dit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--dense-steps", "6", "--sparse-steps", "2", "--out", str(tmp_path)])
    train_dit.main()
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    models = {name: load_model(tmp_path / f"{name}.pth") for name in ("dense", "sparsedm")}
    dense, sparse = (model.checkpoint.state for model in models.values())
    assert models["dense"].family is FAMILY
    assert models["dense"].recipe.null_class == 10
    assert not models["dense"].recipe.excluded  # it predicts no variance
    assert len([layer for layer in bake(models["sparsedm"], "magnitude").layers if layer.masked]) == 16
    for name in ("blocks.0.adaLN_modulation.1.weight", "y_embedder.embedding_table.weight"):
        assert not np.array_equal(dense[name], sparse[name])
    assert np.array_equal(dense["pos_embed"], sparse["pos_embed"])
    network = models["sparsedm"].network(sparse)
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0)
    three, none = (network(x, t, y=torch.full((2,), label)) for label in (3, 10))
    assert three.shape == x.shape
    assert not torch.equal(three, none)


def test_its_configuration_is_the_familys() -> None:
    values = json.loads((FOLDER / "config.json").read_text())
    recipe = {"family", "schedule", "prediction", "value_range", "sampler", "null_class"}
    assert values.keys() - recipe <= FAMILY.settings
    network = DiT(DiTConfig.from_dict(values))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(0.75e6, rel=0.1)
