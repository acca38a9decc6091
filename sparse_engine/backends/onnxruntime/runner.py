"""A session over an engine file's graph, and the glue between it and the sampling loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import IDENTITY_ROW, NO_CLIP, NoiseSource, StepCallback
from sparse_engine.backends.onnx_graph import STEP_INPUTS
from sparse_engine.ending import stop_if_ending
from sparse_engine.errors import BackendError, EngineClosedError, EngineFileError, SparseEngineError
from sparse_engine.sampling import StepFunction, Trajectory, walk

from .forks import outlive_forks
from .library import load_onnxruntime
from .session import create_session
from .step import fastest_step

TYPES = {"int64": "int64", "float32": "float"}  # NumPy's name -> ONNX Runtime's


class OnnxRuntimeRunner:
    """A ``StepRunner``. ``InferenceSession.run`` is thread-safe, and so is this."""

    def __init__(self, engine: EngineFile, threads: int, autotune: bool) -> None:
        onnxruntime = load_onnxruntime()

        try:
            prepared = fastest_step(engine, threads, autotune)
            self._session: Any = create_session(prepared, engine.path, threads)
        except SparseEngineError:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions have no common public base
            engine.verify()  # bytes that were altered are the likelier cause, and the clearer message
            raise BackendError(f"{engine.path}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}") from error
        outlive_forks(self._session)
        inputs = {entry.name: (entry.type, entry.shape) for entry in self._session.get_inputs()}
        self._guided = "guidance" in inputs
        _check_fit(engine, inputs)
        self._description = {
            "library": f"onnxruntime {onnxruntime.__version__}",
            "device": "cpu",
            "threads": threads,
            "attention": prepared.attention,
            "group_norm": prepared.group_norm,
            "batch_invariant": True,  # one kernel a layer, and each adds up in an order of its own: tested to the bit
            "layers": prepared.report,
            **({"step": prepared.step} if prepared.step else {}),
        }
        self._kept = prepared.overrides  # the session reads these arrays in place

    def run(
        self,
        trajectory: Trajectory,
        x: np.ndarray,
        *,
        conditioning: Mapping[str, np.ndarray],
        guidance: np.ndarray,
        noise: NoiseSource,
        callback: StepCallback | None = None,
        callback_every: int = 1,
        on_device: bool = False,
    ) -> np.ndarray:
        """See ``StepRunner.run``. The device is the CPU, and NumPy's arrays have ``__dlpack__``."""
        step = self._step(conditioning, guidance)
        return walk(trajectory, step, x, noise=noise, callback=callback, callback_every=callback_every)

    def network(
        self, x: np.ndarray, t: np.ndarray, *, conditioning: Mapping[str, np.ndarray], guidance: np.ndarray
    ) -> np.ndarray:
        """See ``StepRunner.network``."""
        zeros = np.zeros_like(x)
        return self._step(conditioning, guidance)(x, t, IDENTITY_ROW, NO_CLIP, zeros, zeros, zeros, zeros)[1]

    def describe(self) -> dict[str, Any]:
        """See ``StepRunner.describe``."""
        return dict(self._description)

    def close(self) -> None:
        """Drop the session; calls under way finish on their own reference."""
        self._session = None

    def _step(self, conditioning: Mapping[str, np.ndarray], guidance: np.ndarray) -> StepFunction:
        """The step function that the loop calls, with what stays the same over a trajectory bound to it."""
        session = self._session
        if session is None:
            raise EngineClosedError("the engine was closed by another thread", "load it again with SparseEngine.load")
        fixed: dict[str, Any] = {**conditioning, "guidance": guidance} if self._guided else {}

        def step(
            x: np.ndarray,
            t: np.ndarray,
            coef: np.ndarray,
            clip: np.ndarray,
            base: np.ndarray,
            h1: np.ndarray,
            h2: np.ndarray,
            z: np.ndarray,
        ) -> tuple[np.ndarray, np.ndarray]:
            stop_if_ending()
            moving = {"x": x, "t": t, "coef": coef, "clip": clip, "base": base, "h1": h1, "h2": h2, "z": z}
            try:
                x_next, m = session.run(("x_next", "m"), {**moving, **fixed})
            except Exception as error:  # ONNX Runtime's own exceptions have no common public base
                raise BackendError(f"ONNX Runtime could not run a step: {error}") from error
            return x_next, m

        return step


def _check_fit(engine: EngineFile, inputs: Mapping[str, tuple[str, Sequence[Any]]]) -> None:
    """Raise EngineFileError where the manifest says something else than the graph."""
    told = {each.name: (TYPES[each.dtype], list(each.shape)) for each in engine.manifest.conditions}
    found = {
        name: (kind.removeprefix("tensor(").removesuffix(")"), list(shape[2:]))
        for name, (kind, shape) in inputs.items()
        if name not in STEP_INPUTS
    }
    shape, takes = list(engine.manifest.data_shape), list(inputs["x"][1][1:])
    if shape != takes or told != found or bool(told) != ("guidance" in inputs):
        raise EngineFileError(
            f"{engine.path}: its graph takes samples of {takes} and {_words(found)}, its manifest says {shape} and "
            f"{_words(told)}",
            "rebuild the engine",
        )


def _words(told: Mapping[str, tuple[str, list[int]]]) -> str:
    return ", ".join(f"{name} {kind} {shape}" for name, (kind, shape) in told.items()) or "nothing else"
