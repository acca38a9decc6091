"""What all tests of pruning run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_gradients(one_torch_thread: None) -> Iterator[None]:
    """As in ``prune``, which trains nothing."""
    with torch.no_grad():
        yield
