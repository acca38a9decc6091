"""What a pipeline's swap adds to a call of the network: ``python -m sparse_engine.bench.swap``.

A small network stands in for Stable Diffusion's, of its pictures (4x64x64) and texts (77x768): what is added does not
depend on how much the network computes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from sparse_engine.backends import BuildOptions
from sparse_engine.diffusers import EngineDenoiser
from sparse_engine.diffusers.original import Original
from sparse_engine.engine import SparseEngine
from sparse_engine.export.build import build_engine
from sparse_engine.files import scratch_folder

BATCH, SIDE, LENGTH, WIDTH = 2, 64, 77, 768
CALLS, ROUNDS = 40, 25


def small_network() -> Any:
    """Three stages of 8 channels, attention on the smallest map, told a text of Stable Diffusion's size."""
    network: Any = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return network.eval()


def overhead(folder: Path, rounds: int = ROUNDS, calls: int = CALLS) -> tuple[float, float]:
    """(milliseconds of ``engine.network``, milliseconds that the swap adds): the least of ``rounds``, in turns."""
    network = small_network()
    network.save_pretrained(folder / "unet")
    path, _ = build_engine(folder / "unet", folder / "m.sengine", options=BuildOptions(batch=(1, BATCH, BATCH)))
    x, context = torch.randn(BATCH, 4, SIDE, SIDE), torch.randn(BATCH, LENGTH, WIDTH)
    arrays, t = (x.numpy(), {"context": context.numpy()}), torch.tensor(500)
    with SparseEngine.load(path, threads=1) as engine, torch.inference_mode():
        denoiser: Any = EngineDenoiser(engine, Original(network))
        times = np.full((rounds, calls, 2), np.inf)
        for row in times.reshape(-1, 2):
            began = time.perf_counter()
            engine.network(arrays[0], 500.0, conditioning=arrays[1])
            between = time.perf_counter()
            denoiser(x, t, encoder_hidden_states=context, return_dict=False)
            row[:] = between - began, time.perf_counter() - between
    alone, swapped = 1e3 * times.reshape(-1, 2).min(axis=0)
    return float(alone), float(swapped - alone)


if __name__ == "__main__":
    with scratch_folder() as scratch:
        alone, added = overhead(scratch)
    print(f"engine.network {alone:.2f} ms; the swap adds {added:.3f} ms a call")  # noqa: T201
