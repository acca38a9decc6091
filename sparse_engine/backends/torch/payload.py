"""``network.safetensors``: the baked weights of a network, its 2:4 layers packed.

Nothing in it is executed: it is a table of tensors in the safetensors format (eight bytes with the length of a JSON
header, the header, the data), read in place from the engine file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparse_engine.artifact import EngineFile, PayloadFile
from sparse_engine.errors import EngineFileError

from .packing import pack, unpack

NETWORK_FILE = "network.safetensors"
VALUES, POSITIONS = ".values", ".positions"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 1 << 26


def network_payload(state: Mapping[str, Tensor], sparse_layers: Iterable[str]) -> PayloadFile:
    """The weights as a payload file.

    Args:
        state: under the checkpoint's keys, each in the type that the network computes in.
        sparse_layers: those whose ``weight`` is 2:4 along its inputs (a 1x1 convolution's, along its channels).
    """
    stored: dict[str, Tensor] = dict(state)
    for layer in sparse_layers:
        weight = stored.pop(f"{layer}.weight")
        values, positions = pack(weight.flatten(1))
        stored |= {f"{layer}.weight{VALUES}": values, f"{layer}.weight{POSITIONS}": positions}
    header, end = {}, 0
    for name, tensor in stored.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned

    def chunks() -> Iterable[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in stored.values():
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data

    return PayloadFile(NETWORK_FILE, 8 + len(text) + end, chunks, aligned=True)


def read_network(engine: EngineFile) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of an engine, unpacked, and the names of the layers that were packed.

    Dense tensors are mapped from the engine file; do not write into them.

    Raises:
        EngineFileError: the payload is damaged.
    """
    tensors = _read_tensors(engine)
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith((VALUES, POSITIONS))}
    layers = [name.removesuffix(f".weight{VALUES}") for name in tensors if name.endswith(f".weight{VALUES}")]
    for layer in layers:
        key = f"{layer}.weight"
        if key + POSITIONS not in tensors:
            raise _damaged(engine, f"{key} has values and no positions")
        state[key] = unpack(tensors[key + VALUES], tensors[key + POSITIONS])
    return state, layers


def _read_tensors(engine: EngineFile) -> dict[str, Tensor]:
    start, size = engine.span(NETWORK_FILE)
    mapped = torch.from_file(str(engine.path), shared=False, size=start + size, dtype=torch.uint8)[start:]
    try:
        (length,) = struct.unpack("<Q", mapped[:8].numpy().tobytes())
        if 8 + length > min(size, _LARGEST_HEADER):
            raise ValueError(f"a header of {length} bytes does not fit into {size}")
        header = json.loads(mapped[8 : 8 + length].numpy().tobytes())
        data = mapped[8 + length :]
        return {name: _tensor(data, **entry) for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(engine, str(error)) from error


def _tensor(data: Tensor, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    first, last = data_offsets
    kind = DTYPES[dtype]
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * kind.itemsize:
        raise ValueError(f"a tensor of {dtype} {shape} cannot lie at {data_offsets} of {len(data)} bytes")
    piece = data[first:last]
    if (data.storage_offset() + first) % kind.itemsize:
        piece = piece.clone()
    return piece.view(kind).view(shape)


def _damaged(engine: EngineFile, what: str) -> EngineFileError:
    engine.verify()  # bytes that were altered are the likelier cause, and the clearer message
    return EngineFileError(
        f"{engine.path}: {NETWORK_FILE} cannot be read: {what}", "rebuild it with sparse-engine build"
    )
