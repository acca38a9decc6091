"""The wheel: what is in it, and that it runs engines where there is no torch."""

import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = (
    *("numpy", "onnx", "onnxruntime", "torch", "typer", "rich", "PIL", "matplotlib", "sklearn", "safetensors"),
    *("fastapi", "uvicorn", "pydantic", "prometheus_client", "ray"),
)


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


def test_pipelines_say_which_extra_is_missing() -> None:
    script = "import sys\nsys.modules['diffusers'] = None\nimport sparse_engine.diffusers"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "sparse_engine.diffusers needs diffusers; it is not installed" in done.stderr
    assert "pip install 'sparse-engine[diffusers,cpu]'" in done.stderr


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
        "bulk/worker.py",
        "sampling/solvers/__init__.py",
        "export/families/uvit.py",
        "bench/quality.py",
        "diffusers/swap.py",
        "calibration/__init__.py",
        "pruning/__init__.py",
        "serve/app.py",
        "serve/page/page.html",
        "serve/page/page.js",
        "serve/page/page.css",
    ):
        assert f"sparse_engine/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    unwanted = ("tests/", "/test_", "bench/results/", "__pycache__")
    assert not [name for name in names if any(part in name for part in unwanted)]


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a new environment with the wheel in it, and what it needs on a CPU."""
    programs = tmp_path_factory.mktemp("fresh") / "bin"
    subprocess.run([sys.executable, "-m", "venv", programs.parent], check=True)
    pins = ["-c", REPOSITORY / "constraints.txt"]
    subprocess.run([programs / "pip", "install", "-q", *pins, f"{wheel}[cpu]"], check=True, timeout=400)
    return programs


@pytest.mark.slow
def test_wheel_runs_an_engine_without_torch(fresh: Path, conditional_engine: Path, tmp_path: Path) -> None:
    script = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
from sparse_engine import SparseEngine
with SparseEngine.load(sys.argv[1]) as engine:
    print(engine.sample(4, steps=5).shape)
"""
    python, command = fresh / "python", fresh / "sparse-engine"
    done = subprocess.run([python, "-c", script, conditional_engine], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "(4, 8, 8, 3)", done.stderr
    build = subprocess.run([command, "build", "x.pth"], capture_output=True, text=True, cwd=tmp_path)
    assert build.returncode == 2
    assert "needs torch; it is not installed" in build.stderr
    assert "pip install 'sparse-engine[export]'" in build.stderr
    serve = subprocess.run([command, "serve", conditional_engine], capture_output=True, text=True, cwd=tmp_path)
    assert (serve.returncode, "pip install 'sparse-engine[serve]'" in serve.stderr) == (2, True)
    doctor = subprocess.run([command, "doctor"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "needs torch, onnxscript, safetensors" in doctor.stdout


@pytest.mark.slow
def test_the_image_serves(wheel: Path, fresh: Path, conditional_engine: Path, tmp_path: Path) -> None:
    """What the Dockerfile runs, but for Debian's packages and its user: pip's line, then the program as it starts."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = re.findall(r"^RUN (pip .*)", text, re.M)
    assert lines[0] == "pip wheel --no-cache-dir --no-deps -w /wheels ."  # as the fixture builds it
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for file in (wheel, REPOSITORY / "constraints.txt"):
        (wheels / file.name).write_bytes(file.read_bytes())
    environment = {"PATH": f"{fresh}:/usr/bin:/bin", "HOME": str(tmp_path)} | {
        name: value for name, value in os.environ.items() if name.startswith("PIP_")
    }
    install = lines[1].replace("/wheels", str(wheels)).replace("--no-cache-dir", "-q")
    subprocess.run(["sh", "-ec", install], check=True, env=environment, timeout=300)
    entry, (default,) = (json.loads(re.findall(rf"^{word} (.*)", text, re.M)[-1]) for word in ("ENTRYPOINT", "CMD"))
    assert default == "/engines/model.sengine"
    command = [*entry, "--port", "0", "--no-autotune", str(conditional_engine)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as service:
        try:
            assert service.stderr is not None
            said = next(line for line in service.stderr if line.startswith("serving"))
            url = f"http://127.0.0.1:{said.rpartition(':')[2].strip()}"
            with urllib.request.urlopen(f"{url}/health/ready", timeout=20) as answer:
                assert answer.status == 200
            body = urllib.request.Request(
                f"{url}/v1/images/generations",
                b'{"steps": 2}',
                {"Content-Type": "application/json", "Accept": "image/png"},
            )
            with urllib.request.urlopen(body, timeout=20) as answer:
                assert answer.read().startswith(b"\x89PNG")
        finally:
            service.terminate()
        assert service.wait(20) == 0
