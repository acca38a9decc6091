"""Convolutions in a step graph: to nodes of ``sparse_engine.Conv24``, and back.

A Conv takes with it: a doubling of its input (nearest neighbours) before it; what is added to each image and channel,
the time's embedding, and what is added to the whole, the residual, after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from sparse_engine.backends.onnx_graph import only_consumer, sizes
from sparse_engine.kernels.packing import matrix_as_conv

from .layers import DOMAIN, FusedLayer, other_input, put_in_place

CONV_OP = "Conv24"
SIDES = ("pad_top", "pad_left", "pad_bottom", "pad_right")
Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class FusedConv(FusedLayer):
    """A ``Conv24`` node. ``depth`` is channels x taps; ``image_bias`` [B, N, 1, 1] is added beside the bias.

    Attributes:
        kernel: taps, (height, width).
        stride: of both axes.
        pads: zeros at (top, left, bottom, right), of the input enlarged.
        upsample: how often each pixel of the input is repeated along both axes.
        size: (height, width) of an input image.
        image_bias: as the inputs of ``FusedLayer``.
    """

    kernel: tuple[int, int]
    stride: int
    pads: tuple[int, int, int, int]
    upsample: int
    size: tuple[int, int]
    image_bias: str = ""

    @classmethod
    def of(cls, node: NodeProto) -> FusedConv:
        """Read a node."""
        attributes = _attributes(node)
        x, values, positions, *others = node.input
        bias, image_bias, residual = [*others, "", "", ""][:3]
        kernel = (attributes["kernel_h"], attributes["kernel_w"])
        return cls(
            name=node.name,
            rows=attributes["N"],
            depth=attributes["C"] * kernel[0] * kernel[1],
            activation=attributes["activation"].decode(),
            x=x,
            values=values,
            positions=positions,
            bias=bias,
            residual=residual,
            output=node.output[0],
            kernel=kernel,
            stride=attributes["stride"],
            pads=tuple(attributes[side] for side in SIDES),
            upsample=attributes["upsample"],
            size=(attributes["height"], attributes["width"]),
            image_bias=image_bias,
        )

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.depth // (self.kernel[0] * self.kernel[1])

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of an image that comes out."""
        top, left, bottom, right = self.pads
        height, width = (
            (side * self.upsample + pads - taps) // self.stride + 1
            for side, pads, taps in zip(self.size, (top + bottom, left + right), self.kernel, strict=True)
        )
        return height, width

    @property
    def geometry(self) -> str:
        """See ``FusedLayer``."""
        enlarged = f" enlarged {self.upsample}x" if self.upsample > 1 else ""
        pads = " ".join(map(str, self.pads))
        image_bias = " image bias" if self.image_bias else ""
        kernel = "x".join(map(str, self.kernel))
        return f" conv {kernel} stride {self.stride} pads {pads} of {self.size[0]}x{self.size[1]}{enlarged}{image_bias}"

    def tokens(self, batch: int, positions: int, enough: int) -> int:
        """See ``FusedLayer``: of whole images."""
        return max(1, min(batch, enough // positions)) * positions

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """See ``FusedLayer``."""
        images, *shape = self.output_shape(tokens)
        given = {
            self.x: (images, self.channels, *self.size),
            self.image_bias: (images, self.rows, 1, 1),
            self.residual: (images, *shape),
        }
        return {name: shape for name, shape in given.items() if name}

    def output_shape(self, tokens: int) -> tuple[int, ...]:
        """See ``FusedLayer``."""
        height, width = self.out_size
        return (tokens // (height * width), self.rows, height, width)

    def plain_weight(self, weight: np.ndarray) -> np.ndarray:
        """See ``FusedLayer``: [N, C, kh, kw]."""
        return matrix_as_conv(weight, self.kernel)

    def own_node(self, kernel: str, compute: str, threads: int) -> NodeProto:
        """See ``FusedLayer``."""
        return self.node(tactic=kernel, compute=compute, threads=threads)

    @property
    def told(self) -> dict[str, Any]:
        """The attributes that every operator of a convolution has."""
        numbers = {"N": self.rows, "C": self.channels, "kernel_h": self.kernel[0], "kernel_w": self.kernel[1]}
        window = {"stride": self.stride, "upsample": self.upsample, **dict(zip(SIDES, self.pads, strict=True))}
        return {**numbers, **window, "activation": self.activation}

    def node(self, **attributes: Any) -> NodeProto:
        """Write it as a node. Attributes: ``compute``, ``tactic`` and ``threads``."""
        inputs = [self.x, self.values, self.positions, self.bias, self.image_bias, self.residual]
        while not inputs[-1]:
            inputs.pop()
        attributes |= self.told | {
            "height": self.size[0],
            "width": self.size[1],
        }  # not the kernel's: what it is timed at
        return helper.make_node(CONV_OP, inputs, [self.output], name=self.name, domain=DOMAIN, **attributes)

    def feeds(self, second: FusedLayer) -> bool:
        """See ``FusedLayer``: no kernel computes two convolutions."""
        return False

    def plain_nodes(self, weight: str) -> list[NodeProto]:
        """The same in plain ONNX over a dense initializer [N, C, kh, kw]."""
        nodes = []
        x = self.x
        if self.upsample > 1:
            x = f"{self.name}.enlarged"
            nodes += _enlarging(self.x, x, f"{self.name}.scales", self.upsample)
        added = [name for name in (self.image_bias, self.residual) if name]
        outputs = [*(f"{self.name}.{index}" for index in range(len(added))), self.output]
        window: Any = {"kernel_shape": self.kernel, "strides": (self.stride, self.stride), "pads": self.pads}
        inputs = [x, weight, self.bias] if self.bias else [x, weight]
        nodes.append(helper.make_node("Conv", inputs, [outputs[0]], name=self.name, **window))
        for index, other in enumerate(added):
            add = helper.make_node("Add", [outputs[index], other], [outputs[index + 1]])
            add.name = f"{self.name}.{index + 1}"
            nodes.append(add)
        return nodes


def _enlarging(x: str, output: str, scales: str, times: int) -> list[NodeProto]:
    """Each pixel of x repeated so often along both axes."""
    constant = numpy_helper.from_array(np.array([1, 1, times, times], np.float32), scales)
    how: Any = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return [
        helper.make_node("Constant", [], [scales], name=scales, value=constant),
        helper.make_node("Resize", [x, "", scales], [output], name=output, **how),
    ]


def why_not(graph: GraphProto, node: NodeProto) -> str | None:
    """Why the kernel does not take a Conv whose weights are 2:4; None where it does."""
    return why_no_window(node) or (
        None if _image_size(graph, node.input[0]) is not None else "the size of its images is not known"
    )


def why_no_window(node: NodeProto) -> str | None:
    """The same, of how a Conv moves over images of whatever size."""
    attributes = _attributes(node)
    if attributes.get("group", 1) != 1:
        return f"a convolution in {attributes['group']} groups: the kernels have none"
    if set(attributes.get("dilations", [1])) != {1}:
        return f"a convolution with dilations {list(attributes['dilations'])}: the kernels have none"
    if len(set(attributes.get("strides", [1]))) != 1:
        return f"a convolution with strides {list(attributes['strides'])}: the kernels have one for both axes"
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or len(attributes["kernel_shape"]) != 2:
        return "not a convolution of images with explicit padding"
    return None


def fuse_conv(proto: ModelProto, name: str, shape: tuple[int, int], values: str, positions: str) -> None:
    """Replace a Conv that the kernel takes, and what goes before and follows it, by one node over a weight [N, K]."""
    graph = proto.graph
    start = next(node for node in graph.node if node.name == name)
    conv, absorbed = with_neighbours(graph, start, start.input[0], shape, (values, positions))
    put_in_place(graph, absorbed, conv.node(), start.input[1])


def with_neighbours(
    graph: GraphProto, start: NodeProto, given: str, shape: tuple[int, int], weight: tuple[str, str]
) -> tuple[FusedConv, list[NodeProto]]:
    """A Conv with what one kernel computes before and after it, and those nodes, the Conv among them.

    Args:
        graph: that it is in.
        start: the Conv.
        given: what it convolves: its input, or floats that its input is rounded from.
        shape: (N, K).
        weight: names of values and positions.
    """
    rows, depth = shape
    constants = {tensor.name for tensor in graph.initializer}
    attributes = _attributes(start)
    x, upsample, absorbed = given, 1, [start]
    before = next((node for node in graph.node if x in node.output), None)
    if before is not None and (times := _times_enlarged(graph, before)) and only_consumer(graph, x) is not None:
        x, upsample, absorbed = before.input[0], times, [before, start]
    image_bias = residual = ""
    follower = only_consumer(graph, start.output[0])
    if follower is not None and follower.op_type == "Add":
        other = other_input(follower, start)
        if other not in constants and _shape(graph, other)[1:] == (rows, 1, 1):
            absorbed, image_bias = [*absorbed, follower], other
            follower = only_consumer(graph, follower.output[0])
    if follower is not None and follower.op_type == "Add":
        other = other_input(follower, absorbed[-1])
        if other not in constants and _shape(graph, other)[1:] == _shape(graph, start.output[0])[1:]:
            absorbed, residual = [*absorbed, follower], other
    size = _image_size(graph, x)
    if size is None:  # of what is enlarged, where that of the enlarged is known
        height, width = _image_size(graph, given) or (0, 0)
        size = (height // upsample, width // upsample)
    conv = FusedConv(
        name=start.name,
        rows=rows,
        depth=depth,
        activation="none",
        x=x,
        values=weight[0],
        positions=weight[1],
        bias=start.input[2] if len(start.input) > 2 else "",
        residual=residual,
        output=absorbed[-1].output[0],
        kernel=tuple(attributes["kernel_shape"]),
        stride=next(iter(attributes.get("strides", [1]))),
        pads=tuple(attributes.get("pads", (0, 0, 0, 0))),
        upsample=upsample,
        size=size,
        image_bias=image_bias,
    )
    return conv, absorbed


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _shape(graph: GraphProto, name: str) -> tuple[int, ...]:
    """Of a value; 0 where an axis is dynamic, () where nothing is known."""
    known = (value for values in (graph.value_info, graph.input) for value in values if value.name == name)
    return next((sizes(value) for value in known), ())


def _image_size(graph: GraphProto, name: str) -> tuple[int, int] | None:
    shape = _shape(graph, name)
    return (shape[2], shape[3]) if len(shape) == 4 and all(shape[1:]) else None


def _times_enlarged(graph: GraphProto, node: NodeProto) -> int:
    """How often a Resize repeats each pixel; 0 where it does anything else, or is another node."""
    if node.op_type != "Resize":
        return 0
    attributes = _attributes(node)
    nearest = attributes.get("mode", b"nearest") == b"nearest"
    floors = attributes.get("nearest_mode", b"round_prefer_floor") == b"floor"
    from_corner = attributes.get("coordinate_transformation_mode", b"half_pixel") == b"asymmetric"
    before, after = _image_size(graph, node.input[0]), _image_size(graph, node.output[0])
    if not (nearest and floors and from_corner and before and after):
        return 0
    times = after[0] // before[0]
    return times if (before[0] * times, before[1] * times) == after and times in range(2, 9) else 0
