"""SDXL's two CLIP text models as one graph: tokens [B, L] of each -> context [B, L, D1 + D2], pooled [B, P].

Source: Podell et al., "SDXL" (arXiv 2307.01952), section 2.3, and diffusers' ``StableDiffusionXLPipeline``. Of both the
states before the last layer are the context, not normed; of the second the last states of the token that ends the text,
normed and projected, are the text as a whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine.backends.base import bytes_payload
from sparse_engine.errors import InputError
from sparse_engine.text import GRAPH, SECOND_TOKENIZER, TOKENIZER, WEIGHTS, text_tokenizer, token_rows

from .asset_graph import graph_files
from .clip_tokenizer import read_tokenizer
from .diffusers_folder import PIPELINE
from .text_encoder import ClipText, TextEncoderFiles, read_clip_text, read_projection
from .weight_files import read_json

PARTS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


class TwoClips(nn.Module):
    """Two text models and the projection of the second.

    Args:
        first, second: of one length.
        projection: of the second's last token.
        eos: the number of the token that ends a text, in the second's vocabulary.
    """

    def __init__(self, first: ClipText, second: ClipText, projection: nn.Linear, eos: int) -> None:
        super().__init__()
        self.first, self.second, self.projection, self.eos = first, second, projection, eos

    def forward(self, tokens: Tensor, tokens_2: Tensor) -> tuple[Tensor, Tensor]:
        """Int64 [B, L] each -> float32 [B, L, D1 + D2] and [B, P]."""
        states = self.second.states(tokens_2)
        ends = (tokens_2 == self.eos).float()
        first_end = ends * (ends.cumsum(dim=1) == 1).float()
        last = (self.second.final_layer_norm(states[-1]) * first_end[:, :, None]).sum(dim=1)
        return torch.cat([self.first.states(tokens)[-2], states[-2]], dim=-1), self.projection(last)


def two_text_encoders_files(folder: Path) -> TextEncoderFiles:
    """Make an engine's text encoder of the two of a pipeline's folder.

    Args:
        folder: diffusers', with ``text_encoder/``, ``tokenizer/``, ``text_encoder_2/`` and ``tokenizer_2/``.

    Raises:
        InputError, MissingDependencyError, BackendError: as ``text_encoder_files``.
    """
    (first, second), (tokenizer, tokenizer_2), digests = _read(folder)
    network = TwoClips(first, second, read_projection(folder / PARTS[1][0]), tokenizer_2.eos).eval()
    length = first.mask.shape[0]
    example = {name: torch.zeros(2, length, dtype=torch.int64) for name in ("tokens", "tokens_2")}
    rows = [
        torch.from_numpy(token_rows(text_tokenizer(each.json), [""], length, each.pad))
        for each in (tokenizer, tokenizer_2)
    ]
    with torch.no_grad():
        context, pooled = (each[0].numpy() for each in network(*rows))
    files = graph_files(network, example, ["context", "pooled"], GRAPH, WEIGHTS)
    files.append(bytes_payload(TOKENIZER, tokenizer.json.encode()))
    files.append(bytes_payload(SECOND_TOKENIZER, tokenizer_2.json.encode()))
    entry: dict[str, Any] = {
        "model": "two clips",
        "length": length,
        "width": context.shape[1],
        "pooled": len(pooled),
        "pad": tokenizer.pad,
        "vocabulary": tokenizer.size,
        "weights_sha256": digests[0],
        "second": {"pad": tokenizer_2.pad, "vocabulary": tokenizer_2.size, "weights_sha256": digests[1]},
    }
    null = {"context": context, "pooled": pooled}
    return TextEncoderFiles(files, entry, length, context.shape[1], _nulls(folder, null), len(pooled))


def _nulls(folder: Path, empty: dict[str, np.ndarray]) -> dict[str, np.ndarray | str]:
    """What guidance takes for none: the pipeline says whether that is zeros or the empty text."""
    index = folder / PIPELINE
    zeros = read_json(index).get("force_zeros_for_empty_prompt", True) if index.is_file() else True
    return dict.fromkeys(empty, "zeros") if zeros else dict(empty)


def _read(folder: Path) -> tuple[list[ClipText], list[Any], list[str]]:
    """Both text models, of one length, both tokenizers, and the hashes of the weights."""
    networks, tokenizers, digests = [], [], []
    for model, tokenizer in PARTS:
        for part in (model, tokenizer):
            if not (folder / part).is_dir():
                raise InputError(f"{folder} has no {part}/ beside {PARTS[1][0]}/", "download the whole folder")
        tokenizers.append(read_tokenizer(folder / tokenizer))
        network, config, sha256 = read_clip_text(folder / model, tokenizers[-1].length)
        if tokenizers[-1].size > config.vocabulary:
            raise InputError(
                f"{folder / tokenizer} has tokens up to {tokenizers[-1].size - 1}, and {folder / model} "
                f"{config.vocabulary} rows for them",
                "take model and tokenizer from one place",
            )
        if config.layers < 2:
            raise InputError(f"{folder / model} has {config.layers} layer; expected two or more", "download it again")
        networks.append(network)
        digests.append(sha256)
    lengths = [network.mask.shape[0] for network in networks]
    if lengths[0] != lengths[1]:
        raise InputError(f"{folder}: its text encoders read {lengths[0]} and {lengths[1]} tokens; expected one number")
    return networks, tokenizers, digests
