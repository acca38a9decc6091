"""An int8 engine whose step is faster in floats: which is found out, and what it computes then."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, kernels
from sparse_engine.backends.onnxruntime import step
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.cli.main import run
from sparse_engine.tactics import Choice, timing_afresh

TIERS = kernels.available_tiers() if kernels.is_available() else ()
needs_halves = pytest.mark.skipif("avx512-bf16" not in TIERS, reason="this machine lacks AVX512-BF16")
needs_avx2 = pytest.mark.skipif("avx2" not in TIERS, reason="this machine lacks AVX2")
INNER, SPARSE = 13, 12  # layers in 8 bits: all but one are 2:4


@pytest.fixture
def no_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has AVX512-BF16 and neither AVX512-VBMI nor AVX-VNNI (a Cooper Lake)."""
    best = kernels.best_tier
    monkeypatch.setattr(kernels, "best_tier", lambda compute="fp32": "scalar" if compute == "int8" else best(compute))


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Steps are "timed": the one named under "step" takes 1 ms, another "slower". "timed" says how often they were."""
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    told: dict[str, Any] = {"step": "int8", "slower": 2.0, "timed": 0}

    def fastest(candidates: Any) -> Choice:
        for each in candidates.values():
            each()
        kernel = "t-lanes" if "t-lanes" in candidates else next(iter(candidates))
        if "int8" in candidates:
            told["timed"] += 1
            kernel = told["step"]
        return Choice(kernel, {name: 1.0 if name == kernel else told["slower"] for name in candidates})

    monkeypatch.setattr("sparse_engine.tactics.fastest", fastest)
    return told


def predict(engine: SparseEngine, batch: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((batch, *engine.manifest.data_shape)).astype(np.float32)
    return engine.predict(x, 0.5, labels=np.zeros(batch, np.int64))


def expected(path: Path) -> np.ndarray:
    """What an engine computes in 8 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_floats", lambda engine: [])
        with SparseEngine.load(path, autotune=False) as engine:
            assert engine.info["runtime"]["step"]["precision"] == "int8"
            return predict(engine)


def kernels_of(engine: SparseEngine) -> Counter[str]:
    return Counter(layer["kernel"] for layer in engine.info["layers"])


@pytest.mark.parametrize(
    "isa, precision, left",
    [
        pytest.param("", "bf16", 0, marks=needs_halves),
        pytest.param("avx2", "fp32", INNER - SPARSE, marks=needs_avx2),  # a dense layer stays in 8 bits
    ],
)
def test_the_faster_step_is_kept_and_remembered(
    int8_engines: dict[str, Path],
    preferred: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    isa: str,
    precision: str,
    left: int,
) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, isa)
    codes = expected(int8_engines["2:4"])
    preferred["step"] = precision
    for _ in range(2):
        with SparseEngine.load(int8_engines["2:4"], threads=1) as engine:
            told = engine.info["runtime"]["step"]
            assert (told["precision"], told["why"]) == (precision, "faster at the usual batch")
            assert told["milliseconds"] == {"int8": 2.0, precision: 1.0}
            assert preferred["timed"] == 2  # with kernels by the rule and with timed ones; not by the second load
            ran = kernels_of(engine)
            assert ran["r-lanes" if precision == "bf16" else "t-lanes"] == SPARSE
            assert sum(count for name, count in ran.items() if "int8" in name) == left
            assert sum(bool(layer["chosen"]) for layer in engine.info["layers"]) == SPARSE
            assert relative_error(predict(engine), codes) < 0.02
    preferred["step"] = "int8"
    for slower, timed in ((1.6, 3), (1.4, 5)):  # where int8 is far ahead, kernels of the others need not be timed
        preferred["slower"] = slower
        with timing_afresh(), SparseEngine.load(int8_engines["2:4"], threads=1) as engine:
            assert preferred["timed"] == timed
            assert engine.info["runtime"]["step"]["precision"] == "int8"
            np.testing.assert_array_equal(predict(engine), codes)


@needs_halves
@pytest.mark.parametrize("name, sparse", [("2:4", SPARSE), ("dense", 0)])
def test_without_kernels_in_8_bits_it_runs_in_bf16(
    int8_engines: dict[str, Path], no_int8_kernels: None, name: str, sparse: int
) -> None:
    with SparseEngine.load(int8_engines[name], autotune=False) as engine:
        assert engine.info["runtime"]["step"] == {"precision": "bf16", "why": "not timed: ours by default"}
        ran, found = kernels_of(engine), predict(engine)
        np.testing.assert_array_equal(predict(engine, 2), found[:2])
    assert (ran["r-lanes"], ran["dense-bf16"]) == (sparse, INNER - sparse)
    assert relative_error(found, expected(int8_engines[name])) < 0.02


def test_what_is_timed_is_what_is_chosen(
    int8_engines: dict[str, Path],
    no_int8_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    codes = expected(int8_engines["2:4"])
    with SparseEngine.load(int8_engines["2:4"], threads=1) as engine:
        told = engine.info["runtime"]["step"]
        assert relative_error(predict(engine), codes) < 0.02
        ran = kernels_of(engine)
    times = told.get("milliseconds", {"int8": 1.0})
    assert told["precision"] == min(times, key=times.__getitem__)
    assert len(times) == (2 if {"avx2", "neon"} & set(TIERS) else 1)
    assert (ran["dense int8"] == INNER) == (told["precision"] == "int8")
    assert run(["inspect", str(int8_engines["2:4"])]) == 0
    assert "a step runs in " in " ".join(capsys.readouterr().out.split())


@needs_avx2
def test_a_dense_engine_has_nothing_to_choose_in_fp32(
    int8_engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(kernels.ISA_VARIABLE, "avx2")
    with SparseEngine.load(int8_engines["dense"]) as engine:
        why = "no kernel of ours computes its layers in floats"
        assert engine.info["runtime"]["step"] == {"precision": "int8", "why": why}


@needs_halves
def test_results_in_floats_are_nearer_to_those_of_the_network(
    int8_engines: dict[str, Path], conditional_engine: Path, no_int8_kernels: None
) -> None:
    codes = expected(int8_engines["2:4"])
    with SparseEngine.load(conditional_engine) as engine:
        network = predict(engine)
    with SparseEngine.load(int8_engines["2:4"], autotune=False) as engine:
        found = predict(engine)
    assert relative_error(found, network) < relative_error(codes, network)
