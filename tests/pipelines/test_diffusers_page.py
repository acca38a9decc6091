"""Every command and line of Python of docs/diffusers.md, in order, with a small folder by the name that it uses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.pipeline_cases import CASES
from tests.pipelines.test_bundle import make_sd

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "diffusers.md").read_text()
BLOCKS = re.findall(r"```(sh|python) run\n(.*?)```", PAGE, re.S)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    assert [language for language, _ in BLOCKS] == ["python", "sh", "python", "sh"]
    make_sd(tmp_path, length=77).save_pretrained(tmp_path / "stable-diffusion-v1-5")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    for language, text in BLOCKS:
        command = ["sh", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for name in ("cube.png", "cube-engine.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1
    assert len(list((tmp_path / "home").rglob("*.sengine"))) == 1
    results = json.loads((tmp_path / "pipeline.json").read_text())
    assert results["kind"] == "pipeline"


def test_the_pipelines_of_the_page_are_those_that_are_tested() -> None:
    table = re.search(r"\| pipeline \|.*?\n\n", PAGE, re.S)
    assert table is not None
    rows = [line.split("|")[1:4] for line in table[0].strip().splitlines()[2:]]
    for name, case in CASES.items():
        short = name.removeprefix("StableDiffusion") or name
        row = next(row for row in rows if name in row[0] or short in row[0].split("its")[-1])
        kind = type(case.network()).__name__
        assert kind in row[1]
        assert all(scheduler in row[2] or "their own" in row[2] for scheduler in case.schedulers)


def test_links_of_the_page_are_there() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target
