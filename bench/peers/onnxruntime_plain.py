"""ONNX Runtime as anyone would use it: the exported graph, default options, dense."""

from __future__ import annotations

from typing import Any

from sparse_engine.backends.onnxruntime.library import load_onnxruntime

from .base import Peer, PeerRunner, PeerUnavailableError, Subject

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _prepare(subject: Subject) -> PeerRunner:
    try:
        onnxruntime = load_onnxruntime()
    except ImportError as error:
        raise PeerUnavailableError("onnxruntime is not installed") from error
    provider = PROVIDERS[subject.device]
    if provider not in onnxruntime.get_available_providers():
        raise PeerUnavailableError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(subject.onnx, options, providers=[provider])

    def call(feed: dict[str, Any]) -> tuple[Any, Any]:
        x_next, m = session.run(["x_next", "m"], feed)
        return x_next, m

    return PeerRunner(call)


PLAIN = Peer("ONNX Runtime", {"cpu": ("int8", "fp32"), "cuda": ("fp32",)}, _prepare)
