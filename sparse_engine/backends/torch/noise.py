"""The noise of ``sparse_engine.sampling.noise``, which defines it, in PyTorch's operators: on a GPU, one kernel.

Each element works its four words out for itself and keeps one of the four normals: three quarters of the arithmetic are
thrown away, and nothing but the result is written to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused import fused

_WORD = (1 << 32) - 1
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_noise(z: Tensor, origin: Tensor, number: Tensor) -> None:
    """Fill z with one draw.

    Args:
        z: float32 [B, C, H, W].
        origin: uint32 [B, 3], ``SeededNoise.origin``.
        number: uint32 [1], the draw's.
    """
    _fill(z, origin.view(torch.int32), number.view(torch.int32))


@fused
def _fill(z: Tensor, origin: Tensor, number: Tensor) -> None:
    words = origin.long() & _WORD
    image = words[:, 2:]
    element = torch.arange(z[0].numel(), device=z.device).expand(len(z), -1)
    counter = (element // 4, number.long() & _WORD, image, 0 * image)
    first, second, third, fourth = _philox(counter, (words[:, :1], words[:, 1:2]))
    later = element % 4 >= 2
    uniform = ((torch.where(later, third, first) >> 8) + 1).float() * 2.0**-24  # in (0, 1], exact
    radius = torch.sqrt(-2.0 * torch.log(uniform))
    # pi / 2^23, as a literal: of a global float torch.compile makes an argument.
    angle = (torch.where(later, fourth, second).int() >> 8).float() * 3.745070282923291e-7
    normals = radius * torch.where(element % 2 == 1, torch.sin(angle), torch.cos(angle))
    z.copy_(normals.view(z.shape))


def _philox(words: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on 32-bit words in int64, whose products are right modulo 2^64: all that is needed of them."""
    c0, c1, c2, c3 = words
    for i in range(_ROUNDS):
        p0, p1 = c0 * _FACTORS[0], c2 * _FACTORS[1]
        key0, key1 = ((key[each] + i * _KEY_STEPS[each]) & _WORD for each in (0, 1))
        c0, c1, c2, c3 = _high(p1) ^ c1 ^ key0, p1 & _WORD, _high(p0) ^ c3 ^ key1, p0 & _WORD
    return c0, c1, c2, c3


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & _WORD
