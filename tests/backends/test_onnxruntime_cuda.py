"""ONNX Runtime on a GPU: the session over our buffers, run on the CPU provider and a GPU out of host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, StepGraph, backend_named
from sparse_engine.backends.cuda.runtime import Gpu
from sparse_engine.backends.onnxruntime import cuda
from sparse_engine.cli.main import run
from sparse_engine.errors import BackendError, OptionError, UnsupportedError
from sparse_engine.export.write import write_built
from tests.backends.fake_cuda import FakeCuda


@pytest.fixture
def engine_file(small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path) -> Path:
    backend, options = backend_named("onnxruntime"), BuildOptions(True, "fp32", (1, 4, 8), device="cuda")
    write_built(tmp_path / "gpu.sengine", *small_model, step_graph("fp32"), backend, options)
    return tmp_path / "gpu.sengine"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU whose memory is the host's, and whose provider is the CPU's."""
    made = FakeCuda(late=False)
    monkeypatch.setattr(cuda, "_check_provider", lambda: None)
    monkeypatch.setattr(cuda, "find_gpu", lambda device: Gpu(0, "fake", "8.6", 1 << 30, "12.4"))
    monkeypatch.setattr(cuda, "Cuda", lambda index: made)
    monkeypatch.setattr(cuda.SessionDevice, "memory", "cpu")
    monkeypatch.setattr(cuda.SessionDevice, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(cuda.SessionDevice, "_providers", lambda self, engine: ["CPUExecutionProvider"])
    return made


def test_draws_what_the_cpu_draws(
    engine_file: Path, gpu: FakeCuda, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path
) -> None:
    cpu_file = tmp_path / "cpu.sengine"
    write_built(cpu_file, *small_model, step_graph("fp32"), backend_named("onnxruntime"), BuildOptions(False))
    settings: dict[str, Any] = {"steps": 13, "sampler": "euler-sde", "labels": 2, "guidance": 2.0, "output": "float"}
    with SparseEngine.load(engine_file) as engine, SparseEngine.load(cpu_file) as reference:
        for batch in (1, 3):
            found = engine.sample(3, batch_size=batch, **settings)
            expected = reference.sample(3, **settings)
            assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
        info = engine.info
    assert info["runtime"]["device"] == "cuda:0 fake"
    assert info["runtime"]["steps"] == "one by one: ONNX Runtime's steps are not recorded"
    masked = [layer for layer in info["layers"] if layer["masked"]]
    assert {(layer["chosen"], layer["kernel"]) for layer in masked} == {(False, "dense")}
    assert masked[0]["why"] == "ONNX Runtime has no sparse kernels on a GPU"
    assert gpu.leaks() == {}


def test_an_engine_of_the_cpu_stays_there(
    gpu: FakeCuda, small_model: tuple, step_graph: Callable[[str], StepGraph], tmp_path: Path
) -> None:
    path = tmp_path / "cpu.sengine"
    write_built(path, *small_model, step_graph("fp32"), backend_named("onnxruntime"), BuildOptions(True))
    with pytest.raises(
        UnsupportedError, match="was built for the CPU, its weights packed .*\n.*build it with --device"
    ):
        SparseEngine.load(path, device="cuda")


def test_an_engine_of_the_gpu_stays_there(engine_file: Path, gpu: FakeCuda) -> None:
    with pytest.raises(UnsupportedError, match="device 'cpu': .* was built for onnxruntime on cuda"):
        SparseEngine.load(engine_file, device="cpu")
    with pytest.raises(OptionError, match="threads = 0"):
        SparseEngine.load(engine_file, threads=0)


def test_a_provider_that_does_not_start_is_no_silent_cpu(
    engine_file: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda.SessionDevice, "provider", cuda.PROVIDER)
    with pytest.raises(UnsupportedError, match="cannot start its CUDAExecutionProvider\n.*cuDNN"):
        SparseEngine.load(engine_file)
    assert gpu.leaks() == {}


def test_what_the_session_refuses_gives_everything_back(
    engine_file: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "fuse_attention", lambda model, *_, **__: model.graph.ClearField("node"))
    with pytest.raises(BackendError, match="ONNX Runtime .* refuses it"):
        SparseEngine.load(engine_file)
    assert gpu.leaks() == {}


def test_without_the_provider(engine_file: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    import onnxruntime

    if cuda.PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(UnsupportedError, match="has no CUDAExecutionProvider\n.*pip install 'sparse-engine"):
        SparseEngine.load(engine_file)
    command = ["build", str(tiny_checkpoint), "--heads", "4", "--backend", "onnxruntime", "--device", "cuda"]
    assert run([*command, "-o", str(tmp_path / "x.sengine")]) == 2
    assert "that is installed has no CUDAExecutionProvider" in capsys.readouterr().err
    assert not (tmp_path / "x.sengine").exists()


@pytest.mark.parametrize(
    "options,kind,message",
    [
        ({"precision": "bf16", "device": "cuda"}, UnsupportedError, "'bf16' is not supported by .* on a GPU"),
        ({"device": "cuda", "require_sparse": True}, UnsupportedError, "ONNX Runtime has no sparse kernels on a GPU"),
        ({"device": "tpu"}, OptionError, "device 'tpu': the onnxruntime backend runs on cpu and cuda"),
    ],
)
def test_options_are_checked_before_the_work(options: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        backend_named("onnxruntime").check(BuildOptions(True, **options))


def test_the_graph_is_exported_in_the_precision_of_the_build() -> None:
    backend = backend_named("onnxruntime")
    assert backend.graph_precision(BuildOptions(True, "fp16", device="cuda:0")) == "fp16"
    assert backend.graph_precision(BuildOptions(True, "bf16")) == "fp32"


def test_the_manifest_says_where_it_runs(engine_file: Path) -> None:
    assert EngineFile(engine_file).manifest.backend["device"] == "cuda"
