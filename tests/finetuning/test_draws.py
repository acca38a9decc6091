"""What training draws: by (seed, step, sample) alone."""

import numpy as np
import pytest

from sparse_engine.pruning.draws import Draws, times
from sparse_engine.sampling import DiscreteBetas, FlowMatching, VPCosine, VPLinear


def test_every_row_once_an_epoch_in_another_order() -> None:
    draws = Draws(3, rows=10, batch=4)
    seen = np.concatenate([draws.rows(step, np.arange(4)) for step in range(10)]).reshape(4, 10)  # four epochs
    assert all(sorted(epoch) == list(range(10)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 4
    assert not np.array_equal(seen[0], Draws(4, 10, 4).rows(0, np.arange(4)))


def test_a_sample_draws_the_same_on_any_process() -> None:
    draws, other = Draws(2**40 + 7, 100, 8), Draws(2**40 + 7, 100, 8)
    whole, part = draws.of(5, np.arange(8)), other.of(5, np.arange(4, 8))
    for name in ("uniform", "dropped", "flipped", "choice"):
        assert np.array_equal(getattr(whole, name)[4:], getattr(part, name))
    assert np.array_equal(draws.noise(np.arange(8), (3, 2, 2))(5)[4:], other.noise(np.arange(4, 8), (3, 2, 2))(5))
    assert np.array_equal(draws.rows(5, np.arange(8))[4:], other.rows(5, np.arange(4, 8)))


def test_draws_are_uniform_and_independent() -> None:
    draws = Draws(0, 100, 4096)
    first, second = draws.of(0, np.arange(4096)), draws.of(1, np.arange(4096))
    for found in (first.uniform, first.dropped, first.choice):
        assert found.mean() == pytest.approx(0.5, abs=0.02)
        assert 0 <= found.min() < 0.01 < 0.99 < found.max() < 1
    assert first.flipped.mean() == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(first.uniform, second.uniform)[0, 1]) < 0.06
    noise = draws.noise(np.arange(64), (4, 8, 8))(0)
    latent = draws.latent_noise(0, np.arange(64), (4, 8, 8))
    assert abs(np.corrcoef(noise.ravel(), latent.ravel())[0, 1]) < 0.03


def test_times() -> None:
    uniform = np.array([0.0, 0.25, 0.999999])
    assert times(VPLinear(), uniform).tolist() == uniform.tolist()
    assert times(VPCosine(), uniform).max() < 0.9946
    assert times(FlowMatching(shift=3.0), uniform).tolist() == uniform.tolist()
    chain = DiscreteBetas(steps=4, time_shift=-1.0, time_scale=4.0)
    found = times(chain, np.array([0.0, 0.2499, 0.25, 0.999999]))
    assert found.tolist() == [0.25, 0.25, 0.5, 1.0]
    assert chain.network_time(found).tolist() == [0.0, 0.0, 1.0, 3.0]
