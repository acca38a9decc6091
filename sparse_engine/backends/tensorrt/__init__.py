"""NVIDIA TensorRT, and TensorRT for RTX: engines with sparse tactics where the library has them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparse_engine import arguments
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
from sparse_engine.errors import BackendError

from .libraries import RTX, TENSORRT, Library, normalised

if TYPE_CHECKING:
    from sparse_engine.backends.cuda.runner import CudaRunner
    from sparse_engine.backends.cuda.runtime import Gpu

    from .plans import Chosen

RTX_IS_DENSE = "TensorRT for RTX has no sparse kernels: the flag is taken and not used"
DENSE_WAS_FASTER = "the dense plan was faster than every sparse one"
NO_SPARSE_PLAN = "no plan with sparse kernels could be built and run"


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

        from .plan import PLAN_FILE
        from .plans import PlanBuilder, candidates, choose_plan

        gpu = self.library.gpu_for(options)
        if gpu is not None:
            Cuda(gpu.index).use()  # TensorRT builds for the calling thread's GPU
        builder = PlanBuilder(self.library, graph, options, gpu, self.availability().version or "")
        wanted = candidates(self.library, options, bool(sparse_layers), gpu)
        chosen = choose_plan(self.library, builder, wanted, gpu, options)
        plan = chosen.built.plan
        files = [PayloadFile(PLAN_FILE, len(plan), lambda: (plan,), aligned=True)]
        if options.tensorrt.strip_weights:
            files += [bytes_payload(GRAPH_FILE, chosen.built.graph.proto.SerializeToString())]
            files += [weights_payload(chosen.built.graph.weights)]
        backend = {**self._description(chosen, options), **self._target(options, gpu)}
        return Payload(files, backend, self._layers(graph, sparse_layers, chosen, options))

    def _description(self, chosen: Chosen, options: BuildOptions) -> dict[str, Any]:
        """How the plan was built, as ``docs/engine-file.md`` has it."""
        built = chosen.built
        return {
            "name": self.name,
            "linear": built.candidate.form,
            "attention": built.attention,
            "profile": (options.batch[1],) * 3 if options.tensorrt.static_batch else options.batch,
            "sparsity": dataclasses.asdict(built.sparsity),
            "timed": chosen.milliseconds,
            "failed": chosen.failed,
            "flags": {**dataclasses.asdict(options.tensorrt), "tf32": options.precision != "fp32"},
        }

    def _layers(
        self, graph: StepGraph, sparse_layers: list[str], chosen: Chosen, options: BuildOptions
    ) -> dict[str, dict[str, Any]]:
        """What runs each layer, as far as the library says."""
        from .plan import Plan
        from .report import layer_reports

        built = chosen.built
        if not self.library.has_sparse_kernels:
            return {name: {"chosen": False, "kernel": None, "why": RTX_IS_DENSE} for name in graph.layers}
        compatible = options.tensorrt.version_compatible
        plan = Plan(self.library, built.plan, "the plan just built", version_compatible=compatible)
        layers = layer_reports(graph.layers, sparse_layers, built.sparsity, plan.kernels())
        if sparse_layers and not built.candidate.sparse:
            compared = any(name.startswith("sparse") for name in chosen.milliseconds or ())
            why = DENSE_WAS_FASTER if compared else NO_SPARSE_PLAN
            layers |= {name: {**layers[name], "chosen": False, "why": why} for name in sparse_layers}
        return layers

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

    def load(self, engine: EngineFile, *, threads: int | None, device: str | None, autotune: bool) -> CudaRunner:
        """Deserialise the plan, once it is known to fit this machine; ``threads`` is how many callers run at once."""
        from sparse_engine.backends.cuda.runner import CudaRunner
        from sparse_engine.backends.cuda.runtime import Cuda, find_gpu

        from .plan import Plan, check_fits, mapped

        callers = arguments.threads(threads) or 1
        gpu = find_gpu(device)
        check_fits(engine, self.library, self.availability().version or "", gpu)
        cuda = Cuda(gpu.index)
        cuda.use()
        built = engine.manifest.backend
        compatible = built["version_compatible"]
        plan = Plan(self.library, mapped(engine), str(engine.path), version_compatible=compatible)
        if built["flags"]["strip_weights"]:
            plan.refit(engine)
        lanes: list[Any] = []
        try:
            lanes += [plan.device(cuda, gpu) for _ in range(callers)]
        except BackendError:
            for lane in lanes:
                lane.close()
            raise
        description = {
            "library": f"{self.name} {built['version']}",
            "device": f"cuda:{gpu.index} {gpu.name}",
            "threads": callers,
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
