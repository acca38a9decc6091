"""One model: our sparse engine against our dense one and against other runtimes, same weights, inputs and threads."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_engine.cores import pool_size
from sparse_engine.errors import VerificationError
from sparse_engine.export.model import Model
from sparse_engine.files import scratch_folder

from .arms import DENSE, Arm, build_arms
from .layers import amdahl_limit, profile_step
from .memory import peak_memory
from .peers import PEERS, PLAIN, Feed, Peer, PeerRunner, PeerUnavailableError
from .peers.torch_dense import torch_runner
from .products import product_flops
from .quality import Judge, measure_quality
from .settings import TOLERANCE, Settings
from .statistics import noise, speedup, spread
from .timing import Timings, interleave
from .workload import Workload

Progress = Callable[[str], None]
Candidate = Arm | PeerRunner


def compare_model(
    model: Model,
    batches: Sequence[int],
    settings: Settings,
    progress: Progress = lambda stage: None,
    judges: Sequence[Judge] = (),
) -> Iterator[dict[str, Any]]:
    """Time one solver step of a model, its masks baked, and a whole sample where the settings ask for it.

    Args:
        model: what ``load_model`` read, or ``RandomNetwork.model`` made.
        batches: batch sizes.
        settings: how to measure.
        progress: told each stage as it begins.
        judges: what samples of a trained model are held against, beside the fp32 reference.

    Yields:
        One row per batch, as ``docs/bench-results.md`` describes them; the quality of a trained model is in the last.

    Raises:
        UnsupportedError, BackendError: the first backend cannot build or run this.
        VerificationError: one of our own engines does not compute what torch computes.
    """
    workload = Workload(model)
    with scratch_folder() as folder:
        progress("exporting")
        if settings.peers:
            workload.write_onnx(folder, settings.precision)
        for batch in batches:
            with _Comparison(folder, workload, batch, settings, progress) as comparison:
                yield comparison.row(judges if workload.trained and batch == batches[-1] else None)


class _Comparison:
    """All candidates at one batch size."""

    def __init__(self, folder: Path, workload: Workload, batch: int, settings: Settings, progress: Progress) -> None:
        self._workload, self._batch, self._settings, self._folder = workload, batch, settings, folder
        self._progress = lambda stage: progress(f"batch {batch}: {stage}")
        self._skipped: dict[str, str] = {}
        self._peer_facts: dict[str, dict[str, Any]] = {}
        self._feed = workload.feed(np.arange(batch))
        self._progress("building")
        self._arms = build_arms(folder, workload, batch, settings, self._skipped)
        self._ours, self._dense, *_ = self._arms.values()
        self._threads = pool_size(settings.threads)
        with self._reference() as reference:
            self._expected = reference.step(self._feed)
        self._errors = {arm.name: self._check_arm(arm) for arm in self._arms.values()}
        self._peers = self._prepare_peers() if settings.peers else {}

    def __enter__(self) -> _Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        for arm in self._arms.values():
            arm.engine.close()
            arm.path.unlink()
        self._arms, self._peers = {}, {}
        _free_memory()

    def row(self, judges: Sequence[Judge] | None) -> dict[str, Any]:
        """Everything that is measured. Judges: None leaves quality out."""
        row: dict[str, Any] = {
            "batch": self._batch,
            "model": self._workload.describe(),
            "candidates": self._described(),
            "relative_error": self._errors[self._ours.name],
            "kernels": self._ours.kernels(),
            "skipped": self._skipped,
        }
        self._progress(f"timing {len(self._candidates())} candidates")
        row |= self._timed(lambda candidate: candidate.step(self._feed))
        flops = sum(product_flops(self._workload.graph(), self._batch).values())
        row["gflop"] = flops / 1e9
        row["gflops"] = {name: flops / 1e6 / each["median"] for name, each in row["milliseconds"].items()}
        if not self._settings.self_test:
            row |= self._layers(row["speedup"]["median"])
        self._progress("peak memory")
        paths = {name: arm.path for name, arm in self._arms.items()}
        row["peak_memory_mib"] = peak_memory(paths, self._batch, self._settings.threads)
        if self._settings.steps:
            row["end_to_end"] = self._end_to_end(self._settings.steps)
        if judges is not None:
            self._progress("quality")
            row["quality"] = self._quality(judges)
        return row

    def _candidates(self) -> dict[str, Candidate]:
        return {**self._arms, **self._peers}

    def _described(self) -> dict[str, dict[str, Any]]:
        ours = {name: arm.describe() for name, arm in self._arms.items()}
        return ours | {name: self._peer_facts[name] for name in self._peers}

    @contextmanager
    def _reference(self) -> Iterator[PeerRunner]:
        """Torch in fp32, on the device that our engine runs on, for as long as it is needed."""
        subject = self._workload.subject(self._folder, self._ours.device, self._threads, "fp32")
        yield torch_runner(subject.step("fp32").to(subject.device), subject)
        _free_memory()

    def _check_arm(self, arm: Arm) -> float:
        error = relative_error(arm.step(self._feed), self._expected)
        if not error <= TOLERANCE[arm.precision]:
            raise VerificationError(
                f"{arm.name} ({arm.backend}, {arm.precision}) differs from torch fp32 by {error:.1e} of the largest "
                f"value; expected at most {TOLERANCE[arm.precision]:.1e}"
            )
        return error

    def _prepare_peers(self) -> dict[str, PeerRunner]:
        """The peers that compute the same, each in our precision and in the one it is best at."""
        runners: dict[str, PeerRunner] = {}
        for peer in PEERS:
            wanted = peer.wanted(self._ours.device, self._settings.precision)
            if not wanted:
                self._skipped[peer.name] = f"does not run on {self._ours.device}"
            for precision in wanted:
                name = peer.name if precision == self._settings.precision else f"{peer.name}, {precision}"
                self._progress(name)
                try:
                    runners[name] = self._prepare(peer, precision)
                    self._peer_facts[name] = {"peer": peer.name, "precision": precision, "device": self._ours.device}
                except PeerUnavailableError as error:
                    self._skipped[name] = str(error)
                except Exception as error:  # another runtime's failure is its own: the others are still measured
                    self._skipped[name] = f"failed: {type(error).__name__}: {error}"[:200]
        return runners

    def _prepare(self, peer: Peer, precision: str) -> PeerRunner:
        runner = peer.prepare(self._workload.subject(self._folder, self._ours.device, self._threads, precision))
        error = relative_error(runner.step(self._feed), self._expected)
        if not error <= TOLERANCE[precision]:
            raise PeerUnavailableError(f"computes something else: relative error {error:.1e}")
        return runner

    def _timed(self, run: Callable[[Candidate], np.ndarray]) -> dict[str, Any]:
        runs = {name: _bound(run, candidate) for name, candidate in self._candidates().items()}
        settings = self._settings
        timings = interleave(runs, repeats=settings.repeats, seconds=settings.seconds, renew=self._reload)
        peers = {name: str(self._peer_facts[name]["precision"]) for name in self._peers}
        return summarise(timings, self._ours.name, self._ours.precision, peers)

    def _reload(self) -> None:
        for arm in self._arms.values():
            arm.reload()

    def _layers(self, achieved: float) -> dict[str, Any]:
        """Times by layer of both engines, and Amdahl's limit; nothing where the backend does not tell."""
        self._progress("profiling")
        layers = {
            arm.name: profile_step(arm.path, self._feed, self._workload.graph().layers, self._settings.threads)
            for arm in (self._dense, self._ours)
        }
        dense, ours = layers[self._dense.name], layers[self._ours.name]
        if dense is None or ours is None:
            return {}
        limit = amdahl_limit(dense, self._workload.sparse_layers)
        return {
            "amdahl": {"share": limit.share, "limit": limit.limit, "reached": limit.reached(achieved)},
            "layers": {name: [entry.to_dict() for entry in times or ()] for name, times in layers.items()},
        }

    def _end_to_end(self, steps: int) -> dict[str, Any]:
        self._progress(f"timing whole samples of {steps} steps")
        sampler = self._ours.engine.manifest.sampler
        found = self._timed(lambda candidate: self._sample(candidate, self._feed, steps, sampler))
        rates = {name: 1e3 * self._batch / each["median"] for name, each in found["milliseconds"].items()}
        return {"steps": steps, "sampler": sampler, "images_per_second": rates, **found}

    def _sample(self, candidate: Candidate, feed: Feed, steps: int, sampler: str) -> np.ndarray:
        if isinstance(candidate, Arm):
            return candidate.sample(feed, steps, sampler)
        trajectory = self._ours.engine.trajectory(steps, sampler)
        return candidate.sample(trajectory, feed, self._workload.noise(np.arange(len(feed["x"]))))

    def _quality(self, judges: Sequence[Judge]) -> dict[str, Any]:
        with self._reference() as reference:
            candidates = {"torch fp32": reference, **self._candidates()}
            return measure_quality(candidates, self._sample, self._workload, self._batch, judges)


def _bound(run: Callable[[Candidate], np.ndarray], candidate: Candidate) -> Callable[[], np.ndarray]:
    return lambda: run(candidate)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest expected value; NaN where either has one."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def summarise(timings: Timings, ours: str, precision: str, peers: Mapping[str, str]) -> dict[str, Any]:
    """What a results file says of a set of timings.

    Args:
        timings: of our engine, our dense one, and others.
        ours, precision: the candidate that every ratio is of.
        peers: other runtimes among the candidates -> their precision.
    """
    fast = timings.runs[ours]
    ratios = {name: speedup(runs, fast).to_dict() for name, runs in timings.runs.items() if name != ours}
    medians = {name: float(np.median(runs)) for name, runs in timings.runs.items()}
    alike = [name for name, found in peers.items() if found == precision]
    return {
        "milliseconds": {name: spread(runs).to_dict() for name, runs in timings.runs.items()},
        "runs_milliseconds": {name: (1e3 * runs).round(4).tolist() for name, runs in timings.runs.items()},
        "warmup_milliseconds": {name: 1e3 * value for name, value in timings.warmup.items()},
        "speedup": ratios[DENSE],
        "speedups": ratios,
        "best_peer": min(alike, key=medians.__getitem__, default=None),
        "best_peer_in_any_precision": min(peers, key=medians.__getitem__, default=None),
        "plain_onnxruntime": next((name for name in peers if name.startswith(PLAIN.name)), None),
        "noise": noise(timings.runs[DENSE]).to_dict(),
        "rounds": list(fast.shape),
    }
