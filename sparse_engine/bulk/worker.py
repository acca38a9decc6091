"""A worker process: ``python -m sparse_engine.bulk.worker``. Orders come in on standard input, a line of JSON each, and
what has happened goes out on standard output. Where standard input ends, the process that started it is no more, and
neither is this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

from sparse_engine.bulk.draw import ChunkSampler, Load, Trouble
from sparse_engine.bulk.job import Chunk, Request

ORPHANED = 3  # exit code


def main() -> None:
    """Load the engine, then draw what is asked for until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    said = _own_output()
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        begin = orders.get()
        with ChunkSampler(Request.from_dict(begin["asked"]), Load(**begin["load"])) as sampler:
            _say(said, ready=sampler.kernels)
            while True:
                _draw(sampler, Chunk(*orders.get()["chunk"]), said)
    except Exception as error:  # in loading
        _say(said, failed=vars(Trouble.of(error)))


def _draw(sampler: ChunkSampler, chunk: Chunk, said: TextIO) -> None:
    try:
        for images in sampler.draw(chunk):
            _say(said, drew=images)
        _say(said, done=True)
    except Exception as error:
        _say(said, failed=vars(Trouble.of(error)))


def _own_output() -> TextIO:
    """Standard output, for our lines alone: what libraries print goes to the error stream."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _say(said: TextIO, **event: Any) -> None:
    try:
        said.write(json.dumps(event) + "\n")
        said.flush()
    except OSError:  # nobody listens any more
        os._exit(ORPHANED)


def _listen(orders: queue.Queue[dict[str, Any]]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in sys.stdin:
            orders.put(json.loads(line))
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
