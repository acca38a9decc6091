"""What is printed arrives, falls back to plain characters, or is missed in two lines: whatever is at the other end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_engine.cli.main import run
from sparse_engine.files import replacing

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
LONG = "samplers --json"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of bash, in which ``sparse-engine`` is ours."""
    ours = f'sparse-engine() {{ "{sys.executable}" -m sparse_engine "$@"; }}; '
    command = ["bash", "-c", ours + line]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, env=os.environ | environment)


@pytest.mark.parametrize("line", ["--help", LONG, "samplers"])
def test_a_pipe_that_is_closed_ends_quietly(line: str) -> None:
    """The command goes on: what it finds is in its exit code, also where nobody reads its words."""
    done = shell(f"sparse-engine {line} | :; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == (b"0\n", b"")


def test_a_reader_that_leaves_does_not_turn_a_failure_into_success(tiny_engine: Path, tmp_path: Path) -> None:
    done = shell(f"sparse-engine inspect {tmp_path}/none.sengine 2>&1 | :; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == (b"2\n", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["--version", "sample --help", LONG, "samplers"])
def test_a_full_disk_behind_the_output(line: str) -> None:
    done = shell(f"sparse-engine {line} > /dev/full")
    said = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert said[0] == "error: standard output cannot be written: No space left on device"
    assert said[1].startswith("fix: ")
    assert len(said) == 2


def test_plain_characters_where_others_cannot_be_written(tiny_engine: Path) -> None:
    done = shell(f"sparse-engine inspect {tiny_engine}; sparse-engine bench --help", **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode("ascii")
    assert "->" in said
    assert "?" not in said.split("Usage")[0]
    assert "--compare-dense" in said


def test_names_that_are_no_text(tmp_path: Path) -> None:
    done = shell(f"sparse-engine inspect $'{tmp_path}/\\xff.sengine'", PYTHONUTF8="1")
    assert done.returncode == 2
    assert b"\xff.sengine does not exist" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(tmp_path: Path, tiny_engine: Path, closed: str) -> None:
    """The first file that is opened would get a closed stream's number, and what is printed."""
    path = tmp_path / "x.npz"
    done = shell(f"sparse-engine sample {tiny_engine} --steps 2 -n 2 -o {path} {closed}; echo $?")
    assert done.stdout == b"0\n"
    assert path.read_bytes().startswith(b"PK")
    assert os.listdir(tmp_path) == ["x.npz"]


def test_an_error_with_nowhere_to_say_it() -> None:
    for where in ("2>&-", "2>/dev/full"):
        assert shell(f"sparse-engine inspect none.sengine {where}").returncode == 2


def test_a_full_temporary_folder_is_named(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As in the float engine that ``calibrate`` builds there."""

    def build(checkpoint: Path, engine: Path, **_: object) -> None:
        with replacing(engine):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sparse_engine.export.build.build_engine", build)
    output = tmp_path / "out"
    output.mkdir()
    called = ["calibrate", str(tiny_checkpoint), "--heads", "4", "-o", str(output), "--images", "16", "--steps", "8"]
    assert run(called) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path}: the disk is full" in said
    assert "set TMPDIR" in said
    assert " -o" not in said
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_of_the_system_that_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error", "weights.bin")

    monkeypatch.setattr("sparse_engine.cli.inspect._engine_report", failing)
    assert run(["inspect", "x.sengine"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: weights.bin: Input/output error"
