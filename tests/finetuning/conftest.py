"""A tiny model and a tiny data set, and runs on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine.export.options import ModelOptions
from sparse_engine.pruning.data import DataOptions
from sparse_engine.pruning.finetune import Finished, finetune
from sparse_engine.pruning.settings import Reporting, Settings, Start

OF_THE_MODEL = ModelOptions(heads=4, null_class=4)
SHORT = {"steps": 10, "batch": 8, "warmup": 2, "lr": 1e-3}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of four classes."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (20, 8, 8, 3), np.uint8), labels=np.arange(20) % 4)
    return path


Train = Callable[..., Finished]


@pytest.fixture
def train(conditional_checkpoint: Path, tiny_data: Path, tmp_path: Path, one_torch_thread: None) -> Train:
    """A short run on the tiny data; settings, data options and reporting by their names."""

    def run(output: str | Path = "run", **options: Any) -> Finished:
        of_data = {name: options.pop(name) for name in ("flip", "dropout", "null_context") if name in options}
        reporting = {name: options.pop(name) for name in Reporting.__dataclass_fields__ if name in options}
        start = {"dense": conditional_checkpoint}
        start |= {name: options.pop(name) for name in ("dense", "weights", "config", "force") if name in options}
        called = {name: options.pop(name) for name in ("say", "stepped", "model", "device") if name in options}
        return finetune(
            Start(**start),
            options.pop("data", tiny_data),
            tmp_path / output,
            Settings(**{**SHORT, **options}),
            of_data=DataOptions(**of_data),
            reporting=Reporting(**{"log_every": 2, "save_every": 4, **reporting}),
            **{"model": OF_THE_MODEL, **called},
        )

    return run
