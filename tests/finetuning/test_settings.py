"""What a fine-tuning is told, checked before anything is read."""

from typing import Any

import pytest

from sparse_engine.errors import OptionError
from sparse_engine.pruning.settings import Reporting, Settings
from sparse_engine.pruning.trainer import rate_at


def test_defaults_are_the_papers() -> None:
    settings = Settings()
    assert (settings.teacher_weight, settings.mask_decay, settings.warmup) == (0.1, 2e-4, 1000)
    assert Settings(steps=500_000).warmup == 2500
    assert (settings.lr, settings.weight_decay, settings.betas, settings.ema) == (2e-4, 0.03, (0.99, 0.999), 0.9999)
    assert (Settings(method="ste").teacher_weight, Settings(method="ste").mask_decay) == (0, 0)
    assert Settings(method="ste", teacher_weight=0.5).taught


def test_the_learning_rate() -> None:
    constant = Settings(steps=100, warmup=10)
    assert [rate_at(constant, step) for step in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = Settings(steps=100, warmup=0, lr_decay="cosine")
    assert rate_at(cosine, 0) == 1
    assert rate_at(cosine, 50) == pytest.approx(0.5)
    assert 0 < rate_at(cosine, 99) < 1e-3


def test_stages_end_in_the_pattern_that_is_asked_for() -> None:
    settings = Settings(method="progressive", steps=500_000)
    found = [str(settings.pattern_at(step)) for step in (0, 100_000, 200_000, 300_000, 399_999, 400_000, 500_000)]
    assert found == ["31:32", "15:16", "7:8", "3:4", "3:4", "2:4", "2:4"]
    assert not settings.endless


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "magic"}, "--method = 'magic'; expected one of sparsedm, ste, asp, progressive, dense"),
    ({"precision": "int8"}, "--precision = 'int8'; expected one of fp32, bf16, fp16"),
    ({"lr_decay": "step"}, "--lr-decay = 'step'"),
    ({"steps": 0}, "--steps = 0; expected a whole number from 1"),
    ({"batch": -4}, "--batch = -4"),
    ({"accumulate": 0}, "--accumulate = 0"),
    ({"seed": -1}, "seed = -1"),
    ({"lr": 0.0}, "--lr = 0"),
    ({"lr": float("nan")}, "--lr = nan"),
    ({"warmup": -1}, "--warmup = -1"),
    ({"ema": 1.0}, "--ema 1: expected 0 or more, and less than 1"),
    ({"betas": (0.9, 1.5)}, "--betas 1.5"),
    ({"mask_decay": -1.0}, "--mask-decay -1: expected 0 or more"),
    ({"noise_weight": 0.0, "teacher_weight": 0.0}, "both 0: nothing is learnt"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=[next(iter(given)) for given, _ in WRONG])
def test_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        Settings(**given)
    assert message in str(raised.value)


def test_reporting() -> None:
    with pytest.raises(OptionError, match="--log-every = 0"):
        Reporting(log_every=0)
    with pytest.raises(OptionError, match="--keep = 0"):
        Reporting(keep=0)
