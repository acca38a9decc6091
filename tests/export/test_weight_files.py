"""One file, a folder or shards; links, and paths that cannot be read."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_engine.cli.main import run
from sparse_engine.errors import CheckpointError
from sparse_engine.export.build import default_output
from sparse_engine.export.checkpoint import load_checkpoint
from sparse_engine.export.model import load_model
from tests.conftest import TINY, random_state, save_checkpoint

STATE = {"a.weight": torch.randn(4, 8), "a.bias": torch.randn(4), "b.weight": torch.randn(2, 4)}


def write_shards(folder: Path, stem: str, suffix: str, state: Mapping[str, Tensor], count: int = 3) -> Path:
    """Shards and their index, as the Hub's libraries write them."""
    where = {}
    for number in range(1, count + 1):
        name = f"{stem}-{number:05d}-of-{count:05d}{suffix}"
        part = dict(list(state.items())[number - 1 :: count])
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_through_their_index_or_folder(tmp_path: Path, suffix: str) -> None:
    index = write_shards(tmp_path, "model", suffix, random_state(TINY))
    (tmp_path / "config.json").write_text('{"heads": 4}')
    for path in (index, tmp_path):
        model = load_model(path)
        assert model.checkpoint.path == index
        assert all(np.array_equal(model.checkpoint.state[name], t) for name, t in random_state(TINY).items())
        assert model.notes[0] == f"3 shards listed by {index.name}"
    variant = index.rename(index.with_name(f"model{suffix}.index.fp16.json"))
    assert load_model(tmp_path).checkpoint.path == variant


def test_the_hash_of_shards_is_of_all_of_them(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", ".safetensors", STATE)
    before = load_checkpoint(index).sha256
    assert load_checkpoint(index).sha256 == before
    last = tmp_path / "model-00003-of-00003.safetensors"
    save_file({"b.weight": STATE["b.weight"] + 1}, last)
    assert load_checkpoint(index).sha256 != before


def test_a_lone_shard_is_refused_naming_its_siblings(tmp_path: Path) -> None:
    index = write_shards(tmp_path, "model", ".safetensors", STATE)
    lone = tmp_path / "model-00002-of-00003.safetensors"
    siblings = (
        r"is one of 3 shards; the others are model-00001-of-00003\.safetensors, model-00003-of-00003\.safetensors"
    )
    with pytest.raises(CheckpointError, match=rf"{siblings}\n.*name {index}"):
        load_checkpoint(lone)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"put the others and model\.safetensors\.index\.json beside it"):
        load_checkpoint(lone)
    whole = tmp_path / "other-00001-of-00001.safetensors"
    save_file(STATE, whole)
    assert load_checkpoint(whole).state.keys() == STATE.keys()


@pytest.mark.parametrize(
    "content,message",
    [
        (
            {"weight_map": {"a": "model-00004-of-00004.safetensors"}},
            "lists 1 files that are not beside it: model-00004",
        ),
        (
            {"weight_map": {"a": "../x.safetensors"}},
            r"lists '\.\./x\.safetensors'; expected the name of a file beside it",
        ),
        ({"weight_map": {}}, 'has no "weight_map"'),
        ({"weight_map": {"a": 3}}, 'has no "weight_map"'),
        ({"weight_map": {"a": "n" * 300}}, "lists 1 files that are not beside it"),
        (
            {"weight_map": {"zz": "model-00001-of-00003.safetensors"}},
            "lacks 1 tensors that its index lists, such as zz",
        ),
        (
            {"weight_map": {"a.weight": "all.safetensors"}},
            r"holds 2 tensors that its index does not list, such as a\.bias",
        ),
        ([], "holds a list"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, content: object, message: str) -> None:
    index = write_shards(tmp_path, "model", ".safetensors", STATE)
    save_file(STATE, tmp_path / "all.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(index)


def test_folders(tmp_path: Path) -> None:
    hub, several, parts = tmp_path / "hub", tmp_path / "several", tmp_path / "parts"
    for folder in (hub, several, parts):
        folder.mkdir()
    save_file(STATE, hub / "diffusion_pytorch_model.safetensors")
    assert load_checkpoint(hub).state.keys() == STATE.keys()
    write_shards(several, "model", ".safetensors", STATE)
    write_shards(several, "model.fp16", ".safetensors", STATE)
    with pytest.raises(CheckpointError, match=r"holds model\.fp16.* and model\.safetensors\.index\.json"):
        load_checkpoint(several)
    (parts / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"torch\.distributed in parts\n.*dcp_to_torch"):
        load_checkpoint(parts)


def test_the_newest_whole_checkpoint_of_a_training(tmp_path: Path) -> None:
    """SparseDM's and U-ViT's ``ckpts/`` hold them so, too; numbers, not names, are in order."""
    for number in ("500", "20000", "3000"):
        (tmp_path / f"{number}.ckpt").mkdir()
        torch.save({**STATE, "a.bias": torch.full((4,), float(number))}, tmp_path / f"{number}.ckpt" / "nnet_ema.pth")
    (tmp_path / "90000.ckpt").mkdir()  # one that was being deleted
    (tmp_path / "config.json").write_text("{}")
    found = load_checkpoint(tmp_path)
    assert found.state["a.bias"][0] == 20000
    assert f"20000.ckpt of {tmp_path.name}: the newest of 3" in found.notes


def test_raw_weights_that_are_named_while_averaged_ones_lie_beside_them(tmp_path: Path) -> None:
    for name in ("nnet.pth", "nnet_ema.pth"):
        torch.save(STATE, tmp_path / name)
    assert "the averaged ones are in nnet_ema.pth" in load_checkpoint(tmp_path / "nnet.pth").notes[0]
    assert load_checkpoint(tmp_path / "nnet_ema.pth").notes == []


def test_an_engine_is_named_after_the_link_and_configured_beside_it(tmp_path: Path) -> None:
    """The Hub's cache: snapshots/REVISION/model.pth leads to blobs/HASH, and so does its configuration."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_checkpoint(blobs / "c0ffee", TINY)
    (blobs / "beef").write_text('{"heads": 8}')
    (blobs / "config.json").write_text('{"heads": 2}')
    link = snapshot / "model.pth"
    link.symlink_to(Path("../../blobs/c0ffee"))
    assert load_model(link).config.heads == 2  # beside the file that the link leads to
    (snapshot / "config.json").symlink_to(Path("../../blobs/beef"))
    assert load_model(link).config.heads == 8
    assert default_output(link) == Path("model.sengine")


@pytest.mark.parametrize(
    "path,name",
    [
        ("a/model.safetensors.index.json", "model.sengine"),
        ("a/model.safetensors.index.fp16.json", "model.sengine"),
        ("a/model.v2.pth", "model.v2.sengine"),
        ("500000.ckpt/", "500000.sengine"),
        ("a/b/..", "a.sengine"),
    ],
)
def test_default_output(path: str, name: str) -> None:
    assert default_output(Path(path)) == Path(name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "c0ffee")
    assert load_checkpoint(tmp_path / "c0ffee").state.keys() == STATE.keys()
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program, not weights"):
        load_checkpoint(tmp_path / "program.pt")


def test_paths_that_cannot_be_read_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dangling.pth").symlink_to("gone.pth")
    (tmp_path / "circle.pth").symlink_to("circle.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    for name, message in {
        "n" * 300: "cannot be looked at: File name too long",
        "circle.pth": "cannot be looked at: Too many levels of symbolic links",
        "dangling.pth": "is a link to gone.pth, which does not exist",
        "pipe.pth": "is a device or a pipe; expected a file",
        "gone.pth": "does not exist",
    }.items():
        assert run(["inspect", str(tmp_path / name)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[0]
        assert len(lines) == 2


def test_a_path_that_is_none() -> None:
    with pytest.raises(CheckpointError, match="is no path: embedded null"):
        load_checkpoint("no\0name")


def test_a_folder_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be looked at: Permission denied"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_may_not_be_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pth"
    torch.save(STATE, path) if kind == "file" else path.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may read everything
    with pytest.raises(CheckpointError, match=r"x\.pth may not be read"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "x.json"])
@pytest.mark.parametrize(
    "kind,message",
    [("folder", "is a folder; expected a file"), ("dangling", "which does not exist"), ("deep", "is not JSON")],
)
def test_a_configuration_that_cannot_be_read(tmp_path: Path, name: str, kind: str, message: str) -> None:
    torch.save(STATE, tmp_path / "x.pth")
    config = tmp_path / name
    if kind == "folder":
        config.mkdir()
    elif kind == "dangling":
        config.symlink_to("gone.json")
    else:
        config.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        load_checkpoint(tmp_path / "x.pth")
