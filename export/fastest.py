"""``--precision auto``: the fastest engine within a stated loss of quality, both measured on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_engine import sampling
from sparse_engine.backends import Backend, BuildOptions, StepGraph
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.observe import predictions
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.conditioning import zeros_for
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import (
    BackendError,
    CheckpointError,
    OptionError,
    QualityLimitError,
    SparseEngineError,
    UnsupportedError,
)
from sparse_engine.files import scratch_folder
from sparse_engine.tactics import Choice, fastest

from .bake import Baked
from .graphs import export_baked, graph_for
from .model import Model
from .write import write_built

REFERENCE = "fp32"
PRECISIONS = (REFERENCE, "tf32", "bf16", "fp16", "int8", "fp8")
# What ends one precision and leaves the others: this machine or backend has none, its range is too small for the
# weights, its loss is too large, or the backend failed in it.
CANNOT = (UnsupportedError, CheckpointError, QualityLimitError, BackendError)


@dataclass(frozen=True)
class Candidate:
    """One precision. ``loss`` is as in ``Quality``, of the whole engine; ``note`` says what was chosen and why."""

    options: BuildOptions
    graph: StepGraph
    quantised: Quantised | None
    engine: SparseEngine
    loss: float
    note: str = ""


def fastest_within(
    model: Model,
    baked: Baked,
    backend: Backend,
    options: BuildOptions,
    data: CalibrationData | None,
    wanted: Quantisation | None,
) -> Candidate:
    """Build each precision that the backend has, measure loss and time of a step, take the fastest within the limit.

    Args:
        model, baked, backend: what is built.
        options: of the build; ``precision`` is replaced.
        data: the loss is measured on its held-out samples.
        wanted: its ``max_quality_loss`` is the limit.

    Returns:
        The candidate chosen; its engine is closed.

    Raises:
        OptionError: no calibration data or no limit is given.
        UnsupportedError: engines of this backend cannot run here, so they cannot be timed.
        QualityLimitError: no precision that can be built stays within the limit.
        One of ``CANNOT``: no precision can be built. The message of either says why, for each.
    """
    if data is None or wanted is None or wanted.max_quality_loss is None:
        raise OptionError(
            "precision auto measures each precision's loss, and takes the fastest within a limit",
            "give both: --calib calib.npz --max-quality-loss 0.02",
        )
    if not backend.availability().usable:
        raise UnsupportedError(
            f"precision auto times engines, and those of the {backend.name} backend do not run here",
            "name a precision, or build on the machine that will run the engine",
        )
    limit = wanted.max_quality_loss
    with scratch_folder() as folder, ExitStack() as stack:
        build = _Builder(model, baked, backend, options, data, wanted, folder)
        candidates: dict[str, Candidate] = {}
        left_out: dict[str, SparseEngineError] = {}
        for precision in PRECISIONS:
            try:
                candidates[precision] = build(precision)
            except CANNOT as error:
                left_out[precision] = error
            else:
                stack.callback(candidates[precision].engine.close)
        within = {name: each for name, each in candidates.items() if each.loss <= limit}
        if not within:
            raise _none_within(limit, candidates, left_out)
        options.progress(f"timing {', '.join(within)}")
        steps = {name: _step(each.engine, options.batch[1]) for name, each in within.items()}
        choice = fastest(steps, spinning=True)
    note = f"precision {choice.kernel}: the fastest within a loss of {limit:.2%} ({_listed(candidates, choice)})"
    return dataclasses.replace(candidates[choice.kernel], note=note + _left_out(left_out))


class _Builder:
    """Builds a precision and measures its loss; arguments as ``fastest_within``, ``folder`` holds the engines."""

    def __init__(
        self,
        model: Model,
        baked: Baked,
        backend: Backend,
        options: BuildOptions,
        data: CalibrationData,
        wanted: Quantisation,
        folder: Path,
    ) -> None:
        self._model, self._baked, self._backend, self._options = model, baked, backend, options
        self._data, self._wanted, self._folder = data, wanted, folder
        self._exported: dict[str, StepGraph] = {}
        self._expected: np.ndarray | None = None

    def __call__(self, precision: str) -> Candidate:
        """A candidate, its engine open. Raises one of ``CANNOT`` where the precision cannot be built or run."""
        model, baked, backend = self._model, self._baked, self._backend
        options = dataclasses.replace(self._options, precision=precision)
        backend.check(options)
        graph, quantised = graph_for(model, baked, backend, options, self._data, self._wanted, self._exported)
        options.progress(f"building and measuring {precision}")
        path = self._folder / f"{precision}.sengine"
        write_built(path, model, baked, graph, backend, options, quantised)
        engine = SparseEngine.load(path, device=options.device)
        with ExitStack() as on_error:
            on_error.callback(engine.close)
            loss = self._loss(engine, precision)
            on_error.pop_all()
        return Candidate(options, graph, quantised, engine, loss)

    def _loss(self, engine: SparseEngine, precision: str) -> float:
        """Against the engine in fp32; where the backend has none, against the step graph in fp32."""
        held_out = self._data.split()[1]
        found = _predictions(engine, held_out)
        if self._expected is None and precision == REFERENCE:
            self._expected = found
        elif self._expected is None:
            if REFERENCE not in self._exported:
                self._exported[REFERENCE] = export_baked(self._model, self._baked, REFERENCE)
            self._expected = predictions(self._exported[REFERENCE], held_out)
        return relative_error(found, self._expected)


def _none_within(
    limit: float, candidates: Mapping[str, Candidate], left_out: Mapping[str, SparseEngineError]
) -> SparseEngineError:
    if not candidates:
        first = next(iter(left_out.values()))
        return type(first)(f"no precision can be built: {_listed_errors(left_out)}", first.fix)
    losses = "; ".join(f"{name} loses {each.loss:.2%}" for name, each in candidates.items())
    return QualityLimitError(
        f"no precision stays within a loss of {limit:.2%}: {losses}{_left_out(left_out)}",
        "allow more with --max-quality-loss, or name a precision",
    )


def _left_out(errors: Mapping[str, SparseEngineError]) -> str:
    return f"; left out: {_listed_errors(errors)}" if errors else ""


def _listed_errors(errors: Mapping[str, SparseEngineError]) -> str:
    return "; ".join(f"{name} ({error.what})" for name, error in errors.items())


def _listed(candidates: Mapping[str, Candidate], choice: Choice) -> str:
    times = {name: f"{value:.3g} ms" for name, value in choice.milliseconds.items()}
    return "; ".join(f"{name} {times.get(name, 'not timed')}, loss {c.loss:.2%}" for name, c in candidates.items())


def _predictions(engine: SparseEngine, data: CalibrationData) -> np.ndarray:
    batches = data.batches(engine.manifest.batch[1])
    return np.concatenate(
        [engine.predict(part.x, part.times, conditioning=part.conditioning, allow_nonfinite=True) for part in batches]
    )


def _step(engine: SparseEngine, batch: int) -> Callable[[], object]:
    x = sampling.normal(0, np.arange(batch), 0, engine.manifest.data_shape)
    told = zeros_for(engine.manifest.conditions)
    return lambda: engine.predict(x, engine.schedule.t_max / 2, conditioning=told)
