"""Our own engines as candidates: the same weights and fusions, once with sparse kernels and once with dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_engine.backends import Backend, BuildOptions, backend_named, usable_backend
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import SparseEngineError, UnsupportedError
from sparse_engine.export.build import write_built

from .peers import Feed
from .settings import Settings
from .workload import NETWORK_TIME, SEED, Workload

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx")
SPARSE, DENSE, AGAIN = "2:4 sparse", "dense", "dense again"


class Arm:
    """One engine file, loaded afresh as often as asked.

    Attributes:
        name: in results.
        path: the engine file.
        backend, precision: what it was built for.
    """

    def __init__(self, name: str, path: Path, backend: str, precision: str, threads: int | None) -> None:
        self.name, self.path, self.backend, self.precision = name, path, backend, precision
        self._threads = threads
        self.engine = SparseEngine.load(path, threads=threads)

    def reload(self) -> None:
        """Give the engine's memory back and load it again, wherever that puts it."""
        self.engine.close()
        self.engine = SparseEngine.load(self.path, threads=self._threads)

    def step(self, feed: Feed) -> np.ndarray:
        """One solver step; the network's output, float32 [B, C, H, W]."""
        schedule = self.engine.schedule
        t = (NETWORK_TIME - schedule.time_shift) / schedule.time_scale
        return self.engine.predict(feed["x"], t, conditioning=self._told(feed))

    def sample(self, feed: Feed, steps: int, sampler: str) -> np.ndarray:
        """A whole sample from the feed's x; float32 [B, C, H, W]."""
        x = feed["x"]
        options: dict[str, Any] = {"steps": steps, "sampler": sampler, "batch_size": len(x), "output": "float"}
        options["allow_nonfinite"] = True  # random weights may diverge, and are timed; of trained ones quality tells
        return self.engine.sample(len(x), seed=SEED, noise=x, conditioning=self._told(feed), **options)

    def _told(self, feed: Feed) -> dict[str, np.ndarray]:
        return {each.name: feed[each.name][0] for each in self.engine.manifest.conditions}

    def kernels(self) -> dict[str, int]:
        """How many of the masked layers run which kernel."""
        ran = [str(layer["kernel"]) for layer in self.engine.info["layers"] if layer["masked"]]
        return {kernel: ran.count(kernel) for kernel in dict.fromkeys(ran)}

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        on_gpu = self.backend in GPU_BACKENDS or str(self.engine.info["runtime"]["device"]).startswith("cuda")
        return "cuda" if on_gpu else "cpu"

    def describe(self) -> dict[str, Any]:
        """As results files hold it."""
        return {"backend": self.backend, "precision": self.precision, "device": self.device}


def check_backends(names: Sequence[str]) -> None:
    """Say before the work that a backend is none, or that the first cannot run here. Raises InputError."""
    usable_backend(names[0])
    for name in names[1:]:
        backend_named(name)


def runs_on_gpu(name: str) -> bool:
    """Whether a backend, by the name that ``--backend`` takes, keeps weights and activations on a GPU here."""
    backend = usable_backend(name).name
    return backend in GPU_BACKENDS or (backend == "torch" and torch.cuda.is_available())


def build_arms(
    folder: Path, workload: Workload, batch: int, settings: Settings, skipped: dict[str, str]
) -> dict[str, Arm]:
    """Sparse and dense engines of each backend, the first backend's under the plain names.

    Raises SparseEngineError where the first backend cannot build; another's reason goes into ``skipped``.
    """
    arms: dict[str, Arm] = {}
    for index, wanted in enumerate(settings.backends):
        names = (SPARSE, DENSE) if not settings.self_test else (AGAIN, DENSE)
        if index:
            names = tuple(f"{name} ({wanted})" for name in names)  # type: ignore[assignment]
        try:
            backend = usable_backend(wanted)
            for name, sparse in zip(names, (not settings.self_test, False), strict=True):
                arms[name] = _build(folder, name, workload, backend, sparse, batch, settings)
        except SparseEngineError as error:
            if not index:
                raise
            skipped[names[0]] = error.what
    return arms


def _build(
    folder: Path, name: str, workload: Workload, backend: Backend, sparse: bool, batch: int, settings: Settings
) -> Arm:
    options = BuildOptions(sparse, settings.precision, (batch, batch, batch))
    if sparse or can_build(backend, options):
        backend.check(options)
    else:
        options = BuildOptions(sparse, "fp32", options.batch)
    path = folder / f"{name.replace(':', '')} {batch}.sengine"
    graph, quantised = workload.build_graph(backend, options, folder)
    write_built(path, workload.model, workload.baked, graph, backend, options, quantised)
    return Arm(name, path, backend.name, options.precision, settings.threads)


def can_build(backend: Backend, options: BuildOptions) -> bool:
    """Whether a backend has what is asked for: ONNX Runtime has no dense bf16 on a CPU, for one."""
    try:
        backend.check(options)
    except UnsupportedError:
        return False
    return True
