"""The torch backend: what runs on a CPU is everything but the sparse products."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile, PayloadFile, write_engine
from sparse_engine.backends import BuildOptions, StepGraph, backend_named, usable_backend
from sparse_engine.backends.step_device import CaptureError, OutOfDeviceMemoryError, StepBuffers
from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.backends.torch.payload import NETWORK_FILE, read_network
from sparse_engine.backends.torch.runner import find_device
from sparse_engine.cli.main import run
from sparse_engine.errors import BackendError, EngineClosedError, EngineFileError, OptionError, UnsupportedError
from sparse_engine.export.bake import Baked
from sparse_engine.export.build import check_all_sparse, write_built
from sparse_engine.export.model import Model
from sparse_engine.images import psnr

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "sparsedm.pth"
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def digits(build: Callable[..., Path]) -> dict[str, Path]:
    return {name: build(DIGITS, sparse=True, backend=name) for name in ("torch", "onnxruntime")}


@pytest.fixture(scope="module")
def engines(
    small_model: tuple[Model, Baked], step_graph: Callable[[str], StepGraph], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Precision -> engine of one and the same model."""
    folder, backend = tmp_path_factory.mktemp("torch"), backend_named("torch")
    paths = {precision: folder / f"{precision}.sengine" for precision in ("fp32", "fp16", "bf16")}
    for precision, path in paths.items():
        write_built(path, *small_model, step_graph(precision), backend, BuildOptions(sparse=True, precision=precision))
    return paths


@pytest.fixture(scope="module")
def half(engines: dict[str, Path]) -> Path:
    return engines["fp16"]


def test_the_digits_model_is_what_onnxruntime_draws(digits: dict[str, Path]) -> None:
    with SparseEngine.load(digits["torch"]) as found, SparseEngine.load(digits["onnxruntime"]) as expected:
        x = np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32)
        for labels, guidance in ((3, None), (np.arange(4), 2.0)):
            eps = [engine.denoise(x, 0.4, labels=labels, guidance=guidance) for engine in (found, expected)]
            assert np.abs(eps[0] - eps[1]).max() <= 1e-5 * np.abs(eps[1]).max()
        for sampler, steps in (("dpm-solver", 10), ("euler-sde", 12), ("ddpm", 10)):
            options: dict[str, Any] = {"steps": steps, "sampler": sampler, "output": "float", "seed": 3}
            for _ in range(2):
                samples = [engine.sample(6, batch_size=4, **options) for engine in (found, expected)]
                assert np.abs(samples[0] - samples[1]).max() <= 1e-4 * np.abs(samples[1]).max()
        assert found.sample(3, steps=4).shape == (3, 8, 8, 1)


def test_layers_are_dense_on_a_cpu_and_the_report_says_why(digits: dict[str, Path]) -> None:
    with SparseEngine.load(digits["torch"], threads=1) as engine:
        engine.sample(2, steps=2)
        engine.sample(2, steps=2)
        info = engine.info
    masked = [layer for layer in info["layers"] if layer["masked"]]
    assert len(masked) == 20
    assert {(layer["kernel"], layer["why"]) for layer in masked} == {("dense", "no CUDA: the engine runs on cpu")}
    assert info["backend"]["name"] == "torch"
    runtime = info["runtime"]
    assert (runtime["device"], runtime["threads"], runtime["compiler"]) == ("cpu", 1, "none")
    assert runtime["steps"] == "one by one: no CUDA graphs on the CPU"


@pytest.mark.parametrize("precision,tolerance", [("fp16", 3e-3), ("bf16", 3e-2)])
def test_low_precision_is_close_to_float32(engines: dict[str, Path], precision: str, tolerance: float) -> None:
    with SparseEngine.load(engines[precision]) as low, SparseEngine.load(engines["fp32"]) as full:
        x = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
        found, expected = low.denoise(x, 0.4, labels=1), full.denoise(x, 0.4, labels=1)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert 1e-5 < error < tolerance
        options: dict[str, Any] = {"steps": 5, "output": "float", "sampler": "dpm-solver++", "labels": 1}
        samples = [engine.sample(2, **options) for engine in (low, full)]
        assert psnr(*samples, (float(samples[1].min()), float(samples[1].max()))) > 40


def test_the_payload_is_safetensors_of_packed_weights(half: Path, small_model: tuple[Model, Baked]) -> None:
    data = EngineFile(half).read(NETWORK_FILE)
    stored = safetensors.torch.load(data)
    assert {name for name in stored if "mid_block.mlp.fc1" in name} == {
        "mid_block.mlp.fc1.weight.values",
        "mid_block.mlp.fc1.weight.positions",
        "mid_block.mlp.fc1.bias",
    }
    values, positions = (stored[f"mid_block.mlp.fc1.weight.{part}"] for part in ("values", "positions"))
    assert (values.dtype, values.nbytes + positions.nbytes) == (torch.float16, 9 * 64 * 256 * 2 // 16)
    assert stored["patch_embed.proj.weight"].dtype == torch.float32  # an end of the network
    network = read_network(EngineFile(half))
    assert len(network.packed) == 12
    assert not network.quantised
    baked = small_model[1].state
    assert network.state.keys() == baked.keys()
    for name, tensor in network.state.items():
        assert torch.equal(tensor, torch.from_numpy(baked[name]).to(tensor.dtype)), name


def test_a_batch_split_for_memory_is_the_same_batch(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SparseEngine.load(half) as engine:
        expected = engine.sample(8, steps=6, sampler="euler-sde", output="float", batch_size=8)
        allocate = TorchDevice.allocate

        def limited(self: TorchDevice, shape: tuple[int, ...], dtype: type) -> torch.Tensor:
            if len(shape) == 4 and shape[0] > 3:
                raise OutOfDeviceMemoryError("cuda:0 has no memory left for this batch")
            return allocate(self, shape, dtype)

        monkeypatch.setattr(TorchDevice, "allocate", limited)
        engine._runner._forget()  # type: ignore[union-attr]
        found = engine.sample(8, steps=6, sampler="euler-sde", output="float", batch_size=8)
        assert engine.info["runtime"]["largest_batch"] == 2
    assert np.abs(found - expected).max() <= 2e-2 * np.abs(expected).max()  # fp16, and other batches round otherwise


def test_samples_stay_on_the_device_as_tensors(half: Path, conditional_engine: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "labels": 1}
    with SparseEngine.load(half) as engine:
        tensor = engine.sample(3, output="dlpack", **options)
        assert isinstance(tensor, torch.Tensor)
        assert np.array_equal(tensor.numpy(), engine.sample(3, output="float", **options))
        batches = [torch.from_dlpack(batch) for batch in engine.stream(5, batch_size=3, output="dlpack", **options)]
        assert [len(batch) for batch in batches] == [3, 2]
        with pytest.raises(OptionError, match=r"n = 5 is more than batch_size = 3\n.*use stream"):
            engine.sample(5, batch_size=3, output="dlpack", **options)
        with pytest.raises(OptionError, match="a decoder takes NumPy arrays"):
            engine.sample(1, output="dlpack", decoder=np.tanh, **options)
    with SparseEngine.load(conditional_engine) as engine:
        found = torch.from_dlpack(engine.sample(2, output="dlpack", **options))
        assert np.array_equal(found.numpy(), engine.sample(2, output="float", **options))


def test_closing_is_final(half: Path) -> None:
    engine = SparseEngine.load(half)
    stream = engine.stream(4, batch_size=2, steps=2)
    next(stream)
    engine.close()
    with pytest.raises(EngineClosedError):
        next(stream)


def test_automatic_choice_on_a_cpu_is_onnxruntime() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert usable_backend().name == "onnxruntime"
    assert usable_backend("torch").name == "torch"


@pytest.mark.parametrize(
    "device,message",
    [
        ("cuda:1", "device 'cuda:1': torch .* (is built without CUDA|finds no GPU)"),
        ("tpu", "device 'tpu': the torch backend runs on cpu, cuda and cuda:N"),
        ("cuda:x", "device 'cuda:x'"),
        ("cpu:0", "device 'cpu:0'"),
    ],
)
def test_devices_that_are_not_here(
    half: Path, device: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=message):
        SparseEngine.load(half, device=device)
    assert run(["sample", str(half), "--device", device]) == 2
    assert "error: device" in capsys.readouterr().err


def test_devices_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert find_device(None) == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UnsupportedError, match=r"this machine has 2 GPU\(s\), cuda:0 to cuda:1"):
        find_device("cuda:2")


def test_the_command_line_samples_on_a_device(half: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npz"
    command = ["sample", str(half), "-n", "3", "--steps", "3", "--device", "cpu", "--threads", "1", "-o", str(output)]
    assert run(command) == 0
    assert np.load(output)["samples"].shape == (3, 8, 8, 3)


def test_precisions_that_are_not_there(build: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="precision 'int4' is not supported by the torch backend; expected fp32"):
        build(DIGITS, backend="torch", precision="int4")
    with pytest.raises(OptionError, match="threads = 0"):
        backend_named("torch").load(None, threads=0, device="cpu", autotune=True)  # type: ignore[arg-type]


def test_require_sparse_is_an_error_where_layers_stay_dense(half: Path) -> None:
    with SparseEngine.load(half, device="cpu") as engine:
        layers = engine.info["layers"]
    with pytest.raises(UnsupportedError, match=r"12 masked layers stay dense, .*\(no CUDA: the engine runs on cpu\)"):
        check_all_sparse(layers)


def rewritten(path: Path, copy: Path, change: Callable[[bytes], bytes]) -> Path:
    """The same engine with another payload under a hash that fits it."""
    file = EngineFile(path)
    data = change(file.read(NETWORK_FILE))
    write_engine(copy, file.manifest, [PayloadFile(NETWORK_FILE, len(data), lambda: (data,), aligned=True)])
    return copy


def with_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def rewrite(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return rewrite


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda data: data[:4], "cannot be read"),
        (lambda data: struct.pack("<Q", 1 << 40) + data[8:], "a header of 1099511627776 bytes does not fit"),
        (lambda data: data[:9] + b"{" + data[10:], "cannot be read"),
        (lambda data: data[:-1000], "cannot lie at"),
        (with_header(lambda header: header["norm.weight"].update(dtype="F99")), "F99"),
        (with_header(lambda header: header.pop("norm.weight")), "1 weights are not those of its uvit network"),
        (with_header(lambda header: header.pop("mid_block.mlp.fc1.weight.positions")), "has values and no positions"),
        (with_header(lambda header: header["norm.weight"].update(shape=[8])), "cannot lie at"),
    ],
)
def test_damaged_payloads(half: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(EngineFileError, match=message):
        SparseEngine.load(rewritten(half, tmp_path / "x.sengine", change))


def test_an_altered_payload_is_found_by_check(half: Path, tmp_path: Path) -> None:
    data = bytearray(half.read_bytes())
    data[sum(EngineFile(half).span(NETWORK_FILE)) - 100] ^= 1
    (tmp_path / "x.sengine").write_bytes(data)
    with pytest.raises(EngineFileError, match=f"{NETWORK_FILE} was altered"):
        SparseEngine.load(tmp_path / "x.sengine", check=True)


class Doubling(torch.nn.Module):
    """A step of the right form."""

    def forward(self, x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, 3 * x


def test_the_step_falls_back_where_the_compiler_fails(caplog: pytest.LogCaptureFixture) -> None:
    device = TorchDevice(torch.device("cpu"), Doubling(), compiled=False)

    def broken(**buffers: torch.Tensor) -> None:
        raise ImportError("cannot find a C compiler\nand more")

    device._compiled = broken
    names = ("x", "t", "guidance", "coef", "clip", "base", "h1", "h2", "z", "x_next", "m")
    buffers = {name: torch.ones(2) for name in names}
    for _ in range(2):
        device.step(StepBuffers(conditioning={}, **buffers))
    assert buffers["x_next"].tolist() == [2, 2]
    assert buffers["m"].tolist() == [3, 3]
    assert device.describe() == {"compiler": "none: cannot find a C compiler"}
    assert len(caplog.records) == 1


def test_errors_of_torch_are_ours() -> None:
    device = TorchDevice(torch.device("cpu"), Doubling(), compiled=False)
    with pytest.raises(BackendError, match=r"cpu failed: .*"):
        device.copy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(OutOfDeviceMemoryError, match=r"no memory left for this batch\n.*smaller batch_size"):
        with device._current():
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CaptureError, match="no CUDA graphs on the CPU"):
        device.capture(lambda: None)


def test_uploads_are_of_their_own_memory() -> None:
    device = TorchDevice(torch.device("cpu"), Doubling(), compiled=False)
    buffer = device.allocate((4, 2), np.float32)
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    array.flags.writeable = False
    device.upload(buffer, array)
    found = device.download(device.row(buffer, 2))
    device.upload(buffer, np.zeros((4, 2), np.float32))
    assert found.tolist() == [4, 5]
