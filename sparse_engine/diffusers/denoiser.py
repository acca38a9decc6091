"""A network of diffusers' whose work an engine does: what a pipeline holds in place of its own."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError, UnsupportedError

from . import calls
from .original import Original

# What pipelines and users do to a network beside calling it, and an engine cannot follow -> (what it is, what to do).
LORA = ("a LoRA", calls.FUSE)
PROCESSOR = ("an attention processor", calls.RESTORE)
IMAGE = (calls.ADAPTER, calls.RESTORE)
FREEU = ("FreeU", calls.RESTORE)
NOT_HELD = {
    **dict.fromkeys(("load_lora_adapter", "load_attn_procs", "add_adapter", "set_adapters", "delete_adapters"), LORA),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "enable_lora", "disable_lora", "unload_lora"), LORA),
    **dict.fromkeys(("attn_processors", "set_attn_processor", "set_default_attn_processor"), PROCESSOR),
    **dict.fromkeys(("encoder_hid_proj", "_load_ip_adapter_weights"), IMAGE),
    **dict.fromkeys(("enable_freeu", "disable_freeu"), FREEU),
    "enable_forward_chunking": ("chunks of the MLP", "leave it out"),
    "fuse_qkv_projections": ("joined projections", "leave it out: an engine joins what is worth it"),
}
LEARNED = ("learned", "learned_range")


class _NotHeldError(UnsupportedError, AttributeError):
    """So that ``hasattr`` says no, and whoever goes on reads why."""


@dataclass
class DenoiserOutput(BaseOutput):
    """What a network returns where it is not asked for a tuple.

    Attributes:
        sample: [B, C, H, W].
    """

    sample: Tensor


class EngineDenoiser(ModelMixin, ConfigMixin):
    """A pipeline's network, evaluated by an engine.

    It has the original's configuration, device and type, takes what the original's ``forward`` takes, and saves the
    original. It holds no weights: it moves between devices and types at no cost, its engine stays where it is.

    Args:
        engine: that was built of this network.
        original: the network that it stands for.
        pipe: that it is put into; its scheduler is looked at where the network predicts a variance.

    Raises:
        OptionError: the engine is of another network.
    """

    _supports_gradient_checkpointing = False

    engine: SparseEngine
    original: Original

    def __new__(cls, engine: SparseEngine, original: Original, pipe: Any = None) -> EngineDenoiser:
        """An instance of a class that has the original's name and signature: pipelines save and show these."""
        return super().__new__(_named_as(cls, original.kind))

    def __init__(self, engine: SparseEngine, original: Original, pipe: Any = None) -> None:
        super().__init__()
        self.register_to_config(**original.config)
        plain = self.__dict__  # nothing of the original is a part of this module
        plain.update(engine=engine, original=original, _pipe=_reference(pipe))
        plain.update(_device=original.device, _dtype=original.dtype)
        manifest = engine.manifest
        plain["_conditions"] = {each.name: each for each in manifest.conditions}
        plain["_more"] = _channels_beyond(original.config, manifest.data_shape[0])
        if original.added_features is not None:  # which SDXL's pipelines read
            plain["add_embedding"] = SimpleNamespace(linear_1=SimpleNamespace(in_features=original.added_features))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a network that an engine evaluates cannot be copied or sent to another process",
            "use_engine(other, pipe.unet.engine) shares the engine; in another process name its file",
        )

    @property
    def device(self) -> torch.device:
        """Where the pipeline's other parts are, as far as it was told."""
        return self.__dict__["_device"]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pipeline's tensors; what the engine computes in is ``engine.manifest.precision``."""
        return self.__dict__["_dtype"]

    @property
    def predicts_variance(self) -> bool:
        """Whether the network has channels beyond the picture's, which an engine leaves at zero."""
        return bool(self._more)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EngineDenoiser:
        """What ``.to``, ``.cuda``, ``.half`` and their like do to tensors."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.is_meta:
            raise UnsupportedError("an engine cannot go to the meta device", "restore(pipe) first")
        self.__dict__.update(_device=probe.device, _dtype=probe.dtype)
        return self

    def __getattr__(self, name: str) -> Any:
        if name in NOT_HELD:
            what, fix = NOT_HELD[name]
            raise _NotHeldError(f"{name}: an engine's network is fixed, and does not take {what}", fix)
        return super().__getattr__(name)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: Any = None,
        **options: Any,
    ) -> None:
        """Save the original network; arguments as ``ModelMixin.save_pretrained``."""
        if max_shard_size is not None:
            options["max_shard_size"] = max_shard_size
        options |= {"is_main_process": is_main_process, "safe_serialization": safe_serialization, "variant": variant}
        self.original.network().save_pretrained(save_directory, **options)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the network: arguments and result as those of the original's ``forward``.

        Raises:
            UnsupportedError: an argument that an engine cannot honour, with what to do instead.
            OptionError: one that does not fit the engine, such as pictures of another size.
            EngineClosedError: the engine was closed, or this is a fork of the process that loaded it.
        """
        arguments = _bound(self.original.signature, args, kwargs)
        sample = arguments.pop(next(iter(arguments)))
        time = next((arguments.pop(name) for name in calls.TIMES if name in arguments), None)
        self._check(sample)
        rows = len(sample)
        told = calls.told(arguments, self._conditions, rows)
        predicted = self.engine.network(_given(sample), calls.times(time, rows), conditioning=told)
        out = _returned(predicted, self._more, sample)
        return DenoiserOutput(sample=out) if arguments.get("return_dict", True) else (out,)

    def _check(self, sample: Any) -> None:
        """Say what an engine cannot do with a picture, or for a scheduler."""
        if not isinstance(sample, Tensor):
            raise OptionError(f"the picture is {type(sample).__name__}; expected a tensor")
        shape, (channels, height, width) = tuple(sample.shape), self.engine.manifest.data_shape
        if shape[1:] != (channels, height, width):
            raise OptionError(
                f"the picture has shape {list(shape)}; the engine's is [B, {channels}, {height}, {width}]",
                f"ask the pipeline for {height} x {width} latents, or use_engine(pipe, build=True, image_size=...): an "
                "engine is built for one size",
            )
        if sample.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("a gradient of the picture is asked for, which an engine has none of", calls.RESTORE)
        if self._more:
            check_scheduler(getattr(self._pipe(), "scheduler", None))


def _reference(pipe: Any) -> Callable[[], Any]:
    """What gives a pipeline that is still there; of an object that takes no weak reference, always."""
    try:
        return weakref.ref(pipe)
    except TypeError:
        return lambda: pipe


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that reads a variance out of the network's second half. Raises UnsupportedError."""
    variance = getattr(getattr(scheduler, "config", None), "variance_type", None)
    if variance in LEARNED:
        raise UnsupportedError(
            f"{type(scheduler).__name__} has variance_type {variance!r}, and an engine gives no variance",
            "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, variance_type='fixed_small')",
        )


def _named_as(base: type[EngineDenoiser], kind: Any) -> type:
    """A subclass by the name, module and signature of a network's class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    return type(kind.__name__, (base,), {"__module__": kind.__module__, "forward": forward, "__doc__": base.__doc__})


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the original's ``forward``. Raises OptionError."""
    try:
        found = signature.bind(None, *args, **kwargs).arguments
    except TypeError as error:
        raise OptionError(f"the network does not take this call: {error}") from error
    return dict(list(found.items())[1:])


def _channels_beyond(config: Mapping[str, Any], channels: int) -> int:
    """How many channels the network predicts beyond the picture's: those of a learned variance."""
    out = config.get("out_channels")
    return channels if out == 2 * channels else 0


def _given(sample: Tensor) -> Any:
    """As an engine takes it: the host's memory as it lies there, a GPU's by way of DLPack."""
    sample = sample.detach()
    if sample.dtype != torch.float32:
        sample = sample.float()
    return sample.contiguous().numpy() if sample.device.type == "cpu" else sample.contiguous()


def _returned(predicted: np.ndarray, more: int, like: Tensor) -> Tensor:
    out = torch.from_numpy(np.ascontiguousarray(predicted))
    if more:
        out = torch.cat([out, out.new_zeros(len(out), more, *out.shape[2:])], dim=1)
    return out if out.device == like.device and out.dtype == like.dtype else out.to(like.device, like.dtype)
