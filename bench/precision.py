"""What a lower precision costs in accuracy: the lowered networks on the CPU, against float32.

python -m sparse_engine.bench.precision -o bench/results/precision.json

The products of fp16 and bf16 are summed in float32 and rounded once, as tensor cores do; tf32 is emulated by rounding
the operands of every product to 11 significant bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine import process, sampling
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.precision import PRODUCTS, lower
from sparse_engine.export.step_graph import solver_lines
from sparse_engine.images import psnr

from .presets import network_named
from .results_file import describe_run, write_results

CHECKOUT = Path(__file__).resolve().parents[1]
DIGITS = CHECKOUT / "examples" / "digits" / "sparsedm.pth"
PRECISIONS = ("tf32", "fp16", "bf16")
TIMES = (0.999, 0.75, 0.5, 0.25, 0.1, 0.01)  # of the schedule's end
SAMPLER, STEPS = "dpm-solver++", 10
TF32_DROPPED = 13  # of float32's 23 stored bits

Predict = Callable[[np.ndarray, np.ndarray], np.ndarray]


def predictor(model: Model, baked: Baked, precision: str) -> Predict:
    """(x [B, C, H, W], network time [B]) -> the network's prediction, float32 of x's shape, without guidance."""
    network = lower(
        model.network(baked.state), model.family.float32_layers, "fp32" if precision == "tf32" else precision
    )
    for module in network.modules():
        if hasattr(module, "fused"):  # the plain form, as an exported graph has it
            module.fused = False
        if precision == "tf32" and isinstance(module, PRODUCTS):
            _round_operands(module)
        if precision == "tf32" and hasattr(module, "attend"):
            module.attend = _rounding(module.attend)

    def predict(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        told = {name: torch.from_numpy(rows) for name, rows in model.told(np.arange(len(x))).items()}
        with torch.no_grad():
            predicted = network(torch.from_numpy(x), torch.from_numpy(t), **told)
        found: np.ndarray = predicted[:, : x.shape[1]].float().numpy()
        return found

    return predict


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32's 10 stored bits, ties to even."""
    bits = x.contiguous().view(torch.int32)
    half = (1 << (TF32_DROPPED - 1)) - 1
    rounded = bits + half + ((bits >> TF32_DROPPED) & 1)
    return (rounded & -(1 << TF32_DROPPED)).view(torch.float32)


def _round_operands(module: nn.Module) -> None:
    module.weight = nn.Parameter(to_tf32(module.weight), requires_grad=False)  # type: ignore[arg-type]
    module.register_forward_pre_hook(lambda _, inputs: (to_tf32(inputs[0]),))


def _rounding(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: attend(to_tf32(q), to_tf32(k), to_tf32(v))


def compare(model: Model, baked: Baked, batch: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each precision: the relative error of eps, and the PSNR in dB of a sample, both against float32.

    The error is the largest over the largest |eps|, at the worst of ``TIMES``.
    """
    schedule = sampling.schedule_from_dict(
        {"name": model.recipe.schedule} if isinstance(model.recipe.schedule, str) else model.recipe.schedule
    )
    trajectory = sampling.make_trajectory(SAMPLER, schedule, STEPS, prediction=model.recipe.prediction)
    noise = sampling.normal(0, np.arange(batch), 0, model.config.data_shape)
    exact = predictor(model, baked, "fp32")
    expected = [exact(noise, _times(schedule, t, batch)) for t in TIMES]
    sample = sampling.walk(trajectory, _step(exact), noise, noise=None)
    low_high = model.recipe.value_range or (float(sample.min()), float(sample.max()))
    rows = []
    for precision in PRECISIONS:
        say(precision)
        predict = predictor(model, baked, precision)
        found = [predict(noise, _times(schedule, t, batch)) for t in TIMES]
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
        drawn = sampling.walk(trajectory, _step(predict), noise, noise=None)
        row = {"precision": precision, "eps_error": float(np.max(errors)), "psnr": psnr(drawn, sample, low_high)}
        rows.append(row)
    return rows


def _times(schedule: sampling.Schedule, share: float, batch: int) -> np.ndarray:
    return np.full(batch, schedule.network_time(share * schedule.t_max), np.float32)


def _step(predict: Predict) -> sampling.StepFunction:
    """The solver's lines around a network, in float32."""

    def step(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, t, *rest = inputs
        x_next, m = solver_lines(*map(torch.from_numpy, (x, predict(x, t), *rest)))
        return x_next.numpy(), m.numpy()

    return step


def markdown(results: dict[str, Any]) -> str:
    """The results as the README's table."""
    lines = ["| | tf32 | fp16 | bf16 |", "|---|---|---|---|"]
    for name, rows in results["models"].items():
        errors = " | ".join(f"{row['eps_error']:.1e}, {row['psnr']:.0f} dB" for row in rows)
        lines.append(f"| {name} | {errors} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both models; print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    output = parser.parse_args().output

    def say(what: str) -> None:
        sys.stderr.write(f"{what}\n")

    digits, uvit_s = load_model(DIGITS), network_named("uvit-s").model()
    results = describe_run("python -m sparse_engine.bench.precision " + " ".join(sys.argv[1:]), None)
    results |= {"kind": "precision", "sampler": SAMPLER, "steps": STEPS}
    results["models"] = {
        "digits, trained, 2:4": compare(digits, bake(digits), 16, say),
        "U-ViT-S, random weights, 2:4": compare(uvit_s, bake(uvit_s), 2, say),
    }
    if output is not None:
        write_results(output, results)
    sys.stdout.write(markdown(results) + "\n")


if __name__ == "__main__":
    process.run(main)
