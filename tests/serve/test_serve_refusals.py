"""What is refused, by which status and in which words; nothing that fails takes the service with it."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_engine import SparseEngine
from sparse_engine.errors import BackendError
from sparse_engine.serve import guard
from sparse_engine.serve.asked import ImageRequest
from tests.serving import FAST, IMAGES, JSON, Client, load, serving

DEEP = b"[" * 30_000 + b"]" * 30_000


@pytest.mark.parametrize(
    "fields, param, words",
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "at most 64"),
        ({"n": "2"}, "n", "valid integer"),
        ({"n": 2.0}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"steps": 1001}, "steps", "at most 1000"),
        ({"steps": 10**400}, "steps", ""),
        ({"sampler": "plms"}, "sampler", "expected one of"),
        ({"labels": 5}, "labels", "label 5 is out of range"),
        ({"labels": [0, 1]}, "labels", "expected one label or 1 of them"),
        ({"labels": "x"}, "labels", "valid"),
        ({"seed": -1}, "seed", "0 to 2"),
        ({"seed": 2**64}, "seed", "0 to 2"),
        ({"seed": [1, 2]}, "seed", "2 seeds for 1 images"),
        ({"seed": 1.5}, "seed", "valid"),
        ({"first": 2**32 - 1, "n": 2}, "first", "within the"),
        ({"guidance": 1e300}, "guidance", "finite"),
        ({"options": {"eta": [1]}}, "options", "neither a number"),
        ({"options": {"beta": 1}}, "options", "beta is none of them"),
        ({"options": {"self": 1}}, "options", "self is none of them"),
        ({"options": {"steps": 1}}, "options", "steps is none of them"),
        ({"options": {"eta": "x"}, "sampler": "ddim"}, None, "eta"),
        ({"sampler": "ddim", "options": {"clip": 1}}, None, "True or False"),
        ({"prompt": "a cat"}, "prompt", "prompt is given, but the model"),
        ({"conditioning": {"z": 1}}, "conditioning", "it is told y"),
        ({"model": "other"}, "model", "expected one of conditional"),
        ({"size": "16x16"}, "size", "draws 8x8"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"output_format": "webp"}, "output_format", "png"),
        ({"step": 10}, "step", "no such field"),
        ({"k" * 5000: 1}, "k" * 200, "no such field"),
    ],
)
def test_fields(client: Client, fields: dict[str, Any], param: str | None, words: str) -> None:
    answer = client.draw(**fields)
    assert answer.status == (404 if "model" in fields else 400)
    assert (answer.error["type"], answer.error["param"]) == (
        "not_found_error" if "model" in fields else "invalid_request_error",
        param,
    )
    assert words in answer.error["message"]
    assert len(answer.body) < 1000
    assert "/" + "tmp" not in answer.error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b'{"n": 1', b"\xff\xfe", DEEP, b'{"n": NaN}', b'{"n": 1}x']
)
def test_bodies_that_are_no_request(client: Client, body: bytes) -> None:
    answer = client.ask("POST", IMAGES, body, JSON)
    assert answer.status == 400, answer.body
    assert answer.error["code"] in ("invalid_json", "invalid_value")


def test_a_key_of_true_is_not_one_of_1(client: Client) -> None:
    good = client.draw(sampler="ddim", options={"clip": True})
    assert good.status == 200
    assert client.draw(sampler="ddim", options={"clip": 1}).status == 400


@pytest.mark.parametrize(
    "method, path, status",
    [("GET", "/v1/nothing", 404), ("GET", IMAGES, 405), ("POST", "/v1/models", 405), ("GET", "/v1/models/other", 404)],
)
def test_routes(client: Client, method: str, path: str, status: int) -> None:
    answer = client.ask(method, path, b"{}" if method == "POST" else None, JSON)
    assert (answer.status, answer.error["type"] != "") == (status, True)


def test_a_page_of_another_site_cannot_ask_without_being_asked(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.ask("POST", IMAGES, b"{}", {"Content-Type": kind})
        assert (answer.status, answer.error["code"]) == (415, "not_json")
    preflight = client.ask("OPTIONS", IMAGES, headers={"Origin": "http://x", "Access-Control-Request-Method": "POST"})
    assert preflight.status == 405
    assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_ten_megabytes(client: Client, chunked: bool) -> None:
    body: Any = b"x" * 10_000_000
    answer = client.ask("POST", IMAGES, iter([body]) if chunked else body, JSON)  # type: ignore[arg-type]
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert client.draw(seed=1).status == 200


def test_a_body_that_does_not_come(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", client.port)) as slow:
        slow.sendall(f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_one_image_only_as_bytes(client: Client) -> None:
    assert client.draw({"Accept": "image/png"}, n=2).error["param"] == "n"


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "x"])
def test_deadlines_that_are_none(client: Client, seconds: str) -> None:
    assert client.draw({"X-Deadline-Seconds": seconds}).error["param"] == "x-deadline-seconds"


def test_a_deadline(client: Client) -> None:
    started = time.monotonic()
    answer = client.draw({"X-Deadline-Seconds": "0.2"}, n=64, steps=1000)
    assert (answer.status, answer.error["code"]) == (504, "deadline")
    assert time.monotonic() - started < 5
    assert client.draw(seed=1).status == 200  # what was begun for it has stopped


def test_a_key(conditional_engine: Path) -> None:
    with serving(conditional_engine, api_key="secret") as client:
        for given in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            for answer in (client.draw(given), client.ask("GET", "/v1/models", None, given)):
                assert (answer.status, answer.error["type"]) == (401, "authentication_error")
            assert client.ask("GET", "/metrics", headers=given).status == 401
        assert client.draw({"Authorization": "Bearer secret"}).status == 200
        assert client.get("/health/ready").status == 200
        assert "secret" not in repr(client.service.settings)  # type: ignore[union-attr]


def test_a_full_queue(conditional_engine: Path) -> None:
    with serving(conditional_engine, max_images=4, queue_images=4, max_batch=1, max_steps=20_000) as client:
        busy = [_begin(client, n=4, steps=20_000) for _ in range(2)]
        time.sleep(0.3)
        answer = client.draw(n=4)
        assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        for each in busy:
            each.close()
        time.sleep(0.3)
        assert client.draw(n=4).status == 200  # those that have gone make room
        assert client.metric("sparse_engine_queue_images") == client.metric("sparse_engine_in_flight_images") == 0
        assert 'requests_total{code="499"}' in client.get("/metrics").body.decode()


def test_a_queue_of_too_many_seconds(conditional_engine: Path) -> None:
    with serving(conditional_engine, queue_seconds=1e-6) as client:
        assert client.draw(n=4).status == 200  # of a request by itself nothing is said
        with _begin(client, n=64, steps=1000):
            time.sleep(0.3)
            answer = client.draw()
            assert answer.status == 429
            assert "s of work wait" in answer.error["message"]


def test_an_engine_that_fails_says_so_without_its_paths(conditional_engine: Path) -> None:
    def failing(path: Path) -> SparseEngine:
        engine, calls = load(path), []
        drawn = engine.sample

        def sample(n: int, **options: Any) -> np.ndarray:
            calls.append(n)
            if len(calls) > 2:  # those that warm it up
                raise BackendError(f"{path}: no", "look")
            return drawn(n, **options)

        engine.sample = sample  # type: ignore[method-assign]
        return engine

    with serving(conditional_engine, load=failing) as client:
        answer = client.draw()
        assert (answer.status, answer.error["code"]) == (500, "engine_failed")
        assert str(conditional_engine) not in answer.body.decode()
        assert client.get("/health/live").status == 200


def test_what_nobody_foresaw_is_no_traceback(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(asked: Any) -> None:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(client.service, "job", broken)
    answer = client.draw()
    assert (answer.status, answer.error["code"]) == (500, "engine_failed")
    assert b"secret" not in answer.body


def _begin(client: Client, **fields: Any) -> socket.socket:
    """Ask, and wait for nothing."""
    body = json.dumps(FAST | fields).encode()
    connection = socket.create_connection(("127.0.0.1", client.port))
    head = f"POST {IMAGES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


VALUES: list[Any] = [
    *(
        None,
        True,
        0,
        1,
        -1,
        2**32,
        2**64,
        10**30,
        0.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "1",
        "\0",
        "é" * 100,
    ),
    *([], [1], [0, 1], ["a"], [None], [[1]], {}, {"": 1}, {"self": 1}, {"steps": 3}, {"eta": 0.5}, {"order": 2}),
    *(
        {"y": 1},
        {"y": [1, 2]},
        {"y": "a"},
        {"y": {}},
        {"t_start": 0.1},
        {"t_start": None},
        {"spacing": "x"},
        {"clip": 1},
    ),
]


@pytest.mark.parametrize("field", ImageRequest.model_fields)
def test_any_value_of_any_field_is_taken_or_refused(client: Client, field: str) -> None:
    for value in VALUES:
        answer = client.draw(**{field: value})
        assert answer.status in (200, 400, 404), (value, answer.body)
