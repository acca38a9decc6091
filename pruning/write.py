"""A pruned checkpoint, stored as the dense one is: its own names and types, its folder if it is one.

What was pruned and what was left dense on purpose goes into the file's own metadata, as part of the configuration that
``load_checkpoint`` finds there: it is not lost where the file is moved alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_engine.errors import OptionError
from sparse_engine.export import diffusers_folder
from sparse_engine.export.checkpoint import stored_weights
from sparse_engine.export.model import Model
from sparse_engine.export.weight_files import WeightFiles, find_weights, name_without_suffixes
from sparse_engine.files import (
    UMASK,
    check_fillable,
    check_writable,
    filling,
    in_folder,
    kept_if_done,
    output_error,
    replacing,
)

from .oneshot import Pruned

SUFFIX = ".safetensors"
OF_DIFFUSERS = f"diffusion_pytorch_model{SUFFIX}"


def output_for(checkpoint: Path, output: Path) -> Path:
    """Where the result goes: a folder for what diffusers saved as one, else a file, in ``output`` if that is a folder.

    Raises:
        CheckpointError: the checkpoint is none.
        OptionError, OutputError: the result cannot be written there.
    """
    files = find_weights(checkpoint)
    if is_folder(checkpoint, files, output):
        check_fillable(output)
        return output
    output = in_folder(output, f"{name_without_suffixes(Path(os.path.abspath(checkpoint)))}{SUFFIX}")
    check_writable(output, SUFFIX)
    check_writable(output.with_suffix(".json"))
    if output.exists() and output.samefile(files.path):
        raise OptionError(f"{output} is the dense checkpoint itself", "write elsewhere: it would be lost")
    return output


def is_folder(checkpoint: Path, files: WeightFiles, output: Path) -> bool:
    """Whether the result is a folder for diffusers: what it saved was given as one, and no file is asked for."""
    saved = diffusers_folder.WEIGHTS.match(files.path.name) is not None
    return saved and checkpoint.is_dir() and output.suffix != SUFFIX


def write_pruned(checkpoint: Path, output: Path, model: Model, pruned: Pruned) -> None:
    """Write a pruned checkpoint.

    Args:
        checkpoint: the dense one.
        output: what ``output_for`` says.
        model: the dense model.
        pruned: what ``prune`` made.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    files, stored = stored_weights(checkpoint)
    tensors = _renewed(stored, model, pruned.tensors)
    metadata = {"format": "pt", "config": json.dumps({"pruning": pruned.record()})}
    if is_folder(checkpoint, files, output):
        with filling(output) as folder:
            network = _copied(checkpoint, files, folder)
            _save(tensors, network / OF_DIFFUSERS, metadata, output)
        return
    with replacing(output.with_suffix(".json")) as stream:
        stream.write(json.dumps(model.settings(), indent=1).encode())
    with kept_if_done(output) as temporary:
        _save(tensors, temporary, metadata, output)


def _renewed(stored: Mapping[str, tuple[str, Tensor]], model: Model, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors under the names they are stored by, those of pruned layers new, in the shape and type of the old."""
    layout = model.family.layout({name: tuple(tensor.shape) for name, (_, tensor) in stored.items()})
    names = {} if layout is None else layout.names
    renewed = {}
    for name, (own, tensor) in stored.items():
        made = new.get(names.get(name, name))
        value = tensor if made is None else made.reshape(tensor.shape).to(tensor.dtype)
        renewed[own] = value.contiguous().clone()  # of storage of its own: a file holds no shared one
    return renewed


def _copied(checkpoint: Path, files: WeightFiles, folder: Path) -> Path:
    """Copy all of a folder but its network's weights. Returns the network's folder there."""
    network = files.path.parent
    inside = network.resolve().relative_to(checkpoint.resolve())
    target = folder / inside.with_name(inside.name.removesuffix("_ema")) if inside.name else folder
    others = [network.with_name(name) for name in diffusers_folder.NETWORKS] if inside.name else []
    for path in sorted(checkpoint.rglob("*")):
        if path.is_dir() or path in files.parts or path == files.path:
            continue
        place = folder / path.relative_to(checkpoint)
        if network in path.parents and inside.name:
            place = target / path.relative_to(network)
        elif any(other in path.parents for other in others):  # raw weights, where the averaged ones were pruned
            continue
        if _is_of_weights(path, network):
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        except OSError as error:
            raise output_error(place, error) from error
    target.mkdir(parents=True, exist_ok=True)
    return target


def _is_of_weights(path: Path, network: Path) -> bool:
    """Whether a file is another form of the network's weights: a variant, a shard, an index."""
    return path.parent == network and path.name.startswith("diffusion_pytorch_model")


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str], wanted: Path) -> None:
    """Write a safetensors file, flushed to disk. Raises OutputError that names ``wanted``."""
    try:
        save_file(dict(tensors), path, metadata)
        path.chmod(0o666 & ~UMASK)
        with path.open("r+b") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise output_error(wanted, error) from error
    except SafetensorError as error:  # which it makes of a full disk, too
        full = "No space left" in str(error) or "os error 28" in str(error)
        raise output_error(wanted, OSError(28 if full else 5, str(error))) from error
