"""The table of the ways to a 2:4 model: it measures what it has made, goes on with its rows, and is what pages show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.examples.test_digits import DIGITS, script

EXAMPLES = DIGITS.parent
RESULTS = sorted(EXAMPLES.glob("*/pruning.json"))


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict:
    """The table of one way, 20 samples a seed, kept in a folder of its own."""
    pruning = script("pruning", EXAMPLES)
    monkeypatch.setattr(pruning, "WAYS", {"digits": [pruning.Way("wanda", 1)]})
    monkeypatch.setattr(pruning, "RESULTS", folder / "pruning.json")
    monkeypatch.setattr(pruning, "SHOWN_IN", {"digits": [folder / "page.md"]})
    monkeypatch.setattr(sys, "argv", ["pruning.py", "digits", "--each", "2", "--write", *arguments])
    pruning.main()
    return json.loads((folder / "pruning.json").read_text())


def test_each_way_is_gone_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, one_torch_thread: None
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: pruning.py digits --write -->\nold\n<!-- end of table -->\nafter\n")
    results = run(monkeypatch, tmp_path, "--runs", str(tmp_path / "runs"))
    dense, trained = results["models"]
    assert [row["model"] for row in results["models"]] == ["dense", "wanda + 1 steps, teacher"]
    assert "psnr" not in dense
    assert "seconds" not in dense
    assert np.mean(trained["frechet"]) > np.mean(dense["frechet"])
    assert all(len(trained[name]) == 3 for name in ("frechet", "accuracy", "psnr"))
    assert (tmp_path / "runs" / "wanda+1steps,teacher" / "000001.ckpt").is_dir()
    text = page.read_text()
    assert text.startswith("before\n<!-- table: pruning.py digits --write -->\n| model | Fréchet | accuracy |")
    assert text.endswith("<!-- end of table -->\nafter\n")

    again = run(monkeypatch, tmp_path, "--runs", str(tmp_path / "other"))
    assert again["models"] == results["models"]
    assert not list((tmp_path / "other").glob("wanda*"))  # it was not gone again


@pytest.mark.parametrize("file", RESULTS, ids=[file.parent.name for file in RESULTS])
def test_pages_show_the_results_files(file: Path) -> None:
    pruning = script("pruning", EXAMPLES)
    results, name = json.loads(file.read_text()), file.parent.name
    shown = f"{pruning.begin(name)}\n{pruning.table(results)}\n"
    for document in pruning.SHOWN_IN[name]:
        assert shown in document.read_text(), document
    rows = {row["model"]: row for row in results["models"]}
    assert list(rows) == ["dense", *(way.name for way in pruning.WAYS[name])]
    distance = {model: np.mean(row["frechet"]) for model, row in rows.items()}
    methods = [distance[each] for each in ("full", "sparsegpt", "wanda")]
    assert methods == sorted(methods)
    assert distance["dense"] < distance["sparsegpt"]
