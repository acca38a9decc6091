"""Damage from a seed: to bytes, to the members of a zip, to JSON, to the opcodes of a pickle."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

HUGE = (2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**400, 1e308, -1, 0, 0.5, float("nan"), float("inf"))
VALUES = (None, True, "", "x" * 5000, "../../x", "\x00", "é", [], {}, [[]], [None] * 50, *HUGE)


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """One to eight edits: flips, cuts, insertions, repeats, huge lengths, and truncation."""
    altered = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(altered) + 1)
        match rng.randrange(6):
            case 0 if at < len(altered):
                altered[at] ^= 1 << rng.randrange(8)
            case 1:
                altered[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
            case 2:
                del altered[at : at + rng.choice((1, 8, 4096))]
            case 3:
                altered[at:at] = altered[at : at + rng.randrange(1, 512)]
            case 4:
                altered[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
            case _:
                del altered[rng.randrange(len(altered) + 1) :]
    return bytes(altered)


def json_of(value: Any, rng: random.Random) -> Any:
    """One to three edits: a value of another type or size, a key gone, renamed or added, deep nesting."""
    for _ in range(rng.choice((1, 1, 3))):
        value = _edited(value, rng)
    return value


def _edited(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
        return _other(rng)
    holder: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("", "x", key + "x"))] = holder.pop(key)
        case 2:
            holder[key] = _other(rng)
        case _:
            holder[key] = _edited(holder[key], rng)
    return holder


def _other(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        nested: Any = 0
        for _ in range(800):
            nested = [nested]
        return nested
    return rng.choice(VALUES)


def text_of(data: bytes, rng: random.Random) -> bytes:
    """A JSON file: its values, or its bytes."""
    return bytes_of(data, rng) if rng.random() < 0.4 else json.dumps(json_of(json.loads(data), rng)).encode()


def zip_of(data: bytes, rng: random.Random) -> bytes:
    """A zip written anew with a member gone, doubled, renamed, compressed or damaged inside, its CRC right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(5):
        case 0:
            del members[at]
        case 1:
            members.append((name, content))
        case 2:
            members[at] = (rng.choice(("x", "../" + name, name + "x")), content)
        case 3 if name.endswith(".pkl"):
            members[at] = (name, pickle_of(content, rng))
        case _:
            members[at] = (name, text_of(content, rng) if name.endswith(".json") else bytes_of(content, rng))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", rng.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
        for each in members:
            archive.writestr(*each)
    return made.getvalue()


def pickle_of(content: bytes, rng: random.Random, canary: Path | None = None) -> bytes:
    """A pickle with opcodes exchanged; or, with a canary, one that would write it if it were run."""
    if canary is not None:
        return pickle.dumps(_Canary(canary), protocol=2)
    altered = bytearray(content)
    for _ in range(rng.choice((1, 3))):
        altered[rng.randrange(len(altered))] = rng.choice(b"(.0125FINSKUVX]abcdeghijloprstu}RQ\x80\x81\x82\x85\x86\x87")
    return bytes(altered)


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def safetensors_of(data: bytes, rng: random.Random) -> bytes:
    """The header's JSON edited, its length right; or bytes."""
    if rng.random() < 0.4:
        return bytes_of(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json_of(json.loads(data[8 : 8 + length]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
