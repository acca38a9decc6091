"""Signals: an exception where it can pass, the end at once where it cannot; what the shell ignores stays ignored."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_engine.process import noting

WORK = """
import contextlib, signal, sys
from pathlib import Path
from sparse_engine import files, process
def work():
    try:
        held = process.fragile() if "fragile" in sys.argv else contextlib.nullcontext()
        with files.kept_if_done(Path(sys.argv[1])), held:
            print("begun", flush=True)
            sys.stdin.read()
    except KeyboardInterrupt:
        print("raised", flush=True)
        raise
process.run(work)
"""


@contextmanager
def at_work(*arguments: object, prefix: str = "") -> Iterator[subprocess.Popen]:
    command = ["sh", "-c", prefix + 'exec "$@"', "sh", sys.executable, "-c", WORK, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    yield process
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("fragile", [False, True])
def test_a_signal_clears_away_and_says_which_it_was(tmp_path: Path, number: int, fragile: bool) -> None:
    with at_work(tmp_path / "x", *(["fragile"] if fragile else [])) as process:
        process.send_signal(number)
        out, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert ("raised" in out) is not fragile
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    with at_work(tmp_path / "x", prefix="trap '' HUP; ") as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_is_noted_where_nothing_may_be_raised() -> None:
    noted: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    with noting(lambda: noted.append(True)):
        signal.raise_signal(signal.SIGINT)
    assert noted == [True]
    assert signal.getsignal(signal.SIGINT) is before
