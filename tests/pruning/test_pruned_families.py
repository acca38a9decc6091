"""One tiny model of each family the whole way: pruned, built, verified, sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions
from sparse_engine.export.build import build_engine
from sparse_engine.export.model import load_model
from sparse_engine.export.options import ModelOptions
from sparse_engine.export.verify import verify_engine
from sparse_engine.pruning.journal import Journal
from sparse_engine.pruning.oneshot import PruneOptions, prune
from sparse_engine.pruning.write import output_for, write_pruned
from tests.conftest import TINY_CONDITIONAL, save_checkpoint
from tests.export import test_dit, test_unet_ddpm, test_uvit_t2i
from tests.pruning.states import states_of
from tests.test_families import FAST, MAKERS, OPTIONS, said

pytestmark = pytest.mark.usefixtures("without_gradients")

SHORT = dataclasses.replace(test_uvit_t2i.SHORT, depth=2)
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "uvit": lambda folder: save_checkpoint(folder / "x.pth", TINY_CONDITIONAL),
    "uvit-t2i": lambda folder: test_uvit_t2i.save(folder, SHORT),
    "dit-diffusers": lambda folder: test_dit.store(folder, test_dit.theirs()),
    "unet-ddpm": lambda folder: test_unet_ddpm.save(folder / "x.pth", test_unet_ddpm.AFFINE),
    **MAKERS,
}
GIVEN: dict[str, dict[str, Any]] = {
    "uvit": {"heads": 4, "null_class": 4},
    "uvit-t2i": {"heads": 2, "context_length": 7},
    "unet-ddpm": {"heads": 4, "image_size": 8, **test_unet_ddpm.TRAINING},
    **OPTIONS,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_built_verified_sampled(family: str, tmp_path: Path) -> None:
    checkpoint = FAMILIES[family](tmp_path)
    given = ModelOptions(**GIVEN.get(family, {}))
    model = load_model(checkpoint, given.family, **given.given())
    output = output_for(checkpoint, tmp_path / ("pruned" if checkpoint.is_dir() else "pruned.safetensors"))
    journal = Journal(output, {})
    pruned = prune(model, states_of(model, 32), PruneOptions(dense_layers=1), journal, tmp_path)
    write_pruned(checkpoint, output, model, pruned)
    layers = [layer for layer in pruned.layers if layer.pruned]
    assert sum(layer.reason is not None for layer in pruned.layers) >= 1
    assert np.mean([layer.error for layer in layers]) < np.mean([layer.by_magnitude for layer in layers])
    engine_file, manifest = build_engine(
        output, tmp_path / "m.sengine", model=given, backend="onnxruntime", options=BuildOptions(sparse=True)
    )
    sparse = {layer["name"] for layer in manifest.layers if layer["masked"] and layer["hardware_24"]}
    assert sparse == {layer.name for layer in layers}
    dense = {layer["name"]: layer["reason"] for layer in manifest.layers if not layer["masked"] and layer["reason"]}
    assert dense.keys() == {layer.name for layer in pruned.layers if not layer.pruned}
    assert verify_engine(engine_file, output).passed
    with SparseEngine.load(engine_file, threads=1, autotune=False) as engine:
        told = said(engine) if engine.manifest.conditions else {}
        assert np.isfinite(engine.sample(3, **told, **FAST)).all()
