"""Samples to files: one picture with all of them, a folder of pictures, or an array."""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sparse_engine.errors import OutputError
from sparse_engine.files import UMASK, output_error, replacing


def write_samples(path: Path, batches: Iterable[np.ndarray]) -> int:
    """Write samples as they come: ``X.png`` a grid, ``X.npz`` an array ``samples``, anything else a folder of PNGs.

    Args:
        path: where to.
        batches: uint8 [B, H, W, C]; float32 [B, C, H, W] latents go to ``.npz`` alone.

    Returns:
        How many samples were written.

    Raises:
        OutputError: the place cannot be written; nothing is left behind.
    """
    kind = path.suffix.lower()
    if kind == ".npz":
        samples = np.concatenate(list(batches))
        with replacing(path) as stream:
            np.savez(stream, samples=samples)
        return len(samples)
    if kind == ".png":
        samples = np.concatenate(list(batches))
        with replacing(path) as stream:
            stream.write(encode_png(grid(samples)))
        return len(samples)
    return _write_folder(path, batches)


def _write_folder(folder: Path, batches: Iterable[np.ndarray]) -> int:
    """PNGs in a folder that did not exist or is empty; filled under another name, so that it appears whole."""
    if folder.suffix:
        raise OutputError(
            f"{folder}: {folder.suffix} is no kind of file that samples go to", "use .png, .npz or a folder"
        )
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is there already and is not an empty folder", "name a new folder")
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise output_error(folder, error) from error
    count = 0
    try:
        for batch in batches:
            for image in batch:
                (temporary / f"{count:06d}.png").write_bytes(encode_png(image))
                count += 1
        temporary.chmod(0o777 & ~UMASK)
        temporary.replace(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay uint8 [n, H, W, C] out in rows on white; small images are enlarged so that a person can see them."""
    n, height, width, channels = images.shape
    scale = max(1, 64 // max(height, width))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = columns or (10 if n % 10 == 0 else math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * cell_h, gap + index % columns * cell_w
        sheet[top : top + height * scale, left : left + width * scale] = image
    return sheet


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C], C of 1 (grey), 3 (RGB) or 4 (RGBA) -> PNG bytes. Raises OutputError on other channels."""
    from PIL import Image

    if image.shape[-1] not in (1, 3, 4):
        raise OutputError(f"a sample has {image.shape[-1]} channels; a PNG has 1, 3 or 4", "write to a .npz file")
    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return stream.getvalue()


def psnr(found: np.ndarray, expected: np.ndarray, value_range: tuple[float, float]) -> float:
    """Peak signal-to-noise ratio in dB; infinite where the two are equal."""
    mean_square = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    low, high = value_range
    return float(10 * np.log10((high - low) ** 2 / mean_square)) if mean_square else float("inf")
