"""Which tier runs, and what is said where it cannot."""

import platform
import re
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import AVX2, AVX512, AVX512_BF16, defined_symbols, needs_compiler

from sparse_engine import kernels
from sparse_engine.errors import InputError, UnsupportedError
from sparse_engine.kernels import library

FLAGS = {"tier_avx2.cpp": AVX2, "tier_avx512.cpp": AVX512, "tier_avx512_bf16.cpp": AVX512_BF16}


def test_the_best_tier_is_the_highest_for_the_precision(monkeypatch):
    monkeypatch.delenv(kernels.ISA_VARIABLE, raising=False)
    tiers = kernels.available_tiers()
    assert tiers[0] == "scalar"
    assert kernels.best_tier() == [t for t in tiers if t != "avx512-bf16"][-1]


def test_the_environment_forces_a_tier(monkeypatch):
    for tier in kernels.available_tiers():
        monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
        # The float32 kernels of the bf16 tier are those of avx512.
        assert kernels.best_tier("fp32") == ("avx512" if tier == "avx512-bf16" else tier)
        assert kernels.MatMul24(*kernels.pack(np.eye(4, dtype=np.float32))).tier == kernels.best_tier()


@pytest.mark.parametrize("tier", ["scalar", "avx2", "avx512"])
def test_bf16_has_no_substitute(monkeypatch, tier):
    if tier not in kernels.available_tiers():
        pytest.skip(f"this machine lacks {tier}")
    monkeypatch.setenv(kernels.ISA_VARIABLE, tier)
    with pytest.raises(UnsupportedError, match=f"bf16 products need AVX512-BF16; the highest tier here is {tier}"):
        kernels.best_tier("bf16")


def test_a_forced_tier_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.ISA_VARIABLE, "sse2")
    with pytest.raises(InputError, match="SPARSE_ENGINE_ISA is 'sse2', expected one of: scalar, avx2"):
        kernels.best_tier()


def test_a_forced_tier_that_the_machine_lacks_is_refused(monkeypatch):
    lacking = [tier for tier in kernels.TIERS if tier not in kernels.available_tiers()]
    if not lacking:
        pytest.skip("this machine has every tier")
    monkeypatch.setenv(kernels.ISA_VARIABLE, lacking[0])
    with pytest.raises(UnsupportedError, match=f"SPARSE_ENGINE_ISA asks for {lacking[0]}, which this machine"):
        kernels.best_tier()
    with pytest.raises(UnsupportedError, match=f"asks for {lacking[0]}"):
        kernels.MatMul24(*kernels.pack(np.eye(4, dtype=np.float32)), tier=lacking[0])


def test_a_lanes_name_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="tactic is 'diagonal', expected one of: t-lanes, n-lanes"):
        kernels.MatMul24(*kernels.pack(np.eye(4, dtype=np.float32)), lanes="diagonal")


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "missing.so")
    library._library.cache_clear()
    try:
        assert not kernels.is_available()
        with pytest.raises(UnsupportedError, match=r"not built: .*missing\.so does not exist") as error:
            kernels.available_tiers()
        assert "cmake -S . -B build" in error.value.fix
    finally:
        library._library.cache_clear()


def test_the_detected_tiers_are_those_that_the_kernel_reports():
    if platform.machine() != "x86_64":
        arm = platform.machine() in ("aarch64", "arm64")
        assert kernels.available_tiers() == (("scalar", "neon") if arm else ("scalar",))
        return
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needs = {
        "scalar": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
    needs["avx512-bf16"] = needs["avx512"] | {"avx512_bf16"}
    needs["neon"] = {"asimd"}  # which no x86 processor says of itself
    assert kernels.available_tiers() == tuple(tier for tier in kernels.TIERS if needs[tier] <= flags)


def test_the_peak_of_a_tier_is_plausible():
    for tier in kernels.available_tiers():
        registers, loads = kernels.peak_flops(tier), kernels.peak_flops(tier, load=True)
        if tier == "scalar":
            assert np.isnan(registers)
        else:
            assert 1e9 < registers < 1e12
            assert 1e9 < loads < 1e12
    with pytest.raises(InputError, match="tier is 'mmx', expected one of"):
        kernels.peak_flops("mmx")


@needs_compiler
@pytest.mark.parametrize("source", FLAGS)
def test_an_instruction_set_shares_no_code_with_the_others(source, tmp_path):
    expected = 7 if "bf16" in source else 5
    assert len(defined_symbols(source, FLAGS[source], tmp_path)) == expected, (
        "its tactics, of products and convolutions (in bf16 two more), the peak loop, and nothing else"
    )
