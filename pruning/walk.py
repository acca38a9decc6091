"""Two networks, the dense one and the one being pruned, walked side by side over all states, from layer to layer.

What an operation has made is kept as long as a later one uses it, and on disk where memory is short: first what is
used last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.files import output_error

from .graph import Layer, Traced

DENSE, PRUNED = 0, 1
Key = tuple[int, Node, int]  # batch, operation, which of the two networks
SPILL_FROM = 1 << 16  # bytes; smaller values stay


@dataclasses.dataclass(frozen=True)
class Given:
    """What a group of layers is given of one batch: the same tensor twice while nothing before it was pruned.

    ``missing`` is of each layer by how much what its outputs are added to is less in the pruned network than in the
    dense one; None where that is nothing.
    """

    dense: Tensor
    pruned: Tensor
    missing: tuple[Tensor | None, ...] = ()


class Kept:
    """Values that wait for later operations: in memory up to ``budget`` bytes, the others as files in ``folder``."""

    def __init__(self, budget: int, folder: Path, next_use: Callable[[Node], int]) -> None:
        self.budget, self.folder, self.next_use = budget, folder, next_use
        self.values: dict[Key, Any] = {}
        self.files: dict[Key, Path] = {}
        self.bytes = 0
        self.spilled = 0

    def put(self, key: Key, value: Any) -> None:
        """Keep a value."""
        self.values[key] = value
        self.bytes += _bytes(value)
        while self.bytes > self.budget and self._spill():
            pass

    def get(self, key: Key) -> Any:
        """A value that is kept; one on disk stays there."""
        if key in self.values:
            return self.values[key]
        return torch.load(self.files[key], weights_only=True)

    def drop(self, key: Key) -> None:
        """Forget a value that nothing uses any more."""
        if key in self.values:
            self.bytes -= _bytes(self.values.pop(key))
        elif key in self.files:
            self.files.pop(key).unlink(missing_ok=True)

    def _spill(self) -> bool:
        """Put on disk what is used last; False where nothing is left that is worth it."""
        large = [key for key, value in self.values.items() if isinstance(value, Tensor) and _bytes(value) >= SPILL_FROM]
        if not large:
            return False
        key = max(large, key=lambda each: (self.next_use(each[1]), each[0]))
        path = self.folder / f"{self.spilled}.pt"
        try:
            torch.save(self.values[key].clone(), path)  # a view would be stored with all that it is a view of
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
            raise output_error(path, error if isinstance(error, OSError) else OSError(28, str(error))) from error
        self.bytes -= _bytes(self.values.pop(key))
        self.files[key] = path
        self.spilled += 1
        return True


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(each) for each in value) if isinstance(value, (list, tuple)) else 0


class Walk:
    """One walk through a network, stopping before each group of layers.

    Args:
        traced: the network's operations.
        pruned: names of the layers whose weights are replaced on the way.
        states: what the network is given.
        batch: how many states at once.
        budget: bytes of states that are kept in memory between stops.
        folder: for the others.
    """

    def __init__(
        self, traced: Traced, pruned: Sequence[str], states: CalibrationData, batch: int, budget: int, folder: Path
    ) -> None:
        self.traced, self.nodes = traced, traced.nodes
        self.place = {node: index for index, node in enumerate(self.nodes)}
        dense = dict(traced.network.named_parameters()) | dict(traced.network.named_buffers())
        self.weights: list[dict[str, Tensor]] = [dense, dict(dense)]
        self.batches = [inputs_of(part, traced) for part in states.batches(batch)]
        self.stops = traced.groups
        self.last = self._last_uses()
        self.differs = self._differing({f"{name}.weight" for name in pruned})
        self.kept = Kept(budget, folder, self.last.__getitem__)

    def stop_before_each(self, progress: Callable[[], None]) -> Iterator[list[Layer]]:
        """Run both networks up to each group in turn; what it is given is then to be had from ``given``.

        New weights have to be put into ``replace`` before the next one. ``progress`` is told each batch.
        """
        at = 0
        for group in self.stops:
            until = self._stop(group)
            for batch in range(len(self.batches)):
                self._run(batch, at, until)
                progress()
            yield group
            at = max(at, until)
            self._drop(at)

    def given(self, group: Sequence[Layer]) -> Iterator[Given]:
        """Batch by batch, what a group is given."""
        source = group[0].source
        for batch in range(len(self.batches)):
            dense = self._value(batch, source, DENSE, {})
            pruned = self._value(batch, source, PRUNED, {}) if source in self.differs else dense
            yield Given(dense, pruned, tuple(self._missing(batch, layer.beside) for layer in group))

    def _missing(self, batch: int, beside: Node | None) -> Tensor | None:
        if beside is None or beside not in self.differs:
            return None
        return self._value(batch, beside, DENSE, {}) - self._value(batch, beside, PRUNED, {})

    def replace(self, name: str, weight: Tensor) -> None:
        """Give a layer of the pruned network its new weights."""
        self.weights[PRUNED][f"{name}.weight"] = weight

    def _run(self, batch: int, start: int, stop: int) -> None:
        """Run the operations from ``start`` to ``stop`` on a batch, and keep what later ones use."""
        live: dict[tuple[Node, int], Any] = {}
        for index in range(start, stop):
            node = self.nodes[index]
            for side in (DENSE, PRUNED) if node in self.differs else (DENSE,):

                def value(used: Node, side: int = side) -> Any:
                    return self._value(batch, used, side, live)

                args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
                live[node, side] = node.target(*args, **kwargs)  # type: ignore[operator]
            for key in [key for key in live if self.last[key[0]] <= index]:
                del live[key]
        for (node, side), made in live.items():
            self.kept.put((batch, node, side), made)

    def _value(self, batch: int, node: Node, side: int, live: Mapping[tuple[Node, int], Any]) -> Any:
        side = side if node in self.differs else DENSE
        if (node, side) in live:
            return live[node, side]
        if node in self.traced.inputs:
            return self.batches[batch][self.traced.inputs[node]]
        if node in self.traced.tensors:
            return self.weights[side][self.traced.tensors[node]]
        if node in self.traced.constants:
            return self.traced.constants[node]
        return self.kept.get((batch, node, side))

    def _drop(self, at: int) -> None:
        """Forget what no operation from ``at`` on uses."""
        for key in [*self.kept.values, *self.kept.files]:
            if self.last[key[1]] < at:
                self.kept.drop(key)

    def _last_uses(self) -> dict[Node, int]:
        """Operation -> the place of the last that uses it, in the list or as a stop."""
        last = dict(self.place)
        for index, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                if used in last:
                    last[used] = index
        for group in self.stops:
            stop = self._stop(group)
            for waiting in (group[0].source, *(layer.beside for layer in group)):
                if waiting is not None and waiting in last:
                    last[waiting] = max(last[waiting], stop)
        return last

    def _stop(self, group: Sequence[Layer]) -> int:
        """How many operations have to be run before a group: all that it is given, and added to, is there then."""
        needed = [group[0].source, *(layer.beside for layer in group)]
        return max(self.place.get(node, -1) for node in needed if node is not None) + 1

    def _differing(self, names: set[str]) -> set[Node]:
        """The parameters that are replaced, and all operations that depend on one."""
        differs = {node for node, name in self.traced.tensors.items() if name in names}
        for node in self.nodes:
            if any(used in differs for used in node.all_input_nodes):
                differs.add(node)
        return differs


def inputs_of(states: CalibrationData, traced: Traced) -> dict[str, Tensor]:
    """The network's arguments for some states, by name."""
    arrays: dict[str, np.ndarray] = {"x": states.x, "t": states.network_times, **states.conditioning}
    return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in traced.inputs.values()}
