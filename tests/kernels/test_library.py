"""The library is built where it can be: without it the other tests of this folder are skipped, unnoticed."""

import shutil

import pytest

from sparse_engine import kernels


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
def test_a_machine_with_a_compiler_has_the_kernels() -> None:
    assert kernels.is_available(), f"{kernels.LIBRARY_PATH} was not built: pip install -e ."
