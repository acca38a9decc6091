"""From what ``sample_many`` is asked for to a job, with every argument checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sparse_engine import arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.assets import Assets
from sparse_engine.backends import StepRunner
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError

from .job import BALANCED, CHUNK, DRAWN, JOB, LISTED, REPEATED, Chunk, Job, Request
from .told import Told, sha256_of


def request(engine: str | Path, out: str | Path, n: int, given: Mapping[str, Any]) -> Request:
    """What ``sample_many`` is asked for, all of it checked; nothing is drawn or written.

    Args:
        engine, out, n: as ``sample_many``.
        given: its keywords from ``chunk`` to ``options``, all of them.

    Raises:
        As ``sample_many``.
    """
    out = arguments.path("out", out)
    n = arguments.whole_number("n", n, 1, arguments.MOST_IMAGES)
    chunk = arguments.whole_number("chunk", _known_chunk(out) if given["chunk"] is None else given["chunk"], 1)
    file = EngineFile(engine)
    manifest, guidance, told = file.manifest, given["guidance"], given["conditioning"]
    others = {key: arguments.plain(value) for key, value in (given["options"] or {}).items() if value is not None}
    latents = manifest.value_range is None and "vae" not in manifest.assets
    channels, *area = manifest.picture_shape
    spec, label_file = _label_spec(given["labels"], n)
    job = Job(
        engine=file.manifest_sha256,
        n=n,
        seed=arguments.seed(given["seed"]),
        steps=arguments.whole_number("steps", given["steps"], 1),
        sampler=manifest.sampler if given["sampler"] is None else given["sampler"],
        options=others,
        guidance=None if guidance is None else arguments.real_number("guidance", guidance, arguments.MOST_GUIDANCE),
        labels=spec,
        prompt=given["prompt"],
        negative_prompt=given["negative_prompt"],
        conditioning=None if told is None else sha256_of(Path(told)),
        output="float" if latents else "uint8",
        shape=list(manifest.data_shape) if latents else [*area, channels],
        chunk=chunk,
    )
    asked = Request(
        job,
        str(Path(engine).absolute()),
        str(out.absolute()),
        label_file and str(Path(label_file).absolute()),
        None if told is None else str(Path(told).absolute()),
    )
    _check(asked, file)
    return asked


def _known_chunk(out: Path) -> int:
    """Where no size is asked for: that of the job which is there already."""
    return Job.read(out).chunk if (out / JOB).is_file() else CHUNK


def _label_spec(labels: Any, n: int) -> tuple[dict[str, Any], str | None]:
    """(how labels come about, the file that lists them)."""
    if labels is None or labels in (DRAWN, BALANCED):
        return {"kind": labels or DRAWN}, None
    if isinstance(labels, (str, Path)):
        return {"kind": LISTED, "sha256": sha256_of(Path(labels))}, str(labels)
    classes = arguments.array("labels", labels, "array: {}; expected classes, which are repeated").reshape(-1)
    if classes.dtype.kind not in "iu" or not 0 < len(classes) <= n:
        raise OptionError(
            f"labels are {len(classes)} of {classes.dtype}; expected 1 to {n} classes, which are repeated",
            'or "balanced", or the path of a .npy file with one for each image',
        )
    return {"kind": REPEATED, "classes": classes.tolist()}, None


def _check(asked: Request, file: EngineFile) -> None:
    """Say before the work what ``SparseEngine.stream`` would refuse: an engine that is not loaded checks as much."""
    unloaded = SparseEngine(file.manifest, cast(StepRunner, _Unloaded()), Assets(file.manifest, file, 1))
    told = Told(asked, file.manifest)
    unloaded.stream(1, **told.of(Chunk(0, 1)))
    if told.listed is not None:
        unloaded.told(asked.job.n, labels=told.listed, conditioning=told.first_row())


class _Unloaded:
    """In the place of a runner, for an engine whose arguments are checked and that draws nothing."""
