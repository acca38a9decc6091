"""The NEON tier, built for 64-bit Arm and run under QEMU's user mode, where those are installed.

apt-get install qemu-user g++-aarch64-linux-gnu
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in ("cmake", COMPILER, EMULATOR) if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_every_kernel_of_an_arm_processor_under_qemu(tmp_path):
    target = {
        "SPARSE_ENGINE_SMOKE": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
    }
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in target.items())]
    for command in (configure, ["cmake", "--build", tmp_path, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", tmp_path / "kernels_smoke"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["scalar ran", "neon ran", "scalar in int8 ran"]
