"""The kernels under the address and undefined-behaviour sanitizers, in a program of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sparse_engine import kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs cmake and g++")
def test_every_tier_of_this_machine_is_clean_under_the_sanitizers(tmp_path):
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-DSPARSE_ENGINE_SANITIZE=ON"]
    for command in (configure, ["cmake", "--build", tmp_path, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = subprocess.run([tmp_path / "kernels_smoke"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [f"{tier} ran" for tier in kernels.available_tiers()]
    ran += [f"{tier} in int8 ran" for tier in kernels.available_tiers("int8")]
    assert done.stdout.split("\n")[:-1] == ran
