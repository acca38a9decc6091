"""int8 and fp8 in the torch backend: a CPU runs what the codes stand for, fakes stand in for the GPU's products."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import BuildOptions, StepGraph, backend_named
from sparse_engine.backends import torch as torch_backend
from sparse_engine.backends.torch import candidates, choose, fused, network, products, quantised
from sparse_engine.backends.torch.choose import Chooser
from sparse_engine.backends.torch.codes import QuantisedWeight, quantise, quantised_weights
from sparse_engine.backends.torch.layers import QuantisedLayer
from sparse_engine.backends.torch.packing import pack, unpack
from sparse_engine.backends.torch.payload import NETWORK_FILE, read_network
from sparse_engine.backends.torch.quantised import CusparseltCodesProduct, DenseCodesProduct, DequantisedProduct
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import CalibrationData, collect
from sparse_engine.calibration.formats import FLOAT8, INT8, Format
from sparse_engine.calibration.observe import layer_inputs, layer_outputs, predictions, run_network
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.cli.main import run
from sparse_engine.errors import BackendError, EngineFileError, UnsupportedError
from sparse_engine.export.bake import Baked
from sparse_engine.export.masks import is_n_of_m
from sparse_engine.export.model import Model
from sparse_engine.export.quantise import describe_quantised
from sparse_engine.export.quantise import quantise as quantise_model
from sparse_engine.export.write import check_all_sparse, write_built
from sparse_engine.tactics import Choice
from tests.backends.fake_recorder import FakeRecorder
from tests.backends.test_torch import rewritten, with_header
from tests.backends.test_torch_packing import two_of_four

FORMATS = {"int8": INT8, "fp8": FLOAT8}
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclasses.dataclass(frozen=True)
class Built:
    """An engine, and the Q/DQ graph of the same quantisation."""

    path: Path
    quantised: Quantised


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def data(
    small_model: tuple[Model, Baked], step_graph: Callable[[str], StepGraph], tmp_path_factory: pytest.TempPathFactory
) -> CalibrationData:
    path = tmp_path_factory.mktemp("calibrated") / "fp32.sengine"
    write_built(path, *small_model, step_graph("fp32"), backend_named("onnxruntime"), BuildOptions(sparse=True))
    with SparseEngine.load(path, threads=1, autotune=False) as engine:
        return collect(engine, images=20, steps=8, sampler="ddim")


@pytest.fixture(scope="module")
def build_quantised(
    small_model: tuple[Model, Baked],
    step_graph: Callable[[str], StepGraph],
    data: CalibrationData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Build:
    """Precision -> engine; ``between`` is what the layers that are not in 8 bits compute in."""

    def make(precision: str, between: str = "fp16", **wanted: Any) -> Built:
        folder, backend = tmp_path_factory.mktemp(precision), backend_named("torch")
        data.save(folder / "calib.npz")
        asked, options = Quantisation(folder / "calib.npz", **wanted), BuildOptions(sparse=True, precision=precision)
        graphs = step_graph("fp32"), step_graph(between)
        made = quantise_model(*small_model, *graphs, backend, options, data, asked)
        path = folder / "model.sengine"
        write_built(path, *small_model, made.graph, backend, options, made)
        return Built(path, made)

    return make


@pytest.fixture(scope="module")
def built(build_quantised: Build) -> dict[str, Built]:
    return {precision: build_quantised(precision) for precision in FORMATS}


def predict(path: Path, data: CalibrationData) -> np.ndarray:
    with SparseEngine.load(path, device="cpu") as engine:
        return engine.predict(data.x, data.times, conditioning=data.conditioning)


@pytest.mark.parametrize("smooth", [None, 0.5])
@pytest.mark.parametrize("precision", FORMATS)
def test_the_whole_network_is_what_onnxruntime_makes_of_the_same_quantisation(
    precision: str,
    smooth: float | None,
    build_quantised: Build,
    data: CalibrationData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With float32 between the layers: in fp16 the two round otherwise, and a code that flips is a step of 8 bits."""
    for module in (torch_backend, network):
        monkeypatch.setattr(module, "float_precision", lambda precision: "fp32")
    made = build_quantised(precision, "fp32", smooth=smooth)
    assert relative_error(predict(made.path, data), predictions(made.quantised.graph, data)) < 2e-3


@pytest.mark.parametrize("precision", FORMATS)
def test_each_layer_in_fp16_is_what_onnxruntime_makes_of_it(
    precision: str, built: dict[str, Built], data: CalibrationData
) -> None:
    made = built[precision].quantised
    weights = quantised_weights(made.graph)
    proto, names = made.graph.proto, list(weights)
    values = {output: node.input[0] for node in proto.graph.node for output in node.output}  # across Q and DQ
    inputs = [values[values[tensor]] for tensor in layer_inputs(proto, names).values()]
    outputs = list(layer_outputs(proto, names).values())
    _, (_, *arrays) = next(run_network(made.graph, data.take(np.arange(4)), [*inputs, *outputs]))
    for name, x, expected in zip(names, arrays[: len(names)], arrays[len(names) :], strict=True):
        bias = torch.from_numpy(made.graph.state[f"{name}.bias"]).half()
        product = DequantisedProduct(weights[name], bias, torch.float16)
        found = product(torch.from_numpy(x).flatten(0, -2)).numpy().reshape(expected.shape)
        assert relative_error(found, expected) < 1e-3, name


@pytest.mark.parametrize("precision", FORMATS)
def test_it_loses_no_more_than_the_graph_does(precision: str, built: dict[str, Built], data: CalibrationData) -> None:
    made = built[precision]
    found, expected = predict(made.path, data), predictions(made.quantised.graph, data)
    manifest = EngineFile(made.path).manifest
    describe_quantised(manifest, made.quantised)
    assert relative_error(found, expected) < 1.5 * manifest.quantisation["quality_loss"]
    with SparseEngine.load(made.path, device="cpu") as engine:
        assert engine.sample(2, steps=2, labels=1, guidance=2.0).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("precision", FORMATS)
def test_the_payload_is_codes_and_scales(precision: str, built: dict[str, Built]) -> None:
    stored = safetensors.torch.load(EngineFile(built[precision].path).read(NETWORK_FILE))
    assert {name for name in stored if "mid_block.mlp.fc1" in name} == {
        "mid_block.mlp.fc1.weight.codes.values",
        "mid_block.mlp.fc1.weight.codes.positions",
        "mid_block.mlp.fc1.weight.scale",
        "mid_block.mlp.fc1.input.scale",
        "mid_block.mlp.fc1.bias",
    }
    values, positions = (stored[f"mid_block.mlp.fc1.weight.codes.{part}"] for part in ("values", "positions"))
    assert (values.dtype, values.nbytes + positions.nbytes) == (TYPES[precision], 5 * 64 * 256 // 8)
    assert stored["out_blocks.0.skip_linear.weight.codes"].dtype == TYPES[precision]  # which has no mask
    assert {stored[name].dtype for name in ("mid_block.mlp.fc1.bias", "norm.weight")} == {torch.float16, torch.float32}
    network = read_network(EngineFile(built[precision].path))
    graph = built[precision].quantised.graph
    expected = quantised_weights(graph)
    assert (len(network.packed), len(network.quantised)) == (12, 13)
    for name, weight in network.quantised.items():
        assert torch.equal(weight.dequantised(torch.float32), expected[name].dequantised(torch.float32)), name
        assert is_n_of_m(weight.codes.float().numpy()) == (name in network.packed)


@pytest.mark.parametrize("precision", FORMATS)
def test_every_layer_says_what_it_runs_and_why(precision: str, built: dict[str, Built]) -> None:
    with SparseEngine.load(built[precision].path, device="cpu") as engine:
        info = engine.info
    found = {layer["name"]: layer for layer in info["layers"]}
    chosen = [layer for layer in found.values() if layer["quantised"] == precision]
    assert len(chosen) == 13
    assert {(layer["kernel"], layer["why"]) for layer in chosen} == {("dense", "no CUDA: the engine runs on cpu")}
    assert found["decoder_pred"]["quantised"] is None
    with pytest.raises(UnsupportedError, match=r"12 masked layers stay dense, .*\(no CUDA: the engine runs on cpu\)"):
        check_all_sparse(info["layers"])


def test_layers_that_stay_float_are_in_fp16(build_quantised: Build) -> None:
    path = build_quantised("int8", keep_float=("*.attn.proj",), smooth=0.5).path
    network = read_network(EngineFile(path))
    assert (len(network.packed), len(network.quantised)) == (12, 10)
    assert network.state["mid_block.attn.proj.weight"].dtype == torch.float16
    with SparseEngine.load(path, device="cpu") as engine:
        layer = next(each for each in engine.info["layers"] if each["name"] == "mid_block.attn.proj")
    assert (layer["quantised"], layer["masked"]) == (None, True)


@pytest.mark.parametrize("precision", FORMATS)
def test_the_command_line_builds_and_samples(
    precision: str, conditional_checkpoint: Path, conditional_engine: Path, tmp_path: Path
) -> None:
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        collect(engine, images=20, steps=8, sampler="ddim").save(tmp_path / "calib.npz")
    output = str(tmp_path / "model.sengine")
    build = ["build", str(conditional_checkpoint), "--sparse", "--heads", "4", "--backend", "torch", "-o", output]
    assert run([*build, "--precision", precision]) == 2  # without --calib
    assert run([*build, "--precision", precision, "--calib", str(tmp_path / "calib.npz")]) == 0
    assert run(["sample", output, "-n", "2", "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "x.npz")]) == 0


def in_16_bits(entry: dict[str, Any]) -> None:
    """Half of a float32 tensor's bytes, for as many numbers."""
    first, last = entry["data_offsets"]
    entry.update(dtype="F16", data_offsets=[first, (first + last) // 2])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda header: header.pop("mid_block.mlp.fc1.weight.scale"), "has no scale of its weight or of its input"),
        (lambda header: header.pop("mid_block.mlp.fc1.input.scale"), "has no scale of its weight or of its input"),
        (lambda header: header.pop("mid_block.mlp.fc1.weight.codes.positions"), "has values and no positions"),
        (lambda header: header["out_blocks.0.skip_linear.weight.codes"].update(dtype="U8"), "is not int8 or float8"),
        (lambda header: header["mid_block.mlp.fc1.weight.scale"].update(shape=[2, 128]), "one for each of 256 outputs"),
        (lambda header: header["mid_block.mlp.fc1.input.scale"].update(shape=[1]), "one for each of 256 outputs"),
        (lambda header: in_16_bits(header["mid_block.mlp.fc1.weight.scale"]), "are not float32"),
        (lambda header: in_16_bits(header["mid_block.mlp.fc1.input.scale"]), "are not float32"),
    ],
)
def test_damaged_payloads(
    change: Callable[[dict[str, Any]], None], message: str, built: dict[str, Built], tmp_path: Path
) -> None:
    with pytest.raises(EngineFileError, match=message):
        SparseEngine.load(rewritten(built["int8"].path, tmp_path / "x.sengine", with_header(change)))


def test_a_convolution_that_is_no_product_is_not_built(built: dict[str, Built]) -> None:
    graph = built["int8"].quantised.graph
    weights = {**graph.weights, "out_blocks.0.skip_linear.weight.int8": np.zeros((64, 128, 3, 3), np.int8)}
    places = {**graph.layers, "out_blocks.0.skip_linear": ("out_blocks.0.skip_linear.weight.int8", 1)}
    changed = StepGraph(graph.proto, weights, places, graph.state)
    with pytest.raises(UnsupportedError, match=r"skip_linear: the torch backend has 8-bit .*\n.*--keep-float"):
        backend_named("torch").build(changed, BuildOptions(sparse=True, precision="int8"), [])


def test_codes_without_a_quantised_input_are_no_layer(built: dict[str, Built]) -> None:
    graph = built["int8"].quantised.graph
    changed = type(graph.proto)()
    changed.CopyFrom(graph.proto)
    node = next(each for each in changed.graph.node if each.name == "mid_block.mlp.fc1")
    node.input[0] = "x"
    with pytest.raises(BackendError, match=r"mid_block.mlp.fc1: its weights are in 8 bits, and its input is not"):
        quantised_weights(dataclasses.replace(graph, proto=changed))


@pytest.mark.parametrize("precision", FORMATS)
def test_numbers_are_rounded_as_the_formats_say(precision: str) -> None:
    form: Format = FORMATS[precision]
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 100
    x[:6] = 0.5, 1.5, -2.5, 440, -1e-9, 126.5
    expected = form.quantize(x, np.float32(1), np.zeros((), form.dtype)).astype(np.float32)
    found = quantise(torch.from_numpy(x), torch.ones(()), TYPES[precision]).float().numpy()
    inside = np.abs(x) <= 126.5
    assert np.array_equal(found[inside], expected[inside])
    assert np.abs(found).max() <= 448


def test_float8_codes_are_packed_and_minus_zero_is_pruned() -> None:
    weight = two_of_four(8, 64).to(torch.float8_e4m3fn)
    signed = torch.where(weight.float() == 0, torch.tensor(-0.0), weight.float()).to(torch.float8_e4m3fn)
    for each in (weight, signed):
        values, positions = pack(each)
        assert values.dtype == torch.float8_e4m3fn
        assert torch.equal(unpack(values, positions).float(), weight.float())


# Products, with functions in the place of CUDA's libraries that compute the same from the same arguments.


def eight_bits(precision: str, outputs: int = 64, inputs: int = 96) -> QuantisedWeight:
    form = FORMATS[precision]
    weight = two_of_four(outputs, inputs).numpy()
    scale, _ = form.scale_and_zero(-np.abs(weight).max(1), np.abs(weight).max(1))
    stored = form.quantize(weight, scale[:, None], np.zeros((), form.dtype))
    found = torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8)).view(TYPES[precision])
    return QuantisedWeight(found, torch.from_numpy(scale), torch.tensor(3 / form.highest))


def layer(precision: str, sparse: bool = True, **shape: int) -> QuantisedLayer:
    weight = eight_bits(precision, **shape)
    return QuantisedLayer(weight, torch.randn(len(weight.codes)).half(), torch.float16, sparse)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU with every library: what cuSPARSELt was given."""
    seen: dict[str, Any] = {}

    def sparse(packed, columns, *, bias, alpha, out_dtype, transpose_result, alg_id, **split):
        assert columns.shape[1] % 16 == 0
        assert columns.stride() == (1, columns.shape[0])
        assert transpose_result
        assert (bias, alpha.dtype) == (None, torch.float32)
        seen["algorithm"] = (alg_id, split)
        return (alpha[:, None] * (packed.float() @ columns.float())).T.to(out_dtype).contiguous()

    def scaled(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert (b.stride(0), scale_a.numel(), scale_b.numel(), out_dtype) == (1, 1, 1, torch.float32)
        return scale_a * scale_b * (a.float() @ b.float())

    def int_mm(a, b):
        assert len(a) > 16
        assert b.stride(0) == 1
        return (a.int() @ b.int()).int()

    monkeypatch.setattr(products, "check_capability", lambda *arguments: None)
    monkeypatch.setattr(quantised, "check_capability", lambda *arguments: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse)
    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 17, 257])
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", [DequantisedProduct, DenseCodesProduct, CusparseltCodesProduct])
def test_all_products_compute_the_same(
    kind: Any, precision: str, rows: int, bias: bool, libraries: dict[str, Any]
) -> None:
    linear = layer(precision)
    linear = linear if bias else dataclasses.replace(linear, bias=None)
    x = torch.randn(rows, 96).half()
    found = kind(linear.weight, linear.bias, torch.float16)(x)
    assert (found.shape, found.dtype) == ((rows, 64), torch.float16)
    torch.testing.assert_close(found.float(), linear.expected(x), rtol=2e-3, atol=2e-3)


def test_the_search_is_given_codes_and_scales(libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    module = type("Module", (), {"mm_search": staticmethod(lambda *arguments: given.extend(arguments) or (5, 2, 1, 9))})
    monkeypatch.setattr(torch._C, "_cusparselt", module, raising=False)
    product = CusparseltCodesProduct(eight_bits("int8"), None, torch.float16)
    product.algorithm = product.search(torch.randn(7, 96).half())
    packed, columns, bias, alpha, out_dtype, transposed = given
    assert packed.dtype == columns.dtype == torch.int8
    assert columns.shape == (96, 16)
    assert torch.equal(alpha, product.alpha)
    assert (bias, out_dtype, transposed) == (None, torch.float16, True)
    product(torch.randn(7, 96).half())
    assert libraries["algorithm"][0] == 5
    assert libraries["algorithm"][1]["split_k"] == 2


@pytest.mark.parametrize(
    "precision,shape,message",
    [
        ("int8", (64, 100), "64 outputs and 100 inputs; int8 takes multiples of 8"),
        ("fp8", (56, 96), "56 outputs and 96 inputs; fp8 takes multiples of 16"),
        ("int8", (48, 96), "48 outputs and 96 inputs; cusparselt takes multiples of 32 and 32"),
        ("fp8", (64, 80), "64 outputs and 80 inputs; cusparselt takes multiples of 32 and 32"),
    ],
)
def test_shapes_that_are_not_taken_are_said(
    precision: str, shape: tuple[int, int], message: str, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "device_facts", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    choice = chooser(autotune=False).choose("fc", layer(precision, outputs=shape[0], inputs=shape[1]))
    assert message in choice.why


def test_gpus_that_are_too_old_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device, shape, dtype = torch.device("cuda", 0), torch.Size((64, 96)), torch.float8_e4m3fn

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    weight: Any = dataclasses.replace(eight_bits("fp8"), codes=OnGpu())
    with pytest.raises(products.ObstacleError, match=r"compute capability 7.5; fp8 needs 8.9 or newer"):
        DenseCodesProduct(weight, None, torch.float16)
    with pytest.raises(products.ObstacleError, match=r"compute capability 7.5; 2:4 needs 8.0 or newer"):
        products.pack_for_cusparselt(OnGpu())  # type: ignore[arg-type]


SPEED = {"cusparselt": 1.0, "dense int8": 2.0, "dense fp8": 2.0, "dense": 3.0}


def chooser(device: torch.device = torch.device("cuda", 0), autotune: bool = True) -> Chooser:  # noqa: B008
    return Chooser({"fc": 10}, (1, 4, 16), device, autotune)


@pytest.fixture
def timed(libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Candidates take the times of ``SPEED``: what was timed together."""
    calls: list[tuple[str, ...]] = []

    def fastest(candidates: dict[str, Callable[[], object]]) -> Choice:
        calls.append(tuple(candidates))
        times = {name: SPEED[name] for name in candidates}
        return Choice(min(times, key=lambda name: times[name]), times)

    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr("sparse_engine.tactics.fastest", fastest)
    monkeypatch.setattr(choose, "Recorder", FakeRecorder)
    monkeypatch.setattr(candidates, "_copies", lambda product, device: 1)
    monkeypatch.setattr(choose, "device_facts", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(CusparseltCodesProduct, "search", lambda self, x: (2, 1, -1))
    monkeypatch.setitem(SPEED, "cusparselt 2 1 -1", SPEED["cusparselt"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return calls


@pytest.mark.parametrize("precision", FORMATS)
def test_the_fastest_of_sparse_dense_and_dequantised_stays(
    precision: str, timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = f"dense {precision}"
    report = chooser().choose("fc", layer(precision)).to_dict()
    assert timed == [("cusparselt", eight, "dense", "cusparselt 2 1 -1")] * 3
    assert (report["chosen"], report["kernel"]) == (True, "cusparselt")
    report = chooser().choose("fc", layer(precision, sparse=False)).to_dict()  # not what the sparse layer's cache says
    assert (report["chosen"], report["kernel"]) == (False, eight)
    monkeypatch.setitem(SPEED, "dense", 0.5)
    choice = chooser().choose("fc", dataclasses.replace(layer(precision), bias=None))
    assert (choice.to_dict()["chosen"], choice.kernel) == (False, "dense")
    assert {type(product) for product in choice.products.values()} == {DequantisedProduct}


def test_without_timing_the_first_that_runs(timed: list[tuple[str, ...]]) -> None:
    for sparse, kernel, why in ((True, "cusparselt", "sparse by default"), (False, "dense int8", "8 bits by default")):
        choice = chooser(autotune=False).choose("fc", layer("int8", sparse))
        assert (choice.kernel, choice.why) == (kernel, f"not timed: {why}")
    assert not timed


def test_what_the_library_refuses_is_said(timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Unsupported dtype for cuSPARSELt compressed matrix\nmore")

    monkeypatch.setattr(torch, "_cslt_compress", refuse)
    choice = chooser().choose("fc", layer("fp8"))
    assert choice.kernel == "dense fp8"
    assert choice.why == "faster at the usual batch; Unsupported dtype for cuSPARSELt compressed matrix"


def test_elementwise_work_is_compiled_on_cuda_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def compile_(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled.append(function)
        return lambda *arguments: "one kernel"

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch, "compile", compile_)
    fused._compiled.cache_clear()
    assert quantise(torch.ones(2), torch.ones(()), torch.int8).tolist() == [1, 1]
    assert not compiled
    for _ in range(2):
        assert quantise(OnGpu(), torch.ones(()), torch.int8) == "one kernel"  # type: ignore[comparison-overlap]
    assert len(compiled) == 1
    fused._compiled.cache_clear()


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("kind", [DequantisedProduct, DenseCodesProduct, CusparseltCodesProduct])
def test_torch_compile_takes_a_product_in_one_piece(
    kind: Any, precision: str, libraries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that rounding and scaling become one with what is next to them."""
    linear = layer(precision)
    product = kind(linear.weight, linear.bias, torch.float16)
    x = torch.randn(257, 96).half()
    expected = product(x)
    found = torch.compile(product, dynamic=False, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
