"""A network as the list of operations that it is, in their order, and where its layers stand in it.

Layers are pruned one after another, each given what the layers before it, already pruned, make of the states. A list
of operations can be stopped before any layer for all states and gone on with, so the network is run once in all, and
what is kept between two stops is what later operations use: the states of one block and the skips that are alive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparse_engine import process
from sparse_engine.errors import BackendError
from sparse_engine.export.families import FamilyConfig

LINEAR, CONV = torch.ops.aten.linear.default, (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
ADD, TRANSPOSE, RESHAPE = torch.ops.aten.add.Tensor, torch.ops.aten.transpose.int, torch.ops.aten.reshape.default
EXAMPLE_BATCH = 3  # any size but 0 and 1, which the tracer takes for constants


@dataclasses.dataclass(frozen=True)
class Layer:
    """One Linear or Conv2d where it is applied.

    Attributes:
        name: of the module.
        node: its operation.
        source: what it is given.
        module: itself.
        beside: what its outputs are added to, and nothing else is done with them: the other end of a residual. None
            where there is no such.
    """

    name: str
    node: Node
    source: Node
    module: nn.Linear | nn.Conv2d
    beside: Node | None = None

    @property
    def columns(self) -> int:
        """Length of the sums: inputs, times taps."""
        return math.prod(self.module.weight.shape[1:])

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.module.weight.shape[0]

    def geometry(self) -> tuple[Any, ...]:
        """What is equal for layers whose columns are the same numbers, given the same input."""
        if isinstance(self.module, nn.Linear):
            return ("linear",)
        conv = self.module
        return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A network's operations.

    Attributes:
        nodes: the calls, in an order in which each comes after what it uses.
        tensors: placeholder -> name of the parameter or buffer that it stands for.
        inputs: placeholder -> name of the network's argument.
        constants: placeholder -> a tensor that is neither.
        groups: layers that are given the same, in the order of the network.
        network: what was traced.
    """

    nodes: list[Node]
    tensors: dict[Node, str]
    inputs: dict[Node, str]
    constants: dict[Node, Tensor]
    groups: list[list[Layer]]
    network: nn.Module

    def largest(self) -> int:
        """Bytes of the largest value that an operation makes of one sample."""
        sizes = [_size(node.meta.get("val")) for node in self.nodes]
        return max(sizes, default=0) // EXAMPLE_BATCH


def trace(network: nn.Module, config: FamilyConfig, selected: Mapping[str, nn.Module]) -> Traced:
    """Trace a network of a family.

    Args:
        network: in evaluation mode; forward(x, t, **conditions).
        config: gives the shapes of the data and of the conditions.
        selected: the layers to stop before, by name. One that the network never uses is left out of the groups.

    Raises:
        BackendError: torch cannot trace it.
    """
    program = _exported(network, config)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    arguments = ["x", "t", *(each.name for each in config.conditions)]
    free = [node for node in placeholders if node.name not in named and node.name not in lifted]
    weights = {f"{name}.weight": name for name in selected}
    tensors = {node: named[node.name] for node in placeholders if node.name in named}
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    layers: dict[str, Layer] = {}
    before: set[Node] = set()
    for node in nodes:
        before.add(node)
        if node.target is LINEAR or node.target in CONV:
            name = weights.get(tensors.get(node.args[1], ""))
            if name is not None and name not in layers:
                module, source = selected[name], node.args[0]
                layers[name] = Layer(name, node, source, module, _beside(node, before))  # type: ignore[arg-type]
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers.values():
        groups.setdefault((layer.source, layer.geometry()), []).append(layer)
    kept = _used(nodes, [node for layer in layers.values() for node in (layer.source, layer.beside) if node])
    place = {node: index for index, node in enumerate(kept)}
    return Traced(
        kept,
        tensors,
        dict(zip(free, arguments, strict=True)),
        {node: program.constants[lifted[node.name]] for node in placeholders if node.name in lifted},
        sorted(groups.values(), key=lambda group: place.get(group[0].source, -1)),
        network,
    )


def _exported(network: nn.Module, config: FamilyConfig) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    told = {
        each.name: torch.zeros(EXAMPLE_BATCH, *each.shape, dtype=getattr(torch, each.dtype))
        for each in config.conditions
    }
    inputs = (torch.zeros(EXAMPLE_BATCH, *config.data_shape), torch.zeros(EXAMPLE_BATCH))
    dynamic = {name: {0: batch} for name in ("x", "t", *told)}
    try:
        with torch.no_grad(), process.fragile():  # an exception through torch's dispatch modes aborts
            return torch.export.export(network, inputs, told, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # a tracer raises whatever the network makes it raise
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise BackendError(f"torch {torch.__version__} cannot trace the network: {cause}") from error


def _beside(node: Node, before: set[Node]) -> Node | None:
    """What a layer's outputs are added to, if that is all that becomes of them and it is there by then.

    Between the layer and the sum, tokens [B, L, C] may become a map [B, C, H, W].
    """
    end, user = node, _only_user(node)
    if user is not None and user.target is TRANSPOSE and user.args[1:] == (1, 2):
        reshaped = _only_user(user)
        if reshaped is not None and reshaped.target is RESHAPE and len(reshaped.meta["val"].shape) == 4:
            end, user = reshaped, _only_user(reshaped)
    if user is None or user.target is not ADD or user.kwargs:
        return None
    others = [other for other in user.args if other is not end]
    other = others[0] if len(others) == 1 else None
    if not isinstance(other, Node) or other not in before or _size(other.meta["val"]) != _size(end.meta["val"]):
        return None
    return other


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _used(nodes: list[Node], ends: list[Node]) -> list[Node]:
    """The operations that some of the ends depend on."""
    wanted, waiting = set(ends), list(ends)
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used not in wanted:
                wanted.add(used)
                waiting.append(used)
    return [node for node in nodes if node in wanted]


def _size(value: Any) -> int:
    """Bytes of a traced value at the example's batch."""
    if isinstance(value, Tensor):
        return math.prod(int(size) for size in value.shape) * value.element_size()
    return sum(_size(each) for each in value) if isinstance(value, (list, tuple)) else 0
