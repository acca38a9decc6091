"""NVIDIA TensorRT, and TensorRT for RTX: engines with sparse tactics where the library has them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import (
    GRAPH_FILE,
    Availability,
    BuildOptions,
    Payload,
    PayloadFile,
    StepGraph,
    bytes_payload,
    weights_payload,
)
from sparse_engine.errors import BackendError, OptionError, SparseEngineError

from .libraries import RTX, TENSORRT, Library, normalised

if TYPE_CHECKING:
    from sparse_engine.backends.cuda.runner import CudaRunner
    from sparse_engine.backends.cuda.runtime import Gpu

RTX_IS_DENSE = "TensorRT for RTX has no sparse kernels: the flag is taken and not used"
DENSE_WAS_FASTER = "the dense plan was faster than every sparse one"


class _Backend:
    """What both libraries share; see ``Backend``."""

    library: Library

    @property
    def name(self) -> str:
        """As in manifests and ``--backend``."""
        return self.library.name

    def availability(self) -> Availability:
        """Whether library, driver and GPU are there."""
        return self.library.availability()

    def check(self, options: BuildOptions) -> None:
        """See ``Backend.check``."""
        self.library.check(options)

    def graph_precision(self, options: BuildOptions) -> str:
        """Precision is in the graph: tf32 is a way to multiply float32, and what a quantised graph leaves is fp16."""
        return {"tf32": "fp32", "int8": "fp16", "fp8": "fp16"}.get(options.precision, options.precision)

    def build(self, graph: StepGraph, options: BuildOptions, sparse_layers: list[str]) -> Payload:
        """Build the candidates, time them where there is a GPU, and keep the fastest."""
        from sparse_engine.backends.cuda.runtime import Cuda

        from .plan import PLAN_FILE, Plan
        from .plans import PlanBuilder, candidates, time_plans
        from .report import layer_reports

        gpu = self._gpu(options)
        if gpu is not None:
            Cuda(gpu.index).use()  # TensorRT builds for the calling thread's GPU
        version = self.availability().version or ""
        builder = PlanBuilder(self.library, graph, options, gpu, version)
        built = [builder.build(each) for each in candidates(self.library, options, bool(sparse_layers), gpu)]
        chosen, timed = built[0], None
        if len(built) > 1 and gpu is not None:
            options.progress("timing the plans")
            timed = time_plans(self.library, built, gpu, options)
            chosen = next(each for each in built if each.candidate.name == timed.kernel)
        kernels = {}
        if gpu is not None:
            compatible = options.tensorrt.version_compatible
            just_built = Plan(self.library, chosen.plan, "the plan just built", version_compatible=compatible)
            kernels = just_built.kernels()
        layers = layer_reports(graph.layers, sparse_layers, chosen.sparsity, kernels)
        if not self.library.has_sparse_kernels:
            layers = {name: {"chosen": False, "kernel": None, "why": RTX_IS_DENSE} for name in layers}
        elif not chosen.candidate.sparse:
            layers |= {name: {**layers[name], "chosen": False, "why": DENSE_WAS_FASTER} for name in sparse_layers}
        plan = chosen.plan
        files = [PayloadFile(PLAN_FILE, len(plan), lambda: (plan,), aligned=True)]
        if options.tensorrt.strip_weights:
            files += [bytes_payload(GRAPH_FILE, chosen.graph.proto.SerializeToString())]
            files += [weights_payload(chosen.graph.weights)]
        profile = (options.batch[1],) * 3 if options.tensorrt.static_batch else options.batch
        backend: dict[str, Any] = {
            "name": self.name,
            "linear": chosen.candidate.form,
            "attention": chosen.attention,
            "profile": profile,
            "sparsity": dataclasses.asdict(chosen.sparsity),
            "timed": None if timed is None else timed.milliseconds,
            "flags": {**dataclasses.asdict(options.tensorrt), "tf32": options.precision != "fp32"},
            **self._target(options, gpu),
        }
        return Payload(files, backend, layers)

    def _target(self, options: BuildOptions, gpu: Gpu | None) -> dict[str, Any]:
        """What the plan runs on, as ``plan.check_fits`` reads it."""
        wanted = options.tensorrt
        target: dict[str, Any] = {
            "device": gpu.name if gpu else None,
            "driver": gpu.driver if gpu else None,
            "compute_capabilities": [normalised(each) for each in wanted.compute_capabilities],
            "compute_capability": None,
            "hardware_compatible": wanted.hardware_compatible,
            "version_compatible": wanted.version_compatible,
        }
        if gpu is not None and not self.library.builds_without_gpu:
            target["compute_capability"] = gpu.compute_capability
        return target

    def _gpu(self, options: BuildOptions) -> Gpu | None:
        """The GPU to build and time on; None where the library can do without."""
        from sparse_engine.backends.cuda.runtime import find_gpu

        try:
            return find_gpu(options.device)
        except SparseEngineError:
            if options.device is not None or not self.library.builds_without_gpu:
                raise
            return None

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> CudaRunner:
        """Deserialise the plan, once it is known to fit this machine; ``threads`` is how many callers run at once."""
        from sparse_engine.backends.cuda.runner import CudaRunner
        from sparse_engine.backends.cuda.runtime import Cuda, find_gpu

        from .plan import Plan, check_fits, mapped

        if threads is not None and threads < 1:
            raise OptionError(f"threads = {threads}; expected 1 or more, or None for one")
        gpu = find_gpu(device)
        check_fits(engine, self.availability().version or "", gpu)
        cuda = Cuda(gpu.index)
        cuda.use()
        built = engine.manifest.backend
        compatible = built["version_compatible"]
        plan = Plan(self.library, mapped(engine), str(engine.path), version_compatible=compatible)
        if built["flags"]["strip_weights"]:
            plan.refit(engine)
        lanes: list[Any] = []
        try:
            lanes += [plan.device(cuda, gpu) for _ in range(threads or 1)]
        except BackendError:
            for lane in lanes:
                lane.close()
            raise
        description = {
            "library": f"{self.name} {built['version']}",
            "device": f"cuda:{gpu.index} {gpu.name}",
            "threads": threads or 1,
            "linear": built["linear"],
            "attention": built["attention"],
        }
        return CudaRunner(lanes, tuple(built["profile"]), description)


class TensorRTBackend(_Backend):
    """TensorRT 10.13 or newer, and 11: builds for the GPU it runs on."""

    library = TENSORRT


class TensorRTRTXBackend(_Backend):
    """TensorRT for RTX: builds on any machine, for RTX GPUs; dense."""

    library = RTX
