"""The options that several commands take: what a checkpoint does not say of its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_engine.errors import OptionError

from .terminal import export_module

if TYPE_CHECKING:
    from sparse_engine.export.options import ModelOptions

FamilyName = Annotated[str | None, typer.Option(help="Model family.", show_default="read off the keys")]
Heads = Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")]
NullClass = Annotated[int | None, typer.Option(help="Label that stands for 'no label'.")]
ScheduleName = Annotated[str | None, typer.Option(help="Noise schedule the model was trained on.")]
Prediction = Annotated[str | None, typer.Option(help="What the network predicts: eps, x0, v or flow.")]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Side of what the network draws (latents: theirs), where that is open."),
]
ContextLength = Annotated[int | None, typer.Option(help="Rows of a context, where the family leaves them open.")]
GuidanceChannels = Annotated[
    str | None, typer.Option(help="Channels that guidance acts on: all, or 3 as in DiT's own code.", show_default="all")
]

ConditioningFile = Annotated[
    Path | None, typer.Option(help="An .npz of what the network is told, by name; negative/NAME for 'not this'.")
]

Steps = Annotated[int, typer.Option(help="Network evaluations per sample.")]
SamplerName = Annotated[str | None, typer.Option(help="See `sparse-engine samplers`.", show_default="the model's")]
Prompt = Annotated[str | None, typer.Option(help="A text, for an engine with a text encoder.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance weight w; 1 is without.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples per network call.")]
Autotune = Annotated[bool, typer.Option("--autotune/--no-autotune", help="Time the kernels on this machine.")]
TStart = Annotated[float | None, typer.Option(help="Schedule time to start from.")]
TEnd = Annotated[float | None, typer.Option(help="Schedule time to stop at.")]
Spacing = Annotated[str | None, typer.Option(help="How the sampler's times are spaced.")]
DenoiseToZero = Annotated[
    bool | None, typer.Option("--denoise-to-zero/--no-denoise-to-zero", help="Make the last step one to t = 0.")
]
Eta = Annotated[float | None, typer.Option(help="Noise of ddim: 0 none, 1 ancestral.")]
Variance = Annotated[str | None, typer.Option(help="Variance of ddpm: small or large.")]
Order = Annotated[int | None, typer.Option(help="Order of a solver that has several.")]
Clip = Annotated[
    bool | None, typer.Option("--clip/--no-clip", help="Keep predicted x0 in range.", show_default="ddpm and ddim")
]


def model_options(arguments: Mapping[str, Any]) -> ModelOptions:
    """What was given of these among a command's arguments, its ``locals()``. Raises OptionError."""
    kind: type[ModelOptions] = export_module("options").ModelOptions
    given = {field.name: arguments.get(field.name) for field in dataclasses.fields(kind)}
    channels = given["guidance_channels"]
    if channels is not None and channels != "all":
        if not channels.isdecimal():
            raise OptionError(f"--guidance-channels {channels!r}: expected all, or how many")
        given["guidance_channels"] = int(channels)
    return kind(**given)
