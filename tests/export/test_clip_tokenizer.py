"""CLIP's tokenizer against transformers' own, on awkward texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sparse_engine.errors import InputError
from sparse_engine.export.clip_tokenizer import read_tokenizer
from sparse_engine.text import text_tokenizer, token_rows
from tests.clip import BOS, EOS, save_tokenizer, vocabulary

TEXTS = [
    "",
    " ",
    "a cat",
    "The CAT,  the\tdog!!\n\n(1234) -- it's 5.0",
    "they'll DON'T o'clock ''s",
    "caf\u00e9 cafe\u0301 na\u00efve \u03a9 \u00df \u0130 \ufb01 \u6f22\u5b57 \ud55c\uae00 \u0e44\u0e17\u0e22",
    "\U0001f431\u200d\U0001f464 \U0001f1fa\U0001f1f3 \x00\x1f \ufeff\u00a0\u3000x",
    "the <|endoftext|> cat<|startoftext|> <|ENDOFTEXT|> <|endoftext",
    "a!b !c! ! !!",
    "dog " * 200,
    "\u00e9" * 300,
]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}


def said(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **FLAGS}


def decoder(*tokens: str) -> dict[str, Any]:
    numbers = vocabulary()
    return {str(numbers[token]): {**said(token), "special": True} for token in tokens}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pad !": {"pad": "!"},
    "as published": {"bos_token": said(BOS), "eos_token": said(EOS), "unk_token": said(EOS)},
    "as published, pad !": {"bos_token": said(BOS), "eos_token": said(EOS), "unk_token": said(EOS), "pad": "!"},
    "as transformers 4 saves": {"added_tokens_decoder": decoder(BOS, EOS), "bos_token": BOS, "eos_token": EOS},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json", "both"])
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_tokens_are_those_of_transformers(settings: dict[str, Any], form: str, tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "files", **settings)
    reference = CLIPTokenizer.from_pretrained(folder)
    if form != "vocab.json":
        folder = tmp_path / "whole"
        reference.save_pretrained(folder)
        assert not (folder / "vocab.json").exists()
    if form == "both":
        save_tokenizer(folder, **settings)
        reference = CLIPTokenizer.from_pretrained(folder)
    expected = reference(TEXTS, padding="max_length", truncation=True, max_length=77).input_ids
    found = read_tokenizer(folder)
    assert (found.length, found.size) == (77, len(vocabulary()))
    rows = token_rows(text_tokenizer(found.json), TEXTS, 77, found.pad)
    for text, row, numbers in zip(TEXTS, rows, expected, strict=True):
        assert row.tolist() == numbers, text
    pad = vocabulary()["!" if settings.get("pad") == "!" else EOS]
    assert rows[0].tolist() == [vocabulary()[BOS], vocabulary()[EOS], *[pad] * 75]


@pytest.mark.parametrize("first,second", list(itertools.permutations(SETTINGS, 2)))
@pytest.mark.filterwarnings("ignore:a prompt has")
def test_files_that_disagree_are_read_as_transformers_does(first: str, second: str, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(save_tokenizer(tmp_path / "a", **SETTINGS[first])).save_pretrained(tmp_path / "b")
    save_tokenizer(tmp_path / "b", **SETTINGS[second])
    expected = CLIPTokenizer.from_pretrained(tmp_path / "b")(
        TEXTS, padding="max_length", truncation=True, max_length=77
    ).input_ids
    found = read_tokenizer(tmp_path / "b")
    assert token_rows(text_tokenizer(found.json), TEXTS, 77, found.pad).tolist() == expected


def test_a_longer_text_is_cut_aloud(tmp_path: Path) -> None:
    found = read_tokenizer(save_tokenizer(tmp_path))
    tokenizer = text_tokenizer(found.json)
    with pytest.warns(UserWarning, match=r"a prompt has 3 tokens and the text encoder reads 2: .*'the cat the'"):
        (cut,) = token_rows(tokenizer, ["the cat the"], 4, found.pad)
    (fits,) = token_rows(tokenizer, ["the cat"], 4, found.pad)
    assert np.array_equal(cut, fits)


def test_half_a_surrogate_pair_is_a_question_mark(tmp_path: Path) -> None:
    found = read_tokenizer(save_tokenizer(tmp_path))
    rows = token_rows(text_tokenizer(found.json), ["cat \udcff", "cat ?"], 9, found.pad)
    assert np.array_equal(rows[0], rows[1])


def test_no_longest_text(tmp_path: Path) -> None:
    assert read_tokenizer(save_tokenizer(tmp_path, length=int(1e30))).length is None


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("vocab.json", "{", "vocab.json or merges.txt is damaged"),
        ("merges.txt", "#version: 0.2\nqq zz\n", "holds no CLIP tokenizer"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list; expected an object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, file: str, text: str, message: str) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_tokenizer(tmp_path)


def test_another_kind_of_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(InputError, match=r"(?s)another kind \(Unigram\).*CLIP text model"):
        read_tokenizer(tmp_path)
