"""The digits of diffusers' U-Net: a short run learns, and the shipped folders are diffusers' own and draw digits."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from sparse_engine.export.bake import bake
from sparse_engine.export.build import ENERGY_WARNING, warnings_of
from sparse_engine.export.families.unet2d import FAMILY
from sparse_engine.export.masks import TWO_FOUR
from sparse_engine.export.model import load_model
from sparse_engine.pruning.finetune import masked_layers
from sparse_engine.pruning.masking import MaskedWeights
from sparse_engine.pruning.settings import Settings
from tests.conftest import build_with
from tests.examples.test_digits import classifier, judged, script

FOLDER = Path(__file__).parents[2] / "examples" / "digits_unet"
CONVOLUTION, LINEAR = "up_blocks.1.resnets.0.conv1.weight", "mid_block.attentions.0.to_q.weight"


@pytest.fixture
def train_unet() -> ModuleType:
    return script("train_unet", FOLDER)


def test_a_short_training_run_writes_folders_as_shipped(
    train_unet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--dense-steps", "4", "--sparse-steps", "2", "--out", str(tmp_path)])
    train_unet.main()
    models = {name: load_model(tmp_path / name) for name in ("dense", "sparsedm")}
    for name, model in models.items():
        shipped = load_model(FOLDER / name)
        assert (model.config, model.recipe) == (shipped.config, shipped.recipe)
        assert model.checkpoint.shapes == shipped.checkpoint.shapes
    dense, sparse = (model.checkpoint.state for model in models.values())
    for name in (CONVOLUTION, LINEAR, "class_embedding.weight"):
        assert not np.array_equal(dense[name], sparse[name])
    assert np.count_nonzero(sparse[CONVOLUTION]) == sparse[CONVOLUTION].size


def test_training_masks_what_the_engine_masks() -> None:
    model = load_model(FOLDER / "sparsedm")
    network = model.network({name: array.copy() for name, array in model.checkpoint.state.items()})
    masks = MaskedWeights(network, masked_layers(model, Settings())[0], TWO_FOUR)
    baked = bake(model)
    assert masks.names == [layer.name for layer in baked.layers if layer.masked]
    for name, weight in network.state_dict().items():
        assert np.array_equal(weight.numpy(), baked.state[name]), name


def test_the_mask_takes_less_from_what_was_trained_under_it() -> None:
    """Five convolutions of the larger map lose 7 to 11 %; it is the average that a build warns of."""
    removed = {
        name: [layer.energy_removed for layer in bake(load_model(FOLDER / name), "magnitude").layers if layer.masked]
        for name in ("dense", "sparsedm")
    }
    assert len(removed["sparsedm"]) == 38
    assert max(removed["sparsedm"]) < min(removed["dense"])
    assert np.mean(removed["sparsedm"]) < ENERGY_WARNING / 2
    assert min(removed["dense"]) > ENERGY_WARNING
    assert not any("warning" in note for note in warnings_of(bake(load_model(FOLDER / "sparsedm"))))


def test_diffusers_reads_the_shipped_folder_and_predicts_the_same() -> None:
    model = load_model(FOLDER / "sparsedm")
    assert model.family is FAMILY
    assert (model.num_classes, model.recipe.null_class) == (11, 10)
    reference = UNet2DModel.from_pretrained(FOLDER / "sparsedm" / "unet")
    torch.manual_seed(0)
    x, t, y = torch.randn(11, 1, 8, 8), torch.linspace(0, 999, 11), torch.arange(11)
    with torch.no_grad():
        expected = reference(x, t, y).sample
    torch.testing.assert_close(model.network(model.checkpoint.state)(x, t, y), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with(FOLDER / "sparsedm", tmp_path_factory.mktemp("unet") / "sparsedm.sengine", sparse=True)[0]


def test_it_draws_digits_that_a_classifier_reads(engine_file: Path) -> None:
    """As results.json says, within what 200 samples allow."""
    accuracy, distance = judged(engine_file)
    assert accuracy > 0.8
    assert distance < 2.0


def test_a_pipeline_of_diffusers_draws_them_through_the_swap(engine_file: Path, one_torch_thread: None) -> None:
    pipeline = script("pipeline", FOLDER)
    labels = [*range(10)] * 5
    pipe, baked = pipeline.load(), pipeline.load()
    state = bake(load_model(FOLDER / "sparsedm"), "magnitude").state
    baked.unet.load_state_dict({name: torch.from_numpy(each) for name, each in state.items()})
    for each in (pipe, baked):
        each.set_progress_bar_config(disable=True)
    pipeline.use_engine(pipe, engine_file, threads=1, autotune=False)
    drawn = pipe(labels)
    assert np.abs(drawn - baked(labels)).max() < 1e-3
    read = classifier().predict(2 * drawn.reshape(len(labels), 64) - 1)
    assert (read == labels).mean() > 0.9
    assert pipeline.contact_sheet(drawn).size == (600, 300)
    dense = pipeline.restore(pipe)(labels)
    assert np.abs(dense - drawn).max() > 1e-2
