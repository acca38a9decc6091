"""Other runtimes: the same step, the same samples; and the CUDA ones as far as a CPU shows."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sparse_engine import sampling
from sparse_engine.backends.base import GRAPH_FILE
from sparse_engine.bench.compare import relative_error
from sparse_engine.bench.peers import PEERS, PLAIN, Peer, PeerRunner, PeerUnavailableError
from sparse_engine.bench.peers.torch_dense import COMPILED, EAGER
from sparse_engine.bench.peers.torch_semi_structured import CUSPARSELT, CUTLASS, make_sparse
from sparse_engine.bench.presets import PRESETS, random_uvit
from sparse_engine.bench.settings import TOLERANCE
from sparse_engine.bench.workload import Workload
from sparse_engine.export.masks import is_n_of_m
from sparse_engine.export.model import load_model
from tests.bench.conftest import DIGITS

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def workload(conditional_checkpoint: Path) -> Workload:
    return Workload(load_model(conditional_checkpoint, heads=4, null_class=4))


@pytest.fixture(scope="module")
def folder(workload: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers")
    workload.write_onnx(path, "fp32")
    return path


def prepared(peer: Peer, workload: Workload, folder: Path, precision: str = "fp32") -> PeerRunner:
    try:
        return peer.prepare(workload.subject(folder, "cpu", 1, precision))
    except PeerUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=peer.name, marks=[pytest.mark.slow] if peer is COMPILED else [])
        for peer in PEERS
        if "cpu" in peer.precisions
    ],
)
def test_a_stochastic_sample_is_the_same_everywhere(peer: Peer, workload: Workload, folder: Path) -> None:
    """SparseDM's own sampler draws noise at each step, so state and noise have to be carried right."""
    feed = workload.feed(np.arange(3))
    trajectory = sampling.make_trajectory("euler-sde", sampling.VPLinear(), 4)
    assert trajectory.stochastic
    reference, runner = (prepared(each, workload, folder) for each in (EAGER, peer))
    assert relative_error(runner.step(feed), reference.step(feed)) < 1e-5
    found = runner.sample(trajectory, feed, workload.noise(np.arange(3)))
    assert relative_error(found, reference.sample(trajectory, feed, workload.noise(np.arange(3)))) < 1e-4
    assert found.dtype == np.float32
    assert relative_error(found, feed["x"]) > 0.1


def test_peers_in_int8_run_our_own_quantised_graph(tmp_path: Path) -> None:
    """Ranges are those of the model's own trajectories, and the products are in 8 bits."""
    workload = Workload(load_model(DIGITS / "sparsedm.pth"))
    workload.write_onnx(tmp_path, "int8")
    quantised = onnx.load(tmp_path / "int8" / GRAPH_FILE, load_external_data=False)
    kinds = [node.op_type for node in quantised.graph.node]
    assert kinds.count("QuantizeLinear") >= 12
    feed = workload.feed(np.arange(2))
    expected = prepared(EAGER, workload, tmp_path).step(feed)
    found = prepared(PLAIN, workload, tmp_path, "int8").step(feed)
    assert 1e-4 < relative_error(found, expected) < TOLERANCE["int8"]


def test_torch_in_bf16_holds_its_weights_in_bf16(workload: Workload, folder: Path) -> None:
    step = workload.subject(folder, "cpu", 1, "bf16").step("bf16")
    assert step.network.mid_block.mlp.fc1.weight.dtype == torch.bfloat16
    feed = workload.feed(np.arange(2))
    exact, rounded = (prepared(EAGER, workload, folder, each).step(feed) for each in ("fp32", "bf16"))
    assert 1e-4 < relative_error(rounded, exact) < 0.1


def test_each_peer_in_our_precision_and_in_its_best() -> None:
    assert EAGER.wanted("cpu", "fp32") == ("fp32", "bf16")
    assert EAGER.wanted("cpu", "bf16") == ("bf16",)
    assert EAGER.wanted("cuda", "fp32") == ("fp32", "fp16")
    plain = PEERS[0]
    assert plain.wanted("cpu", "bf16") == ("fp32",)  # the best it has
    assert CUTLASS.wanted("cpu", "fp32") == ()
    assert COMPILED.wanted("cuda", "fp16") == ("fp16",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_semi_structured_peers_need_a_gpu(workload: Workload, folder: Path) -> None:
    for peer in (CUTLASS, CUSPARSELT):
        with pytest.raises((RuntimeError, AssertionError)):  # torch's own; the bench reports it and goes on
            peer.prepare(workload.subject(folder, "cuda", 1, "fp16"))


def test_masked_layers_become_sparse_tensors(workload: Workload) -> None:
    step, seen = workload.torch_step("fp16"), []

    def from_dense(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight)
        return weight.clone()

    make_sparse(step, workload.sparse_layers, from_dense)
    assert len(seen) == len(workload.sparse_layers) == 12
    assert all(weight.dtype == torch.float16 and is_n_of_m(weight.numpy()) for weight in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("peer", [CUTLASS, CUSPARSELT], ids=lambda peer: peer.name)
def test_semi_structured_products_on_a_gpu(peer: Peer, folder: Path) -> None:
    workload = Workload(random_uvit(PRESETS["quick"].config(4, 4)).model())
    feed = workload.feed(np.arange(2))
    runner = peer.prepare(workload.subject(folder, "cuda", 1, "fp16"))
    assert relative_error(runner.step(feed), prepared(EAGER, workload, folder).step(feed)) < 3e-2
