"""Loads and samples by eight threads, of mixed sizes, cancelled and closed at random: what a process holds stays flat.

    python tests/soak/soak.py model.sengine --rounds 10000

A round is one load, one to three samples and a close. Exit 1 where something grew.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_engine import SparseEngine
from sparse_engine.errors import EngineClosedError, SamplingCancelled

THREADS = 8
WARM = 0.25  # of the rounds, before what is held is first counted: allocators fill their pools
MOST_GROWTH = 12 << 20  # bytes, however many rounds: a list of closed engines held 18 MB after 640


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls, process: int | str = "self") -> Held:
        """Of a process, resting."""
        gc.collect()
        place = Path("/proc") / str(process)
        pages = int((place / "statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(place / "fd")), len(os.listdir(place / "task")))


def one_round(path: Path, seed: int, expected: np.ndarray) -> str:
    """One load and what a hurried caller does with it. Returns how it ended."""
    rng = random.Random(seed)
    engine = SparseEngine.load(path, threads=1, autotune=False)
    closer = threading.Timer(rng.uniform(0, 0.02), engine.close) if rng.random() < 0.2 else None
    if closer:
        closer.start()
    try:
        for _ in range(rng.randrange(1, 4)):
            size, stop = rng.choice((1, 2, 3, 5, 8)), rng.random() < 0.2
            drawn = engine.sample(
                size,
                steps=2,
                labels=1,
                batch_size=rng.choice((1, 2, 8)),
                output="float",
                callback=(lambda *_: False) if stop else None,
            )
            exact = engine.manifest.backend["name"] == "onnxruntime"  # PyTorch chooses products by the batch
            np.testing.assert_allclose(drawn, expected[:size], rtol=0, atol=0 if exact else 2e-5 * abs(expected).max())
        return "drawn"
    except SamplingCancelled:
        return "cancelled"
    except EngineClosedError:
        return "closed"
    finally:
        if closer:
            closer.join()
        engine.close()


def soak(path: Path, rounds: int, seconds: float = float("inf")) -> tuple[Counter[str], Held, Held]:
    """Rounds until there are enough or the time is over. Returns how they ended, and what was held early and late."""
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        expected = engine.sample(8, steps=2, labels=1, output="float")
    ended: Counter[str] = Counter()
    started, early, chunk = time.monotonic(), None, 10 * THREADS
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, rounds, chunk):
            ended.update(
                pool.map(lambda seed: one_round(path, seed, expected), range(first, min(first + chunk, rounds)))
            )
            spent = time.monotonic() - started
            if early is None and (first + chunk >= WARM * rounds or spent > WARM * seconds):
                early = Held.now()
            if spent > seconds:
                break
        return ended, early or Held.now(), Held.now()


def grown(early: Held, late: Held) -> list[str]:
    """What is not flat."""
    found = [f"{late.memory - early.memory} bytes"] if late.memory - early.memory > MOST_GROWTH else []
    found += [f"descriptors {early.descriptors} -> {late.descriptors}"] if late.descriptors > early.descriptors else []
    return found + ([f"threads {early.threads} -> {late.threads}"] if late.threads > early.threads else [])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop after so many.")
    given = parser.parse_args()
    started = time.monotonic()
    ended, early, late = soak(given.engine, given.rounds, given.seconds)
    print(f"{ended.total()} rounds in {time.monotonic() - started:.0f} s: {dict(ended)}\nearly {early}\nlate  {late}")
    found = grown(early, late)
    print("grew: " + ", ".join(found) if found else "flat")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
