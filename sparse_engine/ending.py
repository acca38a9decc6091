"""A process may end while a daemon thread samples.

Python ends such a thread where it next asks for the interpreter, inside a C++ library that allows no unwinding there:
the process aborts (pybind11, Python before 3.14). So the process waits, before Python is taken apart, until no thread
is in a library, and a daemon thread that calls one after that ends as by ``sys.exit()``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

CALLERS_WAIT = 1.0  # seconds, for a callback to return
LONGEST_WAIT = 30.0  # seconds, of a step: a thread may also wait for another's engine, whose callback never returns

_changed = threading.Condition()
_inside: dict[int, int] = {}  # thread -> its calls into libraries, one within the other
_in_callers: set[int] = set()  # threads that are in code of the caller's within such calls
_last: int | None = None  # the thread that ends the process, once it does
_waited = threading.Event()  # for all others: from here on Python is taken apart
_owned: weakref.WeakSet[Any] = weakref.WeakSet()
_kept: list[Any] = []  # of those, what there is once the process ends


@contextlib.contextmanager
def library_call() -> Iterator[None]:
    """Around calls into a library; the process does not end within. Raises SystemExit where it is ending."""
    me = threading.get_ident()
    with _changed:
        stop_if_ending()
        _inside[me] = _inside.get(me, 0) + 1
    try:
        yield
    except BaseException as error:
        if _last not in (None, me):
            _give_up(error)
        raise
    finally:
        with _changed:
            left = _inside.pop(me, 1) - 1
            if left:
                _inside[me] = left
            _changed.notify_all()


def _give_up(error: BaseException | None) -> None:
    """What the frames of a call that has failed own of the library: else it goes with the thread, unwaited for."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


@contextlib.contextmanager
def callers_code() -> Iterator[None]:
    """Within ``library_call``, around code of the caller's: it may wait for what never comes, and nobody for it."""
    me = threading.get_ident()
    with _changed:
        calls = _inside.pop(me, 0)
        _in_callers.add(me)
        _changed.notify_all()
    try:
        yield
    finally:
        while _waited.is_set() and me != _last:  # too late: what is on this thread's stack calls libraries as it goes
            time.sleep(LONGEST_WAIT)
        with _changed:
            _in_callers.discard(me)
            if calls:
                _inside[me] = calls  # so that the process waits until all of it has gone
            stop_if_ending()


def stop_if_ending() -> None:
    """Between two calls into a library: end this thread where the process ends and it is not the one that ends it."""
    if _last is not None and threading.get_ident() != _last:
        raise SystemExit


def keep_until_the_end(owner: Any) -> None:
    """Have the process wait before all else that it does at its end, and give up ``owner`` of a library's memory last.

    A thread that ends gives up what it has: a library's memory too, in calls that nobody waits for. Called once the
    library is loaded, which may itself have something done at the end.
    """
    with _changed:
        _owned.add(owner)
        if _last is not None:
            _kept.append(owner)
    atexit.unregister(_wait)
    atexit.register(_wait)


def _wait() -> None:
    global _last
    with _changed:
        _last = threading.get_ident()
        _kept.extend(_owned)
        _changed.wait_for(lambda: not (_inside.keys() | _in_callers) - {_last}, CALLERS_WAIT)
        _changed.wait_for(lambda: not _inside.keys() - {_last}, LONGEST_WAIT)
        _waited.set()


def _forget() -> None:
    """A forked child has none of the other threads, and does not end because its parent did."""
    global _changed, _last, _waited
    _changed, _last, _waited = threading.Condition(), None, threading.Event()
    for thread in _inside.keys() - {threading.get_ident()}:
        del _inside[thread]
    _in_callers.intersection_update({threading.get_ident()})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
