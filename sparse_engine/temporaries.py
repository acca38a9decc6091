"""Temporary files and folders: beside what they become, or for the work alone; gone afterwards, whatever happened.

A temporary is locked for as long as its process lives. One that nobody holds was left by a process that was killed, and
goes when the same name is written again. Where a file system or a system has no locks, it is never taken for abandoned.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".sparse-engine.tmp"
NAME_BYTES = 100  # of the name that a temporary is for: some file systems allow 143 in all
LATER_SLOTS = 4  # looked through for leftovers of processes that ran, and died, side by side
FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC if os.name == "posix" else 0


@dataclasses.dataclass(eq=False)
class _Hold:
    """What keeps a temporary: the descriptor that has its lock; None while it is being made."""

    lock: int | None = None


_live: dict[Path, _Hold] = {}
_scratch: set[Path] = set()
_process = os.getpid()


@contextlib.contextmanager
def file_beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of ``path``, for nobody else; removed, unless it was renamed. Raises OSError."""
    with _claimed(path, folder=False) as temporary:
        yield temporary


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """The same, a folder."""
    with _claimed(path, folder=True) as temporary:
        yield temporary


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the work alone, where ``TMPDIR`` says. Raises OSError."""
    user = os.getuid() if os.name == "posix" else "user"
    with folder_beside(Path(tempfile.gettempdir()) / f"sparse-engine-{user}") as folder:
        _scratch.add(folder)
        try:
            yield folder
        finally:
            _scratch.discard(folder)


def in_scratch(path: Path) -> Path | None:
    """The scratch folder that ``path`` lies in, or is."""
    return next((folder for folder in _scratch if folder == path or folder in path.parents), None)


def clear() -> None:
    """Remove what is left of this process's temporaries: after an interrupt, which may come while they are removed."""
    if os.getpid() == _process:  # a fork has its parent's list
        for temporary in list(_live):
            _release(temporary)


atexit.register(clear)


@contextlib.contextmanager
def _claimed(path: Path, *, folder: bool) -> Iterator[Path]:
    temporary = _claim(path, folder)
    try:
        yield temporary
    finally:
        _release(temporary)


def _claim(path: Path, folder: bool) -> Path:
    """Make the first temporary for ``path`` that nobody alive has, and lock it."""
    path = path.absolute()
    slot, temporary = next(
        (slot, temporary) for slot in itertools.count() if _made(temporary := path.with_name(_name(path, slot)), folder)
    )
    for later in range(slot + 1, slot + 1 + LATER_SLOTS):
        _remove_abandoned(path.with_name(_name(path, later)))
    return temporary


def _made(temporary: Path, folder: bool) -> bool:
    """Make and lock a temporary of that name, unless somebody alive has it."""
    hold = _Hold()
    if _live.setdefault(temporary, hold) is not hold:  # first, as an interrupt may come behind every line
        return False
    made = False
    try:
        _remove_abandoned(temporary)
        temporary.mkdir(0o700) if folder else os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))
        made = _lock(temporary, hold)
    except FileExistsError:
        pass
    except (OSError, ValueError):
        del _live[temporary]
        raise
    if not made:
        del _live[temporary]
    return made


def _name(path: Path, slot: int) -> str:
    name = os.fsencode(path.name)[:NAME_BYTES].decode(errors="ignore")
    return f".{name}.{slot}{SUFFIX}"


def _lock(temporary: Path, hold: _Hold) -> bool:
    """Lock a temporary that was just made; False where another process took it for abandoned before that."""
    if fcntl is None:
        return True
    try:
        hold.lock = _opened(temporary)
        fcntl.flock(hold.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kept = _is_at(temporary, hold.lock)
    except (BlockingIOError, FileNotFoundError):
        kept = False
    except OSError:  # a file system without locks
        kept = True
    if not kept and hold.lock is not None:
        os.close(hold.lock)
    return kept


def _opened(temporary: Path) -> int:
    try:
        return os.open(temporary, os.O_RDWR | FLAGS)  # NFS locks what may be written
    except IsADirectoryError:
        return os.open(temporary, os.O_RDONLY | FLAGS)


def _is_at(temporary: Path, descriptor: int) -> bool:
    """Whether what is open is what has that name: not renamed, removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(temporary))
    except OSError:
        return False


def _release(temporary: Path) -> None:
    """Remove a temporary of this process; what was renamed is nobody's, or another's by now."""
    hold = _live.get(temporary)
    if hold is None:
        return
    if hold.lock is None:
        _remove(temporary) if fcntl is None else _remove_abandoned(temporary)
    elif _is_at(temporary, hold.lock):
        _remove(temporary)
    _live.pop(temporary, None)
    if hold.lock is not None:
        os.close(hold.lock)


def _remove_abandoned(temporary: Path) -> None:
    """Remove what a process of this user, which is no more, has left under a temporary's name."""
    if fcntl is None:
        return
    try:
        lock = _opened(temporary)
    except (OSError, ValueError):  # nothing there, or nothing of ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(temporary, lock) and os.fstat(lock).st_uid == os.geteuid():
            _remove(temporary)
    except OSError:  # held: its process is alive
        pass
    finally:
        os.close(lock)


def _remove(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            temporary.unlink()
