"""The sets of weights that a file's nested dictionaries hold, and which of them are averaged.

A set of tensors counts as a network where its names are a known family's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .names import network_prefixes, tidied, without_wrappers, words

# Words of the keys and prefixes that hold averaged weights, those that hold raw ones, and those without weights.
AVERAGED = frozenset({"ema", "swa", "averaged", "average", "avg", "shadow", "polyak"})
RAW = frozenset({"online", "current", "collected", "stored", "backup"})
NO_WEIGHTS = frozenset({"opt", "optim", "optimizer", "optimizers", "scheduler", "schedulers", "scaler", "rng"})
# Counters that averaging keeps beside the weights.
BOOKKEEPING = frozenset({"n_averaged", "initted", "step", "steps", "decay", "num_updates"})
DEPTH = 8  # of dictionaries in dictionaries

Entry = tuple[tuple[str, ...], dict[str, Tensor]]  # the keys that lead to a dictionary, and its tensors


@dataclass(frozen=True)
class Weights:
    """One set of weights: a dictionary of a file, and there the names under a prefix.

    Attributes:
        entry: the keys that lead to the dictionary; () is the file itself.
        prefix: what the names begin with there, with its dot.
        tensors: under the network's own names.
        averaged: whether its entry or prefix says so.
    """

    entry: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    averaged: bool

    @property
    def where(self) -> str:
        """For a sentence."""
        return place(self.entry, self.prefix)


def place(entry: Sequence[str], prefix: str = "") -> str:
    """Where in a file, for a sentence."""
    names = f"the names under {prefix!r}" if prefix else ""
    inside = f"the entry {'.'.join(entry)!r}" if entry else ""
    return " of ".join(part for part in (names, inside) if part) or "the file itself"


def mappings_in(raw: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Each dictionary of a file, once, and the keys and indices that lead to it; what holds no weights is left out."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), raw)]
    seen: set[int] = set()
    for path, inner in waiting:  # grows as it is walked
        if id(inner) in seen or len(path) > DEPTH:
            continue
        seen.add(id(inner))
        if isinstance(inner, Mapping):
            yield path, inner
        waiting += [
            ((*path, str(key)), value)
            for key, value in (inner.items() if isinstance(inner, Mapping) else enumerate(inner))
            if isinstance(value, (Mapping, list, tuple)) and not words(str(key)) & NO_WEIGHTS
        ]


def entries_of(raw: Mapping[Any, Any]) -> list[Entry]:
    """The dictionaries that hold tensors."""
    found = [
        (path, {_text(name): value for name, value in mapping.items() if isinstance(value, Tensor)})
        for path, mapping in mappings_in(raw)
    ]
    return [(path, tensors) for path, tensors in found if tensors]


def lists_of(raw: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """The lists of tensors, and the keys that lead to them."""
    for path, mapping in mappings_in(raw):
        for key, value in mapping.items():
            if isinstance(value, (list, tuple)) and not words(str(key)) & NO_WEIGHTS:
                tensors = [each for each in value if isinstance(each, Tensor)]
                if tensors:
                    yield (*path, str(key)), tensors


def _text(key: Any) -> str:
    """A key as a name; one that is no text in brackets, lest 1 and "1" be one."""
    return key if isinstance(key, str) else f"[{key}]"


def networks_in(entry: Entry, raw: Mapping[Any, Any], file: str) -> Iterator[Weights]:
    """The networks of known families among the tensors of one dictionary of ``raw``."""
    path, tensors = entry
    plain = {name: without_wrappers(name) for name in tensors if name not in BOOKKEEPING}
    prefixes = network_prefixes({short: tuple(tensors[name].shape) for name, short in plain.items()})
    others = [*prefixes, *(part for part in first_parts(plain.values()) if words(part) & AVERAGED)]
    for prefix in prefixes:
        deeper = tuple(other for other in others if other != prefix and other.startswith(prefix))
        own = {
            name: tensors[name]
            for name, short in plain.items()
            if short.startswith(prefix) and not short.startswith(deeper)
        }
        named = {name.removeprefix(prefix): tensor for name, tensor in tidied(own, file).items()}
        yield Weights(path, prefix, named, is_averaged(path, prefix, raw))


def first_parts(names: Iterable[str]) -> list[str]:
    """What names begin with up to their first dot, each once and with its dot."""
    return sorted({name.partition(".")[0] + "." for name in names if "." in name})


def is_averaged(path: tuple[str, ...], prefix: str, raw: Mapping[Any, Any]) -> bool:
    """By the last key that says it, but for the tools that put the average in the place of the raw weights.

    Lightning's WeightAveraging keeps the raw ones as ``current_model_state``, MMEngine's EMAHook as ``ema_state_dict``.
    """
    meta = raw.get("meta")
    exchanged = isinstance(meta, Mapping) and "mmengine_version" in meta
    if exchanged or "averaging_state" in raw:
        return path[:1] == ("state_dict",)
    for part in reversed([*path, *prefix.split(".")]):
        if words(part) & (AVERAGED | RAW):
            return not words(part) & RAW
    return False
