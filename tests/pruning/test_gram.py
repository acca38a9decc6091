"""Sums over a layer's inputs, against products that are written out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from sparse_engine.errors import NonFiniteError
from sparse_engine.pruning import gram
from sparse_engine.pruning.gram import Work, collect, columns_of, outputs_of, rows_of, weight_of
from sparse_engine.pruning.graph import Layer
from sparse_engine.pruning.walk import Given

pytestmark = pytest.mark.usefixtures("without_gradients")

CONVS = [{}, {"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2, "dilation": 2}]


def layer_of(module: nn.Linear | nn.Conv2d) -> Layer:
    node = Graph().placeholder("x")
    return Layer("layer", node, node, module)


def batches(shape: tuple[int, ...], count: int = 2) -> list[Given]:
    generator = torch.Generator().manual_seed(0)
    return [
        Given(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(count)
    ]


@pytest.mark.parametrize("options", CONVS)
def test_rows_times_columns_are_the_convolution(options: dict[str, int]) -> None:
    module = nn.Conv2d(8, 12, 3, **options)
    x = torch.randn(2, 8, 9, 7)
    product = rows_of(x, module) @ columns_of(module.weight).T
    expected = (module(x) - module.bias[:, None, None]).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(product, expected, atol=1e-5)
    assert torch.allclose(outputs_of(x, module), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 8), (12, 8, 3, 2)])
def test_columns_group_channels_of_a_tap(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    columns = columns_of(weight)
    assert torch.equal(weight_of(columns, shape), weight)
    if len(shape) == 4:
        assert torch.equal(columns[3, :4], weight[3, :4, 0, 0])


@pytest.mark.parametrize(
    "module,shape",
    [(nn.Linear(24, 40), (3, 5, 24)), (nn.Linear(24, 8), (3, 5, 24)), (nn.Conv2d(8, 12, 3, padding=1), (3, 8, 6, 6))],
    ids=["more outputs than inputs", "fewer", "convolution"],
)
def test_sums(module: nn.Linear | nn.Conv2d, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "TILE", 10)
    monkeypatch.setattr(gram, "CHUNK", 8 * 24 * 7)
    given, work = batches(shape), Work()
    (found,) = collect([layer_of(module)], given, work)
    x = torch.cat([rows_of(each.pruned, module) for each in given]).double()
    y = torch.cat([outputs_of(each.dense, module) for each in given]).double()
    assert found.rows == len(x)
    assert torch.allclose(found.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.cross, y.T @ x, rtol=1e-4, atol=1e-4)
    weight = columns_of(module.weight).double() * 0.5
    expected = (y - x @ weight.T).square().sum() / y.square().sum()
    assert found.error(weight) == pytest.approx(float(expected), rel=1e-5)
    assert work.flops > 0


@pytest.mark.parametrize(
    "module,shape,of_output",
    [(nn.Linear(16, 8), (4, 3, 16), (4, 3, 8)), (nn.Conv2d(8, 4, 3, padding=1), (4, 8, 5, 5), (4, 4, 5, 5))],
)
def test_what_a_residual_lacks_is_wanted_too(
    module: nn.Linear | nn.Conv2d, shape: tuple[int, ...], of_output: tuple[int, ...]
) -> None:
    given = batches(shape)
    lacking = [Given(each.dense, each.pruned, (torch.randn(of_output),)) for each in given]
    (plain,) = collect([layer_of(module)], given, Work())
    (found,) = collect([layer_of(module)], lacking, Work())
    x = torch.cat([rows_of(each.pruned, module) for each in given]).double()
    rows = [
        each.missing[0].reshape(-1, 8) if len(shape) == 3 else each.missing[0].movedim(1, 3).reshape(-1, 4)
        for each in lacking
    ]
    more = torch.cat(rows).double()
    assert torch.allclose(found.cross, plain.cross + more.T @ x, atol=1e-4)
    assert found.energy == pytest.approx(plain.energy)
    assert found.wanted != pytest.approx(plain.energy)


def test_layers_that_are_given_the_same_share_their_matrix() -> None:
    modules = [nn.Linear(16, 8), nn.Linear(16, 24)]
    given = batches((4, 3, 16))
    together = collect([layer_of(module) for module in modules], given, Work())
    for module, found in zip(modules, together, strict=True):
        (alone,) = collect([layer_of(module)], given, Work())
        assert torch.allclose(found.cross, alone.cross, atol=1e-4)
        assert found.energy == pytest.approx(alone.energy)
        assert torch.equal(found.gram, together[0].gram)


def test_nan_is_refused_by_the_layer_it_reaches() -> None:
    def broken() -> Iterator[Given]:
        x: Tensor = F.pad(torch.full((1, 1, 1), torch.nan), (0, 15))
        yield Given(x, x)

    with pytest.raises(NonFiniteError, match="layer is given NaN or infinite values"):
        collect([layer_of(nn.Linear(16, 8))], broken(), Work())
