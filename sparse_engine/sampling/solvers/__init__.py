"""The samplers: functions from a schedule to a trajectory's table of coefficients."""

from sparse_engine.sampling.solvers.make import make_trajectory
from sparse_engine.sampling.solvers.registry import SAMPLERS, SamplerInfo, default_sampler
from sparse_engine.sampling.trajectory import Trajectory

__all__ = ["SAMPLERS", "SamplerInfo", "Trajectory", "default_sampler", "make_trajectory"]
