"""The plans that a build may end with: built or taken from the cache, timed where there is a GPU, the fastest kept."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine.backends.base import IDENTITY_ROW, NO_CLIP, StepGraph, weights_payload
from sparse_engine.backends.cuda.device import Buffer
from sparse_engine.backends.cuda.runtime import Cuda, Gpu
from sparse_engine.backends.device_loop import StepBuffers
from sparse_engine.backends.options import LINEAR_FORMS, BuildOptions
from sparse_engine.errors import BackendError
from sparse_engine.tactics import Choice, fastest

from .builder import Messages, build_plan
from .cache import PlanCache, TimingCache, graph_digest
from .device import TensorRTDevice
from .graph import with_attention_nodes, with_linear_form
from .libraries import Library
from .plan import Plan
from .report import Sparsity, parse_log

log = logging.getLogger(__name__)

STEPS_TIMED = 8  # enqueued together, so that the host's part is hidden


@dataclass(frozen=True)
class Candidate:
    """One way of building: a form of the Linears, and whether sparse kernels may be chosen."""

    form: str
    sparse: bool

    @property
    def name(self) -> str:
        """As reports call it."""
        return f"{'sparse' if self.sparse else 'dense'} {self.form}"


@dataclass(frozen=True)
class Built:
    """A plan, the graph that it was built from, how its attention was written, and what the log says of sparsity."""

    candidate: Candidate
    graph: StepGraph
    plan: bytes | memoryview
    attention: str
    sparsity: Sparsity


def candidates(library: Library, options: BuildOptions, sparse: bool, gpu: Gpu | None) -> list[Candidate]:
    """What is worth building: every form where the choice is left to us and can be timed, and dense beside sparse."""
    form = options.tensorrt.linear
    forms = LINEAR_FORMS[1:] if form == "auto" and gpu is not None else (LINEAR_FORMS[1] if form == "auto" else form,)
    found = [Candidate(each, sparse) for each in forms]
    if sparse and library.has_sparse_kernels:
        found.append(Candidate(LINEAR_FORMS[1], False))
    return found


class PlanBuilder:
    """Builds candidates of one step graph.

    Args:
        library, graph, options: of the build.
        gpu: that the plans are for; None where there is none.
        version: the library's.
    """

    def __init__(
        self, library: Library, graph: StepGraph, options: BuildOptions, gpu: Gpu | None, version: str
    ) -> None:
        self._library, self._graph, self._options = library, graph, options
        self._machine = {"library": library.name, "version": version, "gpu": gpu and dataclasses.asdict(gpu)}

    def build(self, candidate: Candidate) -> Built:
        """Build one, with attention as one node where the library takes it. Raises as ``build_plan``."""
        plain = with_linear_form(self._graph, candidate.form)
        graph, fused = with_attention_nodes(plain)
        low = self._options.precision not in ("fp32", "tf32")  # there are no fused kernels of float32
        if fused and low:
            try:
                return self._build(candidate, graph, "Attention")
            except BackendError as error:
                log.info("attention as one node: %s; building it in its plain form", error.what)
        return self._build(candidate, plain, "plain")

    def _build(self, candidate: Candidate, graph: StepGraph, attention: str) -> Built:
        options, timings, messages = self._options, None, Messages()
        proto = graph.proto.SerializeToString(deterministic=True)
        facts = {**self._machine, "graph": graph_digest(proto, weights_payload(graph.weights))}
        flags = dataclasses.asdict(options.tensorrt) | {"precision": options.precision, "batch": options.batch}
        plans = PlanCache({**facts, **flags, "sparse": candidate.sparse})
        kept = plans.load() if options.tensorrt.cache else None
        if kept is not None:
            return Built(candidate, graph, kept[0], attention, Sparsity.from_dict(kept[1]))
        if options.tensorrt.cache and self._library.times_kernels:
            timings = TimingCache(self._machine)

        def progress(stage: str) -> None:
            options.progress(f"{candidate.name}: {stage}")

        plan = build_plan(
            self._library,
            graph,
            dataclasses.replace(options, progress=progress),
            sparse=candidate.sparse,
            timings=timings,
            messages=messages,
        )
        sparsity = parse_log(messages.texts())
        if options.tensorrt.cache:
            plans.store(plan, dataclasses.asdict(sparsity))
        return Built(candidate, graph, plan, attention, sparsity)


def time_plans(library: Library, plans: Sequence[Built], gpu: Gpu, options: BuildOptions) -> Choice:
    """Run steps of each plan at the usual batch, in turn, and take the fastest; its times are of one step."""
    cuda, runs, compatible = Cuda(gpu.index), {}, options.tensorrt.version_compatible
    with contextlib.ExitStack() as held:
        for built in plans:
            plan = Plan(library, built.plan, built.candidate.name, version_compatible=compatible)
            device = plan.device(cuda, gpu)
            held.callback(device.close)
            runs[built.candidate.name] = _timed_run(device, built.graph, options.batch[1], held)
        choice = fastest(runs)
        return Choice(choice.kernel, {name: value / STEPS_TIMED for name, value in choice.milliseconds.items()})


def _timed_run(
    device: TensorRTDevice, graph: StepGraph, batch: int, held: contextlib.ExitStack
) -> Callable[[], object]:
    """A function that runs some steps on zeros and waits for them; its buffers are given back with ``held``."""
    inputs = {value.name: value.type.tensor_type.shape for value in graph.proto.graph.input}
    shape = (batch, *(dim.dim_value for dim in inputs["x"].dim[1:]))

    def buffer(shape: tuple[int, ...], dtype: type[np.generic] = np.float32, value: Any = 0) -> Buffer:
        made = device.allocate(shape, dtype)
        held.callback(device.free, made)
        device.upload(made, np.full(shape, value, dtype))
        return made

    buffers = StepBuffers(
        t=buffer((batch,)),
        labels=buffer((1, batch), np.int64) if "y" in inputs else None,
        guidance=buffer((1,), value=1),
        coef=buffer((8,), value=IDENTITY_ROW),
        clip=buffer((2,), value=NO_CLIP),
        **{name: buffer(shape) for name in ("x", "base", "h1", "h2", "z", "x_next", "m")},
    )

    held.callback(device.synchronize)

    def run() -> None:
        for _ in range(STEPS_TIMED):
            device.step(buffers)
        device.synchronize()

    return run
