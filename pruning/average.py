"""The exponential moving average of a training's parameters, all of them in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """average <- rate average + (1 - rate) parameter, the rate growing to its end as (1 + step) / (10 + step).

    Args:
        parameters: what is averaged.
        rate: in [0, 1); 0 is the parameters themselves.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: float) -> None:
        self._parameters = [each.detach() for each in parameters]
        self._rate = rate
        self.tensors = [each.clone() for each in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After a step, which counts from 0."""
        rate = min(self._rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.tensors, self._parameters, 1 - rate)
