"""Networks of known sizes with random weights: the paper's, and those that ``bench --random`` takes by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparse_engine.errors import OptionError
from sparse_engine.export.checkpoint import Checkpoint
from sparse_engine.export.families import Family, FamilyConfig
from sparse_engine.export.families.dit import FAMILY as DIT
from sparse_engine.export.families.dit import DiTConfig
from sparse_engine.export.families.unet2d import FAMILY as UNET2D
from sparse_engine.export.families.unet2d import UNet2DConfig
from sparse_engine.export.families.unet_condition import FAMILY as UNET_CONDITION
from sparse_engine.export.families.unet_condition import UNetConditionConfig
from sparse_engine.export.families.unet_ddpm import FAMILY as DDPM
from sparse_engine.export.families.unet_ddpm import SPARSEDM, SPARSEDM_HEADS, SPARSEDM_SIZE, DDPMConfig
from sparse_engine.export.families.uvit import FAMILY as UVIT
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.export.families.uvit_t2i import FAMILY as UVIT_T2I
from sparse_engine.export.families.uvit_t2i import UViTT2IConfig
from sparse_engine.export.model import Model

PAPER_SAMPLER = "euler-sde"
UVIT_PATCH, UVIT_MLP_RATIO = 2, 4  # U-ViT's own
SEED = 0
# Of what zeros become: matrices as the authors' others; biases, that a DiT's gates let its branches through.
WEIGHT_STD, BIAS_STD = 0.02, 0.2


@dataclass(frozen=True)
class RandomNetwork:
    """A network to be filled at random.

    Attributes:
        family, config: what it is.
        sampler: in place of the family's own, where whole samples are timed.
    """

    family: Family
    config: FamilyConfig
    sampler: str | None = None

    def model(self) -> Model:
        """The network as its authors initialise it, but for matrices of zeros, as if read from a checkpoint.

        A branch that begins as zero (a DiT's gates, its head) would hide everything before it: such matrices and their
        biases are normal numbers of a fixed seed.
        """
        torch.manual_seed(SEED)
        state = {name: tensor.numpy() for name, tensor in self.family.network(self.config).state_dict().items()}
        rng = np.random.default_rng(SEED)
        for name in [name for name, array in state.items() if array.ndim > 1 and not array.any()]:
            for part, std in ((name, WEIGHT_STD), (name.removesuffix("weight") + "bias", BIAS_STD)):
                if part in state:
                    state[part] = np.float32(std) * rng.standard_normal(state[part].shape, np.float32)
        recipe = self.family.recipe(self.config)
        recipe = dataclasses.replace(recipe, sampler=self.sampler or recipe.sampler)
        return Model(Checkpoint(Path("random"), state, {}, {}, sha256="0" * 64), self.family, self.config, recipe, [])


def random_uvit(config: UViTConfig) -> RandomNetwork:
    """A U-ViT that is sampled as in the paper's grid."""
    return RandomNetwork(UVIT, config, PAPER_SAMPLER)


@dataclass(frozen=True)
class Preset:
    """Size of the grid's networks and of the batch."""

    embed_dim: int
    depth: int
    heads: int
    batch: int

    def config(self, patch: int = UVIT_PATCH, mlp_ratio: int = UVIT_MLP_RATIO) -> UViTConfig:
        """The network of one cell. Raises OptionError where the heads do not divide the embedding."""
        if self.heads < 1 or self.embed_dim % self.heads:
            raise OptionError(f"heads = {self.heads} does not divide embed_dim = {self.embed_dim}")
        return UViTConfig(32, patch, 3, self.embed_dim, self.depth, self.heads, mlp_ratio * self.embed_dim)


PRESETS = {
    "quick": Preset(embed_dim=512, depth=2, heads=8, batch=4),
    "quick-1024": Preset(embed_dim=1024, depth=2, heads=16, batch=1),
    "uvit-s": Preset(embed_dim=512, depth=12, heads=8, batch=4),
    "paper": Preset(embed_dim=8192, depth=1, heads=8, batch=64),
}
# google/ddpm-cifar10-32's, which is ermongroup's, and Stable Diffusion 1.5's at 64x64 latents.
DDPM_CIFAR10 = UNet2DConfig(
    (32, 32), 3, (128, 256, 256, 256), (2, 2, 2, 2), (0, 1, 0, 0), (0, 0, 1, 0), mid_attention=1, time_width=128,
    time_dim=512, scaled=False, groups=32, eps=1e-6, padding=0, cos_first=False, freq_shift=1, center=False,
    num_classes=0, head_dim=0, mid_groups=32,
)  # fmt: skip
SD15 = UNetConditionConfig(
    (64, 64), 4, (320, 640, 1280, 1280), (2, 2, 2, 2), (1, 1, 1, 0), (0, 1, 1, 1), mid_attention=1, time_width=320,
    time_dim=1280, scaled=False, groups=32, eps=1e-5, padding=1, cos_first=True, freq_shift=0, center=False,
    num_classes=0, stage_heads=(8, 8, 8, 8), context_dim=768, context_length=77, linear_projection=False,
)  # fmt: skip
# Of `--random`: a new network is one line. The sizes of the last are those of their authors' published models.
NETWORKS: dict[str, RandomNetwork] = {
    **{name: random_uvit(preset.config()) for name, preset in PRESETS.items()},
    "uvit-s-t2i": RandomNetwork(UVIT_T2I, UViTT2IConfig(32, 2, 4, embed_dim=512, depth=12, heads=8)),
    "sparsedm-cifar10": RandomNetwork(
        DDPM, DDPMConfig((SPARSEDM_SIZE, SPARSEDM_SIZE), 3, heads=SPARSEDM_HEADS, groups=28, **SPARSEDM)
    ),
    "ddpm-cifar10": RandomNetwork(UNET2D, DDPM_CIFAR10),
    "sd15": RandomNetwork(UNET_CONDITION, SD15),
    "dit-b2": RandomNetwork(DIT, DiTConfig(32, 2, 4, 768, 12, 12, num_classes=1001, out_channels=8, null_row=True)),
    "dit-l2": RandomNetwork(DIT, DiTConfig(32, 2, 4, 1024, 24, 16, num_classes=1001, out_channels=8, null_row=True)),
}


def preset_named(name: str) -> Preset:
    """Look a size of the grid up. Raises OptionError on a name that is none."""
    if name not in PRESETS:
        raise OptionError(f"preset {name!r} is not known; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def network_named(name: str) -> RandomNetwork:
    """Look a network of ``--random`` up. Raises OptionError on a name that is none."""
    if name not in NETWORKS:
        raise OptionError(f"--random {name!r} is not known; expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name]
