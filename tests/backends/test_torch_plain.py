"""What the calling program has set in PyTorch does not reach what we compute, and is there again afterwards."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.torch import plain
from sparse_engine.errors import BackendError
from sparse_engine.export.verify import Reference, verify_engine
from tests.conftest import build_with


def products() -> list[str]:
    return [place.fp32_precision for place in plain._precisions()]


OPTIONS: dict[str, Any] = {"steps": 2, "seed": 1, "output": "float"}


@contextlib.contextmanager
def default_type() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def rough_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        found = products()
        yield
        assert products() == found
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default type": default_type,
    "a default device": lambda: torch.device("meta"),
    "rough products": rough_products,
    "inference mode": torch.inference_mode,
}


@pytest.fixture(scope="module")
def engine_file(tiny_checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(tiny_checkpoint, sparse=True, backend="torch")


@pytest.fixture(scope="module")
def expected(engine_file: Path) -> np.ndarray:
    with SparseEngine.load(engine_file, device="cpu") as engine:
        return engine.sample(2, **OPTIONS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_engine_draws_the_same(engine_file: Path, expected: np.ndarray, setting: str) -> None:
    with SETTINGS[setting](), SparseEngine.load(engine_file, device="cpu") as engine:
        found = engine.sample(2, **OPTIONS)
    np.testing.assert_array_equal(found, expected)


def test_the_same_graph_is_built(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        for name in ("autocast", "a default type", "a default device", "rough products"):
            stack.enter_context(SETTINGS[name]())
        _, manifest = build_with(tiny_checkpoint, tmp_path / "m.sengine", sparse=True, heads=4)
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_autocast_enabled("cpu")
    assert manifest.graph_sha256 == EngineFile(tiny_engine).manifest.graph_sha256
    torch.testing.assert_close(torch.get_rng_state(), state)


def test_an_engine_is_verified_against_float32(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    def prediction() -> np.ndarray:
        reference = Reference(EngineFile(tiny_engine).manifest, tiny_checkpoint)
        return reference(np.ones((2, 3, 8, 8), np.float32), np.full(2, 500, np.float32))

    expected = prediction()
    with SETTINGS["autocast"]():
        assert not np.array_equal(prediction(), expected)  # else this test says nothing
        verify_engine(tiny_engine, tiny_checkpoint).check()


def test_settings_are_put_back_when_the_last_leaves() -> None:
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with plain.plain_torch():
            entered.set()
            leave.wait(10)

    with rough_products():
        thread = threading.Thread(target=inside)
        thread.start()
        entered.wait(10)
        with plain.plain_torch():
            assert set(products()) == {"ieee"}
        assert set(products()) == {"ieee"}  # the other one is still computing
        leave.set()
        thread.join()
        assert "ieee" not in products()


def test_a_network_that_cannot_be_traced_is_an_error_of_ours(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **__: object) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(BackendError, match=r"torch .* cannot export the network: no such$"):
        build_with(tiny_checkpoint, tmp_path / "m.sengine", heads=4)
    assert not list(tmp_path.iterdir())
