"""The text-to-image digits: a short run learns, and writes what a build of it needs."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sparse_engine.export.bake import bake
from sparse_engine.export.families.uvit_t2i import FAMILY, UViTT2I
from sparse_engine.export.model import load_model
from tests.examples.test_digits import script

FOLDER = Path(__file__).parents[2] / "examples" / "digits_text"


@pytest.fixture
def train_text() -> ModuleType:
    return script("train_text", FOLDER)


def test_a_short_training_run_writes_models_and_what_they_are_told(
    train_text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None
) -> None:
    arguments = ["train_text.py", "--dense-steps", "6", "--sparse-steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    train_text.main()
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    models = {name: load_model(tmp_path / f"{name}.pth") for name in ("dense", "sparsedm")}
    told = models["dense"].config.conditions[0]
    contexts, null = np.load(tmp_path / "contexts.npz")["context"], np.load(tmp_path / "null_context.npy")
    assert contexts.shape == (10, *told.shape)
    assert null.shape == told.shape
    assert contexts.dtype == null.dtype == np.float32
    assert len({row.tobytes() for row in (*contexts, null)}) == 11
    assert len([layer for layer in bake(models["sparsedm"], "magnitude").layers if layer.masked]) == 20
    states = [model.checkpoint.state for model in models.values()]
    for name in ("mid_block.mlp.fc1.weight", "context_embed.weight"):
        assert not np.array_equal(states[0][name], states[1][name])
    network = models["dense"].network(states[0])
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 500.0)
    both = [network(x, t, context=torch.from_numpy(row).expand(2, -1, -1)) for row in (contexts[3], null)]
    assert both[0].shape == x.shape
    assert not torch.allclose(both[0], both[1])


def test_its_configuration_is_the_familys(train_text: ModuleType) -> None:
    values = json.loads((FOLDER / "config.json").read_text())
    config = train_text.UViTT2IConfig.from_dict(values)
    assert values.keys() - {"family", "schedule", "prediction", "value_range", "sampler"} <= FAMILY.settings
    assert sum(p.numel() for p in UViTT2I(config).parameters()) == pytest.approx(0.6e6, rel=0.1)
