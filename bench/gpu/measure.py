"""Timing single calls, and finding where the device's time goes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparse_engine.backends.torch.recorded import Recorded, repeats
from sparse_engine.bench.timing import interleave

from .session import Session


def seconds_each(calls: dict[str, Callable[[], object]], session: Session, operations: float) -> dict[str, float]:
    """Median seconds of each call, measured in turn; on a GPU inside CUDA graphs, several calls to a graph.

    Args:
        calls: name -> what to time.
        session: where, and for how long.
        operations: of one call, about; how many go into a graph.
    """
    on_gpu = session.device.type == "cuda"
    count = repeats(operations) if on_gpu else 1
    runs = {name: Recorded([call] * count, session.device) if on_gpu else call for name, call in calls.items()}
    timings = interleave(runs, repeats=3, seconds=session.seconds / 5)
    return {name: float(np.median(values)) / count for name, values in timings.runs.items()}


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


def query_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it is not there."""
    fields = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit", "memory.total", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device and the libraries that its numbers depend on."""
    if device.type != "cuda":
        return {"name": "cpu", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cusparselt": torch.backends.cusparselt.version(),
        "nvidia_smi": query_driver(),
    }
