"""``sparse-engine sample``: pictures out of an engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sparse_engine.conditioning import read_conditioning
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError
from sparse_engine.images import check_output, check_place, write_samples

from .groups import grouped
from .options import Autotune, BatchSize, Device, SamplerName, SamplerOptions, Steps, Threads, Told
from .terminal import errors, progress

MOST_LABELS = 2**31


@grouped
def command(
    engine: Annotated[Path, typer.Argument(help="A .sengine file.")],
    *,
    n: Annotated[int, typer.Option("-n", "--count", help="How many samples.")] = 16,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="X.png for one picture of all, X.npz, or a folder for PNGs.")
    ] = Path("samples.png"),
    steps: Steps = 50,
    sampler: SamplerName = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first image within its seed.")] = 0,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes such as 3, 0,1,2 or 0-9, repeated to fill the count.", show_default="drawn"),
    ] = None,
    told: Told,
    batch_size: BatchSize = None,
    threads: Threads = None,
    device: Device = None,
    check: Annotated[bool, typer.Option("--check", help="Hash the engine by sha256 first.")] = False,
    autotune: Autotune = True,
    own: SamplerOptions,
) -> None:
    """Draw samples and write them to a picture, a folder or an array."""
    check_place(output)
    conditioning, negative = read_conditioning(told.conditioning)
    with (
        SparseEngine.load(engine, threads=threads, device=device, check=check, autotune=autotune) as loaded,
        progress() as display,
    ):
        manifest = loaded.manifest
        latents = manifest.value_range is None and "vae" not in manifest.assets
        size = batch_size or manifest.batch[1]
        task = display.add_task("sampling", total=math.ceil(max(n, 1) / max(size, 1)) * steps)
        batches = loaded.stream(
            n,
            steps=steps,
            sampler=sampler,
            seed=seed,
            first=first,
            labels=filling_labels(labels, n),
            batch_size=batch_size,
            output="float" if latents else "uint8",
            **{**vars(told), "conditioning": conditioning, "negative": negative},
            **vars(own),
            callback=(lambda *_: display.advance(task)) if errors.is_terminal else None,  # it costs a GPU its pace
        )
        check_output(output, n, manifest.picture_shape, latents=latents)  # nothing has been drawn yet
        written = write_samples(output, batches)
    errors.print(f"{written} samples: {output}", highlight=False, markup=False)


def filling_labels(text: str | None, n: int) -> np.ndarray | None:
    """The classes, repeated to one label per sample. Raises OptionError where they do not fill the count evenly."""
    if text is None:
        return None
    values = class_list(text, n)
    if max(n, 1) % len(values):
        raise OptionError(f"--labels {text!r} are {len(values)} classes, which do not fill {n} samples evenly")
    return np.resize(np.array(values, np.int64), max(n, 1))


def class_list(text: str, n: int) -> list[int]:
    """ "3", "0,1,2" or "0-9" -> the classes, for n samples. Raises OptionError."""
    values: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise OptionError(f"--labels {text!r}: {part!r} is no class", "write them as 3, 0,1,2 or 0-9")
        if int(high or low) > MOST_LABELS:
            raise OptionError(f"--labels {text!r}: {part.strip()!r} is no class: no model has so many")
        span = int(high or low) + 1 - int(low)
        if span > max(n, 1):
            raise OptionError(f"--labels {text!r}: {part.strip()!r} are {span} classes for {n} samples")
        values += range(int(low), int(low) + span)
    if not values:
        raise OptionError(f"--labels {text!r} are no classes", "write them as 3, 0,1,2 or 0-9")
    return values
