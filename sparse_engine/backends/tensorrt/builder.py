"""One step graph to one plan: parse, configure, build."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_engine.backends.base import GRAPH_FILE, StepGraph, weights_payload
from sparse_engine.backends.options import BuildOptions
from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.files import scratch_folder
from sparse_engine.process import noting

from .cache import TimingCache
from .libraries import Library

log = logging.getLogger(__name__)

PASSES = (1, 2, 2)  # of guidance: smallest, usual, largest
DYNAMIC = -1


@dataclass
class Messages:
    """What a library has said, oldest first."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """One message of a severity such as "ERROR"."""
        self.lines.append((severity, text))
        log.debug("TensorRT %s: %s", severity.lower(), text)

    @property
    def errors(self) -> list[str]:
        """The errors."""
        return [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]

    def texts(self) -> list[str]:
        """Everything."""
        return [text for _, text in self.lines]


def make_logger(trt: Any, messages: Messages) -> Any:
    """An ``ILogger`` that keeps what it is told."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            messages.add(severity.name, text)

    return Logger()


def build_plan(
    library: Library,
    graph: StepGraph,
    options: BuildOptions,
    *,
    sparse: bool,
    timings: TimingCache | None,
    messages: Messages,
) -> memoryview:
    """Build a plan.

    Args:
        graph: as the parser is to see it.
        options: its batch profile, precision and ``tensorrt``.
        sparse: let sparse kernels be timed too.
        timings: to use and to add to.
        messages: gets the builder's log.

    Raises:
        BackendError: the parser or the builder refuses the graph, in its own words.
        UnsupportedError: there is not enough memory, or the library lacks what was asked.
        KeyboardInterrupt: Ctrl-C; the build was cancelled.
    """
    trt = library.load()
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(library.network_flags(trt))
    with _on_disk(graph) as path:
        _parse(trt, library, network, logger, path)
        config = _configure(trt, library, builder, network, options, sparse)
        if timings is not None:
            timings.attach(config)
        with _cancellable(trt, config, options.progress) as cancelled:
            plan = builder.build_serialized_network(network, config)
    cancelled.check()
    if plan is None:
        raise _build_error(library, messages)
    if timings is not None:
        timings.store(config)
    return memoryview(plan)


@contextlib.contextmanager
def _on_disk(graph: StepGraph) -> Iterator[Path]:
    """A graph and its weights as files: the parser maps them, and protobuf's 2 GiB do not count."""
    with scratch_folder() as folder:
        path, weights = folder / GRAPH_FILE, weights_payload(graph.weights)
        path.write_bytes(graph.proto.SerializeToString())
        with path.with_name(weights.name).open("wb") as stream:
            for chunk in weights.chunks():
                stream.write(chunk)
        yield path


def _parse(trt: Any, library: Library, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # of group norms; portable plans cannot have its plugin
    if not parser.parse_from_file(str(path)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        what = "; ".join(f"{each.node_operator() or 'model'} {each.node_name()}: {each.desc()}" for each in found[:3])
        raise BackendError(
            f"{library.name} {trt.__version__} does not take the step graph: {what or 'its parser gives no reason'}",
            "a newer version may; or choose another backend",
        )
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True  # head sizes without a fused kernel build too


def _configure(trt: Any, library: Library, builder: Any, network: Any, options: BuildOptions, sparse: bool) -> Any:
    config, wanted = builder.create_builder_config(), options.tensorrt
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = wanted.optimization_level
    if options.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    else:
        config.set_flag(trt.BuilderFlag.TF32)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if wanted.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # the weights put back are these: nothing is given up for it
    if wanted.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, wanted.workspace)
    library.target(trt, config, wanted)
    profile = builder.create_optimization_profile()
    batch = (options.batch[1],) * 3 if wanted.static_batch else options.batch
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if DYNAMIC in shape:
            profile.set_shape(tensor.name, *(_sized(tensor.name, shape, batch[i], i) for i in range(3)))
    config.add_optimization_profile(profile)
    return config


def _sized(name: str, shape: tuple[int, ...], batch: int, which: int) -> tuple[int, ...]:
    """A shape of the profile: the batch is dynamic, and before it the number of passes of what guidance differs in."""
    dynamic = shape.count(DYNAMIC)
    sizes = iter((PASSES[which],) if name == "guidance" else (batch,) if dynamic == 1 else (PASSES[which], batch))
    return tuple(next(sizes) if size == DYNAMIC else size for size in shape)


@dataclass
class _Cancel:
    """Why a build is to stop."""

    interrupted: bool = False
    error: BaseException | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error
        if self.interrupted:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _cancellable(trt: Any, config: Any, progress: Callable[[str], None]) -> Iterator[_Cancel]:
    """Tell ``progress`` of the builder's phases, and stop the builder on Ctrl-C or SIGTERM.

    An exception must not pass through the library, so that a signal is only noted until the builder has returned.
    """
    cancel, phases = _Cancel(), list[list[Any]]()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.append([phase_name, 0, num_steps])

        def phase_finish(self, phase_name: str) -> None:
            phases[:] = [phase for phase in phases if phase[0] != phase_name]

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                for phase in phases:
                    if phase[0] == phase_name:
                        phase[1] = step + 1
                progress(" > ".join(f"{name} {done}/{total}" for name, done, total in phases[:3]))
            except BaseException as error:
                cancel.error = error
            return cancel.error is None and not cancel.interrupted

    def note() -> None:
        cancel.interrupted = True

    monitor = Monitor()
    config.progress_monitor = monitor
    try:
        with noting(note):
            yield cancel
    finally:
        config.progress_monitor = None


def _build_error(library: Library, messages: Messages) -> Exception:
    """The builder's last word, in one line, with what can be done about it."""
    errors = messages.errors
    what = " ".join((errors[-1] if errors else "no reason given").split())
    lower = " ".join(errors).lower()
    if "out of memory" in lower or "outofmemory" in lower or "requested amount of gpu memory" in lower:
        return UnsupportedError(
            f"{library.name} ran out of GPU memory while building: {what}",
            "free the GPU, or build with a smaller largest --batch or --workspace",
        )
    if "driver version is insufficient" in lower or "cuda_success" in lower:
        return UnsupportedError(f"{library.name} needs a GPU for this build: {what}", "build where the GPU is")
    return BackendError(f"{library.name} could not build a plan: {what}", "run with --debug for its whole log")
