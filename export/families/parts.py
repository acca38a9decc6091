"""What the networks of several families have alike: embedded times, attention between its projections, patches.

The code is written for export: static reshapes, no data-dependent Python, a dynamic batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sines at the end of an array that is no multiple of a vector are computed by another function, which rounds otherwise:
# what a time is embedded as would depend on where in its batch it stands. Rows are filled up to the widest vector.
SINE_LANES = 16


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, freq_shift: int = 0, cos_first: bool = True
) -> Tensor:
    """Sinusoidal embedding of times: cosines, then sines, or the other way round. t: [B], in the network's units.

    Returns [B, dim].

    Frequency i is max_period^(-i / (dim/2 - freq_shift)): a shift of 0 in U-ViT and DiT, of 1 in diffusers' DiT. It is
    worked out in float64 and rounded once: another last bit, as an exporter that folds it may have, is 6e-5 rad at t =
    999.
    """
    half = dim // 2
    exponents = torch.arange(whole_lanes(half), dtype=torch.float64, device=t.device) / (half - freq_shift)
    freqs = torch.exp(-math.log(max_period) * exponents).float()
    embedding = sinusoids(t, freqs, half, cos_first)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def whole_lanes(count: int) -> int:
    """So many sines, filled up."""
    return -(-count // SINE_LANES) * SINE_LANES


def sinusoids(t: Tensor, freqs: Tensor, count: int, cos_first: bool = True) -> Tensor:
    """Cosines and sines of times [B] at the first ``count`` of ``whole_lanes(count)`` frequencies -> [B, 2 count]."""
    args = t[:, None].float() * freqs[None]
    cosines, sines = torch.cos(args)[:, :count], torch.sin(args)[:, :count]
    return torch.cat([cosines, sines] if cos_first else [sines, cosines], dim=-1)


class Attends(nn.Module):
    """What attention does between its projections.

    ``fused`` may be unset where the products, one by one, are faster than ``scaled_dot_product_attention``.
    """

    fused = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
        """softmax(scale q k^T + bias) v, [B, H, L, D]; plain in an exported graph: every runtime's matcher knows it.

        ``scale`` None is 1 / sqrt(D); ``bias`` is float32 [B or 1, H or 1, L or 1, S].
        """
        if self.fused and not torch.compiler.is_exporting():
            mask = None if bias is None else bias.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = ((q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)).float()
        return (scores if bias is None else scores + bias).softmax(dim=-1).to(v.dtype) @ v


def unpatchify(h: Tensor, channels: int, size: int, patch: int) -> Tensor:
    """[B, (h w), (p1 p2 C)] -> [B, C, (h p1), (w p2)]."""
    side = size // patch
    h = h.reshape(-1, side, side, patch, patch, channels)
    return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, size, size)
