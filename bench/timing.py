"""Timing candidates against one another in one process: A B A B, after a warm-up that is reported apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sparse_engine.cores import QUIET_FOR, wait_for_quiet

MAX_ROUNDS = 100
TIMED_PER_TURN = 2
SETTLING = 0.01  # seconds of untimed calls before timed ones


@dataclass(frozen=True)
class Timings:
    """Seconds of each candidate.

    Attributes:
        warmup: of the first call.
        runs: [repeats, timed calls]; entry [i, j] of all candidates was measured in one round, side by side.
    """

    warmup: dict[str, float]
    runs: dict[str, np.ndarray]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 3,
    seconds: float = 2.0,
    renew: Callable[[], None] | None = None,
) -> Timings:
    """Let every candidate have its turn in each round, rounds for about ``seconds`` per repeat.

    A turn waits until the threads of the candidate before have stopped spinning, fills caches with untimed calls, and
    then times two. Each candidate returns when its work is done. The order alternates from round to round, so that
    none always follows the same one.

    Args:
        candidates: name -> one run of it.
        repeats, seconds: how often, and how long each time; at least one round.
        renew: called first, and between repeats. A benchmark that loads its engines afresh here measures what depends
            on where their memory happens to lie as the noise that it is; otherwise the first load decides.
    """
    if renew is not None:
        renew()
    warmup = {name: _seconds(run) for name, run in candidates.items()}
    # The first call says too much of a fast candidate; of a slow one it is near enough for a number of rounds.
    usual = {name: _seconds(run) if warmup[name] < seconds else warmup[name] for name, run in candidates.items()}
    turn = sum(QUIET_FOR + max(SETTLING, once) + TIMED_PER_TURN * once for once in usual.values())
    rounds = int(np.clip(seconds / max(turn, 1e-9), 1, MAX_ROUNDS))
    runs = {name: np.empty((repeats, rounds, TIMED_PER_TURN)) for name in candidates}
    order = list(candidates)
    for repeat in range(repeats):
        if renew is not None and repeat:
            renew()
        for index in range(rounds):
            for name in order if (repeat + index) % 2 == 0 else reversed(order):
                _settle(candidates[name])
                runs[name][repeat, index] = [_seconds(candidates[name]) for _ in range(TIMED_PER_TURN)]
    return Timings(warmup, {name: seconds.reshape(repeats, -1) for name, seconds in runs.items()})


def _settle(run: Callable[[], object]) -> None:
    wait_for_quiet()
    end = time.perf_counter() + SETTLING
    run()
    while time.perf_counter() < end:
        run()


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
