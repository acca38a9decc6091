"""What an engine file holds beside the network: null rows, a text encoder, a decoder of latents."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.conditioning import Condition
from sparse_engine.errors import EngineFileError, OptionError
from sparse_engine.manifest import Manifest

CONTEXT = "context"  # the condition that a text becomes


class Assets:
    """An engine's assets; the text encoder and the decoder are loaded when they are first used.

    Args:
        manifest: of the engine.
        file: that holds them; None for an engine without.
        threads: for their own sessions; None is one per core.

    Attributes:
        nulls: name -> the row of each condition whose null is "stored".

    Raises (on construction):
        EngineFileError: a null row is not of its condition's shape.
    """

    def __init__(self, manifest: Manifest, file: EngineFile | None = None, threads: int | None = None) -> None:
        self._manifest, self._file, self._threads = manifest, file, threads
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self.nulls: dict[str, np.ndarray] = {}
        for each in manifest.conditions:
            if each.null == "stored" and file is not None:
                self.nulls[each.name] = _row(file, each.stored, each.shape, each.dtype)

    @property
    def decoder(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Latents [B, C, H, W] -> pixels [B, 3, H', W'] in [-1, 1]; None where the engine holds none."""
        return self._asset("vae")

    def with_prompt(
        self, argument: str, told: Mapping[str, Any] | None, name: str, prompt: Any, n: int
    ) -> Mapping[str, Any] | None:
        """What a caller tells the network, its text encoded.

        Args:
            argument, told: of the public function: "conditioning" or "negative".
            name, prompt: of the public function: one text, n of them, or None.
            n: images.

        Raises:
            OptionError: texts that are none or too many, no text encoder, or a context given as well.
        """
        if prompt is None:
            return told
        texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, (list, tuple)) else None
        if texts is None or not all(isinstance(text, str) for text in texts) or len(texts) not in (1, n):
            raise OptionError(f"{name} is {type(prompt).__name__}; expected one text, or {n} of them in a list")
        if told and CONTEXT in told:
            raise OptionError(f"{name} and {argument}[{CONTEXT!r}] say the same thing twice", "give one of them")
        encoder = self._asset("text")
        if encoder is None:
            raise OptionError(f"{name} is given, but {self._no_encoder()}", self._without_encoder(argument))
        rows = {each: array if len(array) == n else array[0] for each, array in encoder(texts).items()}
        return {**self._beside(argument), **rows, **(told or {})}

    def _beside(self, argument: str) -> dict[str, np.ndarray]:
        """What goes with a text where nobody says it: of SDXL's, the size of the picture."""
        told = self._manifest.assets["text"].get("told", {}) if argument == "conditioning" else {}
        return {each.name: _told(each, told[each.name]) for each in self._manifest.conditions if each.name in told}

    def close(self) -> None:
        """Drop what was loaded; calls under way finish on their own reference."""
        with self._lock:
            self._loaded.clear()

    def _no_encoder(self) -> str:
        family, told = self._manifest.family, [each.name for each in self._manifest.conditions]
        if CONTEXT not in told:
            return f"the model ({family}) is told {', '.join(told) or 'nothing'} and no text"
        return f"the engine ({family}) holds no text encoder"

    def _without_encoder(self, argument: str) -> str:
        if all(each.name != CONTEXT for each in self._manifest.conditions):
            return "leave it out"
        return (
            f"pass {argument}={{{CONTEXT!r}: array}}, made by the model's own encoder; where that is one CLIP text "
            "model, rebuild with --text-encoder FOLDER"
        )

    def _asset(self, kind: str) -> Any:
        if kind not in self._manifest.assets or self._file is None:
            return None
        with self._lock:
            if kind not in self._loaded:
                self._loaded[kind] = _load(kind, self._file, self._threads)
            return self._loaded[kind]


def _told(condition: Condition, value: Any) -> np.ndarray:
    try:
        row = np.asarray(value, condition.dtype)
    except (TypeError, ValueError) as error:
        raise EngineFileError(f"its text encoder says {condition.name} is {value!r}", "rebuild the engine") from error
    if row.shape != condition.shape:
        raise EngineFileError(f"its text encoder says {condition.name} is {value!r}", "rebuild the engine")
    return row


def _load(kind: str, file: EngineFile, threads: int | None) -> Any:
    if kind == "text":
        from sparse_engine.text import TextEncoder

        return TextEncoder(file, threads)
    from sparse_engine.decoder import LatentDecoder

    return LatentDecoder(file, threads)


def _row(file: EngineFile, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        row: np.ndarray = np.load(io.BytesIO(file.read(name)), allow_pickle=False)
    except ValueError as error:
        raise EngineFileError(f"{file.path}: {name} is no array: {error}", "rebuild the engine") from error
    if row.shape != shape or row.dtype != dtype or not np.isfinite(row).all():
        raise EngineFileError(
            f"{file.path}: {name} is {row.dtype} {list(row.shape)}; expected {dtype} {list(shape)}, all finite",
            "rebuild the engine",
        )
    return row
