"""What TensorRT chose, read off its log in both formats and off its inspector."""

from __future__ import annotations

import json

import pytest

from sparse_engine.backends.tensorrt.report import Sparsity, layer_reports, parse_inspector, parse_log

# TensorRT 8 to 10.3: https://github.com/NVIDIA/TensorRT/issues/2169
UP_TO_10_3 = """\
[I] [TRT] Detected 3 inputs and 2 output network tensors.
[I] [TRT] (Sparsity) Layers eligible for sparse math: mid_block.attn.qkv, mid_block.mlp.fc1 + gelu, fc2
[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: mid_block.mlp.fc1 + gelu
"""
FROM_10_14 = """\
(Sparsity) Found 2 layer(s) eligible to use sparse tactics: mid_block.attn.qkv, mid_block.mlp.fc1
(Sparsity) Chose 1 layer(s) using sparse tactics: mid_block.mlp.fc1
Compiler backend is used during engine execution.
(Sparsity) Found 1 layer(s) eligible to use sparse tactics: fc2
(Sparsity) Chose 0 layer(s) using sparse tactics:
"""
WITHOUT_NAMES = """\
(Sparsity) Found 39 layer(s) eligible to use sparse tactics
(Sparsity) Chose 0 layer(s) using sparse tactics
"""


@pytest.mark.parametrize("text", [UP_TO_10_3, FROM_10_14], ids=["up to 10.3", "from 10.14"])
def test_both_formats(text: str) -> None:
    found = parse_log(text.splitlines())
    assert found.reported
    assert (found.eligible_count, found.chosen_count) == (3, 1)
    assert len(found.eligible) == 3
    reports = layer_reports(
        ["mid_block.attn.qkv", "mid_block.mlp.fc1", "fc2", "head"],
        ["mid_block.attn.qkv", "mid_block.mlp.fc1", "fc2"],
        found,
        {},
    )
    assert reports["mid_block.mlp.fc1"]["chosen"] is True
    assert reports["mid_block.mlp.fc1"]["kernel"] == "sparse"
    assert reports["head"] == {"chosen": False, "kernel": None, "why": "dense weights"}


def test_counts_without_names() -> None:
    found = parse_log(WITHOUT_NAMES.splitlines())
    assert found == Sparsity(True, (), (), 39, 0)
    assert layer_reports(["fc1"], ["fc1"], found, {})["fc1"]["chosen"] is False


def test_nothing_chosen_in_the_old_format() -> None:
    lines = [
        "(Sparsity) Layers eligible for sparse math: Conv_0",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: ",
    ]
    assert parse_log(lines) == Sparsity(True, ("Conv_0",), (), 1, 0)


def test_a_log_that_says_nothing_is_no_answer() -> None:
    found = parse_log(["Engine generation completed in 1.9 seconds."])
    assert not found.reported
    report = layer_reports(["fc1"], ["fc1"], found, {})["fc1"]
    assert report["chosen"] is None
    assert report["why"] == "TensorRT does not say which kernel it chose"


def inspected(*entries: dict) -> dict[str, tuple[str, ...]]:
    return parse_inspector(json.dumps({"Layers": list(entries), "Bindings": ["x"]}))


def test_inspector_names_the_kernel_of_each_fused_layer() -> None:
    sparse = "sm80_xmma_gemm_sparse_f16f16_f16f32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_sptensor16x8x32"
    kernels = inspected(
        {"Name": "__myl_Fc_0", "Metadata": "[ONNX Layer: fc1]\x1e[ONNX Layer: node_gelu]", "TacticName": sparse},
        {"Name": "fc2 + node_add", "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n", "HasSparseWeights": 1},
        {"Name": "reformat", "TacticName": ""},
    )
    assert kernels["fc1"] == kernels["node_gelu"] == (sparse,)
    reports = layer_reports(["fc1", "fc2"], ["fc1", "fc2"], parse_log([]), kernels)
    assert reports["fc1"] == {"chosen": True, "kernel": sparse, "why": "faster than dense in TensorRT's timing"}
    assert reports["fc2"]["chosen"] is False  # its weights are sparse; its kernel is not
    assert reports["fc2"]["kernel"] == "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n"


def test_a_convolution_with_what_was_fused_into_it() -> None:
    sparse = "sm80_xmma_fprop_sparse_conv_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_sptensor16x8x32"
    dense = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_stage4"
    kernels = inspected(
        {"Name": "down.conv1 + node_silu", "Metadata": "[ONNX Layer: down.conv1]", "TacticName": sparse},
        {"Name": "down.conv2", "Metadata": "[ONNX Layer: down.conv2]", "TacticName": dense},
    )
    names = ["down.conv1", "down.conv2"]
    reports = layer_reports(names, names, parse_log([]), kernels)
    assert [reports[name]["chosen"] for name in names] == [True, False]
    assert [reports[name]["kernel"] for name in names] == [sparse, dense]


@pytest.mark.parametrize("kernel", ["cutlass_80_tensorop_spmma_f16", "sm90_xmma_gemm_SPARSE_e4m3", "x_sptensor16x8x64"])
def test_sparse_kernels_by_name(kernel: str) -> None:
    assert layer_reports(["a"], ["a"], parse_log([]), {"a": (kernel,)})["a"]["chosen"] is True


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"Layers": ["only", "names"]}', '{"Layers": [{"Name": "x"}]}'])
def test_an_inspector_without_detail_says_nothing(text: str) -> None:
    assert parse_inspector(text) == {}
