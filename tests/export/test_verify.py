"""``verify``: what it lets through and what it must not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.errors import VerificationError
from sparse_engine.export.verify import TOLERANCES, TimeError, Verification, verify_engine


def test_an_engine_agrees_with_its_checkpoint(conditional_engine: Path, conditional_checkpoint: Path) -> None:
    found = verify_engine(conditional_engine, conditional_checkpoint)
    assert found.passed
    assert found.same_checkpoint
    assert found.worst < 1e-5
    assert found.psnr > 80


@pytest.mark.parametrize("tolerance,allowed", [(None, TOLERANCES["bf16"]), (1e-9, 1e-9)])
def test_a_precision_has_a_tolerance_of_its_own(
    tolerance: float | None,
    allowed: float,
    conditional_engine: Path,
    conditional_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = SparseEngine.load

    def in_bf16(*arguments: Any, **options: Any) -> SparseEngine:
        engine = load(*arguments, **options)
        engine.manifest.precision = "bf16"
        return engine

    monkeypatch.setattr(SparseEngine, "load", in_bf16)
    found = verify_engine(conditional_engine, conditional_checkpoint, tolerance=tolerance)
    assert found.tolerance == allowed
    if tolerance is not None:
        with pytest.raises(VerificationError, match="expected at most 1e-09") as raised:
            found.check()
        assert "--tolerance" in str(raised.value.fix)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_never_passes(place: int) -> None:
    errors = [1e-6, 1e-6, 1e-6]
    errors[place] = float("nan")
    found = Verification([TimeError(0.5, value, value) for value in errors], 100.0, 1e-4, True)
    assert not found.passed
    with pytest.raises(VerificationError, match="relative error of eps is nan"):
        found.check()
    assert not Verification([TimeError(0.5, 0.0, 0.0)], float(np.nan), 1e-4, True).passed


def test_the_failure_that_is_told_is_the_one_that_failed() -> None:
    fine = [TimeError(0.5, 5e-7, 5e-7)]
    for psnr in (float("nan"), float("-inf")):  # NaN in the trajectory, or an infinite pixel
        found = Verification(fine, psnr, 1e-4, True)
        assert not found.passed
        with pytest.raises(VerificationError, match=r"10 steps ends in NaN.*eps itself is right to 5.00e-07"):
            found.check()
    assert Verification(fine, float("inf"), 1e-4, True).passed  # equal pictures
    with pytest.raises(VerificationError, match=r"relative error of eps is 1.00e\+00; expected at most 1e-04"):
        Verification([TimeError(0.5, 1.0, 1.0)], float("nan"), 1e-4, True).check()  # what is wrong first


def test_an_engine_whose_samples_diverge_is_told_so(
    conditional_engine: Path, conditional_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = SparseEngine.sample

    def diverging(*arguments: Any, **options: Any) -> Any:
        return sample(*arguments, **options) * np.float32(np.inf)

    monkeypatch.setattr(SparseEngine, "sample", diverging)
    with pytest.raises(VerificationError, match="a trajectory of 10 steps ends in NaN or infinity"):
        verify_engine(conditional_engine, conditional_checkpoint).check()


def test_an_engine_that_predicts_nan_is_told_so(
    conditional_engine: Path, conditional_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_engine.backends.onnxruntime.runner import OnnxRuntimeRunner

    monkeypatch.setattr(OnnxRuntimeRunner, "network", lambda self, x, t, **_: np.full_like(x, np.nan))
    with pytest.raises(VerificationError, match="relative error of eps is nan"):
        verify_engine(conditional_engine, conditional_checkpoint).check()
