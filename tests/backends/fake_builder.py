"""The building side of Python's ``tensorrt``, written from NVIDIA's documentation of 10.13, 10.14 and 11.1.

A name that the documented version does not have is an AttributeError here, as it would be there; what is set and not
documented as a property is one too. A plan is JSON that says how it was built.
"""

from __future__ import annotations

import enum
import json
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from tests.backends.fake_cuda import FakeContext, FakeCuda, FakeEngine
from tests.backends.test_cuda_runner import step

COMMON_FLAGS = (
    *("DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "EDITABLE_TIMING_CACHE", "TF32", "SPARSE_WEIGHTS"),
    *("SAFETY_SCOPE", "DIRECT_IO", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "ERROR_ON_TIMING_CACHE_MISS"),
    *("DISABLE_COMPILATION_CACHE", "STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING", "REFIT_INDIVIDUAL"),
    *("STRICT_NANS", "MONITOR_MEMORY", "DISTRIBUTIVE_INDEPENDENCE"),
)
FLAGS_OF_10 = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4", "OBEY_PRECISION_CONSTRAINTS", "REJECT_EMPTY_ALGORITHMS")
SPARSE_KERNEL = "sm80_xmma_gemm_sparse_f16f16_f16f32_f32_tn_n_sptensor16x8x32"
DENSE_KERNEL = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"


class Documented:
    """An object that has the properties it was made with and no others."""

    def __init__(self, **properties: Any) -> None:
        self.__dict__.update(properties)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__class__" and name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no property {name}")
        object.__setattr__(self, name, value)


class ILogger:
    Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class IProgressMonitor: ...


class ILayer(Documented): ...


class IAttentionInputLayer(ILayer): ...


class ITimingCache:
    def __init__(self, entries: bytes) -> None:
        self.entries = entries

    def serialize(self) -> bytes:
        return self.entries

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.entries += input_cache.entries
        return True


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple] = {}

    def set_shape(self, input: str, min: tuple, opt: tuple, max: tuple) -> None:
        assert all(low <= usual <= high for low, usual, high in zip(min, opt, max, strict=True))
        self.shapes[input] = (min, opt, max)


class IBuilderConfig(Documented):
    def __init__(self, flags: type[enum.IntEnum]) -> None:
        super().__init__(
            builder_optimization_level=3,
            profiling_verbosity=None,
            hardware_compatibility_level=None,
            progress_monitor=None,
            _flags={flags.TF32},  # type: ignore[attr-defined]
            _kind=flags,
            _pools={},
            _profiles=[],
            _timings=None,
        )

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._kind)
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self._inputs: list[Any] = []
        self._layers: list[ILayer] = []

    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class BuiltEngine(FakeEngine):
    """The engine of a plan; it has no context where there is no memory for one."""

    def __init__(self, cuda: FakeCuda, how: dict[str, Any], runs: bool) -> None:
        super().__init__(cuda, step, {"y": np.int64})
        self.information = json.dumps({"Layers": how["layers"]})
        self._flags, self._runs = how["flags"], runs

    def create_execution_context(self, strategy: Any) -> FakeContext | None:  # type: ignore[override]
        assert "STRIP_PLAN" not in self._flags, "run without its weights"
        return super().create_execution_context(strategy) if self._runs else None


How = Callable[[dict[str, Any]], bool]


class FakeTensorRTBuilder:
    """A module ``tensorrt`` of a version.

    ``cannot_build`` and ``cannot_run`` are given how a plan is built; ``engines`` are those still held,
    ``most_engines`` how many there were at once.
    """

    ILogger, IProgressMonitor, IAttentionInputLayer = ILogger, IProgressMonitor, IAttentionInputLayer
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
    HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY")
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM TACTIC_DRAM TACTIC_SHARED_MEMORY")
    NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    OnnxParserFlag = enum.Enum("OnnxParserFlag", "NATIVE_INSTANCENORM ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA")
    LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, version: str, cuda: FakeCuda) -> None:
        self.__version__, self.cuda = version, cuda
        numbers = tuple(map(int, version.split(".")[:2]))
        self.has_attention = numbers >= (10, 14)
        self.BuilderFlag = enum.IntEnum("BuilderFlag", (*COMMON_FLAGS, *(FLAGS_OF_10 if numbers < (11, 0) else ())))
        kinds = ("CONVOLUTION", "MATRIX_MULTIPLY", *(("ATTENTION_INPUT",) if self.has_attention else ()))
        self.LayerType = enum.Enum("LayerType", kinds)
        self.plans: list[dict[str, Any]] = []
        self.cannot_build: How = lambda how: False
        self.cannot_run: How = lambda how: False
        self.engines, self.most_engines = weakref.WeakSet[BuiltEngine](), 0
        self.attentions: list[Documented] = []
        library = self

        class Builder:
            def __init__(self, logger: ILogger) -> None:
                self.logger: Any = logger

            def create_network(self, flags: int = 0) -> INetworkDefinition:
                return INetworkDefinition(flags)

            def create_builder_config(self) -> IBuilderConfig:
                return IBuilderConfig(library.BuilderFlag)

            def create_optimization_profile(self) -> IOptimizationProfile:
                return IOptimizationProfile()

            def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
                return library.build(self.logger, network, config)

        class OnnxParser:
            def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
                self.network, self.refused = network, list[onnx.NodeProto]()
                self.flags = set[Any]()

            num_errors = property(lambda self: len(self.refused))

            def set_flag(self, flag: Any) -> None:
                assert isinstance(flag, library.OnnxParserFlag)
                self.flags.add(flag)

            def parse_from_file(self, model: str) -> bool:
                assert library.OnnxParserFlag.NATIVE_INSTANCENORM in self.flags
                proto = onnx.load(model)
                self.refused = [node for node in proto.graph.node if not library.takes(node)]
                library.read(proto, self.network)
                return not self.refused

            def get_error(self, index: int) -> Any:
                node, words = self.refused[index], "In function parseNode: Assertion failed: no importer"
                return SimpleNamespace(
                    node_operator=lambda: node.op_type, node_name=lambda: node.name, desc=lambda: words
                )

        class Runtime(Documented):
            def __init__(self, logger: ILogger) -> None:
                super().__init__(logger=logger, engine_host_code_allowed=False)

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
                how = json.loads(bytes(serialized_engine))
                if "VERSION_COMPATIBLE" in how["flags"] and not self.engine_host_code_allowed:
                    self.logger.log(ILogger.Severity.ERROR, "Plan contains host code, which is not allowed")
                    return None
                engine = BuiltEngine(cuda, how, runs=not library.cannot_run(how))
                library.engines.add(engine)
                library.most_engines = max(library.most_engines, len(library.engines))
                return engine

        self.Builder, self.OnnxParser, self.Runtime = Builder, OnnxParser, Runtime
        self._products: list[str] = []
        self._operator = ""

    def takes(self, node: onnx.NodeProto) -> bool:
        return node.op_type != "Attention" or self.has_attention

    def read(self, proto: onnx.ModelProto, network: INetworkDefinition) -> None:
        for value in proto.graph.input:
            shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
            network._inputs.append(SimpleNamespace(name=value.name, shape=shape))
        self._products = [node.name for node in proto.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
        self._operator = next(node.op_type for node in proto.graph.node if node.name == "mid_block.mlp.fc1")
        for node in proto.graph.node:
            if node.op_type == "Attention" and self.has_attention:
                attention = Documented(decomposable=False, causal=False, mask=None, name=node.name)
                self.attentions.append(attention)
                network._layers.append(ILayer(type=self.LayerType["ATTENTION_INPUT"], attention=attention))
            else:
                network._layers.append(ILayer(type=self.LayerType["MATRIX_MULTIPLY"]))

    def build(self, logger: Any, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        strongly_typed = network.flags >> int(self.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1
        if not strongly_typed and self.__version__ < "11":
            logger.log(ILogger.Severity.ERROR, "weakly typed")
            return None
        assert self.cuda.uses, "built for whichever GPU is the thread's"
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 1)
        assert monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
        sparse = self.BuilderFlag.SPARSE_WEIGHTS in config._flags
        found = ", ".join(self._products)
        if sparse:
            said = f"Chose {len(self._products)} layer(s) using sparse tactics: {found}"
            logger.log(ILogger.Severity.INFO, f"(Sparsity) {said}")
        kernel = SPARSE_KERNEL if sparse else DENSE_KERNEL
        plan: dict[str, Any] = {
            "operator": self._operator,
            "flags": sorted(flag.name for flag in config._flags),
            "level": config.builder_optimization_level,
            "verbosity": config.profiling_verbosity.name,
            "hardware": config.hardware_compatibility_level and config.hardware_compatibility_level.name,
            "workspace": config._pools.get(self.MemoryPoolType.WORKSPACE),
            "profile": config._profiles[0].shapes,
            "layers": [
                {"Name": "x", "Metadata": f"[ONNX Layer: {name}]", "TacticName": kernel} for name in self._products
            ],
        }
        if self.cannot_build(plan):
            logger.log(ILogger.Severity.ERROR, f"Could not find any implementation for a {self._operator}")
            return None
        if config._timings is not None:
            config._timings.entries += b"."
        self.plans.append(plan)
        return json.dumps(plan).encode()
