"""The whole of a TensorRT build over a module that has what NVIDIA documents for a version, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named
from sparse_engine.backends.cuda import runtime as cuda
from sparse_engine.backends.cuda.runtime import Gpu
from sparse_engine.backends.tensorrt import libraries, plans
from sparse_engine.backends.tensorrt.libraries import TENSORRT, Library
from sparse_engine.export.build import write_built
from sparse_engine.manifest import Manifest
from sparse_engine.tactics import Choice
from tests.backends.fake_builder import SPARSE_KERNEL, FakeTensorRTBuilder
from tests.backends.fake_cuda import FakeCuda

A40 = Gpu(1, "NVIDIA A40", "8.6", 48 << 30, "12.4")
VERSIONS = ["10.13.3.9", "10.14.1.48", "11.1.0.106"]


Build = Callable[..., tuple[Manifest, FakeTensorRTBuilder]]


@pytest.fixture
def build(
    small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Build with a version of the library; "sparse conv1x1" is found to be the fastest."""

    def choose(candidates: dict[str, Callable[[], object]]) -> Choice:
        for run in candidates.values():
            run()
        fastest = next((name for name in candidates if name == "sparse conv1x1"), next(iter(candidates)))
        return Choice(fastest, {name: 1.0 if name == fastest else 2.0 for name in candidates})

    def make(version: str, **options: Any) -> tuple[Manifest, FakeTensorRTBuilder]:
        gpu = FakeCuda()
        trt = FakeTensorRTBuilder(version, gpu)
        monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(Library, "load", lambda self: trt)
        monkeypatch.setattr(libraries.util, "find_spec", lambda name: object())
        monkeypatch.setattr(libraries.metadata, "version", lambda name: f"{version}.post1")
        for module in (cuda, libraries):
            monkeypatch.setattr(module, "find_gpu", lambda device=None: A40)
        for module in (cuda, plans):
            monkeypatch.setattr(module, "Cuda", lambda index: gpu if index == A40.index else pytest.fail("another GPU"))
        monkeypatch.setattr(plans, "fastest", choose)
        wanted = BuildOptions(True, options.pop("precision", "fp16"), (1, 4, 8), tensorrt=TensorRTOptions(**options))
        backend = backend_named("tensorrt")
        assert backend.availability().usable
        backend.check(wanted)
        graph = step_graph(backend.graph_precision(wanted))
        manifest = write_built(tmp_path / "x.sengine", *small_model, graph, backend, wanted)
        assert gpu.leaks() == {}
        return manifest, trt

    return make


@pytest.mark.parametrize("version", VERSIONS)
def test_every_form_is_built_and_a_dense_plan_beside(version: str, build: Build, tmp_path: Path) -> None:
    manifest, trt = build(version, workspace=1 << 30, optimization_level=4)
    assert len(trt.plans) == 4
    assert [("SPARSE_WEIGHTS" in plan["flags"]) for plan in trt.plans] == [True, True, True, False]
    for plan in trt.plans:
        assert (plan["verbosity"], plan["level"], plan["workspace"]) == ("DETAILED", 4, 1 << 30)
        assert plan["profile"]["x"] == ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))
        assert plan["profile"]["y"] == ((1, 1), (2, 4), (2, 8))
        assert not {"FP16", "BF16", "INT8", "FP8", "REFIT", "STRIP_PLAN"} & set(plan["flags"])
    backend = manifest.backend
    assert backend["version"] == version
    assert backend["linear"] == "conv1x1"
    assert set(backend["timed"]) == {"sparse matmul", "sparse gemm", "sparse conv1x1", "dense matmul"}
    assert backend["attention"] == ("plain" if version.startswith("10.13") else "Attention")
    assert bool(trt.attentions) is not version.startswith("10.13")
    assert all(attention.decomposable for attention in trt.attentions)
    masked = [layer for layer in manifest.layers if layer["masked"]]
    assert {(layer["chosen"], layer["kernel"]) for layer in masked} == {(True, SPARSE_KERNEL)}
    timings = list((tmp_path / "cache" / "tensorrt").glob("timing-*.bin"))
    assert len(timings) == 1
    assert timings[0].stat().st_size >= 4


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision,tf32", [("fp32", False), ("tf32", True)])
def test_tf32_is_the_only_precision_that_is_a_flag(version: str, precision: str, tf32: bool, build: Build) -> None:
    _, trt = build(version, precision=precision, linear="matmul")
    assert {"TF32" in plan["flags"] for plan in trt.plans} == {tf32}


@pytest.mark.parametrize("version", VERSIONS)
def test_compatible_plans_are_timed_and_loaded_as_what_they_are(version: str, build: Build, tmp_path: Path) -> None:
    manifest, trt = build(version, version_compatible=True, hardware_compatible=True, static_batch=True)
    assert all("VERSION_COMPATIBLE" in plan["flags"] for plan in trt.plans)
    assert {plan["hardware"] for plan in trt.plans} == {"AMPERE_PLUS"}
    assert trt.plans[0]["profile"]["x"] == ((4, 3, 8, 8),) * 3
    assert manifest.backend["profile"] == (4, 4, 4)
    with SparseEngine.load(tmp_path / "x.sengine") as engine:
        assert engine.sample(3, steps=2, labels=1).shape == (3, 8, 8, 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_stripped_plans_take_back_the_very_weights(version: str, build: Build) -> None:
    _, trt = build(version, strip_weights=True, linear="matmul")
    assert all({"STRIP_PLAN", "REFIT_IDENTICAL"} <= set(plan["flags"]) for plan in trt.plans)


def test_a_tensorrt_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.util, "find_spec", lambda name: object())
    monkeypatch.setattr(libraries.metadata, "version", lambda name: "10.3.0")
    found = TENSORRT.availability()
    assert not found.usable
    assert found.reason == "tensorrt 10.3.0 is too old; expected 10.13"
    assert "pip install 'sparse-engine[tensorrt]'" in (found.fix or "")
