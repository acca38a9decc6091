"""The buffers of a batch on a device, and which of them a step reads and writes.

Nothing is copied from step to step: x alternates between two buffers, and the predictions go around three. A step's
buffers depend on its index modulo ``PERIOD`` alone, so a recording, whose addresses are fixed, is good wherever a chunk
starts at the same phase.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from sparse_engine.errors import BackendError

from .step_device import B, Recording, StepBuffers, StepDevice

PERIOD = 6  # x alternates between 2 buffers and the predictions between 3
NOISE_BYTES = 256 << 20  # of a chunk's noise: 12 steps of 64 latents of 4x64x64 take a fifth of it


@dataclass
class Drawn(Generic[B]):
    """What noise that the device draws passes through; see ``NoiseDevice.draw``."""

    z: B  # [B, C, H, W], a step's
    origin: B  # uint32 [B, 3]
    draws: B  # uint32 [chunk, 1]


@dataclass
class State(Generic[B]):
    """The buffers of one batch size and number of passes, and what has been recorded on them."""

    x: list[B]
    m: list[B]
    base: B
    zeros: B
    clip: B
    guidance: B
    conditioning: dict[str, B]
    chunk: int
    t: B  # [chunk, B]
    coef: B  # [chunk, 8]
    noise_shape: tuple[int, ...]
    z: B | None = None  # [chunk, B, C, H, W], once noise is uploaded
    drawn: Drawn[B] | None = None  # once the device may draw noise
    seen: set[Hashable] = field(default_factory=set)
    recordings: dict[Hashable, Recording] = field(default_factory=dict)

    def buffers(self) -> list[B]:
        """All of them."""
        drawn = vars(self.drawn).values() if self.drawn is not None else ()
        optional = [buffer for buffer in (self.z, *drawn) if buffer is not None]
        told = self.conditioning.values()
        return [*told, *self.x, *self.m, self.base, self.zeros, self.clip, self.guidance, self.t, self.coef, *optional]


def allocate(
    device: StepDevice[B], shape: tuple[int, ...], passes: int, conditioning: Mapping[str, np.ndarray], chunk: int
) -> State[B]:
    """The buffers of batches of a shape, [B, C, H, W], for chunks of at most so many steps; all or none."""
    made: list[B] = []

    def buffer(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> B:
        made.append(device.allocate(shape, dtype))
        return made[-1]

    noise_row = 4 * int(np.prod(shape))
    fitting = NOISE_BYTES // noise_row // PERIOD * PERIOD
    chunk = max(min(chunk, fitting), PERIOD)
    try:
        state = State(
            x=[buffer(shape) for _ in range(2)],
            m=[buffer(shape) for _ in range(3)],
            base=buffer(shape),
            zeros=buffer(shape),
            clip=buffer((2,)),
            guidance=buffer((passes,)),
            conditioning={name: buffer(rows.shape, rows.dtype.type) for name, rows in conditioning.items()},
            chunk=chunk,
            t=buffer((chunk, shape[0])),
            coef=buffer((chunk, 8)),
            noise_shape=(chunk, *shape),
        )
        device.upload(state.zeros, np.zeros(shape, np.float32))
    except BackendError:
        for each in made:
            device.free(each)
        raise
    return state


def allocate_drawn(device: StepDevice[B], state: State[B]) -> Drawn[B]:
    """What noise that the device draws passes through; all or none."""
    (chunk, batch, *image), made = state.noise_shape, []
    shapes = (((batch, *image), np.float32), ((batch, 3), np.uint32), ((chunk, 1), np.uint32))
    try:
        for shape, dtype in shapes:
            made.append(device.allocate(shape, dtype))
    except BackendError:
        for each in made:
            device.free(each)
        raise
    return Drawn(*made)


def step_buffers(device: StepDevice[B], state: State[B], index: int, k: int, noise: str) -> StepBuffers[B]:
    """The buffers of the step ``index`` of a trajectory (modulo ``PERIOD``), the k-th of its chunk."""
    row = device.row
    z = state.zeros
    if noise == "uploaded" and state.z is not None:
        z = row(state.z, k)
    elif noise == "drawn" and state.drawn is not None:
        z = state.drawn.z
    return StepBuffers(
        x=state.x[index % 2],
        t=row(state.t, k),
        conditioning=state.conditioning,
        guidance=state.guidance,
        coef=row(state.coef, k),
        clip=state.clip,
        base=state.base,
        h1=state.m[(index - 1) % 3],
        h2=state.m[(index - 2) % 3],
        z=z,
        x_next=state.x[(index + 1) % 2],
        m=state.m[index % 3],
    )
