"""One process or several: what ``torchrun`` says of them, and the few things they do together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_engine.errors import OptionError, UnsupportedError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def wrapped(self, network: nn.Module) -> nn.Module:
        """A network whose gradients are averaged over all processes as they are computed."""
        if self.count == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def partial(self, network: nn.Module) -> AbstractContextManager[None]:
        """Around all parts of a batch but the last: gradients are added up, not yet averaged."""
        held: AbstractContextManager[None] = (
            network.no_sync() if isinstance(network, DistributedDataParallel) else contextlib.nullcontext()
        )
        return held

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over all processes."""
        if self.count == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        together = together.to(self.device)
        distributed.all_reduce(together)
        return (together / self.count).tolist()

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()


@contextlib.contextmanager
def together(device: str | None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started; alone without it. gloo on CPUs, NCCL on GPUs.

    Raises:
        OptionError, UnsupportedError: a device that is none, or is not there.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")), count)
    if count == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, chosen)
    finally:
        distributed.destroy_process_group()


def _device(name: str | None, local_rank: int, count: int) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise OptionError(f"--device {name!r} is no device", "for example --device cpu or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"--device {name!r}: expected cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError(f"--device {name}: this PyTorch finds no CUDA GPU", "train with --device cpu")
        index = local_rank if count > 1 or device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(
                f"GPU {index} is asked for, and there are {torch.cuda.device_count()}",
                "start as many processes as GPUs",
            )
        return torch.device("cuda", index)
    return device
