"""``build=True``: an engine of the network that a pipeline holds, built once for its weights and what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from sparse_engine.diffusers import building, restore, use_engine
from sparse_engine.errors import OptionError, UnsupportedError
from tests.pipelines.pipeline_cases import CASES, Built

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class AskedToBuildError(Exception):
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "engines"


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, a build is an error."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AskedToBuildError

    return lambda: monkeypatch.setattr(building, "build_engine", fail)


def pipeline(built: Callable[[str], Built]) -> Any:
    return CASES["DDIM"].pipeline(built("DDIM").network)


@pytest.mark.filterwarnings("ignore:the mask removes")
def test_it_is_built_once(
    built: Callable[[str], Built], cache: Path, no_build: Callable[[], None], one_torch_thread: None
) -> None:
    pipe, options = pipeline(built), {"build": True, "cache": cache, "threads": 1, "autotune": False}
    with pytest.warns(UserWarning, match="the mask removes"):  # of weights that no training put under it
        use_engine(pipe, **options)
    expected = CASES["DDIM"].call(CASES["DDIM"].pipeline(built("DDIM").baked))
    assert (CASES["DDIM"].call(pipe) - expected).abs().max() <= 1e-4
    files = list(cache.iterdir())
    assert [file.name.split("-")[0] for file in files] == ["UNet2DModel"]
    manifest = pipe.unet.engine.manifest
    assert manifest.schedule["name"] == "discrete"
    assert not any("/" in note for note in manifest.notes)  # of the folder that it was saved to on the way
    no_build()
    again = pipeline(built)
    again.scheduler = PNDMScheduler(beta_start=0.0001, beta_end=0.02)  # of the same training
    use_engine(again, **options)
    assert list(cache.iterdir()) == files
    for changed in ({"precision": "bf16"}, {"sparse": False}, {"mask_layers": ["down_blocks.*"]}):
        with pytest.raises(AskedToBuildError):
            use_engine(pipeline(built), **options, **changed)
    restore(pipe)
    bias = pipe.unet.conv_out.bias.data
    bias += 1
    try:
        with pytest.raises(AskedToBuildError):
            use_engine(pipe, **options)
    finally:
        bias -= 1
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(AskedToBuildError):  # damaged: built anew
        use_engine(pipe, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the mask removes")
def test_int8_is_calibrated_on_the_networks_own_pictures(
    built: Callable[[str], Built], tmp_path: Path, one_torch_thread: None
) -> None:
    pipe = pipeline(built)
    use_engine(pipe, build=True, precision="int8", sparse=False, cache=tmp_path, threads=1, autotune=False)
    manifest = pipe.unet.engine.manifest
    assert manifest.precision == "int8"
    assert manifest.quantisation is not None
    found, expected = CASES["DDIM"].call(pipe), CASES["DDIM"].call(pipeline(built))
    assert 0 < (found - expected).abs().mean() < 0.05
    assert len(list(tmp_path.iterdir())) == 2  # the float engine that was sampled with, too


def test_int8_of_a_network_that_is_told_a_text_needs_its_texts(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built("StableDiffusion")
    built_engine = building.built_engine
    monkeypatch.setattr(
        building,
        "built_engine",
        lambda original, pipe, asked: made.path if asked.precision == "fp32" else built_engine(original, pipe, asked),
    )
    with pytest.raises(
        OptionError, match="int8 needs calibration data, and the network is told context.*\n.*calibrate"
    ):
        use_engine(
            CASES["StableDiffusion"].pipeline(made.network), build=True, precision="int8", cache=tmp_path, sparse=False
        )


def test_weights_that_are_not_in_memory_are_refused(built: Callable[[str], Built], tmp_path: Path) -> None:
    pipe = CASES["DDIM"].pipeline(CASES["DDIM"].network().to("meta"))
    with pytest.raises(UnsupportedError, match="not in memory.*\n.*use_engine before"):
        use_engine(pipe, build=True, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users_own(
    built: Callable[[str], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    made, pipe = built("DDIM"), pipeline(built)
    monkeypatch.setattr(
        building, "build_engine", lambda _, path, **__: (path.write_bytes(made.path.read_bytes()), made.engine.manifest)
    )
    use_engine(pipe, build=True, threads=1, autotune=False)
    assert [file.parent for file in tmp_path.rglob("*.sengine")] == [tmp_path / "diffusers"]
    assert torch.is_tensor(CASES["DDIM"].call(pipe))
