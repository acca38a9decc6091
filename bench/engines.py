"""Engine files of one model against one another, one solver step each, interleaved in one process.

    python -m sparse_engine.bench.engines dense.sengine sparse.sengine int8.sengine --batch 1,4,16

Ratios are over the first. An int8 engine is timed so: calibrating it is a build's business, and not the bench's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import process, sampling
from sparse_engine.conditioning import zeros_for
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError, SparseEngineError
from sparse_engine.files import check_writable

from .results_file import describe_run, write_results
from .run import parse_batches
from .statistics import speedup, spread
from .timing import interleave


def time_engines(
    paths: Sequence[Path], batches: Sequence[int], *, threads: int | None, repeats: int, seconds: float
) -> dict[str, Any]:
    """Time one network evaluation of each engine at several batch sizes.

    Args:
        paths: engine files of one checkpoint, with different names; ratios are over the first.
        batches: batch sizes.
        threads: of each; None is one per core.
        repeats, seconds: as ``interleave`` takes them.

    Raises:
        OptionError: fewer than two engines, two of one name, or not all of one checkpoint.
        EngineFileError, UnsupportedError: an engine cannot be loaded here.
    """
    names = [path.stem for path in paths]
    if len(names) < 2 or len(set(names)) < len(names):
        raise OptionError(f"engines {', '.join(names)}: expected two or more files of different names")
    engines = {name: SparseEngine.load(path, threads=threads) for name, path in zip(names, paths, strict=True)}
    try:
        if len({engine.manifest.checkpoint_sha256 for engine in engines.values()}) > 1:
            raise OptionError("the engines were built from different checkpoints", "build all of them from one")
        rows = [_time_batch(engines, batch, repeats, seconds) for batch in batches]
        return {"kind": "engines", "engines": {name: _describe(e) for name, e in engines.items()}, "rows": rows}
    finally:
        for engine in engines.values():
            engine.close()


def _time_batch(engines: dict[str, SparseEngine], batch: int, repeats: int, seconds: float) -> dict[str, Any]:
    timings = interleave({name: _step(e, batch) for name, e in engines.items()}, repeats=repeats, seconds=seconds)
    first = timings.runs[next(iter(engines))]
    return {
        "batch": batch,
        "milliseconds": {name: spread(runs).to_dict() for name, runs in timings.runs.items()},
        "speedups": {name: speedup(first, runs).to_dict() for name, runs in list(timings.runs.items())[1:]},
        "rounds": list(first.shape),
    }


def _step(engine: SparseEngine, batch: int) -> Callable[[], object]:
    x = sampling.normal(0, np.arange(batch), 0, engine.manifest.data_shape)
    told = zeros_for(engine.manifest.conditions)
    return lambda: engine.predict(x, engine.schedule.t_max / 2, conditioning=told)


def _describe(engine: SparseEngine) -> dict[str, Any]:
    info = engine.info
    ran = [str(layer["kernel"]) for layer in info["layers"]]
    kernels = {kernel: ran.count(kernel) for kernel in dict.fromkeys(ran)}
    return {"precision": info["precision"], "sparse": info["sparse"], "backend": info["backend"], "kernels": kernels}


def markdown(results: dict[str, Any]) -> str:
    """The results as a table: milliseconds, and how many times faster than the first engine."""
    rows = results["rows"]
    names = list(results["engines"])
    lines = ["| |" + "".join(f" batch {row['batch']} |" for row in rows), "|---|" + "---|" * len(rows)]
    for name in names:
        cells = []
        for row in rows:
            cell = f"{row['milliseconds'][name]['median']:.1f} ms"
            if name in row["speedups"]:
                ratio = row["speedups"][name]
                cell += f", {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]x"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line: exit 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", type=Path, nargs="+")
    parser.add_argument("--batch", default="1,4,16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing in each repeat of each batch")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    try:
        if given.output is not None:
            check_writable(given.output, ".json")
        results = describe_run("python -m sparse_engine.bench.engines " + " ".join(sys.argv[1:]), given.threads)
        batches = parse_batches(given.batch)
        results |= time_engines(
            given.engines, batches, threads=given.threads, repeats=given.repeat, seconds=given.seconds
        )
        if given.output is not None:
            write_results(given.output, results)
    except SparseEngineError as error:
        sys.exit(_told(error))
    sys.stdout.write(markdown(results) + "\n")


def _told(error: SparseEngineError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


if __name__ == "__main__":
    process.run(main)
