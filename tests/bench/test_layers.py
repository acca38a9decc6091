"""Times by layer from a trace, and what Amdahl makes of them."""

import pytest

from sparse_engine.bench.layers import RUNS, LayerTime, _collect, amdahl_limit


def event(name: str, operator: str, microseconds: float) -> dict:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": {"op_name": operator}}


def test_a_trace_by_layer_and_kernel() -> None:
    events = [{"cat": "Session", "name": "model_run", "dur": 9}]
    for run in range(1 + RUNS):
        warm_up = 1000 if run == 0 else 1
        events += [event("fc1", "MatMul24", 10 * warm_up), event("add_1", "Add", 2), event("add_2", "Add", 3)]
        events += [event("head", "MatMul", 7 - run)]
    found = {entry.name: entry for entry in _collect(events, {"fc1", "head"}, {"fc1": "t-lanes"})}
    assert found["fc1"] == LayerTime("fc1", "t-lanes", 0.01, True)
    assert found["Add"] == LayerTime("Add", "Add", 0.005, False)
    assert found["head"].milliseconds == pytest.approx((7 - RUNS) / 1e3)  # the last run is the fastest


def test_two_layers_in_one_node_share_its_time() -> None:
    events = [event("fc1+fc2", "Mlp24", 8) for _ in range(1 + RUNS)] + [event("a+b", "Add", 2) for _ in range(1 + RUNS)]
    kernels = {"fc1": "t-lanes", "fc2": "t-lanes"}
    assert _collect(events, {"fc1", "fc2"}, kernels) == [
        LayerTime("fc1", "t-lanes", 0.004, True),
        LayerTime("fc2", "t-lanes", 0.004, True),
        LayerTime("Add", "Add", 0.002, False),
    ]


def test_convolutions_under_the_runtimes_own_names() -> None:
    events = [event("y_nchwc", "Conv", 8) for _ in range(1 + RUNS)]
    assert _collect(events, {"conv"}, {}, {"y_nchwc": "conv"}) == [LayerTime("conv", "Conv", 0.008, True)]


def test_amdahl() -> None:
    times = [LayerTime("fc1", "MatMul", 6.0, True), LayerTime("Add", "Add", 4.0, False)]
    found = amdahl_limit(times, ["fc1"])
    assert (found.share, found.limit) == pytest.approx((0.6, 10 / 7))
    assert found.reached(1.0) == 0
    assert found.reached(10 / 7) == pytest.approx(1)
    assert found.reached(10 / 8.5) == pytest.approx(0.5)
    assert amdahl_limit(times, []).reached(1.2) is None
