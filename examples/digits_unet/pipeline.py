"""Digits drawn by a pipeline of diffusers whose network is an engine.

    python examples/digits_unet/pipeline.py -o pipeline.png

``DDPMPipeline`` tells its network no label, so this is a pipeline of one's own: anything that calls ``unet`` will do.
Its network is put out and in again by one line each, and any scheduler of diffusers samples.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from PIL import Image

from sparse_engine.diffusers import restore, use_engine

HERE = Path(__file__).parent
NULL_CLASS = 10


class DigitsPipeline(DDPMPipeline):
    """A pipeline that tells its network labels, with classifier-free guidance."""

    @torch.no_grad()
    def __call__(self, labels: list[int], *, guidance: float = 2.0, steps: int = 25, seed: int = 0) -> np.ndarray:
        """One picture of each label: float32 [B, 8, 8] in 0..1."""
        size = (len(labels), self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)
        x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        told = torch.tensor([*labels, *[NULL_CLASS] * len(labels)])
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            twice = self.scheduler.scale_model_input(torch.cat([x, x]), t)
            eps, eps_null = self.unet(twice, t, class_labels=told).sample.chunk(2)
            x = self.scheduler.step(eps_null + guidance * (eps - eps_null), t, x).prev_sample
        pixels: np.ndarray = (x[:, 0] / 2 + 0.5).clip(0, 1).numpy()
        return pixels


def load(folder: Path = HERE / "sparsedm") -> Any:
    """The shipped model as a pipeline, with DPM-Solver++."""
    pipe = DigitsPipeline.from_pretrained(folder)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, thresholding=False)
    return pipe


def contact_sheet(digits: np.ndarray, columns: int = 10, scale: int = 6) -> Image.Image:
    """[B, 8, 8] in 0..1 -> one picture, a class a column."""
    rows = digits.reshape(-1, columns, 8, 8)
    whole = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 1, 3).reshape(len(rows) * 10, columns * 10)
    return Image.fromarray((255 * whole).astype(np.uint8)).resize((columns * 10 * scale, len(rows) * 10 * scale), 0)


def main() -> None:
    """Draw forty digits through an engine, and again by the network that came back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("pipeline.png"))
    chosen = parser.parse_args()
    labels = [*range(10)] * 4
    pipe = load()
    with tempfile.TemporaryDirectory() as cache:
        use_engine(pipe, build=True, cache=cache)
        drawn = pipe(labels)
        restore(pipe)
    contact_sheet(drawn).save(chosen.output)
    dense = pipe(labels)
    print(
        f"{chosen.output}: 2:4 by the engine; the same network dense differs by {np.abs(drawn - dense).mean():.3f} of 1"
    )


if __name__ == "__main__":
    main()
