"""Checkpoint files to a state dict of NumPy arrays, with the masks they carry and the configuration beside them.

Pickles are opened with ``weights_only=True`` and nothing else: code in a file is never run.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.artifact import SUFFIX
from sparse_engine.errors import CheckpointError

# Where a training script puts the weights: the averaged ones first, since those are what the authors sample from.
WEIGHT_KEYS = ("nnet_ema", "ema", "model_ema", "nnet", "model", "state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# A folder `N.ckpt/` of SparseDM and U-ViT holds these beside the optimizer's state.
FOLDER_FILES = ("nnet_ema.pth", "nnet.pth")
MASK_SUFFIXES = ("__weight_mma_mask", "_mask")  # NVIDIA's ASP; torch.nn.utils.prune


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        path: the file that the weights came from.
        state: name -> array, as float32 where it was a floating dtype, explicit masks not yet applied.
        masks: weight name -> bool array, where the file carries explicit masks.
        config: the configuration stored beside or in the checkpoint; empty where there is none.
        sha256: of the file.
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
        path: a ``.pth``/``.pt`` state dict, or one nested under ``nnet_ema``, ``ema``, ``model``, ``state_dict``; a
            ``.safetensors`` file; or a SparseDM ``N.ckpt/`` folder.

    Raises:
        CheckpointError: not a checkpoint, truncated, holding code, without tensors, or with NaN or inf in a tensor.
    """
    file, notes = _weights_file(Path(path))
    raw, config = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    tensors = _strip_prefixes(_peel(raw, file, notes))
    state = {name: _to_numpy(name, tensor, file) for name, tensor in tensors.items()}
    state, masks = _split_masks(state, file)
    config = {**config, **_config_beside(file)}
    return Checkpoint(file, state, masks, config, _sha256(file), notes)


def _weights_file(path: Path) -> tuple[Path, list[str]]:
    if path.is_dir():
        for name in FOLDER_FILES:
            if (path / name).is_file():
                note = [] if name == FOLDER_FILES[0] else [f"{path.name} has no {FOLDER_FILES[0]}: using {name}"]
                return path / name, note
        raise CheckpointError(f"{path} is a folder without {' or '.join(FOLDER_FILES)}", "name the weights file itself")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", "check the path of the checkpoint")
    if path.suffix == SUFFIX:
        raise CheckpointError(f"{path} is an engine; expected a checkpoint", "name the file that it was built from")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty", "copy or download the checkpoint again")
    return path, []


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}", "copy or download it again"
        ) from error
    return tensors, _parse_config(metadata["config"], f"{file} (metadata)") if "config" in metadata else {}


def _read_pickle(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on a pickle protocol help nobody here
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise CheckpointError(
                f"{file} holds Python objects that are not weights; they were not run ({_reason(error)})",
                "save the plain state dict: torch.save(model.state_dict(), ...)",
            ) from error
        raise CheckpointError(
            f"{file} is not a checkpoint that torch can read ({_reason(error)})", _CHECK_FILE
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file} is truncated, damaged or no checkpoint ({_reason(error)})", _CHECK_FILE
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    config = loaded.get("config")
    return dict(loaded), dict(config) if isinstance(config, Mapping) else {}


_CHECK_FILE = "check that it is a .pth/.pt/.safetensors checkpoint, whole; copy or download it again"


def _reason(error: Exception) -> str:
    """The part of torch's many-line message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0][:160]


def _peel(raw: dict[str, Any], file: Path, notes: list[str]) -> dict[str, Any]:
    """Walk into the dictionaries that training scripts wrap around a state dict."""
    depth = 0
    while True:
        tensors = {str(name): value for name, value in raw.items() if hasattr(value, "dtype")}
        inner = next((key for key in WEIGHT_KEYS if isinstance(raw.get(key), Mapping)), None)
        if inner is None or depth == 4:
            break
        notes.append(f"weights taken from the entry {inner!r} of {file.name}")
        raw, depth = dict(raw[inner]), depth + 1
    if not tensors:
        raise CheckpointError(
            f"{file} has no tensors; its entries are {', '.join(map(str, list(raw)[:6])) or 'none'}",
            f"expected a state dict, or one under {', '.join(WEIGHT_KEYS)}",
        )
    return tensors


def _strip_prefixes(tensors: dict[str, Any]) -> dict[str, Any]:
    def strip(name: str) -> str:
        for prefix in WRAPPER_PREFIXES:
            if name.startswith(prefix):
                return strip(name[len(prefix) :])
        return name.replace("._orig_mod.", ".")

    return {strip(name): tensor for name, tensor in tensors.items()}


def _to_numpy(name: str, tensor: Any, file: Path) -> np.ndarray:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout}, {tensor.dtype}"
        raise CheckpointError(f"{file}: {name} is {kind}; expected plain real weights", "save it dense and in float")
    tensor = tensor.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: np.ndarray = tensor.contiguous().numpy()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise CheckpointError(
            f"{file}: {name} has {bad} of {array.size} values that are NaN or infinite",
            "the training diverged, or the file is damaged: use an earlier checkpoint",
        )
    return array


def _split_masks(state: dict[str, np.ndarray], file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tell weights from the masks stored beside them; ``X_orig`` goes back to its own name ``X``."""
    weights, masks = {}, {}
    for name, array in state.items():
        suffix = next((suffix for suffix in MASK_SUFFIXES if name.endswith(suffix)), None)
        if suffix is None:
            weights[name.removesuffix("_orig")] = array
            continue
        owner = name.removesuffix(suffix)
        masks[owner + "weight" if suffix.startswith("__") else owner] = array != 0
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            found = list(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(f"{file}: a mask of shape {list(mask.shape)} for {name}, where there is {found}")
    return weights, masks


def _config_beside(file: Path) -> dict[str, Any]:
    """``NAME.json`` beside ``NAME.pth``, else ``config.json`` in the same folder, else in the one above a ``.ckpt``."""
    folders = [file.parent, file.parent.parent] if file.parent.suffix == ".ckpt" else [file.parent]
    for candidate in (file.with_suffix(".json"), *(folder / "config.json" for folder in folders)):
        if candidate.is_file():
            return _parse_config(candidate.read_bytes(), str(candidate))
    return {}


def _parse_config(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:  # bad JSON, or bytes that are no text
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} holds a {type(config).__name__}; expected an object of settings")
    return config


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
