"""U-ViT text-to-image: a U-ViT that has the vectors of a text among its tokens.

Source: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023 (arXiv 2209.12152), and the
MS-COCO models of baofff/U-ViT. A text is what the text model of CLIP ViT-L/14 makes of it: its last hidden states, 77
vectors of 768, all of them used. "None" is what it makes of the empty text, which a checkpoint does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_engine.conditioning import Condition
from sparse_engine.errors import CheckpointError

from .base import Family, Recipe, Shapes
from .reading import PublishedHeads, settle, shape_of
from .uvit import (
    AUTHORS_NAMES,
    CONTEXT_KEY,
    FLOAT32_LAYERS,
    LATENT_CHANNELS,
    SPARSE_LAYERS,
    UViTBase,
    UViTSizes,
    has_uvit_keys,
    positions,
    read_sizes,
    refuse_unidiffuser,
    settings_of,
)

CONTEXT_LENGTH = 77  # CLIP's
PUBLISHED_HEADS: PublishedHeads = {512: 8}  # S/2, of depth 12 and of 16
T2I_NAMES = {**AUTHORS_NAMES, "clip_dim": "context_dim", "num_clip_token": "context_length"}


@dataclasses.dataclass(frozen=True)
class UViTT2IConfig(UViTSizes):
    """Everything that fixes a text-to-image U-ViT's graph: a text is [context_length, context_dim]."""

    context_dim: int = 768
    context_length: int = CONTEXT_LENGTH

    @property
    def extras(self) -> int:
        """The time, and the text."""
        return 1 + self.context_length

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The text; what none is has to be given."""
        return (Condition("context", (self.context_length, self.context_dim), null=None),)


class UViTT2I(UViTBase):
    """The network: (x, t, context) -> prediction of x's shape."""

    context_embed: nn.Linear

    def __init__(self, config: UViTT2IConfig) -> None:
        super().__init__(config, context_embed=lambda: nn.Linear(config.context_dim, config.embed_dim))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict what the network was trained for (eps, x0 or v).

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            context: [B, context_length, context_dim], of the text.
        """
        return self.decode([self.time_token(t), self.context_embed(context), self.patch_embed(x)])


def _recognises(shapes: Shapes) -> bool:
    return has_uvit_keys(shapes) and CONTEXT_KEY in shapes


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[UViTT2IConfig, list[str]]:
    given = {T2I_NAMES.get(name, name): value for name, value in given.items()}
    refuse_unidiffuser(shapes)
    context_dim = shape_of(shapes, CONTEXT_KEY, 2)[1]
    length, notes = _context_length(given.get("context_length"))
    fix = f"a text of {length} was taken; say its length with --context-length N, or in a configuration file"
    read = {**read_sizes(shapes, 1 + length, fix), "context_dim": context_dim}
    heads, more = settle(given, read, PUBLISHED_HEADS)
    return UViTT2IConfig(heads=heads, context_length=length, **read), notes + more


def _context_length(given: Any) -> tuple[int, list[str]]:
    """How many vectors a text has: the weights know only that and the patches together."""
    if given is None:
        return CONTEXT_LENGTH, [
            f"context_length = {CONTEXT_LENGTH}: not in the weights; taken from the published models"
        ]
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise CheckpointError(
            f"context_length is {given!r} in the given configuration; expected a whole number above 0"
        )
    return given, []


def _recipe(config: UViTT2IConfig) -> Recipe:
    """The authors' own: latents on Stable Diffusion's betas."""
    pixels = None if config.channels == LATENT_CHANNELS else (-1.0, 1.0)
    return Recipe("stable-diffusion", "eps", pixels, None, "dpm-solver++-singlestep")


def _positions(config: UViTT2IConfig, layer: str) -> int:
    return config.context_length if layer == "context_embed" else positions(config, layer)


FAMILY = Family(
    name="uvit-t2i",
    sparse_layers=SPARSE_LAYERS,
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=UViTT2IConfig.from_dict,
    network=UViTT2I,
    recipe=_recipe,
    positions=_positions,
    float32_layers=(*FLOAT32_LAYERS, "context_embed"),
    settings=settings_of(UViTT2IConfig, T2I_NAMES),
)
