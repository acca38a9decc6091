"""Candidates ready to be timed as they will run: in a CUDA graph, on weights that are not in the cache.

Outside a graph cuSPARSELt pays about half a millisecond of set-up at every call; inside it pays once. A graph holds
several products in a row, over as many copies of the weight as it takes to pass the second-level cache, since in a
network the other layers have emptied it. What a graph computes when it is replayed is held against float32, too: what
a library keeps on the host may be gone by then. Rounding inputs to 8 bits and scaling sums are timed as kernels of
their own; in the network torch.compile makes them one with what is next to them.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .convolutions import PatchProduct
from .layers import CUSPARSELT, DENSE, Layer
from .products import DEFAULT_ALGORITHM, Algorithm, ObstacleError, first_line
from .recorded import Recorder, repeats

log = logging.getLogger(__name__)

MAX_COPIES = 256  # of a weight
CHECKED_ROWS = 64
SEARCHED_OPERATIONS = 1.5e12  # of a call in cuSPARSELt's search, which makes hundreds of them: some 3 ms
# Why a product is left out; a TypeError is a private operator whose arguments another PyTorch has changed.
REFUSALS = (ObstacleError, RuntimeError, TypeError)
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of the largest output
SPLIT_MODES = (1, 2)  # cuSPARSELt's ways to sum the parts of a split K: in the kernel, in one of its own

Ready = dict[str, Callable[[], object]]


def ready_products(
    made: Mapping[str, nn.Module], layer: Layer, rows: int, recorder: Recorder, left_out: dict[str, str]
) -> Ready:
    """A layer's products on so many rows, cuSPARSELt's by the algorithms of its search, too.

    Args:
        made: name -> product.
        layer: what they are to compute.
        rows: of the matrix that the weight is multiplied with.
        recorder: on the layer's device.
        left_out: gets the name of each that fails or computes something else, and why.

    Raises what the dense product raises, and OutOfMemoryError.
    """
    x = layer.sample(rows)
    count = calls_in_graph(made, layer, rows)
    candidates: Ready = {}
    for name, product in {**made, **_searched(made, layer, x, left_out)}.items():
        try:
            check_product(product, layer, x)
            recorded = recorder.record(_calls(product, x, count))
            recorded()
            check_output(recorded.take_result(), layer, x)
            candidates[name] = recorded
        except REFUSALS as error:
            if name == DENSE or isinstance(error, torch.OutOfMemoryError):  # of which another would suffer, too
                raise
            left_out[name] = first_line(error)
            log.debug("%s is no candidate at %d tokens: %s", name, rows, error)
    return candidates


def ready_attentions(module: Any, shape: torch.Size, length: int, dtype: torch.dtype, recorder: Recorder) -> Ready:
    """The forms of an attention ``module``.

    q is [B, H, L, D], k and v are of ``length`` in place of L; they lie as one projection leaves them where L is the
    same, and else as one for q and one for k and v do.
    """
    batch, heads, queries, width = shape

    def projected(tokens: int, parts: int) -> list[torch.Tensor]:
        whole = torch.randn(batch, tokens, parts * heads * width, device=recorder.device, dtype=dtype)
        return [part.unflatten(-1, (heads, width)).transpose(1, 2) for part in whole.chunk(parts, dim=-1)]

    q, k, v = projected(queries, 3) if length == queries else (*projected(queries, 1), *projected(length, 2))
    count = repeats(4 * shape.numel() * length)
    candidates: Ready = {}
    for name, fused in (("fused", True), ("plain", False)):
        variant = copy.copy(module)
        variant.fused = fused
        recorded = recorder.record([lambda each=variant: each.attend(q, k, v)] * count)  # type: ignore[misc]
        recorded.take_result()
        candidates[name] = recorded
    return candidates


def check_product(product: nn.Module, layer: Layer, x: Tensor) -> None:
    """Hold what a product gives for x's first and last rows, or images, against float32.

    Raises ObstacleError where it computes something else.
    """
    check_output(product(x), layer, x)


def check_output(y: Tensor, layer: Layer, x: Tensor) -> None:
    """Hold the first and last rows of what was computed of x against float32. Raises ObstacleError."""
    rows = torch.cat([x[:CHECKED_ROWS], x[-CHECKED_ROWS:]])
    found = torch.cat([y[:CHECKED_ROWS], y[-CHECKED_ROWS:]]).float()
    expected = layer.expected(rows)
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= TOLERANCE[layer.dtype] * largest:  # NaN is no less than anything
        raise ObstacleError(f"computes something else: off by {error:.1e} where outputs reach {largest:.1e}")


def searched_rows(layer: Layer) -> int:
    """How many rows cuSPARSELt's search is given at most: fewer than come only where these fill the GPU many times."""
    return int(SEARCHED_OPERATIONS / (2 * layer.shape.numel()))


def calls_in_graph(made: Mapping[str, nn.Module], layer: Layer, rows: int) -> int:
    """How many products a graph holds, of each candidate alike: enough for the smallest weights to pass the cache."""
    return max(repeats(2 * rows * layer.shape.numel()), *(_copies(product, layer.device) for product in made.values()))


def _searched(made: Mapping[str, nn.Module], layer: Layer, x: Tensor, left_out: dict[str, str]) -> dict[str, nn.Module]:
    """cuSPARSELt's product by what its search finds: with and without the split of K that it reports."""
    if CUSPARSELT not in made:
        return {}
    try:
        product: Any = _of_rows(made[CUSPARSELT])
        algorithm, split_k, mode = product.search(layer.rows(x)[: searched_rows(layer)])
    except REFUSALS as error:
        left_out[f"{CUSPARSELT}, searched"] = first_line(error)
        log.debug("cuSPARSELt's search failed: %s", error)
        return {}
    found: list[Algorithm] = [(algorithm, split_k, mode)]
    if split_k != 1:  # what some versions of PyTorch and cuSPARSELt report, they do not take back
        found += [(algorithm, 1, DEFAULT_ALGORITHM[2])]
        found += [(algorithm, split_k, each) for each in SPLIT_MODES if split_k > 1 and each != mode]
    products = {algorithm_name(each): with_algorithm(made[CUSPARSELT], each) for each in found}
    return {name: product for name, product in products.items() if product is not made[CUSPARSELT]}


def _calls(product: nn.Module, x: Tensor, count: int) -> list[Callable[[], Tensor]]:
    """Calls of a product, over as many copies of its weight as do not fit into the second-level cache together."""
    copies = _copies(product, x.device)
    products = [product, *(copy.deepcopy(product) for _ in range(copies - 1))]
    return [lambda each=products[index % copies]: each(x) for index in range(count)]  # type: ignore[misc]


def _copies(product: nn.Module, device: torch.device) -> int:
    size = sum(buffer.nbytes for buffer in product.buffers())
    cache = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(1 + cache // max(size, 1), MAX_COPIES)


def algorithm_name(algorithm: Algorithm) -> str:
    """The name of cuSPARSELt's product by an algorithm."""
    return f"{CUSPARSELT} {' '.join(map(str, algorithm))}"


def parse_name(name: str) -> tuple[str, Algorithm | None]:
    """A candidate's name -> the product's, and the algorithm that is named behind it."""
    found = re.fullmatch(r"(.*) (-?\d+) (-?\d+) (-?\d+)", name)
    return (name, None) if found is None else (found[1], (int(found[2]), int(found[3]), int(found[4])))


def _of_rows(product: nn.Module) -> nn.Module:
    """The product of matrices in a convolution's; any other is one."""
    return product.product if isinstance(product, PatchProduct) else product


def with_algorithm(product: nn.Module, algorithm: Algorithm) -> nn.Module:
    """The same product, sharing its packed weight, by another algorithm."""
    if algorithm == DEFAULT_ALGORITHM:
        return product
    if isinstance(product, PatchProduct):
        return PatchProduct(with_algorithm(product.product, algorithm), product.window)
    other = copy.copy(product)
    other.algorithm = algorithm  # type: ignore[assignment]
    return other
