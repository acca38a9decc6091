"""Options and shapes of the public API, as hypothesis thinks of them: a right result, or an error of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_engine import SparseEngine, sampling
from sparse_engine.errors import SparseEngineError

FEW = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = st.one_of(
    st.integers(-2, 6),
    st.floats(-2, 3),
    st.sampled_from(
        [None, True, "2", float("nan"), float("inf"), 2**64, np.uint8(3), np.int64(2), np.float32(0.5), [], [1]]
    ),
)
DTYPES = st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int64, np.bool_, np.complex64])
SHAPES = st.sampled_from([(2, 3, 8, 8), (1, 3, 8, 8), (2, 3, 8), (0, 3, 8, 8), (2, 4, 8, 8), ()])
ARRAYS = st.builds(lambda shape, dtype: np.ones(shape, dtype), SHAPES, DTYPES)


@pytest.mark.filterwarnings("ignore")
@FEW
@given(
    n=NUMBERS,
    options=st.dictionaries(
        st.sampled_from(["batch_size", "seed", "labels", "guidance", "steps", "t_start", "t_end", "eta", "order"]),
        NUMBERS,
        max_size=3,
    ),
    sampler=st.sampled_from([*sampling.SAMPLERS, "nobody's", None]),
    output=st.sampled_from(["uint8", "float", "dlpack", "png"]),
)
def test_sample(engine: SparseEngine, n: Any, options: dict[str, Any], sampler: Any, output: str) -> None:
    if output == "dlpack":
        output = "float"
    try:
        drawn = engine.sample(n, sampler=sampler, output=output, **{"steps": 2, **options})
    except SparseEngineError:
        return
    assert drawn.shape == ((n, 8, 8, 3) if output == "uint8" else (n, 3, 8, 8))
    assert drawn.dtype == (np.uint8 if output == "uint8" else np.float32)
    assert np.isfinite(drawn).all()


@pytest.mark.filterwarnings("ignore")
@FEW
@given(x=ARRAYS, t=NUMBERS, guidance=NUMBERS)
def test_denoise(engine: SparseEngine, x: np.ndarray, t: Any, guidance: Any) -> None:
    try:
        eps = engine.denoise(x, t, guidance=guidance)
    except SparseEngineError:
        return
    assert eps.shape == x.shape
    assert eps.dtype == np.float32
    assert np.isfinite(eps).all()
