"""What goes into an engine file beside the network: the null context, a text encoder, a decoder of latents."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_engine import arguments
from sparse_engine.artifact import PayloadFile
from sparse_engine.assets import CONTEXT
from sparse_engine.backends.base import bytes_payload
from sparse_engine.conditioning import Condition
from sparse_engine.errors import InputError, OptionError
from sparse_engine.files import check_readable

from .model import Model

if TYPE_CHECKING:
    from .text_encoder import TextEncoderFiles
    from .vae import DecoderFiles

LARGEST_ROW = 1 << 28  # bytes of a .npy file: SD3's context is 2.7 million floats


@dataclass(frozen=True)
class AssetOptions:
    """What to store in an engine file beside the network.

    Attributes:
        null_context: a ``.npy`` file [L, D]: what the second pass of guidance is told, in place of a context.
        text_encoder: a transformers CLIP folder, or a diffusers pipeline's that holds one.
        vae: a diffusers AutoencoderKL's folder, or a pipeline's that holds one.
        vae_scale: the factor that latents were multiplied by, where the folder does not say or says another.
    """

    null_context: str | Path | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    vae_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("null_context", "text_encoder", "vae"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else arguments.path(name, value))
        if self.vae_scale is not None:
            object.__setattr__(self, "vae_scale", arguments.real_number("vae_scale", self.vae_scale, above=0))
            if self.vae is None:
                raise OptionError("vae_scale is given without vae: there is no decoder to scale for", "give both")


@dataclass(frozen=True)
class AssetFiles:
    """Assets as an engine file takes them.

    Attributes:
        conditions: the model's, with what is stored for "none".
        files: of the payload.
        entries: the manifest's ``assets``.
        notes: for the user to read.
    """

    conditions: tuple[Condition, ...]
    files: Sequence[PayloadFile] = ()
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def asset_files(model: Model, options: AssetOptions) -> AssetFiles:
    """Read the assets and hold them against the model.

    Raises:
        OptionError: the model has no use for one of them.
        InputError: a file cannot be read, or holds something else.
        MissingDependencyError: a text encoder is given, and ``tokenizers`` is not installed.
        BackendError: torch cannot export one of them.
    """
    rows: dict[str, np.ndarray] = {}
    more: list[PayloadFile] = []
    entries: dict[str, dict[str, Any]] = {}
    if options.null_context is not None:
        rows[CONTEXT] = read_row(Path(options.null_context), _context_of(model, "--null-context"))
    if options.text_encoder is not None:
        context = _context_of(model, "--text-encoder")
        encoder = _text_encoder(Path(options.text_encoder), context)
        more += encoder.files
        entries["text"] = encoder.entry
        if context.null is None:
            rows.setdefault(CONTEXT, encoder.null)
    if options.vae is not None:
        decoder = _decoder(model, Path(options.vae), options.vae_scale)
        more += decoder.files
        entries["vae"] = decoder.entry
    conditions = tuple(
        dataclasses.replace(each, null="stored") if each.name in rows else each for each in model.conditions
    )
    files = [_row_file(each.stored, rows[each.name]) for each in conditions if each.name in rows]
    return AssetFiles(conditions, [*files, *more], entries)


def _text_encoder(folder: Path, context: Condition) -> TextEncoderFiles:
    from .text_encoder import text_encoder_files

    encoder = text_encoder_files(folder)
    found = (encoder.length, encoder.width)
    if found != context.shape:
        only_length = found[1:] == context.shape[1:]
        raise InputError(
            f"{folder} makes {list(found)} of a text, and the model's context is {list(context.shape)}",
            f"build with --context-length {encoder.length}, where the model allows it"
            if only_length
            else "name the text encoder that the model was trained with",
        )
    return encoder


def _decoder(model: Model, folder: Path, scale: float | None) -> DecoderFiles:
    from .vae import decoder_files

    if model.recipe.value_range is not None:
        raise OptionError("--vae is given, but the model draws pixels: there is nothing to decode", "leave it out")
    return decoder_files(folder, model.config.data_shape, scale)


def _context_of(model: Model, option: str) -> Condition:
    for each in model.conditions:
        if each.name == CONTEXT:
            return each
    told = ", ".join(each.name for each in model.conditions) or "nothing"
    raise OptionError(f"{option} is given, but the model is told {told} and no context", "leave it out")


def read_row(path: Path, condition: Condition) -> np.ndarray:
    """A condition's row out of a ``.npy`` file: float of any width, [*shape] or [1, *shape]. Raises InputError."""
    fix = f"save it with numpy.save, float32 {list(condition.shape)}"
    check_readable(path, InputError, missing=fix)
    if os.path.getsize(path) > LARGEST_ROW:
        raise InputError(f"{path} has {os.path.getsize(path)} bytes; expected one row {list(condition.shape)}", fix)
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # of any kind, where a file is damaged
        raise InputError(f"{path} is no .npy file: {error}", fix) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise InputError(f"{path} holds no array of numbers", fix)
    if found.shape not in (condition.shape, (1, *condition.shape)):
        raise InputError(f"{path} has shape {list(found.shape)}; expected {list(condition.shape)}", fix)
    row = np.ascontiguousarray(found.reshape(condition.shape), condition.dtype)
    if not np.isfinite(row).all():
        raise InputError(f"{path} holds NaN or infinite values", fix)
    return row


def _row_file(name: str, row: np.ndarray) -> PayloadFile:
    data = io.BytesIO()
    np.save(data, row)
    return bytes_payload(name, data.getvalue())
