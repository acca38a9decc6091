"""A request's JSON: OpenAI's fields, and those that say which picture exactly."""

from __future__ import annotations

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparse_engine.arguments import MOST_IMAGES, MOST_SEED

from .refusals import Refusal

DRAWN_SEEDS = 2**53  # of a request that names none: JavaScript keeps such a number whole
SHOWN = 200  # characters of a message of the parser's


class ImageRequest(BaseModel):
    """What ``POST /v1/images/generations`` takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="One of /v1/models; may be left out where there is one.")
    prompt: str | list[str] | None = Field(
        None, description="A text, or one for each image, for an engine with a text encoder; else absent or empty."
    )
    negative_prompt: str | list[str] | None = Field(None, description="What guidance leads away from.")
    n: int | None = Field(None, ge=1, description="How many images; 1.")
    labels: int | list[int] | None = Field(
        None,
        description="A class, or one for each image, for a class-conditional engine; drawn from the seed if absent.",
    )
    seed: int | list[int] | None = Field(
        None, description="A seed, or one for each image, 0 to 2**64 - 1; drawn if absent. Pictures of a seed stay."
    )
    first: int | None = Field(None, ge=0, lt=MOST_IMAGES, description="Number of the first image in its seed; 0.")
    steps: int | None = Field(None, ge=1, description="Network evaluations per image; 50.")
    sampler: str | None = Field(None, description="One of the model's samplers; its own if absent.")
    guidance: float | None = Field(None, description="Classifier-free guidance weight w; 1 is without.")
    options: dict[str, Any] | None = Field(None, description="The sampler's own: eta, order, clip, t_end, ...")
    conditioning: dict[str, Any] | None = Field(None, description="Arrays that the network is told, by name.")
    negative: dict[str, Any] | None = Field(None, description="The same for the second pass of guidance.")
    size: str | None = Field(None, description="WIDTHxHEIGHT; has to be the model's.")
    response_format: Literal["b64_json"] | None = Field(None, description="b64_json; there are no URLs.")
    output_format: Literal["png"] | None = Field(None, description="png.")
    quality: Literal["auto"] | None = Field(None, description="Taken, and without effect.")
    background: Literal["auto"] | None = Field(None, description="Taken, and without effect.")
    user: str | None = Field(None, description="Taken, and without effect.")

    @classmethod
    def parse(cls, body: bytes) -> ImageRequest:
        """Read a body. Raises Refusal, which names the field."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = str(first["loc"][0]) if first["loc"] else None
            if first["type"] == "json_invalid":
                raise Refusal(400, f"the body is no JSON: {first['msg'][:SHOWN]}", "invalid_json") from None
            if first["type"] == "extra_forbidden":
                field = field and field[:SHOWN]
                raise Refusal(400, f"{field}: no such field; see /docs", "unknown_field", param=field) from None
            where = f"{field}: " if field else "the body: "
            raise Refusal(400, where + first["msg"][:SHOWN], "invalid_value", param=field) from None

    @property
    def count(self) -> int:
        """How many images."""
        return 1 if self.n is None else self.n

    def seeds(self) -> int | list[int]:
        """One seed, or one for each image; drawn where none is given. Raises Refusal."""
        if self.seed is None:
            return secrets.randbelow(DRAWN_SEEDS)
        each = self.seed if isinstance(self.seed, list) else [self.seed]
        if any(not 0 <= seed <= MOST_SEED for seed in each):
            raise Refusal(400, "seed: expected whole numbers from 0 to 2**64 - 1", "invalid_value", param="seed")
        return self.seed
