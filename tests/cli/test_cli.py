"""The command line as a user meets it: exit codes, one or two lines of error, nothing left behind."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_engine import SparseEngine, cli, process
from sparse_engine import __main__ as entry
from sparse_engine.artifact import EngineFile
from sparse_engine.cli.inspect import _kernel
from sparse_engine.cli.main import run
from sparse_engine.errors import BackendError, EngineFileError
from tests.conftest import TINY, random_state

FAST = ["--steps", "2", "--sampler", "ddim"]


def sparse_engine(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from sparse_engine.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_build_inspect_verify_sample(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    engine = tmp_path / "model.sengine"
    assert run(["build", str(tiny_checkpoint), "--sparse", "--heads", "4", "-o", str(engine)]) == 0
    said = capsys.readouterr().out
    assert "note: warning: the mask removes 1" in said
    assert "12 of 16 layers masked, 12 of them hardware 2:4" in said.replace("\n", " ")
    assert run(["verify", str(engine), "--against", str(tiny_checkpoint)]) == 0
    assert "PSNR of a 10-step trajectory" in capsys.readouterr().out
    assert run(["inspect", str(engine), "--check"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    assert run(["sample", str(engine), "-n", "5", "-o", str(tmp_path / "x.png"), *FAST]) == 0
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    assert sorted(os.listdir(tmp_path)) == ["model.sengine", "x.png"]


def test_default_output_is_the_checkpoints_name_here(tmp_path: Path, tiny_checkpoint: Path) -> None:
    done = sparse_engine("build", tiny_checkpoint, "--heads", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["tiny.sengine"]
    assert done.stderr == ""  # no terminal, no progress bar


def test_inspect_says_against_what_a_kernel_was_timed_and_with_which_layer() -> None:
    timed = {"257": {"milliseconds": {"dense": 3.0, "t-lanes": 1.5}, "fastest": "t-lanes", "margin": 2.0}}
    layer = {"kernel": "t-lanes", "timed_by_tokens": timed, "pair": {"with": "mlp.fc2", "chosen": "together"}}
    assert _kernel(layer, "") == "t-lanes 2.00x, with fc2"
    assert _kernel(layer | {"pair": {"with": "mlp.fc2", "chosen": "apart"}}, " fp32") == "t-lanes 2.00x fp32"
    assert _kernel({"kernel": "dense", "timed_by_tokens": timed}, "") == "dense"
    int8 = {"64": {"milliseconds": {"own": 1.0, "dense int8": 3.0}}}
    assert _kernel({"kernel": "r-lanes int8", "timed_by_tokens": int8}, "") == "r-lanes int8 3.00x"
    assert _kernel({"kernel": "dense int8", "timed_by_tokens": int8}, "") == "dense int8"


def test_an_interrupt_while_it_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, *rest: Any, **options: Any) -> Any:
        if name == "sparse_engine.cli.main":
            raise KeyboardInterrupt
        return imported(name, *rest, **options)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", interrupted)
    monkeypatch.setattr(process, "begin", lambda: None)  # it would be this process's streams and signals
    with pytest.raises(SystemExit, match="130"):
        entry.main()


def test_help_shows_every_default_that_is_said_in_words(capsys: pytest.CaptureFixture) -> None:
    """In square brackets rich takes them for markup and drops them."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        assert "[default:" not in path.read_text(), f"{path.name}: write show_default=..."
    assert run(["bench", "--help"]) == 0
    assert "one per core" in " ".join(capsys.readouterr().out.split())


def test_inspect_json_and_plot(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    chart = tmp_path / "layers.png"
    assert run(["inspect", str(tiny_checkpoint), "--heads", "4", "--json", "--plot", str(chart)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["embed_dim"] == 32
    assert sum(layer["masked"] for layer in report["layers"]) == 12
    assert Image.open(chart).size[0] > 500


def test_sample_to_a_folder_and_an_array(tmp_path: Path, conditional_engine: Path) -> None:
    assert (
        run(["sample", str(conditional_engine), "-n", "6", "--labels", "0-2", "-o", str(tmp_path / "out"), *FAST]) == 0
    )
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i:06d}.png" for i in range(6)]
    assert (
        run(["sample", str(conditional_engine), "-n", "6", "--labels", "0-2", "-o", str(tmp_path / "x.npz"), *FAST])
        == 0
    )
    samples = np.load(tmp_path / "x.npz")["samples"]
    assert (samples.shape, samples.dtype) == ((6, 8, 8, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "000004.png")), samples[4])


def test_latents_go_to_an_array(tmp_path: Path, latent_engine: Path) -> None:
    assert run(["sample", str(latent_engine), "-n", "2", "-o", str(tmp_path / "z.npz"), *FAST]) == 0
    assert np.load(tmp_path / "z.npz")["samples"].shape == (2, 4, 8, 8)
    assert run(["sample", str(latent_engine), "-n", "2", "-o", str(tmp_path / "z.png"), *FAST]) == 2


def test_verify_fails_past_the_tolerance(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "other.pth"
    torch.save(random_state(TINY, seed=1), other)
    assert run(["verify", str(tiny_engine), "--against", str(other)]) == 1
    assert "expected at most 1e-04 (the engine was built from another checkpoint file)" in capsys.readouterr().err


def test_doctor_and_samplers(capsys: pytest.CaptureFixture) -> None:
    assert run(["doctor", "--json"]) == 0
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert findings["backend onnxruntime"]["ok"]
    assert findings["CPU"]["found"]
    assert run(["samplers", "--json"]) == 0
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert {"ddim", "ddpm", "euler-ode", "dpm-solver++"} <= names
    assert run(["doctor"]) == run(["samplers"]) == run(["--version"]) == run(["--help"]) == 0


def test_doctor_sees_both_onnxruntimes(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_engine import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    finding = next(entry for entry in doctor.diagnose() if entry.name == "onnxruntime twice")
    assert not finding.ok
    assert "pip uninstall" in (finding.fix or "")


BAD_INPUT = {
    "not a checkpoint": (["build", "{junk}"], "junk.pth is"),
    "missing checkpoint": (["build", "nowhere.pth"], "nowhere.pth does not exist"),
    "wrong heads": (["build", "{tiny}", "--heads", "5"], "heads = 5 does not divide embed_dim = 32"),
    "no heads": (["build", "{tiny}"], "attention heads cannot be read off"),
    "bad pattern": (["build", "{tiny}", "--heads", "4", "--sparse", "--pattern", "4:2"], "expected 0 < N < M"),
    "nothing 2:4": (
        ["build", "{tiny}", "--heads", "4", "--sparse", "--pattern", "7:8"],
        "none of the 16 layers can be 2:4",
    ),
    "glob": (["build", "{tiny}", "--heads", "4", "--sparse", "--mask-layers", "x.*"], "'x.*' matches none"),
    "bad batch": (
        ["build", "{tiny}", "--heads", "4", "--batch", "4,2,1"],
        "expected 1 <= smallest <= usual <= largest",
    ),
    "batch no numbers": (["build", "{tiny}", "--heads", "4", "--batch", "many"], "expected three whole numbers"),
    "batch too large": (["build", "{tiny}", "--heads", "4", "--batch", "1,1,1" + "0" * 30], "<= largest <= 65536"),
    "workspace nan": (["build", "{tiny}", "--workspace", "nan"], "--workspace nan: expected 0.001 to 1000000 GiB"),
    "workspace inf": (["build", "{tiny}", "--workspace", "inf"], "--workspace inf: expected"),
    "workspace negative": (["build", "{tiny}", "--workspace=-1"], "--workspace -1: expected"),
    "workspace 0": (["build", "{tiny}", "--workspace", "0"], "--workspace 0: expected"),
    "workspace huge": (["build", "{tiny}", "--workspace", "1e308"], "--workspace 1e+308: expected"),
    "linear": (["build", "{tiny}", "--linear", "gem"], "--linear 'gem' is not known"),
    "sparse required of nothing": (
        ["build", "{tiny}", "--require-sparse"],
        "--require-sparse is given without --sparse",
    ),
    "level": (["build", "{tiny}", "--optimization-level", "6"], "--optimization-level 6: expected 0 to 5"),
    "precision": (["build", "{tiny}", "--heads", "4", "--precision", "fp4"], "precision 'fp4' is not supported"),
    "backend": (["build", "{tiny}", "--backend", "abacus"], "backend 'abacus' is not known"),
    "no folder": (["build", "{tiny}", "-o", "no/where.sengine"], "the folder no does not exist"),
    "no engine": (["sample", "{junk}"], "is no engine file"),
    "n of 0": (["sample", "{engine}", "-n", "0"], "n = 0; expected a whole number of 1 or more"),
    "negative n": (["sample", "{engine}", "-n", "-3"], "n = -3; expected"),
    "labels for unconditional": (["sample", "{engine}", "--labels", "1"], "the model is unconditional"),
    "labels no class": (["sample", "{engine}", "--labels", "cat"], "'cat' is no class"),
    "labels uneven": (["sample", "{engine}", "-n", "5", "--labels", "0-1"], "do not fill 5 samples evenly"),
    "unwritable output": (["sample", "{engine}", "-o", "no/where.png"], "the folder no does not exist"),
    "inspect junk engine": (["inspect", "{junk_engine}"], "is no engine file"),
    "no such many samples": (["sample", "{engine}", "-n", "99999999999"], "the images that a seed has"),
    "no such many steps": (["sample", "{engine}", "--steps", "99999999999"], "expected at most 1000000"),
    "no such many labels": (["sample", "{engine}", "--labels", "9" * 24], "no model has so many"),
    "no such many threads": (["sample", "{engine}", "--threads", "1000000000"], "expected 1 to 4096"),
    "guidance": (["sample", "{engine}", "--guidance", "1e308"], "expected a finite number"),
    "tolerance": (["verify", "{engine}", "--against", "{tiny}", "--tolerance", "nan"], "expected a number above 0"),
    "an engine for a checkpoint": (["build", "{junk_engine}"], "is an engine; expected a checkpoint"),
    "output a pipe": (["build", "{tiny}", "--heads", "4", "-o", "{pipe}"], "is a device or a pipe"),
    "plot to a pipe": (["inspect", "{tiny}", "--heads", "4", "--plot", "{pipe}"], "is a device or a pipe"),
    "long name": (["sample", "{engine}", "-o", "x" * 300], "cannot be written"),
    "long file name": (["sample", "{engine}", "-o", "x" * 300 + ".png"], "cannot be written"),
    "seed of a calibration": (["calibrate", "{tiny}", "--heads", "4", "--seed", "-1"], "seed = -1; expected"),
    "batch of the grid": (["bench", "--compare-dense", "--batch", "9" * 30], "expected at most 65536"),
    "unknown option": (["build", "--fast"], "No such option"),
    "no number": (["sample", "{engine}", "-n", "nan"], "Invalid value for '-n' / '--count'"),
    "engine over a checkpoint": (["build", "{tiny}", "-o", "{junk}"], "what is written here ends in .sengine"),
    "calibration over a checkpoint": (["calibrate", "{tiny}", "-o", "{junk}"], "what is written here ends in .npz"),
    "plot over a checkpoint": (["inspect", "{tiny}", "--plot", "{junk}"], "ends in .png or .svg or .pdf"),
    "results over a checkpoint": (["bench", "--compare-dense", "-o", "{junk}"], "what is written here ends in .json"),
    "a folder for an engine": (["inspect", "{folder}"], "is a folder; expected a file"),
    "TensorRT's options for another": (
        ["build", "{tiny}", "--backend", "onnxruntime", "--linear", "gemm"],
        "options of the TensorRT backends are given, and the onnxruntime backend builds",
    ),
    "ranges of nothing": (["build", "{tiny}", "--ranges", "max"], "--ranges, --smooth, --keep-float"),
    "no fp8 here": (["build", "{tiny}", "--backend", "onnxruntime", "--precision", "fp8"], "'fp8' is not supported"),
    "masks of an engine": (["inspect", "{engine}", "--pattern", "1:4"], "its masks and its network are settled"),
    "check of a checkpoint": (["inspect", "{tiny}", "--check"], "--check is for an engine"),
    "masks for an engine's calibration": (["calibrate", "{engine}", "--sparse"], "is for a checkpoint"),
    "huge calibration": (["calibrate", "{tiny}", "--images", "9" * 20], "expected at most 100000 and 10000"),
    "cells of a model": (["bench", "--random", "uvit-s", "--cells", "patch=1"], "--cells goes with --compare-dense"),
    "batch of products": (["bench", "--kernels", "--batch", "4"], "--batch goes with --compare-dense or"),
    "two modes": (["bench", "--kernels", "--random", "uvit-s"], "found --random and --kernels"),
    "no mode": (["bench"], "found none"),
    "endless": (["bench", "--compare-dense", "--seconds", "inf"], "--seconds inf: expected more than 0, and 3600"),
    "huge repeats": (["bench", "--compare-dense", "--repeat", "9" * 12], "expected 1 to 1000"),
    "few samples": (["bench", "--checkpoint", "{tiny}", "--samples", "3"], "--samples 3: expected 16 to 1000000"),
    "report nowhere": (["bench", "--compare-dense", "--report", "no/where"], "--report no/where: the folder no does"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_two_lines_and_exit_2_and_leaves_nothing(
    case: str,
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    arguments, message = BAD_INPUT[case]
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "junk.pth").write_text("not a checkpoint " * 50)
    (inputs / "junk.sengine").write_text("not an engine " * 50)
    os.mkfifo(inputs / "pipe")
    (inputs / "folder.sengine").mkdir()
    names = {
        "folder": inputs / "folder.sengine",
        "junk": inputs / "junk.pth",
        "junk_engine": inputs / "junk.sengine",
        "pipe": inputs / "pipe",
        "tiny": tiny_checkpoint,
        "engine": tiny_engine,
    }
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    assert run([argument.format(**names) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.startswith("error: ")
    assert len(shown.err.strip().splitlines()) <= 2
    assert os.listdir(work) == []
    assert (inputs / "junk.pth").read_text() == "not a checkpoint " * 50


def dense_here(path: Path, *_: Any) -> dict[str, Any]:
    return {"layers": [{"name": "fc1", "masked": True, "chosen": False, "kernel": "dense"}]}


def refused(*_: Any) -> dict[str, Any]:
    raise BackendError("the runtime refuses it")


def interrupted(*_: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "report,code,message",
    [
        (dense_here, 2, "--require-sparse: 1 masked layers stay dense, such as fc1 (kernel dense)"),
        (refused, 1, "the runtime refuses it"),
        (interrupted, 130, "nothing half-written was left behind"),
    ],
)
@pytest.mark.parametrize("before", [None, b"an engine that is in use"])
def test_a_build_that_fails_at_its_end_leaves_what_was_there(
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    report: Any,
    code: int,
    message: str,
    before: bytes | None,
) -> None:
    engine = tmp_path / "x.sengine"
    if before is not None:
        engine.write_bytes(before)
    monkeypatch.setattr("sparse_engine.cli.build._report", report)
    given = ["--sparse", "--require-sparse", "--heads", "4", "-o", str(engine)]
    assert run(["build", str(tiny_checkpoint), *given]) == code
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"x.sengine": before} if before else {})


def test_a_build_replaces_what_was_there(tmp_path: Path, tiny_checkpoint: Path) -> None:
    engine = tmp_path / "x.sengine"
    engine.write_bytes(b"an older engine")
    options = ["--sparse", "--require-sparse", "--no-autotune"]  # dense may be faster in a layer of 32 channels
    assert run(["build", str(tiny_checkpoint), *options, "--heads", "4", "-o", str(engine)]) == 0
    assert os.listdir(tmp_path) == ["x.sengine"]
    assert EngineFile(engine).manifest.sparse


def test_a_plan_for_another_gpu_is_kept(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def misfit(path: Path, **_: Any) -> None:
        raise EngineFileError(f"{path} was built for compute capability 8.6; here is 9.0")

    monkeypatch.setattr(SparseEngine, "load", misfit)
    assert run(["build", str(tiny_checkpoint), "--heads", "4", "-o", str(tmp_path / "x.sengine")]) == 0
    said = capsys.readouterr().out
    assert "note: cannot run here: was built for compute capability 8.6; here is 9.0" in said
    assert os.listdir(tmp_path) == ["x.sengine"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    tmp_path.chmod(0o500)
    assert run(["build", str(tiny_checkpoint), "--heads", "4", "-o", str(tmp_path / "x.sengine")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = sparse_engine("--debug", "build", tmp_path / "nowhere.pth")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", ["build", "sample"])
@pytest.mark.parametrize("after", [0.6, 2.5])
def test_ctrl_c_leaves_nothing_behind(
    tmp_path: Path, tiny_checkpoint: Path, tiny_engine: Path, command: str, after: float
) -> None:
    arguments = {
        "build": ["build", tiny_checkpoint, "--heads", 4, "-o", tmp_path / "x.sengine"],
        "sample": ["sample", tiny_engine, "-n", 100000, "-o", tmp_path / "out"],
    }[command]
    launch = "from sparse_engine.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", launch, *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode == 130:
        assert "interrupted; nothing half-written was left behind" in said
        assert os.listdir(tmp_path) == []
    else:  # interrupted before the program had begun, or after it had ended
        assert after < 1 or process.returncode == 0, said
        assert os.listdir(tmp_path) in ([], ["x.sengine"])
