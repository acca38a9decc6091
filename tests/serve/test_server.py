"""From loading to draining: health, signals, slow and idle clients, and what the command says where it cannot serve."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.cli import serve
from sparse_engine.cli.main import run
from sparse_engine.serve import server
from tests.serving import FAST, IMAGES, Client, load, serving


@contextmanager
def command(engine: Path, *options: str) -> Iterator[tuple[subprocess.Popen, Client]]:
    """``sparse-engine serve`` in a process of its own, once it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-m", "sparse_engine", "serve", str(engine), "--port", "0", "--no-autotune", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert started.stderr is not None
    try:
        for line in started.stderr:
            found = re.fullmatch(r"serving \w+ on http://127\.0\.0\.1:(\d+)\n", line)
            if found:
                break
        else:
            raise AssertionError("it ended without serving")
        yield started, Client(int(found[1]))
    finally:
        if started.poll() is None:
            started.kill()
        started.stderr.close()
        started.wait()


def test_health_and_models(client: Client) -> None:
    health = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
    for path in (*health, "/v2/models/conditional/ready"):
        assert client.get(path).status == 200, path
    assert client.get("/v2/models/other/ready").status == 404
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    model = listed["data"][0]
    assert (model["id"], model["object"], model["size"]) == ("conditional", "model", "8x8")
    assert model["classes"] == [0, 1, 2, 3]
    assert sum(model["kernels"].values()) > 10
    assert client.get("/v1/models/conditional").json()["id"] == "conditional"


def test_metrics_are_counted(client: Client) -> None:
    before = client.metric("sparse_engine_images_total")
    client.draw(n=3)
    client.draw(n=0)
    assert client.metric("sparse_engine_images_total") == before + 3
    text = client.get("/metrics").body.decode()
    assert 'sparse_engine_requests_total{code="400"}' in text
    assert 'sparse_engine_build_info{backend="onnxruntime",engine="conditional",version="' in text
    for name in ("request_duration_seconds", "queue_duration_seconds", "step_duration_seconds", "batch_images"):
        assert f"sparse_engine_{name}_bucket" in text


def test_while_engines_load_it_is_live_and_not_ready(conditional_engine: Path) -> None:
    go, found = threading.Event(), []

    def slow(path: Path) -> SparseEngine:
        go.wait(30)
        return load(path)

    def ask(port: int) -> None:
        client = Client(port)
        found.extend([client.get("/health/live"), client.get("/health/ready"), client.draw(), client.get("/metrics")])
        go.set()

    listen = server.listen

    def listening(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        threading.Thread(target=ask, args=(listener.getsockname()[1],)).start()
        return listener

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.serving.listen", listening)
        with serving(conditional_engine, load=slow) as client:
            assert client.get("/health/ready").status == 200
    assert [each.status for each in found] == [200, 503, 503, 200]
    assert (found[2].error["code"], found[2].headers["retry-after"]) == ("loading", "5")


def test_sigterm_loses_no_accepted_request(conditional_engine: Path) -> None:
    with command(conditional_engine, "--max-batch", "4") as (process, client), ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(client.draw, seed=k, steps=300) for k in range(24)]
        while client.metric("sparse_engine_queue_images") < 16:
            time.sleep(0.01)
        kept = socket.create_connection(("127.0.0.1", client.port))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert client.get("/health/ready").status == 503
        late = client.draw(seed=1)
        assert (late.status, late.error["code"]) == (503, "shutting_down")
        answers = [each.result() for each in asked]
        assert process.wait(30) == 0
        kept.close()
    assert Counter(answer.status for answer in answers) == {200: 24}
    with load(conditional_engine) as engine:
        expected = engine.sample(24, seed=list(range(24)), **FAST | {"steps": 300})
    np.testing.assert_array_equal(np.concatenate([answer.pictures() for answer in answers]), expected)


@pytest.mark.parametrize("how", ["grace", "twice"])
def test_what_does_not_fit_into_the_grace_is_told_so(conditional_engine: Path, how: str) -> None:
    grace = "0.5" if how == "grace" else "60"
    with command(conditional_engine, "--grace", grace) as (process, client), ThreadPoolExecutor(2) as pool:
        asked = pool.submit(client.draw, n=64, steps=1000)
        while not client.metric("sparse_engine_in_flight_images"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        if how == "twice":
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
        else:
            assert asked.result().error["code"] == "shutting_down"
        assert process.wait(20) == 1
        asked.exception()


def test_an_idle_service_ends_at_once(conditional_engine: Path) -> None:
    with command(conditional_engine) as (process, client):
        assert client.get("/").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_slow_readers_and_idle_connections_hold_nobody_up(
    conditional_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "IDLE_SECONDS", 1.0)
    with serving(conditional_engine, queue_images=2000) as client:
        idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(200)]
        half = socket.create_connection(("127.0.0.1", client.port))
        half.sendall(b"POST / HTTP/1.1\r\nHost:")
        body = json.dumps(FAST | {"n": 64}).encode()
        head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        slow = []
        for _ in range(8):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect(("127.0.0.1", client.port))
            reader.sendall(head.encode() + body)
            slow.append(reader)
        for k in range(20):
            assert client.draw(seed=k).status == 200
        for each in [*idle, half]:
            each.settimeout(10)
            assert each.recv(10) == b""  # closed
            each.close()
        for reader in slow:
            reader.settimeout(10)
            assert reader.recv(15) == b"HTTP/1.1 200 OK"
            reader.close()


def test_the_service_gives_everything_back(conditional_engine: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    for attempt in range(3):
        with serving(conditional_engine) as client:
            client.draw(n=2)
        if attempt == 0:
            before = held()
    wait = time.monotonic() + 10  # a thread that has ended is listed a moment longer
    while any(late > early for late, early in zip(held(), before, strict=True)):
        assert time.monotonic() < wait, (before, held())
        time.sleep(0.05)


def test_an_answer_does_not_wait_for_an_acknowledgement() -> None:
    with server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "arguments, words, fix",
    [
        (["none.sengine"], "none.sengine does not exist", ""),
        (["{engine}", "{engine}"], "would both be served as conditional", "rename one"),
        (["{engine}", "--max-batch", "65"], "built for at most 64", "lower --max-batch"),
        (["{engine}", "--batch-sizes", "1,x"], "expected whole numbers", "1,4,16"),
        (["{engine}", "--queue-images", "8"], "would always be refused", "raise --queue-images"),
        (["{engine}", "--deadline", "0"], "expected a number above 0", ""),
        (["{engine}", "--api-key", "ö"], "api_key is empty, or holds", "printable"),
        (["{engine}", "--cluster", "auto"], "--cluster is given without --replicas", "--replicas N"),
        (["{engine}", "--host", "no.such.host.invalid"], "--host no.such.host.invalid", "listen elsewhere"),
    ],
)
def test_what_cannot_be_served_is_said(
    arguments: list[str], words: str, fix: str, conditional_engine: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [each.format(engine=conditional_engine) for each in arguments]
    assert run(["serve", "--port", "0", "--no-autotune", "--threads", "1", *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert fix in said
    assert "Traceback" not in said


def test_a_port_that_is_taken(client: Client, conditional_engine: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["serve", str(conditional_engine), "--port", str(client.port)]) == 2
    assert "in use" in capsys.readouterr().err


def test_what_is_missing_is_named(
    conditional_engine: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(serve, "import_module", absent)
    for package, extra in (("fastapi", "serve"), ("ray", "replicas")):
        assert run(["serve", str(conditional_engine)]) == 2
        assert f"serving needs {package}" in (said := capsys.readouterr().err)
        assert f"pip install 'sparse-engine[{extra}]'" in said


def test_only_this_machine_is_listened_to_unless_asked(client: Client) -> None:
    assert serve._is_local("127.0.0.1")
    assert serve._is_local("::1")
    assert serve._is_local("localhost")
    assert not serve._is_local("0.0.0.0")
    assert inspect.signature(serve.command).parameters["host"].default == "127.0.0.1"
