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


class _Uvicorn(uvicorn.Server):
    """Signals are ours: ``process.noting`` has them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded. Raises OptionError."""
    try:
        listener = socket.create_server((host, port), family=_family(host), backlog=2048)
        # Accepted connections have it too. asyncio sets it for sockets of its own alone, and an answer's body would
        # wait for the acknowledgement of its head: 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"--host {host} --port {port}: {words}", "free the port, or listen elsewhere") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Server:
    """A service behind a socket, from loading to draining.

    Args:
        service: not started yet.
        listener: that listens.
        grace: seconds to answer what was accepted, once it is to stop; what is left then is dropped.
        ready: called once the engines are there.
    """

    def __init__(
        self,
        service: Service,
        listener: socket.socket,
        *,
        grace: float = 30.0,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
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
        self._uvicorn = _Uvicorn(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked = 0  # times that it was asked to stop

    def run(self) -> int:
        """Serve until it is to stop: by ``stop``, or where this is the main thread by a signal.

        Returns:
            The exit code: 1 where the grace did not suffice, or it was told twice.

        Raises:
            SparseEngineError: an engine cannot be loaded.
        """
        with process.noting(self.stop):
            return asyncio.run(self._serve())

    def stop(self) -> None:
        """Answer what was accepted, and end; a second time: end. From any thread, or a signal's handler."""
        self._asked += 1
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._stopped.set()
        self._uvicorn.force_exit = self._asked > 1

    async def _serve(self) -> int:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        if self._asked:
            self._wake()
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._listener]))
        try:
            failure, whole = await self._until_stopped(), True
            if failure is None:
                whole = await self._drain()
        finally:
            self._uvicorn.should_exit = True
            await serving
            self._loop = None
        if failure is not None:
            raise failure
        return EXIT_DONE if whole else EXIT_FAILED

    async def _until_stopped(self) -> BaseException | None:
        """Returns the error where the engines cannot be loaded."""
        stopped = asyncio.create_task(self._stopped.wait())
        while self._service.loaded is None and not stopped.done():
            await asyncio.sleep(0.01)
        loading = self._service.loaded
        if loading is not None:
            either: set[asyncio.Future[Any]] = {loading, stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if loading.done() and loading.exception() is not None:
                stopped.cancel()
                return loading.exception()
            if loading.done():
                self._ready()
        await stopped
        return None

    async def _drain(self) -> bool:
        """Answer what was accepted. Whether that was done before the grace was over or a second signal came."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        draining = asyncio.create_task(self._service.drained())
        while not draining.done() and loop.time() < end and self._asked < 2:
            await asyncio.wait({draining}, timeout=0.1)
        whole = draining.done()
        draining.cancel()
        self._uvicorn.config.timeout_graceful_shutdown = max(1, int(end - loop.time()))  # for answers to be sent
        if not whole:
            self._service.drop_all()
        return whole
