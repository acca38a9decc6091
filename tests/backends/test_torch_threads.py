"""PyTorch's number of threads is the host program's: an engine works with its own, and puts the other back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.backends.torch import threads as pool
from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.backends.torch.threads import torch_threads

FAST: dict[str, Any] = {"steps": 2, "sampler": "ddim", "labels": 0}
HOST = 3  # of the host program: more than the machine may have, which is its own affair


@pytest.fixture(autouse=True)
def hosts_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool, "pool_size", lambda threads: threads)  # whatever cores this machine has
    before = torch.get_num_threads()
    torch.set_num_threads(HOST)
    yield
    torch.set_num_threads(before)


def test_the_hosts_number_is_there_after_every_call(torch_engine: Path) -> None:
    seen: list[int] = []
    with SparseEngine.load(torch_engine, threads=2, device="cpu") as engine:
        assert torch.get_num_threads() == HOST
        assert engine.info["runtime"]["threads"] == 2
        engine.sample(2, callback=lambda *_: seen.append(torch.get_num_threads()), **FAST)
        engine.predict(np.ones((1, 3, 8, 8), np.float32), 0.5)
        assert seen == [HOST, HOST]
        assert torch.get_num_threads() == HOST


def test_the_engine_works_with_its_own(torch_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    step = TorchDevice.step

    def watched(device: Any, buffers: Any) -> None:
        seen.append(torch.get_num_threads())
        step(device, buffers)

    monkeypatch.setattr(TorchDevice, "step", watched)
    for threads, used in ((2, 2), (None, HOST)):
        with SparseEngine.load(torch_engine, threads=threads, device="cpu") as engine:
            engine.sample(1, **FAST)
        assert set(seen) == {used}
        seen.clear()


def test_a_failure_puts_it_back(torch_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with SparseEngine.load(torch_engine, threads=2, device="cpu") as engine:
        monkeypatch.setattr(TorchDevice, "step", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.sample(1, **FAST)
    assert torch.get_num_threads() == HOST


def test_engines_at_work_at_the_same_time() -> None:
    """The last to finish puts the host's number back, whatever the order, for threads that are new too."""
    inside, leave = threading.Event(), threading.Event()
    found: list[int] = []

    def other() -> None:
        with torch_threads(1):
            inside.set()
            leave.wait(10)
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    with torch_threads(2):
        thread.start()
        inside.wait(10)
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == HOST
    leave.set()
    thread.join()
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [1, HOST]
