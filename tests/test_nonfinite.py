"""NaN and infinite values: never a black picture, always an error that says where they began."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.backends.cuda.dlpack import SharedArray
from sparse_engine.calibration.collect import collect
from sparse_engine.errors import NonFiniteError, OptionError
from sparse_engine.results import _first_broken
from sparse_engine.sampling import VPLinear, make_trajectory, walk

FAST: dict[str, Any] = {"steps": 4, "sampler": "ddim", "labels": 0}


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Diverging:
    """A runner whose network gives NaN for some images from a step on."""

    def __init__(self, step: int, *images: int, value: float = np.nan) -> None:
        self.step, self.images, self.value = step, images, value
        self.calls = 0

    def run(self, trajectory: Any, x: Any, *, noise: Any, callback: Any, on_device: bool, **_: Any) -> Any:
        calls = iter(range(len(trajectory)))

        def step(x: Any, t: Any, coef: Any, clip: Any, *history: Any) -> Any:
            m = np.zeros_like(x)
            if next(calls) >= self.step:
                m[np.isin(noise.images, self.images), 1, 2, 3] = self.value
            self.calls += 1
            return m + 0.5, m

        return walk(trajectory, step, x, noise=noise, callback=callback)

    def network(self, x: Any, t: Any, **_: Any) -> Any:
        prediction = np.ones_like(x)
        prediction[list(self.images)] = self.value
        return prediction


def with_runner(engine: SparseEngine, runner: Any) -> SparseEngine:
    return SparseEngine(engine.manifest, runner)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("output", ["uint8", "float", "dlpack"])
def test_the_error_names_the_step_and_the_images(engine: SparseEngine, output: str, value: float) -> None:
    broken = with_runner(engine, Diverging(2, 1, 5, value=value))
    with pytest.raises(NonFiniteError, match=r"images 1, 5 became NaN or infinite at step 3 of 4 \(t = ") as raised:
        broken.sample(6, batch_size=6, output=output, **FAST)
    assert (raised.value.images, raised.value.step, raised.value.exit_code) == ((1, 5), 2, 1)
    assert "more steps, or another sampler" in str(raised.value.fix)


def test_images_are_those_of_the_whole_run(engine: SparseEngine) -> None:
    stream = with_runner(engine, Diverging(0, 5)).stream(9, batch_size=4, **FAST)
    assert len(next(stream)) == 4
    with pytest.raises(NonFiniteError, match="image 5 became NaN or infinite at step 1 of 4"):
        next(stream)


def test_many_images_are_counted(engine: SparseEngine) -> None:
    with pytest.raises(NonFiniteError, match="images 0, 1, 2, 3 and 5 more became"):
        with_runner(engine, Diverging(1, *range(9))).sample(9, **FAST)


def test_looked_for_once_and_replayed_only_where_it_is_found(engine: SparseEngine) -> None:
    seen: list[int] = []
    runner = Diverging(2, 1)
    with pytest.raises(NonFiniteError):
        with_runner(engine, runner).sample(2, callback=lambda step, t, x: seen.append(step), **FAST)
    assert runner.calls == 4 + 3  # the batch, and again as far as it is broken
    assert seen == [0, 1, 2, 3]  # the caller is not told twice
    runner = Diverging(9)
    with_runner(engine, runner).sample(2, **FAST)
    assert runner.calls == 4


def test_allowed_where_it_is_asked_for(engine: SparseEngine) -> None:
    broken = with_runner(engine, Diverging(2, 1))
    for output in ("float", "dlpack"):
        found = broken.sample(2, output=output, allow_nonfinite=True, **FAST)
        assert np.isnan(found[1]).sum() == 1
        assert np.isfinite(found[0]).all()
    with pytest.raises(OptionError, match=r"allow_nonfinite is given, and output=\"uint8\" has no NaN"):
        broken.sample(2, allow_nonfinite=True, **FAST)


def test_a_real_network_that_overflows(engine: SparseEngine) -> None:
    noise = np.zeros((3, 3, 8, 8), np.float32)
    noise[2] = 3e38
    with pytest.raises(NonFiniteError, match="image 2 became NaN or infinite at step 1 of 4"):
        engine.sample(3, noise=noise, **FAST)
    with pytest.raises(NonFiniteError, match="the prediction is NaN or infinite for sample 2 of 3, t = 0.5"):
        engine.denoise(noise, 0.5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_predictions(engine: SparseEngine, prediction: str) -> None:
    broken = with_runner(engine, Diverging(0, 1))
    broken.manifest.prediction = prediction
    x = np.ones((3, 3, 8, 8), np.float32)
    for evaluate in (broken.denoise, broken.predict):
        with pytest.raises(NonFiniteError, match="NaN or infinite for sample 1 of 3, t = 0.25"):
            evaluate(x, [0.5, 0.25, 0.1])
        assert np.isnan(evaluate(x, 0.5, allow_nonfinite=True)[1]).all()


def test_noise_in_an_image_without_any(engine: SparseEngine) -> None:
    x = np.ones((2, 3, 8, 8), np.float32)
    engine.manifest.prediction = "x0"
    with pytest.raises(OptionError, match="t = 0: x holds no noise, and a model of x0 says 0/0 of it"):
        engine.denoise(x, [0.5, 0.0])
    assert engine.predict(x, 0.0).shape == x.shape
    with pytest.raises(NonFiniteError):
        engine.denoise(x, 1e-300)  # no 0/0, but beyond float32
    engine.manifest.prediction = "v"
    assert np.array_equal(engine.denoise(x, 0.0), engine.predict(x, 0.0))


@pytest.mark.parametrize("output", ["uint8", "float"])
def test_a_decoder_that_gives_nan_is_named(engine: SparseEngine, output: str) -> None:
    batches = iter(range(2))

    def decoder(z: np.ndarray) -> np.ndarray:
        z[1] = np.nan if next(batches) else 0
        return z

    with pytest.raises(
        NonFiniteError, match="the decoder gave NaN or infinite values for image 3, of latents that are"
    ):
        list(engine.stream(4, batch_size=2, decoder=decoder, output=output, **FAST))


@pytest.mark.parametrize(
    "returned,message",
    [
        (lambda z: z.astype(np.uint8), "the decoder returned uint8; expected floating-point pixels"),
        (lambda z: z[:1], r"the decoder returned shape \[1, 3, 8, 8\] for latents of shape \[2, 3, 8, 8\]"),
        (lambda z: z[0], r"the decoder returned shape \[3, 8, 8\]"),
        (lambda z: None, "the decoder returned object"),
        (lambda z: [[1.0], [1.0, 2.0]], "the decoder's result is no array"),
    ],
)
def test_what_a_decoder_must_not_return(engine: SparseEngine, returned: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.sample(2, decoder=returned, **FAST)


def test_calibration_never_keeps_nan(engine: SparseEngine) -> None:
    with pytest.raises(NonFiniteError):
        collect(with_runner(engine, Diverging(3, 1)), images=16, steps=8)


def test_coefficients_that_float32_cannot_hold() -> None:
    with pytest.raises(OptionError, match="coefficient that is not finite in float32"):
        make_trajectory("ddim", VPLinear(beta_min=0.1, beta_max=400.0), 10)  # 1/alpha(1) is e^100


def test_parts_of_a_batch_that_a_device_cannot_hold_count_on() -> None:
    whole = np.zeros((5, 1, 2, 2), np.float32)

    def in_parts(told: Any) -> None:
        from sparse_engine.errors import SamplingCancelled

        for part in (whole[:3].copy(), whole[3:].copy()):
            for step in range(3):
                if len(part) == 2 and step == 1:
                    part[1] = np.nan
                if not told(step, 0.5, part):
                    raise SamplingCancelled("")

    step, rows = _first_broken(in_parts)
    assert (step, rows.tolist()) == (1, [4])
    step, rows = _first_broken(lambda told: None)  # a device that does not do the same again
    assert (step, rows.tolist()) == (None, [])


def test_what_is_left_on_a_device_is_looked_through_too(engine: SparseEngine) -> None:
    """Device backends hand out objects that know nothing but DLPack."""

    class OnDevice(Diverging):
        def run(self, *arguments: Any, **options: Any) -> Any:
            self.array = np.ascontiguousarray(super().run(*arguments, **options))
            array = self.array
            return SharedArray(array.ctypes.data, array.shape, np.float32, (1, 0), lambda: None)

    with pytest.raises(NonFiniteError, match="image 1 became"):
        with_runner(engine, OnDevice(2, 1)).sample(2, output="dlpack", **FAST)
    assert hasattr(with_runner(engine, OnDevice(9)).sample(2, output="dlpack", **FAST), "__dlpack__")


def test_a_device_backend_too(torch_engine: Path) -> None:
    noise = np.zeros((2, 3, 8, 8), np.float32)
    noise[1] = 3e38
    with SparseEngine.load(torch_engine, threads=1) as engine:
        with pytest.raises(NonFiniteError, match="image 1 became NaN or infinite at step 1 of 4"):
            engine.sample(2, noise=noise, **FAST)


class GpuNoise:
    """An array of another library on cuda:0, which copies it to the host when it is asked to."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, dl_device: tuple[int, int] = (2, 0), **_: Any) -> Any:
        address, shape = self.array.ctypes.data, self.array.shape
        return SharedArray(address, shape, np.float32, dl_device, lambda: None).__dlpack__()


def test_noise_that_was_left_on_the_gpu_is_what_is_blamed(engine: SparseEngine) -> None:
    class OnGpu(Diverging):
        dlpack_device = (2, 0)

        def run(self, trajectory: Any, x: Any, **options: Any) -> Any:
            return super().run(trajectory, x.owner.array[x.rows], **options)

    for noise, error in ((np.nan, OptionError), (0.0, NonFiniteError)):
        given = GpuNoise(np.full((2, 3, 8, 8), noise, np.float32))
        with pytest.raises(error, match="noise holds NaN|image 1 became"):
            with_runner(engine, OnGpu(2, 1)).sample(2, noise=given, **FAST)
