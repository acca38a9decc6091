"""Which images are drawn together, and what becomes of those that nobody waits for: no engine, no network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from sparse_engine.conditioning import Rows
from sparse_engine.errors import SamplingCancelled
from sparse_engine.serve.batcher import Batch, Batcher, Job, Key
from sparse_engine.serve.refusals import Refusal

A, B = Key("m", 10, "ddim", 1.0), Key("m", 10, "ddim", 2.0)


class Bench:
    """A batcher whose engine draws when it is told to."""

    def __init__(self, **options: Any) -> None:
        self.batches: list[Batch] = []
        self.gate = asyncio.Semaphore(0)
        given = {"max_wait": 0.0, "queue_images": 100, "queue_seconds": 100.0} | options
        self.batcher = Batcher(self.draw, lambda model: 4, **given)
        self.task = asyncio.create_task(self.batcher.run())

    async def draw(self, batch: Batch) -> list[np.ndarray | None]:
        self.batches.append(batch)
        await self.gate.acquire()
        if batch.abandoned():
            raise SamplingCancelled("all gone")
        return [np.array(job.numbers[k]) for job, rows in batch.parts for k in rows]

    def job(self, n: int, key: Key = A) -> Job:
        loop = asyncio.get_running_loop()
        told = Rows({}, np.ones(1, np.float32))
        job = Job(key, np.zeros(n, np.uint64), np.arange(n), told, loop.create_future(), loop.time())
        self.batcher.submit(job)
        return job

    def sizes(self) -> list[list[int]]:
        return [[len(rows) for _, rows in batch.parts] for batch in self.batches]


def on_loop(test: Callable[[Bench], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        bench = Bench(**options)
        try:
            await asyncio.wait_for(test(bench), 10)
        finally:
            bench.task.cancel()

    asyncio.run(run())


async def rest() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_jobs_share_batches_and_large_ones_are_split() -> None:
    async def test(bench: Bench) -> None:
        jobs = [bench.job(1), bench.job(2), bench.job(6)]
        bench.gate.release(), bench.gate.release(), bench.gate.release()
        for job in jobs:
            images = await job.done
            assert [int(each) for each in images if each is not None] == list(range(len(job.seeds)))
        assert bench.sizes() == [[1, 2, 1], [4], [1]]
        await bench.batcher.drained()

    on_loop(test)


def test_the_oldest_lane_goes_first_and_a_lane_takes_all_that_is_its_own() -> None:
    async def test(bench: Bench) -> None:
        first = bench.job(1)
        await rest()
        later = [bench.job(1, B), bench.job(1), bench.job(1, B), bench.job(1)]
        for _ in range(3):
            bench.gate.release()
        await asyncio.gather(first.done, *(job.done for job in later))
        assert [batch.key for batch in bench.batches] == [A, B, A]
        assert bench.sizes() == [[1], [1, 1], [1, 1]]

    on_loop(test)


def test_company_is_waited_for_while_there_is_nothing_to_do() -> None:
    async def test(bench: Bench) -> None:
        bench.gate.release(), bench.gate.release()
        one = bench.job(1)
        await asyncio.sleep(0.02)
        assert not bench.batches
        two = bench.job(1)
        await asyncio.gather(one.done, two.done)
        full = bench.job(4, B)
        await asyncio.wait_for(full.done, 0.15)  # a full batch waits for nobody
        assert bench.sizes() == [[1, 1], [4]]

    on_loop(test, max_wait=0.2)


def test_who_is_alone_waits_for_nobody_until_others_come() -> None:
    async def test(bench: Bench) -> None:
        for _ in range(4):
            bench.gate.release()
        await bench.job(1).done
        alone = bench.job(1)
        await rest()
        assert len(bench.batches) == 2
        await alone.done
        first, others = bench.job(1), [bench.job(1), bench.job(1)]  # at once: the first has company
        await asyncio.gather(first.done, *(job.done for job in others))
        crowded = bench.job(1)
        await rest()
        assert bench.sizes() == [[1], [1], [1, 1, 1]]
        await crowded.done
        assert bench.sizes()[-1] == [1]

    on_loop(test, max_wait=0.1)


def test_a_lane_that_is_full_goes_before_one_that_still_waits_for_company() -> None:
    async def test(bench: Bench) -> None:
        bench.job(1, B)
        bench.job(4, A)
        await rest()
        assert [batch.key for batch in bench.batches] == [A]

    on_loop(test, max_wait=5.0)


def test_the_queue_is_bounded_in_images_but_not_what_is_drawn() -> None:
    async def test(bench: Bench) -> None:
        bench.job(4)
        await rest()
        bench.job(5), bench.job(5)
        assert (bench.batcher.queued, bench.batcher.in_flight) == (10, 4)
        with pytest.raises(Refusal, match="10 images wait, and 10 may") as refused:
            bench.job(1)
        assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})

    on_loop(test, queue_images=10)


def test_the_queue_is_bounded_in_seconds_by_what_batches_have_taken() -> None:
    async def test(bench: Bench) -> None:
        bench.batcher.pace.learn(A, 4, 8.0)  # 0.2 s for a pass of an image
        bench.job(4)
        await rest()
        bench.job(3)  # 6 s, of what is drawn 8
        assert bench.batcher.seconds_ahead() == pytest.approx(14.0, abs=0.1)
        with pytest.raises(Refusal, match="14 s of work wait, and 10 s may") as refused:
            bench.job(1)
        assert refused.value.headers == {"retry-after": "4"}

    on_loop(test, queue_seconds=10.0)


def test_what_nobody_waits_for_is_not_drawn_and_makes_room() -> None:
    async def test(bench: Bench) -> None:
        drawn, dropped, kept = bench.job(4), bench.job(4), bench.job(1)
        await rest()
        bench.batcher.abandon(dropped)
        assert bench.batcher.queued == 1
        bench.gate.release(), bench.gate.release()
        await asyncio.gather(drawn.done, kept.done)
        assert bench.sizes() == [[4], [1]]
        assert not dropped.done.done()

    on_loop(test)


def test_a_batch_stops_when_all_of_it_is_abandoned_and_not_before() -> None:
    async def test(bench: Bench) -> None:
        one, two = bench.job(1), bench.job(6)
        await rest()
        bench.batcher.abandon(two)
        assert not bench.batches[0].abandoned()
        bench.batcher.abandon(one)
        assert bench.batches[0].abandoned()
        bench.gate.release()
        await bench.batcher.drained()
        assert bench.sizes() == [[1, 3]]  # the rest of the second went with it

    on_loop(test)


def test_a_failing_batch_fails_its_jobs_alone() -> None:
    async def test(bench: Bench) -> None:
        good = bench.draw

        async def bad(batch: Batch) -> list[np.ndarray | None]:
            bench.batcher._draw = good
            raise RuntimeError("no")

        bench.batcher._draw = bad
        bench.gate.release()
        first = bench.job(6)
        await rest()
        second = bench.job(1)
        with pytest.raises(Refusal, match="the engine failed"):
            await first.done
        await second.done
        assert bench.sizes() == [[1]]  # nothing more of the first

    on_loop(test)


def test_dropping_all_answers_all() -> None:
    async def test(bench: Bench) -> None:
        jobs = [bench.job(5), bench.job(1, B)]
        await rest()
        bench.batcher.drop_all(Refusal(503, "closing", "closing"))
        for job in jobs:
            with pytest.raises(Refusal, match="closing"):
                await job.done
        bench.gate.release()
        await bench.batcher.drained()

    on_loop(test)
