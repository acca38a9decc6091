"""Figures are written in the format that their name says."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from sparse_engine.cli.main import run
from sparse_engine.errors import OptionError, OutputError
from sparse_engine.plots import encoded, save_figure

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".SVG": b"<?xml"}


def figure() -> Figure:
    drawn = Figure(figsize=(2, 2))
    drawn.add_subplot().plot([1, 2, 3])
    return drawn


@pytest.mark.parametrize("kind", MAGIC)
def test_every_command_that_draws(tmp_path: Path, tiny_engine: Path, kind: str) -> None:
    chart = tmp_path / f"x{kind}"
    assert run(["inspect", str(tiny_engine), "--json", "--plot", str(chart)]) == 0
    assert chart.read_bytes().startswith(MAGIC[kind])


def test_calibration_draws_what_was_asked_for(tmp_path: Path, tiny_engine: Path) -> None:
    chart, quick = tmp_path / "x.svg", ["--images", "16", "--steps", "8", "--sampler", "ddim"]
    called = ["calibrate", str(tiny_engine), *quick, "-o", str(tmp_path / "x.npz"), "--plot", str(chart)]
    assert run(called) == 0
    assert chart.read_bytes().startswith(MAGIC[".svg"])


@pytest.mark.parametrize("kind", [".png", ".svg", ".pdf"])
def test_the_same_figure_gives_the_same_bytes(kind: str) -> None:
    assert encoded(figure(), kind, "x") == encoded(figure(), kind, "x")


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="ends in .png or .svg or .pdf"):
        save_figure(figure(), tmp_path / "x.jpg")
    with pytest.raises(OutputError, match="does not exist"):
        save_figure(figure(), tmp_path / "no" / "x.svg")
    assert not list(tmp_path.iterdir())
