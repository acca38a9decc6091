"""The program that samples does not feel it: what belongs to the process stays as the program has set it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_engine.tactics import CACHE_VARIABLE

# Argument 1 is an engine, 2 a folder to go to. PyTorch is imported first where the host uses it.
SCRIPT = """
import asyncio, gc, locale, logging, os, pickle, random, signal, sys, threading, warnings
import numpy as np
if sys.argv[3] == "torch": import torch

def umask():
    value = os.umask(0o027)
    os.umask(value)
    return value

def state():
    found = {
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "root handlers": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        # A library that is imported may add a filter of its own warnings (SymPy, which PyTorch imports).
        "warnings": ([f for f in warnings.filters if f[2].__module__ == "builtins"], warnings.showwarning),
        "numpy errors": (np.geterr(), np.geterrcall(), np.get_printoptions()),
        "umask": umask(),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"},
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook, sys.stdout, sys.stderr),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), threading.stack_size()),
        "random": random.getstate(),
        "numpy random": pickle.dumps(np.random.get_state()),
    }
    if sys.argv[3] == "torch":
        settings = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        found["torch"] = (*settings, torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist())
    return found

random.seed(1); np.random.seed(2); np.seterr(all="raise"); os.umask(0o027)
signal.signal(signal.SIGTERM, lambda number, frame: None)
os.chdir(sys.argv[2])
before = state()
from sparse_engine import SparseEngine

def draw():
    with np.errstate(all="raise"), SparseEngine.load(sys.argv[1], threads=1) as engine:
        return engine.sample(2, steps=2, labels=1).tobytes()

drawn = [draw()]
thread = threading.Thread(target=lambda: drawn.append(draw()))
thread.start(); thread.join()
drawn.append(asyncio.run(asyncio.to_thread(draw)))
after = state()
print(len(drawn), len(set(drawn)), [key for key in before if before[key] != after[key]])
"""


@pytest.mark.parametrize("kind, home", [("onnxruntime", "/dev/null/nowhere"), ("torch", None)])
def test_the_host_program_is_left_as_it_was(
    kind: str, home: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engine = request.getfixturevalue({"onnxruntime": "conditional_engine", "torch": "torch_engine"}[kind])
    unset = ("HOME", "XDG_CACHE_HOME", CACHE_VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_NUM_THREADS": "1"} | ({CACHE_VARIABLE: "/dev/null/cache"} if home is None else {"HOME": home})
    tmp_path.chmod(0o555)
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(engine), str(tmp_path), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 1 []\n", "")
    assert list(tmp_path.iterdir()) == []
