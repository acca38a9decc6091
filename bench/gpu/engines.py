"""Steps 5, 6 and 7: engine files, built and run as a user would: TensorRT for RTX, TensorRT, and all end to end."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions, StepGraph, TensorRTOptions, backend_named
from sparse_engine.bench.grid import PAPER_SAMPLER, PAPER_STEPS, random_model
from sparse_engine.bench.statistics import speedup, spread
from sparse_engine.bench.timing import interleave
from sparse_engine.bench.workload import Workload
from sparse_engine.errors import UnsupportedError
from sparse_engine.export.build import write_built
from sparse_engine.export.families.uvit import UViTConfig

from .measure import device_time
from .session import Results, Row, Session

RTX, TENSORRT, TORCH = "tensorrt-rtx", "tensorrt", "torch"
CAPABILITIES = ("8.0", "8.6", "8.9", None)  # plans for Ampere and Ada, and TensorRT for RTX's own choice
LINEARS = ("matmul", "gemm", "conv1x1")
CHUNK_STEPS = 12  # one recording of the device loop
END_TO_END = 256
SCHEDULE_TIME = 0.5


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
                _compare(session, row, TENSORRT, config, preset.batch, TensorRTOptions(static_batch=True))


def run_end_to_end(session: Session, results: Results) -> None:
    """Step 7: images a second of ``SparseEngine.sample``, and what the host adds to the device's time."""
    for backend, sparse in itertools.product((TORCH, TENSORRT, RTX), (True, False)):
        if results.wants(backend=backend, sparse=sparse):
            with results.row(backend=backend, sparse=sparse) as row:
                _end_to_end(session, row, backend, sparse)


def _compare(
    session: Session, row: Row, backend: str, config: UViTConfig, batch: int, tensorrt: TensorRTOptions
) -> None:
    """Sparse and dense engines of a backend: outputs against float32, the time of a recorded step, and the layers."""
    with tempfile.TemporaryDirectory() as name:
        runs: dict[str, Callable[[], object]] = {}
        engines = {}
        for kind, sparse in (("sparse", True), ("dense", False)):
            engines[kind] = engine = _engine(session, Path(name), backend, config, sparse, batch, tensorrt)
            row[f"{kind}_parity"] = _parity(session, Path(name), engine, config, batch)
            runs[kind] = _sampling(engine, batch, CHUNK_STEPS)
            started = time.perf_counter()
            runs[kind]()  # one by one; the next is recorded
            row[f"{kind}_first_milliseconds"] = 1e3 * (time.perf_counter() - started) / CHUNK_STEPS
            runs[kind]()
            info = engine.info
            row[f"{kind}_runtime"] = info["runtime"]
            row[f"{kind}_kernels"] = {layer["name"]: layer["kernel"] for layer in info["layers"] if layer["masked"]}
        runs = {kind: _sampling(engine, batch, CHUNK_STEPS) for kind, engine in engines.items()}
        timings = interleave(runs, repeats=3, seconds=session.seconds)
        row["milliseconds"] = {kind: spread(each / CHUNK_STEPS).to_dict() for kind, each in timings.runs.items()}
        row["speedup"] = speedup(timings.runs["dense"], timings.runs["sparse"]).to_dict()
        for engine in engines.values():
            engine.close()


def _end_to_end(session: Session, row: Row, backend: str, sparse: bool) -> None:
    batch = session.batches(64)[0]
    images, steps = (2 * batch, 4) if session.rehearsal else (END_TO_END, PAPER_STEPS)
    with (
        tempfile.TemporaryDirectory() as name,
        _closing(_engine(session, Path(name), backend, session.uvit_s(), sparse, batch, TensorRTOptions())) as engine,
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
    return Workload(random_model(config))


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


def _parity(session: Session, folder: Path, engine: SparseEngine, config: UViTConfig, batch: int) -> float:
    """The largest error of a prediction over its largest value, against PyTorch in float32."""
    x = np.random.default_rng(0).standard_normal((batch, *config.data_shape), np.float32)
    with _closing(_engine(session, folder, TORCH, config, True, batch, TensorRTOptions(), "fp32")) as reference:
        expected = reference.predict(x, SCHEDULE_TIME)
    return float(np.abs(engine.predict(x, SCHEDULE_TIME) - expected).max() / np.abs(expected).max())


def _sampling(engine: SparseEngine, images: int, steps: int, batch: int | None = None) -> Callable[[], object]:
    options: dict[str, Any] = {"steps": steps, "sampler": PAPER_SAMPLER, "batch_size": batch or images}
    return lambda: engine.sample(images, **options)


@contextmanager
def _closing(engine: SparseEngine) -> Iterator[SparseEngine]:
    with engine:
        yield engine
