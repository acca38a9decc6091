"""Timing candidates against one another in one process: A B A B, after a warm-up that is reported apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate.

    Attributes:
        warmup: of the first call.
        runs: [repeats, rounds]; entry [i, j] of all candidates was measured in one round, side by side.
    """

    warmup: dict[str, float]
    runs: dict[str, np.ndarray]


def interleave(candidates: Mapping[str, Callable[[], object]], *, repeats: int = 3, seconds: float = 2.0) -> Timings:
    """Run every candidate once a round, rounds for about ``seconds`` per repeat.

    Each candidate returns when its work is done. The order within a round alternates, so that none always follows the
    same one.
    """
    warmup = {name: _seconds(run) for name, run in candidates.items()}
    second = {name: _seconds(run) for name, run in candidates.items()}
    rounds = int(np.clip(seconds / max(sum(second.values()), 1e-9), MIN_ROUNDS, MAX_ROUNDS))
    runs = {name: np.empty((repeats, rounds)) for name in candidates}
    order = list(candidates)
    for repeat in range(repeats):
        for index in range(rounds):
            for name in order if index % 2 == 0 else reversed(order):
                runs[name][repeat, index] = _seconds(candidates[name])
    return Timings(warmup, runs)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
