"""Checkpoint files to a state dict of NumPy arrays, with the masks they carry and the configuration beside them.

The steps: ``weight_files`` finds the files, ``weight_reading`` opens them, ``weight_choice`` takes one network out of
what they hold (``weight_sets``, ``averages``, ``names``), and ``mask_carriers`` tells its weights from its masks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_engine.errors import CheckpointError

from .hub import cached
from .mask_carriers import Carried, told_apart, weight_name
from .weight_choice import choose_weights
from .weight_files import WeightFiles, find_weights, name_without_suffixes, read_json
from .weight_reading import read_weights
from .weight_sets import entries_of


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: the file that the weights came from; the index of shards.
        state: name -> array, as float32 where it was a floating dtype, explicit masks not yet applied.
        masks: weight name -> bool array, where the file carries explicit masks.
        config: the configuration stored beside or in the checkpoint; empty where there is none.
        sha256: of the file; of index and shards together where there are several.
        notes: what was decided on the way, for the user to read.
    """

    path: Path
    state: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    config: dict[str, Any]
    sha256: str
    notes: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: array.shape for name, array in self.state.items()}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a ``.pth``/``.pt``/``.bin`` or ``.safetensors`` state dict, or one inside a training checkpoint's
            dictionaries or under prefixes; the ``*.index.json`` of shards; a SparseDM ``N.ckpt/`` or a Hub's folder; a
            diffusers pipeline's folder, of which the network is taken, or that network's own; the name of one on the
            Hub, which is looked for in the local cache alone.

    Raises:
        CheckpointError: not a checkpoint, unreadable, truncated, holding code, without tensors, with several networks
            and nothing to choose between them, with a pruning tool's tensors that cannot be taken, or with NaN or inf.
    """
    files = find_weights(cached(Path(path)))
    held, inside = read_weights(files)
    where = str(files.path)
    carried, notes = _chosen(held, files)
    state = {name: _to_numpy(name, tensor, where) for name, tensor in carried.weights.items()}
    masks = {name: mask.numpy() for name, mask in carried.masks.items()}
    config = {**inside, **_config_beside(files.path)}
    return Checkpoint(files.path, state, masks, config, files.sha256(), [*files.notes, *notes, *carried.notes])


def stored_weights(path: str | Path) -> tuple[WeightFiles, dict[str, tuple[str, Tensor]]]:
    """A checkpoint's weights as they are stored.

    Args:
        path: as ``load_checkpoint`` takes it.

    Returns:
        Its files; and the name that ``load_checkpoint`` gives a tensor -> (the name that it is stored under, but for
        what pruning tools add to it; the tensor in its own dtype, with its explicit mask multiplied in).

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    files = find_weights(Path(path))
    held, _ = read_weights(files)
    stored = {id(tensor): name for _, tensors in entries_of(held) for name, tensor in tensors.items()}
    carried, _ = _chosen(held, files)
    found = {}
    for name, tensor in carried.weights.items():
        mask = carried.masks.get(name)
        own = tensor if mask is None else torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
        found[name] = weight_name(stored.get(id(tensor), name)), own.detach()
    return files, found


def _chosen(held: Mapping[Any, Any], files: WeightFiles) -> tuple[Carried, list[str]]:
    """One network's weights and masks out of what files hold, and notes. Raises CheckpointError."""
    where = str(files.path)
    tensors, notes = choose_weights(held, files.path.name)
    for name, tensor in tensors.items():
        _check_plain(name, tensor, where)
    return told_apart(tensors, where), notes


def _check_plain(name: str, tensor: Tensor, where: str) -> None:
    """Refuse what is no dense array of real numbers with data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout}, {tensor.dtype}"
        raise CheckpointError(f"{where}: {name} is {kind}; expected plain real weights", "save it dense and in float")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise CheckpointError(
            f"{where}: {name} is a {type(tensor).__name__}; expected a plain tensor",
            "gather or dequantise it (full_tensor(), to_dense(), dequantize()), then save",
        )
    if tensor.is_meta or tensor.numel() == 0:
        found = "on the meta device" if tensor.is_meta else f"of shape {list(tensor.shape)}"
        raise CheckpointError(
            f"{where}: {name} holds no data ({found})",
            "save it where the weights are; gather a sharded model first (FULL_STATE_DICT, zero_to_fp32.py)",
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:  # a few bytes may stand for more than there is memory
        raise CheckpointError(
            f"{where}: {name} has shape {list(tensor.shape)}, expanded from the {stored} bytes that are stored",
            "save it whole: tensor.contiguous()",
        )


def _to_numpy(name: str, tensor: Tensor, where: str) -> np.ndarray:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor.contiguous().numpy()
    array: np.ndarray = tensor.float().contiguous().numpy()
    if np.isfinite(array).all():
        return array
    bad = int(array.size - np.isfinite(array).sum())
    if torch.isfinite(tensor.double()).all():
        raise CheckpointError(
            f"{where}: {name} has {bad} of {array.size} values beyond the range of float32",
            "save the weights in float32",
        )
    raise CheckpointError(
        f"{where}: {name} has {bad} of {array.size} values that are NaN or infinite",
        "the training diverged, or the file is damaged: use an earlier checkpoint",
    )


def _config_beside(file: Path) -> Mapping[str, Any]:
    """``NAME.json`` beside ``NAME.pth``, else ``config.json`` in the same folder, else in the one above a ``.ckpt``.

    A link's own folder comes before that of the file it leads to: the Hub's cache keeps files elsewhere by their hash.
    """
    for place in dict.fromkeys((file, file.resolve())):
        folders = [place.parent, place.parent.parent] if place.parent.suffix == ".ckpt" else [place.parent]
        own = place.with_name(f"{name_without_suffixes(place)}.json")
        for candidate in (own, *(folder / "config.json" for folder in folders)):
            if os.path.lexists(candidate):
                return read_json(candidate)
    return {}
