"""Small models for every test: real U-ViTs of few parameters, built once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparse_engine import SparseEngine
from sparse_engine.backends import BuildOptions
from sparse_engine.backends.onnxruntime.library import keep_private
from sparse_engine.export.build import build_engine
from sparse_engine.export.families.uvit import UViT, UViTConfig
from sparse_engine.export.options import MaskOptions, ModelOptions
from sparse_engine.manifest import Manifest

keep_private()  # tests that import onnxruntime themselves record nothing either

MASKS = {"mask": "rule", "pattern": "pattern", "mask_layers": "layers"}
TINY = UViTConfig(image_size=8, patch_size=2, channels=3, embed_dim=32, depth=2, heads=4)
TINY_CONDITIONAL = UViTConfig(8, 2, 3, 32, 2, 4, num_classes=5)
TINY_LATENT = UViTConfig(8, 2, 4, 32, 2, 4, num_classes=5, final_conv=False, mlp_time_embed=True)


def fill(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights for a network, large enough that every part of it shows in its output."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.15)
    return network.state_dict()


def random_state(config: UViTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A U-ViT's weights."""
    torch.manual_seed(seed)
    return fill(UViT(config))


def save_network(path: Path, network: nn.Module, seed: int = 0) -> Path:
    """A state dict of a network filled at random."""
    torch.manual_seed(seed)
    torch.save(fill(network), path)
    return path


def save_checkpoint(path: Path, config: UViTConfig, seed: int = 0) -> Path:
    """A state dict under the authors' key names."""
    torch.save(random_state(config, seed), path)
    return path


def build_with(checkpoint: str | Path, output: str | Path | None = None, **options: Any) -> tuple[Path, Manifest]:
    """``build_engine``, its options by their own names, whichever object they are of."""
    others = {name: options.pop(name) for name in ("backend", "quantisation", "assets") if name in options}
    masks = {name: options.pop(old) for old, name in MASKS.items() if old in options}
    of_build = {field.name: options.pop(field.name) for field in fields(BuildOptions) if field.name in options}
    return build_engine(
        checkpoint,
        output,
        model=ModelOptions(**options),
        masks=MaskOptions(**masks),
        options=BuildOptions(**of_build),
        **others,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.pth", TINY)


@pytest.fixture(scope="session")
def conditional_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("conditional") / "conditional.pth", TINY_CONDITIONAL)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build an engine from a checkpoint in a folder of its own."""

    def make(checkpoint: Path, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("engine") / f"{checkpoint.stem}.sengine"
        return build_with(checkpoint, output, **{"heads": 4, **options})[0]

    return make


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(tiny_checkpoint, sparse=True)


@pytest.fixture(scope="session")
def conditional_engine(conditional_checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(conditional_checkpoint, sparse=True, null_class=4)


@pytest.fixture(scope="session")
def torch_engine(conditional_checkpoint: Path, build: Callable[..., Path]) -> Path:
    return build(conditional_checkpoint, backend="torch", null_class=4)


@pytest.fixture(scope="session")
def latent_engine(tmp_path_factory: pytest.TempPathFactory, build: Callable[..., Path]) -> Path:
    return build(save_checkpoint(tmp_path_factory.mktemp("latent") / "latent.pth", TINY_LATENT), null_class=4)


@pytest.fixture
def engine(conditional_engine: Path) -> Any:
    with SparseEngine.load(conditional_engine, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Small networks are not faster on more threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
