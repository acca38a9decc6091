"""Timing single calls, and finding where the device's time goes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sparse_engine.backends.torch.recorded import Recorder
from sparse_engine.bench.timing import interleave

from .session import Session


def seconds_each(calls: dict[str, Callable[[], object]], session: Session, count: int) -> dict[str, float]:
    """Median seconds of each call, measured in turn; on a GPU inside CUDA graphs, ``count`` calls to a graph.

    Args:
        calls: name -> what to time.
        session: where, and for how long.
        count: how many go into a graph, so that launching it and waiting for it is nothing beside them.
    """
    on_gpu = session.device.type == "cuda"
    runs, count = (_recorded(calls, session.device, count), count) if on_gpu else (calls, 1)
    timings = interleave(runs, repeats=3, seconds=session.seconds / 5)
    return {name: float(np.median(values)) / count for name, values in timings.runs.items()}


def _recorded(
    calls: dict[str, Callable[[], object]], device: torch.device, count: int
) -> dict[str, Callable[[], object]]:
    recorder = Recorder(device)
    runs: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        recorded = recorder.record([call] * count)
        recorded.take_result()  # the next graph gets its memory
        runs[name] = recorded
    return runs


def device_time(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Kernel -> milliseconds of the device's time in one run, the longest first. ``run`` returns when it is done."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        run()
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, field) / 1e3 for event in profiled.key_averages()}
    return dict(sorted(((name, value) for name, value in times.items() if value > 0), key=lambda item: -item[1]))
