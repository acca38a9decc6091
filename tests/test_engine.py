"""``SparseEngine`` as a service uses it."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine, sampling
from sparse_engine.backends.cuda.dlpack import SharedArray
from sparse_engine.backends.cuda.dlpack_in import DeviceArray
from sparse_engine.errors import EngineClosedError, EngineFileError, OptionError, SamplingCancelled, UnsupportedError

FAST = {"steps": 4, "sampler": "dpm-solver++"}


def close_to(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and float(np.abs(a - b).max()) <= 2e-5 * float(np.abs(b).max())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler-ode", "dpm-solver++"])
def test_image_i_of_a_seed_is_the_same_in_any_batch(engine: SparseEngine, sampler: str) -> None:
    whole = engine.sample(16, steps=5, sampler=sampler, seed=7, batch_size=16, output="float")
    for batch_size in (1, 3):
        again = engine.sample(16, steps=5, sampler=sampler, seed=7, batch_size=batch_size, output="float")
        assert close_to(again, whole)
    assert close_to(engine.sample(3, steps=5, sampler=sampler, seed=7, output="float"), whole[:3])
    assert not close_to(engine.sample(16, steps=5, sampler=sampler, seed=8, output="float"), whole)


def test_four_threads_of_callers_get_what_one_gets(conditional_engine: Path) -> None:
    with SparseEngine.load(conditional_engine, threads=2) as engine:
        alone = [engine.sample(4, seed=seed, output="float", **FAST) for seed in range(8)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda seed: engine.sample(4, seed=seed, output="float", **FAST), range(8)))
    assert all(close_to(a, b) for a, b in zip(alone, together, strict=True))


def test_clipping_is_what_each_samplers_authors_do(engine: SparseEngine) -> None:
    for sampler, clips in (("ddpm", True), ("ddim", True), ("dpm-solver++", False), ("euler-sde", False)):
        assert np.isfinite(engine.trajectory(10, sampler).clip).all() == clips
    assert engine.trajectory(10, "dpm-solver++", clip=True).clip == (-1.0, 1.0)
    assert np.isinf(engine.trajectory(10, "ddim", clip=False).clip).all()


def test_shapes_and_types(engine: SparseEngine, latent_engine: Path) -> None:
    pixels = engine.sample(5, **FAST)
    assert (pixels.shape, pixels.dtype) == ((5, 8, 8, 3), np.uint8)
    floats = engine.sample(5, output="float", **FAST)
    assert (floats.shape, floats.dtype) == ((5, 3, 8, 8), np.float32)
    assert np.array_equal(np.rint((floats.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1), pixels)


def test_latents_have_no_pixels(latent_engine: Path) -> None:
    with SparseEngine.load(latent_engine) as engine:
        with pytest.raises(OptionError, match=r'latent model: its samples have no pixels\n.*output="float".*decoder='):
            engine.sample(2, **FAST)
        assert engine.sample(2, output="float", **FAST).shape == (2, 4, 8, 8)
        decoded = engine.sample(2, decoder=lambda z: np.tanh(z[:, :3].repeat(2, 2).repeat(2, 3)), **FAST)
        assert (decoded.shape, decoded.dtype) == ((2, 16, 16, 3), np.uint8)


def test_stream_yields_batches_as_they_finish(engine: SparseEngine) -> None:
    stream = engine.stream(7, batch_size=3, output="float", **FAST)
    batches = list(stream)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert close_to(np.concatenate(batches), engine.sample(7, output="float", **FAST))


def test_stream_checks_its_arguments_at_once(engine: SparseEngine) -> None:
    with pytest.raises(OptionError, match="n = 0"):
        engine.stream(0)


def test_labels_and_guidance_reach_the_network(engine: SparseEngine) -> None:
    x, t = np.ones((2, 3, 8, 8), np.float32), 0.5
    by_label = [engine.denoise(x, t, labels=label) for label in range(5)]
    assert not close_to(by_label[0], by_label[1])
    assert close_to(engine.denoise(x, t), by_label[4])  # without labels: the null class
    for w in (2.0, 0.0, -0.5):
        mixed = w * by_label[1] + (1 - w) * by_label[4]
        assert close_to(engine.denoise(x, t, labels=1, guidance=w), mixed)
    each = engine.denoise(x, np.array([0.5, 0.25]), labels=[0, 3])
    assert close_to(each[:1], by_label[0][:1])


def test_missing_labels_are_drawn_from_the_seed_and_never_null(engine: SparseEngine) -> None:
    drawn = sampling.labels(3, np.arange(64), 4)
    assert set(drawn) == {0, 1, 2, 3}  # and not 4, the null class
    told = engine.sample(64, seed=3, labels=drawn, **FAST)
    assert np.array_equal(engine.sample(64, seed=3, **FAST), told)
    assert np.array_equal(engine.sample(2, seed=3, first=40, **FAST), told[40:42])


def test_which_images_of_which_seeds(engine: SparseEngine) -> None:
    options = {"sampler": "ddpm", "steps": 4, "output": "float"}
    whole = engine.sample(8, seed=7, **options)
    assert np.array_equal(engine.sample(3, seed=7, first=5, **options), whole[5:])
    assert np.array_equal(engine.sample(4, seed=7, images=[6, 0, 0, 3], batch_size=3, **options), whole[[6, 0, 0, 3]])
    seeds = [7, 2**64 - 1, 7]
    alone = [engine.sample(1, seed=seed, **options) for seed in seeds]
    assert np.array_equal(engine.sample(3, seed=seeds, batch_size=2, **options), np.concatenate(alone))
    later = [engine.sample(1, seed=seed, first=2, **options) for seed in seeds]
    assert np.array_equal(engine.sample(3, seed=np.array(seeds, np.uint64), first=2, **options), np.concatenate(later))
    mixed = engine.sample(2, seed=[7, 8], images=[3, 1], **options)
    assert np.array_equal(mixed[:1], whole[3:4])
    assert np.array_equal(mixed[1:], engine.sample(1, seed=8, first=1, **options))


def test_conditions_by_name(engine: SparseEngine, rng: np.random.Generator) -> None:
    options = {"seed": 3, "guidance": 2.0, "output": "float", **FAST}
    by_label = engine.sample(3, labels=[0, 1, 2], **options)
    assert np.array_equal(engine.sample(3, conditioning={"y": [0, 1, 2]}, **options), by_label)
    assert np.array_equal(engine.sample(3, labels=[0, 1, 2], negative={"y": 4}, **options), by_label)
    assert not close_to(engine.sample(3, labels=[0, 1, 2], negative={"y": 3}, **options), by_label)
    x = rng.standard_normal((2, 3, 8, 8), np.float32)
    each = [engine.denoise(x, 0.5, labels=label) for label in (1, 3)]
    mixed = 2 * each[0] - each[1]
    assert close_to(engine.predict(x, 0.5, conditioning={"y": 1}, negative={"y": 3}, guidance=2.0), mixed)


def test_the_network_alone_takes_its_own_times(engine: SparseEngine, rng: np.random.Generator) -> None:
    x, t = rng.standard_normal((2, 3, 8, 8), np.float32), np.array([0.25, 0.75])
    times = engine.schedule.network_time(t)
    told = {"y": [1, 2]}
    assert np.array_equal(engine.network(x, times, conditioning=told), engine.predict(x, t, conditioning=told))
    assert np.array_equal(engine.network(x, 500.0), engine.network(x, 500))  # one time for all, whole or not
    assert np.array_equal(engine.network(x, 500), engine.network(x, np.array([500, 500]), conditioning={"y": 4}))
    with pytest.raises(OptionError, match=r"t has shape \[3\]; expected one time, or one for each of 2"):
        engine.network(x, [1.0, 2.0, 3.0])


def test_noise_init_and_t_start(engine: SparseEngine, rng: np.random.Generator) -> None:
    noise = rng.standard_normal((3, 3, 8, 8), np.float32)
    first = engine.sample(3, noise=noise, labels=0, output="float", **FAST)
    assert close_to(engine.sample(3, noise=noise, labels=0, seed=9, output="float", **FAST), first)
    init = np.tile(np.linspace(-1, 1, 8, dtype=np.float32), (3, 3, 8, 1))
    near = engine.sample(3, init=init, t_start=0.01, labels=0, output="float", **FAST)
    far = engine.sample(3, init=init, t_start=0.9, labels=0, output="float", **FAST)
    assert np.abs(near - init).mean() < 0.2 < np.abs(far - init).mean()


class Foreign:
    """An array of another library: nothing but ``__dlpack__``. On a GPU, its library copies it to the host."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, dl_device: tuple[int, int] | None = None, **_: object) -> object:
        array, device = self.array, dl_device or self.device
        return SharedArray(array.ctypes.data, array.shape, array.dtype.type, device, lambda: None).__dlpack__()


@pytest.mark.parametrize("device", [(1, 0), (2, 0)], ids=["host", "GPU"])
def test_arrays_of_other_libraries(engine: SparseEngine, rng: np.random.Generator, device: tuple[int, int]) -> None:
    noise, init = (rng.standard_normal((3, 3, 8, 8), np.float32) for _ in range(2))
    for options in ({"noise": noise}, {"noise": noise, "init": init, "t_start": 0.5}):
        foreign = {key: Foreign(value, device) if key != "t_start" else value for key, value in options.items()}
        found = engine.sample(3, labels=0, batch_size=2, output="float", **FAST, **foreign)
        assert np.array_equal(found, engine.sample(3, labels=0, batch_size=2, output="float", **FAST, **options))
    for evaluate in (engine.denoise, engine.predict):
        assert np.array_equal(evaluate(Foreign(init, device), 0.5), evaluate(init, 0.5))


def test_arrays_of_other_libraries_where_x0_is_predicted(conditional_engine: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 8, 8), np.float32)
    with SparseEngine.load(conditional_engine) as engine:
        engine.manifest.prediction = "x0"
        expected = engine.denoise(x, 0.5)
        assert np.array_equal(engine.denoise(Foreign(x), 0.5), expected)
        assert np.array_equal(engine.denoise(x.tolist(), 0.5), expected)


@pytest.mark.parametrize(
    "array,message",
    [
        (Foreign(np.zeros((2, 3, 4, 4), np.float32)), r"noise has shape \[2, 3, 4, 4\]; expected \[2, 3, 8, 8\]"),
        (Foreign(np.full((2, 3, 8, 8), np.nan, np.float32)), "noise holds NaN or infinite values"),
        (Foreign(np.zeros((2, 3, 8, 8), np.float16), (2, 0)), "noise is float16 on cuda:0; expected float32"),
        (Foreign(np.zeros((2, 3, 8, 8), np.float32), (10, 0)), "noise lies on a device of DLPack's type 10"),
    ],
)
def test_bad_arrays_of_other_libraries(engine: SparseEngine, array: Foreign, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.sample(2, noise=array, **FAST)


class OnGpu:
    """A runner that keeps its state on cuda:0, and notes what it is given."""

    dlpack_device = (2, 0)

    def __init__(self) -> None:
        self.given: list[Any] = []

    def run(self, trajectory: Any, x: Any, **options: Any) -> np.ndarray:
        self.given.append(x)
        return np.zeros(x.shape, np.float32)

    def network(self, x: Any, t: np.ndarray, **options: Any) -> np.ndarray:
        self.given.append(x)
        return np.zeros(x.shape, np.float32)


def test_an_array_on_the_runners_gpu_stays_there(engine: SparseEngine, rng: np.random.Generator) -> None:
    noise = Foreign(rng.standard_normal((5, 3, 8, 8), np.float32), (2, 0))
    runner: Any = OnGpu()
    on_gpu = SparseEngine(engine.manifest, runner)
    on_gpu.sample(5, noise=noise, labels=0, batch_size=3, **FAST)
    on_gpu.predict(noise, 0.5)
    assert [type(x) for x in runner.given] == [DeviceArray] * 3
    assert [x.rows.tolist() for x in runner.given] == [[0, 1, 2], [3, 4], [0, 1, 2, 3, 4]]
    on_gpu.sample(5, noise=noise, init=noise, t_start=0.5, labels=0, batch_size=5, **FAST)  # noised on the host
    on_gpu.sample(5, noise=Foreign(noise.array, (2, 1)), labels=0, batch_size=5, **FAST)  # from another GPU
    assert [type(x) for x in runner.given[3:]] == [np.ndarray] * 2
    with pytest.raises(OptionError, match=r"noise has shape \[5, 3, 8, 8\]; expected \[4, 3, 8, 8\]"):
        on_gpu.sample(4, noise=noise, **FAST)


def test_callback_sees_every_step_and_can_stop(engine: SparseEngine) -> None:
    seen = []
    engine.sample(5, batch_size=3, callback=lambda step, t, x: seen.append((step, x.shape[0])), **FAST)
    assert seen == [(step, batch) for batch in (3, 2) for step in range(4)]
    with pytest.raises(SamplingCancelled):
        engine.sample(5, callback=lambda step, t, x: step < 1, **FAST)


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4"])
def test_bad_n(engine: SparseEngine, n: object) -> None:
    with pytest.raises(OptionError, match=r"n = .*; expected a whole number of 1 or more"):
        engine.sample(n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"labels": 5}, "label 5 is out of range; the model has classes 0 to 4"),
        ({"labels": [0, -1]}, "label -1 is out of range"),
        ({"labels": [0, 1, 2]}, r"labels have shape \[3\]; expected one label or 2 of them"),
        ({"labels": [0.5, 1.0]}, "labels are float64; expected integers"),
        ({"guidance": float("nan")}, "guidance = nan; expected a finite number"),
        ({"batch_size": 0}, "batch_size = 0; expected a whole number"),
        ({"seed": -1}, "seed = -1; expected a whole number from 0"),
        ({"output": "png"}, "output = 'png'; expected one of uint8, float"),
        ({"steps": 0}, "steps"),
        ({"sampler": "dpm"}, "sampler"),
        ({"noise": np.zeros((2, 3, 4, 4))}, r"noise has shape \[2, 3, 4, 4\]; expected \[2, 3, 8, 8\]"),
        ({"clip": True, "sampler": "euler-ode"}, "clip = True, but sampler euler-ode never forms x0"),
        ({"guidance": "much"}, "guidance = 'much'; expected a number"),
        ({"labels": [[0], [1, 2]]}, "labels are no array"),
        ({"noise": "loud"}, "noise is no array of numbers"),
        ({"speed": 3}, "speed: no such option; expected t_start"),
        ({"init": np.zeros((2, 3, 8, 8))}, "init is given without t_start"),
        ({"noise": np.full((2, 3, 8, 8), np.nan)}, "noise holds NaN or infinite values"),
        ({"seed": [1, 2, 3]}, "seed holds 3 seeds for 2 images; expected one, or one for each"),
        ({"seed": [1, -2]}, r"seed\[1\] = -2; expected"),
        ({"images": [0, 1, 2]}, r"images has shape \[3\] of int64; expected 2 whole numbers"),
        ({"images": [0.0, 1.0]}, "images has shape .* of float64; expected 2 whole numbers"),
        ({"images": [0, 2**32]}, r"images runs from 0 to 4294967296; expected 0 <= image < 2\*\*32"),
        ({"images": [0, 1], "first": 2}, "first and images both say which images to draw"),
        ({"first": 2**32 - 1}, "first = 4294967295; expected 2 images from it on within the 4294967296"),
        ({"first": -1}, "first = -1"),
        ({"conditioning": {"context": 1}}, r"conditioning\['context'\]: the model is not told that; it is told y"),
        ({"conditioning": {"y": 1}, "labels": 1}, "the same thing said twice"),
        ({"negative": {"y": 1}}, "negative is given without guidance"),
        ({"prompt": "a cat"}, "prompt is given, but the model .uvit. is told y and no text"),
        ({"prompt": ["a", "b", "c"]}, "prompt is list; expected one text, or 2 of them in a list"),
        ({"negative_prompt": 3, "guidance": 2.0}, "negative_prompt is int; expected one text"),
    ],
    ids=str,
)
def test_bad_arguments(engine: SparseEngine, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.sample(2, **options)


def test_labels_for_an_unconditional_model(tiny_engine: Path) -> None:
    with SparseEngine.load(tiny_engine) as engine:
        with pytest.raises(OptionError, match="labels are given, but the model is unconditional"):
            engine.sample(2, labels=1)
        with pytest.raises(OptionError, match=r"guidance = 2.0, but the model is told nothing"):
            engine.sample(2, guidance=2.0)
        assert engine.sample(2, guidance=1.0, **FAST).shape == (2, 8, 8, 3)


def test_guidance_without_a_null_class(conditional_checkpoint: Path, build) -> None:
    with SparseEngine.load(build(conditional_checkpoint)) as engine:
        with pytest.raises(OptionError, match=r"has no null class\n.*--null-class"):
            engine.sample(2, guidance=2.0)


def test_bad_threads_and_device(tiny_engine: Path) -> None:
    with pytest.raises(OptionError, match="threads = 0"):
        SparseEngine.load(tiny_engine, threads=0)
    with pytest.raises(UnsupportedError, match="device 'cuda'"):
        SparseEngine.load(tiny_engine, device="cuda")


def test_use_after_close(conditional_engine: Path) -> None:
    engine = SparseEngine.load(conditional_engine)
    stream = engine.stream(4, batch_size=2, **FAST)
    next(stream)
    engine.close()
    engine.close()
    for use in (lambda: engine.sample(1), lambda: engine.info, lambda: next(stream)):
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            use()


def test_closing_while_another_thread_samples_is_an_error_not_a_crash(conditional_engine: Path) -> None:
    engine = SparseEngine.load(conditional_engine, threads=1)
    outcome: list[object] = []

    def work() -> None:
        try:
            engine.sample(64, steps=200, batch_size=1)
        except EngineClosedError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    engine.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(outcome) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_use_after_fork_is_an_error_not_a_hang(conditional_engine: Path) -> None:
    script = """
import gc, os, sys
from sparse_engine import SparseEngine
from sparse_engine.errors import EngineClosedError
engine = SparseEngine.load(sys.argv[1], threads=2)
engine.sample(1, steps=2)
child = os.fork()
if child == 0:
    try:
        engine.sample(1, steps=2)
    except EngineClosedError as error:
        told = "fork" in str(error)
    engine.close()  # none of these may wait for threads that are not here
    del engine
    gc.collect()
    sys.exit(42 if told else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(conditional_engine)], timeout=60)
    assert done.returncode == 42


def test_info_and_warmup(engine: SparseEngine) -> None:
    engine.warmup(2)
    info = engine.info
    assert info["family"] == "uvit"
    assert info["runtime"]["threads"] == 1
    assert {"name", "masked", "hardware_24", "eligible", "chosen", "kernel"} <= info["layers"][0].keys()


@pytest.mark.parametrize("check", [False, True])
def test_weights_altered_on_disk_are_found(check: bool, conditional_engine: Path, tmp_path: Path) -> None:
    from sparse_engine.artifact import EngineFile

    data = bytearray(conditional_engine.read_bytes())
    data[EngineFile(conditional_engine).span("weights.bin")[0] + 5000] ^= 1
    (tmp_path / "x.sengine").write_bytes(data)
    with pytest.raises(EngineFileError, match="weights.bin was altered"):
        SparseEngine.load(tmp_path / "x.sengine", check=check)


def test_engine_of_a_backend_that_is_not_here(conditional_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "x.sengine"
    copy.write_bytes(conditional_engine.read_bytes())
    with pytest.raises(OptionError, match="backend 'other' is not known"):
        SparseEngine.load(rewritten_backend(copy))


def rewritten_backend(path: Path) -> Path:
    import zipfile

    from sparse_engine.artifact import EngineFile, PayloadFile, write_engine

    file = EngineFile(path)
    with zipfile.ZipFile(path) as archive:
        data = {name: archive.read(name) for name in file.manifest.files}
    file.manifest.backend = {"name": "other"}

    def payload(name: str) -> PayloadFile:
        return PayloadFile(name, len(data[name]), lambda: (data[name],), aligned=name.endswith(".bin"))

    write_engine(path, file.manifest, [payload(name) for name in data])
    return path
