"""Workers as actors of Ray Core, on this machine or on a cluster's. Ray starts them and tells of their deaths; what is
drawn by whom, again and when to give up is the pool's, as for local processes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from sparse_engine.errors import MissingDependencyError, OptionError, SparseEngineError

from .draw import ChunkSampler, Load, Trouble
from .job import Chunk, Request
from .pool import Died, Done, Drew, Event, Failed, Ready

LOCAL = "local"  # in place of an address: a Ray of our own on this machine
BETWEEN = 2.0  # seconds between two questions to a worker how far it is
USAGE = "RAY_USAGE_STATS_ENABLED"  # it reports to its makers otherwise
TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # a Ray of our own has one for itself, and leaves none in the home


class RemoteSampler:
    """What an actor is: a ``ChunkSampler`` that is asked from afar. Answers are plain values, errors too."""

    def __init__(self, asked: dict[str, Any], load: dict[str, Any]) -> None:
        self._asked, self._load = Request.from_dict(asked), Load(**load)
        self._sampler: ChunkSampler | None = None
        self._drawn = 0

    def load(self) -> dict[str, Any]:
        """Load the engine."""
        try:
            self._sampler = ChunkSampler(self._asked, self._load)
            return {"ready": self._sampler.kernels}
        except Exception as error:
            return {"failed": vars(Trouble.of(error))}

    def draw(self, first: int, last: int) -> dict[str, Any]:
        """Draw a chunk and commit it."""
        try:
            if self._sampler is None:
                raise SparseEngineError("the engine was not loaded")
            for images in self._sampler.draw(Chunk(first, last)):
                self._drawn += images
            return {"done": True}
        except Exception as error:
            return {"failed": vars(Trouble.of(error))}

    def drawn(self) -> int:
        """Images so far, asked while a chunk is drawn."""
        return self._drawn


class Actors:
    """A ``Fleet`` of Ray's actors.

    Args:
        asked: the job; every machine sees its folder, engine and files under the same paths.
        load: how each of them loads the engine; its ``threads`` are the CPUs that Ray keeps for it.
        address: of the cluster, or "local".
        workers: how many; None is as many as there are CPUs (or GPUs) for.

    Attributes:
        workers: how many there is room for.

    Raises (on construction):
        MissingDependencyError: Ray is not installed.
        OptionError: there is no cluster at the address, or no room on it.
    """

    patient = False

    def __init__(self, asked: Request, load: Load, address: str, workers: int | None) -> None:
        self._asked, self._load = asked, load
        self._ray = _ray()
        self._cpus, self._gpus = load.threads or 1, int((load.device or "").startswith("cuda"))
        self._own = not self._ray.is_initialized()
        if self._own:
            _connect(self._ray, address, None if workers is None else workers * self._cpus)
        try:
            self.workers = self._room(address, workers)
        except BaseException:
            self.close()
            raise
        self._class = self._ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_concurrency=2, max_restarts=0, max_task_retries=0
        )(RemoteSampler)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, str]] = {}
        self._drawn: dict[int, int] = {}
        self._asked_at = time.monotonic()

    def _room(self, address: str, workers: int | None) -> int:
        found = self._ray.cluster_resources()
        room = int(found.get("CPU", 0)) // self._cpus
        if self._gpus:
            room = min(room, int(found.get("GPU", 0)))
        if room < (workers or 1):
            what = f"{self._cpus} CPUs" + (" and a GPU" if self._gpus else "")
            raise OptionError(
                f"the cluster {address} has room for {room} workers of {what} each; {workers or 1} were asked for",
                "ask for fewer --workers or --threads",
            )
        return workers or room

    def start(self, worker: int, choices: dict[str, Any] | None) -> None:
        """See ``Fleet``."""
        actor = self._class.remote(self._asked.to_dict(), replace(self._load, choices=choices).to_dict())
        self._actors[worker], self._drawn[worker] = actor, 0
        self._pending[actor.load.remote()] = (worker, "load")

    def give(self, worker: int, chunk: Chunk) -> None:
        """See ``Fleet``."""
        self._pending[self._actors[worker].draw.remote(chunk.first, chunk.last)] = (worker, "draw")

    def wait(self, seconds: float) -> Iterator[Event]:
        """See ``Fleet``."""
        self._ask_how_far()
        if not self._pending:
            time.sleep(seconds)
            return
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        for reference in ready:
            worker, what = self._pending.pop(reference, (-1, ""))
            if worker in self._actors:
                yield from self._heard(worker, what, reference)

    def _ask_how_far(self) -> None:
        if time.monotonic() - self._asked_at < BETWEEN:
            return
        self._asked_at = time.monotonic()
        asked = {worker for worker, what in self._pending.values() if what == "drawn"}
        for worker in {worker for worker, what in self._pending.values() if what == "draw"} - asked:
            self._pending[self._actors[worker].drawn.remote()] = (worker, "drawn")

    def _heard(self, worker: int, what: str, reference: Any) -> Iterable[Event]:
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # its process, or its machine, is gone
            self._forget(worker)
            return [Died(worker, f"died: {' '.join(str(error).split())[:200]}")]
        if what == "drawn":
            more, self._drawn[worker] = answer - self._drawn[worker], answer
            return [Drew(worker, more)] if more and (worker, "draw") in self._pending.values() else []
        if "ready" in answer:
            return [Ready(worker, answer["ready"])]
        return [Failed(worker, Trouble(**answer["failed"])) if "failed" in answer else Done(worker)]

    def stop(self, worker: int) -> None:
        """See ``Fleet``."""
        actor = self._forget(worker)
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def _forget(self, worker: int) -> Any:
        self._pending = {reference: about for reference, about in self._pending.items() if about[0] != worker}
        return self._actors.pop(worker, None)

    def close(self) -> None:
        """See ``Fleet``: and leave the cluster, or end our own."""
        for worker in list(getattr(self, "_actors", ())):
            with contextlib.suppress(Exception):
                self.stop(worker)
        if self._own:
            self._ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"--cluster needs {error.name}; it is not installed", "pip install 'sparse-engine[cluster]'"
        ) from error
    return ray


def _connect(ray: Any, address: str, cpus: int | None) -> None:
    """Join a cluster, or start one; this process's signals stay its own."""
    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.environ.setdefault(USAGE, "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == LOCAL:
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        if not any(os.environ.get(name) for name in TOKEN):
            os.environ |= {TOKEN[0]: secrets.token_hex(32)}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError: by version
        raise OptionError(
            f"there is no Ray cluster at {address}: {' '.join(str(error).split())[:300]}",
            "start one with `ray start --head`, and give its address, or --cluster local",
        ) from error
    finally:
        for number, handler in own.items():
            with contextlib.suppress(ValueError, TypeError):  # in a thread; or set by no Python
                signal.signal(number, handler)
