"""A network that is told a label and a text with its mask, through every runner: no runner knows a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from sparse_engine import SparseEngine, sampling, tactics
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, StepGraph
from sparse_engine.backends.cuda.device import tensors
from sparse_engine.backends.cuda.runner import CudaRunner
from sparse_engine.backends.onnx_graph import STEP_INPUTS
from sparse_engine.backends.onnxruntime.runner import OnnxRuntimeRunner
from sparse_engine.backends.step_device import StepBuffers
from sparse_engine.backends.tensorrt.builder import _configure
from sparse_engine.backends.tensorrt.device import TensorRTDevice
from sparse_engine.backends.tensorrt.libraries import TENSORRT
from sparse_engine.bench.arms import Arm
from sparse_engine.bench.peers.base import Peer
from sparse_engine.bench.peers.onnxruntime_plain import PLAIN
from sparse_engine.bench.peers.torch_dense import EAGER
from sparse_engine.bench.workload import Workload
from sparse_engine.calibration.collect import collect, load_calibration
from sparse_engine.conditioning import Condition
from sparse_engine.errors import EngineFileError, OptionError
from sparse_engine.export import families
from sparse_engine.export.bake import bake
from sparse_engine.export.build import export_baked
from sparse_engine.export.families import Family, Recipe
from sparse_engine.export.families.uvit import Mlp, timestep_embedding
from sparse_engine.export.model import load_model
from sparse_engine.triton import configuration
from tests.backends.fake_builder import FakeTensorRTBuilder
from tests.backends.fake_cuda import FakeCuda, FakeEngine
from tests.conftest import save_network

CLASSES, NULL, LENGTH, WIDTH, DIM = 5, 4, 6, 12, 32
SHAPE = (3, 4, 4)


@dataclasses.dataclass(frozen=True)
class ToldConfig:
    size: int = 4

    @property
    def data_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (
            Condition("y", (), "int64", classes=CLASSES),
            Condition("context", (LENGTH, WIDTH), null="zeros", mask="context_mask"),
            Condition("context_mask", (LENGTH,), null="ones", default=1.0),
        )

    @property
    def guided_channels(self) -> int | None:
        return None


class Cross(nn.Module):
    """One head over the text; what the mask leaves out weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(WIDTH, 2 * DIM)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        k, v = self.kv(context).chunk(2, dim=-1)
        scores = self.q(x) @ k.transpose(1, 2) * DIM**-0.5 + (mask[:, None].to(x.dtype) - 1) * 1e4
        return scores.float().softmax(-1).to(x.dtype) @ v


class Told(nn.Module):
    """forward(x, t, y, context, context_mask) -> [B, 6, H, W]: three channels more than x has."""

    dtype = torch.float32

    def __init__(self, config: ToldConfig) -> None:
        super().__init__()
        self.size = config.size
        self.enter, self.label = nn.Linear(3, DIM), nn.Embedding(CLASSES, DIM)
        self.cross, self.mlp, self.leave = Cross(), Mlp(DIM, 2 * DIM), nn.Linear(DIM, 6)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        tokens = self.enter(x.flatten(2).transpose(1, 2)) + (timestep_embedding(t, DIM) + self.label(y))[:, None]
        tokens = tokens + self.cross(tokens, context, context_mask)
        return self.leave(tokens + self.mlp(tokens)).transpose(1, 2).unflatten(2, (self.size, self.size))


FAMILY = Family(
    name="told",
    sparse_layers=("mlp.fc1", "mlp.fc2"),
    recognises=lambda shapes: "cross.kv.weight" in shapes,
    read_config=lambda shapes, given: (ToldConfig(), []),
    config_from_dict=lambda values: ToldConfig(**values),
    network=Told,
    recipe=lambda config: Recipe(null_class=NULL),
    positions=lambda config, layer: 16,
    float32_layers=("label",),
    settings=frozenset(),
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", (FAMILY, *families.FAMILIES))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tactics.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("told") / "told.pth", Told(ToldConfig()))


@pytest.fixture(scope="module")
def files(registered: None, checkpoint: Path, build: Callable[..., Path]) -> dict[str, Path]:
    return {name: build(checkpoint, heads=None, sparse=True, backend=name) for name in ("onnxruntime", "torch")}


@pytest.fixture(scope="module")
def graph(registered: None, checkpoint: Path) -> StepGraph:
    model = load_model(checkpoint)
    return export_baked(model, bake(model), "fp32")


def said(n: int) -> dict[str, np.ndarray]:
    lengths = 1 + np.arange(n) % LENGTH
    return {
        "y": np.arange(n) % NULL,
        "context": sampling.normal(3, np.arange(n), 0, (LENGTH, WIDTH)),
        "context_mask": (np.arange(LENGTH) < lengths[:, None]).astype(np.float32),
    }


def expected(checkpoint: Path, x: np.ndarray, t: float, told: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the module itself, with the baked weights."""
    model = load_model(checkpoint)
    network = model.network(bake(model).state)
    with torch.no_grad():
        times = torch.full((len(x),), t * 999)
        found = network(torch.from_numpy(x), times, **{name: torch.from_numpy(rows) for name, rows in told.items()})
    predicted: np.ndarray = found[:, :3].numpy()
    return predicted


def close_to(found: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> bool:
    return found.shape == wanted.shape and float(np.abs(found - wanted).max()) <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_each_condition_reaches_the_network(backend: str, files: dict[str, Path], checkpoint: Path) -> None:
    x, told = sampling.normal(1, np.arange(5), 0, SHAPE), said(5)
    nulls = {
        "y": np.full(5, NULL),
        "context": np.zeros_like(told["context"]),
        "context_mask": np.ones_like(told["context_mask"]),
    }
    first, second = (expected(checkpoint, x, 0.4, each) for each in (told, nulls))
    with SparseEngine.load(files[backend]) as engine:
        assert close_to(engine.predict(x, 0.4, conditioning=told), first)
        assert close_to(engine.predict(x, 0.4, conditioning=told, guidance=2.5), 2.5 * first - 1.5 * second)
        for name, rows in told.items():
            changed = {**told, name: rows[::-1].copy()}
            wanted = expected(checkpoint, x, 0.4, changed)
            assert not close_to(wanted, first, 1e-3)
            assert close_to(engine.predict(x, 0.4, conditioning=changed), wanted)
        mine = {"negative": {"y": told["y"], "context": told["context"][:1], "context_mask": told["context_mask"][:1]}}
        refused = {"y": told["y"], **{name: np.repeat(told[name][:1], 5, 0) for name in ("context", "context_mask")}}
        guided = engine.predict(x, 0.4, conditioning=told, guidance=2.0, **mine)
        assert close_to(guided, 2 * first - expected(checkpoint, x, 0.4, refused))


def test_samples_of_mixed_seeds_are_those_of_each_alone(files: dict[str, Path]) -> None:
    told, fast = said(3), {"steps": 3, "sampler": "euler-sde", "output": "float", "guidance": 1.5}
    drawn = {}
    for name, path in files.items():
        with SparseEngine.load(path) as engine:
            drawn[name] = engine.sample(3, seed=[7, 2**63, 7], conditioning=told, **fast)
            for index, seed in enumerate((7, 2**63, 7)):
                own = {key: rows[index] for key, rows in told.items()}
                alone = engine.sample(1, seed=seed, conditioning=own, **fast)
                assert close_to(alone, drawn[name][index : index + 1], 1e-6)
    assert close_to(drawn["torch"], drawn["onnxruntime"], 1e-4)


@pytest.mark.parametrize(
    "changed,words",
    [
        ({"shape": [LENGTH, WIDTH + 1]}, r"context float \[6, 13\]"),
        ({"name": "text"}, r"text float \[6, 12\]"),
        ({"dtype": "int64"}, r"context int64 \[6, 12\]"),
    ],
)
def test_the_graph_and_the_manifest_have_to_agree(files: dict[str, Path], changed: dict[str, Any], words: str) -> None:
    file = EngineFile(files["onnxruntime"])
    entries = [dict(entry) for entry in file.manifest.conditioning]
    entries[1].update(changed)
    file.manifest = dataclasses.replace(file.manifest, conditioning=entries)
    takes = (
        r"its graph takes samples of \[3, 4, 4\] and y int64 \[\], context float \[6, 12\], context_mask float \[6\]"
    )
    with pytest.raises(
        EngineFileError, match=f"{takes}, its manifest says .* and y int64 \\[\\], {words}, context_mask"
    ):
        OnnxRuntimeRunner(file, threads=1, autotune=False)


def test_a_plans_profile_has_each_condition(graph: StepGraph) -> None:
    trt = FakeTensorRTBuilder("10.14.1", FakeCuda())
    builder = trt.Builder(None)  # type: ignore[arg-type]
    network = builder.create_network(1)
    for value in graph.proto.graph.input:
        sizes = tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim)
        network._inputs.append(SimpleNamespace(name=value.name, shape=sizes))
    config = _configure(trt, TENSORRT, builder, network, BuildOptions(True, "fp16", (1, 4, 8)), True)
    shapes = config._profiles[0].shapes
    assert shapes["y"] == ((1, 1), (2, 4), (2, 8))
    assert shapes["context"] == ((1, 1, LENGTH, WIDTH), (2, 4, LENGTH, WIDTH), (2, 8, LENGTH, WIDTH))
    assert shapes["context_mask"] == ((1, 1, LENGTH), (2, 4, LENGTH), (2, 8, LENGTH))
    assert shapes["guidance"] == ((1,), (2,), (2,))
    assert shapes["x"] == ((1, *SHAPE), (4, *SHAPE), (8, *SHAPE))
    assert shapes["t"] == ((1,), (4,), (8,))
    assert not {"coef", "clip"} & shapes.keys()


def step(x, t, y, context, context_mask, guidance, coef, clip, base, h1, h2, z) -> tuple[np.ndarray, np.ndarray]:
    """In NumPy, of every input."""
    rows = y + (context.mean(-1) * context_mask).sum(-1)
    eps = 0.5 * np.tanh(x) + 0.01 * np.einsum("g,gb->b", guidance, rows)[:, None, None, None]
    m = np.clip(coef[0] * x + coef[1] * (eps + 1e-3 * t[:, None, None, None]), *clip)
    return coef[2] * x + coef[3] * base + coef[4] * m + coef[5] * h1 + coef[6] * h2 + coef[7] * z, m


@pytest.mark.parametrize("batch", [3, 9])  # of one part; of three, the last filled up
def test_a_gpu_is_given_every_condition(batch: int) -> None:
    cuda, dtypes = FakeCuda(), {each.name: np.dtype(each.dtype) for each in ToldConfig().conditions}
    engine = FakeEngine(cuda, step, dtypes)
    runner = CudaRunner([TensorRTDevice(cuda, engine, 0, "user managed")], (1, 2, 4), {"library": "fake"})
    table = sampling.make_trajectory("euler-sde", sampling.VPLinear(), 6)
    x, guidance = sampling.normal(1, np.arange(batch), 0, SHAPE), np.array([1.5, -0.5], np.float32)
    noise = sampling.noise.SeededNoise(np.arange(batch, dtype=np.uint64), np.arange(batch), SHAPE)
    for shift in range(3):  # enqueued, recorded, launched: what is told is no part of a recording
        told = {name: np.stack([np.roll(rows, shift, 0), rows[::-1]]) for name, rows in said(batch).items()}
        found = runner.run(table, x, conditioning=told, guidance=guidance, noise=noise)

        def on_host(x, t, coef, clip, base, h1, h2, z, told=told):
            return step(x, t, **told, guidance=guidance, coef=coef, clip=clip, base=base, h1=h1, h2=h2, z=z)

        assert close_to(found, sampling.walk(table, on_host, x, noise=noise))
    runner.close()
    assert cuda.leaks() == {}


def test_the_names_of_a_steps_buffers() -> None:
    parts = ("x", "t", "guidance", "coef", "clip", "base", "h1", "h2", "z", "x_next", "m")
    buffers: StepBuffers[Any] = StepBuffers(**{name: name for name in parts}, conditioning={"context": 1, "pooled": 2})
    assert tensors(buffers) == {**{name: name for name in parts}, "context": 1, "pooled": 2}
    alone = dataclasses.replace(buffers, conditioning={})
    assert tensors(alone) == {name: name for name in parts if name != "guidance"}


def test_triton_is_told_of_each_condition(files: dict[str, Path]) -> None:
    text = configuration(EngineFile(files["onnxruntime"]).manifest, "told")
    assert 'name: "y" data_type: TYPE_INT64 dims: [ -1, -1 ]' in text
    assert f'name: "context" data_type: TYPE_FP32 dims: [ -1, -1, {LENGTH}, {WIDTH} ]' in text
    assert f'name: "context_mask" data_type: TYPE_FP32 dims: [ -1, -1, {LENGTH} ]' in text
    assert 'name: "guidance" data_type: TYPE_FP32 dims: [ -1 ]' in text


def test_calibration_keeps_every_condition(files: dict[str, Path], tmp_path: Path) -> None:
    with SparseEngine.load(files["onnxruntime"]) as engine:
        told = {name: rows for name, rows in said(16).items() if name != "y"}
        data = collect(engine, images=16, steps=8, conditioning=told)
        with pytest.raises(OptionError, match="negative is given without guidance"):
            collect(engine, images=16, steps=8, conditioning=told, negative={"y": 1}, guidance=[1.0])
        manifest = engine.manifest
    assert set(data.guidance.tolist()) == {1.0, 2.0}
    nulls = data.conditioning["y"] == NULL
    assert nulls.sum() == len(data) // 4  # half of the guided half
    assert not data.conditioning["context"][nulls].any()
    assert data.conditioning["context"][~nulls].any(axis=(1, 2)).all()
    assert (data.conditioning["context_mask"][nulls] == 1).all()
    data.save(tmp_path / "told.npz")
    again = load_calibration(
        tmp_path / "told.npz",
        checkpoint_sha256=manifest.checkpoint_sha256,
        data_shape=SHAPE,
        conditions=manifest.conditions,
    )
    for name, rows in data.conditioning.items():
        assert np.array_equal(again.conditioning[name], rows)
        assert again.conditioning[name].dtype == rows.dtype


@pytest.mark.parametrize("peer", [PLAIN, EAGER], ids=lambda peer: peer.name)
def test_what_it_is_measured_against_is_told_the_same(
    peer: Peer, files: dict[str, Path], checkpoint: Path, tmp_path: Path
) -> None:
    workload = Workload(load_model(checkpoint))
    workload.write_onnx(tmp_path)
    feed = workload.feed(np.arange(7))
    assert [each for each in feed if each not in STEP_INPUTS] == ["y", "context", "context_mask"]
    assert feed["y"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert (feed["context_mask"] == 1).all()
    assert 0.8 < feed["context"].std() < 1.2
    runner = peer.prepare(workload.subject(tmp_path, "cpu", 1, "fp32"))
    arm = Arm("sparse", files["onnxruntime"], "onnxruntime", "fp32", 1)
    assert close_to(runner.step(feed), arm.step(feed), 1e-4)
    arm.engine.close()


def test_the_graphs_inputs_are_the_conditions_in_their_order(graph: StepGraph) -> None:
    names = [value.name for value in graph.proto.graph.input]
    assert names[:6] == ["x", "t", "y", "context", "context_mask", "guidance"]
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.proto.graph.input}
    assert kinds["y"] == onnx.TensorProto.INT64
    assert kinds["context_mask"] == onnx.TensorProto.FLOAT
