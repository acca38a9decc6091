"""Which cells there are, and what they will take."""

import pytest

from sparse_engine.bench.grid import PAPER, estimate_bytes, parse_cells
from sparse_engine.bench.presets import PRESETS
from sparse_engine.errors import OptionError


def test_the_whole_grid_by_default() -> None:
    assert set(parse_cells(None)) == set(PAPER)
    assert set(parse_cells("mlp=4")) == {(1, 4), (2, 4), (4, 4)}


@pytest.mark.parametrize("text", ["patch", "patch=x", "depth=3", "patch=3", "patch=1;mlp=4"])
def test_cells_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="--cells"):
        parse_cells(text)


def test_memory_grows_with_weights_and_with_tokens() -> None:
    quick, paper = PRESETS["quick"], PRESETS["paper"]
    small, tokens = estimate_bytes(quick.config(4, 1), 4), estimate_bytes(quick.config(1, 1), 4)
    assert small < tokens < estimate_bytes(quick.config(1, 8), 4)
    weights = 4 * 20 * 8192**2  # one block of the paper's largest cell in float32
    assert estimate_bytes(paper.config(4, 8), 64) > 2 * weights
