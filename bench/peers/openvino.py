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
    bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if subject.precision == "bf16" and not bf16:
        raise PeerUnavailableError("this processor has no bf16 that OpenVINO uses")
    beside_int8 = "bf16" if bf16 else "fp32"  # what is not in 8 bits, at its fastest
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[beside_int8 if subject.precision == "int8" else subject.precision],
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


OPENVINO = Peer("OpenVINO", {"cpu": ("fp32", "int8", "bf16")}, _prepare)
