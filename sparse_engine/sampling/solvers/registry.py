"""The samplers by name, their defaults, and what each accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparse_engine.sampling.schedules import DiscreteBetas, FlowMatching, Schedule
from sparse_engine.sampling.solvers.ancestral import ddim, ddpm
from sparse_engine.sampling.solvers.euler import euler_ode, euler_sde
from sparse_engine.sampling.solvers.multistep import dpm_solver_pp, sde_dpm_solver_pp
from sparse_engine.sampling.solvers.singlestep import dpm_solver, dpm_solver_pp_singlestep
from sparse_engine.sampling.trajectory import Options, Trajectory


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """One sampler and its defaults.

    Attributes:
        function: (schedule, steps, options) -> Trajectory; the same signature for all.
        source: paper and equation.
        evaluations_per_step: network evaluations in a solver step of full order. ``steps`` counts
            evaluations whatever this is.
        deterministic: nothing is drawn after the start (DDIM: at its default, eta = 0).
        clips: predicts x0, so ``value_range`` can clip it.
        clips_by_default: its authors clip pixels.
        t_end: where a continuous schedule ends; a discrete one ends after its first step, 1/N. 0 is 0 on both.
        orders: orders on offer, the default first; empty where there is no choice.
        not_flow: why it is not offered in flow matching; None where it is.
    """

    name: str
    function: Callable[[Schedule, int, Options], Trajectory]
    source: str
    evaluations_per_step: int = 1
    deterministic: bool = True
    clips: bool = False
    clips_by_default: bool = False
    t_end: float = 1e-3
    spacing: str = "time-uniform"
    denoise_to_zero: bool = False
    has_eta: bool = False
    has_variance: bool = False
    orders: tuple[int, ...] = ()
    not_flow: str | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The names of ``make_trajectory``'s options that change this sampler."""
        own = {
            "eta": self.has_eta,
            "variance": self.has_variance,
            "order": bool(self.orders),
            "clip": self.clips,
        }
        return ("t_start", "t_end", "spacing", "denoise_to_zero", *(name for name, has in own.items() if has))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what a listing shows."""
        return {
            "name": self.name,
            "source": self.source,
            "evaluations_per_step": self.evaluations_per_step,
            "deterministic": self.deterministic,
            "options": list(self.options),
            "orders": list(self.orders),
            "spacing": self.spacing,
            "flow_matching": self.not_flow is None,
        }


SAMPLERS: dict[str, SamplerInfo] = {
    info.name: info
    for info in (
        SamplerInfo(
            name="ddpm",
            function=ddpm,
            source="Ho et al. 2020, arXiv:2006.11239, algorithm 2",
            deterministic=False,
            clips=True,
            clips_by_default=True,
            t_end=0.0,
            has_variance=True,
            not_flow="its chain adds noise to a variance that is preserved",
        ),
        SamplerInfo(
            name="ddim",
            function=ddim,
            source="Song et al. 2021, arXiv:2010.02502, eq. 12",
            clips=True,
            clips_by_default=True,
            t_end=0.0,
            has_eta=True,
            not_flow="without noise it is euler-ode there, and its noise is of a variance that is preserved",
        ),
        SamplerInfo(
            name="euler-sde",
            function=euler_sde,
            source="Song et al. 2021, arXiv:2011.13456, eq. 6",
            deterministic=False,
            denoise_to_zero=True,
            not_flow="the SDE's beta is infinite where sampling starts",
        ),
        SamplerInfo(
            name="euler-ode",
            function=euler_ode,
            source="Song et al. 2021, arXiv:2011.13456, eq. 13; Esser et al. 2024, arXiv:2403.03206, eq. 1",
            denoise_to_zero=True,
        ),
        SamplerInfo(
            name="dpm-solver",
            function=dpm_solver,
            source="Lu et al. 2022, arXiv:2206.00927, eq. 3.7 and algorithms 1, 2 (DPM-Solver-fast)",
            evaluations_per_step=3,
            t_end=1e-4,
            spacing="logsnr-uniform",
            orders=(3, 2, 1),
            not_flow="it divides by alpha, which is 0 where sampling starts",
        ),
        SamplerInfo(
            name="dpm-solver++",
            function=dpm_solver_pp,
            source="Lu et al. 2022, arXiv:2211.01095, algorithm 2 (2M)",
            clips=True,
            orders=(2, 1, 3),
        ),
        SamplerInfo(
            name="dpm-solver++-singlestep",
            function=dpm_solver_pp_singlestep,
            source="Lu et al. 2022, arXiv:2211.01095, algorithm 1 (2S; 3S as in its code)",
            evaluations_per_step=3,
            clips=True,
            orders=(3, 2, 1),
            not_flow="its first step's length in logsnr is infinite",
        ),
        SamplerInfo(
            name="sde-dpm-solver++",
            function=sde_dpm_solver_pp,
            source="Lu et al. 2022, arXiv:2211.01095, SDE-DPM-Solver++(2M)",
            deterministic=False,
            clips=True,
            denoise_to_zero=True,
            orders=(2, 1),
        ),
    )
}


def default_sampler(schedule: Schedule) -> str:
    """The sampler that authors evaluate a model of this schedule with: U-ViT's, and for flow matching SD3's.

    ``euler-ode`` for flow matching, ``dpm-solver`` for other continuous time (pixels, and the latents of L),
    ``dpm-solver++-singlestep`` for discrete (the latents of H, and text-to-image).
    """
    if isinstance(schedule, FlowMatching):
        return "euler-ode"
    return "dpm-solver++-singlestep" if isinstance(schedule, DiscreteBetas) else "dpm-solver"
