"""``--precision auto``: the fastest engine within a stated loss of quality, both measured on this machine."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_engine import sampling
from sparse_engine.backends import Backend, BuildOptions, StepGraph
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError, QualityLimitError, UnsupportedError
from sparse_engine.tactics import Choice, fastest

from .bake import Baked
from .build import graph_for, write_built
from .model import Model

REFERENCE = "fp32"
PRECISIONS = (REFERENCE, "tf32", "bf16", "fp16", "int8", "fp8")


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
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        candidates: dict[str, Candidate] = {}
        exported: dict[str, StepGraph] = {}
        expected: np.ndarray | None = None
        for precision in PRECISIONS:
            mine = dataclasses.replace(options, precision=precision)
            try:
                backend.check(mine)
                graph, quantised = graph_for(model, baked, backend, mine, data, wanted, exported)
            except (UnsupportedError, QualityLimitError):
                continue
            options.progress(f"building and measuring {precision}")
            path = Path(folder) / f"{precision}.sengine"
            write_built(path, model, baked, graph, backend, mine, quantised)
            engine = stack.enter_context(SparseEngine.load(path, device=options.device))
            found = _predictions(engine, data.split()[1])
            expected = found if expected is None else expected
            candidates[precision] = Candidate(mine, graph, quantised, engine, relative_error(found, expected))
        within = {name: each for name, each in candidates.items() if each.loss <= limit}
        options.progress(f"timing {', '.join(within)}")
        choice = fastest({name: _step(each.engine, options.batch[1]) for name, each in within.items()})
    note = f"precision {choice.kernel}: the fastest within a loss of {limit:.2%} ({_listed(candidates, choice)})"
    return dataclasses.replace(candidates[choice.kernel], note=note)


def _listed(candidates: Mapping[str, Candidate], choice: Choice) -> str:
    times = {name: f"{value:.3g} ms" for name, value in choice.milliseconds.items()}
    return "; ".join(f"{name} {times.get(name, 'not timed')}, loss {c.loss:.2%}" for name, c in candidates.items())


def _predictions(engine: SparseEngine, data: CalibrationData) -> np.ndarray:
    batches = data.batches(engine.manifest.batch[1])
    return np.concatenate([engine.predict(part.x, part.times, labels=part.labels) for part in batches])


def _step(engine: SparseEngine, batch: int) -> Callable[[], object]:
    x = sampling.normal(0, np.arange(batch), 0, engine.manifest.data_shape)
    return lambda: engine.predict(x, engine.schedule.t_max / 2)
