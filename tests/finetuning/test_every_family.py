"""A few steps of each family, and the run's folder read as what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.export.bake import bake
from sparse_engine.export.families.unet_ddpm import FAMILY as DDPM
from sparse_engine.export.families.uvit_t2i import UViTT2I, UViTT2IConfig
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.options import ModelOptions
from sparse_engine.pruning.finetune import finetune
from sparse_engine.pruning.settings import Reporting, Settings, Start
from tests.conftest import save_network
from tests.export.test_unet_ddpm import AFFINE
from tests.test_families import MAKERS, OPTIONS

COUNT = 6
T2I = UViTT2IConfig(8, 2, 4, 32, 2, 4, context_dim=6, context_length=3)


def made(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    if name == "uvit-t2i":
        return save_network(folder / "t2i.pth", UViTT2I(T2I)), {"heads": 4, "context_length": 3}
    if name == "unet-ddpm":
        return save_network(folder / "ddpm.pth", DDPM.network(AFFINE)), {
            "heads": AFFINE.heads,
            "image_size": 8,
            "schedule": "vp-linear",
            "prediction": "eps",
        }
    return MAKERS[name](folder), OPTIONS[name]


def data_for(model: Model, path: Path) -> Path:
    """Random images or latents, with something for each condition."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"images": rng.uniform(-1, 1, (COUNT, *model.config.data_shape)).astype(np.float32)}
    for each in model.conditions:
        if each.classes is not None:
            labels = model.labels(COUNT)
            assert labels is not None
            arrays["labels"] = labels
        elif each.needed:
            arrays[each.name] = rng.standard_normal((COUNT, *each.shape)).astype(each.dtype)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", [*MAKERS, "uvit-t2i", "unet-ddpm"])
def test_trains_and_is_read(name: str, tmp_path: Path, one_torch_thread: None) -> None:
    checkpoint, given = made(name, tmp_path)
    options = ModelOptions(**given)
    dense = load_model(checkpoint, **options.given())
    with torch.random.fork_rng(devices=[]):
        done = finetune(
            Start(checkpoint),
            data_for(dense, tmp_path / "data.npz"),
            tmp_path / "run",
            Settings(steps=2, batch=2, lr=1e-3, warmup=0, ema=0.0),
            reporting=Reporting(log_every=1),
            model=options,
        )
    assert np.isfinite(list(done.losses.values())).all()
    assert done.losses["teacher_loss"] > 0
    tuned = load_model(tmp_path / "run")
    assert (tuned.family, tuned.config, tuned.recipe) == (dense.family, dense.config, dense.recipe)
    masked = [layer.name for layer in bake(tuned).layers if layer.masked]
    assert masked == [layer.name for layer in bake(dense, "magnitude").layers if layer.masked]
    before, after = dense.checkpoint.state, tuned.checkpoint.state
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[f"{each}.weight"], after[f"{each}.weight"]) for each in masked)
