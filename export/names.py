"""Names of tensors: what wrappers add to them, what their words say, and under which prefix a network lies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparse_engine.errors import CheckpointError

from .families import FAMILIES, Shapes
from .mask_carriers import weight_name

# What wrappers put between the parts of a name: torch.compile, FSDP, activation checkpointing, Lightning Fabric.
WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
)
PARALLEL = "module"  # DataParallel's and AveragedModel's, at the front alone: a network may have a part of that name
PREFIX_PARTS = 4  # how deep inside a training module a network is looked for


def words(text: str) -> set[str]:
    """The words of a key, in lower case: "EMACallback.ema_state_dict" -> ema, callback, state, dict."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def without_wrappers(name: str) -> str:
    """A tensor's name as the network itself has it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == PARALLEL:
        del parts[0]
    return ".".join(parts)


def tidied(tensors: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Tensors under ``without_wrappers``. Raises CheckpointError where two end under one name."""
    stored: dict[str, str] = {}
    for name in tensors:
        short = without_wrappers(name)
        if short in stored:
            raise CheckpointError(
                f"{file}: {stored[short]} and {name} are both {short} once wrappers' names are taken off",
                "save the state dict of one network alone",
            )
        stored[short] = name
    return {short: tensors[name] for short, name in stored.items()}


def network_prefixes(shapes: Shapes) -> list[str]:
    """The prefixes, "" too, under which the names are those of a known family; each ends in a dot."""
    under: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = weight_name(name).split(".")
        for depth in range(min(PREFIX_PARTS, len(parts) - 1) + 1):
            prefix = "".join(f"{part}." for part in parts[:depth])
            under.setdefault(prefix, {})[".".join(parts[depth:])] = shape
    return [prefix for prefix, own in under.items() if any(family.recognises(own) for family in FAMILIES)]


def tensors_in_words(count: int) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{count} tensor{'' if count == 1 else 's'}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few names for a sentence."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
