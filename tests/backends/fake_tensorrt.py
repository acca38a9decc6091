"""Python's ``tensorrt`` as far as loading and refusing a plan goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.backends.fake_cuda import FakeEngine


class FakeTensorRT:
    """A module. ``engine`` is what any plan becomes; None refuses it."""

    __version__ = "10.14.1.48"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    LayerInformationFormat = SimpleNamespace(JSON="json")

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
