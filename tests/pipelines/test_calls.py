"""What a pipeline's network is called with: every form is taken, and what an engine cannot honour is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from sparse_engine.diffusers import EngineDenoiser, use_engine
from sparse_engine.diffusers.original import Original
from sparse_engine.errors import OptionError, UnsupportedError
from tests.pipelines.pipeline_cases import CASES, LENGTH, Built, drawn

X = drawn(2, 4, 8, 8, seed=8)
CONTEXT = drawn(2, LENGTH, 24, seed=9)


def denoiser(made: Built) -> EngineDenoiser:
    return EngineDenoiser(made.engine, Original(made.network))


@pytest.fixture
def unet(built: Callable[[str], Built]) -> EngineDenoiser:
    return denoiser(built("StableDiffusion"))


@pytest.mark.parametrize(
    "time",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor([7.0, 7.0], dtype=torch.float64)],
    ids=["int", "float", "0-d", "[1]", "[B]", "float64 [B]"],
)
def test_times_in_every_form(time: Any, unet: EngineDenoiser) -> None:
    expected = torch.from_numpy(unet.engine.network(X.numpy(), 7.0, conditioning={"context": CONTEXT.numpy()}))
    assert torch.equal(unet(X, time, CONTEXT).sample, expected)


def test_a_time_between_two_steps_is_not_cut(unet: EngineDenoiser, built: Callable[[str], Built]) -> None:
    time = torch.tensor(499.5)
    expected = built("StableDiffusion").baked(X, time, CONTEXT).sample
    assert (unet(X, time, CONTEXT).sample - expected).abs().max() < 1e-5
    assert (unet(X, 499, CONTEXT).sample - expected).abs().max() > 1e-5


def test_arguments_by_place_and_by_name_and_results_in_both_forms(unet: EngineDenoiser) -> None:
    by_name = unet(sample=X, timestep=3, encoder_hidden_states=CONTEXT, cross_attention_kwargs={"scale": 1.0})
    by_place = unet(X, 3, CONTEXT, None, return_dict=False, added_cond_kwargs={}, timestep_cond=None)
    assert isinstance(by_place, tuple)
    assert len(by_place) == 1
    assert torch.equal(by_name.sample, by_place[0])
    assert torch.equal(by_name[0], by_place[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_pictures_type(dtype: torch.dtype, unet: EngineDenoiser) -> None:
    found = unet(X.to(dtype), torch.tensor(3, dtype=dtype), CONTEXT.to(dtype)).sample
    assert found.dtype == dtype
    exact = unet(X.to(dtype).float(), 3, CONTEXT.to(dtype).float()).sample
    assert torch.equal(found, exact.to(dtype))


def test_results_are_the_callers_own(unet: EngineDenoiser) -> None:
    first = unet(X, 3, CONTEXT).sample
    kept = first.clone()
    unet(-X, 900, CONTEXT).sample.zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["DiT", "PixArtSigma"])
def test_a_learned_variance_comes_out_as_zeros(name: str, built: Callable[[str], Built]) -> None:
    made = built(name)
    told: dict[str, Any] = {"class_labels": torch.tensor([3, 4])}
    if name == "PixArtSigma":
        told = {"encoder_hidden_states": CONTEXT, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    found = denoiser(made)(X, timestep=torch.tensor([5, 5]), **told).sample
    expected = made.baked(X, timestep=torch.tensor([5, 5]), **told).sample
    assert found.shape == expected.shape == (2, 8, 8, 8)
    assert (found[:, :4] - expected[:, :4]).abs().max() < 1e-5
    assert not found[:, 4:].any()


def test_a_scheduler_that_reads_the_variance_is_refused(built: Callable[[str], Built]) -> None:
    case, made = CASES["DiT"], built("DiT")
    pipe = case.pipeline(made.network)
    pipe.scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(UnsupportedError, match="variance_type 'learned_range'.*\n.*fixed_small"):
        use_engine(pipe, made.engine)
    assert pipe.transformer is made.network
    pipe.scheduler = case.scheduler("DDIM")
    use_engine(pipe, made.engine)
    pipe.scheduler = DDPMScheduler(variance_type="learned")  # it may be changed later on
    with pytest.raises(UnsupportedError, match="gives no variance"):
        case.call(pipe)


def test_a_shorter_text_is_filled_up_where_there_is_a_mask(built: Callable[[str], Built]) -> None:
    made = built("PixArtSigma")
    told = {"encoder_hidden_states": CONTEXT[:, :4], "encoder_attention_mask": torch.ones(2, 4)}
    told["encoder_attention_mask"][1, 2:] = 0
    added = {"resolution": None, "aspect_ratio": None}
    found = denoiser(made)(X, timestep=9, added_cond_kwargs=added, **told).sample
    expected = made.baked(X, timestep=torch.tensor([9, 9]), added_cond_kwargs=added, **told).sample
    assert (found - expected)[:, :4].abs().max() < 1e-5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cross_attention_kwargs": {"scale": 0.5}}, "LoRA's scale of 0.5.*\n.*pipe.fuse_lora"),
    ({"cross_attention_kwargs": {"ip_adapter_masks": [X]}}, "IP-Adapter"),
    ({"cross_attention_kwargs": {"gligen": {}}}, "option 'gligen'"),
    ({"added_cond_kwargs": {"image_embeds": X}}, "IP-Adapter.*\n.*restore"),
    ({"down_block_additional_residuals": (X,)}, "ControlNet.*\n.*restore"),
    ({"mid_block_additional_residual": X}, "ControlNet"),
    ({"down_intrablock_additional_residuals": [X]}, "T2I-Adapter"),
    ({"class_labels": torch.tensor([1, 2])}, "y is given, but the engine's network is told context"),
    ({"encoder_attention_mask": torch.ones(2, LENGTH)}, "context_mask is given"),
    (
        {"encoder_hidden_states": CONTEXT[:, :3]},
        "text has 3 vectors, and the engine's context is 6.*\n.*context_length=3",
    ),
    ({"encoder_hidden_states": None}, r"conditioning\['context'\] is missing"),
    ({"sample": X[:, :, :4]}, r"shape \[2, 4, 4, 8\]; the engine's is \[B, 4, 8, 8\].*\n.*4 x 8|8 x 8 latents"),
    ({"sample": X[:, :3]}, r"the engine's is \[B, 4, 8, 8\]"),
    ({"sample": X.numpy()}, "ndarray; expected a tensor"),
    ({"sample": X.clone().requires_grad_()}, "gradient"),
    ({"timestep": torch.tensor([1, 2, 3])}, r"the time is int64 \[3\]; expected one number, or one for each of 2"),
    ({"timestep": None}, "the time is"),
    ({"nonsense": 1}, "does not take this call"),
]


@pytest.mark.parametrize(
    "changed, message", REFUSED, ids=[next(iter(entry[0])) + str(i) for i, entry in enumerate(REFUSED)]
)
def test_what_cannot_be_honoured_is_refused(changed: dict[str, Any], message: str, unet: EngineDenoiser) -> None:
    told = {"sample": X, "timestep": 3, "encoder_hidden_states": CONTEXT, **changed}
    with pytest.raises((OptionError, UnsupportedError), match=message):
        unet(**told)


def test_skip_layers_and_controlnet_of_sd3_are_refused(built: Callable[[str], Built]) -> None:
    transformer = denoiser(built("StableDiffusion3"))
    told = {"hidden_states": X, "timestep": 3, "encoder_hidden_states": CONTEXT, "pooled_projections": drawn(2, 20)}
    transformer(**told)
    with pytest.raises(UnsupportedError, match="skip-layer guidance"):
        transformer(**told, skip_layers=[1])
    with pytest.raises(UnsupportedError, match="ControlNet"):
        transformer(**told, block_controlnet_hidden_states=[X])
    with pytest.raises(UnsupportedError, match="joint_attention_kwargs: a LoRA"):
        transformer(**told, joint_attention_kwargs={"scale": 2})


def test_a_class_is_asked_for(built: Callable[[str], Built]) -> None:
    with pytest.raises(OptionError, match="class_labels are missing"):
        denoiser(built("DiT"))(X, timestep=3)


@pytest.mark.parametrize(
    "name, fix",
    [
        ("attn_processors", "restore"),
        ("encoder_hid_proj", "restore"),
        ("enable_freeu", "restore"),
        ("load_lora_adapter", "fuse_lora"),
        ("fuse_qkv_projections", "leave it out"),
    ],
)
def test_what_is_done_to_networks_is_refused(name: str, fix: str, unet: EngineDenoiser) -> None:
    assert not hasattr(unet, name)
    with pytest.raises(UnsupportedError, match=f"{name}.*\n.*{fix}"):
        getattr(unet, name)
    with pytest.raises(AttributeError, match="nonsense"):
        unet.nonsense  # noqa: B018
