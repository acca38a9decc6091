"""One model: our sparse engine against our dense one and against other runtimes, same weights, inputs and threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from sparse_engine.backends import BuildOptions, StepGraph, backend_named
from sparse_engine.backends.base import GRAPH_FILE, WEIGHTS_FILE, weights_payload
from sparse_engine.engine import SparseEngine
from sparse_engine.export.bake import Baked, bake
from sparse_engine.export.build import export_baked, write_built
from sparse_engine.export.model import Model, load_model
from sparse_engine.export.step_graph import Step, UnconditionalStep

from .peers import PEERS, Feed, PeerUnavailableError, Run, Subject
from .statistics import speedup, spread
from .timing import Timings, interleave

SPARSE, DENSE = "2:4 sparse", "dense"  # our own engines: same graph, same fusions, the kernels of the 2:4 layers differ
# A runtime may differ from torch's fp32 by this share of the largest value before it is said to compute something else.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-1}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        precision: of our sparse engine and of each peer that has it; our dense engine is fp32.
        threads: for every runtime; None is one per core.
        repeats, seconds: as ``interleave`` takes them.
        peers: time the other runtimes too.
    """

    precision: str = "fp32"
    threads: int | None = None
    repeats: int = 3
    seconds: float = 3.0
    peers: bool = True


def compare_checkpoint(
    checkpoint: Path, batches: list[int], settings: Settings, progress: Progress = lambda stage: None, **given: Any
) -> dict[str, Any]:
    """Time one solver step of a checkpoint at several batch sizes; see ``compare_model``.

    Args:
        checkpoint, **given: as ``load_model`` takes them.
        batches: batch sizes.
        settings: how to measure.
        progress: told each stage as it begins.
    """
    progress("exporting")
    return compare_model(load_model(checkpoint, **given), batches, settings, progress)


def compare_model(model: Model, batches: list[int], settings: Settings, progress: Progress) -> dict[str, Any]:
    """Time one solver step of a model, its masks baked.

    Returns:
        {"model", "precision", "rows": [...]}; one row per batch with milliseconds and speed-ups.
    """
    baked = bake(model)
    graph = export_baked(model, baked)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_onnx(folder, graph)
        for batch in batches:
            progress(f"batch {batch}")
            rows.append(_compare_batch(folder, model, baked, graph, batch, settings, progress))
    layers = [layer for layer in baked.layers if layer.masked]
    return {
        "model": {
            "family": model.family.name,
            "config": vars(model.config),
            "masked_layers": len(layers),
            "macs": sum(layer.macs for layer in baked.layers),
        },
        "precision": settings.precision,
        "rows": rows,
    }


def _compare_batch(
    folder: Path,
    model: Model,
    baked: Baked,
    graph: StepGraph,
    batch: int,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    backend = backend_named("onnxruntime")
    feed = _feed(model, batch)
    runs: dict[str, Callable[[], np.ndarray]] = {}
    skipped: dict[str, str] = {}
    engines = []
    for name, sparse, kind in ((SPARSE, True, settings.precision), (DENSE, False, "fp32")):
        path = folder / f"{name.replace(':', '')}-{batch}.sengine"
        write_built(path, model, baked, graph, backend, BuildOptions(sparse, kind, (batch, batch, batch)))
        engines.append(SparseEngine.load(path, threads=settings.threads))
        runs[name] = _engine_run(engines[-1], feed)
    expected = runs[DENSE]()
    if settings.peers:
        step: torch.nn.Module = (Step if model.config.num_classes else UnconditionalStep)(model.network(baked.state))
        subject = Subject(step, folder / GRAPH_FILE, settings.threads or torch.get_num_threads(), settings.precision)
        found, skipped = _prepare_peers(subject, feed, expected, lambda peer: progress(f"batch {batch}: {peer}"))
        runs |= found
    _check_output(runs[SPARSE](), expected, settings.precision)
    relative_error = float(np.abs(runs[SPARSE]() - expected).max() / np.abs(expected).max())
    progress(f"batch {batch}: timing {len(runs)} runtimes")
    timings = interleave(runs, repeats=settings.repeats, seconds=settings.seconds)
    chosen = [layer["kernel"] for layer in engines[0].info["layers"] if layer["masked"]]
    for engine in engines:
        engine.close()
    return {
        "batch": batch,
        "relative_error": relative_error,
        "kernels": {kernel: chosen.count(kernel) for kernel in dict.fromkeys(chosen)},
        "skipped": skipped,
        **summarise(timings),
    }


def _prepare_peers(
    subject: Subject, feed: Feed, expected: np.ndarray, progress: Progress
) -> tuple[dict[str, Run], dict[str, str]]:
    """(peers that compute the same, why the others are skipped)."""
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for peer in PEERS:
        progress(peer.name)
        try:
            if subject.precision not in peer.precisions:
                raise PeerUnavailableError(f"has no {subject.precision} on this device")
            run = peer.prepare(subject, feed)
            _check_output(run(), expected, subject.precision)
            runs[peer.name] = run
        except PeerUnavailableError as error:
            skipped[peer.name] = str(error)
        except Exception as error:  # another runtime's failure is its own: the others are still measured
            skipped[peer.name] = f"failed: {type(error).__name__}: {error}"[:200]
    return runs, skipped


def summarise(timings: Timings) -> dict[str, Any]:
    """Milliseconds of each candidate and our speed-up over each, and over the best of the others."""
    ours = timings.runs[SPARSE]
    others = {name: runs for name, runs in timings.runs.items() if name != SPARSE}
    peers = {name: float(np.median(runs)) for name, runs in others.items() if name != DENSE}
    best = min(peers, key=lambda name: peers[name]) if peers else None
    return {
        "milliseconds": {name: spread(runs).to_dict() for name, runs in timings.runs.items()},
        "warmup_milliseconds": {name: 1e3 * value for name, value in timings.warmup.items()},
        "speedup": {name: speedup(runs, ours).to_dict() for name, runs in others.items()},
        "best_peer": best,
        "rounds": list(ours.shape),
    }


def _feed(model: Model, batch: int) -> Feed:
    """A fixed step in the order of the graph's inputs: x, t [, y, guidance], coef, clip, base, h1, h2, z."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *model.config.data_shape), np.float32)
    feed: Feed = {"x": x, "t": np.full(batch, 500.0, np.float32)}
    if model.config.num_classes:
        labels = np.zeros((1, batch), np.int64)
        feed |= {"y": labels, "guidance": np.ones(1, np.float32)}
    feed |= {"coef": np.array([0, 1, 1, 0, 0, 0, 0, 0], np.float32), "clip": np.array([-1e30, 1e30], np.float32)}
    return feed | {name: np.zeros_like(x) for name in ("base", "h1", "h2", "z")}


def _engine_run(engine: SparseEngine, feed: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
    t = (float(feed["t"][0]) - engine.schedule.time_shift) / engine.schedule.time_scale
    labels = feed["y"][0] if "y" in feed else None
    return lambda: engine.predict(feed["x"], t, labels=labels)


def _check_output(found: np.ndarray, expected: np.ndarray, precision: str) -> None:
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE[precision]:
        raise PeerUnavailableError(f"computes something else: relative error {error:.1e}")


def _write_onnx(folder: Path, graph: StepGraph) -> None:
    onnx.save_model(graph.proto, folder / GRAPH_FILE)
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        for chunk in weights_payload(graph.weights).chunks():
            stream.write(chunk)
