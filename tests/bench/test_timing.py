"""Turns, rounds and repeats: who is called when."""

import threading
import time

import pytest

from sparse_engine.bench.timing import interleave


def test_interleaving_alternates_and_keeps_warm_up_apart() -> None:
    calls: list[str] = []

    def slow_first(name: str) -> None:
        time.sleep(0.02 if name in calls else 0.1)  # longer than settling takes: one untimed call a turn
        calls.append(name)

    found = interleave({"a": lambda: slow_first("a"), "b": lambda: slow_first("b")}, repeats=2, seconds=0.15)
    assert found.warmup["a"] > 0.1 > found.runs["a"].max()
    assert found.runs["a"].shape == found.runs["b"].shape == (2, 2)
    assert calls[4:] == list("aaabbbbbbaaa")


def test_engines_are_renewed_between_repeats() -> None:
    calls: list[str] = []

    def call() -> None:
        calls.append("call")
        time.sleep(0.02)

    interleave({"a": call}, repeats=3, seconds=0.001, renew=lambda: calls.append("renew"))
    assert calls == ["renew", *["call"] * 4, "renew", *["call"] * 3, "renew", *["call"] * 3]


def test_a_turn_waits_for_threads_that_spin() -> None:
    """ONNX Runtime's threads spin after a call; the next candidate would be timed on one core less."""
    spinning, seen = threading.Event(), []

    def spin() -> None:
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass
        spinning.clear()

    def leaves_a_thread_behind() -> None:
        if not spinning.is_set():
            spinning.set()
            threading.Thread(target=spin).start()

    def looks() -> None:
        seen.append(spinning.is_set())
        time.sleep(0.01)

    interleave({"spins": leaves_a_thread_behind, "looks": looks}, repeats=2, seconds=0.001)
    assert not any(seen[2:])  # beyond the warm-up


@pytest.mark.parametrize("seconds,least,most", [(0.0, 1, 1), (0.5, 2, 25)])
def test_rounds_by_time(seconds: float, least: int, most: int) -> None:
    """A turn takes 20 ms at the least: one untimed call and two timed ones of 10 ms, after 10 ms of quiet."""
    found = interleave({"a": lambda: time.sleep(0.01)}, repeats=1, seconds=seconds)
    assert least <= found.runs["a"].shape[1] / 2 <= most
