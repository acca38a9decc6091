"""Noise schedules: how much signal and noise a diffusion holds at each time.

At schedule time t a training image x0 has become ``alpha(t) * x0 + sigma(t) * noise``. alpha² + sigma² is 1 (the
variance is preserved) on all schedules but that of flow matching, where alpha + sigma is. Time runs from 0 (the image)
to ``t_max`` (noise). Everything is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sparse_engine import arguments
from sparse_engine.errors import OptionError

Float64 = npt.NDArray[np.float64]
LARGEST_SHIFT = 1e3  # of flow matching; published ones are 1 to 17


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A noise schedule; variance-preserving where a class does not say otherwise.

    Every method takes a time, or an array of times, in [0, t_max] and returns float64 of the same shape.

    Attributes:
        time_scale, time_shift: the network is given ``time_scale * t + time_shift``.
        t_min: the smallest time the network was trained at; 0 where training draws t from (0, t_max].
        t_max: the time sampling starts from.
        predictions: what a network that was trained on it may predict; see ``trajectory.model_form``.
    """

    name: ClassVar[str]
    predictions: ClassVar[tuple[str, ...]] = ("eps", "x0", "v")
    time_scale: float = 999.0
    time_shift: float = 0.0

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value = f"schedule {self.name}: {option.name}", getattr(self, option.name)
            if isinstance(option.default, float):  # plain Python numbers: a manifest can hold them
                object.__setattr__(self, option.name, arguments.real_number(name, value))
            elif isinstance(option.default, int):
                object.__setattr__(self, option.name, arguments.whole_number(name, value))
        if self.time_scale <= 0:
            raise OptionError(f"schedule {self.name}: time_scale is {self.time_scale}, expected more than 0")

    @property
    def t_min(self) -> float:  # noqa: D102  (described with the class)
        return 0.0

    @property
    def t_max(self) -> float:  # noqa: D102
        return 1.0

    @abstractmethod
    def log_alpha(self, t: npt.ArrayLike) -> Float64:
        """log alpha(t), the logarithm of the signal's scale."""

    @abstractmethod
    def inverse_log_alpha(self, log_alpha: npt.ArrayLike) -> Float64:
        """The time at which ``log_alpha(t)`` has the given value."""

    @abstractmethod
    def beta(self, t: npt.ArrayLike) -> Float64:
        """beta(t) = -2 d log_alpha / dt: the SDE is dx = -beta/2 x dt + sqrt(beta) dw."""

    def alpha(self, t: npt.ArrayLike) -> Float64:
        """The signal's scale."""
        return np.exp(self.log_alpha(t))

    def sigma(self, t: npt.ArrayLike) -> Float64:
        """The noise's standard deviation."""
        return np.sqrt(-np.expm1(2.0 * self.log_alpha(t)))

    def lambda_(self, t: npt.ArrayLike) -> Float64:
        """Half the log signal-to-noise ratio, log(alpha / sigma); infinite where either is 0."""
        with np.errstate(divide="ignore"):
            return self.log_alpha(t) - np.log(self.sigma(t))

    def inverse_lambda(self, l: npt.ArrayLike) -> Float64:  # noqa: E741  (lambda, in the papers)
        """The time at which ``lambda_(t)`` has the given value."""
        return self.inverse_log_alpha(-0.5 * np.logaddexp(0.0, -2.0 * np.asarray(l, np.float64)))

    def network_time(self, t: npt.ArrayLike) -> Float64:
        """The time as the network takes it."""
        return self.time_scale * np.asarray(t, np.float64) + self.time_shift

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the manifest; ``schedule_from_dict`` reads it back."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class VPLinear(Schedule):
    """The VP-SDE with linear beta(t) on [0, 1] (Song et al. 2021, arXiv:2011.13456, eq. 32-33).

    U-ViT and SparseDM train their pixel models, and the latent L, on it with beta 0.1..20 and give the network 999 t.
    """

    name: ClassVar[str] = "vp-linear"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min < self.beta_max:
            raise OptionError(
                f"schedule vp-linear: beta_min {self.beta_min} and beta_max {self.beta_max}, "
                "expected 0 < beta_min < beta_max"
            )

    def log_alpha(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        t = np.asarray(t, np.float64)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def inverse_log_alpha(self, log_alpha: npt.ArrayLike) -> Float64:  # noqa: D102
        slope = self.beta_max - self.beta_min
        c = -4.0 * slope * np.asarray(log_alpha, np.float64)
        # The quadratic formula in the form that does not cancel for small t.
        return c / (np.sqrt(self.beta_min**2 + c) + self.beta_min) / slope

    def beta(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        return self.beta_min + np.asarray(t, np.float64) * (self.beta_max - self.beta_min)


@dataclass(frozen=True, kw_only=True)
class VPCosine(Schedule):
    """The cosine schedule in continuous time (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).

    alpha(1) is 0, so sampling starts from T = 0.9946, as DPM-Solver's does (arXiv:2206.00927).
    """

    name: ClassVar[str] = "vp-cosine"
    offset: float = 0.008
    t_final: float = 0.9946

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t_final < 1:
            raise OptionError(
                f"schedule vp-cosine: t_final is {self.t_final}, expected a time in (0, 1); alpha is 0 at 1"
            )
        if not 0 < self.offset < 1:
            raise OptionError(f"schedule vp-cosine: offset is {self.offset}, expected a number in (0, 1)")

    @property
    def t_max(self) -> float:  # noqa: D102
        return self.t_final

    def _angle(self, t: npt.ArrayLike) -> Float64:
        return (np.asarray(t, np.float64) + self.offset) / (1.0 + self.offset) * (math.pi / 2)

    def log_alpha(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        # At t = 0 rounding may leave a positive 1e-17, of which sigma would be a NaN.
        return np.minimum(np.log(np.cos(self._angle(t)) / np.cos(self._angle(0.0))), 0.0)

    def inverse_log_alpha(self, log_alpha: npt.ArrayLike) -> Float64:  # noqa: D102
        cosine = np.exp(np.asarray(log_alpha, np.float64)) * np.cos(self._angle(0.0))
        return np.arccos(cosine) * (2 / math.pi) * (1.0 + self.offset) - self.offset

    def beta(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        return np.tan(self._angle(t)) * math.pi / (1.0 + self.offset)


def _linear_betas(start: float, end: float, steps: int) -> Float64:
    return np.linspace(start, end, steps)


def _scaled_linear_betas(start: float, end: float, steps: int) -> Float64:
    return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2


def _cosine_betas(start: float, end: float, steps: int) -> Float64:
    angle = (np.arange(steps + 1) / steps + 0.008) / 1.008 * (math.pi / 2)
    alpha_bar = np.cos(angle) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


_BETAS: dict[str, Callable[[float, float, int], Float64]] = {
    "linear": _linear_betas,
    "scaled-linear": _scaled_linear_betas,
    "cosine": _cosine_betas,
}


@dataclass(frozen=True, kw_only=True)
class DiscreteBetas(Schedule):
    """A Markov chain of N noising steps, made continuous by interpolating log alpha between them.

    After n of the N steps t = n / N (Lu et al. 2022, arXiv:2206.00927, section 3.4, with the knot t = 0,
    alpha = 1 in front). ``betas`` is ``linear`` (Ho et al. 2020, arXiv:2006.11239), ``scaled-linear``
    (Rombach et al. 2022, arXiv:2112.10752) or ``cosine`` (Nichol and Dhariwal 2021, arXiv:2102.09672, which
    has no beta_start and beta_end).

    The network is given n by default, as U-ViT's latent H is; models trained on 0..N-1, as
    diffusers' are, have ``time_shift=-1``.
    """

    name: ClassVar[str] = "discrete"
    time_scale: float = 1000.0
    betas: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.one_of(f"schedule {self.name}: betas", self.betas, tuple(_BETAS))
        arguments.whole_number(f"schedule {self.name}: steps", self.steps, 2)
        if not 0 < self.beta_start < self.beta_end < 1:
            raise OptionError(
                f"schedule {self.name}: beta_start {self.beta_start} and beta_end {self.beta_end}, "
                "expected 0 < beta_start < beta_end < 1"
            )

    @property
    def t_min(self) -> float:  # noqa: D102
        return 1.0 / self.steps

    @cached_property
    def _knots(self) -> tuple[Float64, Float64]:
        """Times and log alpha after 0..N steps, each [N + 1]."""
        betas = _BETAS[self.betas](self.beta_start, self.beta_end, self.steps)
        log_alpha = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-betas))])
        return np.arange(self.steps + 1) / self.steps, log_alpha

    def log_alpha(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        times, log_alpha = self._knots
        return np.asarray(np.interp(np.asarray(t, np.float64), times, log_alpha))

    def inverse_log_alpha(self, log_alpha: npt.ArrayLike) -> Float64:  # noqa: D102
        times, knots = self._knots
        return np.asarray(np.interp(-np.asarray(log_alpha, np.float64), -knots, times))

    def beta(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        _, log_alpha = self._knots
        # The interval that ends at t: the noising step that led there. The margin forgives n / N its rounding.
        step = np.ceil(np.asarray(t, np.float64) * self.steps - 1e-9).astype(int)
        return (-2.0 * self.steps * np.diff(log_alpha))[np.clip(step, 1, self.steps) - 1]


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(DiscreteBetas):
    """Stable Diffusion's schedule: 1000 scaled-linear betas, 0.00085..0.012 (arXiv:2112.10752).

    U-ViT's latent H and text-to-image models use it with n = 1..1000 as the network's time; the original
    networks, and diffusers', count 0..999: ``time_shift=-1``.
    """

    name: ClassVar[str] = "stable-diffusion"
    betas: str = "scaled-linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Schedule):
    """The straight path of rectified flow, x = (1 - s) x0 + s noise (Liu et al. 2022, arXiv:2209.03003).

    A schedule time t is that before the shift: s = shift t / (1 + (shift - 1) t) (Esser et al. 2024,
    arXiv:2403.03206, eq. 23), which spends more of the steps in the noise. The network is given 1000 s. At t = 1
    nothing of the image is left and alpha is 0: only samplers that do not divide by it are offered.

    ``t_min`` is the s of the first of 1000 training steps, as a time before the shift, which so is shifted twice: where
    the authors' own sampler (and diffusers') visits its last time before 0.
    """

    name: ClassVar[str] = "flow"
    predictions: ClassVar[tuple[str, ...]] = ("flow", "x0")
    time_scale: float = 1000.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shift <= LARGEST_SHIFT:
            raise OptionError(f"schedule flow: shift is {self.shift}, expected a number in (0, {LARGEST_SHIFT:g}]")

    @property
    def t_min(self) -> float:  # noqa: D102
        return float(self.sigma(1e-3))

    def sigma(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        t = np.asarray(t, np.float64)
        return np.asarray(self.shift * t / (1.0 + (self.shift - 1.0) * t))

    def alpha(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        t = np.asarray(t, np.float64)
        return np.asarray((1.0 - t) / (1.0 + (self.shift - 1.0) * t))  # 1 - sigma without its cancellation

    def log_alpha(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t))

    def inverse_log_alpha(self, log_alpha: npt.ArrayLike) -> Float64:  # noqa: D102
        return self._before_shift(-np.expm1(np.asarray(log_alpha, np.float64)))

    def beta(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        t = np.asarray(t, np.float64)
        with np.errstate(divide="ignore"):
            return 2.0 * self.shift / ((1.0 + (self.shift - 1.0) * t) * (1.0 - t))

    def inverse_lambda(self, l: npt.ArrayLike) -> Float64:  # noqa: D102, E741
        return self._before_shift(np.exp(-np.logaddexp(0.0, np.asarray(l, np.float64))))

    def network_time(self, t: npt.ArrayLike) -> Float64:  # noqa: D102
        return self.time_scale * self.sigma(t) + self.time_shift

    def _before_shift(self, s: Float64) -> Float64:
        return s / (self.shift - (self.shift - 1.0) * s)


_SCHEDULES: dict[str, type[Schedule]] = {
    cls.name: cls for cls in (VPLinear, VPCosine, DiscreteBetas, StableDiffusion, FlowMatching)
}


def schedule_from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that ``Schedule.to_dict`` described.

    Raises:
        OptionError: unknown name or key, a value of the wrong type, or a value out of range.
    """
    name = data.get("name") if isinstance(data, Mapping) else None
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise OptionError(f"schedule: found {data!r}, expected a mapping whose name is one of {', '.join(_SCHEDULES)}")
    cls = _SCHEDULES[name]
    values = {key: value for key, value in data.items() if key != "name"}
    types = {field.name: type(field.default) for field in fields(cls)}
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise OptionError(f"schedule {cls.name}: unknown key {unknown[0]!r}, expected some of {', '.join(types)}")
    for key, value in values.items():
        values[key] = _typed(f"schedule {cls.name}: {key}", value, types[key])
    return cls(**values)


def _typed(what: str, value: object, expected: type) -> object:
    # JSON writes 20.0 as 20 in some languages, and Python counts True as an int.
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not expected:
        raise OptionError(f"{what} is {value!r}, expected a value of type {expected.__name__}")
    return value
