"""Who draws which chunk: hands them out, replaces workers that die or hang, sets aside a chunk that keeps failing.

It knows neither processes nor Ray: a ``Fleet`` starts workers and tells what happens to them.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sparse_engine.errors import SparseEngineError

from .draw import Trouble
from .job import Chunk

TRIES = 3  # of a chunk; and of workers that do not come up, one after the other
LOOK = 0.5  # seconds between two looks at the clock
LOADING, IDLE, BUSY = "loading", "idle", "busy"


@dataclass(frozen=True)
class Ready:
    """A worker has loaded the engine. ``kernels`` as ``ChunkSampler.kernels``."""

    worker: int
    kernels: dict[str, Any]


@dataclass(frozen=True)
class Drew:
    """A worker has drawn a batch of its chunk."""

    worker: int
    images: int


@dataclass(frozen=True)
class Done:
    """A worker has committed its chunk."""

    worker: int


@dataclass(frozen=True)
class Failed:
    """A worker has failed to load the engine, or with its chunk, and is there still."""

    worker: int
    trouble: Trouble


@dataclass(frozen=True)
class Died:
    """A worker is no more."""

    worker: int
    why: str


Event = Ready | Drew | Done | Failed | Died


class Fleet(Protocol):
    """Workers, numbered from 0, and where they run."""

    patient: bool  # whether a worker cannot be stopped, so that none counts as hung

    def start(self, worker: int, choices: dict[str, Any] | None) -> None:
        """Start a worker; it loads the engine with the job's kernels, where they are known, and says so."""
        ...

    def give(self, worker: int, chunk: Chunk) -> None:
        """Have an idle worker draw a chunk."""
        ...

    def wait(self, seconds: float) -> Iterable[Event]:
        """What has happened, in order; after ``seconds`` at the latest, nothing."""
        ...

    def stop(self, worker: int) -> None:
        """End a worker at once; nothing is heard of it any more."""
        ...

    def close(self) -> None:
        """End them all."""
        ...


@dataclass
class Failure:
    """A chunk that was set aside, and what the last try said."""

    chunk: Chunk
    trouble: Trouble


@dataclass
class _Slot:
    state: str = LOADING
    chunk: Chunk | None = None
    drawn: int = 0
    heard: float = 0.0
    given: float = 0.0


@dataclass
class State:
    """How far a pool is.

    Attributes:
        done: images of finished chunks.
        drawing: images of those under way.
        workers: that are up.
        first_up: when the first one was, by ``time.monotonic``.
        replaced: workers that died or hung.
        busy: seconds from handing out the chunks that are done until they were, added up.
    """

    done: int = 0
    drawing: int = 0
    workers: int = 0
    first_up: float | None = None
    replaced: int = 0
    busy: float = 0.0


class Kernels(Protocol):
    """The kernels that all workers of a job are to have."""

    choices: dict[str, Any] | None  # what a worker is to load with; None where nobody has chosen yet

    def fit(self, kernels: dict[str, Any]) -> bool:
        """Whether a worker that has come up has them; if not, it is to load again with ``choices``.

        Raises InputError where it cannot have them.
        """
        ...


class Pool:
    """Draws chunks with the workers of a fleet.

    Args:
        fleet: where they run.
        workers: how many.
        chunks: to draw.
        timeout: seconds without a batch, or a load, after which a worker counts as hung.
        kernels: what they are held to.
        tell: called now and then with how far it is.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        fleet: Fleet,
        workers: int,
        chunks: Sequence[Chunk],
        *,
        timeout: float,
        kernels: Kernels,
        tell: Callable[[State], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._queue, self._timeout = fleet, deque(chunks), timeout
        self._kernels, self._tell, self._clock = kernels, tell, clock
        self._slots: dict[int, _Slot] = {}
        self._workers = min(workers, len(chunks))
        self._tries: dict[Chunk, int] = {}
        self._stillborn = 0  # workers that did not come up, since one last did
        self.state = State()
        self.failures: list[Failure] = []

    def run(self) -> list[Failure]:
        """Draw them all. Returns those that failed ``TRIES`` times.

        Raises:
            InputError: what no chunk can be drawn with: the disk is full, or the engine does not fit this machine.
            SparseEngineError: workers do not come up.
        """
        try:
            first_alone = self._kernels.choices is None  # it finds out which kernels the others are to have
            for worker in range(1 if first_alone else self._workers):
                self._start(worker)
            while self._queue or any(slot.state == BUSY for slot in self._slots.values()):
                for event in self._fleet.wait(LOOK):
                    self._handle(event)
                self._stop_hung()
                self._tell(self._now())
            self._tell(self._now())
            return self.failures
        finally:
            self._fleet.close()

    def _now(self) -> State:
        drawing = sum(slot.drawn for slot in self._slots.values())
        up = sum(slot.state != LOADING for slot in self._slots.values())
        return dataclasses.replace(self.state, drawing=drawing, workers=up)

    def _start(self, worker: int) -> None:
        self._slots[worker] = _Slot(heard=self._clock())
        self._fleet.start(worker, self._kernels.choices)

    def _handle(self, event: Event) -> None:
        slot = self._slots.get(event.worker)
        if slot is None:
            return
        slot.heard = self._clock()
        if isinstance(event, Ready):
            self._up(event.worker, slot, event.kernels)
        elif isinstance(event, Drew):
            slot.drawn += event.images
            self._tell(self._now())
        elif isinstance(event, Done):
            self.state.done += slot.chunk.images if slot.chunk else 0
            self.state.busy += slot.heard - slot.given
            self._next(event.worker, slot)
        elif isinstance(event, Failed):
            self._failed(event.worker, slot, event.trouble)
        else:
            self._lost(event.worker, slot, Trouble(f"its worker {event.why}"))

    def _up(self, worker: int, slot: _Slot, kernels: dict[str, Any]) -> None:
        if not self._kernels.fit(kernels):
            self._fleet.stop(worker)
            self._start(worker)
            return
        self._stillborn = 0
        if self.state.first_up is None:
            self.state.first_up = self._clock()
        self._next(worker, slot)
        for other in range(self._workers):
            if other not in self._slots and self._queue:
                self._start(other)

    def _next(self, worker: int, slot: _Slot) -> None:
        slot.state, slot.chunk, slot.drawn = IDLE, None, 0
        if self._queue:
            slot.state, slot.chunk = BUSY, self._queue.popleft()
            slot.given = slot.heard = self._clock()
            self._fleet.give(worker, slot.chunk)

    def _failed(self, worker: int, slot: _Slot, trouble: Trouble) -> None:
        if trouble.fatal:
            raise trouble.error()
        if slot.state == LOADING:
            self._fleet.stop(worker)
            self._lost(worker, slot, trouble)
        else:
            self._set_back(slot, trouble)
            self._next(worker, slot)
            self._wake()

    def _lost(self, worker: int, slot: _Slot, trouble: Trouble) -> None:
        """A worker is gone: another takes its number, while there is work."""
        if slot.state == LOADING:
            self._stillborn += 1
            if self._stillborn >= TRIES:
                raise SparseEngineError(
                    f"{TRIES} workers in a row did not come up; the last one: {trouble.what}",
                    trouble.fix or "try one in this process first: the same command without --workers and --cluster",
                )
        self.state.replaced += 1
        self._set_back(slot, trouble)
        del self._slots[worker]
        if self._queue:
            self._start(worker)

    def _set_back(self, slot: _Slot, trouble: Trouble) -> None:
        """A slot's chunk goes to the end of the queue, or is set aside."""
        chunk, slot.chunk, slot.drawn = slot.chunk, None, 0
        if chunk is None:
            return
        self._tries[chunk] = self._tries.get(chunk, 0) + 1
        if self._tries[chunk] < TRIES:
            self._queue.append(chunk)
        else:
            self.failures.append(Failure(chunk, trouble))

    def _wake(self) -> None:
        """Workers that had nothing left to do have something again."""
        for worker, slot in self._slots.items():
            if slot.state == IDLE and self._queue:
                self._next(worker, slot)

    def _stop_hung(self) -> None:
        if self._fleet.patient:
            return
        for worker, slot in list(self._slots.items()):
            if slot.state != IDLE and self._clock() - slot.heard > self._timeout:
                self._fleet.stop(worker)
                self._lost(worker, slot, Trouble(f"its worker did nothing for {self._timeout:g} s"))
        self._wake()
