"""Every error that sparse-engine raises on purpose.

A message says what is wrong, where, and what was expected; ``fix`` says what to do about it. The command
line prints both, in one or two lines, and exits with ``exit_code``: 2 where the user's input is at fault,
1 where something failed.
"""

from __future__ import annotations

from typing import Any

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_SIGNAL = 128  # and the signal's number, as shells count
EXIT_INTERRUPTED = EXIT_SIGNAL + 2  # SIGINT: Ctrl-C


class SparseEngineError(Exception):
    """The root of the hierarchy: something failed.

    Args:
        what: what is wrong, where, and what was expected.
        fix: what the user can do about it; None where there is nothing to add.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what if fix is None else f"{what}\n  fix: {fix}")
        self.what = what
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole in another process too, where a worker's errors go."""
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[SparseEngineError], args: tuple[Any, ...], attributes: dict[str, Any]) -> SparseEngineError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class InputError(SparseEngineError):
    """The user's input is at fault."""

    exit_code = EXIT_BAD_INPUT


class CheckpointError(InputError):
    """A checkpoint cannot be read, or does not fit its model family."""


class EngineFileError(InputError):
    """A ``.sengine`` file is damaged, of another format version, or made for another machine."""


class OptionError(InputError, ValueError):
    """An argument has a value that cannot be used."""


class QualityLimitError(OptionError):
    """Quantisation costs more quality than was allowed, whatever stays float."""


class OutputError(InputError):
    """A result cannot be written where it was asked for."""


class PrintError(SparseEngineError):
    """What a command has to say cannot be written to its standard output."""


class MissingDependencyError(InputError):
    """An optional package is not installed; ``fix`` names the extra that brings it."""


class UnsupportedError(InputError):
    """This machine, or this build of a library, cannot do what was asked."""


class BackendError(SparseEngineError):
    """A backend failed while building, loading or running an engine."""


class NonFiniteError(SparseEngineError):
    """A network or a decoder gave NaN or infinite values.

    Attributes:
        images: of the run, those that broke first.
        step: the first after which they were broken, from 0; None where it was not found, or no sampler was at work.
    """

    def __init__(self, what: str, fix: str | None, images: tuple[int, ...], step: int | None = None) -> None:
        super().__init__(what, fix)
        self.images, self.step = images, step


class VerificationError(SparseEngineError):
    """An engine's results are further from the reference than the tolerance allows."""


class TrainingError(SparseEngineError):
    """A training diverged."""


class EngineClosedError(SparseEngineError):
    """An engine was used after ``close()``, or in a process forked from the one that loaded it."""


class SamplingCancelled(SparseEngineError):
    """A callback asked for sampling to stop."""
