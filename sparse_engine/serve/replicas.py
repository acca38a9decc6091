"""The same application in several processes, on one machine or many, under Ray Serve.

Ray's proxies listen and choose a replica; each replica has engines and a batcher of its own. Ray starts one anew that
dies, and waits at the end until what was accepted is answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve

from sparse_engine import process
from sparse_engine.cores import usable_cores
from sparse_engine.errors import EXIT_DONE, BackendError

from .app import create_app
from .service import Loader, Service
from .settings import Settings

NAME = "sparse-engine"
QUEUED_REQUESTS = 200  # of a replica, beside those that its own queue refuses: Ray's default of 5 would cap its batches


def deployment(
    paths: Mapping[str, Path], settings: Settings, load: Loader, replicas: int, grace: float = 30.0, **needs: float
) -> Any:
    """A Ray Serve application of so many replicas.

    Args:
        paths: name -> engine file, by a path that every node has.
        settings, load: as for ``Service``; ``load`` can be pickled.
        replicas: how many.
        grace: seconds that a replica has to answer what it accepted, once it is to stop.
        needs: what Ray sets aside for each: ``num_cpus``, ``num_gpus``.
    """
    application = serve.ingress(lambda: create_app(Service(paths, settings, load), wait=True))(_Replica)
    return serve.deployment(
        name=NAME,
        num_replicas=replicas,
        max_ongoing_requests=QUEUED_REQUESTS + settings.queue_images,
        ray_actor_options=needs,
        graceful_shutdown_timeout_s=grace,
    )(application).bind()


class _Replica:
    """What Ray makes of each process; the application answers."""


def run(
    paths: Mapping[str, Path],
    settings: Settings,
    load: Loader,
    host: str,
    port: int,
    replicas: int,
    *,
    grace: float = 30.0,
    cluster: str | None = None,
    gpus: float = 0,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal comes. Returns the exit code.

    Args:
        paths, settings, load, replicas, grace: as for ``deployment``.
        host, port: where Ray's proxies listen.
        cluster: an address, as ``ray.init`` takes it; None starts Ray on this machine.
        gpus: that Ray sets aside for each replica.
        ready: called once they answer.

    Raises:
        BackendError: Ray cannot be reached, or the replicas cannot be started.
    """
    told = threading.Event()
    handlers = {number: signal.getsignal(number) for number in process.SIGNALS}
    absolute = {name: path.resolve() for name, path in paths.items()}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"num_cpus": max(usable_cores(), replicas), "include_dashboard": False}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        try:
            ray.init(address=cluster, **quiet, **(own if cluster is None else {}))
            stack.callback(ray.shutdown)
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray's own ends the process, and Ray's with it, at once
            stack.enter_context(process.noting(told.set))
            serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
            stack.callback(serve.shutdown)
            bound = deployment(absolute, settings, load, replicas, grace, num_cpus=1, num_gpus=gpus)
            serve.run(bound, name=NAME, route_prefix="/")
        except Exception as error:  # Ray's own have no common base
            raise BackendError(f"Ray could not start {replicas} replicas: {error}") from error
        ready()
        told.wait()
        serve.delete(NAME)  # replicas answer what they have accepted, while Ray's proxies are still there
    return EXIT_DONE
