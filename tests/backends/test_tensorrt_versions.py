"""The whole of a TensorRT build over a module that has what NVIDIA documents for a version, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named
from sparse_engine.backends.cuda import runtime as cuda
from sparse_engine.backends.cuda.runtime import Gpu
from sparse_engine.backends.tensorrt import libraries, plans
from sparse_engine.backends.tensorrt.libraries import TENSORRT, Library
from sparse_engine.errors import BackendError
from sparse_engine.export.write import write_built
from sparse_engine.manifest import Manifest
from sparse_engine.tactics import Choice
from tests.backends.fake_builder import SPARSE_KERNEL, FakeTensorRTBuilder, How
from tests.backends.fake_cuda import FakeCuda

A40 = Gpu(1, "NVIDIA A40", "8.6", 48 << 30, "12.4")
VERSIONS = ["10.13.3.9", "10.14.1.48", "11.1.0.106"]


Build = Callable[..., tuple[Manifest, FakeTensorRTBuilder]]


def never(how: dict[str, Any]) -> bool:
    return False


@pytest.fixture
def build(
    small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Build:
    """Build with a version of the library; "sparse conv1x1" is found to be the fastest."""

    def make(
        version: str, cannot_build: How = never, cannot_run: How = never, memory: int = 1 << 30, **options: Any
    ) -> tuple[Manifest, FakeTensorRTBuilder]:
        gpu = FakeCuda(memory)
        trt = FakeTensorRTBuilder(version, gpu)
        trt.cannot_build, trt.cannot_run = cannot_build, cannot_run

        def choose(candidates: dict[str, Callable[[], object]]) -> Choice:
            for run in candidates.values():
                run()
            times = {name: 1.0 if name == "sparse conv1x1" else 2.0 for name in candidates}
            return Choice(min(times, key=lambda name: times[name]), times)

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
        assert trt.most_engines <= 2, "more plans on the GPU than are compared"
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
def test_only_the_fastest_plan_is_stripped_and_none_is_timed_without_its_weights(version: str, build: Build) -> None:
    manifest, trt = build(version, strip_weights=True)
    stripped = [{"STRIP_PLAN", "REFIT_IDENTICAL"} <= set(plan["flags"]) for plan in trt.plans]
    assert stripped == [False, False, False, False, True]
    assert trt.plans[-1]["operator"] == "Conv"
    assert manifest.backend["linear"] == "conv1x1"
    assert manifest.backend["flags"]["strip_weights"]
    assert {"step.plan", "step.onnx", "weights.bin"} <= set(manifest.files)


def of(*operators: str, sparse: bool | None = None) -> How:
    """Plans of Linears as some operators; sparse ones or dense ones only where that is given."""
    return lambda how: how["operator"] in operators and sparse in (None, "SPARSE_WEIGHTS" in how["flags"])


def test_a_form_that_cannot_be_built_is_left_out_and_said(build: Build) -> None:
    manifest, trt = build(VERSIONS[0], cannot_build=of("Conv"))
    assert len(trt.plans) == 3
    assert manifest.backend["linear"] == "matmul"
    assert set(manifest.backend["timed"]) == {"sparse matmul", "sparse gemm", "dense matmul"}
    assert list(manifest.backend["failed"]) == ["sparse conv1x1"]
    assert "Could not find any implementation for a Conv" in manifest.backend["failed"]["sparse conv1x1"]


def test_a_plan_that_cannot_be_run_is_left_out_and_said(build: Build) -> None:
    manifest, _ = build(VERSIONS[0], cannot_run=of("MatMul", sparse=True))
    assert manifest.backend["linear"] == "conv1x1"
    assert set(manifest.backend["timed"]) == {"sparse gemm", "sparse conv1x1", "dense matmul"}
    assert "cannot create an execution context" in manifest.backend["failed"]["sparse matmul"]


def test_plans_that_do_not_fit_beside_each_other_are_timed_alone(build: Build) -> None:
    manifest, _ = build(VERSIONS[0], memory=30_000)  # one takes 22 kB
    assert manifest.backend["failed"] == {}
    assert set(manifest.backend["timed"]) == {"sparse matmul", "sparse gemm", "sparse conv1x1", "dense matmul"}
    assert manifest.backend["linear"] == "conv1x1"


def test_dense_is_kept_where_no_sparse_plan_is_left_and_the_report_says_why(build: Build) -> None:
    manifest, _ = build(VERSIONS[0], cannot_build=of("MatMul", "Gemm", "Conv", sparse=True))
    assert manifest.backend["timed"] is None
    assert set(manifest.backend["failed"]) == {"sparse matmul", "sparse gemm", "sparse conv1x1"}
    whys = {layer["why"] for layer in manifest.layers if layer["masked"]}
    assert whys == {"no plan with sparse kernels could be built and run"}


def test_a_build_fails_where_no_candidate_is_left(build: Build) -> None:
    every = of("MatMul", "Gemm", "Conv")
    with pytest.raises(BackendError, match="could not build a plan: Could not find any implementation for a MatMul"):
        build(VERSIONS[0], cannot_build=every)
    with pytest.raises(BackendError, match="cannot create an execution context"):
        build(VERSIONS[0], cannot_run=every)


def test_times_of_different_pairs_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is twice as slow in each round as in the one before."""
    speeds, slowdown = {"a": 3.0, "b": 2.0, "c": 2.5, "d": 1.0}, itertools.count()

    def choose(runs: dict[str, Callable[[], object]]) -> Choice:
        factor = 2 ** next(slowdown)
        times = {name: speeds[name] * factor for name in runs}
        return Choice(min(times, key=lambda name: times[name]), times)

    monkeypatch.setattr(plans, "fastest", choose)
    monkeypatch.setattr(plans, "Cuda", lambda index: None)
    monkeypatch.setattr(plans, "_timed_run", lambda *_: None)
    built: Any = [SimpleNamespace(candidate=SimpleNamespace(name=name)) for name in speeds]
    times, failed = plans.time_plans(TENSORRT, built, A40, BuildOptions(True))
    assert failed == {}
    assert times == pytest.approx({name: value / plans.STEPS_TIMED for name, value in speeds.items()})


def test_a_tensorrt_that_is_too_old_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.util, "find_spec", lambda name: object())
    monkeypatch.setattr(libraries.metadata, "version", lambda name: "10.3.0")
    found = TENSORRT.availability()
    assert not found.usable
    assert found.reason == "tensorrt 10.3.0 is too old; expected 10.13"
    assert "pip install 'sparse-engine[tensorrt]'" in (found.fix or "")
