"""OpenVINO on the CPU, compiled for latency at the shapes that are run."""

from __future__ import annotations

from typing import Any

from .base import Peer, PeerRunner, PeerUnavailableError, Subject

HINTS = {"fp32": "f32", "bf16": "bf16"}


def _prepare(subject: Subject) -> PeerRunner:
    try:
        import openvino
    except ImportError as error:
        raise PeerUnavailableError("openvino is not installed") from error
    core = openvino.Core()
    if subject.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise PeerUnavailableError("this processor has no bf16 that OpenVINO uses")
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[subject.precision],
        "INFERENCE_NUM_THREADS": str(subject.threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(subject.onnx)
    requests: dict[tuple[int, ...], Any] = {}  # one for each shape of x

    def call(feed: dict[str, Any]) -> tuple[Any, Any]:
        shape = feed["x"].shape
        if shape not in requests:
            model.reshape({name: list(array.shape) for name, array in feed.items()})
            requests[shape] = core.compile_model(model, "CPU", options).create_infer_request()
        outputs = requests[shape].infer(feed, share_inputs=True)
        return outputs["x_next"], outputs["m"]

    return PeerRunner(call)


OPENVINO = Peer("OpenVINO", {"cpu": ("fp32", "bf16")}, _prepare)
