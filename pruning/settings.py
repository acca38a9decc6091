"""What a fine-tuning is told, checked before anything is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_engine import arguments
from sparse_engine.errors import OptionError
from sparse_engine.export.masks import TWO_FOUR, Pattern

METHODS = ("sparsedm", "ste", "asp", "progressive", "dense")
PRECISIONS = ("fp32", "bf16", "fp16")
LR_DECAYS = ("constant", "cosine")
RANDOM = "random"  # weights to start from
# SparseDM's own: ``configs/cifar10_uvit_small.py`` and ``train_c10_lsm3.py`` of the authors' code.
TEACHER_WEIGHT, MASK_DECAY, WARMUP = 0.1, 2e-4, 2500
# The stages of "progressive", of equal length; the last is the pattern that is asked for.
STAGES = (Pattern(31, 32), Pattern(15, 16), Pattern(7, 8), Pattern(3, 4))
MOST_STEPS, MOST_BATCH = 2**32 - 1, 2**20  # a step is one word of a counter


@dataclass(frozen=True)
class Settings:
    """How a model is trained: all that the weights depend on, beside the model, its data and the start.

    Attributes:
        method: "sparsedm" (straight-through mask, SR-STE decay, dense teacher), "ste" (the mask alone), "asp" (a mask
            fixed at the start), "progressive" (31:32, 15:16, 7:8, 3:4, then 2:4), "dense" (no mask).
        steps: updates of the weights.
        batch: images of an update, over all processes and accumulated parts.
        lr: of AdamW, reached after ``warmup`` steps; None for those is 2,500, and a tenth of ``steps`` at most.
        lr_decay: "constant", as SparseDM's, or "cosine" to 0.
        weight_decay, betas: AdamW's, on all parameters.
        noise_weight: of the noise in the loss.
        teacher_weight: of the dense model's prediction in the loss; None is 0.1 for "sparsedm", else 0.
        mask_decay: SR-STE's lambda; None is 2e-4 for "sparsedm", else 0.
        ema: rate of the averaged weights, which are what is used.
        clip_norm: of the gradient; 0 is without.
        precision: of the network's arithmetic: fp32, or bf16 or fp16 by autocast.
        accumulate: parts in which a process works through its share of a batch.
        seed: of order, times, noise and what is dropped.
        pattern: N:M.
        mask_layers: globs in place of the family's choice.
    """

    method: str = "sparsedm"
    steps: int = 10_000
    batch: int = 128
    lr: float = 2e-4
    warmup: int | None = None
    lr_decay: str = "constant"
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.999)
    noise_weight: float = 1.0
    teacher_weight: float | None = None
    mask_decay: float | None = None
    ema: float = 0.9999
    clip_norm: float = 0.0
    precision: str = "fp32"
    accumulate: int = 1
    seed: int = 0
    pattern: Pattern = TWO_FOUR
    mask_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        arguments.one_of("--method", self.method, METHODS)
        arguments.one_of("--precision", self.precision, PRECISIONS)
        arguments.one_of("--lr-decay", self.lr_decay, LR_DECAYS)
        whole = {"steps": (1, MOST_STEPS), "batch": (1, MOST_BATCH), "accumulate": (1, MOST_BATCH)}
        for name, (least, most) in whole.items():
            arguments.whole_number(
                f"--{name}", getattr(self, name), least, most, f"a whole number from {least} to {most}"
            )
        arguments.seed(self.seed)
        sparsedm = self.method == "sparsedm"
        defaults = {
            "warmup": min(WARMUP, self.steps // 10),
            "teacher_weight": TEACHER_WEIGHT if sparsedm else 0.0,
            "mask_decay": MASK_DECAY if sparsedm else 0.0,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        arguments.whole_number("--warmup", self.warmup, 0, MOST_STEPS)
        arguments.real_number("--lr", self.lr, above=0)
        for name in ("weight_decay", "noise_weight", "teacher_weight", "mask_decay", "clip_norm"):
            self._check_least(name)
        for name, rate in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= arguments.real_number(f"--{name}", rate) < 1:
                raise OptionError(f"--{name} {rate:g}: expected 0 or more, and less than 1")
        if self.noise_weight == 0 and self.teacher_weight == 0:
            raise OptionError("--noise-weight and --teacher-weight are both 0: nothing is learnt", "give one of them")

    def _check_least(self, name: str) -> None:
        value = arguments.real_number(f"--{name.replace('_', '-')}", getattr(self, name))
        if value < 0:
            raise OptionError(f"--{name.replace('_', '-')} {value:g}: expected 0 or more")

    @property
    def taught(self) -> bool:
        """Whether the dense model's predictions are in the loss."""
        return bool(self.teacher_weight)

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return self.method != "dense"

    def pattern_at(self, step: int) -> Pattern:
        """The N:M of a step, which counts from 0."""
        if self.method != "progressive":
            return self.pattern
        stages = (*STAGES, self.pattern)
        return stages[min(step * len(stages) // self.steps, len(stages) - 1)]

    def to_dict(self) -> dict[str, Any]:
        """As the run's folder holds it."""
        return {
            **dataclasses.asdict(self),
            "pattern": str(self.pattern),
            "betas": list(self.betas),
            "mask_layers": list(self.mask_layers),
        }

    @property
    def endless(self) -> bool:
        """Whether a step does not depend on how many there will be, so that a run may be made longer."""
        return self.method != "progressive" and self.lr_decay == "constant"


@dataclass(frozen=True)
class Reporting:
    """What a fine-tuning leaves behind on its way; the weights do not depend on it.

    Attributes:
        log_every, save_every, sample_every: steps between lines of the log, checkpoints and pictures; 0 is none, but
            for the last checkpoint.
        samples: pictures in a sample.
        keep: checkpoints.
        tensorboard: whether the log is written for TensorBoard too.
    """

    log_every: int = 50
    save_every: int = 500
    sample_every: int = 0
    samples: int = 40
    keep: int = 3
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, least in (("log_every", 1), ("save_every", 0), ("sample_every", 0), ("samples", 1), ("keep", 1)):
            arguments.whole_number(f"--{name.replace('_', '-')}", getattr(self, name), least, MOST_STEPS)


@dataclass(frozen=True)
class Start:
    """Where the weights come from.

    Attributes:
        dense: the dense checkpoint: the teacher, and what is trained where nothing else is said.
        weights: a checkpoint to start from, ``RANDOM``, or None for the dense one's.
        config: a configuration to make a network of at random, where there is no dense checkpoint.
        force: whether a "dense" checkpoint that is 2:4 already will do.
    """

    dense: Path | None = None
    weights: str | Path | None = None
    config: Path | None = None
    force: bool = False
