"""``sparse-engine serve``: images on request, over HTTP."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from sparse_engine import process
from sparse_engine.cores import usable_cores
from sparse_engine.engine import SparseEngine
from sparse_engine.errors import MissingDependencyError, OptionError

from .groups import grouped
from .options import Autotune, Device, Threads
from .terminal import errors

KEY_VARIABLE = "SPARSE_ENGINE_API_KEY"


@dataclass(frozen=True)
class Limits:
    """Sizes and times of a service."""

    max_batch: Annotated[
        int | None, typer.Option(help="Images that are drawn together.", show_default="twice the build's usual")
    ] = None
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Sizes that batches are filled up to, as 1,4,16.", show_default="on a GPU powers of 2"),
    ] = None
    max_wait_ms: Annotated[float, typer.Option(help="Wait for company while the engine is idle.")] = 2.0
    max_images: Annotated[int, typer.Option(help="Most images of a request.")] = 64
    max_steps: Annotated[int, typer.Option(help="Most steps of a request.")] = 1000
    max_body: Annotated[int, typer.Option(help="Most bytes of a request.")] = 64 << 10
    queue_images: Annotated[int, typer.Option(help="Most images that wait; then 429.")] = 256
    queue_seconds: Annotated[float, typer.Option(help="Most seconds of work that wait; then 429.")] = 300.0
    deadline: Annotated[float, typer.Option(help="Seconds until a request is given up with 504.")] = 600.0

    def settings(self, api_key: str | None) -> Any:
        """The same for ``serve``. Raises OptionError, MissingDependencyError."""
        given = {**vars(self), "batch_sizes": _sizes(self.batch_sizes), "max_wait": self.max_wait_ms / 1000}
        del given["max_wait_ms"]
        return _serving("settings").Settings(**given, api_key=api_key)


@grouped
def command(
    engine: Annotated[list[Path], typer.Argument(help="One .sengine file or more; served by their names.")],
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="Clients have to show it; best in the variable.")
    ] = None,
    threads: Threads = None,
    device: Device = None,
    autotune: Autotune = True,
    limits: Limits,
    grace: Annotated[float, typer.Option(help="Seconds to answer what was accepted, after SIGTERM.")] = 30.0,
    replicas: Annotated[int, typer.Option(min=0, help="So many processes through Ray Serve; 0 is this one alone.")] = 0,
    cluster: Annotated[
        str | None, typer.Option(help="Ray cluster for --replicas, as auto or ray://host:10001.", show_default="local")
    ] = None,
) -> None:
    """Serve engines over HTTP until SIGTERM or Ctrl-C, then answer what was accepted and end."""
    service_module = _serving("service")
    settings = limits.settings(api_key)
    paths = service_module.named(engine)
    if threads is None and replicas and cluster is None:
        threads = max(1, usable_cores() // replicas)
    load = partial(SparseEngine.load, threads=threads, device=device, autotune=autotune)
    if api_key is None and not _is_local(host):
        errors.print(f"warning: everybody who reaches {host} may use this service: give it --api-key", markup=False)
    if cluster is not None and not replicas:
        raise OptionError("--cluster is given without --replicas", "say how many with --replicas N")
    listener = None if replicas else _serving("server").listen(host, port)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    names, number = ", ".join(paths), port if listener is None else listener.getsockname()[1]
    where = f"http://{f'[{host}]' if ':' in host else host}:{number}"

    def ready() -> None:
        errors.print(f"serving {names} on {where}", highlight=False, markup=False)

    errors.print(f"loading {names}", highlight=False, markup=False)
    if listener is None:
        on_gpu = float(str(device).startswith("cuda"))
        run = partial(_serving("replicas").run, grace=grace, cluster=cluster, gpus=on_gpu, ready=ready)
        raise typer.Exit(run(paths, settings, load, host, port, replicas))
    service = service_module.Service(paths, settings, load)
    raise typer.Exit(_serving("server").Server(service, listener, grace=grace, ready=ready).run())


def _serving(name: str) -> ModuleType:
    """A module of ``sparse_engine.serve``. Raises MissingDependencyError where something it needs is not there."""
    try:
        with process.fragile():
            return import_module(f"sparse_engine.serve.{name}")
    except ModuleNotFoundError as error:
        extra = "replicas" if error.name == "ray" else "serve"
        raise MissingDependencyError(
            f"serving needs {error.name}; it is not installed", f"pip install 'sparse-engine[{extra}]'"
        ) from error


def _sizes(text: str | None) -> tuple[int, ...]:
    """ "1,4,16" -> (1, 4, 16). Raises OptionError."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise OptionError(f"--batch-sizes {text!r}: expected whole numbers", "write them as 1,4,16")
    return tuple(int(part) for part in parts)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
