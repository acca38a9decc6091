"""What a GPU's numbers depend on: the device, its driver, and the libraries."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import torch


def query_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it is not there."""
    fields = ("driver_version", "clocks.max.sm", "clocks.sm", "power.limit", "memory.total", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))


@cache
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
