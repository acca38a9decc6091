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
from sparse_engine.text import POOLED

from .diffusers_folder import NETWORKS
from .model import Model
from .weight_files import read_json

if TYPE_CHECKING:
    from .text_encoder import TextEncoderFiles
    from .vae import DecoderFiles

SIZES, UPSCALE = "time_ids", 8
LARGEST_ROW = 1 << 28  # bytes of a .npy file: SD3's context is 2.7 million floats


@dataclass(frozen=True)
class AssetOptions:
    """What to store in an engine file beside the network.

    Attributes:
        null_context: a ``.npy`` file [L, D]: what the second pass of guidance is told, in place of a context.
        text_encoder: a transformers CLIP folder, or a diffusers pipeline's that holds one, or SDXL's two.
        vae: a diffusers AutoencoderKL's folder, or a pipeline's that holds one.
        vae_scale: the factor that latents were multiplied by, where the folder does not say or says another.
        bundle: take the text encoder and the decoder of the pipeline's folder that the network is of.
    """

    null_context: str | Path | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    vae_scale: float | None = None
    bundle: bool = False

    def __post_init__(self) -> None:
        for name in ("null_context", "text_encoder", "vae"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else arguments.path(name, value))
        if self.vae_scale is not None:
            object.__setattr__(self, "vae_scale", arguments.real_number("vae_scale", self.vae_scale, above=0))
            if self.vae is None and not self.bundle:
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
    options, notes = bundled(model, options) if options.bundle else (options, [])
    nulls: dict[str, np.ndarray | str] = {}
    more: list[PayloadFile] = []
    entries: dict[str, dict[str, Any]] = {}
    if options.null_context is not None:
        nulls[CONTEXT] = read_row(Path(options.null_context), _context_of(model, "--null-context"))
    if options.text_encoder is not None:
        encoder = _text_encoder(Path(options.text_encoder), model)
        more += encoder.files
        entries["text"] = encoder.entry
        for each in model.conditions:
            if each.null is None and each.name in encoder.null:
                nulls.setdefault(each.name, encoder.null[each.name])
    if options.vae is not None:
        decoder = _decoder(model, Path(options.vae), options.vae_scale)
        more += decoder.files
        entries["vae"] = decoder.entry
    if "text" in entries:
        _tell_sizes(model, entries)
    conditions = tuple(
        dataclasses.replace(each, null=_kind(nulls[each.name])) if each.name in nulls else each
        for each in model.conditions
    )
    rows = {name: row for name, row in nulls.items() if not isinstance(row, str)}
    files = [_row_file(each.stored, rows[each.name]) for each in conditions if each.name in rows]
    return AssetFiles(conditions, [*files, *more], entries, notes)


def bundled(model: Model, options: AssetOptions) -> tuple[AssetOptions, list[str]]:
    """The options with what the folder of the network's pipeline holds, and notes on what was left out.

    Raises OptionError where the network is of no such folder, or it holds nothing that an engine takes.
    """
    folder = pipeline_folder(model.checkpoint.path)
    notes: list[str] = []
    found: dict[str, Any] = {}
    if options.vae is None and model.recipe.value_range is None and (folder / "vae").is_dir():
        found["vae"] = folder / "vae"
    if options.text_encoder is None and any(each.name == CONTEXT for each in model.conditions):
        encoder, why = _encoder_in(folder)
        if encoder is not None:
            found["text_encoder"] = encoder
        elif why is not None:
            notes.append(f"{why}: not bundled; prompts are encoded outside")
    if not found and options.vae is None and options.text_encoder is None:
        raise OptionError(
            f"--bundle: {folder} holds no vae/ and no text encoder that the model has a use for"
            + (f" ({notes[0]})" if notes else ""),
            "leave --bundle out, or name them with --vae and --text-encoder",
        )
    taken = dataclasses.replace(options, bundle=False, **found)
    return taken, [*(f"bundled: {path.name}/ of {folder.name}" for path in found.values()), *notes]


def pipeline_folder(weights: Path) -> Path:
    """The folder of the pipeline that a network's file is of; the file's own, where it lies beside the other parts."""
    return weights.parent.parent if weights.parent.name in NETWORKS else weights.parent


def has_two(folder: Path) -> bool:
    """Whether a pipeline's folder has two text encoders, and no more."""
    return (folder / "text_encoder_2").is_dir() and not (folder / "text_encoder_3").is_dir()


def _encoder_in(folder: Path) -> tuple[Path | None, str | None]:
    """(what ``text_encoder`` is to be, or why there is none)."""
    parts = sorted(part for part in folder.glob("text_encoder*") if part.is_dir())
    kinds = {}
    for part in parts:
        config = part / "config.json"
        named = (read_json(config).get("architectures") if config.is_file() else None) or ["unknown"]
        kinds[part.name] = str(named[0])
    other = next((name for name, kind in kinds.items() if "CLIP" not in kind), None)
    if other is not None:
        return None, f"{other}/ is a {kinds[other]}"
    if len(parts) > 1:
        return (folder, None) if has_two(folder) else (None, f"{folder.name} has {len(parts)} text encoders")
    return (parts[0], None) if parts else (None, None)


def _kind(null: np.ndarray | str) -> str:
    return null if isinstance(null, str) else "stored"


def _tell_sizes(model: Model, entries: dict[str, dict[str, Any]]) -> None:
    """SDXL's network is told the picture's size: where a text is given, that of what the decoder draws."""
    told = next((each for each in model.conditions if each.name == SIZES), None)
    if told is None or told.shape != (6,):
        return
    height, width = (entries["vae"]["picture"] if "vae" in entries else [0, *_pixels(model)])[1:]
    entries["text"]["told"] = {SIZES: [height, width, 0, 0, height, width]}


def _pixels(model: Model) -> list[int]:
    """Of a model without its decoder: eight pixels a latent, as SDXL's has."""
    return [UPSCALE * side for side in model.config.data_shape[1:]]


def _text_encoder(folder: Path, model: Model) -> TextEncoderFiles:
    from .text_encoder import text_encoder_files
    from .text_encoders_two import two_text_encoders_files

    context = _context_of(model, "--text-encoder")
    pooled = next((each.shape[0] for each in model.conditions if each.name == POOLED), 0)
    encoder = two_text_encoders_files(folder) if pooled and has_two(folder) else text_encoder_files(folder)
    found = (encoder.length, encoder.width)
    if found != context.shape:
        only_length = found[1:] == context.shape[1:]
        raise InputError(
            f"{folder} makes {list(found)} of a text, and the model's context is {list(context.shape)}",
            f"build with --context-length {encoder.length}, where the model allows it"
            if only_length
            else "name the text encoder that the model was trained with",
        )
    if encoder.pooled != pooled:
        raise InputError(
            f"{folder} makes {encoder.pooled or 'no'} numbers of a text as a whole, and the model is told {pooled}",
            "name the pipeline's folder that holds both text encoders the model was trained with",
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
