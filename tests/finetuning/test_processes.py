"""The same training on one process and on two, under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_engine.errors import OptionError, UnsupportedError
from sparse_engine.pruning.processes import together
from tests.finetuning.conftest import Train

LIMITS = {10: 1e-5, 50: 1e-3}  # of the weights, which are of 0.15 and move by 1e-3 a step at most


@pytest.mark.slow
def test_one_and_two_processes(train: Train, tmp_path: Path, conditional_checkpoint: Path, tiny_data: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    train("one", steps=50, save_every=10, keep=5, log_every=5, clip_norm=1.0)
    given = {"--data": tiny_data, "-o": two, "--heads": 4, "--null-class": 4, "--batch": 8, "--steps": 50}
    given |= {"--warmup": 2, "--lr": 1e-3, "--save-every": 10, "--keep": 5, "--log-every": 5, "--clip-norm": 1.0}
    arguments = [str(part) for pair in given.items() for part in pair]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "sparse_engine", "finetune", str(conditional_checkpoint), *arguments, "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            _, told = child.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its processes too
            raise
    assert child.returncode == 0, told
    for steps, limit in LIMITS.items():
        for name in ("nnet.pth", "nnet_ema.pth"):
            a, b = (torch.load(run / f"{steps:06d}.ckpt" / name, weights_only=True) for run in (one, two))
            assert max(float((a[key] - b[key]).abs().max()) for key in a) < limit
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, two)]
    for alone, both in zip(*logs, strict=True):
        assert alone["loss"] == pytest.approx(both["loss"], rel=1e-3)


def test_a_batch_that_cannot_be_split(train: Train) -> None:
    with pytest.raises(OptionError, match=r"--batch 8 cannot be split evenly into 1 processes x --accumulate 3"):
        train(accumulate=3)


def test_devices() -> None:
    with together("cpu") as alone:
        assert (alone.rank, alone.count, alone.first) == (0, 1, True)
        assert alone.mean([1.0, 2.0]) == [1.0, 2.0]
    with pytest.raises(OptionError, match="is no device"), together("gpu0"):
        pass
    with pytest.raises(OptionError, match="expected cpu or cuda"), together("meta"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="finds no CUDA GPU"), together("cuda"):
            pass
