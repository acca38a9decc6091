"""Small pipelines of diffusers with random weights, one of each class, and what they are called with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from sparse_engine import SparseEngine
from sparse_engine.export.bake import bake
from sparse_engine.export.build import build_engine
from sparse_engine.export.model import load_model
from sparse_engine.export.options import ModelOptions
from tests.conftest import BuildOptions
from tests.export.diffusers_networks import randomised

LENGTH = 6  # vectors of a text
STEPS = 4
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EPS_SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "Euler": EulerDiscreteScheduler,
    "EulerAncestral": EulerAncestralDiscreteScheduler,
    "DPMSolverMultistep": DPMSolverMultistepScheduler,
    "LCM": LCMScheduler,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",),
}
SD: dict[str, Any] = {
    **UNET,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
SDXL = {
    **SD,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
DIT = {**TRANSFORMER, "out_channels": 8, "num_embeds_ada_norm": 1000}
PIXART = {**TRANSFORMER, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
SD3 = {
    **TRANSFORMER,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}


@dataclass(frozen=True)
class Case:
    """A pipeline class.

    Attributes:
        network: that it samples with; ``part`` is what it calls it.
        make: (network, scheduler) -> the pipeline.
        call: the pipeline, with a seed of 0 -> its float pictures or latents.
        schedulers: that it is tried with.
        family: the name of the engine that it uses.
    """

    network: Callable[[], Any]
    make: Callable[[Any, Any], Any]
    call: Callable[[Any], Any]
    schedulers: tuple[str, ...]
    family: str
    part: str = "unet"
    betas: dict[str, Any] = field(default_factory=lambda: SD_BETAS)

    def scheduler(self, name: str) -> Any:
        """A scheduler by its short name."""
        if name == "FlowMatchEuler":
            return FlowMatchEulerDiscreteScheduler(shift=3.0)
        return EPS_SCHEDULERS[name](**self.betas)

    def pipeline(self, network: Any, scheduler: str | None = None) -> Any:
        """The pipeline, silent."""
        pipe = self.make(network, self.scheduler(scheduler or self.schedulers[0]))
        pipe.set_progress_bar_config(disable=True)
        return pipe


@cache
def vae() -> Any:
    """An autoencoder of 2x2 pixels a latent."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return randomised(AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded() -> dict[str, Any]:
    """What every call of a pipeline is told; some draw from the global generator."""
    torch.manual_seed(0)
    return {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS}


def text(width: int = 24, pooled: int = 0, batch: int = 1) -> dict[str, Any]:
    """Prompts as embeddings, and what is not wanted."""
    told = {"prompt_embeds": drawn(batch, LENGTH, width, seed=1)}
    told["negative_prompt_embeds"] = drawn(batch, LENGTH, width, seed=2)
    if pooled:
        told["pooled_prompt_embeds"] = drawn(batch, pooled, seed=3)
        told["negative_pooled_prompt_embeds"] = drawn(batch, pooled, seed=4)
    return told


def _sd(kind: Any) -> Callable[[Any, Any], Any]:
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return lambda unet, scheduler: kind(
        vae=vae(), unet=unet, scheduler=scheduler, **others, requires_safety_checker=False
    )


def _sdxl(unet: Any, scheduler: Any) -> Any:
    others = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(vae=vae(), unet=unet, scheduler=scheduler, **others, add_watermarker=False)


def _sd3(transformer: Any, scheduler: Any) -> Any:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(transformer, scheduler, vae(), **dict.fromkeys(names))


def _pixart(transformer: Any, scheduler: Any) -> Any:
    return PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=transformer, scheduler=scheduler
    )


def _call_sd(pipe: Any, **more: Any) -> Any:
    return pipe(**text(), **seeded(), output_type="latent", **more)[0]


def _call_pixart(pipe: Any) -> Any:
    masks = {"prompt_attention_mask": torch.tensor([[1] * 4 + [0] * 2])}
    masks["negative_prompt_attention_mask"] = torch.tensor([[1] * 2 + [0] * 4])
    told = {**text(), **masks, "negative_prompt": None, "use_resolution_binning": False}
    return pipe(**told, **seeded(), output_type="latent")[0]


def _pixels(seed: int = 5) -> Any:
    return drawn(1, 3, 16, 16, seed=seed).sigmoid()


CASES = {
    "DDPM": Case(
        lambda: UNet2DModel(**UNET),
        DDPMPipeline,
        lambda pipe: torch.from_numpy(pipe(batch_size=2, **seeded(), output_type="np")[0]),
        ("DDPM",),
        "unet2d",
        betas={},
    ),
    "DDIM": Case(
        lambda: UNet2DModel(**UNET),
        DDIMPipeline,
        lambda pipe: torch.from_numpy(pipe(batch_size=2, eta=0.5, **seeded(), output_type="np")[0]),
        ("DDIM",),
        "unet2d",
        betas={},
    ),
    "DiT": Case(
        lambda: DiTTransformer2DModel(**DIT),
        lambda transformer, scheduler: DiTPipeline(transformer, vae(), scheduler),
        lambda pipe: torch.from_numpy(pipe([3, 998], **seeded(), output_type="np")[0]),
        ("DDIM", "DDPM", "DPMSolverMultistep"),
        "dit",
        "transformer",
        betas={},
    ),
    "StableDiffusion": Case(
        lambda: UNet2DConditionModel(**SD), _sd(StableDiffusionPipeline), _call_sd, tuple(EPS_SCHEDULERS), "sd"
    ),
    "StableDiffusionImg2Img": Case(
        lambda: UNet2DConditionModel(**SD),
        _sd(StableDiffusionImg2ImgPipeline),
        lambda pipe: _call_sd(pipe, image=_pixels(), strength=0.7),
        ("DDIM", "Euler", "DPMSolverMultistep"),
        "sd",
    ),
    "StableDiffusionInpaint": Case(
        lambda: UNet2DConditionModel(**SD),
        _sd(StableDiffusionInpaintPipeline),
        lambda pipe: _call_sd(pipe, image=_pixels(), mask_image=_pixels(6)[:, :1].round(), height=16, width=16),
        ("DDIM", "EulerAncestral"),
        "sd",
    ),
    "StableDiffusionXL": Case(
        lambda: UNet2DConditionModel(**SDXL),
        _sdxl,
        lambda pipe: pipe(**text(pooled=20), **seeded(), output_type="latent")[0],
        ("Euler", "DDIM", "DPMSolverMultistep"),
        "sdxl",
    ),
    "StableDiffusion3": Case(
        lambda: SD3Transformer2DModel(**SD3),
        _sd3,
        lambda pipe: pipe(**text(pooled=20), **seeded(), output_type="latent")[0],
        ("FlowMatchEuler",),
        "sd3",
        "transformer",
    ),
    "PixArtSigma": Case(
        lambda: PixArtTransformer2DModel(**PIXART),
        _pixart,
        _call_pixart,
        ("DPMSolverMultistep", "DDPM", "Euler"),
        "pixart",
        "transformer",
    ),
    "LatentConsistency": Case(
        lambda: UNet2DConditionModel(**SD, time_cond_proj_dim=12),
        lambda unet, scheduler: LatentConsistencyModelPipeline(
            vae(), None, None, unet, scheduler, None, None, requires_safety_checker=False
        ),
        lambda pipe: pipe(prompt_embeds=text()["prompt_embeds"], guidance_scale=4.0, **seeded(), output_type="latent")[
            0
        ],
        ("LCM",),
        "lcm",
    ),
}


@dataclass(frozen=True)
class Built:
    """A network, the same with its masks baked, and a 2:4 engine of it."""

    network: Any
    baked: Any
    path: Path
    engine: SparseEngine


def build(case: Case, folder: Path) -> Built:
    """Save a network as its pipeline does, and build its engine."""
    network = tamed(randomised(case.network()))
    saved = folder / "pipeline" / case.part
    network.save_pretrained(saved)
    case.scheduler(case.schedulers[0]).save_pretrained(folder / "pipeline" / "scheduler")
    told = {} if case.family in ("unet2d", "dit") else {"context_length": LENGTH}
    path, _ = build_engine(
        saved, folder / f"{case.family}.sengine", model=ModelOptions(**told), options=BuildOptions(sparse=True)
    )
    baked = copy.deepcopy(network)
    state = bake(load_model(saved, **told), "auto").state
    baked.load_state_dict({name: torch.from_numpy(each) for name, each in state.items()}, strict=False)
    return Built(network, baked, path, SparseEngine.load(path, threads=1, autotune=False))


def tamed(network: Any) -> Any:
    """With predictions of ordinary size, so that a trajectory does not run away."""
    for name in ("conv_out", "proj_out", "proj_out_2"):
        if hasattr(network, name):
            getattr(network, name).weight.mul_(0.3)
    return network
