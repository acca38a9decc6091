"""What a command owes the shell that runs it: output that cannot fail in odd ways, signals that clean up, exit codes.

Light, as it is imported before anything else. A program that uses the library is left as it is: only ``begin`` changes
the process.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from sparse_engine import temporaries
from sparse_engine.errors import EXIT_INTERRUPTED, EXIT_SIGNAL, PrintError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
INTERRUPTED = "interrupted; nothing half-written was left behind"
PLAIN_ERRORS = "sparse_engine.plain"
PLAIN = {
    "→": "->", "←": "<-", "×": "x", "…": "...", "–": "-", "—": "-", "─": "-", "━": "-", "│": "|", "┃": "|", "•": "*",
    "±": "+-", "≤": "<=", "≥": ">=", "‘": "'", "’": "'", "“": '"', "”": '"', "\N{HYPHEN}": "-",
}  # fmt: skip

_received: int | None = None
_fragile = False  # what runs cannot bear an exception in its midst
_interruptible = False  # before, nothing has been written: the process may end anywhere


def begin() -> None:
    """Make this process one that behaves: streams, and signals, which end it at once until ``run``."""
    if os.name != "posix" or isinstance(getattr(sys.stdout, "buffer", None), _Buffer):
        return
    _fill_closed_descriptors()
    codecs.register_error(PLAIN_ERRORS, _plain)
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in the background of a script
            signal.signal(number, _stop)


def run(work: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its code. From here on a signal is a KeyboardInterrupt: what was begun goes."""
    global _interruptible
    begin()
    _interruptible = True
    try:
        code = work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = clear_away()
    except PrintError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    _handle(_stop, signal.SIG_DFL)  # an exception has nobody to go to any more
    if _received is not None:
        _leave(code or 0)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process with this code. Python itself would end it by SIGINT where a KeyboardInterrupt has ever passed
    through an ``exec`` of a string, such as a dataclass's while its module is imported.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def clear_away() -> int:
    """After an interrupt: nothing is left behind, whatever signal comes meanwhile. The exit code: 128 + the signal's.

    Ctrl-C's where no signal is known.
    """
    _handle(_stop, signal.SIG_IGN)
    temporaries.clear()
    return EXIT_INTERRUPTED if _received is None else EXIT_SIGNAL + _received


@contextlib.contextmanager
def fragile() -> Iterator[None]:
    """While a library runs that an exception in its midst would abort: a signal clears away and ends the process.

    Only where ``run`` handles signals; a program that uses the library has its own.
    """
    global _fragile
    before, _fragile = _fragile, True
    try:
        yield
    finally:
        _fragile = before


def interrupted_by() -> int | None:
    """The signal that this process was sent, if any."""
    return _received


@contextlib.contextmanager
def noting(note: Callable[[], None]) -> Iterator[None]:
    """While a library runs that no exception may pass through: a signal calls ``note`` and raises nothing."""
    if threading.current_thread() is not threading.main_thread():  # where signals do not come
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        global _received
        _received = number if before[number] is _stop else _received
        note()

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: it for number, it in handlers.items() if it is _stop or number == signal.SIGINT}
    for number in before:
        signal.signal(number, noted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(before: Any, after: Any) -> None:
    """Give the signals that are handled so another handler."""
    for number in SIGNALS:
        if signal.getsignal(number) is before:
            signal.signal(number, after)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    if _interruptible and not _fragile:
        raise KeyboardInterrupt
    code = clear_away()
    if _interruptible:
        show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
        with contextlib.suppress(OSError):
            os.write(2, show_cursor + INTERRUPTED.encode() + b"\n")
    os._exit(code)


def _fill_closed_descriptors() -> None:
    """Open the standard streams that the shell closed (``>&-``): a file of ours would get their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """For ``codecs``: a character that a stream's encoding lacks, in plain ones; an undecodable byte as it was."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # of a file name that is no text
        return bytes([ord(letter) & 0xFF]), error.start + 1
    plain = PLAIN.get(letter) or unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or "?", error.start + 1


class _Output(io.FileIO):
    """Standard output or error. When nobody reads it any more, the rest is dropped and the command goes on.

    A write that fails otherwise, as on a full disk, is said once: PrintError from standard output.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._muted = False

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self._muted:
            return size
        try:
            return super().write(data)  # None where a pipe is full and would block
        except BrokenPipeError:
            self._muted = True
        except OSError as error:
            self._muted = True
            if self.fileno() == 1:
                raise PrintError(
                    f"standard output cannot be written: {error.strerror}", "write it elsewhere, or free space"
                ) from error
        return size


class _Buffer(io.BufferedWriter):
    """Tells a stream that is ours already."""


def _stream(descriptor: int, old: TextIO | None) -> TextIO:
    """A standard stream as it was set up, over ``_Output``."""
    with contextlib.suppress(Exception):
        if old is not None:
            old.flush()
    return io.TextIOWrapper(
        _Buffer(_Output(descriptor)),
        encoding=getattr(old, "encoding", None) or "utf-8",
        errors=PLAIN_ERRORS,
        line_buffering=bool(getattr(old, "line_buffering", False)) or descriptor == 2,
        write_through=bool(getattr(old, "write_through", False)),
    )
