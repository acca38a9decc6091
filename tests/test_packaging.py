"""The wheel: what is in it, and that it runs engines where there is no torch."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from sparse_engine import __version__
from tests.distributions import closure, expose

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


def test_wheel_is_for_any_python_and_brings_the_kernels(wheel: Path) -> None:
    assert re.fullmatch(rf"sparse_engine-{re.escape(__version__)}-py3-none-\w+\.whl", wheel.name)
    assert not wheel.name.endswith("-any.whl")  # what is built where there is no compiler
    archive = zipfile.ZipFile(wheel)
    library = archive.read("sparse_engine/kernels/libsparse_engine_kernels.so")
    assert b"sparse_engine" in library
    paths = [
        str(folder).encode() for folder in (REPOSITORY, Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix))
    ]
    for name in archive.namelist():
        assert not [path for path in paths if len(path) > 4 and path in archive.read(name)], name


def test_wheel_of_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    """All that a machine with a compiler needs is in the sdist: the kernels' sources, and every file of the wheel."""
    script = "import sys\nfrom scikit_build_core.build import build_sdist\nbuild_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=REPOSITORY, check=True, capture_output=True)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = REPOSITORY / "sparse_engine" / "kernels" / "src"
    assert {
        "CMakeLists.txt",
        "pyproject.toml",
        *(f"sparse_engine/kernels/src/{f.name}" for f in kernels.iterdir()),
    } <= names
    assert not [name for name in names if name.startswith(("tests", "examples", "bench/results/", "build", "out"))]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, "-C", "wheel.cmake=false", source], check=True, timeout=300)
    (made,) = tmp_path.glob("*.whl")
    assert made.name.endswith("-py3-none-any.whl")
    compiled = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    assert set(zipfile.ZipFile(made).namelist()) == set(zipfile.ZipFile(wheel).namelist()) - compiled


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a new environment that has the wheel in it, and nothing else: not even pip."""
    programs = tmp_path_factory.mktemp("bare") / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", programs.parent], check=True)
    pip = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", wheel], check=True, timeout=300)
    return programs


def with_extras(bare: Path, extras: str, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the bare environment, where it sees what the wheel declares for these extras, and no more.

    Where that is not here, the test is skipped, for the extras that ``make`` does not install.
    """
    (metadata,) = bare.parent.glob("lib/*/site-packages/sparse_engine-*.dist-info")
    found, absent = closure(Distribution.at(metadata), extras.split(","))
    if absent and ELSEWHERE.intersection(extras.split(",")):
        pytest.skip(f"[{extras}] is not tried: {', '.join(sorted(absent))} is not here")
    assert not absent
    packages = folder / "packages"
    for each in found:
        expose(each, packages)
    environment = {"PATH": f"{bare}:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(packages)}
    words = [str(bare / command[0]), *map(str, command[1:])]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


# What `make` does not install: it is large, for an NVIDIA GPU, or unpacks over what is there (onnxruntime-gpu).
ELSEWHERE = {"cuda", "tensorrt", "quality", "fid-offline", "tensorboard", "peers", "replicas", "cluster"}
EXPORTING = "sparse_engine.export.build", "sparse_engine.export.verify", "sparse_engine.pruning.finetune"
MEASURING = "sparse_engine.bench.run", "sparse_engine.bench.evaluate", "sparse_engine.bench.report.page"
# Extras, as the documentation and the errors name them together -> what is then there to import.
PROMISED = {
    "cpu": ("sparse_engine.backends.onnxruntime.runner", "sparse_engine.bulk", "sparse_engine.calibration.apply"),
    "cuda": ("sparse_engine.backends.onnxruntime.cuda", "sparse_engine.backends.cuda.runner"),
    "torch": ("sparse_engine.backends.torch.runner",),
    "export": (*EXPORTING[:2], "sparse_engine.export.vae", "sparse_engine.export.text_encoder"),
    "export,cpu": (*EXPORTING, "sparse_engine.pruning.write"),
    "bench": ("sparse_engine.plots", "sparse_engine.calibration.plot", "matplotlib.figure"),
    "bench,export,cpu": MEASURING,
    "bench,export,cpu,quality": (*MEASURING, "sparse_engine.bench.inception", "torch_fidelity"),
    "bench,export,cpu,fid-offline": (*MEASURING, "sparse_engine.bench.inception", "torch_fidelity"),
    "export,cpu,tensorboard": (*EXPORTING, "torch.utils.tensorboard"),
    "bench,export,cpu,peers": (*MEASURING, "sparse_engine.bench.peers.openvino", "openvino"),
    "tensorrt": ("sparse_engine.backends.tensorrt.builder", "tensorrt", "sparse_engine.backends.cuda.nvrtc"),
    "tensorrt-rtx": ("sparse_engine.backends.tensorrt.builder", "tensorrt_rtx", "sparse_engine.backends.cuda.nvrtc"),
    "text": ("sparse_engine.text", "tokenizers"),
    "diffusers": ("sparse_engine.diffusers", "sparse_engine.export.hub", "transformers", *EXPORTING[:2]),
    "serve": ("sparse_engine.serve.app", "sparse_engine.serve.server"),
    "replicas": ("sparse_engine.serve.app", "sparse_engine.serve.server", "sparse_engine.serve.replicas", "ray.serve"),
    "cluster": ("sparse_engine.bulk.cluster", "ray"),
    "parquet": ("sparse_engine.bulk.formats", "pyarrow.parquet"),
    "examples": ("sklearn.datasets",),
}


def test_every_extra_promises_something() -> None:
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for extras in PROMISED for extra in extras.split(",")} == declared.keys() - {"dev"}


@pytest.mark.parametrize("extras", PROMISED)
def test_extras_bring_what_they_promise(bare: Path, extras: str, tmp_path: Path) -> None:
    done = with_extras(bare, extras, tmp_path, "python", "-c", f"import {', '.join(PROMISED[extras])}")
    assert (done.returncode, done.stderr) == (0, "")


def test_base_install_says_what_it_lacks(bare: Path, conditional_engine: Path, tmp_path: Path) -> None:
    script = "import sys, importlib.util\nprint(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))"
    seen = with_extras(bare, "", tmp_path, "python", "-c", script, *HEAVY, "pip", "pytest")
    assert set(seen.stdout.split()) - {"pydantic"} == {"numpy", "onnx", "typer", "rich", "PIL"}, seen.stderr
    helped = with_extras(bare, "", tmp_path, "sparse-engine", "--help")
    assert (helped.returncode, "sample-many" in helped.stdout) == (0, True), helped.stderr
    inspected = with_extras(bare, "", tmp_path, "sparse-engine", "inspect", conditional_engine)
    assert (inspected.returncode, "uvit" in inspected.stdout) == (0, True), inspected.stderr
    refused = with_extras(bare, "", tmp_path, "sparse-engine", "sample", conditional_engine)
    assert (refused.returncode, "pip install 'sparse-engine[cpu]'" in refused.stderr) == (2, True), refused.stderr


def test_cpu_install_passes_what_a_release_asks_of_its_wheels(bare: Path, tmp_path: Path) -> None:
    release = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert release["test-extras"] == ["cpu"]
    for command in release["test-command"]:
        words = shlex.split(command.format(project=REPOSITORY))
        done = with_extras(bare, "cpu", tmp_path, *words)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.png").is_file()


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
