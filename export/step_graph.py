"""A network to its step graph: one call is one solver step.

    eps    = sum_g guidance[g] * float32(net(x, t, told[g]))   # one batch of G*B
    m      = clip(coef[0]*x + coef[1]*eps, clip[0], clip[1])
    x_next = coef[2]*x + coef[3]*base + coef[4]*m + coef[5]*h1 + coef[6]*h2 + coef[7]*z

``told`` are the named conditions, [G, B, ...] each; ``eps`` stands for whatever the network predicts. The lines of
the solver are float32 whatever the network is.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from sparse_engine import process
from sparse_engine.backends.base import WEIGHTS_FILE, StepGraph, weight_offsets
from sparse_engine.errors import BackendError

from .families import FamilyConfig

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20  # the first with Gelu as one node; ONNX Runtime 1.17 and TensorRT 10 read it
INLINE_BELOW = 1024  # bytes: shape constants and biases stay in the graph


class Step(nn.Module):
    """One solver step of a network that is told something beside x and t: see the module's text.

    Args:
        network: forward(x, t, **conditions) -> [B, C or more, H, W].
        guided_channels: see ``FamilyConfig``.
    """

    def __init__(self, network: nn.Module, guided_channels: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.guided = guided_channels

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        guidance: Tensor,
        coef: Tensor,
        clip: Tensor,
        base: Tensor,
        h1: Tensor,
        h2: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Shapes: x, base, h1, h2, z [B, C, H, W]; t [B]; conditions [G, B, ...]; guidance [G]; coef [8]; clip [2]."""
        passes, batch = next(iter(conditioning.values())).shape[:2]
        x_all = x[None].expand(passes, -1, -1, -1, -1).flatten(0, 1)
        t_all = t[None].expand(passes, -1).flatten()
        told = {name: rows.flatten(0, 1) for name, rows in conditioning.items()}
        predictions = _cut(self.network(x_all, t_all, **told), x).float().unflatten(0, (passes, batch))
        eps = (guidance[:, None, None, None, None] * predictions).sum(0)
        if self.guided is not None and self.guided < x.shape[1]:
            eps = torch.cat([eps[:, : self.guided], predictions[0, :, self.guided :]], dim=1)
        return solver_lines(x, eps, coef, clip, base, h1, h2, z)


class UnconditionalStep(nn.Module):
    """One solver step of a network that is told x and t alone: no ``guidance``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, t: Tensor, coef: Tensor, clip: Tensor, base: Tensor, h1: Tensor, h2: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shapes as in ``Step``."""
        eps = _cut(self.network(x, t), x).float()
        return solver_lines(x, eps, coef, clip, base, h1, h2, z)


def _cut(prediction: Tensor, x: Tensor) -> Tensor:
    """Without the channels that say something of the variance."""
    return prediction if prediction.shape[1] == x.shape[1] else prediction[:, : x.shape[1]]


def step_of(network: nn.Module, config: FamilyConfig) -> nn.Module:
    """A network's solver step: ``Step``, or ``UnconditionalStep`` where it is told nothing beside x and t."""
    return Step(network, config.guided_channels) if config.conditions else UnconditionalStep(network)


def solver_lines(
    x: Tensor, eps: Tensor, coef: Tensor, clip: Tensor, base: Tensor, h1: Tensor, h2: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """What follows the network: (x_next, m), in float32."""
    m = (coef[0] * x + coef[1] * eps).clamp(clip[0], clip[1])
    x_next = coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z
    return x_next, m


def export_step_graph(network: nn.Module, config: FamilyConfig) -> StepGraph:
    """Trace a network's step into ONNX, with dynamic batch and number of guidance passes.

    Args:
        network: in evaluation mode, its weights baked; forward(x, t, **conditions).
        config: gives the shapes of the data and of the conditions.

    Raises:
        BackendError: torch cannot export the network, or the exported graph is not a valid model.
    """
    step = step_of(network, config)
    inputs, dynamic = _example_inputs(config)
    names = [inner for name, value in inputs.items() for inner in (value if isinstance(value, dict) else [name])]
    return to_graph(trace(step, inputs, dynamic, names, ["x_next", "m"]))


def trace(
    module: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any], names: list[str], outputs: list[str]
) -> onnx_ir.Model:
    """Trace a module into ONNX.

    Args:
        module: in evaluation mode.
        inputs: argument of its ``forward`` -> an example.
        dynamic: argument -> which of its axes are dynamic, as ``torch.export`` takes them.
        names, outputs: what the graph calls what goes in and comes out.

    Raises:
        BackendError: torch cannot export it.
    """
    try:
        with _quiet(), torch.no_grad(), process.fragile():  # an exception through torch's dispatch modes aborts
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=names,
                output_names=outputs,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # a tracer raises whatever the network makes it raise
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise BackendError(f"torch {torch.__version__} cannot export the network: {cause}") from error
    if program is None:
        raise BackendError("torch.onnx.export returned no program")
    return program.model


def _example_inputs(config: FamilyConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(argument -> tensor, or name -> tensor of the conditions; which of their axes are dynamic)."""
    batch, passes = 3, 2  # any sizes but 0 and 1, which the exporter takes for constants
    b = torch.export.Dim("batch", min=1)
    g = torch.export.Dim("guidance", min=1)
    inputs: dict[str, Any] = {"x": torch.zeros(batch, *config.data_shape), "t": torch.zeros(batch)}
    dynamic: dict[str, Any] = {"x": {0: b}, "t": {0: b}}
    if config.conditions:
        told = {
            each.name: torch.zeros(passes, batch, *each.shape, dtype=getattr(torch, each.dtype))
            for each in config.conditions
        }
        inputs |= {"conditioning": told, "guidance": torch.ones(passes)}
        dynamic |= {"conditioning": {name: {0: g, 1: b} for name in told}, "guidance": {0: g}}
    inputs |= {"coef": torch.ones(8), "clip": torch.tensor([-1.0, 1.0])}
    dynamic |= {"coef": None, "clip": None}
    for name in ("base", "h1", "h2", "z"):
        inputs[name] = torch.zeros(batch, *config.data_shape)
        dynamic[name] = {0: b}
    return inputs, dynamic


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of packages and axis names that are no concern of the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def to_graph(model: onnx_ir.Model, weights_file: str = WEIGHTS_FILE) -> StepGraph:
    """Name layers after their modules, and move weights out of the graph, to a file of the name that it refers to."""
    import onnx_ir

    layers = _name_layers(model)
    weights, of_layers = {}, {initializer for initializer, _ in layers.values()}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and (name in of_layers or value.const_value.nbytes >= INLINE_BELOW):
            weights[name] = value.const_value.numpy()  # a view of the module's own, perhaps transposed
    offsets, _ = weight_offsets(weights)
    for name, array in weights.items():
        value = model.graph.initializers[name]
        kind = onnx_ir.DataType.from_numpy(array.dtype)
        value.const_value = onnx_ir.ExternalTensor(
            weights_file, offsets[name], array.nbytes, kind, shape=onnx_ir.Shape(array.shape), name=name
        )
    _drop_metadata(model)
    proto = onnx_ir.to_proto(model)
    proto.producer_name, proto.producer_version = "sparse-engine", ""
    return StepGraph(proto, weights, layers)


def _name_layers(model: onnx_ir.Model) -> dict[str, tuple[str, int]]:
    """Find each Linear's and Conv's node by the module it was traced from; name node and weight after it.

    The exporter folds transposes into constants called ``val_17``, so the weight's own name is no guide.
    """
    layers: dict[str, tuple[str, int]] = {}
    renamed: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        weight = node.inputs[1]
        layer = _module_of(node)
        if layer is None or weight is None or weight.const_value is None or weight.name is None:
            continue
        old = weight.name
        if old not in renamed:
            new = f"{layer}.weight"
            del model.graph.initializers[old]
            weight.name = new
            model.graph.initializers[new] = weight
            renamed[new] = new
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        layers[layer] = (weight.name, 1 if transposed or node.op_type == "Conv" else 0)
        node.name = layer
    return layers


def _module_of(node: onnx_ir.Node) -> str | None:
    """The innermost module of the network that a node was traced from, by the exporter's metadata."""
    scopes = json.loads(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))
    modules = [scope.removeprefix("network.") for scope in scopes[:-1] if scope.startswith("network.")]
    return modules[-1] if modules else None


def _drop_metadata(model: onnx_ir.Model) -> None:
    """Traces carry source paths of the machine that exported; an engine does not."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def check_graph(graph: StepGraph, state: Mapping[str, np.ndarray]) -> None:
    """Hold the graph against the ONNX standard, and its weights against those that were baked.

    Raises BackendError where the graph is invalid, or a layer's initializer is not the weight that was baked.
    """
    check_valid(graph.proto, "step graph")
    for layer, (initializer, axis) in graph.layers.items():
        stored, baked = graph.weights[initializer], state[f"{layer}.weight"]
        if not np.array_equal(stored if axis else stored.T, baked.astype(stored.dtype)):
            raise BackendError(f"{layer}: the exported graph does not hold the weight that was baked")


def check_valid(proto: onnx.ModelProto, name: str) -> None:
    """Hold a graph against the ONNX standard. Raises BackendError."""
    try:
        onnx.checker.check_model(_without_weights(proto), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the exported {name} is not valid ONNX: {error}") from error


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its external weights as inputs, which the checker takes without their data."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    external = [tensor for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    inputs = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in external]
    kept = [tensor for tensor in bare.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(kept)
    bare.graph.input.extend(inputs)
    return bare
