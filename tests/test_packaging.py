"""The wheel: what is in it, and that it runs engines where there is no torch."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("numpy", "onnx", "onnxruntime", "torch", "typer", "rich", "PIL", "matplotlib", "sklearn", "safetensors")


def imported_by(statement: str) -> set[str]:
    """Which of the heavy packages a statement loads, in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_imports_are_lazy() -> None:
    assert imported_by("import sparse_engine") == set()
    assert imported_by("from sparse_engine import SparseEngine") == {"numpy"}
    assert imported_by("import sparse_engine.sampling") == {"numpy"}
    assert imported_by("import sparse_engine.cli.main") == {"numpy", "typer", "rich"}


def test_nothing_imports_bench() -> None:
    for folder in ("sparse_engine", "export", "calibration", "pruning"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            text = file.read_text()
            assert not re.search(r"^\s*(from|import) sparse_engine\.bench", text, re.M), file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        REPOSITORY,
    ]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_one_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"sparse_engine"}
    for name in (
        "py.typed",
        "engine.py",
        "cli/main.py",
        "sampling/solvers/__init__.py",
        "export/families/uvit.py",
        "bench/quality.py",
        "calibration/__init__.py",
        "pruning/__init__.py",
    ):
        assert f"sparse_engine/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    unwanted = ("tests/", "/test_", "bench/results/", "__pycache__")
    assert not [name for name in names if any(part in name for part in unwanted)]


@pytest.mark.slow
def test_wheel_runs_an_engine_without_torch(wheel: Path, conditional_engine: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = ["-c", REPOSITORY / "constraints.txt"]
    subprocess.run([python, "-m", "pip", "install", "-q", *pins, f"{wheel}[cpu]"], check=True, timeout=400)
    script = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
from sparse_engine import SparseEngine
with SparseEngine.load(sys.argv[1]) as engine:
    print(engine.sample(4, steps=5).shape)
"""
    done = subprocess.run([python, "-c", script, conditional_engine], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "(4, 8, 8, 3)", done.stderr
    command = tmp_path / "venv" / "bin" / "sparse-engine"
    build = subprocess.run([command, "build", "x.pth"], capture_output=True, text=True, cwd=tmp_path)
    assert build.returncode == 2
    assert "needs torch; it is not installed" in build.stderr
    assert "pip install 'sparse-engine[export]'" in build.stderr
    doctor = subprocess.run([command, "doctor"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "needs torch, onnxscript, safetensors" in doctor.stdout
