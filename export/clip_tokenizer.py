"""CLIP's tokenizer from the files that it is published in: a ``tokenizer.json`` for the ``tokenizers`` library.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021 (arXiv
2103.00020), openai/CLIP: byte-level BPE in lower case, words ending in ``</w>``. A folder has ``vocab.json`` and
``merges.txt``, or both in a ``tokenizer.json``; everything about it but those two, and its special tokens, is fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_engine.errors import InputError
from sparse_engine.files import check_readable
from sparse_engine.text import load_tokenizers

from .weight_files import read_json

WHOLE, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
END_OF_WORD = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
ROLES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
DOWNLOAD = "download the tokenizer's folder too"


@dataclass(frozen=True)
class ClipTokenizer:
    """A tokenizer as an engine stores it.

    Attributes:
        json: for ``tokenizers.Tokenizer``; a text becomes bos, its tokens, eos.
        size: one more than the largest number of a token.
        pad: the number of the token that fills a text up.
        eos: the number of the token that ends a text.
        length: of the longest text, bos and eos too; None where the folder does not say.
    """

    json: str
    size: int
    pad: int
    eos: int
    length: int | None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return (folder / WHOLE).is_file() or all((folder / name).is_file() for name in (VOCABULARY, MERGES))


def read_tokenizer(folder: Path) -> ClipTokenizer:
    """Read CLIP's tokenizer out of a folder.

    Raises:
        MissingDependencyError: ``tokenizers`` is not installed.
        InputError: a file is missing, damaged, or of another kind of tokenizer.
    """
    tokenizers = load_tokenizers()
    vocabulary, merges, added = _byte_pairs(folder, tokenizers)
    settings, special = _settings(folder / SETTINGS), _settings(folder / SPECIAL)
    roles, flags = _special_tokens(settings, special, added)
    for role, content in roles.items():
        if content not in vocabulary and content not in flags:
            raise InputError(f"{folder}: its {role} {content!r} is not in its vocabulary", DOWNLOAD)
    try:
        tokenizer = _tokenizer(tokenizers, vocabulary, merges, roles["unk_token"])
        for content, said in flags.items():
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, special=True, **said)])
        bos, eos, pad = (tokenizer.token_to_id(roles[role]) for role in ("bos_token", "eos_token", "pad_token"))
        tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
            (roles["eos_token"], eos), (roles["bos_token"], bos), False, False
        )
    except Exception as error:  # the library raises plain exceptions
        raise InputError(f"{folder} holds no CLIP tokenizer: {error}", DOWNLOAD) from error
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    length = settings.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        length = None
    return ClipTokenizer(tokenizer.to_str(), size, pad, eos, length)


def _settings(path: Path) -> dict[str, Any]:
    """What a file of settings says; nothing where it is not there. "No longest text" is a number of 31 digits."""
    if not path.is_file():
        return {}
    check_readable(path, InputError)
    try:
        values = json.loads(path.read_bytes(), parse_int=lambda digits: int(digits) if len(digits) < 16 else math.inf)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", DOWNLOAD) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; expected an object of settings", DOWNLOAD)
    return values


def _tokenizer(tokenizers: Any, vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> Any:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=unknown,
        )
    )
    normalizers, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
            pre.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _byte_pairs(folder: Path, tokenizers: Any) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """(vocabulary, merges, tokens that a ``tokenizer.json`` adds)."""
    if all((folder / name).is_file() for name in (VOCABULARY, MERGES)):
        for name in (VOCABULARY, MERGES):
            check_readable(folder / name, InputError)
        try:
            vocabulary, merges = tokenizers.models.BPE.read_file(str(folder / VOCABULARY), str(folder / MERGES))
        except Exception as error:  # as above
            raise InputError(f"{folder}: {VOCABULARY} or {MERGES} is damaged: {error}", DOWNLOAD) from error
        beside = read_json(folder / WHOLE).get("added_tokens") if (folder / WHOLE).is_file() else None
        return vocabulary, merges, beside if isinstance(beside, list) else []
    whole = read_json(folder / WHOLE)
    model, added = whole.get("model"), whole.get("added_tokens")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        kind = model.get("type") if isinstance(model, dict) else None
        raise InputError(
            f"{folder / WHOLE} is a tokenizer of another kind ({kind}); expected CLIP's, a BPE whose words end in "
            f"{END_OF_WORD}",
            "name the folder of a CLIP text model",
        )
    try:
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        return dict(model["vocab"]), merges, list(added or [])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / WHOLE} is damaged: {error!r}", DOWNLOAD) from error


def _special_tokens(
    settings: Mapping[str, Any], special: Mapping[str, Any], added: list[Any]
) -> tuple[dict[str, str], dict[str, dict[str, bool]]]:
    """(role -> token, token -> how it is looked for in a text); a list of all tokens counts more than their roles."""
    roles = dict(ROLES)
    said: list[Any] = []
    for source in (special, settings):
        for role in ROLES:
            entry = source.get(role)
            entry = {"content": entry} if isinstance(entry, str) else entry
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                roles[role] = entry["content"]
                said.append(entry)
    decoder = settings.get("added_tokens_decoder")
    listed = list(decoder.values()) if isinstance(decoder, dict) and decoder else added
    said += [entry for entry in listed if isinstance(entry, dict)]
    flags = {content: dict.fromkeys(FLAGS, False) for content in roles.values()}
    for entry in said:
        if isinstance(entry.get("content"), str):
            flags[entry["content"]] = {name: bool(entry.get(name, False)) for name in FLAGS}
    return roles, flags
