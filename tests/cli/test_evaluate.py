"""``sparse-engine evaluate``: a pruned model against its dense one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sparse_engine.cli.main import run
from sparse_engine.images import write_samples

DRAWN = ["-n", "20", "--steps", "4", "--threads", "1"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "real"
    write_samples(folder, [np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)])
    return folder


@pytest.fixture(scope="module")
def dense_engine(conditional_checkpoint: Path, build: object) -> Path:
    return build(conditional_checkpoint, null_class=4)  # type: ignore[operator]


def test_engines(
    conditional_engine: Path, dense_engine: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page, file = tmp_path / "page.html", tmp_path / "e.json"
    command = ["evaluate", str(conditional_engine), "--against", str(dense_engine), "--reference", str(reference)]
    assert run([*command, "--no-fid", *DRAWN, "--page", str(page), "-o", str(file)]) == 0
    said = capsys.readouterr().out
    assert "PSNR to the dense model's" in said
    assert "20 images of each seed, 4 steps of dpm-solver++; mean ± standard deviation over seeds 0, 1, 2." in said
    assert "LPIPS is left out: it needs torch-fidelity" in said
    results = json.loads(file.read_text())
    assert results["kind"] == "evaluation"
    assert results["candidate"]["masked_layers"] == 12
    assert results["dense"]["masked_layers"] == 0
    metrics = results["metrics"]
    assert metrics.keys() == {"psnr", "ssim", "frechet"}
    assert metrics["psnr"].keys() == {"tool", "candidate"}
    assert metrics["frechet"].keys() == {"tool", "candidate", "dense"}
    for row in (metrics["psnr"]["candidate"], metrics["frechet"]["dense"]):
        assert len(row["values"]) == 3
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["spread"] == pytest.approx(np.std(row["values"], ddof=1))
    text = page.read_text()
    pairs = text.count('<div class="pair">')
    assert pairs == 32  # the first sixteen, and the sixteen that differ most
    assert text.count('src="data:image/png;base64,') == 3 * pairs
    assert not re.search(r"<script|https?://", text)


def test_a_model_against_itself(dense_engine: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["evaluate", str(dense_engine), "--against", str(dense_engine), *DRAWN, "--seeds", "7", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["metrics"]["psnr"]["candidate"] == {"mean": 100.0, "spread": None, "values": [100.0]}
    assert results["metrics"]["ssim"]["candidate"]["mean"] == pytest.approx(1)
    assert "No reference pictures: distances to them are left out." in results["notes"]


def test_a_checkpoint_is_built_with_its_masks(
    conditional_checkpoint: Path, dense_engine: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["evaluate", str(conditional_checkpoint), "--against", str(dense_engine), "--heads", "4", *DRAWN]
    assert run([*command, "--null-class", "4", "--seeds", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidate"]["masked_layers"] == 12
    assert run([*command, "--null-class", "4", "--seeds", "0", "--json", "--no-sparse"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidate"]["masked_layers"] == 0
    assert found["metrics"]["psnr"]["candidate"]["mean"] > 90


def test_latents_have_no_pictures(latent_engine: Path, reference: Path, capsys: pytest.CaptureFixture) -> None:
    command = [
        "evaluate",
        str(latent_engine),
        "--against",
        str(latent_engine),
        "-n",
        "4",
        "--steps",
        "2",
        "--seeds",
        "0",
    ]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"].keys() == {"psnr"}
    assert run([*command, "--reference", str(reference)]) == 2
    assert "this is a latent model, whose samples have no pixels" in capsys.readouterr().err


WRONG = [
    (["--count", "1"], "--count = 1; expected a whole number of 2 or more"),
    (["--seeds", "a"], "--seeds 'a': expected whole numbers"),
    (["--seeds", "1,1"], "--seeds: found [1, 1]; expected one or more, each once"),
    (["--page", "x.txt"], "the name of what is written here ends in .html"),
    (["--output", "no/where.json"], "does not exist"),
    (["--reference", "no-folder"], "no-folder does not exist"),
    (["--labels", "9"], "label 9 is out of range; the model has classes 0 to 4"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=[given[0] + given[1] for given, _ in WRONG])
def test_wrong(dense_engine: Path, capsys: pytest.CaptureFixture, given: list[str], message: str) -> None:
    assert run(["evaluate", str(dense_engine), "--against", str(dense_engine), "--steps", "2", *given]) == 2
    assert message in capsys.readouterr().err


def test_two_that_draw_different_things(
    dense_engine: Path, latent_engine: Path, tiny_engine: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["evaluate", str(latent_engine), "--against", str(dense_engine), *DRAWN]) == 2
    assert "draws [4, 8, 8]" in capsys.readouterr().err
    assert run(["evaluate", str(tiny_engine), "--against", str(dense_engine), *DRAWN]) == 2
    assert "is told nothing" in capsys.readouterr().err


def test_the_digits_have_a_judge_of_their_own(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Their accuracy; and a distance to scikit-learn's digits, where no other pictures are given."""
    digits = Path(__file__).parents[2] / "examples" / "digits"
    pictures = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "noise.npz", images=pictures)
    command = ["evaluate", str(digits / "dense.pth"), "--against", str(digits / "dense.pth"), "--no-sparse", "--no-fid"]
    command += ["-n", "80", "--steps", "8", "--seeds", "0", "--threads", "1", "--json"]
    found = []
    for more in ([], ["--reference", str(tmp_path / "noise.npz")]):
        assert run([*command, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["metrics"])
    assert found[0].keys() == found[1].keys() == {"psnr", "ssim", "accuracy", "frechet"}
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["accuracy"]["dense"]["mean"] > 0.85
    assert found[0]["frechet"]["dense"]["mean"] < 5 < found[1]["frechet"]["dense"]["mean"]
    assert all(len(each["frechet"]["dense"]["values"]) == 1 for each in found)
