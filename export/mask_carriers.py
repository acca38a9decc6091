"""What pruning tools leave in a state dict: masks are told from weights, packed weights unpacked, the rest refused.

Sources: apex ``contrib/sparsity/asp.py``; ModelOpt ``sparsity/weight_sparsity/module.py``; compressed-tensors
``compressors/sparse_compressors`` (llm-compressor writes it); ``torch.nn.utils.prune``; ``torch.ao.pruning``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparse_engine.errors import CheckpointError

# A mask's name -> the name of its weight: apex ASP; ModelOpt; torch.ao.pruning's FakeSparsity (PyTorch before 1.13
# stored it); torch.nn.utils.prune and any plain `X_mask`.
MASKS = (
    (re.compile(r"^(.*\.)?__(\w+)_mma_mask$"), r"\1\2"),
    (re.compile(r"^(.*\.)?_weight_mask$"), r"\1weight"),
    (re.compile(r"^(.*\.)?parametrizations\.(\w+)\.\d+\.mask$"), r"\1\2"),
    (re.compile(r"^(.+)_mask$"), r"\1"),
)
# How a weight is called while something multiplies it.
ORIGINALS = (
    (re.compile(r"^(.*\.)?parametrizations\.(\w+)\.original$"), r"\1\2"),
    (re.compile(r"^(.+)_orig$"), r"\1"),
)
# Helpers that change nothing of what the network computes, and what they are.
HELPERS = (
    (re.compile(r"(^|\.)__\w+_mma_pruned_p$"), "the values that apex ASP cut away"),
    (re.compile(r"_quantizer\._amax$"), "ModelOpt's quantisation ranges"),
)
PACKED = re.compile(r"^(.*?)(?:\.weight)?\.(compressed|bitmask|shape|row_offsets)$")
# Whatever stores something else than the weights that the network multiplies with: by name, with the way out.
REFUSED = (
    (
        r"(^|\.)(weight_packed|scale_packed|weight_scale\w*|weight_zero_point|weight_g_idx|weight_global_scale|qweight"
        r"|qzeros|g_idx|SCB|_packed_params\w*|weight\.(absmax|quant_map|nested_absmax))$|_quantizer\._(double_)?scale$",
        "a quantised weight's (compressed-tensors, GPTQ, bitsandbytes, ModelOpt)",
        "save the weights in float: dequantise or decompress the model first; build quantises with --precision int8",
    ),
    (
        r"_pre_quant_scale$",
        "ModelOpt's SmoothQuant scale, which the stored weights are not the model's without",
        "save the model before quantisation; build smooths with --smooth",
    ),
    (
        r"(^|\.)_?flat_param(_\d+)?$|(^|\.)_flat_param",
        "FSDP's flat parameter, a part of many weights in one",
        "gather it: save under FSDP's FULL_STATE_DICT",
    ),
    (
        r"(^|\.)weight_u$|parametrizations\.\w+\.\d+\._[uv]$",
        "spectral_norm's: the stored weight is not the one that is multiplied with",
        "call torch.nn.utils.remove_spectral_norm or parametrize.remove_parametrizations, then save",
    ),
    (
        r"(^|\.)weight_[gv]$|parametrizations\.\w+\.original[01]$",
        "weight_norm's: the weight is stored as a length and a direction",
        "call torch.nn.utils.remove_weight_norm or parametrize.remove_parametrizations, then save",
    ),
    (
        r"(^|\.)(lora_\w+|base_layer)(\.|$)",
        "an adapter's (LoRA), which the weights have to be merged with",
        "merge it: model.merge_and_unload(), then save",
    ),
)


@dataclass
class Carried:
    """Tensors told apart: the network's own weights, and weight name -> mask."""

    weights: dict[str, Any]
    masks: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def is_mask(name: str) -> bool:
    """Whether a stored tensor is a mask, by its name."""
    return _owner(name) is not None


def weight_name(name: str) -> str:
    """The name that a stored tensor's weight has in the network; its own where no pruning tool has renamed it."""
    for pattern, replacement in ORIGINALS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    packed = PACKED.match(name)
    return f"{packed[1]}.weight" if packed and packed[2] == "compressed" else name


def told_apart(tensors: Mapping[str, Any], file: str) -> Carried:
    """Tell weights from masks and helpers, under the network's own names.

    Raises:
        CheckpointError: a mask without its weight, of another shape, or with values beside 0 and 1; a weight that is
            stored twice, or without what it is multiplied with; a tool's tensors that cannot be taken.
    """
    _refuse(tensors, file)
    found = Carried(_unpacked(tensors, file))
    if len(found.weights) < len(tensors):
        found.notes.append("weights unpacked from the bitmasks of compressed-tensors")
    for name in list(found.weights):
        owner = _owner(name)
        if owner is not None:
            found.masks[owner] = _checked_mask(name, found.weights.pop(name), found.masks.get(owner), file)
    _drop_helpers(found)
    found.weights = _renamed(found, file)
    for name, mask in found.masks.items():
        if name not in found.weights or found.weights[name].shape != mask.shape:
            there = list(found.weights[name].shape) if name in found.weights else "nothing"
            raise CheckpointError(f"{file}: a mask of shape {list(mask.shape)} for {name}, where there is {there}")
    return found


def _refuse(tensors: Mapping[str, Any], file: str) -> None:
    for expression, what, fix in REFUSED:
        name = next((name for name in tensors if re.search(expression, name)), None)
        if name is not None:
            raise CheckpointError(f"{file}: {name} is {what}", fix)


def _owner(name: str) -> str | None:
    """The weight that a mask is for; None for a tensor that is no mask."""
    for pattern, replacement in MASKS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return None


def _checked_mask(name: str, mask: Any, earlier: Any, file: str) -> Any:
    """The mask as bools; where there is one for that weight already, what both keep."""
    kept = mask != 0
    if not bool(((mask == 1) | ~kept).all()):
        raise CheckpointError(
            f"{file}: the mask {name} has values other than 0 and 1",
            "multiply it into the weight before saving: torch.nn.utils.prune.remove",
        )
    return kept if earlier is None else kept & earlier


def _drop_helpers(found: Carried) -> None:
    for pattern, what in HELPERS:
        names = [name for name in found.weights if pattern.search(name)]
        for name in names:
            del found.weights[name]
        if names:
            found.notes.append(f"not used: {what}, such as {names[0]} ({len(names)} in all)")


def _renamed(found: Carried, file: str) -> dict[str, Any]:
    """Weights under the network's own names."""
    weights: dict[str, Any] = {}
    for name, tensor in found.weights.items():
        own = weight_name(name)
        if own != name and own not in found.masks:
            raise CheckpointError(
                f"{file}: {name} is a weight that something is applied to, and there is no mask of {own} beside it",
                "save the weights as they are applied: prune.remove, sparsifier.squash_mask(), remove_parametrizations",
            )
        if own in weights or (own != name and own in found.weights):
            raise CheckpointError(f"{file}: {name} and {own} are the same weight, stored twice", "keep one of them")
        weights[own] = tensor
    return weights


def _unpacked(tensors: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Put weights in place of compressed-tensors' (compressed, bitmask, shape)."""
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        match = PACKED.match(name)
        if match:
            parts.setdefault(match[1], {})[match[2]] = tensor
    packed = {layer: own for layer, own in parts.items() if "compressed" in own}
    left = {name: t for name, t in tensors.items() if not ((m := PACKED.match(name)) and m[1] in packed)}
    for layer, own in packed.items():
        if f"{layer}.weight" in left:
            raise CheckpointError(f"{file}: {layer}.weight and {layer}.compressed are the same weight, stored twice")
        left[f"{layer}.weight"] = _unpack(layer, own, file)
    return left


def _unpack(layer: str, own: Mapping[str, Any], file: str) -> Any:
    """One weight: a bit for each value, little-endian along the last axis, and the values that are kept."""
    missing = {"bitmask", "shape"} - own.keys()
    if missing:
        raise CheckpointError(f"{file}: {layer}.compressed has no {' and no '.join(sorted(missing))} beside it")
    shape = [int(size) for size in own["shape"].flatten().tolist()]
    bits, values = own["bitmask"], own["compressed"].flatten()
    fits = shape and min(shape) > 0 and bits.dtype == torch.uint8
    if not fits or bits.numel() != math.prod(shape[:-1]) * -(-shape[-1] // 8):
        raise CheckpointError(f"{file}: {layer}.bitmask does not fit its shape {shape}", "save the checkpoint again")
    rows = bits.numpy().reshape(*shape[:-1], -1)
    kept = torch.from_numpy(np.unpackbits(rows, axis=-1, count=shape[-1], bitorder="little").astype(bool))
    if int(kept.sum()) != values.numel():
        raise CheckpointError(
            f"{file}: {layer}.bitmask keeps {int(kept.sum())} weights, and {layer}.compressed holds {values.numel()}",
            "save the checkpoint again",
        )
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values
    return weight
