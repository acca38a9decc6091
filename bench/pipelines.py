"""A whole pipeline of diffusers, called by one network runtime after the other: what a user of it waits for.

The network's masks are baked in for all of them, so that each draws the same picture, and is held to it.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from sparse_engine.conditioning import Conditioning
from sparse_engine.cores import pool_size
from sparse_engine.diffusers import EngineDenoiser
from sparse_engine.diffusers.original import Original, unwrapped
from sparse_engine.errors import CheckpointError, OptionError, UnsupportedError
from sparse_engine.export.diffusers_folder import PIPELINE
from sparse_engine.export.hub import cached
from sparse_engine.export.model import load_model
from sparse_engine.export.weight_files import read_json
from sparse_engine.files import scratch_folder
from sparse_engine.manifest import Manifest

from .arms import DENSE, SPARSE, build_arms
from .compare import Progress, relative_error
from .peers import PEERS, Feed, PeerRunner, PeerUnavailableError
from .peers.torch_dense import COMPILED, EAGER
from .settings import TOLERANCE, Settings
from .statistics import speedup, spread
from .timing import interleave
from .workload import SEED, Workload

AS_IT_IS, COMPILED_AS_IT_IS = "the pipeline as it is", "torch.compile"
PROMPT = "a photograph of a red cube on a table"
NETWORK, TEXT, DECODER = "denoiser", "text encoder", "VAE"
REST = "rest"
Row = dict[str, Any]


def run_pipeline(
    results: Row,
    folder: Path,
    batches: list[int],
    steps: int,
    settings: Settings,
    save: Callable[[Row], None],
    progress: Progress,
    prompt: str = PROMPT,
) -> None:
    """Fill ``results`` with the times of a pipeline's calls, one row for each batch; ``save`` is called after each.

    Args:
        results: what ``describe_run`` gave.
        folder: of the pipeline, or its name in the Hub's local cache.
        batches: pictures in a call.
        steps: of the pipeline's own scheduler.
        settings: how to measure.
        save, progress: as ``run_model`` takes them.
        prompt: for a pipeline that takes one.

    Raises:
        InputError: the folder is no pipeline's, or its network of no known family.
        UnsupportedError, BackendError: our own engine cannot be built or run.
    """
    folder = cached(folder)
    progress("loading the pipeline")
    pipe = load_pipeline(folder)
    given = {"context_length": length} if (length := _context_length(pipe)) else {}
    workload = Workload(load_model(folder, **given))
    results.update({"kind": "pipeline", "precision": settings.precision, "steps": steps, "rows": []})
    results["pipeline"] = {"class": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__}
    results["pipeline"]["family"] = workload.model.family.name
    with scratch_folder() as scratch, _Arms(pipe, workload, scratch, settings, progress) as arms:
        for batch in batches:
            call = arms.call_of(batch, steps, prompt)
            results["rows"].append(arms.row(batch, call))
            save(results)


def load_pipeline(folder: Path) -> Any:
    """A pipeline in float32, parts that its folder says are None left out. Raises CheckpointError."""
    if not (folder / PIPELINE).is_file():
        raise CheckpointError(f"{folder} has no {PIPELINE}: no folder of a pipeline", "name what save_pretrained wrote")
    parts = read_json(folder / PIPELINE)
    absent = {name: None for name, kind in parts.items() if isinstance(kind, list) and kind[:1] == [None]}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # `dtype`, its new name, is not known to older versions
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, **absent)
    except Exception as error:  # of any kind, by what is wrong with the folder
        raise CheckpointError(f"{folder}: diffusers cannot load it: {error}", "check that it is whole") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(pipe: Any, model: Any, batch: int, prompt: str) -> Row:
    """What a pipeline is called with: a prompt, embeddings where it has no text encoder, labels, or how many."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "prompt_embeds" in takes and getattr(pipe, "tokenizer", None) is None:
        return _embeddings(takes, model, batch)
    if "prompt" in takes:
        return {"prompt": [prompt] * batch}
    if "class_labels" in takes:
        return {"class_labels": [0] * batch}
    if "batch_size" in takes:
        return {"batch_size": batch}
    raise OptionError(f"{type(pipe).__name__} takes neither a prompt nor labels nor a batch size: it is not timed")


def _embeddings(takes: Mapping[str, Any], model: Any, batch: int) -> Row:
    """Noise in place of texts: the work of a network does not depend on them."""
    told = {each.name: torch.from_numpy(model.told(np.arange(batch), SEED)[each.name]) for each in model.conditions}
    names = {"context": "prompt_embeds", "pooled": "pooled_prompt_embeds", "context_mask": "prompt_attention_mask"}
    given: Row = {}
    for name, argument in names.items():
        if name in told and argument in takes:
            given |= {argument: told[name]}
            given |= {f"negative_{argument}": told[name]} if f"negative_{argument}" in takes else {}
    return given | ({"negative_prompt": None} if "negative_prompt" in takes else {})


def _context_length(pipe: Any) -> int | None:
    """Of a pipeline with one tokenizer, the length that it fills texts up to; None leaves it to the family."""
    if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "tokenizer_3", None) is not None:
        return None
    length = getattr(pipe.tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and "CLIP" in type(pipe.tokenizer).__name__ else None


class PeerNetwork:
    """Another runtime in the shape of an engine, for ``EngineDenoiser``."""

    def __init__(self, manifest: Manifest, runner: PeerRunner) -> None:
        self.manifest, self._runner = manifest, runner
        self._conditioning = Conditioning(manifest.conditions)

    def network(self, x: Any, t: np.ndarray, *, conditioning: Mapping[str, Any] | None = None) -> np.ndarray:
        """As ``SparseEngine.network``."""
        rows = self._conditioning.rows(len(x), conditioning=conditioning)
        feed: Feed = {"x": x, "t": t}
        if rows.arrays:
            feed |= {**rows.arrays, "guidance": rows.weights}
        feed |= {"coef": np.array([0, 1, 1, 0, 0, 0, 0, 0], np.float32), "clip": np.array([-1e30, 1e30], np.float32)}
        return self._runner.step(feed | {name: np.zeros_like(x) for name in ("base", "h1", "h2", "z")})


class _Arms:
    """The pipeline, and the networks that are put into it in turn."""

    def __init__(self, pipe: Any, workload: Workload, folder: Path, settings: Settings, progress: Progress) -> None:
        self._pipe, self._workload, self._settings, self._progress = pipe, workload, settings, progress
        self._part = "unet" if hasattr(pipe, "unet") else "transformer"
        self._skipped: dict[str, str] = {}
        network = getattr(pipe, self._part)
        state = {name: torch.from_numpy(each) for name, each in workload.baked.state.items()}
        network.load_state_dict(state, strict=False)
        self._original = Original(network)
        self._threads = pool_size(settings.threads)
        torch.set_num_threads(self._threads)
        progress("building")
        self._engines = build_arms(folder, workload, 2, settings, self._skipped)
        self._ours, self._dense, *_ = self._engines.values()
        self.networks: dict[str, Any] = {AS_IT_IS: network}
        if settings.peers:
            self.networks[COMPILED_AS_IT_IS] = torch.compile(network, dynamic=False)
        for arm in (self._ours, self._dense):
            self.networks[arm.name] = EngineDenoiser(arm.engine, self._original, pipe)
        self.precisions = dict.fromkeys(self.networks, "fp32")
        self.precisions |= {arm.name: arm.precision for arm in (self._ours, self._dense)}
        if settings.peers:
            self._add_peers(folder)

    def __enter__(self) -> _Arms:
        return self

    def __exit__(self, *_: object) -> None:
        for arm in self._engines.values():
            arm.engine.close()

    def _add_peers(self, folder: Path) -> None:
        self._progress("exporting")
        self._workload.write_onnx(folder)
        device, wanted = self._ours.device, self._settings.precision
        for peer in PEERS:
            for precision in peer.wanted(device, wanted):
                if peer in (EAGER, COMPILED) and precision != wanted:
                    continue
                name = peer.name if precision == wanted else f"{peer.name}, {precision}"
                if name in self.networks or (peer in (EAGER, COMPILED) and precision == "fp32"):
                    continue  # diffusers' own network stands for torch
                self._progress(name)
                try:
                    runner = peer.prepare(self._workload.subject(folder, device, self._threads, precision))
                except PeerUnavailableError as error:
                    self._skipped[name] = str(error)
                    continue
                except Exception as error:  # another runtime's failure is its own: the others are still measured
                    self._skipped[name] = f"failed: {type(error).__name__}: {error}"[:200]
                    continue
                like: Any = PeerNetwork(self._ours.engine.manifest, runner)
                self.networks[name] = EngineDenoiser(like, self._original, self._pipe)
                self.precisions[name] = precision

    def call_of(self, batch: int, steps: int, prompt: str) -> Callable[[str], Any]:
        """A call of the pipeline by the name of a network."""
        given = call_arguments(self._pipe, self._workload.model, batch, prompt)

        def call(name: str) -> Any:
            setattr(self._pipe, self._part, self.networks[name])
            torch.manual_seed(SEED)
            with torch.inference_mode():
                return self._pipe(num_inference_steps=steps, output_type="np", **given)[0]

        return call

    def row(self, batch: int, call: Callable[[str], Any]) -> Row:
        """Times and shares of each network that draws what the first draws."""
        self._progress(f"batch {batch}: checking")
        errors = self._checked(call)
        names = list(errors)
        self._progress(f"batch {batch}: timing {len(names)} runtimes")
        timings = interleave(
            {name: _bound(call, name) for name in names},
            repeats=self._settings.repeats,
            seconds=self._settings.seconds,
        )
        ours = self._ours.name
        return {
            "batch": batch,
            "milliseconds": {name: spread(runs).to_dict() for name, runs in timings.runs.items()},
            "speedups": {
                name: speedup(runs, timings.runs[ours]).to_dict() for name, runs in timings.runs.items() if name != ours
            },
            "shares": {name: self._shares(call, name) for name in names},
            "relative_error": errors,
            "precisions": {name: self.precisions[name] for name in names},
            "warmup_milliseconds": {name: 1e3 * value for name, value in timings.warmup.items()},
            "skipped": dict(self._skipped),
        }

    def _checked(self, call: Callable[[str], Any]) -> dict[str, float]:
        """How far each network's first prediction is from torch's; what is too far, or fails, is left out."""
        kept: list[tuple[Any, Any]] = []
        network = unwrapped(self.networks[AS_IT_IS])
        handle = network.register_forward_hook(
            lambda _, args, kwargs, out: kept.append(((args, kwargs), out)), with_kwargs=True
        )
        call(AS_IT_IS)
        handle.remove()
        (args, kwargs), out = kept[0]
        channels = self._workload.model.config.data_shape[0]
        expected = np.asarray(out[0][:, :channels])
        errors = {}
        for name, each in self.networks.items():
            try:
                with torch.inference_mode():
                    found = np.asarray(each(*args, **kwargs)[0][:, :channels])
                errors[name] = relative_error(found, expected)
            except Exception as error:  # another runtime's failure is its own: the others are still measured
                if name in self._engines:
                    raise
                self._skipped[name] = f"failed: {type(error).__name__}: {error}"[:200]
                continue
            if not errors[name] <= TOLERANCE[self.precisions[name]]:
                if name in self._engines:
                    raise UnsupportedError(f"{name} differs from the pipeline's network by {errors[name]:.1e}")
                self._skipped[name] = f"computes something else: relative error {errors.pop(name):.1e}"
        return errors

    def _shares(self, call: Callable[[str], Any], name: str) -> dict[str, float]:
        """Of one call, the share of each part."""
        spent = dict.fromkeys((TEXT, NETWORK, DECODER), 0.0)
        with ExitStack() as watched:
            call_network = self.networks[name]
            watched.enter_context(_watched(call_network, "forward", NETWORK, spent))
            for part, module in self._pipe.components.items():
                if part.startswith("text_encoder") and module is not None:
                    watched.enter_context(_watched(module, "forward", TEXT, spent))
                elif part in ("vae", "vqvae", "movq") and module is not None:
                    watched.enter_context(_watched(module, "decode", DECODER, spent))
            began = time.perf_counter()
            call(name)
            whole = time.perf_counter() - began
        return {part: each / whole for part, each in spent.items()} | {REST: 1 - sum(spent.values()) / whole}


@contextmanager
def _watched(module: Any, method: str, part: str, spent: dict[str, float]) -> Iterator[None]:
    """Count the seconds that a module's method takes."""
    plain, held = getattr(module, method), vars(module).get(method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - began

    object.__setattr__(module, method, timed)
    try:
        yield
    finally:
        object.__delattr__(module, method)
        if held is not None:  # of a compiled module, the compiled one
            object.__setattr__(module, method, held)


def table(results: Row) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of a run: a row for each runtime at each batch."""
    parts = (TEXT, NETWORK, DECODER, REST)
    rows = []
    for row in results["rows"]:
        for name, found in row["milliseconds"].items():
            ratio = row["speedups"].get(name)
            over = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "-"
            shares = [f"{row['shares'][name][part]:.0%}" for part in parts]
            rows.append(
                [str(row["batch"]), _called(name, row["precisions"][name]), f"{found['median']:.1f}", over, *shares]
            )
    return ["batch", "runtime", "ms a call", "over 2:4 [99 %]", *parts], rows


def _called(name: str, precision: str) -> str:
    shown = {SPARSE: "ours, 2:4", DENSE: "ours, dense"}.get(name, name)
    return shown if shown.endswith(f", {precision}") else f"{shown}, {precision}"


def remarks(results: Row) -> list[str]:
    """What the table does not say."""
    lines = [
        f"{results['pipeline']['class']}, {results['steps']} steps of {results['pipeline']['scheduler']}; "
        "the network's masks are baked in for every runtime, and each draws the same picture."
    ]
    skipped = {name: why for row in results["rows"] for name, why in row["skipped"].items()}
    return [*lines, *(f"Left out: {name}: {why}." for name, why in skipped.items())]


def _bound(call: Callable[[str], Any], name: str) -> Callable[[], Any]:
    return lambda: call(name)
