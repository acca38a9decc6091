"""An engine against the checkpoint it was built from: ``sparse-engine verify``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_engine import arguments, sampling
from sparse_engine.backends.torch.plain import plain_defaults
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import VerificationError
from sparse_engine.images import psnr
from sparse_engine.manifest import Manifest

from .bake import bake
from .families import family_named
from .masks import Pattern
from .model import load_model
from .step_graph import solver_lines

TIMES = (0.999, 0.75, 0.5, 0.25, 0.1, 0.01)  # of the schedule's end
BATCH = 2
TRAJECTORY_STEPS, TRAJECTORY_SAMPLER = 10, "dpm-solver++"
# Of eps, relative to the largest: more than a precision's rounding leaves (docs/precision.md), with room to spare.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2, "int8": 0.15, "fp8": 0.15}


@dataclass(frozen=True)
class TimeError:
    """How far eps is from the reference at one time. ``relative`` is the largest error over the largest |eps|."""

    t: float
    max_abs: float
    relative: float


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Attributes:
        times: one error per time.
        psnr: of a short deterministic trajectory against the reference's, in dB; inf where they are equal, and where
            the model is not offered its sampler; NaN or -inf where one of them is not finite.
        tolerance: for ``relative``.
        same_checkpoint: whether the checkpoint is the file that the engine was built from.
    """

    times: list[TimeError]
    psnr: float
    tolerance: float
    same_checkpoint: bool
    steps: int = TRAJECTORY_STEPS

    @property
    def worst(self) -> float:
        """The largest relative error of eps."""
        return float(np.max([entry.relative for entry in self.times]))  # NaN stays NaN

    @property
    def failure(self) -> tuple[str, str] | None:
        """What failed and what to do: eps at some time, or else the trajectory; None where neither did."""
        if not self.worst <= self.tolerance:
            return (
                f"relative error of eps is {self.worst:.2e}; expected at most {self.tolerance:.0e}",
                "rebuild the engine from this checkpoint, or say what is close enough with --tolerance",
            )
        if not self.psnr > -math.inf:
            return (
                f"a trajectory of {self.steps} steps ends in NaN or infinity; eps itself is right to {self.worst:.2e}",
                "rebuild the engine in fp32; if it fails in the same way, the checkpoint itself diverges",
            )
        return None

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return self.failure is None

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {**asdict(self), "worst": self.worst, "passed": self.passed}

    def check(self) -> None:
        """Raise VerificationError unless passed, with the failure that it is."""
        if self.failure is not None:
            what, fix = self.failure
            other = "" if self.same_checkpoint else " (the engine was built from another checkpoint file)"
            raise VerificationError(what + other, fix)


@plain_defaults()
def verify_engine(
    path: str | Path,
    checkpoint: str | Path,
    *,
    tolerance: float | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Verification:
    """Compare an engine with the torch network of a checkpoint, its masks baked the way the engine's were.

    Every payload byte is hashed first. ``tolerance`` None is that of the engine's precision in ``TOLERANCES``.

    Raises:
        EngineFileError, CheckpointError: one of the two cannot be used.
        OptionError: the tolerance is none.
    """
    if tolerance is not None:
        tolerance = arguments.real_number("tolerance", tolerance, above=0)
    checkpoint, seed = arguments.path("checkpoint", checkpoint), arguments.seed(seed)
    with SparseEngine.load(path, threads=threads, check=True) as engine:
        reference = Reference(engine.manifest, checkpoint, seed)
        times = [_time_error(engine, reference, t * engine.schedule.t_max, seed) for t in TIMES]
        psnr = _trajectory_psnr(engine, reference, seed)
        same = reference.sha256 == engine.manifest.checkpoint_sha256
        allowed = TOLERANCES[engine.manifest.precision] if tolerance is None else tolerance
    return Verification(times, psnr, allowed, same)


class Reference:
    """The torch network that an engine has to agree with."""

    def __init__(self, manifest: Manifest, checkpoint: str | Path, seed: int = 0) -> None:
        known = family_named(manifest.family).settings
        settings = {name: value for name, value in manifest.config.items() if name in known}
        settings |= {"null_class": manifest.null_class, "prediction": manifest.prediction}
        model = load_model(checkpoint, manifest.family, schedule=manifest.schedule, **settings)
        mask = manifest.mask
        baked = bake(model, mask["rule"], Pattern.parse(mask["pattern"]), mask["layers"])
        self._network = model.network(baked.state)
        self.sha256 = model.checkpoint.sha256
        self.conditioning = model.told(np.arange(BATCH), seed)

    def __call__(self, x: np.ndarray, network_time: np.ndarray) -> np.ndarray:
        """The network's prediction, float32 of x's shape."""
        told = {name: torch.from_numpy(rows) for name, rows in self.conditioning.items()}
        with torch.no_grad():
            predicted = self._network(torch.from_numpy(x), torch.from_numpy(network_time), **told)
        found: np.ndarray = predicted[:, : x.shape[1]].float().numpy()
        return found

    def step(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One solver step in torch: (x, t, coef, clip, base, h1, h2, z) -> (x_next, m)."""
        x, t, *rest = inputs
        eps = torch.from_numpy(self(x, t))
        x_next, m = solver_lines(torch.from_numpy(x), eps, *(torch.from_numpy(array) for array in rest))
        return x_next.numpy(), m.numpy()


def _time_error(engine: SparseEngine, reference: Reference, t: float, seed: int) -> TimeError:
    x = sampling.normal(seed, np.arange(BATCH), 0, engine.manifest.data_shape)
    network_time = np.full(BATCH, engine.schedule.network_time(t), np.float32)
    expected = reference(x, network_time)
    found = engine.predict(x, t, conditioning=reference.conditioning, allow_nonfinite=True)
    error = float(np.abs(found - expected).max())
    return TimeError(t, error, error / max(float(np.abs(expected).max()), 1e-30))


def _trajectory_psnr(engine: SparseEngine, reference: Reference, seed: int) -> float:
    if TRAJECTORY_SAMPLER in engine.manifest.excluded_samplers:
        return math.inf
    trajectory = engine.trajectory(TRAJECTORY_STEPS, TRAJECTORY_SAMPLER)
    x = sampling.normal(seed, np.arange(BATCH), 0, engine.manifest.data_shape)
    expected = sampling.walk(trajectory, reference.step, x, noise=None)
    found = engine.sample(
        BATCH,
        steps=TRAJECTORY_STEPS,
        sampler=TRAJECTORY_SAMPLER,
        noise=x,
        conditioning=reference.conditioning,
        batch_size=BATCH,
        output="float",
        allow_nonfinite=True,
    )
    with np.errstate(all="ignore"):  # NaN and infinity are what the result then says
        return psnr(found, expected, engine.manifest.value_range or (float(expected.min()), float(expected.max())))
