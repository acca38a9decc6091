"""An engine of a network that is in memory: built once, kept in a folder by the weights and what was asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparse_engine import __version__, arguments, artifact, tactics
from sparse_engine.backends import BuildOptions
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import collect
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import CheckpointError, EngineFileError, OptionError
from sparse_engine.export.build import build_engine
from sparse_engine.export.diffusers_folder import DECODERS
from sparse_engine.export.diffusers_scheduler import scheduler_settings
from sparse_engine.export.masks import Pattern
from sparse_engine.export.options import MaskOptions, ModelOptions
from sparse_engine.files import kept_if_done, scratch_folder

from .original import Original, weights_digest

FOLDER = "diffusers"  # in the user's cache folder
# What an engine says of noise where the pipeline's scheduler is not offered: it only evaluates its network.
CALIBRATED = (*QUANTISED_PRECISIONS, "auto")
TRAINING = ("schedule", "prediction")
NOT_READ: dict[bool, dict[str, Any]] = {
    True: {"schedule": {"name": "flow", "time_scale": 1000.0, "shift": 3.0}, "prediction": "flow"},
    False: {"schedule": {"name": "stable-diffusion", "time_shift": -1.0}, "prediction": "eps"},
}


@dataclass(frozen=True)
class BuildRequest:
    """What an engine is built with; everything but ``cache`` is in its key.

    Attributes:
        precision: of the network's products.
        sparse: 2:4 masks and sparse kernels; False builds dense.
        backend: "auto" or a backend's name.
        batch: (smallest, usual, largest) of a call; under guidance a call has two rows for each picture.
        mask: as ``--mask``; mask_layers: globs; pattern: N:M.
        calib: what ``sparse-engine calibrate`` wrote of the network's file, for int8, fp8 and "auto"; None collects it,
            where the network is told no more than a label.
        max_quality_loss: as ``--max-quality-loss``.
        image_size: side of the latents or pixels, where it is not the configuration's.
        context_length: vectors of a text, where it is not the family's.
        cache: folder of built engines.
    """

    precision: str = "fp32"
    sparse: bool = True
    backend: str = "auto"
    batch: tuple[int, int, int] = (1, 2, 64)
    mask: str | None = None
    mask_layers: tuple[str, ...] | None = None
    pattern: str = "2:4"
    calib: str | Path | None = None
    max_quality_loss: float | None = None
    image_size: int | None = None
    context_length: int | None = None
    cache: str | Path | None = None


def request_of(options: Mapping[str, Any]) -> BuildRequest:
    """The build that a caller's options ask for. Raises OptionError on one that is none."""
    known = [field.name for field in fields(BuildRequest)]
    for name in options:
        if name not in known:
            raise OptionError(f"{name} is no option of a build; expected {', '.join(known)}")
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    request = BuildRequest(**given)
    arguments.truth("sparse", request.sparse)
    return request


def built_engine(original: Original, pipe: Any, request: BuildRequest) -> Path:
    """The engine file of a pipeline's network, built where it is not in the cache yet.

    Raises:
        CheckpointError, OptionError, UnsupportedError: as ``build_engine``; the network is of no known family.
        BackendError: the graph could not be exported or built.
    """
    network = original.network()
    trained = _trained(getattr(pipe, "scheduler", None))
    folder = Path(arguments.path("cache", request.cache)) if request.cache else tactics.cache_folder() / FOLDER
    path = folder / f"{original.kind.__name__}-{_key(network, original, trained, request)}{artifact.SUFFIX}"
    if path.is_file():
        with contextlib.suppress(EngineFileError):  # damaged, or of another machine: built anew
            artifact.EngineFile(path)
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with _saved(network, original, pipe) as checkpoint, kept_if_done(path) as built:
        calib = Path(request.calib) if request.calib else None
        if calib is None and request.precision in CALIBRATED:
            calib = _calibrated(original, pipe, request, built.with_name("calibration.npz"))
        _, manifest = build_engine(
            checkpoint,
            built,
            model=ModelOptions(image_size=request.image_size, context_length=request.context_length, **trained),
            masks=MaskOptions(request.mask, Pattern.parse(request.pattern), request.mask_layers),
            backend=request.backend,
            options=BuildOptions(sparse=request.sparse, precision=request.precision, batch=request.batch),
            quantisation=Quantisation(calib, max_quality_loss=request.max_quality_loss) if calib else None,
        )
    for note in manifest.notes:
        if note.startswith("warning:"):
            warnings.warn(note.removeprefix("warning: "), stacklevel=3)
    return path


def _key(network: Any, original: Original, trained: dict[str, Any], request: BuildRequest) -> str:
    asked = {field.name: getattr(request, field.name) for field in fields(request) if field.name != "cache"}
    if request.calib is not None:
        calib = Path(request.calib)
        asked["calib"] = hashlib.sha256(calib.read_bytes()).hexdigest() if calib.is_file() else str(calib)
    told = {
        "tool": __version__,
        "weights": weights_digest(network),
        "config": {name: value for name, value in original.config.items() if not name.startswith("_")},
        "trained": trained,
        "asked": asked,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _calibrated(original: Original, pipe: Any, request: BuildRequest, path: Path) -> Path:
    """What a float engine's network is given as it samples, written to ``path``. Raises OptionError."""
    float_engine = built_engine(original, pipe, dataclasses.replace(request, precision="fp32", max_quality_loss=None))
    with SparseEngine.load(float_engine) as engine:
        needed = [each.name for each in engine.manifest.conditions if each.needed]
        if needed:
            raise OptionError(
                f"precision {request.precision} needs calibration data, and the network is told {', '.join(needed)}",
                "sparse-engine calibrate FOLDER --conditioning told.npz, build with --calib, and pass engine=",
            )
        collect(engine).save(path)
    return path


@contextlib.contextmanager
def _saved(network: Any, original: Original, pipe: Any) -> Iterator[Path]:
    """The network's part of a pipeline's folder, as far as a build reads it."""
    part = "unet" if original.kind.__name__.startswith("UNet") else "transformer"
    if not hasattr(network, "save_pretrained"):
        raise CheckpointError(
            f"the network is a {original.kind.__name__}, which diffusers cannot save",
            "save its weights, build an engine of the file, and pass engine=",
        )
    with scratch_folder() as folder:
        network.save_pretrained(folder / part)
        if any(getattr(pipe, name, None) is not None for name in DECODERS):
            (folder / DECODERS[0]).mkdir()  # which says that the network draws latents
        yield folder / part


def _trained(scheduler: Any) -> dict[str, Any]:
    """What a scheduler says of the training; where it is one that is not offered, something that goes with the network.

    The engine in a pipeline only evaluates its network, and no scheduler of ours is asked.
    """
    if not hasattr(scheduler, "save_pretrained"):
        return NOT_READ[False]
    with scratch_folder() as folder:
        scheduler.save_pretrained(folder / "scheduler")
        try:
            settings, _ = scheduler_settings(folder / "unet" / "config.json", {})
        except CheckpointError:
            settings = {}
    found = {name: settings[name] for name in TRAINING if name in settings}
    return found if len(found) == len(TRAINING) else NOT_READ["Flow" in type(scheduler).__name__]
