"""``SparseEngine``: load an engine file, draw samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sparse_engine import sampling
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import StepRunner, backend_named
from sparse_engine.backends.cuda.dlpack_in import DeviceArray, receive
from sparse_engine.errors import EngineClosedError, OptionError, UnsupportedError
from sparse_engine.manifest import Manifest
from sparse_engine.sampling.noise import SeededNoise

MOST_IMAGES = 2**32  # an image's number is one word of the noise's counter
MOST_GUIDANCE = 1e6  # far beyond any that draws a picture, and far from float32's end
Callback = Callable[[int, float, np.ndarray], object]
Labels = int | Sequence[int] | np.ndarray
Decoder = Callable[[np.ndarray], np.ndarray]
OUTPUTS = ("uint8", "float", "dlpack")
TRAJECTORY_OPTIONS = ("t_start", "t_end", "spacing", "eta", "variance", "order", "denoise_to_zero")


class SparseEngine:
    """A loaded engine. Safe to use from several threads; not after ``close()``, nor in a forked process.

        with SparseEngine.load("model.sengine") as engine:
            images = engine.sample(16, steps=50, seed=0)  # uint8 [16, H, W, C]

    A process forked from the one that loaded it has none of its threads: load the engine anew there.
    """

    def __init__(self, manifest: Manifest, runner: StepRunner) -> None:
        self.manifest = manifest
        self._runner: StepRunner | None = runner
        self._process = os.getpid()
        self._schedule = sampling.schedule_from_dict(manifest.schedule)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        check: bool = False,
        autotune: bool = True,
    ) -> SparseEngine:
        """Load an engine file.

        Args:
            path: the ``.sengine`` file. It stays mapped: do not overwrite it in place while it is in use.
            threads: for the backend's own pool; None is one per core.
            device: where the backend runs, for one that has a choice ("cuda:0").
            check: hash everything by sha256 too; every load checks it by a fast hash, which finds accidents.
            autotune: time the kernels of each 2:4 layer on this machine, once (the choices are remembered in the
                user's cache folder); False takes the sparse kernel wherever one runs.

        Raises:
            EngineFileError: missing, damaged, of a newer format, or altered.
            OptionError, UnsupportedError: this machine or the arguments do not fit.
            BackendError: the backend refuses the payload.
        """
        file = EngineFile(path)
        if check:
            file.verify()
        backend = backend_named(file.manifest.backend["name"])
        found = backend.availability()
        if not found.usable:
            raise UnsupportedError(f"{path} needs the {backend.name} backend: {found.reason}", found.fix)
        return cls(file.manifest, backend.load(file, threads=threads, device=device, autotune=autotune))

    def sample(
        self,
        n: int,
        *,
        steps: int = 50,
        sampler: str | None = None,
        seed: int = 0,
        labels: Labels | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        output: str = "uint8",
        noise: Any = None,
        init: Any = None,
        t_start: float | None = None,
        callback: Callback | None = None,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draw n samples.

        Args:
            n: how many.
            steps: network evaluations per sample.
            sampler: a name out of ``sampling.SAMPLERS``; None is the one the model's authors use.
            seed: image i of a seed is the same whatever the batch size and the number of threads.
            labels: one class, or n of them; None draws them from the seed.
            guidance: classifier-free guidance weight w, eps = w eps(y) + (1 - w) eps(null). None or 1 is without.
                SparseDM's and U-ViT's scale s is w = 1 + s.
            batch_size: samples per network call; None is the build's usual batch.
            output: "uint8" for [n, H, W, C], "float" for float32 [n, C, H, W] in the model's own range, "dlpack" for
                the same, one batch, left on the device that made it: an object with ``__dlpack__`` (a tensor for the
                torch backend).
            noise: float32 [n, C, H, W] to start from in place of the seed's: an array, or any object with
                ``__dlpack__``. One that lies on the engine's own GPU is copied there (not for ``init``), and is not
                looked through for NaN; any other comes by way of the host.
            init: the same, in the model's range: start from these, noised to ``t_start``.
            t_start: the schedule time to start from; None is the schedule's end.
            callback: called with (step, t, x) after each step of each batch; returning False stops.
            decoder: float32 latents [B, C, H, W] -> pixels [B, C', H', W'] in [-1, 1], for latent models.
            **options: the sampler's own: ``t_end``, ``spacing``, ``eta``, ``variance``, ``order``,
                ``denoise_to_zero``; and ``clip``, whether the predicted x0 is kept in the pixels' range (``ddpm`` and
                ``ddim`` do by default).

        Raises:
            OptionError: an argument that cannot be used; says which and what was expected.
            SamplingCancelled: the callback returned False.
            EngineClosedError: after ``close()``, or in a forked process.
        """
        batches = self.stream(
            n,
            steps=steps,
            sampler=sampler,
            seed=seed,
            labels=labels,
            guidance=guidance,
            batch_size=batch_size,
            output=output,
            noise=noise,
            init=init,
            t_start=t_start,
            callback=callback,
            decoder=decoder,
            **options,
        )
        if output == "dlpack":
            if n > (size := batch_size or self.manifest.batch[1]):
                raise OptionError(
                    f'output="dlpack" is one batch, and n = {n} is more than batch_size = {size}',
                    "use stream(), or pass batch_size=n",
                )
            return next(batches)
        return np.concatenate(list(batches))

    def stream(
        self,
        n: int,
        *,
        steps: int = 50,
        sampler: str | None = None,
        seed: int = 0,
        labels: Labels | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        output: str = "uint8",
        noise: Any = None,
        init: Any = None,
        t_start: float | None = None,
        callback: Callback | None = None,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """As ``sample``, yielding each batch as it finishes. Arguments are checked at once, not at the first batch."""
        self._live()
        _check_count("n", n)
        size = self.manifest.batch[1] if batch_size is None else batch_size
        _check_count("batch_size", size)
        _check_seed(seed)
        finish = self._finisher(output, decoder)
        trajectory = self.trajectory(steps, sampler, t_start=t_start, **options)
        if init is not None and t_start is None:
            raise OptionError("init is given without t_start", "say how far to noise it, for example t_start=0.5")
        noise = self._checked_images("noise", noise, n, stays=init is None)
        init = self._checked_images("init", init, n)
        y, weights = self._conditioning(n, seed, labels, guidance)

        def batches() -> Iterator[np.ndarray]:
            for first in range(0, n, size):
                images = np.arange(first, min(first + size, n))
                x = self._start(trajectory, seed, images, noise, init)
                labels_of = y[:, images] if y is not None else None
                yield finish(
                    self._walk(trajectory, seed, images, x, labels_of, weights, callback, on_device=output == "dlpack")
                )

        return batches()

    def denoise(
        self, x: Any, t: float | np.ndarray, *, labels: Labels | None = None, guidance: float | None = None
    ) -> np.ndarray:
        """The noise that the model sees in x, whatever it was trained to predict: one network evaluation.

        Args:
            x: float32 [B, C, H, W]: an array, or any object with ``__dlpack__``, as ``noise`` of ``sample``.
            t: schedule time, one for all or [B].
            labels: one class or B of them; None is the null class, or class 0 for a model without one.
            guidance: as in ``sample``.

        Returns:
            float32 eps [B, C, H, W].

        Raises:
            OptionError, EngineClosedError: as ``sample``.
        """
        if self.manifest.prediction == "eps":
            return self.predict(x, t, labels=labels, guidance=guidance)
        x = self._checked_images("x", x, None)
        predicted = self.predict(x, t, labels=labels, guidance=guidance)
        times = np.broadcast_to(np.asarray(t, np.float64), (len(predicted),))[:, None, None, None]
        alpha, sigma = self._schedule.alpha(times), self._schedule.sigma(times)
        eps = (x - alpha * predicted) / sigma if self.manifest.prediction == "x0" else alpha * predicted + sigma * x
        return eps.astype(np.float32)

    def predict(
        self, x: Any, t: float | np.ndarray, *, labels: Labels | None = None, guidance: float | None = None
    ) -> np.ndarray:
        """What the network itself predicts (eps, x0 or v); arguments and errors as ``denoise``."""
        runner = self._live()
        images = self._checked_images("x", x, None, stays=True)
        if not len(images):
            raise OptionError("x is empty; expected at least one sample")
        if not np.all((np.asarray(t) >= 0) & (np.asarray(t) <= self._schedule.t_max)):
            raise OptionError(f"t = {t}; expected schedule times from 0 to {self._schedule.t_max:g}")
        network_time = np.asarray(self._schedule.network_time(t), np.float32)
        if network_time.shape not in ((), (len(images),)):
            raise OptionError(
                f"t has shape {list(network_time.shape)}; expected one time, or one for each of {len(images)}"
            )
        if labels is None and self.manifest.num_classes:
            labels = self.manifest.null_class or 0
        y, weights = self._conditioning(len(images), 0, labels, guidance)
        times = np.ascontiguousarray(np.broadcast_to(network_time, (len(images),)))
        return runner.network(images, times, labels=y, guidance=weights)

    def warmup(self, batch_size: int | None = None) -> None:
        """Run one step at a batch size, so that the first sample is not slower than the next."""
        self.sample(
            batch_size or self.manifest.batch[1], steps=1, batch_size=batch_size, output="float", sampler="ddim"
        )

    def trajectory(
        self, steps: int, sampler: str | None = None, *, clip: bool | None = None, **options: Any
    ) -> sampling.Trajectory:
        """The table of coefficients that ``sample`` would walk; arguments and errors as there."""
        name = sampler or self.manifest.sampler
        info = sampling.SAMPLERS.get(name)
        pixels = self.manifest.value_range
        if clip and (pixels is None or (info is not None and not info.clips)):
            why = "latents have no range" if pixels is None else f"sampler {name} never forms x0"
            raise OptionError(f"clip = True, but {why}", "leave clip out")
        unknown = options.keys() - set(TRAJECTORY_OPTIONS)
        if unknown:
            raise OptionError(f"{', '.join(sorted(unknown))}: no such option; expected {', '.join(TRAJECTORY_OPTIONS)}")
        clips = info is not None and info.clips_by_default if clip is None else clip
        return sampling.make_trajectory(
            name,
            self._schedule,
            steps,
            prediction=self.manifest.prediction,
            value_range=pixels if clips else None,
            **options,
        )

    @property
    def schedule(self) -> sampling.Schedule:
        """The schedule that the model was trained on."""
        return self._schedule

    @property
    def info(self) -> dict[str, Any]:
        """The manifest, what each layer runs here, and under "runtime" what runs it."""
        runtime = self._live().describe()
        chosen = runtime.pop("layers", {})
        layers = [{**layer, **chosen.get(layer["name"], {})} for layer in self.manifest.layers]
        return {**self.manifest.to_dict(), "layers": layers, "runtime": runtime}

    def close(self) -> None:
        """Give memory and devices back. A second call does nothing."""
        runner, self._runner = self._runner, None
        if runner is not None and os.getpid() == self._process:
            runner.close()

    def __enter__(self) -> SparseEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _live(self) -> StepRunner:
        runner = self._runner
        if runner is None:
            raise EngineClosedError("the engine is closed", "load it again with SparseEngine.load")
        if os.getpid() != self._process:
            raise EngineClosedError(
                f"the engine was loaded in process {self._process} and is used in its fork {os.getpid()}",
                "load it in the child process: a fork does not inherit the runtime's threads",
            )
        return runner

    def _walk(
        self,
        trajectory: sampling.Trajectory,
        seed: int,
        images: np.ndarray,
        x: Any,
        y: np.ndarray | None,
        weights: np.ndarray,
        callback: Callback | None,
        on_device: bool,
    ) -> np.ndarray:
        noise = SeededNoise(seed, images, self.manifest.data_shape)
        y = None if y is None else np.ascontiguousarray(y)
        options: dict[str, Any] = {"labels": y, "guidance": weights, "noise": noise, "callback": callback}
        found: np.ndarray = self._live().run(trajectory, x, on_device=on_device, **options)
        return found

    def _start(
        self,
        trajectory: sampling.Trajectory,
        seed: int,
        images: np.ndarray,
        noise: Any,
        init: np.ndarray | None,
    ) -> Any:
        """x at the first time: noise, or ``init`` with noise on it."""
        z = sampling.normal(seed, images, 0, self.manifest.data_shape) if noise is None else noise[images]
        if init is None:
            return z
        alpha, sigma = trajectory.init
        return np.float32(alpha) * init[images] + np.float32(sigma) * z

    def _conditioning(
        self, n: int, seed: int, labels: Labels | None, guidance: float | None
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """(labels int64 [G, n] or None, weights float32 [G]): the null class is the second pass."""
        null = self.manifest.null_class
        weight = 1.0 if guidance is None else _number("guidance", guidance)
        if weight != 1.0 and null is None:
            what = "has no labels" if not self.manifest.num_classes else "has no null class"
            raise OptionError(
                f"guidance = {guidance}, but the model {what}", "leave guidance out, or rebuild with --null-class"
            )
        if not self.manifest.num_classes:
            if labels is not None:
                raise OptionError("labels are given, but the model is unconditional", "leave labels out")
            return None, np.ones(1, np.float32)
        y = self._checked_labels(labels, n, seed)
        if weight == 1.0:
            return y[None], np.ones(1, np.float32)
        return np.stack([y, np.full_like(y, null)]), np.array([weight, 1.0 - weight], np.float32)

    def _checked_labels(self, labels: Labels | None, n: int, seed: int) -> np.ndarray:
        rows, null = self.manifest.num_classes, self.manifest.null_class
        if labels is None:
            drawn = sampling.labels(seed, np.arange(n), rows - (null is not None))
            return drawn if null is None else drawn + (drawn >= null)
        try:
            y = np.asarray(labels)
        except ValueError as error:
            raise OptionError(f"labels are no array: {error}; expected one label or {n} of them") from error
        if y.dtype.kind not in "iu":
            raise OptionError(f"labels are {y.dtype}; expected integers")
        if y.ndim > 1 or (y.ndim == 1 and len(y) != n):
            raise OptionError(f"labels have shape {list(y.shape)}; expected one label or {n} of them")
        if y.size and (y.min() < 0 or y.max() >= rows):
            bad = y.min() if y.min() < 0 else y.max()
            raise OptionError(f"label {bad} is out of range; the model has classes 0 to {rows - 1}")
        return np.broadcast_to(y.astype(np.int64), (n,)).copy()

    def _checked_images(self, name: str, images: Any, n: int | None, stays: bool = False) -> Any:
        """float32 [n, C, H, W] of the host; where it lies on the runner's GPU and ``stays``, a ``DeviceArray``.

        None stays None; without n any number of images will do.
        """
        if images is None and n is not None:
            return None
        shape = tuple(self.manifest.data_shape)
        expected = f"[{', '.join(map(str, ('B' if n is None else n, *shape)))}]"
        if hasattr(images, "__dlpack__") and not isinstance(images, np.ndarray):
            images = receive(name, images, getattr(self._live(), "dlpack_device", None) if stays else None)
        if not isinstance(images, DeviceArray):
            try:
                images = np.ascontiguousarray(images, np.float32)
            except (TypeError, ValueError) as error:
                raise OptionError(f"{name} is no array of numbers: {error}; expected {expected}") from error
        if images.shape[1:] != shape or n not in (None, len(images)):
            raise OptionError(f"{name} has shape {list(images.shape)}; expected {expected}")
        if isinstance(images, np.ndarray) and not np.isfinite(images).all():
            raise OptionError(f"{name} holds NaN or infinite values")
        return images

    def _finisher(self, output: str, decoder: Decoder | None) -> Callable[[np.ndarray], np.ndarray]:
        """What turns a finished batch into what was asked for."""
        if output not in OUTPUTS:
            raise OptionError(f"output = {output!r}; expected one of {', '.join(OUTPUTS)}")
        value_range = self.manifest.value_range
        if output == "dlpack":
            if decoder is not None:
                raise OptionError(
                    'a decoder takes NumPy arrays, and output="dlpack" makes none', "decode what it returns"
                )
            return lambda x: x
        if decoder is not None:
            value_range = (-1.0, 1.0)
        elif output == "uint8" and value_range is None:
            raise OptionError(
                "this is a latent model: its samples have no pixels",
                'pass output="float" for the latents, or decoder= to turn them into pixels',
            )

        def finish(x: np.ndarray) -> np.ndarray:
            pixels = x if decoder is None else np.asarray(decoder(x))
            return pixels if output == "float" or value_range is None else to_uint8(pixels, value_range)

        return finish


def to_uint8(x: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """float [B, C, H, W] in a range -> uint8 [B, H, W, C], rounded and clipped."""
    low, high = value_range
    scaled = (x - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise OptionError(f"{name} = {value!r}; expected a whole number of 1 or more")
    if value > MOST_IMAGES:
        raise OptionError(f"{name} = {value}; expected at most {MOST_IMAGES}, the images that a seed has")


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} = {value!r}; expected a number") from error
    if not abs(number) <= MOST_GUIDANCE:  # nor NaN
        raise OptionError(f"{name} = {value}; expected a finite number, at most {MOST_GUIDANCE:.0e}")
    return number


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise OptionError(f"seed = {seed!r}; expected a whole number from 0 to 2**64 - 1")
