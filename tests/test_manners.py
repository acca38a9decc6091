"""The program that uses the library does not feel it, and finds it wherever it runs."""

import asyncio
import concurrent.futures
import copy
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, errors
from sparse_engine.errors import NonFiniteError, SparseEngineError, UnsupportedError
from sparse_engine.tactics import cache_folder

STATE = """
import atexit, gc, locale, logging, os, random, signal, sys, threading, warnings
import numpy as np
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)
def state():
    umask = os.umask(0); os.umask(umask)
    return {
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "logging": (list(logging.root.handlers), logging.root.level),
        "warnings": list(warnings.filters),
        "NumPy's errors": np.geterr(),
        "umask": umask,
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"},
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "gc": (gc.isenabled(), gc.get_threshold()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "random": (random.getstate(), np.random.get_state()[1].tolist()),
        "streams": (sys.stdout, sys.stderr, sys.stdin),
    }
before = state()
from sparse_engine import SparseEngine
with SparseEngine.load(sys.argv[1], threads=1) as engine:
    engine.sample(2, steps=2)
after = state()
print(*(name for name in before if before[name] != after[name]))
"""


def test_loading_and_sampling_change_nothing_of_the_program(conditional_engine: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", STATE, conditional_engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_arithmetic_that_raises_is_the_callers_own(conditional_engine: Path) -> None:
    with np.errstate(all="raise"), SparseEngine.load(conditional_engine, threads=1) as engine:
        assert engine.sample(2, steps=3, sampler="ddpm").shape == (2, 8, 8, 3)


def test_it_runs_in_threads_and_after_the_folder_was_changed(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(conditional_engine.parent)

    def draw() -> Any:
        with SparseEngine.load(conditional_engine.name, threads=1) as engine:
            os.chdir(tmp_path)
            return engine.sample(1, steps=2)

    assert asyncio.run(asyncio.to_thread(draw)).shape == (1, 8, 8, 3)


DRAW = """
import sys
from sparse_engine import SparseEngine
print(len(SparseEngine.load(sys.argv[1]).sample(1, steps=1)))
"""


def test_without_a_home_in_a_folder_that_takes_no_file(conditional_engine: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere"}
    command = [sys.executable, "-c", DRAW, conditional_engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/proc")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_the_cache_is_where_the_user_means_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SPARSE_ENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "sparse-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", "/absolute")
    assert cache_folder() == Path("/absolute/sparse-engine")


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_an_engine_is_not_copied(engine: SparseEngine, copied: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be copied or sent to another process.*\n.*pass the path"):
        copied(engine)


@pytest.mark.parametrize(
    "kind", [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SparseEngineError)]
)
def test_an_error_survives_the_way_to_another_process(kind: Any) -> None:
    error = kind("what", "fix", (3, 4), 7) if kind is NonFiniteError else kind("what", "fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), vars(again)) == (str(error), vars(error))


def fail(number: int) -> None:
    raise NonFiniteError("what", "fix", (number,), 2)


def test_a_workers_error_reaches_its_parent() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(fail, 5).exception(timeout=60)
    assert isinstance(error, NonFiniteError)
    assert (error.what, error.fix, error.images, error.step) == ("what", "fix", (5,), 2)
