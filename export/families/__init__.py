"""Model families, told apart by the keys of their checkpoints. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from sparse_engine.errors import CheckpointError, OptionError

from .base import Family, FamilyConfig, Recipe, Shapes
from .dit import FAMILY as DIT
from .dit_diffusers import FAMILY as DIT_DIFFUSERS
from .uvit import FAMILY as UVIT
from .uvit_t2i import FAMILY as UVIT_T2I

FAMILIES: tuple[Family, ...] = (UVIT, UVIT_T2I, DIT, DIT_DIFFUSERS)

__all__ = ["FAMILIES", "Family", "FamilyConfig", "Recipe", "Shapes", "family_named", "recognise"]


def family_named(name: str) -> Family:
    """Look a family up. Raises OptionError on a name that is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise OptionError(f"model family {name!r} is not known; expected one of: {known}")


def recognise(shapes: Shapes, where: str) -> Family:
    """Tell a checkpoint's family from its keys. Raises CheckpointError where none fits."""
    for family in FAMILIES:
        if family.recognises(shapes):
            return family
    sample = ", ".join(list(shapes)[:4])
    prefix = _common_prefix(shapes)
    under = f", all under {prefix!r}" if prefix else ""
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"{where}: its {len(shapes)} keys ({sample}, ...{under}) are of no known model family; "
        f"expected one of: {known}",
        "check that this is the network's state dict and not an optimizer's or an autoencoder's",
    )


def _common_prefix(names: Iterable[str]) -> str:
    """The parts that all of several names begin with, each with its dot."""
    split = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in shared) if len(split) > 1 else ""
