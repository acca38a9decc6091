"""Writing files whole or not at all, and what is wrong with a path before it is read or written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparse_engine.errors import InputError, OptionError, OutputError

UMASK = os.umask(0o022)  # it can only be read by setting it: once, before there are threads
os.umask(UMASK)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path``: it takes its place, flushed to disk, if the block ends well; otherwise it goes.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_writable(path: Path, *kinds: str) -> None:
    """Say before the work, not after it, that a file cannot be written.

    Args:
        path: the file.
        kinds: what its name may end in, such as ".json"; a slip of the hand then costs nobody a checkpoint.

    Raises:
        OptionError: its name ends in none of them.
        OutputError: it cannot be written.
    """
    try:
        special = path.exists() and not (path.is_file() or path.is_dir())
    except OSError as error:  # a name that is too long, for one
        raise output_error(path, error) from error
    if special:  # it would be replaced by a file
        raise OutputError(f"{path} is a device or a pipe; expected a file name", "write to a file")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected a file name", f"write to {path / 'NAME'}")
    if kinds and path.suffix.lower() not in kinds:
        raise OptionError(
            f"{path}: the name of what is written here ends in {' or '.join(kinds)}",
            f"for example {path.with_suffix(kinds[0]) if path.name else 'NAME' + kinds[0]}",
        )
    if not path.parent.is_dir():
        raise output_error(path, FileNotFoundError(errno.ENOENT, "no such folder"))
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} cannot be written to", "write elsewhere with -o")


def output_error(path: Path, error: OSError) -> OutputError:
    """What went wrong with writing ``path``, in the user's terms."""
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"{path}: the disk is full; nothing was left behind", "free space, or write elsewhere with -o"
        )
    if not path.parent.is_dir():
        return OutputError(f"{path}: the folder {path.parent} does not exist", "create it, or write elsewhere with -o")
    return OutputError(f"{path} cannot be written: {error.strerror or error}", "write elsewhere with -o")


def check_readable(
    path: Path, kind: type[InputError], *, folder: bool = False, missing: str = "check the path"
) -> None:
    """Say what is wrong with a path that is to be read. Raises ``kind``.

    Args:
        path: the file.
        kind: the error.
        folder: whether a folder will do.
        missing: what to do where there is nothing of that name.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise kind(
                f"{path} is a link to {os.readlink(path)}, which does not exist", "fetch the file it leads to"
            ) from None
        raise kind(f"{path} does not exist", missing) from None
    except OSError as error:  # a name that is too long, a folder that may not be searched, links in a circle
        raise kind(f"{path} cannot be looked at: {error.strerror or error}", "check the path and its rights") from error
    except ValueError as error:  # a NUL in the name
        raise kind(f"{str(path)!r} is no path: {error}", "check the path") from error
    if stat.S_ISDIR(mode) and not folder:
        raise kind(f"{path} is a folder; expected a file", "name a file in it")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise kind(f"{path} is a device or a pipe; expected a file", "write it to a file first")
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise kind(f"{path} may not be read", "check its rights")
