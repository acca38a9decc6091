"""``sparse-engine bench`` end to end on a small cell, and its files."""

import json
from pathlib import Path

import pytest

from sparse_engine.bench.grid import PAPER, parse_cells
from sparse_engine.bench.report import markdown
from sparse_engine.bench.results_file import SCHEMA, read_results
from sparse_engine.cli.main import run
from sparse_engine.errors import InputError, OptionError

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
QUICK = ["--repeat", "2", "--seconds", "0.05"]


def test_a_cell_of_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "cell.json"
    assert run(["bench", "--compare-dense", "--cells", "patch=4,mlp=1", *QUICK, "-o", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "1.01" in shown  # the paper's, beside ours
    results = read_results(file)
    (cell,) = results["cells"]
    assert (cell["patch"], cell["mlp_ratio"]) == (4, 1)
    ratio = cell["speedup"]["dense"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert cell["relative_error"] < 1e-5
    assert sum(cell["kernels"].values()) == 12  # three blocks of four masked layers
    assert f"{ratio['median']:.2f} [" in markdown(results)


def test_own_checkpoint_against_other_runtimes(tmp_path: Path) -> None:
    file = tmp_path / "digits.json"
    command = ["bench", "--checkpoint", str(DIGITS / "sparsedm.pth"), "--batch", "2", "--peers", *QUICK]
    assert run([*command, "--threads", "1", "-o", str(file)]) == 0
    results = read_results(file)
    assert results["threads"] == 1
    assert results["versions"]["onnxruntime"]
    (row,) = results["rows"]
    assert {"2:4 sparse", "dense", "ONNX Runtime", "torch eager"} <= row["milliseconds"].keys()
    assert row["best_peer"] in row["milliseconds"]
    assert set(row["skipped"]) <= {"OpenVINO", "torch.compile"}


def test_the_whole_grid_by_default() -> None:
    assert set(parse_cells(None)) == set(PAPER)
    assert set(parse_cells("mlp=4")) == {(1, 4), (2, 4), (4, 4)}


@pytest.mark.parametrize("text", ["patch", "patch=x", "depth=3", "patch=3", "patch=1;mlp=4"])
def test_cells_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="--cells"):
        parse_cells(text)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "expected one of --compare-dense, --checkpoint FILE, --random PRESET, --kernels"),
        (["--compare-dense", "--preset", "huge"], "preset 'huge' is not known"),
        (["--compare-dense", "--repeat", "0"], "--repeat 0"),
        (["--checkpoint", "x.pth", "--batch", "many"], "--batch 'many': expected whole numbers"),
        (["--compare-dense", "-o", "no/where.json"], "the folder no does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"schema": "other/2"}))
    with pytest.raises(InputError, match=f"has schema 'other/2'; expected '{SCHEMA}'"):
        read_results(file)
    file.write_text("{")
    with pytest.raises(InputError, match="is no results file"):
        read_results(file)
