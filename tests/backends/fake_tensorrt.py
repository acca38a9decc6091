"""Python's ``tensorrt`` as far as loading and refusing a plan goes, and the engines of ``tensorrt_rtx``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.backends.fake_cuda import FakeContext, FakeEngine


class RuntimeConfig:
    """``IRuntimeConfig``, what is set in it in the order it is set."""

    def __init__(self) -> None:
        self.set: list[tuple[str, Any]] = []

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.set.append(("execution_context_allocation_strategy", strategy))

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "set":
            self.set.append((name, value))


class RtxEngine(FakeEngine):
    """``ICudaEngine`` of TensorRT for RTX; ``capturable`` is what its contexts say of themselves."""

    capturable = True

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> FakeContext:
        assert isinstance(config, RuntimeConfig)
        context = super().create_execution_context("user managed")
        context.is_stream_capturable = lambda stream: self.capturable  # type: ignore[attr-defined]
        return context


class FakeTensorRT:
    """A module. ``engine`` is what any plan becomes; None refuses it."""

    __version__ = "10.14.1.48"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    LayerInformationFormat = SimpleNamespace(JSON="json")
    ComputeCapability = SimpleNamespace(SM75=75, SM80=80, SM86=86, SM89=89, SM120=120)

    def __init__(self, engine: FakeEngine | None) -> None:
        self.engine = engine
        self.deserialised: list[bytes] = []
        outer = self

        class Logger:
            def log(self, severity: Any, text: str) -> None: ...

        class Runtime:
            def __init__(self, logger: Logger) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, plan: memoryview) -> FakeEngine | None:
                outer.deserialised.append(bytes(plan))
                if outer.engine is None:
                    self.logger.log(SimpleNamespace(name="ERROR"), "Serialization assertion failed.\n  magic tag")
                return outer.engine

        class Refitter:
            def __init__(self, engine: FakeEngine, logger: Logger) -> None:
                assert engine is outer.engine

            def refit_cuda_engine(self) -> bool:
                return True

        class OnnxParserRefitter:
            def __init__(self, refitter: Refitter, logger: Logger) -> None: ...

            def refit_from_bytes(self, model: bytes, path: str) -> bool:
                outer.refitted = (model, path)
                return outer.takes_weights

        self.ILogger, self.Runtime = Logger, Runtime
        self.Refitter, self.OnnxParserRefitter = Refitter, OnnxParserRefitter
        self.refitted: tuple[bytes, str] | None = None
        self.takes_weights = True
