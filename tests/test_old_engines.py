"""Engine files of earlier versions draw what they drew."""

from pathlib import Path

import numpy as np

from sparse_engine import SparseEngine

GOLDEN = Path(__file__).parent / "golden"
LEVELS = 1  # of grey: another processor's kernels add up in another order
CLOSE = 1e-5


def test_a_digits_engine_of_format_1_draws_the_same_pictures() -> None:
    """Written with its pictures by the last version that knew labels alone; neither is ever written again."""
    drawn = np.load(GOLDEN / "digits-1.npz")
    with SparseEngine.load(GOLDEN / "digits-1.sengine", threads=1, autotune=False) as engine:
        assert engine.manifest.format_version == 1
        guided = engine.sample(20, labels=np.arange(20) % 10, guidance=2.0, steps=25, seed=3)
        unguided = engine.sample(8, steps=25, seed=11)
        eps = engine.denoise(np.full((2, 1, 8, 8), 0.5, np.float32), 0.4, labels=[1, 2], guidance=1.5)
    assert np.abs(guided.astype(int) - drawn["guided"]).max() <= LEVELS
    assert np.abs(unguided.astype(int) - drawn["drawn"]).max() <= LEVELS
    assert np.abs(eps - drawn["eps"]).max() < CLOSE
