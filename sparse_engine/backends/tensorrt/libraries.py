"""TensorRT and TensorRT for RTX: one code builds and runs both, and this is where they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata, util
from types import ModuleType
from typing import Any

from sparse_engine.backends.base import Availability
from sparse_engine.backends.cuda.runtime import Gpu, find_gpu
from sparse_engine.backends.options import LINEAR_FORMS, BuildOptions, TensorRTOptions
from sparse_engine.errors import OptionError, SparseEngineError, UnsupportedError

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
OLDEST_VERSION = (10, 13)  # of TensorRT; RTX counts from 1
OLDEST_GPU = 7.5
OLDEST = {"fp8": 8.9, "bf16": 8.0, "tf32": 8.0}  # compute capability with tensor cores of a type


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        name: the backend's.
        module: Python's.
        extra: of our package, which brings it.
        builds_without_gpu: RTX plans hold kernels in an intermediate form, and are compiled where they run.
        has_sparse_kernels: RTX accepts SPARSE_WEIGHTS and ignores it: dense and sparse plans are the same.
        times_kernels: while it builds, so that its timings are worth keeping.
    """

    name: str
    module: str
    extra: str
    builds_without_gpu: bool
    has_sparse_kernels: bool
    times_kernels: bool

    def load(self) -> ModuleType:
        """Import it. Raises UnsupportedError where it is not there or cannot be loaded."""
        try:
            return import_module(self.module)
        except (ImportError, OSError) as error:
            raise UnsupportedError(f"{self.module} cannot be imported: {error}", self._install) from error

    @property
    def _install(self) -> str:
        index = "" if self.builds_without_gpu else ", with NVIDIA's package index as --extra-index-url"
        return f"pip install 'sparse-engine[{self.extra}]'{index}"

    def availability(self) -> Availability:
        """Whether this machine can run its engines, without loading it."""
        if util.find_spec(self.module) is None:
            return Availability(False, reason=f"{self.module} is not installed", fix=self._install)
        version = self._version()
        if not self.builds_without_gpu and tuple(map(int, version.split(".")[:2])) < OLDEST_VERSION:
            wanted = ".".join(map(str, OLDEST_VERSION))
            return Availability(False, version, f"{self.name} {version} is too old; expected {wanted}", self._install)
        try:
            gpu = find_gpu()
        except SparseEngineError as error:
            return Availability(False, version, error.what, error.fix, builds=self.builds_without_gpu)
        own = gpu.compute_capability
        if self.builds_without_gpu and own not in (known := self.targets(())):
            reason = f"{gpu.name} has compute capability {own}; {self.name} is for {', '.join(known)}"
            return Availability(False, version, reason, "use --backend tensorrt or torch", builds=True)
        if float(own) < OLDEST_GPU:
            reason = f"{gpu.name} has compute capability {own}; {self.name} needs {OLDEST_GPU}"
            return Availability(False, version, reason, "choose another backend")
        return Availability(True, version)

    def _version(self) -> str:
        try:
            return metadata.version(self.module).partition(".post")[0]
        except metadata.PackageNotFoundError:  # from NVIDIA's Debian packages
            return str(self.load().__version__)

    def check(self, options: BuildOptions) -> None:
        """See ``Backend.check``."""
        wanted, given = options.tensorrt, options.precision
        if given not in PRECISIONS:
            raise UnsupportedError(
                f"precision {given!r} is not supported by the {self.name} backend; expected {', '.join(PRECISIONS)}"
            )
        if wanted.linear not in LINEAR_FORMS:
            raise OptionError(f"--linear {wanted.linear!r} is not known; expected one of {', '.join(LINEAR_FORMS)}")
        if not 0 <= wanted.optimization_level <= 5:
            raise OptionError(f"--optimization-level {wanted.optimization_level}: expected 0 to 5")
        if wanted.workspace is not None and wanted.workspace < 1 << 20:
            raise OptionError(f"--workspace of {wanted.workspace} bytes: expected 1 MiB or more, given in GiB")
        if options.require_sparse and not self.has_sparse_kernels:
            raise UnsupportedError(f"--require-sparse: {self.name} has no sparse kernels", "use --backend tensorrt")
        if self.builds_without_gpu:
            self._check_portable(wanted, given)
            self._check_strippable(options)
        else:
            if wanted.compute_capabilities:
                raise OptionError(
                    "--compute-capabilities is for tensorrt-rtx; TensorRT builds for the GPU it runs on",
                    "leave it out, or give --hardware-compatible for every GPU since Ampere",
                )
            _check_gpu(float(find_gpu(options.device).compute_capability), given, self.name)

    def _check_portable(self, wanted: TensorRTOptions, precision: str) -> None:
        for flag in ("hardware_compatible", "version_compatible"):
            if getattr(wanted, flag):
                raise UnsupportedError(
                    f"--{flag.replace('_', '-')} is not for tensorrt-rtx",
                    "leave it out; --compute-capabilities says which GPUs the plan is for",
                )
        known = known_compute_capabilities(self.load())
        for each in wanted.compute_capabilities:
            if normalised(each) not in known:
                raise UnsupportedError(
                    f"--compute-capabilities {each}: {self.name} {self._version()} builds for {', '.join(known)}"
                )
            _check_gpu(float(normalised(each)), precision, self.name)

    def _check_strippable(self, options: BuildOptions) -> None:
        """RTX compiles a plan's kernels while it builds where weights are to be put back later, so it needs the GPU."""
        if options.tensorrt.strip_weights and self.gpu_for(options) is None:
            raise UnsupportedError(
                f"--strip-weights: {self.name} builds such plans only on a GPU that runs them; there is none here",
                "leave it out, or build where the engine will run",
            )

    def gpu_for(self, options: BuildOptions) -> Gpu | None:
        """The GPU here that runs what these options build; None where there is none and the library does without.

        Raises UnsupportedError, OptionError: there is no such GPU, and the library, or ``device``, asks for one.
        """
        try:
            gpu = find_gpu(options.device)
        except SparseEngineError:
            if options.device is not None or not self.builds_without_gpu:
                raise
            return None
        if not self.builds_without_gpu:
            return gpu
        own = gpu.compute_capability
        runs = own in self.targets(options.tensorrt.compute_capabilities) and float(own) >= oldest(options.precision)
        return gpu if runs else None

    def targets(self, compute_capabilities: Sequence[str]) -> list[str]:
        """The compute capabilities that a plan is for: with none named every one that RTX builds for.

        Empty for TensorRT, whose plans are for the GPU they were built on.
        """
        if not self.builds_without_gpu:
            return []
        named = [normalised(each) for each in compute_capabilities]
        return named or known_compute_capabilities(self.load())

    def network_flags(self, trt: Any) -> int:
        """Precision is that of the graph: TensorRT 11 and RTX know nothing else, TensorRT 10 has to be told."""
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def target(self, trt: Any, config: Any, options: TensorRTOptions) -> None:
        """Tell a builder's configuration what the plan is to run on."""
        if self.builds_without_gpu:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or its steps cannot be recorded
            members = [f"SM{normalised(each).replace('.', '')}" for each in options.compute_capabilities]
            if members:
                config.num_compute_capabilities = len(members)
            for index, member in enumerate(members):
                config.set_compute_capability(getattr(trt.ComputeCapability, member), index)
            return
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)

    def context_settings(self, trt: Any, engine: Any) -> Any:
        """What an engine's execution contexts are created with: we allocate their memory.

        RTX compiles kernels for a shape while others stand in for them; a recording would keep the stand-ins, so that
        the first step of a shape has to wait for its own.
        """
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.builds_without_gpu:
            return user_managed
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(user_managed)
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        return settings


TENSORRT = Library(
    "tensorrt", "tensorrt", "tensorrt", builds_without_gpu=False, has_sparse_kernels=True, times_kernels=True
)
RTX = Library(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "tensorrt-rtx",
    builds_without_gpu=True,
    has_sparse_kernels=False,
    times_kernels=False,
)


def known_compute_capabilities(trt: Any) -> list[str]:
    """The GPUs that an RTX plan can be for, from 8.0: float32 products are not built for older ones, and what RTX
    builds where it is told none is not for them either.
    """
    numbers = [match[1] for name in dir(trt.ComputeCapability) if (match := re.fullmatch(r"SM(\d+)", name))]
    return sorted((f"{number[:-1]}.{number[-1]}" for number in numbers if int(number) >= 80), key=float)


def normalised(compute_capability: str) -> str:
    """ "8.6", "86" and "sm86" are one: "8.6". Raises OptionError on what is none."""
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", compute_capability.strip().lower())
    if match is None:
        raise OptionError(f"compute capability {compute_capability!r} is none", "write it as 8.6, or sm86")
    return f"{match[1]}.{match[2]}"


def oldest(precision: str) -> float:
    """The oldest compute capability that has a precision."""
    return OLDEST.get(precision, OLDEST_GPU)


def _check_gpu(compute_capability: float, precision: str, name: str) -> None:
    wanted = oldest(precision)
    if compute_capability < wanted:
        raise UnsupportedError(
            f"precision {precision} with {name} needs compute capability {wanted}; this is for {compute_capability}",
            "build with --precision fp16",
        )
