"""Steps 3 and 4: one network run five ways, checked for the same outputs, then timed in turn.

dense, eager                what PyTorch does when nothing is done
dense, compiled, recorded   torch.compile in a CUDA graph: the fairest opponent
CUTLASS, eager              how SparseDM's published inference runs its 2:4 layers; PyTorch's kernel takes GPUs of 8.x
cuSPARSELt, eager           what PyTorch's own 2:4 tensors run elsewhere, on Hopper for one
ours                        products chosen by timing, compiled between, recorded
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sparse_engine import sampling
from sparse_engine.backends.base import IDENTITY_ROW
from sparse_engine.backends.device_loop import DeviceLoop
from sparse_engine.backends.step_device import CaptureError, StepBuffers
from sparse_engine.backends.torch.choose import Chooser
from sparse_engine.backends.torch.device import TorchDevice
from sparse_engine.backends.torch.network import choose_attention, choose_products
from sparse_engine.backends.torch.products import try_cutlass
from sparse_engine.bench.grid import PAPER, PAPER_STEPS
from sparse_engine.bench.peers.torch_semi_structured import make_sparse
from sparse_engine.bench.presets import PAPER_SAMPLER
from sparse_engine.bench.statistics import speedup, spread
from sparse_engine.bench.timing import interleave
from sparse_engine.export.families.uvit import FAMILY, SPARSE_LAYERS, UViT, UViTConfig
from sparse_engine.export.precision import lower
from sparse_engine.export.step_graph import UnconditionalStep
from sparse_engine.images import psnr

from .ceilings import keep_two_of_four
from .session import Results, Row, Session, failure

EAGER, COMPILED, OURS = "dense, eager", "dense, compiled, recorded", "ours"
CUTLASS, CUSPARSELT = "CUTLASS, eager", "cuSPARSELt, eager"
OPPONENTS = (COMPILED, EAGER, CUTLASS, CUSPARSELT)
MOST_STEPS, RUN_SECONDS, FLOPS = 4, 20e-3, 6e14  # of a run, by arithmetic, so that all arms take as many
REFERENCE_IMAGES = 4  # of the batch, in float32
NETWORK_TIME = 500.0
TOLERANCE = {"fp16": 3e-2, "bf16": 1e-1}


def run_uvit_s(session: Session, results: Results) -> None:
    """Step 3: U-ViT-S at several batches and both 16-bit types."""
    config = session.uvit_s()
    for precision, batch in itertools.product(("fp16", "bf16"), session.batches(16, 1, 64)):
        if results.wants(precision=precision, batch=batch):
            with results.row(precision=precision, batch=batch) as row:
                measure(session, config, precision, batch, row, samples=batch == session.batches(16)[0])
        _give_back()


def run_paper(session: Session, results: Results) -> None:
    """Step 4: the paper's grid."""
    preset = session.preset("paper")
    for patch, mlp_ratio in session.cells():
        if results.wants(patch=patch, mlp_ratio=mlp_ratio):
            with results.row(patch=patch, mlp_ratio=mlp_ratio) as row:
                row |= {"paper": PAPER[patch, mlp_ratio], "precision": "fp16", "batch": preset.batch}
                measure(session, preset.config(patch, mlp_ratio), "fp16", preset.batch, row)
        _give_back()


def measure(
    session: Session, config: UViTConfig, precision: str, batch: int, row: Row, *, samples: bool = False
) -> None:
    """Fill a row: outputs of the five ways against float32, and their times.

    Args:
        session: the device.
        config: of a network with random weights, its 2:4 layers masked.
        precision: "fp16" or "bf16".
        batch: samples of a step.
        row: to fill in.
        samples: compare a whole trajectory, too.
    """
    network = masked_network(config, session.device)
    x = torch.from_numpy(sampling.normal(0, np.arange(batch), 0, config.data_shape)).to(session.device)
    with torch.no_grad():
        time = torch.full((REFERENCE_IMAGES,), NETWORK_TIME, device=session.device)
        expected = network(x[:REFERENCE_IMAGES], time[: len(x)])
    expected_samples = sample(network, config, session, compiled=False) if samples else None
    ways = Ways(session, lower(network, FAMILY.float32_layers, precision), config, batch, x)
    row |= {"config": vars(config), "skipped": ways.skipped, "steps_per_run": ways.steps, "parity": {}}
    for name, arm in list(ways.arms.items()):
        try:
            row["parity"][name] = error = relative_error(arm.prediction()[: len(expected)], expected)
            if not error <= TOLERANCE[precision]:
                raise ValueError(f"computes something else: relative error {error:.1e}")
        except Exception as reason:  # an opponent that fails is left out, with its words
            ways.drop(name, reason)
    row |= {"layers": ways.layers, "attention": ways.attention, "how": {n: a.how() for n, a in ways.arms.items()}}
    if expected_samples is not None:
        found = sample(ways.ours, config, session, compiled=False)  # compiling once more would take a minute
        pixels = (float(expected_samples.min()), float(expected_samples.max()))
        row["psnr"] = psnr(found, expected_samples, pixels)
    _time(ways.arms, session.seconds, row)


def _time(arms: dict[str, Arm], seconds: float, row: Row) -> None:
    timings = interleave(arms, repeats=3, seconds=seconds)
    runs = {name: values / row["steps_per_run"] for name, values in timings.runs.items()}
    row["warmup_milliseconds"] = {name: 1e3 * value for name, value in timings.warmup.items()}
    row["milliseconds"] = {name: spread(values).to_dict() for name, values in runs.items()}
    others = {name: values for name, values in runs.items() if name != OURS}
    row["speedups"] = {name: speedup(values, runs[OURS]).to_dict() for name, values in others.items()}
    if torch.cuda.is_initialized():
        row["peak_memory"] = torch.cuda.max_memory_allocated()


def masked_network(config: UViTConfig, device: torch.device) -> UViT:
    """A U-ViT of random weights in float32, the layers that SparseDM masks holding 2:4 weights."""
    torch.manual_seed(0)
    with device:
        network = UViT(config).eval().requires_grad_(False)
    for name in sparse_layers(network):
        layer: Any = network.get_submodule(name)
        layer.weight.copy_(keep_two_of_four(layer.weight))
    return network


def sparse_layers(network: nn.Module) -> list[str]:
    """Names of the layers that SparseDM masks."""
    endings = tuple(glob.removeprefix("*") for glob in SPARSE_LAYERS)
    return [name for name, _ in network.named_modules() if name.endswith(endings)]


def shapes_of(network: nn.Module) -> dict[tuple[int, int], str]:
    """[N, K] -> the first of SparseDM's layers of that shape."""
    first: dict[tuple[int, int], str] = {}
    for name in sparse_layers(network):
        layer: Any = network.get_submodule(name)
        first.setdefault(tuple(layer.weight.shape), name)
    return first


class Arm:
    """A network as solver steps on one batch; a call runs several and waits.

    Args:
        network: float32 or lowered, on the device.
        session: where it runs.
        x: float32 [B, C, H, W].
        steps: in a row in each call, so that launching a graph and waiting for it is shared.
        compiled: hand the step to torch.compile.
        recorded: run it from a CUDA graph.
        beside: an arm to share memory for graphs with.
    """

    def __init__(
        self,
        network: nn.Module,
        session: Session,
        x: torch.Tensor,
        steps: int,
        *,
        compiled: bool,
        recorded: bool,
        beside: Arm | None = None,
    ) -> None:
        other: TorchDevice | None = None if beside is None else beside._device
        self._device: TorchDevice = TorchDevice(session.device, UnconditionalStep(network), compiled, other)
        self._count = steps
        zeros = torch.zeros_like(x)
        coef = torch.from_numpy(IDENTITY_ROW).to(x.device)
        self._buffers = StepBuffers(
            x=x,
            t=torch.full((len(x),), NETWORK_TIME, device=x.device),
            conditioning={},
            guidance=torch.ones(1, device=x.device),
            coef=coef,
            clip=torch.tensor([-1e30, 1e30], device=x.device),
            **{name: zeros.clone() for name in ("base", "h1", "h2", "z", "x_next", "m")},
        )
        self._recording: Any = None
        self._record = recorded
        self._why_not_recorded = "not asked for"

    def prediction(self) -> torch.Tensor:
        """The network's own output, float32 [B, C, H, W]: of the recorded steps where that was asked for."""
        self._device.step(self._buffers)
        self._device.synchronize()
        if self._record and self._recording is None:
            try:
                self._recording = self._device.capture(self._steps)
            except CaptureError as error:
                self._why_not_recorded = str(error)
        if self._recording is not None:
            self._buffers.m.fill_(math.nan)  # nothing but the recorded steps may have filled it in
            self._wait()
            self()
        return self._buffers.m.clone()

    def __call__(self) -> None:
        """The steps of a run."""
        if self._recording is None:
            self._steps()
        else:
            self._recording.launch()
        self._device.synchronize()

    def how(self) -> dict[str, Any]:
        """Whether it is compiled and recorded, and if not, why."""
        recorded = "yes" if self._recording is not None else self._why_not_recorded
        return {**self._device.describe(), "recorded": recorded}

    def _steps(self) -> None:
        for _ in range(self._count):
            self._device.step(self._buffers)

    def _wait(self) -> None:
        """For what was enqueued elsewhere than on the steps' own stream."""
        if self._buffers.m.is_cuda:
            torch.cuda.synchronize(self._buffers.m.device)


class Ways:
    """The arms of one cell.

    Attributes:
        arms, skipped: name -> arm, or why there is none.
        ours: the network of our arm.
        layers, attention: what was chosen for ours; one layer of each shape.
        steps: of a run of each arm.

    Args:
        session, network, config, batch, x: as for ``measure``; the network is lowered.
        opponents: which arms there are to be beside ours.
    """

    def __init__(
        self,
        session: Session,
        network: nn.Module,
        config: UViTConfig,
        batch: int,
        x: torch.Tensor,
        opponents: Collection[str] = OPPONENTS,
    ) -> None:
        self._session, self._x = session, x
        self.arms: dict[str, Arm] = {}
        self.skipped: dict[str, str] = {}
        names = sparse_layers(network)
        positions = {name: FAMILY.positions(config, name) for name in names}
        chooser = Chooser(positions, (batch, batch, batch), session.device, autotune=True)
        self.attention = choose_attention(network, {"x": x[:1], "t": torch.zeros(1, device=x.device)}, chooser)
        self.ours = copy.deepcopy(network)  # all with the same attention
        self.steps = steps_of_a_run(batch * sum(positions[name] * _weights(network, name) for name in names))
        shapes = shapes_of(network)
        report = choose_products(self.ours, names, chooser)
        self.layers = [
            {"layer": name, "shape": list(shape), "tokens": batch * positions[name], **report[name]}
            for shape, name in shapes.items()
        ]
        self._add(OURS, lambda: self.ours, compiled=session.compiled, recorded=True)
        makers = {name: partial(_semi_structured, network, names, kind) for name, kind in SEMI_STRUCTURED.items()}
        for name in opponents:
            fast = name == COMPILED
            self._add(name, makers.get(name, lambda: network), compiled=fast and session.compiled, recorded=fast)

    def _add(self, name: str, make: Callable[[], nn.Module], *, compiled: bool, recorded: bool) -> None:
        try:
            self.arms[name] = Arm(
                make(),
                self._session,
                self._x,
                self.steps,
                compiled=compiled,
                recorded=recorded,
                beside=self.arms.get(OURS),
            )
        except Exception as error:  # an opponent that cannot be made is left out, with its words
            self.drop(name, error)

    def drop(self, name: str, error: Exception) -> None:
        """Leave an opponent out. Ours is what is measured: its failure is the row's."""
        if name == OURS:
            raise error
        self.skipped[name] = failure(error)
        self.arms.pop(name, None)


SEMI_STRUCTURED = {
    CUTLASS: torch.sparse.SparseSemiStructuredTensorCUTLASS,
    CUSPARSELT: torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
}


def steps_of_a_run(products: float) -> int:
    """How many steps of so many multiplications make a run: about RUN_SECONDS at FLOPS, MOST_STEPS at most."""
    return max(1, min(MOST_STEPS, round(RUN_SECONDS * FLOPS / (2 * products))))


def _weights(network: nn.Module, name: str) -> int:
    layer: Any = network.get_submodule(name)
    return int(layer.weight.numel())


def _semi_structured(network: nn.Module, names: list[str], kind: Any) -> nn.Module:
    if kind is torch.sparse.SparseSemiStructuredTensorCUTLASS:  # packing a large network for nothing takes seconds
        layer: Any = network.get_submodule(names[0])
        try_cutlass(layer.weight.device, layer.weight.dtype)
    network = copy.deepcopy(network)
    with warnings.catch_warnings(action="ignore"):  # that the interface is a prototype
        make_sparse(UnconditionalStep(network), tuple(names), kind.from_dense)
    return network


def sample(network: nn.Module, config: UViTConfig, session: Session, compiled: bool) -> np.ndarray:
    """A trajectory of the paper's sampler from the seed's noise, float32 [B, C, H, W]."""
    images = np.arange(REFERENCE_IMAGES)

    def noise(draw: int) -> np.ndarray:
        return sampling.normal(0, images, draw, config.data_shape)

    trajectory = sampling.make_trajectory(PAPER_SAMPLER, sampling.VPLinear(), PAPER_STEPS)
    loop = DeviceLoop(TorchDevice(session.device, UnconditionalStep(network), compiled))
    found: np.ndarray = loop.run(trajectory, noise(0), conditioning={}, guidance=np.ones(1, np.float32), noise=noise)
    loop.close()
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over the largest value."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def _give_back() -> None:
    """Return a cell's memory before the next."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
