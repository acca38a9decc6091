"""What a peer is: another runtime that computes the same solver step of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sparse_engine.backends.base import NoiseSource
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS
from sparse_engine.sampling import Trajectory, walk

Feed = dict[str, np.ndarray]


class PeerUnavailableError(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        step: precision -> the solver step as a torch module, masks baked in, its network lowered to that precision;
            takes the feed's arrays by name, the conditions as one mapping. A fresh one each time.
        onnx: the same in fp32 as ``step.onnx`` with ``weights.bin`` beside it; in int8 our own engine's Q/DQ graph.
        device: "cpu" or "cuda".
        threads: that every runtime may use on the CPU.
        precision: that the peer is to run in.
        sparse_layers: names of the 2:4 layers, as modules of the network.
    """

    step: Callable[[str], nn.Module]
    onnx: Path
    device: str
    threads: int
    precision: str
    sparse_layers: tuple[str, ...]


class PeerRunner:
    """A peer, ready. A call returns when its work is done.

    Args:
        call: one step, (x_next, m) in arrays of the runtime's own.
        to_numpy: one of those as float32 on the host; waits for it.
    """

    def __init__(
        self, call: Callable[[dict[str, Any]], tuple[Any, Any]], to_numpy: Callable[[Any], np.ndarray] = np.asarray
    ) -> None:
        self._call, self._to_numpy = call, to_numpy

    def step(self, feed: Feed) -> np.ndarray:
        """One solver step; returns m, float32 [B, C, H, W]."""
        return self._to_numpy(self._call(feed)[1])

    def sample(self, trajectory: Trajectory, feed: Feed, noise: NoiseSource) -> np.ndarray:
        """Walk a trajectory from the feed's x, the state staying where the runtime keeps it; float32 [B, C, H, W]."""
        moving = ("x", "t", "coef", "clip", "base", "h1", "h2", "z")

        def step(*arrays: Any) -> tuple[Any, Any]:
            return self._call({**feed, **dict(zip(moving, arrays, strict=True))})

        return self._to_numpy(walk(trajectory, step, feed["x"], noise=noise))


@dataclass(frozen=True)
class Peer:
    """A runtime.

    Attributes:
        name: in tables and results.
        precisions: device -> what it runs in there, the one it is best at last.
        prepare: raises PeerUnavailableError, with the reason, where it cannot run here.
    """

    name: str
    precisions: Mapping[str, tuple[str, ...]]
    prepare: Callable[[Subject], PeerRunner]

    def wanted(self, device: str, precision: str) -> tuple[str, ...]:
        """The precisions to measure it in: ours, where it has it, and its best one; beside our 8 bits all of them."""
        offered = self.precisions.get(device, ())
        others = offered if precision in QUANTISED_PRECISIONS else offered[-1:]
        return tuple(dict.fromkeys(each for each in (precision, *others) if each in offered))
