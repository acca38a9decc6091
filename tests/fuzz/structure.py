"""Damage to what a file means, its bytes being in order: pickles, tensors, names, arrays, and the fields of a zip."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from typing import Any

import mutate
import numpy as np
import torch

CANARY = "canary"
PARTS = ("module", "_orig_mod", "model", "ema", "ema_model", "state_dict", "optimizer", "config", "shadow_params", "")
KEYS = (0, 1.5, None, True, ("a", 1), b"k", "", ".", "..", "weight_mask", "x" * 4000, "\x00", "ключ")
MOST = 1 << 20  # elements that are worked on
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FILL = (float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, 0.0)
# Of a zip: signature -> (offset, struct format) of the fields that say where and how much.
FIELDS = {
    b"PK\x03\x04": ((4, "H"), (6, "H"), (8, "H"), (14, "L"), (18, "L"), (22, "L"), (26, "H"), (28, "H")),
    b"PK\x01\x02": ((8, "H"), (10, "H"), (16, "L"), (20, "L"), (24, "L"), (28, "H"), (30, "H"), (32, "H"), (42, "L")),
    b"PK\x05\x06": ((4, "H"), (8, "H"), (10, "H"), (12, "L"), (16, "L"), (20, "H")),
}
BOMB = 3 << 29  # bytes that a deflated member of zeros unpacks to: more than a case may use


def checkpoint_of(data: bytes, rng: random.Random) -> bytes:
    """A state dict with one to three edits of its tensors, its names or its nesting, saved by torch."""
    made = io.BytesIO()
    try:
        torch.save(_edited(data, rng), made, _use_new_zipfile_serialization=rng.random() < 0.8)
    except RecursionError:  # nested beyond what torch can save: other edits
        return checkpoint_of(data, rng)
    return made.getvalue()


def _edited(data: bytes, rng: random.Random) -> Any:
    held: Any = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice((1, 1, 3))):
        held = rng.choice((_tensor_changed, _tensor_changed, _renamed, _nested, _added))(held, rng)
    return held


def _any_key(held: dict[Any, Any], rng: random.Random) -> Any:
    return rng.choice(list(held))


def _tensor_changed(held: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    key = _any_key(held, rng)
    if isinstance(held[key], torch.Tensor):
        try:
            return {**held, key: _other_tensor(held[key], rng)}
        except RuntimeError:  # what PyTorch cannot do with a tensor that was changed before
            return held
    return {**held, key: rng.choice(mutate.VALUES[:12])}


def _other_tensor(tensor: torch.Tensor, rng: random.Random) -> Any:
    if tensor.numel() > MOST:  # one that stands for many already: no operation on it is a file's doing
        return tensor
    match rng.randrange(10):
        case 0:
            return tensor.to(rng.choice(DTYPES))
        case 1:
            return torch.full_like(tensor, rng.choice(FILL)) if tensor.is_floating_point() else tensor
        case 2:
            return torch.zeros(1).expand(rng.choice((1 << 29, 1 << 33, 1 << 40)))  # four bytes that stand for many
        case 3:
            return tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
        case 4:
            return tensor.float().to(rng.choice(FLOAT8))
        case 5:
            return rng.choice((tensor.to_sparse(), tensor.t())) if tensor.dim() == 2 else tensor[None]
        case 6:
            return torch.empty(tensor.shape, device="meta")
        case 7:
            return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
        case 8:
            return tensor.expand(rng.choice((0, 1, 3)), *tensor.shape)
        case _:
            return rng.choice(mutate.VALUES[:12])


def _renamed(held: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    key = _any_key(held, rng)
    if rng.random() < 0.3:  # all of them under a prefix
        prefix = ".".join(rng.choices(PARTS, k=rng.choice((1, 2, 6))))
        return {f"{prefix}.{name}": value for name, value in held.items()}
    new = rng.choice((*KEYS, f"{rng.choice(PARTS)}.{key}", f"{key}_mask", f"{key}_orig", f"{key}__weight_mma_mask"))
    return {new if name == key else name: value for name, value in held.items()}


def _nested(held: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    if rng.random() < 0.2:
        held = dict(held)
        held[rng.choice(PARTS)] = [held, held] if rng.random() < 0.5 else held  # holds itself
        return held
    for _ in range(rng.choice((1, 1, 2, 5, 12, 20))):
        held = {rng.choice(PARTS): rng.choice((held, held, [held], tuple(held.values())))}
    return held


def _added(held: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    settings = {"family": "uvit", "heads": 4, "num_classes": 5, "value_range": [-1, 1], "nnet": {"mlp_ratio": 4}}
    tensors = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    beside: tuple[Any, ...] = (
        {"config": mutate.json_of(settings, rng)},
        {rng.choice(PARTS): dict(tensors)},
        {rng.choice(PARTS): list(tensors.values())},
        {rng.choice(KEYS): torch.ones(rng.choice(((), (0,), (3,), (2, 2))))},
        {rng.choice(KEYS): rng.choice(mutate.VALUES[:12])},
    )
    return {**held, **rng.choice(beside)}


def pickle_in_zip(data: bytes, rng: random.Random) -> bytes:
    """The pickle of torch's zip exchanged for a hostile one, or with opcodes put before its end; the CRC is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    hostile = rng.choice(_hostile())
    if rng.random() < 0.5:
        members[name] = b"\x80\x02" + hostile + b"."
    else:
        at = rng.choice((2, len(members[name]) - 1))
        members[name] = members[name][:at] + hostile + rng.choice((b"0", b"")) + members[name][at:]
    return _zipped(members)


def _hostile() -> tuple[bytes, ...]:
    touch = b"touch " + CANARY.encode()
    short = b"\x8c" + bytes([len(touch)]) + touch
    text = b"(X" + struct.pack("<L", len(touch)) + touch
    wide = b"]" + b"".join(b"(" + b"h\x00" * 10 + b"lq" + bytes([i]) for i in range(1, 20))
    return (
        b"cos\nsystem\n" + text + b"tR",
        b"cposix\nsystem\n" + text + b"tR",
        b"\x8c\x02os\x8c\x06system\x93" + short + b"\x85R",
        b"(ios\nsystem\n" + text[1:],
        b"(cos\nsystem\n" + short + b"o",
        b"cbuiltins\neval\n(Vopen('" + CANARY.encode() + b"','w')\ntR",
        b"cpathlib\nPath\n" + short + b"\x85\x81",
        b"ctorch\nload\n" + text + b"tR",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ccollections\nOrderedDict\n)R}(U\x01aK\x01ub",
        b"\x8b" + struct.pack("<l", 1 << 24) + b"\xff" * (1 << 16),  # LONG4 beyond its data
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"a",  # BINUNICODE8
        b"B" + struct.pack("<L", (1 << 32) - 1),  # BINBYTES
        b"\x8e" + struct.pack("<Q", 1 << 40),  # BINBYTES8
        b"r" + struct.pack("<L", (1 << 32) - 1),  # LONG_BINPUT
        b"j" + struct.pack("<L", 1 << 31),  # LONG_BINGET of nothing
        b"(" * 200000 + b"t" * 200000,
        b"]" * 100000 + b"a" * 99999,
        b"]q\x00" + wide,
        b"]q\x00h\x00a",
        b"U\x07storageQ",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\x7ftQ",
        b"(U\x07storagectorch\nFloatStorage\nU\x05../..U\x03cpuK\x01tQ",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x04metaK\x01tQ",
        b"\x95" + struct.pack("<Q", 1 << 63),
        b"\x80\xff",
    )


def _zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def zip_fields_of(data: bytes, rng: random.Random) -> bytes:
    """Fields of a zip's headers set to other values, bytes put before or behind it, or a comment."""
    altered = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        signature = rng.choice(list(FIELDS))
        places = [at for at in range(len(altered) - 46) if altered[at : at + 4] == signature] or [len(altered) - 22]
        offset, form = rng.choice(FIELDS[signature])
        at, size = rng.choice(places) + offset, struct.calcsize("<" + form)
        now = int.from_bytes(altered[at : at + size], "little")
        wanted = rng.choice(
            (0, 1, now + 1, now - 1, now * 2, 8, 20, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFE, rng.randrange(1 << 32))
        )
        altered[at : at + size] = (wanted % (1 << 8 * size)).to_bytes(size, "little")
    match rng.randrange(8):
        case 0:
            return rng.randbytes(rng.choice((1, 100, 4096))) + bytes(altered)
        case 1:
            return bytes(altered) + rng.randbytes(rng.choice((1, 22, 4096, 70000)))
        case _:
            return bytes(altered)


def bomb_of(data: bytes, rng: random.Random) -> bytes:
    """One member deflated, or one that unpacks to more than a case may use."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        members = {name: archive.read(name) for name in names}
    chosen = rng.choice(names)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            if name != chosen:
                archive.writestr(name, content)
            elif rng.random() < 0.97:  # one that unpacks to so much takes seconds to make
                archive.writestr(info, content)
            else:
                info.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(info, "w", force_zip64=True) as member:
                    for _ in range(BOMB >> 24):
                        member.write(bytes(1 << 24))
    return made.getvalue()


def npz_of(data: bytes, rng: random.Random) -> bytes:
    """Arrays of other shapes, dtypes or values, or with an edited header; the facts edited as JSON."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in rng.sample(list(members), rng.choice((1, 1, 3))):
        if name == "facts.npy" and rng.random() < 0.7:
            facts = json.loads(str(np.load(io.BytesIO(members[name]))))
            text = json.dumps(mutate.json_of(facts, rng)) if rng.random() < 0.9 else "[" * 100000
            members[name] = _npy(np.asarray(text))
        elif rng.random() < 0.5:
            members[name] = _npy(_other_array(np.load(io.BytesIO(members[name])), rng))
        else:
            members[name] = _header_edited(members[name], rng)
    return _zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def _npy(array: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.save(made, array, allow_pickle=True)
    return made.getvalue()


def _other_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    match rng.randrange(7):
        case 0:
            return array.reshape(-1)[:1].reshape(())
        case 1:
            return array[..., None]
        case 2:
            return np.broadcast_to(array.reshape(-1)[0], array.shape)
        case 3:
            return array[: rng.randrange(2)] if array.ndim else array
        case 4 if array.dtype.kind in "fi":
            return array.astype(rng.choice(("O", "U9", "S3", "?", ">f4", "f2", "c8", "i1")))
        case 5 if array.dtype.kind in "fi":
            filled = array.copy()
            filled[...] = rng.choice(FILL if array.dtype.kind == "f" else (-1, 5, 2**62))
            return filled
        case _:
            return np.zeros(3, [("a", "f4"), ("b", "i8")])


def _header_edited(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[8:10], "little")
    header, body = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    old, new = rng.choice(
        (
            ("False", "True"),
            ("(", f"({rng.choice((0, -1, 2**31, 2**62, 10**30))}, "),
            ("'descr'", "'describes'"),
            ("'<", "'>"),
            ("'<", "'|O"),
            ("{", "{" * 300),
            ("}", "} + x"),
            ("'shape'", "'shape': None, 'x'"),
        )
    )
    header = header.replace(old, new, 1)
    return content[:8] + struct.pack("<H", len(header) % 65536) + header.encode("latin1") + body


def described_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a configuration in its metadata, edited or nested beyond reason."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    settings = {"family": "uvit", "heads": 4, "num_classes": 5, "schedule": {"name": "vp-linear"}, "null_class": 4}
    text = json.dumps(mutate.json_of(settings, rng)) if rng.random() < 0.9 else '{"a":' * 100000
    made = json.dumps({"__metadata__": {"config": text}, **header}).encode()
    return struct.pack("<Q", len(made)) + made + data[8 + length :]
