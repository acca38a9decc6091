"""The U-Nets of Stable Diffusion, as diffusers stores them (``UNet2DConditionModel``): 1.x, 2.x, XL, and their LCMs.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022 (arXiv 2112.10752);
Podell et al., "SDXL" (arXiv 2307.01952), which is told the picture's sizes and a pooled text; Luo et al., "Latent
Consistency Models" (arXiv 2310.04378), which are told how strong guidance is. After the residual blocks of most stages
transformers attend to the map itself and to a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import CheckpointError
from sparse_engine.sampling import SAMPLERS

from .base import Family, Recipe, Shapes
from .diffusers_parts import (
    BLOCK_LAYERS,
    BY_ANALOGY,
    CROSS_LAYERS,
    GEGLU,
    CrossAttention,
    FeedForward,
    SelfAttention,
    TwoLinears,
    check_fixed,
    positive,
)
from .reading import agree, shape_of
from .unet_parts import as_map, as_tokens, positions_with, size_of
from .unet_stages import (
    DEFAULTS,
    DIFFUSERS_NAMES,
    FLOAT32_LAYERS,
    OWN_KEYS,
    SPARSE_LAYERS,
    UNet,
    UNetSizes,
    check_groups,
    of_stages,
    own_names,
    read_sizes,
    settled,
)

KIND = "UNet2DConditionModel"
NAMES = {
    **DIFFUSERS_NAMES,
    "heads": "stage_heads",
    "attention_head_dim": "stage_heads",  # the number of heads, whatever its name says (huggingface/diffusers#2011)
    "transformer_layers_per_block": "depths",
    "cross_attention_dim": "context_dim",
    "use_linear_projection": "linear_projection",
    "addition_time_embed_dim": "size_dim",
    "time_cond_proj_dim": "guidance_dim",
}
FIXED: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "addition_embed_type": "text_time",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "mid_block_only_cross_attention": False,
    "class_embeddings_concat": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "reverse_transformer_layers_per_block": None,
    "num_attention_heads": None,
}
BLOCKS = {"": False, "CrossAttn": True}
HEADS = 8  # diffusers' default
CONTEXT_LENGTH = 77  # vectors of CLIP
SIZES = 6  # numbers that SDXL is told: height, width, crop's top and left, target's height and width
# SDXL's refiner is told five, an aesthetic score in place of the target; known by the columns that they and 1280 make.
REFINER_SIZES, REFINER_COLUMNS = 5, 2560
SIZE_DIM = 256  # sinusoids of each, in SDXL
NORM_EPS = 1e-6  # of the norm before a transformer, whatever that of the residual blocks
MLP_RATIO = 4
ADDED = "add_embedding.linear_1.weight"
GUIDANCE = "time_embedding.cond_proj.weight"
TEXT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
V_OR_EPS_WIDTH = 1024  # of the texts of Stable Diffusion 2.x, of which some predict v and others eps
SAY_V_OR_EPS = "Stable Diffusion 2.x of 512 pixels predicts eps, that of 768 predicts v, and their weights look alike"
ONLY_NETWORK = (
    "this is a latent consistency model, whose own sampler is not offered: use engine.network, or the engine in a "
    "pipeline with LCMScheduler"
)


@dataclasses.dataclass(frozen=True)
class UNetConditionConfig(UNetSizes):
    """Everything that fixes the graph.

    ``stage_heads`` is one number for each stage; ``linear_projection`` says that linears, not convolutions, lead into
    and out of a transformer; ``pooled_dim`` and ``size_dim`` are those of SDXL's pooled text and of the sinusoids of
    each of its ``sizes`` numbers, 0 elsewhere; ``guidance_dim`` that of what an LCM is told of guidance, 0 elsewhere.
    """

    stage_heads: tuple[int, ...]
    context_dim: int
    context_length: int
    linear_projection: bool
    pooled_dim: int = 0
    size_dim: int = 0
    sizes: int = SIZES
    guidance_dim: int = 0

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The text, of which what none is has to be given; a label; SDXL's pooled text and sizes; an LCM's guidance."""
        told = [Condition("context", (self.context_length, self.context_dim), null=None)]
        told += class_condition(self.num_classes)
        if self.pooled_dim:
            told.append(Condition("pooled", (self.pooled_dim,), null=None))
            told.append(Condition("time_ids", (self.sizes,), null="same"))
        if self.guidance_dim:
            told.append(Condition("timestep_cond", (self.guidance_dim,), null="same"))
        return tuple(told)


class Block(nn.Module):
    """Attention to the map, attention to the text, an MLP, each after a norm and added."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = SelfAttention(dim, heads, bias=False)
        self.attn2 = CrossAttention(dim, heads, context_dim, bias=False)
        self.ff = FeedForward(dim, MLP_RATIO * dim, GEGLU)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """h: [B, P, D]; context: [B, L, D of it] -> [B, P, D]."""
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), context)
        return h + self.ff(self.norm3(h))


class Transformer(nn.Module):
    """Blocks over a map's places, and what came in."""

    def __init__(self, config: UNetConditionConfig, level: int, depth: int) -> None:
        super().__init__()
        width, self.linear = config.widths[level], config.linear_projection
        self.norm = nn.GroupNorm(config.groups, width, NORM_EPS)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.stage_heads[level], config.context_dim) for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: [B, C, H, W]; context: [B, L, D of it] -> [B, C, H, W]."""
        h = self.norm(x)
        h = self.proj_in(as_tokens(h)) if self.linear else as_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + (as_map(self.proj_out(h), x) if self.linear else self.proj_out(as_map(h, x)))


class GuidedTime(TwoLinears):
    """A time and the strength of guidance as one vector."""

    def __init__(self, width: int, dim: int, guidance_dim: int) -> None:
        super().__init__(width, dim)
        self.cond_proj = nn.Linear(guidance_dim, width, bias=False)

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        """x: [B, width], sinusoids; guidance: [B, guidance_dim] -> [B, D]."""
        return super().forward(x if guidance is None else x + self.cond_proj(guidance))


class UNetCondition(UNet):
    """The network: (x, t, context, ...) -> prediction of x's shape."""

    config: UNetConditionConfig

    def __init__(self, config: UNetConditionConfig) -> None:
        super().__init__(config)
        if config.guidance_dim:
            self.time_embedding = GuidedTime(config.time_width, config.time_dim, config.guidance_dim)
        if config.pooled_dim:
            self.add_embedding = TwoLinears(config.pooled_dim + config.sizes * config.size_dim, config.time_dim)

    def attention(self, level: int, depth: int, middle: bool) -> nn.Module:
        """See ``UNet``."""
        return Transformer(self.config, level, depth)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Predict what the network was trained for (eps or v).

        Args:
            x: [B, C, H, W].
            t: [B], in the network's own time units.
            context: [B, context_length, context_dim], of the text.
            y: [B] int64 labels, for a network that is told one.
            pooled: [B, pooled_dim], of the text as a whole, for SDXL.
            time_ids: [B, sizes], for SDXL: the picture's height and width, the crop's top and left, the target's height
                and width, in pixels.
            timestep_cond: [B, guidance_dim], for an LCM: sinusoids of the strength of guidance.
        """
        sinusoids = self.sinusoids(t, self.config.time_width)
        emb = self.time_embedding(*(each for each in (sinusoids, timestep_cond) if each is not None))
        if y is not None:
            emb = emb + self.class_embedding(y)
        if pooled is not None and time_ids is not None:
            sizes = (
                self.sinusoids(time_ids.flatten(), self.config.size_dim)
                .unflatten(0, (-1, self.config.sizes))
                .flatten(1)
            )
            emb = emb + self.add_embedding(torch.cat([pooled, sizes], dim=1))
        return self.predict(x, emb, context)


def _recognises(shapes: Shapes) -> bool:
    return set(shapes) >= OWN_KEYS | {TEXT}


def _read_config(shapes: Shapes, given: Mapping[str, Any]) -> tuple[UNetConditionConfig, list[str]]:
    check_fixed(given, FIXED, KIND)
    read = {**read_sizes(shapes, KIND), **_read_own(shapes)}
    own = own_names(given, NAMES, BLOCKS)
    own.pop("pooled_dim", None)
    if isinstance(own.get("context_dim"), tuple) and len(set(own["context_dim"])) == 1:
        own["context_dim"] = own["context_dim"][0]
    agree(own, read)
    values, notes = settled(own, {**DEFAULTS, "stage_heads": HEADS}, KIND)
    heads = of_stages(values.pop("stage_heads"), len(read["widths"]))
    _check_heads(heads, read["widths"])
    length = own.get("context_length")
    if length is None:
        length = CONTEXT_LENGTH
        notes.append(f"context_length = {length}: not in the weights; CLIP's; say --context-length")
    if read["guidance_dim"]:
        notes.append(ONLY_NETWORK)
    pooled_dim, size_dim, sizes = _added(shapes, own)
    # A map that is no multiple is cut to what the way down had: with padding on one side alone it would be too small.
    multiple = 1 if values["padding"] else 1 << (len(read["widths"]) - 1)
    config = UNetConditionConfig(
        image_size=size_of(own.get("image_size"), multiple),
        stage_heads=heads,
        context_length=positive(length, "context_length"),
        pooled_dim=pooled_dim,
        size_dim=size_dim,
        sizes=sizes,
        **read,
        **values,
    )
    check_groups(config)
    masked = "masked layers = every convolution and linear of the stages, but for those of the time"
    return config, [*notes, f"{masked}: {BY_ANALOGY}"]


def _read_own(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say beyond ``read_sizes``. Raises CheckpointError."""
    proj_in = next((shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")), ())
    return {
        "context_dim": shape_of(shapes, TEXT, 2, KIND)[1],
        "linear_projection": len(proj_in) == 2,
        "guidance_dim": shapes[GUIDANCE][1] if GUIDANCE in shapes else 0,
    }


def _check_heads(heads: Any, widths: tuple[int, ...]) -> None:
    fits = isinstance(heads, tuple) and len(heads) == len(widths)
    if fits and all(type(each) is int and each > 0 and w % each == 0 for each, w in zip(heads, widths, strict=True)):
        return
    raise CheckpointError(
        f"attention_head_dim is {heads!r} in the given configuration; expected the number of heads, which divides the "
        f"channels {list(widths)} of the stages: one number, or one for each",
        "give the number the model was trained with",
    )


def _added(shapes: Shapes, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """(width of the pooled text, sinusoids of each size, sizes) of SDXL; zeros elsewhere. Raises CheckpointError."""
    if ADDED not in shapes:
        return 0, 0, SIZES
    size_dim = positive(given.get("size_dim") or SIZE_DIM, "addition_time_embed_dim")
    columns = shape_of(shapes, ADDED, 2, KIND)[1]
    sizes = REFINER_SIZES if (columns, size_dim) == (REFINER_COLUMNS, SIZE_DIM) else SIZES
    if columns <= sizes * size_dim:
        raise CheckpointError(
            f"{ADDED} has {columns} columns, {sizes} x {size_dim} of them of sizes; expected more, of a pooled text",
            "correct addition_time_embed_dim in config.json",
        )
    return columns - sizes * size_dim, size_dim, sizes


def _recipe(config: UNetConditionConfig) -> Recipe:
    """Stable Diffusion's betas, times 0 to 999, latents."""
    schedule = {"name": "stable-diffusion", "time_shift": -1.0}
    unknown = SAY_V_OR_EPS if config.context_dim == V_OR_EPS_WIDTH and not config.pooled_dim else None
    excluded = dict.fromkeys(SAMPLERS, ONLY_NETWORK) if config.guidance_dim else {}
    return Recipe(schedule, "eps", None, None, "dpm-solver++", excluded, unknown)


FAMILY = Family(
    name="unet2d-condition",
    sparse_layers=(
        *SPARSE_LAYERS,
        "*.attentions.*.proj_in",
        "*.attentions.*.proj_out",
        *BLOCK_LAYERS,
        *CROSS_LAYERS,
    ),
    recognises=_recognises,
    read_config=_read_config,
    config_from_dict=UNetConditionConfig.from_dict,
    network=UNetCondition,
    recipe=_recipe,
    positions=positions_with(UNetCondition),
    float32_layers=(*FLOAT32_LAYERS, "add_embedding.*"),
    settings=frozenset(NAMES) | {field.name for field in dataclasses.fields(UNetConditionConfig)},
    class_names=frozenset({"UNet2DConditionModel"}),
)
