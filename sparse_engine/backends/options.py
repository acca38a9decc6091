"""What a build is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparse_engine import arguments
from sparse_engine.errors import OptionError

LARGEST_BATCH = 65536
LINEAR_FORMS = ("auto", "matmul", "gemm", "conv1x1")


@dataclass(frozen=True)
class TensorRTOptions:
    """What only the TensorRT backends take.

    Attributes:
        linear: the ONNX operator that a Linear becomes: "matmul", "gemm" or "conv1x1" (which of them get sparse kernels
            differs between TensorRT versions), or "auto", which builds and times them where there is a GPU.
        static_batch: fix the batch at the usual one; faster to build, and one shape at run time.
        workspace: bytes that kernels may use beside weights and activations; None is the device's memory.
        optimization_level: 0 (fast build) to 5 (slow build); TensorRT's default is 3.
        cache: keep timings and engines in the user's cache folder.
        hardware_compatible: the plan runs on Ampere and every later GPU, slower.
        version_compatible: the plan runs on later versions of TensorRT of the same major number; it holds code of the
            host for that (TensorRT's lean runtime), which loading it runs.
        strip_weights: leave the weights out of the plan and put them back when it is loaded; TensorRT for RTX needs
            the GPU for that.
        compute_capabilities: GPUs that a TensorRT for RTX plan is for ("8.6", "12.0"). None is every one from 8.0 that
            the library knows and that has the precision, whether or not there is a GPU here.
    """

    linear: str = "auto"
    static_batch: bool = False
    workspace: int | None = None
    optimization_level: int = 3
    cache: bool = True
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {
            name: arguments.truth(name, getattr(self, name))
            for name in ("static_batch", "cache", "hardware_compatible", "version_compatible", "strip_weights")
        }
        level = "0 to 5, a whole number"
        numbers["optimization_level"] = arguments.whole_number(
            "optimization_level", self.optimization_level, 0, 5, level
        )
        if self.workspace is not None:
            numbers["workspace"] = arguments.whole_number("workspace", self.workspace, 1)
        for name, value in numbers.items():
            object.__setattr__(self, name, value)


def _say_nothing(stage: str) -> None:
    pass


@dataclass(frozen=True)
class BuildOptions:
    """What a build was asked for.

    Attributes:
        sparse: use sparse kernels where a layer is hardware 2:4 and the kernel is faster.
        precision: of the network's weights and products; the solver's lines are always float32.
        batch: (smallest, usual, largest) batch.
        device: where the engine will run, for a backend that has a choice ("cpu", "cuda:0"); None is its default.
        require_sparse: raise where a masked layer is known to stay dense.
        tensorrt: what only the TensorRT backends take.
        progress: told each stage of the backend's work as it begins.
    """

    sparse: bool = False
    precision: str = "fp32"
    batch: tuple[int, int, int] = (1, 16, 64)
    device: str | None = None
    require_sparse: bool = False
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)
    progress: Callable[[str], None] = field(default=_say_nothing, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse", arguments.truth("sparse", self.sparse))
        object.__setattr__(self, "require_sparse", arguments.truth("require_sparse", self.require_sparse))
        object.__setattr__(self, "device", arguments.device(self.device))
        sizes = arguments.whole_numbers("batch", self.batch)
        smallest, usual, largest = sizes if len(sizes) == 3 else (0, 0, 0)
        if not 1 <= smallest <= usual <= largest <= LARGEST_BATCH:
            raise OptionError(
                f"batch {self.batch}: expected 1 <= smallest <= usual <= largest <= {LARGEST_BATCH}",
                "for example --batch 1,16,64",
            )
        object.__setattr__(self, "batch", (smallest, usual, largest))
