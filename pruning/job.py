"""Checkpoint -> states -> pruned layers -> checkpoint: what ``sparse-engine prune`` calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sparse_engine import __version__
from sparse_engine.export.model import load_model
from sparse_engine.export.options import ModelOptions

from .journal import Journal
from .oneshot import Pruned, PruneOptions, check_prunable, prune
from .states import StateOptions, states_for
from .write import write_pruned


def run_job(
    checkpoint: Path,
    output: Path,
    *,
    given: ModelOptions = ModelOptions(),  # noqa: B008 - all of these are frozen
    states: StateOptions = StateOptions(),  # noqa: B008
    options: PruneOptions = PruneOptions(),  # noqa: B008
    folder: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Pruned:
    """Prune a checkpoint and write the result; where an earlier run of the same job was killed, go on with it.

    Args:
        checkpoint: as ``load_checkpoint`` takes it.
        output: what ``write.output_for`` says.
        given: what the checkpoint does not say of its model.
        states: what layers are given while they are pruned.
        options: how.
        folder: for states that do not fit into memory.
        progress: told (done, in all, what is at work, or "" for the same).

    Raises:
        CheckpointError, OptionError, InputError, OutputError, UnsupportedError: bad input; nothing is left behind.
        NonFiniteError: the model diverges.
    """
    model = load_model(checkpoint, given.family, **given.given())
    check_prunable(model, options)
    job = {
        "version": __version__,
        "checkpoint": model.checkpoint.sha256,
        "model": {**given.given(), "family": model.family.name},
        "states": states.to_dict(),
        **options.to_dict(),
    }
    journal = Journal(output, job)
    try:
        progress(0, 1, "building a float engine" if states.calib is None else "reading states")
        taken = journal.states(model)
        if taken is None:
            taken = states_for(checkpoint, model, states, given, lambda done, total: progress(done, total, "sampling"))
            journal.keep_states(taken)
        pruned = prune(model, taken, options, journal, folder, progress)
        write_pruned(checkpoint, output, model, pruned)
    except Exception:
        journal.remove_if_empty()
        raise
    journal.remove()
    return pruned
