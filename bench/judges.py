"""What samples of a trained model are held against: the digits' own evaluation, or reference pictures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np

from sparse_engine.errors import MissingDependencyError, OptionError
from sparse_engine.files import check_readable, scratch_folder
from sparse_engine.images import write_samples
from sparse_engine.pruning.data import Canvas, DataOptions, images_of
from sparse_engine.pruning.pictures import SUFFIXES
from sparse_engine.results import to_uint8

from .inception import fidelity, inception
from .quality import Judge, frechet_distance

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
DIGITS_SHAPE, DIGITS_CLASSES = (1, 8, 8), 11


def is_digits(canvas: Canvas, num_classes: int) -> bool:
    """Whether a model draws scikit-learn's digits: its shape and classes are theirs, and the evaluation is here."""
    fits = canvas.data_shape == DIGITS_SHAPE and num_classes == DIGITS_CLASSES
    return fits and (DIGITS / "evaluate.py").is_file()


def digits_judge(images: int) -> Judge:
    """The accuracy of a classifier trained on the real digits, and the Fréchet distance to them in pixels.

    Raises MissingDependencyError where scikit-learn is not installed.
    """
    if str(DIGITS) not in sys.path:
        sys.path.insert(0, str(DIGITS))  # its scripts import one another by name
    try:
        machine, _ = importlib.import_module("evaluate").classifier()
        real = importlib.import_module("data").load()[0].reshape(-1, 64)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the digits' quality needs {error.name}; it is not installed", "pip install 'sparse-engine[examples]'"
        ) from error

    def judge(drawn: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        pixels = drawn.clip(-1, 1).reshape(len(drawn), -1)
        accuracy = float((machine.predict(pixels) == labels).mean())
        return {"accuracy": accuracy, "frechet": frechet_distance(pixels, real)}

    return Judge(images, judge)


def reference_pictures(canvas: Canvas, references: Path) -> np.ndarray:
    """Reference pictures, float32 [n, C, H, W] in the canvas' range: a folder's, of that size, or an ``.npz``'s.

    Raises InputError where there are none, or they do not fit.
    """
    found = images_of(references, canvas, DataOptions())
    if len(found) < 2:
        raise OptionError(f"{references}: expected two pictures or more, found {len(found)}")
    return found


def frechet_judge(real: np.ndarray, value_range: tuple[float, float], images: int) -> Judge:
    """The Fréchet distance to reference pictures in pixels, in the model's own units. real: float [n, C, H, W]."""

    def judge(drawn: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        return {"frechet": frechet_distance(drawn.clip(*value_range), real)}

    return Judge(images, judge)


def fid_judge(canvas: Canvas, references: Path, images: int, option: str = "--quality") -> Judge:
    """FID against a folder of pictures of any size, or an ``.npz``'s, by torch-fidelity.

    Raises:
        OptionError: no folder of images, or a latent model, whose samples have no pixels.
        MissingDependencyError: torch-fidelity is not installed.
        UnsupportedError: the Inception weights are not on this machine; nothing is ever downloaded.
    """
    value_range = canvas.value_range
    if value_range is None:
        raise OptionError(f"{option}: this is a latent model, whose samples have no pixels", f"leave {option} out")
    check_readable(references, OptionError, folder=True)
    real: np.ndarray | None = None
    if references.is_file():
        real = reference_pictures(canvas, references)
    else:
        found = [path for path in references.glob("*") if path.suffix.lower() in SUFFIXES]
        if len(found) < 2:
            raise OptionError(f"{option} {references}: expected a folder with two images or more, found {len(found)}")
    tool, network = fidelity(), inception()

    def judge(drawn: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        with scratch_folder() as folder:
            samples, against = folder / "samples", references
            write_samples(samples, [to_uint8(drawn, value_range)])
            if real is not None:
                against = folder / "references"
                write_samples(against, [to_uint8(real, value_range)])
            scores = tool.calculate_metrics(
                input1=str(samples),
                input2=str(against),
                fid=True,
                cuda=False,
                cache=False,
                save_cpu_ram=True,  # in this process: no worker of its own per core
                verbose=False,
                **network,
            )
        return {"fid": float(scores["frechet_inception_distance"])}

    return Judge(images, judge)
