"""ONNX Runtime as anyone would use it: the exported graph, default options, dense."""

from __future__ import annotations

from .base import Feed, Peer, PeerUnavailableError, Run, Subject


def _prepare(subject: Subject, feed: Feed) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise PeerUnavailableError("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(subject.onnx, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["m"], feed)[0]


PLAIN = Peer("ONNX Runtime", ("fp32",), _prepare)
