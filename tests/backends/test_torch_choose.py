"""Choosing products: what is timed, kept, remembered and reported. Fakes stand in for the GPU and its libraries."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from sparse_engine.backends.torch import candidates, choose, layers
from sparse_engine.backends.torch.candidates import calls_in_graph, check_product
from sparse_engine.backends.torch.choose import Chooser, nearest
from sparse_engine.backends.torch.layers import FloatLayer
from sparse_engine.backends.torch.network import (
    TwoFourConvolution,
    TwoFourLinear,
    TwoFourPointwise,
    choose_attention,
    choose_products,
    is_product,
)
from sparse_engine.backends.torch.products import DEFAULT_ALGORITHM, DenseProduct, ObstacleError
from sparse_engine.backends.torch.recorded import MAX_REPEATS, repeats
from sparse_engine.export.families.uvit import Attention, UViT
from sparse_engine.tactics import Choice, TacticCache
from tests.backends.fake_recorder import FakeRecorded, FakeRecorder
from tests.backends.test_torch_packing import two_of_four
from tests.conftest import TINY

CUDA = torch.device("cuda", 0)
BATCHES = (1, 4, 16)
TOKENS = 10  # positions of a layer
SPEED = {"cusparselt": 2.0, "cusparselt 3 2 1": 1.0, "cutlass": 3.0, "dense": 4.0}  # milliseconds
SPEED |= {"cusparselt 3 1 -1": 2.5, "cusparselt 3 2 2": 2.6}
SEARCHED = ("cusparselt 3 2 1", "cusparselt 3 1 -1", "cusparselt 3 2 2")  # with the split found, without, and otherwise


class FakeProduct(DenseProduct):
    """Computes densely under the name of a sparse product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self.algorithm = DEFAULT_ALGORITHM


class FakeCusparselt(FakeProduct):
    def search(self, x: torch.Tensor) -> tuple[int, int, int]:
        return 3, 2, 1


class FakeCutlass(FakeProduct):
    pass


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """A GPU on which candidates take the times of ``SPEED``: what was timed together."""
    calls: list[tuple[str, ...]] = []

    def fastest(candidates: dict[str, Callable[[], object]]) -> Choice:
        calls.append(tuple(candidates))
        milliseconds = {name: SPEED[name] for name in candidates}
        return Choice(min(milliseconds, key=lambda name: milliseconds[name]), milliseconds)

    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr("sparse_engine.tactics.fastest", fastest)
    monkeypatch.setattr(layers, "CusparseltProduct", FakeCusparselt)
    monkeypatch.setattr(layers, "CutlassProduct", FakeCutlass)
    monkeypatch.setattr(choose, "Recorder", FakeRecorder)
    monkeypatch.setattr(FakeRecorder, "made", [])
    monkeypatch.setattr(candidates, "_copies", lambda product, device: 1)
    monkeypatch.setattr(candidates, "repeats", lambda operations: 2)
    monkeypatch.setattr(choose, "device_facts", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return calls


def chooser(device: torch.device = CUDA, autotune: bool = True) -> Chooser:
    return Chooser(dict.fromkeys(("fc", "pointwise", "conv"), TOKENS), BATCHES, device, autotune)


def layer_of(shape: tuple[int, int]) -> FloatLayer:
    return FloatLayer(torch.zeros(shape, dtype=torch.float16), None)


def layer(dtype: torch.dtype = torch.float16) -> FloatLayer:
    return FloatLayer(two_of_four(32, 64, dtype), torch.randn(32).to(dtype))


def test_the_fastest_stays_for_each_batch_and_the_report_says_by_how_much(timed: list[tuple[str, ...]]) -> None:
    choice = chooser().choose("fc", layer())
    assert timed == [("cusparselt", "cutlass", "dense", *SEARCHED)] * 3
    assert sorted(choice.products) == [TOKENS * batch for batch in BATCHES]
    assert {product.algorithm for product in choice.products.values()} == {(3, 2, 1)}
    report = choice.to_dict()
    assert (report["chosen"], report["kernel"]) == (True, "cusparselt")
    at_usual = report["timed_by_tokens"]["40"]
    times = {name: value / 2 for name, value in SPEED.items()}  # of one product
    assert at_usual["milliseconds"] == times
    assert "left_out" not in report
    assert at_usual["fastest"] == "cusparselt 3 2 1"
    assert at_usual["margin"] == pytest.approx(2.0)


def test_choices_are_remembered_with_their_algorithm(timed: list[tuple[str, ...]]) -> None:
    first = chooser().choose("fc", layer())
    again = chooser().choose("fc", layer())
    assert len(timed) == 3
    assert again.to_dict() == first.to_dict()
    assert {product.algorithm for product in again.products.values()} == {(3, 2, 1)}


def test_what_was_remembered_and_is_not_to_be_had_runs_dense(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser().choose("fc", layer())

    def refuse(self: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(FakeCusparselt, "__init__", refuse)
    choice = chooser().choose("fc", layer())
    assert {type(product) for product in choice.products.values()} == {DenseProduct}
    assert choice.to_dict()["kernel"] == "dense"
    assert choice.why == "cusparselt was faster, and cannot be made today; CUDA error: out of memory"


def test_a_faster_dense_product_stays(timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPEED, "dense", 0.5)
    report = chooser().choose("fc", layer()).to_dict()
    assert (report["chosen"], report["kernel"]) == (False, "dense")


def test_a_product_that_computes_something_else_is_never_chosen(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCusparselt, "forward", lambda self, x: 1.1 * DenseProduct.forward(self, x))
    choice = chooser().choose("fc", layer())
    assert timed == [("cutlass", "dense")] * 3
    assert choice.kernel == "cutlass"
    left_out = choice.to_dict()["left_out"]
    assert sorted(left_out) == sorted(["cusparselt", *SEARCHED])
    assert all(why.startswith("computes something else: off by") for why in left_out.values())


def test_a_graph_that_computes_something_else_when_replayed_is_never_chosen(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a library's plan has gone by then."""
    replay = FakeRecorded.__call__

    def without_a_plan(self: FakeRecorded) -> None:
        product = self.calls[0].__defaults__[0]  # type: ignore[attr-defined]
        if not isinstance(product, FakeCusparselt):
            replay(self)

    monkeypatch.setattr(FakeRecorded, "__call__", without_a_plan)
    choice = chooser().choose("fc", layer())
    assert timed == [("cutlass", "dense")] * 3
    assert sorted(choice.left_out) == sorted(["cusparselt", *SEARCHED])
    assert all(why.startswith("computes something else: off by nan") for why in choice.left_out.values())


def test_all_candidates_of_an_engine_are_recorded_on_one_stream(timed: list[tuple[str, ...]]) -> None:
    """PyTorch shares memory among the recordings of one stream alone."""
    chooser().choose("fc", layer())
    assert FakeRecorder.made == [(CUDA, None), (CUDA, "stream 0"), (CUDA, "stream 0")]


def test_what_a_search_finds_by_default_is_timed_once(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCusparselt, "search", lambda self, x: DEFAULT_ALGORITHM)
    chooser().choose("fc", layer())
    assert timed == [("cusparselt", "cutlass", "dense")] * 3


@pytest.mark.parametrize(
    "found,algorithms",
    [
        ((5, 1, -1), ["cusparselt 5 1 -1"]),
        ((5, -1, 1), ["cusparselt 5 -1 1", "cusparselt 5 1 -1"]),
        ((5, 4, 6), ["cusparselt 5 4 6", "cusparselt 5 1 -1", "cusparselt 5 4 1", "cusparselt 5 4 2"]),
    ],
    ids=str,
)
def test_a_split_that_is_not_taken_back_does_not_lose_the_algorithm(
    found: Any, algorithms: list[str], timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in algorithms:
        monkeypatch.setitem(SPEED, name, 1.0)
    monkeypatch.setattr(FakeCusparselt, "search", lambda self, x: found)
    chooser().choose("fc", layer())
    assert timed == [("cusparselt", "cutlass", "dense", *algorithms)] * 3


def test_weights_pass_the_cache_in_a_timed_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    small, large = (layer_of(shape) for shape in ((512, 512), (8192, 8192)))
    count = calls_in_graph({"dense": small.dense()}, small, 257)
    assert count * small.weight.nbytes > properties.L2_cache_size
    assert calls_in_graph({"dense": large.dense()}, large, 65600) == 1


def test_a_library_that_refuses_is_reported_and_left_out(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        raise RuntimeError("CUDA error: architecture mismatch when calling cusparseLtInit\nmore")

    monkeypatch.setattr(FakeCusparselt, "__init__", refuse)
    choice = chooser().choose("fc", layer())
    assert choice.kernel == "cutlass"
    assert choice.why == ("faster at the usual batch; CUDA error: architecture mismatch when calling cusparseLtInit")


def test_an_operator_of_another_pytorch_is_reported_and_left_out(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("_cslt_sparse_mm() got an unexpected keyword argument 'split_k_mode'")

    monkeypatch.setattr(FakeCusparselt, "forward", forward)
    assert chooser().choose("fc", layer()).kernel == "cutlass"


def test_a_failed_search_leaves_the_default_algorithm(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, x: torch.Tensor) -> None:
        raise RuntimeError("no search here")

    monkeypatch.setattr(FakeCusparselt, "search", fail)
    choice = chooser().choose("fc", layer())
    assert choice.kernel == "cusparselt"
    assert {product.algorithm for product in choice.products.values()} == {DEFAULT_ALGORITHM}


def test_a_batch_without_memory_to_time_it_takes_the_product_of_another(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    randn, limit = torch.randn, 100

    def limited(*shape: int, **options: Any) -> torch.Tensor:
        if shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", limited)
    assert sorted(chooser().choose("fc", layer()).products) == [TOKENS, 4 * TOKENS]
    weight, limit = torch.ones(64, 128, dtype=torch.float16), 1
    choice = chooser().choose("fc", FloatLayer(weight, None))
    assert (choice.kernel, choice.why) == ("dense", "no product could be timed")
    assert set(choice.left_out.values()) == {"CUDA out of memory"}


def test_without_timing_sparse_by_default(timed: list[tuple[str, ...]]) -> None:
    choice = chooser(autotune=False).choose("fc", layer())
    assert not timed
    assert (choice.kernel, choice.why) == ("cusparselt", "not timed: sparse by default")


def test_on_a_cpu_dense_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    choice = chooser(torch.device("cpu")).choose("fc", layer())
    assert choice.to_dict() == {
        "chosen": False,
        "kernel": "dense",
        "why": "no CUDA: the engine runs on cpu",
        "timed_by_tokens": {},
    }


@pytest.mark.parametrize("error", [0.0, 0.005, 0.05, float("nan")])
def test_products_are_held_against_float32(error: float) -> None:
    linear = layer()
    x = torch.randn(300, 64).half()

    class Off(DenseProduct):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            y[-1, -1] += error * y.abs().max()
            return y

    if error in (0.0, 0.005):
        check_product(Off(linear.weight, linear.bias), linear, x)
    else:
        with pytest.raises(ObstacleError, match="computes something else: off by .* where outputs reach"):
            check_product(Off(linear.weight, linear.bias), linear, x)


def test_a_layer_of_zeros_is_a_layer(timed: list[tuple[str, ...]]) -> None:
    """As a zero-initialised output projection is until it is trained."""
    zeros = FloatLayer(torch.zeros(32, 64, dtype=torch.float16), None)
    assert chooser().choose("fc", zeros).kernel == "cusparselt"
    product = DenseProduct(zeros.weight, torch.full((32,), 1e-3).half())
    with pytest.raises(ObstacleError, match="off by 1.0e-03 where outputs reach 0.0e"):
        check_product(product, zeros, torch.randn(8, 64).half())


def test_a_layer_whose_dense_product_overflows_loads_all_the_same(timed: list[tuple[str, ...]]) -> None:
    choice = chooser().choose("fc", FloatLayer(two_of_four(32, 64).mul(6e4).half(), None))
    assert (choice.kernel, choice.why) == ("dense", "no product could be timed")


def test_the_search_is_short_whatever_the_layer(timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer()
    rows: list[int] = []
    monkeypatch.setattr(FakeCusparselt, "search", lambda self, x: rows.append(len(x)) or (3, 2, 1))
    chooser().choose("fc", linear)
    monkeypatch.setattr(candidates, "SEARCHED_OPERATIONS", 2 * 50 * linear.weight.numel())
    monkeypatch.setattr(choose, "TacticCache", lambda **facts: TacticCache(**facts, another="cache"))
    chooser().choose("fc", linear)
    assert rows == [10, 40, 160, 10, 40, 50]


def test_a_timed_graph_is_short_whatever_the_layer() -> None:
    assert repeats(2 * 257 * 512 * 512) == MAX_REPEATS
    assert repeats(2 * 65600 * 65536 * 8192) == 1


@pytest.mark.parametrize("wanted,found", [(1, 10), (19, 10), (21, 40), (79, 40), (81, 160), (5000, 160)])
def test_other_batches_take_the_nearest_in_ratio(wanted: int, found: int) -> None:
    assert nearest((10, 40, 160), wanted) == found


class Small(nn.Module):
    """A linear layer, a 1x1 convolution, and two larger ones, of which one is in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)
        self.pointwise = nn.Conv2d(64, 32, 1)
        self.conv = nn.Conv2d(64, 32, 3, padding=1)
        self.groups = nn.Conv2d(64, 32, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.movedim(1, -1)).movedim(-1, 1) + self.pointwise(x) + self.conv(x) + self.groups(x)


def test_layers_are_replaced_and_compute_the_same(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(candidates.TOLERANCE, torch.float32, 1e-5)
    network = Small().requires_grad_(False)
    x = torch.randn(2, 64, 5, 5)
    expected = network(x)
    names = ["fc", "pointwise", "conv", "groups"]
    report = choose_products(network, names, chooser(), inputs={"x": torch.zeros(1, 64, 5, 5)})
    assert isinstance(network.fc, TwoFourLinear)
    assert isinstance(network.pointwise, TwoFourPointwise)
    assert isinstance(network.conv, TwoFourConvolution)
    torch.testing.assert_close(network(x), expected)
    assert [report[name]["chosen"] for name in names] == [True, True, True, False]
    assert report["groups"]["why"] == "a Conv2d that is in groups: there is no 2:4 product for it"


WINDOWS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (0, 2)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 4, "stride": 4, "padding": "valid"},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_convolution_is_a_product_over_its_patches(
    window: dict[str, Any], timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(candidates.TOLERANCE, torch.float32, 1e-5)
    network = nn.Sequential(nn.Conv2d(64, 32, **window)).requires_grad_(False)
    x = torch.randn(3, 64, 9, 8)
    expected = network(x)
    report = choose_products(network, ["0"], convolution_chooser(), inputs={"input": x[:1]})
    assert timed == [("cusparselt", "cutlass", "dense", *SEARCHED)] * 3
    assert (report["0"]["chosen"], report["0"]["kernel"]) == (True, "cusparselt")
    assert isinstance(network[0], TwoFourConvolution)
    products = [product.product for product in network[0].products]
    assert {(type(product), product.algorithm) for product in products} == {(FakeCusparselt, (3, 2, 1))}
    assert network[0].places == expected[0, 0].numel()
    torch.testing.assert_close(network(x), expected)


def convolution_chooser(autotune: bool = True) -> Chooser:
    return Chooser({"0": TOKENS}, BATCHES, CUDA, autotune)


def test_a_faster_dense_convolution_stays_as_it_was(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(candidates.TOLERANCE, torch.float32, 1e-5)
    monkeypatch.setitem(SPEED, "dense", 0.5)
    network = nn.Sequential(nn.Conv2d(64, 32, 3))
    report = choose_products(network, ["0"], convolution_chooser(), inputs={"input": torch.zeros(1, 64, 5, 5)})["0"]
    assert (type(network[0]), report["chosen"], report["kernel"]) == (nn.Conv2d, False, "dense")
    assert report["why"] == "faster at the usual batch"
    assert report["timed_by_tokens"]["40"]["milliseconds"].keys() >= {"dense", "cusparselt", "cutlass"}


def test_a_convolution_that_is_not_timed_is_dense(timed: list[tuple[str, ...]]) -> None:
    network = nn.Sequential(nn.Conv2d(64, 32, 3))
    chooser = convolution_chooser(autotune=False)
    report = choose_products(network, ["0"], chooser, inputs={"input": torch.zeros(1, 64, 5, 5)})["0"]
    assert (type(network[0]), report["kernel"], report["why"]) == (nn.Conv2d, "dense", "not timed: dense by default")
    assert timed == []


def test_a_convolution_of_two_sizes_of_maps_is_dense() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    report = choose_products(Twice(), ["conv"], chooser(torch.device("cpu")), inputs={"x": torch.zeros(1, 8, 9, 9)})
    assert report["conv"]["why"].startswith("a Conv2d that is given maps of several sizes, or of none")


@pytest.mark.parametrize(
    "conv,obstacle",
    [
        (nn.Conv2d(8, 8, 3, groups=2), "in groups"),
        (nn.Conv2d(8, 8, 1, groups=2), "in groups"),
        (nn.Conv2d(8, 8, 3, dilation=2), "dilated"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "padded otherwise than by zeros"),
    ],
)
def test_what_keeps_a_convolution_from_being_a_product(conv: nn.Conv2d, obstacle: str) -> None:
    report = choose_products(nn.Sequential(conv), ["0"], chooser(torch.device("cpu")))
    assert report["0"]["why"] == f"a Conv2d that is {obstacle}: there is no 2:4 product for it"


@pytest.mark.parametrize(
    "module,expected",
    [
        (nn.Linear(4, 4), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, stride=2), False),
        (nn.Conv2d(4, 4, 1, padding=1), False),
        (nn.Conv2d(4, 4, 1, groups=2), False),
        (nn.Conv2d(4, 4, 3), False),
    ],
    ids=str,
)
def test_what_is_one_product(module: nn.Module, expected: bool) -> None:
    assert is_product(module) == expected


def test_a_layer_takes_the_product_for_its_number_of_tokens() -> None:
    weight = torch.randn(8, 4)
    linear = TwoFourLinear({10: DenseProduct(weight, None), 160: DenseProduct(2 * weight, None)}, torch.float32)
    for batch, scale in ((2, 1), (50, 2)):
        x = torch.randn(batch, 6, 4)
        torch.testing.assert_close(linear(x), scale * x @ weight.T)


@pytest.mark.parametrize("faster", ["fused", "plain"])
def test_attention_runs_in_the_faster_form(
    faster: str, timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SPEED, "fused", 1.0 if faster == "fused" else 3.0)
    monkeypatch.setitem(SPEED, "plain", 2.0)
    here = Chooser({}, BATCHES, CUDA, autotune=True)
    here._device = torch.device("cpu")
    network = UViT(TINY).eval()
    inputs = {"x": torch.randn(4, 3, 8, 8), "t": torch.full((4,), 500.0)}
    expected = network(**inputs)
    report = choose_attention(network, inputs, here)
    assert timed == [("fused", "plain")]  # once: all blocks are alike
    assert report == {"4x17x8": {"kernel": faster, "milliseconds": {"fused": SPEED["fused"], "plain": 2.0}}}
    assert network.mid_block.attn.fused == (faster == "fused")
    torch.testing.assert_close(network(**inputs), expected)


class Cross(torch.nn.Module):
    """Attention over another length, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(32, 4, qkv_bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        k = context.unflatten(-1, (4, 8)).transpose(1, 2)
        return self.attn.attend(x, k, k)


def test_attention_over_another_length_is_timed_over_it(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("fused", "plain"):
        monkeypatch.setitem(SPEED, form, 1.0)
    here = Chooser({}, BATCHES, CUDA, autotune=True)
    here._device = torch.device("cpu")
    inputs = {"x": torch.randn(2, 4, 5, 8), "t": torch.zeros(2), "context": torch.randn(2, 11, 32)}
    report = choose_attention(Cross().eval(), inputs, here)
    assert list(report) == ["4x5x8 over 11"]
    assert timed == [("fused", "plain")]


class Normed(Cross):
    """Its first parameter stays float32, and its products run in bfloat16."""

    ran: ClassVar[list[torch.dtype]] = []

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.norm = True, torch.nn.LayerNorm(8)
        del self.attn

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q = self.norm(x).bfloat16()
        return self.attend(q, q, q)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.ran.append(q.dtype)
        return q


def test_attention_is_timed_in_the_type_it_runs_in(
    timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("fused", "plain"):
        monkeypatch.setitem(SPEED, form, 1.0)
    here = Chooser({}, BATCHES, CUDA, autotune=True)
    here._device = torch.device("cpu")
    monkeypatch.setattr(Normed, "ran", [])
    inputs = {"x": torch.randn(2, 4, 5, 8), "t": torch.zeros(2), "context": torch.zeros(2, 1)}
    choose_attention(Normed().eval(), inputs, here)
    assert set(Normed.ran) == {torch.bfloat16}


def test_attention_on_a_cpu_is_fused(timed: list[tuple[str, ...]]) -> None:
    network = UViT(TINY).eval()
    inputs = {"x": torch.randn(4, 3, 8, 8), "t": torch.zeros(4)}
    report = choose_attention(network, inputs, chooser(torch.device("cpu")))
    assert report == {"4x17x8": {"kernel": "fused", "milliseconds": {}}}
    assert not timed
