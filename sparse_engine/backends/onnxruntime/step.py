"""An int8 engine's step on this machine: in 8 bits or, where that is faster, in floats.

What the layers take alone does not decide: what lies between them differs too, codes or floats, and so does attention.
So whole steps are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx

from sparse_engine import kernels
from sparse_engine.artifact import EngineFile
from sparse_engine.backends.base import GRAPH_FILE, IDENTITY_ROW, NO_CLIP
from sparse_engine.backends.onnx_graph import GraphView
from sparse_engine.tactics import Choice

from .choose import Chooser, find_obstacle
from .compute import NO_SPINNING, halves_or_floats
from .int8 import int8_layers
from .int8_in_floats import takes
from .session import Prepared, create_session, prepare

CODES = "int8"
FAR_AHEAD = 1.5  # more than choosing kernels by timing them gains over choosing them by the rule
SIZES = {"guidance": 1}  # of a graph's dynamic axes, beside the batch


def fastest_step(engine: EngineFile, threads: int | None, autotune: bool) -> Prepared:
    """Prepare an engine in its precision; one in int8 in that in which its step is fastest here.

    Args:
        engine, threads: as ``prepare``.
        autotune: time them; otherwise int8 wherever our kernels compute it, then bf16, then what the runtime has.
    """
    if engine.manifest.precision != CODES:
        return prepare(engine, threads, autotune)
    names = [CODES, *_floats(engine)]
    made: dict[str, Prepared] = {}
    if len(names) == 1:
        chosen, step = CODES, {"why": "no kernel of ours computes its layers in floats"}
    elif not autotune:
        ours = kernels.best_tier("int8") != "scalar" or "bf16" not in names
        chosen, step = CODES if ours else "bf16", {"why": "not timed: ours by default"}
    else:
        choice = _timed(engine, threads, names, made)
        chosen, step = choice.kernel, {"why": "faster at the usual batch", **choice.to_dict()}
    prepared = made.get(chosen) or prepare(engine, threads, autotune, chosen)
    prepared.step = {"precision": chosen, **step}
    return prepared


def _timed(engine: EngineFile, threads: int | None, names: Sequence[str], made: dict[str, Prepared]) -> Choice:
    """The precision in which a step is fastest. What was prepared for that, all of it timed, is put into ``made``.

    Float layers have the kernels of the rule first, which takes a moment. Unless int8 is far ahead then, they are timed
    too.
    """
    chooser = Chooser(engine.manifest, threads, autotune=True)
    graph = engine.read(GRAPH_FILE)

    def candidate(name: str, tuned: bool) -> Callable[[], object]:
        prepared = made.get(name) or prepare(engine, threads, tuned or name == CODES, name)
        if tuned or name == CODES:
            made[name] = prepared
        session = create_session(prepared, engine.path, threads, settings=[NO_SPINNING])
        return _one_step(session, chooser.step_batch)

    for tuned in (False, True):
        candidates = {name: partial(candidate, name, tuned) for name in names}
        choice = chooser.step(graph, candidates, tuned)
        if choice.kernel == CODES and choice.margin > FAR_AHEAD:
            break
    return choice


def _floats(engine: EngineFile) -> list[str]:
    """In what our kernels could compute an int8 engine's layers, where they take any."""
    compute = halves_or_floats() if kernels.is_available() else "fp32"
    if find_obstacle(compute):
        return []
    model = onnx.load_model_from_string(engine.read(GRAPH_FILE))
    layers = int8_layers(GraphView(model), model.graph)
    return [compute] if any(takes(layer, compute) for layer in layers) else []


def _one_step(session: Any, batch: int) -> Callable[[], object]:
    """A step over noise."""
    rng = np.random.default_rng(0)
    told = {"coef": IDENTITY_ROW, "clip": NO_CLIP}
    feed = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else SIZES.get(size, batch) for size in entry.shape]
        whole = "int" in entry.type
        noise = np.zeros(shape, np.int64) if whole else rng.standard_normal(shape, np.float32)
        feed[entry.name] = told.get(entry.name, noise)
    return lambda: session.run(None, feed)
