"""Writing files and folders whole or not at all, and what is wrong with a path before it is read or written."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparse_engine import temporaries
from sparse_engine.errors import InputError, OptionError, OutputError

UMASK = os.umask(0o022)  # it can only be read by setting it: once, before there are threads
os.umask(UMASK)
SET_TMPDIR = "set TMPDIR to a folder that can be written and has space"
MOUNTS = Path("/proc/self/mountinfo")
MOST_DIGITS = 20  # of a whole number in JSON: a seed has 20, and what is much larger is no float
CONTENT = "content"  # what is being made in a folder goes by this name
NOT_CONTENT = ("lost+found",)  # what a file system that was just made has in it


def read_arrays(path: Path, what: str, fix: str, *, most: float = math.inf, times: float = math.inf) -> dict[str, Any]:
    """The members of a ``.npz`` file, name -> array; one that is no array, as bytes.

    Args:
        path: of the file.
        what: it is where it cannot be read: "no calibration file".
        fix: for errors.
        most, times: bytes that it may unpack to, and how many times its size: a few bytes could stand for more than
            there is memory.

    Raises:
        InputError: it is missing, damaged, too large, or holds objects.
    """
    import numpy as np

    check_readable(path, InputError, missing=fix)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > min(most, times * path.stat().st_size):
            raise InputError(f"{path} is {what}: it unpacks to {unpacked} bytes", fix)
        with np.load(path, allow_pickle=False) as members:
            return {name: members[name] for name in members.files}
    except InputError:
        raise
    except Exception as error:  # of any kind, where a file is damaged
        raise InputError(f"{path} is {what}: {error}", fix) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path``: it takes its place, flushed to disk, if the block ends well; otherwise it goes.

    A symbolic link is written through: what it leads to is replaced.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    with _failing_at(path):
        target = written_through(path)
        with temporaries.file_beside(target) as temporary:
            with temporary.open("r+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~UMASK)
            temporary.replace(target)
            flush_folder(target.parent)


def create(path: Path, content: bytes) -> bool:
    """Write a new file, whole; of several processes that do so at once, one does. Returns whether it was this one.

    Raises OutputError where it cannot be written.
    """
    with _failing_at(path), temporaries.file_beside(path) as temporary:
        with temporary.open("r+b") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~UMASK)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _create_in_place(path, content)
        flush_folder(path.parent)
        return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """The same on a file system without hard links: for a moment it is there and empty."""
    try:
        with path.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        return False
    return True


def flush_folder(folder: Path) -> None:
    """Put the names in a folder to disk, where the system can: a rename is not there after a power cut otherwise."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems open or flush no folder
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def kept_if_done(path: Path) -> Iterator[Path]:
    """A name in a temporary folder: the file of that name takes the place of ``path`` if the block ends well.

    So what was there stays until the new file is known to be what was wanted. Raises OutputError.
    """
    with contextlib.ExitStack() as held:
        with _failing_at(path):
            target = written_through(path)
            folder = held.enter_context(temporaries.folder_beside(target))
        yield folder / path.name
        with _failing_at(path):
            (folder / path.name).replace(target)


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are ``folder``'s if the block ends well; otherwise they go.

    A folder that is not there appears whole; one that is there, and empty, is filled in place, as it may be a mount
    point. Raises OutputError where it cannot be, or is not empty.
    """
    check_fillable(folder)
    with _failing_at(folder):
        in_place = folder.is_dir()
        with temporaries.folder_beside(folder / CONTENT if in_place else folder) as temporary:
            yield temporary
            if in_place:
                check_fillable(folder)
                _move(temporary, folder)
            else:
                temporary.chmod(0o777 & ~UMASK)
                temporary.replace(folder)


def _move(source: Path, folder: Path) -> None:
    """Move all that is in a folder to another of the same file system; nothing, where one of them fails."""
    moved: list[Path] = []
    try:
        for each in sorted(source.iterdir()):
            moved.append(folder / each.name)
            each.replace(moved[-1])
    except BaseException:
        for each in moved:
            if not (source / each.name).exists():
                each.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the work alone, in the system's folder for such. Raises OutputError where it is full, or is none."""
    folder = None
    try:
        with temporaries.scratch_folder() as folder:
            yield folder
    except OSError as error:
        if folder is not None and error.errno not in FULL:
            raise
        where = folder.parent if folder is not None else "the folder for temporary files"
        raise OutputError(f"{where}: {_words(error)}", SET_TMPDIR) from error


def check_writable(path: Path, *kinds: str) -> None:
    """Say before the work, not after it, that a file cannot be written: one is made beside it, and removed.

    Args:
        path: the file.
        kinds: what its name may end in, such as ".json"; a slip of the hand then costs nobody a checkpoint.

    Raises:
        OptionError: its name ends in none of them.
        OutputError: it cannot be written.
    """
    with _failing_at(path):
        target = written_through(path)
        if target.is_dir():
            raise OutputError(f"{path} is a folder; expected a file name", f"write to {path / 'NAME'}")
        if target.exists() and not target.is_file():  # it would be replaced by a file
            raise OutputError(f"{path} is a device or a pipe; expected a file name", "write to a file")
        if kinds and path.suffix.lower() not in kinds:
            raise OptionError(
                f"{path}: the name of what is written here ends in {' or '.join(kinds)}",
                f"for example {path.with_suffix(kinds[0]) if path.name else 'NAME' + kinds[0]}",
            )
        if target.is_file() and _is_mount_point(target):
            raise OutputError(
                f"{path} is a mount point of its own, which cannot be replaced in one go", "mount its folder instead"
            )
        with temporaries.file_beside(target):
            pass


def check_fillable(folder: Path) -> None:
    """Say before the work that ``filling`` cannot be done. Raises OutputError."""
    with _failing_at(folder):
        if not folder.is_dir():
            if folder.exists() or folder.is_symlink():
                raise OutputError(f"{folder} is there already and is not an empty folder", "name a new folder")
            with temporaries.folder_beside(folder):
                return
        content = [name for name in os.listdir(folder) if name not in NOT_CONTENT]
        if any(not name.endswith(temporaries.SUFFIX) for name in content):
            raise OutputError(f"{folder} is there already and is not an empty folder", "name a new folder")
        with temporaries.folder_beside(folder / CONTENT):
            pass


def in_folder(path: Path, name: str) -> Path:
    """Where a file goes that was asked for as ``path``: into it, under ``name``, where that is a folder."""
    return path / name if os.path.isdir(path) else path


def written_through(path: Path) -> Path:
    """What a write to ``path`` replaces: a symbolic link's target, not the link. Raises OSError."""
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return path
    except FileNotFoundError:
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _is_mount_point(path: Path) -> bool:
    """Whether a file was mounted (``docker -v FILE:FILE``): nothing can be renamed over it."""
    name = str(path.absolute()).replace(" ", r"\040")
    with contextlib.suppress(OSError):
        return any(line.split(" ")[4] == name for line in MOUNTS.read_text(errors="replace").splitlines())
    return False


FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_WORDS = {
    errno.ENOSPC: "the disk is full; nothing was left behind",
    errno.EDQUOT: "your share of the disk is full; nothing was left behind",
}


@contextlib.contextmanager
def _failing_at(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null byte" not in str(error):
            raise
        raise output_error(path, error) from error


def _words(error: OSError | ValueError) -> str:
    return _WORDS.get(getattr(error, "errno", None) or 0) or getattr(error, "strerror", None) or str(error)


def output_error(path: Path, error: OSError | ValueError) -> OutputError:
    """What went wrong with writing ``path``, in the user's terms."""
    number, folder = getattr(error, "errno", None), path.parent
    scratch = temporaries.in_scratch(path)
    if scratch is not None:
        return OutputError(f"{scratch.parent}: {_words(error)}", SET_TMPDIR)
    if number in FULL:
        return OutputError(f"{path}: {_words(error)}", "free space, or write elsewhere")
    if number in (errno.EACCES, errno.EPERM):
        return OutputError(f"{path}: the folder {folder} cannot be written to", "write elsewhere")
    if number == errno.ENOTDIR or os.path.isfile(folder):
        return OutputError(f"{path} cannot be written: {_first_file(folder)} is a file, no folder", "write elsewhere")
    if number == errno.ENOENT and not os.path.isdir(folder):
        return OutputError(f"{path}: the folder {folder} does not exist", "create it, or write elsewhere")
    return OutputError(f"{path} cannot be written: {_words(error)}", "write elsewhere, or under another name")


def _first_file(folder: Path) -> Path:
    return next((each for each in (*reversed(folder.parents), folder) if os.path.isfile(each)), folder)


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


def parsed_json(text: str | bytes) -> Any:
    """What a JSON file of anybody's says. Raises ValueError: no JSON, nested too deep, or with an endless number."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
