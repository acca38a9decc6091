"""Steps 5, 6 and 7: engine files, built and run as a user would: TensorRT for RTX, TensorRT, and all end to end."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from sparse_engine import SparseEngine, sampling
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named
from sparse_engine.bench.grid import PAPER_STEPS
from sparse_engine.bench.presets import PAPER_SAMPLER, random_uvit
from sparse_engine.bench.statistics import speedup, spread
from sparse_engine.bench.timing import interleave
from sparse_engine.bench.workload import Workload
from sparse_engine.errors import BackendError, UnsupportedError
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.write import write_built
from sparse_engine.files import scratch_folder
from sparse_engine.images import psnr

from .measure import device_time
from .session import Results, Row, Session

RTX, TENSORRT, TORCH = "tensorrt-rtx", "tensorrt", "torch"
CAPABILITIES = ("8.0", "8.6", "8.9", None)  # plans for Ampere and Ada, and TensorRT for RTX's own choice
LINEARS = ("matmul", "gemm", "conv1x1")
CHUNK_STEPS = 12  # one recording of the device loop
STEP_SAMPLER = "euler-ode"  # the paper's without its noise, which the host or the device would draw in between
REFERENCE_IMAGES = 4  # of a batch, sampled in float32
_EAGER = "eager "
END_TO_END = 256
SCHEDULE_TIME = 0.5
TOLERATED = 3e-2  # of the largest prediction, in fp16


def run_rtx(session: Session, results: Results) -> None:
    """Step 5: which plans of TensorRT for RTX does this GPU take?"""
    for capability in CAPABILITIES:
        key = {"backend": RTX, "compute_capability": capability or "default"}
        if results.wants(**key):
            with results.row(**key) as row:
                tensorrt = TensorRTOptions(compute_capabilities=(capability,) if capability else ())
                _compare(session, row, RTX, session.uvit_s(), session.batches(16)[0], tensorrt)


def run_tensorrt(session: Session, results: Results) -> None:
    """Step 6: TensorRT's own, in each form of a linear layer; then the paper's grid."""
    for linear, batch in itertools.product(LINEARS, session.batches(16, 1, 64)):
        key: Row = {"backend": TENSORRT, "linear": linear, "batch": batch}
        if results.wants(**key):
            with results.row(**key) as row:
                _compare(session, row, TENSORRT, session.uvit_s(), batch, TensorRTOptions(linear=linear))
    preset = session.preset("paper")
    for patch, mlp_ratio in session.cells():
        key = {"backend": TENSORRT, "patch": patch, "mlp_ratio": mlp_ratio}
        if results.wants(**key):
            with results.row(**key) as row:
                config = preset.config(patch, mlp_ratio)
                options = TensorRTOptions(static_batch=True)
                _compare(session, row, TENSORRT, config, preset.batch, options, CHUNK_STEPS)  # which last long enough


def run_end_to_end(session: Session, results: Results) -> None:
    """Step 7: images a second of ``SparseEngine.sample``, and what the host adds to the device's time."""
    for backend, sparse in itertools.product((TORCH, TENSORRT, RTX), (True, False)):
        if results.wants(backend=backend, sparse=sparse):
            with results.row(backend=backend, sparse=sparse) as row:
                _end_to_end(session, row, backend, sparse)


def _compare(
    session: Session,
    row: Row,
    backend: str,
    config: UViTConfig,
    batch: int,
    tensorrt: TensorRTOptions,
    steps: int = 4 * CHUNK_STEPS,
) -> None:
    """Sparse and dense engines of a backend: outputs against float32, the times of their steps, and the layers."""
    with scratch_folder() as folder, contextlib.ExitStack() as held:
        reference = Reference.make(session, folder, config, batch)
        engines = {}
        for kind, sparse in (("sparse", True), ("dense", False)):
            engine = _engine(session, folder, backend, config, sparse, batch, tensorrt)
            engines[kind] = held.enter_context(engine)
            row |= {f"{kind}_parity": reference.parity(engine), f"{kind}_psnr": reference.psnr(engine)}
            if not row[f"{kind}_parity"] <= TOLERATED:
                error = f"{kind} computes something else: relative error {row[f'{kind}_parity']:.1e}"
                raise BackendError(error, "no time of it is worth anything")
        _time_steps(session, row, engines, batch, steps)
        for kind, engine in engines.items():
            info = engine.info
            row[f"{kind}_runtime"] = info["runtime"]
            row[f"{kind}_kernels"] = {layer["name"]: layer["kernel"] for layer in info["layers"] if layer["masked"]}


def _time_steps(session: Session, row: Row, engines: dict[str, SparseEngine], batch: int, steps: int) -> None:
    """Milliseconds of a step of each engine, recorded and one by one, all measured in turn.

    The sampler draws nothing and starts from noise that is there, so that hardly anything but steps is timed.
    """
    recorded = {kind: _stepping(engine, batch, steps, recorded=True) for kind, engine in engines.items()}
    for kind, run in recorded.items():
        started = time.perf_counter()
        run()  # a chunk is recorded when it comes for the second time
        row[f"{kind}_first_milliseconds"] = 1e3 * (time.perf_counter() - started) / steps
        run()
    eager = {kind: _stepping(engine, batch, steps, recorded=False) for kind, engine in engines.items()}
    both = recorded | {_EAGER + kind: run for kind, run in eager.items()}
    runs = interleave(both, repeats=3, seconds=session.seconds).runs
    row |= {"sampler": STEP_SAMPLER, "steps": steps}
    row["milliseconds"] = {kind: spread(runs[kind] / steps).to_dict() for kind in engines}
    row["eager_milliseconds"] = {kind: spread(runs[_EAGER + kind] / steps).to_dict() for kind in engines}
    row["speedup"] = speedup(runs["dense"], runs["sparse"]).to_dict()
    for run in recorded.values():
        run()  # what is said of the engines is of this


def _stepping(engine: SparseEngine, batch: int, steps: int, *, recorded: bool) -> Callable[[], object]:
    noise = sampling.normal(0, np.arange(batch), 0, engine.manifest.data_shape)
    options: dict[str, Any] = {"steps": steps, "sampler": STEP_SAMPLER, "batch_size": batch, "output": "float"}
    runner: Any = engine._runner

    def run() -> None:
        runner.records = recorded
        engine.sample(batch, noise=noise, **options)

    return run


@dataclass(frozen=True)
class Reference:
    """What PyTorch makes of a network's baked weights in float32.

    Attributes:
        x: float32 [B, C, H, W].
        predicted: the network's output for x at ``SCHEDULE_TIME``.
        samples: the first images of a seed by the paper's sampler, float32 [n, C, H, W].
    """

    x: np.ndarray
    predicted: np.ndarray
    samples: np.ndarray

    @classmethod
    def make(cls, session: Session, folder: Path, config: UViTConfig, batch: int) -> Reference:
        """Build and run the engine that is the reference; its memory is given back."""
        x = np.random.default_rng(0).standard_normal((batch, *config.data_shape), np.float32)
        with _closing(_engine(session, folder, TORCH, config, True, batch, TensorRTOptions(), "fp32")) as engine:
            return cls(x, engine.predict(x, SCHEDULE_TIME), _samples(engine, min(batch, REFERENCE_IMAGES)))

    def parity(self, engine: SparseEngine) -> float:
        """The largest error of an engine's prediction over the largest value."""
        error = np.abs(engine.predict(self.x, SCHEDULE_TIME) - self.predicted).max()
        return float(error / np.abs(self.predicted).max())

    def psnr(self, engine: SparseEngine) -> float | None:
        """Of an engine's samples, in dB over the range of the reference's; None where the two are equal."""
        pixels = (float(self.samples.min()), float(self.samples.max()))
        found = psnr(_samples(engine, len(self.samples)), self.samples, pixels)
        return found if np.isfinite(found) else None


def _samples(engine: SparseEngine, images: int) -> np.ndarray:
    """The first images of a seed after ``PAPER_STEPS`` steps."""
    return engine.sample(images, steps=PAPER_STEPS, sampler=PAPER_SAMPLER, batch_size=images, output="float")


def _end_to_end(session: Session, row: Row, backend: str, sparse: bool) -> None:
    batch = session.batches(64)[0]
    images, steps = (2 * batch, 4) if session.rehearsal else (END_TO_END, PAPER_STEPS)
    with (
        scratch_folder() as folder,
        _closing(_engine(session, folder, backend, session.uvit_s(), sparse, batch, TensorRTOptions())) as engine,
    ):
        whole = _sampling(engine, images, steps, batch)
        whole()
        whole()  # the first enqueues, the second records
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timings = interleave({"sample": whole}, repeats=3, seconds=session.seconds)
        seconds = float(np.median(timings.runs["sample"]))
        calls = images // batch * steps
        row |= {"images": images, "steps": steps, "batch": batch, "precision": _precision(session)}
        row |= {"seconds_of_all": seconds, "images_per_second": images / seconds, "sampler": PAPER_SAMPLER}
        busy = sum(device_time(whole, session.device).values()) / 1e3
        row["step_milliseconds"] = 1e3 * seconds / calls
        row["host_overhead_milliseconds_per_step"] = 1e3 * max(seconds - busy, 0.0) / calls
        if session.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(session.device)
            row["memory"] = {"in_use": total - free, "torch_peak": torch.cuda.max_memory_allocated()}
        row["runtime"] = {key: value for key, value in engine.info["runtime"].items() if key != "layers"}


def _precision(session: Session) -> str:
    return "fp32" if session.rehearsal else "fp16"


@cache
def _workload(config: UViTConfig) -> Workload:
    return Workload(random_uvit(config).model())


def _engine(
    session: Session,
    folder: Path,
    backend: str,
    config: UViTConfig,
    sparse: bool,
    batch: int,
    tensorrt: TensorRTOptions,
    precision: str | None = None,
) -> SparseEngine:
    chosen = backend_named(backend)
    found = chosen.availability()
    if not (found.usable or found.builds):
        raise UnsupportedError(f"{backend}: {found.reason}", found.fix)
    device = "cpu" if session.device.type == "cpu" else None
    options = BuildOptions(
        sparse, precision or _precision(session), (batch, batch, batch), device=device, tensorrt=tensorrt
    )
    chosen.check(options)
    workload = _workload(config)
    path = folder / f"{backend}-{sparse}-{options.precision}.sengine"
    if backend == TORCH:
        graph = weights_alone(workload, options.precision)
    else:
        graph = workload.graph(chosen.graph_precision(options))
    write_built(path, workload.model, workload.baked, graph, chosen, options)
    return SparseEngine.load(path, device=device)


def weights_alone(workload: Workload, precision: str) -> StepGraph:
    """What the torch backend reads of a step graph: no export, which takes half a minute and other packages."""
    network = workload.torch_step(precision).get_submodule("network")
    layers = {
        name: each for name, each in network.named_modules() if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
    }
    weights = {f"{name}.weight": each.weight.detach().numpy() for name, each in layers.items()}
    return StepGraph(ModelProto(), weights, {name: (f"{name}.weight", 1) for name in layers}, workload.baked.state)


def _sampling(engine: SparseEngine, images: int, steps: int, batch: int | None = None) -> Callable[[], object]:
    options: dict[str, Any] = {"steps": steps, "sampler": PAPER_SAMPLER, "batch_size": batch or images}
    return lambda: engine.sample(images, **options)


@contextmanager
def _closing(engine: SparseEngine) -> Iterator[SparseEngine]:
    with engine:
        yield engine
