"""Choices by timing, and their file."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, tactics
from sparse_engine.backends.tensorrt.cache import PlanCache
from sparse_engine.cli.main import run
from sparse_engine.tactics import CACHE_VARIABLE, Choice, TacticCache, fastest

ONE = {"only": lambda: None}
SURE = Choice("a", {"a": 1.0, "b": 2.0}, noise=0.1)
UNSURE = Choice("a", {"a": 1.0, "b": 1.05}, noise=0.1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tactics, "_timed_again", set())
    return tmp_path


def never() -> dict[str, Callable[[], object]]:
    raise AssertionError("it is remembered")


def timings(monkeypatch: pytest.MonkeyPatch, *choices: Choice) -> list[Choice]:
    """Let these be what is measured, in turn; gives back those that are left."""
    left = list(choices)
    monkeypatch.setattr(tactics, "fastest", lambda candidates: left.pop(0))
    return left


def stored(folder: Path) -> dict[str, Any]:
    return json.loads(next(folder.glob("tactics-*.json")).read_text())


def test_what_another_engine_has_stored_meanwhile_is_kept() -> None:
    first, second = TacticCache(device="x"), TacticCache(device="x")
    for cache, key in ((first, "a"), (second, "b")):
        cache.choose(key, lambda: ONE)
    for key in ("a", "b"):
        assert TacticCache(device="x").choose(key, never).kernel == "only"


def spin(seconds: float, calls: list[None] | None = None) -> Callable[[], None]:
    """Something that takes so long, and counts how often it was called."""

    def run() -> None:
        if calls is not None:
            calls.append(None)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def test_a_clear_case_is_timed_as_often_as_it_takes() -> None:
    clear: list[None] = []
    assert fastest({"short": spin(1e-3), "long": spin(4e-3, clear)}).kernel == "short"
    assert len(clear) == 1 + tactics.MIN_ROUNDS
    assert tactics._is_clear({"short": [1.0, 1.0], "long": [1.3, 1.3], "longer": [2.0, 2.0]})
    assert not tactics._is_clear({"short": [1.0, 1.0], "long": [1.3, 1.2]})
    assert not tactics._is_clear({"now": [1.0, 2.0], "then": [2.0, 1.0]})


def test_a_turn_begins_when_the_threads_of_the_one_before_have_stopped() -> None:
    until = 0.0

    def busy() -> None:
        while time.perf_counter() < until:
            pass

    def spinning() -> None:
        nonlocal until
        until = time.perf_counter() + 0.08
        threading.Thread(target=busy).start()

    seen: list[bool] = []
    fastest({"spins": spinning, "own": lambda: seen.append(time.perf_counter() < until)}, spinning=True)
    assert not any(seen[1:])  # the first is the warm-up
    seen.clear()
    fastest({"spins": spinning, "own": lambda: seen.append(time.perf_counter() < until)})
    assert all(seen[1:])


def test_the_noise_is_the_spread_of_paired_rounds() -> None:
    assert not fastest({"short": spin(1e-4), "long": spin(1e-3)}).within_noise
    assert fastest({"only": spin(1e-4)}).within_noise is False
    steady, shaken = [1.0] * 9, [1.01, 1.01, 1.02, 1.01, 1.0, 1.02, 1.01, 1.01, 1.01]
    assert tactics._noise(steady, shaken) < 0.01
    assert tactics._noise(steady, [0.5, 1.5, 1.01, 0.6, 1.4, 1.2, 0.8, 1.3, 0.9]) > 0.1
    assert tactics._noise(steady, [*shaken[:8], 50.0]) < 0.01  # one run that was interrupted


def test_evidence_is_merged_by_how_often_it_was_timed() -> None:
    twice = Choice("a", {"a": 1.0, "b": 1.1}, noise=0.2, times=2)
    merged = twice.merged(Choice("b", {"a": 1.9, "b": 1.1}, noise=0.2))
    assert merged.kernel == "b"
    assert merged.milliseconds == pytest.approx({"a": 1.3, "b": 1.1})
    assert merged.times == 3
    assert merged.noise == pytest.approx(0.2 * 5**0.5 / 3)


def test_a_choice_within_the_noise_is_timed_again_some_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = timings(monkeypatch, UNSURE, UNSURE, SURE, *[Choice("b", {"a": 2.0, "b": 1.0})] * 3)
    first = TacticCache()
    for key in ("unsure", "unsure too", "sure"):
        first.choose(key, dict)
    TacticCache().choose("unsure", never)  # not on the same day
    monkeypatch.setattr(tactics, "SECONDS_BETWEEN", -1.0)
    second = TacticCache()
    assert second.choose("sure", never) == SURE
    assert second.choose("unsure", dict).kernel == "b"
    assert second.choose("unsure too", never) == UNSURE  # one a process
    assert TacticCache().choose("unsure too", never) == UNSURE
    assert stored(folder)["choices"]["unsure"]["times"] == 2
    assert len(left) == 2


def test_what_stays_within_the_noise_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, *[UNSURE] * tactics.MOST_TIMES)
    monkeypatch.setattr(tactics, "SECONDS_BETWEEN", -1.0)
    for times in range(1, tactics.MOST_TIMES + 1):
        tactics._timed_again.clear()
        assert TacticCache().choose("x", dict).times == times
    tactics._timed_again.clear()
    assert TacticCache().choose("x", never).times == tactics.MOST_TIMES


def test_a_choice_that_cannot_be_timed_again_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, UNSURE)
    TacticCache().choose("x", dict)
    monkeypatch.setattr(tactics, "SECONDS_BETWEEN", -1.0)
    assert TacticCache().choose("x", never) == UNSURE


@pytest.mark.parametrize(
    "entry",
    [
        None,
        0.0,
        "t-lanes",
        [],
        {},
        {"kernel": "a"},
        {"kernel": "a", "milliseconds": {"a": 1.0, "b": 2.0}},  # of an earlier version
        *(
            {**asdict(SURE), "milliseconds": {"a": value, "b": 2.0}}
            for value in (None, 0.0, -1, "1", True, [], 10**400)
        ),
        {**asdict(SURE), "milliseconds": {"a": float("nan"), "b": 2.0}},
        {**asdict(SURE), "milliseconds": {}},
        {**asdict(SURE), "milliseconds": ["a", "b"]},
        *({**asdict(SURE), "kernel": value} for value in ("b", "kernel of another version", None, ["a"])),
        *({**asdict(SURE), "noise": value} for value in (None, -1, "0", float("inf"))),
        *({**asdict(SURE), "times": value} for value in (None, 0, 1.5, "1", True)),
    ],
    ids=repr,
)
def test_an_entry_that_cannot_be_is_timed_again_and_its_neighbours_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entry: object
) -> None:
    timings(monkeypatch, SURE, SURE, SURE)
    for key in ("good", "bad"):
        TacticCache().choose(key, dict)
    content = stored(folder)
    content["choices"]["bad"] = entry
    next(folder.glob("tactics-*.json")).write_text(json.dumps(content))
    assert TacticCache().choose("good", never) == SURE
    assert TacticCache().choose("bad", dict) == SURE
    assert stored(folder)["choices"]["bad"] == asdict(SURE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'{"choices": []}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"conditions": {}, "choices": {"x": {"kernel": "a", "milliseconds": {"a": 1.0}, "noise": 0.0, "times": 1}}}',
        b" " * (tactics.LARGEST_FILE + 1),
    ],
    ids=["empty", "null", "list", "no choices", "no text", "nested", "other conditions", "huge"],
)
def test_a_file_that_cannot_be_is_written_anew(folder: Path, content: bytes) -> None:
    TacticCache().choose("x", lambda: ONE)
    file = next(folder.glob("tactics-*.json"))
    file.write_bytes(content)
    assert TacticCache().choose("x", lambda: ONE).kernel == "only"
    assert stored(folder)["choices"].keys() == {"x"}


@pytest.mark.parametrize("place", ["folder", "pipe", "no cache folder", "file for a cache folder"])
def test_where_nothing_can_be_stored_choices_are_made_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    TacticCache().choose("x", lambda: ONE)
    file = next(folder.glob("tactics-*.json"))
    file.unlink()
    if place == "folder":
        (file / "full").mkdir(parents=True)
    elif place == "pipe":
        os.mkfifo(file)
    else:
        monkeypatch.setenv(CACHE_VARIABLE, "/proc/none" if place == "no cache folder" else str(folder / "file"))
        (folder / "file").write_text("")
    assert TacticCache().choose("x", lambda: ONE).kernel == "only"


def test_a_choice_among_other_candidates_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, SURE, Choice("c", {"a": 2.0, "c": 1.0}))
    TacticCache().choose("x", dict, ("a", "b"))
    assert TacticCache().choose("x", never, ("b", "a")) == SURE
    assert TacticCache().choose("x", dict, ("a", "c")).kernel == "c"


@pytest.mark.parametrize("notes", [b"null", b"[]", b"7", b"{}", b"[" * 100_000, b"\xff"], ids=repr)
def test_a_plan_whose_notes_are_damaged_is_built_again(folder: Path, notes: bytes) -> None:
    cache = PlanCache({"gpu": "x"})
    cache.store(b"plan", {"timed": {}})
    assert cache.load() == (b"plan", {"timed": {}})
    next(folder.rglob("*.json")).write_bytes(notes)
    assert cache.load() is None


def edit_choices(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = next(folder.glob("tactics-*.json"))
    content = json.loads(file.read_text())
    content["choices"] = {key: edit(value) for key, value in content["choices"].items()}
    file.write_text(json.dumps(content))


def test_an_engine_loads_whatever_the_cache_says(folder: Path, conditional_engine: Path) -> None:
    def draw() -> np.ndarray:
        with SparseEngine.load(conditional_engine, threads=1) as engine:
            return engine.sample(2, steps=2, output="float")

    expected = draw()
    for edit in (
        lambda value: {**value, "kernel": "of another version", "milliseconds": {"of another version": 1.0}},
        lambda value: {**value, "milliseconds": dict.fromkeys(value["milliseconds"], 0.0)},
        lambda value: None,
    ):
        edit_choices(folder, edit)
        assert np.allclose(draw(), expected, atol=1e-4)


def test_tune_times_again_what_was_chosen(
    folder: Path, conditional_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SparseEngine.load(conditional_engine, threads=1):
        pass
    before = stored(folder)["choices"]
    edit_choices(
        folder,
        lambda value: {
            **value,
            "milliseconds": {name: 1e-5 if name == value["kernel"] else 1e9 for name in value["milliseconds"]},
        },
    )
    assert run(["tune", str(conditional_engine), "--threads", "1", "--json"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert {each["key"] for each in timed} & before.keys()  # pairs depend on what was chosen for each alone
    assert all(each["before"]["milliseconds"][each["before"]["fastest"]] == 1e-5 for each in timed)
    after = stored(folder)["choices"]
    assert after.keys() >= before.keys()
    assert all(max(after[each["key"]]["milliseconds"].values()) < 1e6 for each in timed)
    assert run(["tune", str(conditional_engine), "--threads", "1"]) == 0
    assert "margin" in capsys.readouterr().out


def test_the_report_says_what_is_within_the_noise(folder: Path, conditional_engine: Path) -> None:
    with SparseEngine.load(conditional_engine, threads=1):
        pass
    edit_choices(folder, lambda value: {**value, "noise": 1e9, "times": 2})
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        timed = [each for layer in engine.info["layers"] for each in layer.get("timed_by_tokens", {}).values()]
    assert timed
    assert all(each["within_noise"] and each["times"] == 2 for each in timed)


def test_choices_that_are_fixed_hold_for_any_threads_and_are_never_timed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed: dict[str, Any] = {}
    one, other = (lambda: {"a": lambda: None, "b": lambda: time.sleep(0.001)}), (lambda: pytest.fail("timed again"))
    with tactics.fixing(fixed):
        assert TacticCache(tier="x", threads=1).choose("layer", one, ("a", "b")).kernel == "a"
    assert len(fixed) == 1
    monkeypatch.setattr(time, "time", lambda: 1e12)  # some later day
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "elsewhere"))
    with tactics.fixing(json.loads(json.dumps(fixed))):
        assert TacticCache(tier="x", threads=2).choose("layer", other, ("a", "b")).kernel == "a"
        swapped = {"b": lambda: None, "a": lambda: time.sleep(0.001)}
        assert TacticCache(tier="y", threads=2).choose("layer", lambda: swapped, ("a", "b")).kernel == "b"  # elsewhere
    assert TacticCache(tier="x", threads=2).choose("layer", lambda: swapped, ("a", "b")).kernel == "b"


@pytest.mark.parametrize(
    "milliseconds, noise, kernel", [((1.0, 1.01), 0.0, "b"), ((1.0, 1.05), 0.0, "a"), ((1.0, 1.05), 0.06, "b")]
)
def test_a_choice_that_leans_to_one_kernel(milliseconds: tuple[float, float], noise: float, kernel: str) -> None:
    choice = Choice("a", dict(zip("ab", milliseconds, strict=True)), noise)
    assert choice.leaning_to("b").kernel == kernel
    assert choice.leaning_to("a") == choice
