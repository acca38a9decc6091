"""Which set of weights of a file is used: averaged before raw, one or none, and said aloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_engine.errors import CheckpointError

from .averages import averages_named
from .names import listed, tensors_in_words, tidied
from .weight_sets import Entry, Weights, entries_of, is_averaged, lists_of, networks_in, place


def choose_weights(raw: Mapping[Any, Any], file: str) -> tuple[dict[str, Tensor], list[str]]:
    """The network's tensors under its own names, and notes on what was taken and what was not.

    Args:
        raw: what the file holds.
        file: its name, for sentences.

    Raises:
        CheckpointError: there are no tensors, several sets of weights with nothing to choose between them, averaged
            weights that cannot be matched with names, or two tensors of one name.
    """
    entries = entries_of(raw)
    if not entries:
        raise CheckpointError(
            f"{file} has no tensors; its entries are {', '.join(map(str, list(raw)[:6])) or 'none'}",
            "expected a state dict, or one under nnet_ema, ema, model, state_dict or the like",
        )
    found = [weights for entry in entries for weights in networks_in(entry, raw, file)]
    found = found or [_likeliest(entries, file)]
    averaged = [weights for weights in found if weights.averaged]
    others = [weights for weights in found if not weights.averaged]
    taken = _only(averaged or averages_named(raw, entries, others, file) or others, file)
    passed_over = [weights for weights in found if weights is not taken]
    tensors, notes = _completed(taken, others)
    return tensors, [
        *_taken_note(taken, passed_over, file),
        *notes,
        *_unused_notes(raw, entries, [taken, *passed_over]),
    ]


def _likeliest(entries: Sequence[Entry], file: str) -> Weights:
    """Where no names are a known family's, which the caller says: the names to say it of."""
    ranked = [(is_averaged(path, "", {}), len(tensors)) for path, tensors in entries]
    best = ranked.index(max(ranked))
    path, tensors = entries[best]
    return Weights(path, "", tidied(tensors, file), ranked[best][0])


def _only(choices: Sequence[Weights], file: str) -> Weights:
    if len(choices) > 1:
        raise CheckpointError(
            f"{file} holds several sets of weights, and nothing says which is wanted: "
            f"{'; '.join(weights.where for weights in choices)}",
            "save the wanted one alone, as a plain state dict: torch.save(model.state_dict(), ...)",
        )
    return choices[0]


def _completed(taken: Weights, others: Sequence[Weights]) -> tuple[dict[str, Tensor], list[str]]:
    """Averages with what is not averaged (buffers, masks, frozen weights) out of the raw weights, if there are any."""
    lacking = others[0].tensors.keys() - taken.tensors.keys() if taken.averaged and len(others) == 1 else set()
    if not lacking:
        return taken.tensors, []
    count = tensors_in_words(len(lacking))
    there = f"not averaged, and taken from {others[0].where}: {count}, {listed(lacking)}"
    return {**others[0].tensors, **taken.tensors}, [there]


def _taken_note(taken: Weights, passed_over: Sequence[Weights], file: str) -> list[str]:
    if not (taken.entry or taken.prefix or passed_over):
        return []
    kind = "averaged weights" if taken.averaged else "weights"
    beside = f", not from {' or '.join(weights.where for weights in passed_over)}" if passed_over else ""
    return [f"{kind} taken from {taken.where} of {file}{beside}"]


def _unused_notes(raw: Mapping[Any, Any], entries: Sequence[Entry], named: Sequence[Weights]) -> list[str]:
    """Which tensors of a file nothing uses, beside those of the sets that are named already."""
    used = {id(tensor) for weights in named for tensor in weights.tensors.values()}
    lists = [(path, {f"[{index}]": each for index, each in enumerate(own)}) for path, own in lists_of(raw)]
    left = [
        (path, [name for name, tensor in own.items() if id(tensor) not in used]) for path, own in [*entries, *lists]
    ]
    return [
        f"not used: {tensors_in_words(len(names))} of {place(path)}: {listed(names)}" for path, names in left if names
    ]
