"""What a network is told beside x and t: a family declares it, the manifest carries it, and no runner knows a name.

A condition is one named input with a row for each image and each pass of guidance, [G, B, *shape]. The first pass is
told what the caller wants, the second what "none" is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine import arguments, sampling
from sparse_engine.errors import OptionError
from sparse_engine.files import read_arrays

LABELS = "y"  # the condition that ``labels=`` of the public functions stands for
DTYPES = ("int64", "float32")
NULLS = ("stored", "zeros", "ones", "same")  # beside a class's number, and None
NEGATIVE = "negative/"  # before the names of the second pass's rows in a file
LARGEST_FILE = 8 << 30  # bytes that a file of rows may unpack to: 2,000 contexts of SD3
_FILLED = {"zeros": 0.0, "ones": 1.0}


@dataclass(frozen=True)
class Condition:
    """One thing that a network is told.

    Attributes:
        name: of the step graph's input, and of the argument of the network's ``forward``.
        shape: of one row; [] is a label.
        dtype: "int64" or "float32".
        classes: of labels, how many rows the table has, the null class too; None for what is no label.
        null: what the second pass of guidance is told where the caller says nothing: a class; "stored", an array that
            the engine has; "zeros" or "ones"; "same", as the first pass; None: the caller has to say.
        default: what a row that is not given holds, for what may be left out (1 for a mask); None: labels are drawn
            from the seed, all else has to be given.
        mask: name of the condition that says which positions of this one count, so that a shorter row can be filled up.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    classes: int | None = None
    null: int | str | None = None
    default: float | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def stored(self) -> str:
        """The engine's file that holds the null row, where ``null`` is "stored"."""
        return f"null/{self.name}.npy"

    @property
    def needed(self) -> bool:
        """Whether callers have to say it: it is no label, and has no default."""
        return self.classes is None and self.default is None

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return dataclasses.asdict(self)


def is_condition(entry: Any) -> bool:
    """Whether it is what ``Condition.to_dict`` gives; readers of manifests take it apart without looking."""

    def whole(value: Any, least: int = 0) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53

    if not isinstance(entry, dict) or entry.keys() != {field.name for field in dataclasses.fields(Condition)}:
        return False
    classes, null, default = entry["classes"], entry["null"], entry["default"]
    return (
        isinstance(entry["name"], str)
        and entry["name"].isidentifier()
        and isinstance(entry["shape"], list | tuple)
        and all(whole(size, 1) for size in entry["shape"])
        and entry["dtype"] in DTYPES
        and (classes is None or whole(classes, 1))
        and (null is None or null in NULLS or (classes is not None and whole(null) and null < classes))
        and (default is None or (isinstance(default, int | float) and not isinstance(default, bool)))
        and isinstance(entry["mask"], str | None)
    )


def classes_of(conditions: Iterable[Condition]) -> int:
    """Rows of the label table, the null class too; 0 for a network that is told no label."""
    return next((each.classes for each in conditions if each.classes is not None), 0)


def class_condition(classes: int, null: int | None = None) -> tuple[Condition, ...]:
    """The labels of a class-conditional model; of one without classes, nothing."""
    return (Condition(LABELS, (), "int64", classes=classes, null=null),) if classes else ()


def zeros_for(conditions: Iterable[Condition]) -> dict[str, np.ndarray]:
    """A row of zeros for each thing that callers have to say: where what comes out is timed, and not looked at."""
    return {each.name: np.zeros(each.shape, each.dtype) for each in conditions if each.needed}


@dataclass(frozen=True)
class Rows:
    """What a network is told for some images.

    Attributes:
        arrays: name -> [G, n, *shape].
        weights: float32 [G], of the G passes.
    """

    arrays: Mapping[str, np.ndarray]
    weights: np.ndarray

    def of(self, rows: Any) -> Rows:
        """The same for some of the images, each array contiguous."""
        return Rows({name: np.ascontiguousarray(array[:, rows]) for name, array in self.arrays.items()}, self.weights)


class Conditioning:
    """The conditions of one engine: from what a caller says to what its runner is given.

    Args:
        conditions: what the network is told, in the order of the step graph's inputs.
        nulls: name -> the row [*shape] of the conditions whose null is "stored".
    """

    def __init__(self, conditions: Sequence[Condition], nulls: Mapping[str, np.ndarray] | None = None) -> None:
        self._conditions = {condition.name: condition for condition in conditions}
        self._nulls = dict(nulls or {})

    def rows(
        self,
        n: int,
        *,
        labels: Any = None,
        conditioning: Mapping[str, Any] | None = None,
        negative: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        draw: tuple[Any, np.ndarray] | None = None,
    ) -> Rows:
        """Check what a caller says, and lay it out.

        Args:
            n: images.
            labels: short for ``conditioning={"y": ...}``: one class, or n of them.
            conditioning: name -> a row for all, or [n, *shape].
            negative: the same, for the second pass.
            guidance: weight w; None or 1 is one pass.
            draw: (seeds, images): labels that are not given are drawn for these; None tells them the null class, or
                class 0 where there is none.

        Raises:
            OptionError: a name that the model does not have, one given twice or missing, or an array that does not fit.
        """
        given = self._named("conditioning", conditioning)
        if labels is not None:
            self._check_labels(labels, given)
            given[LABELS] = labels
        refused = self._named("negative", negative)
        weight = 1.0 if guidance is None else arguments.real_number("guidance", guidance, arguments.MOST_GUIDANCE)
        if weight == 1.0 and refused:
            raise OptionError(
                "negative is given without guidance: the second pass has no weight", "say how much with guidance="
            )
        if weight != 1.0 and not self._conditions:
            raise OptionError(f"guidance = {guidance}, but the model is told nothing", "leave guidance out")
        arrays = self._laid_out("conditioning", given, n)
        for name, condition in self._conditions.items():
            if name not in arrays:
                arrays[name] = self._default(condition, n, draw)
        if weight == 1.0:
            return Rows({name: arrays[name][None] for name in self._conditions}, np.ones(1, np.float32))
        second = self._laid_out("negative", refused, n)
        for name, condition in self._conditions.items():
            if name not in second:
                second[name] = self._null(condition, arrays[name], bool(refused), guidance)
        both = {name: np.stack([arrays[name], second[name]]) for name in self._conditions}
        return Rows(both, np.array([weight, 1.0 - weight], np.float32))

    def _named(self, argument: str, values: Any) -> dict[str, Any]:
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            raise arguments.refused(argument, values, "a mapping such as {'context': array}")
        for name in values:
            if name not in self._conditions:
                told = ", ".join(self._conditions) or "nothing"
                raise OptionError(f"{argument}[{name!r}]: the model is not told that; it is told {told}")
        return dict(values)

    def _check_labels(self, labels: Any, given: Mapping[str, Any]) -> None:
        if LABELS in given:
            raise OptionError(f"labels and conditioning[{LABELS!r}] are the same thing said twice", "give one of them")
        if LABELS not in self._conditions:
            told = ", ".join(self._conditions)
            what = f"is told {told} and no label" if told else "is unconditional"
            raise OptionError(f"labels are given, but the model {what}", "leave labels out")

    def _laid_out(self, argument: str, given: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
        """name -> [n, *shape]; of a row that was filled up, its mask too."""
        arrays: dict[str, np.ndarray] = {}
        for name, value in given.items():
            condition = self._conditions[name]
            where = f"{argument}[{name!r}]"
            if condition.classes is not None:
                label = "labels" if argument == "conditioning" else where
                arrays[name] = arguments.class_labels(value, n, condition.classes, label)
                continue
            array = arguments.condition(where, value, condition.dtype)
            axis, (most, *rest) = array.ndim - len(condition.shape), condition.shape or (0,)
            length = array.shape[axis] if axis >= 0 and array.shape[axis + 1 :] == tuple(rest) else 0
            if condition.mask is not None and condition.mask not in given and 0 < length < most:
                mask = (np.arange(most) < length).astype(np.float32)
                arrays[condition.mask] = np.broadcast_to(mask, (n, most)).copy()
                array = np.pad(array, [(0, most - length if each == axis else 0) for each in range(array.ndim)])
            arrays[name] = _fitted(where, array, condition, n)
        return arrays

    def _default(self, condition: Condition, n: int, draw: tuple[Any, np.ndarray] | None) -> np.ndarray:
        if condition.classes is not None:
            null = condition.null if isinstance(condition.null, int) else None
            if draw is None:
                return np.full(n, null or 0, np.int64)
            drawn = sampling.labels(*draw, condition.classes - (null is not None))
            return drawn if null is None else drawn + (drawn >= null)
        if condition.needed:
            expected = f"{condition.dtype} {list(condition.shape)} for all images, or {[n, *condition.shape]}"
            raise OptionError(
                f"conditioning[{condition.name!r}] is missing, and the model has to be told it; expected {expected}",
                f"pass conditioning={{{condition.name!r}: array}}",
            )
        return np.full((n, *condition.shape), condition.default, condition.dtype)

    def _null(self, condition: Condition, first: np.ndarray, said: bool, guidance: Any) -> np.ndarray:
        """What the second pass is told of a condition that ``negative`` does not name."""
        null = condition.null
        if null is None:
            what = f"is told {condition.name} and has no null for it"
            if condition.classes is not None:
                what = "has no null class"
            raise OptionError(
                f"guidance = {guidance}, but the model {what}",
                "leave guidance out, or rebuild with --null-class"
                if condition.classes is not None
                else f"pass negative={{{condition.name!r}: array}}, or leave guidance out",
            )
        if null == "same":
            return first
        if null == "stored":
            return np.broadcast_to(self._nulls[condition.name], first.shape).astype(first.dtype)
        return np.full_like(first, null if isinstance(null, int) else _FILLED[null])


def read_conditioning(path: Path | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a ``.npz`` file says: (conditioning, negative), as ``rows`` takes them; ``negative/NAME`` is of the second.

    Raises:
        InputError: it is missing, no such file, or holds objects.
    """
    if path is None:
        return {}, {}
    fix = "save it with numpy.savez(path, context=array), and 'negative/context' for the second pass of guidance"
    found = read_arrays(path, "no .npz file of arrays", fix, most=LARGEST_FILE)
    second = {name: array for name, array in found.items() if name.startswith(NEGATIVE)}
    return (
        {name: array for name, array in found.items() if name not in second},
        {name.removeprefix(NEGATIVE): array for name, array in second.items()},
    )


def _fitted(where: str, array: np.ndarray, condition: Condition, n: int) -> np.ndarray:
    """[n, *shape] of a row for all, or of n of them. Raises OptionError."""
    for shape in ((n, *condition.shape), (1, *condition.shape), condition.shape):
        if array.shape == shape:
            return np.ascontiguousarray(np.broadcast_to(array, (n, *condition.shape)))
    expected = f"{list(condition.shape)} for all images, or {[n, *condition.shape]}"
    found = list(array.shape)
    axis = array.ndim - len(condition.shape)
    longer = axis in (0, 1) and len(condition.shape) and array.shape[axis] > condition.shape[0]
    raise OptionError(
        f"{where} has shape {found}; expected {expected}",
        f"the engine's length is {condition.shape[0]}: cut it, or rebuild with --context-length {array.shape[axis]}"
        if longer and len(condition.shape) > 1 and array.shape[axis + 1 :] == condition.shape[1:]
        else None,
    )
