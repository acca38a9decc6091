"""The options that several commands take, one by one and in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_engine.errors import OptionError

from .terminal import export_module

if TYPE_CHECKING:
    from sparse_engine.export.options import ModelOptions

Steps = Annotated[int, typer.Option(help="Network evaluations per sample.")]
SamplerName = Annotated[str | None, typer.Option(help="See `sparse-engine samplers`.", show_default="the model's")]
ConditioningFile = Annotated[
    Path | None, typer.Option(help="An .npz of what the network is told, by name; negative/NAME for 'not this'.")
]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance weight w; 1 is without.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples per network call.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per core")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="the backend's own")]
Autotune = Annotated[bool, typer.Option("--autotune/--no-autotune", help="Time the kernels on this machine.")]
MaskLayers = Annotated[str | None, typer.Option(help="Globs over layer names, comma-separated.")]


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint does not say of its model."""

    family: Annotated[str | None, typer.Option(help="Model family.", show_default="read off the keys")] = None
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the weights cannot tell.")] = None
    null_class: Annotated[int | None, typer.Option(help="Label that stands for 'no label'.")] = None
    schedule: Annotated[str | None, typer.Option(help="Noise schedule the model was trained on.")] = None
    prediction: Annotated[str | None, typer.Option(help="What the network predicts: eps, x0, v or flow.")] = None
    image_size: Annotated[
        int | None, typer.Option(help="Side of what the network draws (latents: theirs), where that is open.")
    ] = None
    context_length: Annotated[
        int | None, typer.Option(help="Rows of a context, where the family leaves them open.")
    ] = None

    def options(self, **others: Any) -> ModelOptions:
        """What was given of these, for ``export``. Raises OptionError."""
        made: ModelOptions = export_module("options").ModelOptions(**{**vars(self), **others})
        return made


@dataclass(frozen=True)
class Model(TrainedModel):
    """The same, of a model that is guided."""

    guidance_channels: Annotated[
        str | None,
        typer.Option(help="Channels that guidance acts on: all, or 3 as in DiT's own code.", show_default="all"),
    ] = None

    def options(self, **others: Any) -> ModelOptions:
        """What was given of these, for ``export``. Raises OptionError."""
        channels = self.guidance_channels
        if channels in (None, "all"):
            return super().options(**others)
        if not channels.isdecimal():
            raise OptionError(f"--guidance-channels {channels!r}: expected all, or how many")
        return super().options(guidance_channels=int(channels), **others)


@dataclass(frozen=True)
class Told:
    """What the network is told beside labels."""

    conditioning: ConditioningFile = None
    prompt: Annotated[str | None, typer.Option(help="A text, for an engine with a text encoder.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None
    guidance: Guidance = None


@dataclass(frozen=True)
class SamplerOptions:
    """What is a sampler's own, or of its schedule."""

    t_start: Annotated[float | None, typer.Option(help="Schedule time to start from.")] = None
    t_end: Annotated[float | None, typer.Option(help="Schedule time to stop at.")] = None
    spacing: Annotated[str | None, typer.Option(help="How the sampler's times are spaced.")] = None
    denoise_to_zero: Annotated[
        bool | None, typer.Option("--denoise-to-zero/--no-denoise-to-zero", help="Make the last step one to t = 0.")
    ] = None
    eta: Annotated[float | None, typer.Option(help="Noise of ddim: 0 none, 1 ancestral.")] = None
    variance: Annotated[str | None, typer.Option(help="Variance of ddpm: small or large.")] = None
    order: Annotated[int | None, typer.Option(help="Order of a solver that has several.")] = None
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Keep predicted x0 in range.", show_default="ddpm and ddim")
    ] = None


@dataclass(frozen=True)
class Trajectories:
    """The sampling that shows what layers are given."""

    images: Annotated[int, typer.Option(help="Trajectories; of every four steps one is kept.")] = 64
    steps: Annotated[int, typer.Option(help="Network evaluations of each.")] = 20
    sampler: Annotated[str | None, typer.Option(help="Sampler.", show_default="the model's own")] = None
