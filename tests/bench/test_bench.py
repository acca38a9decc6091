"""``sparse-engine bench`` end to end on small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_engine.bench import run as bench_run
from sparse_engine.bench.arms import DENSE, SPARSE
from sparse_engine.bench.presets import PRESETS, Preset
from sparse_engine.bench.results_file import read_results
from sparse_engine.cli.main import run
from tests.bench.conftest import DIGITS, QUICK


def test_a_cell_of_the_grid(grid_results: dict[str, Any]) -> None:
    (cell,) = grid_results["cells"]
    assert (cell["patch"], cell["mlp_ratio"], cell["batch"]) == (4, 1, 4)
    ratio = cell["speedup"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert ratio == cell["speedups"][DENSE]
    assert cell["relative_error"] < 1e-5
    assert sum(cell["kernels"].values()) == 12  # three blocks of four masked layers
    assert cell["candidates"][SPARSE] == {"backend": "onnxruntime", "precision": "fp32", "device": "cpu"}
    assert len(cell["runs_milliseconds"][SPARSE]) == cell["rounds"][0] == 2


def test_what_stands_beside_a_ratio(grid_results: dict[str, Any]) -> None:
    (cell,) = grid_results["cells"]
    step = cell["milliseconds"][SPARSE]
    assert step["p5"] <= step["median"] <= step["p95"] <= step["p99"]
    assert cell["gflops"][SPARSE] == pytest.approx(cell["gflop"] / step["median"] * 1e3)
    assert cell["gflop"] > 2 * 4 * cell["model"]["macs"] / 1e9  # the linears of four samples, and attention
    assert 0.3 < cell["amdahl"]["share"] < 1
    assert cell["amdahl"]["limit"] == pytest.approx(1 / (1 - cell["amdahl"]["share"] / 2))
    assert {entry["name"] for entry in cell["layers"][SPARSE]} > {"mid_block.mlp.fc1", "out_blocks.0.skip_linear"}
    assert cell["noise"]["drift"] >= 1
    weights = 20.0  # MiB of 5.3 M parameters in float32
    assert weights < cell["peak_memory_mib"][DENSE]["host"] < 8 * weights


def test_a_whole_sample(grid_results: dict[str, Any]) -> None:
    (cell,) = grid_results["cells"]
    whole = cell["end_to_end"]
    assert (whole["steps"], whole["sampler"]) == (2, "euler-sde")
    assert whole["milliseconds"][DENSE]["median"] > cell["milliseconds"][DENSE]["median"]
    assert whole["images_per_second"][DENSE] == pytest.approx(4e3 / whole["milliseconds"][DENSE]["median"])


def test_own_checkpoint_against_other_runtimes(digits_results: dict[str, Any]) -> None:
    assert digits_results["threads"] == 1
    assert digits_results["versions"]["onnxruntime"]
    (row,) = digits_results["rows"]
    assert {SPARSE, DENSE, f"{SPARSE} (torch)", "ONNX Runtime", "torch eager"} <= row["milliseconds"].keys()
    assert row["candidates"]["torch eager, bf16"]["precision"] == "bf16"  # the one it is best at, beside ours
    assert row["candidates"][row["best_peer"]]["precision"] == "fp32"
    assert row["best_peer_in_any_precision"] in row["speedups"]
    assert row["plain_onnxruntime"] == "ONNX Runtime"


def test_peers_that_are_not_timed(digits_results: dict[str, Any]) -> None:
    (row,) = digits_results["rows"]
    assert "computes something else: relative error 1" in row["skipped"]["wrong"]
    assert row["skipped"]["broken"] == "failed: RuntimeError: out of luck"
    assert row["skipped"]["absent"] == "not installed"
    assert not {"wrong", "broken", "absent"} & row["milliseconds"].keys()


def test_quality_of_a_trained_model(digits_results: dict[str, Any]) -> None:
    quality = digits_results["rows"][-1]["quality"]
    assert quality["images"] == 100
    rows = quality["rows"]
    assert rows["torch fp32"]["psnr"] is None  # the reference itself
    for name in (SPARSE, DENSE, "ONNX Runtime", f"{SPARSE} (torch)"):
        assert rows[name]["psnr"] is None or rows[name]["psnr"] > 80
        assert rows[name]["accuracy"] > 0.9
        assert rows[name]["frechet"] < 2.5
    assert rows["torch eager, bf16"]["psnr"] < rows[SPARSE]["psnr"]


def test_self_test(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", Preset(embed_dim=64, depth=2, heads=4, batch=2))
    file = tmp_path / "self.json"
    code = run(["bench", "--self-test", "--cells", "patch=4,mlp=1", *QUICK, "-o", str(file)])
    shown = capsys.readouterr().out
    (cell,) = read_results(file)["cells"]
    assert "amdahl" not in cell
    assert cell["kernels"] == {"dense": 12}
    assert code == 0  # one cell may miss 1.00
    assert "1 may miss it" in shown


def test_a_cell_that_cannot_be_built_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """patch 1 does not fit into the memory that is left; what is measured of patch 4 is not the point here."""

    def measured(*arguments: Any) -> Any:
        yield {"speedup": {"median": 1.0, "low": 0.9, "high": 1.1, "tie": True}}

    monkeypatch.setattr("sparse_engine.bench.grid.compare_model", measured)
    monkeypatch.setattr("sparse_engine.bench.grid.available_bytes", lambda: 640 * 2**20)
    results: dict[str, Any] = {}
    bench_run.run_grid(results, "quick", "mlp=8", bench_run.Settings(), lambda done: None, lambda stage: None)
    by_patch = {cell["patch"]: cell for cell in results["cells"]}
    assert "needs about" in by_patch[1]["failed"]
    assert "speedup" in by_patch[4]
    bench_run.run_grid(results, "quick", "mlp=8", bench_run.Settings(), lambda done: None, lambda stage: None, heads=7)
    assert {cell["failed"] for cell in results["cells"]} == {"heads = 7 does not divide embed_dim = 512"}


def test_a_run_that_measured_nothing_fails(capsys: pytest.CaptureFixture) -> None:
    assert run(["bench", "--compare-dense", "--cells", "patch=4,mlp=1", "--heads", "7"]) == 1
    assert "heads = 7 does not divide embed_dim = 512" in capsys.readouterr().out


def test_an_interrupt_keeps_the_finished_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid_results: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    cells: list[Any] = [grid_results["cells"][0], grid_results["cells"][0]]

    def run_cell(*arguments: Any) -> Any:
        if not cells:
            raise KeyboardInterrupt
        return cells.pop()

    monkeypatch.setattr(bench_run, "run_cell", run_cell)
    file = tmp_path / "cut.json"
    assert run(["bench", "--compare-dense", "-o", str(file)]) == 130
    assert "Interrupted: what was finished is above." in capsys.readouterr().out
    results = read_results(file)
    assert len(results["cells"]) == 2
    assert results["interrupted"]
    file.unlink()
    assert run(["bench", "--compare-dense", "-o", str(file)]) == 130  # nothing was finished
    assert not file.exists()


def test_an_earlier_run_is_shown_and_compared(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, shown: Callable[[], str]
) -> None:
    results = json.loads(grid_file.read_text())
    for times in results["cells"][0]["milliseconds"].values():
        times["median"] /= 2
    faster = tmp_path / "faster.json"
    faster.write_text(json.dumps(results))
    show = ["bench", "--results", str(grid_file), "--profile"]
    assert run(show) == 0
    assert "mid_block.mlp.fc1" in shown()
    assert run([*show, "--compare-to", str(grid_file)]) == 0
    assert run([*show, "--compare-to", str(faster)]) == 1
    assert "slower by more than 10%: patch 4, mlp_ratio 1" in capsys.readouterr().err
    assert run([*show, "--compare-to", str(faster), "--max-loss", "1.1"]) == 0


@pytest.fixture
def shown(capsys: pytest.CaptureFixture) -> Callable[[], str]:
    return lambda: str(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "expected one of --compare-dense, --checkpoint, --random, --pipeline, --kernels, --results; found none"),
        (["--compare-dense", "--preset", "huge"], "preset 'huge' is not known"),
        (["--compare-dense", "--cells", "patch=3"], "--cells 'patch=3' is outside the grid"),
        (["--compare-dense", "--threads", "0"], "--threads 0: expected 1 to 4096"),
        (["--compare-dense", "--repeat", "0"], "--repeat 0: expected 1 to 1000"),
        (["--compare-dense", "--seconds", "0"], "--seconds 0.0: expected more than 0"),
        (["--compare-dense", "--max-loss", "-1"], "--max-loss -1.0: expected 0 or more"),
        (["--compare-dense", "--precision", "fp64"], "--precision 'fp64': expected one of fp32"),
        (["--compare-dense", "--quality", "."], "--quality goes with --checkpoint"),
        (["--kernels", "--precision", "fp16"], "the CPU kernels compute in fp32, bf16 or int8"),
        (["--checkpoint", str(DIGITS / "sparsedm.pth"), "--batch", "many"], "--batch 'many': expected whole numbers"),
        (["--checkpoint", "no.pth"], "no.pth"),
        (["--checkpoint", str(DIGITS / "sparsedm.pth"), "--quality", "no"], "no does not exist"),
        (["--checkpoint", str(DIGITS / "sparsedm.pth"), "--backend", "magic"], "backend 'magic' is not known"),
        (["--compare-dense", "-o", "no/where.json"], "the folder no does not exist"),
        (["--compare-dense", "--report", __file__], "is a file; expected a folder"),
        (["--results", str(DIGITS.parents[1] / "bench/results/engines-uvit-s-int8.json")], "of the kind 'engines'"),
        (["--compare-dense", "--compare-to", "no.json"], "no.json does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
