"""Training under an N:M mask: dense weights that are trained, masked ones that the network multiplies with.

The dense weights of all masked layers lie in one array, in the order in which the mask groups them: the mask of the
whole network is derived in a few operations, once a step, by the rule of ``export.masks``. Gradients with respect to
the masked weights are taken for the dense ones' (straight-through); SR-STE (Zhou et al., arXiv 2102.04010, eq. 9) adds
lambda (1 - mask) w. SparseDM (arXiv 2404.10445, section 3): ``sparse_ops_mask.py`` of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_engine.export.masks import Pattern

PAIRWISE = 8  # up to so many of a group are ranked pair by pair, more are sorted


def kept(groups: Tensor, n: int) -> Tensor:
    """True for the ``n`` largest of each row; of two equal ones the later. groups: [G, M], not < 0 -> bool [G, M].

    What ``export.masks.magnitude_mask`` derives, on any device.
    """
    m = groups.shape[1]
    if m > PAIRWISE:
        pruned = groups.argsort(dim=1, stable=True)[:, : m - n]
        return torch.ones_like(groups, dtype=torch.bool).scatter_(1, pruned, False)
    columns = groups.t().contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.uint8, device=groups.device)  # how many of its group each beats
    for low in range(m):
        for high in range(low + 1, m):
            low_wins = columns[low] > columns[high]
            rank[low] += low_wins
            rank[high] += ~low_wins
    return (rank >= m - n).t().contiguous()


@dataclass(frozen=True)
class _Layer:
    name: str
    part: slice  # of the flat arrays
    shape: tuple[int, ...]

    def seen(self, flat: Tensor) -> Tensor:
        """A layer's own part of a flat array, as its weight is shaped."""
        if len(self.shape) != 4:
            return flat[self.part].view(self.shape)
        out, in_, kh, kw = self.shape
        return flat[self.part].view(out, kh, kw, in_).permute(0, 3, 1, 2)


class MaskedWeights:
    """The masked layers of a network that is being trained.

    Args:
        network: its layers hold the weights to start from, and are given the masked ones.
        names: of the layers; each weight's size is a multiple of 4.
        pattern: N:M.
        fixed: whether the mask is derived once, here, and kept (ASP).
        decay: SR-STE's lambda.

    Attributes:
        dense: the parameter that the optimizer trains, [all weights].
        mask: bool of its shape.
        parameters: the layers' weights in the network, which hold the masked ones.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], pattern: Pattern, *, fixed: bool = False, decay: float = 0.0
    ) -> None:
        known = dict(network.named_parameters())
        weights = [known[f"{name}.weight"] for name in names]
        first, self._layers = 0, []
        for name, weight in zip(names, weights, strict=True):
            self._layers.append(_Layer(name, slice(first, first + weight.numel()), tuple(weight.shape)))
            first += weight.numel()
        self.parameters: list[nn.Parameter] = weights
        self.dense = nn.Parameter(torch.empty(first, device=weights[0].device, dtype=weights[0].dtype))
        self._masked, self._grad = (torch.empty_like(self.dense.detach()) for _ in range(2))
        self._weights = [weight.detach() for weight in weights]  # the same storage
        torch._foreach_copy_([layer.seen(self.dense.detach()) for layer in self._layers], self._weights)
        self._fixed, self._decay = fixed, decay
        self._pattern = pattern
        self.mask = self._derived(self.dense.detach())
        self._apply()

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return [layer.name for layer in self._layers]

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Name of a weight -> its part of a flat array, of its own shape."""
        return {f"{layer.name}.weight": layer.seen(flat) for layer in self._layers}

    def masked(self, flat: Tensor) -> Tensor:
        """Weights of the same layers, such as averages, under the mask that is derived from themselves."""
        return flat * self.mask_of(flat)

    def mask_of(self, flat: Tensor) -> Tensor:
        """The mask that is derived from such weights."""
        return self.mask if self._fixed else self._derived(flat)

    def _derived(self, flat: Tensor) -> Tensor:
        magnitudes, pattern = flat.abs(), self._pattern
        if all((layer.part.stop - layer.part.start) % pattern.m == 0 for layer in self._layers):
            return kept(magnitudes.view(-1, pattern.m), pattern.n).view(-1)
        mask = torch.ones_like(magnitudes, dtype=torch.bool)
        for layer in self._layers:
            if (layer.part.stop - layer.part.start) % pattern.m == 0:  # of a stage with wide groups, others stay dense
                mask[layer.part] = kept(magnitudes[layer.part].view(-1, pattern.m), pattern.n).view(-1)
        return mask

    @torch.no_grad()
    def _apply(self) -> None:
        if self._fixed:
            self.dense.mul_(self.mask)
        torch.mul(self.dense.detach(), self.mask, out=self._masked)
        torch._foreach_copy_(self._weights, [layer.seen(self._masked) for layer in self._layers])

    def refresh(self, pattern: Pattern, *, count: bool = False) -> dict[str, float]:
        """Derive the mask anew and give the network its masked weights.

        Args:
            pattern: N:M from here on.
            count: whether to say how the mask has changed.

        Returns:
            Layer name -> share of its mask that changed; {} where nothing was counted.
        """
        before = self.mask
        if not self._fixed:
            self._pattern = pattern
            self.mask = self._derived(self.dense.detach())
        self._apply()
        if not count:
            return {}
        changed = before ^ self.mask
        counts = torch.stack([changed[layer.part].sum() for layer in self._layers]).tolist()
        sizes = [layer.part.stop - layer.part.start for layer in self._layers]
        return {name: flips / size for name, flips, size in zip(self.names, counts, sizes, strict=True)}

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Make the network's gradients the dense weights' own: straight through the mask."""
        views = [layer.seen(self._grad) for layer in self._layers]
        there = [
            (view, weight.grad) for view, weight in zip(views, self.parameters, strict=True) if weight.grad is not None
        ]
        if len(there) < len(views):
            self._grad.zero_()
        torch._foreach_copy_([view for view, _ in there], [found for _, found in there])
        self.dense.grad = self._grad

    @torch.no_grad()
    def decay_pruned(self) -> None:
        """Add SR-STE's term to gradients that are neither scaled nor partial; a fixed mask lets none through instead.

        In the authors' code it is added in the backward pass, where a gradient is multiplied with a loss scale under
        fp16 and the term is not: there it is all but lost.
        """
        if self._fixed:
            self._grad.mul_(self.mask)
        elif self._decay:
            torch.sub(self.dense.detach(), self._masked, out=self._masked)  # (1 - mask) w; filled anew by ``refresh``
            self._grad.add_(self._masked, alpha=self._decay)
