"""``python -m sparse_engine.bench.gpu``: the steps, each in a process of its own, so that none ends another."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparse_engine.backends.torch.runner import find_device
from sparse_engine.errors import OptionError, SparseEngineError

from . import ceilings, engines, ways, where
from .session import Results, Session, failure, has_broken_cuda

Step = Callable[[Session, Results], None]
CHECKOUT = Path(__file__).resolve().parents[2]
GRACE = 180  # seconds that a step may take to finish what it had begun within its budget
KEEP_GOING = "--continue-on-collection-errors"  # other tests may need packages that are not here
LINES_KEPT = 60  # of the tests' output


def run_tests(session: Session, results: Results) -> None:
    """Step 2: every test that needs a GPU."""
    if results.wants(name="tests"):
        with results.row(name="tests") as row:
            # Without the working folder in front of the path: there the package lacks the folders mapped into it.
            command = [
                sys.executable,
                "-P",
                "-m",
                "pytest",
                "-o",
                "addopts=-q",
                "-m",
                "gpu",
                "-rs",
                KEEP_GOING,
                "tests",
            ]
            path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(CHECKOUT))))
            environment = {**os.environ, "PYTHONPATH": path}
            done = subprocess.run(
                command,
                cwd=CHECKOUT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=session.budget,
                check=False,
            )
            row |= {"exit_code": done.returncode, "output": done.stdout.splitlines()[-LINES_KEPT:]}


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


def main(arguments: list[str]) -> int:
    """Measure on a GPU; 0 where every step came to its end, 1 where one did not, 2 on bad input."""
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
    done = [run_step(n, session) if given.here else _run_apart(n, arguments, given.budget) for n in wanted]
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
    """Run a step in this process; whether it came to its end."""
    name, step = STEPS[number]
    results, started = session.results(name), time.perf_counter()
    if session.device.type == "cuda":
        torch.cuda.set_device(session.device)
    try:
        step(session, results)
    except Exception as error:  # the other steps go on, and this one's rows are written
        say(f"step {number}, {name}: {failure(error)}")
        if has_broken_cuda(error):
            sys.exit(BROKEN)
        return False
    say(f"step {number}, {name}: {len(results.rows)} rows in {time.perf_counter() - started:.0f} s, {results.path}")
    for row in results.rows:
        if "failed" in row:
            say(f"  {row['failed']}")
    return True


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
    sys.exit(main(sys.argv[1:]))
