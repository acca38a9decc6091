"""One writer for each shard of a folder: ``lock.i-of-N`` says who, and goes with its process where that can be told."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_engine.errors import InputError
from sparse_engine.files import output_error, parsed_json

from .job import LOCK, Shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class BusyError(InputError):
    """Another process writes there."""


@contextlib.contextmanager
def locked(out: Path, shard: Shard, *, steal: bool = False) -> Iterator[None]:
    """Hold the lock of a shard.

    Args:
        out: the job's folder.
        shard: which.
        steal: take the lock of a process on another host, which this one cannot look at, for left behind.

    Raises:
        BusyError: a living process holds it, or that of a shard of another division, or nobody can tell.
        OutputError: it cannot be written.
    """
    path = out / f"{LOCK}{shard}"
    try:
        descriptor = _taken(path, steal)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        for other in sorted(out.glob(f"{LOCK}*")):
            if not other.name.endswith(f"-of-{shard.count}") and _is_held(other):
                raise BusyError(
                    f"{out} is being written to by {_who(_owner(other))}, as shard {other.name.removeprefix(LOCK)}",
                    "give all shards of a job the same number of them",
                )
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _taken(path: Path, steal: bool) -> int:
    """The descriptor that has the lock. Raises BusyError, OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            held = _flock(descriptor)
            owner = _read(descriptor)
            if held is False:
                raise BusyError(f"{path} is held: {_who(owner)} writes there", "wait for it, or end it first")
            if not _is_at(path, descriptor):  # its owner has just removed it
                os.close(descriptor)
                continue
            if owner and not _is_dead(owner, held) and not steal:
                raise BusyError(
                    f"{path} was left by {_who(owner)}, and this process cannot tell whether that one is alive",
                    "if it is not: --steal-lock",
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _flock(descriptor: int) -> bool | None:
    """True: held from now on, until this process ends; False: another holds it; None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_dead(owner: dict[str, Any], held: bool | None) -> bool:
    """Whether a lock's owner is known to be no more: on this host alone."""
    if owner.get("host") != socket.gethostname():
        return False
    return bool(held) or not _lives(owner.get("pid"))


def _lives(pid: Any) -> bool:
    if os.name != "posix" or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_held(path: Path) -> bool:
    """Whether somebody alive holds a lock, as far as can be told."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return False
    try:
        held, owner = _flock(descriptor), _read(descriptor)
        return held is False or (bool(owner) and not _is_dead(owner, held))
    finally:
        os.close(descriptor)


def _owner(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = parsed_json(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _read(descriptor: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = parsed_json(os.pread(descriptor, 4096, 0))
        return found if isinstance(found, dict) else {}
    return {}


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
