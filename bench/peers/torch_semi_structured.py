"""PyTorch's own 2:4: eager, the masked layers' weights as semi-structured tensors.

Through CUTLASS this is how SparseDM's published GPU inference runs (it sets ``_FORCE_CUTLASS``); through cuSPARSELt
it is what PyTorch would choose itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Peer, PeerRunner, PeerUnavailableError, Subject
from .torch_dense import torch_runner

PRECISIONS = {"cuda": ("bf16", "fp16")}


def _cutlass(subject: Subject) -> PeerRunner:
    _check_device()
    return _runner(subject, torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense)


def _cusparselt(subject: Subject) -> PeerRunner:
    _check_device()
    if not torch.backends.cusparselt.is_available():
        raise PeerUnavailableError("this torch has no cuSPARSELt")
    return _runner(subject, torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense)


def _check_device() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        raise PeerUnavailableError("2:4 needs a GPU of compute capability 8.0 or more")


def _runner(subject: Subject, from_dense: Callable[[Tensor], Any]) -> PeerRunner:
    step = subject.step(subject.precision).to(subject.device)
    with warnings.catch_warnings(action="ignore"):  # that the interface is a prototype
        make_sparse(step, subject.sparse_layers, from_dense)
    return torch_runner(step, subject)


def make_sparse(step: nn.Module, layers: tuple[str, ...], from_dense: Callable[[Tensor], Any]) -> None:
    """Replace the weights of a step's Linear layers, in place, by what ``from_dense`` makes of them."""
    network = step.get_submodule("network")
    for name in layers:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(from_dense(layer.weight.detach()), requires_grad=False)


CUTLASS = Peer("torch 2:4, CUTLASS", PRECISIONS, _cutlass)
CUSPARSELT = Peer("torch 2:4, cuSPARSELt", PRECISIONS, _cusparselt)
