"""What a model family has to offer, so that the rest of the code never asks which one it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
from torch import nn

from sparse_engine.conditioning import Condition

Shapes = Mapping[str, tuple[int, ...]]


class FamilyConfig(Protocol):
    """Everything that fixes a family's graph: a frozen dataclass."""

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of one sample, [C, H, W]."""
        ...

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What the network is told beside x and t, in the order of the step graph's inputs."""
        ...

    @property
    def guided_channels(self) -> int | None:
        """How many of x's channels guidance acts on, the first; None is all. The others take the first pass's."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredConfig:
    """What all configurations share: they are read out of manifests."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a configuration from a mapping; keys that are not its own are left alone."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    @property
    def guided_channels(self) -> int | None:
        """See ``FamilyConfig``."""
        return None


@dataclasses.dataclass(frozen=True)
class SquareConfig(StoredConfig):
    """What the configurations of networks over the patches of a square image share."""

    image_size: int
    patch_size: int
    channels: int

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Shape of one sample, [C, H, W]."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def patches(self) -> int:
        """Tokens of the image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model was trained, as far as sampling has to know. Nothing of this can be read off the weights.

    ``value_range`` is None for latents, which have no pixels. ``schedule`` is a name or a mapping that
    ``sampling.schedule_from_dict`` takes. ``excluded`` says of a sampler why it is not offered. ``null_class`` becomes
    the null of the condition "y". ``unknown`` says why schedule and prediction have to be said, where no training
    stands out.
    """

    schedule: str | Mapping[str, Any] = "vp-linear"
    prediction: str = "eps"
    value_range: tuple[float, float] | None = (-1.0, 1.0)
    null_class: int | None = None
    sampler: str = "dpm-solver"
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: str | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A family's weights as another project stores them.

    Attributes:
        names: a tensor's name there -> the network's own, for those that differ.
        shapes: the network's own name -> shape, for those that differ.
        settings: what that project's networks are, of what the weights do not say; a given setting wins.
        notes: for the user to read.
    """

    names: Mapping[str, str]
    shapes: Shapes = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as it stands in manifests and in ``--family``.
        sparse_layers: globs over module names: the layers that SparseDM masks.
        recognises: whether a state dict's shapes are this family's.
        read_config: (shapes, given) -> (configuration, notes). ``given`` holds what the user or a stored
            configuration says and wins over a default; where it contradicts the shapes, CheckpointError.
        config_from_dict: the configuration out of a manifest.
        network: configuration -> module with the checkpoint's own key names and forward(x, t, **conditions), x [B, C,
            H, W], t float32 [B], each condition [B, *shape] -> [B, C or more, H, W]; channels beyond C are cut.
        recipe: configuration -> how the family's published models were trained.
        float32_layers: globs over module names: the layers that stay float32 in a lower precision. What runs between
            layers runs in the network's attribute ``dtype``, which ``precision.lower`` sets.
        settings: the names that ``read_config`` understands in ``given``.
        remarks: (configuration, name -> array) -> notes on the weights themselves, for the user to read.
        positions: (configuration, layer name) -> how often a layer's weights are applied to one sample.
        class_names: what diffusers calls the family's networks in ``config.json``, as ``class_of`` has it.
        layout: shapes -> how the names and shapes of a known other project differ from the network's; None where they
            do not.
    """

    name: str
    sparse_layers: tuple[str, ...]
    recognises: Callable[[Shapes], bool]
    read_config: Callable[[Shapes, Mapping[str, Any]], tuple[Any, list[str]]]
    config_from_dict: Callable[[Mapping[str, Any]], Any]
    network: Callable[[Any], nn.Module]
    recipe: Callable[[Any], Recipe]
    positions: Callable[[Any, str], int]
    float32_layers: tuple[str, ...]
    settings: frozenset[str]
    class_names: frozenset[str] = frozenset()
    layout: Callable[[Shapes], Layout | None] = lambda shapes: None
    remarks: Callable[[Any, Mapping[str, np.ndarray]], list[str]] = lambda config, state: []
