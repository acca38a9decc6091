"""Samples to files: one picture with all of them, a folder of pictures, or an array."""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sparse_engine.errors import OutputError
from sparse_engine.files import check_fillable, check_writable, filling, replacing

PICTURE, ARRAY = ".png", ".npz"
PNG_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MOST_PIXELS = 178_956_970  # of one picture: Pillow opens no larger one, taking it for a decompression bomb


def check_place(path: Path) -> None:
    """Say before the work that ``write_samples`` can write nothing there. Raises OutputError."""
    check_fillable(path) if _kind(path) is None else check_writable(path)


def check_output(path: Path, n: int, data_shape: Sequence[int], *, latents: bool) -> None:
    """Say before the work that what will be drawn cannot be written there.

    Args:
        path: where to.
        n: how many samples.
        data_shape: (C, H, W) of one.
        latents: whether they are no pixels.

    Raises:
        OutputError: the place cannot hold them; says what can.
    """
    kind = _kind(path)
    channels, height, width = data_shape
    if kind == ARRAY:
        _check_room(path, n * channels * height * width * (4 if latents else 1))
    elif latents or channels not in PNG_CHANNELS:
        what = "latents, which no picture shows" if latents else f"{channels} channels; a PNG has 1, 3 or 4"
        raise OutputError(f"{path}: a sample has {what}", f"write an array: --output {path.with_suffix(ARRAY)}")
    elif kind == PICTURE:
        rows, columns = sheet_size(n, height, width)
        if rows * columns > MOST_PIXELS:
            raise OutputError(
                f"{path}: one picture of {n} samples would have {columns} x {rows} pixels; "
                f"most programs open {MOST_PIXELS / 1e6:.0f} million at most",
                f"write a folder of pictures: --output {path.with_suffix('')}",
            )


def _check_room(path: Path, size: int) -> None:
    """Raise OutputError where an array is larger than the disk or, twice while it is put together, the memory."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OutputError(f"{path}: needs {size / 1e9:.3g} GB; the disk has {free / 1e9:.3g} GB left", "write fewer")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if 2 * size > memory:
        raise OutputError(
            f"{path}: an array of {size / 1e9:.3g} GB is put together in memory, of which there are "
            f"{memory / 1e9:.3g} GB",
            "write fewer at a time, with another --seed each",
        )


def _kind(path: Path) -> str | None:
    """What is written at a path: a picture, an array, or (None) a folder. Raises OutputError on another suffix."""
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        return None
    if suffix and suffix not in (PICTURE, ARRAY):
        raise OutputError(
            f"{path}: {path.suffix} is no kind of file that samples go to",
            "use .png, .npz or a folder (one with a dot in its name has to be there)",
        )
    return suffix or None


def write_samples(path: Path, batches: Iterable[np.ndarray]) -> int:
    """Write samples as they come: ``X.png`` a grid, ``X.npz`` an array ``samples``, anything else a folder of PNGs.

    Args:
        path: where to. A folder that is there and empty is filled in place.
        batches: uint8 [B, H, W, C]; float32 [B, C, H, W] latents go to ``.npz`` alone.

    Returns:
        How many samples were written.

    Raises:
        OutputError: the place cannot be written; nothing is left behind.
    """
    kind = _kind(path)
    if kind is None:
        return _write_folder(path, batches)
    samples = np.concatenate(list(batches))
    with replacing(path) as stream:
        if kind == ARRAY:
            np.savez(stream, samples=samples)
        else:
            stream.write(encode_png(grid(samples)))
    return len(samples)


def _write_folder(folder: Path, batches: Iterable[np.ndarray]) -> int:
    count = 0
    with filling(folder) as temporary:
        for batch in batches:
            for image in batch:
                (temporary / f"{count:06d}.png").write_bytes(encode_png(image))
                count += 1
    return count


def layout(n: int, columns: int | None = None) -> tuple[int, int]:
    """(rows, columns) of n samples in one picture."""
    columns = columns or (10 if n % 10 == 0 else math.ceil(math.sqrt(n)))
    return math.ceil(n / columns), columns


def sheet_size(n: int, height: int, width: int, columns: int | None = None, gap: int = 2) -> tuple[int, int]:
    """(height, width) in pixels of the picture that ``grid`` makes of n samples."""
    scale = enlargement(height, width)
    rows, columns = layout(n, columns)
    return rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap


def enlargement(height: int, width: int) -> int:
    """How many times small images are enlarged, so that a person can see them."""
    return max(1, 64 // max(height, width))


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay uint8 [n, H, W, C] out in rows on white; small images are enlarged."""
    n, height, width, channels = images.shape
    scale = enlargement(height, width)
    sheet = np.full((*sheet_size(n, height, width, columns, gap), channels), 255, np.uint8)
    _, columns = layout(n, columns)
    for index, image in enumerate(images):
        top = gap + index // columns * (height * scale + gap)
        left = gap + index % columns * (width * scale + gap)
        enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet[top : top + height * scale, left : left + width * scale] = enlarged
    return sheet


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C], C of 1 (grey), 3 (RGB) or 4 (RGBA) -> PNG bytes. Raises OutputError on other channels."""
    from PIL import Image

    if image.shape[-1] not in PNG_CHANNELS:
        raise OutputError(f"a sample has {image.shape[-1]} channels; a PNG has 1, 3 or 4", "write to a .npz file")
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def psnr(found: np.ndarray, expected: np.ndarray, value_range: tuple[float, float]) -> float:
    """Peak signal-to-noise ratio in dB; infinite where the two are equal."""
    mean_square = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    low, high = value_range
    return float(10 * np.log10((high - low) ** 2 / mean_square)) if mean_square else float("inf")
