"""Damaged files from fixed seeds, each read in a worker with a limit of time and memory.

    python tests/fuzz/run.py --cases 100000 --workers 2

Prints each case that ends otherwise than well or in an error of ours; exit 1 if there is one. ``--only pth:17`` is one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS, BYTES = 5, 1 << 30  # of a case; the bytes beyond what the worker has when it is ready
GRACE = 15  # seconds beyond its own alarm after which a worker is killed
MAKING = 120  # seconds that a file may take to be damaged, or a worker to start
Finding = tuple[str, str]  # (case, what happened)


def names(cases: int, first: int = 0) -> list[str]:
    """Cases from ``first`` on: the targets in turn, with seeds of their own. Few of tactics, which load with tuning."""
    kinds = ["pth", "engine", "manifest", "safetensors", "calibration", "results", "configuration"]
    kinds += ["state", "pickle", "described", "index", "pthzip", "npz", "grid", "zip"]
    made = [f"{kinds[i % len(kinds)]}:{i // len(kinds)}" for i in range(first, first + cases)]
    return [f"tactics:{i}" if i % 100 == 99 else name for i, name in enumerate(made)]


class _TooLong(BaseException):
    pass


def _alarm(*_: object) -> None:
    raise _TooLong


def _work(seeds: Path, cases: list[str], pipe: Connection) -> None:
    import targets

    from sparse_engine.tactics import CACHE_VARIABLE

    warnings.simplefilter("ignore")
    os.environ[CACHE_VARIABLE] = str(seeds / "cache")
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    signal.signal(signal.SIGALRM, _alarm)
    for kind in ("engine", "pth"):  # what is imported once is no case's
        targets.TARGETS[kind].use(seeds / targets.TARGETS[kind].file, seeds)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, resource.RLIM_INFINITY))
    for case in cases:
        pipe.send(("begin", case))
        pipe.send(("end", _outcome(targets, seeds, case, pipe)))
    pipe.close()


def _outcome(targets: object, seeds: Path, case: str, pipe: Connection) -> str:
    """ "ok", "error" for one of ours, or what else happened."""
    from sparse_engine.errors import SparseEngineError

    kind, _, number = case.partition(":")
    target = targets.TARGETS[kind]  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(dir=seeds.parent) as folder:
        path = Path(folder) / target.file
        path.write_bytes(targets.damage(target, seeds, random.Random(f"{kind} {number}")))  # type: ignore[attr-defined]
        os.chdir(folder)
        pipe.send(("made", case))
        signal.alarm(SECONDS)
        try:
            target.use(path, seeds)
            outcome = "ok"
        except SparseEngineError:
            outcome = "error"
        except _TooLong:
            outcome = f"longer than {SECONDS} s"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f for f in where if "sparse_engine" in f.filename or "/export/" in f.filename] or list(where)
            outcome = f"{type(error).__name__}: {str(error)[:120]} in {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        finally:
            signal.alarm(0)
        left = targets.written_beside(Path(folder), {target.file, *target.beside})  # type: ignore[attr-defined]
        os.chdir("/")
    return f"{outcome}; wrote {left}" if left else outcome


def _supervise(seeds: Path, cases: list[str]) -> tuple[collections.Counter[str], list[Finding]]:
    """Run cases in a worker, another one after each crash."""
    context = multiprocessing.get_context("spawn")
    counted: collections.Counter[str] = collections.Counter()
    findings: list[Finding] = []
    done = 0
    while done < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(seeds, cases[done:], theirs))
        worker.start()
        theirs.close()
        running = None
        with contextlib.suppress(EOFError):
            patience = MAKING
            while ours.poll(patience):
                word, what = ours.recv()
                patience = SECONDS + GRACE if word == "made" else MAKING
                if word == "begin":
                    running = what
                if word != "end":
                    continue
                counted[what.split(":")[0] if what not in ("ok", "error") else what] += 1
                findings += [(running, what)] if what not in ("ok", "error") else []
                _tell(done + 1, len(cases), running, what)
                done, running = done + 1, None
        worker.kill()
        worker.join()
        if running is not None:
            findings.append((running, f"the worker ended ({worker.exitcode})"))
            _tell(done + 1, len(cases), *findings[-1])
            counted["crash"] += 1
            done += 1
        elif done < len(cases):
            raise RuntimeError(f"a worker did not start ({worker.exitcode})")
    return counted, findings


def _tell(done: int, count: int, case: str, outcome: str) -> None:
    """A finding at once, and how far it is; on stderr."""
    if outcome not in ("ok", "error"):
        print(f"{case}: {outcome}", file=sys.stderr, flush=True)
    if done % 500 == 0:
        print(f"{done} of {count} cases", file=sys.stderr, flush=True)


def fuzz(cases: list[str], workers: int) -> tuple[collections.Counter[str], list[Finding]]:
    """Run cases. Returns how many ended how, and those that ended badly."""
    from concurrent.futures import ThreadPoolExecutor

    import targets

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        seeds = Path(folder) / targets.SEEDS
        targets.make_seeds(seeds)
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(lambda i: _supervise(seeds, cases[i::workers]), range(workers)))
    total: collections.Counter[str] = collections.Counter()
    for counted, _ in parts:
        total += counted
    return total, [finding for _, findings in parts for finding in findings]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the case to begin with")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    started = time.perf_counter()
    counted, findings = fuzz(given.only or names(given.cases, given.first), given.workers)
    seconds = time.perf_counter() - started
    for case, what in findings:
        print(f"{case}: {what}")
    print(f"{sum(counted.values())} cases, {sum(counted.values()) / seconds:.0f} a second: {dict(counted)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
