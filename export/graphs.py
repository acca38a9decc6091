"""A baked model -> the step graph that a backend builds from, in its precision; quantised where that is asked for."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from sparse_engine.backends import Backend, BuildOptions, StepGraph
from sparse_engine.calibration.apply import Quantisation, Quantised
from sparse_engine.calibration.collect import CalibrationData
from sparse_engine.calibration.quantize import QUANTISED_PRECISIONS

from .bake import Baked
from .model import Model
from .precision import lower
from .quantise import quantise
from .step_graph import check_graph, export_step_graph


def graph_for(
    model: Model,
    baked: Baked,
    backend: Backend,
    options: BuildOptions,
    data: CalibrationData | None,
    quantisation: Quantisation | None,
    exported: dict[str, StepGraph] | None = None,
) -> tuple[StepGraph, Quantised | None]:
    """The step graph that a backend builds from, in its precision; quantised for a precision that asks for it.

    ``exported`` keeps exports from one call to the next, by precision.
    """
    known = {} if exported is None else exported

    def export(precision: str) -> StepGraph:
        if precision not in known:
            options.progress("exporting the step graph")
            known[precision] = export_baked(model, baked, precision)
        return known[precision]

    graph = export(backend.graph_precision(options))
    if data is None or quantisation is None or options.precision not in QUANTISED_PRECISIONS:
        return graph, None
    quantised = quantise(model, baked, export("fp32"), graph, backend, options, data, quantisation)
    return quantised.graph, quantised


def export_baked(model: Model, baked: Baked, precision: str = "fp32") -> StepGraph:
    """The step graph of a baked model, lowered and checked against what was baked. Raises BackendError."""
    network = lower(model.network(baked.state), model.family.float32_layers, precision)
    graph = export_step_graph(network, model.config)
    _let_go(network)
    check_graph(graph, baked.state)
    return dataclasses.replace(graph, state=baked.state)


def _let_go(network: nn.Module) -> None:
    """Take a network's weights away: the exporter's libraries keep the modules of the last export for good."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)
