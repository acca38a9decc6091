"""From the last state of a batch to what the caller asked for: looked through for NaN, decoded, as pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.backends.base import StepCallback
from sparse_engine.backends.cuda.dlpack_in import DeviceArray, receive
from sparse_engine.errors import NonFiniteError, OptionError, SamplingCancelled, SparseEngineError
from sparse_engine.sampling import Schedule, Trajectory
from sparse_engine.sampling.trajectory import model_form

Decoder = Callable[[np.ndarray], np.ndarray]
Finish = Callable[[Any, np.ndarray], Any]  # (a batch's last state, which images of the run they are) -> the result
OUTPUTS = ("uint8", "float", "dlpack")
MOST_NAMED = 4  # images in an error
HIDDEN = 'output="float" with allow_nonfinite=True returns it as it is'


def finisher(
    output: str, decoder: Decoder | None, value_range: tuple[float, float] | None, allow_nonfinite: bool
) -> Finish:
    """What turns a finished batch into what was asked for; arguments as ``SparseEngine.sample`` takes them.

    Raises:
        OptionError: the arguments do not go together.
    """
    arguments.one_of("output", output, OUTPUTS)
    if allow_nonfinite and output == "uint8":
        raise OptionError('allow_nonfinite is given, and output="uint8" has no NaN', 'pass output="float" too')
    if decoder is None:
        if output == "uint8" and value_range is None:
            raise OptionError(
                "this is a latent model: its samples have no pixels",
                'pass output="float" for the latents, or decoder= to turn them into pixels',
            )
        return lambda x, images: x if output != "uint8" or value_range is None else to_uint8(x, value_range)
    if output == "dlpack":
        raise OptionError('a decoder takes NumPy arrays, and output="dlpack" makes none', "decode what it returns")
    if not callable(decoder):
        raise arguments.refused("decoder", decoder, "a function of latents [B, C, H, W]")

    def finish(x: np.ndarray, images: np.ndarray) -> np.ndarray:
        pixels = decoded(decoder, x)
        broken = nonfinite_rows(pixels)
        if len(broken) and not allow_nonfinite:
            raise NonFiniteError(
                f"the decoder gave NaN or infinite values for {_named(images[broken])}, of latents that are finite",
                f"run the decoder in float32; {HIDDEN}",
                tuple(images[broken].tolist()),
            )
        return pixels if output == "float" else to_uint8(pixels, (-1.0, 1.0))

    return finish


def decoded(decoder: Decoder, x: np.ndarray) -> np.ndarray:
    """A decoder's pixels, float32 [B, C, H, W]. Raises OptionError where it returned anything else."""
    found = arguments.array("the decoder's result", decoder(x), "array: {}; expected pixels [B, C, H, W]")
    if found.dtype.kind != "f" and found.dtype.name != "bfloat16":
        raise OptionError(f"the decoder returned {found.dtype}; expected floating-point pixels in -1..1")
    if found.ndim != 4 or len(found) != len(x) or not found.size:
        raise OptionError(
            f"the decoder returned shape {list(found.shape)} for latents of shape {list(x.shape)}; "
            f"expected [{len(x)}, C, H, W]"
        )
    with np.errstate(over="ignore"):  # looked for by the caller
        return np.ascontiguousarray(found, np.float32)


def to_uint8(x: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """float [B, C, H, W] in a range, all of it finite -> uint8 [B, H, W, C], rounded and clipped."""
    low, high = value_range
    scaled = (x - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def nonfinite_rows(x: Any) -> np.ndarray:
    """Which rows of a batch hold NaN or infinite values; of one on a GPU by way of a copy to the host."""
    array: Any = x if isinstance(x, np.ndarray) else receive("the result", x, None)
    return np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))


def check_prediction(predicted: np.ndarray, t: np.ndarray) -> None:
    """Raise NonFiniteError where a network evaluation gave NaN or infinite values."""
    broken = nonfinite_rows(predicted)
    if len(broken):
        first = float(np.broadcast_to(t, (len(predicted),))[broken[0]])
        raise NonFiniteError(
            f"the prediction is NaN or infinite for sample {_numbers(broken)} of {len(predicted)}, t = {first:g}",
            "try a build in fp32 or bf16, or a smaller x; allow_nonfinite=True returns it as it is",
            tuple(broken.tolist()),
        )


def noise_seen(
    prediction: str, schedule: Schedule, x: np.ndarray, predicted: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """eps [B, C, H, W] of a network that predicts x0, v or flow at ``times`` above 0 (see ``sampling.model_form``)."""
    with np.errstate(over="ignore", invalid="ignore"):  # looked for by the caller
        of_x, of_prediction = (
            np.reshape(each, (-1, 1, 1, 1)) for each in model_form(schedule, times, prediction, "eps")
        )
        eps: np.ndarray = (of_x * x + of_prediction * predicted).astype(np.float32)
    return eps


def diverged(
    walk: Callable[[StepCallback], object],
    trajectory: Trajectory,
    start: np.ndarray | DeviceArray,
    images: np.ndarray,
    broken: np.ndarray,
    precision: str,
) -> SparseEngineError:
    """The error for a batch whose last state is not finite.

    Args:
        walk: draws the batch once more, calling back after each step, to find where it began.
        trajectory: of the batch.
        start: its first state. One that was left on a GPU has not been looked through yet.
        images: which of the run they are, [B].
        broken: rows of the last state that are not finite.
        precision: the engine's.
    """
    if isinstance(start, DeviceArray) and len(nonfinite_rows(start.owner)):
        return OptionError("noise holds NaN or infinite values")
    step, rows = _first_broken(walk)
    at = "in the end, though not when drawn again step by step"
    if step is not None:
        at, broken = f"at step {step + 1} of {len(trajectory)} (t = {trajectory.times[step]:.3g})", rows
    other = "" if precision == "fp32" else "a build in fp32 or bf16, " if precision != "bf16" else "a build in fp32, "
    return NonFiniteError(
        f"{_named(images[broken])} became NaN or infinite {at} of sampler {trajectory.sampler}",
        f"try {other}a lower guidance, more steps, or another sampler",
        tuple(images[broken].tolist()),
        step,
    )


def _first_broken(walk: Callable[[StepCallback], object]) -> tuple[int | None, np.ndarray]:
    """The first step after which some rows are not finite, and those rows.

    A batch that a device cannot hold is walked in parts, one after the other, each from step 0 on.
    """
    found: list[tuple[int, np.ndarray]] = []
    first, size = 0, 0

    def look(step: int, t: float, x: np.ndarray) -> bool:
        nonlocal first, size
        if step == 0:
            first, size = first + size, len(x)
        rows = nonfinite_rows(x)
        if len(rows):
            found.append((step, first + rows))
        return not len(rows)

    try:
        walk(look)
    except SamplingCancelled:
        return found[0]
    return None, np.empty(0, np.int64)


def _named(images: np.ndarray) -> str:
    return f"image{'s' if len(images) > 1 else ''} {_numbers(images)}"


def _numbers(numbers: np.ndarray) -> str:
    named = ", ".join(str(number) for number in numbers[:MOST_NAMED].tolist())
    return named if len(numbers) <= MOST_NAMED else f"{named} and {len(numbers) - MOST_NAMED} more"
