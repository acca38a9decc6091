"""Every kind of damage that a checkpoint comes with, and what is said of it: for each family's files the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """``write`` puts a damaged file of a state dict under a path that ends in ``suffix``; ``message`` is a pattern."""

    suffix: str
    message: str
    write: Callable[[Path, State], object]


class Payload:
    """Pickles to a call; what a hostile checkpoint looks like."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def trace_of(file: Path) -> Path:
    """What the code in a hostile checkpoint would make."""
    return file.with_name("it-ran")


def _weight(state: State) -> str:
    """The name of the first of several axes."""
    return next(name for name, tensor in state.items() if tensor.ndim > 1)


def _with(state: State, change: Callable[[Tensor], Tensor]) -> State:
    name = _weight(state)
    return {**state, name: change(state[name].clone())}


def _filled(value: float) -> Callable[[Path, State], object]:
    def put(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return lambda path, state: torch.save(_with(state, put), path)


def _cut(length: Callable[[int], int]) -> Callable[[Path, State], object]:
    def write(path: Path, state: State) -> None:
        torch.save(state, path)
        data = path.read_bytes()
        path.write_bytes(data[: length(len(data))])

    return write


def _cut_safetensors(path: Path, state: State) -> None:
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-20])


NOT_WHOLE = "is (truncated, damaged or no checkpoint|not a checkpoint that torch can read)"
HOSTILE = "holds Python objects that are not weights; they were not run"
FILES: dict[str, Damage] = {
    **{
        f"{value}": Damage(".bin", r" has 1 of \d+ values that are NaN or infinite", _filled(value))
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "code": Damage(".bin", HOSTILE, lambda path, state: torch.save({**state, "w": Payload(trace_of(path))}, path)),
    "code in a plain pickle": Damage(
        ".bin", HOSTILE, lambda path, state: path.write_bytes(pickle.dumps({"w": Payload(trace_of(path))}, protocol=2))
    ),
    "ten bytes": Damage(".bin", NOT_WHOLE, _cut(lambda whole: 10)),
    "one half": Damage(".bin", NOT_WHOLE, _cut(lambda whole: whole // 2)),
    "all but a byte": Damage(".bin", NOT_WHOLE, _cut(lambda whole: whole - 1)),
    "cut safetensors": Damage(".safetensors", "not a whole safetensors file", _cut_safetensors),
    "a text": Damage(".bin", NOT_WHOLE, lambda path, state: path.write_text("hello, this is a text file\n" * 20)),
    "nothing": Damage(".bin", "is empty", lambda path, state: path.touch()),
    "no tensors": Damage(
        ".bin",
        "has no tensors; its entries are step, lr",
        lambda path, state: torch.save({"step": 3, "lr": 0.1}, path),
    ),
    "a list": Damage(".bin", "holds a list; expected a dictionary", lambda path, state: torch.save([1, 2], path)),
    "a sparse tensor": Damage(
        ".bin",
        "expected plain real weights",
        lambda path, state: torch.save(_with(state, lambda tensor: tensor.to_sparse()), path),
    ),
    "complex numbers": Damage(
        ".bin",
        "expected plain real weights",
        lambda path, state: torch.save(_with(state, lambda tensor: tensor.to(torch.complex64)), path),
    ),
    "few bytes for many": Damage(
        ".bin",
        "expanded from the 4 bytes that are stored",
        lambda path, state: torch.save(_with(state, lambda tensor: torch.zeros(1).expand(1 << 40)), path),
    ),
    "a pickle called safetensors": Damage(
        ".safetensors",
        r"is a PyTorch checkpoint and no safetensors file(?s:.*)rename it",
        lambda path, state: torch.save(state, path),
    ),
    "a pointer of Git LFS": Damage(
        ".safetensors",
        r"is a pointer of Git LFS(?s:.*)git lfs pull",
        lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"),
    ),
}

# Of a network: what fits no more.
NETWORKS: dict[str, Damage] = {
    "a missing key": Damage(
        ".bin",
        r"1 missing key\(s\) for a \S+ model",
        lambda path, state: torch.save(dict(list(state.items())[:-1]), path),
    ),
    "a key too many": Damage(
        ".bin",
        r"1 unexpected key\(s\) for a \S+ model: extra\.weight",
        lambda path, state: torch.save({**state, "extra.weight": torch.ones(1)}, path),
    ),
    "a key of another name": Damage(
        ".bin",
        r"1 missing key.*; 1 unexpected key.*: renamed",
        lambda path, state: torch.save({**dict(list(state.items())[:-1]), "renamed": list(state.values())[-1]}, path),
    ),
    "another shape": Damage(
        ".bin",
        r" has shape \[31\]; expected \[[\d, ]+\]",
        lambda path, state: torch.save({**state, list(state)[-1]: torch.ones(31)}, path),
    ),
}

CONFIGURATIONS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{heads: 4}", "is not JSON"),
    "no text": (b"\xff\xfe{", "is not JSON"),
    "a list": (b"[1]", "holds a list; expected an object"),
    "too deep": (b"[" * 100_000, "is not JSON"),
}
