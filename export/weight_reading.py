"""Weight files to dictionaries of tensors.

Pickles are opened with ``weights_only=True`` and nothing else: code in a file is never run. Of Python's objects
``argparse.Namespace`` alone is taken, in which training scripts store their command line.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparse_engine.errors import CheckpointError

from .weight_files import WeightFiles, differing, parse_json

CHECK_FILE = "check that it is a .pth/.pt/.safetensors checkpoint, whole; copy or download it again"
LIST_ENTRIES = ("model", "optimizer", "epoch", "step", "ema")  # of a training checkpoint that is a list
LFS_POINTER = b"version https://git-lfs"


def read_weights(files: WeightFiles) -> tuple[dict[Any, Any], dict[str, Any]]:
    """(what the files hold, the configuration inside). Raises CheckpointError on a damaged or hostile file."""
    held: dict[Any, Any] = {}
    config: dict[str, Any] = {}
    for part in files.parts:
        content, inside = _read(part)
        if part in files.names:
            problem = differing({str(name) for name in content}, files.names[part])
            if problem:
                raise CheckpointError(f"{part} {problem}", "download the shards and the index of one revision")
        held.update(content)
        config.update(inside)
    return held, config


def _read(file: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    with file.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise CheckpointError(f"{file} is a pointer of Git LFS, not the weights", "git lfs pull")
    if file.suffix == ".safetensors" and start.startswith(b"PK"):
        raise CheckpointError(f"{file} is a PyTorch checkpoint and no safetensors file", "rename it to .pth")
    safetensors = file.suffix == ".safetensors" or start[8:9] == b"{"  # the Hub's cache has no suffixes
    return _read_safetensors(file) if safetensors else _read_pickle(file)


def _read_safetensors(file: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}", "copy or download it again"
        ) from error
    return tensors, parse_json(metadata["config"], f"{file} (metadata)") if "config" in metadata else {}


def _read_pickle(file: Path) -> tuple[dict[Any, Any], dict[str, Any]]:
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # torch's remarks on a pickle protocol help nobody here
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise _refused_pickle(file, error) from error
    except Exception as error:  # of any kind, where a file is damaged
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{file} is a TorchScript program, not weights", "save them: torch.save(module.state_dict(), ...)"
            ) from error
        raise CheckpointError(
            f"{file} is truncated, damaged or no checkpoint ({_reason(error)})", CHECK_FILE
        ) from error
    if _is_training_list(loaded):
        loaded = dict(zip(LIST_ENTRIES, loaded, strict=False))
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    config, line = loaded.get("config"), loaded.get("args")
    inside = dict(config) if isinstance(config, Mapping) else {}
    return dict(loaded), {**inside, "args": _plain(line)} if isinstance(line, argparse.Namespace) else inside


def _is_training_list(loaded: Any) -> bool:
    """Whether it is ``[model, optimizer, epoch, step, ema]``, as ermongroup/ddim and PNDM save, or without the last."""
    fits = isinstance(loaded, list) and len(LIST_ENTRIES) - 1 <= len(loaded) <= len(LIST_ENTRIES)
    return fits and isinstance(loaded[0], Mapping) and isinstance(loaded[1], Mapping)


def _plain(line: argparse.Namespace) -> dict[str, Any]:
    """A training script's command line: its numbers and texts, which a family may know how to read."""
    return {name: value for name, value in vars(line).items() if isinstance(value, (str, int, float))}


def _refused_pickle(file: Path, error: Exception) -> CheckpointError:
    if "semi_structured" in str(error):
        return CheckpointError(
            f"{file} holds PyTorch's semi-structured sparse tensors, packed for one GPU",
            "save them dense: {name: tensor.to_dense() for each}; build finds their zeros again",
        )
    if "Unsupported global" in str(error):
        return CheckpointError(
            f"{file} holds Python objects that are not weights; they were not run ({_reason(error)})",
            "save the plain state dict: torch.save(model.state_dict(), ...)",
        )
    return CheckpointError(f"{file} is not a checkpoint that torch can read ({_reason(error)})", CHECK_FILE)


def _reason(error: Exception) -> str:
    """The part of torch's many-line message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0][:160]
