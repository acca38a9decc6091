"""The pool's rules, with workers that do as they are told and a clock that runs when nothing happens."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from sparse_engine.bulk.draw import Trouble
from sparse_engine.bulk.job import Chunk
from sparse_engine.bulk.pool import Died, Done, Drew, Event, Failed, Pool, Ready, State
from sparse_engine.errors import InputError, SparseEngineError

CHUNKS = [Chunk(10 * i, 10 * i + 10) for i in range(6)]
Behaviour = Callable[[str, Chunk | None, int], str]  # ("load" or "draw", chunk, how often before) -> what happens


class Actors:
    """A fleet whose workers do what ``behaviour`` says: "do", "die", "fail", "refuse" or "hang"."""

    patient = False

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.now = behaviour, 0.0
        self.started: list[tuple[int, Any]] = []
        self.drawn: Counter[Chunk] = Counter()
        self.stopped: list[int] = []
        self.closed = False
        self._events: list[Event] = []
        self._tries: Counter[Any] = Counter()

    def start(self, worker: int, choices: Any) -> None:
        self.started.append((worker, choices))
        self._act(worker, "load", None, [Ready(worker, {"facts": {}, "choices": {"of": len(self.started)}})])

    def give(self, worker: int, chunk: Chunk) -> None:
        self._act(worker, "draw", chunk, [Drew(worker, 4), Drew(worker, 6), Done(worker)])

    def _act(self, worker: int, what: str, chunk: Chunk | None, good: list[Event]) -> None:
        does = self.behaviour(what, chunk, self._tries[chunk])
        self._tries[chunk] += 1
        if does == "do":
            self.drawn[chunk or CHUNKS[0]] += chunk is not None
            self._events += good
        elif does == "die":
            self._events += [*good[:1], Died(worker, "was ended by SIGKILL")] if chunk else [Died(worker, "went")]
        elif does != "hang":
            self._events.append(Failed(worker, Trouble("no memory", "more", does == "refuse")))

    def wait(self, seconds: float) -> Iterable[Event]:
        assert not self.closed
        if not self._events:
            self.now += seconds
        while self._events:
            yield self._events.pop(0)

    def stop(self, worker: int) -> None:
        self.stopped.append(worker)

    def close(self) -> None:
        self.closed = True


class Kernels:
    def __init__(self, fits: Callable[[dict[str, Any]], bool] = lambda kernels: True) -> None:
        self.choices: dict[str, Any] | None = None
        self._fits = fits

    def fit(self, kernels: dict[str, Any]) -> bool:
        self.choices = self.choices or kernels["choices"]
        return self._fits(kernels)


def pool(behaviour: Behaviour, workers: int = 2, **options: Any) -> tuple[Pool, Actors]:
    fleet = Actors(behaviour)
    options = {"kernels": Kernels(), **options}
    return Pool(fleet, workers, CHUNKS, timeout=60, clock=lambda: fleet.now, **options), fleet


def test_each_chunk_is_drawn_once_and_the_images_are_counted() -> None:
    told: list[State] = []
    drawing, fleet = pool(lambda *_: "do", tell=told.append)
    assert drawing.run() == []
    assert fleet.drawn == Counter(CHUNKS)
    assert fleet.closed
    counts = [state.done + state.drawing for state in told]
    assert counts == sorted(counts)
    assert (counts[-1], told[-1].workers, told[-1].replaced) == (60, 2, 0)


def test_the_first_worker_chooses_kernels_before_another_starts() -> None:
    drawing, fleet = pool(lambda *_: "do", workers=3)
    drawing.run()
    assert fleet.started == [(0, None), (1, {"of": 1}), (2, {"of": 1})]


def test_a_worker_with_other_kernels_loads_again_with_the_jobs() -> None:
    drawing, fleet = pool(lambda *_: "do", workers=1, kernels=Kernels(lambda kernels: kernels["choices"] != {"of": 1}))
    assert drawing.run() == []
    assert (fleet.started, fleet.stopped) == ([(0, None), (0, {"of": 1})], [0])


def test_where_the_kernels_are_known_all_start_at_once() -> None:
    kernels = Kernels()
    kernels.choices = {"of": "before"}
    drawing, fleet = pool(lambda *_: "do", workers=3, kernels=kernels)
    drawing.run()
    assert fleet.started == [(worker, {"of": "before"}) for worker in range(3)]
    assert fleet.drawn == Counter(CHUNKS)


def test_no_more_workers_than_chunks() -> None:
    drawing, fleet = pool(lambda *_: "do", workers=100)
    drawing.run()
    assert len(fleet.started) <= len(CHUNKS)


@pytest.mark.parametrize("failure", ["die", "fail", "hang"])
def test_what_goes_wrong_twice_is_drawn_in_the_end(failure: str) -> None:
    drawing, fleet = pool(lambda what, chunk, tries: failure if chunk == CHUNKS[2] and tries < 2 else "do")
    assert drawing.run() == []
    assert fleet.drawn == Counter(CHUNKS)
    assert drawing.state.done == 60
    assert drawing.state.replaced == (0 if failure == "fail" else 2)
    assert fleet.now > 120 if failure == "hang" else fleet.now < 5


@pytest.mark.parametrize("failure", ["die", "fail", "hang"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_chunk_that_fails_three_times_is_named_and_the_rest_goes_on(failure: str, workers: int) -> None:
    drawing, fleet = pool(lambda what, chunk, tries: failure if chunk == CHUNKS[2] else "do", workers)
    failures = drawing.run()
    assert [each.chunk for each in failures] == [CHUNKS[2]]
    expected = {"die": "was ended by SIGKILL", "fail": "no memory", "hang": "did nothing for 60 s"}[failure]
    assert expected in failures[0].trouble.what
    assert fleet.drawn == Counter(CHUNKS[:2] + CHUNKS[3:])


def test_what_no_chunk_can_be_drawn_with_ends_it_at_once() -> None:
    drawing, fleet = pool(lambda what, chunk, tries: "refuse" if chunk == CHUNKS[1] else "do", workers=1)
    with pytest.raises(InputError, match="no memory") as raised:
        drawing.run()
    assert raised.value.fix == "more"
    assert fleet.closed
    assert fleet.drawn == Counter(CHUNKS[:1])


@pytest.mark.parametrize("failure", ["die", "fail", "hang"])
def test_workers_that_do_not_come_up(failure: str) -> None:
    drawing, fleet = pool(lambda what, *_: failure if what == "load" else "do")
    with pytest.raises(SparseEngineError, match="3 workers in a row did not come up"):
        drawing.run()
    assert fleet.closed


def test_one_that_does_not_come_up_is_replaced() -> None:
    drawing, _ = pool(lambda what, chunk, tries: "die" if what == "load" and tries in (1, 2) else "do", workers=3)
    assert drawing.run() == []
    assert drawing.state.replaced == 2
