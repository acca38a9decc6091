"""The plans that a build may end with: built or taken from the cache, timed where there is a GPU, the fastest kept."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_engine import __version__
from sparse_engine.backends.base import IDENTITY_ROW, NO_CLIP, StepGraph, weights_payload
from sparse_engine.backends.cuda.device import Buffer
from sparse_engine.backends.cuda.runtime import Cuda, Gpu
from sparse_engine.backends.onnx_graph import conditions_of, dtype_of, sizes
from sparse_engine.backends.options import LINEAR_FORMS, BuildOptions
from sparse_engine.backends.step_device import StepBuffers
from sparse_engine.errors import BackendError, SparseEngineError
from sparse_engine.tactics import fastest

from .builder import Messages, build_plan
from .cache import PlanCache, TimingCache, graph_digest
from .graph import with_attention_nodes, with_linear_form
from .libraries import Library
from .plan import Plan
from .report import Sparsity, parse_log

log = logging.getLogger(__name__)

STEPS_TIMED = 8  # enqueued together, so that the host's part is hidden
REVISION = 2  # of what this package does to a graph and a builder's configuration: plans of another are not served


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


@dataclass(frozen=True)
class Chosen:
    """The plan that a build ends with.

    Attributes:
        built: it.
        milliseconds: candidate -> time of a step; None where there was nothing to compare.
        failed: candidate -> why it was not built or could not be timed.
    """

    built: Built
    milliseconds: dict[str, float] | None
    failed: dict[str, str]


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

    def build(self, candidate: Candidate, *, strip: bool = False) -> Built:
        """Build one, with attention as one node where the library takes it. Raises as ``build_plan``.

        ``strip``: without its weights; it then has to be refitted before it runs.
        """
        plain = with_linear_form(self._graph, candidate.form)
        graph, fused = with_attention_nodes(plain)
        low = self._options.precision not in ("fp32", "tf32")  # there are no fused kernels of float32
        if fused and low:
            try:
                return self._build(candidate, graph, "Attention", strip)
            except BackendError as error:
                log.info("attention as one node: %s; building it in its plain form", error.what)
        return self._build(candidate, plain, "plain", strip)

    def _build(self, candidate: Candidate, graph: StepGraph, attention: str, strip: bool) -> Built:
        timings, messages = None, Messages()
        wanted = dataclasses.replace(self._options.tensorrt, strip_weights=strip)
        options = dataclasses.replace(self._options, tensorrt=wanted)
        proto = graph.proto.SerializeToString(deterministic=True)
        builder = {"builder": f"{__version__} revision {REVISION}"}
        facts = {**self._machine, **builder, "graph": graph_digest(proto, weights_payload(graph.weights))}
        flags = dataclasses.asdict(wanted) | {"precision": options.precision, "batch": options.batch}
        plans = PlanCache({**facts, **flags, "sparse": candidate.sparse})
        kept = plans.load() if wanted.cache else None
        if kept is not None:
            return Built(candidate, graph, kept[0], attention, Sparsity.from_dict(kept[1]))
        if wanted.cache and self._library.times_kernels:
            timings = TimingCache(self._machine)

        def progress(stage: str) -> None:
            self._options.progress(f"{candidate.name}: {stage}")

        plan = build_plan(
            self._library,
            graph,
            dataclasses.replace(options, progress=progress),
            sparse=candidate.sparse,
            timings=timings,
            messages=messages,
        )
        sparsity = parse_log(messages.texts())
        if wanted.cache:
            plans.store(plan, dataclasses.asdict(sparsity))
        return Built(candidate, graph, plan, attention, sparsity)


def choose_plan(
    library: Library, builder: PlanBuilder, wanted: Sequence[Candidate], gpu: Gpu | None, options: BuildOptions
) -> Chosen:
    """Build the candidates, time them where there is a GPU, and keep the fastest; only its weights are stripped.

    A candidate that cannot be built or run is left out. Raises what the first of them met where none is left.
    """
    built, failed = list[Built](), dict[str, SparseEngineError]()
    for each in wanted:
        try:
            built.append(builder.build(each))
        except SparseEngineError as error:
            log.info("%s is left out: %s", each.name, error)
            failed[each.name] = error.with_traceback(None)
    times: dict[str, float] = {}
    if len(built) > 1 and gpu is not None:
        options.progress("timing the plans")
        times, unfit = time_plans(library, built, gpu, options)
        failed |= unfit
        built = [each for each in built if each.candidate.name in times]
    if not built:
        raise next(iter(failed.values()))
    chosen = min(built, key=lambda each: times.get(each.candidate.name, 0.0))
    if options.tensorrt.strip_weights:
        chosen = builder.build(chosen.candidate, strip=True)
    return Chosen(chosen, times or None, {name: error.what for name, error in failed.items()})


def time_plans(
    library: Library, plans: Sequence[Built], gpu: Gpu, options: BuildOptions
) -> tuple[dict[str, float], dict[str, SparseEngineError]]:
    """Run steps of the plans at the usual batch.

    The GPU holds two of them at once, the fastest so far and the next, which run in turn. What counts is their ratio:
    it is applied to the first plan's time, so that times of different pairs compare. One that cannot run beside
    another, for want of memory or for whatever reason, runs alone.

    Returns:
        candidate -> milliseconds of a step; and candidate -> why it could not be run.
    """
    cuda, queue = Cuda(gpu.index), list(plans)
    milliseconds, failed = dict[str, float](), dict[str, SparseEngineError]()
    best: dict[str, Callable[[], object]] = {}
    with contextlib.ExitStack() as kept:
        while queue:
            name = queue[0].candidate.name
            with contextlib.ExitStack() as held:
                try:
                    run = _timed_run(library, queue[0], cuda, gpu, options, held)
                    found = fastest({**best, name: run}).milliseconds
                except BackendError as error:
                    if best:
                        best = {}
                        held.close()
                        kept.close()
                        continue
                    log.info("%s cannot be timed: %s", name, error)
                    failed[name] = error.with_traceback(None)  # its frames hold the plan
                else:
                    unit = next((milliseconds[each] / found[each] for each in best), 1 / STEPS_TIMED)
                    milliseconds[name] = found[name] * unit
                    if name == min(milliseconds, key=lambda each: milliseconds[each]):
                        best = {name: run}
                        kept.close()
                        kept.enter_context(held.pop_all())
            queue.pop(0)
    return milliseconds, failed


def _timed_run(
    library: Library, built: Built, cuda: Cuda, gpu: Gpu, options: BuildOptions, held: contextlib.ExitStack
) -> Callable[[], object]:
    """A function that runs some steps on zeros and waits for them; what it uses is given back with ``held``."""
    compatible = options.tensorrt.version_compatible
    plan = Plan(library, built.plan, built.candidate.name, version_compatible=compatible)
    device, made = plan.device(cuda, gpu), list[Buffer]()

    def free() -> None:
        for each in made:
            device.free(each)

    for release in (device.close, free, device.synchronize):  # the last is the first to run
        held.callback(release)
    x = next(value for value in built.graph.proto.graph.input if value.name == "x")
    shape = (options.batch[1], *sizes(x)[1:])

    def buffer(shape: tuple[int, ...], dtype: type[np.generic] = np.float32, value: Any = 0) -> Buffer:
        made.append(device.allocate(shape, dtype))
        device.upload(made[-1], np.full(shape, value, dtype))
        return made[-1]

    buffers = StepBuffers(
        t=buffer(shape[:1]),
        conditioning={
            value.name: buffer((1, shape[0], *sizes(value)[2:]), dtype_of(value))
            for value in conditions_of(built.graph.proto)
        },
        guidance=buffer((1,), value=1),
        coef=buffer((8,), value=IDENTITY_ROW),
        clip=buffer((2,), value=NO_CLIP),
        **{name: buffer(shape) for name in ("x", "base", "h1", "h2", "z", "x_next", "m")},
    )

    def run() -> None:
        for _ in range(STEPS_TIMED):
            device.step(buffers)
        device.synchronize()

    return run
