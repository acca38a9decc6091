"""An engine in, the network out again: what pipelines do to their parts, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from sparse_engine.diffusers import EngineDenoiser, restore, use_engine
from sparse_engine.diffusers.original import Original
from sparse_engine.errors import CheckpointError, EngineClosedError, OptionError, UnsupportedError
from tests.export.diffusers_networks import randomised
from tests.pipelines.pipeline_cases import CASES, SD, UNET, Built, tamed, text

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NO_TEXT = {"text_encoder": None, "tokenizer": None}


@pytest.fixture
def made(built: Callable[[str], Built]) -> Built:
    return built("StableDiffusion")


@pytest.fixture
def pipe(made: Built) -> Any:
    return CASES["StableDiffusion"].pipeline(made.network)


@pytest.fixture
def ddpm(built: Callable[[str], Built]) -> Any:
    return CASES["DDPM"].pipeline(built("DDPM").network)


def draw(pipe: Any) -> torch.Tensor:
    return CASES["StableDiffusion"].call(pipe)


def weights(network: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in network.state_dict().items()}


def test_the_network_comes_back_untouched(pipe: Any, made: Built) -> None:
    before = weights(made.network)
    assert use_engine(pipe, made.path, threads=1, autotune=False) is pipe
    engine = pipe.unet.engine
    draw(pipe)
    assert restore(pipe) is pipe
    assert pipe.unet is made.network
    after = made.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    with pytest.raises(EngineClosedError):
        engine.warmup(1)
    with pytest.raises(OptionError, match="uses no engine.*\n.*use_engine"):
        restore(pipe)


def test_it_looks_like_the_original(pipe: Any, made: Built) -> None:
    use_engine(pipe, made.engine)
    unet: Any = pipe.unet
    assert unet.config == made.network.config
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))
    assert isinstance(unet, EngineDenoiser)
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert pipe.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert list(unet.parameters()) == []
    assert list(unet.modules()) == [unet]


def test_sdxl_reads_the_width_of_what_is_added(built: Callable[[str], Built]) -> None:
    made = built("StableDiffusionXL")
    pipe = use_engine(CASES["StableDiffusionXL"].pipeline(made.network), made.engine)
    assert pipe.unet.add_embedding.linear_1.in_features == 68


def test_it_goes_where_the_pipeline_goes(pipe: Any, made: Built) -> None:
    use_engine(pipe, made.engine)
    expected = draw(pipe)
    pipe.to(torch.float16)
    assert pipe.unet.dtype == torch.float16
    pipe.to(torch.float32)
    pipe.unet.half().float().cpu()
    assert torch.equal(draw(pipe), expected)
    with pytest.raises(UnsupportedError, match="meta device.*\n.*restore"):
        pipe.unet.to("meta")
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            pipe.unet.to("cuda")
    restore(pipe)
    assert made.network.dtype == torch.float32


class Hook:
    """What accelerate's ``cpu_offload_with_hook`` does to a module, as far as a pipeline sees it."""

    def __init__(self, module: Any) -> None:
        self.moves: list[str] = []
        self._module, self._forward = module, module.forward
        self.execution_device = torch.device("cpu")
        module._hf_hook = self
        module._old_forward = module.forward
        module.forward = self._hooked
        self._move()

    def _hooked(self, *args: Any, **kwargs: Any) -> Any:
        self._move()
        return self._module._old_forward(*args, **kwargs)

    def _move(self) -> None:
        self._module.to(self.execution_device)
        self.moves.append("to")

    def remove(self) -> None:
        self._module.forward = self._module._old_forward
        delattr(self._module, "_hf_hook")
        delattr(self._module, "_old_forward")


def test_the_hooks_of_offloading(pipe: Any, made: Built) -> None:
    use_engine(pipe, made.engine)
    expected = draw(pipe)
    hook = Hook(pipe.unet)
    assert pipe._execution_device == torch.device("cpu")
    assert torch.equal(draw(pipe), expected)
    assert len(hook.moves) == 1 + 4
    hook.remove()
    assert torch.equal(draw(pipe), expected)


def test_hooks_and_modes_of_torch(pipe: Any, made: Built) -> None:
    use_engine(pipe, made.engine)
    seen = []
    handle = pipe.unet.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    draw(pipe.unet.eval() and pipe)
    handle.remove()
    assert seen == [torch.Size([2, 4, 8, 8])] * 4
    compiled = copy.copy(pipe)
    compiled.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.equal(draw(compiled), draw(pipe))


def test_saving_saves_the_original(pipe: Any, made: Built, tmp_path: Path) -> None:
    use_engine(pipe, made.engine)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **NO_TEXT)
    loaded.set_progress_bar_config(disable=True)
    own = loaded.unet.state_dict()
    assert all(torch.equal(own[name], each) for name, each in made.network.state_dict().items())
    assert (draw(use_engine(loaded, made.engine)) - draw(pipe)).abs().max() == 0


def test_a_pipeline_is_loaded_with_it(pipe: Any, made: Built, tmp_path: Path) -> None:
    """The type check of ``from_pretrained``; and what saves it afterwards writes the original's class."""
    pipe.save_pretrained(tmp_path)
    use_engine(pipe, made.engine)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, unet=pipe.unet, **NO_TEXT)
    assert loaded.unet is pipe.unet
    assert loaded.config["unet"] == ("diffusers", "UNet2DConditionModel")
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert other.unet is pipe.unet
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe, unet=pipe.unet).unet is pipe.unet


def test_two_pipelines_share_an_engine(made: Built) -> None:
    first, second = (CASES["StableDiffusion"].pipeline(made.network) for _ in range(2))
    use_engine(first, made.path, threads=1, autotune=False)
    use_engine(second, first.unet.engine)
    expected = draw(first)
    restore(first)
    assert torch.equal(draw(second), expected)  # the engine is open as long as one of them uses it
    engine = second.unet.engine
    restore(second)
    with pytest.raises(EngineClosedError):
        engine.warmup(1)


def test_an_engine_that_was_given_stays_open(pipe: Any, made: Built) -> None:
    restore(use_engine(pipe, made.engine))
    made.engine.warmup(1)


def test_another_engine_takes_the_place_of_the_first(pipe: Any, made: Built) -> None:
    use_engine(pipe, made.path, threads=1, autotune=False)
    first = pipe.unet.engine
    use_engine(pipe, made.engine)
    with pytest.raises(EngineClosedError):
        first.warmup(1)
    assert restore(pipe).unet is made.network


def test_two_threads(made: Built) -> None:
    pipes = [CASES["StableDiffusion"].pipeline(made.network) for _ in range(2)]
    for each in pipes:
        use_engine(each, made.engine)
    expected = [draw(pipes[0])]
    found: list[torch.Tensor] = []

    def work(pipe: Any) -> None:
        generator = torch.Generator()
        for _ in range(3):
            told = {**text(), "generator": generator.manual_seed(0)}
            found.append(pipe(**told, num_inference_steps=4, output_type="latent")[0])

    threads = [threading.Thread(target=work, args=(each,)) for each in pipes]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 6
    assert all(torch.equal(each, expected[0]) for each in found)


def test_a_fork_is_told_to_load_its_own(pipe: Any, made: Built) -> None:
    """The child is refused, restores without touching the parent's engine, and draws with one of its own."""
    use_engine(pipe, made.path, threads=1, autotune=False)
    expected = draw(pipe)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            draw(pipe)
        except EngineClosedError as error:
            said = error.fix or ""
        try:
            restore(pipe)
            use_engine(pipe, made.path, threads=1, autotune=False)
            said += f" {bool(torch.equal(draw(pipe), expected))}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    assert "load it in the child process" in said
    assert said.endswith("True")
    assert torch.equal(draw(pipe), expected)
    restore(pipe)


def test_any_object_that_calls_its_network(made: Built) -> None:
    """Somebody's own pipeline, and a network under another name."""
    own = SimpleNamespace(model=made.network)
    with pytest.raises(OptionError, match="neither unet nor transformer.*\n.*component="):
        use_engine(own, made.engine)
    use_engine(own, made.engine, component="model")
    x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 24)
    assert (own.model(x, 3, context)[0] - made.baked(x, 3, context)[0]).abs().max() < 1e-5
    assert restore(own).model is made.network
    module = torch.nn.Module()
    module.unet = made.network
    use_engine(module, made.engine)
    assert isinstance(module.unet, EngineDenoiser)
    assert restore(module).unet is made.network


def test_a_compiled_network_comes_back_compiled(made: Built) -> None:
    pipe = CASES["StableDiffusion"].pipeline(made.network)
    pipe.unet = compiled = torch.compile(made.network, backend="eager")
    use_engine(pipe, made.engine)
    assert pipe.unet.config.cross_attention_dim == 24
    draw(pipe)
    assert restore(pipe).unet is compiled


MISUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "neither engine= nor build=True"),
    ({"engine": "x.sengine", "build": True}, "engine= and build=True are given"),
    ({"engine": "nowhere.sengine"}, "nowhere.sengine does not exist"),
    ({"engine": "x.sengine", "precision": "bf16"}, "precision: of a build"),
    ({"build": True, "presicion": "bf16"}, "presicion is no option of a build; expected precision"),
    ({"engine": 3}, "engine = 3; expected a path"),
    ({"build": "yes"}, "build = 'yes'; expected True"),
]


@pytest.mark.parametrize("given, message", MISUSED, ids=[message.split(":")[0] for _, message in MISUSED])
def test_misuse(given: dict[str, Any], message: str, pipe: Any, made: Built) -> None:
    with pytest.raises(Exception, match=message):
        use_engine(pipe, **given)
    assert pipe.unet is made.network


def test_threads_of_an_engine_that_is_loaded(pipe: Any, made: Built) -> None:
    with pytest.raises(OptionError, match="threads or device is given with an engine that is loaded"):
        use_engine(pipe, made.engine, threads=1)


def test_an_engine_of_another_network_is_refused(pipe: Any, built: Callable[[str], Built], made: Built) -> None:
    with pytest.raises(OptionError, match="engine's family is dit-diffusers, and the .* a UNet2DConditionModel"):
        use_engine(pipe, built("DiT").engine)
    with pytest.raises(OptionError, match="takes 4 channels and the engine 3"):
        use_engine(pipe, built("DDPM").engine)
    with pytest.raises(OptionError, match="engine's linear_projection is True, and the network's is False"):
        use_engine(pipe, built("StableDiffusionXL").engine)
    pipe.unet = UNet2DConditionModel(**{**SD, "attention_head_dim": 4})
    with pytest.raises(OptionError, match=r"engine's stage_heads is \[2\], and the network's is \[4\]"):
        use_engine(pipe, made.path)
    pipe.unet = UNet2DConditionModel(**SD, in_channels=9)
    with pytest.raises(OptionError, match="takes 9 channels and the engine 4.*\n.*inpainting"):
        use_engine(pipe, made.path)


def test_nine_channels_are_refused_by_the_build_too(pipe: Any, tmp_path: Path) -> None:
    pipe.unet = UNet2DConditionModel(**SD, in_channels=9)
    with pytest.raises(CheckpointError, match="9"):
        use_engine(pipe, build=True, cache=tmp_path)
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == []


def test_the_original_may_be_let_go(built: Callable[[str], Built], tmp_path: Path) -> None:
    made = built("DDPM")
    CASES["DDPM"].pipeline(made.network).save_pretrained(tmp_path)
    pipe: Any = DDPMPipeline.from_pretrained(tmp_path)
    gone = weakref.ref(pipe.unet)
    use_engine(pipe, made.engine, keep_original=False)
    gc.collect()
    assert gone() is None
    pipe.save_pretrained(tmp_path / "again")
    restore(pipe)
    assert type(pipe.unet) is UNet2DModel
    own = pipe.unet.state_dict()
    assert all(torch.equal(own[name], each) for name, each in made.network.state_dict().items())
    again = UNet2DModel.from_pretrained(tmp_path / "again" / "unet").state_dict()
    assert all(torch.equal(own[name], each) for name, each in again.items())


def test_the_original_stays_where_it_cannot_be_had_again(
    ddpm: Any, built: Callable[[str], Built], tmp_path: Path
) -> None:
    engine = built("DDPM").engine
    with pytest.raises(OptionError, match="does not come from a folder.*\n.*keep_original"):
        use_engine(ddpm, engine, keep_original=False)
    ddpm.save_pretrained(tmp_path)
    pipe: Any = DDPMPipeline.from_pretrained(tmp_path)
    pipe.unet.conv_out.bias.data += 1  # as fusing a LoRA does
    network = pipe.unet
    with pytest.raises(OptionError, match="holds other weights"):
        use_engine(pipe, engine, keep_original=False)
    assert pipe.unet is network
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    use_engine(pipe, engine, keep_original=False)
    tamed(randomised(UNet2DModel(**UNET, time_embedding_dim=16))).save_pretrained(tmp_path / "unet")
    with pytest.raises(CheckpointError, match="unet"):
        restore(pipe)
    assert isinstance(pipe.unet, EngineDenoiser)


def test_engines_are_not_kept_alive_by_pipelines_that_are_gone(made: Built) -> None:
    pipe = CASES["StableDiffusion"].pipeline(made.network)
    use_engine(pipe, made.path, threads=1, autotune=False)
    engine = weakref.ref(pipe.unet.engine)
    del pipe
    gc.collect()
    assert engine() is None


def test_an_engine_and_its_denoiser_are_not_copied(made: Built) -> None:
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        copy.deepcopy(EngineDenoiser(made.engine, Original(made.network)))
