"""Texts to what a network is told of them: an engine's own tokenizer and text encoder, without torch."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparse_engine.artifact import EngineFile
from sparse_engine.ending import library_call
from sparse_engine.errors import BackendError, EngineFileError, MissingDependencyError, OptionError

GRAPH, WEIGHTS, TOKENIZER = "text/encoder.onnx", "text/encoder.bin", "text/tokenizer.json"
SECOND_TOKENIZER = "text/tokenizer_2.json"  # of an engine with two encoders, which are one graph
CONTEXT, POOLED = "context", "pooled"  # what the graph calls what it gives, and the network what it is told
KEPT = 32  # contexts: 7.6 MB of CLIP ViT-L/14's


class TextEncoder:
    """An engine's text encoder. Safe to call from several threads.

    Args:
        file: an engine whose manifest has ``assets["text"]``.
        threads: of its session; None is one per core.

    Raises (on construction):
        MissingDependencyError: ``tokenizers`` or ``onnxruntime`` is not installed.
        EngineFileError: the engine says of its encoder what cannot be.
        BackendError: ONNX Runtime refuses the graph.
    """

    def __init__(self, file: EngineFile, threads: int | None = None) -> None:
        from sparse_engine.backends.onnxruntime.assets import asset_session

        self._length, width, pad = _sizes(file)
        entry = file.manifest.assets["text"]
        self._shapes: dict[str, tuple[int, ...]] = {CONTEXT: (self._length, width)}
        tokenizers = {"tokens": (TOKENIZER, pad)}
        if "second" in entry:
            self._shapes[POOLED] = (_number(file, entry, POOLED, 1),)
            tokenizers["tokens_2"] = (SECOND_TOKENIZER, _number(file, entry, "second", 0))
        self._tokenizers = {name: (_tokenizer(file, member), pad) for name, (member, pad) in tokenizers.items()}
        self._session = asset_session(file, GRAPH, WEIGHTS, threads)
        _check_fit(file, self._session, dict.fromkeys(tokenizers, (self._length,)) | self._shapes)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, list[np.ndarray]] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode texts; a text's rows are the same whatever is encoded with it.

        Args:
            prompts: n texts. One that is longer than the encoder's length is cut, with a warning.

        Returns:
            "context", float32 [n, length, width]; of two encoders "pooled" too, [n, width of it].

        Raises:
            OptionError: one of them is no text.
            BackendError: ONNX Runtime could not run the encoder.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise OptionError(f"prompt is {type(prompt).__name__}; expected a text")
        told = {name: np.empty((len(prompts), *shape), np.float32) for name, shape in self._shapes.items()}
        for index, prompt in enumerate(prompts):
            for rows, row in zip(told.values(), self._encoded(prompt), strict=True):
                rows[index] = row
        return told

    def _encoded(self, prompt: str) -> list[np.ndarray]:
        with self._lock:
            if prompt in self._kept:
                self._kept.move_to_end(prompt)
                return self._kept[prompt]
        tokens = {
            name: token_rows(tokenizer, [prompt], self._length, pad)
            for name, (tokenizer, pad) in self._tokenizers.items()
        }
        try:
            with library_call():
                # One at a time: a product of more rows may add up in another order.
                found = [rows[0] for rows in self._session.run(list(self._shapes), tokens)]
        except Exception as error:  # ONNX Runtime's own exceptions have no common public base
            raise BackendError(f"ONNX Runtime could not run the text encoder: {error}") from error
        with self._lock:
            self._kept[prompt] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found


def load_tokenizers() -> Any:
    """The ``tokenizers`` library. Raises MissingDependencyError."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            "a text encoder needs tokenizers; it is not installed", "pip install 'sparse-engine[text]'"
        ) from error
    return tokenizers


def text_tokenizer(text: str) -> Any:
    """A ``tokenizers.Tokenizer`` of what a ``tokenizer.json`` holds."""
    return load_tokenizers().Tokenizer.from_str(text)


def token_rows(tokenizer: Any, texts: Sequence[str], length: int, pad: int) -> np.ndarray:
    """Tokens of texts, int64 [n, length]: the first, what fits, the last, then ``pad``; warns of texts that are cut."""
    rows = np.full((len(texts), length), pad, np.int64)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(_plain(text)).ids
        if len(ids) > length:
            warnings.warn(
                f"a prompt has {len(ids) - 2} tokens and the text encoder reads {length - 2}: the rest is left out "
                f"({text[:40]!r}...)",
                stacklevel=2,
            )
            ids = [*ids[: length - 1], ids[-1]]
        row[: len(ids)] = ids
    return rows


def _plain(text: str) -> str:
    """Without halves of surrogate pairs, such as a command line's undecodable bytes: the library refuses them."""
    return text.encode("utf-8", "replace").decode()


def _tokenizer(file: EngineFile, member: str) -> Any:
    try:
        return text_tokenizer(file.read(member).decode())
    except (MissingDependencyError, EngineFileError):
        raise
    except Exception as error:  # the library raises plain exceptions
        raise EngineFileError(f"{file.path}: {member} is no tokenizer: {error}", "rebuild the engine") from error


def _sizes(file: EngineFile) -> tuple[int, int, int]:
    """(length, width, pad), as the manifest says. Raises EngineFileError."""
    entry = file.manifest.assets["text"]
    return _number(file, entry, "length", 2), _number(file, entry, "width", 1), _number(file, entry, "pad", 0)


def _number(file: EngineFile, entry: Mapping[str, Any], name: str, least: int) -> int:
    value = entry.get(name)
    value = value.get("pad") if isinstance(value, dict) else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EngineFileError(f"{file.path}: its text encoder's {name} is {value!r}", "rebuild the engine")
    return value


def _check_fit(file: EngineFile, session: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = {each.name: tuple(each.shape[1:]) for each in (*session.get_inputs(), *session.get_outputs())}
    if found != shapes:
        raise EngineFileError(
            f"{file.path}: its text encoder has {found}; its manifest says {dict(shapes)}",
            "rebuild the engine",
        )
