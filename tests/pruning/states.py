"""States that need no engine: noise, and what a model is told."""

from __future__ import annotations

import numpy as np

from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.export.model import Model


def states_of(model: Model, count: int = 48, seed: int = 0) -> CalibrationData:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0.01, 1, count))[::-1] * model.schedule.t_max
    return CalibrationData(
        rng.standard_normal((count, *model.config.data_shape), np.float32),
        times,
        model.schedule.network_time(times).astype(np.float32),
        model.told(np.arange(count), seed),
        np.ones(count, np.float32),
        {"checkpoint_sha256": model.checkpoint.sha256},
    )
