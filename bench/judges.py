"""What samples of a trained model are held against: the digits' own evaluation, or a folder of reference images."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparse_engine.errors import MissingDependencyError, OptionError, UnsupportedError
from sparse_engine.export.model import Model
from sparse_engine.files import check_readable, scratch_folder
from sparse_engine.images import write_samples
from sparse_engine.results import to_uint8

from .quality import Judge, frechet_distance

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
DIGITS_SHAPE, DIGITS_CLASSES = (1, 8, 8), 11
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_digits(model: Model) -> bool:
    """Whether a model draws scikit-learn's digits: its shape and classes are theirs, and the evaluation is here."""
    fits = model.config.data_shape == DIGITS_SHAPE and model.num_classes == DIGITS_CLASSES
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


def fid_judge(model: Model, references: Path, images: int) -> Judge:
    """FID against a folder of images, by torch-fidelity.

    Raises:
        OptionError: no folder of images, or a latent model, whose samples have no pixels.
        MissingDependencyError: torch-fidelity is not installed.
        UnsupportedError: the Inception weights are not on this machine; nothing is ever downloaded.
    """
    value_range = model.recipe.value_range
    if value_range is None:
        raise OptionError("--quality: this is a latent model, whose samples have no pixels", "leave --quality out")
    check_readable(references, OptionError, folder=True)
    found = [path for path in references.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    if len(found) < 2:
        raise OptionError(f"--quality {references}: expected a folder with two images or more, found {len(found)}")
    fidelity, weights = _fidelity(), inception_weights()

    def judge(drawn: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        with scratch_folder() as folder:
            samples = folder / "samples"
            write_samples(samples, [to_uint8(drawn, value_range)])
            scores = fidelity.calculate_metrics(
                input1=str(samples),
                input2=str(references),
                fid=True,
                cuda=False,
                cache=False,
                save_cpu_ram=True,  # in this process: no worker of its own per core
                verbose=False,
                feature_extractor_weights_path=str(weights),
            )
        return {"fid": float(scores["frechet_inception_distance"])}

    return Judge(images, judge)


def inception_weights() -> Path:
    """Where torch-fidelity keeps the Inception network's weights. Raises UnsupportedError where they are not."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if not path.is_file():
        raise UnsupportedError(
            f"FID needs the Inception weights, and {path} does not exist",
            "download that file from torch-fidelity's release v0.2.0 and put it there, or leave --quality out",
        )
    return path


def _fidelity() -> Any:
    try:
        return importlib.import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"FID needs {error.name}; it is not installed", "pip install 'sparse-engine[quality]'"
        ) from error
