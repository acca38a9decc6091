"""A plan in memory: deserialised, inspected, checked against the machine before TensorRT gets its bytes."""

from __future__ import annotations

import mmap

import onnx

from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE
from sparse_engine.backends.cuda.runtime import Cuda, Gpu
from sparse_engine.errors import BackendError, EngineFileError

from .builder import Messages, make_logger
from .device import TensorRTDevice
from .libraries import Library, oldest
from .report import parse_inspector

PLAN_FILE = "step.plan"


class Plan:
    """A deserialised plan.

    Args:
        library: that built it.
        data: its bytes.
        where: what to call it in an error.
        version_compatible: it was built so; it brings the runtime of its version along, which TensorRT only loads where
            it is told that code from the plan may run.

    Raises (on construction):
        BackendError: TensorRT refuses it, in its own words.
    """

    def __init__(
        self, library: Library, data: bytes | memoryview, where: str, *, version_compatible: bool = False
    ) -> None:
        self._library, self._trt, messages = library, library.load(), Messages()
        self._logger = make_logger(self._trt, messages)  # the bindings do not all keep what they are given
        self._runtime = self._trt.Runtime(self._logger)
        if version_compatible:
            self._runtime.engine_host_code_allowed = True
        self._where, self._messages = where, messages
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self._refused(f"{library.name} {self._trt.__version__} refuses the plan")

    def _refused(self, what: str) -> BackendError:
        errors = self._messages.errors
        reason = " ".join((errors[-1] if errors else "no reason given").split())
        return BackendError(f"{self._where}: {what}: {reason}", "rebuild the engine with sparse-engine build")

    def refit(self, file: EngineFile) -> None:
        """Put the weights back that were stripped: they lie beside the plan, under the graph that it was built from."""
        model = onnx.load_model_from_string(file.read(GRAPH_FILE))
        start, _ = file.span(WEIGHTS_FILE)
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if entries:
                entries["location"].value = file.path.resolve().name
                entries["offset"].value = str(int(entries["offset"].value) + start)
        refitter = self._trt.Refitter(self.engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        path = str(file.path.resolve())
        if not parser.refit_from_bytes(model.SerializeToString(), path) or not refitter.refit_cuda_engine():
            raise self._refused("its weights cannot be put back")

    def kernels(self) -> dict[str, tuple[str, ...]]:
        """Layer -> the kernels that run it."""
        inspector = self.engine.create_engine_inspector()
        return parse_inspector(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def device(self, cuda: Cuda, gpu: Gpu) -> TensorRTDevice:
        """One stream that runs it."""
        settings = self._library.context_settings(self._trt, self.engine)
        return TensorRTDevice(cuda, self.engine, gpu.index, settings, owner=self)


def mapped(file: EngineFile) -> memoryview:
    """The plan's bytes, mapped from the engine file."""
    offset, size = file.span(PLAN_FILE)
    with file.path.open("rb") as stream:
        whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(whole)[offset : offset + size]


def check_fits(file: EngineFile, library: Library, version: str, gpu: Gpu) -> None:
    """Refuse a plan of another version or GPU, saying what it was built for and what is here.

    Raises EngineFileError.
    """
    built = file.manifest.backend
    name, was = built["name"], str(built.get("version"))
    here = f"{name} {version} on {gpu.name} (compute capability {gpu.compute_capability})"
    same_major = was.split(".")[0] == version.split(".")[0]
    if was != version and not (built.get("version_compatible") and same_major and _numbers(was) <= _numbers(version)):
        raise _misfit(file, f"{file.path} was built by {name} {was}; here is {here}")
    capabilities = library.targets(built.get("compute_capabilities") or [])
    if capabilities and gpu.compute_capability not in capabilities:
        raise _misfit(file, f"{file.path} was built for compute capability {', '.join(capabilities)}; here is {here}")
    precision = file.manifest.precision
    if float(gpu.compute_capability) < oldest(precision):
        what = f"{file.path} is in {precision}, which needs compute capability {oldest(precision)}; here is {here}"
        raise _misfit(file, what, "fp16")
    own = built.get("compute_capability")
    portable = built.get("hardware_compatible") and float(gpu.compute_capability) >= 8.0
    if own and not portable and (own, built.get("device")) != (gpu.compute_capability, gpu.name):
        where = f"{built.get('device')} (compute capability {own})"
        raise _misfit(file, f"{file.path} was built on {where}; here is {here}")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdecimal()]


def _misfit(file: EngineFile, what: str, precision: str | None = None) -> EngineFileError:
    """The error, with the command that builds for this machine; in another precision where one is given."""
    manifest = file.manifest
    sparse = " --sparse" if manifest.sparse else ""
    batch = ",".join(map(str, manifest.batch))
    return EngineFileError(
        what,
        f"rebuild it here: sparse-engine build CHECKPOINT{sparse} --backend {manifest.backend['name']} "
        f"--precision {precision or manifest.precision} --batch {batch} -o {file.path}",
    )
