"""Bake masks into weights, and report per layer what was done and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_engine.errors import CheckpointError, OptionError

from .masks import TWO_FOUR, Pattern, energy_removed, is_n_of_m, magnitude_mask, obeys_training_groups
from .model import Model

MASK_RULES = ("auto", "explicit", "zeros", "magnitude", "none")


@dataclass(frozen=True)
class LayerReport:
    """One weight matrix or convolution.

    Attributes:
        source: where its mask came from: "explicit", "zeros", "magnitude", or None for a dense layer.
        hardware_24: whether each aligned group of four along the reduction axis has at most two nonzeros.
        reason: why a layer that was asked for is not masked, or a masked one is not hardware 2:4.
        energy_removed: share of the sum of squares that the mask took away.
        tied_groups: groups of four in which two equal nonzero weights competed for the last place.
        macs, macs_nonzero: multiply-accumulates per sample and network evaluation, all and with a nonzero weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str | None
    pattern: str | None
    hardware_24: bool
    reason: str | None
    energy_removed: float
    tied_groups: int
    parameters: int
    nonzeros: int
    macs: int
    macs_nonzero: int

    @property
    def masked(self) -> bool:
        """Whether the layer carries a mask."""
        return self.source is not None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {**dataclasses.asdict(self), "shape": list(self.shape), "masked": self.masked}


@dataclass(frozen=True)
class Baked:
    """Weights with their masks multiplied in. ``rule`` and ``patterns`` say how, so that it can be done again."""

    state: dict[str, np.ndarray]
    layers: list[LayerReport]
    rule: str
    pattern: Pattern
    globs: tuple[str, ...]

    @property
    def sparse_layers(self) -> list[LayerReport]:
        """The layers that 2:4 hardware and kernels can take."""
        return [layer for layer in self.layers if layer.masked and layer.hardware_24]

    def recipe(self) -> dict[str, Any]:
        """What ``bake`` needs to do the same again."""
        return {"rule": self.rule, "pattern": str(self.pattern), "layers": list(self.globs)}


def bake(
    model: Model,
    rule: str = "auto",
    pattern: Pattern = TWO_FOUR,
    layers: Sequence[str] | None = None,
) -> Baked:
    """Multiply masks into a model's weights.

    Args:
        model: what ``load_model`` read.
        rule: "auto" takes a layer's explicit mask, else its exact zeros, else SparseDM's magnitude rule; "explicit",
            "zeros" and "magnitude" take that one alone; "none" leaves the weights as they are stored. Explicit masks
            in the checkpoint are always multiplied in: without them the stored weights are not the model's.
        pattern: N:M for the magnitude rule. Only 2:4 is hardware 2:4.
        layers: globs over layer names in place of the family's own choice.

    Raises:
        OptionError: an unknown rule, or a glob that matches no layer.
        CheckpointError: rule "explicit" or "zeros" on a layer that has none.
    """
    if rule not in MASK_RULES:
        raise OptionError(f"mask rule {rule!r} is not known; expected one of {', '.join(MASK_RULES)}")
    globs = tuple(layers) if layers else model.family.sparse_layers
    modules = _maskable_modules(model)
    for glob in globs:
        if layers and not any(fnmatchcase(name, glob) for name in modules):
            raise OptionError(
                f"--mask-layers {glob!r} matches none of the {len(modules)} layers",
                f"names look like {', '.join(list(modules)[:3])}; `sparse-engine inspect` lists them",
            )
    state = dict(model.checkpoint.state)
    for name, stored_mask in model.checkpoint.masks.items():
        if name.removesuffix(".weight") not in modules:  # a bias, an embedding: no layer of its own below
            state[name] = np.where(stored_mask, state[name], np.float32(0))
    reports = []
    for name, kind in modules.items():
        selected = rule != "none" and any(fnmatchcase(name, glob) for glob in globs)
        weight = state[f"{name}.weight"]
        explicit = model.checkpoint.masks.get(f"{name}.weight")
        mask, source, tied, reason = _choose_mask(name, weight, explicit, rule if selected else "none", pattern)
        baked = weight if mask is None else np.where(mask, weight, np.float32(0))
        state[f"{name}.weight"] = baked
        removed = 0.0 if mask is None else energy_removed(weight, mask)
        positions = model.family.positions(model.config, name)
        reports.append(_report(name, kind, baked, source, pattern, tied, reason, removed, positions))
    return Baked(state, reports, rule, pattern, globs)


def _maskable_modules(model: Model) -> dict[str, str]:
    with torch.device("meta"):
        network = model.family.network(model.config)
    kinds = {nn.Linear: "linear", nn.Conv2d: "conv"}
    return {name: kinds[type(module)] for name, module in network.named_modules() if type(module) in kinds}


def _choose_mask(
    name: str, weight: np.ndarray, explicit: np.ndarray | None, rule: str, pattern: Pattern
) -> tuple[np.ndarray | None, str | None, int, str | None]:
    """Return (mask or None, its source, tied groups, why not)."""
    if explicit is not None:
        return explicit, "explicit", 0, None
    if rule == "explicit":
        raise CheckpointError(f"{name} carries no explicit mask", "use --mask auto")
    if rule in ("auto", "zeros") and obeys_training_groups(weight, pattern):
        return None, "zeros", 0, None
    if rule == "zeros":
        raise CheckpointError(f"{name}: its stored weights are not {pattern}", "use --mask auto, or magnitude")
    if rule == "none":
        return None, None, 0, None
    if weight.size % pattern.m:
        return None, None, 0, f"{weight.size} weights are no multiple of {pattern.m}"
    mask, tied = magnitude_mask(weight, pattern)
    return mask, "magnitude", tied, None


def _report(
    name: str,
    kind: str,
    weight: np.ndarray,
    source: str | None,
    pattern: Pattern,
    tied: int,
    reason: str | None,
    removed: float,
    positions: int,
) -> LayerReport:
    hardware = is_n_of_m(weight)
    if source and not hardware:
        reason = _why_not_hardware(weight, pattern)
    nonzeros = int(np.count_nonzero(weight))
    return LayerReport(
        name=name,
        kind=kind,
        shape=weight.shape,
        source=source,
        pattern=str(pattern) if source else None,
        hardware_24=hardware,
        reason=reason,
        energy_removed=removed,
        tied_groups=tied,
        parameters=weight.size,
        nonzeros=nonzeros,
        macs=weight.size * positions,
        macs_nonzero=nonzeros * positions,
    )


def _why_not_hardware(weight: np.ndarray, pattern: Pattern) -> str:
    if weight.shape[1] % 4:
        return f"{weight.shape[1]} inputs are no multiple of 4"
    if pattern != TWO_FOUR:
        return f"{pattern} is not 2:4"
    return "more than 2 of 4 along the inputs"
