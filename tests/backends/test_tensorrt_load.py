"""What happens to a plan before TensorRT gets its bytes, on a machine with a GPU that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import (
    Availability,
    BuildOptions,
    Payload,
    PayloadFile,
    StepGraph,
    TensorRTOptions,
    backend_named,
)
from sparse_engine.backends.base import bytes_payload, weights_payload
from sparse_engine.backends.cuda import runtime as cuda
from sparse_engine.backends.cuda.runtime import Gpu
from sparse_engine.backends.tensorrt import libraries, plans
from sparse_engine.backends.tensorrt.libraries import Library
from sparse_engine.errors import BackendError, EngineFileError, OptionError, UnsupportedError
from sparse_engine.export.build import write_built
from sparse_engine.tactics import Choice
from tests.backends.fake_cuda import FakeCuda, FakeEngine
from tests.backends.fake_tensorrt import FakeTensorRT
from tests.backends.test_cuda_runner import step

A40 = Gpu(0, "NVIDIA A40", "8.6", 48 << 30, "12.4")
PLAN = b"the plan's bytes" * 4096
BUILT = {
    "name": "tensorrt",
    "device": "NVIDIA A40",
    "compute_capability": "8.6",
    "compute_capabilities": [],
    "hardware_compatible": False,
    "version_compatible": False,
    "profile": [1, 4, 16],
    "linear": "matmul",
    "attention": "Attention",
    "flags": {"strip_weights": False},
}


class Machine:
    """What ``find_gpu`` and the library's version say, and what was given to TensorRT."""

    def __init__(self) -> None:
        self.gpu, self.version = A40, "10.14.1.48"
        self.cuda = FakeCuda()
        self.trt = FakeTensorRT(FakeEngine(self.cuda, step, {"y": np.int64}))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    for module in (cuda, libraries):
        monkeypatch.setattr(module, "find_gpu", lambda device=None: made.gpu)
    monkeypatch.setattr(cuda, "Cuda", lambda index: made.cuda)
    monkeypatch.setattr(Library, "load", lambda self: made.trt)
    monkeypatch.setattr(Library, "availability", lambda self: Availability(True, made.version))
    return made


@pytest.fixture
def engine_file(machine: Machine, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path) -> Path:
    return make_file(tmp_path / "x.sengine", small_model, step_graph)


def make_file(
    path: Path, small_model: tuple, step_graph: Callable[[str], StepGraph], precision: str = "fp16", **changed: Any
) -> Path:
    """An engine file with a plan in it, as the backend would have built it."""

    class Builder:
        name = "tensorrt"

        def availability(self) -> Availability:
            return Availability(True, "10.14.1.48")

        def build(self, graph: StepGraph, *_: Any) -> Payload:
            files = [PayloadFile("step.plan", len(PLAN), lambda: (PLAN,), aligned=True)]
            files += [bytes_payload("step.onnx", graph.proto.SerializeToString()), weights_payload(graph.weights)]
            return Payload(files, {**BUILT, **changed})

    write_built(path, *small_model, step_graph("fp16"), Builder(), BuildOptions(True, precision))  # type: ignore[arg-type]
    return path


def test_a_plan_that_fits_runs(machine: Machine, engine_file: Path) -> None:
    with SparseEngine.load(engine_file, threads=2) as engine:
        assert machine.trt.deserialised == [PLAN]
        images = engine.sample(5, steps=4, labels=1, guidance=2.0, batch_size=5)
        assert images.shape == (5, 8, 8, 3)
        again = engine.sample(5, steps=4, labels=1, guidance=2.0, batch_size=2)
        assert np.abs(images.astype(int) - again).max() <= 1
        runtime = engine.info["runtime"]
        assert runtime["device"] == "cuda:0 NVIDIA A40"
        assert runtime["lanes"] == 2
    assert machine.cuda.leaks() == {}


def refused(path: Path, machine: Machine) -> EngineFileError:
    with pytest.raises(EngineFileError) as caught:
        SparseEngine.load(path)
    assert machine.trt.deserialised == []
    return caught.value


def test_another_version(machine: Machine, engine_file: Path) -> None:
    machine.version = "11.4.0.106"
    error = refused(engine_file, machine)
    assert "was built by tensorrt 10.14.1.48; here is tensorrt 11.4.0.106 on NVIDIA A40" in error.what
    assert error.fix == (
        "rebuild it here: sparse-engine build CHECKPOINT --sparse --backend tensorrt --precision fp16 --batch 1,16,64 "
        f"-o {engine_file}"
    )


def test_another_gpu(machine: Machine, engine_file: Path) -> None:
    machine.gpu = Gpu(0, "NVIDIA H100", "9.0", 80 << 30, "12.4")
    error = refused(engine_file, machine)
    assert "was built on NVIDIA A40 (compute capability 8.6); here is" in error.what
    assert "NVIDIA H100 (compute capability 9.0)" in error.what


def test_another_gpu_of_the_same_compute_capability(machine: Machine, engine_file: Path) -> None:
    machine.gpu = Gpu(0, "NVIDIA GeForce RTX 3090", "8.6", 24 << 30, "12.4")
    error = refused(engine_file, machine)
    assert "was built on NVIDIA A40 (compute capability 8.6); here is" in error.what
    assert "NVIDIA GeForce RTX 3090 (compute capability 8.6)" in error.what


def test_a_gpu_that_an_rtx_plan_was_not_built_for(
    machine: Machine, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path
) -> None:
    changed = {"name": "tensorrt-rtx", "compute_capability": None, "compute_capabilities": ["8.9", "12.0"]}
    path = make_file(tmp_path / "rtx.sengine", small_model, step_graph, **changed)
    assert "was built for compute capability 8.9, 12.0; here is tensorrt-rtx" in refused(path, machine).what


@pytest.mark.parametrize(
    "gpu,what",
    [
        (Gpu(0, "NVIDIA H100", "9.0", 80 << 30, "12.4"), "was built for compute capability 8.0, 8.6, 8.9, 12.0; here"),
        (A40, "is in fp8, which needs compute capability 8.9; here is tensorrt-rtx"),
    ],
    ids=["not of the library", "without the precision"],
)
def test_an_rtx_plan_for_any_gpu_is_for_those_that_have_its_precision(
    machine: Machine, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path, gpu: Gpu, what: str
) -> None:
    changed = {"name": "tensorrt-rtx", "compute_capability": None}
    path = make_file(tmp_path / "rtx.sengine", small_model, step_graph, precision="fp8", **changed)
    machine.gpu = gpu
    error = refused(path, machine)
    assert what in error.what
    assert error.fix is not None
    assert "--backend tensorrt-rtx --precision" in error.fix


@pytest.mark.parametrize(
    "changed,version,gpu",
    [
        ({"version_compatible": True}, "10.15.0.1", A40),
        ({"hardware_compatible": True}, "10.14.1.48", Gpu(0, "NVIDIA H100", "9.0", 80 << 30, "12.4")),
        ({"compute_capability": None, "compute_capabilities": ["8.0", "8.6"]}, "10.14.1.48", A40),
    ],
    ids=["later version", "later GPU", "one of several GPUs"],
)
def test_compatible_plans_run_elsewhere(
    machine: Machine,
    small_model: tuple,
    step_graph: Callable[[str], StepGraph],
    tmp_path: Path,
    changed: dict,
    version: str,
    gpu: Gpu,
) -> None:
    path = make_file(tmp_path / "x.sengine", small_model, step_graph, **changed)
    machine.version, machine.gpu = version, gpu
    SparseEngine.load(path).close()
    assert machine.trt.deserialised == [PLAN]


@pytest.mark.parametrize("version", ["10.13.0.1", "11.0.0.1"], ids=["earlier", "next major"])
def test_version_compatible_is_forward_and_within_a_major(
    machine: Machine, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path, version: str
) -> None:
    path = make_file(tmp_path / "x.sengine", small_model, step_graph, version_compatible=True)
    machine.version = version
    assert "was built by tensorrt 10.14.1.48" in refused(path, machine).what


def test_truncated(machine: Machine, engine_file: Path) -> None:
    engine_file.write_bytes(engine_file.read_bytes()[:-2000])
    assert "is cut short or altered" in refused(engine_file, machine).what


def test_one_byte_altered(machine: Machine, engine_file: Path) -> None:
    data = bytearray(engine_file.read_bytes())
    data[EngineFile(engine_file).span("step.plan")[0] + 1000] ^= 1
    engine_file.write_bytes(data)
    assert "step.plan was altered: its xxh3_128 is" in refused(engine_file, machine).what


def test_what_tensorrt_refuses_is_said_in_its_words_on_one_line(machine: Machine, engine_file: Path) -> None:
    machine.trt.engine = None
    with pytest.raises(BackendError, match="refuses the plan: Serialization assertion failed. magic tag") as caught:
        SparseEngine.load(engine_file)
    assert "\n" not in caught.value.what


def test_stripped_weights_are_put_back_from_the_engine_file(
    machine: Machine, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path
) -> None:
    path = make_file(tmp_path / "x.sengine", small_model, step_graph, flags={"strip_weights": True})
    SparseEngine.load(path).close()
    assert machine.trt.refitted is not None
    model, where = machine.trt.refitted
    assert where == str(path)
    graph, data = step_graph("fp16"), path.read_bytes()
    external = {each.name: each for each in onnx.load_model_from_string(model).graph.initializer if each.external_data}
    assert set(external) == set(graph.weights)
    for name, tensor in external.items():
        facts = {entry.key: entry.value for entry in tensor.external_data}
        assert facts["location"] == path.name
        start = int(facts["offset"])
        assert data[start : start + int(facts["length"])] == graph.weights[name].tobytes()
    machine.trt.takes_weights = False
    with pytest.raises(BackendError, match="its weights cannot be put back"):
        SparseEngine.load(path)


SPARSE_KERNEL = "sm80_xmma_gemm_sparse_f16f16_f16f32_f32_tn_n_sptensor16x8x32"
DENSE_KERNEL = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"


@pytest.mark.parametrize("fastest,chosen", [("sparse gemm", True), ("dense matmul", False)])
def test_plans_are_timed_and_the_fastest_is_kept_and_reported(
    machine: Machine,
    small_model: tuple,
    step_graph: Callable[[str], StepGraph],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fastest: str,
    chosen: bool,
) -> None:
    built: list[tuple[str, bool]] = []

    def build_plan(library: Library, graph: StepGraph, options: BuildOptions, **how: Any) -> memoryview:
        built.append((next(n.op_type for n in graph.proto.graph.node if n.name == "mid_block.mlp.fc1"), how["sparse"]))
        if how["sparse"]:
            for said in ("Found 12 layer(s) eligible to use", "Chose 1 layer(s) using"):
                how["messages"].add("INFO", f"(Sparsity) {said} sparse tactics: mid_block.mlp.fc1")
        return memoryview(f"plan {len(built)}".encode())

    def choose(candidates: dict[str, Callable[[], object]]) -> Choice:
        for run in candidates.values():
            run()
        times = {name: 1.0 if name == fastest else 2.0 for name in candidates}
        return Choice(min(times, key=lambda name: times[name]), times)

    monkeypatch.setattr(plans, "build_plan", build_plan)
    monkeypatch.setattr(plans, "fastest", choose)
    monkeypatch.setattr(plans, "Cuda", lambda index: machine.cuda)
    kernel = SPARSE_KERNEL if chosen else DENSE_KERNEL
    entry = {"Name": "__myl_Fc", "Metadata": "[ONNX Layer: mid_block.mlp.fc1]", "TacticName": kernel}
    assert machine.trt.engine is not None
    machine.trt.engine.information = json.dumps({"Layers": [entry]})
    options = BuildOptions(True, "fp16", (1, 4, 8), tensorrt=TensorRTOptions(cache=False))
    path = tmp_path / "x.sengine"
    manifest = write_built(path, *small_model, step_graph("fp16"), backend_named("tensorrt"), options)
    assert built == [("MatMul", True), ("Gemm", True), ("Conv", True), ("MatMul", False)]
    assert manifest.backend["timed"][fastest] == 1.0 / plans.STEPS_TIMED
    assert manifest.backend["linear"] == fastest.split()[1]
    assert EngineFile(path).read("step.plan") == (b"plan 2" if chosen else b"plan 4")
    assert (manifest.backend["device"], manifest.backend["compute_capability"]) == ("NVIDIA A40", "8.6")
    layer = next(layer for layer in manifest.layers if layer["name"] == "mid_block.mlp.fc1")
    assert (layer["chosen"], layer["kernel"]) == (chosen, kernel)
    others = {layer["why"] for layer in manifest.layers if layer["masked"] and layer["name"] != "mid_block.mlp.fc1"}
    said = (
        "TensorRT does not say which kernel it chose" if chosen else "the dense plan was faster than every sparse one"
    )
    assert others == {said}
    assert machine.cuda.leaks() == {}


def test_threads_of_zero(machine: Machine, engine_file: Path) -> None:
    with pytest.raises(OptionError, match="threads = 0; expected 1 to 4096"):
        SparseEngine.load(engine_file, threads=0)


class FakeRuntime:
    """``cuda.bindings.runtime`` on machines that lack something."""

    def __init__(self, driver: int, count: tuple[int, int | None]) -> None:
        codes = {"cudaSuccess": 0, "cudaErrorInsufficientDriver": 35, "cudaErrorMemoryAllocation": 2}
        self.cudaError_t = SimpleNamespace(**codes)
        self.driver, self.count = driver, count

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13040

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.count

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, b"out of memory" if code == 2 else b"an illegal memory access was encountered"

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, None]:
        return 2, None

    def cudaSetDevice(self, index: int) -> tuple[int]:
        return (700,)


@pytest.mark.parametrize(
    "driver,count,message,fix",
    [
        (0, (35, None), "there is no NVIDIA driver", "install NVIDIA's driver"),
        (12020, (35, None), "the NVIDIA driver is for CUDA 12.2; this cuda-python is for CUDA 13.4", "cuda-python==12"),
        (13040, (100, None), "there is a driver, but no NVIDIA GPU", "nvidia-smi"),
        (13040, (0, 0), "there is a driver, but no NVIDIA GPU", "nvidia-smi"),
    ],
)
def test_what_the_machine_lacks(
    driver: int, count: tuple, message: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_runtime", lambda: FakeRuntime(driver, count))
    with pytest.raises(UnsupportedError, match=message) as caught:
        cuda.find_gpu()
    assert fix in (caught.value.fix or "")
    found = libraries.RTX.availability()
    assert (found.usable, found.builds, found.reason) == (False, True, caught.value.what)


@pytest.mark.parametrize("device", ["cuda:x", "cpu", "gpu"])
def test_device_names(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_runtime", lambda: FakeRuntime(13040, (0, 1)))
    with pytest.raises(OptionError, match=f"device '{device}'"):
        cuda.find_gpu(device)


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_runtime", lambda: FakeRuntime(13040, (0, 2)))
    with pytest.raises(OptionError, match="device cuda:2: there are 2 GPUs\n  fix: expected cuda:0 to cuda:1"):
        cuda.find_gpu("cuda:2")


def test_every_call_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_runtime", lambda: FakeRuntime(13040, (0, 1)))
    from sparse_engine.backends.step_device import OutOfDeviceMemoryError

    with pytest.raises(OutOfDeviceMemoryError, match=r"out of memory: cudaMalloc failed: out of memory \(error 2\)"):
        cuda.Cuda(0).allocate(1 << 40)
    with pytest.raises(BackendError, match="cudaSetDevice failed: an illegal memory access"):
        cuda.Cuda(0).use()
