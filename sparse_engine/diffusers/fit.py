"""Whether an engine was built of a pipeline's network: held against its configuration and the shapes of its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_engine.engine import SparseEngine
from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.families import class_of, family_named
from sparse_engine.manifest import Manifest

# What an engine may have otherwise than the configuration says: it was told at the build, or says nothing of weights.
OF_THE_BUILD = ("image_size", "context_length")
ASIDE = ("guidance_channels", "sample_size")
BUILD = "build an engine of this network: use_engine(pipe, build=True)"


def check_fit(engine: SparseEngine, network: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse an engine of another network.

    Args:
        engine: that is to stand for it.
        network: the pipeline's own.
        config: its configuration; of a class that is not diffusers', empty.

    Raises OptionError, with the first thing that differs.
    """
    manifest = engine.manifest
    kind = type(network).__name__
    name = class_of({**config, "_class_name": kind})
    channels = config.get("in_channels")
    if channels is not None and channels != manifest.data_shape[0]:
        raise OptionError(
            f"the network takes {channels} channels and the engine {manifest.data_shape[0]}: it is of another network",
            "inpainting networks of 9 channels are not offered; inpainting pipelines take one of 4 too"
            if channels == 9
            else BUILD,
        )
    family = family_named(manifest.family)
    if name not in family.class_names:
        if family.class_names or _is_diffusers(network):
            raise OptionError(f"the engine's family is {family.name}, and the pipeline's network is a {kind}", BUILD)
        return  # a network of somebody's own: its size was held against the engine's
    own = _described(manifest, network, config)
    for key, value in _plain(manifest.config).items():
        if key not in ASIDE and own.get(key, value) != value:
            raise OptionError(
                f"the engine's {key} is {value}, and the network's is {own[key]}: it is of another network", BUILD
            )


def _is_diffusers(network: nn.Module) -> bool:
    return type(network).__module__.split(".")[0] == "diffusers"


def _described(manifest: Manifest, network: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine's family reads off the network."""
    family = family_named(manifest.family)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    layout = family.layout(shapes)
    settings = {**(layout.settings if layout else {}), **config}
    if layout is not None:
        named = {layout.names.get(name, name): shape for name, shape in shapes.items()}
        shapes = {name: tuple(layout.shapes.get(name, shape)) for name, shape in named.items()}
    for key in OF_THE_BUILD:
        if key in manifest.config:
            value = manifest.config[key]
            settings[key] = tuple(value) if isinstance(value, list) else value
    try:
        return _plain(dataclasses.asdict(family.read_config(shapes, settings)[0]))
    except InputError as error:
        raise OptionError(f"the pipeline's network is no {family.name} that an engine runs: {error.what}") from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
