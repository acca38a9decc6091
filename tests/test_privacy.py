"""Nothing is recorded, and nothing is left in the user's home, unless the user wants it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_engine.backends.onnxruntime.library import TELEMETRY_VARIABLE, keep_private

REPOSITORY = Path(__file__).parents[1]
LIBRARY = REPOSITORY / "sparse_engine/backends/onnxruntime/library.py"
SCRIPT = """
import os, sys
from sparse_engine import SparseEngine
with SparseEngine.load(sys.argv[1], threads=1, autotune=False) as engine:
    engine.sample(1, steps=2)
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def test_a_first_sample_leaves_nothing_in_the_home(conditional_engine: Path, tmp_path: Path) -> None:
    unset = (TELEMETRY_VARIABLE, "XDG_CACHE_HOME", "SPARSE_ENGINE_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(conditional_engine)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "1"
    assert [path.name for path in tmp_path.rglob("*")] == []


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ("0", "", "1"):
        monkeypatch.setenv(TELEMETRY_VARIABLE, wanted)
        assert not keep_private()
        assert os.environ[TELEMETRY_VARIABLE] == wanted
    monkeypatch.delenv(TELEMETRY_VARIABLE)
    assert keep_private()
    assert os.environ[TELEMETRY_VARIABLE] == "1"


@pytest.mark.parametrize("folder", ["sparse_engine", "export", "calibration", "pruning", "bench", "examples"])
def test_one_place_imports_onnxruntime(folder: str) -> None:
    pattern = re.compile(
        r"^\s*(import onnxruntime|from onnxruntime)|import_module\(f?.onnxruntime|__import__\(.onnx", re.M
    )
    files = [file for file in (REPOSITORY / folder).rglob("*.py") if file != LIBRARY]
    assert files
    assert [str(file) for file in files if pattern.search(file.read_text())] == []
    assert pattern.search(LIBRARY.read_text())
