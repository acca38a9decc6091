"""Ray's actors: what we do with what Ray says, by a stand-in for Ray; and Ray itself, where it is installed."""

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.bulk import Machines, cluster, sample_many
from sparse_engine.errors import MissingDependencyError, OptionError, SparseEngineError

N = 40
OPTIONS: dict[str, Any] = {"steps": 2, "chunk": 8, "labels": "balanced"}


class ActorDiedError(Exception):
    """As Ray has it: what ``get`` raises."""


class Reference:
    """A result that comes later."""

    def __init__(self) -> None:
        self.done, self.value, self.error = threading.Event(), None, None


class Actor:
    """An object on two threads of its own, as ``max_concurrency=2`` makes it; ``dies_at`` is a call's number."""

    def __init__(self, made: Any, dies: Callable[[str], bool]) -> None:
        self._made, self._dies, self._calls = made, dies, queue.Queue[Any]()
        self._alive, self._open = True, list[Reference]()
        for _ in range(2):
            threading.Thread(target=self._serve, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Reference:
            reference = Reference()
            self._open.append(reference)
            self._calls.put((name, arguments, reference)) if self._alive else self.kill()
            return reference

        return SimpleNamespace(remote=remote)

    def _serve(self) -> None:
        while True:
            name, arguments, reference = self._calls.get()
            if self._dies(name):
                self.kill()
                return
            value = getattr(self._made, name)(*arguments)
            if self._alive:
                reference.value = value
                reference.done.set()

    def kill(self) -> None:
        self._alive = False
        for reference in self._open:
            if not reference.done.is_set():
                reference.error = ActorDiedError("its process died")
                reference.done.set()


class StandIn:
    """As much of Ray as we call."""

    exceptions = SimpleNamespace(RayError=ActorDiedError)

    def __init__(self, dies: Callable[[str], bool] = lambda name: False, cpus: int = 2) -> None:
        self._dies, self._cpus = dies, cpus
        self.actors: list[Actor] = []
        self.options: dict[str, Any] = {}
        self.joined: dict[str, Any] = {}
        self.running = False

    def is_initialized(self) -> bool:
        return self.running

    def init(self, **options: Any) -> None:
        if options["address"] != "local":
            raise ConnectionError(f"nobody at {options['address']}")
        self.joined, self.running = options, True
        self._cpus = options["num_cpus"] or self._cpus

    def shutdown(self) -> None:
        self.running = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cpus)}

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options

        def actor_class(kind: type) -> Any:
            def remote(*arguments: Any) -> Actor:
                self.actors.append(Actor(kind(*arguments), self._dies))
                return self.actors[-1]

            return SimpleNamespace(remote=remote)

        return actor_class

    def wait(self, references: list[Reference], num_returns: int, timeout: float) -> tuple[list[Reference], Any]:
        ends = time.monotonic() + timeout
        while time.monotonic() < ends:
            ready = [reference for reference in references if reference.done.is_set()]
            if ready:
                return ready[:num_returns], None
            time.sleep(0.001)
        return [], None

    def get(self, reference: Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def kill(self, actor: Actor, no_restart: bool) -> None:
        actor.kill()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def make(*arguments: Any, **options: Any) -> StandIn:
        ray = StandIn(*arguments, **options)
        monkeypatch.setattr(cluster, "_ray", lambda: ray)
        return ray

    monkeypatch.setenv(cluster.TOKEN[0], "x")  # the process's own, which is not to change
    monkeypatch.setenv(cluster.USAGE, "0")
    return make


def draw(engine: Path, out: Path, **options: Any) -> Any:
    return sample_many(engine, out, N, **{**OPTIONS, "machines": Machines(cluster="local", **options)})


def check(engine: Path, out: Path) -> None:
    with SparseEngine.load(engine, threads=1) as loaded, np.load(out / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], loaded.sample(N, steps=2, labels=np.arange(N) % 4))


def test_actors_draw_the_same_images(conditional_engine: Path, tmp_path: Path, stand_in: Any) -> None:
    ray = stand_in(cpus=2)
    assert draw(conditional_engine, tmp_path / "out").drawn == N
    check(conditional_engine, tmp_path / "out")
    assert len(ray.actors) == 2  # as many as there is room for
    assert (ray.options["num_cpus"], ray.options["num_gpus"], ray.options["max_restarts"]) == (1, 0, 0)
    assert ray.joined["include_dashboard"] is False
    assert not ray.running


def test_an_actor_that_dies_is_replaced(conditional_engine: Path, tmp_path: Path, stand_in: Any) -> None:
    deaths = iter([False, True, False, False, True])
    ray = stand_in(lambda name: name == "draw" and next(deaths, False))
    assert draw(conditional_engine, tmp_path / "out", workers=2).replaced == 2
    assert len(ray.actors) == 4
    check(conditional_engine, tmp_path / "out")


def test_actors_that_do_not_come_up(conditional_engine: Path, tmp_path: Path, stand_in: Any) -> None:
    ray = stand_in(lambda name: name == "load")
    with pytest.raises(SparseEngineError, match="3 workers in a row did not come up; the last one: its worker died"):
        draw(conditional_engine, tmp_path / "out")
    assert not ray.running
    assert os.listdir(tmp_path) == []


def test_an_actor_that_hangs_is_replaced(
    conditional_engine: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in()
    hung, draw_really = threading.Event(), cluster.RemoteSampler.draw

    def draw_or_hang(self: cluster.RemoteSampler, first: int, last: int) -> Any:
        if first == 8 and not hung.is_set():
            hung.set()
            time.sleep(30)
        return draw_really(self, first, last)

    monkeypatch.setattr(cluster.RemoteSampler, "draw", draw_or_hang)
    assert draw(conditional_engine, tmp_path / "out", timeout=3.0).replaced == 1
    check(conditional_engine, tmp_path / "out")


def test_how_far_an_actor_is_is_asked(
    conditional_engine: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(cpus=1)
    monkeypatch.setattr(cluster, "BETWEEN", 0.0)
    told: list[int] = []
    machines = Machines(cluster="local", batch_size=1)
    sample_many(conditional_engine, tmp_path / "out", N, steps=20, chunk=N, machines=machines,
                tell=lambda progress: told.append(progress.done))  # fmt: skip
    assert any(0 < done < N for done in told)
    assert told[-1] == N


def test_no_room_and_no_cluster(conditional_engine: Path, tmp_path: Path, stand_in: Any) -> None:
    ray = stand_in(cpus=2)
    with pytest.raises(OptionError, match="has room for 0 workers of 64 CPUs each; 1 were asked for"):
        draw(conditional_engine, tmp_path / "out", threads=64)
    machines = Machines(cluster="10.0.0.1:6379")
    with pytest.raises(OptionError, match=r"no Ray cluster at 10\.0\.0\.1:6379: nobody at .*\n.*ray start --head"):
        sample_many(conditional_engine, tmp_path / "out", N, **OPTIONS, machines=machines)
    assert not ray.running
    assert os.listdir(tmp_path) == []


def test_without_ray(conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"--cluster needs ray.*\n.*sparse-engine\[cluster\]"):
        draw(conditional_engine, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.slow
def test_ray_itself_with_a_worker_that_is_killed(
    conditional_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cluster.USAGE, "0")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(cluster.TOKEN[0], "")
    killed: list[int] = []

    def kill_once(progress: Any) -> None:
        chunks = list((tmp_path / "out" / "chunks").glob("*.json"))
        if progress.done >= 8 and not killed and chunks:
            import json

            killed.append(json.loads(chunks[0].read_text())["pid"])
            os.kill(killed[0], 9)

    machines = Machines(workers=2, cluster="local")
    summary = sample_many(
        conditional_engine, tmp_path / "out", 400, steps=20, chunk=8, machines=machines, tell=kill_once
    )
    assert (summary.replaced, len(killed)) == (1, 1)
    with SparseEngine.load(conditional_engine, threads=1) as loaded, np.load(tmp_path / "out" / "samples.npz") as found:
        np.testing.assert_array_equal(found["arr_0"], loaded.sample(400, steps=20))
    assert not (tmp_path / "home" / ".ray").exists()
