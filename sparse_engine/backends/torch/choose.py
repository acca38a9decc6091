"""Which product a 2:4 or 8-bit layer gets, by timing the candidates on the GPU that will run them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparse_engine.tactics import Choice, TacticCache
from sparse_engine.version import __version__

from .candidates import (
    REFUSALS,
    calls_in_graph,
    parse_name,
    ready_attentions,
    ready_products,
    with_algorithm,
)
from .layers import DENSE, SPARSE, Layer
from .products import first_line
from .recorded import Recorder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerChoice:
    """What a layer runs.

    Attributes:
        products: tokens (rows of its input, or places of what a convolution gives) -> the product for about as many.
        kernel: that of the usual batch.
        why: how that was decided; where it is dense, why.
        measured: tokens -> what was timed, in milliseconds per product.
        left_out: candidates that were not timed, and why; those of a choice that was remembered are not known.
    """

    products: dict[int, nn.Module]
    kernel: str
    why: str
    measured: dict[int, Choice] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For ``engine.info`` and ``inspect``."""
        timed = {str(tokens): choice.to_dict() for tokens, choice in self.measured.items()}
        report = {"chosen": self.kernel in SPARSE, "kernel": self.kernel, "why": self.why, "timed_by_tokens": timed}
        return report | ({"left_out": self.left_out} if self.left_out else {})


class Chooser:
    """Chooses for the layers of one engine.

    Args:
        positions: layer -> how often its weights are applied to one sample.
        batch: smallest, usual and largest, the passes of guidance not counted.
        device: where it runs.
        autotune: time the candidates; otherwise the stated rule: the first sparse product that runs, and of a
            convolution that is not 1x1 the dense one.
    """

    def __init__(
        self, positions: Mapping[str, int], batch: tuple[int, int, int], device: torch.device, autotune: bool
    ) -> None:
        self._positions, self._batches, self._usual = positions, sorted(set(batch)), batch[1]
        self._device, self._autotune = device, autotune and device.type == "cuda"
        self._cache = tactics_of(device)
        self._stream: Any = None  # of all recordings, whose memory is shared

    def choose(self, name: str, layer: Layer) -> LayerChoice:
        """The products of a layer, which is on the device."""
        with self._current():
            return self._choose(name, layer)

    def _choose(self, name: str, layer: Layer) -> LayerChoice:
        tokens = {batch: batch * self._positions[name] for batch in self._batches}
        made, obstacles = self._candidates(layer)
        if list(made) == [DENSE]:
            return LayerChoice({tokens[self._usual]: made[DENSE]}, DENSE, "; ".join(obstacles))
        if not self._autotune and layer.only_where_timed:
            why = "; ".join(["not timed: dense by default", *obstacles])
            return LayerChoice({tokens[self._usual]: made[DENSE]}, DENSE, why)
        if not self._autotune:
            kernel = next(name for name in made if name != DENSE)
            why = f"not timed: {'sparse' if kernel in SPARSE else '8 bits'} by default"
            return LayerChoice({tokens[self._usual]: made[kernel]}, kernel, "; ".join([why, *obstacles]))
        left_out: dict[str, str] = {}
        measured = self._measured(made, layer, list(tokens.values()), left_out)
        if not measured:
            why = "no product could be timed"
            return LayerChoice({tokens[self._usual]: made[DENSE]}, DENSE, why, left_out=left_out)
        products = {rows: _product_named(choice.kernel, made) for rows, choice in measured.items()}
        usual = nearest(measured, tokens[self._usual])
        fastest = parse_name(measured[usual].kernel)[0]
        kernel = DENSE if products[usual] is made[DENSE] else fastest
        how = "faster at the usual batch" if kernel == fastest else f"{fastest} was faster, and cannot be made today"
        return LayerChoice(products, kernel, "; ".join([how, *obstacles]), measured, left_out)

    def _measured(
        self, made: dict[str, nn.Module], layer: Layer, tokens: list[int], left_out: dict[str, str]
    ) -> dict[int, Choice]:
        """What was timed for each number of tokens; those that could not be, for want of memory, are left out."""
        measured = {}
        for rows in tokens:
            bias = "bias" if layer.bias is not None else "no bias"
            key = f"{layer.weights} {tuple(layer.shape)} {bias} tokens {rows}"
            try:
                choice = self._cache.choose(
                    key,
                    lambda rows=rows: ready_products(made, layer, rows, self._recorder(), left_out),  # type: ignore[misc]
                )
                measured[rows] = _per_product(choice, calls_in_graph(made, layer, rows))
            except REFUSALS as error:  # the dense product's own, or for want of memory
                left_out[f"{DENSE} at {rows} tokens"] = first_line(error)
                log.warning("%s is not timed: %s", key, error)
        return measured

    def attention(self, module: nn.Module, shape: torch.Size, length: int, dtype: torch.dtype) -> Choice:
        """ "fused" or "plain" for an attention of q [H, L, D] over ``length``: fused kernels do not take any heads."""
        if not self._autotune:
            return Choice("fused", {})
        whole = torch.Size((self._usual, *shape))
        try:
            with self._current():
                return self._cache.choose(
                    f"{dtype} attention {tuple(whole)}{'' if length == shape[-2] else f' over {length}'}",
                    lambda: ready_attentions(module, whole, length, dtype, self._recorder()),
                )
        except RuntimeError as error:
            log.warning("attention over %s is not timed: %s", tuple(whole), error)
            return Choice("fused", {})

    def _candidates(self, layer: Layer) -> tuple[dict[str, nn.Module], list[str]]:
        """(products that can be made, why the others cannot)."""
        made: dict[str, nn.Module] = {}
        obstacles: list[str] = []
        for name, make in layer.others().items():
            try:
                made[name] = make()
            except REFUSALS as error:
                reason = first_line(error)
                obstacles += [] if reason in obstacles else [reason]
        return {**made, DENSE: layer.dense()}, obstacles

    def _recorder(self) -> Recorder:
        """One for each set of candidates: their memory goes back together."""
        recorder = Recorder(self._device, self._stream)
        self._stream = recorder.stream
        return recorder

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device PyTorch's current one: cuSPARSELt's search runs on that, wherever its tensors are."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()


def tactics_of(device: torch.device) -> TacticCache:
    """What has been timed on a device."""
    return TacticCache(sparse_engine=__version__, **device_facts(device))


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a timing is valid for."""
    if device.type != "cuda":
        return {"device": device.type, "torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version(),
    }


def nearest(tokens: Iterable[int], wanted: int) -> int:
    """The entry nearest in ratio."""
    return min(tokens, key=lambda each: max(each, wanted) / min(each, wanted))


def _per_product(choice: Choice, count: int) -> Choice:
    return replace(choice, milliseconds={name: value / count for name, value in choice.milliseconds.items()})


def _product_named(name: str, made: dict[str, nn.Module]) -> nn.Module:
    kernel, algorithm = parse_name(name)
    product = made.get(kernel, made[DENSE])  # one that was remembered may not be to be had today
    return product if algorithm is None or product is made[DENSE] else with_algorithm(product, algorithm)
