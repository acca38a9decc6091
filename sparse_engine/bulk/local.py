"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from .draw import Load, Trouble
from .job import Chunk, Request
from .pool import Died, Done, Drew, Event, Failed, Ready

COMMAND = (sys.executable, "-P", "-m", "sparse_engine.bulk.worker")
ENDS_IN = 5.0  # seconds, once nobody asks anything of it


class Processes:
    """A ``Fleet`` of local processes.

    Args:
        asked: the job.
        load: how each of them loads the engine.
        devices: worker i has the i-th of them, from the first again where there are fewer; empty: all have ``load``'s.
    """

    patient = False

    def __init__(self, asked: Request, load: Load, devices: Sequence[str] = ()) -> None:
        self._asked, self._load, self._devices = asked, load, devices
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._events: queue.Queue[tuple[subprocess.Popen[str], Event]] = queue.Queue()

    def start(self, worker: int, choices: dict[str, Any] | None) -> None:
        """See ``Fleet``."""
        device = self._devices[worker % len(self._devices)] if self._devices else self._load.device
        load = replace(self._load, device=device, choices=choices)
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1
        )
        self._processes[worker] = process
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()
        self._order(process, asked=self._asked.to_dict(), load=load.to_dict())

    def give(self, worker: int, chunk: Chunk) -> None:
        """See ``Fleet``."""
        self._order(self._processes[worker], chunk=[chunk.first, chunk.last])

    def wait(self, seconds: float) -> Iterable[Event]:
        """See ``Fleet``."""
        with contextlib.suppress(queue.Empty):
            process, event = self._events.get(timeout=seconds)
            while True:
                if self._processes.get(event.worker) is process:  # not of one that was stopped
                    if isinstance(event, Died):
                        self._reap(self._processes.pop(event.worker))
                    yield event
                process, event = self._events.get_nowait()

    def stop(self, worker: int) -> None:
        """See ``Fleet``: by SIGKILL, as one that hangs may be stopped itself."""
        process = self._processes.pop(worker, None)
        if process is not None:
            process.kill()
            self._reap(process)

    def close(self) -> None:
        """See ``Fleet``: their input ends, and so do they."""
        processes, self._processes = self._processes, {}
        for process in processes.values():
            with contextlib.suppress(OSError):
                process.stdin.close() if process.stdin else None
        for process in processes.values():
            self._reap(process)

    @staticmethod
    def _reap(process: subprocess.Popen[str]) -> None:
        try:
            process.wait(ENDS_IN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            process.stdin.close() if process.stdin else None

    @staticmethod
    def _order(process: subprocess.Popen[str], **order: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: that is heard of by itself
            stream: Any = process.stdin
            stream.write(json.dumps(order) + "\n")
            stream.flush()

    def _listen(self, worker: int, process: subprocess.Popen[str]) -> None:
        """On a thread of its own: a worker's lines as events, and its end."""
        stream: Any = process.stdout
        with contextlib.suppress(OSError, ValueError), stream:
            for line in stream:
                self._events.put((process, _event(worker, json.loads(line))))
        self._events.put((process, Died(worker, _ending(process.wait()))))


def _event(worker: int, said: dict[str, Any]) -> Event:
    if "ready" in said:
        return Ready(worker, said["ready"])
    if "drew" in said:
        return Drew(worker, said["drew"])
    return Failed(worker, Trouble(**said["failed"])) if "failed" in said else Done(worker)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
