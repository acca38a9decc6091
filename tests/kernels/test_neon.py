"""The NEON tier, built for 64-bit Arm and run under QEMU's user mode, where those are installed.

apt-get install qemu-user g++-aarch64-linux-gnu
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NAMES, OBJECTS = "aarch64-linux-gnu-nm", "aarch64-linux-gnu-objdump"
MISSING = [tool for tool in ("cmake", COMPILER, EMULATOR, NAMES, OBJECTS) if shutil.which(tool) is None]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the kernels are built, linked into ``kernels_smoke``."""
    folder = tmp_path_factory.mktemp("arm")
    target = {
        "SPARSE_ENGINE_SMOKE": "ON",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
    }
    configure = ["cmake", "-S", ROOT, "-B", folder, *(f"-D{name}={value}" for name, value in target.items())]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def emulate(folder, *arguments, processor="max", **environment):
    command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, folder / "kernels_smoke", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_every_kernel_of_an_arm_processor_under_qemu(folder):
    ran = emulate(folder)
    assert ran == ["scalar ran", "neon ran", "scalar in int8 ran", "neon-dot in int8 ran"]


@pytest.mark.parametrize(
    "processor, forced, best",
    [
        ("max", "", ["fp32 neon", "int8 neon-dot"]),
        ("max", "neon-dot", ["fp32 neon", "int8 neon-dot"]),
        ("max", "neon", ["fp32 neon", "int8 scalar"]),
        ("cortex-a53", "", ["fp32 neon", "int8 scalar"]),  # which has no dot products
    ],
)
def test_dot_products_are_found_out(folder, processor, forced, best):
    assert emulate(folder, "best", processor=processor, SPARSE_ENGINE_ISA=forced) == best


def test_dot_products_are_in_a_file_of_their_own(folder):
    """Where a processor lacks them, nothing else may have been compiled with them."""
    (found,) = folder.rglob("tier_neon_dot.cpp.o")
    listed = subprocess.run([NAMES, "--defined-only", "--extern-only", found], capture_output=True, text=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["_ZN13sparse_engine12kNeonDotInt8E"]
    others = [path for path in folder.rglob("*.cpp.o") if path != found]
    assert len(others) > 20
    listed = subprocess.run([OBJECTS, "-d", *others], capture_output=True, text=True)
    assert "\tfmla\t" in listed.stdout
    assert "\tsdot\t" not in listed.stdout
