"""Train a class-conditional U-ViT on Noto Emoji, prune it to 2:4, train it on under the mask.

    python examples/emoji/train_emoji.py

Three commands: ``finetune --method dense`` from random weights, ``prune``, and ``finetune`` from what was pruned, the
dense model its teacher. Stopped, the same command goes on where it was: the runs' folders lie in ``runs/``, until both
models are there. They are kept in fp16.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "digits"))

import train  # noqa: E402

DATA, CONFIG = HERE / "emoji.npz", HERE / "config.json"
SHARED = ("--batch=32", *train.SHARED[1:])
DENSE = (*SHARED, "--method=dense", "--lr=1e-3", "--warmup=200", "--precision=bf16", "--sample-every=500")
SPARSE = (*SHARED, "--lr=5e-4", "--warmup=50", *train.SPARSE[-2:])  # from the teacher alone


def keep(folder: Path, path: Path) -> None:
    """The averaged weights of a run's last checkpoint, in fp16."""
    state = torch.load(train.last_checkpoint(folder), weights_only=True)
    torch.save({name: tensor.half() for name, tensor in state.items()}, path)


def main() -> None:
    """Train both models."""
    chosen = train.options(__doc__, dense_steps=8500, sparse_steps=500, out=HERE)
    runs, data = chosen.out / train.RUNS, f"--data={DATA}"
    runs.mkdir(exist_ok=True)
    dense, pruned = chosen.out / "dense.pth", runs / "pruned.safetensors"
    if chosen.out != HERE:
        shutil.copyfile(CONFIG, chosen.out / CONFIG.name)  # which says of both what weights cannot
    steps = f"--steps={chosen.dense_steps}"
    train.command("finetune", *train.anew(CONFIG), data, "-o", runs / "dense", steps, *DENSE)
    keep(runs / "dense", dense)
    train.command("prune", dense, "-o", pruned)
    steps = f"--steps={chosen.sparse_steps}"
    train.command("finetune", dense, f"--from={pruned}", data, "-o", runs / "sparse", steps, *SPARSE)
    keep(runs / "sparse", chosen.out / "sparse.pth")
    shutil.rmtree(runs)


if __name__ == "__main__":
    main()
