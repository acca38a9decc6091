"""Tiny networks of diffusers' own, with random weights: the reference for the families that read what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_engine.export.bake import bake
from sparse_engine.export.model import Model
from sparse_engine.export.step_graph import check_graph, export_step_graph
from tests.export.references import Array, relative_error, two_of_four
from tests.export.test_step_graph import session_of

SHARD = "30KB"  # of save_pretrained: several shards, whatever the network


def randomised(network: Any) -> Any:
    """The same network with weights of which every one shows in the output, none drowning another."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2 and "scale_shift_table" not in name:
            drawn *= value[0].numel() ** -0.5
        elif "norm_" in name:
            drawn = 1 + 0.3 * drawn
        else:
            drawn *= 0.3
        value.data = drawn
    return network.eval().requires_grad_(False)


def masked(network: Any, endings: tuple[str, ...]) -> Any:
    """The network with the weights of these endings 2:4, in place."""
    for name, value in network.named_parameters():
        if name.endswith(endings):
            value.data = torch.from_numpy(two_of_four(value.numpy()))
    return network


def inputs_of(model: Model, batch: int, passes: int = 1) -> tuple[Array, Array, dict[str, Array]]:
    """x, t, and the conditions [passes, batch, ...]."""
    rng = np.random.default_rng(batch)
    x = rng.standard_normal((batch, *model.config.data_shape), np.float32)
    t = np.resize(np.array([999.0, 1.0, 500.5, 20.98, 333.25], np.float32), batch)
    told = {each.name: rng.standard_normal((passes, batch, *each.shape), np.float32) for each in model.conditions}
    return x, t, told


STEPS: tuple[tuple[int, list[float]], ...] = ((1, [2.0, -1.0]), (3, [1.0]), (17, [2.0, -1.0]))


def step_errors(model: Model, reference: Any, folder: Path) -> list[float]:
    """How far the exported 2:4 step, in a plain session, is from the solver's lines around ``reference``.

    Args:
        reference: (x, t, told [batch, ...]) -> prediction, of the channels that x has.

    Returns:
        One number for each batch and guidance of ``STEPS``.
    """
    baked = bake(model, "magnitude")
    graph = export_step_graph(model.network(baked.state), model.config)
    check_graph(graph, baked.state)
    assert set(graph.layers) == {layer.name for layer in baked.layers}
    session = session_of(graph, folder)
    return [
        _step_error(model, reference, session, batch, guidance if model.conditions else [1.0])
        for batch, guidance in STEPS
    ]


def _step_error(model: Model, reference: Any, session: Any, batch: int, guidance: list[float]) -> float:
    rng = np.random.default_rng(1)
    x, t, told = inputs_of(model, batch, len(guidance))
    if "context_mask" in told:
        told["context_mask"] = (told["context_mask"] > -0.5).astype(np.float32)
    told |= {each.name: np.abs(told[each.name]).astype(np.int64) for each in model.conditions if each.dtype == "int64"}
    coef, clip = rng.standard_normal(8).astype(np.float32), np.array([-1.5, 1.5], np.float32)
    others = {name: rng.standard_normal(x.shape, np.float32) for name in ("base", "h1", "h2", "z")}
    weights = np.array(guidance, np.float32)
    guided = {"guidance": weights} if model.conditions else {}
    feed = {"x": x, "t": t, **told, **guided, "coef": coef, "clip": clip, **others}
    assert [entry.name for entry in session.get_inputs()] == list(feed)
    x_next, m = session.run(["x_next", "m"], feed)
    passes = [reference(x, t, {name: rows[g] for name, rows in told.items()}) for g in range(len(guidance))]
    expected_m = (coef[0] * x + coef[1] * sum(w * p for w, p in zip(guidance, passes, strict=True))).clip(*clip)
    terms = (x, others["base"], expected_m, others["h1"], others["h2"], others["z"])
    expected = sum(c * term for c, term in zip(coef[2:], terms, strict=True))
    return max(relative_error(m, expected_m), relative_error(x_next, expected))
