"""PyTorch, dense: eager, and compiled by inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparse_engine.backends.onnx_graph import STEP_INPUTS

from .base import Peer, PeerRunner, PeerUnavailableError, Subject

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def torch_runner(module: Callable[..., Any], subject: Subject) -> PeerRunner:
    """A ``step_graph.Step`` or ``UnconditionalStep``, its state kept on the subject's device."""

    def call(feed: dict[str, Any]) -> tuple[Any, Any]:
        torch.set_num_threads(subject.threads)
        with torch.inference_mode():
            tensors = {name: torch.as_tensor(array, device=subject.device) for name, array in feed.items()}
            told = {name: tensors.pop(name) for name in feed if name not in STEP_INPUTS}
            x_next, m = module(**tensors, **({"conditioning": told} if told else {}))
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
