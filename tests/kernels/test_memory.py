"""No kernel reads or writes beyond its arrays, whatever their alignment; none leaks."""

import numpy as np
import pytest
from kernel_cases import TOLERANCE, create, random_weight, relative_error

from sparse_engine import kernels

CASES = [(1, 4, 1), (37, 76, 3), (37, 76, 19), (130, 68, 97), (64, 320, 130)]


@pytest.mark.parametrize("rows, depth, tokens", CASES, ids=str)
@pytest.mark.parametrize("at", ["begin", "end"])
def test_arrays_next_to_a_page_without_access(tactic, guarded_memory, rows, depth, tokens, at):
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, rows, depth)
    values, positions = (guarded_memory.copy(a, at) for a in kernels.pack(weight))
    x = guarded_memory.copy(rng.standard_normal((tokens, depth)).astype(np.float32), at)
    bias = guarded_memory.copy(rng.standard_normal(rows).astype(np.float32), at)
    residual = guarded_memory.copy(rng.standard_normal((tokens, rows)).astype(np.float32), at)
    out = guarded_memory.copy(np.zeros((tokens, rows), np.float32), at)
    tier, lanes = tactic
    product = kernels.MatMul24(values, positions, tier=tier, lanes=lanes)
    product(x, bias=bias, residual=residual, out=out, threads=2)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T + bias + residual
    assert relative_error(out, expected) < 2 * TOLERANCE[tier]  # bf16 of few products is at its limit


@pytest.mark.parametrize("offset", [1, 3, 7, 13])
def test_any_alignment_gives_the_same_bits(tactic, offset):
    rng = np.random.default_rng(offset)
    product = create(random_weight(rng, 75, 92), tactic)
    x = rng.standard_normal((53, 92)).astype(np.float32)
    bias = rng.standard_normal(75).astype(np.float32)
    residual = rng.standard_normal((53, 75)).astype(np.float32)

    def shifted(array):
        copy = np.empty(array.size + 16, np.float32)[offset : offset + array.size].reshape(array.shape)
        copy[:] = array
        return copy

    result = product(shifted(x), bias=shifted(bias), residual=shifted(residual), out=shifted(np.zeros_like(residual)))
    np.testing.assert_array_equal(result, product(x, bias=bias, residual=residual))


def test_neighbours_of_the_output_are_left_alone(tactic):
    rng = np.random.default_rng(0)
    product = create(random_weight(rng, 29, 64), tactic)
    canvas = np.full(16 + 23 * 29 + 16, 7, np.float32)
    product(np.ones((23, 64), np.float32), out=canvas[16:-16].reshape(23, 29))
    assert (canvas[:16] == 7).all()
    assert (canvas[-16:] == 7).all()


def test_products_that_come_and_go_do_not_leak(resident_bytes):
    packed = kernels.pack(random_weight(np.random.default_rng(0), 512, 512))
    x = np.ones((130, 512), np.float32)

    def round_trip():
        kernels.MatMul24(*packed)(x, threads=2)

    for _ in range(20):
        round_trip()
    before = resident_bytes()
    for _ in range(300):
        round_trip()
    assert resident_bytes() - before < 20e6  # one leaked weight per round would be 230 MB
