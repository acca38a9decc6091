"""Where commands write: into folders, through links, and what cannot be written is said before the work."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparse_engine.artifact import EngineFile
from sparse_engine.cli.main import run
from sparse_engine.drawing import Drawing
from sparse_engine.errors import OutputError
from sparse_engine.export.families.uvit import UViTConfig
from sparse_engine.images import check_output, grid, sheet_size
from tests.conftest import save_checkpoint

FAST = ["--steps", "2", "--sampler", "ddim", "-n", "4"]
QUICK = ["--images", "16", "--steps", "8", "--sampler", "ddim"]


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("it was drawn before it was said")

    monkeypatch.setattr(Drawing, "_walk", drawn)


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory: pytest.TempPathFactory, build: Callable[..., Path]) -> Path:
    config = UViTConfig(image_size=8, patch_size=2, channels=2, embed_dim=32, depth=2, heads=4)
    return build(save_checkpoint(tmp_path_factory.mktemp("two") / "two.pth", config))


@pytest.mark.parametrize("output", ["x.png", "X.PNG", "folder", "x.jpg"])
@pytest.mark.parametrize("engine", ["two_channels", "latent_engine"])
def test_what_no_picture_holds_is_said_before_it_is_drawn(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    no_drawing: None,
    capsys: pytest.CaptureFixture,
    engine: str,
    output: str,
) -> None:
    path = tmp_path / output
    assert run(["sample", str(request.getfixturevalue(engine)), *FAST, "-o", str(path)]) == 2
    said = capsys.readouterr().err
    expected = "2 channels; a PNG has 1, 3 or 4" if engine == "two_channels" else "latents, which no picture shows"
    if output == "x.jpg":
        assert "use .png, .npz or a folder" in said
    else:
        assert expected in said
        assert f"--output {path.with_suffix('.npz')}" in said
    assert "output=" not in said
    assert os.listdir(tmp_path) == []


def test_they_go_to_an_array(tmp_path: Path, two_channels: Path) -> None:
    assert run(["sample", str(two_channels), *FAST, "-o", str(tmp_path / "x.npz")]) == 0


def test_a_picture_that_no_program_opens(tmp_path: Path, no_drawing: None, tiny_engine: Path) -> None:
    called = ["sample", str(tiny_engine), "--steps", "2", "-n", "100000", "-o", str(tmp_path / "x.png")]
    assert run(called) == 2
    with pytest.raises(OutputError, match=r"100 samples would have 20482 x 20482 pixels.*\n.*--output .*x$"):
        check_output(tmp_path / "x.png", 100, (3, 2046, 2046), latents=False)
    check_output(tmp_path / "x", 100, (3, 2046, 2046), latents=False)


def test_an_array_larger_than_the_disk_or_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"needs .* GB; the disk has .* GB left"):
        check_output(tmp_path / "x.npz", 2**32, (3, 4096, 4096), latents=False)
    monkeypatch.setattr("sparse_engine.images.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 80))
    with pytest.raises(OutputError, match="is put together in memory"):
        check_output(tmp_path / "x.npz", 2**32, (3, 4096, 4096), latents=False)


@pytest.mark.parametrize("n", [1, 7, 10])
def test_the_size_that_is_said_is_the_pictures(n: int) -> None:
    assert sheet_size(n, 24, 16) == grid(np.zeros((n, 24, 16, 3), np.uint8)).shape[:2]


def test_a_folder_takes_what_is_named_after_the_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert run(["build", str(tiny_checkpoint), "--heads", "4", "--no-autotune", "-o", str(tmp_path)]) == 0
    assert os.listdir(tmp_path) == ["tiny.sengine"]
    EngineFile(tmp_path / "tiny.sengine").verify()


def test_other_commands_write_into_a_folder(tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["calibrate", str(tiny_engine), "--guidance", "1", *QUICK, "-o", "."]) == 0
    assert run(["inspect", str(tiny_engine), "--json", "--plot", "."]) == 0
    assert sorted(os.listdir()) == ["calib.npz", "tiny.png"]


def test_an_empty_folder_is_filled_where_it_is(
    tmp_path: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming another over it would take the working folder away, and fail at a mount point."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    assert run(["sample", str(tiny_engine), *FAST, "-o", "."]) == 0
    assert sorted(os.listdir()) == [f"{i:06d}.png" for i in range(4)]
    assert tmp_path.stat().st_ino == before
    assert run(["sample", str(tiny_engine), *FAST, "-o", "."]) == 2


def test_a_link_stays_one(tmp_path: Path, tiny_engine: Path) -> None:
    (tmp_path / "x.png").symlink_to(tmp_path / "y.png")
    assert run(["sample", str(tiny_engine), *FAST, "-o", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").is_symlink()
    assert (tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")


TARGETS = {"too long": "x" * 300, "below a file": "file/sub/x", "no folder": "no/x", "the system's": "/proc/x"}


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize(
    "command, suffix",
    [
        (["build", "{checkpoint}", "--heads", "4", "-o"], ".sengine"),
        (["calibrate", "{engine}", "-o"], ".npz"),
        (["calibrate", "{engine}", "--plot"], ".png"),
        (["inspect", "{engine}", "--plot"], ".svg"),
        (["sample", "{engine}", "-o"], ".npz"),
        (["sample", "{engine}", "-o"], ".png"),
        (["sample", "{engine}", "-o"], ""),
        (["bench", "--compare-dense", "-o"], ".json"),
        (["bench", "--compare-dense", "--report"], ""),
    ],
)
def test_what_cannot_be_written_is_two_lines(
    tmp_path: Path,
    tiny_checkpoint: Path,
    tiny_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    no_drawing: None,
    command: list[str],
    suffix: str,
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    names = {"checkpoint": str(tiny_checkpoint), "engine": str(tiny_engine)}
    assert run([*(word.format(**names) for word in command), TARGETS[case] + suffix]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[0][:7], said[1][:5]) == (2, "error: ", "fix: "), said
    assert os.listdir(tmp_path) == ["file"]
