"""``sample_many``: the folder, its lock, the workers, and what is left to do."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_engine import arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import backend_named
from sparse_engine.cores import usable_cores
from sparse_engine.errors import OptionError, OutputError, SparseEngineError, UnsupportedError

from .chunks import missing
from .draw import ChunkSampler, Load
from .folder import open_folder
from .formats import check_format, finish
from .inline import Inline
from .job import CHUNKS, JOB, KERNELS, Job, Request, Shard
from .kernels import JobKernels
from .local import Processes
from .lock import locked
from .pool import Failure, Fleet, Pool, State
from .request import request

TIMEOUT = 600.0
NAMED = 5  # chunks in an error


@dataclass(frozen=True)
class Machines:
    """Who draws, and how; nothing of this changes an image, where the kernels are the same.

    Attributes:
        workers: local processes, or with ``cluster`` actors; None is this process, or as many actors as there is room.
        cluster: address of a Ray cluster, or "local" for one of its own.
        threads: of each worker; None is one per core in this process, the cores divided by the workers in local
            processes, 1 in actors.
        device: as ``SparseEngine.load`` takes it; several, separated by commas, are dealt out to local processes.
        batch_size: images in a network call; None is the build's usual batch.
        autotune: as ``SparseEngine.load``.
        timeout: seconds without a batch after which a worker counts as hung.
        mixed: go on although the kernels are not those that the job was begun with.
        steal_lock: take the lock of a process on another host for left behind.
    """

    workers: int | None = None
    cluster: str | None = None
    threads: int | None = None
    device: str | None = None
    batch_size: int | None = None
    autotune: bool = True
    timeout: float = TIMEOUT
    mixed: bool = False
    steal_lock: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            arguments.whole_number("workers", self.workers, 1, arguments.MOST_THREADS)
        if self.batch_size is not None:
            arguments.whole_number("batch_size", self.batch_size, 1, arguments.MOST_IMAGES)
        arguments.threads(self.threads)
        arguments.real_number("timeout", self.timeout, above=0.0)
        if len(self.devices) > 1 and (self.workers is None or self.cluster is not None):
            raise OptionError(f"device = {self.device} are several", "give --workers, local ones, to share them")

    @property
    def devices(self) -> list[str]:
        """The names in ``device``."""
        return [name.strip() for name in self.device.split(",")] if self.device else []

    @property
    def load(self) -> Load:
        """What a worker is told."""
        threads = self.threads
        if threads is None and self.cluster is not None:
            threads = 1
        elif threads is None and self.workers is not None:
            threads = max(1, usable_cores() // self.workers)
        device = self.device if len(self.devices) < 2 else None
        return Load(threads, device, self.autotune, self.batch_size)


@dataclass(frozen=True)
class Progress:
    """How far a command is, of its own shard.

    Attributes:
        done, total: images, those that were there before too.
        rate: images per second of all workers, since the first was up; None before it has drawn any.
        left: seconds; None while nobody knows.
        workers: that are up.
        replaced: workers that died or hung.
    """

    done: int
    total: int
    rate: float | None
    left: float | None
    workers: int
    replaced: int


@dataclass(frozen=True)
class Summary:
    """What a command did.

    Attributes:
        images: of its shard, all there now.
        drawn: of them, by this command.
        seconds: that drawing took, from the first worker's being up.
        replaced: workers that died or hung.
        busy: seconds that the workers had a chunk to draw and commit, added up.
        finished: what ``finish`` made, where it ran.
    """

    images: int
    drawn: int
    seconds: float
    replaced: int
    busy: float
    finished: Path | None = None


Tell = Callable[[Progress], None]


def sample_many(
    engine: str | Path,
    out: str | Path,
    n: int,
    *,
    chunk: int | None = None,
    seed: int = 0,
    steps: int = 50,
    sampler: str | None = None,
    labels: str | int | Sequence[int] | Path | None = None,
    conditioning: str | Path | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance: float | None = None,
    options: Mapping[str, Any] | None = None,
    machines: Machines | None = None,
    shard: Shard | None = None,
    format: str | None = "npz",
    tell: Tell = lambda progress: None,
) -> Summary:
    """Draw n images into a folder; where some are there already, the others.

    Args:
        engine: the ``.sengine`` file.
        out: the folder; new, empty, or of the same job.
        n: images 0 to n - 1 of the seed.
        chunk: images in a file; None is 500, or the job's where there is one.
        seed, steps, sampler, prompt, negative_prompt, guidance: as ``SparseEngine.sample``; one for all.
        labels: None or "drawn" draws them from the seed; "balanced": image i is of class i mod the classes; classes
            are repeated; the path of a ``.npy`` has one for each image, int64 [n].
        conditioning: the path of an ``.npz``, as ``conditioning.read_conditioning`` reads it: a row for all or n.
        options: the sampler's own, as ``SparseEngine.sample`` takes them.
        machines: who draws; None is this process.
        shard: a part of the chunks, for a scheduler that runs one command for each; nothing is finished then.
        format: what ``finish`` makes at the end; None leaves the chunks as they are.
        tell: called now and then.

    Returns:
        What was done. Chunks that were there are not drawn again.

    Raises:
        OptionError, InputError: what was asked for cannot be done, or the folder is another job's, or was begun with
            other kernels; nothing is drawn.
        BusyError: another process writes there.
        OutputError: the folder cannot be written, or the disk is full.
        SparseEngineError: chunks that failed three times, by name, or workers that do not come up; the rest is drawn.
    """
    given: dict[str, Any] = {"chunk": chunk, "seed": seed, "steps": steps, "sampler": sampler, "labels": labels}
    given |= {
        "options": options,
        "conditioning": conditioning,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
    }
    asked = request(engine, out, n, given)
    if format is not None and shard is None:
        check_format(asked.job, format)
    machines = machines or Machines()
    _check_backend(asked.engine, machines)
    folder, part = Path(out), shard or Shard()
    with _folder(folder, asked.job, part, machines):
        summary = _draw(asked, folder, part, machines, tell)
    if shard is None and format is not None:
        return Summary(**{**vars(summary), "finished": finish(folder, format)})
    return summary


def _check_backend(engine: str, machines: Machines) -> None:
    """Say before the folder is made that this machine cannot run the engine, where it is to."""
    found = backend_named(EngineFile(engine).manifest.backend["name"]).availability()
    if machines.cluster is None and not found.usable:
        raise UnsupportedError(f"{engine} cannot run here: {found.reason}", found.fix)


@contextlib.contextmanager
def _folder(out: Path, job: Job, shard: Shard, machines: Machines) -> Iterator[None]:
    """The job's folder, locked; gone again where it was made here and nothing was drawn."""
    was_there = out.is_dir()
    made = open_folder(out, job)
    emptied = False
    try:
        with locked(out, shard, steal=machines.steal_lock):
            try:
                yield
            except BaseException:
                emptied = made and shard.count == 1 and not any((out / CHUNKS).glob("*.npz"))
                if emptied:
                    _unmake(out)
                raise
    finally:
        if emptied and not was_there:
            with contextlib.suppress(OSError):
                out.rmdir()


def _unmake(out: Path) -> None:
    shutil.rmtree(out / CHUNKS, ignore_errors=True)
    for name in (KERNELS, JOB):
        (out / name).unlink(missing_ok=True)


def _draw(asked: Request, out: Path, shard: Shard, machines: Machines, tell: Tell) -> Summary:
    job, mine = asked.job, asked.job.chunks(shard)
    todo = missing(out, job, mine)
    images, to_draw = sum(chunk.images for chunk in mine), sum(chunk.images for chunk in todo)
    if not todo:
        return Summary(images, 0, 0.0, 0, 0.0)
    _check_room(out, to_draw * job.image_bytes)

    def report(state: State) -> None:
        drawn = state.done + state.drawing
        seconds = 0.0 if state.first_up is None else time.monotonic() - state.first_up
        rate = drawn / seconds if drawn and seconds > 0 else None
        left = (to_draw - drawn) / rate if rate else None
        tell(Progress(images - to_draw + drawn, images, rate, left, state.workers, state.replaced))

    kernels = JobKernels(out, machines.mixed)
    fleet, workers = _fleet(asked, machines)
    pool = Pool(fleet, workers, todo, timeout=machines.timeout, kernels=kernels, tell=report)
    failures = pool.run()
    if failures:
        raise _failed(failures, len(mine), out)
    seconds = 0.0 if pool.state.first_up is None else time.monotonic() - pool.state.first_up
    return Summary(images, to_draw, seconds, pool.state.replaced, pool.state.busy)


def _fleet(asked: Request, machines: Machines) -> tuple[Fleet, int]:
    load = machines.load
    if machines.cluster is not None:
        from .cluster import Actors

        actors = Actors(asked, load, machines.cluster, machines.workers)
        return actors, actors.workers
    if machines.workers is not None:
        devices = machines.devices if len(machines.devices) > 1 else ()
        return Processes(asked, load, devices), machines.workers
    return Inline(lambda choices: ChunkSampler(asked, replace(load, choices=choices))), 1


def _check_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise OutputError(
            f"{out}: the images need {size / 1e9:.3g} GB; the disk has {free / 1e9:.3g} GB left",
            "draw fewer, or free space",
        )


def _failed(failures: Sequence[Failure], of: int, out: Path) -> SparseEngineError:
    names = ", ".join(str(each.chunk) for each in failures[:NAMED])
    more = f" and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
    last = failures[-1].trouble
    return SparseEngineError(
        f"{len(failures)} of {of} chunks failed three times: images {names}{more}; the last said: {last.what}",
        last.fix or f"the others are in {out / CHUNKS}: the same command tries these again",
    )
