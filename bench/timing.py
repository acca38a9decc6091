"""Timing candidates against one another in one process: A B A B, after a warm-up that is reported apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_ROUNDS, MAX_ROUNDS = 3, 100
TIMED_PER_TURN = 2
SETTLING = 0.01  # seconds: runtimes' threads spin about this long after their last call, and would take a core


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate.

    Attributes:
        warmup: of the first call.
        runs: [repeats, timed calls]; entry [i, j] of all candidates was measured in one round, side by side.
    """

    warmup: dict[str, float]
    runs: dict[str, np.ndarray]


def interleave(candidates: Mapping[str, Callable[[], object]], *, repeats: int = 3, seconds: float = 2.0) -> Timings:
    """Let every candidate have its turn in each round, rounds for about ``seconds`` per repeat.

    A turn is untimed calls until the threads of the candidate before have stopped spinning and caches are full, and
    then two timed ones. Each candidate returns when its work is done. The order of a round alternates, so that none
    always follows the same one.
    """
    warmup = {name: _seconds(run) for name, run in candidates.items()}
    second = {name: _seconds(run) for name, run in candidates.items()}
    turn = sum(max(SETTLING, once) + TIMED_PER_TURN * once for once in second.values())
    rounds = int(np.clip(seconds / max(turn, 1e-9), MIN_ROUNDS, MAX_ROUNDS))
    runs = {name: np.empty((repeats, rounds, TIMED_PER_TURN)) for name in candidates}
    order = list(candidates)
    for repeat in range(repeats):
        for index in range(rounds):
            for name in order if index % 2 == 0 else reversed(order):
                _settle(candidates[name])
                runs[name][repeat, index] = [_seconds(candidates[name]) for _ in range(TIMED_PER_TURN)]
    return Timings(warmup, {name: seconds.reshape(repeats, -1) for name, seconds in runs.items()})


def _settle(run: Callable[[], object]) -> None:
    end = time.perf_counter() + SETTLING
    run()
    while time.perf_counter() < end:
        run()


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
