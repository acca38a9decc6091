"""A small U-ViT with every kind of layer, exported once in each precision that a test asks for; sessions of graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from sparse_engine import SparseEngine, kernels
from sparse_engine.backends.base import StepGraph, weights_payload
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.graphs import export_baked
from sparse_engine.export.model import Model, load_model
from tests.conftest import build_with, save_checkpoint

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


@pytest.fixture(scope="session")
def int8_engines(
    conditional_checkpoint: Path, conditional_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """For ONNX Runtime, "2:4" and "dense": 13 layers in 8 bits, four a block and one that is dense in both."""
    folder = tmp_path_factory.mktemp("int8")
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        collect(engine, images=20, steps=8, sampler="ddim").save(folder / "calib.npz")
    told: dict[str, Any] = {"precision": "int8", "heads": 4, "null_class": 4}
    told["quantisation"] = Quantisation(folder / "calib.npz")
    return {
        name: build_with(conditional_checkpoint, folder / f"{name}.sengine", sparse=sparse, **told)[0]
        for name, sparse in (("2:4", True), ("dense", False))
    }


def open_session(graph: StepGraph, folder: Path) -> Any:
    """As the backend opens it: with ONNX Runtime's own optimisations."""
    weights = weights_payload(graph.weights)
    with (folder / weights.name).open("wb") as stream:
        stream.writelines(weights.chunks())
    (folder / "step.onnx").write_bytes(graph.proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    if any(node.domain == "sparse_engine" for node in graph.proto.graph.node):
        options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    return onnxruntime.InferenceSession(folder / "step.onnx", options, providers=["CPUExecutionProvider"])
