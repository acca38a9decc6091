"""The script for a GPU, rehearsed on a CPU: the same code at small sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.bench.gpu import __main__ as script
from sparse_engine.bench.gpu import ceilings, engines, ways, where
from sparse_engine.bench.gpu.session import GRID, UNFINISHED, Results, Session, failure
from sparse_engine.bench.gpu.table import section
from sparse_engine.bench.grid import PAPER
from sparse_engine.errors import OptionError, UnsupportedError
from sparse_engine.export.masks import magnitude_mask
from sparse_engine.sampling import VPLinear, make_trajectory

pytestmark = pytest.mark.usefixtures("one_torch_thread")
REHEARSE = ["--device", "cpu", "--rehearse", "--no-compile", "--here"]


def rehearse(folder: Path, steps: str, *options: str) -> int:
    return script.main([*REHEARSE, "--steps", steps, "-o", str(folder), *options])


def rows(folder: Path, step: str) -> list[dict[str, Any]]:
    results = json.loads((folder / "rehearsal" / f"rehearsal-cpu-{step}.json").read_text())
    assert results["rehearsal"] is True
    assert results["kind"] == "gpu"
    found: list[dict[str, Any]] = results["rows"]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1, 4 and 8."""
    folder = tmp_path_factory.mktemp("gpu")
    assert rehearse(folder, "1,4,8") == 0
    return folder


def test_ceilings(measured: Path) -> None:
    found = {row["name"]: row for row in rows(measured, "device")}
    assert found["copy"]["gigabytes_per_second"] > 0
    dense = found["fp16 dense"]
    assert dense["relative_error"] < 1e-2
    assert dense["tera_operations"] == pytest.approx(2 * 256**3 / dense["milliseconds"] / 1e9)
    assert found["fp16 cusparselt"]["failed"] == "ObstacleError: no CUDA: the engine runs on cpu"
    assert set(found["attention"]["milliseconds"]) == {"fused", "plain"}
    in_8_bits = {name: row for name, row in found.items() if name.endswith((" in int8", " in fp8"))}
    assert len(in_8_bits) == 8
    assert {(row["kernel"], row["why"]) for row in in_8_bits.values()} == {("dense", "no CUDA: the engine runs on cpu")}


def test_the_ways_are_checked_and_timed(measured: Path) -> None:
    (cell,) = rows(measured, "paper")
    assert (cell["patch"], cell["mlp_ratio"], cell["paper"]) == (4, 4, 0.98)
    assert set(cell["milliseconds"]) == {ways.OURS, ways.COMPILED, ways.EAGER}
    assert set(cell["speedups"]) == {ways.COMPILED, ways.EAGER}
    assert all(0 < error < 1e-2 for error in cell["parity"].values())
    assert "Could not run 'aten::_sparse_semi_structured_mm'" in cell["skipped"][ways.CUTLASS]
    assert "Only CUDA tensors are currently supported" in cell["skipped"][ways.CUSPARSELT]
    assert cell["steps_per_run"] == ways.MOST_STEPS
    assert {layer["why"] for layer in cell["layers"]} == {"no CUDA: the engine runs on cpu"}
    assert [tuple(layer["shape"]) for layer in cell["layers"]] == [(192, 64), (64, 64), (256, 64), (64, 256)]


def test_tables_for_the_readme(measured: Path, tmp_path: Path) -> None:
    file = measured / "rehearsal" / "rehearsal-cpu-paper.json"
    assert section(file.parent) == ""  # a rehearsal is no evidence
    (tmp_path / "gpu-a-gpu-paper.json").write_text(file.read_text())
    title, headers, rule, row = section(tmp_path).replace("\n\n", "\n").splitlines()
    assert "on one cpu" in title
    assert headers.startswith("| patch | mlp_ratio | dense, eager, ms |")
    assert headers.count("|") == rule.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    (cell,) = rows(measured, "paper")
    assert cells[:2] == ["4", "4"]
    assert cells[4] == cells[5] == cells[8] == cells[9] == "-"  # CUTLASS and cuSPARSELt did not run
    assert cells[6] == f"{cell['milliseconds'][ways.OURS]['median']:.2f}"
    assert cells[-1] == "0.98"


def test_where_the_time_goes(measured: Path) -> None:
    found = rows(measured, "where")
    assert [row["which"] for row in found] == ["slowest", "best"]
    for row in found:
        assert (
            row["layers"][0]["bounds"]["sparse"]["milliseconds"] < row["layers"][0]["bounds"]["dense"]["milliseconds"]
        )
        assert row[f"kernels of {ways.OURS}"]["milliseconds_of_a_step"] > 0


def test_whole_trajectories_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "PAPER_STEPS", 4)
    assert rehearse(tmp_path, "3") == 0
    found = rows(tmp_path, "uvit-s")
    assert [row["precision"] for row in found] == ["fp16", "bf16"]
    assert all(row["psnr"] > 30 for row in found)


def test_end_to_end(tmp_path: Path) -> None:
    assert rehearse(tmp_path, "7") == 0
    sparse, dense, *others = rows(tmp_path, "end-to-end")
    for row in (sparse, dense):
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds_of_all"])
        assert row["runtime"]["device"] == "cpu"
    assert {row["backend"] for row in others} == {"tensorrt", "tensorrt-rtx"}


def test_another_backends_engines_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of TensorRT: the torch backend, through the same code."""
    monkeypatch.setattr(engines, "RTX", "torch")
    monkeypatch.setattr(engines, "CAPABILITIES", (None,))
    assert rehearse(tmp_path, "5") == 0
    (row,) = rows(tmp_path, "tensorrt-rtx")
    assert row["sparse_parity"] < 1e-5
    assert row["sparse_psnr"] is None or row["sparse_psnr"] > 80  # both are in float32
    assert (row["sampler"], row["steps"]) == ("euler-ode", 48)
    for measured in (row["milliseconds"], row["eager_milliseconds"]):
        assert {kind: each["median"] > 0 for kind, each in measured.items()} == {"sparse": True, "dense": True}
    assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert set(row["sparse_kernels"].values()) == {"dense"}


def test_steps_are_timed_without_noise_and_one_by_one_where_asked() -> None:
    given: list[dict[str, Any]] = []
    runner = SimpleNamespace(records=None)
    engine: Any = SimpleNamespace(
        _runner=runner,
        manifest=SimpleNamespace(data_shape=(3, 8, 8)),
        sample=lambda n, **options: given.append({"n": n, "records": runner.records, **options}),
    )
    for recorded in (True, False):
        engines._stepping(engine, 2, 24, recorded=recorded)()
    assert [(call["n"], call["steps"], call["records"]) for call in given] == [(2, 24, True), (2, 24, False)]
    assert all(call["noise"].shape == (2, 3, 8, 8) for call in given)
    assert not make_trajectory(given[0]["sampler"], VPLinear(), 24).stochastic


def test_a_step_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert rehearse(tmp_path, "1", "--budget", "0") == 0
    assert not (tmp_path / "rehearsal").exists()
    results = session(tmp_path).results("x")
    with results.row(name="good") as row:
        row["value"] = 1
    with results.row(name="bad") as row:
        row["value"] = 2
        raise UnsupportedError("this GPU has no such unit", "another GPU")
    assert [row.get("failed") for row in rows(tmp_path, "x")] == [None, "this GPU has no such unit"]
    assert not dataclasses.replace(session(tmp_path), keep_failed=True).results("x").wants(name="bad")
    again = session(tmp_path).results("x")
    assert not again.wants(name="good")
    assert again.wants(name="bad")  # a failure may be mended
    with again.row(name="bad") as row:
        row["value"] = 3
    assert [(row["name"], row["value"]) for row in rows(tmp_path, "x")] == [("good", 1), ("bad", 3)]


def test_a_row_whose_process_dies_is_left_as_failed(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), session(tmp_path).results("x").row(name="slow"):
        raise KeyboardInterrupt
    assert rows(tmp_path, "x") == [{"name": "slow", "failed": UNFINISHED}]
    assert session(tmp_path).results("x").wants(name="slow")


def test_a_step_that_breaks_cuda_is_followed_by_another_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(session: Session, results: Results) -> None:
        with results.row(name="illegal"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for module in ("session", "__main__"):
        monkeypatch.setattr(f"sparse_engine.bench.gpu.{module}.has_broken_cuda", lambda error: True)
    monkeypatch.setitem(script.STEPS, 1, ("device", broken))
    with pytest.raises(SystemExit, match=str(script.BROKEN)):
        rehearse(tmp_path, "1")
    assert "illegal memory access" in rows(tmp_path, "device")[0]["failed"]

    commands: list[list[str]] = []
    codes = iter([-11, script.BROKEN, 0])

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(subprocess, "run", run)
    assert script.main([*REHEARSE[:-1], "--steps", "1", "-o", str(tmp_path)]) == 0
    assert ["--keep-failed" in command for command in commands] == [False, True, True]
    assert "step 1 ended with exit code -11" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code,output,rehearsed,message",
    [
        (1, "FAILED tests/a.py::b\n1 failed, 9 passed", False, "exit code 1: 1 failed, 9 passed; FAILED tests/a.py::b"),
        (5, "400 deselected in 0.10s", False, "exit code 5: 400 deselected"),
        (1, "No module named pytest", False, "exit code 1: No module named pytest"),
        (-11, "", False, "exit code -11: no output"),
        (0, "10 skipped, 400 deselected in 0.1s", False, "no test has passed: 10 skipped"),
        (0, "10 skipped, 400 deselected in 0.1s", True, None),
        (0, "9 passed, 1 skipped in 0.1s", False, None),
    ],
)
def test_tests_that_fail_fail_the_run_and_are_run_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    code: int,
    output: str,
    rehearsed: bool,
    message: str | None,
) -> None:
    here = dataclasses.replace(session(tmp_path), rehearsal=rehearsed)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, output))
    assert script.run_step(2, here) == (message is None)
    (row,) = json.loads(here.results("tests").path.read_text())["rows"]
    assert (row["exit_code"], row["output"]) == (code, output.splitlines())
    assert ("failed" in row) == (message is not None)
    assert here.results("tests").wants(name="tests") == (message is not None)
    assert (message or "") in capsys.readouterr().err


def test_tests_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        if "pytest" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", hang)
    assert rehearse(tmp_path, "2") == 1
    assert rows(tmp_path, "tests")[0]["failed"] == "the tests did not end within the budget of 240 s"


@pytest.mark.parametrize(
    "step,error,succeeds",
    [
        (4, ValueError("computes something else"), False),
        (4, UnsupportedError("this GPU has no such unit"), True),
        (1, ValueError("no kernel for this GPU"), True),  # what a GPU does not have is what step 1 asks
    ],
)
def test_a_row_that_failed_fails_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, error: Exception, succeeds: bool
) -> None:
    def measure(session: Session, results: Results) -> None:
        with results.row(name="good"):
            pass
        with results.row(name="bad"):
            raise error

    monkeypatch.setitem(script.STEPS, step, (script.STEPS[step][0], measure))
    assert rehearse(tmp_path, str(step)) == (0 if succeeds else 1)


def test_a_step_of_which_nothing_could_be_measured_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(session: Session, results: Results) -> None:
        with results.row(name="copy"):
            raise ValueError("out of order")

    monkeypatch.setitem(script.STEPS, 1, ("device", measure))
    assert rehearse(tmp_path, "1") == 1


def test_rows_that_were_not_begun_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert rehearse(tmp_path, "1", "--budget", "0") == 0
    assert f"{10 + len(ceilings.PRODUCTS)} more were not begun within the budget" in capsys.readouterr().err


def test_a_file_that_is_not_the_scripts_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = session(tmp_path).results("device").path
    path.parent.mkdir()
    path.write_text(json.dumps({"schema": "sparse-engine-bench/2", "kind": "model", "rows": []}))
    assert rehearse(tmp_path, "1") == 1
    assert "holds no results of this script" in capsys.readouterr().err
    assert json.loads(path.read_text())["kind"] == "model"


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(session: Session, results: Results) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(script.STEPS, 1, ("device", interrupt))
    assert rehearse(tmp_path, "1") == 130
    assert "what was measured is kept" in capsys.readouterr().err


def session(folder: Path) -> Session:
    return Session(torch.device("cpu"), True, folder / "rehearsal", 60.0, False, "a command")


def test_a_step_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert rehearse(tmp_path, "8") == 1
    assert "step 8, where: RuntimeError: no cell has been measured yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--device", "cpu"], "there is no GPU to measure"),
        (["--device", "cpu", "--steps", "9"], "--steps '9': expected some of 1 to 8"),
        (["--device", "cpu", "--steps", "all"], "--steps 'all'"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--device", "cpu", "--rehearse", "--budget", "nan"], "--budget nan: expected seconds"),
        (["--device", "cpu", "--rehearse", "--budget", "inf"], "--budget inf: expected seconds"),
        (["--device", "cpu", "--rehearse", "--budget", "-1"], "--budget -1.0: expected seconds"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert script.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_measured_is_cut_short() -> None:
    assert failure(OptionError("what", "fix")) == "what"
    assert failure(ValueError("x" * 1000)) == f"ValueError: {'x' * 288}..."


def test_the_grid_is_the_papers() -> None:
    assert set(GRID) == set(PAPER)
    assert len(GRID) == len(PAPER)


def test_masks_on_the_device_are_sparsedms() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    mask, _ = magnitude_mask(weight.numpy())
    assert np.array_equal(ceilings.keep_two_of_four(weight).numpy(), np.where(mask, weight.numpy(), 0))


@pytest.mark.parametrize(
    "tokens,by,dense,sparse",
    [(8192, "arithmetic", 2 * 8192 * 4096 * 4096 / 1e14, 8192 * 4096 * 4096 / 1e14), (1, "memory", 3.357e-5, 1.889e-5)],
)
def test_a_layers_bound(tokens: int, by: str, dense: float, sparse: float) -> None:
    timed = {str(tokens): {"milliseconds": {"dense": 4e3 * dense, "cusparselt 3 1 -1": 2e3 * sparse}}}
    layer = {"shape": [4096, 4096], "tokens": tokens, "timed_by_tokens": timed}
    found = where.layer_against_bound(layer, (1e14, 1e12))
    assert found["bounds"]["dense"]["by"] == found["bounds"]["sparse"]["by"] == by
    assert found["bounds"]["dense"]["milliseconds"] == pytest.approx(1e3 * dense, rel=1e-3)
    assert found["bounds"]["sparse"]["milliseconds"] == pytest.approx(1e3 * sparse, rel=1e-3)
    assert found["of_bound"] == pytest.approx({"dense": 0.25, "cusparselt 3 1 -1": 0.5}, rel=1e-3)


def test_an_arm_repeats_its_steps(tmp_path: Path) -> None:
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return 2 * x

    network = Counting()
    arm = ways.Arm(network, session(tmp_path), torch.ones(2, 3, 4, 4), 3, compiled=False, recorded=True)
    assert torch.equal(arm.prediction(), 2 * torch.ones(2, 3, 4, 4))
    arm()
    assert network.calls == 1 + 3
    assert arm.how() == {"compiler": "none", "recorded": "no CUDA graphs on the CPU"}


@pytest.mark.parametrize("works", [True, False])
def test_the_outputs_that_are_compared_are_of_the_recorded_steps(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are those that are timed; before them the same steps have run unrecorded."""

    class Replayed:
        def __init__(self, work: Callable[[], None]) -> None:
            self.launch = work if works else lambda: None

    monkeypatch.setattr(TorchDevice, "capture", lambda self, work: Replayed(work))
    x = torch.ones(2, 3, 4, 4)
    arm = ways.Arm(Doubling(), session(tmp_path), x, 1, compiled=False, recorded=True)
    found = arm.prediction()
    assert torch.equal(found, 2 * x) if works else found.isnan().all()


@pytest.mark.parametrize("patch,mlp_ratio,steps", [(4, 1, 4), (2, 1, 1), (1, 8, 1)])
def test_a_run_is_about_as_long_in_any_cell(patch: int, mlp_ratio: int, steps: int) -> None:
    """By arithmetic: 5.6, 21 and 293 ms a step at 600 TFLOP/s."""
    tokens = 64 * (1 + (32 // patch) ** 2)
    assert ways.steps_of_a_run(tokens * 8192**2 * (4 + 2 * mlp_ratio)) == steps


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_results_of_another_device_are_another_file(tmp_path: Path) -> None:
    assert isinstance(session(tmp_path).results("device"), Results)
    assert session(tmp_path).results("device").path.name == "rehearsal-cpu-device.json"
