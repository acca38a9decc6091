"""PyTorch: 2:4 on CUDA through cuSPARSELt and CUTLASS, for GPUs without TensorRT; dense and correct on a CPU."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import Availability, Payload, StepGraph
from sparse_engine.backends.options import BuildOptions
from sparse_engine.cores import say_if_capped
from sparse_engine.errors import UnsupportedError

from .precision import float_precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .payload import LazyTensor
    from .runner import TorchRunner

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


class TorchBackend:
    """Stores a network's weights, and runs it through PyTorch."""

    name = "torch"

    def availability(self) -> Availability:
        """Whether PyTorch is there. "auto" takes it where it has a GPU: on a CPU onnxruntime is faster."""
        if find_spec("torch") is None:
            return Availability(False, reason="No module named 'torch'", fix="pip install 'sparse-engine[torch]'")
        import torch

        return Availability(True, version=torch.__version__, automatic=torch.cuda.is_available())

    def check(self, options: BuildOptions) -> None:
        """See ``Backend.check``."""
        from .runner import find_device

        if options.precision not in PRECISIONS:
            raise UnsupportedError(
                f"precision {options.precision!r} is not supported by the torch backend; "
                f"expected {', '.join(PRECISIONS)}"
            )
        find_device(options.device)

    def graph_precision(self, options: BuildOptions) -> str:
        """The engine's, or what is float in it: what the graph holds in it says what the payload stores in it."""
        return float_precision(options.precision)

    def build(self, graph: StepGraph, options: BuildOptions, sparse_layers: list[str]) -> Payload:
        """Store the weights, 2:4 layers packed; which product each gets is decided where the engine is loaded.

        Raises UnsupportedError where a convolution that is not 1x1 is quantised.
        """
        from .codes import quantised_weights
        from .payload import network_payload

        quantised = quantised_weights(graph)
        for name in quantised:
            if not _is_product(graph.weights[graph.layers[name][0]]):
                raise UnsupportedError(
                    f"{name}: the torch backend has 8-bit products for linear layers and 1x1 convolutions",
                    f"build with --keep-float {name!r}",
                )
        later = {"kernel": "chosen where it is loaded"}
        layers: dict[str, dict[str, Any]] = {}
        for name in graph.layers:
            layers[name] = {"chosen": False, "kernel": "dense"} | (later if name in quantised else {})
            layers[name] |= {"chosen": None, **later} if name in sparse_layers else {}
        state = _lowered(graph, self.graph_precision(options))
        return Payload([network_payload(state, sparse_layers, quantised)], {"name": self.name}, layers)

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> TorchRunner:
        """Rebuild the network and choose the products of its 2:4 layers on this machine."""
        from .runner import TorchRunner, find_device

        asked = arguments.threads(threads)
        say_if_capped(asked)
        return TorchRunner.load(engine, asked, find_device(device), autotune)


def _is_product(weight: np.ndarray) -> bool:
    """A matrix, or the weight of a 1x1 convolution."""
    return weight.ndim == 2 or weight.shape[2:] == (1, 1)


def _lowered(graph: StepGraph, precision: str) -> dict[str, LazyTensor]:
    """The baked weights, each layer's in the type that the step graph has it in; of one in 8 bits, in ``precision``."""
    import torch

    from sparse_engine.export.precision import DTYPES

    from .payload import LazyTensor

    def lowered(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    state = {}
    for name, array in graph.state.items():
        layer, _, _ = name.rpartition(".")
        stored = graph.weights[graph.layers[layer][0]].dtype if layer in graph.layers else np.dtype(np.float32)
        dtype = DTYPES[precision] if stored.itemsize == 1 else getattr(torch, stored.name)
        state[name] = LazyTensor(array.shape, dtype, partial(lowered, array, dtype))
    return state
