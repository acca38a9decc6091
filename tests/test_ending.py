"""A process that ends while threads of it sample: it ends well, and soon."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from sparse_engine import SparseEngine, ending

LOOP = """
import atexit, os, sys, threading
from sparse_engine import SparseEngine
if sys.argv[2] == "atexit before": atexit.register(lambda: print(engine.sample(1, steps=2).shape))
engine = SparseEngine.load(sys.argv[1], threads=1, autotune=False)
started = threading.Event()
def told(step, t, x):
    started.set()
    if sys.argv[2] == "callback": threading.Event().wait()
def loop():
    while True:
        if sys.argv[2] == "load":
            SparseEngine.load(sys.argv[1], threads=1, autotune=False).close()
            started.set()
        else:
            engine.sample(2, steps=100_000, sampler="ddpm", callback=told)
for _ in range(2): threading.Thread(target=loop, daemon=True).start()
started.wait()
if sys.argv[2] == "close": engine.close()
if sys.argv[2] == "fork":
    child = os.fork()
    if child: assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
if sys.argv[2] == "exit 3": sys.exit(3)
"""


def ended(engine: Path, kind: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a hundred thousand steps are not waited for."""
    command = [sys.executable, "-c", LOOP, str(engine), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    "kind,code,printed",
    [
        ("", 0, ""),
        ("exit 3", 3, ""),
        ("callback", 0, ""),  # one that never returns is not waited for
        ("load", 0, ""),
        ("atexit before", 0, "(1, 8, 8, 3)"),  # what the caller does at the end still can sample
        ("close", 0, ""),
        ("fork", 0, ""),
    ],
)
def test_daemon_threads(conditional_engine: Path, kind: str, code: int, printed: str) -> None:
    found, out, err = ended(conditional_engine, kind)
    assert (found, out) == (code, printed), err
    if kind != "close":  # there the threads' own EngineClosedError is printed
        assert err == ""


def test_daemon_threads_of_a_device_backend(torch_engine: Path) -> None:
    assert ended(torch_engine, "") == (0, "", "")


def test_what_a_thread_owns_of_a_library_is_given_up_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory would else go, in calls of the library's, when the thread ends."""

    class Owner:
        pass

    for name, value in (("_last", None), ("_waited", threading.Event()), ("_kept", []), ("_inside", {})):
        monkeypatch.setattr(ending, name, value)
    owner, late = Owner(), Owner()
    seen = [weakref.ref(owner), weakref.ref(late)]
    ending.keep_until_the_end(owner)
    ending._wait()
    ending.keep_until_the_end(late)  # a load that was under way
    del owner, late
    gc.collect()
    assert all(each() is not None for each in seen)


def test_a_call_that_the_end_has_cut_short_leaves_nothing_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that its frames own would else go, in calls of the library's, when nobody waits any more."""

    class Tensor:
        pass

    seen: list[weakref.ref[Tensor]] = []

    def network() -> None:
        tensor = Tensor()
        seen.append(weakref.ref(tensor))
        monkeypatch.setattr(ending, "_last", -1)
        ending.stop_if_ending()

    monkeypatch.setattr(ending, "_last", None)
    with pytest.raises(SystemExit) as end, ending.library_call():
        network()
    assert end.value.__traceback__ is not None
    assert seen[0]() is None


def test_images_of_a_device_backend_are_in_memory_of_numpys_own(torch_engine: Path) -> None:
    with SparseEngine.load(torch_engine, threads=1, autotune=False) as engine:
        states: list[object] = []
        images = engine.sample(1, steps=1, output="float", callback=lambda step, t, x: states.append(x))
    for array in (images, *states):
        while isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        assert isinstance(array, np.ndarray)


def test_what_is_closed_before_the_end_goes_at_once(conditional_engine: Path) -> None:
    engine = SparseEngine.load(conditional_engine, threads=1, autotune=False)
    runner = weakref.ref(engine._runner)
    engine.close()
    del engine
    gc.collect()
    assert runner() is None
