"""Step 1: the machine, how fast it copies, and how fast it multiplies: dense and 2:4, in every type it has."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine.backends.torch.choose import Chooser
from sparse_engine.backends.torch.codes import LIMITS, QuantisedWeight, quantise
from sparse_engine.backends.torch.layers import QuantisedLayer
from sparse_engine.backends.torch.products import CusparseltProduct, CutlassProduct, DenseProduct
from sparse_engine.backends.torch.quantised import NAMES
from sparse_engine.errors import OptionError

from .measure import seconds_each
from .session import Results, Row, Session

COPY_BYTES, SIDE = 1 << 30, 8192
REHEARSED_COPY_BYTES, REHEARSED_SIDE = 1 << 22, 256
IN_A_GRAPH = 8  # copies or products
ATTENTION = (64, 8, 1025, 1024)  # the paper's, patch 1: heads of 1024
REHEARSED_ATTENTION = (1, 2, 17, 32)


def run(session: Session, results: Results) -> None:
    """Fill in the rows "copy", one per product and per layer in 8 bits, and "attention".

    Every file's header describes the device.
    """
    if results.wants(name="copy"):
        with results.row(name="copy") as row:
            _copy(session, row)
    for name, make in PRODUCTS.items():
        if results.wants(name=name):
            with results.row(name=name) as row:
                _product(session, row, make)
    for codes, name in itertools.product(LIMITS, UVIT_S_LAYERS):
        key = {"name": f"{name} in {NAMES[codes]}"}
        if results.wants(**key):
            with results.row(**key) as row:
                _layer_in_8_bits(session, row, name, codes)
    if results.wants(name="attention"):
        with results.row(name="attention") as row:
            _attention(session, row)


def ceilings(results: Results) -> tuple[float, float]:
    """(operations a second of the best dense 16-bit product, bytes a second of a copy) that step 1 measured."""
    rows = {row["name"]: row for row in results.rows if "failed" not in row}
    dense = [rows[name]["tera_operations"] for name in ("fp16 dense", "bf16 dense") if name in rows]
    if not dense or "copy" not in rows:
        raise OptionError("there are no ceilings to hold layers against", "run step 1 first")
    return 1e12 * max(dense), 1e9 * rows["copy"]["gigabytes_per_second"]


def _copy(session: Session, row: Row) -> None:
    size = REHEARSED_COPY_BYTES if session.rehearsal else COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    seconds = seconds_each({"copy": lambda: target.copy_(source)}, session, IN_A_GRAPH)["copy"]
    row |= {"bytes": size, "gigabytes_per_second": 2 * size / seconds / 1e9}


Make = Callable[[Tensor, Tensor], tuple[Callable[[], Tensor], Tensor]]  # (weight, x), float32 -> (call, expected)


def _sixteen_bits(kind: Callable[..., torch.nn.Module], dtype: torch.dtype, search: bool = False) -> Make:
    def make(weight: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        weight, x = weight.to(dtype), x.to(dtype)
        product = kind(weight, None)
        if search:
            product.algorithm = product.search(x)  # type: ignore[operator]
        return lambda: product(x), F.linear(x[:64].float(), weight.float())

    return make


def _int8(weight: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    weight, x = (_integers(each) for each in (weight, x))
    return lambda: torch._int_mm(x, weight.t()), F.linear(x[:64].float(), weight.float())


def _int8_sparse(weight: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    weight, x = (_integers(each) for each in (weight, x))
    packed, columns = torch._cslt_compress(weight), x.t()
    expected = F.linear(x[:64].float(), weight.float())
    return lambda: torch._cslt_sparse_mm(packed, columns, out_dtype=torch.int32, transpose_result=True), expected


def _fp8(weight: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    weight, x = (each.to(torch.float8_e4m3fn) for each in (weight, x))
    one = torch.ones((), device=x.device)
    expected = F.linear(x[:64].float(), weight.float())
    return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float16), expected


def _fp8_sparse(weight: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
    weight, x = (each.to(torch.float8_e4m3fn) for each in (weight, x))
    packed, columns = torch._cslt_compress(weight), x.t()
    expected = F.linear(x[:64].float(), weight.float())
    return lambda: torch._cslt_sparse_mm(packed, columns, out_dtype=torch.float16, transpose_result=True), expected


def _integers(values: Tensor) -> Tensor:
    return (values * 30).round().clamp(-127, 127).to(torch.int8)


PRODUCTS: dict[str, Make] = {
    "fp16 dense": _sixteen_bits(DenseProduct, torch.float16),
    "bf16 dense": _sixteen_bits(DenseProduct, torch.bfloat16),
    "fp16 cusparselt": _sixteen_bits(CusparseltProduct, torch.float16),
    "fp16 cusparselt, searched": _sixteen_bits(CusparseltProduct, torch.float16, search=True),
    "bf16 cusparselt, searched": _sixteen_bits(CusparseltProduct, torch.bfloat16, search=True),
    "fp16 cutlass": _sixteen_bits(CutlassProduct, torch.float16),
    "int8 dense": _int8,
    "int8 cusparselt": _int8_sparse,
    "fp8 dense": _fp8,
    "fp8 cusparselt": _fp8_sparse,
}


UVIT_S_LAYERS = {"attn.qkv": (1536, 512), "attn.proj": (512, 512), "mlp.fc1": (2048, 512), "mlp.fc2": (512, 2048)}
UVIT_S_TOKENS, BATCHES = 257, (1, 16, 64)  # smallest, usual and largest


def _layer_in_8_bits(session: Session, row: Row, name: str, codes: torch.dtype) -> None:
    """What a 2:4 layer of U-ViT-S gets, and how fast each product of its codes is."""
    shape = (REHEARSED_SIDE, REHEARSED_SIDE) if session.rehearsal else UVIT_S_LAYERS[name]
    weight = keep_two_of_four(torch.randn(shape, device=session.device))
    largest = LIMITS[codes][1]
    scale = weight.abs().amax(1) / largest
    input_scale = torch.tensor(4 / largest, device=session.device)  # of what is normal
    stored = QuantisedWeight(quantise(weight, scale[:, None], codes), scale, input_scale)
    bias = torch.randn(shape[0], device=session.device, dtype=torch.float16)
    chooser = Chooser({name: UVIT_S_TOKENS}, BATCHES, session.device, autotune=True)
    row |= {"shape": list(shape), "tokens": UVIT_S_TOKENS * BATCHES[1]}
    row |= chooser.choose(name, QuantisedLayer(stored, bias, torch.float16, sparse=True)).to_dict()


def _product(session: Session, row: Row, make: Make) -> None:
    side = REHEARSED_SIDE if session.rehearsal else SIDE
    generator = torch.Generator(session.device).manual_seed(0)
    weight, x = (torch.randn(side, side, device=session.device, generator=generator) for _ in range(2))
    call, expected = make(keep_two_of_four(weight), x)
    found = call()[:64].float()
    row["relative_error"] = float((found - expected).abs().max() / expected.abs().max())
    seconds = seconds_each({"product": call}, session, IN_A_GRAPH)["product"]
    row |= {"side": side, "milliseconds": 1e3 * seconds, "tera_operations": 2 * side**3 / seconds / 1e12}


def _attention(session: Session, row: Row) -> None:
    """The fused kernel against plain products."""
    batch, heads, length, dim = REHEARSED_ATTENTION if session.rehearsal else ATTENTION
    q, k, v = (torch.randn(batch, heads, length, dim, device=session.device).half() for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "fused": lambda: F.scaled_dot_product_attention(q, k, v),
        "plain": lambda: ((q * dim**-0.5) @ k.transpose(-2, -1)).float().softmax(-1).half() @ v,
    }
    operations = 4 * q.numel() * length
    seconds = seconds_each(calls, session, 1)
    row |= {"shape": [batch, heads, length, dim], "milliseconds": {name: 1e3 * each for name, each in seconds.items()}}
    row["tera_operations"] = {name: operations / each / 1e12 for name, each in seconds.items()}


def keep_two_of_four(weight: Tensor) -> Tensor:
    """A weight [N, K] with the two smallest of each group of four along K set to 0: SparseDM's rule, on the device."""
    groups = weight.unflatten(1, (-1, 4))
    smallest = groups.abs().topk(2, dim=-1, largest=False).indices
    return groups.scatter(-1, smallest, 0.0).flatten(1)
