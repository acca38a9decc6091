"""A service on a port of this machine, in a thread of the test's process, and a client for it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparse_engine import SparseEngine
from sparse_engine.serve.server import Server, listen
from sparse_engine.serve.service import Service, named
from sparse_engine.serve.settings import Settings

IMAGES = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
FAST: dict[str, Any] = {"steps": 3, "sampler": "dpm-solver++"}


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json()["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return found

    def pictures(self) -> np.ndarray:
        """uint8 [n, H, W, C]."""
        assert self.status == 200, self.body
        return np.stack([picture(base64.b64decode(each["b64_json"])) for each in self.json()["data"]])


def picture(data: bytes) -> np.ndarray:
    """A PNG -> uint8 [H, W, C]."""
    found = np.asarray(Image.open(io.BytesIO(data)))
    return found if found.ndim == 3 else found[..., None]


class Client:
    """Asks a service at a port."""

    def __init__(self, port: int, service: Service | None = None, server: Server | None = None) -> None:
        self.port, self.service, self.server = port, service, server

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def draw(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return self.ask("POST", IMAGES, json.dumps(FAST | fields).encode(), JSON | (headers or {}))

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").body.decode().splitlines() if not line.startswith("#")]
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)


Load = Callable[[Path], SparseEngine]


def load(path: Path) -> SparseEngine:
    """As the tests load: one thread, kernels by a stated rule."""
    return SparseEngine.load(path, threads=1, autotune=False)


@contextmanager
def serving(*paths: Path, load: Load = load, grace: float = 30.0, **settings: Any) -> Iterator[Client]:
    """A service of these engines, ready, for as long as it lasts."""
    service = Service(named(paths), Settings(**settings), load)
    ready = threading.Event()
    listener = listen("127.0.0.1", 0)
    server = Server(service, listener, grace=grace, ready=ready.set)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failures.append(error)
        ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        if failures:
            raise failures[0]
        yield Client(listener.getsockname()[1], service, server)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
