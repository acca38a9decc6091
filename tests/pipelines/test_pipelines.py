"""Every pipeline class, with every scheduler that it takes: an engine draws what the baked network draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_engine.diffusers import restore, use_engine
from tests.pipelines.pipeline_cases import CASES, Built

# Of diffusers itself: schedulers without Stable Diffusion's offset, an interface that it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PAIRS = [(name, scheduler) for name, case in CASES.items() for scheduler in case.schedulers]


@pytest.mark.parametrize("name, scheduler", PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_the_picture_is_that_of_the_baked_network(
    name: str, scheduler: str, built: Callable[[str], Built], one_torch_thread: None
) -> None:
    case, made = CASES[name], built(name)
    expected = case.call(case.pipeline(made.baked, scheduler))
    dense = case.call(case.pipeline(made.network, scheduler))
    pipe = case.pipeline(made.network, scheduler)
    use_engine(pipe, made.engine)
    found = case.call(pipe)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4
    assert (dense - expected).abs().max() > 1e-2  # masks show
    restore(pipe)
    assert torch.equal(case.call(pipe), dense)
