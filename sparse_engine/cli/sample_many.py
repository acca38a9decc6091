"""``sparse-engine sample-many``: pictures by the ten thousand, and ``sample-many finish``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from sparse_engine.errors import OptionError

from .groups import grouped
from .options import Autotune, BatchSize, SamplerName, SamplerOptions, Steps, Told
from .sample import class_list
from .terminal import errors

FINISH = "sample-many finish"
BETWEEN_LINES = 30.0  # seconds, where no terminal shows a bar: a job's log


@dataclass(frozen=True)
class Machines:
    """Who draws, and how."""

    workers: Annotated[int | None, typer.Option(help="Processes of this machine.", show_default="this one alone")] = (
        None
    )
    cluster: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local.")] = None
    batch_size: BatchSize = None
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each worker.", show_default="the cores, shared; 1 on a cluster")
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cuda:0, or cuda:0,cuda:1 for workers.", show_default="the backend's own")
    ] = None
    autotune: Autotune = True
    timeout: Annotated[float, typer.Option(help="Seconds without a batch after which a worker counts as hung.")] = 600
    mixed_machines: Annotated[
        bool, typer.Option("--mixed-machines", help="Go on with other kernels than the job was begun with.")
    ] = False
    steal_lock: Annotated[
        bool, typer.Option("--steal-lock", help="Take the lock of a process on another host for left behind.")
    ] = False

    def options(self) -> Any:
        """The same for ``bulk``."""
        from sparse_engine import bulk

        given = dict(vars(self))
        return bulk.Machines(mixed=given.pop("mixed_machines"), **given)


@grouped
def command(
    engine: Annotated[Path, typer.Argument(help="A .sengine file.")],
    *,
    n: Annotated[int, typer.Option("-n", "--count", help="How many images, numbered from 0.")] = 50_000,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A folder: new, or of the same job, which is then gone on with.")
    ] = Path("samples"),
    chunk: Annotated[int | None, typer.Option(help="Images in a file.", show_default="500, or the job's")] = None,
    format: Annotated[
        str, typer.Option(help="What the end makes of the chunks: npz, png, webdataset, parquet or none.")
    ] = "npz",
    shard: Annotated[
        str | None, typer.Option(help="i/N: every N-th chunk from i (0 to N - 1) on; finish it by itself later.")
    ] = None,
    steps: Steps = 50,
    sampler: SamplerName = None,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    labels: Annotated[
        str | None,
        typer.Option(
            help="balanced; or classes such as 3, 0,1,2 or 0-9, repeated; or a .npy file with one for each image.",
            show_default="drawn",
        ),
    ] = None,
    told: Told,
    machines: Machines,
    own: SamplerOptions,
) -> None:
    """Draw tens of thousands of samples into a folder, by one process or many; run again to go on."""
    from sparse_engine import bulk

    crew = machines.options()
    with _display(n) as tell:
        summary = bulk.sample_many(
            engine,
            output,
            n,
            chunk=chunk,
            seed=seed,
            steps=steps,
            sampler=sampler,
            labels=_labels(labels, n),
            **vars(told),
            options=vars(own),
            machines=crew,
            shard=None if shard is None else _shard(shard),
            format=None if format == "none" else format,
            tell=tell,
        )
    rate = f", {_rate(summary.drawn / summary.seconds)}" if summary.seconds > 0 else ""
    replaced = f", {summary.replaced} workers replaced" if summary.replaced else ""
    where = summary.finished or output
    _print(f"{summary.images} images ({summary.drawn} drawn now{rate}{replaced}): {where}")


def finish_command(
    output: Annotated[Path, typer.Argument(help="A folder of sample-many.", metavar="OUT")],
    format: Annotated[str, typer.Option(help="npz, png, webdataset or parquet.")] = "npz",
) -> None:
    """Put the chunks of sample-many together: an array, pictures, WebDataset's tars or a Parquet file."""
    from sparse_engine import bulk

    _print(f"{bulk.finish(output, format)}")


def _print(line: str) -> None:
    errors.print(line, highlight=False, markup=False)


def _labels(text: str | None, n: int) -> Any:
    if text is None or text in ("balanced", "drawn"):
        return text
    return Path(text) if text.endswith(".npy") else class_list(text, n)


def _shard(text: str) -> Any:
    from sparse_engine.bulk import Shard

    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal():
        raise OptionError(f"--shard {text!r}: expected i/N, such as 0/4", "shards are counted from 0")
    return Shard(int(index), int(count))


@contextmanager
def _display(n: int) -> Iterator[Any]:
    """Something that is told of the progress: a bar on a terminal, a line now and then in a log."""
    if not errors.is_terminal:
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=errors, transient=True) as display:
        task = display.add_task("loading", total=n, pace="")

        def tell(progress: Any) -> None:
            what = f"{progress.done}/{progress.total} images" if progress.workers else "loading"
            display.update(task, description=what, completed=progress.done, total=progress.total, pace=_pace(progress))

        yield tell


class _Lines:
    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, progress: Any) -> None:
        if time.monotonic() - self._said >= BETWEEN_LINES and progress.rate:
            self._said = time.monotonic()
            _print(f"{progress.done} of {progress.total} images, {_pace(progress)}")


def _pace(progress: Any) -> str:
    """ "83.1 images/s by 2 workers, 7 min 31 s left"."""
    if not progress.rate:
        return ""
    crew = f"{progress.workers} worker{'s' * (progress.workers != 1)}"
    replaced = f" ({progress.replaced} replaced)" if progress.replaced else ""
    left = "" if progress.left is None else f", {_duration(progress.left)} left"
    return f"{_rate(progress.rate)} by {crew}{replaced}{left}"


def _rate(per_second: float) -> str:
    return f"{per_second:.0f} images/s" if per_second >= 100 else f"{per_second:.3g} images/s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
