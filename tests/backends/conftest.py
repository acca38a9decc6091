"""One small U-ViT with every kind of layer, exported once in each precision that a test asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from sparse_engine.backends.base import StepGraph
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.build import export_baked
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.model import Model, load_model
from tests.conftest import save_checkpoint

EVERY_LAYER = UViTConfig(8, 2, 3, 64, 2, 4, qkv_bias=True, mlp_time_embed=True, num_classes=5)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Baked]:
    """12 of its layers are 2:4."""
    model = load_model(
        save_checkpoint(tmp_path_factory.mktemp("small") / "small.pth", EVERY_LAYER), heads=4, null_class=4
    )
    return model, bake(model)


@pytest.fixture(scope="session")
def step_graph(small_model: tuple[Model, Baked]) -> Callable[[str], StepGraph]:
    """Precision -> the step graph."""
    return functools.cache(lambda precision: export_baked(*small_model, precision))
