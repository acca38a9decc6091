"""The network that is trained, its masks, optimizer and averages: one step, and all of it in a checkpoint."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine.backends.torch.noise import draw_noise
from sparse_engine.export.model import Model
from sparse_engine.sampling.noise import SeededNoise

from .average import Average
from .data import Data
from .draws import Draws, times
from .loss import column, losses, target_of
from .masking import MaskedWeights
from .processes import Processes
from .settings import Settings

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Batch:
    """Some samples of a step.

    Attributes:
        x0: float32 [B, C, H, W].
        told: name -> [B, *shape].
        t: schedule times, float64 [B].
        noise: float32 [B, C, H, W], or what draws it on a GPU.
    """

    x0: np.ndarray
    told: dict[str, np.ndarray]
    t: np.ndarray
    noise: np.ndarray | SeededNoise


class Batches:
    """This process's parts of each step's batch; the next is made ready while one is worked on.

    Args:
        data, draws, model: what they are made of.
        settings: the batch, and in how many parts.
        processes: which parts are this one's.
    """

    def __init__(self, data: Data, draws: Draws, model: Model, settings: Settings, processes: Processes) -> None:
        self._data, self._draws, self._schedule = data, draws, model.schedule
        self._shape = model.config.data_shape
        self._on_device = processes.device.type == "cuda"
        size = settings.batch // (processes.count * settings.accumulate)
        first = processes.rank * settings.accumulate
        self._parts = [np.arange(part * size, (part + 1) * size) for part in range(first, first + settings.accumulate)]

    def make(self, step: int, part: int) -> Batch:
        """One part, a function of its number alone."""
        samples = self._parts[part]
        drawn = self._draws.of(step, samples)
        examples = self._data.examples(self._draws.rows(step, samples), drawn, self._draws, step, samples)
        noise = self._draws.noise(samples, self._shape)
        return Batch(
            examples.x0, examples.told, times(self._schedule, drawn.uniform), noise if self._on_device else noise(step)
        )

    def steps(self, first: int, end: int) -> Iterator[list[Callable[[], Batch]]]:
        """Of each step from ``first`` to ``end`` its parts, to be called in turn."""
        count = len(self._parts)
        with ThreadPoolExecutor(1) as pool:
            ready = deque([pool.submit(self.make, first, 0)] if first < end else [])

            def take(step: int, part: int) -> Batch:
                batch = ready.popleft().result()
                after = (step, part + 1) if part + 1 < count else (step + 1, 0)
                if after[0] < end:
                    ready.append(pool.submit(self.make, *after))
                return batch

            for step in range(first, end):
                yield [partial(take, step, part) for part in range(count)]


class Trainer:
    """A network under training.

    Args:
        model: what the network is.
        state: the weights to start from.
        teacher: the dense weights, None for no teacher.
        masked: names of the masked layers.
        settings: how it is trained.
        processes: with whom.
    """

    def __init__(
        self,
        model: Model,
        state: Mapping[str, np.ndarray],
        teacher: Mapping[str, np.ndarray] | None,
        masked: Sequence[str],
        settings: Settings,
        processes: Processes,
    ) -> None:
        self._model, self._settings, self._processes = model, settings, processes
        self.device = processes.device
        self.network = trainable(model, state).to(self.device)
        self._teacher = None if teacher is None else copy.deepcopy(model.network(teacher)).to(self.device)
        self.masks = self._masks(masked)
        own = {id(parameter) for parameter in (self.masks.parameters if self.masks else ())}
        self._others = {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in own and parameter.requires_grad
        }
        trained = [*([self.masks.dense] if self.masks else []), *self._others.values()]
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True
        )
        self._trained = trained
        names = {*self._others, *(f"{name}.weight" for name in masked)}
        self._kept = {name: torch.from_numpy(array) for name, array in state.items() if name not in names}
        self.average = Average(trained, settings.ema)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self._wrapped = processes.wrapped(self.network)

    def _masks(self, names: Sequence[str]) -> MaskedWeights | None:
        if not names:
            return None
        settings = self._settings
        fixed = settings.method == "asp"
        return MaskedWeights(self.network, names, settings.pattern_at(0), fixed=fixed, decay=settings.mask_decay or 0.0)

    def step(self, step: int, parts: Sequence[Callable[[], Batch]], *, count_flips: bool = False) -> dict[str, Any]:
        """One update of the weights.

        Args:
            step: its number, from 0.
            parts: of the batch.
            count_flips: whether to say how the mask has changed.

        Returns:
            "loss", "noise_loss", "teacher_loss": of this process's samples; "lr"; "grad_norm" where it is clipped;
            "flips": layer -> share of its mask that changed, where counted.
        """
        settings = self._settings
        sums = torch.zeros(3, dtype=torch.float64)
        for index, part in enumerate(parts):
            last = index + 1 == len(parts)
            with contextlib.nullcontext() if last else self._processes.partial(self._wrapped):
                sums += self._backward(part(), step, len(parts))
        told: dict[str, Any] = dict(
            zip(("loss", "noise_loss", "teacher_loss"), (sums / len(parts)).tolist(), strict=True)
        )
        if self.masks:
            self.masks.collect_gradients()
        self._scaler.unscale_(self.optimizer)
        if self.masks:
            self.masks.decay_pruned()
        if settings.clip_norm:
            told["grad_norm"] = float(nn.utils.clip_grad_norm_(self._trained, settings.clip_norm))
        told["lr"] = settings.lr * rate_at(settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = told["lr"]
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.network.zero_grad(set_to_none=True)
        self.average.update(step)
        if self.masks:
            told["flips"] = self.masks.refresh(settings.pattern_at(step + 1), count=count_flips)
        return told

    def _backward(self, batch: Batch, step: int, parts: int) -> Tensor:
        """Gradients of one part; its losses, float64 [3]."""
        settings, prediction = self._settings, self._model.recipe.prediction
        schedule, device = self._model.schedule, self.device
        x0 = torch.from_numpy(batch.x0).to(device, non_blocking=True)
        told = {name: torch.from_numpy(np.ascontiguousarray(rows)).to(device) for name, rows in batch.told.items()}
        noise = self._noise(batch, step)
        alpha, sigma = column(schedule.alpha(batch.t), device), column(schedule.sigma(batch.t), device)
        x, t = (
            alpha * x0 + sigma * noise,
            torch.from_numpy(schedule.network_time(batch.t).astype(np.float32)).to(device),
        )
        lower = AUTOCAST.get(settings.precision)
        with torch.autocast(device.type, dtype=lower, enabled=lower is not None):
            predicted = self._wrapped(x, t, **told)[:, : x.shape[1]]
            taught = None
            if self._teacher is not None:
                with torch.no_grad():
                    taught = self._teacher(x, t, **told)[:, : x.shape[1]]
        found = losses(
            predicted,
            target_of(prediction, x0, noise, alpha, sigma),
            taught,
            settings.noise_weight,
            settings.teacher_weight or 0.0,
        )
        self._scaler.scale(found.total / parts).backward()
        return torch.stack([found.total.detach(), found.noise, found.teacher]).double().cpu()

    def _noise(self, batch: Batch, step: int) -> Tensor:
        if not isinstance(batch.noise, SeededNoise):
            return torch.from_numpy(batch.noise).to(self.device)
        z = torch.empty(batch.x0.shape, device=self.device)
        origin = torch.from_numpy(batch.noise.origin).to(self.device)
        draw_noise(z, origin, torch.tensor([step], dtype=torch.uint32, device=self.device))
        return z

    def raw(self) -> dict[str, Tensor]:
        """The dense weights, under the network's own names; on the CPU."""
        return self._state(self._trained)

    def averaged(self) -> dict[str, Tensor]:
        """Their averages."""
        return self._state(self.average.tensors)

    def _state(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        state = dict(self._kept)  # as it was: a network may cut a table that it was given whole
        others = list(tensors)
        if self.masks:
            state |= self.masks.parts(others.pop(0).detach())
        state |= dict(zip(self._others, others, strict=True))
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def drawn_with(self) -> dict[str, Tensor]:
        """The averaged weights, masked: what an engine of them runs."""
        state = self.averaged()
        if self.masks:
            flat = self.average.tensors[0]
            state |= {name: part.cpu() for name, part in self.masks.parts(self.masks.masked(flat)).items()}
        return state

    def averaged_masks(self) -> dict[str, Tensor]:
        """Name of a weight -> the mask of its average, on the CPU; {} without masks."""
        if not self.masks:
            return {}
        mask = self.masks.mask_of(self.average.tensors[0])
        return {name: part.cpu().contiguous() for name, part in self.masks.parts(mask).items()}

    def rest(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    @torch.no_grad()
    def load(
        self, step: int, raw: Mapping[str, Tensor], averaged: Mapping[str, Tensor], rest: Mapping[str, Any]
    ) -> None:
        """Go on from what ``raw``, ``averaged`` and ``rest`` were after ``step`` steps."""
        for state, tensors in ((raw, self._trained), (averaged, self.average.tensors)):
            into = list(tensors)
            if self.masks:
                for name, part in self.masks.parts(into.pop(0).detach()).items():
                    part.copy_(state[name])
            for name, tensor in zip(self._others, into, strict=True):
                tensor.copy_(state[name])
        self.optimizer.load_state_dict(dict(rest["optimizer"]))
        self._scaler.load_state_dict(dict(rest["scaler"]))
        if self.masks:
            self.masks.refresh(self._settings.pattern_at(step))

    def finite(self) -> bool:
        """Whether all weights and averages are finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in (*self._trained, *self.average.tensors))


def trainable(model: Model, state: Mapping[str, np.ndarray]) -> nn.Module:
    """The network with weights of its own, in training mode; what its family keeps fixed stays so."""
    with torch.device("meta"):
        fresh = model.family.network(model.config)
    network = copy.deepcopy(model.network(state)).train()
    for (_, parameter), (_, original) in zip(network.named_parameters(), fresh.named_parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return network


def rate_at(settings: Settings, step: int) -> float:
    """The learning rate of a step over its highest: up in a line, then constant, or down as a cosine."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.lr_decay == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
