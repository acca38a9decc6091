"""What ``doctor`` finds on machines that are not this one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

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


def test_extras_are_printed_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    finding = doctor.Finding("tensorrt", False, "not installed", "pip install 'sparse-engine[tensorrt]'")
    monkeypatch.setattr("sparse_engine.cli.doctor.diagnose", lambda: [finding])
    assert run(["doctor"]) == 0
    assert "'sparse-engine[tensorrt]'" in capsys.readouterr().out
