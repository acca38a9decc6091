"""An engine that is served: what it can be asked for, which batches it runs, and a batch drawn on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_engine import sampling
from sparse_engine.backends.device_loop import CHUNK
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError
from sparse_engine.images import PNG_CHANNELS
from sparse_engine.results import nonfinite_rows, to_uint8

from .batcher import Batch, Key
from .settings import Settings

MOST_CHECKED = 1000  # keys that are remembered as good


class Served:
    """One engine, by the name that clients know it by.

    Args:
        name: of ``/v1/models``.
        engine: loaded.
        settings: of the service.

    Raises:
        OptionError: the settings ask for batches that the engine was not built for.
    """

    def __init__(self, name: str, engine: SparseEngine, settings: Settings) -> None:
        self.name, self.engine, self.created = name, engine, int(time.time())
        self.manifest = engine.manifest
        self._on_cpu = str(engine.info["runtime"].get("device", "")).startswith("cpu")
        smallest, usual, most = self.manifest.batch
        self.largest = min(2 * usual, most) if settings.max_batch is None else settings.max_batch
        given = settings.batch_sizes
        asked = max(self.largest, *given, 1)
        if asked > most:
            raise OptionError(
                f"a batch of {asked} images, but {name} was built for at most {most}",
                f"lower --max-batch and --batch-sizes, or rebuild with --batch {smallest},{usual},N",
            )
        powers = [2**k for k in range(self.largest.bit_length()) if smallest <= 2**k < self.largest]
        self.sizes = given or (() if self._on_cpu and smallest == 1 else (*powers, max(self.largest, smallest)))
        if given:
            self.largest = min(self.largest, max(given))
        self._checked: set[Key] = set()

    @property
    def takes_text(self) -> bool:
        """Whether it holds a text encoder."""
        return "text" in self.manifest.assets

    @property
    def draws_pixels(self) -> bool:
        """Whether its samples are pictures that a PNG holds: pixels, or latents that it decodes itself."""
        pixels = self.manifest.value_range is not None or "vae" in self.manifest.assets
        return pixels and self.manifest.picture_shape[0] in PNG_CHANNELS

    @property
    def classes(self) -> list[int]:
        """Labels that can be asked for; none of a model without."""
        return [label for label in range(self.manifest.num_classes) if label != self.manifest.null_class]

    @property
    def samplers(self) -> list[str]:
        """Names of the samplers that are offered for this model."""
        return [name for name in sampling.SAMPLERS if name not in self.manifest.excluded_samplers]

    def padded(self, images: int) -> int:
        """The batch that so many images are drawn in."""
        return next((size for size in self.sizes if size >= images), images)

    def check(self, key: Key) -> None:
        """Raise OptionError where no such trajectory can be walked."""
        if key in self._checked:
            return
        self.engine.trajectory(key.steps, key.sampler, **key.chosen)
        if len(self._checked) >= MOST_CHECKED:
            self._checked.clear()
        self._checked.add(key)

    def warm_up(self) -> float:
        """Run each recorded size, or one image, once; the seconds that a network pass of an image takes then."""
        for size in self.sizes or (1,):
            self.engine.warmup(size)
        started = time.perf_counter()
        self.engine.warmup(self.padded(1))
        return time.perf_counter() - started

    def draw(self, batch: Batch) -> list[np.ndarray | None]:
        """Draw a batch: uint8 [H, W, C] of each image, or float32 latents [C, H, W]; None where it is not finite.

        Raises:
            SamplingCancelled: nobody waits for any of it any more.
        """
        rows = np.resize(np.arange(len(batch)), self.padded(len(batch)))
        rows[len(batch) :] = 0  # rows that fill the batch up repeat the first, and are thrown away
        seeds = np.concatenate([job.seeds[part.start : part.stop] for job, part in batch.parts])[rows]
        numbers = np.concatenate([job.numbers[part.start : part.stop] for job, part in batch.parts])[rows]
        told = {name: each[:, rows] for name, each in _joined(batch).items()}
        guided = batch.key.guidance != 1.0
        x = self.engine.sample(
            len(rows),
            steps=batch.key.steps,
            sampler=batch.key.sampler,
            seed=seeds,
            images=numbers,
            conditioning={name: each[0] for name, each in told.items()},
            negative={name: each[1] for name, each in told.items()} if guided else None,
            guidance=batch.key.guidance,
            batch_size=len(rows),
            output="float",
            allow_nonfinite=True,
            callback=lambda *_: not batch.abandoned(),
            callback_every=1 if self._on_cpu else CHUNK,
            **batch.key.chosen,
        )[: len(batch)]
        return self._finished(x)

    def describe(self) -> dict[str, Any]:
        """As ``/v1/models`` has it: OpenAI's fields, and what can be asked of it."""
        runtime = self.engine.info["runtime"]
        channels, height, width = self.manifest.picture_shape
        facts = {"id": self.name, "object": "model", "created": self.created, "owned_by": "sparse-engine"}
        return facts | {
            "family": self.manifest.family,
            "precision": self.manifest.precision,
            "size": f"{width}x{height}",
            "channels": channels,
            "pixels": self.draws_pixels,
            "classes": self.classes,
            "prompt": self.takes_text,
            "told": [each.name for each in self.manifest.conditions],
            "guidance": bool(self.manifest.conditions),
            "sampler": self.manifest.sampler,
            "samplers": self.samplers,
            "max_batch": self.largest,
            "batch_sizes": list(self.sizes),
            "runs_on": {name: runtime[name] for name in ("library", "device", "threads") if name in runtime},
            "batch_invariant": runtime.get("batch_invariant"),
            "kernels": _kernels(self.engine.info["layers"]),
        }

    def _finished(self, x: np.ndarray) -> list[np.ndarray | None]:
        done: list[np.ndarray | None] = [None] * len(x)
        good = np.setdiff1d(np.arange(len(x)), nonfinite_rows(x))
        value_range, kept = self.manifest.value_range, x[good]
        if len(good) and "vae" in self.manifest.assets:
            kept, value_range = self.engine.decode(kept), (-1.0, 1.0)
            finite = np.setdiff1d(np.arange(len(kept)), nonfinite_rows(kept))
            good, kept = good[finite], kept[finite]
        images = kept if value_range is None else to_uint8(kept, value_range)
        for row, image in zip(good.tolist(), images, strict=True):
            done[row] = np.ascontiguousarray(image)
        return done


def _joined(batch: Batch) -> Mapping[str, np.ndarray]:
    """name -> [G, images, ...] of all parts of a batch."""
    parts = [(job.told.arrays, rows) for job, rows in batch.parts]
    names = parts[0][0].keys()
    return {
        name: np.concatenate([arrays[name][:, rows.start : rows.stop] for arrays, rows in parts], axis=1)
        for name in names
    }


def _kernels(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What the network's layers run, and how many of them."""
    return dict(Counter(str(layer.get("kernel", "dense")) for layer in layers).most_common())
