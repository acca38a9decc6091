"""How many cores this process may use: a pool with more threads than that spins against itself."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path("/")
# Runtimes' threads spin after their last call: ONNX Runtime's for 40 ms on a Zen 4. The process is quiet when it has
# used next to no processor time for a while.
QUIET_FOR, QUIET_SHARE, QUIET_AFTER = 0.01, 0.1, 0.5  # seconds, part of a core, seconds


def usable_cores(root: Path = ROOT) -> int:
    """The smallest of the affinity and of the CFS quotas of the process's cgroups (v1 and v2), rounded up; 1 or more.

    ``root`` is the root of the file system: ``docker --cpus=1`` is written there, in no affinity. The two processors
    that share a core (SMT) count as two.
    """
    return max(1, min([len(_affinity()), *(math.ceil(share) for share in _quotas(root))]))


def pool_size(threads: int | None, root: Path = ROOT) -> int:
    """How many threads a pool of the CPU has that is asked for ``threads``: no more than ``usable_cores``.

    None is one per core: of those that share an arithmetic unit, one.
    """
    return min(usable_cores(root), len(_physical_cores(root)) if threads is None else threads)


def say_if_capped(threads: int | None) -> None:
    """Warn where ``pool_size`` is less than was asked for."""
    if threads is not None and pool_size(threads) < threads:
        log.warning("threads = %d, but this process may use %d cores: as many are used", threads, pool_size(threads))


def wait_for_quiet() -> None:
    """Wait until no thread of this process computes or spins any more, but for no longer than ``QUIET_AFTER``."""
    end = time.perf_counter() + QUIET_AFTER
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(QUIET_FOR)
        if time.process_time() - used < QUIET_SHARE * QUIET_FOR:
            return


def _affinity() -> set[int]:
    """The processors that the process may run on, by number."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _physical_cores(root: Path) -> set[str]:
    """The cores that those processors are of; where the system does not tell, each is one."""
    topology = root / "sys/devices/system/cpu"
    return {_read(topology / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu) for cpu in _affinity()}


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time of each quota that the process is under: its cgroup's, and those of the ones above."""
    for folder in _folders(root):
        version_2 = _read(folder / "cpu.max").split()
        version_1 = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        for quota in (version_2, version_1):
            if len(quota) == 2 and all(word.isdecimal() and int(word) for word in quota):  # not "max", nor -1
                yield int(quota[0]) / int(quota[1])


def _folders(root: Path) -> Iterator[Path]:
    """Where the process's cgroups of the CPU are, as far as they can be seen.

    A container sees its own cgroup as the topmost, under whatever name ``/proc/self/cgroup`` has for it.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            mounts = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif "cpu" in controllers.split(","):
            mounts = (f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu")
        else:
            continue
        own = Path(name.strip("/"))
        yield from (root / mount / each for mount in mounts for each in (own, *own.parents))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
