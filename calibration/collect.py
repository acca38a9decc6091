"""Calibration data: what the network is given along sampling trajectories.

A diffusion network's activations change with time, so inputs drawn at one time, or noise put on images, calibrate it
badly. The float engine's own sampler is run, and every few steps of each image are kept, in such a way that each step
is kept equally often.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments, sampling
from sparse_engine.conditioning import LABELS, Condition, Rows
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import InputError, OptionError
from sparse_engine.files import parsed_json, read_arrays, replacing
from sparse_engine.manifest import Manifest

EVERY = 4  # of this many steps of an image one is kept: neighbouring states of one trajectory say much the same
MIN_SAMPLES = 32
MOST_IMAGES, MOST_STEPS = 100_000, 10_000
HELD_OUT = 5  # one sample of this many measures quality, and is not calibrated on
MOST_PACKED = 20  # times its size that a file may unpack to
FORMAT, OLD_FORMAT = "sparse-engine-calibration/2", "sparse-engine-calibration/1"  # the old one knows labels alone


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Inputs of the network, in the order of time, latest first.

    Attributes:
        x: float32 [N, C, H, W], states of sampling trajectories.
        times: float64 [N], schedule times.
        network_times: float32 [N], what the network is given for them.
        conditioning: name -> [N, *shape], what the second pass is told too where guidance was on.
        guidance: float32 [N], the weight that each trajectory was sampled with.
        facts: where they come from: "checkpoint_sha256", "masked", "seed", "sampler", "steps", "images".
    """

    x: np.ndarray
    times: np.ndarray
    network_times: np.ndarray
    conditioning: dict[str, np.ndarray]
    guidance: np.ndarray
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: np.ndarray) -> CalibrationData:
        """Some of the samples."""
        return dataclasses.replace(
            self,
            x=self.x[indices],
            times=self.times[indices],
            network_times=self.network_times[indices],
            conditioning={name: rows[indices] for name, rows in self.conditioning.items()},
            guidance=self.guidance[indices],
        )

    def split(self) -> tuple[CalibrationData, CalibrationData]:
        """(what ranges are found on, what quality is measured on); both spread over all times."""
        held_out = np.arange(len(self)) % HELD_OUT == HELD_OUT // 2
        return self.take(np.flatnonzero(~held_out)), self.take(np.flatnonzero(held_out))

    def batches(self, size: int) -> Iterator[CalibrationData]:
        """The samples in order, at most ``size`` at once."""
        for first in range(0, len(self), size):
            yield self.take(np.arange(first, min(first + size, len(self))))

    def save(self, path: Path) -> None:
        """Write ``.npz``, whole or not at all. Raises OutputError."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays |= {f"{TOLD}{name}": rows for name, rows in self.conditioning.items()}
        with replacing(path) as stream:
            np.savez(stream, facts=np.array(json.dumps({"format": FORMAT, **self.facts})), **arrays)


ARRAYS = {"x": np.float32, "times": np.float64, "network_times": np.float32, "guidance": np.float32}
TOLD = "conditioning/"  # before the names of conditions in a file


def check_amounts(images: Any, steps: Any, seed: Any) -> tuple[int, int, int]:
    """Say before the work that these are no amounts to collect; as ints. Raises OptionError."""
    seed = arguments.seed(seed)
    images, steps = arguments.whole_number("images", images), arguments.whole_number("steps", steps)
    if images < 1 or steps < 1 or images * (steps // EVERY) < MIN_SAMPLES:
        raise OptionError(
            f"{images} images of {steps} steps leave fewer than {MIN_SAMPLES} calibration samples",
            "take more images, or more steps; 64 images of 20 steps are a good start",
        )
    if images > MOST_IMAGES or steps > MOST_STEPS:
        raise OptionError(
            f"{images} images of {steps} steps; expected at most {MOST_IMAGES} and {MOST_STEPS}",
            "64 images of 20 steps are a good start",
        )
    return images, steps, seed


def collect(
    engine: SparseEngine,
    *,
    images: int = 64,
    steps: int = 20,
    sampler: str | None = None,
    conditioning: Mapping[str, Any] | None = None,
    negative: Mapping[str, Any] | None = None,
    guidance: Sequence[float] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationData:
    """Sample with a float engine and keep what its network was given.

    Args:
        engine: of a float precision.
        images: how many trajectories; ``images * steps / 4`` samples are kept.
        steps: network evaluations of each, at times of equal distance.
        sampler: as ``SparseEngine.sample`` takes it.
        conditioning, negative: as ``SparseEngine.sample`` takes them, a row for all images or one for each. Labels that
            are not given are every class equally often.
        guidance: weights; the images take them in turn. None is 1, and 2 where the second pass can be told something.
            Where the weight is not 1, half of what is kept is the second pass.
        seed: of the noise and of the order of labels.
        progress: told (steps done, steps in all).

    Raises:
        OptionError: the engine is quantised itself, or there are too few samples.
        NonFiniteError: the model diverges.
    """
    manifest = engine.manifest
    if manifest.quantisation is not None:
        raise OptionError(
            f"the engine is {manifest.precision}; calibration needs the ranges of the float model",
            "calibrate the checkpoint, or an engine built in fp32",
        )
    images, steps, seed = check_amounts(images, steps, seed)
    weights = _weights(manifest, guidance, negative)
    unguided = all(weight == 1 for weight in weights)  # and then ``negative`` is refused
    told = dict(conditioning or {})
    if manifest.num_classes and LABELS not in told:
        told[LABELS] = _labels(manifest, images, seed)
    trajectory = engine.trajectory(steps, sampler, spacing="time-uniform")
    rows = {
        weight: engine.told(
            images, conditioning=told, negative=negative if weight != 1 or unguided else None, guidance=weight
        )
        for weight in weights
    }
    groups = list(_groups(images, weights, manifest.batch[1]))
    kept = []
    for index, (weight, chosen) in enumerate(groups):

        def count(step: int, index: int = index) -> None:
            progress(index * steps + step + 1, len(groups) * steps)

        part = rows[weight].of(chosen)
        states = _states(engine, chosen, part, weight, steps, sampler, seed, count)
        kept.append(_keep(states, chosen // len(weights), trajectory, part, weight))
    facts = {
        "checkpoint_sha256": manifest.checkpoint_sha256,
        "masked": any(layer["masked"] for layer in manifest.layers),
        "seed": seed,
        "sampler": sampler or manifest.sampler,
        "steps": steps,
        "images": images,
    }
    return _joined(kept, facts)


def _weights(manifest: Manifest, guidance: Sequence[float] | None, negative: Any) -> Sequence[float]:
    """Those asked for, or the default: a second pass where it can be told something."""
    if guidance is not None:
        return arguments.real_numbers("guidance", guidance)
    nulls = bool(manifest.conditions) and all(each.null is not None for each in manifest.conditions)
    return (1.0, 2.0) if nulls or negative else (1.0,)


def _joined(parts: Sequence[CalibrationData], facts: dict[str, Any]) -> CalibrationData:
    """All samples, latest first."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    names = parts[0].conditioning
    told = {name: np.concatenate([part.conditioning[name] for part in parts]) for name in names}
    data = CalibrationData(**arrays, conditioning=told, facts=facts)
    return data.take(np.argsort(-data.times, kind="stable"))


def _labels(manifest: Manifest, images: int, seed: int) -> np.ndarray:
    """Every class equally often, in random order; of more classes than images, some."""
    classes = np.delete(np.arange(manifest.num_classes), [] if manifest.null_class is None else [manifest.null_class])
    rng = np.random.default_rng(seed)
    labels: np.ndarray = rng.permutation(np.resize(rng.permutation(classes), images))
    return labels


def _groups(images: int, weights: Sequence[float], batch: int) -> Iterator[tuple[float, np.ndarray]]:
    """(guidance weight, images that are sampled together)."""
    for turn, weight in enumerate(weights):
        mine = np.arange(turn, images, len(weights))
        for first in range(0, len(mine), batch):
            yield weight, mine[first : first + batch]


def _states(
    engine: SparseEngine,
    images: np.ndarray,
    told: Rows,
    weight: float,
    steps: int,
    sampler: str | None,
    seed: int,
    progress: Callable[[int], None],
) -> list[np.ndarray]:
    """x at each network evaluation of some images: [steps][B, C, H, W]."""
    states = [sampling.normal(seed, images, 0, engine.manifest.data_shape)]

    def keep_state(step: int, t: float, x: np.ndarray) -> None:
        states.append(np.array(x))
        progress(step)

    engine.sample(
        len(images),
        steps=steps,
        sampler=sampler,
        spacing="time-uniform",
        noise=states[0],
        seed=seed,
        conditioning={name: rows[0] for name, rows in told.arrays.items()},
        negative={name: rows[1] for name, rows in told.arrays.items()} if weight != 1.0 else None,
        guidance=weight,
        batch_size=len(images),
        output="float",
        callback=keep_state,
    )
    return states[:-1]


def _keep(
    states: list[np.ndarray],
    turns: np.ndarray,
    trajectory: sampling.Trajectory,
    told: Rows,
    weight: float,
) -> CalibrationData:
    """Each image's own share of its steps: ``turns`` [B] are its places among the images of the same weight."""
    step, column = np.nonzero((np.arange(len(states))[:, None] + turns[None, :]) % EVERY == 0)
    conditioning = {}
    for name, rows in told.arrays.items():
        conditioning[name] = rows[0][column]
        if weight != 1.0:
            conditioning[name][1::2] = rows[1][column[1::2]]
    return CalibrationData(
        np.stack(states)[step, column],
        trajectory.times[step],
        trajectory.network_times[step].astype(np.float32),
        conditioning,
        np.full(len(step), weight, np.float32),
        {},
    )


def load_calibration(
    path: Path, *, checkpoint_sha256: str, data_shape: Sequence[int], conditions: Sequence[Condition]
) -> CalibrationData:
    """Read calibration data and hold it against the model that it is for.

    Args:
        path: what ``CalibrationData.save`` wrote.
        checkpoint_sha256, data_shape, conditions: the model's.

    Raises:
        InputError: no calibration file, damaged, of another model, too few samples, or samples that are all alike.
    """
    data = _read(path)
    found = data.facts.get("checkpoint_sha256")
    if data.x.shape[1:] != tuple(data_shape):
        raise InputError(
            f"{path} holds samples of shape {list(data.x.shape[1:])}; the model takes {list(data_shape)}", _AGAIN
        )
    if found != checkpoint_sha256:
        raise InputError(
            f"{path} is of another model: its checkpoint's sha256 is {str(found)[:12]}..., "
            f"expected {checkpoint_sha256[:12]}...",
            _AGAIN,
        )
    told = {each.name: each for each in conditions}
    if data.conditioning.keys() != told.keys():
        words = " and ".join(", ".join(names) or "nothing" for names in (data.conditioning, told))
        raise InputError(f"{path} and the model differ in what the network is told: {words}", _AGAIN)
    for name, rows in data.conditioning.items():
        if not _fits(rows, told[name]):
            raise InputError(f"{path}: its {_NAMES.get(name, name)} do not fit a model of {_words(told[name])}", _AGAIN)
    if len(data) < MIN_SAMPLES:
        raise InputError(f"{path} holds {len(data)} samples; expected at least {MIN_SAMPLES}", _AGAIN)
    if np.ptp(data.x, axis=0).max() == 0:
        raise InputError(f"{path}: all of its samples are the same: they say nothing of activation ranges", _AGAIN)
    if np.ptp(data.times) == 0:
        raise InputError(f"{path}: its samples are all of the time {data.times[0]:g}: ranges change over time", _AGAIN)
    return data


def _fits(rows: np.ndarray, condition: Condition) -> bool:
    if rows.dtype != condition.dtype or rows.shape[1:] != condition.shape:
        return False
    return condition.classes is None or bool(((rows >= 0) & (rows < condition.classes)).all())


def _words(condition: Condition) -> str:
    if condition.classes is not None:
        return f"{condition.classes} classes"
    return f"{condition.name} {condition.dtype} {list(condition.shape)}"


_NAMES = {LABELS: "labels"}
_AGAIN = "make it for this model: sparse-engine calibrate CHECKPOINT -o calib.npz"


def _read(path: Path) -> CalibrationData:
    members = read_arrays(path, "no calibration file", _AGAIN, times=MOST_PACKED)  # states are noisy and hardly pack
    try:
        facts = parsed_json(str(members["facts"]))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is no calibration file: {error}", _AGAIN) from error
    if not isinstance(facts, dict):
        raise InputError(f"{path} is no calibration file: its facts are no mapping", _AGAIN)
    arrays: dict[str, Any] = {name: members.get(name) for name in ARRAYS}
    told = {name.removeprefix(TOLD): array for name, array in members.items() if name.startswith(TOLD)}
    if facts.get("format") == OLD_FORMAT and "labels" in members:
        told[LABELS] = members["labels"]
    if facts.get("format") not in (FORMAT, OLD_FORMAT):
        raise InputError(f"{path} is no calibration file of the format {FORMAT}", _AGAIN)
    x = arrays["x"]
    if not isinstance(x, np.ndarray) or x.ndim != 4:
        raise InputError(f"{path} is incomplete: it holds no x [N, C, H, W]", _AGAIN)
    for name, array in {**arrays, **told}.items():
        flat = name in ARRAYS and name != "x"
        if not isinstance(array, np.ndarray) or array.shape[:1] != x.shape[:1] or (flat and array.ndim != 1):
            raise InputError(f"{path} is incomplete: {name} is missing or cut short", _AGAIN)
        if name in ARRAYS and array.dtype != ARRAYS[name]:
            raise InputError(f"{path}: {name} is {array.dtype}; expected {np.dtype(ARRAYS[name])}", _AGAIN)
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values", _AGAIN)
    return CalibrationData(**arrays, conditioning=told, facts=facts)
