"""Runs: what is left behind, going on after a stop or a kill, and what is refused."""

from __future__ import annotations

import errno
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

from sparse_engine.errors import CheckpointError, MissingDependencyError, OptionError, OutputError, TrainingError
from sparse_engine.export.bake import bake
from sparse_engine.export.masks import Pattern
from sparse_engine.export.model import load_model
from sparse_engine.export.options import ModelOptions
from sparse_engine.pruning import run_folder
from sparse_engine.pruning.settings import RANDOM
from tests.finetuning.conftest import Train

FILES = ("nnet_ema.pth", "nnet.pth", "optimizer.pth")


def held(folder: Path) -> dict[str, Any]:
    return {name: torch.load(folder / name, weights_only=True) for name in FILES}


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit, whatever it is nested in."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for each, other in zip(a, b, strict=True):
            assert_same(each, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def without_pace(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in entries]


def test_a_run_leaves_a_folder_that_build_takes(train: Train, tmp_path: Path, conditional_checkpoint: Path) -> None:
    done = train(sample_every=5, samples=8)
    run = tmp_path / "run"
    assert done.steps == 10
    assert done.checkpoint == run / "000010.ckpt"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "000004.ckpt", "000008.ckpt", "000010.ckpt", "config.json", "log.jsonl", "run.json", "samples",
    ]  # fmt: skip
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["000005.png", "000010.png"]
    entries = log_of(run)
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10]
    assert entries[-1]["flips"].keys() == {layer.name for layer in bake(load_model(run)).layers if layer.masked}
    assert any(share > 0 for share in entries[0]["flips"].values())
    dense, tuned = load_model(conditional_checkpoint, heads=4, null_class=4), load_model(run)
    assert (tuned.config, tuned.recipe) == (dense.config, dense.recipe)
    assert "000010.ckpt of run: the newest of 3" in tuned.notes


def test_the_student_comes_to_see_what_its_teacher_sees(train: Train, tmp_path: Path) -> None:
    train(steps=60, noise_weight=0.0, teacher_weight=1.0, log_every=10, lr=3e-3)
    entries = log_of(tmp_path / "run")
    assert entries[-1]["teacher_loss"] < 0.5 * entries[0]["teacher_loss"]


def test_going_on_is_the_same_bit_for_bit(train: Train, tmp_path: Path) -> None:
    train("whole", clip_norm=1.0)

    def stop(step: int, steps: int, losses: Any) -> None:
        if step == 7:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train("stopped", clip_norm=1.0, stepped=stop)
    assert log_of(tmp_path / "stopped")[-1]["step"] == 6
    said: list[str] = []
    assert train("stopped", clip_norm=1.0, say=said.append).begun_at == 4
    assert "going on from 000004.ckpt" in said
    assert_same(held(tmp_path / "whole" / "000010.ckpt"), held(tmp_path / "stopped" / "000010.ckpt"))
    assert without_pace(log_of(tmp_path / "whole")) == without_pace(log_of(tmp_path / "stopped"))
    assert train("stopped", clip_norm=1.0).begun_at == 10  # done: nothing happens


def command(conditional_checkpoint: Path, tiny_data: Path, run: Path, *options: str) -> list[str]:
    given = ["--data", str(tiny_data), "-o", str(run), "--heads", "4", "--null-class", "4", "--batch", "8"]
    return ["-m", "sparse_engine", "finetune", str(conditional_checkpoint), *given, *options]


def test_a_killed_run_goes_on_bit_for_bit(
    train: Train, conditional_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ["--save-every", "3", "--log-every", "1", "--lr", "1e-3", "--warmup", "2"]
    arguments = command(conditional_checkpoint, tiny_data, run, *options, "--steps", "100000", "--threads", "1")
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").is_file() or len((run / "log.jsonl").read_text().splitlines()) < 8:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    steps = max(int(path.stem) for path in run.glob("*.ckpt")) + 7
    assert train(steps=steps, save_every=3, log_every=1, keep=5).begun_at > 0
    train("whole", steps=steps, save_every=3, log_every=1)
    assert_same(held(tmp_path / "whole" / f"{steps:06d}.ckpt"), held(run / f"{steps:06d}.ckpt"))
    assert without_pace(log_of(tmp_path / "whole")) == without_pace(log_of(run))
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")] == []


def test_ctrl_c_finishes_the_step_and_saves(conditional_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--steps", "100000", "--save-every", "0", "--log-every", "1", "--threads", "1"]
    arguments = [sys.executable, *command(conditional_checkpoint, tiny_data, run, *options)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 130
    saved = [path.name for path in run.iterdir() if path.suffix == ".ckpt"]
    assert len(saved) == 1
    assert f"the same command goes on from {run / saved[0]}" in told.replace("\n", "")
    assert "Traceback" not in told


@pytest.mark.parametrize("method", ["ste", "asp", "progressive", "dense"])
def test_baselines(train: Train, tmp_path: Path, conditional_checkpoint: Path, method: str) -> None:
    train(method=method, log_every=1)
    entries = log_of(tmp_path / "run")
    trained = load_model(tmp_path / "run")
    weight = trained.checkpoint.state["mid_block.mlp.fc1.weight"]
    assert entries[-1]["teacher_loss"] == 0
    if method == "dense":
        assert "flips" not in entries[-1]
    elif method == "asp":
        assert all(share == 0 for entry in entries for share in entry["flips"].values())
        assert np.count_nonzero(weight) == weight.size / 2
        assert {layer.source for layer in bake(trained).layers if layer.masked} == {"zeros"}
    elif method == "progressive":
        patterns = [entry["pattern"] for entry in entries]
        assert patterns == [name for name in ("31:32", "15:16", "7:8", "3:4", "2:4") for _ in range(2)]
    else:
        assert np.count_nonzero(weight) == weight.size


@pytest.mark.parametrize(
    "layers, pattern", [(("*.mlp.fc1", "*.skip_linear"), "2:4"), (("*.mlp.*",), "1:4"), (("patch_embed.proj",), "2:4")]
)
def test_a_choice_of_layers_is_what_an_engine_gets(
    train: Train, tmp_path: Path, layers: tuple[str, ...], pattern: str
) -> None:
    """Averages are dense: where no rule would find their masks again, they are stored with them."""
    train(mask_layers=layers, pattern=Pattern.parse(pattern), steps=3)
    trained = load_model(tmp_path / "run")
    baked = bake(trained)
    wanted = set(log_of(tmp_path / "run")[-1]["flips"])
    kept = {"2:4": 0.5, "1:4": 0.25}[pattern]
    for layer in baked.layers:
        if layer.name in wanted:
            assert layer.nonzeros == layer.parameters * kept
        else:
            assert layer.nonzeros == layer.parameters
    record = json.loads((tmp_path / "run" / "config.json").read_text())["pruning"]
    assert (record["pattern"], set(record["pruned"])) == (pattern, wanted)


def test_from_pruned_weights_the_mask_begins_as_theirs(
    train: Train, tmp_path: Path, conditional_checkpoint: Path
) -> None:
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    pruned = {name: torch.from_numpy(array) for name, array in bake(model, "magnitude").state.items()}
    torch.save(pruned, tmp_path / "pruned.pth")
    train("from", weights=tmp_path / "pruned.pth", steps=1, lr=1e-9, warmup=0, ema=0.0)
    found = load_model(tmp_path / "from").checkpoint.state["mid_block.mlp.fc1.weight"]
    np.testing.assert_allclose(found, pruned["mid_block.mlp.fc1.weight"].numpy(), atol=1e-7)


def test_what_pruning_left_dense_stays_so(train: Train, tmp_path: Path, conditional_checkpoint: Path) -> None:
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    left = "mid_block.mlp.fc1"
    state = {**bake(model, "magnitude").state, f"{left}.weight": model.checkpoint.state[f"{left}.weight"]}
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, tmp_path / "pruned.pth")
    record = {"pattern": "2:4", "pruned": ["mid_block.mlp.fc2"], "dense": {left: "most damaged"}}
    (tmp_path / "pruned.json").write_text(json.dumps({**model.settings(), "pruning": record}))
    said: list[str] = []
    train(weights=tmp_path / "pruned.pth", steps=2, say=said.append)
    assert f"note: {left} stay dense, as they were left in the pruning" in said
    layers = {layer.name: layer for layer in bake(load_model(tmp_path / "run")).layers}
    assert layers[left].nonzeros == layers[left].parameters
    assert layers["mid_block.mlp.fc2"].nonzeros == layers["mid_block.mlp.fc2"].parameters / 2


def test_from_random_weights_and_a_configuration_alone(train: Train, tmp_path: Path) -> None:
    config = {
        "family": "uvit",
        "image_size": 8,
        "patch_size": 4,
        "channels": 3,
        "embed_dim": 16,
        "depth": 2,
        "heads": 2,
    }
    (tmp_path / "new.json").write_text(json.dumps({**config, "num_classes": 5, "null_class": 4}))
    anew = {"dense": None, "weights": RANDOM, "config": tmp_path / "new.json", "method": "dense"}
    train("anew", **anew, model=ModelOptions())
    assert load_model(tmp_path / "anew").config.embed_dim == 16
    with pytest.raises(OptionError, match="no dense checkpoint that could teach"):
        train("b", **{**anew, "method": "sparsedm"})
    (tmp_path / "new.json").write_text(json.dumps({**config, "heads": 3}))
    with pytest.raises(OptionError, match=r"heads = 3 does not divide embed_dim = 16"):
        train("c", **anew, model=ModelOptions())
    (tmp_path / "new.json").write_text(json.dumps({**config, "depth": "two"}))
    with pytest.raises(CheckpointError, match=r"describes no uvit network"):
        train("e", **anew, model=ModelOptions())
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"does not say its family"):
        train("d", **anew, model=ModelOptions())


def test_parts_of_a_batch_add_up(train: Train, tmp_path: Path) -> None:
    for name, accumulate in (("one", 1), ("four", 4)):
        train(name, accumulate=accumulate, steps=5)
    one, four = (held(tmp_path / name / "000005.ckpt")["nnet.pth"] for name in ("one", "four"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_decays_as_much(train: Train, tmp_path: Path, precision: str) -> None:
    """The decay is added once the loss scale has been taken out: it is the one that was asked for."""
    train("low", precision=precision, mask_decay=5.0, steps=3, ema=0.0)
    train("full", mask_decay=5.0, steps=3, ema=0.0)
    low, full = (load_model(tmp_path / name).checkpoint.state["mid_block.mlp.fc1.weight"] for name in ("low", "full"))
    assert np.abs(low - full).max() < 1.5e-3  # of steps of 1e-3 in the direction of the gradient


def test_longer_is_the_same_run_and_other_settings_are_not(train: Train, tmp_path: Path) -> None:
    train(steps=4)
    assert train(steps=6).begun_at == 4
    for option, found, here in (
        ("lr", 0.001, 0.002),
        ("seed", 0, 1),
        ("dropout", 0.1, 0.2),
        ("method", "sparsedm", "ste"),
    ):
        with pytest.raises(OptionError, match=f"another run: its .*{found!r}, and here {here!r}"):
            train(steps=6, **{option: here})
    with pytest.raises(OptionError, match=r"another run: its lr_decay is 'constant', and here 'cosine'"):
        train(steps=6, lr_decay="cosine")
    other = tmp_path / "other.npz"
    np.savez(other, images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.zeros(20, np.int64))
    with pytest.raises(OptionError, match=r"another run: its data is"):
        train(steps=6, data=other)


def test_a_folder_of_something_else_is_left_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(OptionError, match="is there already, and holds no run"):
        train()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        train("file")
    with pytest.raises(OutputError, match="does not exist"):
        train("no/where")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_two_do_not_train_in_one_folder(train: Train, tmp_path: Path) -> None:
    train(steps=2)
    with run_folder.RunFolder(tmp_path / "run").held(), pytest.raises(OptionError, match="another process trains in"):
        train(steps=4)


def test_a_damaged_checkpoint_is_named(train: Train, tmp_path: Path) -> None:
    train(steps=8)
    broken = tmp_path / "run" / "000008.ckpt" / "optimizer.pth"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"000008.ckpt cannot be read.*\n.*delete .*000008.ckpt: the run goes on"):
        train(steps=10)


def test_a_full_disk_leaves_the_last_checkpoint(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = run_folder._write

    def full(path: Path, what: Any) -> None:
        if "000008" in path.parent.name and path.name == "nnet.pth":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, what)

    monkeypatch.setattr(run_folder, "_write", full)
    with pytest.raises(OutputError, match="000008.ckpt: the disk is full"):
        train()
    assert [path.name for path in (tmp_path / "run").iterdir() if "ckpt" in path.name] == ["000004.ckpt"]
    monkeypatch.setattr(run_folder, "_write", write)
    assert train().begun_at == 4


def test_a_divergence_names_the_last_good_checkpoint(train: Train, tmp_path: Path) -> None:
    train(steps=4)
    folder = tmp_path / "run" / "000004.ckpt"
    before = held(folder)
    raw = {name: torch.full_like(tensor, torch.nan) for name, tensor in before["nnet.pth"].items()}
    torch.save(raw, folder / "nnet.pth")  # as if the arithmetic of the next step had gone wrong
    with pytest.raises(
        TrainingError, match=r"the loss of step 5 is nan; the last good checkpoint is .*000004.ckpt.*\n.*lr"
    ):
        train(steps=6)
    with pytest.raises(TrainingError, match=r"(loss of step|weights are NaN).*no checkpoint was written before"):
        train("fresh", lr=1e30, warmup=0, steps=3)
    assert [path.name for path in (tmp_path / "fresh").iterdir() if path.suffix == ".ckpt"] == []


def test_a_checkpoint_that_is_pruned_already(train: Train, tmp_path: Path, conditional_checkpoint: Path) -> None:
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    torch.save({k: torch.from_numpy(v) for k, v in bake(model, "magnitude").state.items()}, tmp_path / "pruned.pth")
    with pytest.raises(
        CheckpointError, match=r"pruned.pth is 2:4 already, in 12 of the 12 layers.*\n.*--from.*--force"
    ):
        train(dense=tmp_path / "pruned.pth")
    assert train(dense=tmp_path / "pruned.pth", force=True, steps=1).steps == 1


def test_tensorboard_is_asked_for_before_the_work(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match=r"--tensorboard needs .*\n.*sparse-engine\[tensorboard\]"):
        train(tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_what_the_log_has(train: Train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(tensorboard=True)
    assert len(list((tmp_path / "run").glob("events.out.tfevents.*"))) == 1


def test_a_start_of_another_network_is_refused(train: Train, tiny_checkpoint: Path) -> None:
    with pytest.raises((CheckpointError, OptionError), match=r"another network|has no labels|null class"):
        train(weights=tiny_checkpoint)
