"""Averaged weights whose names were changed, or not stored, under the names of the raw weights that they fit.

CompVis' LitEma drops the dots of names; torch-ema and diffusers' EMAModel store a list in the network's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_engine.errors import CheckpointError

from .mask_carriers import is_mask
from .names import without_wrappers, words
from .weight_sets import AVERAGED, Entry, Weights, first_parts, is_averaged, lists_of, place

Averages = tuple[tuple[str, ...], str, dict[str, Tensor] | list[Tensor]]  # entry, prefix, tensors


def averages_named(
    raw: Mapping[Any, Any], entries: Sequence[Entry], others: Sequence[Weights], file: str
) -> list[Weights]:
    """Match what a file calls averaged with the raw weights ``others``.

    Raises:
        CheckpointError: averaged tensors that fit none of them, or several.
    """
    named = []
    for entry, prefix, tensors in [*_groups(entries), *_lists(raw)]:
        if not _are_akin(tensors.values() if isinstance(tensors, dict) else tensors, others):
            continue
        fitting = [own for own in (_fit(tensors, other) for other in others) if own is not None]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{file}: {place(entry, prefix)} holds {len(tensors)} averaged tensors, which cannot be matched with "
                f"{' or '.join(other.where for other in others)} by name or by order",
                "save the weights to be used alone: copy the averages into the model, then save model.state_dict()",
            )
        named.append(Weights(entry, prefix, fitting[0], averaged=True))
    return named


def _groups(entries: Sequence[Entry]) -> Iterator[Averages]:
    """Tensors under keys or prefixes that say averaged; counters are none."""
    for path, tensors in entries:
        own = {without_wrappers(name): tensor for name, tensor in tensors.items() if tensor.numel() > 1}
        prefixes = [""] if is_averaged(path, "", {}) else [part for part in first_parts(own) if words(part) & AVERAGED]
        for prefix in prefixes:
            group = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
            if group:
                yield path, prefix, group


def _lists(raw: Mapping[Any, Any]) -> Iterator[Averages]:
    for path, tensors in lists_of(raw):
        if is_averaged(path, "", {}):
            yield path, "", tensors


def _are_akin(tensors: Iterable[Tensor], others: Sequence[Weights]) -> bool:
    """Whether tensors could be of a network: a log of averaged losses, say, has none of its shapes."""
    shapes = {tensor.shape for other in others for tensor in other.tensors.values() if tensor.numel() > 1}
    return any(tensor.shape in shapes for tensor in tensors)


def _fit(averages: dict[str, Tensor] | list[Tensor], other: Weights) -> dict[str, Tensor] | None:
    """The averages under the raw weights' names; None where they do not fit."""
    if isinstance(averages, list):
        names = [name for name in other.tensors if not is_mask(name)]
        fitting = dict(zip(names, averages, strict=False)) if len(names) == len(averages) else {}
    else:
        plain = {_squashed(name): tensor for name, tensor in averages.items()}
        parts = other.prefix.split(".")  # LitEma may have been given a part of what the prefix leads through
        leads = [".".join(parts[depth:]) for depth in range(len(parts))]
        tries = [
            {name: plain[key] for name in other.tensors if (key := _squashed(lead + name)) in plain} for lead in leads
        ]
        fitting = max(tries, key=len)
        if len(fitting) not in (len(plain), len(other.tensors)):
            return None
    same = all(tensor.shape == other.tensors[name].shape for name, tensor in fitting.items())
    return fitting if fitting and same else None


def _squashed(name: str) -> str:
    return re.sub(r"[._/]", "", name)
