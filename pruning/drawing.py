"""Samples of a network that is being trained, as a picture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine import sampling
from sparse_engine.errors import OptionError
from sparse_engine.export.model import Model
from sparse_engine.export.step_graph import solver_lines
from sparse_engine.images import encode_png, grid
from sparse_engine.results import to_uint8

STEPS, SAMPLER = 25, "dpm-solver++"
SEED, BATCH = 0, 50


def check_drawable(model: Model, samples: int) -> None:
    """Say before the training that no picture can be drawn. Raises OptionError."""
    if model.recipe.value_range is None:
        raise OptionError("--sample-every: this is a latent model, whose samples have no pixels", "leave it out")
    if model.config.data_shape[0] not in (1, 3, 4):
        raise OptionError("--sample-every: a PNG has 1, 3 or 4 channels", "leave it out")


def draw(
    network: nn.Module, model: Model, told: Mapping[str, np.ndarray], count: int, device: torch.device
) -> np.ndarray:
    """Samples without guidance, always of the same noise.

    Args:
        network: forward(x, t, **conditions), its masks applied.
        model: says shape, range and schedule.
        told: what the network is told, name -> [count, *shape].
        count: how many.
        device: where the network is.

    Returns:
        float32 [count, C, H, W]; NaN where the network gives it.
    """
    recipe = model.recipe
    schedule = model.schedule
    sampler = SAMPLER if SAMPLER not in recipe.excluded and recipe.prediction != "flow" else recipe.sampler
    trajectory = sampling.make_trajectory(sampler, schedule, STEPS, prediction=recipe.prediction)
    drawn = [
        _batch(network, model, {name: rows[part] for name, rows in told.items()}, part, trajectory, device)
        for part in np.array_split(np.arange(count), -(-count // BATCH))
    ]
    return np.concatenate(drawn)


@torch.no_grad()
def _batch(
    network: nn.Module,
    model: Model,
    told: Mapping[str, np.ndarray],
    images: np.ndarray,
    trajectory: sampling.Trajectory,
    device: torch.device,
) -> np.ndarray:
    conditions = {name: torch.from_numpy(np.ascontiguousarray(rows)).to(device) for name, rows in told.items()}

    def step(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, t, *rest = (torch.from_numpy(np.asarray(array)).to(device) for array in inputs)
        eps = network(x, t, **conditions)[:, : x.shape[1]].float()
        x_next, m = solver_lines(x, eps, *rest)
        return x_next.cpu().numpy(), m.cpu().numpy()

    shape = model.config.data_shape
    x = sampling.normal(SEED, images, 0, shape)
    return sampling.walk(trajectory, step, x, noise=lambda number: sampling.normal(SEED, images, number, shape))


def picture(drawn: np.ndarray, value_range: tuple[float, float]) -> bytes:
    """One PNG of samples; NaN is the low end of the range."""
    return encode_png(grid(to_uint8(np.nan_to_num(drawn, nan=value_range[0]), value_range)))


def own_copy(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Weights as ``Model.network`` takes them."""
    return {
        name: tensor.detach().float().cpu().numpy().copy() if tensor.is_floating_point() else tensor.cpu().numpy()
        for name, tensor in state.items()
    }
