"""What docs/bulk.md says to run, run in its order."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "bulk.md").read_text()


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "examples" / "digits", tmp_path / "examples" / "digits")
    blocks = re.findall(r"```(sh|python) run\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 5
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for language, text in blocks:
        command = ["sh", "-e", "-c", text] if language == "sh" else [sys.executable, "-P", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (200, 8, 8, 1)
    assert len(list((tmp_path / "out" / "png").iterdir())) == 200


def test_links_and_options_of_the_page_are_there() -> None:
    from sparse_engine.cli import sample_many

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target
    source = Path(sample_many.__file__).read_text()
    ours = re.sub(r"#SBATCH.*|`python [^`]*`", "", PAGE)
    for option in set(re.findall(r"--([a-z][a-z-]+)", ours)) - {"sparse"}:
        assert re.search(rf"\b{option.replace('-', '_')}: |--{option}\b", source), option
