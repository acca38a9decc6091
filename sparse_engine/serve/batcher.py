"""Which images are drawn together: lanes of one key, the oldest first, never more waiting than was agreed to.

All of it runs on the event loop, so nothing here needs a lock; the thread that draws reads ``Batch.abandoned``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_engine.conditioning import Rows
from sparse_engine.errors import SamplingCancelled

from . import refusals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What a call of an engine has once for all of its images."""

    model: str
    steps: int
    sampler: str
    guidance: float
    options: str = "{}"  # the sampler's own, as JSON: 1 is not true there

    @property
    def chosen(self) -> dict[str, Any]:
        """The sampler's own options, by name."""
        found: dict[str, Any] = json.loads(self.options)
        return found

    @property
    def work(self) -> int:
        """Network passes that an image takes."""
        return self.steps * (1 if self.guidance == 1.0 else 2)


@dataclass(eq=False)
class Job:
    """One request's images.

    Attributes:
        key: what they share with the others of a batch.
        seeds, numbers: uint64 and int64 [n]: image ``numbers[i]`` of seed ``seeds[i]``.
        told: what the network is told, n rows.
        done: of n arrays, None for each image that is not finite.
        arrived: when, by the loop's clock.
        taken: how many of the images have left the queue.
        gone: whether nobody waits for them any more.
    """

    key: Key
    seeds: np.ndarray
    numbers: np.ndarray
    told: Rows
    done: asyncio.Future[list[np.ndarray | None]]
    arrived: float
    taken: int = 0
    drawn: int = 0
    gone: bool = False
    images: list[np.ndarray | None] = field(default_factory=list)
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.images = [None] * len(self.seeds)

    @property
    def waiting(self) -> int:
        """Images that are still in the queue."""
        return 0 if self.gone else len(self.seeds) - self.taken


@dataclass(frozen=True)
class Batch:
    """Images of one key: of each job some rows, one after the other."""

    key: Key
    parts: Sequence[tuple[Job, range]]

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def abandoned(self) -> bool:
        """Whether nobody waits for any of it."""
        return all(job.gone for job, _ in self.parts)


class Pace:
    """Seconds that a network pass of an image takes, by model: what batches have shown, the latest most."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def learn(self, key: Key, images: int, seconds: float) -> None:
        """A batch took so long."""
        found = seconds / (images * key.work)
        before = self._seconds.get(key.model)
        self._seconds[key.model] = found if before is None else before + 0.3 * (found - before)

    def seconds(self, key: Key, images: int) -> float:
        """What so many images would take; 0 before anything is known."""
        return self._seconds.get(key.model, 0.0) * images * key.work


class Batcher:
    """The queue, and the task that empties it.

    Args:
        draw: draws a batch, one at a time: an array for each image, None for one that is not finite.
        largest: model -> images that are drawn together at most.
        max_wait: seconds that a job waits for others while nothing is drawn; where the last batch was of one job, and
            none came while it was drawn, nobody is waited for.
        queue_images, queue_seconds: what may wait.
        told: is told of each batch that was drawn, and its seconds.
    """

    def __init__(
        self,
        draw: Callable[[Batch], Awaitable[Sequence[np.ndarray | None]]],
        largest: Callable[[str], int],
        *,
        max_wait: float,
        queue_images: int,
        queue_seconds: float,
        told: Callable[[Batch, float], None] = lambda batch, seconds: None,
    ) -> None:
        self.pace = Pace()
        self._draw, self._largest, self._told = draw, largest, told
        self._max_wait, self._most_images, self._most_seconds = max_wait, queue_images, queue_seconds
        self._lanes: dict[Key, list[Job]] = {}
        self._crowded = True  # whether others are about
        self._running: Batch | None = None
        self._began = 0.0
        self._arrived = asyncio.Event()
        self._rested = asyncio.Event()  # something was finished or dropped
        self._loop = asyncio.get_running_loop()

    @property
    def queued(self) -> int:
        """Images that wait."""
        return sum(job.waiting for lane in self._lanes.values() for job in lane)

    @property
    def in_flight(self) -> int:
        """Images that are being drawn."""
        return len(self._running) if self._running is not None else 0

    def seconds_ahead(self) -> float:
        """Of work before one that would come now."""
        waiting = sum(self.pace.seconds(job.key, job.waiting) for lane in self._lanes.values() for job in lane)
        if self._running is None:
            return waiting
        expected = self.pace.seconds(self._running.key, len(self._running))
        return waiting + max(0.0, expected - (self._loop.time() - self._began))

    def submit(self, job: Job) -> None:
        """Take a job in. Raises Refusal (429) where too much waits."""
        queued, seconds = self.queued, self.seconds_ahead()
        if queued + len(job.seeds) > self._most_images:
            raise refusals.full(f"{queued} images wait, and {self._most_images} may", seconds)
        if seconds > self._most_seconds:
            what = f"about {seconds:.0f} s of work wait, and {self._most_seconds:g} s may"
            raise refusals.full(what, seconds - self._most_seconds)
        self._lanes.setdefault(job.key, []).append(job)
        self._arrived.set()

    def abandon(self, job: Job) -> None:
        """Nobody waits for a job any more: what is queued of it goes; a batch of nothing else stops."""
        job.gone = True
        self._leave(job)

    def drop_all(self, why: refusals.Refusal) -> None:
        """Give up whatever waits or is being drawn."""
        running = [job for job, _ in self._running.parts] if self._running is not None else []
        for job in [*running, *(job for lane in self._lanes.values() for job in lane)]:
            if not (job.gone or job.done.done()):
                job.done.set_exception(why)
            self.abandon(job)

    async def run(self) -> None:
        """Draw what comes, until cancelled."""
        while True:
            batch = await self._next()
            self._running, self._began = batch, self._loop.time()
            outcome = await self._drawn(batch)
            seconds = self._loop.time() - self._began
            self._running = None
            if not isinstance(outcome, BaseException):
                self.pace.learn(batch.key, len(batch), seconds)
                self._told(batch, seconds)
            self._crowded = len(batch.parts) > 1 or bool(self._lanes)
            self._deliver(batch, outcome)
            self._rested.set()

    async def drained(self) -> None:
        """Return once nothing waits and nothing is drawn."""
        while self._lanes or self._running is not None:
            self._rested.clear()
            await self._rested.wait()

    async def _drawn(self, batch: Batch) -> Sequence[np.ndarray | None] | Exception:
        try:
            return await self._draw(batch)
        except SamplingCancelled as error:
            return error
        except Exception as error:
            log.exception("a batch of %d images failed", len(batch))
            return error

    def _deliver(self, batch: Batch, outcome: Sequence[np.ndarray | None] | Exception) -> None:
        position = 0
        for job, rows in batch.parts:
            if isinstance(outcome, Exception):
                if not (job.gone or job.done.done()):
                    job.done.set_exception(refusals.failed())
                self.abandon(job)
                continue
            job.images[rows.start : rows.stop] = outcome[position : position + len(rows)]
            position += len(rows)
            job.drawn += len(rows)
            if job.drawn == len(job.seeds) and not job.done.done():
                job.done.set_result(job.images)

    async def _next(self) -> Batch:
        """The batch to draw now; waits for one."""
        while True:
            self._arrived.clear()
            now = self._loop.time()
            key, due = self._ready(now)
            if key is not None:
                return self._take(key, now)
            pause = None if due is None else max(0.0, due - now)
            try:
                await asyncio.wait_for(self._arrived.wait(), pause)
            except TimeoutError:
                continue

    def _ready(self, now: float) -> tuple[Key | None, float | None]:
        """(the lane to draw from, or None; when the oldest is due): an overdue one first, then a full one."""
        if not self._lanes:
            return None, None
        oldest = min(self._lanes, key=lambda key: self._lanes[key][0].arrived)
        due = self._lanes[oldest][0].arrived + (self._max_wait if self._crowded else 0.0)
        if now >= due:
            return oldest, due
        waiting = {key: sum(job.waiting for job in lane) for key, lane in self._lanes.items()}
        full = [key for key, images in waiting.items() if images >= self._largest(key.model)]
        return min(full, key=lambda key: self._lanes[key][0].arrived, default=None), due

    def _take(self, key: Key, now: float) -> Batch:
        room, parts = self._largest(key.model), []
        for job in list(self._lanes[key]):
            rows = range(job.taken, min(job.taken + room, len(job.seeds)))
            if job.taken == 0:
                job.waited = now - job.arrived
            parts.append((job, rows))
            job.taken, room = rows.stop, room - len(rows)
            if job.taken == len(job.seeds):
                self._leave(job)
            if not room:
                break
        return Batch(key, parts)

    def _leave(self, job: Job) -> None:
        lane: Any = self._lanes.get(job.key, [])
        if job in lane:
            lane.remove(job)
            if not lane:
                del self._lanes[job.key]
            self._rested.set()
