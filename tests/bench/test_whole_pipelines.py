"""Whole calls of a pipeline: every runtime draws the same, and what is written says where the time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_engine.bench import pipelines, swap
from sparse_engine.cli.main import run
from sparse_engine.errors import CheckpointError, OptionError
from sparse_engine.export.model import load_model
from tests.pipelines.pipeline_cases import CASES

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class NoPipeline:
    def __call__(self) -> None: ...


def saved(name: str, folder: Path) -> Path:
    case = CASES[name]
    case.pipeline(case.network()).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_with_every_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiler(module, backend="eager"))
    folder, out = saved("StableDiffusion", tmp_path / "p"), tmp_path / "x.json"
    amounts = ["--steps", "2", "--repeat", "1", "--seconds", "0.05", "--threads", "1", "-o", str(out)]
    assert run(["bench", "--pipeline", str(folder), "--peers", *amounts]) == 0
    results = json.loads(out.read_text())
    assert (results["kind"], results["steps"], results["pipeline"]["class"]) == (
        "pipeline",
        2,
        "StableDiffusionPipeline",
    )
    (row,) = results["rows"]
    wanted = {pipelines.AS_IT_IS, pipelines.COMPILED_AS_IT_IS, pipelines.SPARSE, pipelines.DENSE, "ONNX Runtime"}
    assert set(row["milliseconds"]) >= wanted
    for name, shares in row["shares"].items():
        assert sum(shares.values()) == pytest.approx(1), name
        assert 0 < shares[pipelines.NETWORK] < 1
        assert shares[pipelines.DECODER] > 0
        assert shares[pipelines.TEXT] == 0  # the folder has no text encoder: its texts are noise
    assert all(error < 1e-4 for name, error in row["relative_error"].items() if "bf16" not in name)
    assert set(row["speedups"]) == set(row["milliseconds"]) - {pipelines.SPARSE}
    said = " ".join(capfd.readouterr().out.split())
    assert "ours, 2:4, fp32" in said
    assert "2 steps of DDIMScheduler" in said


def test_what_pipelines_are_called_with(tmp_path: Path) -> None:
    case = CASES["StableDiffusionXL"]
    pipe, model = case.pipeline(case.network()), load_model(saved("StableDiffusionXL", tmp_path), context_length=6)
    told = pipelines.call_arguments(pipe, model, 2, "x")
    assert told.pop("negative_prompt") is None
    assert {name: tuple(each.shape) for name, each in told.items()} == {
        "prompt_embeds": (2, 6, 24),
        "negative_prompt_embeds": (2, 6, 24),
        "pooled_prompt_embeds": (2, 20),
        "negative_pooled_prompt_embeds": (2, 20),
    }
    pipe.tokenizer = object()
    assert pipelines.call_arguments(pipe, model, 2, "x") == {"prompt": ["x", "x"]}
    for name, given in (("DiT", {"class_labels": [0, 0]}), ("DDIM", {"batch_size": 2})):
        other = CASES[name]
        assert pipelines.call_arguments(other.pipeline(other.network()), model, 2, "x") == given
    with pytest.raises(OptionError, match="takes neither a prompt nor labels"):
        pipelines.call_arguments(NoPipeline(), model, 1, "x")


def test_what_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index.json.*\n.*save_pretrained"):
        pipelines.load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    assert run(["bench", "--pipeline", str(tmp_path)]) == 2
    assert "diffusers cannot load it" in capfd.readouterr().err
    assert run(["bench", "--random", "uvit-s", "--prompt", "x"]) == 2
    assert "--prompt goes with --pipeline" in capfd.readouterr().err


@pytest.mark.slow
def test_what_the_swap_adds_is_measured_at_the_size_of_stable_diffusion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    plain = swap.EngineDenoiser.forward

    def watched(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(sample.shape))
        return plain(self, sample, *args, **kwargs)

    monkeypatch.setattr(swap.EngineDenoiser, "forward", watched)
    alone, added = swap.overhead(tmp_path, rounds=1, calls=3)
    assert seen == [(2, 4, 64, 64)] * 3
    assert alone > 0
    assert alone + added > 0
