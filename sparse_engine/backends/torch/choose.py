"""Which product a 2:4 or 8-bit layer gets, by timing the candidates inside CUDA graphs on the GPU that will run them.

Outside a graph cuSPARSELt pays about half a millisecond of set-up at every call; inside it pays once. So a candidate is
timed as it will run: a graph of several products in a row, over as many copies of the weight as it takes to pass the
second-level cache, since in a network the other layers have emptied it. Rounding inputs to 8 bits and scaling sums are
timed as kernels of their own; in the network torch.compile makes them one with what is next to them.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine import __version__
from sparse_engine.tactics import Choice, TacticCache

from .layers import CUSPARSELT, DENSE, SPARSE, Layer
from .products import DEFAULT_ALGORITHM, Algorithm, ObstacleError
from .recorded import Recorded, repeats

log = logging.getLogger(__name__)

MAX_COPIES = 16  # of a weight
CHECKED_ROWS = 64
SEARCHED_OPERATIONS = 5e12  # of a call in cuSPARSELt's search, which makes hundreds of them: some 10 ms
# Why a product is left out; a TypeError is a private operator whose arguments another PyTorch has changed.
REFUSALS = (ObstacleError, RuntimeError, TypeError)
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest output


@dataclass(frozen=True)
class LayerChoice:
    """What a layer runs.

    Attributes:
        products: tokens (rows of its input) -> the product for about as many.
        kernel: that of the usual batch.
        why: how that was decided; where it is dense, why.
        measured: tokens -> what was timed, in milliseconds per product.
    """

    products: dict[int, nn.Module]
    kernel: str
    why: str
    measured: dict[int, Choice] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For ``engine.info`` and ``inspect``."""
        timed = {
            str(tokens): {"milliseconds": choice.milliseconds, "fastest": choice.kernel, "margin": choice.margin}
            for tokens, choice in self.measured.items()
        }
        return {"chosen": self.kernel in SPARSE, "kernel": self.kernel, "why": self.why, "timed_by_tokens": timed}


class Chooser:
    """Chooses for the layers of one engine.

    Args:
        positions: layer -> how often its weights are applied to one sample.
        batch: smallest, usual and largest, the passes of guidance not counted.
        device: where it runs.
        autotune: time the candidates; otherwise the stated rule: the first sparse product that runs.
    """

    def __init__(
        self, positions: Mapping[str, int], batch: tuple[int, int, int], device: torch.device, autotune: bool
    ) -> None:
        self._positions, self._batches, self._usual = positions, sorted(set(batch)), batch[1]
        self._device, self._autotune = device, autotune and device.type == "cuda"
        self._cache = TacticCache(sparse_engine=__version__, **device_facts(device))

    def choose(self, name: str, layer: Layer) -> LayerChoice:
        """The products of a layer, which is on the device."""
        tokens = {batch: batch * self._positions[name] for batch in self._batches}
        made, obstacles = self._candidates(layer)
        if list(made) == [DENSE]:
            return LayerChoice({tokens[self._usual]: made[DENSE]}, DENSE, "; ".join(obstacles))
        if not self._autotune:
            kernel = next(name for name in made if name != DENSE)
            why = f"not timed: {'sparse' if kernel in SPARSE else '8 bits'} by default"
            return LayerChoice({tokens[self._usual]: made[kernel]}, kernel, "; ".join([why, *obstacles]))
        measured = self._measured(made, layer, list(tokens.values()))
        if not measured:
            return LayerChoice({tokens[self._usual]: made[DENSE]}, DENSE, "no product could be timed")
        products = {rows: _product_named(choice.kernel, made) for rows, choice in measured.items()}
        usual = nearest(measured, tokens[self._usual])
        kernel = DENSE if products[usual] is made[DENSE] else _parsed(measured[usual].kernel)[0]
        why = "; ".join(["faster at the usual batch", *obstacles])
        return LayerChoice(products, kernel, why, measured)

    def _measured(self, made: dict[str, nn.Module], layer: Layer, tokens: list[int]) -> dict[int, Choice]:
        """What was timed for each number of tokens; those that could not be, for want of memory, are left out."""
        measured = {}
        for rows in tokens:
            bias = "bias" if layer.bias is not None else "no bias"
            key = f"{layer.weights} {tuple(layer.shape)} {bias} tokens {rows}"
            try:
                choice = self._cache.choose(key, lambda rows=rows: self._timed(made, layer, rows))  # type: ignore[misc]
                measured[rows] = _per_product(choice, rows, layer)
            except REFUSALS as error:  # the dense product's own, or for want of memory
                log.warning("%s is not timed: %s", key, error)
        return measured

    def attention(self, module: nn.Module, shape: torch.Size) -> Choice:
        """ "fused" or "plain" for an attention over [H, L, D]: fused kernels are not made for heads of any size."""
        if not self._autotune:
            return Choice("fused", {})
        dtype, whole = next(module.parameters()).dtype, torch.Size((self._usual, *shape))
        try:
            return self._cache.choose(
                f"{dtype} attention {tuple(whole)}", lambda: self._attentions(module, whole, dtype)
            )
        except RuntimeError as error:
            log.warning("attention over %s is not timed: %s", tuple(whole), error)
            return Choice("fused", {})

    def _attentions(self, module: Any, shape: torch.Size, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
        q, k, v = (torch.randn(shape, device=self._device, dtype=dtype) for _ in range(3))
        candidates: dict[str, Callable[[], object]] = {}
        pool, count = torch.cuda.graph_pool_handle(), repeats(4 * shape.numel() * shape[-2])
        for name, fused in (("fused", True), ("plain", False)):
            variant = copy.copy(module)
            variant.fused = fused
            candidates[name] = Recorded([lambda each=variant: each.attend(q, k, v)] * count, self._device, pool)  # type: ignore[misc]
        return candidates

    def _candidates(self, layer: Layer) -> tuple[dict[str, nn.Module], list[str]]:
        """(products that can be made, why the others cannot)."""
        made: dict[str, nn.Module] = {}
        obstacles: list[str] = []
        for name, make in layer.others().items():
            try:
                made[name] = make()
            except REFUSALS as error:
                reason = str(error).splitlines()[0]
                obstacles += [] if reason in obstacles else [reason]
        return {**made, DENSE: layer.dense()}, obstacles

    def _timed(self, made: dict[str, nn.Module], layer: Layer, rows: int) -> dict[str, Callable[[], object]]:
        """Candidates ready to be timed on so many rows; those that fail or compute something else are left out."""
        x = torch.randn(rows, layer.shape[1], device=layer.device, dtype=layer.dtype)
        products = dict(made)
        if CUSPARSELT in made:
            try:
                algorithm = made[CUSPARSELT].search(x[: searched_rows(layer)])  # type: ignore[operator]
                products[_algorithm_name(algorithm)] = _with_algorithm(made[CUSPARSELT], algorithm)
            except REFUSALS as error:
                log.debug("cuSPARSELt's search failed: %s", error)
        candidates: dict[str, Callable[[], object]] = {}
        pool = torch.cuda.graph_pool_handle()  # shared: no two run at a time, and their results are of no use
        for name, product in products.items():
            try:
                check_product(product, layer, x)
                candidates[name] = Recorded(_calls(product, x, repeats_of(rows, layer)), x.device, pool)
            except REFUSALS as error:
                if name == DENSE or isinstance(error, torch.OutOfMemoryError):  # of which another would suffer, too
                    raise
                log.debug("%s is no candidate at %d tokens: %s", name, rows, error)
                pool = torch.cuda.graph_pool_handle()  # PyTorch may not have closed one that a recording failed in
        return candidates


def check_product(product: nn.Module, layer: Layer, x: Tensor) -> None:
    """Hold a product's first and last rows against float32. Raises ObstacleError where it computes something else."""
    rows = torch.cat([x[:CHECKED_ROWS], x[-CHECKED_ROWS:]])
    y = product(x)
    found = torch.cat([y[:CHECKED_ROWS], y[-CHECKED_ROWS:]]).float()
    expected = layer.expected(rows)
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= TOLERANCE[layer.dtype] * largest:  # NaN is no less than anything
        raise ObstacleError(f"computes something else: off by {error:.1e} where outputs reach {largest:.1e}")


def searched_rows(layer: Layer) -> int:
    """How many rows cuSPARSELt's search is given at most: fewer than come only where these fill the GPU many times."""
    return int(SEARCHED_OPERATIONS / (2 * layer.shape.numel()))


def repeats_of(rows: int, layer: Layer) -> int:
    """How many products of a layer a timed graph holds."""
    return repeats(2 * rows * layer.shape.numel())


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


def _calls(product: nn.Module, x: Tensor, count: int) -> list[Callable[[], object]]:
    """Calls of a product, over as many copies of its weight as do not fit into the second-level cache together."""
    size = sum(buffer.nbytes for buffer in product.buffers())
    cache = int(torch.cuda.get_device_properties(x.device).L2_cache_size)
    copies = min(1 + cache // max(size, 1), count, MAX_COPIES)
    products = [product, *(copy.deepcopy(product) for _ in range(copies - 1))]
    return [lambda each=products[index % copies]: each(x) for index in range(count)]  # type: ignore[misc]


def _per_product(choice: Choice, rows: int, layer: Layer) -> Choice:
    count = repeats_of(rows, layer)
    return Choice(choice.kernel, {name: value / count for name, value in choice.milliseconds.items()})


def _algorithm_name(algorithm: Algorithm) -> str:
    return f"{CUSPARSELT} {' '.join(map(str, algorithm))}"


def _parsed(name: str) -> tuple[str, Algorithm | None]:
    """A candidate's name -> the product's, and the algorithm that is named behind it."""
    found = re.fullmatch(r"(.*) (-?\d+) (-?\d+) (-?\d+)", name)
    return (name, None) if found is None else (found[1], (int(found[2]), int(found[3]), int(found[4])))


def _product_named(name: str, made: dict[str, nn.Module]) -> nn.Module:
    kernel, algorithm = _parsed(name)
    product = made.get(kernel, made[DENSE])  # one that was remembered may not be to be had today
    return product if algorithm is None or product is made[DENSE] else _with_algorithm(product, algorithm)


def _with_algorithm(product: nn.Module, algorithm: Algorithm) -> nn.Module:
    """The same product, sharing its packed weight, by another algorithm."""
    if algorithm == DEFAULT_ALGORITHM:
        return product
    other = copy.copy(product)
    other.algorithm = algorithm  # type: ignore[assignment]
    return other
