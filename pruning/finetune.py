"""Fine-tuning under a 2:4 mask, as SparseDM does it (arXiv 2404.10445): what ``sparse-engine finetune`` calls.

Plain torch, on one process or under ``torchrun``. All that is drawn is a function of (seed, step, sample), so a run is
the same on any number of processes, and goes on where it stopped when the same is called again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_engine import __version__, arguments, process
from sparse_engine.errors import CheckpointError, MissingDependencyError, OptionError, TrainingError
from sparse_engine.export.bake import bake
from sparse_engine.export.masks import TWO_FOUR, obeys_training_groups
from sparse_engine.export.model import Model, initialised_model, load_model
from sparse_engine.export.names import listed
from sparse_engine.export.options import ModelOptions

from .data import Data, DataOptions, load_data
from .drawing import check_drawable, draw, own_copy, picture
from .draws import Draws
from .processes import Processes, together
from .run_folder import RunFolder
from .settings import RANDOM, Reporting, Settings, Start
from .trainer import Batches, Trainer

LOSSES = ("loss", "noise_loss", "teacher_loss")
Said = Callable[[str], None]
Steps = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end.

    Attributes:
        checkpoint: the last one.
        steps: done in all.
        begun_at: the step at which this call began.
        losses: of the last line of the log that this call wrote.
        images_per_second: of this call, over all processes; 0 where nothing was left to do.
        first: whether this is the process that writes the files.
    """

    checkpoint: Path
    steps: int
    begun_at: int
    losses: dict[str, float]
    images_per_second: float
    first: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {**dataclasses.asdict(self), "checkpoint": str(self.checkpoint)}


@dataclass
class _Sums:
    """Losses since the last line of the log. In checkpoints too: a line is the same whether the run was stopped."""

    values: list[float] = field(default_factory=lambda: [0.0] * len(LOSSES))
    count: int = 0

    def add(self, values: Sequence[float]) -> None:
        self.values = [total + value for total, value in zip(self.values, values, strict=True)]
        self.count += 1

    def taken(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: total / self.count for name, total in zip(LOSSES, self.values, strict=True)}
        self.values, self.count = [0.0] * len(LOSSES), 0
        return means


def finetune(
    start: Start,
    data: Path,
    output: Path,
    settings: Settings,
    *,
    of_data: DataOptions = DataOptions(),  # noqa: B008 - all of these are frozen
    reporting: Reporting = Reporting(),  # noqa: B008
    model: ModelOptions = ModelOptions(),  # noqa: B008
    device: str | None = None,
    threads: int | None = None,
    say: Said = lambda line: None,
    stage: Said = lambda text: None,
    stepped: Steps = lambda step, steps, losses: None,
) -> Finished:
    """Train a model, or go on with a training that was stopped.

    Args:
        start: the dense checkpoint, and what to start from.
        data: as ``load_data`` takes it.
        output: the run's folder; ``build`` takes it as it is.
        settings: how to train.
        of_data: how the data is read.
        reporting: log, checkpoints and pictures.
        model: what the checkpoint does not say of its model.
        device: "cpu", "cuda" or "cuda:N"; None is a GPU where there is one.
        threads: of a CPU; None is PyTorch's own choice.
        say: told what the user should read.
        stage: told what is being done.
        stepped: told (step, steps, losses) after each.

    Raises:
        CheckpointError, OptionError, InputError, OutputError: bad input, or a folder of another run.
        TrainingError: a loss or a weight is NaN or infinite; names the last good checkpoint.
        KeyboardInterrupt: a signal came; the step was finished, and a checkpoint written.
    """
    if threads is not None:
        torch.set_num_threads(arguments.threads(threads) or 1)
    with together(device) as processes:
        tell = say if processes.first else lambda line: None
        _check_parts(settings, processes)
        stage("reading the checkpoint")
        loaded, initial = _models(start, model, settings)
        if reporting.sample_every:
            check_drawable(loaded, reporting.samples)
        _check_optional(reporting)
        masked, notes = masked_layers(loaded, settings, initial.checkpoint.config)
        _check_dense(loaded, masked, start, settings)
        stage("reading the data")
        found = load_data(data, loaded, of_data)
        for note in (*loaded.notes, *notes, *found.notes):
            tell(f"note: {note}")
        folder = RunFolder(output)
        facts = _facts(loaded, initial, found, of_data, settings)
        if processes.first:
            record = masks_on_record(loaded, masked, settings)
            folder.begin(facts, {**loaded.settings(), **record}, settings.endless)
        with folder.held() if processes.first else contextlib.nullcontext():
            return _Run(loaded, initial, found, masked, settings, reporting, folder, processes).go(tell, stepped)


def _check_parts(settings: Settings, processes: Processes) -> None:
    parts = processes.count * settings.accumulate
    if settings.batch % parts:
        raise OptionError(
            f"--batch {settings.batch} cannot be split evenly into {processes.count} processes x --accumulate "
            f"{settings.accumulate}",
            f"for example --batch {max(1, round(settings.batch / parts)) * parts}",
        )


def _check_optional(reporting: Reporting) -> None:
    if not reporting.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"--tensorboard needs {error.name}; it is not installed", "pip install 'sparse-engine[tensorboard]'"
        ) from error


def _models(start: Start, given: ModelOptions, settings: Settings) -> tuple[Model, Model]:
    """The dense model (or what stands for it), and the one whose weights are started from."""
    options = given.given()
    if start.dense is None:
        if start.weights != RANDOM or start.config is None:
            raise OptionError(
                "there is no checkpoint to fine-tune", "name one, or train anew: --from random --config FILE"
            )
        if settings.taught:
            raise OptionError(
                "there is no dense checkpoint that could teach", "name one, or give --method dense, ste or progressive"
            )
        made = initialised_model(start.config, given.family, settings.seed, **options)
        return made, made
    if start.config is not None:
        raise OptionError("--config is given beside a checkpoint, which has a configuration", "leave one of them out")
    dense = load_model(start.dense, given.family, **options)
    if start.weights is None:
        return dense, dense
    if start.weights == RANDOM:
        return dense, _reinitialised(dense, settings.seed)
    other = load_model(Path(start.weights), given.family, **options)
    if other.family is not dense.family or other.config != dense.config:
        raise CheckpointError(
            f"--from {start.weights} is another network than {start.dense}",
            "start from weights that were made of that checkpoint",
        )
    return dense, other


def _reinitialised(model: Model, seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = model.family.network(model.config).state_dict()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return dataclasses.replace(
        model, checkpoint=dataclasses.replace(model.checkpoint, state=arrays, masks={}, sha256=RANDOM)
    )


def masked_layers(
    model: Model, settings: Settings, started_from: Mapping[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """Names of the layers that a training masks, and notes on those that are left dense.

    Args:
        model: says which layers there are.
        settings: "mask_layers" in place of the family's choice.
        started_from: the configuration of the weights to start from: layers that ``prune`` left dense stay so.

    Raises OptionError where none can be masked.
    """
    if not settings.masked:
        if settings.mask_layers:
            raise OptionError("--mask-layers is given, and --method dense masks nothing", "leave it out")
        return [], []
    globs = settings.mask_layers or model.family.sparse_layers
    layers = bake(model, "none", settings.pattern, settings.mask_layers or None).layers
    chosen = [layer for layer in layers if any(fnmatchcase(layer.name, glob) for glob in globs)]
    record = (started_from or {}).get("pruning")
    spared = record.get("dense") if isinstance(record, Mapping) and not settings.mask_layers else None
    kept = [layer.name for layer in chosen if isinstance(spared, Mapping) and layer.name in spared]
    chosen = [layer for layer in chosen if layer.name not in kept]
    fitting = [layer.name for layer in chosen if layer.parameters % settings.pattern.m == 0]
    others = [layer.name for layer in chosen if layer.parameters % settings.pattern.m]
    if not fitting:
        raise OptionError(f"none of the {len(layers)} layers can be masked {settings.pattern}", "see --mask-layers")
    notes = [f"{listed(others)} stay dense: their weights are no multiple of {settings.pattern.m}"] if others else []
    notes += [f"{listed(kept)} stay dense, as they were left in the pruning"] if kept else []
    return fitting, notes


def masks_on_record(model: Model, masked: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What the run's configuration says of its masks: which layers have one, and which of the family's do not."""
    if not masked:
        return {}
    others = dict.fromkeys(_left_dense(model, masked), "not masked in the fine-tuning")
    return {"pruning": {"pattern": str(settings.pattern), "pruned": list(masked), "dense": others}}


def _left_dense(model: Model, masked: Sequence[str]) -> list[str]:
    """The layers of the family's choice that are not masked."""
    names = [layer.name for layer in bake(model, "none").layers]
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in model.family.sparse_layers)]
    return [name for name in chosen if name not in masked]


def _check_dense(model: Model, masked: Sequence[str], start: Start, settings: Settings) -> None:
    """Refuse a teacher that is pruned itself, unless that is wanted."""
    if start.dense is None or start.force or not masked:
        return
    state = bake(model, "none").state
    weights = {name: state[f"{name}.weight"] for name in masked}
    pruned = [name for name, own in weights.items() if own.any() and obeys_training_groups(own, settings.pattern)]
    if pruned:
        raise CheckpointError(
            f"{start.dense} is {settings.pattern} already, in {len(pruned)} of the {len(masked)} layers that would be "
            "masked",
            "name the dense checkpoint, and this one with --from; or give --force",
        )


def _facts(model: Model, initial: Model, data: Data, of_data: DataOptions, settings: Settings) -> dict[str, Any]:
    """All that the weights depend on."""
    null = {name: row.tolist() if row.ndim == 0 else _digest(row) for name, row in data.nulls.items()}
    options = dataclasses.asdict(of_data)
    return {
        "tool_version": __version__,
        "checkpoint_sha256": model.checkpoint.sha256,
        "from_sha256": initial.checkpoint.sha256,
        "model": model.settings(),
        "images": data.count,
        "data": data.fingerprint,
        "nulls": null,
        "flip": options["flip"],
        "resize": options["resize"],
        "dropout": options["dropout"],
        "latent_scale": options["latent_scale"],
        **settings.to_dict(),
    }


def _digest(row: np.ndarray) -> str:
    """A fingerprint of an array."""
    return hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()


class _Run:
    """One call of ``finetune``, on one process."""

    def __init__(
        self,
        model: Model,
        initial: Model,
        data: Data,
        masked: Sequence[str],
        settings: Settings,
        reporting: Reporting,
        folder: RunFolder,
        processes: Processes,
    ) -> None:
        self._model, self._data, self._settings, self._reporting = model, data, settings, reporting
        self._folder, self._processes = folder, processes
        teacher = bake(model, "none").state if settings.taught else None
        self._left = _left_dense(model, masked)
        globs = model.family.sparse_layers
        chosen = all(any(fnmatchcase(name, glob) for glob in globs) for name in masked)
        self._by_rule = not self._left and chosen and settings.pattern == TWO_FOUR
        self._trainer = Trainer(model, bake(initial, "none").state, teacher, masked, settings, processes)
        self._batches = Batches(data, Draws(settings.seed, data.count, settings.batch), model, settings, processes)
        self._stop = threading.Event()
        self._sums, self._log_line = _Sums(), dict[str, float]()
        self._saved: Path | None = None
        self._writer: Any = None

    def go(self, say: Said, stepped: Steps) -> Finished:
        settings = self._settings
        first = self._resumed(say)
        if self._processes.first and self._reporting.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder.path, purge_step=first + 1)
        began = time.perf_counter()
        logged = (began, first)
        with process.noting(self._stop.set):
            for step, parts in enumerate(self._batches.steps(first, settings.steps), start=first):
                logging = (step + 1) % self._reporting.log_every == 0 or step + 1 == settings.steps
                told = self._trainer.step(step, parts, count_flips=logging)
                stopped = self._agree(step, told)
                if logging:
                    logged = self._log(step, told, logged)
                stepped(step + 1, settings.steps, {name: told[name] for name in LOSSES})
                self._leave_behind(step + 1, stopped)
                if stopped:
                    if step + 1 < settings.steps:
                        say(f"stopped after step {step + 1}: the same command goes on from {self._saved}")
                    raise KeyboardInterrupt
        if self._writer is not None:
            self._writer.close()
        seconds = max(time.perf_counter() - began, 1e-9)
        if self._saved is None:
            raise CheckpointError(f"{self._folder.path} has no checkpoint", "run again, with another folder")
        pace = (settings.steps - first) * settings.batch / seconds
        done, writes = max(settings.steps, first), self._processes.first
        return Finished(self._saved, done, first, self._log_line, max(pace, 0.0), writes)

    def _resumed(self, say: Said) -> int:
        """The step to begin with: after the last checkpoint, if there is one."""
        last = self._folder.last()
        if last is None:
            if self._processes.first:
                self._folder.rewind(0)
            self._processes.wait()
            return 0
        step, held = self._folder.load(last)
        rest = held["optimizer.pth"]
        try:
            self._trainer.load(step, held["nnet.pth"], held["nnet_ema.pth"], rest)
            self._sums = _Sums(list(rest["sums"]), int(rest["count"]))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{last} is no checkpoint of this run: {error}", f"delete {last}") from error
        self._saved = last
        if self._processes.first:
            self._folder.rewind(step)
        self._processes.wait()
        say(
            f"going on from {last.name}"
            if step < self._settings.steps
            else f"{self._folder.path} is done: {step} steps"
        )
        return step

    def _agree(self, step: int, told: dict[str, Any]) -> bool:
        """The losses over all processes, in ``told``; whether one of the processes was asked to stop."""
        *values, asked = self._processes.mean([*(told[name] for name in LOSSES), float(self._stop.is_set())])
        told.update(zip(LOSSES, values, strict=True))
        if not math.isfinite(told["loss"]):
            raise self._diverged(f"the loss of step {step + 1} is {told['loss']}")
        self._sums.add(values)
        return asked > 0

    def _diverged(self, what: str) -> TrainingError:
        good = f"the last good checkpoint is {self._saved}" if self._saved else "no checkpoint was written before"
        return TrainingError(
            f"{what}; {good}", "give a lower --lr, a longer --warmup or --clip-norm 1, with another folder -o"
        )

    def _log(self, step: int, told: dict[str, Any], logged: tuple[float, int]) -> tuple[float, int]:
        """A line of the log; when it was written, and after how many steps."""
        now = time.perf_counter()
        self._log_line = self._sums.taken()
        if not self._processes.first:
            return now, step + 1
        pace = (step + 1 - logged[1]) * self._settings.batch / max(now - logged[0], 1e-9)
        entry = {"step": step + 1, **self._log_line, "lr": told["lr"], "images_per_second": round(pace, 2)}
        if "grad_norm" in told:
            entry["grad_norm"] = told["grad_norm"]
        if self._settings.masked:
            entry |= {"pattern": str(self._settings.pattern_at(step)), "flips": told["flips"]}
        self._folder.log(entry)
        if self._writer is not None:
            for name in (*LOSSES, "lr", "images_per_second"):
                self._writer.add_scalar(name, entry[name], step + 1)
            for name, share in told.get("flips", {}).items():
                self._writer.add_scalar(f"flips/{name}", share, step + 1)
        return now, step + 1

    def _leave_behind(self, step: int, stopped: bool) -> None:
        """Checkpoint and picture, where it is time for one."""
        reporting = self._reporting
        last = step == self._settings.steps
        if last or stopped or (reporting.save_every and step % reporting.save_every == 0):
            self._save(step)
        if reporting.sample_every and (last or step % reporting.sample_every == 0) and self._processes.first:
            self._folder.write_picture(step, self._picture())

    def _save(self, step: int) -> None:
        if not self._trainer.finite():
            raise self._diverged(f"weights are NaN or infinite after step {step}")
        if self._processes.first:
            rest = {**self._trainer.rest(), "sums": self._sums.values, "count": self._sums.count}
            averaged = {**self._trainer.averaged(), **self._stored_masks()}
            self._saved = self._folder.save(step, averaged, self._trainer.raw(), rest)
            self._folder.thin(self._reporting.keep)
        else:
            self._saved = self._folder.path / f"{step:06d}.ckpt"

    def _stored_masks(self) -> dict[str, torch.Tensor]:
        """Masks to store beside averages that no rule would find again: of other layers than the family's, or not 2:4.

        Where they are the family's and 2:4, none are stored, as SparseDM stores none.
        """
        if self._by_rule or not self._settings.masked:
            return {}
        masks, shapes = self._trainer.averaged_masks(), self._model.checkpoint.shapes
        whole = {f"{name}.weight": torch.ones(shapes[f"{name}.weight"], dtype=torch.bool) for name in self._left}
        return {f"{name}_mask": mask for name, mask in {**masks, **whole}.items()}

    def _picture(self) -> bytes:
        count, model = self._reporting.samples, self._model
        network = model.network(own_copy(self._trainer.drawn_with())).to(self._processes.device)
        rows = np.arange(count) % self._data.count
        told = {name: each(rows) for name, each in self._data.told.items()}
        told = {name: array[:, 0] if name == "context" and array.ndim == 4 else array for name, array in told.items()}
        labels = model.labels(count)
        if "y" in told and labels is not None:
            told["y"] = labels
        return picture(
            draw(network, model, told, count, self._processes.device), model.recipe.value_range or (-1.0, 1.0)
        )
