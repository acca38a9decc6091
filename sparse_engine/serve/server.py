"""The application under uvicorn in this process, and what signals do: the first drains, the second ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sparse_engine import process
from sparse_engine.errors import EXIT_DONE, EXIT_FAILED, OptionError

from .app import create_app
from .service import Service

IDLE_SECONDS = 30.0  # that a new connection has for its first request's headers
KEPT_SECONDS = 15  # that a connection is kept after an answer
LAST_SECONDS = 5.0  # for answers that are drawn to be sent, within the grace


class _Connection(H11Protocol):
    """A connection that says nothing is closed: uvicorn itself waits for its first request for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(IDLE_SECONDS, self._give_up)

    def connection_lost(self, error: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(error)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Signals are ours: ``process.noting`` has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded. Raises OptionError."""
    try:
        return socket.create_server((host, port), family=_family(host), backlog=2048)
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"--host {host} --port {port}: {words}", "free the port, or listen elsewhere") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def run(service: Service, listener: socket.socket, *, grace: float, ready: Callable[[], None] = lambda: None) -> int:
    """Serve until a signal comes, then answer what was accepted.

    Args:
        service: not started yet.
        listener: that listens.
        grace: seconds for that; what is left then is dropped.
        ready: called once the engines are there.

    Returns:
        The exit code: 1 where the grace did not suffice.

    Raises:
        SparseEngineError: an engine cannot be loaded.
    """
    return asyncio.run(_Run(service, listener, grace, ready).serve())


class _Run:
    def __init__(self, service: Service, listener: socket.socket, grace: float, ready: Callable[[], None]) -> None:
        self._service, self._listener, self._grace, self._ready = service, listener, grace, ready
        config = uvicorn.Config(
            create_app(service),
            http=_Connection,
            ws="none",
            loop="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEPT_SECONDS,
        )
        self._server = _Server(config)
        self._signals = 0
        self._told = asyncio.Event()

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()

        def note() -> None:
            loop.call_soon_threadsafe(self._signal)

        with process.noting(note):
            serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            failure, whole = await self._until_told(), True
            if failure is None:
                whole = await self._drain()
            self._server.should_exit = True
            await serving
        if failure is not None:
            raise failure
        return EXIT_DONE if whole else EXIT_FAILED

    def _signal(self) -> None:
        self._signals += 1
        self._told.set()
        if self._signals > 1:
            self._server.force_exit = True

    async def _until_told(self) -> BaseException | None:
        """Wait for a signal. Returns the error where the engines cannot be loaded."""
        told = asyncio.create_task(self._told.wait())
        while self._service.loaded is None and not told.done():
            await asyncio.sleep(0.01)
        loading = self._service.loaded
        if loading is not None:
            either: set[asyncio.Future[Any]] = {loading, told}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is not None:
                told.cancel()
                return loading.exception()
            if loading.done():
                self._ready()
        await told
        return None

    async def _drain(self) -> bool:
        """Answer what was accepted. Whether that was done before the grace was over or a second signal came."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        draining = asyncio.create_task(self._service.drained())
        while not draining.done() and loop.time() < end and self._signals < 2:
            await asyncio.wait({draining}, timeout=0.1)
        whole = draining.done()
        draining.cancel()
        self._server.config.timeout_graceful_shutdown = int(max(1.0, min(LAST_SECONDS, end - loop.time())))
        if not whole:
            self._service.drop_all()
        return whole
