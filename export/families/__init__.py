"""Model families, told apart by the keys of their checkpoints. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from sparse_engine.errors import CheckpointError, OptionError

from .base import Family, FamilyConfig, Layout, Recipe, Shapes
from .dit import FAMILY as DIT
from .dit_diffusers import FAMILY as DIT_DIFFUSERS
from .pixart import FAMILY as PIXART
from .sd3 import FAMILY as SD3
from .unet2d import FAMILY as UNET2D
from .unet_condition import FAMILY as UNET_CONDITION
from .unet_ddpm import FAMILY as UNET_DDPM
from .uvit import FAMILY as UVIT
from .uvit_t2i import FAMILY as UVIT_T2I

FAMILIES: tuple[Family, ...] = (UVIT, UVIT_T2I, DIT, DIT_DIFFUSERS, SD3, PIXART, UNET_DDPM, UNET2D, UNET_CONDITION)

__all__ = ["FAMILIES", "Family", "FamilyConfig", "Layout", "Recipe", "Shapes", "class_of", "family_named", "recognise"]


def family_named(name: str) -> Family:
    """Look a family up. Raises OptionError on a name that is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise OptionError(f"model family {name!r} is not known; expected one of: {known}")


def class_of(config: Mapping[str, Any]) -> str | None:
    """What diffusers calls the network that a ``config.json`` describes; None where it is not diffusers'.

    ``Transformer2DModel`` is several networks, told apart by their norms: ``Transformer2DModel:ada_norm_single``.
    """
    name = config.get("_class_name")
    return f"{name}:{config.get('norm_type')}" if name == "Transformer2DModel" else name


def recognise(shapes: Shapes, where: str, config: Mapping[str, Any] | None = None) -> Family:
    """Tell a checkpoint's family from what its configuration calls the network, else from its keys.

    Raises CheckpointError where none fits.
    """
    name = class_of(config or {})
    if name is not None:
        return _of_class(name, where)
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


def _of_class(name: str, where: str) -> Family:
    for family in FAMILIES:
        if name in family.class_names:
            return family
    known = ", ".join(sorted(taken for family in FAMILIES for taken in family.class_names))
    raise CheckpointError(
        f"{where}: the configuration beside it says that this is a {name}, which is not offered; "
        f"expected one of: {known}",
        "name the pipeline's denoiser (transformer/ or unet/), or say --family if it is of a known one all the same",
    )


def _common_prefix(names: Iterable[str]) -> str:
    """The parts that all of several names begin with, each with its dot."""
    split = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return "".join(f"{parts[0]}." for parts in shared) if len(split) > 1 else ""
