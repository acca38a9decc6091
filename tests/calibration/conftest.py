"""A small conditional model, observed: its engine, its float step graph, and calibration data from its trajectories."""

from pathlib import Path

import pytest

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import StepGraph
from sparse_engine.calibration.collect import CalibrationData, collect
from sparse_engine.calibration.engine_graph import step_graph_of


@pytest.fixture(scope="session")
def data(conditional_engine: Path) -> CalibrationData:
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        return collect(engine, images=20, steps=8, sampler="ddim")


@pytest.fixture(scope="session")
def graph(conditional_engine: Path) -> StepGraph:
    return step_graph_of(EngineFile(conditional_engine))


@pytest.fixture(scope="session")
def inner_layers(graph: StepGraph) -> list[str]:
    """The layers that are quantised unless told otherwise."""
    return [name for name in graph.layers if "." in name and not name.startswith("patch_embed")]


@pytest.fixture(scope="session")
def sparse_layers(inner_layers: list[str]) -> list[str]:
    return [name for name in inner_layers if not name.endswith("skip_linear")]


@pytest.fixture(scope="session")
def calibration_file(data: CalibrationData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    data.save(path)
    return path
