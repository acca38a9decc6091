"""CLIP's text model as a graph beside the network: tokens [B, L] -> context [B, L, D].

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021 (arXiv
2103.00020). Module names are those of transformers' ``CLIPTextModel``. Its context is the last layer's states after the
final norm, which U-ViT, Stable Diffusion and others are told; every token counts, those that fill up too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.artifact import PayloadFile
from sparse_engine.backends.base import bytes_payload
from sparse_engine.errors import InputError
from sparse_engine.files import check_readable
from sparse_engine.text import GRAPH, TOKENIZER, WEIGHTS, text_tokenizer, token_rows

from .asset_graph import graph_files, load_float32, read_tensors
from .clip_tokenizer import has_tokenizer, read_tokenizer
from .weight_files import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
DEFAULTS = {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # transformers' own
PREFIX = "text_model."
TOKEN_TABLE = "embeddings.token_embedding.weight"
POSITION_TABLE = "embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
NOT_USED = ("embeddings.position_ids", PROJECTION)
FIX = "name the folder of a CLIP text model with its tokenizer, or a pipeline's that has one"


@dataclass(frozen=True)
class TextEncoderFiles:
    """A text encoder as an engine takes it.

    Attributes:
        files: of the payload.
        entry: the manifest's ``assets["text"]``.
        length, width: of a context, [length, width].
        null: what the empty text is, name -> row; "zeros" of what guidance takes for none in place of it.
        pooled: width of the text as a whole, for a network that is told it; 0 for others.
    """

    files: list[PayloadFile]
    entry: dict[str, Any]
    length: int
    width: int
    null: Mapping[str, np.ndarray | str]
    pooled: int = 0


@dataclass(frozen=True)
class ClipTextConfig:
    """Everything that fixes the text model's graph."""

    vocabulary: int
    positions: int
    width: int
    hidden: int
    layers: int
    heads: int
    activation: str
    eps: float


class Embeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class CausalAttention(nn.Module):
    """Multi-head attention in which a token sees those before it and itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]; mask [L, L] is 0 or -inf."""
        length, width = x.shape[1:]
        split = (-1, length, self.heads, width // self.heads)
        q, k, v = (layer(x).reshape(split).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + mask
        return self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, length, width))


class Mlp(nn.Module):
    """Two linears with a GELU between them: erf's, or x sigmoid(1.702 x)."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)
        self.quick = config.activation == "quick_gelu"

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipText(nn.Module):
    """The text model: tokens -> the states of the last layer, normed.

    Args:
        config: of the model.
        length: of a text; no more than the model's positions.
    """

    mask: Tensor

    def __init__(self, config: ClipTextConfig, length: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.width, config.eps)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 [B, L] -> float32 [B, L, D]."""
        return self.final_layer_norm(self.states(tokens)[-1])

    def states(self, tokens: Tensor) -> list[Tensor]:
        """What each layer makes of them, [B, L, D] each, not normed."""
        h, found = self.embeddings(tokens), []
        for layer in self.encoder.layers:  # type: ignore[union-attr]
            h = layer(h, self.mask)
            found.append(h)
        return found


def text_encoder_files(folder: Path) -> TextEncoderFiles:
    """Make an engine's text encoder of a CLIP text model.

    Its weights are stored as float32 whatever they were: 16 bits are widened without loss, and float32 is what the CPU
    maps and multiplies as it is.

    Args:
        folder: transformers' (``config.json``, weights, tokenizer files), or a diffusers pipeline's with
            ``text_encoder/`` and ``tokenizer/``, or such a ``text_encoder/`` itself.

    Raises:
        InputError: no such model, another kind of model, or a damaged file.
        MissingDependencyError: ``tokenizers`` is not installed.
        BackendError: torch cannot export it.
    """
    model_folder, tokenizer_folder = _folders(folder)
    tokenizer = read_tokenizer(tokenizer_folder)
    network, config, sha256 = read_clip_text(model_folder, tokenizer.length)
    length = network.mask.shape[0]
    if tokenizer.size > config.vocabulary:
        raise InputError(
            f"{tokenizer_folder} has tokens up to {tokenizer.size - 1}, the text model in {model_folder} "
            f"{config.vocabulary} rows for them",
            "take model and tokenizer from one place",
        )
    entry = {
        "model": "clip",
        "length": length,
        "width": config.width,
        "pad": tokenizer.pad,
        "vocabulary": config.vocabulary,
        "weights_sha256": sha256,
    }
    tokens = token_rows(text_tokenizer(tokenizer.json), [""], length, tokenizer.pad)
    with torch.no_grad():
        null: np.ndarray = network(torch.from_numpy(tokens))[0].numpy()
    files = graph_files(network, {"tokens": torch.zeros(2, length, dtype=torch.int64)}, ["context"], GRAPH, WEIGHTS)
    files.append(bytes_payload(TOKENIZER, tokenizer.json.encode()))
    return TextEncoderFiles(files, entry, length, config.width, {"context": null})


def _folders(folder: Path) -> tuple[Path, Path]:
    """(of the text model, of its tokenizer). Raises InputError."""
    check_readable(folder, InputError, folder=True, missing=FIX)
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder with config.json, weights and a tokenizer", FIX)
    if (folder / "model_index.json").is_file():
        if (folder / "text_encoder_2").is_dir():
            raise InputError(
                f"{folder} is a pipeline with several text encoders; expected one that has one, or SDXL's two",
                "encode prompts outside and pass conditioning={'context': array, ...}",
            )
        model, tokenizer = folder / "text_encoder", folder / "tokenizer"
    else:
        model = folder
        tokenizer = folder if has_tokenizer(folder) else folder.resolve().parent / "tokenizer"
    if not (model / "config.json").is_file():
        raise InputError(f"{model} has no config.json: no model of transformers", FIX)
    if not has_tokenizer(tokenizer):
        raise InputError(
            f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt, here or in {tokenizer}",
            FIX,
        )
    return model, tokenizer


def read_projection(folder: Path) -> nn.Linear:
    """The linear that makes a text as a whole of its last token's states. Raises InputError where there is none."""
    tensors, _ = read_tensors(folder, WEIGHT_FILES)
    weight = tensors.get(PROJECTION)
    if weight is None or weight.ndim != 2:
        raise InputError(f"{folder}: its weights lack {PROJECTION}", "name a CLIP text model with projection")
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    load_float32(projection, {"weight": weight}, str(folder))
    return projection.eval().requires_grad_(False)


def read_clip_text(folder: Path, length: int | None = None) -> tuple[ClipText, ClipTextConfig, str]:
    """CLIP's text model out of a folder of transformers: (network in evaluation mode, its settings, weights' sha256).

    Args:
        folder: with config.json and weights, of the text model or of a whole CLIP.
        length: of a text; None, or more than the model has positions, is as many as those.

    Raises:
        InputError: another kind of model, or a damaged file.
    """
    given = read_json(folder / "config.json")
    _check_class(folder, given)
    if isinstance(given.get("text_config"), dict):  # of a whole CLIP
        given = {**given["text_config"], **(given.get("text_config_dict") or {})}
    tensors, sha256 = read_tensors(folder, WEIGHT_FILES)
    if any(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
    state = {name: tensor for name, tensor in tensors.items() if name not in NOT_USED}
    config = _read_config(folder, given, state)
    network = ClipText(config, min(length or config.positions, config.positions))
    load_float32(network, state, str(folder))
    return network.eval().requires_grad_(False), config, sha256


def _check_class(folder: Path, given: dict[str, Any]) -> None:
    named = given.get("architectures")
    found = named[0] if isinstance(named, list) and named else given.get("model_type")
    if found not in (*CLASSES, "clip", "clip_text_model"):
        raise InputError(
            f"{folder / 'config.json'} is of {found}; expected a CLIP text model ({', '.join(CLASSES)})",
            "encode prompts outside and pass conditioning={'context': array}",
        )


def _read_config(folder: Path, given: dict[str, Any], state: dict[str, Tensor]) -> ClipTextConfig:
    """Sizes are read off the weights, what leaves no trace in them off config.json. Raises InputError."""
    for name in (TOKEN_TABLE, POSITION_TABLE, "encoder.layers.0.mlp.fc1.weight"):
        if name not in state or state[name].ndim != 2:
            raise InputError(f"{folder}: its weights lack {name}; a CLIP text model has it", "download it again")
    vocabulary, width = state[TOKEN_TABLE].shape
    heads, activation, eps = (given.get(name, default) for name, default in DEFAULTS.items())
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise InputError(f"{folder}: num_attention_heads is {heads!r}; expected a divisor of the width {width}")
    if activation not in ("quick_gelu", "gelu"):
        raise InputError(f"{folder}: hidden_act is {activation!r}; expected quick_gelu or gelu")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise InputError(f"{folder}: layer_norm_eps is {eps!r}; expected a small number above 0")
    numbers = {int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")}
    return ClipTextConfig(
        vocabulary=vocabulary,
        positions=state[POSITION_TABLE].shape[0],
        width=width,
        hidden=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        layers=len(numbers),
        heads=heads,
        activation=activation,
        eps=float(eps),
    )
