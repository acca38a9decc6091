"""``network.safetensors``: the baked weights of a network, its 2:4 layers packed, its quantised layers in 8 bits.

Nothing in it is executed: it is a table of tensors in the safetensors format (eight bytes with the length of a JSON
header, the header, the data), read in place from the engine file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.artifact import EngineFile, PayloadFile
from sparse_engine.errors import EngineFileError
from sparse_engine.files import parsed_json

from .codes import LIMITS, QuantisedWeight
from .packing import as_matrix, pack, unpack

NETWORK_FILE = "network.safetensors"
WEIGHT, VALUES, POSITIONS = ".weight", ".values", ".positions"
CODES, SCALE, INPUT_SCALE = ".weight.codes", ".weight.scale", ".input.scale"
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 1 << 26


@dataclass(frozen=True)
class StoredNetwork:
    """What a payload holds.

    Attributes:
        state: the float weights, under the checkpoint's keys; those that were packed are dense again, and matrices.
        packed: the names of the layers that were, which are 2:4.
        quantised: layer -> its weight in 8 bits; ``state`` does not have it.
    """

    state: dict[str, Tensor]
    packed: list[str]
    quantised: dict[str, QuantisedWeight]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def network_payload(
    state: Mapping[str, LazyTensor],
    sparse_layers: Iterable[str],
    quantised: Mapping[str, QuantisedWeight] | None = None,
) -> PayloadFile:
    """The weights as a payload file.

    Args:
        state: under the checkpoint's keys, each in the type that the network computes in.
        sparse_layers: those whose ``weight`` is 2:4 along its inputs (a convolution's, along its channels).
        quantised: layer -> its weight in 8 bits, stored in the place of that in ``state``.
    """
    stored = dict(state)
    for layer, weight in (quantised or {}).items():
        del stored[layer + WEIGHT]
        parts = {CODES: weight.codes, SCALE: weight.scale, INPUT_SCALE: weight.input_scale}
        stored |= {layer + part: _made(tensor) for part, tensor in parts.items()}
    for layer in sparse_layers:
        key = layer + (CODES if layer + CODES in stored else WEIGHT)
        stored |= _packed(key, stored.pop(key))
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
            yield tensor.make().contiguous().view(-1).view(torch.uint8).numpy().data

    return PayloadFile(NETWORK_FILE, 8 + len(text) + end, chunks, aligned=True)


def _made(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _packed(key: str, weight: LazyTensor) -> dict[str, LazyTensor]:
    """What a 2:4 weight becomes; both parts are packed once, where the first is written."""
    rows, depth = weight.shape[0], math.prod(weight.shape[1:])
    both: list[Tensor] = []

    def values() -> Tensor:
        both[:] = pack(as_matrix(weight.make()))
        return both.pop(0)

    return {
        key + VALUES: LazyTensor((rows, depth // 2), weight.dtype, values),
        key + POSITIONS: LazyTensor((rows, -(-depth // 8)), torch.uint8, lambda: both.pop()),
    }


def read_network(engine: EngineFile) -> StoredNetwork:
    """The weights of an engine, unpacked.

    Dense tensors are mapped from the engine file; do not write into them.

    Raises:
        EngineFileError: the payload is damaged.
    """
    tensors = _read_tensors(engine)
    packed = [name.removesuffix(VALUES) for name in tensors if name.endswith(VALUES)]
    for key in packed:
        if key + POSITIONS not in tensors:
            raise _damaged(engine, f"{key} has values and no positions")
        tensors[key] = unpack(tensors.pop(key + VALUES), tensors.pop(key + POSITIONS))
    layers = [name.removesuffix(CODES) for name in tensors if name.endswith(CODES)]
    quantised = {layer: _quantised_weight(engine, layer, tensors) for layer in layers}
    return StoredNetwork(tensors, [key.removesuffix(CODES).removesuffix(WEIGHT) for key in packed], quantised)


def _quantised_weight(engine: EngineFile, layer: str, tensors: dict[str, Tensor]) -> QuantisedWeight:
    """Take a layer's weight out of ``tensors``."""
    codes, scale, input_scale = (tensors.pop(layer + part, None) for part in (CODES, SCALE, INPUT_SCALE))
    if scale is None or input_scale is None:
        raise _damaged(engine, f"{layer}{CODES} has no scale of its weight or of its input")
    if codes is None or codes.ndim != 2 or codes.dtype not in LIMITS:
        raise _damaged(engine, f"{layer}{CODES} is not int8 or float8_e4m3fn [N, K]")
    shapes, dtypes = (scale.shape, input_scale.shape), {scale.dtype, input_scale.dtype}
    if shapes != (codes.shape[:1], ()) or dtypes != {torch.float32}:
        raise _damaged(engine, f"the scales of {layer} are not float32, one for each of {len(codes)} outputs and one")
    return QuantisedWeight(codes, scale, input_scale)


def _read_tensors(engine: EngineFile) -> dict[str, Tensor]:
    start, size = engine.span(NETWORK_FILE)
    mapped = torch.from_file(str(engine.path), shared=False, size=start + size, dtype=torch.uint8)[start:]
    try:
        (length,) = struct.unpack("<Q", mapped[:8].numpy().tobytes())
        if 8 + length > min(size, _LARGEST_HEADER):
            raise ValueError(f"a header of {length} bytes does not fit into {size}")
        header = parsed_json(mapped[8 : 8 + length].numpy().tobytes())
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
