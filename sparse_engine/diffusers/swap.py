"""``use_engine`` and ``restore``: one line in, one line out."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

from sparse_engine import arguments
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import OptionError

from .denoiser import EngineDenoiser, check_scheduler
from .original import Original

COMPONENTS = ("unet", "transformer")  # what pipelines call their network

# The engines that were loaded here, each closed with the last network that it stands for.
_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[SparseEngine, weakref.WeakSet[EngineDenoiser]] = weakref.WeakKeyDictionary()


def use_engine(
    pipe: Any,
    engine: str | Path | SparseEngine | None = None,
    *,
    build: bool = False,
    component: str | None = None,
    keep_original: bool = True,
    threads: int | None = None,
    device: str | None = None,
    autotune: bool = True,
    **options: Any,
) -> Any:
    """Have an engine evaluate a pipeline's network. The pipeline samples, with any scheduler, as before.

    Args:
        pipe: a pipeline of diffusers, or any object that calls its attribute ``unet`` or ``transformer``.
        engine: an engine file that was built of this network, or a loaded engine, such as ``other.unet.engine``.
        build: build it, once: the file is kept in ``cache`` by the weights and what was asked for.
        component: the attribute that holds the network, where it is neither ``unet`` nor ``transformer``.
        keep_original: keep the network in memory for ``restore``. False frees it, where it was loaded from a folder
            that still holds the same weights: ``restore`` and ``save_pretrained`` load it again.
        threads, device, autotune: as ``SparseEngine.load`` takes them.
        **options: of the build, the fields of ``building.BuildRequest``: ``precision``, ``sparse``, ``backend``,
            ``batch``, ``mask``, ``mask_layers``, ``pattern``, ``calib``, ``max_quality_loss``, ``image_size``,
            ``context_length``, ``cache``.

    Returns:
        The pipeline.

    Raises:
        OptionError: nothing or too much is given, or the engine is of another network.
        UnsupportedError: the scheduler needs what an engine does not give, or the weights are not in memory.
        InputError, BackendError: as ``SparseEngine.load`` and ``sparse-engine build``.
    """
    build, keep_original = arguments.truth("build", build), arguments.truth("keep_original", keep_original)
    name = _component(pipe, component)
    held = getattr(pipe, name)
    original = held.original if isinstance(held, EngineDenoiser) else Original(held)
    _check_asked(engine, build, options)
    if build:
        from .building import built_engine, request_of

        engine = built_engine(original, pipe, request_of(options))
    loaded, ours = _loaded(engine, threads, device, autotune)
    try:
        denoiser = _denoiser(loaded, original, pipe)
        if not keep_original:
            original.let_go()
    except BaseException:
        if ours:
            loaded.close()
        raise
    with _lock:
        if ours or loaded in _users:
            _users.setdefault(loaded, weakref.WeakSet()).add(denoiser)
    setattr(pipe, name, denoiser)
    if isinstance(held, EngineDenoiser):
        _let_go(held)
    return pipe


def restore(pipe: Any) -> Any:
    """Put a pipeline's own network back, untouched, and close the engine, where no other pipeline uses it.

    The network has the weights and the type that it had; it goes to the device where the pipeline is by now.

    Returns:
        The pipeline.

    Raises:
        OptionError: none of its parts is an engine's.
        CheckpointError: the network was let go, and its folder holds other weights by now.
    """
    parts = {**vars(pipe), **getattr(pipe, "_modules", {})}  # of a pipeline that is a module itself, too
    found = {name: part for name, part in parts.items() if isinstance(part, EngineDenoiser)}
    if not found:
        raise OptionError("the pipeline uses no engine: there is nothing to restore", "use_engine(pipe, ...) first")
    for name, denoiser in found.items():
        module = denoiser.original.module()
        if denoiser.device != denoiser.original.device:
            module.to(denoiser.device)
        setattr(pipe, name, module)
        _let_go(denoiser)
    return pipe


def _check_asked(engine: Any, build: bool, options: dict[str, Any]) -> None:
    """Raise OptionError where both or neither of an engine and a build is given, or options without a build."""
    if (engine is None) is not build:
        raise OptionError(
            "engine= and build=True are given" if build else "neither engine= nor build=True is given",
            "name an engine file, or have one built",
        )
    if options and not build:
        raise OptionError(
            f"{', '.join(options)}: of a build, and build is not asked for", "leave it out, or build=True"
        )


def _component(pipe: Any, component: str | None) -> str:
    """The attribute that holds the network. Raises OptionError."""
    names = COMPONENTS if component is None else (component,)
    found = [name for name in names if getattr(pipe, name, None) is not None]
    if len(found) == 1 and callable(getattr(pipe, found[0])):
        return found[0]
    raise OptionError(
        f"{type(pipe).__name__} has {' and '.join(found) or 'neither ' + ' nor '.join(names)}; expected one network",
        "say which attribute it is: component='...'",
    )


def _loaded(engine: Any, threads: int | None, device: str | None, autotune: bool) -> tuple[SparseEngine, bool]:
    """(the engine, whether it was loaded here)."""
    if not isinstance(engine, SparseEngine):
        path = arguments.path("engine", engine)
        return SparseEngine.load(path, threads=threads, device=device, autotune=autotune), True
    if threads is not None or device is not None:
        raise OptionError("threads or device is given with an engine that is loaded", "say it to SparseEngine.load")
    return engine, False


def _denoiser(engine: SparseEngine, original: Original, pipe: Any) -> EngineDenoiser:
    if original.kept:
        from .fit import check_fit

        check_fit(engine, original.network(), original.config)
    denoiser = EngineDenoiser(engine, original, pipe)
    if denoiser.predicts_variance:
        check_scheduler(getattr(pipe, "scheduler", None))
    return denoiser


def _let_go(denoiser: EngineDenoiser) -> None:
    """Close an engine that was loaded here with the last network that it stands for."""
    engine = denoiser.engine
    with _lock:
        users = _users.get(engine)
        if users is None:
            return
        users.discard(denoiser)
        last = not users
        if last:
            del _users[engine]
    if last:
        engine.close()
