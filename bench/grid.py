"""The paper's grid: patch size x mlp_ratio on 32x32 images, random weights, dense against sparse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from sparse_engine.errors import OptionError, SparseEngineError, UnsupportedError
from sparse_engine.export.families.uvit import UViT, UViTConfig

from .arms import runs_on_gpu
from .compare import Progress, compare_model
from .memory import available_bytes
from .presets import Preset, random_uvit
from .settings import Settings

PATCHES, MLP_RATIOS = (1, 2, 4), (1, 2, 4, 8)
# The authors' speed-ups on four A40 through CUTLASS (arXiv 2404.10445): (patch, mlp_ratio) -> ratio.
PAPER = {
    (1, 1): 1.02, (2, 1): 1.01, (4, 1): 1.01,
    (1, 2): 1.04, (2, 2): 0.97, (4, 2): 1.01,
    (1, 4): 1.23, (2, 4): 1.10, (4, 4): 0.98,
    (1, 8): 1.22, (2, 8): 1.17, (4, 8): 1.08,
}  # fmt: skip
PAPER_STEPS = 50
# What the memory estimate multiplies, held against the measured peaks of a cell of large weights and of one of many
# tokens. Weights: as drawn, baked, traced, exported, and in engines. Activations: of two engines, one more while it is
# profiled, and the torch reference.
COPIES_OF_WEIGHTS, ENGINES = 7, 4
ACTIVATIONS_PER_TOKEN = 8  # times embed_dim: residual, normalised, q, k, v, attended, and a skip


def run_cell(preset: Preset, patch: int, mlp_ratio: int, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Time one cell.

    Returns:
        A row of ``compare_model`` with the cell's place and the paper's number; in place of the measurements
        {"failed": why} where the cell cannot be built or run here, or would not fit into memory.
    """
    cell = {"patch": patch, "mlp_ratio": mlp_ratio, "paper": PAPER[patch, mlp_ratio], "batch": preset.batch}
    try:
        config = preset.config(patch, mlp_ratio)
        check_memory(config, preset.batch, on_gpu=runs_on_gpu(settings.backends[0]))
        (row,) = compare_model(random_uvit(config).model(), [preset.batch], settings, progress)
        return {**cell, **row}
    except SparseEngineError as error:
        return {**cell, "failed": error.what}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {**cell, "failed": f"out of memory: {error}"[:200]}


def check_memory(config: UViTConfig, batch: int, *, on_gpu: bool) -> None:
    """Say before the work that it would not fit into the host's memory. Raises UnsupportedError.

    What does not fit on a GPU is found where it runs out: how much an engine takes there depends on its backend.
    """
    needed, available = estimate_bytes(config, 0 if on_gpu else batch), available_bytes()
    if available is not None and needed > available:
        raise UnsupportedError(f"needs about {needed / 2**30:.1f} GiB of memory, and {available / 2**30:.1f} are free")


def estimate_bytes(config: UViTConfig, batch: int) -> int:
    """Memory that comparing two engines takes, from the sizes of weights and activations; see the constants above."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in UViT(config).parameters())
    ratio = math.ceil(config.mlp_hidden / config.embed_dim)
    activations = batch * config.tokens * config.embed_dim * (ACTIVATIONS_PER_TOKEN + 2 * ratio)
    return 4 * (COPIES_OF_WEIGHTS * weights + ENGINES * activations)


def parse_cells(text: str | None) -> list[tuple[int, int]]:
    """ "patch=1,mlp=4" -> the cells that fit; None is the whole grid. Raises OptionError on what is no cell."""
    wanted: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        if name not in ("patch", "mlp") or not value.isdecimal():
            raise OptionError(
                f"--cells {text!r}: {part!r} is no choice of cells", "write patch=1,mlp=4, or one of them"
            )
        wanted[name] = int(value)
    cells = [(p, m) for m, p in itertools.product(MLP_RATIOS, PATCHES)]
    chosen = [(p, m) for p, m in cells if wanted.get("patch", p) == p and wanted.get("mlp", m) == m]
    if not chosen:
        raise OptionError(f"--cells {text!r} is outside the grid: patch {_listed(PATCHES)}, mlp {_listed(MLP_RATIOS)}")
    return chosen


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
