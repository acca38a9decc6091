"""How many cores there are to use: affinity, cgroup quotas, and what is made of ``threads``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from sparse_engine import SparseEngine, cores, doctor
from sparse_engine.bench.settings import Settings
from sparse_engine.cores import pool_size, usable_cores

V2_DOCKER = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}
V2_NESTED = {
    "proc/self/cgroup": "0::/user.slice/app.scope\n",
    "sys/fs/cgroup/user.slice/cpu.max": "250000 100000\n",
    "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000\n",
}
V1 = {
    "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/docker/1a2b\n1:name=systemd:/x\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",  # seen from inside, where /docker/1a2b is not there
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
V1_LINKED = {
    "proc/self/cgroup": "4:cpu:/job\n",
    "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
    "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
}
V1_WITHOUT = {**V1, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}
HYBRID = {
    "proc/self/cgroup": "4:cpu:/\n0::/\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/unified/cpu.max": "210000 100000\n",
}
BROKEN = {"proc/self/cgroup": "nonsense\n0::/\n", "sys/fs/cgroup/cpu.max": "a lot\n"}
ZERO = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "0 0\n"}
LITTLE = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000\n"}


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: set(range(8)))


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files,expected",
    [
        ({}, 8),
        (V2_DOCKER, 1),
        (V2_NESTED, 3),
        (V1, 2),
        (V1_LINKED, 3),
        (V1_WITHOUT, 8),
        (HYBRID, 3),
        (BROKEN, 8),
        (ZERO, 8),
        (LITTLE, 1),
    ],
    ids=["none", "v2", "v2 nested", "v1", "v1 linked", "v1 -1", "hybrid", "broken", "zero", "little"],
)
def test_quotas(eight_processors: None, tmp_path: Path, files: dict[str, str], expected: int) -> None:
    root = system(tmp_path, files)
    assert usable_cores(root) == expected
    assert pool_size(None, root) == expected
    assert pool_size(500, root) == expected
    assert pool_size(1, root) == 1


def test_two_processors_of_a_core_are_one_by_default_and_two_where_asked_for(
    eight_processors: None, tmp_path: Path
) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}\n" for i in range(8)
    }
    root = system(tmp_path, siblings)
    assert usable_cores(root) == 8
    assert pool_size(None, root) == 4
    assert pool_size(8, root) == 8
    assert pool_size(None, system(tmp_path, V1_LINKED)) == 3


def test_affinity() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def spinning() -> int:
    return len(os.listdir("/proc/self/task"))


def test_an_engine_has_no_more_threads_than_cores_and_says_so(
    conditional_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = spinning()
    with caplog.at_level(logging.WARNING), SparseEngine.load(conditional_engine, threads=500, autotune=False) as engine:
        assert engine.info["runtime"]["threads"] == usable_cores()
        assert spinning() - before <= usable_cores()
    assert f"threads = 500, but this process may use {usable_cores()} cores" in caplog.text


@pytest.mark.parametrize("threads", [None, 500])
def test_a_quota_bounds_the_pool_and_all_that_is_made_by_its_size(
    conditional_engine: Path, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda root=None: 1)
    before = spinning()
    with SparseEngine.load(conditional_engine, threads=threads, autotune=False) as engine:
        assert engine.info["runtime"]["threads"] == 1
        assert spinning() == before
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    assert doctor._cpu().found.startswith("1 usable cores")


def test_no_warning_where_nothing_is_capped(conditional_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    for threads in (None, 1):
        SparseEngine.load(conditional_engine, threads=threads, autotune=False).close()
    assert "threads" not in caplog.text


def test_more_threads_than_any_machine_has_are_refused() -> None:
    with pytest.raises(ValueError, match="threads = 5000; expected 1 to 4096"):
        Settings(threads=5000)
