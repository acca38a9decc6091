"""Dense weights to N:M ones in one shot: layer after layer, in the order of the network.

Each layer is pruned on what the layers before it, pruned already, make of states along sampling trajectories, towards
what the dense network makes of them. No gradient is taken and nothing is trained.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.bake import bake, chosen_layers, is_pruned
from sparse_engine.export.masks import TWO_FOUR, Pattern
from sparse_engine.export.model import Model
from sparse_engine.export.names import listed

from .gram import Sums, Work, collect, columns_of, weight_of
from .graph import Layer, Traced, trace
from .journal import Journal, Turn
from .solve import DAMPING, METHODS
from .walk import Walk

BATCH = 64  # states at once, where the largest value of the network leaves room for it
OF_BUDGET = 8  # the part of the budget that the largest value of a batch may take
MATRICES = 6  # of a layer's columns squared, float64, at once while it is solved
KEPT_DENSE = "kept dense by prune: pruning it did most damage"


@dataclasses.dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Attributes:
        method: "full" (SparseGPT's choice with the dense network's outputs as target, what stays solved exactly),
            "sparsegpt", "wanda" or "magnitude".
        pattern: N:M; only 2:4 has sparse kernels.
        layers: globs in place of the family's choice of layers.
        dense_layers: how many layers stay dense, those that pruning damages most.
        memory: bytes that states between layers may take in memory; the others are put on disk. A layer's matrices
            have to fit, too.
        force: prune what is pruned already.
    """

    method: str = "full"
    pattern: Pattern = TWO_FOUR
    layers: Sequence[str] | None = None
    dense_layers: int = 0
    memory: int = 4 << 30
    force: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method {self.method!r} is not known; expected one of {', '.join(METHODS)}")
        if isinstance(self.dense_layers, bool) or self.dense_layers < 0:
            raise OptionError(f"dense_layers is {self.dense_layers}; expected a whole number from 0")

    def to_dict(self) -> dict[str, Any]:
        """What fixes the result, for a journal."""
        layers = None if self.layers is None else list(self.layers)
        return {
            "method": self.method,
            "pattern": str(self.pattern),
            "layers": layers,
            "dense_layers": self.dense_layers,
            "force": self.force,
        }


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What became of one layer. Errors are shares of the energy of the dense network's outputs of the layer.

    Attributes:
        pruned: whether its weights are N:M now; if not, ``reason`` says why.
        error: of the new weights, given what the pruned network gives them.
        inherited: of the dense weights, given the same: what the layers before have done.
        by_magnitude: of the dense weights with all but the largest cut away, given the same.
        damping: what was added to the diagonal of G, in parts of its mean.
        states: how many rows of inputs G is of.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pruned: bool
    reason: str | None = None
    error: float = 0.0
    inherited: float = 0.0
    by_magnitude: float = 0.0
    damping: float = 0.0
    states: int = 0

    @property
    def damage(self) -> float:
        """What pruning this layer alone has added to the error of its outputs."""
        return self.error - self.inherited

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A pruned model: new tensors under the network's names, and what was done."""

    tensors: dict[str, Tensor]
    layers: list[LayerResult]
    options: PruneOptions
    work: Work
    seconds: float
    spilled: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def report(self, path: Path) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "path": str(path),
            "method": self.options.method,
            "pattern": str(self.options.pattern),
            "seconds": self.seconds,
            "float64": dataclasses.asdict(self.work),
            "spilled": self.spilled,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": self.notes,
        }

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it: ``bake`` obeys it."""
        return {
            "method": self.options.method,
            "pattern": str(self.options.pattern),
            "pruned": [layer.name for layer in self.layers if layer.pruned],
            "dense": {layer.name: layer.reason for layer in self.layers if not layer.pruned},
        }


def prune(
    model: Model,
    states: CalibrationData,
    options: PruneOptions,
    journal: Journal,
    folder: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Pruned:
    """Prune a model.

    Args:
        model: what ``load_model`` read.
        states: what the network is given: ``states.states_for``.
        options: how.
        journal: the layers that are done already, and where the others are noted as they are done.
        folder: for states that do not fit into memory.
        progress: told (done, in all, the layer at work).

    Raises:
        CheckpointError: it is pruned already, or nothing of it can be.
        OptionError: a glob that matches nothing, or a layer whose matrices do not fit into memory.
        NonFiniteError: the states or the network on them are NaN or infinite.
    """
    started, work = time.perf_counter(), Work()
    network = model.network(bake(model, "none").state)
    modules, spared = check_prunable(model, options)
    traced = trace(network, model.config, {name: network.get_submodule(name) for name in modules})
    used = [layer for group in traced.groups for layer in group]
    spared |= dict.fromkeys(set(modules) - {layer.name for layer in used}, "the network does not use it")
    _check_memory(used, options)
    walker = _Walker(traced, states, options, folder, work)
    walker.turns = 2 if options.dense_layers else 1
    done = walker.pruned([layer.name for layer in used], {}, journal.of("first"), progress)
    if options.dense_layers:
        excluded = worst([each.result for each in done.values()], options.dense_layers)
        names = [layer.name for layer in used if layer.name not in excluded]
        spared |= dict.fromkeys(excluded, KEPT_DENSE)
        done = walker.pruned(names, walker.before(excluded, done), journal.of("second"), progress)
    layers = [
        done[name].result
        if name in done
        else LayerResult(name, kind_of(module), tuple(module.weight.shape), False, spared[name])
        for name, module in network.named_modules()
        if name in done or name in spared
    ]
    tensors = {f"{name}.weight": each.weight for name, each in done.items()}
    return Pruned(tensors, layers, options, work, time.perf_counter() - started, walker.spilled, _warnings(layers))


def worst(layers: Sequence[LayerResult], count: int) -> list[str]:
    """The names of the layers whose outputs pruning has damaged most, of what it did to each alone."""
    return [layer.name for layer in sorted(layers, key=lambda each: -each.damage)[:count]]


def kind_of(module: nn.Module) -> str:
    """ "linear" or "conv"."""
    return "linear" if isinstance(module, nn.Linear) else "conv"


@dataclasses.dataclass(frozen=True)
class _Done:
    """One layer's new weight, and what was done."""

    weight: Tensor
    result: LayerResult


class _Walker:
    """Prunes layers on a walk through the network; there may be several walks."""

    def __init__(
        self, traced: Traced, states: CalibrationData, options: PruneOptions, folder: Path, work: Work
    ) -> None:
        self.traced, self.states, self.options, self.folder, self.work = traced, states, options, folder, work
        room = options.memory // OF_BUDGET // max(1, traced.largest())
        self.batch = max(1, min(BATCH, room, len(states)))
        self.turn, self.turns, self.spilled = 0, 1, 0

    def pruned(
        self,
        names: Sequence[str],
        done: Mapping[str, _Done],
        journal: Turn,
        progress: Callable[[int, int, str], None],
    ) -> dict[str, _Done]:
        """Prune these layers, but for those that are done."""
        made = dict(done)
        walk = Walk(self.traced, names, self.states, self.batch, self.options.memory, self.folder)
        each = len(walk.stops) * len(walk.batches)
        count = self.turn * each

        def step() -> None:
            nonlocal count
            count += 1
            progress(count, self.turns * each, "")

        for group in walk.stop_before_each(step):
            wanted = [layer for layer in group if layer.name in names]
            progress(count, self.turns * each, group[0].name)
            for layer, new in zip(wanted, self._of_group(wanted, walk, made, journal), strict=True):
                made[layer.name] = new
                walk.replace(layer.name, new.weight)
        self.turn += 1
        self.spilled = max(self.spilled, walk.kept.spilled)
        return made

    def before(self, excluded: Sequence[str], done: Mapping[str, _Done]) -> dict[str, _Done]:
        """What stays of a walk once some layers are not to be pruned: all before the first of them."""
        kept: dict[str, _Done] = {}
        for group in self.traced.groups:
            if any(layer.name in excluded for layer in group):
                break
            kept |= {layer.name: done[layer.name] for layer in group}
        return kept

    def _of_group(
        self, group: Sequence[Layer], walk: Walk, done: Mapping[str, _Done], journal: Turn
    ) -> Iterator[_Done]:
        noted = {layer.name: done.get(layer.name) or _read(journal, layer) for layer in group}
        missing = [layer for layer in group if noted[layer.name] is None]
        sums = dict(zip(group, collect(group, walk.given(group), self.work), strict=True)) if missing else {}
        for layer in group:
            new = noted[layer.name]
            if new is None:
                new = self._solved(layer, sums[layer])
                journal.write(layer.name, new.weight, new.result.to_dict())
            yield new

    def _solved(self, layer: Layer, sums: Sums) -> _Done:
        """Prune a layer, and measure what it cost."""
        options, module = self.options, layer.module
        dense = columns_of(module.weight).double()
        found = METHODS[options.method](dense, sums, options.pattern, self.work)
        new = found.weight.float()
        largest = METHODS["magnitude"](dense, sums, options.pattern, self.work).weight
        result = LayerResult(
            layer.name,
            kind_of(module),
            tuple(module.weight.shape),
            True,
            error=sums.error(new.double()),
            inherited=sums.error(dense),
            by_magnitude=sums.error(largest),
            damping=found.damping,
            states=sums.rows,
        )
        return _Done(weight_of(new, module.weight.shape), result)


def _read(journal: Turn, layer: Layer) -> _Done | None:
    """What a journal has of a layer."""
    found = journal.read(layer.name)
    if found is None:
        return None
    weight, facts = found
    return _Done(weight, LayerResult(**{**facts, "shape": tuple(facts["shape"])}))


def check_prunable(model: Model, options: PruneOptions) -> tuple[list[str], dict[str, str]]:
    """Say before the work what of a model can be pruned: (the layers, those of the chosen that cannot be and why).

    Raises OptionError, CheckpointError.
    """
    pattern, masks = options.pattern, model.checkpoint.masks
    chosen = chosen_layers(model, options.layers)
    weights = {name: model.checkpoint.state[f"{name}.weight"] for name in chosen}
    already = [name for name, weight in weights.items() if is_pruned(weight, masks.get(f"{name}.weight"), pattern)]
    if already and not options.force:
        raise CheckpointError(
            f"{model.checkpoint.path}: {len(already)} of the {len(chosen)} selected layers are {pattern} already: "
            f"{listed(already)}",
            "build takes it as it is, with --sparse; prune the dense weights, or these again with --force",
        )
    spared = {
        name: f"{weight.shape[1]} inputs are no multiple of {pattern.m}"
        for name, weight in weights.items()
        if weight.shape[1] % pattern.m
    }
    wanted = [name for name in chosen if name not in spared]
    if len(wanted) <= options.dense_layers:
        raise OptionError(
            f"{len(wanted)} of the {len(chosen)} selected layers can be pruned, and {options.dense_layers} are to stay "
            "dense: none is left",
            "choose others with --mask-layers, or fewer --dense-layers",
        )
    return wanted, spared


def _check_memory(layers: Sequence[Layer], options: PruneOptions) -> None:
    """Raise OptionError where a layer's matrices are larger than what may be used."""
    if not layers:
        return
    widest = max(layers, key=lambda layer: layer.columns)
    needed = 8 * MATRICES * widest.columns**2
    if needed > options.memory:
        raise OptionError(
            f"{widest.name} sums {widest.columns} products: its matrices take {needed / 2**30:.2g} GiB, and "
            f"{options.memory / 2**30:.2g} GiB may be used",
            "give more with --max-memory, or choose layers with --mask-layers",
        )


def _warnings(layers: Sequence[LayerResult]) -> list[str]:
    """What a user should know: layers whose states are too few, or needed more damping than usual."""
    pruned = [layer for layer in layers if layer.pruned]
    few = [layer for layer in pruned if layer.states < math.prod(layer.shape[1:])]
    notes = []
    if few:
        least = min(few, key=lambda layer: layer.states / math.prod(layer.shape[1:]))
        notes.append(
            f"warning: {len(few)} layers are given fewer rows of states than they have inputs (in {least.name} "
            f"{least.states} of {math.prod(least.shape[1:])}): their Gram matrices are singular, and damped; "
            "give more states (--images)"
        )
    damped = [layer for layer in pruned if layer.damping > DAMPING]
    if damped:
        notes.append(f"damped more than usual, to be solvable: {listed(layer.name for layer in damped)}")
    return notes
