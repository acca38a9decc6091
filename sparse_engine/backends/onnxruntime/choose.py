"""Which kernel each 2:4 layer, each attention and each group norm gets, by timing the candidates on this machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_engine import kernels
from sparse_engine.backends.attention import Attention
from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.cores import pool_size
from sparse_engine.kernels.library import Compute
from sparse_engine.manifest import Manifest
from sparse_engine.tactics import Choice, TacticCache
from sparse_engine.version import __version__

from .attention import MICROSOFT, own_nodes, runtime_nodes
from .compute import EXACT_PRODUCTS, NO_SPINNING, attention_in, products_in
from .convolutions import FusedConv
from .group_norm import GroupNorm
from .int8 import Int8Layer, Int8Unit
from .int8_convolutions import Int8Conv
from .layers import DOMAIN, PATTERNS, FusedLayer
from .layers_bf16 import Bf16Unit
from .library import load_onnxruntime

log = logging.getLogger(__name__)

# Tokens beyond which rows in lanes never won; in bf16 they do at any number, where a core permutes as fast as it
# multiplies.
N_LANES_UP_TO = {"fp32": 64, "bf16": 1 << 30}
ENOUGH_TOKENS = 2048  # more of them take longer and change nothing
ENOUGH_OF_STEPS = 1024  # tokens; the same of whole steps, which take long enough
DENSE = ("dense", "dense-bf16")
OWN_INT8, RUNTIME_INT8 = "own", "dense int8"  # candidates for layers in 8 bits
SPARSE_INT8 = "r-lanes int8"  # what reports call ours over 2:4 weights
LACKING = "this processor has neither AVX512-VNNI and AVX512-VBMI, nor AVX-VNNI, nor Arm's dot products"
PAIRED = ("t-lanes", "n-lanes", "dense-bf16")  # kernels that compute two layers in a row
ATTENTION_RULE = {"fp32": "onnxruntime", "bf16": "own", "int8": "own"}  # without timing
# Without timing: ours, its lanes by the tokens of the usual batch. Where T-lanes overtake N-lanes on a Zen 4: below it
# most lanes of a tile are empty.
UNTIMED_N_LANES_UP_TO = {"fp32": 12, "bf16": 24}


@dataclass(frozen=True)
class LayerChoice:
    """What a layer runs.

    Attributes:
        kernel: "dense" (ONNX Runtime's, float32), "dense-bf16" (ours); sparse: "t-lanes", "n-lanes", "r-lanes". One for
            every number of tokens: each adds up in an order of its own, and what is drawn must not depend on the batch.
        why: how that was decided.
        measured: tokens -> what was timed; at the usual batch alone.
    """

    kernel: str
    why: str
    measured: dict[int, Choice]

    def to_dict(self) -> dict[str, Any]:
        """For ``engine.info`` and ``inspect``."""
        timed = {str(tokens): choice.to_dict() for tokens, choice in self.measured.items()}
        chosen = self.kernel not in (*DENSE, OWN_INT8, RUNTIME_INT8)
        return {"chosen": chosen, "kernel": self.kernel, "why": self.why, "timed_by_tokens": timed}


def find_obstacle(compute: Compute) -> str | None:
    """Why no kernel of ours can run here; None where they can."""
    if not kernels.is_available():
        return "the compiled kernels are not installed"
    if kernels.best_tier(compute) == "scalar":
        return "this processor has no vector unit that the kernels know"
    return None


class Chooser:
    """Chooses for the layers of one engine, which runs in its own precision or in another."""

    def __init__(self, manifest: Manifest, threads: int | None, autotune: bool, precision: str | None = None) -> None:
        onnxruntime = load_onnxruntime()

        self._threads, self._autotune = threads, autotune
        precision = precision or manifest.precision
        self._compute, self._attention_compute = products_in(precision), attention_in(precision)
        self._batch = manifest.batch[1]
        self._positions = {layer["name"]: layer["macs"] // layer["parameters"] for layer in manifest.layers}
        of_layers = (sum(layer[key] for layer in manifest.layers) for key in ("macs", "parameters"))
        self._tokens_of_an_image = max(1, next(of_layers) // max(1, next(of_layers)))  # on average
        self._obstacle = find_obstacle(self._compute)
        if self._obstacle and manifest.sparse:
            log.warning("sparse layers run dense: %s", self._obstacle)
        self._cache = TacticCache(
            sparse_engine=__version__,
            onnxruntime=onnxruntime.__version__,
            kernels=kernels.LIBRARY_PATH.stat().st_mtime_ns if kernels.is_available() else None,
            threads=pool_size(threads),
            tier=None if self._obstacle else kernels.best_tier(self._compute),
        )

    def choose(self, layer: FusedLayer) -> LayerChoice:
        """The kernel for a layer: the fastest at the usual batch."""
        if self._obstacle:
            return LayerChoice("dense", f"no kernel of ours: {self._obstacle}", {})
        tokens = self._tokens(layer)
        if not self._autotune:
            lanes = "n-lanes" if tokens <= UNTIMED_N_LANES_UP_TO[self._compute] else "t-lanes"
            return LayerChoice(lanes if layer.is_sparse else "dense-bf16", "not timed: ours by default", {})
        names = candidates(layer, tokens, self._compute)
        choice = self._cache.choose(
            self._key(layer, tokens),
            lambda: {name: _product(layer, tokens, name, self._compute, self._threads) for name in names},
            names,
        )
        return LayerChoice(choice.kernel, "faster at the usual batch", {tokens: choice})

    def step(self, graph: bytes, candidates: Mapping[str, Callable[[], Callable[[], object]]], tuned: bool) -> Choice:
        """In what precision a whole step is fastest. Each candidate makes what runs one step of ``step_batch``.

        ``graph``: the engine's, which its time depends on. ``tuned``: float layers have the kernels that won.
        """
        name, how = hashlib.sha256(graph).hexdigest()[:16], "timed" if tuned else "by the rule"
        key = f"step {name} int8 {kernels.best_tier('int8')} floats {how} batch {self.step_batch}"
        return self._cache.choose(key, lambda: {name: make() for name, make in candidates.items()}, list(candidates))

    @property
    def step_batch(self) -> int:
        """The usual batch, but no more than it takes."""
        return max(1, min(self._batch, ENOUGH_OF_STEPS // self._tokens_of_an_image))

    def choose_int8(self, unit: Int8Unit, view: GraphView) -> LayerChoice:
        """``OWN_INT8`` or ``RUNTIME_INT8`` for layers in 8 bits that one node of ours would compute."""
        if not kernels.is_available() or kernels.best_tier("int8") == "scalar":
            return LayerChoice(RUNTIME_INT8, f"no kernel of ours: {LACKING}", {})
        tokens = max(1, min(self._batch * self._positions[unit.entry.name], ENOUGH_TOKENS))
        if not self._autotune:
            return LayerChoice(OWN_INT8, "not timed: ours by default", {})
        choice = self._cache.choose(
            f"int8 {kernels.best_tier('int8')} {unit.words()} tokens {tokens}",
            lambda: _int8_candidates(unit, view, tokens, self._threads),
            (OWN_INT8, RUNTIME_INT8),
        )
        return LayerChoice(choice.kernel, "faster at the usual batch", {tokens: choice})

    def choose_bf16(self, unit: Bf16Unit, view: GraphView, nodes: list[NodeProto]) -> Choice | None:
        """One node of ours for layers in bf16 and what surrounds them ("together"), or ``nodes`` ("apart").

        The one node where both are as good as equal, so that layers of a network get one form. None where there is no
        choice.
        """
        if self._obstacle or self._compute != "bf16":
            return None
        if not self._autotune:
            return Choice("together", {})
        tokens = self._tokens(unit.entry)
        choice = self._cache.choose(
            f"bf16 layers {unit.words()}, apart {kinds_of(nodes)}, tokens {tokens}",
            lambda: _bf16_candidates(unit, view, nodes, tokens, self._threads),
            ("together", "apart"),
        )
        return choice.leaning_to("together")

    def choose_int8_conv(self, conv: Int8Conv, view: GraphView) -> LayerChoice:
        """The same for a convolution."""
        if not kernels.is_available() or kernels.best_tier("int8 convolutions") == "scalar":
            return LayerChoice(RUNTIME_INT8, f"no kernel of ours: {LACKING}", {})
        tokens = self._tokens(conv.conv)
        if not self._autotune:
            return LayerChoice(OWN_INT8, "not timed: ours by default", {})
        choice = self._cache.choose(
            f"int8 {kernels.best_tier('int8 convolutions')} {conv.words()} tokens {tokens}",
            lambda: _int8_conv_candidates(conv, view, tokens, self._threads),
            (OWN_INT8, RUNTIME_INT8),
        )
        return LayerChoice(choice.kernel, "faster at the usual batch", {tokens: choice})

    def together(self, first: FusedLayer, second: FusedLayer, kernel: str) -> Choice | None:
        """Two layers in one node ("together") or two ("apart"), at the usual batch; None where they cannot be one.

        ``kernel`` is what was chosen for both.
        """
        if kernel not in PAIRED or not self._autotune or not first.feeds(second):
            return None
        tokens = self._tokens(first)
        return self._cache.choose(
            f"{self._key(first, tokens)} and {self._key(second, tokens)}",
            lambda: {
                name: self._pair(first, second, tokens, kernel, name == "together") for name in ("apart", "together")
            },
            ("apart", "together"),
        )

    def _pair(self, first: FusedLayer, second: FusedLayer, tokens: int, kernel: str, one: bool) -> Callable[[], object]:
        tactic = {"compute": self._compute, "tactic": kernel} if first.is_sparse else {}
        threads = pool_size(self._threads)
        if one:
            nodes = [first.node_with(second, threads=threads, **tactic)]
        else:
            nodes = [layer.own_node(kernel, self._compute, threads) for layer in (first, second)]
        constants = {**_own_constants(first), **_own_constants(second)}
        feed = {
            name: array for name, array in (_feed(first, tokens) | _feed(second, tokens)).items() if name != second.x
        }
        return _alone(nodes, feed, {second.output: second.output_shape(tokens)}, constants, self._threads)

    def attention(self, attention: Attention) -> Choice | None:
        """Our kernel ("own") or ONNX Runtime's; None where ours cannot run and there is no choice."""
        if self._obstacle:
            return None
        if not self._autotune:
            return Choice(ATTENTION_RULE[self._attention_compute], {})
        batch = max(1, min(self._batch, ENOUGH_TOKENS // max(attention.queries, attention.keys)))
        return self._cache.choose(
            f"{self._attention_compute} attention batch {batch} {shape_of(attention)}",
            lambda: self._attention_candidates(attention, batch),
            ("own", "onnxruntime"),
        )

    def _attention_candidates(self, attention: Attention, batch: int) -> Mapping[str, Callable[[], object]]:
        feed = _attention_feed(attention, batch)
        output = {attention.output: (batch, attention.queries, attention.width)}
        nodes = {
            "own": own_nodes(attention, self._attention_compute, pool_size(self._threads)),
            "onnxruntime": runtime_nodes(attention),
        }
        return {name: _alone(each, feed, output, {}, self._threads) for name, each in nodes.items() if each is not None}

    def group_norm(self, norm: GroupNorm) -> Choice | None:
        """Our kernel ("own") or the nodes that a norm was written as ("onnxruntime"); None where ours cannot run."""
        if self._obstacle:
            return None
        if not self._autotune:
            return Choice("own", {})
        batch = max(1, min(self._batch, ENOUGH_TOKENS // norm.area))
        return self._cache.choose(
            f"fp32 group norm batch {batch} {norm.words()}",
            lambda: self._group_norm_candidates(norm, batch),
            ("own", "onnxruntime"),
        )

    def _group_norm_candidates(self, norm: GroupNorm, batch: int) -> Mapping[str, Callable[[], object]]:
        rng = np.random.default_rng(0)
        channels, *places = norm.sizes[1:]
        feed = {norm.x: rng.standard_normal((batch, channels, *places), np.float32)}
        told = [name for name in (norm.scale, norm.shift) if name]
        feed |= {name: rng.standard_normal((batch, channels, *[1] * len(places)), np.float32) for name in told}
        nodes = {"own": [norm.node(pool_size(self._threads))], "onnxruntime": norm.plain}
        output = {norm.output: (batch, channels, *places)}
        arrays = norm.arrays()
        return {
            name: _alone(
                each,
                feed,
                output,
                {key: array for key, array in arrays.items() if any(key in node.input for node in each)},
                self._threads,
            )
            for name, each in nodes.items()
        }

    def _tokens(self, layer: FusedLayer) -> int:
        return layer.tokens(self._batch, self._positions[layer.name], ENOUGH_TOKENS)

    def _key(self, layer: FusedLayer, tokens: int) -> str:
        residual = "residual" if layer.residual else "no residual"
        weights = "2:4" if layer.is_sparse else "dense"
        shape = f"{layer.rows}x{layer.depth}{layer.geometry}"
        return f"{self._compute} {weights} {shape} {layer.activation} {residual} tokens {tokens}"


def shape_of(attention: Attention) -> str:
    """What an attention's time depends on, in words."""
    tokens = f"{attention.queries} tokens"
    if attention.qkv is None:
        tokens += f" to {attention.keys}"
    words = [tokens, f"{attention.heads} heads of {attention.head_dim}"]
    if attention.bias is not None:
        words.append(f"bias {'x'.join(str(size) if size else 'B' for size in attention.bias_sizes)}")
    if attention.qkv is None:
        first = "".join(part for part in "qkv" if getattr(attention, part).layout == "heads")
        words += [f"heads first in {first}"] if first else []
    return " ".join(words)


def _attention_feed(attention: Attention, batch: int) -> dict[str, np.ndarray]:
    """Random q, k and v, laid out as the graph has them, and no bias to speak of."""
    rng = np.random.default_rng(0)
    heads, head_dim, width = attention.heads, attention.head_dim, attention.width
    feed = {}
    if attention.qkv is not None:
        feed[attention.qkv] = rng.standard_normal((batch, attention.queries, 3 * width), np.float32)
    else:
        for operand, tokens in (
            (attention.q, attention.queries),
            (attention.k, attention.keys),
            (attention.v, attention.keys),
        ):
            shape = {
                "tokens": (batch, tokens, width),
                "tokens-heads": (batch, tokens, heads, head_dim),
                "heads": (batch, heads, tokens, head_dim),
            }[operand.layout]
            feed[operand.name] = rng.standard_normal(shape, np.float32)
    if attention.bias is not None:
        first, *others = attention.bias_sizes
        feed[attention.bias] = np.zeros((first if first == 1 else batch, *others), np.float32)
    return feed


def candidates(layer: FusedLayer, tokens: int, compute: str) -> tuple[str, ...]:
    """The kernels that are worth timing for a layer over so many tokens."""
    if not layer.is_sparse:
        return DENSE
    names = ("dense", "t-lanes", "n-lanes") if tokens <= N_LANES_UP_TO[compute] else ("dense", "t-lanes")
    return (*names, "r-lanes") if compute == "bf16" and isinstance(layer, FusedConv) else names


def _product(layer: FusedLayer, tokens: int, kernel: str, compute: str, threads: int | None) -> Callable[[], object]:
    """One layer alone, on random weights, with the kernel asked for."""
    constants = _own_constants(layer)
    if kernel == "dense":
        weight, values = f"{layer.name}.weight", constants.pop(layer.values)
        nodes = layer.plain_nodes(weight)
        dense = kernels.unpack(values, constants.pop(layer.positions)) if layer.is_sparse else values
        constants[weight] = layer.plain_weight(dense)
    else:
        nodes = [layer.own_node(kernel, compute, pool_size(threads))]
    return _alone(nodes, _feed(layer, tokens), {layer.output: layer.output_shape(tokens)}, constants, threads)


def own_int8_kernel(layer: Int8Layer) -> str:
    """What reports call our kernel for a layer in 8 bits."""
    return SPARSE_INT8 if layer.is_sparse else "own dense int8"


def _int8_candidates(
    unit: Int8Unit, view: GraphView, tokens: int, threads: int | None
) -> Mapping[str, Callable[[], object]]:
    """One unit alone, on random weights: as a node of ours, and as the graph has it."""
    rng = np.random.default_rng(0)
    own, plain = {}, {}
    # Codes that several layers read are made floats once, by a node that is none of the unit's.
    shared = [view.producer(name, "DequantizeLinear") for layer in unit.layers for name in _read_by(layer)]
    nodes = [*(node for node in shared if node is not None and node not in unit.nodes), *unit.nodes]
    small = _small_constants(nodes, view)
    for layer in unit.all_layers:
        kept = layer.depth // 2 if layer.is_sparse else layer.depth
        own[layer.values] = rng.integers(-127, 128, (layer.rows, kept), np.int8)
        if layer.packed:
            patterns = np.array(PATTERNS, np.uint8)
            own[layer.packed.positions] = rng.choice(patterns, (layer.rows, layer.depth // 4))
        shape = (layer.rows, layer.depth) if layer.axis else (layer.depth, layer.rows)
        plain[layer.codes] = rng.integers(-127, 128, shape, np.int8)
    feed = unit.feed(tokens, {name: view.sizes(name) for name in (unit.x, unit.beside) if name})
    lead = next(iter(feed.values())).shape[:-1]
    output = {unit.last.output: (*lead, unit.last.rows)}
    return {
        OWN_INT8: _alone([unit.node(pool_size(threads))], feed, output, {**small, **own}, threads),
        RUNTIME_INT8: _alone(nodes, feed, output, {**small, **plain}, threads),
    }


def kinds_of(nodes: Sequence[NodeProto]) -> str:
    """Some nodes, by what they run."""
    tactics = (next((entry.s.decode() for entry in node.attribute if entry.name == "tactic"), "") for node in nodes)
    return " ".join(tactic or node.op_type for node, tactic in zip(nodes, tactics, strict=True))


def _bf16_candidates(
    unit: Bf16Unit, view: GraphView, nodes: list[NodeProto], tokens: int, threads: int | None
) -> Mapping[str, Callable[[], object]]:
    """One unit alone, on random weights: as a node of ours, and as the graph has it."""
    rng = np.random.default_rng(0)
    constants = {name: rng.random(width, np.float32) for name, width in unit.constants().items()}
    for layer in unit.all_layers:
        constants |= _own_constants(layer)
    feed = unit.feed(tokens, view.sizes(unit.beside)[-1] if unit.beside else 0)
    lead = next(iter(feed.values())).shape[:-1]
    output = {unit.last.output: (*lead, unit.last.rows)}
    return {
        "together": _alone([unit.node(pool_size(threads))], feed, output, constants, threads),
        "apart": _alone(nodes, feed, output, constants, threads),
    }


def _int8_conv_candidates(
    conv: Int8Conv, view: GraphView, tokens: int, threads: int | None
) -> Mapping[str, Callable[[], object]]:
    """One convolution alone, on random weights: as a node of ours, and as the graph has it."""
    own, plain = conv.arrays(np.random.default_rng(0))
    nodes = conv.plain()
    small = _small_constants(nodes, view)
    feed, output = _feed(conv.conv, tokens), {conv.conv.output: conv.conv.output_shape(tokens)}
    return {
        OWN_INT8: _alone([conv.node(pool_size(threads))], feed, output, {**small, **own}, threads),
        RUNTIME_INT8: _alone(nodes, feed, output, {**small, **plain}, threads),
    }


def _small_constants(nodes: Sequence[NodeProto], view: GraphView) -> dict[str, np.ndarray]:
    """What nodes read beside codes; random, where it lies in a file of weights."""
    rng, found = np.random.default_rng(0), {}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name in view.constants):
        tensor = view.constants[name]
        if not tensor.external_data:
            found[name] = numpy_helper.to_array(tensor)
        elif tensor.data_type == TensorProto.FLOAT:
            found[name] = rng.random(tuple(tensor.dims), np.float32)
    return found


def _read_by(layer: Int8Layer) -> list[str]:
    """What a layer's product reads."""
    return [name for node in layer.nodes if node.op_type in ("MatMul", "Gemm") for name in node.input[:2]]


def _own_constants(layer: FusedLayer) -> dict[str, np.ndarray]:
    """Random weights, as our own operators take them."""
    rng = np.random.default_rng(0)
    kept = layer.depth // 2 if layer.is_sparse else layer.depth
    constants = {layer.values: rng.standard_normal((layer.rows, kept), np.float32)}
    if layer.is_sparse:
        constants[layer.positions] = rng.choice(np.array(PATTERNS, np.uint8), (layer.rows, layer.depth // 4))
    if layer.bias:
        constants[layer.bias] = rng.standard_normal(layer.rows, np.float32)
    return constants


def _feed(layer: FusedLayer, tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in layer.shapes(tokens).items()}


def _alone(
    nodes: list[NodeProto],
    feed: Mapping[str, np.ndarray],
    outputs: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, np.ndarray],
    threads: int | None,
) -> Callable[[], object]:
    """Some nodes in a session of their own, on a fixed feed."""
    onnxruntime = load_onnxruntime()

    graph = helper.make_graph(
        nodes,
        "candidate",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feed.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [
            numpy_helper.from_array(array, name)
            for name, array in constants.items()
            if any(name in node.input for node in nodes)
        ],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 20), (DOMAIN, 1), (MICROSOFT, 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = pool_size(threads)
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_PRODUCTS)
    options.add_session_config_entry(*NO_SPINNING)
    if any(node.domain == DOMAIN for node in nodes):
        options.register_custom_ops_library(str(kernels.LIBRARY_PATH))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)
