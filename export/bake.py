"""Bake masks into weights, and report per layer what was done and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_engine.errors import CheckpointError, OptionError

from .masks import TWO_FOUR, Pattern, energy_removed, is_n_of_m, magnitude_mask, obeys_training_groups
from .model import Model

LEFT_DENSE = "dense weights, in a checkpoint of which other layers are pruned (--mask magnitude masks all)"
MASK_RULES = ("auto", "explicit", "zeros", "magnitude", "none")


@dataclass(frozen=True)
class LayerReport:
    """One weight matrix or convolution.

    Attributes:
        source: where its mask came from: "explicit", "zeros", "magnitude", or None for a dense layer.
        pattern: the N:M that the mask keeps to; None for a dense layer, and for an explicit mask of another kind.
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
        rule: "auto" takes a layer's explicit mask, else its exact zeros, else SparseDM's magnitude rule; where the
            checkpoint has masks or zeros in some of the layers, it leaves the others dense, as their author did; where
            it says itself which layers were pruned and which left dense (``PruningRecord``), that is obeyed.
            "explicit", "zeros" and "magnitude" take that one alone; "none" leaves the weights as they are stored.
            Explicit masks in the checkpoint are always multiplied in: without them the stored weights are not the
            model's.
        pattern: N:M for the magnitude rule. Only 2:4 is hardware 2:4. For "auto", 2:4 is the record's own.
        layers: globs over layer names in place of the family's own choice.

    Raises:
        OptionError: an unknown rule, or a glob that matches no layer.
        CheckpointError: rule "explicit" or "zeros" on a layer that has none.
    """
    if rule not in MASK_RULES:
        raise OptionError(f"mask rule {rule!r} is not known; expected one of {', '.join(MASK_RULES)}")
    globs, modules = tuple(layers) if layers else model.family.sparse_layers, _maskable_modules(model)
    chosen_names = _matching(model, modules, globs)
    state = dict(model.checkpoint.state)
    for name, stored_mask in model.checkpoint.masks.items():
        if name.removesuffix(".weight") not in modules:  # a bias, an embedding: no layer of its own below
            state[name] = np.where(stored_mask, state[name], np.float32(0))
    masks = model.checkpoint.masks
    selected = [] if rule == "none" else chosen_names
    weights = {name: (state[f"{name}.weight"], masks.get(f"{name}.weight")) for name in modules}
    record = pruning_record(model.checkpoint.config) if rule == "auto" else None
    if record is not None and pattern == TWO_FOUR:
        pattern = record.pattern
    pruned = rule == "auto" and (record or any(is_pruned(*weights[name], pattern) for name in selected))
    reports = []
    for name, module in modules.items():
        weight, explicit = weights[name]
        rule_here = "none" if name not in selected else "stored" if pruned else rule
        if record is not None and name in record.pruned and name in selected:
            rule_here = rule
        chosen = _choose_mask(name, weight, explicit, rule_here, pattern)
        if record is not None and name in record.dense and name in selected:
            chosen = _Mask(reason=record.dense[name])
        baked = weight if chosen.mask is None else np.where(chosen.mask, weight, np.float32(0))
        state[f"{name}.weight"] = baked
        removed = 0.0 if chosen.mask is None else energy_removed(weight, chosen.mask)
        positions = model.family.positions(model.config, name)
        reports.append(_report(name, module, baked, chosen, pattern, removed, positions))
    return Baked(state, reports, rule, pattern, globs)


@dataclass(frozen=True)
class PruningRecord:
    """What a checkpoint says of its pruning, under "pruning" in its configuration: ``sparse-engine prune`` writes it.

    Attributes:
        pattern: N:M of the layers that were pruned.
        pruned: their names.
        dense: name -> why, of those that were left dense on purpose.
    """

    pattern: Pattern
    pruned: frozenset[str]
    dense: dict[str, str]


def pruning_record(config: Mapping[str, Any]) -> PruningRecord | None:
    """What a configuration says of pruning; None where it says nothing. Raises CheckpointError on anything else."""
    said = config.get("pruning")
    if said is None:
        return None
    fields = [said.get(name) for name in ("pattern", "pruned", "dense")] if isinstance(said, Mapping) else [None] * 3
    pattern, pruned, dense = fields
    if (
        not (isinstance(pattern, str) and isinstance(pruned, list) and isinstance(dense, Mapping))
        or not all(isinstance(name, str) for name in pruned)
        or not all(isinstance(text, str) for pair in dense.items() for text in pair)
    ):
        raise CheckpointError(
            'the configuration\'s "pruning" is no record of it: expected {"pattern": "2:4", "pruned": [names], '
            '"dense": {name: why}}',
            "prune the checkpoint again, or take that entry out",
        )
    try:
        return PruningRecord(Pattern.parse(pattern), frozenset(pruned), dict(dense))
    except OptionError as error:
        raise CheckpointError(f'the configuration\'s "pruning": {error.what}', error.fix) from error


def chosen_layers(model: Model, layers: Sequence[str] | None = None) -> list[str]:
    """The names of the layers that masks are for. ``layers`` and errors as ``bake``."""
    return _matching(model, _maskable_modules(model), tuple(layers) if layers else model.family.sparse_layers)


def _matching(model: Model, modules: Mapping[str, nn.Module], globs: Sequence[str]) -> list[str]:
    for glob in globs:
        if glob not in model.family.sparse_layers and not any(fnmatchcase(name, glob) for name in modules):
            raise OptionError(
                f"--mask-layers {glob!r} matches none of the {len(modules)} layers",
                f"names look like {', '.join(list(modules)[:3])}; `sparse-engine inspect` lists them",
            )
    return [name for name in modules if any(fnmatchcase(name, glob) for glob in globs)]


@dataclass(frozen=True)
class _Mask:
    """What was chosen for a layer: its mask, where it came from, how many groups were tied, and why there is none."""

    mask: np.ndarray | None = None
    source: str | None = None
    tied: int = 0
    reason: str | None = None


def _maskable_modules(model: Model) -> dict[str, nn.Linear | nn.Conv2d]:
    with torch.device("meta"):
        network = model.family.network(model.config)
    return {name: module for name, module in network.named_modules() if type(module) in (nn.Linear, nn.Conv2d)}


def is_pruned(weight: np.ndarray, explicit: np.ndarray | None, pattern: Pattern) -> bool:
    """Whether a layer shows that its author pruned it: a mask that keeps all does not, nor zeros that are all."""
    if explicit is not None:
        return not explicit.all()
    return obeys_training_groups(weight, pattern) and bool(weight.any())


def _choose_mask(name: str, weight: np.ndarray, explicit: np.ndarray | None, rule: str, pattern: Pattern) -> _Mask:
    """The mask of one layer. ``rule`` "stored" is "auto" for a checkpoint that says which layers were pruned."""
    if explicit is not None:
        return _Mask(explicit, "explicit")
    if rule == "explicit":
        raise CheckpointError(f"{name} carries no explicit mask", "use --mask auto")
    if rule in ("auto", "stored", "zeros") and obeys_training_groups(weight, pattern):
        return _Mask(source="zeros")
    ungrouped = f"{weight.size} weights are no multiple of {pattern.m}" if weight.size % pattern.m else None
    if rule == "zeros":
        raise CheckpointError(
            f"{name}: {ungrouped or f'its stored weights are not {pattern}'}",
            "leave it out with --mask-layers" if ungrouped else "use --mask auto, or magnitude",
        )
    if rule == "none":
        return _Mask()
    if ungrouped:
        return _Mask(reason=ungrouped)
    if rule == "stored":
        return _Mask(reason=LEFT_DENSE)
    mask, tied = magnitude_mask(weight, pattern)
    return _Mask(mask, "magnitude", tied)


def _report(
    name: str,
    module: nn.Linear | nn.Conv2d,
    weight: np.ndarray,
    chosen: _Mask,
    pattern: Pattern,
    removed: float,
    positions: int,
) -> LayerReport:
    hardware, reason = is_n_of_m(weight), chosen.reason
    if chosen.source and not hardware:
        reason = _why_not_hardware(weight, chosen, pattern, getattr(module, "groups", 1))
    kept = chosen.mask if chosen.source == "explicit" else weight
    nonzeros = int(np.count_nonzero(weight))
    return LayerReport(
        name=name,
        kind="linear" if isinstance(module, nn.Linear) else "conv",
        shape=weight.shape,
        source=chosen.source,
        pattern=str(pattern) if chosen.source and kept is not None and obeys_training_groups(kept, pattern) else None,
        hardware_24=hardware,
        reason=reason,
        energy_removed=removed,
        tied_groups=chosen.tied,
        parameters=weight.size,
        nonzeros=nonzeros,
        macs=weight.size * positions,
        macs_nonzero=nonzeros * positions,
    )


def _why_not_hardware(weight: np.ndarray, chosen: _Mask, pattern: Pattern, groups: int) -> str:
    """Every reason that holds: to mend one alone would not help."""
    if chosen.source == "explicit" and chosen.mask is not None and chosen.mask.all():
        return "its stored mask keeps every weight"
    reasons = []
    if weight.shape[1] % 4:
        each = f" in each of {groups} groups" if groups > 1 else ""
        reasons.append(f"{weight.shape[1]} inputs{each} are no multiple of 4")
    if chosen.source != "explicit" and not (pattern.n == 1 or (pattern.n == 2 and pattern.m % 4 == 0)):
        reasons.append(f"{pattern} is not 2:4")
    return " and ".join(reasons) or "more than 2 of 4 along the inputs"
