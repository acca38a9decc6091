"""PyTorch on the CPU: eager, and compiled by inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .base import Feed, Peer, PeerUnavailableError, Run, Subject


def _runner(module: Callable[..., Any], subject: Subject, feed: Feed) -> Run:
    inputs = [torch.from_numpy(array) for array in feed.values()]
    bf16 = subject.precision == "bf16"

    def run() -> np.ndarray:
        torch.set_num_threads(subject.threads)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            m: np.ndarray = module(*inputs)[1].float().numpy()
        return m

    return run


def _eager(subject: Subject, feed: Feed) -> Run:
    return _runner(subject.step, subject, feed)


def _compiled(subject: Subject, feed: Feed) -> Run:
    if not (shutil.which("g++") or shutil.which("clang++")):
        raise PeerUnavailableError("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    return _runner(torch.compile(subject.step, dynamic=False), subject, feed)


EAGER = Peer("torch eager", ("fp32", "bf16"), _eager)
COMPILED = Peer("torch.compile", ("fp32", "bf16"), _compiled)
