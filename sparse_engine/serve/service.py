"""Engines, batcher and metrics together: loading, ready, draining, closed."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.arguments import SHOWN
from sparse_engine.drawing import TRAJECTORY_OPTIONS
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError

from . import refusals
from .asked import ImageRequest
from .batcher import Batch, Batcher, Job, Key
from .drawing import Served
from .metrics import Metrics
from .refusals import Refusal
from .settings import Settings

log = logging.getLogger(__name__)

USUAL_STEPS = 50  # as ``SparseEngine.sample``
OPTIONS = (*TRAJECTORY_OPTIONS, "clip")  # a sampler's own
Loader = Callable[[Path], SparseEngine]


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Name -> file: the file's own name without its suffix. Raises OptionError where two are alike."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise OptionError(
                f"{found[path.stem]} and {path} would both be served as {path.stem}", "rename one of the files"
            )
        found[path.stem] = path
    return found


class Service:
    """What the application serves.

    Args:
        paths: name -> engine file.
        settings: limits.
        load: loads a file; the default has no options.
    """

    def __init__(self, paths: Mapping[str, Path], settings: Settings, load: Loader = SparseEngine.load) -> None:
        self.settings = settings
        self.models: dict[str, Served] = {}
        self.metrics = Metrics(lambda: self._batcher_says("queued"), lambda: self._batcher_says("in_flight"))
        self.batcher: Batcher | None = None
        self.loaded: asyncio.Future[None] | None = None
        self.draining = False
        self._paths, self._load = dict(paths), load
        self._engine_thread = ThreadPoolExecutor(1, "engine")  # one batch at a time, whichever engine it is of
        self._text_thread = ThreadPoolExecutor(1, "texts")
        self.encoder = ThreadPoolExecutor(1, "pictures")
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.batcher is not None and not self.draining

    async def start(self) -> None:
        """Begin to load the engines; ``loaded`` is done when they are there, or holds the error."""
        self.loaded = asyncio.ensure_future(self._load_all())

    async def stop(self) -> None:
        """Stop drawing, and give everything back. What is being loaded goes on in its thread, and is not used."""
        self.draining = True
        loading = self.loaded is not None and not self.loaded.done()
        if self.loaded is not None:
            self.loaded.cancel()
        self.drop_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for thread in (self._engine_thread, self._text_thread, self.encoder):
            thread.shutdown(wait=False, cancel_futures=True)
            if not loading:
                await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)
        for served in self.models.values():
            served.engine.close()

    def drop_all(self) -> None:
        """Give up what was accepted."""
        if self.batcher is not None:
            self.batcher.drop_all(refusals.closed(draining=True))

    async def drained(self) -> None:
        """From now on no request is taken; return once those that were are drawn."""
        self.draining = True
        if self.batcher is not None:
            await self.batcher.drained()

    def model(self, name: str | None) -> Served:
        """A model by its name, or the only one. Raises Refusal."""
        if not self.ready:
            raise refusals.closed(self.draining)
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise Refusal(400, f"model: expected one of {', '.join(self.models)}", "missing_model", param="model")
        if name not in self.models:
            raise Refusal(404, f"model: expected one of {', '.join(self.models)}", "model_not_found", param="model")
        return self.models[name]

    async def job(self, asked: ImageRequest) -> tuple[Served, Job]:
        """What a request asks for, checked. Raises Refusal."""
        served = self.model(asked.model)
        self._check_limits(asked, served)
        sampler = asked.sampler or served.manifest.sampler
        try:
            options = _options(asked.options)
            told, seeds, numbers = await self._told(asked, served)
            key = Key(
                served.name,
                USUAL_STEPS if asked.steps is None else asked.steps,
                sampler,
                1.0 if asked.guidance is None else float(asked.guidance),
                options,
            )
            served.check(key)
        except OptionError as error:
            raise refusals.of_option(error, ImageRequest.model_fields) from None
        loop = asyncio.get_running_loop()
        return served, Job(key, seeds, numbers, told, loop.create_future(), loop.time())

    async def _told(self, asked: ImageRequest, served: Served) -> tuple[Any, np.ndarray, np.ndarray]:
        n = asked.count
        seeds = arguments.seeds(asked.seeds(), n)
        numbers = arguments.image_numbers(None, asked.first or 0, n, isinstance(seeds, int))
        texts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
        if not served.takes_text:  # OpenAI's clients cannot leave it out
            texts = {name: text or None for name, text in texts.items()}
        given: dict[str, Any] = {
            "labels": asked.labels,
            "conditioning": asked.conditioning,
            "negative": asked.negative,
            "guidance": asked.guidance,
            "draw": (seeds, numbers),
            **texts,
        }
        if any(text is not None for text in texts.values()):
            loop = asyncio.get_running_loop()
            told = await loop.run_in_executor(self._text_thread, lambda: served.engine.told(n, **given))
        else:
            told = served.engine.told(n, **given)
        return told, np.broadcast_to(np.array(seeds, np.uint64), (n,)), numbers

    def _check_limits(self, asked: ImageRequest, served: Served) -> None:
        most = self.settings
        _, height, width = served.manifest.picture_shape
        if asked.count > most.max_images:
            raise Refusal(400, f"n: expected at most {most.max_images}", "too_many_images", param="n")
        if asked.steps is not None and asked.steps > most.max_steps:
            raise Refusal(400, f"steps: expected at most {most.max_steps}", "too_many_steps", param="steps")
        if asked.size not in (None, "auto", f"{width}x{height}"):
            raise Refusal(400, f"size: this model draws {width}x{height}", "invalid_value", param="size")

    async def _load_all(self) -> None:
        loop = asyncio.get_running_loop()
        paces = {}
        for name, path in self._paths.items():
            started = time.perf_counter()
            engine = await loop.run_in_executor(self._engine_thread, self._load, path)
            self.models[name] = served = Served(name, engine, self.settings)
            paces[name] = await loop.run_in_executor(self._engine_thread, served.warm_up)
            self.metrics.loaded(name, served.manifest.backend["name"])
            log.info("%s: loaded in %.1f s", name, time.perf_counter() - started)
        batcher = Batcher(
            self._draw,
            lambda name: self.models[name].largest,
            max_wait=self.settings.max_wait,
            queue_images=self.settings.queue_images,
            queue_seconds=self.settings.queue_seconds,
            told=self._drew,
        )
        for name, seconds in paces.items():
            batcher.pace.learn(Key(name, 1, "", 1.0), 1, seconds)
        self._tasks.append(asyncio.create_task(batcher.run()))
        self.batcher = batcher

    async def _draw(self, batch: Batch) -> list[np.ndarray | None]:
        draw = self.models[batch.key.model].draw
        return await asyncio.get_running_loop().run_in_executor(self._engine_thread, draw, batch)

    def _drew(self, batch: Batch, seconds: float) -> None:
        padding = self.models[batch.key.model].padded(len(batch)) - len(batch)
        self.metrics.drew(batch.key.model, len(batch), padding, batch.key.steps, seconds)
        for job, rows in batch.parts:
            if rows.start == 0:
                self.metrics.queue_seconds.observe(job.waited)

    def _batcher_says(self, what: str) -> float:
        return float(getattr(self.batcher, what)) if self.batcher is not None else 0.0


def _options(given: Mapping[str, Any] | None) -> str:
    """A sampler's options as JSON, in one order, so that equal ones are of one key. Raises OptionError."""
    for name, value in (given or {}).items():
        if name not in OPTIONS:
            raise OptionError(f"options: {name[:SHOWN]} is none of them; expected {', '.join(OPTIONS)}")
        if not isinstance(value, str | int | float | None):
            raise OptionError(f"options: {name} is neither a number, a text, true nor false")
    return json.dumps(dict(sorted((given or {}).items())))
