"""Which files a checkpoint's path stands for: one file, a folder's, or the shards that an index lists."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_engine.artifact import SUFFIX
from sparse_engine.errors import CheckpointError
from sparse_engine.files import check_readable, parsed_json

from . import diffusers_folder

# A folder `N.ckpt/` of SparseDM and U-ViT holds these beside the optimizer's state.
FOLDER_FILES = ("nnet_ema.pth", "nnet.pth")
MISSING = "check the path of the checkpoint; a name on the Hub that is not in the local cache: build --download"
# What the Hub's libraries write into a folder, beside diffusers.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = re.compile(r"\.index(\.[\w-]+)?\.json$")  # with a variant: model.safetensors.index.fp16.json
NUMBERED = re.compile(r"^(\d+)\.ckpt$")
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)$")


@dataclass(frozen=True)
class WeightFiles:
    """Where a checkpoint's tensors are.

    Attributes:
        path: the file that stands for all: the one file, or the index.
        parts: the files to read.
        names: part -> the tensors that an index expects in it; empty without an index.
        notes: what was decided on the way.
    """

    path: Path
    parts: tuple[Path, ...]
    names: dict[Path, set[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Of the file; with an index, of it and of each part's, in the order of their names."""
        if not self.names:
            return _sha256(self.path)
        digests = [_sha256(file) for file in (self.path, *self.parts)]
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def find_weights(path: Path) -> WeightFiles:
    """The files that a path stands for.

    Raises:
        CheckpointError: there is none, it cannot be read or is no checkpoint, or a shard is missing or given alone.
    """
    check_readable(path, CheckpointError, folder=True, missing=MISSING)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == SUFFIX:
        raise CheckpointError(f"{path} is an engine; expected a checkpoint", "name the file that it was built from")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty", "copy or download the checkpoint again")
    if INDEX.search(path.name):
        return _indexed(path)
    _refuse_lone_shard(path)
    return WeightFiles(path, (path,), notes=_averaged_beside(path))


def _in_folder(folder: Path) -> WeightFiles:
    present = [name for name in FOLDER_FILES if (folder / name).is_file()]
    if present:
        found = find_weights(folder / present[0])
        if present[0] != FOLDER_FILES[0]:
            return WeightFiles(found.path, found.parts, notes=[f"{folder.name} has no nnet_ema.pth: using nnet.pth"])
        return found
    numbered = [each for each in numbered_checkpoints(folder) if (each / FOLDER_FILES[0]).is_file()]
    if numbered:
        found = _in_folder(numbered[-1])
        others = f"the newest of {len(numbered)}" if len(numbered) > 1 else "the only one"
        return dataclasses.replace(found, notes=[f"{numbered[-1].name} of {folder.name}: {others}", *found.notes])
    network = diffusers_folder.network_folder(folder)
    if network is not None:
        found = find_weights(network)
        diffusers_folder.check_config(network)
        return dataclasses.replace(found, notes=[f"the network is {network.name}/ of {folder.name}", *found.notes])
    saved = diffusers_folder.weights_in(folder)
    if saved is not None:
        found = find_weights(saved[0])
        return dataclasses.replace(found, notes=[*saved[1], *found.notes])
    choices = _indices(folder) or [folder / name for name in HUB_FILES if (folder / name).is_file()]
    shards = sorted(file for file in folder.iterdir() if SHARD.match(file.name))
    if shards and not choices:
        _refuse_lone_shard(shards[0])
    if len(choices) == 1:
        return find_weights(choices[0])
    if choices:
        raise CheckpointError(f"{folder} holds {' and '.join(file.name for file in choices)}", "name one of them")
    if (folder / ".metadata").exists():
        raise CheckpointError(
            f"{folder} is a checkpoint of torch.distributed in parts",
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth",
        )
    raise CheckpointError(
        f"{folder} is a folder without {' or '.join(FOLDER_FILES)}", "name the weights file or its *.index.json itself"
    )


def numbered_checkpoints(folder: Path) -> list[Path]:
    """The folders ``N.ckpt`` of a training, in the order of N."""
    found = [
        (int(match[1]), each) for each in folder.iterdir() if (match := NUMBERED.match(each.name)) and each.is_dir()
    ]
    return [each for _, each in sorted(found)]


def _indices(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if INDEX.search(path.name))


def _averaged_beside(path: Path) -> list[str]:
    """A note where the raw weights were named and the averaged ones lie beside them."""
    raw, averaged = FOLDER_FILES[1], path.with_name(FOLDER_FILES[0])
    if path.name != raw or not averaged.is_file():
        return []
    return [f"weights taken from {raw} as named; the averaged ones are in {averaged.name} beside it"]


def _indexed(index: Path) -> WeightFiles:
    """What an index lists: {"weight_map": {tensor: file}}."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f'{index} has no "weight_map" of tensors to files', "name the weights file itself")
    for name in where.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} lists {name!r}; expected the name of a file beside it")
    missing = sorted({name for name in where.values() if not os.path.lexists(index.parent / name)})
    if missing:
        raise CheckpointError(
            f"{index} lists {len(missing)} files that are not beside it: {', '.join(missing[:3])}", "download them too"
        )
    names: dict[Path, set[str]] = {}
    for tensor, name in where.items():
        names.setdefault(index.parent / name, set()).add(tensor)
    for part in names:
        check_readable(part, CheckpointError)
    return WeightFiles(index, tuple(sorted(names)), names, [f"{len(names)} shards listed by {index.name}"])


def _refuse_lone_shard(path: Path) -> None:
    shard = SHARD.match(path.name)
    if shard is None or int(shard["count"]) < 2:
        return
    count = int(shard["count"])
    numbers = [number for number in range(1, min(count, 4) + 1) if number != int(shard["number"])]
    siblings = [f"{shard['stem']}-{number:05d}-of-{count:05d}{shard['suffix']}" for number in numbers]
    indices = _indices(path.parent)
    wanted = f"{shard['stem']}{shard['suffix']}.index.json"
    fix = f"name {indices[0]}" if indices else f"put the others and {wanted} beside it, and name that"
    raise CheckpointError(
        f"{path} is one of {count} shards; the others are {', '.join(siblings)}{', ...' if count > 4 else ''}", fix
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    check_readable(path, CheckpointError)
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError on anything else."""
    try:
        values = parsed_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds a {type(values).__name__}; expected an object of settings")
    return values


def name_without_suffixes(path: Path) -> str:
    """``model`` of ``model.pth`` and of ``model.safetensors.index.json``."""
    return Path(INDEX.sub("", path.name)).stem


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differing(found: set[str], expected: set[str]) -> str | None:
    """How the tensors of a shard differ from what its index lists; None where they agree."""
    lacking, more = sorted(expected - found), sorted(found - expected)
    if lacking:
        return f"lacks {len(lacking)} tensors that its index lists, such as {lacking[0]}"
    return f"holds {len(more)} tensors that its index does not list, such as {more[0]}" if more else None
