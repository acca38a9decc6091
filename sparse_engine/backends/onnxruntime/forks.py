"""Sessions outlive a fork.

A fork has none of its parent's threads, and ONNX Runtime waits for them when a session is destroyed, and again when
the process exits. A child that was forked while sessions were open gives each a reference that is never taken back,
and leaves through ``_exit`` once Python has finished, before the C++ runtime takes ONNX Runtime apart.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

_open_sessions: weakref.WeakSet[Any] = weakref.WeakSet()


def outlive_forks(session: Any) -> None:
    """Called with every session that is made for the CPU."""
    _open_sessions.add(session)


def _outlive_fork() -> None:
    sessions = list(_open_sessions)
    for session in sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
    libc = ctypes.CDLL(None)
    if sessions and hasattr(libc, "on_exit"):  # glibc: called with the exit status, the last registered first
        libc.on_exit(libc._exit, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_outlive_fork)
