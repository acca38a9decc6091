"""Signals at any moment: nothing half-written, nothing left behind, the right exit code, and the next run works.

A few moments in CI. ``SPARSE_ENGINE_INTERRUPTS=50 pytest -s tests/cli/test_interrupts.py`` tries 50 of each signal,
spread over the commands, at random moments of a fixed seed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_engine.artifact import EngineFile

COUNT = int(os.environ.get("SPARSE_ENGINE_INTERRUPTS", "0"))  # moments of each signal; 0: those of CI
BARE = "Traceback"  # before any line of ours has run, Python's own
QUICK = ["--images", "16", "--steps", "8", "--sampler", "ddim"]
BENCH = ["--batch", "1", "--repeat", "1", "--seconds", "0.05", "--threads", "1"]
PICTURES = 400


@dataclass
class Place:
    """Where the commands run: a folder for what they write, and ones that they have to leave empty."""

    checkpoint: Path
    engine: Path
    folder: Path

    def command(self, name: str) -> list[str]:
        out, of_a_checkpoint = str(self.output(name)), [str(self.checkpoint), "--heads", "4"]
        return {
            "build": ["build", *of_a_checkpoint, "--sparse", "-o", out],
            "calibrate": ["calibrate", *of_a_checkpoint, *QUICK, "-o", out],
            "sample": ["sample", str(self.engine), "-n", str(PICTURES), "--steps", "20", "--threads", "1", "-o", out],
            "bench": ["bench", "--checkpoint", *of_a_checkpoint, *BENCH, "-o", out],
        }[name]

    def output(self, name: str) -> Path:
        named = {"build": "x.sengine", "calibrate": "x.npz", "sample": "pictures", "bench": "x.json"}
        return self.folder / "out" / named[name]

    def start(self, name: str) -> subprocess.Popen:
        places = {"TMPDIR": str(self.folder / "tmp"), "SPARSE_ENGINE_CACHE": str(self.folder / "cache")}
        return subprocess.Popen(
            [sys.executable, "-m", "sparse_engine", *self.command(name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | places | {"OMP_NUM_THREADS": "1"},
        )

    def check_whole(self, name: str) -> bool:
        """Whether the output is there; then it is whole."""
        output = self.output(name)
        if not output.exists():
            return False
        if name == "build":
            EngineFile(output).verify()
        elif name == "calibrate":
            assert len(np.load(output)["x"]) == 32
        elif name == "sample":
            assert sorted(os.listdir(output)) == [f"{i:06d}.png" for i in range(PICTURES)]
            Image.open(output / f"{PICTURES - 1:06d}.png").load()
        else:
            assert json.loads(output.read_text())["rows"]
        return True

    def left_behind(self, name: str) -> list[str]:
        """What is there beside the output: in its folder, the temporary one, and temporaries in the cache's."""
        found = [path for place in ("out", "tmp") for path in (self.folder / place).iterdir()]
        found += (self.folder / "cache").glob(".*")
        return [str(path) for path in found if path != self.output(name)]

    def clear_output(self, name: str) -> None:
        output = self.output(name)
        if output.is_dir():
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
        output.unlink(missing_ok=True)


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, tiny_engine: Path) -> Place:
    for name in ("out", "tmp", "cache"):
        (tmp_path / name).mkdir()
    return Place(tiny_checkpoint, tiny_engine, tmp_path)


def stop(place: Place, name: str, number: int, after: float) -> None:
    """Send a signal at a moment, and hold what is left against what is promised."""
    process = place.start(name)
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    where = f"{name}, {signal.Signals(number).name} after {after:.2f} s: exit {process.returncode}, said {said}"
    whole = place.check_whole(name)
    if number != signal.SIGKILL:
        before_us, ours, done = -number, 128 + number, 0
        assert process.returncode in (before_us, ours, done), where
        assert whole or process.returncode != done, where
        assert process.returncode != ours or after < 1 or "interrupted; nothing half-written" in said, where
        assert BARE not in said or process.returncode == before_us, where
        assert place.left_behind(name) == [], where
    place.clear_output(name)


def run_through(place: Place, name: str) -> float:
    """Run a command to its end; seconds. What a killed one left behind is gone then."""
    started = time.perf_counter()
    process = place.start(name)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert place.check_whole(name)
    assert place.left_behind(name) == []
    place.clear_output(name)
    return time.perf_counter() - started


@pytest.mark.skipif(COUNT > 0, reason="a full run")
@pytest.mark.parametrize(
    "name, number, after",
    [
        ("sample", signal.SIGTERM, 0.7),
        ("sample", signal.SIGHUP, 0.3),
        ("sample", signal.SIGKILL, 0.75),
        ("build", signal.SIGTERM, 4.0),
        ("calibrate", signal.SIGINT, 3.0),
        ("bench", signal.SIGTERM, 2.0),
    ],
)
def test_a_few_moments(place: Place, name: str, number: int, after: float) -> None:
    stop(place, name, number, after)
    if number == signal.SIGKILL:
        run_through(place, name)


def moments(number: int, durations: dict[str, float]) -> Iterator[tuple[str, float]]:
    chance = random.Random(number)
    for index in range(COUNT):
        name = list(durations)[index % len(durations)]
        yield name, chance.uniform(0, durations[name])


@pytest.mark.timeout(0)  # 50 moments of each signal take the better part of an hour
@pytest.mark.skipif(COUNT == 0, reason="SPARSE_ENGINE_INTERRUPTS is not set")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_many_moments(place: Place, number: int) -> None:
    durations = {name: run_through(place, name) for name in ("build", "calibrate", "sample", "bench")}
    for name, after in moments(number, durations):
        stop(place, name, number, after)
        if number == signal.SIGKILL:
            run_through(place, name)
        print(f"{signal.Signals(number).name}, {name} after {after:.2f} of {durations[name]:.2f} s: as promised")
    for name in durations:
        run_through(place, name)
