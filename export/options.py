"""What a build is told, one object for each concern; ``BuildOptions`` and ``Quantisation`` are the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_engine import arguments

from .masks import TWO_FOUR, Pattern


@dataclass(frozen=True)
class ModelOptions:
    """What a checkpoint does not say of its model, or says wrongly. None is not given.

    Attributes:
        family: a family's name; read off the keys by default.
        heads: of attention.
        null_class: the label that stands for "no label".
        schedule: a name, or a mapping that ``sampling.schedule_from_dict`` takes.
        prediction: "eps", "x0", "v" or "flow".
        value_range: of pixels.
        sampler: the one to use where none is named.
        image_size: side of what the network draws, where the family leaves it open.
        context_length: rows of a context, where the family leaves them open.
        guidance_channels: "all", or how many channels guidance acts on.
    """

    family: str | None = None
    heads: int | None = None
    null_class: int | None = None
    schedule: str | Mapping[str, Any] | None = None
    prediction: str | None = None
    value_range: tuple[float, float] | None = None
    sampler: str | None = None
    image_size: int | None = None
    context_length: int | None = None
    guidance_channels: int | str | None = None

    def given(self) -> dict[str, Any]:
        """Those that are given, but for the family, as ``load_model`` takes them."""
        values = {field.name: arguments.plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and name != "family"}


@dataclass(frozen=True)
class MaskOptions:
    """How weights are masked.

    Attributes:
        rule: for ``bake``; None is "auto" for a sparse build and "none" for a dense one.
        pattern: N:M of the magnitude rule; only 2:4 has sparse kernels.
        layers: globs in place of the family's choice of layers.
    """

    rule: str | None = None
    pattern: Pattern = TWO_FOUR
    layers: Sequence[str] | None = None
