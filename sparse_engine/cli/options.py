"""The options that several commands take: what a checkpoint does not say of its model."""

from __future__ import annotations

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


def model_options(guidance_channels: str | None = None, **given: Any) -> ModelOptions:
    """What was given of these. Raises OptionError."""
    channels: int | str | None = guidance_channels
    if guidance_channels is not None and guidance_channels != "all":
        if not guidance_channels.isdecimal():
            raise OptionError(f"--guidance-channels {guidance_channels!r}: expected all, or how many")
        channels = int(guidance_channels)
    made: ModelOptions = export_module("options").ModelOptions(guidance_channels=channels, **given)
    return made
