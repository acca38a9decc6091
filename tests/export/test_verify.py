"""``verify``: what it lets through and what it must not."""

from pathlib import Path

import numpy as np
import pytest

from sparse_engine.errors import VerificationError
from sparse_engine.export.verify import TimeError, Verification, verify_engine


def test_an_engine_agrees_with_its_checkpoint(conditional_engine: Path, conditional_checkpoint: Path) -> None:
    found = verify_engine(conditional_engine, conditional_checkpoint)
    assert found.passed
    assert found.same_checkpoint
    assert found.worst < 1e-5
    assert found.psnr > 80


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_never_passes(place: int) -> None:
    errors = [1e-6, 1e-6, 1e-6]
    errors[place] = float("nan")
    found = Verification([TimeError(0.5, value, value) for value in errors], 100.0, 1e-4, True)
    assert not found.passed
    with pytest.raises(VerificationError, match="relative error of eps is nan"):
        found.check()
    assert not Verification([TimeError(0.5, 0.0, 0.0)], float(np.nan), 1e-4, True).passed
