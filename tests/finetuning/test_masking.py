"""Masks of a whole network at once: the same as ``export.masks`` derives layer by layer."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sparse_engine.export.masks import TWO_FOUR, Pattern, magnitude_mask
from sparse_engine.pruning.masking import MaskedWeights, kept

PATTERNS = [
    Pattern(2, 4),
    Pattern(1, 4),
    Pattern(3, 4),
    Pattern(7, 8),
    Pattern(1, 16),
    Pattern(15, 16),
    Pattern(31, 32),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_rule_is_that_of_the_engine(pattern: Pattern) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-3, 4, (24, 64)).astype(np.float32)  # full of ties and zeros
    found = kept(torch.from_numpy(weight).abs().view(-1, pattern.m), pattern.n).view(24, 64)
    assert np.array_equal(found.numpy(), magnitude_mask(weight, pattern)[0])


def test_every_order_of_four() -> None:
    groups = torch.tensor(list(itertools.product((0.0, 1.0, 2.0, 3.0), repeat=4)))
    assert np.array_equal(kept(groups, 2).numpy(), magnitude_mask(groups.numpy())[0])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 20), nn.Linear(20, 3)
    )


def test_linear_and_convolution_get_their_masked_weights() -> None:
    net = network()
    dense = {name: net.get_parameter(f"{name}.weight").detach().clone() for name in ("0", "1", "3")}
    masks = MaskedWeights(net, list(dense), TWO_FOUR)
    for name, weight in dense.items():
        expected = weight.numpy() * magnitude_mask(weight.numpy())[0]
        assert np.array_equal(net.get_parameter(f"{name}.weight").detach().numpy(), expected)
        assert torch.equal(masks.parts(masks.dense.detach())[f"{name}.weight"], weight)


def test_gradients_pass_straight_through_and_pruned_weights_decay() -> None:
    net, x = network(), torch.randn(2, 8, 8, 8)
    masks = MaskedWeights(net, ["0", "3"], TWO_FOUR, decay=0.5)
    net(x).square().sum().backward()
    direct = {name: net.get_parameter(f"{name}.weight").grad.clone() for name in ("0", "3")}
    masks.collect_gradients()
    parts = {name: part.clone() for name, part in masks.parts(masks.dense.grad).items()}
    assert all(torch.equal(parts[f"{name}.weight"], grad) for name, grad in direct.items())
    masks.decay_pruned()
    for name, grad in direct.items():
        weight = masks.parts(masks.dense.detach())[f"{name}.weight"]
        mask = torch.from_numpy(magnitude_mask(weight.numpy())[0])
        found = masks.parts(masks.dense.grad)[f"{name}.weight"]
        assert torch.equal(found, grad + 0.5 * (~mask * weight))


def test_a_fixed_mask_stays_and_nothing_passes_it() -> None:
    net, x = network(), torch.randn(2, 8, 8, 8)
    masks = MaskedWeights(net, ["0", "3"], TWO_FOUR, fixed=True)
    first = masks.mask.clone()
    assert not masks.dense[~first].any()
    net(x).sum().backward()
    masks.collect_gradients()
    masks.decay_pruned()
    assert not masks.dense.grad[~first].any()
    with torch.no_grad():
        masks.dense.copy_(torch.randn_like(masks.dense))
    assert masks.refresh(TWO_FOUR, count=True) == {"0": 0.0, "3": 0.0}
    assert torch.equal(masks.mask, first)
    assert not masks.dense[~first].any()


def test_flips_are_counted_by_layer() -> None:
    net = network()
    masks = MaskedWeights(net, ["0", "3"], TWO_FOUR)
    with torch.no_grad():
        part = masks.parts(masks.dense)["3.weight"]
        part[0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    masks.refresh(TWO_FOUR)
    with torch.no_grad():
        part[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert masks.refresh(TWO_FOUR, count=True) == {"0": 0.0, "3": 4 / part.numel()}


def test_layers_that_a_wide_group_does_not_divide_stay_dense_in_that_stage() -> None:
    net = network()
    masks = MaskedWeights(net, ["1", "4"], Pattern(31, 32))  # 48 and 60 weights
    assert masks.mask.all()
    masks.refresh(TWO_FOUR)
    assert masks.mask.float().mean() == 0.5
