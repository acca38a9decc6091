"""Bulk sampling, killed at random: each image is there exactly once in the end, none torn, and nothing is left behind.

    python tests/soak/bulk.py model.sengine --images 5000 --kills 20

A driver with local workers draws a job. At random moments a worker, the driver or all of them are ended by SIGKILL, a
third of the time while a chunk is being committed; a driver that was killed is started again. Exit 1 where something is
wrong with what is there at the end.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from sparse_engine import SparseEngine
from sparse_engine.bulk import finish

TARGETS = ("worker", "driver", "both")
LONGEST = 300.0  # seconds that any one thing may take


def command(engine: Path, out: Path, given: argparse.Namespace) -> list[str]:
    """The command that is killed."""
    options = ["--chunk", given.chunk, "--steps", given.steps, "--workers", given.workers, "--threads", 1]
    words = ["sample-many", engine, "-n", given.images, "-o", out, "--format", "none", *options]
    return [sys.executable, "-P", "-m", "sparse_engine", *map(str, words)]


def children(pid: int) -> list[int]:
    """Of a process, by Linux."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(pids: list[int]) -> None:
    """By SIGKILL; those that are there still."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_for_commit(chunks: Path, seconds: float) -> bool:
    """Until a chunk's temporary file is there."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if any(name.endswith(".tmp") for name in os.listdir(chunks)):
                return True
        except OSError:
            time.sleep(0.01)
    return False


def wait_for_orphans(workers: list[int]) -> list[int]:
    """Workers of a killed driver that are alive after ten seconds."""
    ends = time.monotonic() + 10
    alive = workers
    while alive and time.monotonic() < ends:
        alive = [pid for pid in alive if _is_alive(pid)]
        time.sleep(0.05)
    return alive


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def torment(engine: Path, out: Path, given: argparse.Namespace) -> tuple[Counter[str], list[str]]:
    """Kill until there were enough, then let it end. Returns what was killed, and what was wrong."""
    rng, killed, wrong = random.Random(given.seed), Counter[str](), []
    driver = subprocess.Popen(command(engine, out, given))
    while killed.total() < given.kills:
        time.sleep(rng.uniform(0.2, given.longest))
        target, committing = rng.choice(TARGETS), rng.random() < 1 / 3
        if committing:
            committing = wait_for_commit(out / "chunks", 5)
        if driver.poll() is not None:
            wrong += [] if driver.returncode in (0, 1) else [f"the driver ended with {driver.returncode}"]
            if driver.returncode == 0:
                wrong.append(f"it was done after {killed.total()} kills: ask for more images")
                break
            driver = subprocess.Popen(command(engine, out, given))
            continue
        workers = children(driver.pid)
        if target == "worker":
            kill(rng.sample(workers, min(1, len(workers))))
        else:
            kill([driver.pid, *(workers if target == "both" else [])])
            driver.wait()
            wrong += [f"worker {pid} outlived its driver" for pid in wait_for_orphans(workers)]
            driver = subprocess.Popen(command(engine, out, given))
        killed[f"{target} while committing" if committing else target] += 1
    for _ in range(3):  # a chunk whose workers were killed three times is left for the next run
        if driver.wait(LONGEST) == 0:
            return killed, wrong
        driver = subprocess.Popen(command(engine, out, given))
    return killed, [*wrong, f"the last driver ended with {driver.wait(LONGEST)}"]


def look_through(engine: Path, out: Path, given: argparse.Namespace) -> list[str]:
    """What is wrong with what is there."""
    starts = range(0, given.images, given.chunk)
    names = [f"{first:010d}-{min(first + given.chunk, given.images):010d}" for first in starts]
    expected = sorted(f"{name}.{suffix}" for name in names for suffix in ("json", "npz"))
    found = sorted(os.listdir(out / "chunks"))
    wrong = [] if found == expected else [f"files: {sorted(set(found) ^ set(expected))}"]
    others = sorted(set(os.listdir(out)) - {"chunks", "job.json", "kernels.json"})
    wrong += [f"left behind: {others}"] if others else []
    with (
        np.load(finish(out)) as samples,
        SparseEngine.load(engine, threads=1) as loaded,
    ):
        images = loaded.sample(given.images, steps=given.steps)
        differing = np.flatnonzero((samples["arr_0"] != images).reshape(len(images), -1).any(axis=1))
    return wrong + ([f"{len(differing)} images are others, the first {differing[0]}"] if len(differing) else [])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--chunk", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=6.0, help="Seconds between two kills, at most.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        killed, wrong = torment(given.engine, out, given)
        wrong += look_through(given.engine, out, given)
    print(f"{killed.total()} kills in {time.monotonic() - started:.0f} s: {dict(killed)}; {given.images} images")
    print("wrong: " + "; ".join(wrong) if wrong else "each image once, as drawn in one go; nothing left behind")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
