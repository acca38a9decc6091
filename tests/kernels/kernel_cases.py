"""What the kernel tests share: the tactics of this machine, tolerances, random 2:4 weights."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sparse_engine import kernels

SOURCES = Path(kernels.__file__).parent / "src"
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("nm")) or not SOURCES.is_dir() or platform.machine() != "x86_64",
    reason="the vector tiers are x86-64's, and this needs their sources, g++ and nm",
)

# Relative to the largest result: float32 sums, and products of operands rounded to eight bits.
TOLERANCE = {"scalar": 4e-6, "avx2": 4e-6, "avx512": 4e-6, "avx512-bf16": 4e-3, "neon": 4e-6}


def tactics():
    if not kernels.is_available():
        return []
    tiers = kernels.available_tiers()
    return [
        (tier, lanes) for tier in tiers for lanes in ("t-lanes", "n-lanes") if (tier, lanes) != ("scalar", "n-lanes")
    ]


def random_weight(rng, rows, depth, scale=1.0):
    """A 2:4 weight whose groups keep two, one or no weights, at random positions."""
    weight = (rng.standard_normal((rows, depth // 4, 4)) * scale).astype(np.float32)
    kept = rng.choice([0, 1, 2, 2, 2, 2], size=(rows, depth // 4, 1))
    order = np.argsort(rng.random(weight.shape), axis=-1)
    weight[np.argsort(order, axis=-1) >= kept] = 0
    return weight.reshape(rows, depth)


def create(weight, tactic):
    """The product of a dense 2:4 weight on one tactic; asserts that this tactic is what will run."""
    tier, lanes = tactic
    product = kernels.MatMul24(*kernels.pack(weight), tier=tier, lanes=lanes)
    assert product.tier == tier
    assert product.lanes == lanes
    return product


def relative_error(result, reference):
    """The largest error, relative to the largest reference."""
    assert result.dtype == np.float32
    return np.abs(result - reference).max() / np.abs(reference).max()


def defined_symbols(source, flags, folder):
    """What an instruction set's file defines; asserts that it shares nothing.

    A weak symbol in one of these files could be the copy that the linker keeps for all.
    """
    built = folder / "source.o"
    command = ["g++", "-std=c++17", "-O0", "-w", "-fPIC", "-fno-exceptions", "-DSPARSE_ENGINE_X86", *flags]
    subprocess.run([*command, "-c", SOURCES / source, "-o", built], check=True)
    symbols = subprocess.run(["nm", "-C", built], check=True, capture_output=True, text=True).stdout
    assert [line for line in symbols.splitlines() if re.match(r"\S+ [WVu] ", line)] == []
    return re.findall(r"^\S+ [A-Z] (.+)$", symbols, re.MULTILINE)
