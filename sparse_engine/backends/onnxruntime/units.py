"""What one node of ours may compute of a graph: one layer or two in a row, and what surrounds them.

It normalises or joins its input and multiplies it, and may take the layer before those and the residual along: a
transformer's block is its attention and two of them. Units in 8 bits are ``int8``'s, those in bf16 ``layers_bf16``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

from onnx import NodeProto

from sparse_engine.backends.onnx_graph import GraphView

from .layers import DOMAIN, PAIR

EPSILON = 1e-5  # LayerNormalization's default


class Norm(NamedTuple):
    """A LayerNormalization over the last axis; absent inputs are empty strings."""

    gamma: str
    beta: str
    epsilon: float


class UnitLayer(Protocol):
    """What a unit has to know of a layer. Absent inputs are empty strings."""

    @property
    def name(self) -> str:
        """Of its product."""

    @property
    def rows(self) -> int:
        """N."""

    @property
    def depth(self) -> int:
        """K."""

    @property
    def activation(self) -> str:
        """After its bias."""

    @property
    def residual(self) -> str:
        """What is added last."""

    @property
    def output(self) -> str:
        """What it gives."""

    @property
    def is_sparse(self) -> bool:
        """Whether the weights are 2:4."""

    @property
    def arguments(self) -> list[str]:
        """The operator's inputs of this layer: weights and bias."""


L = TypeVar("L", bound=UnitLayer)


@dataclass(frozen=True)
class Unit(Generic[L]):
    """What one node computes. Absent inputs are empty strings.

    Attributes:
        layers: one or two.
        x, beside: floats that it reads; ``beside`` are more numbers of each token.
        rounded: codes or bfloat16 that it reads in their place.
        norm: of x, or of the front's output.
        before: nodes of the graph that it takes the place of, beside its layers'.
        front: a layer before those, whose output, with its residual, they are given and is added to theirs; ``x``,
            ``beside`` and ``rounded`` are then what it reads.
        result: name of what it gives, where that is not the last layer's output in floats.
    """

    layers: tuple[L, ...]
    x: str
    beside: str = ""
    rounded: str = ""
    norm: Norm | None = None
    before: tuple[NodeProto, ...] = ()
    front: L | None = None
    result: str = ""

    @property
    def all_layers(self) -> tuple[L, ...]:
        """The front too."""
        return (self.front, *self.layers) if self.front else self.layers

    @property
    def entry(self) -> L:
        """The layer that reads what the node is given."""
        return self.all_layers[0]

    @property
    def last(self) -> L:
        """The layer whose output it gives."""
        return self.layers[-1]

    @property
    def added(self) -> L:
        """The layer whose residual it reads."""
        return self.front or self.last

    @property
    def name(self) -> str:
        """Of the node."""
        return PAIR.join(layer.name for layer in self.all_layers)

    @property
    def reads_one(self) -> bool:
        """Whether what it reads goes as it is, in one part, into its first layer."""
        return bool(self.x) and not self.beside and (self.front is not None or self.norm is None)

    def inputs(self) -> list[str]:
        """Of the node."""
        of_second = self.layers[1].arguments if len(self.layers) > 1 else [""] * len(self.entry.arguments)
        gamma, beta = (self.norm.gamma, self.norm.beta) if self.norm else ("", "")
        names = [self.x, self.beside, self.rounded, *self.layers[0].arguments, *of_second]
        names += ["" if self.front else self.last.residual, gamma, beta]
        names += [*self.front.arguments, self.front.residual] if self.front else []
        while not names[-1]:
            names.pop()
        return names

    def attributes(self, threads: int) -> dict[str, Any]:
        """Of the node, in any precision."""
        first = self.layers[0]
        found = {"N": self.last.rows, "H": first.rows, "K": first.depth, "activation": first.activation}
        found |= {"F": self.front.depth} if self.front else {}
        return {**found, "threads": threads, **({"epsilon": self.norm.epsilon} if self.norm else {})}

    def words(self) -> str:
        """What its time depends on."""
        layers = ", ".join(
            f"{'2:4' if layer.is_sparse else 'dense'} {layer.rows}x{layer.depth} {layer.activation}"
            for layer in self.all_layers
        )
        given = "rounded" if self.rounded else "two parts" if self.beside else "floats"
        given += ", norm" if self.norm else ""
        return f"{layers} of {given}, {'residual' if self.added.residual else 'no residual'}"

    def with_what_comes_before(self, view: GraphView, rank: int) -> Self:
        """The same and the node that makes x, of so many axes, where one kernel computes both and none else reads x."""
        before = view.producers.get(self.x)
        if before is None or view.only_reader(self.x) is None:
            return self
        attributes = {entry.name: entry for entry in before.attribute}
        if "axis" in attributes and attributes["axis"].i not in (-1, rank - 1):
            return self
        nodes = (before, *self.before)
        if before.op_type == "LayerNormalization" and len([name for name in before.output if name]) == 1:
            epsilon = attributes["epsilon"].f if "epsilon" in attributes else EPSILON
            gamma, beta = [*before.input[1:], ""][:2]
            if all(not name or name in view.constants for name in (gamma, beta)):
                return replace(self, x=before.input[0], norm=Norm(gamma, beta, epsilon), before=nodes)
        sizes = [view.sizes(name)[-1:] for name in before.input]
        if before.op_type == "Concat" and len(sizes) == 2 and all(size > (0,) for size in sizes):
            return replace(self, x=before.input[0], beside=before.input[1], before=nodes)
        return self

    def behind(self, front: Self) -> Self:
        """This unit with the only layer of another, whose output it reads."""
        before = (*front.before, *self.before)
        return replace(self, x=front.x, beside=front.beside, rounded=front.rounded, before=before, front=front.last)


U = TypeVar("U", bound=Unit[Any])


def with_fronts(view: GraphView, units: Sequence[U], alone: Callable[[U], bool]) -> list[U]:
    """Units of two layers with the layer before them, where nobody else reads what lies between (``alone``)."""
    by_output = {unit.last.output: unit for unit in units}
    made, fronts = [], set[str]()
    for unit in units:
        front = by_output.get(unit.x) if unit.norm and len(unit.layers) > 1 and unit.last.residual == unit.x else None
        if (
            front is None
            or front.norm
            or len(front.layers) > 1
            or front.last.activation != "none"
            or view.leaves(unit.x)
            or not alone(unit)
        ):
            made.append(unit)
            continue
        fronts.add(front.name)
        made.append(unit.behind(front))
    return [unit for unit in made if unit.name not in fronts]


def exchanges(node: NodeProto, *computes: bytes) -> bool:
    """Whether a node is an attention of ours in one of these precisions, which takes and gives what is rounded."""
    compute = next((entry.s for entry in node.attribute if entry.name == "compute"), b"")
    return node.domain == DOMAIN and node.op_type == "SelfAttention" and compute in computes
