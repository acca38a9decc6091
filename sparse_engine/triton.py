"""An engine's plan as a model repository of NVIDIA's Triton Inference Server.

One request to the model is one solver step, as ``docs/engine-file.md`` describes it; the client walks the trajectory,
for which the manifest, with the schedule, lies beside the configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .artifact import MANIFEST, EngineFile
from .errors import OptionError, OutputError, UnsupportedError
from .files import filling, output_error
from .manifest import Manifest

PLAN = "step.plan"
COPY_BYTES = 1 << 24
FLOAT = "TYPE_FP32"


def export_triton(engine: str | Path, repository: str | Path, name: str | None = None) -> Path:
    """Write ``repository/NAME`` with the plan, ``config.pbtxt`` and the manifest.

    Args:
        engine: a ``.sengine`` file built by the tensorrt backend.
        repository: folder of Triton models; made where it is not there.
        name: of the model; the engine file's own where None.

    Returns:
        The model's folder.

    Raises:
        EngineFileError: the file is damaged.
        OptionError: the name is none of a folder.
        UnsupportedError: it holds no plan that Triton can load.
        OutputError: the model is there already, or cannot be written; nothing is left behind.
    """
    file = EngineFile(engine)
    backend = file.manifest.backend["name"]
    if backend != "tensorrt":
        raise UnsupportedError(
            f"{file.path} is an engine for {backend}; Triton loads plans of TensorRT itself",
            "build it with --backend tensorrt on the GPU that will serve it",
        )
    if file.manifest.backend["flags"]["strip_weights"]:
        raise UnsupportedError(f"{file.path} has a plan without weights", "build it without --strip-weights")
    target = Path(repository) / checked_name(name or file.path.stem)
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already", "remove it, or give another --name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(target, error) from error
    with filling(target) as made:
        (made / "1").mkdir()
        _copy_plan(file, made / "1" / "model.plan")
        (made / "config.pbtxt").write_text(configuration(file.manifest, target.name))
        (made / MANIFEST).write_text(json.dumps(file.manifest.to_dict(), indent=1, sort_keys=True))
    return target


def checked_name(name: str) -> str:
    """A model's name: of one folder, which Triton reads from ``config.pbtxt`` too. Raises OptionError on another."""
    if name in (".", "..") or set(name) & set('/\\"\n\0'):
        raise OptionError(f"--name {name!r} is no name of a folder in the repository", "give one like unet-2")
    return name


def configuration(manifest: Manifest, name: str) -> str:
    """``config.pbtxt``: every tensor with its shape, the batch and the number of guidance passes left open.

    Triton's own batching is off (``max_batch_size: 0``): the coefficients of a step belong to the batch as a whole.
    """
    state = [-1, *manifest.data_shape]
    inputs = {"x": state, "t": [-1], "coef": [8], "clip": [2], **dict.fromkeys(("base", "h1", "h2", "z"), state)}
    if manifest.conditions:
        inputs |= {each.name: [-1, -1, *each.shape] for each in manifest.conditions} | {"guidance": [-1]}
    whole = {each.name for each in manifest.conditions if each.dtype == "int64"}
    lines = [f'name: "{name}"', 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    lines += [_tensor("input", each, dims, "TYPE_INT64" if each in whole else FLOAT) for each, dims in inputs.items()]
    lines += [_tensor("output", each, state) for each in ("x_next", "m")]
    lines += ["instance_group [ { count: 1 kind: KIND_GPU } ]"]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, name: str, dims: list[int], data_type: str = FLOAT) -> str:
    return f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: [ {", ".join(map(str, dims))} ] }} ]'


def _copy_plan(file: EngineFile, target: Path) -> None:
    offset, remaining = file.span(PLAN)
    with file.path.open("rb") as source, target.open("wb") as sink:
        source.seek(offset)
        while chunk := source.read(min(remaining, COPY_BYTES)):
            sink.write(chunk)
            remaining -= len(chunk)
