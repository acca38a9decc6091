"""OpenVINO on the CPU, compiled for latency at the shapes that are run."""

from __future__ import annotations

import numpy as np

from .base import Feed, Peer, PeerUnavailableError, Run, Subject


def _prepare(subject: Subject, feed: Feed) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise PeerUnavailableError("openvino is not installed") from error
    core = openvino.Core()
    model = core.read_model(subject.onnx)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[subject.precision],
        "INFERENCE_NUM_THREADS": str(subject.threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run() -> np.ndarray:
        m: np.ndarray = request.infer(feed, share_inputs=True, share_outputs=True)["m"]
        return m

    return run


OPENVINO = Peer("OpenVINO", ("fp32", "bf16"), _prepare)
