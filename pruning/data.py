"""What a model is trained on: pictures, arrays or latents, with what the network is told of each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.conditioning import LABELS, Condition
from sparse_engine.errors import InputError, OptionError
from sparse_engine.export.model import Model
from sparse_engine.files import check_readable, read_arrays

from .draws import Draws, SampleDraws
from .pictures import SUFFIXES, Pictures, Progress, listing

IMAGES = ("images", "samples", "latents", "moments", "arr_0")  # the names of a .npz's images, and of their labels
LABEL_NAMES = ("labels", "y", "arr_1")
CONTEXT = "context"
KEPT_CONTEXT = re.compile(r"^(.+)_(\d+)$")  # i_k.npy: context k of image i, as U-ViT's text-to-image training has them
LOG_VARIANCE = (-30.0, 20.0)  # where an autoencoder's moments are clamped
LATENT_SCALE = 0.18215  # Stable Diffusion's
FAR_OUT = 4.0  # times the model's range: what lies beyond is in other units
MOST_BYTES = 64 << 30
Rows = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Canvas:
    """What a model draws: (C, H, W), and the range of its pixels; None for latents."""

    data_shape: tuple[int, int, int]
    value_range: tuple[float, float] | None


@dataclass(frozen=True)
class DataOptions:
    """How data is read.

    Attributes:
        flip: whether every second image is mirrored, left to right.
        resize: whether pictures of another size are taken.
        skip_broken: whether pictures that cannot be read are left out.
        dropout: how often the network is told what "none" is: labels, contexts.
        null_context: a .npy of what "no context" is, [L, D]; None where the model has it, or has none.
        latent_scale: what latents drawn from their moments are multiplied by.
    """

    flip: bool = False
    resize: bool = False
    skip_broken: bool = False
    dropout: float = 0.1
    null_context: Path | None = None
    latent_scale: float = LATENT_SCALE


@dataclass(frozen=True)
class Examples:
    """Some samples of a step: x0 float32 [B, C, H, W] in the model's range, and what the network is told of them."""

    x0: np.ndarray
    told: dict[str, np.ndarray]


@dataclass(frozen=True)
class Data:
    """A data set, made to fit a model.

    Attributes:
        count: of images.
        images: rows -> uint8 [B, H, W, C], or float32 [B, C or 2 C, H, W].
        told: condition -> its rows, [N, *shape]; contexts may be [N, K, *shape], of which one is chosen.
        nulls: condition -> what "none" is, [*shape].
        options: as it was read with.
        value_range: of the model's pixels; None for latents.
        channels: the model's.
        fingerprint: of what it holds, so that a run is not resumed with another.
        notes: for the user to read.
    """

    count: int
    images: Rows
    told: Mapping[str, Rows]
    nulls: Mapping[str, np.ndarray]
    options: DataOptions
    value_range: tuple[float, float] | None
    channels: int
    fingerprint: str
    notes: list[str] = field(default_factory=list)

    def examples(self, rows: np.ndarray, drawn: SampleDraws, draws: Draws, step: int, samples: np.ndarray) -> Examples:
        """What a step is given: some rows, with what was drawn for the samples that they are."""
        x0 = self._x0(self.images(rows), draws, step, samples)
        if self.options.flip:
            x0[drawn.flipped] = x0[drawn.flipped][..., ::-1]
        told = {name: self._chosen(of_rows(rows), name, drawn) for name, of_rows in self.told.items()}
        dropped = drawn.dropped < self.options.dropout
        for name, null in self.nulls.items():
            told[name] = told[name].copy()
            told[name][dropped] = null
        return Examples(np.ascontiguousarray(x0), told)

    def _x0(self, found: np.ndarray, draws: Draws, step: int, samples: np.ndarray) -> np.ndarray:
        if found.dtype == np.uint8 or found.shape[1] == self.channels:
            return in_range(found, self.value_range)
        mean, log_variance = np.split(found.astype(np.float32), 2, axis=1)
        std = np.exp(0.5 * log_variance.clip(*LOG_VARIANCE))
        normals = draws.latent_noise(step, samples, mean.shape[1:])
        return np.float32(self.options.latent_scale) * (mean + std * normals)

    def _chosen(self, rows: np.ndarray, name: str, drawn: SampleDraws) -> np.ndarray:
        if name != CONTEXT or rows.ndim < 4:
            return rows
        which = (drawn.choice * rows.shape[1]).astype(np.int64)
        return rows[np.arange(len(rows)), which]


def load_data(path: Path, model: Model, options: DataOptions, progress: Progress = lambda done, total: None) -> Data:
    """Read a data set for a model.

    Args:
        path: a folder of pictures, of folders of them by class, or of latents in ``.npy`` (``i.npy``, with contexts
            in ``i_k.npy``); or an ``.npz`` of images, labels and what else the network is told, by name.
        model: says shape, range, classes and conditions.
        options: how to read it.
        progress: told (files read, files in all).

    Raises:
        InputError, OptionError: nothing there, a broken file, another size, labels that do not fit; named.
    """
    check_readable(path, InputError, folder=True, missing="name a folder of images, or an .npz")
    canvas = Canvas(model.config.data_shape, model.recipe.value_range)
    found = _of_folder(path, canvas, options, progress) if path.is_dir() else _of_file(path, canvas)
    if found.count == 0:
        raise InputError(f"{path} holds no images", f"expected {', '.join(SUFFIXES)} or .npy files, or an .npz of them")
    told, notes = _told(found, model, path)
    nulls, about_nulls = _nulls(model, options, told)
    return Data(
        found.count,
        found.images,
        told,
        nulls,
        options,
        model.recipe.value_range,
        model.config.data_shape[0],
        found.fingerprint,
        [*found.notes, *notes, *about_nulls],
    )


def images_of(path: Path, canvas: Canvas, options: DataOptions) -> np.ndarray:
    """All images of a data set of pixels, in the canvas' range: float32 [N, C, H, W]. Raises as ``load_data``."""
    check_readable(path, InputError, folder=True, missing="name a folder of images, or an .npz")
    read = _of_folder(path, canvas, options, lambda done, total: None) if path.is_dir() else _of_file(path, canvas)
    if read.count == 0:
        return np.empty((0, *canvas.data_shape), np.float32)
    return in_range(read.images(np.arange(read.count)), canvas.value_range)


def in_range(found: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """uint8 [n, H, W, C] -> float32 [n, C, H, W] in a model's range; floats stay as they are."""
    if found.dtype != np.uint8:
        return found.astype(np.float32)
    low, high = value_range or (-1.0, 1.0)
    return found.transpose(0, 3, 1, 2).astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)


@dataclass(frozen=True)
class _Found:
    """What a path holds: arrays of conditions are by name, the classes of pictures as the folder calls them."""

    count: int
    images: Rows
    arrays: dict[str, Rows]
    classes: list[str] | None
    fingerprint: str
    notes: list[str]


def _of_folder(path: Path, canvas: Canvas, options: DataOptions, progress: Progress) -> _Found:
    pictures = listing(path)
    if pictures.files:
        if canvas.value_range is None:
            raise OptionError(
                f"{path} holds pictures, and this is a latent model", "encode them: .npy or .npz of latents or moments"
            )
        read = Pictures(
            pictures.files,
            canvas.data_shape,
            resize=options.resize,
            skip_broken=options.skip_broken,
            progress=progress,
        )
        kept = read.kept.tolist()
        notes = [f"{len(read.broken)} broken files left out, such as {read.broken[0].name}"] if read.broken else []
        classes = None if pictures.classes is None else [pictures.classes[index] for index in kept]
        return _Found(len(kept), read, {}, classes, _named([pictures.files[index] for index in kept], path), notes)
    latents = listing(path, (".npy",))
    contexts: dict[Path, dict[int, Path]] = {}
    images = []
    known = {file.with_suffix("") for file in latents.files}
    for file in latents.files:
        match = KEPT_CONTEXT.match(file.stem)
        if match and file.with_name(match[1]) in known:
            contexts.setdefault(file.with_name(match[1]), {})[int(match[2])] = file
        else:
            images.append(file)
    if not images:
        return _Found(0, lambda rows: rows, {}, None, "", [])
    kept_classes = None
    if latents.classes is not None:
        by_file = dict(zip(latents.files, latents.classes, strict=True))
        kept_classes = [by_file[file] for file in images]
    shape = _checked_shape(_array(images[0]).shape, canvas, images[0])
    arrays: dict[str, Rows] = {}
    if contexts:
        arrays[CONTEXT] = _contexts(images, contexts)
    return _Found(len(images), _arrays(images, shape), arrays, kept_classes, _named(images, path), [])


def _array(path: Path) -> np.ndarray:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # of any kind, where a file is damaged
        raise InputError(
            f"{path} is no .npy file of numbers: {error}", "save it with numpy.save, floats alone"
        ) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise InputError(f"{path}: expected finite floats", "save it with numpy.save, floats alone")
    return found


def _arrays(files: Sequence[Path], shape: tuple[int, ...]) -> Rows:
    def read(rows: np.ndarray) -> np.ndarray:
        found = [_array(files[row]) for row in rows]
        for row, each in zip(rows, found, strict=True):
            if each.shape != shape:
                raise InputError(f"{files[row]} has shape {list(each.shape)}; the first has {list(shape)}")
        return np.stack(found)

    return read


def _contexts(images: Sequence[Path], contexts: Mapping[Path, Mapping[int, Path]]) -> Rows:
    """[B, K, L, D]; of an image with fewer contexts than another, some twice."""
    of_image = []
    for image in images:
        own = contexts.get(image.with_suffix(""))
        if not own:
            raise InputError(f"{image} has no context beside it; others have", f"expected {image.stem}_0.npy")
        of_image.append([own[number] for number in sorted(own)])
    most = max(len(own) for own in of_image)

    def read(rows: np.ndarray) -> np.ndarray:
        return np.stack(
            [np.stack([_array(of_image[row][k % len(of_image[row])]) for k in range(most)]) for row in rows]
        )

    return read


def _named(files: Sequence[Path], folder: Path) -> str:
    """A fingerprint of files: their names and sizes."""
    text = "\n".join(f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _of_file(path: Path, canvas: Canvas) -> _Found:
    fix = "save it with numpy.savez(path, images=..., labels=...)"
    members = read_arrays(path, "no .npz file of arrays", fix, most=MOST_BYTES)
    name = next((name for name in IMAGES if name in members), None)
    if name is None:
        raise InputError(f"{path} holds {', '.join(members) or 'nothing'}; expected one of {', '.join(IMAGES)}", fix)
    images = members.pop(name)
    _check_images(images, canvas, path, name)
    labels = next((name for name in LABEL_NAMES if name in members), None)
    arrays = {LABELS if key == labels else key: value for key, value in members.items()}
    for key, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.shape[:1] != images.shape[:1] or value.dtype.kind not in "fiub":
            raise InputError(f"{path}: {key} does not fit {name}: expected a number or an array for each image", fix)
    digest = hashlib.sha256(images.tobytes())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    rows: dict[str, Rows] = {key: partial(np.take, value, axis=0) for key, value in arrays.items()}
    return _Found(len(images), lambda chosen: images[chosen], rows, None, digest.hexdigest(), [])


def _check_images(images: Any, canvas: Canvas, path: Path, name: str) -> None:
    channels, height, width = canvas.data_shape
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype == np.uint8:
        if images.shape[1:] != (height, width, channels) or canvas.value_range is None:
            what = "a latent model takes floats" if canvas.value_range is None else "the model draws"
            raise InputError(
                f"{path}: {name} is uint8 {list(images.shape)}; {what} [n, {height}, {width}, {channels}]",
                "uint8 is [n, H, W, C] in 0..255, float32 [n, C, H, W] in the model's own range",
            )
        return
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.dtype.kind != "f":
        raise InputError(f"{path}: {name} is no array of images", "expected uint8 [n, H, W, C] or floats [n, C, H, W]")
    _checked_shape(images.shape[1:], canvas, path)
    if not np.isfinite(images).all():
        raise InputError(f"{path}: {name} holds NaN or infinite values")
    if canvas.value_range is not None and len(images):
        low, high = canvas.value_range
        if np.abs(images).max() > FAR_OUT * max(abs(low), abs(high), high - low):
            raise InputError(
                f"{path}: {name} is {images.min():g} to {images.max():g}; the model's range is {low:g} to {high:g}",
                "scale them, or save uint8 [n, H, W, C]",
            )


def _checked_shape(shape: tuple[int, ...], canvas: Canvas, path: Path) -> tuple[int, ...]:
    """[C, H, W] as the model draws, or latents' moments, of twice the channels."""
    channels, height, width = canvas.data_shape
    moments = canvas.value_range is None and shape == (2 * channels, height, width)
    if shape != (channels, height, width) and not moments:
        also = f" or moments {[2 * channels, height, width]}" if canvas.value_range is None else ""
        raise InputError(f"{path}: images of {list(shape)}; the model draws {[channels, height, width]}{also}")
    return shape


def _told(found: _Found, model: Model, path: Path) -> tuple[dict[str, Rows], list[str]]:
    """Rows for each condition of the model, out of what the data says."""
    told: dict[str, Rows] = {}
    notes: list[str] = []
    conditions = {each.name: each for each in model.conditions}
    ignored = [name for name in found.arrays if name not in conditions]
    if ignored:
        notes.append(f"not used: {', '.join(sorted(ignored))}: the network is told no such thing")
    for name, condition in conditions.items():
        if condition.classes is not None:
            told[name], said = _labels(found, model, condition, path)
            notes += said
        elif name in found.arrays:
            told[name] = _checked_rows(found, condition, path)
        elif condition.default is not None:
            told[name] = _repeated(np.full(condition.shape, condition.default, condition.dtype))
        else:
            raise InputError(
                f"{path} has no {name}, which the network is told: {condition.dtype} {list(condition.shape)} an image",
                f"put it into an .npz as {name!r}" + (", or beside i.npy as i_0.npy" if name == CONTEXT else ""),
            )
    if found.classes is not None and LABELS not in conditions:
        notes.append("the network is told no class: those of the folder are not used")
    return told, notes


def _repeated(row: np.ndarray) -> Rows:
    return lambda chosen: np.broadcast_to(row, (len(chosen), *row.shape)).copy()


def _checked_rows(found: _Found, condition: Condition, path: Path) -> Rows:
    rows = found.arrays[condition.name]
    shape = rows(np.zeros(1, np.int64)).shape[1:]
    several = condition.name == CONTEXT and shape[1:] == condition.shape
    if shape != condition.shape and not several:
        raise InputError(
            f"{path}: {condition.name} is {list(shape)} an image; the network is told {list(condition.shape)}",
            "say --context-length where the model leaves it open" if condition.name == CONTEXT else None,
        )
    return lambda chosen: rows(chosen).astype(condition.dtype)


def _labels(found: _Found, model: Model, condition: Condition, path: Path) -> tuple[Rows, list[str]]:
    """The class of each image."""
    usable = [label for label in range(model.num_classes) if label != model.recipe.null_class]
    if found.classes is not None:
        labels, notes = _numbered(found.classes, usable, path)
    elif condition.name in found.arrays:
        labels, notes = found.arrays[condition.name](np.arange(found.count)), []
    else:
        raise InputError(
            f"{path} says no class of its images, and the model has {len(usable)}",
            "put them into a folder for each class, add labels.csv (name,label), or an .npz's labels",
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; expected a whole number an image")
    wrong = np.flatnonzero(~np.isin(labels, usable))
    if len(wrong):
        null = f" ({model.recipe.null_class} stands for 'no label')" if model.recipe.null_class is not None else ""
        raise InputError(
            f"{path}: {len(wrong)} labels do not fit, such as {labels[wrong[0]]} of image {wrong[0]}; the model has "
            f"classes {usable[0]} to {usable[-1]}{null}",
            "check the labels, or --null-class",
        )
    labels = labels.astype(np.int64)
    return lambda chosen: labels[chosen], notes


def _numbered(classes: Sequence[str], usable: Sequence[int], path: Path) -> tuple[np.ndarray, list[str]]:
    """Names of classes to numbers: their own where all are numbers, else in the order of names."""
    names = sorted(set(classes))
    if all(name.isdecimal() for name in names):
        return np.array([int(name) for name in classes], np.int64), []
    if len(names) > len(usable):
        raise InputError(
            f"{path} has {len(names)} classes, and the model {len(usable)}", "leave some out, or join folders"
        )
    number = dict(zip(names, usable, strict=False))
    shown = ", ".join(f"{name} = {number[name]}" for name in names[:5]) + (", ..." if len(names) > 5 else "")
    return np.array([number[name] for name in classes], np.int64), [f"classes by name: {shown}"]


def _nulls(model: Model, options: DataOptions, told: Mapping[str, Rows]) -> tuple[dict[str, np.ndarray], list[str]]:
    """What each condition is told where it is dropped; {} where nothing is dropped."""
    if options.null_context is not None and CONTEXT not in told:
        raise OptionError("--null-context is given, and the network is told no context", "leave it out")
    nulls: dict[str, np.ndarray] = {}
    lacking = []
    for each in model.conditions:
        if each.name == CONTEXT and options.null_context is not None:
            row = _array(options.null_context)
            if row.shape != each.shape:
                raise OptionError(f"{options.null_context} is {list(row.shape)}; a context is {list(each.shape)}")
            nulls[each.name] = row.astype(each.dtype)
        elif isinstance(each.null, int):
            nulls[each.name] = np.array(each.null, each.dtype)
        elif each.null in ("zeros", "ones"):
            nulls[each.name] = np.full(each.shape, float(each.null == "ones"), each.dtype)
        elif each.null != "same" and each.default is None:
            lacking.append(each.name)
    if not options.dropout or not model.conditions:
        return {}, []
    if lacking:
        what = "--null-context" if lacking == [CONTEXT] else "--null-class" if lacking == [LABELS] else "no option"
        return {}, [f"nothing is dropped: what 'no {lacking[0]}' is is not known ({what} says it)"]
    return nulls, []
