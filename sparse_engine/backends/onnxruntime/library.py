"""The one place that imports ONNX Runtime."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

# From 1.29 on it records usage, and leaves a device id and a store of events in the user's cache folder, unless this is
# set before it is imported.
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


def load_onnxruntime(part: str = "") -> Any:
    """``onnxruntime``, or a module of it (``quantization``), with its telemetry off unless the user has set it.

    Raises ImportError where it is not installed.
    """
    first = "onnxruntime" not in sys.modules and keep_private()
    library = import_module("onnxruntime")
    if first:
        library.disable_telemetry_events()  # Windows's own, which does not read the variable
    return import_module(f"onnxruntime.{part}") if part else library


def keep_private() -> bool:
    """Turn ONNX Runtime's telemetry off for this process and those that it starts; False where the user has set it."""
    if TELEMETRY_VARIABLE in os.environ:
        return False
    os.environ[TELEMETRY_VARIABLE] = "1"
    return True
