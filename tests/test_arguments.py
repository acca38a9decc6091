"""Numbers, truth values, paths and arrays as callers have them: taken for what they are, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_engine import SparseEngine, arguments
from sparse_engine.artifact import EngineFile
from sparse_engine.backends import TensorRTOptions
from sparse_engine.bench.settings import Settings
from sparse_engine.calibration.apply import Quantisation
from sparse_engine.calibration.collect import check_amounts, collect
from sparse_engine.errors import OptionError, SamplingCancelled
from sparse_engine.export.verify import verify_engine
from sparse_engine.sampling import DiscreteBetas, VPLinear, labels, make_trajectory, normal
from tests.conftest import build_with

FAST: dict[str, Any] = {"steps": 2, "sampler": "ddim"}
X = np.ones((2, 3, 8, 8), np.float32)


class Index:
    def __index__(self) -> int:
        return 3

    def __repr__(self) -> str:
        return "Index()"


class Broken:
    def __index__(self) -> int:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


WHOLE = [
    3,
    np.int8(3),
    np.uint8(3),
    np.int64(3),
    np.uint64(3),
    np.array(3),
    np.array(3, ">i2"),
    torch.tensor(3),
    Index(),
]
NOT_WHOLE = [
    2.0,
    np.float32(2),
    "2",
    b"2",
    None,
    True,
    np.True_,
    np.array(True),
    torch.tensor(True),
    [3],
    np.array([3]),
]
NOT_WHOLE += [float("nan"), Fraction(3), 3j, Broken()]
REAL = [3, 0.5, np.float16(0.5), np.float64(0.5), np.longdouble(0.5), np.int8(3), np.array(0.5), np.array(0.5, ">f4")]
REAL += [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal("0.5")]
NOT_REAL = ["0.5", b"1", None, True, np.True_, torch.tensor(True), np.array([0.5]), torch.ones(1), [0.5], 1j, Broken()]
NOT_FINITE = [float("nan"), float("inf"), np.float32(-np.inf), 10**400, torch.tensor(torch.nan)]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers(value: Any) -> None:
    found = arguments.whole_number("n", value, 1)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: type(value).__name__)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^n = .*; expected a whole number of 1 or more$"):
        arguments.whole_number("n", value, 1)


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_real_numbers(value: Any) -> None:
    found = arguments.real_number("eta", value)
    assert found in (0.5, 3.0)
    assert type(found) is float


@pytest.mark.parametrize("value", NOT_REAL, ids=lambda value: type(value).__name__)
def test_what_is_no_real_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^eta = .*; expected a number$"):
        arguments.real_number("eta", value)


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: type(value).__name__)
def test_numbers_that_are_not_finite(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^eta = .*; expected a finite number$"):
        arguments.real_number("eta", value)
    with pytest.raises(OptionError, match=r"eta = 3.0; expected a finite number, at most 2e\+00"):
        arguments.real_number("eta", 3, most=2.0)


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)], ids=repr)
def test_truth_values(value: Any) -> None:
    assert arguments.truth("clip", value) is True


@pytest.mark.parametrize("value", [1, 0, "yes", None, np.array([True]), torch.ones(1, dtype=torch.bool), 1.0], ids=repr)
def test_what_is_no_truth_value(value: Any) -> None:
    with pytest.raises(OptionError, match="clip = .*; expected True or False"):
        arguments.truth("clip", value)


def test_a_long_value_is_cut_and_stays_on_one_line() -> None:
    with pytest.raises(OptionError) as raised:
        arguments.whole_number("n", np.zeros((40, 40)))
    assert len(str(raised.value)) < 130
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("answer", [False, np.False_, np.array(False), torch.tensor(False)], ids=repr)
def test_a_callback_stops_with_any_librarys_false(engine: SparseEngine, answer: Any) -> None:
    with pytest.raises(SamplingCancelled, match="after step 1 of 2"):
        engine.sample(1, callback=lambda *_: answer, **FAST)


@pytest.mark.parametrize("answer", [None, 0, "", [], np.zeros(3, bool), True, Index()], ids=repr)
def test_nothing_else_that_a_callback_returns_stops(engine: SparseEngine, answer: Any) -> None:
    assert engine.sample(1, callback=lambda *_: answer, **FAST).shape == (1, 8, 8, 3)


def test_what_a_callback_raises_is_the_callers_own(engine: SparseEngine) -> None:
    def fails(*_: Any) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        engine.sample(1, callback=fails, **FAST)
    assert engine.sample(1, **FAST).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("value", [np.uint8(250), torch.tensor(250), np.array(250)], ids=repr)
def test_numbers_do_not_overflow_where_they_are_used(engine: SparseEngine, value: Any) -> None:
    small = {"steps": np.int8(1), "sampler": "ddim", "batch_size": np.uint8(200), "seed": np.uint64(2**64 - 1)}
    assert engine.sample(value, guidance=np.float16(2), **small).shape == (250, 8, 8, 3)


def test_an_engines_arguments(conditional_engine: Path) -> None:
    given: dict[str, Any] = {"threads": np.int64(1), "check": np.True_, "autotune": np.False_}
    with SparseEngine.load(bytes(conditional_engine), **given) as engine:
        assert engine.info["runtime"]["threads"] == 1
        engine.warmup(np.int8(2))


BAD_LOADS = [
    ({"threads": "2"}, "threads = '2'; expected 1 to 4096"),
    ({"threads": 2.0}, "threads = 2.0; expected 1 to 4096"),
    ({"threads": True}, "threads = True; expected 1 to 4096"),
    ({"threads": 4097}, "threads = 4097; expected 1 to 4096"),
    ({"device": 0}, "device = 0; expected a name"),
    ({"check": "no"}, "check = 'no'; expected True or False"),
    ({"autotune": 1}, "autotune = 1; expected True or False"),
]


@pytest.mark.parametrize("options,message", BAD_LOADS, ids=str)
def test_bad_arguments_of_load(conditional_engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SparseEngine.load(conditional_engine, **options)


@pytest.mark.parametrize("value", [None, 5, "", "a\0b", b"", ["x"]], ids=repr)
def test_what_is_no_path(value: Any, tiny_checkpoint: Path, conditional_engine: Path) -> None:
    for use in (
        EngineFile,
        SparseEngine.load,
        lambda path: build_with(path, heads=4),
        lambda path: verify_engine(conditional_engine, path),
    ):
        with pytest.raises(OptionError, match=r"(path|checkpoint) = .*; expected"):
            use(value)


BAD_SAMPLES = [
    ({"batch_size": 2.0}, "batch_size = 2.0"),
    ({"batch_size": 2**33}, "batch_size = 8589934592; expected at most"),
    ({"seed": 1.0}, "seed = 1.0"),
    ({"steps": np.float32(2)}, "steps = .*; expected a whole number"),
    ({"guidance": True}, "guidance = True; expected a number"),
    ({"guidance": "2"}, "guidance = '2'; expected a number"),
    ({"t_start": "1"}, "t_start = '1'; expected a number"),
    ({"t_end": np.array([0.1])}, "t_end = .*; expected a number"),
    ({"eta": "0"}, "eta = '0'; expected a number"),
    ({"clip": 1}, "clip = 1; expected True or False"),
    ({"denoise_to_zero": "yes"}, "denoise_to_zero = 'yes'; expected True or False"),
    ({"sampler": ["ddim"]}, "sampler: unknown"),
    ({"sampler": np.array(["ddim"])}, "sampler: unknown"),
    ({"spacing": ["leading"]}, "spacing: unknown"),
    ({"output": np.array(["uint8"])}, "output = .*; expected one of uint8, float, dlpack"),
    ({"callback": 5}, "callback = 5; expected a function"),
    ({"decoder": 5}, "decoder = 5; expected a function"),
    ({"allow_nonfinite": 1}, "allow_nonfinite = 1; expected True or False"),
    ({"labels": [True, False]}, "labels are bool; expected integers"),
    ({"labels": "01"}, "labels are <U2; expected integers"),
    ({"labels": np.array([0, 1], object)}, "labels are object; expected integers"),
    ({"labels": np.ma.masked_array([0, 1], [True, False])}, "labels are masked in places"),
    ({"labels": 2**70}, "labels are object; expected integers"),
]


@pytest.mark.parametrize("options,message", BAD_SAMPLES, ids=str)
def test_bad_arguments_of_sample(engine: SparseEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.sample(2, **{**FAST, **options})


LABELS = [[0, 1], (0, 1), np.array([0, 1], np.uint64), np.array([0, 1], ">i2"), torch.tensor([0, 1]), range(2)]
LABELS += [np.array([1, 0])[::-1], np.ma.masked_array([0, 1], False)]


@pytest.mark.parametrize("value", LABELS, ids=repr)
def test_labels_of_any_integer_type(engine: SparseEngine, value: Any) -> None:
    assert np.array_equal(engine.sample(2, labels=value, **FAST), engine.sample(2, labels=[0, 1], **FAST))


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


FLOATS: list[Callable[[np.ndarray], Any]] = [
    lambda x: x.astype(np.float64),
    lambda x: x.astype(np.float16),
    lambda x: x.astype(">f4"),
    lambda x: x.transpose(3, 2, 1, 0).copy().transpose(3, 2, 1, 0),
    lambda x: x[:, ::-1].copy()[:, ::-1],
    lambda x: x.tolist(),
    lambda x: np.ma.masked_array(x, False),
    torch.from_numpy,
    read_only,
]


@pytest.mark.parametrize("form", FLOATS)
def test_images_of_any_floating_type(engine: SparseEngine, form: Callable[[np.ndarray], Any]) -> None:
    x = (np.arange(2 * 3 * 8 * 8, dtype=np.float32).reshape(X.shape) % 16 - 8) / 8  # exact in float16 too
    given: dict[str, Any] = {"t_start": 0.5, "labels": 0, "output": "float", **FAST}
    expected = engine.sample(2, init=x, noise=x, **given)
    assert np.array_equal(engine.sample(2, init=form(x), noise=form(x), **given), expected)
    assert np.array_equal(engine.predict(form(x), 0.5), engine.predict(x, 0.5))


NOT_IMAGES: list[tuple[Any, str]] = [
    ((127.5 * X).astype(np.uint8), r"init is uint8; expected floating-point numbers.*\n.*x / 127.5 - 1"),
    (X.astype(np.int64).tolist(), "init is int64; expected floating-point numbers"),
    (X > 0, "init is bool; expected floating-point numbers"),
    (127 * X, r"init goes up to 127; the model's range is -1..1\n.*x / 127.5 - 1"),
    (X * np.nan, "init holds NaN or infinite values"),
    (X.astype(np.float64) * 1e300, "init holds NaN or infinite values"),
    (X.astype(object), "init is no array of numbers: it is object"),
    (X.astype(str), "init is no array of numbers: it is <U"),
    (X + 1j, "init is no array of numbers: it is complex64"),
    (np.ma.masked_array(X, X > 0), r"init is masked in places\n.*filled"),
    (torch.from_numpy(X).requires_grad_(), r"init cannot be read through DLPack: .*detach"),
    ([[1.0], [1.0, 2.0]], "init is no array of numbers: .*inhomogeneous"),
    (5.0, r"init has shape"),
]


@pytest.mark.parametrize("value,message", NOT_IMAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_are_no_images(engine: SparseEngine, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.sample(2, init=value, t_start=0.5, **FAST)
    if "goes up to" not in message:  # what noise there is is the caller's own affair
        with pytest.raises(OptionError, match=message.replace("init", "(noise|x)", 1)):
            engine.sample(2, noise=value, **FAST)
        with pytest.raises(OptionError, match=message.replace("init", "(noise|x)", 1)):
            engine.predict(value, 0.5)


TIMES = [
    [0.5, 0.25],
    (0.5, 0.25),
    np.array([0.5, 0.25], np.float16),
    np.array([0.5, 0.25], ">f8"),
    torch.tensor([0.5, 0.25]),
]


@pytest.mark.parametrize("value", TIMES, ids=repr)
def test_times_of_any_type(engine: SparseEngine, value: Any) -> None:
    assert np.array_equal(engine.denoise(X, value), engine.denoise(X, np.array([0.5, 0.25])))


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), -1, 2, [0.5, None], Index()], ids=repr)
def test_what_are_no_times(engine: SparseEngine, value: Any) -> None:
    with pytest.raises(OptionError, match="t = .*; expected schedule times from 0 to 1"):
        engine.predict(X, value)


def test_no_images_to_look_at(engine: SparseEngine) -> None:
    with pytest.raises(OptionError, match="x is empty; expected at least one sample"):
        engine.denoise(X[:0], 0.5)


def test_the_samplers_functions() -> None:
    narrow = make_trajectory("ddim", VPLinear(), np.uint8(200), eta=np.float16(0.5))  # type: ignore[arg-type]
    assert np.array_equal(narrow.coef, make_trajectory("ddim", VPLinear(), 200, eta=0.5).coef)
    order = make_trajectory("dpm-solver++", VPLinear(), 10, order=np.int64(2))  # type: ignore[arg-type]
    assert len(order) == 10
    assert np.array_equal(normal(np.int64(3), torch.tensor([1]), np.uint8(0), torch.Size([4])), normal(3, [1], 0, (4,)))  # type: ignore[arg-type]
    assert labels(np.uint64(3), [0], np.int8(10)).shape == (1,)  # type: ignore[arg-type]
    schedule = VPLinear(beta_min=np.float32(0.5), beta_max=20)  # type: ignore[arg-type]
    assert {type(value) for value in schedule.to_dict().values()} == {str, float}  # a manifest can hold it


BAD_CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: normal("0", [0], 0, (3,)), "seed = '0'"),  # type: ignore[arg-type]
    (lambda: normal(0, ["0"], 0, (3,)), "expected \\[B\\] of integers"),  # type: ignore[arg-type]
    (lambda: normal(0, [[0], [1, 2]], 0, (3,)), "images is no array of integers"),  # type: ignore[list-item]
    (lambda: normal(0, [0], 0.0, (3,)), "draw = 0.0"),  # type: ignore[arg-type]
    (lambda: normal(0, [0], 0, (3.0,)), "shape\\[0\\] = 3.0"),  # type: ignore[arg-type]
    (lambda: normal(0, [0], 0, 3), "shape = 3; expected whole numbers"),  # type: ignore[arg-type]
    (lambda: normal(0, [0], 0, (-1,)), "shape\\[0\\] = -1"),
    (lambda: labels(0, [0], "10"), "num_classes = '10'"),  # type: ignore[arg-type]
    (lambda: VPLinear(beta_max="20"), "schedule vp-linear: beta_max = '20'; expected a number"),  # type: ignore[arg-type]
    (lambda: DiscreteBetas(steps=10.0), "schedule discrete: steps = 10.0"),  # type: ignore[arg-type]
    (lambda: DiscreteBetas(betas=["linear"]), "schedule discrete: betas = .*; expected one of"),  # type: ignore[arg-type]
    (lambda: make_trajectory("ddim", VPLinear(), 10, value_range=("a", 1)), "value_range"),  # type: ignore[arg-type]
    (lambda: check_amounts(64.0, 20, 0), "images = 64.0"),
    (lambda: check_amounts(64, "20", 0), "steps = '20'"),
    (lambda: check_amounts(64, 20, None), "seed = None"),
    (lambda: TensorRTOptions(workspace=1.5), "workspace = 1.5"),  # type: ignore[arg-type]
    (lambda: TensorRTOptions(optimization_level="3"), "optimization_level = '3'; expected 0 to 5"),  # type: ignore[arg-type]
    (lambda: TensorRTOptions(cache="no"), "cache = 'no'; expected True or False"),  # type: ignore[arg-type]
    (lambda: Settings(threads="2"), "threads = '2'"),  # type: ignore[arg-type]
    (lambda: Settings(repeats=0), "repeats = 0"),
    (lambda: Settings(seconds="1"), "seconds = '1'"),  # type: ignore[arg-type]
    (lambda: Settings(steps=2.5), "steps = 2.5"),  # type: ignore[arg-type]
    (lambda: Quantisation(Path("x"), max_quality_loss="1"), "--max-quality-loss = '1'; expected a number above 0"),  # type: ignore[arg-type]
    (lambda: Quantisation(Path("x"), smooth="1"), "smooth = '1'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("call,message", BAD_CALLS)
def test_bad_arguments_of_other_functions(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_what_is_built_and_verified(tiny_checkpoint: Path, tiny_engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.sengine"
    sizes: Any = np.array([1, 2, 4], np.int8)
    _, manifest = build_with(str(tiny_checkpoint), bytes(output), batch=sizes, heads=np.int64(4), sparse=np.True_)  # type: ignore[arg-type]
    assert tuple(manifest.batch) == (1, 2, 4)
    for batch in ((1, 2), 4, (1.0, 2, 4), "124"):
        with pytest.raises(OptionError, match="batch"):
            build_with(tiny_checkpoint, output, heads=4, batch=batch)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="sparse = 'yes'; expected True or False"):
        build_with(tiny_checkpoint, output, heads=4, sparse="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="tolerance = '1'; expected a number"):
        verify_engine(tiny_engine, tiny_checkpoint, tolerance="1")  # type: ignore[arg-type]


def test_guidance_of_calibration(engine: SparseEngine) -> None:
    for guidance, kept in ((2.0, {2.0}), (np.array([1.0, 3.0]), {1.0, 3.0}), (np.float32(3), {3.0})):
        data = collect(engine, images=np.int64(8), steps=np.uint8(16), guidance=guidance)  # type: ignore[arg-type]
        assert set(data.guidance.tolist()) == kept
        assert {type(data.facts[name]) for name in ("seed", "steps", "images")} == {int}
    with pytest.raises(OptionError, match=r"guidance\[1\] = 'x'; expected a number"):
        collect(engine, guidance=[1.0, "x"])  # type: ignore[list-item]
