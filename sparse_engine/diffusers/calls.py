"""What a pipeline tells its network at a call: as an engine is told it, or refused with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sparse_engine.conditioning import LABELS, Condition
from sparse_engine.errors import OptionError, UnsupportedError

TIMES = ("timestep", "timesteps", "t")
# An argument of diffusers' networks -> the condition that it is.
TOLD = {
    "encoder_hidden_states": "context",
    "encoder_attention_mask": "context_mask",
    "class_labels": LABELS,
    "pooled_projections": "pooled",
    "timestep_cond": "timestep_cond",
}
ADDED = {"text_embeds": "pooled", "time_ids": "time_ids", "resolution": "resolution", "aspect_ratio": "aspect_ratio"}
FUSE = "restore(pipe), pipe.fuse_lora(), then use_engine(pipe, build=True): an engine of the fused weights"
RESTORE = "restore(pipe), and run the original network with it"
CONTROLNET = "residuals of a ControlNet"
ADAPTER = "an IP-Adapter's image"
# An argument that an engine cannot honour -> what it is.
REFUSED = {
    "down_block_additional_residuals": CONTROLNET,
    "mid_block_additional_residual": CONTROLNET,
    "block_controlnet_hidden_states": CONTROLNET,
    "down_intrablock_additional_residuals": "residuals of a T2I-Adapter",
    "skip_layers": "skip-layer guidance",
    "attention_mask": "a mask over the picture's own places",
    "image_embeds": ADAPTER,
    "ip_adapter_image_embeds": ADAPTER,
    "ip_adapter_masks": ADAPTER,
}
OPTIONS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")  # of the attention's processors


def told(arguments: Mapping[str, Any], conditions: Mapping[str, Condition], rows: int) -> dict[str, np.ndarray]:
    """The conditions that a call gives, name -> an array as ``engine.network`` takes it.

    Args:
        arguments: of the network's ``forward`` by name, but for the picture and the time.
        conditions: that the engine is told, by name.
        rows: pictures in the batch.

    Raises:
        UnsupportedError: an argument that an engine cannot honour.
        OptionError: one that does not fit the engine, or is missing.
    """
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None or name == "return_dict":
            continue
        if name in OPTIONS:
            _check_options(name, value)
        elif name == "added_cond_kwargs":
            given |= {ADDED.get(key, key): each for key, each in value.items() if each is not None}
        else:
            given[TOLD.get(name, name)] = value
    for name in given:
        if name not in conditions:
            raise _refusal(name, conditions)
    if LABELS in conditions and LABELS not in given:
        raise OptionError("class_labels are missing, and the network is told a class", "pass class_labels=")
    arrays = {name: as_array(value) for name, value in given.items()}
    for name, array in list(arrays.items()):
        mask = conditions[name].mask
        if mask in arrays:
            arrays[name], arrays[mask] = _filled(array, arrays[mask], conditions[name])
        elif conditions[name].shape and conditions[name].mask is None:
            _check_length(array, conditions[name])
    if LABELS in arrays and arrays[LABELS].size == 1:
        arrays[LABELS] = np.broadcast_to(arrays[LABELS].reshape(1), (rows,))
    return arrays


def as_array(value: Any) -> np.ndarray:
    """A tensor of any device and width as an array of the host; float64, float16 and bfloat16 become float32."""
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach()
    if value.is_floating_point():
        value = value.float()
    array: np.ndarray = value.cpu().contiguous().numpy()
    return array


def times(value: Any, rows: int) -> np.ndarray:
    """A time in any form that schedulers have, float32 [rows]: a number, a tensor [], [1] or [rows], of any type.

    Raises OptionError on anything else.
    """
    found = as_array(value) if value is not None else np.empty(0)
    if found.dtype.kind not in "iuf" or found.shape not in ((), (1,), (rows,)):
        raise OptionError(
            f"the time is {found.dtype} {list(found.shape)}; expected one number, or one for each of {rows} pictures"
        )
    return np.ascontiguousarray(np.broadcast_to(found.astype(np.float32), (rows,)))


def _check_options(name: str, value: Mapping[str, Any]) -> None:
    for option, setting in value.items():
        if option == "scale" and setting in (None, 1, 1.0):
            continue
        if option == "scale":
            raise UnsupportedError(
                f"{name}: a LoRA's scale of {setting} is given, and an engine's weights are fixed", FUSE
            )
        what = REFUSED.get(option, f"the option {option!r} of attention")
        raise UnsupportedError(f"{name}: {what} is given, which an engine does not take", RESTORE)


def _refusal(name: str, conditions: Mapping[str, Condition]) -> Exception:
    if name in REFUSED:
        return UnsupportedError(f"{name}: {REFUSED[name]} cannot be given to an engine", RESTORE)
    has = ", ".join(conditions) or "nothing"
    return OptionError(f"{name} is given, but the engine's network is told {has}", RESTORE)


def _check_length(array: np.ndarray, condition: Condition) -> None:
    """Say of a text of another length what to do; other shapes the engine itself refuses."""
    axis = array.ndim - len(condition.shape)
    if len(condition.shape) != 2 or axis < 0 or array.shape[axis + 1 :] != condition.shape[1:]:
        return
    found, length = array.shape[axis], condition.shape[0]
    if found != length:
        raise OptionError(
            f"the text has {found} vectors, and the engine's {condition.name} is {length} long",
            f"use_engine(pipe, build=True, context_length={found}), or `sparse-engine build --context-length {found}`",
        )


def _filled(context: np.ndarray, mask: np.ndarray, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
    """A text and its mask, filled up to the engine's length with places that do not count."""
    if mask.ndim != 2:
        raise OptionError(f"encoder_attention_mask has shape {list(mask.shape)}; expected [B, L], 1 where it counts")
    missing = condition.shape[0] - mask.shape[1]
    if missing < 0 or context.ndim != 3 or context.shape[1] != mask.shape[1]:
        _check_length(context, condition)
    if missing <= 0:
        return context, mask
    return np.pad(context, ((0, 0), (0, missing), (0, 0))), np.pad(mask, ((0, 0), (0, missing)))
