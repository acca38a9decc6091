"""A tactic is chosen, never assumed: time the candidates of a layer on this machine, keep the fastest, remember it.

A choice whose margin is within the noise of its timing is marked, and some of them are timed again on later loads: one
a process, and one a day, so that no load is noticeably slower. What was measured before counts as much as what is
measured then. After ``MOST_TIMES`` it stays: the candidates are as good as equal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from sparse_engine.cores import wait_for_quiet
from sparse_engine.errors import OutputError
from sparse_engine.files import replacing

log = logging.getLogger(__name__)

# Each candidate runs once per round, so that a drifting machine hits all alike. Rounds stop at SECONDS_PER_CHOICE.
MIN_ROUNDS, MAX_ROUNDS = 3, 31
SECONDS_PER_CHOICE = 0.15
CLEAR = 1.25  # who was faster than all others by so much in each of the first MIN_ROUNDS rounds is: they are the last
CACHE_VARIABLE = "SPARSE_ENGINE_CACHE"
MOST_TIMES = 3  # that a choice within the noise is timed
SECONDS_BETWEEN = 86400.0  # from one choice that is timed again to the next
SPEED_ALONE = ("threads", "kernels")  # conditions that a time depends on, and what a kernel computes does not
LARGEST_FILE = 1 << 24  # bytes: a thousand engines' choices are less
TOO_LITTLE = 0.02  # a margin that is not worth kernels of several forms in one network
TICK = 1e-6  # milliseconds: below what the clock can tell
Candidates = Callable[[], Mapping[str, Callable[[], object]]]


@dataclass(frozen=True)
class Choice:
    """What was measured and chosen.

    Attributes:
        kernel: the fastest candidate's name.
        milliseconds: candidate -> median of its runs.
        noise: what the margin is uncertain by (see ``margin``): twice the standard error of the median, over the
            rounds, of how much slower the next best was than the fastest; 0 where there was no other.
        times: how often it was timed, in as many processes.
    """

    kernel: str
    milliseconds: dict[str, float]
    noise: float = 0.0
    times: int = 1

    @property
    def margin(self) -> float:
        """How many times faster than the next best; 1 where there was no other."""
        others = [value for name, value in self.milliseconds.items() if name != self.kernel]
        return min(others) / self.milliseconds[self.kernel] if others else 1.0

    @property
    def within_noise(self) -> bool:
        """Whether the next best may be as fast."""
        return len(self.milliseconds) > 1 and self.margin - 1 <= self.noise

    def to_dict(self) -> dict[str, Any]:
        """For ``engine.info`` and ``inspect``."""
        return {
            "milliseconds": self.milliseconds,
            "fastest": self.kernel,
            "margin": self.margin,
            "within_noise": self.within_noise,
            "times": self.times,
        }

    def leaning_to(self, kernel: str) -> Choice:
        """The same evidence, ``kernel`` chosen unless another is faster by more than the noise and ``TOO_LITTLE``."""
        least = self.milliseconds[self.kernel]
        close = self.milliseconds[kernel] <= least * (1 + max(self.noise, TOO_LITTLE))
        return replace(self, kernel=kernel) if close else self

    def merged(self, other: Choice) -> Choice:
        """The evidence of both, of the same candidates: each timing counts once."""
        times = self.times + other.times
        milliseconds = {
            name: (self.times * value + other.times * other.milliseconds[name]) / times
            for name, value in self.milliseconds.items()
        }
        noise = math.hypot(self.times * self.noise, other.times * other.noise) / times
        return Choice(_least(milliseconds), milliseconds, noise, times)


def fastest(candidates: Mapping[str, Callable[[], object]], spinning: bool = False) -> Choice:
    """Time candidates in turn, after one warm-up each, and take the one with the smallest median.

    ``spinning``: their threads spin on after a call, and would take cores from the next: each turn waits for that, and
    calls once more before it times.
    """
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and (time.perf_counter() - started > SECONDS_PER_CHOICE or _is_clear(seconds)):
            break
        for name, run in candidates.items():
            if spinning:
                wait_for_quiet()
                run()
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    medians = {name: max(1e3 * statistics.median(values), TICK) for name, values in seconds.items()}
    kernel = _least(medians)
    others = {name: value for name, value in medians.items() if name != kernel}
    noise = _noise(seconds[kernel], seconds[_least(others)]) if others else 0.0
    return Choice(kernel, medians, noise)


def _is_clear(seconds: Mapping[str, list[float]]) -> bool:
    """Whether one candidate was the fastest by ``CLEAR`` in every round."""
    first = _least({name: sum(values) for name, values in seconds.items()})
    others = [values for name, values in seconds.items() if name != first]
    return all(CLEAR * own <= min(rest) for own, *rest in zip(seconds[first], *others, strict=True)) if others else True


def _least(milliseconds: Mapping[str, float]) -> str:
    return min(milliseconds, key=lambda name: milliseconds[name])


def _noise(best: list[float], next_best: list[float]) -> float:
    """Twice the standard error of the median of the paired differences, over the median of the best.

    From the median absolute deviation, which one interrupted run does not move; 1.2533 and 1.4826 are a normal's.
    """
    differences = [other - own for own, other in zip(best, next_best, strict=True)]
    middle = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in differences)
    return 2 * 1.2533 * deviation / math.sqrt(len(differences)) / max(statistics.median(best), 1e-3 * TICK)


@dataclass(frozen=True)
class Timed:
    """One choice of ``timing_afresh``. ``before`` is what was remembered; None where nothing was."""

    key: str
    before: Choice | None
    now: Choice

    def to_dict(self) -> dict[str, Any]:
        """For a program to read."""
        before = self.before.to_dict() if self.before else None
        return {"key": self.key, "before": before, "now": self.now.to_dict()}


_afresh: ContextVar[dict[str, Timed] | None] = ContextVar("afresh", default=None)
_timed_again: set[Path] = set()  # caches of which this process has timed a choice again


@contextlib.contextmanager
def timing_afresh() -> Iterator[dict[str, Timed]]:
    """Within it, caches that are opened time everything again. Yields what was timed, by key."""
    timed: dict[str, Timed] = {}
    token = _afresh.set(timed)
    try:
        yield timed
    finally:
        _afresh.reset(token)


Fixed = dict[str, dict[str, Any]]  # conditions but for ``SPEED_ALONE`` -> key -> a choice, as JSON holds it
_fixed: ContextVar[Fixed | None] = ContextVar("fixed", default=None)


@contextlib.contextmanager
def fixing(choices: Fixed) -> Iterator[None]:
    """Within it, caches that are opened take what ``choices`` holds and time it never again; what they choose is added.

    So that the processes that share a job run the same kernels, on any number of threads.
    """
    token = _fixed.set(choices)
    try:
        yield
    finally:
        _fixed.reset(token)


class TacticCache:
    """Choices in the user's cache folder, one file per machine, set of library versions and number of threads.

    A file that cannot be read or written, or says what cannot be, costs time, never correctness: choices are then
    measured again.
    """

    def __init__(self, **conditions: Any) -> None:
        facts = {"processor": processor_name(), **conditions}
        text = json.dumps(facts, sort_keys=True)
        self._facts = json.loads(text)  # as the file gives them back
        self._path: Path | None = None
        with contextlib.suppress(RuntimeError):  # a user without a home folder
            self._path = cache_folder() / f"tactics-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._timed = _afresh.get()
        shared = {name: value for name, value in self._facts.items() if name not in SPEED_ALONE}
        fixed = _fixed.get()
        self._fixed = None if fixed is None else fixed.setdefault(json.dumps(shared, sort_keys=True), {})
        self._remembered, self._timed_at = self._stored()
        self._choices = {} if self._timed is not None else dict(self._remembered)

    def choose(self, key: str, candidates: Candidates, names: Collection[str] | None = None) -> Choice:
        """The choice stored under a key; else ``candidates`` are made, timed and the fastest stored.

        ``names`` are the candidates that there are now: a choice that was made among others is made again.
        """
        fixed = None if self._fixed is None else _read_choice(self._fixed.get(key))
        known = fixed or self._choices.get(key)
        if known is not None and names is not None and known.milliseconds.keys() != set(names):
            known = None
        if known is None:
            self._keep(key, fastest(candidates()))
        elif known is fixed:
            return known
        elif self._is_due(known):
            self._time_again(key, known, candidates)
        if self._fixed is not None:
            self._fixed[key] = asdict(self._choices[key])
        return self._choices[key]

    def _is_due(self, choice: Choice) -> bool:
        """Whether a choice within the noise is to be timed again now."""
        return (
            choice.within_noise
            and choice.times < MOST_TIMES
            and self._timed is None
            and self._path is not None
            and self._path not in _timed_again
            and abs(time.time() - self._timed_at) > SECONDS_BETWEEN
        )

    def _time_again(self, key: str, known: Choice, candidates: Candidates) -> None:
        if self._path is not None:
            _timed_again.add(self._path)
        try:
            now = fastest(candidates())
        except Exception as error:  # for want of memory, say: what is known stays
            log.debug("%s is not timed again: %s", key, error)
            return
        self._keep(key, known.merged(now) if known.milliseconds.keys() == now.milliseconds.keys() else now)

    def _keep(self, key: str, choice: Choice) -> None:
        if self._timed is not None:
            self._timed[key] = Timed(key, self._remembered.get(key), choice)
        self._choices[key] = choice
        self._timed_at = time.time()
        self._store({key: choice})

    def _stored(self) -> tuple[dict[str, Choice], float]:
        """What the file holds that can be believed, and when a choice was last timed."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            # A pipe or a device in its place would never end.
            if self._path is not None and self._path.is_file() and self._path.stat().st_size <= LARGEST_FILE:
                return _believed(json.loads(self._path.read_bytes()), self._facts)
        return {}, 0.0

    def _store(self, new: Mapping[str, Choice]) -> None:
        if self._path is None:
            return
        merged = {**self._stored()[0], **new}  # another engine may have added its own
        choices = {key: asdict(choice) for key, choice in merged.items()}
        record = {"conditions": self._facts, "timed_at": self._timed_at, "choices": choices}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as stream:
                stream.write(json.dumps(record, indent=1).encode())
        except (OSError, ValueError, OutputError) as error:
            log.debug("tactics are not remembered: %s", error)


def _believed(stored: Any, facts: dict[str, Any]) -> tuple[dict[str, Choice], float]:
    """The choices of a file that are well formed, where it is for these conditions; and when the last was timed."""
    if not isinstance(stored, dict) or stored.get("conditions") != facts:
        return {}, 0.0
    choices = stored.get("choices")
    entries = choices.items() if isinstance(choices, dict) else ()
    read = {key: choice for key, value in entries if (choice := _read_choice(value)) is not None}
    at = stored.get("timed_at")
    return read, (at if _is_number(at) else 0.0)


def _read_choice(value: Any) -> Choice | None:
    """A stored choice; None where it is not one that ``fastest`` can have made."""
    if not isinstance(value, dict):
        return None
    milliseconds, noise, times = value.get("milliseconds"), value.get("noise"), value.get("times")
    if not isinstance(milliseconds, dict) or not all(_is_number(each) and each > 0 for each in milliseconds.values()):
        return None
    if not (_is_number(noise) and noise >= 0) or not (_is_number(times) and isinstance(times, int) and times >= 1):
        return None
    if not milliseconds or value.get("kernel") != _least(milliseconds):
        return None
    return Choice(value["kernel"], milliseconds, noise, times)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def cache_folder() -> Path:
    """``$SPARSE_ENGINE_CACHE``, else ``sparse-engine`` in the user's cache folder. Raises RuntimeError without a home.

    A service's file sets variables without a shell that expands ``~``; a relative ``XDG_CACHE_HOME`` does not count, by
    the XDG Base Directory Specification.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    users = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(users) if os.path.isabs(users) else Path.home() / ".cache") / "sparse-engine"


def processor_name() -> str:
    """The processor's model and stepping as the system tells them: what a timing is valid for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU part")
        found = dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in wanted)
        if found:
            return "; ".join(" ".join(line.split()) for line in found)
    return f"{platform.machine()} {platform.processor()}"
