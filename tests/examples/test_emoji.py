"""The emoji: the archive is made of what the package holds, and the shipped models draw them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_engine import SparseEngine
from sparse_engine.bench.quality import frechet_distance
from sparse_engine.export.bake import bake
from sparse_engine.export.model import load_model
from tests.conftest import build_with
from tests.examples.test_digits import script

FOLDER = Path(__file__).parents[2] / "examples" / "emoji"


def package(path: Path) -> Path:
    """An archive as npm leaves it, of three emoji of 64x64, one of which Google has not drawn."""
    rows = [
        {"name": "RED", "image": "a.png", "subcategory": "colour", "sort_order": 2, "has_img_google": True},
        {"name": "HALF", "image": "b.png", "subcategory": "shape", "sort_order": 1, "has_img_google": True},
        {"name": "MISSING", "image": "c.png", "subcategory": "none", "sort_order": 0, "has_img_google": False},
    ]
    red, half = np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 4), np.uint8)
    red[...] = (255, 0, 0, 255)
    half[:, ::2] = (0, 0, 0, 255)  # black and transparent columns in turn
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for name, pixels in (("a", red), ("b", half)):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            add(f"img/google/64/{name}.png", stream.getvalue())
        add("emoji.json", json.dumps(rows).encode())
    return path


def test_the_archive_is_made_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = script("make_data", FOLDER)
    monkeypatch.setattr("sys.argv", ["make_data.py", str(package(tmp_path / "p.tgz")), "--out", str(tmp_path)])
    made.main()
    held, names = np.load(tmp_path / "emoji.npz"), json.loads((tmp_path / "emoji.json").read_text())
    assert names == {"groups": ["shape", "colour"], "names": ["half", "red"]}
    assert held["labels"].tolist() == [0, 1]
    assert held["images"].shape == (2, 32, 32, 3)
    assert np.unique(held["images"][0]).tolist() == [128]  # black on white, halved
    assert (held["images"][1] == (255, 0, 0)).all()


def test_what_is_shipped_is_the_whole_set() -> None:
    held, names = np.load(FOLDER / "emoji.npz"), json.loads((FOLDER / "emoji.json").read_text())
    assert held["images"].shape == (1911, 32, 32, 3)
    assert len(names["names"]) == 1911
    assert set(held["labels"].tolist()) == set(range(len(names["groups"]))) == set(range(99))
    assert names["groups"][held["labels"][names["names"].index("grinning face")]] == "face-smiling"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Two pictures of each group by the dense model, the 2:4 one, and the dense one pruned by magnitude."""
    folder, labels = tmp_path_factory.mktemp("emoji"), np.repeat(np.arange(99), 2)
    pictures = {}
    for name, model, sparse in (("dense", "dense", False), ("sparse", "sparse", True), ("one shot", "dense", True)):
        path, _ = build_with(FOLDER / f"{model}.pth", folder / f"{name}.sengine", sparse=sparse)
        with SparseEngine.load(path) as engine:
            pictures[name] = engine.sample(
                len(labels), labels=labels, steps=12, sampler="dpm-solver++", batch_size=66, output="float"
            ).clip(-1, 1)
    return pictures


def test_the_sparse_model_draws_what_the_dense_one_draws(drawn: dict[str, np.ndarray]) -> None:
    real = np.load(FOLDER / "emoji.npz")["images"].transpose(0, 3, 1, 2) / 127.5 - 1
    distance = {name: frechet_distance(each, real) for name, each in drawn.items()}
    assert distance["sparse"] < 1.2 * distance["dense"]
    assert distance["one shot"] > 1.5 * distance["dense"]
    apart = np.square(drawn["sparse"] - drawn["dense"]).mean()
    assert apart < 0.25 * np.square(drawn["one shot"] - drawn["dense"]).mean()


def test_the_sparse_model_was_trained_under_its_mask() -> None:
    layers = [layer for layer in bake(load_model(FOLDER / "sparse.pth")).layers if layer.masked]
    assert len(layers) == 28
    assert max(layer.energy_removed for layer in layers) < 0.05
