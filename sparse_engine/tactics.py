"""A tactic is chosen, never assumed: time the candidates of a layer on this machine, keep the fastest, remember it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_engine.errors import OutputError
from sparse_engine.files import replacing

log = logging.getLogger(__name__)

# Each candidate runs once per round, so that a drifting machine hits all alike. Rounds stop at SECONDS_PER_CHOICE.
MIN_ROUNDS, MAX_ROUNDS = 3, 31
SECONDS_PER_CHOICE = 0.15
CACHE_VARIABLE = "SPARSE_ENGINE_CACHE"


@dataclass(frozen=True)
class Choice:
    """What was measured and chosen.

    Attributes:
        kernel: the fastest candidate's name.
        milliseconds: candidate -> median of its runs.
    """

    kernel: str
    milliseconds: dict[str, float]

    @property
    def margin(self) -> float:
        """How many times faster than the next best; 1 where there was no other."""
        others = [value for name, value in self.milliseconds.items() if name != self.kernel]
        return min(others) / self.milliseconds[self.kernel] if others else 1.0


def fastest(candidates: Mapping[str, Callable[[], object]]) -> Choice:
    """Time candidates in turn, after one warm-up each, and take the one with the smallest median."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - started > SECONDS_PER_CHOICE:
            break
        for name, run in candidates.items():
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return Choice(min(medians, key=lambda name: medians[name]), medians)


class TacticCache:
    """Choices in the user's cache folder, one file per machine, set of library versions and number of threads.

    A file that cannot be read or written costs time, never correctness: choices are then measured again.
    """

    def __init__(self, **conditions: Any) -> None:
        facts = {"processor": processor_name(), **conditions}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self._facts = facts
        self._path: Path | None = None
        with contextlib.suppress(RuntimeError):  # a user without a home folder
            self._path = cache_folder() / f"tactics-{digest}.json"
        self._choices = self._stored()

    def choose(self, key: str, candidates: Callable[[], Mapping[str, Callable[[], object]]]) -> Choice:
        """The choice stored under a key; else ``candidates`` are made, timed and the fastest stored."""
        if key not in self._choices:
            self._choices[key] = fastest(candidates())
            self._store()
        return self._choices[key]

    def _stored(self) -> dict[str, Choice]:
        """What the file holds."""
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
                stored = json.loads(self._path.read_text())
                return {key: Choice(**value) for key, value in stored["choices"].items()}
        return {}

    def _store(self) -> None:
        if self._path is None:
            return
        merged = {**self._stored(), **self._choices}  # another engine may have added its own
        choices = {key: asdict(choice) for key, choice in merged.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as stream:
                stream.write(json.dumps({"conditions": self._facts, "choices": choices}, indent=1).encode())
        except (OSError, OutputError) as error:
            log.debug("tactics are not remembered: %s", error)


def cache_folder() -> Path:
    """``$SPARSE_ENGINE_CACHE``, else ``sparse-engine`` in the user's cache folder.

    Raises RuntimeError where that is in a home folder and there is none.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()  # a service's file has no shell to do it
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # XDG Base Directory Specification 0.8: a relative path is invalid and to be ignored.
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "sparse-engine"


def processor_name() -> str:
    """The processor's model and stepping as the system tells them: what a timing is valid for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU part")
        found = dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in wanted)
        if found:
            return "; ".join(" ".join(line.split()) for line in found)
    return f"{platform.machine()} {platform.processor()}"
