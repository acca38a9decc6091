"""Operations counted from shapes, against the formulas for a U-ViT."""

from pathlib import Path

import pytest

from sparse_engine.bench.products import product_flops
from sparse_engine.bench.workload import Workload
from sparse_engine.export.model import load_model
from tests.conftest import TINY_CONDITIONAL


def test_operations_of_a_network(conditional_checkpoint: Path) -> None:
    workload = Workload(load_model(conditional_checkpoint, heads=4))
    flops = product_flops(workload.graph(), batch=3)
    tokens, width = TINY_CONDITIONAL.tokens, TINY_CONDITIONAL.embed_dim
    assert flops["mid_block.mlp.fc1"] == 2 * 3 * tokens * width * 4 * width
    layers = {layer.name: 2 * 3 * layer.macs for layer in workload.baked.layers}
    assert {name: count for name, count in flops.items() if name in layers} == layers
    attention = sum(count for name, count in flops.items() if name not in layers)
    assert attention == 3 * (2 * 2 * 3 * tokens**2 * width)  # three blocks, two products, heads together as wide as D
    assert sum(product_flops(workload.graph(), batch=3, passes=2).values()) == 2 * sum(flops.values())


def test_graph_is_exported_once(conditional_checkpoint: Path) -> None:
    workload = Workload(load_model(conditional_checkpoint, heads=4))
    assert workload.graph() is workload.graph("fp32")
    assert workload.trained


@pytest.mark.parametrize("n", [1, 7])
def test_labels_leave_the_null_class_out(conditional_checkpoint: Path, n: int) -> None:
    labels = load_model(conditional_checkpoint, heads=4, null_class=0).labels(n)
    assert labels is not None
    assert labels.tolist() == [1, 2, 3, 4, 1, 2, 3][:n]
