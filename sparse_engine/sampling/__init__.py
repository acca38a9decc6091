"""Samplers as tables of coefficients, noise schedules, counter-based noise, and the loop that walks them."""

from sparse_engine.sampling.loop import StepFunction, walk
from sparse_engine.sampling.noise import labels, normal, philox4x32
from sparse_engine.sampling.schedules import (
    DiscreteBetas,
    FlowMatching,
    Schedule,
    StableDiffusion,
    VPCosine,
    VPLinear,
    schedule_from_dict,
)
from sparse_engine.sampling.solvers import SAMPLERS, SamplerInfo, Trajectory, default_sampler, make_trajectory

__all__ = [
    "SAMPLERS",
    "DiscreteBetas",
    "FlowMatching",
    "SamplerInfo",
    "Schedule",
    "StableDiffusion",
    "StepFunction",
    "Trajectory",
    "VPCosine",
    "VPLinear",
    "default_sampler",
    "labels",
    "make_trajectory",
    "normal",
    "philox4x32",
    "schedule_from_dict",
    "walk",
]
