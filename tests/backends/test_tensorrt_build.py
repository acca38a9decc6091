"""Plans built by the libraries themselves: TensorRT for RTX anywhere, TensorRT where there is a GPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named, usable_backend
from sparse_engine.backends.tensorrt import builder
from sparse_engine.backends.tensorrt.builder import Messages, build_plan, make_logger
from sparse_engine.backends.tensorrt.cache import PlanCache, TimingCache
from sparse_engine.backends.tensorrt.graph import with_linear_form
from sparse_engine.backends.tensorrt.libraries import RTX, TENSORRT, Library
from sparse_engine.backends.tensorrt.plans import candidates
from sparse_engine.bench.presets import network_named, random_uvit
from sparse_engine.calibration.quantize import observed_tensors, quantize, scheme_for
from sparse_engine.cli.main import run
from sparse_engine.errors import BackendError, OptionError, UnsupportedError
from sparse_engine.export.bake import bake
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.graphs import export_baked
from sparse_engine.export.write import write_built

pytestmark = pytest.mark.skipif(not RTX.availability().version, reason="tensorrt_rtx is not installed")


def buildable() -> list[Library]:
    found = [(library, library.availability()) for library in (RTX, TENSORRT)]
    return [library for library, here in found if here.usable or here.builds]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tensorrt"


Make = Callable[..., Path]


@pytest.fixture
def make(small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path) -> Make:
    """Build the small model with a library."""

    def build(
        library: Library, precision: str = "fp16", *, sparse: bool = True, batch: tuple = (1, 4, 8), **tensorrt: Any
    ) -> Path:
        backend = backend_named(library.name)
        options = BuildOptions(sparse, precision, batch, tensorrt=TensorRTOptions(**tensorrt))
        backend.check(options)
        path = tmp_path / f"{library.name}.sengine"
        write_built(path, *small_model, step_graph(backend.graph_precision(options)), backend, options)
        return path

    return build


def accepted(library: Library, plan: bytes) -> bool:
    """Whether the runtime's own check takes a plan for whole and of its version.

    Without a GPU the verdict is never "valid"; what is wrong with the plan itself is a bit of the diagnostics.
    """
    trt = library.load()
    runtime = trt.Runtime(make_logger(trt, Messages()))
    if not hasattr(runtime, "get_engine_validity"):
        return runtime.deserialize_cuda_engine(plan) is not None
    flaws = trt.EngineInvalidityDiagnostics
    _, found = runtime.get_engine_validity(plan)
    return not found & (int(flaws.MALFORMED_ENGINE) | int(flaws.VERSION_MISMATCH) | int(flaws.UNSUPPORTED_CC))


@pytest.mark.parametrize("library", buildable(), ids=lambda library: library.name)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_a_plan_in_each_precision(library: Library, precision: str, make: Make) -> None:
    path = make(library, precision)
    file = EngineFile(path)
    with zipfile.ZipFile(path) as archive:
        plan = archive.read("step.plan")
    assert accepted(library, plan)
    assert not accepted(library, b"\0" * 64 + plan[64:]) or library is TENSORRT
    manifest = file.manifest
    assert manifest.backend["name"] == library.name
    assert manifest.backend["version"] == library.availability().version
    assert manifest.backend["attention"] == ("plain" if precision in ("fp32", "tf32") else "Attention")
    masked = [layer for layer in manifest.layers if layer["masked"]]
    assert len(masked) == 12
    assert all(layer["eligible"] for layer in masked)
    if library is RTX:
        assert {layer["chosen"] for layer in manifest.layers} == {False}
        assert {layer["why"] for layer in masked} == {
            "TensorRT for RTX has no sparse kernels: the flag is taken and not used"
        }


@pytest.mark.parametrize("library", buildable(), ids=lambda library: library.name)
@pytest.mark.parametrize("linear", ["matmul", "gemm", "conv1x1"])
def test_a_plan_of_each_form(library: Library, linear: str, make: Make) -> None:
    file = EngineFile(make(library, linear=linear))
    assert file.manifest.backend["linear"] == linear
    assert accepted(library, file.read("step.plan"))


@pytest.mark.parametrize("linear", ["matmul", "gemm", "conv1x1"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantised_plan_of_each_form(
    precision: str, linear: str, small_model: tuple, step_graph: Callable[[str], StepGraph]
) -> None:
    names = [layer.name for layer in small_model[1].sparse_layers]
    scheme = scheme_for("tensorrt-rtx", precision)
    ranges = dict.fromkeys(observed_tensors(step_graph("fp16"), names, names, scheme), (-4.0, 4.0))
    graph = with_linear_form(quantize(step_graph("fp16"), ranges, names, names, scheme), linear)
    options = BuildOptions(True, precision, (1, 2, 4))
    plan = build_plan(RTX, graph, options, sparse=True, timings=None, messages=Messages())
    assert accepted(RTX, bytes(plan))


@pytest.mark.parametrize("heads,attention", [(1, "plain"), (2, "Attention")])
def test_attention_is_one_node_up_to_the_largest_head_of_fused_kernels(
    heads: int, attention: str, tmp_path: Path
) -> None:
    model = random_uvit(UViTConfig(8, 2, 3, 320, 2, heads)).model()
    baked = bake(model)
    path, options = tmp_path / "x.sengine", BuildOptions(True, "fp16", (1, 2, 4))
    write_built(path, model, baked, export_baked(model, baked, "fp16"), backend_named("tensorrt-rtx"), options)
    assert EngineFile(path).manifest.backend["attention"] == attention


@pytest.mark.slow
def test_a_u_vit_s_for_four_gpus(tmp_path: Path) -> None:
    model = network_named("uvit-s").model()
    baked, backend = bake(model), backend_named("tensorrt-rtx")
    tensorrt = TensorRTOptions(compute_capabilities=("8.0", "sm86", "8.9", "SM120"))
    options = BuildOptions(True, "fp16", (1, 4, 16), tensorrt=tensorrt)
    write_built(tmp_path / "x.sengine", model, baked, export_baked(model, baked, "fp16"), backend, options)
    file = EngineFile(tmp_path / "x.sengine")
    assert file.manifest.backend["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert sum(layer["masked"] and layer["eligible"] for layer in file.manifest.layers) == 52
    assert 44e6 * 2 < file.span("step.plan")[1] < 44e6 * 2.3
    assert accepted(RTX, file.read("step.plan"))


def test_each_target_is_a_plan_of_its_own(make: Make) -> None:
    plans = set()
    for targets in (("8.0",), ("12.0",), ("8.0", "12.0")):
        file = EngineFile(make(RTX, compute_capabilities=targets))
        assert file.manifest.backend["compute_capabilities"] == list(targets)
        plans.add(file.manifest.files["step.plan"]["sha256"])
    assert len(plans) == 3


def test_static_batch_is_in_the_profile(make: Make) -> None:
    assert EngineFile(make(RTX, static_batch=True)).manifest.backend["profile"] == [4, 4, 4]
    assert EngineFile(make(RTX)).manifest.backend["profile"] == [1, 4, 8]


def test_plans_are_cached_by_everything_they_depend_on(
    make: Make, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(**changed: Any) -> tuple[int, str]:
        digest = EngineFile(make(RTX, **changed)).manifest.files["step.plan"]["sha256"]
        return len(list(own_cache.glob("*.plan"))), digest

    assert build()[0] == 1
    first = build(sparse=False)
    assert first[0] == 2  # a dense plan is never served for a sparse one, even where they are the same
    assert build(batch=(1, 2, 4))[0] == 3
    assert build(optimization_level=0)[0] == 4
    assert build(linear="gemm")[0] == 5
    assert build(precision="bf16")[0] == 6
    monkeypatch.setattr("sparse_engine.backends.tensorrt.plans.build_plan", lambda *_, **__: pytest.fail("built again"))
    assert build(sparse=False) == (6, first[1])


def test_a_damaged_cache_costs_time_only(make: Make, own_cache: Path) -> None:
    make(RTX)
    (plan,) = own_cache.glob("*.plan")
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    assert accepted(RTX, EngineFile(make(RTX)).read("step.plan"))
    assert len(plan.read_bytes()) > len(whole) - 1


def test_without_cache_nothing_is_written(make: Make, own_cache: Path) -> None:
    make(RTX, cache=False)
    assert not own_cache.exists()


def test_cached_plans_stay_under_a_limit(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_engine.backends.tensorrt.cache.PLAN_BYTES", 250)
    for number in range(4):
        PlanCache({"number": number}).store(bytes(100), {})
        for age, path in enumerate(sorted(own_cache.glob("*.plan"), key=os.path.getmtime)):
            os.utime(path, (age, age))
    kept = [number for number in range(4) if PlanCache({"number": number}).load()]
    assert kept == [2, 3]
    assert len(list(own_cache.iterdir())) == 4


def test_timings_of_two_builds_end_in_one_file(own_cache: Path) -> None:
    class Timings:
        def __init__(self, entries: bytes) -> None:
            self.entries = entries

        def combine(self, other: Timings, ignore: bool) -> None:
            self.entries += other.entries

        def serialize(self) -> bytes:
            return self.entries

    class Config:
        def create_timing_cache(self, data: bytes) -> Timings:
            return Timings(data)

        def set_timing_cache(self, cache: Timings, ignore: bool) -> None:
            self.cache = cache

        def get_timing_cache(self) -> Timings:
            return self.cache

    one, two = Config(), Config()
    cache = TimingCache({"gpu": "A40"})
    cache.attach(one)
    cache.attach(two)
    one.cache.entries, two.cache.entries = b"1", b"2"
    cache.store(one)
    cache.store(two)
    assert sorted(next(own_cache.glob("*.bin")).read_bytes()) == sorted(b"12")
    TimingCache({"gpu": "H100"}).attach(one)
    assert one.cache.entries == b""


def test_an_operator_that_the_parser_rejects_is_named(step_graph: Callable[[str], StepGraph]) -> None:
    graph = step_graph("fp16")
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    next(node for node in proto.graph.node if node.op_type == "Gelu").op_type = "Hardmax2"
    with pytest.raises(BackendError, match=r"does not take the step graph: Hardmax2 node_gelu: ") as caught:
        build(StepGraph(proto, graph.weights, graph.layers))
    assert "\n" not in caught.value.what


def build(graph: StepGraph, progress: Callable[[str], None] = lambda stage: None) -> memoryview:
    options = BuildOptions(True, "fp16", (1, 2, 4), progress=progress)
    return build_plan(RTX, graph, options, sparse=True, timings=None, messages=Messages())


def test_progress_is_told_and_ctrl_c_cancels(step_graph: Callable[[str], StepGraph]) -> None:
    stages: list[str] = []
    build(step_graph("fp16"), stages.append)
    assert any(stage.startswith("Building engine") and "/" in stage for stage in stages)

    def interrupt(stage: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(step_graph("fp16"), interrupt)
    assert signal.getsignal(signal.SIGINT) is before

    def fail(stage: str) -> None:
        raise RuntimeError("the display is gone")

    with pytest.raises(RuntimeError, match="the display is gone"):
        build(step_graph("fp16"), fail)


def test_builds_in_a_thread(step_graph: Callable[[str], StepGraph]) -> None:
    plans: list[memoryview] = []
    thread = threading.Thread(target=lambda: plans.append(build(step_graph("fp16"))))
    thread.start()
    thread.join()
    assert len(plans[0]) > 10_000


@pytest.mark.parametrize(
    "said,kind,message",
    [
        (
            "Requested amount of GPU memory (1 bytes) could not be allocated. Error: out of memory",
            UnsupportedError,
            "ran out of GPU memory",
        ),
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            UnsupportedError,
            "needs a GPU for this build",
        ),
        (
            "Could not find any implementation for node\n fc1",
            BackendError,
            "could not build a plan: Could not find any implementation for node fc1",
        ),
        (None, BackendError, "no reason given"),
    ],
)
def test_why_a_build_failed(said: str | None, kind: type, message: str) -> None:
    messages = Messages()
    if said:
        messages.add("ERROR", said)
    error = builder._build_error(RTX, messages)
    assert type(error) is kind
    assert message in error.what
    assert error.fix


BAD = {
    "capability without sparse kernels": ({"compute_capabilities": ("7.5",)}, "builds for 8.0, 8.6", UnsupportedError),
    "capability of no RTX GPU": ({"compute_capabilities": ("9.0",)}, "--compute-capabilities 9.0:", UnsupportedError),
    "no capability": ({"compute_capabilities": ("fast",)}, "compute capability 'fast' is none", OptionError),
    "linear": ({"linear": "einsum"}, "--linear 'einsum' is not known; expected one of auto, matmul", OptionError),
    "level": ({"optimization_level": 9}, "optimization_level = 9; expected 0 to 5", OptionError),
    "workspace": ({"workspace": 10}, "--workspace of 10 bytes", OptionError),
    "version": ({"version_compatible": True}, "--version-compatible is not for tensorrt-rtx", UnsupportedError),
    "hardware": ({"hardware_compatible": True}, "--hardware-compatible is not for tensorrt-rtx", UnsupportedError),
}


@pytest.mark.parametrize("case", BAD)
def test_options_are_checked_before_the_work(case: str) -> None:
    options, message, kind = BAD[case]
    with pytest.raises(kind, match=message):
        backend_named("tensorrt-rtx").check(BuildOptions(True, tensorrt=TensorRTOptions(**options)))


def test_precisions_are_checked_before_the_work() -> None:
    with pytest.raises(UnsupportedError, match="precision 'fp4' is not supported by the tensorrt-rtx backend"):
        RTX.check(BuildOptions(True, "fp4"))
    with pytest.raises(UnsupportedError, match="precision fp8 with tensorrt-rtx needs compute capability 8.9"):
        RTX.check(BuildOptions(True, "fp8", tensorrt=TensorRTOptions(compute_capabilities=("8.6",))))
    with pytest.raises(UnsupportedError, match="--require-sparse: tensorrt-rtx has no sparse kernels"):
        RTX.check(BuildOptions(True, "fp16", require_sparse=True))


def test_what_is_built_and_timed() -> None:
    gpu: Any = object()
    auto, gemm = BuildOptions(True, "fp16"), BuildOptions(True, "fp16", tensorrt=TensorRTOptions(linear="gemm"))
    names = [each.name for each in candidates(TENSORRT, auto, True, gpu)]
    assert names == ["sparse matmul", "sparse gemm", "sparse conv1x1", "dense matmul"]
    assert [each.name for each in candidates(TENSORRT, gemm, True, gpu)] == ["sparse gemm", "dense matmul"]
    assert [each.name for each in candidates(TENSORRT, gemm, False, gpu)] == ["dense gemm"]
    assert [each.name for each in candidates(RTX, auto, True, None)] == ["sparse matmul"]


@pytest.mark.skipif(RTX.availability().usable, reason="here RTX runs")
def test_auto_takes_what_runs_here_and_a_name_what_builds_here() -> None:
    assert usable_backend("auto", to_build=True).name != "tensorrt-rtx"
    assert usable_backend("tensorrt-rtx", to_build=True).name == "tensorrt-rtx"
    with pytest.raises(UnsupportedError, match="no backend can run here: tensorrt-rtx: there is no NVIDIA driver"):
        usable_backend("tensorrt-rtx")


def test_the_command_line(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.sengine"
    command = ["build", str(tiny_checkpoint), "--heads", "4", "--sparse", "--backend", "tensorrt-rtx", "-o", str(path)]
    assert run([*command, "--precision", "fp16", "--compute-capabilities", "8.6,sm89", "--workspace", "0.5"]) == 0
    assert "12 of them hardware 2:4, 0 run by a sparse kernel as the builder reports" in capsys.readouterr().out
    assert EngineFile(path).manifest.backend["flags"]["workspace"] == 1 << 29
    if not RTX.availability().usable:
        assert run(["inspect", str(path), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert any(note.startswith("cannot run here: ") for note in report["notes"])
        assert run(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert "plan for compute capability 8.6, 8.9, batch 1/16/64, Linears as matmul, attention Attention" in said
        assert "no sparse kernel in 12 masked layers: TensorRT for RTX has no sparse kernels" in said
        assert run(["sample", str(path)]) == 2
        assert "needs the tensorrt-rtx backend: there is no NVIDIA driver" in capsys.readouterr().err
    path.unlink()
    assert run([*command, "--compute-capabilities", "9.0"]) == 2
    assert capsys.readouterr().err.startswith("error: --compute-capabilities 9.0: tensorrt-rtx")
    assert not path.exists()
