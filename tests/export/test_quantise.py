"""int8 and fp8 builds: what goes into the engine, what the manifest says of it, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from sparse_engine import SparseEngine
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import CalibrationData, collect
from sparse_engine.calibration.sensitivity import relative_error
from sparse_engine.calibration.smooth import migrate
from sparse_engine.errors import BackendError, InputError, OptionError, QualityLimitError, UnsupportedError
from sparse_engine.export import fastest, quantise
from sparse_engine.export.bake import bake
from sparse_engine.export.graphs import export_baked
from sparse_engine.export.model import load_model
from sparse_engine.tactics import Choice
from tests.conftest import build_with

INNER = 13  # of 16 layers: four a block in three blocks, and one skip_linear
ENDS = {"patch_embed.proj", "decoder_pred", "final_layer"}


@pytest.fixture(scope="module")
def data(conditional_engine: Path) -> CalibrationData:
    with SparseEngine.load(conditional_engine, threads=1) as engine:
        return collect(engine, images=20, steps=8, sampler="ddim")


@pytest.fixture(scope="module")
def calibration(data: CalibrationData, tmp_path_factory: pytest.TempPathFactory) -> Quantisation:
    path = tmp_path_factory.mktemp("calibration") / "calib.npz"
    data.save(path)
    return Quantisation(path)


@pytest.fixture(scope="module")
def int8_engine(conditional_checkpoint: Path, calibration: Quantisation, tmp_path_factory: Any) -> Path:
    return build(tmp_path_factory.mktemp("int8"), conditional_checkpoint, calibration)


def build(folder: Path, checkpoint: Path, wanted: Quantisation | None, **options: Any) -> Path:
    options = {"sparse": True, "precision": "int8", "heads": 4, "null_class": 4, **options}
    return build_with(checkpoint, folder / "model.sengine", quantisation=wanted, **options)[0]


def test_it_draws_what_the_float_engine_draws(
    int8_engine: Path, conditional_engine: Path, data: CalibrationData
) -> None:
    with SparseEngine.load(int8_engine) as engine, SparseEngine.load(conditional_engine) as reference:
        found, expected = (
            each.predict(data.x, data.times, conditioning=data.conditioning) for each in (engine, reference)
        )
        assert 0.001 < relative_error(found, expected) < 0.05
        assert engine.sample(2, steps=2, labels=1, guidance=2.0).shape == (2, 8, 8, 3)


def test_the_file_holds_int8_weights(int8_engine: Path, conditional_engine: Path) -> None:
    graph = onnx.load_model_from_string(EngineFile(int8_engine).read(GRAPH_FILE))
    ends = (".weight.int8", ".weight.int8.values")  # of dense layers, and of 2:4 ones, packed
    codes = [tensor for tensor in graph.graph.initializer if tensor.name.endswith(ends)]
    assert {tensor.data_type for tensor in codes} == {onnx.TensorProto.INT8}
    assert len(codes) == INNER
    assert int8_engine.stat().st_size < 0.75 * conditional_engine.stat().st_size


def test_the_manifest_says_what_was_done_and_what_it_cost(int8_engine: Path, calibration: Quantisation) -> None:
    manifest = EngineFile(int8_engine).manifest
    assert (manifest.precision, manifest.sparse) == ("int8", True)
    facts = manifest.quantisation
    assert (facts["weights"], facts["activations"], facts["ranges"]) == ("int8", "uint8", "mse")
    assert 0 < facts["quality_loss"] < 0.05
    assert facts["samples"] == {"ranges": 32, "quality": 8}
    layers = {layer["name"]: layer for layer in manifest.layers}
    quantised = {name for name, layer in layers.items() if layer["quantised"] == "int8"}
    assert set(layers) - quantised == ENDS
    assert all(layers[name]["sqnr_db"] > 15 for name in quantised)
    later = {name for name in quantised if layers[name]["kernel"] == "chosen where it is loaded"}
    ours = {name for name in quantised if layers[name]["kernel"] in ("r-lanes int8", "own dense int8", "dense int8")}
    assert later | ours == quantised
    assert any("13 of 16 layers are int8; the prediction differs from fp32 by" in note for note in manifest.notes)


def test_layers_kept_float_run_the_sparse_kernel(
    tmp_path: Path, conditional_checkpoint: Path, calibration: Quantisation
) -> None:
    wanted = dataclasses.replace(calibration, keep_float=("*.attn.proj",), smooth=0.5)
    with SparseEngine.load(build(tmp_path, conditional_checkpoint, wanted), autotune=False) as engine:
        layers = {layer["name"]: layer for layer in engine.info["layers"]}
    assert layers["mid_block.attn.proj"]["quantised"] is None
    assert layers["mid_block.attn.proj"]["chosen"]
    assert layers["mid_block.mlp.fc1"]["quantised"] == "int8"


def test_a_dense_model_can_be_int8(tmp_path: Path, conditional_checkpoint: Path, calibration: Quantisation) -> None:
    manifest = EngineFile(build(tmp_path, conditional_checkpoint, calibration, sparse=False)).manifest
    assert manifest.quantisation["quality_loss"] < 0.05
    assert not any(layer["masked"] for layer in manifest.layers)


def test_weights_that_lost_their_pattern_are_not_built(
    tmp_path: Path, conditional_checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "is_n_of_m", lambda *_, **__: False)
    with pytest.raises(BackendError, match="its quantised weights are not 2:4 along the inputs"):
        build(tmp_path, conditional_checkpoint, calibration)
    assert not list(tmp_path.iterdir())


def test_a_network_rebuilt_from_a_smoothed_graph_computes_the_same(conditional_checkpoint: Path) -> None:
    """Nothing is in 8 bits here: all that smoothing changed is in the state."""
    model = load_model(conditional_checkpoint, heads=4, null_class=4)
    baked = bake(model)
    graph = export_baked(model, baked)
    rng = np.random.default_rng(0)
    names = [name for name in graph.layers if name.endswith(("qkv", "fc1"))]
    factors = {name: rng.uniform(0.5, 2, 32).astype(np.float32) for name in names}
    changed = quantise._migrated(graph, migrate(graph, factors))
    assert len(changed) == 3 * len(names)
    x, t, y = torch.randn(2, 3, 8, 8), torch.full((2,), 500.0), torch.tensor([1, 2])
    found, expected = (model.network(state)(x, t, y) for state in ({**baked.state, **changed}, baked.state))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(changed["mid_block.norm1.weight"], baked.state["mid_block.norm1.weight"])


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_torch_backend_has_both(
    precision: str, tmp_path: Path, conditional_checkpoint: Path, calibration: Quantisation, data: CalibrationData
) -> None:
    path = build(tmp_path, conditional_checkpoint, calibration, backend="torch", precision=precision)
    manifest = EngineFile(path).manifest
    assert (manifest.precision, manifest.backend["name"]) == (precision, "torch")
    assert sum(layer["quantised"] == precision for layer in manifest.layers) == INNER
    with SparseEngine.load(path, device="cpu") as engine:
        assert engine.predict(data.x, data.times, conditioning=data.conditioning).shape == data.x.shape


def test_a_quantised_engine_is_not_calibrated_on(int8_engine: Path) -> None:
    with (
        SparseEngine.load(int8_engine) as engine,
        pytest.raises(OptionError, match="the engine is int8; calibration needs the ranges of the float model"),
    ):
        collect(engine)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"wanted": None}, OptionError, "precision int8 needs calibration data"),
        ({"precision": "fp32"}, OptionError, "calibration data is given, but precision fp32 uses none"),
        ({"precision": "fp8"}, UnsupportedError, "fp8"),
        ({"change": {"calibration": Path("none.npz")}}, InputError, "none.npz does not exist"),
        ({"precision": "auto"}, OptionError, "precision auto measures each precision's loss"),
        ({"precision": "auto", "wanted": None}, OptionError, "precision auto measures each precision's loss"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    conditional_checkpoint: Path,
    calibration: Quantisation,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    options = {"wanted": dataclasses.replace(calibration, **options.pop("change", {})), **options}
    with pytest.raises(error, match=message):
        build(tmp_path, conditional_checkpoint, **options)
    assert not list(tmp_path.iterdir())


def test_calibration_of_another_model(tmp_path: Path, tiny_checkpoint: Path, calibration: Quantisation) -> None:
    with pytest.raises(InputError, match="of another model: its checkpoint's sha256 is"):
        build(tmp_path, tiny_checkpoint, calibration, null_class=None)


def test_auto_takes_the_fastest_within_the_limit(
    tmp_path: Path, conditional_checkpoint: Path, calibration: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[set[str]] = []

    def pretend(candidates: dict[str, Any], spinning: bool) -> Choice:
        assert spinning  # the threads of one engine would take cores from the next
        timed.append(set(candidates))
        milliseconds = {name: {"fp32": 3.0, "bf16": 2.0, "int8": 1.0}[name] for name in candidates}
        return Choice(min(milliseconds, key=lambda name: milliseconds[name]), milliseconds)

    def beyond_the_limit(*arguments: Any) -> Any:
        if arguments[3].precision == "int8":
            raise QualityLimitError("no layer can be quantised")
        return graph_for(*arguments)

    graph_for = fastest.graph_for
    monkeypatch.setattr(fastest, "fastest", pretend)
    wide, narrow = (dataclasses.replace(calibration, max_quality_loss=limit) for limit in (0.5, 1e-9))
    manifest = EngineFile(build(tmp_path, conditional_checkpoint, wide, precision="auto")).manifest
    assert (manifest.precision, manifest.quantisation is not None) == ("int8", True)
    assert any(
        note.startswith("precision int8: the fastest within a loss of 50.00% (fp32 3 ms, loss 0.00%;")
        for note in manifest.notes
    )
    monkeypatch.setattr(fastest, "graph_for", beyond_the_limit)
    manifest = EngineFile(build(tmp_path, conditional_checkpoint, narrow, precision="auto")).manifest
    assert (manifest.precision, manifest.quantisation) == ("fp32", None)
    assert timed[0] >= {"fp32", "int8"}
    assert timed[1] == {"fp32"}
