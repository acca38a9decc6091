"""PyTorch, dense: eager, and compiled by inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .base import Peer, PeerRunner, PeerUnavailableError, Subject

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def torch_runner(module: Callable[..., Any], subject: Subject) -> PeerRunner:
    """A module that takes the feed's arrays in order, its state kept on the subject's device."""

    def call(feed: dict[str, Any]) -> tuple[Any, Any]:
        torch.set_num_threads(subject.threads)
        with torch.inference_mode():
            x_next, m = module(*(torch.as_tensor(array, device=subject.device) for array in feed.values()))
        return x_next, m

    def to_numpy(tensor: torch.Tensor) -> np.ndarray:
        array: np.ndarray = tensor.float().cpu().numpy()  # waits for the device
        return array

    return PeerRunner(call, to_numpy)


def _eager(subject: Subject) -> PeerRunner:
    return torch_runner(subject.step(subject.precision).to(subject.device), subject)


def _compiled(subject: Subject) -> PeerRunner:
    if subject.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise PeerUnavailableError("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    step = subject.step(subject.precision).to(subject.device)
    return torch_runner(torch.compile(step, dynamic=False), subject)


EAGER = Peer("torch eager", PRECISIONS, _eager)
COMPILED = Peer("torch.compile", PRECISIONS, _compiled)
