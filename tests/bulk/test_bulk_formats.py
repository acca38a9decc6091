"""What ``finish`` makes of the chunks, read by others."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_engine.bulk import Machines, Shard, finish, sample_many
from sparse_engine.bulk.job import Chunk
from sparse_engine.cli.main import run
from sparse_engine.errors import InputError, OptionError, OutputError

N = 25
OPTIONS = {"steps": 2, "chunk": 10, "labels": "balanced", "machines": Machines(threads=1), "format": None}


@pytest.fixture(scope="module")
def made(conditional_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bulk") / "out"
    sample_many(conditional_engine, out, N, **OPTIONS)
    finish(out)
    return out


@pytest.fixture(scope="module")
def images(made: Path) -> np.ndarray:
    parts = [np.load(path)["arr_0"] for path in sorted((made / "chunks").glob("*.npz"))]
    return np.concatenate(parts)


def test_npz_is_what_the_adm_evaluator_reads(made: Path, images: np.ndarray) -> None:
    with np.load(made / "samples.npz") as found:
        assert found.files == ["arr_0", "arr_1"]
        assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (N, 8, 8, 3))
        np.testing.assert_array_equal(found["arr_0"], images)
        np.testing.assert_array_equal(found["arr_1"], np.arange(N) % 4)


def test_pictures_lie_flat(made: Path, images: np.ndarray) -> None:
    folder = finish(made, "png")
    assert sorted(os.listdir(folder)) == [f"{i:06d}.png" for i in range(N)]
    for index, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"{index:06d}.png")), image)
    assert finish(made, "png") == folder  # once more: they are there
    (folder / "000003.png").unlink()
    with pytest.raises(OutputError, match="not an empty folder"):
        finish(made, "png")


def test_tars_are_webdatasets(made: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_engine.bulk.formats.IN_A_TAR", 10)
    folder = finish(made, "webdataset")
    assert sorted(os.listdir(folder)) == [f"samples-{i:06d}.tar" for i in range(3)]
    index = 0
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for png, label, about in zip(members[::3], members[1::3], members[2::3], strict=True):
                assert [each.name for each in (png, label, about)] == [
                    f"{index:06d}.{s}" for s in ("png", "cls", "json")
                ]
                read = [tar.extractfile(each).read() for each in (png, label, about)]
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(read[0]))), images[index])
                assert int(read[1]) == index % 4
                assert json.loads(read[2]) == {"index": index, "seed": 0, "label": index % 4}
                index += 1
    assert index == N


def test_parquet_has_images_as_structs(made: Path, images: np.ndarray) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(finish(made, "parquet"))
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == list(range(N))
    assert [row["label"] for row in rows] == [i % 4 for i in range(N)]
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))), image)


def test_missing_chunks_are_named(conditional_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    sample_many(conditional_engine, out, N, **OPTIONS, shard=Shard(1, 3))
    assert run(["sample-many", "finish", str(out)]) == 2
    said = capsys.readouterr().err
    assert "2 of 3 chunks are missing, images 0-9, 20-24" in said
    assert "again" in said
    assert not (out / "samples.npz").exists()


def test_a_damaged_chunk_is_named(conditional_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample_many(conditional_engine, out, N, **{**OPTIONS, "chunk": 25})
    path = out / "chunks" / f"{Chunk(0, 25).name}.npz"
    altered = bytearray(path.read_bytes())
    altered[4700] ^= 1  # in the pixels, far behind what is looked at to see whether it is there
    path.write_bytes(altered)
    with pytest.raises(InputError, match=f"{path.name} is damaged"):
        finish(out)
    assert not (out / "samples.npz").exists()


@pytest.mark.parametrize("format", ["png", "webdataset", "parquet"])
def test_latents_are_said_to_be_no_pictures_before_they_are_drawn(
    latent_engine: Path, tmp_path: Path, format: str
) -> None:
    with pytest.raises(OptionError, match=f"--format {format}: the images are latents"):
        sample_many(latent_engine, tmp_path / "out", 4, **{**OPTIONS, "format": format})
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_job(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["sample-many", "finish", str(tmp_path)]) == 2
    assert "job.json does not exist" in capsys.readouterr().err
