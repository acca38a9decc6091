"""Two small runs of the real command, which the tests of reports and files read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparse_engine.bench import compare, quality
from sparse_engine.bench.peers import EAGER, OPENVINO, PLAIN, Peer, PeerRunner, PeerUnavailableError, Subject
from sparse_engine.bench.results_file import read_results
from sparse_engine.cli.main import run

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
QUICK = ["--repeat", "2", "--seconds", "0.05"]


def wrong(subject: Subject) -> PeerRunner:
    right = EAGER.prepare(subject)
    return PeerRunner(lambda feed: (right.step(feed), 1.01 * right.step(feed)))


def broken(subject: Subject) -> PeerRunner:
    raise RuntimeError("out of luck")


def absent(subject: Subject) -> PeerRunner:
    raise PeerUnavailableError("not installed")


# Those that start fast; torch.compile has a test of its own.
PEERS = (PLAIN, OPENVINO, EAGER, *(Peer(f.__name__, {"cpu": ("fp32",)}, f) for f in (wrong, broken, absent)))


@pytest.fixture(scope="session")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell of the grid, a whole sample too."""
    file = tmp_path_factory.mktemp("grid") / "cell.json"
    command = ["bench", "--compare-dense", "--cells", "patch=4,mlp=1", "--end-to-end", "--steps", "2", "--threads", "1"]
    assert run([*command, *QUICK, "-o", str(file)]) == 0
    return file


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model against other runtimes, and its quality."""
    file = tmp_path_factory.mktemp("digits") / "digits.json"
    command = ["bench", "--checkpoint", str(DIGITS / "sparsedm.pth"), "--batch", "50", "--peers", "--samples", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "PEERS", PEERS)
        patch.setattr(quality, "STEPS", 10)
        assert run([*command, "--backend", "auto,torch", "--threads", "1", *QUICK, "-o", str(file)]) == 0
    return file


@pytest.fixture
def grid_results(grid_file: Path) -> dict[str, Any]:
    return read_results(grid_file)


@pytest.fixture
def digits_results(digits_file: Path) -> dict[str, Any]:
    return read_results(digits_file)
