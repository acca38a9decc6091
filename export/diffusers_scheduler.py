"""What the scheduler that diffusers saves with a network says of its training.

Its betas count steps from 0, ours from 1: the network's time is n - 1. (huggingface/diffusers,
``src/diffusers/schedulers`` and ``SchedulerMixin.save_pretrained``.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_engine.errors import CheckpointError
from sparse_engine.sampling import SAMPLERS as OUR_SAMPLERS

from .weight_files import read_json

SCHEDULER = "scheduler_config.json"
CLASS = "_class_name"
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
SAMPLERS = {
    ("DDPMScheduler", None): "ddpm",
    ("DDIMScheduler", None): "ddim",
    ("DPMSolverMultistepScheduler", "dpmsolver++"): "dpm-solver++",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++"): "sde-dpm-solver++",
    ("DPMSolverSinglestepScheduler", "dpmsolver++"): "dpm-solver++-singlestep",
    ("DPMSolverSinglestepScheduler", "dpmsolver"): "dpm-solver",
    ("FlowMatchEulerDiscreteScheduler", None): "euler-ode",
}
# Schedulers that are not offered -> the sampler of ours that does most nearly the same. Euler's steps in sigma / alpha
# are DDIM's, its ancestral ones DDPM's.
NEAREST = {
    "PNDMScheduler": "dpm-solver++",
    "LMSDiscreteScheduler": "dpm-solver++",
    "UniPCMultistepScheduler": "dpm-solver++",
    "DEISMultistepScheduler": "dpm-solver++",
    "DPMSolverMultistepScheduler": "dpm-solver++",
    "DPMSolverSinglestepScheduler": "dpm-solver++-singlestep",
    "HeunDiscreteScheduler": "dpm-solver++-singlestep",
    "KDPM2DiscreteScheduler": "dpm-solver++-singlestep",
    "EulerDiscreteScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddpm",
    "KDPM2AncestralDiscreteScheduler": "sde-dpm-solver++",
    "DPMSolverSDEScheduler": "sde-dpm-solver++",
}
CHAINS = ("ddpm", "ddim")  # that clip what they draw
ENDS = {"beta_start": 1e-4, "beta_end": 0.02}  # where a configuration is silent
FLOW = "FlowMatchEulerDiscreteScheduler"
# What changes the schedule into one that is not offered.
REFUSED = ("trained_betas", "rescale_betas_zero_snr", "invert_sigmas", "shift_terminal")
# What changes only the times that diffusers visits.
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
SAY_SCHEDULE = "say the schedule yourself (--schedule), if the network's training is known to you"


def scheduler_settings(weights: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What the scheduler beside a network says: ``schedule``, ``prediction`` and, where it has ours, ``sampler``.

    Args:
        weights: the network's file.
        given: what the user says; a schedule or prediction there is not read, so it may be one that is not offered.

    Returns:
        (settings, notes); empty where there is no scheduler.

    Raises:
        CheckpointError: it cannot be read, or the network was trained on something that is not offered.
    """
    folder = weights.parent
    places = (folder.parent / "scheduler" / SCHEDULER, folder / "scheduler" / SCHEDULER, folder / SCHEDULER)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return {}, []
    config = read_json(file)
    name = str(config.get(CLASS))
    _check_offered(file, config, "schedule" in given)
    settings: dict[str, Any] = {}
    if "schedule" not in given:
        settings["schedule"] = _schedule(file, config)
    if "prediction" not in given:
        settings["prediction"] = _prediction(file, config)
    sampler = SAMPLERS.get((name, config.get("algorithm_type", "dpmsolver++") if "DPMSolver" in name else None))
    if sampler is not None:
        settings["sampler"] = sampler
    nearest = None if sampler is not None else NEAREST.get(name)
    if nearest is not None and not (_is_flow(config) and OUR_SAMPLERS[nearest].not_flow):
        settings["sampler"] = nearest
    said = ", ".join(f"{setting} = {value}" for setting, value in settings.items())
    notes = [f"{said}: from {name} in {file}"] if said else []
    if sampler is None:
        taken = f"{nearest} is the nearest" if settings.get("sampler") else "no sampler here is near it"
        notes.append(f"{name} is not offered: {taken}; say another with --sampler")
    if sampler in CHAINS:
        notes += _of_chain(config, sampler)
    spaced = [option for option in SPACINGS if config.get(option)]
    if spaced:
        notes.append(f"{spaced[0]} of {file.name} is not offered: a sampler's times are its own, see --spacing")
    return settings, notes


def _of_chain(config: Mapping[str, Any], sampler: str) -> list[str]:
    """What a scheduler of DDPM or DDIM is told that an engine has to be told at each call."""
    notes = []
    if sampler == "ddpm" and config.get("variance_type") == "fixed_large":
        notes.append("variance_type is fixed_large: sample with --variance large")
    if config.get("clip_sample") is False:
        notes.append("clip_sample is false: of pixels, sample with --no-clip")
    return notes


def _check_offered(file: Path, config: Mapping[str, Any], schedule_given: bool) -> None:
    if config.get("thresholding"):
        raise CheckpointError(
            f"{file}: thresholding is set, which is not offered: it clips by quantiles of each image",
            "set it to false there, and sample without it",
        )
    refused = [name for name in REFUSED if config.get(name) not in (None, False)]
    if refused and not schedule_given:
        raise CheckpointError(f"{file}: {refused[0]} is {config[refused[0]]!r}, which is not offered", SAY_SCHEDULE)


def _is_flow(config: Mapping[str, Any]) -> bool:
    return config.get(CLASS) == FLOW or bool(config.get("use_flow_sigmas"))


def _prediction(file: Path, config: Mapping[str, Any]) -> str:
    if config.get(CLASS) == FLOW:
        return "flow"
    default = "flow_prediction" if _is_flow(config) else "epsilon"
    return _one_of(PREDICTIONS, file, "prediction_type", config.get("prediction_type", default))


def _schedule(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``sampling.schedule_from_dict`` takes it."""
    steps = _number(file, config, "num_train_timesteps", 1000, int)
    if _is_flow(config):
        if config.get("use_dynamic_shifting"):
            raise CheckpointError(
                f"{file}: use_dynamic_shifting is set, which is not offered: the shift depends on the image's size",
                'say that of yours in config.json: "schedule": {"name": "flow", "shift": 3.0}',
            )
        shift = _number(file, config, "shift" if config.get(CLASS) == FLOW else "flow_shift", 1.0, float)
        return {"name": "flow", "time_scale": float(steps), "shift": shift}
    if "beta_schedule" not in config and "beta_start" not in config:
        raise CheckpointError(f"{file}: {config.get(CLASS)} has no betas, which is not offered", SAY_SCHEDULE)
    betas = _one_of(BETAS, file, "beta_schedule", config.get("beta_schedule", "linear"))
    ends = {}
    if betas != "cosine":
        ends = {name: _number(file, config, name, default, float) for name, default in ENDS.items()}
    return {"name": "discrete", "betas": betas, **ends, "steps": steps, "time_scale": float(steps), "time_shift": -1.0}


def _one_of(known: Mapping[str, str], file: Path, name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(
            f"{file}: {name} is {value!r}, which is not offered; expected one of {', '.join(known)}",
            "say it yourself (--schedule, --prediction), if the network's training is known to you",
        )
    return known[value]


def _number(file: Path, config: Mapping[str, Any], name: str, default: Any, kind: Callable[[Any], Any]) -> Any:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        raise CheckpointError(f"{file}: {name} is {value!r}; expected a number")
    return kind(value)
