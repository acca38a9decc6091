"""Model families, told apart by the keys of their checkpoints. A new family is one file and one line here."""

from __future__ import annotations

import os

from sparse_engine.errors import CheckpointError, OptionError

from .base import Family, FamilyConfig, Recipe, Shapes
from .uvit import FAMILY as UVIT

FAMILIES: tuple[Family, ...] = (UVIT,)

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
    prefix = os.path.commonprefix(list(shapes)).rpartition(".")[0]
    under = f", all under {prefix + '.'!r}" if prefix and len(shapes) > 1 else ""
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"{where}: its {len(shapes)} keys ({sample}, ...{under}) are of no known model family; expected one of: {known}",
        "check that this is the network's state dict and not an optimizer's or an autoencoder's",
    )
