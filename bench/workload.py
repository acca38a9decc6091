"""What is measured: one model, its masks baked, in the form that each runtime takes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from sparse_engine import sampling
from sparse_engine.artifact import SUFFIX
from sparse_engine.backends import Backend, BuildOptions, StepGraph, backend_named
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE, NoiseSource, weights_payload
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import EVERY, CalibrationData, collect
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS
from sparse_engine.engine import SparseEngine
from sparse_engine.export.bake import bake
from sparse_engine.export.build import export_baked, graph_for, write_built
from sparse_engine.export.model import Model
from sparse_engine.export.precision import lower
from sparse_engine.export.quantise import calibration_of
from sparse_engine.export.step_graph import step_of

from .peers import Feed, Subject

CALIBRATION_IMAGES, CALIBRATION_STEPS = 16, 16  # of trajectories: 64 samples
NETWORK_TIME = 500.0  # any: the work of a step does not depend on it
SEED = 0


class Workload:
    """A baked model; graphs are exported when they are first asked for."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.baked = bake(model)
        self._graphs: dict[str, StepGraph] = {}

    def graph(self, precision: str | None = None) -> StepGraph:
        """The step graph, its network in a precision; None takes any, where shapes are all that matters."""
        if precision is None:
            precision = next(iter(self._graphs), "fp32")
        if precision not in self._graphs:
            self._graphs[precision] = export_baked(self.model, self.baked, precision)
        return self._graphs[precision]

    def build_graph(self, backend: Backend, options: BuildOptions, folder: Path) -> tuple[StepGraph, Quantised | None]:
        """What a backend builds an engine from; in 8 bits on ranges that this model's own trajectories have."""
        wanted = data = None
        if options.precision in QUANTISED_PRECISIONS:
            wanted = Quantisation(self._calibration(folder))
            data = calibration_of(self.model, wanted)
        return graph_for(self.model, self.baked, backend, options, data, wanted, self._graphs)

    def _calibration(self, folder: Path) -> Path:
        """Collected with a float engine, once in a folder; of random weights, whose trajectories run away, noise."""
        path = folder / "calibration.npz"
        if path.exists():
            return path
        if self.trained:
            float_engine = folder / f"calibration{SUFFIX}"
            backend, options = backend_named("onnxruntime"), BuildOptions()
            write_built(float_engine, self.model, self.baked, self.graph("fp32"), backend, options)
            with SparseEngine.load(float_engine) as engine:
                collect(engine, images=CALIBRATION_IMAGES, steps=CALIBRATION_STEPS).save(path)
            float_engine.unlink()
        else:
            self._noise().save(path)
        return path

    def _noise(self) -> CalibrationData:
        images = np.arange(CALIBRATION_IMAGES * CALIBRATION_STEPS // EVERY)
        times = np.linspace(1, 0, len(images), endpoint=False)
        return CalibrationData(
            x=sampling.normal(SEED, images, 1, self.model.config.data_shape),
            times=times,
            network_times=np.float32(2 * NETWORK_TIME * times),
            conditioning=self.model.told(images, SEED),
            guidance=np.ones(len(images), np.float32),
            facts={"checkpoint_sha256": self.model.checkpoint.sha256, "masked": True, "seed": SEED},
        )

    def torch_step(self, precision: str = "fp32") -> nn.Module:
        """The same as a torch module, a fresh one."""
        network = lower(self.model.network(self.baked.state), self.model.family.float32_layers, precision)
        return step_of(network, self.model.config)

    @cached_property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that are 2:4."""
        return tuple(layer.name for layer in self.baked.sparse_layers)

    @property
    def trained(self) -> bool:
        """Whether the weights come from a file: random ones have no quality to lose."""
        return self.model.checkpoint.path.exists()

    def subject(self, folder: Path, device: str, threads: int, precision: str) -> Subject:
        """What a peer is given; ``write_onnx`` has filled the folder."""
        onnx_folder = folder / precision if precision in QUANTISED_PRECISIONS else folder
        return Subject(self.torch_step, onnx_folder / GRAPH_FILE, device, threads, precision, self.sparse_layers)

    def write_onnx(self, folder: Path, precision: str = "fp32") -> None:
        """Write the float32 step graph as any runtime reads it, and in a folder of its own one in 8 bits."""
        _write_graph(folder, self.graph("fp32"))
        if precision in QUANTISED_PRECISIONS:
            own = BuildOptions(sparse=True, precision=precision)
            (folder / precision).mkdir()
            _write_graph(folder / precision, self.build_graph(backend_named("onnxruntime"), own, folder)[0])

    def feed(self, images: np.ndarray) -> Feed:
        """A fixed step from the seed's noise of some images, in the order of the graph's inputs.

        x, t [, conditions, guidance], coef, clip, base, h1, h2, z; m is the network's own output.
        """
        batch = len(images)
        x = sampling.normal(SEED, images, 0, self.model.config.data_shape)
        feed: Feed = {"x": x, "t": np.full(batch, NETWORK_TIME, np.float32)}
        if told := self.model.told(images, SEED):
            rows = {name: np.ascontiguousarray(array[None]) for name, array in told.items()}
            feed |= {**rows, "guidance": np.ones(1, np.float32)}
        feed |= {"coef": np.array([0, 1, 1, 0, 0, 0, 0, 0], np.float32), "clip": np.array([-1e30, 1e30], np.float32)}
        return feed | {name: np.zeros_like(x) for name in ("base", "h1", "h2", "z")}

    def noise(self, images: np.ndarray) -> NoiseSource:
        """What a stochastic sampler draws for these images, the same for every runtime."""
        return lambda index: sampling.normal(SEED, images, index, self.model.config.data_shape)

    def describe(self) -> dict[str, Any]:
        """As results files hold it."""
        return {
            "family": self.model.family.name,
            "config": vars(self.model.config),
            "masked_layers": sum(layer.masked for layer in self.baked.layers),
            "macs": sum(layer.macs for layer in self.baked.layers),
        }


def _write_graph(folder: Path, graph: StepGraph) -> None:
    onnx.save_model(graph.proto, folder / GRAPH_FILE)
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        for chunk in weights_payload(graph.weights).chunks():
            stream.write(chunk)
