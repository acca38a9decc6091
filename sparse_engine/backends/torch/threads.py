"""PyTorch's pool of threads, which is the whole process's, at an engine's own size while the engine works."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from sparse_engine.cores import pool_size

_lock = threading.Lock()
_users = 0  # threads within ``torch_threads``
_size = 0  # the process's own, while there are any


def pool_of(threads: int | None) -> int:
    """How many threads an engine's work gets: what was asked for or the process's own, on no more than its cores."""
    return pool_size(torch.get_num_threads() if threads is None else threads)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within this block PyTorch uses ``threads`` in this thread; afterwards the process has its own number again.

    The number is each thread's own once it has used PyTorch. New threads take the last that was set anywhere, so that
    of engines at work at the same time the last to finish puts the process's back.
    """
    global _users, _size
    with _lock:
        size = torch.get_num_threads()  # a thread's first look at the number undoes what was set before
        if not _users:
            _size = size
        _users += 1
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            torch.set_num_threads(_size)
