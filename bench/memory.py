"""Memory: what an engine takes, measured in a process of its own; and what is left.

``python -m sparse_engine.bench.memory ENGINE BATCH [THREADS]`` is that process.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.backends import backend_named
from sparse_engine.conditioning import zeros_for
from sparse_engine.engine import SparseEngine

MIB = 2**20
TIMEOUT = 300  # seconds
STATUS, CLEAR_REFS, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
CPU_BACKEND = "onnxruntime"
CGROUP = Path("/sys/fs/cgroup")


def peak_memory(engines: Mapping[str, Path], batch: int, threads: int | None) -> dict[str, dict[str, float]]:
    """MiB that loading an engine and running one step adds to a process that has only imported the runtime.

    Args:
        engines: name -> engine file. Each is measured in a process of its own, all at the same time.
        batch, threads: of the step.

    Returns:
        Name -> {"host": resident set at its peak, less what it was before the load; weights that are mapped from the
        file count once they are read}, and {"device"} where the engine runs on a GPU. Empty where the system has no
        ``/proc``; an engine whose process failed is left out.
    """
    if not STATUS.is_file():
        return {}
    arguments = [str(batch), *([str(threads)] if threads else [])]
    command = [sys.executable, "-m", "sparse_engine.bench.memory"]
    processes = {
        name: subprocess.Popen([*command, str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for name, path in engines.items()
    }
    found = {}
    try:
        for name, process in processes.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=TIMEOUT)
                if process.returncode == 0:
                    found[name] = json.loads(output.splitlines()[-1])
    finally:  # of those that took too long, or of all after an interrupt
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def _measure(path: Path, batch: int, threads: int | None) -> dict[str, float]:
    backend = backend_named(EngineFile(path).manifest.backend["name"])
    backend.availability()  # imports the runtime
    may_use_gpu = backend.name != CPU_BACKEND  # asking imports torch, which takes a while
    device_before = _device_bytes() if may_use_gpu else None
    CLEAR_REFS.write_text("5")  # forget the peak that importing left
    before = _status_bytes("VmRSS")
    with SparseEngine.load(path, threads=threads) as engine:
        x = np.zeros((batch, *engine.manifest.data_shape), np.float32)
        told = zeros_for(engine.manifest.conditions)
        engine.predict(x, engine.schedule.t_max / 2, conditioning=told)
        found = {"host": (_status_bytes("VmHWM") - before) / MIB}
        device_after = _device_bytes() if device_before is not None else None
        if device_before is not None and device_after is not None and device_after > device_before:
            found["device"] = (device_after - device_before) / MIB
    return found


def _status_bytes(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _device_bytes() -> int | None:
    """Bytes in use on the first GPU, by whoever uses it; None where torch has none."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def available_bytes() -> int | None:
    """What this process may still take, by the system and by its control group; None where neither says."""
    limits = []
    if MEMINFO.is_file():
        lines = MEMINFO.read_text().splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    largest, current = CGROUP / "memory.max", CGROUP / "memory.current"
    if largest.is_file() and current.is_file() and largest.read_text().strip() != "max":
        limits.append(int(largest.read_text()) - int(current.read_text()))
    return min(limits, default=None)


def main(arguments: list[str]) -> None:
    """Measure one engine and print what was found as one line of JSON."""
    path, batch, *threads = arguments
    sys.stdout.write(json.dumps(_measure(Path(path), int(batch), int(threads[0]) if threads else None)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
