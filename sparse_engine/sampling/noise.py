"""Counter-based noise: image i of seed s is the same in any batch, on any backend.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11), with

    key     = the 64-bit seed, low word first
    counter = (element // 4, draw, image, 0) for noise; (0, 0, image, 1) for a label

Its four output words make elements 4k..4k+3 by Box-Muller, from words (0, 1) and (2, 3):

    r     = sqrt(-2 log(((word >> 8) + 1) / 2^24))    # of the first word, exact in float32, in (0, 1]
    angle = pi / 2^23 * (int32(other) >> 8)           # of the second word, exact but for pi, in [-pi, pi)
    normals r cos(angle), r sin(angle)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_engine import arguments
from sparse_engine.errors import OptionError

_WORD = 1 << 32
_LOW = np.uint64(_WORD - 1)
_SHIFT = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Counters worked on at once: bounds the memory, and is the fastest size for 16 to 64 images of 3x32x32.
_CHUNK = 32768

Seeds = int | npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint64]  # 32-bit words in 64-bit lanes: the products need the room
Float32 = npt.NDArray[np.float32]


def philox4x32(counter: npt.ArrayLike, key: tuple[int, int]) -> Words:
    """Philox4x32-10.

    Args:
        counter: [4, ...] 32-bit words.
        key: two 32-bit words.

    Returns:
        uint64 [4, ...] holding 32-bit words.
    """
    words = np.array(counter, np.uint64)
    lanes = words.reshape(4, -1)
    _encrypt(lanes, np.empty_like(lanes[:2]), key)
    return words


def normal(seed: Seeds, images: npt.ArrayLike, draw: int, shape: tuple[int, ...]) -> Float32:
    """Standard normal noise for some images of a seed, or of a seed each.

    Args:
        seed: 0 <= seed < 2^64, one or [B] of them.
        images: [B], which images of the seed: indices over the whole run, not within a batch.
        draw: 0 is the start x_T; step i of a trajectory uses draw i + 1.
        shape: of one image.

    Returns:
        float32 ``[B, *shape]``, at most 5.8 in size.

    Raises:
        OptionError: a seed, image or draw that its words cannot hold.
    """
    index = _images(images)
    key = _keys(seed, len(index))
    draw = arguments.whole_number("draw", draw, 0, _WORD - 1, "a whole number from 0 to 2**32 - 1")
    shape = arguments.whole_numbers("shape", shape, 0)
    count = math.prod(shape)
    blocks = -(-count // 4)
    out = np.empty((len(index), blocks, 4), np.float32)
    rows = min(len(index), max(1, _CHUNK // max(blocks, 1)))
    work = np.empty((6, rows, blocks), np.uint64)
    for i in range(0, len(index), max(rows, 1)):
        part = out[i : i + rows]
        words = work[:, : len(part)]
        words[0], words[1], words[2], words[3] = np.arange(blocks), draw, index[i : i + rows, None], 0
        _encrypt(words[:4], words[4:], key if isinstance(key, tuple) else key[:, i : i + rows, None])
        _box_muller(words[0], words[1], part[..., 0], part[..., 1])
        _box_muller(words[2], words[3], part[..., 2], part[..., 3])
    return out.reshape(len(index), blocks * 4)[:, :count].reshape(len(index), *shape)


@dataclass(frozen=True, eq=False)
class SeededNoise:
    """The draws of some images: a function of the draw's number, which a device may evaluate itself.

    Attributes:
        seed, images, shape: as for ``normal``.
    """

    seed: Seeds
    images: npt.NDArray[np.integer]
    shape: tuple[int, ...]

    def __call__(self, draw: int) -> Float32:
        """``normal``: float32 [B, *shape]. Raises as there."""
        return normal(self.seed, self.images, draw, self.shape)

    def of(self, rows: slice | np.ndarray) -> SeededNoise:
        """The same for some of the images."""
        seed = self.seed[rows] if isinstance(self.seed, np.ndarray) else self.seed
        return SeededNoise(seed, self.images[rows], self.shape)

    @property
    def origin(self) -> npt.NDArray[np.uint32]:
        """[B, 3]: the two words of the key, and the image; with a draw's number, all that the draw depends on."""
        images = _images(self.images)
        keys = _keys(self.seed, len(images))
        return np.stack([np.broadcast_to(word, images.shape) for word in (*keys, images)], axis=1).astype(np.uint32)


def labels(seed: Seeds, images: npt.ArrayLike, num_classes: int) -> npt.NDArray[np.int64]:
    """Class labels for images of which none was given, uniform over ``num_classes``.

    Args:
        seed, images: as for ``normal``.
        num_classes: 1 or more; the null class of guidance does not count.

    Returns:
        int64 [B]: the first word of the counter (0, 0, image, 1), scaled to [0, num_classes).

    Raises:
        OptionError: a seed, image or number of classes out of range.
    """
    index = _images(images)
    key = _keys(seed, len(index))
    num_classes = arguments.whole_number("num_classes", num_classes, 1, _WORD - 1)
    words = np.zeros((4, len(index)), np.uint64)
    words[2], words[3] = index, 1
    _encrypt(words, np.empty_like(words[:2]), key)
    word = words[0]
    return ((word * np.uint64(num_classes)) >> _SHIFT).astype(np.int64)


def _encrypt(words: Words, product: Words, key: tuple[int, int] | Words) -> None:
    """The ten rounds on words [4, ...] in place, with product [2, ...] to work in and a key for all or [2, ...]."""
    c0, c1, c2, c3 = words
    p0, p1 = product
    for i in range(_ROUNDS):
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        np.right_shift(p1, _SHIFT, out=c0)
        c0 ^= c1
        c0 ^= _round_key(key[0], i * _W0)
        np.right_shift(p0, _SHIFT, out=c2)
        c2 ^= c3
        c2 ^= _round_key(key[1], i * _W1)
        np.bitwise_and(p1, _LOW, out=c1)
        np.bitwise_and(p0, _LOW, out=c3)


def _box_muller(radius: Words, angle: Words, cosines: Float32, sines: Float32) -> None:
    """Fill two arrays with normals; see the top of this file. ``radius`` is overwritten."""
    radius >>= np.uint64(8)
    radius += np.uint64(1)
    r = radius.astype(np.int32).astype(np.float32)  # by way of int32, for which there are vector instructions
    r *= np.float32(2.0**-24)
    np.log(r, out=r)
    r *= np.float32(-2.0)
    np.sqrt(r, out=r)
    a = (angle.astype(np.int32) >> 8).astype(np.float32)
    a *= np.float32(math.pi * 2.0**-23)
    np.multiply(np.cos(a), r, out=cosines)
    np.multiply(np.sin(a, out=a), r, out=sines)


def _round_key(word: Any, added: int) -> Any:
    """A word of the key, or uint64 [...] of them, in a later round."""
    if isinstance(word, int):
        return np.uint64((word + added) % _WORD)
    return (word + np.uint64(added)) & _LOW


def _keys(seed: Seeds, count: int) -> tuple[int, int] | Words:
    """The two words of a seed; of ``count`` seeds, uint64 [2, count]."""
    if isinstance(seed, (int, np.integer)) or np.ndim(seed) == 0:
        whole = arguments.seed(seed)
        return whole % _WORD, whole >> 32
    each = arguments.seeds(seed, count)
    return np.stack([each & _LOW, each >> _SHIFT])


def _images(images: npt.ArrayLike) -> Words:
    index = arguments.array("images", images, "array of integers: {}")
    if index.size == 0:
        index = index.astype(np.int64)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise OptionError(f"images has shape {index.shape} of {index.dtype}, expected [B] of integers")
    if index.size and (index.min() < 0 or index.max() >= _WORD):
        raise OptionError(f"images runs from {index.min()} to {index.max()}, expected 0 <= image < 2^32")
    return index.astype(np.uint64)
