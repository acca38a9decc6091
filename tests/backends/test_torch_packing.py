"""2:4 weights as the torch backend stores and packs them, against float64 products and the kernels' own packing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparse_engine import kernels
from sparse_engine.backends.torch import packing, products
from sparse_engine.backends.torch.packing import pack, unpack
from sparse_engine.backends.torch.products import (
    CusparseltProduct,
    CutlassProduct,
    DenseProduct,
    ObstacleError,
    cusparselt_linear,
    cutlass_linear,
    pack_for_cutlass,
    shape_obstacle,
    split_arguments,
)
from sparse_engine.errors import EngineFileError, UnsupportedError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATTERNS = list(itertools.product((0, 1), repeat=4))


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random weights of which each group of four keeps two, one or none."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, columns // 4, 4, generator=generator)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    kept = torch.randint(0, 3, (rows, columns // 4, 1), generator=generator).clamp(1)
    return torch.where(order < kept, groups, 0.0).flatten(1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 8, 12, 64])
def test_what_is_packed_is_unpacked(columns: int, dtype: torch.dtype) -> None:
    weight = two_of_four(5, columns, dtype)
    values, positions = pack(weight)
    assert (values.shape, values.dtype) == ((5, columns // 2), dtype)
    assert (positions.shape, positions.dtype) == ((5, -(-columns // 8)), torch.uint8)
    assert torch.equal(unpack(values, positions), weight)


def test_sixteen_bits_take_nine_sixteenths() -> None:
    weight = two_of_four(96, 256, torch.float16)
    assert sum(tensor.nbytes for tensor in pack(weight)) == weight.nbytes * 9 // 16


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_of_a_group(pattern: tuple[int, ...]) -> None:
    weight = torch.tensor([pattern * 2], dtype=torch.float32) * 3
    if sum(pattern) > 2:
        with pytest.raises(UnsupportedError, match=r"not 2:4: 2 of 2 groups have more than 2 nonzeros\n.*fix"):
            pack(weight)
        return
    assert torch.equal(unpack(*pack(weight)), weight)


def test_the_values_and_positions_are_those_of_the_kernels() -> None:
    weight = two_of_four(16, 64)
    weight[weight == 0] = 0.0
    values, positions = pack(weight)
    expected_values, expected = kernels.pack(weight.numpy())
    full = (weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2
    found = torch.stack([positions & 15, positions >> 4], -1).flatten(1)
    assert np.array_equal(found[full].numpy(), expected[full.numpy()])
    pairs = values.unflatten(1, (-1, 2))[full].numpy()
    assert np.array_equal(pairs, expected_values.reshape(16, -1, 2)[full.numpy()])


def test_large_weights_are_packed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = two_of_four(33, 64)
    whole = pack(weight)
    monkeypatch.setattr(packing, "BLOCK", 200)
    assert all(torch.equal(a, b) for a, b in zip(pack(weight), whole, strict=True))
    assert torch.equal(unpack(*whole), weight)


def test_packed_weights_that_are_damaged() -> None:
    values, positions = pack(two_of_four(4, 16))
    with pytest.raises(EngineFileError, match="do not belong together"):
        unpack(values, positions[:, :1])
    with pytest.raises(EngineFileError, match="first < second"):
        unpack(values, torch.zeros_like(positions))
    with pytest.raises(UnsupportedError, match="multiple of 4"):
        pack(torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (96, 128), (64, 320)])
def test_the_layout_of_cutlass_by_emulation_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = two_of_four(*shape, dtype)
    x = torch.randn(7, shape[1], dtype=torch.float64)
    packed, meta = pack_for_cutlass(weight)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert (meta.shape, meta.dtype) == ((shape[0], shape[1] // 16), torch.int16)
    found = emulate_cutlass(packed, meta, x)
    torch.testing.assert_close(found, x @ weight.double().T, rtol=1e-12, atol=1e-12)


def emulate_cutlass(packed: torch.Tensor, meta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x W^T, reading the packed weight as the sparse tensor core does.

    Its positions are stored in columns of pairs (CUTLASS's ColumnMajorInterleaved<2>); within each 32 rows the rows are
    interleaved by eights, and each 2x2 block is transposed (its tools/util/include/cutlass/util/host_reorder.h).
    """
    rows, words = meta.shape
    flat = meta.flatten().tolist()
    result = torch.zeros(len(x), rows, dtype=torch.float64)
    for row in range(rows):
        for word in range(words):
            at_row, at_word = row // 32 * 32 + row % 8 * 4 + row % 32 // 8, word
            if (at_row + at_word) % 2:
                at_row, at_word = (at_row + 1, at_word - 1) if at_word % 2 else (at_row - 1, at_word + 1)
            bits = flat[at_word // 2 * rows * 2 + at_row * 2 + at_word % 2] & 0xFFFF
            for group in range(4):
                first = 16 * word + 4 * group
                for place in range(2):
                    column = first + (bits >> (4 * group + 2 * place) & 3)
                    result[:, row] += packed[row, first // 2 + place].double() * x[:, column]
    return result


@pytest.mark.parametrize("kind", [CusparseltProduct, CutlassProduct])
def test_no_sparse_product_on_a_cpu(kind: type) -> None:
    with pytest.raises(ObstacleError, match="no CUDA: the engine runs on cpu"):
        kind(two_of_four(32, 64, torch.float16), None)


@pytest.mark.parametrize("bias", [None, torch.zeros(32, dtype=torch.float16)], ids=["no bias", "bias"])
def test_a_library_that_refuses_this_gpu_says_so_where_the_product_is_made(
    bias: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's CUTLASS kernel packs a weight on any GPU, and refuses the first product on Hopper."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("sparse_semi_structured_mad_op : Supported only on GPUs with compute capability 8.x")

    monkeypatch.setattr(products, "_check", lambda weight, kind: None)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", refuse)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", refuse)
    with pytest.raises(RuntimeError, match="compute capability 8.x"):
        CutlassProduct(two_of_four(32, 64, torch.float16), bias)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *arguments, **options: refuse())
    with pytest.raises(RuntimeError, match="compute capability 8.x"):
        CusparseltProduct(two_of_four(32, 64, torch.float16), bias)


@pytest.mark.parametrize(
    "kind,shape,dtype,message",
    [
        (SparseSemiStructuredTensorCUTLASS, (32, 64), torch.float16, None),
        (SparseSemiStructuredTensorCUTLASS, (1536, 512), torch.bfloat16, None),
        (
            SparseSemiStructuredTensorCUTLASS,
            (48, 64),
            torch.float16,
            "48 outputs and 64 inputs; cutlass takes multiples of",
        ),
        (SparseSemiStructuredTensorCUTLASS, (64, 96), torch.float16, "64 outputs and 96 inputs; cutlass"),
        (SparseSemiStructuredTensorCUSPARSELT, (48, 96), torch.float16, None),
        (SparseSemiStructuredTensorCUSPARSELT, (48, 100), torch.float16, "48 outputs and 100 inputs; cusparselt"),
        (SparseSemiStructuredTensorCUSPARSELT, (64, 64), torch.float32, "no 2:4 product in float32: build with"),
    ],
)
def test_shapes_and_types_that_a_library_does_not_take(
    kind: type, shape: tuple[int, int], dtype: torch.dtype, message: str | None
) -> None:
    found = shape_obstacle(torch.Size(shape), dtype, kind)
    assert found == message if message is None else message in (found or "")


@pytest.mark.parametrize("rows", [1, 8, 257])
def test_the_sparse_operators_pad_rows_and_pass_what_their_libraries_expect(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of the CUDA libraries: functions that compute the same from the same arguments."""
    weight = two_of_four(32, 64)
    bias = torch.randn(32)
    x = torch.randn(rows, 64)
    expected = torch.nn.functional.linear(x, weight, bias)
    seen = {}

    def cslt(packed, columns, *, bias, transpose_result, alg_id, **split):
        assert columns.stride() == (1, 64)
        assert columns.shape[1] % 8 == 0
        assert transpose_result
        seen["cusparselt"] = (alg_id, split)
        return (packed @ columns + bias[:, None]).T.contiguous()

    def addmm(bias, packed, meta, columns):
        assert columns.shape[1] % 8 == 0
        return packed @ columns + bias[:, None]

    monkeypatch.setattr(torch, "_cslt_sparse_mm", cslt)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda packed, meta, columns: packed @ columns)
    found = cusparselt_linear(x, weight, bias, 32, 3, 2, 1)
    torch.testing.assert_close(found, expected)
    assert seen["cusparselt"] == (3, {"split_k": 2, "split_k_mode": 1})
    cusparselt_linear(x, weight, bias, 32, 0, 1, -1)
    assert seen["cusparselt"] == (0, {})
    meta = torch.zeros(32, 4, dtype=torch.int16)
    for found in (cutlass_linear(x, weight, meta, bias, 32), cutlass_linear(x, weight, meta, None, 32) + bias):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous()


@pytest.mark.parametrize(
    "known,expected",
    [
        ({"split_k", "split_k_mode"}, {"split_k": 2, "split_k_mode": 1}),
        ({"split_k", "split_k_one_kernel"}, {"split_k": 2, "split_k_one_kernel": True}),  # PyTorch 2.7
    ],
)
def test_a_split_is_told_as_the_installed_pytorch_takes_it(
    known: set[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert products._sparse_mm_arguments() >= {"alg_id", "split_k"}  # of the one that is installed
    monkeypatch.setattr(products, "_sparse_mm_arguments", lambda: known)
    found = split_arguments(2, 1)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert split_arguments(1, -1) == {}


def test_the_sparse_operators_know_their_shapes_without_running() -> None:
    x = torch.empty(257, 64, dtype=torch.float16, device="meta")
    for found in (cusparselt_linear(x, x, None, 32, 0, 1, -1), cutlass_linear(x, x, x, None, 32)):
        assert (found.shape, found.dtype) == ((257, 32), torch.float16)


def test_the_dense_product() -> None:
    weight, bias, x = torch.randn(8, 4), torch.randn(8), torch.randn(3, 4)
    torch.testing.assert_close(DenseProduct(weight, bias)(x), x @ weight.T + bias)
