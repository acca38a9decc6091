"""The 8-bit formats: exact at 0, saturating, and rounding as ONNX Runtime's own operators do."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparse_engine.calibration.formats import FLOAT8, INT8, UINT8, Format


@pytest.mark.parametrize("form", [UINT8, INT8, FLOAT8], ids=lambda form: form.name)
@pytest.mark.parametrize("ends", [(-1.0, 1.0), (-0.17, 3.0), (0.5, 2.0), (-2.0, -1.0)])
def test_zero_is_exact_and_the_ends_fit(form: Format, ends: tuple[float, float]) -> None:
    scale, zero = form.scale_and_zero(*ends)
    values = np.array([0.0, *ends], np.float32)
    found = form.dequantize(form.quantize(values, scale, zero), scale, zero)
    assert found[0] == 0
    relative_step = 2.0**-4 if form is FLOAT8 else 0  # e4m3 has three bits behind the point
    assert np.all(np.abs(found - values) <= 0.5001 * scale + relative_step * np.abs(values))


@pytest.mark.parametrize("form", [UINT8, INT8, FLOAT8], ids=lambda form: form.name)
def test_codes_are_onnx_runtimes(form: Format, rng: np.random.Generator) -> None:
    scale, zero = form.scale_and_zero(-1.0, 2.0)
    values = np.concatenate([rng.normal(0, 2, 5000), np.arange(-60, 60) * float(scale) / 2]).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "reference",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(values)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(values)])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [float(scale)]),
            helper.make_tensor("zero", form.onnx_type, [], [float(zero)]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = form.dequantize(form.quantize(values, scale, zero), scale, zero)
    inside = (values > -float(scale) * 127) & (values < float(scale) * (255 - float(zero)))  # we leave -128 out
    expected = session.run(None, {"x": values})[0]
    kept = inside if form is INT8 else np.ones_like(inside)
    assert np.array_equal(found[kept], expected[kept])


def test_a_channel_of_zeros_has_a_scale_all_the_same() -> None:
    scale, _ = INT8.scale_and_zero(np.array([0.0, -3.0]), np.array([0.0, 1.0]))
    assert scale.tolist() == [1.0, pytest.approx(3 / 127)]


def test_float8_saturates_instead_of_becoming_nan() -> None:
    codes = FLOAT8.quantize(np.array([1e6, -1e6], np.float32), np.float32(1), np.zeros((), ml_dtypes.float8_e4m3fn))
    assert codes.astype(np.float32).tolist() == [448, -448]
