"""What goes wrong on a device, where the loop knows better than to give up."""

from __future__ import annotations

from sparse_engine.errors import BackendError


class OutOfDeviceMemoryError(BackendError):
    """The device has no memory left for a batch; the loop halves it."""


class CaptureError(Exception):
    """Steps cannot be recorded here; the message says why. The loop enqueues them one by one."""
