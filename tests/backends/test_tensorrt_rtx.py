"""What TensorRT for RTX needs beside TensorRT: recordable steps, and builds for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named
from sparse_engine.backends.cuda.runner import CudaRunner
from sparse_engine.backends.cuda.runtime import Gpu
from sparse_engine.backends.tensorrt import libraries, plans
from sparse_engine.backends.tensorrt.builder import Messages, make_logger
from sparse_engine.backends.tensorrt.device import TensorRTDevice
from sparse_engine.backends.tensorrt.libraries import RTX
from sparse_engine.errors import UnsupportedError
from sparse_engine.export.write import write_built
from tests.backends.fake_cuda import FakeCuda
from tests.backends.fake_tensorrt import RtxEngine, RuntimeConfig
from tests.backends.test_cuda_runner import close_to, draws, reference, step, trajectory

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")

H100 = Gpu(0, "NVIDIA H100", "9.0", 80 << 30, "13.0")
RTX_3090 = Gpu(0, "NVIDIA GeForce RTX 3090", "8.6", 24 << 30, "13.0")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu | None], None]:
    """Say which GPU is here."""

    def here(gpu: Gpu | None) -> None:
        def find_gpu(device: str | None = None) -> Gpu:
            if gpu is None:
                raise UnsupportedError("there is no NVIDIA driver")
            return gpu

        monkeypatch.setattr(libraries, "find_gpu", find_gpu)

    return here


def test_plans_are_built_so_that_their_steps_can_be_recorded() -> None:
    builder = trt.Builder(make_logger(trt, Messages()))
    config = builder.create_builder_config()
    RTX.target(trt, config, TensorRTOptions())
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_contexts_use_our_memory_and_wait_for_the_kernels_of_a_shape() -> None:
    settings = RTX.context_settings(trt, RtxEngine(FakeCuda(), step, {"y": np.int64}))
    assert isinstance(settings, RuntimeConfig)
    assert dict(settings.set) == {
        "execution_context_allocation_strategy": trt.ExecutionContextAllocationStrategy.USER_MANAGED,
        "dynamic_shapes_kernel_specialization_strategy": trt.DynamicShapesKernelSpecializationStrategy.EAGER,
    }
    documented = dir(trt.IRuntimeConfig)
    assert "set_execution_context_allocation_strategy" in documented
    assert "dynamic_shapes_kernel_specialization_strategy" in documented
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")


@pytest.mark.parametrize("capturable,how", [(True, "recorded"), (False, "one by one: TensorRT cannot record")])
def test_steps_are_recorded_only_where_the_context_says_that_they_can_be(capturable: bool, how: str) -> None:
    cuda, table, inputs = FakeCuda(), trajectory(), draws(4)
    engine = RtxEngine(cuda, step, {"y": np.int64})
    engine.capturable = capturable
    runner = CudaRunner([TensorRTDevice(cuda, engine, 0, RTX.context_settings(trt, engine))], (1, 4, 16), {})
    for _ in range(3):
        assert close_to(runner.run(table, **inputs), reference(table, **inputs))
    assert runner.describe()["steps"].startswith(how)
    assert (cuda.launches > 0) == capturable
    runner.close()
    assert cuda.leaks() == {}


@pytest.mark.parametrize(
    "gpu,precision,targets,runs",
    [
        (RTX_3090, "fp16", (), True),
        (RTX_3090, "fp16", ("sm86", "12.0"), True),
        (RTX_3090, "fp16", ("8.9",), False),
        (RTX_3090, "fp8", (), False),
        (H100, "fp16", (), False),
        (H100, "fp16", ("8.6",), False),
        (None, "fp16", (), False),
    ],
)
def test_a_gpu_counts_only_where_it_runs_the_plan(
    found: Callable[[Gpu | None], None], gpu: Gpu | None, precision: str, targets: tuple[str, ...], runs: bool
) -> None:
    found(gpu)
    options = BuildOptions(True, precision, tensorrt=TensorRTOptions(compute_capabilities=targets))
    assert RTX.gpu_for(options) == (gpu if runs else None)


@pytest.mark.parametrize("gpu,targets", [(H100, ("8.6",)), (H100, ()), (RTX_3090, ("8.9", "12.0"))])
def test_plans_for_other_gpus_are_built_beside_a_gpu_that_cannot_run_them(
    found: Callable[[Gpu | None], None],
    gpu: Gpu,
    targets: tuple[str, ...],
    small_model: tuple,
    step_graph: Callable[[str], StepGraph],
    tmp_path: Path,
) -> None:
    found(gpu)
    backend = backend_named("tensorrt-rtx")
    assert backend.availability().builds or backend.availability().usable
    options = BuildOptions(True, "fp16", (1, 2, 4), tensorrt=TensorRTOptions(cache=False, compute_capabilities=targets))
    backend.check(options)
    write_built(tmp_path / "x.sengine", *small_model, step_graph("fp16"), backend, options)
    built = EngineFile(tmp_path / "x.sengine").manifest.backend
    assert (built["device"], built["timed"], built["failed"]) == (None, None, {})
    assert built["compute_capabilities"] == list(targets)


@pytest.mark.parametrize("gpu", [None, H100], ids=["no GPU", "a GPU that RTX does not know"])
def test_stripping_without_a_gpu_that_runs_the_plan_is_refused_before_the_work(
    found: Callable[[Gpu | None], None], gpu: Gpu | None
) -> None:
    options = BuildOptions(True, "fp16", tensorrt=TensorRTOptions(strip_weights=True))
    found(gpu)
    with pytest.raises(UnsupportedError, match="--strip-weights: tensorrt-rtx builds such plans only on a GPU"):
        RTX.check(options)
    found(RTX_3090)
    RTX.check(options)


def test_plans_of_another_builder_are_not_served(
    small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    options = BuildOptions(False, "fp16", (1, 2, 4))

    def build() -> int:
        plans.PlanBuilder(RTX, step_graph("fp16"), options, None, "1.7").build(plans.Candidate("matmul", False))
        return len(list((tmp_path / "tensorrt").glob("*.plan")))

    assert [build(), build()] == [1, 1]
    monkeypatch.setattr(plans, "REVISION", plans.REVISION + 1)
    assert build() == 2
    monkeypatch.setattr(plans, "__version__", "9.9.9")
    assert build() == 3
