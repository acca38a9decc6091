"""``SparseEngine``: load an engine file, draw samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from sparse_engine import arguments, sampling
from sparse_engine.artifact import EngineFile
from sparse_engine.assets import Assets
from sparse_engine.backends import StepRunner, backend_named
from sparse_engine.backends.base import StepCallback, with_kernel
from sparse_engine.conditioning import Conditioning, Rows, zeros_for
from sparse_engine.drawing import Drawing, given_images, trajectory_of
from sparse_engine.ending import keep_until_the_end, library_call
from sparse_engine.errors import EngineClosedError, OptionError, UnsupportedError
from sparse_engine.manifest import Manifest
from sparse_engine.results import Decoder, check_prediction, finisher, noise_seen

Callback = StepCallback
Labels = int | Sequence[int] | np.ndarray
Seeds = int | Sequence[int] | np.ndarray
Prompts = str | Sequence[str]


class SparseEngine:
    """A loaded engine. Safe to use from several threads; not after ``close()``, nor in a forked process.

    For example::

        with SparseEngine.load("model.sengine") as engine:
            images = engine.sample(16, steps=50, seed=0)  # uint8 [16, H, W, C]

    A process forked from the one that loaded it has none of its threads: load the engine anew there.
    """

    def __init__(self, manifest: Manifest, runner: StepRunner, assets: Assets | None = None) -> None:
        self.manifest = manifest
        self._assets = assets or Assets(manifest)
        self._conditioning = Conditioning(manifest.conditions, self._assets.nulls)
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
            threads: for the backend's own pool, on a CPU no more than the cores that the process may use (a warning
                says so); None is one per core.
            device: where the backend runs, for one that has a choice ("cuda:0").
            check: hash everything by sha256 too; every load checks it by a fast hash, which finds accidents.
            autotune: time the kernels of each 2:4 layer on this machine, once (the choices are remembered in the
                user's cache folder); False takes the sparse kernel wherever one runs.

        Raises:
            EngineFileError: missing, damaged, of a newer format, or altered.
            OptionError, UnsupportedError: this machine or the arguments do not fit.
            BackendError: the backend refuses the payload.
        """
        threads, device = arguments.threads(threads), arguments.device(device)
        autotune = arguments.truth("autotune", autotune)
        file = EngineFile(path)
        if arguments.truth("check", check):
            file.verify()
        backend = backend_named(file.manifest.backend["name"])
        found = backend.availability()
        if not found.usable:
            raise UnsupportedError(f"{path} needs the {backend.name} backend: {found.reason}", found.fix)
        with library_call():
            runner = backend.load(file, threads=threads, device=device, autotune=autotune)
            keep_until_the_end(runner)
        return cls(file.manifest, runner, Assets(file.manifest, file, threads))

    def sample(
        self,
        n: int,
        *,
        steps: int = 50,
        sampler: str | None = None,
        seed: Seeds = 0,
        first: int = 0,
        images: Any = None,
        labels: Labels | None = None,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        output: str = "uint8",
        noise: Any = None,
        init: Any = None,
        t_start: float | None = None,
        callback: Callback | None = None,
        callback_every: int = 1,
        decoder: Decoder | None = None,
        allow_nonfinite: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Draw n samples.

        Args:
            n: how many.
            steps: network evaluations per sample.
            sampler: a name out of ``sampling.SAMPLERS``; None is the one the model's authors use.
            seed: image i of a seed is the same whatever the batch size and the number of threads. Of n seeds each
                image has its own: row i is what ``sample(1, seed=seed[i])`` draws.
            first: the number, within its seed, of the first image.
            images: n such numbers, in place of ``first`` and those that follow it.
            labels: one class, or n of them; None draws them from the seed. Short for ``conditioning={"y": labels}``.
            conditioning: what the network is told, by the names in ``manifest.conditions``: a row for all images,
                or one for each. Rows of a context that has a mask may be shorter than the engine's.
            negative: the same for the second pass of guidance, in place of what the engine has stored for "none".
            prompt, negative_prompt: texts in place of the context, for an engine that holds a text encoder.
            guidance: classifier-free guidance weight w, eps = w eps(told) + (1 - w) eps(negative). None or 1 is
                without. SparseDM's and U-ViT's scale s is w = 1 + s.
            batch_size: samples per network call; None is the build's usual batch.
            output: "uint8" for [n, H, W, C], "float" for float32 [n, C, H, W] in the model's own range, "dlpack" for
                the same, one batch, left on the device that made it: an object with ``__dlpack__`` (a tensor for the
                torch backend).
            noise: float32 [n, C, H, W] to start from in place of the seed's: an array, or any object with
                ``__dlpack__``. One that lies on the engine's own GPU is copied there (not for ``init``); any other
                comes by way of the host.
            init: the same, in the model's range: start from these, noised to ``t_start``.
            t_start: the schedule time to start from; None is the schedule's end.
            callback: called with (step, t, x) after each step of each batch; returning False stops, NumPy's too, and
                nothing else does.
            callback_every: so many steps may pass between two calls of the callback; the last step has one. A GPU,
                which otherwise waits for the callback after each step, keeps its pace at 12 or more.
            decoder: float32 latents [B, C, H, W] -> pixels [B, C', H', W'] in [-1, 1], for latent models; None is the
                engine's own, where it holds one and the output is "uint8".
            allow_nonfinite: return NaN and infinite values, where the model diverges, in place of the error; for
                "float" and "dlpack", whose result is otherwise looked through on the host.
            **options: the sampler's own: ``t_end``, ``spacing``, ``eta``, ``variance``, ``order``,
                ``denoise_to_zero``; and ``clip``, whether the predicted x0 is kept in the pixels' range (``ddpm`` and
                ``ddim`` do by default).

        Raises:
            OptionError: an argument that cannot be used; says which and what was expected.
            NonFiniteError: the samples, or what the decoder made of them, are NaN or infinite; says from which step on.
            SamplingCancelled: the callback returned False.
            EngineClosedError: after ``close()``, or in a forked process.
        """
        given: dict[str, Any] = {"steps": steps, "sampler": sampler, "seed": seed, "first": first, "images": images}
        given |= {"labels": labels, "conditioning": conditioning, "negative": negative}
        given |= {"prompt": prompt, "negative_prompt": negative_prompt, "guidance": guidance}
        given |= {"batch_size": batch_size, "output": output, "noise": noise, "init": init, "t_start": t_start}
        given |= {"callback": callback, "callback_every": callback_every, "decoder": decoder}
        batches = self.stream(n, allow_nonfinite=allow_nonfinite, **given, **options)
        if output == "dlpack":
            n, size = self._amounts(n, batch_size)
            if n > size:
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
        seed: Seeds = 0,
        first: int = 0,
        images: Any = None,
        labels: Labels | None = None,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        output: str = "uint8",
        noise: Any = None,
        init: Any = None,
        t_start: float | None = None,
        callback: Callback | None = None,
        callback_every: int = 1,
        decoder: Decoder | None = None,
        allow_nonfinite: bool = False,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """As ``sample``, yielding each batch as it finishes. Arguments are checked at once, not at the first batch."""
        self._live()
        n, size = self._amounts(n, batch_size)
        seeds = arguments.seeds(seed, n)
        numbers = arguments.image_numbers(images, first, n, isinstance(seeds, int))
        allow_nonfinite = arguments.truth("allow_nonfinite", allow_nonfinite)
        if decoder is None and output == "uint8":
            decoder = self._assets.decoder
        finish = finisher(output, decoder, self.manifest.value_range, allow_nonfinite)
        if callback is not None and not callable(callback):
            raise arguments.refused("callback", callback, "a function of (step, t, x)")
        every = arguments.whole_number("callback_every", callback_every, 1)
        trajectory = self.trajectory(steps, sampler, t_start=t_start, **options)
        if init is not None and t_start is None:
            raise OptionError("init is given without t_start", "say how far to noise it, for example t_start=0.5")
        noise = self._checked_images("noise", noise, n, stays=init is None)
        init = self._checked_images("init", init, n)
        said: dict[str, Any] = {"labels": labels, "conditioning": conditioning, "negative": negative}
        said |= {"prompt": prompt, "negative_prompt": negative_prompt, "guidance": guidance}
        told = self.told(n, **said, draw=(seeds, numbers))
        ends: dict[str, Any] = {"callback": callback, "callback_every": every, "allow_nonfinite": allow_nonfinite}
        ends |= {"on_device": output == "dlpack", "finish": finish}
        drawing = Drawing(self._live, self.manifest, trajectory, seeds, numbers, told, noise, init, **ends)
        return drawing.batches(size)

    def denoise(
        self,
        x: Any,
        t: Any,
        *,
        labels: Labels | None = None,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        allow_nonfinite: bool = False,
    ) -> np.ndarray:
        """The noise that the model sees in x, whatever it was trained to predict: one network evaluation.

        Args:
            x: float32 [B, C, H, W]: an array, or any object with ``__dlpack__``, as ``noise`` of ``sample``.
            t: schedule time, one for all or [B]; above 0 for a model that predicts x0.
            labels: one class or B of them; None is the null class, or class 0 for a model without one.
            conditioning, negative, guidance, allow_nonfinite: as in ``sample``.

        Returns:
            float32 eps [B, C, H, W].

        Raises:
            OptionError, NonFiniteError, EngineClosedError: as ``sample``.
        """
        given: dict[str, Any] = {"labels": labels, "conditioning": conditioning, "negative": negative}
        given |= {"guidance": guidance, "allow_nonfinite": allow_nonfinite}
        if self.manifest.prediction == "eps":
            return self.predict(x, t, **given)
        x = self._checked_images("x", x, None)
        times = self._checked_times(t, len(x))
        if self.manifest.prediction == "x0" and not np.all(self._schedule.sigma(times) > 0):
            raise OptionError("t = 0: x holds no noise, and a model of x0 says 0/0 of it", "use t > 0, or predict()")
        eps = noise_seen(self.manifest.prediction, self._schedule, x, self.predict(x, t, **given), times)
        if not allow_nonfinite:
            check_prediction(eps, times)
        return eps

    def predict(
        self,
        x: Any,
        t: Any,
        *,
        labels: Labels | None = None,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        allow_nonfinite: bool = False,
    ) -> np.ndarray:
        """What the network itself predicts (eps, x0, v or flow); arguments and errors as ``denoise``, but any t."""
        self._live()
        states = self._checked_images("x", x, None, stays=True)
        schedule_times = self._checked_times(t, len(states))
        told = self._conditioning.rows(
            len(states), labels=labels, conditioning=conditioning, negative=negative, guidance=guidance
        )
        predicted = self._evaluate(states, self._schedule.network_time(schedule_times), told)
        if not arguments.truth("allow_nonfinite", allow_nonfinite):
            check_prediction(predicted, schedule_times)
        return predicted

    def network(self, x: Any, t: Any, *, conditioning: Mapping[str, Any] | None = None) -> np.ndarray:
        """The network alone, as its authors call it: no schedule, no guidance, and whatever comes out is returned.

        Args:
            x: float32 [B, C, H, W], as for ``denoise``.
            t: float32 in the network's own units, one for all or [B].
            conditioning: as in ``sample``; labels that are not given are the null class, or class 0.

        Returns:
            float32 [B, C, H, W]: x's channels of what the network gives.

        Raises:
            OptionError, EngineClosedError: as ``sample``.
        """
        self._live()
        states = self._checked_images("x", x, None, stays=True)
        times = arguments.network_times(t, len(states))
        return self._evaluate(states, times, self._conditioning.rows(len(states), conditioning=conditioning))

    def told(
        self,
        n: int,
        *,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        **said: Any,
    ) -> Rows:
        """What the network is told for n images: texts as ``sample``, the rest as ``conditioning.Conditioning.rows``.

        Raises:
            OptionError: as they do.
        """
        return self._conditioning.rows(
            n,
            conditioning=self._assets.with_prompt("conditioning", conditioning, "prompt", prompt, n),
            negative=self._assets.with_prompt("negative", negative, "negative_prompt", negative_prompt, n),
            **said,
        )

    def _evaluate(self, x: Any, network_time: Any, told: Rows) -> np.ndarray:
        times = np.ascontiguousarray(np.broadcast_to(np.asarray(network_time, np.float32), (len(x),)))
        with library_call():
            return self._live().network(x, times, conditioning=told.arrays, guidance=told.weights)

    def decode(self, latents: Any) -> np.ndarray:
        """What the engine's own decoder makes of latents, one image at a time.

        A decoder with attention in its middle (Stable Diffusion's has one) holds the weights of every place of the
        latents for every other there: (H W)^2 float32 at its peak, 64 MiB at 64x64, 1 GiB at 128x128.

        Args:
            latents: float32 [B, C, H, W], as ``sample`` returns them with ``output="float"``.

        Returns:
            float32 pixels [B, 3, H', W'], in -1..1 but for what the decoder overshoots.

        Raises:
            OptionError: the engine holds no decoder, or the latents do not fit.
            EngineClosedError: as ``sample``.
        """
        self._live()
        decoder = self._assets.decoder
        if decoder is None:
            raise OptionError("the engine holds no decoder", "rebuild it with --vae FOLDER")
        return decoder(self._checked_images("latents", latents, None))

    def warmup(self, batch_size: int | None = None) -> None:
        """Run one step at a batch size, so that the first sample, or call of ``network``, is as fast as the next."""
        size = self.manifest.batch[1] if batch_size is None else batch_size
        told = zeros_for(self.manifest.conditions)
        if self.manifest.sampler in self.manifest.excluded_samplers:  # of a model that none is offered
            self.network(np.zeros((size, *self.manifest.data_shape), np.float32), 1.0, conditioning=told)
            return
        options: dict[str, Any] = {"output": "float", "allow_nonfinite": True, "conditioning": told}
        self.sample(size, steps=1, batch_size=size, **options)

    def trajectory(
        self, steps: int, sampler: str | None = None, *, clip: bool | None = None, **options: Any
    ) -> sampling.Trajectory:
        """The table of coefficients that ``sample`` would walk; arguments and errors as there."""
        return trajectory_of(self.manifest, self._schedule, steps, sampler, clip, options)

    @property
    def schedule(self) -> sampling.Schedule:
        """The schedule that the model was trained on."""
        return self._schedule

    @property
    def info(self) -> dict[str, Any]:
        """The manifest, what each layer runs here, and under "runtime" what runs it."""
        runtime = self._live().describe()
        chosen = runtime.pop("layers", {})
        sparse = self.manifest.sparse
        layers = [with_kernel(layer, chosen.get(layer["name"], {}), sparse) for layer in self.manifest.layers]
        return {**self.manifest.to_dict(), "layers": layers, "runtime": runtime}

    def close(self) -> None:
        """Give memory and devices back. A second call does nothing."""
        runner, self._runner = self._runner, None
        if runner is not None and os.getpid() == self._process:
            with library_call():
                runner.close()
                self._assets.close()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "an engine cannot be copied or sent to another process: its threads and its memory are this one's",
            "pass the path of its file, and load it there with SparseEngine.load",
        )

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

    def _amounts(self, n: Any, batch_size: Any) -> tuple[int, int]:
        """(images, images in a batch)."""
        size = self.manifest.batch[1] if batch_size is None else batch_size
        most = arguments.MOST_IMAGES
        return arguments.whole_number("n", n, 1, most), arguments.whole_number("batch_size", size, 1, most)

    def _checked_times(self, t: Any, n: int) -> np.ndarray:
        return arguments.schedule_times(t, n, self._schedule.t_max)

    def _checked_images(self, name: str, images: Any, n: int | None, stays: bool = False) -> Any:
        """``given_images``, which may stay on the runner's GPU where it lies there and ``stays``."""
        device = getattr(self._live(), "dlpack_device", None) if stays else None
        return given_images(name, images, n, self.manifest, device)
