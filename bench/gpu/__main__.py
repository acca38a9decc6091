"""``python -m sparse_engine.bench.gpu``: the steps, each in a process of its own, so that none ends another."""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparse_engine import process
from sparse_engine.backends.torch.runner import find_device
from sparse_engine.errors import BackendError, OptionError, SparseEngineError

from . import ceilings, engines, ways, where
from .session import Results, Row, Session, failure, has_broken_cuda

Step = Callable[[Session, Results], None]
CHECKOUT = Path(__file__).resolve().parents[2]
GRACE = 180  # seconds that a step may take to finish what it had begun within its budget
KEEP_GOING = "--continue-on-collection-errors"  # other tests may need packages that are not here
LINES_KEPT = 60  # of the tests' output
KEYS = (
    "name",
    "which",
    "backend",
    "compute_capability",
    "linear",
    "sparse",
    "patch",
    "mlp_ratio",
    "precision",
    "batch",
)


def run_tests(session: Session, results: Results) -> None:
    """Step 2: every test that needs a GPU. The row is one that failed unless pytest ends well and a test has passed."""
    if results.wants(name="tests"):
        with results.row(name="tests") as row:
            code, lines = _pytest(session.budget)
            row |= {"exit_code": code, "output": lines[-LINES_KEPT:]}
            _check_tests(code, lines, session.rehearsal)


def _pytest(seconds: float) -> tuple[int, list[str]]:
    """Run the tests marked ``gpu``: exit code and output."""
    # Without the working folder in front of the path: there the package lacks the folders mapped into it.
    options = ["-o", "addopts=-q", "-m", "gpu", "-rfEs", KEEP_GOING, "tests"]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(CHECKOUT))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", *options],
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the tests did not end within the budget of {seconds:.0f} s") from error
    return done.returncode, done.stdout.splitlines()


def _check_tests(code: int, lines: list[str], rehearsal: bool) -> None:
    """Raise BackendError on any exit code but 0, and on a run that skipped every test, save where it rehearses."""
    last = lines[-1] if lines else "no output"
    if code:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise BackendError("; ".join([f"pytest ended with exit code {code}: {last}", *failed]))
    if not rehearsal and not re.search(r"\b[1-9]\d* passed", last):
        raise BackendError(f"no test has passed: {last}")


STEPS: dict[int, tuple[str, Step]] = {  # by number; ``ORDER`` is that of a run
    1: ("device", ceilings.run),
    2: ("tests", run_tests),
    3: ("uvit-s", ways.run_uvit_s),
    4: ("paper", ways.run_paper),
    5: ("tensorrt-rtx", engines.run_rtx),
    6: ("tensorrt", engines.run_tensorrt),
    7: ("end-to-end", engines.run_end_to_end),
    8: ("where", where.run),
}
ORDER = (1, 4, 7, 5, 3, 8, 2, 6)  # what is wanted most first: a GPU may be lent for minutes
ATTEMPTS = 3  # processes of a step: one that crashes is followed by one that leaves out what it crashed in
BROKEN = 3  # exit code of a step that left CUDA unusable
SURVEYS = ("device", "tensorrt-rtx")  # steps that ask what a GPU takes: that it takes some of it not is an answer


def main(arguments: list[str]) -> int:
    """Measure on a GPU; 0 where nothing failed, 1 where something did, 2 on bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser("python -m sparse_engine.bench.gpu", description=__doc__)
    parser.add_argument(
        "--steps",
        default=",".join(map(str, ORDER)),
        help="which, in order; one that is run again goes on where it was [default: %(default)s]",
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu [default: the first GPU]")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in which a step may begin measurements")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder for results [default: bench/results; a rehearsal's: out]"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes; results are kept apart")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    parser.add_argument("--keep-failed", action="store_true", help="do not measure again what failed before")
    parser.add_argument("--here", action="store_true", help="run the steps in this process")
    given = parser.parse_args(arguments)
    try:
        wanted, device = parse_steps(given.steps), find_device(given.device)
        if device.type == "cpu" and not given.rehearse:
            raise OptionError("there is no GPU to measure", "rehearse on the CPU with --rehearse")
        if not (given.budget >= 0 and math.isfinite(given.budget)):
            raise OptionError(f"--budget {given.budget}: expected seconds, 0 or more", "for example --budget 240")
    except SparseEngineError as error:
        say(f"error: {error}")
        return error.exit_code
    session = Session(
        device=device,
        rehearsal=given.rehearse,
        folder=_folder(given.output, given.rehearse),
        budget=given.budget,
        compiled=not given.no_compile,
        command=" ".join([parser.prog, *(each for each in arguments if each != "--here")]),
        keep_failed=given.keep_failed,
    )
    try:
        done = [run_step(n, session) if given.here else _run_apart(n, arguments, given.budget) for n in wanted]
    except KeyboardInterrupt:
        say("interrupted; what was measured is kept")
        return process.clear_away()
    return 0 if all(done) else 1


def _folder(output: Path | None, rehearsal: bool) -> Path:
    """A rehearsal's results never lie where a GPU's do."""
    if rehearsal:
        return (output or CHECKOUT / "out") / "rehearsal"
    return output or CHECKOUT / "bench" / "results"


def parse_steps(text: str) -> list[int]:
    """ "1,3" -> the steps. Raises OptionError on what is none."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) in STEPS for part in parts):
        raise OptionError(f"--steps {text!r}: expected some of 1 to {max(STEPS)}", "for example --steps 1,3,4")
    return [int(part) for part in parts]


def run_step(number: int, session: Session) -> bool:
    """Run a step in this process; whether it came to its end and nothing in it failed."""
    name, step = STEPS[number]
    started = time.perf_counter()
    if session.device.type == "cuda":
        torch.cuda.set_device(session.device)
    try:
        results = session.results(name)
        step(session, results)
    except Exception as error:  # the other steps go on, and this one's rows are written
        say(f"step {number}, {name}: {failure(error)}")
        if has_broken_cuda(error):
            sys.exit(BROKEN)
        return False
    say(f"step {number}, {name}: {len(results.rows)} rows in {time.perf_counter() - started:.0f} s, {results.path}")
    if results.not_begun:
        say(f"  {results.not_begun} more were not begun within the budget: run the step again to go on")
    for row in results.rows:
        if "failed" in row:
            say(f"  {_named(row)}: {row['failed']}")
    return not _failures(name, results.rows)


def _named(row: Row) -> str:
    """Which row it is, such as "patch 1, mlp_ratio 4"."""
    return ", ".join(f"{key} {row[key]}" for key in KEYS if key in row)


def _failures(step: str, rows: list[Row]) -> list[Row]:
    """The rows that make a step one that failed: not what this machine is known not to do."""
    failed = [row for row in rows if "failed" in row and not row.get("unsupported")]
    return [] if step in SURVEYS and len(failed) < len(rows) else failed


def _run_apart(number: int, arguments: list[str], budget: float) -> bool:
    """Run a step in a process of its own, which may crash or hang. After a crash another goes on behind it."""
    command = [sys.executable, "-P", "-m", "sparse_engine.bench.gpu", *arguments, "--steps", str(number), "--here"]
    ends = time.monotonic() + budget
    for attempt in range(ATTEMPTS):
        left = max(ends - time.monotonic(), 0.0)
        again = ["--keep-failed", "--budget", f"{left:.0f}"] if attempt else []
        try:
            code = subprocess.run([*command, *again], timeout=left + GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            say(f"step {number} was ended: it ran {GRACE} s past its budget")
            return False
        if 0 <= code < BROKEN:
            return code == 0
        say(f"step {number} ended with exit code {code}")
    return False


def say(line: str) -> None:
    """To the terminal."""
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    process.run(lambda: main(sys.argv[1:]))
