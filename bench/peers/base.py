"""What a peer is: another runtime that computes the same solver step of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

Feed = dict[str, np.ndarray]
Run = Callable[[], np.ndarray]  # one step on a fixed feed; returns m


class PeerUnavailableError(Exception):
    """A peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        step: the solver step as a torch module, masks baked in; takes the feed's arrays in its order.
        onnx: the same as ``step.onnx`` with ``weights.bin`` beside it.
        threads: that every runtime may use.
        precision: "fp32" or "bf16".
    """

    step: nn.Module
    onnx: Path
    threads: int
    precision: str


@dataclass(frozen=True)
class Peer:
    """A runtime. ``prepare`` raises PeerUnavailableError, with the reason, where it cannot run here."""

    name: str
    precisions: tuple[str, ...]
    prepare: Callable[[Subject, Feed], Run]
