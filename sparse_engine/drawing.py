"""One call of ``SparseEngine.sample`` or ``stream``, its arguments checked: the table it walks, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine import arguments, sampling
from sparse_engine.backends import StepRunner
from sparse_engine.backends.base import StepCallback
from sparse_engine.backends.cuda.dlpack_in import DeviceArray, receive
from sparse_engine.conditioning import Rows
from sparse_engine.ending import callers_code, library_call
from sparse_engine.errors import OptionError
from sparse_engine.manifest import Manifest
from sparse_engine.results import Finish, diverged, nonfinite_rows
from sparse_engine.sampling.noise import SeededNoise

FAR_OUT = 16  # times the model's range: what an image to start from holds beyond is in other units
TRAJECTORY_OPTIONS = ("t_start", "t_end", "spacing", "eta", "variance", "order", "denoise_to_zero")


def trajectory_of(
    manifest: Manifest,
    schedule: sampling.Schedule,
    steps: int,
    sampler: str | None,
    clip: bool | None,
    options: dict[str, Any],
) -> sampling.Trajectory:
    """The table of coefficients of a sample; arguments and errors as ``SparseEngine.sample``."""
    name = manifest.sampler if sampler is None else sampler
    info = sampling.SAMPLERS.get(name) if isinstance(name, str) else None
    if info is not None and name in manifest.excluded_samplers:
        why = manifest.excluded_samplers[name]
        raise OptionError(f"sampler {name} is not offered for this model: {why}", "see `sparse-engine samplers`")
    pixels = manifest.value_range
    clip = None if clip is None else arguments.truth("clip", clip)
    if clip and (pixels is None or (info is not None and not info.clips)):
        why = "latents have no range" if pixels is None else f"sampler {name} never forms x0"
        raise OptionError(f"clip = True, but {why}", "leave clip out")
    unknown = options.keys() - set(TRAJECTORY_OPTIONS)
    if unknown:
        raise OptionError(f"{', '.join(sorted(unknown))}: no such option; expected {', '.join(TRAJECTORY_OPTIONS)}")
    clips = info is not None and info.clips_by_default if clip is None else clip
    value_range = pixels if clips else None
    return sampling.make_trajectory(
        name, schedule, steps, prediction=manifest.prediction, value_range=value_range, **options
    )


def given_images(name: str, images: Any, n: int | None, manifest: Manifest, device: Any = None) -> Any:
    """float32 [n, C, H, W] of the host; where it lies on the runner's GPU ``device``, a ``DeviceArray``.

    None stays None; without n any number of images will do. Raises OptionError.
    """
    if images is None and n is not None:
        return None
    shape = tuple(manifest.data_shape)
    expected = f"[{', '.join(map(str, ('B' if n is None else n, *shape)))}]"
    if hasattr(images, "__dlpack__") and not isinstance(images, np.ndarray):
        images = receive(name, images, device)
    if not isinstance(images, DeviceArray):
        images = arguments.floats(name, images, expected)
    if images.shape[1:] != shape or n not in (None, len(images)):
        raise OptionError(f"{name} has shape {list(images.shape)}; expected {expected}")
    if not len(images):
        raise OptionError(f"{name} is empty; expected at least one sample")
    low, high = manifest.value_range or (-np.inf, np.inf)
    if name == "init" and np.abs(images).max() > FAR_OUT * max(abs(low), abs(high)):
        raise OptionError(
            f"init goes up to {np.abs(images).max():g}; the model's range is {low:g}..{high:g}",
            "of pixels in 0..255: x / 127.5 - 1 for the range -1..1",
        )
    return images


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn, from what, and by whom.

    Attributes:
        runner: gives the engine's own, or raises EngineClosedError.
        manifest: the engine's.
        trajectory: the table that each batch walks.
        seeds: one for all images, or uint64 [n].
        numbers: int64 [n], the images' within their seeds.
        told: what the network is told of all images.
        noise, init: float32 [n, C, H, W] or None, as ``SparseEngine.sample`` takes them.
        callback, callback_every, allow_nonfinite: as ``SparseEngine.sample`` takes them.
        on_device: whether the last state stays where it was made.
        finish: makes of a batch's last state what was asked for.
    """

    runner: Callable[[], StepRunner]
    manifest: Manifest
    trajectory: sampling.Trajectory
    seeds: int | np.ndarray
    numbers: np.ndarray
    told: Rows
    noise: Any
    init: np.ndarray | None
    callback: StepCallback | None
    callback_every: int
    allow_nonfinite: bool
    on_device: bool
    finish: Finish

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images, at most ``size`` at once. Raises NonFiniteError, SamplingCancelled, EngineClosedError."""
        n = len(self.numbers)
        for begin in range(0, n, size):
            rows = np.arange(begin, min(begin + size, n))
            yield self.finish(self._batch(rows), self.numbers[rows])

    def _batch(self, rows: np.ndarray) -> Any:
        seeds = self.seeds if isinstance(self.seeds, int) else self.seeds[rows]
        source = SeededNoise(seeds, self.numbers[rows], self.manifest.data_shape)
        x, part = self._start(source, rows), self.told.of(rows)

        def walk(callback: StepCallback | None, every: int = 1) -> Any:
            return self._walk(source, x, part, callback, every)

        drawn = walk(self.callback, self.callback_every)
        if not self.allow_nonfinite and len(broken := nonfinite_rows(drawn)):
            raise diverged(walk, self.trajectory, x, self.numbers[rows], broken, self.manifest.precision)
        return drawn

    def _start(self, drawn: SeededNoise, rows: np.ndarray) -> Any:
        """x at the first time: noise, or ``init`` with noise on it."""
        z = drawn(0) if self.noise is None else self.noise[rows]
        if self.init is None:
            return z
        alpha, sigma = self.trajectory.init
        return np.float32(alpha) * self.init[rows] + np.float32(sigma) * z

    def _walk(self, noise: SeededNoise, x: Any, told: Rows, callback: StepCallback | None, every: int) -> Any:
        def tell(step: int, t: float, state: np.ndarray) -> object:
            with callers_code():
                return callback(step, t, state) if callback is not None else None

        options: dict[str, Any] = {"conditioning": told.arrays, "guidance": told.weights, "noise": noise}
        options |= {"callback": None if callback is None else tell, "callback_every": every}
        with library_call():
            return self.runner().run(self.trajectory, x, on_device=self.on_device, **options)
