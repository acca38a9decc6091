"""Folders of pictures: which files, which classes, and their pixels."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.errors import InputError, OptionError
from sparse_engine.files import check_readable, parsed_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
IN_MEMORY = 2 << 30  # bytes of pixels that are kept decoded
NAMED = 3  # files in an error
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Listing:
    """The files of a folder.

    Attributes:
        files: in the order of their names.
        classes: of each file, the name of its class; None where the folder says nothing of classes.
    """

    files: list[Path]
    classes: list[str] | None


def listing(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> Listing:
    """The files of a folder and of those in it; classes are ``labels.csv``'s, ``dataset.json``'s or the folders' names.

    Raises InputError where a table of labels cannot be read, or does not name each file.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if (folder / "labels.csv").is_file():
        return Listing(files, _listed(folder, files, _of_csv(folder / "labels.csv"), "labels.csv"))
    if (folder / "dataset.json").is_file():  # as in StyleGAN and EDM
        table = _of_json(folder / "dataset.json")
        return Listing(files, None if table is None else _listed(folder, files, table, "dataset.json"))
    inside = [path.relative_to(folder).parts for path in files]
    if files and all(len(parts) > 1 for parts in inside):
        return Listing(files, [parts[0] for parts in inside])
    return Listing(files, None)


def _of_csv(path: Path) -> dict[str, str]:
    check_readable(path, InputError)
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if any(len(row) != 2 for row in rows):
        raise InputError(f"{path}: expected lines of a file's name and its label", "for example 0001.png,7")
    return {name.strip(): label.strip() for name, label in rows}


def _of_json(path: Path) -> dict[str, str] | None:
    check_readable(path, InputError)
    try:
        found = parsed_json(path.read_bytes())
        labels = found["labels"]
        return None if labels is None else {str(name): str(label) for name, label in labels}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} holds no labels: {error}", 'expected {"labels": [["a.png", 0], ...]}') from error


def _listed(folder: Path, files: Sequence[Path], table: dict[str, str], name: str) -> list[str]:
    found = [table.get(path.relative_to(folder).as_posix()) for path in files]
    missing = [path.name for path, label in zip(files, found, strict=True) if label is None]
    if missing:
        raise InputError(
            f"{folder / name} has no label for {len(missing)} of {len(files)} files, such as {missing[0]}",
            "add them, or take the files away",
        )
    return [label for label in found if label is not None]


class Pictures:
    """The pixels of files, uint8 [n, H, W, C]; kept decoded where there is room.

    Args:
        files: in their order.
        shape: (C, H, W) that the model draws.
        resize: whether pictures of another size are resized (the shorter side, antialiased) and cut to their middle.
        skip_broken: whether files that cannot be read are left out.
        progress: told (files read, files in all) while they are looked through.

    Attributes:
        kept: which of the files were taken, int64.

    Raises:
        InputError: a file that is no picture, or of another size; named.
    """

    def __init__(
        self, files: Sequence[Path], shape: Sequence[int], *, resize: bool, skip_broken: bool, progress: Progress
    ) -> None:
        channels, self._height, self._width = shape
        if channels not in MODES:
            raise OptionError(
                f"the model draws {channels} channels; pictures have 1, 3 or 4", "give its data as an .npz, or as .npy"
            )
        self._mode, self._resize, self._files = MODES[channels], resize, list(files)
        size = len(files) * channels * self._height * self._width
        self._decoded = (
            np.empty((len(files), self._height, self._width, channels), np.uint8) if size <= IN_MEMORY else None
        )
        broken, sizes = [], Counter[tuple[int, int]]()
        for index, path in enumerate(files):
            try:
                sizes[self._look(index, path)] += 1
            except (OSError, ValueError, SyntaxError) as error:
                broken.append((index, path, error))
            progress(index + 1, len(files))
        if broken and not skip_broken:
            _, path, why = broken[0]
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise InputError(f"{path} cannot be read as a picture{more}: {why}", "replace it, or give --skip-broken")
        self._check_sizes(sizes)
        self.broken = [path for _, path, _ in broken]
        self.kept = np.delete(np.arange(len(files)), [index for index, _, _ in broken])

    def _look(self, index: int, path: Path) -> tuple[int, int]:
        """The (height, width) of a file; decoded where pixels are kept, else only its head is read."""
        from PIL import Image

        if self._decoded is None:
            with Image.open(path) as image:
                return image.height, image.width
        pixels, size = self._read(path)
        if pixels is not None:
            self._decoded[index] = pixels
        return size

    def _read(self, path: Path) -> tuple[np.ndarray | None, tuple[int, int]]:
        """[H, W, C], or None where it has another size and may not be resized; and the file's own size."""
        from PIL import Image

        with Image.open(path) as opened:
            image: Any = opened.convert(self._mode)
        size = image.height, image.width
        if size != (self._height, self._width):
            if not self._resize:
                return None, size
            scale = max(self._height / image.height, self._width / image.width)
            wanted = max(self._width, round(image.width * scale)), max(self._height, round(image.height * scale))
            image = image.resize(wanted, Image.Resampling.BICUBIC)
            left, top = (image.width - self._width) // 2, (image.height - self._height) // 2
            image = image.crop((left, top, left + self._width, top + self._height))
        return np.asarray(image, np.uint8).reshape(self._height, self._width, -1), size

    def _check_sizes(self, sizes: Counter[tuple[int, int]]) -> None:
        other = sum(sizes.values()) - sizes[(self._height, self._width)]
        if other and not self._resize:
            found = ", ".join(f"{count} of {h}x{w}" for (h, w), count in sizes.most_common(NAMED))
            raise InputError(
                f"the model draws {self._height}x{self._width} pixels, and the pictures are {found}"
                + (", ..." if len(sizes) > NAMED else ""),
                "give --resize: the shorter side is resized, and the middle taken",
            )

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, C] of some of the kept files. Raises InputError on one that has broken meanwhile."""
        indices = self.kept[rows]
        if self._decoded is not None:
            return self._decoded[indices]
        return np.stack([self._whole(self._files[index]) for index in indices])

    def _whole(self, path: Path) -> np.ndarray:
        try:
            pixels, _ = self._read(path)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path} cannot be read as a picture: {error}", "replace it, and run again") from error
        if pixels is None:
            raise InputError(f"{path} has changed its size", "put it back, and run again")
        return pixels
