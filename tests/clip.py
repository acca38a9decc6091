"""Small CLIP text models of transformers, with tokenizers of a small vocabulary, as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = [
    ("c", "a"),
    ("ca", "t</w>"),
    ("a", "n"),
    ("t", "h"),
    ("th", "e</w>"),
    ("d", "o"),
    ("do", "g</w>"),
    ("!", "!</w>"),
    ("l", "l</w>"),
    ("Ã", "©</w>"),
]


def vocabulary() -> dict[str, int]:
    """Bytes, bytes at a word's end, merges, bos and eos: as CLIP's own is ordered, "!" first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(token + "</w>" for token in alphabet), *map("".join, MERGES), BOS, EOS]
    assert tokens[0] == "!"
    return {token: number for number, token in enumerate(tokens)}


def save_tokenizer(folder: Path, pad: str = EOS, length: int = 77, **settings: Any) -> Path:
    """``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = "".join(f"{first} {second}\n" for first, second in MERGES)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": pad, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def text_config(length: int = 77, width: int = 16, **changed: Any) -> CLIPTextConfig:
    """Of a text model that fits ``vocabulary``."""
    size = len(vocabulary())
    settings = {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": length,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        **changed,
    }
    return CLIPTextConfig(**settings)


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part shows in the output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)


def save_text_model(folder: Path, length: int = 77, width: int = 16, **changed: Any) -> CLIPTextModel:
    """A text model of random weights, saved as transformers does."""
    model = CLIPTextModel(text_config(length, width, **changed)).eval()
    fill(model)
    model.save_pretrained(folder)
    return model
