"""What bulk sampling costs beside a bare loop over the same engine, and what several workers of one thread gain.

    python -m sparse_engine.bench.bulk model.sengine -n 1024 --chunk 128 --repeat 5 --cluster

Arms run in turn. The bare loop is ``engine.stream`` with nothing done to its batches, on as many threads as the machine
has cores and on one. An arm's seconds are those from its first worker's being up, with the kernels known: its load does
not count. "Per chunk" is the time from handing a chunk out until it is there, but for drawing: committing and talk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sparse_engine.bench.statistics import Ratio, speedup
from sparse_engine.bulk import Machines, Shard, sample_many
from sparse_engine.cores import usable_cores
from sparse_engine.engine import SparseEngine

LOOP = "bare loop, {} threads"
Arm = Callable[[], tuple[float, float]]  # -> (seconds, milliseconds per chunk)


def bare_loop(engine: Path, threads: int, given: argparse.Namespace) -> Arm:
    """``stream`` alone."""
    loaded = SparseEngine.load(engine, threads=threads)
    loaded.warmup(given.batch)

    def run() -> tuple[float, float]:
        started = time.perf_counter()
        for _ in loaded.stream(given.n, steps=given.steps, batch_size=given.batch):
            pass
        return time.perf_counter() - started, 0.0

    return run


def bulk(engine: Path, machines: Machines, given: argparse.Namespace) -> Arm:
    """``sample_many`` into a new folder, whose kernels a first chunk has fixed."""
    options = {"steps": given.steps, "chunk": given.chunk, "machines": machines, "format": None}

    def run() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            chunks = -(-given.n // given.chunk)
            first = {**options, "machines": Machines(threads=machines.load.threads, batch_size=given.batch)}
            sample_many(engine, out, given.n, **first, shard=Shard(0, chunks))
            (out / "chunks" / f"{0:010d}-{given.chunk:010d}.npz").unlink()
            summary = sample_many(engine, out, given.n, **options)
            sidecars = (out / "chunks").glob("*.json")
            drawing = sum(json.loads(path.read_text())["seconds"] for path in sidecars)
        return summary.seconds, 1e3 * (summary.busy - drawing) / chunks

    return run


def arms_of(given: argparse.Namespace) -> dict[str, Arm]:
    """Name -> arm."""
    engine, cores = given.engine, usable_cores()
    threads = given.threads or cores
    one = Machines(threads=threads, batch_size=given.batch)
    process = Machines(workers=1, threads=threads, batch_size=given.batch)
    each = Machines(workers=cores, threads=1, batch_size=given.batch)
    arms = {LOOP.format(size): bare_loop(engine, size, given) for size in dict.fromkeys((threads, 1))}
    arms[f"this process, {threads} threads"] = bulk(engine, one, given)
    arms[f"1 worker, {threads} threads"] = bulk(engine, process, given)
    arms[f"{cores} workers, 1 thread each"] = bulk(engine, each, given)
    if given.cluster:
        ray = Machines(workers=cores, threads=1, batch_size=given.batch, cluster="local")
        arms[f"{cores} actors of Ray, 1 thread each"] = bulk(engine, ray, given)
    return arms


def measure(arms: dict[str, Arm], repeat: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(seconds [repeat, 1] of each arm, median milliseconds per chunk of each)."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(repeat):
        for name, run in arms.items():
            found[name].append(run())
    seconds = {name: np.array([[each[0]] for each in runs]) for name, runs in found.items()}
    return seconds, {name: float(np.median([each[1] for each in runs])) for name, runs in found.items()}


def lines(seconds: dict[str, np.ndarray], per_chunk: dict[str, float], n: int) -> Sequence[str]:
    """The table: images/s of the median and of the fastest run, and the ratio to a bare loop.

    One worker's is to the loop on as many threads, several workers' to the faster loop.
    """
    loops = [name for name in seconds if name.startswith("bare")]
    best = min(loops, key=lambda name: float(np.median(seconds[name])))
    told = []
    for name, values in seconds.items():
        loop = next((each for each in loops if each.endswith(name.rpartition(", ")[2])), best)
        ratio: Ratio = speedup(seconds[loop], values)
        rates = f"{n / np.median(values):.1f} images/s (fastest run {n / values.min():.1f})"
        told.append(f"{name}: {rates}, {ratio} of {loop}; {per_chunk[name]:.0f} ms per chunk beside drawing")
    return told


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("-n", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, help="Of the loop, and of one worker; the cores where not said.")
    parser.add_argument("--cluster", action="store_true", help="With actors of Ray on this machine.")
    given = parser.parse_args()
    print(*lines(*measure(arms_of(given), given.repeat), given.n), sep="\n")  # noqa: T201


if __name__ == "__main__":
    main()
