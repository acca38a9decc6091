"""Engine files timed against one another."""

import json
import sys
from pathlib import Path

import pytest

from sparse_engine.bench import engines
from sparse_engine.errors import OptionError


@pytest.fixture
def pair(tmp_path: Path, tiny_checkpoint: Path, tiny_engine: Path, build) -> tuple[Path, Path]:
    dense = build(tiny_checkpoint)
    sparse = tmp_path / "sparse.sengine"
    sparse.write_bytes(tiny_engine.read_bytes())
    return dense, sparse


def test_each_batch_has_times_and_ratios_over_the_first(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "results.json"
    arguments = [*map(str, pair), "--batch", "1,2", "--repeat", "1", "--seconds", "0.01", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["engines", *arguments])
    engines.main()
    results = json.loads(output.read_text())
    assert [row["batch"] for row in results["rows"]] == [1, 2]
    assert list(results["rows"][0]["speedups"]) == ["sparse"]
    assert sum(results["engines"]["sparse"]["kernels"].values()) == 16
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| | batch 1 | batch 2 |"
    assert table[2].startswith("| tiny | ")
    assert table[3].startswith("| sparse | ")


def test_engines_of_different_models(pair: tuple[Path, Path], conditional_engine: Path) -> None:
    with pytest.raises(OptionError, match="the engines were built from different checkpoints"):
        engines.time_engines([pair[0], conditional_engine], [1], threads=1, repeats=1, seconds=0.01)


def test_one_engine_is_not_enough(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["engines", str(pair[0])])
    with pytest.raises(SystemExit) as stopped:
        engines.main()
    assert stopped.value.code == 2
    assert "expected two or more files of different names" in capsys.readouterr().err
