"""The page in a real browser, and the figures as files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparse_engine.bench.report.page import check_folder, write_report
from sparse_engine.cli.main import run
from sparse_engine.errors import OutputError

Results = dict[str, Any]
BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome",
    "chrome-headless-shell",
)
GRID_PLOTS, MODEL_PLOTS = {"speedup", "layers", "latency"}, {"speedup", "layers", "latency", "quality"}
# What a browser made of each figure, written where --dump-dom shows it.
PROBE = """<script>
  const seen = image => [image.parentElement.id, image.naturalWidth, image.clientWidth, image.alt];
  window.onload = () => document.body.dataset.plots = JSON.stringify([...document.images].map(seen));
</script>"""


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium: the one that $CHROME names, or on the path."""
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path, and $CHROME is not set")
    return found


def opened(browser: str, page: Path, profile: Path) -> tuple[str, str]:
    """(the document after it was loaded, what was said on the console)."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [browser, *switches, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize("file,expected", [("grid_file", GRID_PLOTS), ("digits_file", MODEL_PLOTS)])
def test_a_browser_shows_every_plot(
    browser: str, file: str, expected: set[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "report"
    assert run(["bench", "--results", str(request.getfixturevalue(file)), "--report", str(folder)]) == 0
    page = folder / "index.html"
    page.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    document, console = opened(browser, page, tmp_path / "profile")
    assert console == ""
    found = re.search(r'data-plots="([^"]*)"', document)
    assert found
    plots = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert {name for name, *_ in plots} == expected
    assert all(natural > 300 and shown > 300 and alt for _, natural, shown, alt in plots)


def test_the_browser_would_have_told_of_an_error(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>missing()</script>")
    assert "missing is not defined" in opened(browser, page, tmp_path / "profile")[1]


def test_the_page_needs_nothing_else(grid_results: Results, tmp_path: Path) -> None:
    write_report(tmp_path / "report", grid_results)
    text = (tmp_path / "report" / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*', text) == []
    assert "<script" not in text
    assert grid_results["machine"]["processor"] in text
    assert "A whole sample: 2 steps of euler-sde" in text
    assert "Quality was not measured" in text


@pytest.mark.parametrize("results,expected", [("grid_results", GRID_PLOTS), ("digits_results", MODEL_PLOTS)])
def test_figures_as_png(results: str, expected: set[str], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    files = write_report(tmp_path, request.getfixturevalue(results))
    assert {file.stem for file in files if file.suffix == ".png"} == expected
    for file in files[1:]:
        pixels = np.asarray(Image.open(BytesIO(file.read_bytes())).convert("L"))
        assert pixels.shape[1] > 1000
        assert 0.02 < (pixels < 200).mean() < 0.9  # ink, and paper


def test_a_report_that_cannot_be_written(tmp_path: Path, grid_results: Results) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file; expected a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="the folder .* does not exist"):
        check_folder(tmp_path / "no" / "report")
