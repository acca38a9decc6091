"""The options that several commands take: what a checkpoint does not say of its model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_engine.errors import OptionError

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


def model_settings(**given: Any) -> dict[str, Any]:
    """What was given of these, by the names that ``load_model`` knows. Raises OptionError."""
    channels = given.pop("guidance_channels", None)
    if channels is not None:
        if channels != "all" and not channels.isdecimal():
            raise OptionError(f"--guidance-channels {channels!r}: expected all, or how many")
        given["guidance_channels"] = channels if channels == "all" else int(channels)
    return {name: value for name, value in given.items() if value is not None}
