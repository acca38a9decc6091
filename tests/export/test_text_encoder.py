"""CLIP's text model against transformers' own, in folders as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.export.text_encoder import read_clip_text, text_encoder_files
from tests.clip import fill, save_text_model, save_tokenizer, text_config, vocabulary

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "gelu", "num_attention_heads": 2}], ids=["quick", "gelu"])
@pytest.mark.parametrize("length", [7, 77])
def test_states_are_those_of_transformers(tmp_path: Path, settings: dict[str, Any], length: int) -> None:
    reference = save_text_model(tmp_path, length, **settings)
    network, config, _ = read_clip_text(tmp_path)
    tokens = torch.randint(0, config.vocabulary, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=tokens).last_hidden_state
    found = network(tokens)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_a_shorter_text_than_it_has_positions(tmp_path: Path) -> None:
    reference = save_text_model(tmp_path, 77)
    network, _, _ = read_clip_text(tmp_path, 9)
    tokens = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=tokens).last_hidden_state
    assert float((network(tokens) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_weights_of_16_bits_are_widened(tmp_path: Path) -> None:
    save_text_model(tmp_path, 7).half().save_pretrained(tmp_path)
    network, _, _ = read_clip_text(tmp_path)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("form", ["whole CLIP", "with a projection", "pytorch_model.bin", "shards"])
def test_the_forms_that_it_is_published_in(tmp_path: Path, form: str) -> None:
    if form == "whole CLIP":
        config = CLIPConfig(text_config=text_config(7).to_dict(), vision_config=VISION, projection_dim=8)
        model = CLIPModel(config).eval()
    elif form == "with a projection":
        model = CLIPTextModelWithProjection(text_config(7, projection_dim=8)).eval()
    else:
        model = CLIPTextModel(text_config(7)).eval()
    fill(model)
    model.save_pretrained(tmp_path, max_shard_size="4KB" if form == "shards" else "1GB")
    if form == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        old = {f"text_model.{name}": tensor for name, tensor in model.state_dict().items()}
        old["text_model.embeddings.position_ids"] = torch.arange(7)[None]  # as transformers before 4.31 saved
        torch.save(old, tmp_path / "pytorch_model.bin")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    network, config, _ = read_clip_text(tmp_path)
    tokens = torch.randint(0, config.vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    reference = model if form in ("pytorch_model.bin", "shards", "with a projection") else model.text_model
    with torch.no_grad():
        expected = reference(input_ids=tokens).last_hidden_state
    assert float((network(tokens) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_what_a_folder_says_of_its_encoder(tmp_path: Path) -> None:
    save_text_model(save_tokenizer(tmp_path, length=7), 7)
    found = text_encoder_files(tmp_path)
    assert (found.length, found.width, found.null["context"].shape) == (7, 16, (7, 16))
    assert [file.name for file in found.files] == ["text/encoder.onnx", "text/encoder.bin", "text/tokenizer.json"]
    pipeline = tmp_path / "pipeline"
    save_tokenizer(pipeline / "tokenizer", length=7)
    save_text_model(pipeline / "text_encoder", 7)
    (pipeline / "model_index.json").write_text("{}")
    assert np.array_equal(text_encoder_files(pipeline).null["context"], found.null["context"])
    assert np.array_equal(text_encoder_files(pipeline / "text_encoder").null["context"], found.null["context"])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"architectures": ["T5EncoderModel"], "model_type": "t5"}, "is of T5EncoderModel; expected a CLIP text model"),
        ({"num_attention_heads": 3}, "num_attention_heads is 3; expected a divisor of the width 16"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected quick_gelu or gelu"),
        ({"layer_norm_eps": 2}, "layer_norm_eps is 2"),
    ],
)
def test_what_it_does_not_take(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_text_model(tmp_path, 7)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(InputError, match=message):
        read_clip_text(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        text_encoder_files(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no config\.json"):
        text_encoder_files(tmp_path)
    save_text_model(tmp_path, 7)
    with pytest.raises(InputError, match="has no tokenizer"):
        text_encoder_files(tmp_path)
    save_tokenizer(tmp_path, length=7)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        text_encoder_files(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_text_model(save_tokenizer(tmp_path, length=7), 7, vocab_size=len(vocabulary()) - 5)
    with pytest.raises(InputError, match="take model and tokenizer from one place"):
        text_encoder_files(tmp_path)


def test_a_pipeline_with_two_encoders(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(InputError, match=r"(?s)several text encoders.*conditioning=\{'context'"):
        text_encoder_files(tmp_path)
