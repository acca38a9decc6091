"""This process as the one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .draw import Trouble
from .job import Chunk
from .pool import Done, Drew, Event, Failed, Ready


class Inline:
    """A ``Fleet`` of one: this process. It cannot be replaced or timed out, and nothing passes between processes."""

    patient = True

    def __init__(self, load: Callable[[dict[str, Any] | None], Any]) -> None:
        self._load = load
        self._sampler: Any = None
        self._todo: tuple[str, Any] | None = None

    def start(self, worker: int, choices: dict[str, Any] | None) -> None:
        """See ``Fleet``: it is loaded in ``wait``."""
        self._todo = ("load", choices)

    def give(self, worker: int, chunk: Chunk) -> None:
        """See ``Fleet``: it is drawn in ``wait``."""
        self._todo = ("draw", chunk)

    def wait(self, seconds: float) -> Iterable[Event]:
        """See ``Fleet``; it does the work."""
        todo, self._todo = self._todo, None
        if todo is None:
            return
        try:
            if todo[0] == "load":
                self._sampler = self._load(todo[1])
                yield Ready(0, self._sampler.kernels)
            else:
                for images in self._sampler.draw(todo[1]):
                    yield Drew(0, images)
                yield Done(0)
        except Exception as error:
            yield Failed(0, Trouble.of(error))

    def stop(self, worker: int) -> None:
        """See ``Fleet``."""
        self.close()

    def close(self) -> None:
        """See ``Fleet``."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()
