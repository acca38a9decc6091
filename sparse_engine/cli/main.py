"""The entry point: subcommands, and errors as one or two lines with the right exit code."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparse_engine import __version__, process
from sparse_engine.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, SparseEngineError

from . import (
    bench,
    build,
    calibrate,
    doctor,
    evaluate,
    export_triton,
    finetune,
    inspect,
    prune,
    sample,
    sample_many,
    samplers,
    serve,
    tune,
    verify,
)
from .terminal import errors, tell

# Typer brings click inside itself, or imports it, by version; the base of a usage error is the same class either way.
ClickException: Any = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """The commands, by name. One of them has a second word: ``sample-many finish``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments begin with, and the rest of them."""
        words = " ".join(args[:2])
        return super().resolve_command(ctx, [words, *args[2:]] if words == sample_many.FINISH else args)


app = typer.Typer(
    name="sparse-engine",
    cls=Commands,
    help="Inference engines for 2:4-sparse diffusion models (SparseDM).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    build, prune, finetune, calibrate, inspect, sample, sample_many, serve, verify, evaluate, bench, export_triton,
    samplers, tune, doctor,
)  # fmt: skip
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2].replace("_", "-"))(module.command)
app.command(sample_many.FINISH)(sample_many.finish_command)


def _version(wanted: bool) -> None:
    if wanted:
        tell(f"sparse-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 bad input, 128 + N ended by signal N (130: Ctrl-C)."""
    process.run(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command line with the given arguments and return the exit code."""
    try:
        result = app(arguments, prog_name="sparse-engine", standalone_mode=False)
        if result == EXIT_INTERRUPTED:  # some versions of Typer swallow the interrupt
            return _interrupted()
        sys.stdout.flush()
        return result if isinstance(result, int) else EXIT_DONE
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        if process.interrupted_by() is not None:  # a library has made another error of it
            return _interrupted()
        if "--debug" in arguments and not isinstance(error, ClickException):
            raise
        return _failed(error)


def _interrupted() -> int:
    code = process.clear_away()
    errors.print(process.INTERRUPTED)
    return code


def _failed(error: Exception) -> int:
    """Say what went wrong, in the two lines that all errors have; the exit code. What nobody foresaw is raised."""
    if isinstance(error, SparseEngineError):
        _say(error.what, error.fix)
        return error.exit_code
    if isinstance(error, ClickException):
        return _misused(error)
    if isinstance(error, MemoryError):
        _say(f"out of memory: {error}", "ask for fewer samples or steps at a time, or a smaller batch")
        return EXIT_FAILED
    if isinstance(error, OSError) and error.strerror:
        _say(f"{error.filename or 'the system'}: {error.strerror}", "check the path, the disk and the permissions")
        return EXIT_BAD_INPUT if error.filename else EXIT_FAILED
    raise error


def _misused(error: Any) -> int:
    words = " ".join(error.format_message().split())
    if not words:  # help that was shown for want of arguments
        error.show()
    else:
        context = getattr(error, "ctx", None)
        _say(words, f"see {context.command_path if context else 'sparse-engine'} --help")
    return int(error.exit_code)


def _say(what: str, fix: str | None) -> None:
    """An error, in the two lines that all errors have."""
    errors.print(f"error: {what}", style="bold red", markup=False, highlight=False)
    if fix:
        errors.print(f"fix: {fix}", markup=False, highlight=False)
