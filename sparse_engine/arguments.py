"""What callers pass in or hand back, as the types that the code behind works with.

Every number, truth value, path and array of the public API comes through here, so that NumPy's and PyTorch's scalars
count as what they are, and what is none is refused in one way: the argument's name, what was found, what was expected.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_engine.errors import OptionError

MOST_IMAGES = 2**32  # an image's number is one word of the noise's counter
MOST_SEED = 2**64 - 1
MOST_THREADS = 4096
MOST_GUIDANCE = 1e6  # far beyond any that draws a picture, and far from float32's end
SHOWN = 80  # characters of a value in an error


def refused(name: str, value: object, expected: str, fix: str | None = None) -> OptionError:
    """The error for an argument that cannot be used."""
    try:
        words = " ".join(repr(value).split())
    except Exception:  # of a caller's own class
        words = f"a {type(value).__name__}"
    return OptionError(f"{name} = {words if len(words) <= SHOWN else words[:SHOWN] + '...'}; expected {expected}", fix)


def whole_number(
    name: str, value: Any, least: int | None = None, most: int | None = None, expected: str | None = None
) -> int:
    """An int, NumPy's of any width, a 0-d array of them, or what else has ``__index__``; no bool, no 2.0.

    Args:
        name: of the argument, for errors.
        value: what was passed.
        least, most: the ends of what will do.
        expected: what to say was expected; None says it by ``least`` and ``most``.

    Raises:
        OptionError: it is none, or out of range.
    """
    said = expected or "a whole number" + ("" if least is None else f" of {least} or more")
    if is_truth(value):
        raise refused(name, value, said)
    try:
        number = operator.index(value)
    except Exception as error:  # a caller's own class raises anything
        raise refused(name, value, said) from error
    if least is not None and number < least:
        raise refused(name, number, said)
    if most is not None and number > most:
        raise refused(
            name,
            number,
            expected or f"at most {most}" + ("" if most != MOST_IMAGES else ", the images that a seed has"),
        )
    return number


def real_number(name: str, value: Any, most: float = math.inf, *, above: float = -math.inf) -> float:
    """An int, a float, NumPy's, a 0-d array or tensor of them, or what else has ``__float__``; no bool, no string.

    Raises:
        OptionError: it is none, not finite, larger than ``most`` in size, or not ``above``.
    """
    said = "a number" if above == -math.inf else f"a number above {above:g}"
    try:
        if is_truth(value) or isinstance(value, (str, bytes, bytearray)) or _rank(value):
            raise TypeError(f"a {type(value).__name__}")
        number = float(value)
    except OverflowError as error:
        raise refused(name, value, "a finite number") from error
    except Exception as error:  # a caller's own class raises anything
        raise refused(name, value, said) from error
    if not number > above and above > -math.inf:
        raise refused(name, number, said)
    if not math.isfinite(number) or abs(number) > most:
        raise refused(name, number, "a finite number" + ("" if most == math.inf else f", at most {most:.0e}"))
    return number


def real_numbers(name: str, values: Any) -> tuple[float, ...]:
    """One number or several, as ``real_number`` takes them; one or more."""
    if isinstance(values, (str, bytes)) or not (isinstance(values, Iterable) and _rank(values, 1)):
        return (real_number(name, values),)
    found = tuple(real_number(f"{name}[{index}]", value) for index, value in enumerate(values))
    if not found:
        raise refused(name, values, "one number or more")
    return found


def whole_numbers(name: str, values: Any, least: int | None = None) -> tuple[int, ...]:
    """Several whole numbers, as ``whole_number`` takes them."""
    if isinstance(values, (str, bytes)) or not (isinstance(values, Iterable) and _rank(values, 1)):
        raise refused(name, values, "whole numbers")
    return tuple(whole_number(f"{name}[{index}]", value, least) for index, value in enumerate(values))


def plain(value: Any) -> Any:
    """NumPy's scalars as Python's own; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_truth(value: Any) -> bool:
    """Whether it is a truth value: Python's, NumPy's, or an array or tensor of them."""
    return isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def truth(name: str, value: Any) -> bool:
    """True or False, NumPy's and PyTorch's too. Raises OptionError on anything else."""
    if not is_truth(value) or _rank(value):
        raise refused(name, value, "True or False")
    return bool(value)


def stops(answer: Any) -> bool:
    """Whether a callback's answer stops its caller: False does, NumPy's and PyTorch's too, and nothing else does."""
    return is_truth(answer) and not _rank(answer) and not answer


def _rank(value: Any, otherwise: int = 0) -> int:
    """An array's number of dimensions; ``otherwise`` of what has none."""
    return int(getattr(value, "ndim", otherwise))


def one_of(name: str, value: Any, names: Sequence[str]) -> str:
    """One of several names. Raises OptionError on anything else."""
    if not isinstance(value, str) or value not in names:
        raise refused(name, value, f"one of {', '.join(names)}")
    return value


def path(name: str, value: Any) -> Path:
    """A path: a string, bytes as the system has them, or an object with ``__fspath__``. Raises OptionError."""
    try:
        text = os.fsdecode(value)
    except (TypeError, ValueError) as error:  # bytes that are no name are a ValueError
        raise refused(name, value, "a path") from error
    if not text or "\0" in text:
        raise refused(name, value, "the name of a file or folder")
    return Path(text)


def seed(value: Any) -> int:
    """A seed. Raises OptionError."""
    return whole_number("seed", value, 0, MOST_SEED, "a whole number from 0 to 2**64 - 1")


def seeds(value: Any, count: int) -> int | npt.NDArray[np.uint64]:
    """One seed, or ``count`` of them -> int, or uint64 [count]. Raises OptionError."""
    if isinstance(value, (str, bytes)) or not (isinstance(value, Iterable) and _rank(value, 1)):
        return seed(value)
    if isinstance(value, np.ndarray) and value.dtype == np.uint64 and value.ndim == 1:
        found = value  # any of them is a seed: asked for anew at every draw
    else:
        found = np.array([whole_number(f"seed[{i}]", each, 0, MOST_SEED) for i, each in enumerate(value)], np.uint64)
    if len(found) != count:
        raise OptionError(f"seed holds {len(found)} seeds for {count} images; expected one, or one for each")
    return found


def image_numbers(value: Any, first: Any, count: int, one_seed: bool) -> npt.NDArray[np.int64]:
    """Which image of its seed each row is: as given, or from ``first`` on; of a seed each, ``first`` of all.

    Args:
        value: ``count`` numbers, or None.
        first: the first of them where they are not given.
        count: rows.
        one_seed: whether all rows are of one seed.

    Returns:
        int64 [count], below 2**32.

    Raises:
        OptionError: they are none, more or fewer, out of range, or said twice.
    """
    begin = whole_number("first", first, 0, MOST_IMAGES - 1)
    if value is None:
        if one_seed and begin + count > MOST_IMAGES:
            raise refused("first", begin, f"{count} images from it on within the {MOST_IMAGES} that a seed has")
        return begin + np.arange(count) if one_seed else np.full(count, begin)
    if begin:
        raise OptionError("first and images both say which images to draw", "give one of them")
    found = array("images", value, "array of integers: {}")
    if found.dtype.kind not in "iu" or found.shape != (count,):
        raise OptionError(f"images has shape {list(found.shape)} of {found.dtype}; expected {count} whole numbers")
    if found.size and (found.min() < 0 or found.max() >= MOST_IMAGES):
        raise OptionError(f"images runs from {found.min()} to {found.max()}; expected 0 <= image < 2**32")
    return found.astype(np.int64)


def threads(value: Any) -> int | None:
    """A number of threads that a machine can have; None stays None, for the backend's own choice."""
    if value is None:
        return None
    expected = f"1 to {MOST_THREADS}, a whole number, or None for the backend's own choice"
    return whole_number("threads", value, 1, MOST_THREADS, expected)


def device(value: Any) -> str | None:
    """A device by its name; None stays None. Raises OptionError."""
    if value is None or (isinstance(value, str) and value):
        return value
    raise refused("device", value, 'a name such as "cpu" or "cuda:0", or None for the backend\'s own choice')


def floats(name: str, value: Any, expected: str) -> npt.NDArray[np.float32]:
    """An array of floating-point numbers of any width and byte order, or nested lists, as contiguous float32.

    Raises:
        OptionError: it is none, of another type, or holds masked, NaN or infinite values.
    """
    found = array(name, value, f"array of numbers: {{}}; expected {expected}")
    if found.dtype.kind in "iub":
        raise OptionError(
            f"{name} is {found.dtype}; expected floating-point numbers, {expected}",
            "of a picture in 0..255: x / 127.5 - 1 for a model of the range -1..1" if found.dtype == np.uint8 else None,
        )
    if not np.issubdtype(found.dtype, np.floating) and found.dtype.name not in ("bfloat16", "float8_e4m3fn"):
        raise OptionError(f"{name} is no array of numbers: it is {found.dtype}; expected {expected}")
    with np.errstate(over="ignore", invalid="ignore"):  # found just below
        converted = np.ascontiguousarray(found, np.float32).reshape(found.shape)  # a number is not made a row of one
    if not np.isfinite(converted).all():
        raise OptionError(f"{name} holds NaN or infinite values")
    return converted


def schedule_times(value: Any, count: int, latest: float) -> npt.NDArray[np.float64]:
    """Schedule times in [0, latest], one or ``count`` of them: a number, a list, an array or a tensor -> float64.

    Raises:
        OptionError: they are none, out of range, or more or fewer.
    """
    found = array("t", value, "number or array of them: {}")
    if found.dtype.kind not in "iuf" and found.dtype.name != "bfloat16":
        raise refused("t", value, f"schedule times from 0 to {latest:g}")
    times = found.astype(np.float64)
    if times.shape not in ((), (count,)):
        raise OptionError(f"t has shape {list(times.shape)}; expected one time, or one for each of {count}")
    if not np.all((times >= 0) & (times <= latest)):  # nor NaN
        raise refused("t", value, f"schedule times from 0 to {latest:g}")
    return times


def network_times(value: Any, count: int) -> npt.NDArray[np.float32]:
    """Times in a network's own units, one or ``count`` of them -> float32. Raises OptionError."""
    times = condition("t", value, "float32")
    if times.shape not in ((), (count,)):
        raise OptionError(f"t has shape {list(times.shape)}; expected one time, or one for each of {count}")
    return times


def class_labels(value: Any, count: int, classes: int, name: str = "labels") -> npt.NDArray[np.int64]:
    """One label or ``count`` of them, of any integer type -> int64 [count].

    Raises:
        OptionError: they are none, more or fewer, or no classes of the model.
    """
    y = array(name, value, f"array: {{}}; expected one label or {count} of them")
    verb, has = ("are", "have") if name == "labels" else ("is", "has")
    if y.dtype.kind not in "iu":
        raise OptionError(f"{name} {verb} {y.dtype}; expected integers")
    if y.ndim > 1 or (y.ndim == 1 and len(y) != count):
        raise OptionError(f"{name} {has} shape {list(y.shape)}; expected one label or {count} of them")
    if y.size and (y.min() < 0 or y.max() >= classes):
        bad = y.min() if y.min() < 0 else y.max()
        raise OptionError(f"label {bad} is out of range; the model has classes 0 to {classes - 1}")
    return np.broadcast_to(y.astype(np.int64), (count,)).copy()


def condition(name: str, value: Any, dtype: str) -> npt.NDArray[Any]:
    """What a network is told, of any width -> the type it is told in; whole numbers and truth values count as floats.

    Raises:
        OptionError: it is no array of such numbers, or holds masked, NaN or infinite values.
    """
    found = array(name, value, f"array of numbers: {{}}; expected {dtype}")
    if found.dtype.kind in "iub":
        return found.astype(dtype)
    if dtype != "float32":
        raise OptionError(f"{name} is {found.dtype}; expected integers")
    return floats(name, found, "float32")


def array(name: str, value: Any, refusal: str) -> npt.NDArray[Any]:
    """NumPy's view of anything; ``refusal`` says what it is not, with a place for the reason."""
    verb = "are" if name == "labels" else "is"
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise OptionError(f"{name} {verb} masked in places", "fill them first, with value.filled(...)")
        value = value.data
    try:
        return np.asarray(value)
    except Exception as error:  # __array__ of another library raises anything
        raise OptionError(f"{name} {verb} no {refusal.format(error)}") from error
