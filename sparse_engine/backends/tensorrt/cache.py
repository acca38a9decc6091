"""Timings and plans in the user's cache folder. A file that cannot be used costs time, never correctness."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparse_engine.artifact import PayloadFile
from sparse_engine.errors import OutputError
from sparse_engine.files import parsed_json, replacing
from sparse_engine.tactics import cache_folder

log = logging.getLogger(__name__)

PLAN_BYTES = 8 << 30  # of plans that are kept; beyond it the ones used longest ago go


def digest(facts: Mapping[str, Any]) -> str:
    """A name for what a file in the cache is valid for."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def graph_digest(proto: bytes, weights: PayloadFile) -> str:
    """sha256 of a graph and its weights."""
    total = hashlib.sha256(proto)
    for chunk in weights.chunks():
        total.update(chunk)
    return total.hexdigest()


class TimingCache:
    """TensorRT's own timings, for one version of the library, GPU and driver; several builds may share the file."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._path: Path | None = None
        with contextlib.suppress(RuntimeError, OSError):  # a user without a home folder
            self._path = cache_folder() / "tensorrt" / f"timing-{digest(facts)}.bin"

    def attach(self, config: Any) -> None:
        """Give a builder's configuration the stored timings, or an empty cache."""
        cache = config.create_timing_cache(self._read())
        if cache is None:
            cache = config.create_timing_cache(b"")
        if cache is not None:
            config.set_timing_cache(cache, False)

    def store(self, config: Any) -> None:
        """Add what a build has measured to what others have stored meanwhile."""
        cache = config.get_timing_cache()
        if self._path is None or cache is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                others = config.create_timing_cache(self._read())
                if others is not None:
                    cache.combine(others, False)
                with replacing(self._path) as stream:
                    stream.write(memoryview(cache.serialize()))
        except (OSError, OutputError) as error:
            log.debug("timings are not remembered: %s", error)

    def _read(self) -> bytes:
        with contextlib.suppress(OSError):
            if self._path is not None:
                return self._path.read_bytes()
        return b""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes respect."""
    try:
        import fcntl
    except ImportError:  # Windows: the last build to end wins
        yield
        return
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class PlanCache:
    """Built plans and what their builder said, each under all that it depends on."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._plan: Path | None = None
        with contextlib.suppress(RuntimeError, OSError):
            self._plan = cache_folder() / "tensorrt" / f"{digest(facts)}.plan"

    def load(self) -> tuple[bytes, dict[str, Any]] | None:
        """The plan and its notes; None where there is none, or it is damaged."""
        if self._plan is None:
            return None
        try:
            plan, record = self._plan.read_bytes(), parsed_json(self._plan.with_suffix(".json").read_bytes())
            os.utime(self._plan)
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or not isinstance(record.get("notes"), dict):
            return None
        return (plan, record["notes"]) if record.get("sha256") == hashlib.sha256(plan).hexdigest() else None

    def store(self, plan: bytes | memoryview, notes: Mapping[str, Any]) -> None:
        """Keep a plan; the oldest go where there are too many."""
        if self._plan is None or len(plan) > PLAN_BYTES:
            return
        record = {"sha256": hashlib.sha256(plan).hexdigest(), "notes": notes}
        try:
            self._plan.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._plan) as stream:
                stream.write(plan)
            with replacing(self._plan.with_suffix(".json")) as stream:
                stream.write(json.dumps(record).encode())
            _evict(self._plan.parent)
        except (OSError, OutputError) as error:
            log.debug("the plan is not kept: %s", error)


def _evict(folder: Path) -> None:
    plans = sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in plans)
    for path in plans[:-1]:
        if total <= PLAN_BYTES:
            break
        total -= path.stat().st_size
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
