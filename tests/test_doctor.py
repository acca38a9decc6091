"""What ``doctor`` finds on machines that are not this one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_engine import doctor
from sparse_engine.backends import Availability
from sparse_engine.cli.main import run


class Driver:
    """``libcuda.so.1`` of a machine with an A40."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:
        name.value = b"NVIDIA A40"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = {75: 8, 76: 6}[attribute]
        return 0


def test_a_gpu_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    finding = doctor._gpu()
    assert finding.ok
    assert finding.found == "NVIDIA A40 (compute capability 8.6); driver for CUDA 12.4"


def test_a_backend_that_only_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Availability(False, "1.7", "there is no NVIDIA driver", "install it", builds=True)
    monkeypatch.setattr(doctor, "backend_named", lambda name: SimpleNamespace(availability=lambda: found))
    finding = doctor._backend("tensorrt-rtx")
    assert not finding.ok
    assert finding.found == "1.7 builds engines, but cannot run them here: there is no NVIDIA driver"


def test_a_backend_whose_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Availability:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "backend_named", lambda name: SimpleNamespace(availability=broken))
    finding = doctor._backend("torch")
    assert not finding.ok
    assert "libcudart.so.12" in finding.found


def fake_torch(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, tuple[int, int]], cusparselt: bool = True) -> None:
    """A torch for CUDA that sees these GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = doctor._torch_on_gpu()
    assert not finding.ok
    assert "is built without CUDA and cuSPARSELt" in finding.found
    assert "pip install 'torch>=2.7'" in (finding.fix or "")
    assert finding in doctor.diagnose()


def test_a_torch_on_the_cpu_alone_is_said_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Availability(True, "2.9", automatic=False)
    monkeypatch.setattr(doctor, "backend_named", lambda name: SimpleNamespace(availability=lambda: found))
    assert doctor._backend("torch").found == "usable, 2.9, on the CPU alone, where onnxruntime is faster"


@pytest.mark.parametrize(
    "gpus,cusparselt,good,said",
    [
        ([("A40", (8, 6))], True, [True, True, True], "A40"),
        ([("T4", (7, 5)), ("H100", (9, 0))], True, [True, True, True], "H100"),
        ([("T4", (7, 5))], True, [True, True, False], "T4 has 7.5; 2:4 needs compute capability 8.0"),
        ([], False, [True, False, False], "torch sees no GPU"),
    ],
)
def test_what_torch_needs_for_sparse_layers(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Any], cusparselt: bool, good: list[bool], said: str
) -> None:
    fake_torch(monkeypatch, *gpus, cusparselt=cusparselt)
    findings = doctor._torch_on_gpu()
    assert [finding.name for finding in findings] == ["torch: CUDA", "torch: cuSPARSELt", "torch: 2:4 on a GPU"]
    assert [finding.ok for finding in findings] == good
    assert findings[-1].found == said
    assert all(finding.fix for finding in findings if not finding.ok)


def test_no_torch_no_findings_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor._torch_on_gpu() == []


def test_extras_are_printed_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    finding = doctor.Finding("tensorrt", False, "not installed", "pip install 'sparse-engine[tensorrt]'")
    monkeypatch.setattr("sparse_engine.cli.doctor.diagnose", lambda: [finding])
    assert run(["doctor"]) == 0
    assert "'sparse-engine[tensorrt]'" in capsys.readouterr().out
