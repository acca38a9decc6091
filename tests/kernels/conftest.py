"""Fixtures of the kernel tests: each tactic of this machine, guarded memory, resident memory."""

from __future__ import annotations

import ctypes
import mmap
import shutil

import numpy as np
import pytest
from kernel_cases import tactics

from sparse_engine import kernels


def pytest_collection_modifyitems(items):
    if kernels.is_available():
        return
    reason = "the kernels are not built" + ("" if shutil.which("c++") else ": there is no C++ compiler")
    for item in items:
        if "kernels" in item.path.parts and item.path.name != "test_packing.py":
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=tactics(), ids="/".join)
def tactic(request):
    """Each (tier, lanes) that this machine runs."""
    return request.param


_libc = ctypes.CDLL(None, use_errno=True)


class GuardedMemory:
    """Arrays that end (or begin) exactly where a page without any access begins (or ends)."""

    def __init__(self):
        self._maps = []

    def copy(self, array, at="end"):
        page = mmap.PAGESIZE
        pages = -(-array.nbytes // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        self._maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + (pages + 1) * page):
            assert _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        offset = page if at == "begin" else (pages + 1) * page - array.nbytes
        copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        copy[:] = array
        return copy


@pytest.fixture
def guarded_memory():
    return GuardedMemory()


@pytest.fixture
def resident_bytes():
    """A function: the memory of this process that is resident now."""

    def read():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    return read
