"""Train diffusers' own U-Net on scikit-learn's digits, then make it 2:4 sparse the SparseDM way.

    python examples/digits_unet/train_unet.py

The network is a class-conditional ``UNet2DModel``, the noise ``DDPMScheduler``'s, and both models are written by
``DDPMPipeline.save_pretrained``, into ``dense/`` and ``sparsedm/``. The images and the training are those of
examples/digits. The label that stands for "no label" is one that diffusers has no name for: ``null_class`` in
``unet/config.json`` says it to the engine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "digits"))

import data  # noqa: E402
import train  # noqa: E402

SCHEDULER = DDPMScheduler()  # 1,000 steps, betas 0.0001 to 0.02, eps


def unet() -> UNet2DModel:
    """Two levels of 32 channels, 8x8 and 4x4, with attention on the smaller; 11 classes, "no label" being the last."""
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=data.NULL_CLASS + 1,
    )
    net.register_to_config(null_class=data.NULL_CLASS)
    return net


def save(folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """A pipeline's folder, as diffusers writes it; with weights of its own where None are given."""
    net = unet()
    if state is not None:
        net.load_state_dict(state)
    DDPMPipeline(net, SCHEDULER).save_pretrained(folder)


def keep(run: Path, folder: Path) -> None:
    """A run's averaged weights in a pipeline's folder."""
    save(folder, torch.load(train.last_checkpoint(run), weights_only=True))


def main() -> None:
    """Train both models."""
    chosen = train.options(__doc__, dense_steps=5000, sparse_steps=2500, out=HERE)
    start = chosen.out / train.RUNS / "start"
    if not start.exists():
        torch.manual_seed(0)
        save(start)
    train.train_both([str(start)], chosen.dense_steps, chosen.sparse_steps, chosen.out, keep=keep)


if __name__ == "__main__":
    main()
