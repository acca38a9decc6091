"""Requests of mixed keys by 16 clients, some of them rude: every picture is right, what the service holds stays flat.

    python tests/soak/serve.py model.sengine --requests 10000

Of a hundred requests five are dropped before their answer, one is malformed, one over the limits; now and then a body
of 10 MB comes, or a client that reads slowly, and 200 connections say nothing. At the end SIGTERM comes under load.
Exit 1 where a picture was wrong, a request went unanswered, or something grew.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from soak import WARM, Held, grown

from sparse_engine import SparseEngine

CLIENTS, IDLE, CHUNK = 16, 200, 400
SEEDS = 24  # that pictures are asked of
LIMIT = 8  # images of a request
HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
MALFORMED = (b"{", b"[1]", b'{"n": "x"}', b'{"steps": 2, "m": 1}', b"\xff" * 50, b'{"seed": -1}', b"[" * 20000)
KEYS = [
    {"steps": steps, "sampler": sampler, "guidance": guidance}
    for steps, sampler, guidance in itertools.product((2, 3, 5), ("ddim", "dpm-solver++", "euler-sde"), (1.0, 2.0))
]


class Client:
    """Asks a service of an engine, and knows what has to come."""

    def __init__(self, engine: Path, port: int) -> None:
        self.port = port
        with SparseEngine.load(engine, threads=1, autotune=False) as loaded:
            self.classes = min(10, loaded.manifest.num_classes - 1)
            labels = [seed % self.classes for seed in range(SEEDS)]
            self.expected = [loaded.sample(SEEDS, seed=list(range(SEEDS)), labels=labels, **key) for key in KEYS]

    def ask(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            headers = {"Content-Type": "application/json"} | (headers or {})
            connection.request("POST", "/v1/images/generations", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def one(self, number: int) -> str:
        """One request of whatever kind; how it ended, "wrong ..." where it should not have."""
        rng = random.Random(number)
        kind = rng.random()
        if kind < 0.05:
            return self.dropped(rng)
        if kind < 0.06:
            return self.refused(rng.choice(MALFORMED), 400)
        if kind < 0.07:
            return self.refused(json.dumps(rng.choice(({"n": LIMIT + 1}, {"steps": 10**6}))).encode(), 400)
        if kind < 0.075:
            return self.refused(b" " * 10_000_000, 413)
        key, seeds, body = self.asked(rng)
        if kind < 0.085:
            return self.slow(key, seeds, body)
        return self.judged(key, seeds, *self.ask(body))

    def asked(self, rng: random.Random) -> tuple[int, list[int], bytes]:
        key, seeds = rng.randrange(len(KEYS)), [rng.randrange(SEEDS) for _ in range(rng.choice((1, 1, 1, 2, 4, LIMIT)))]
        labels = [seed % self.classes for seed in seeds]
        return key, seeds, json.dumps(KEYS[key] | {"n": len(seeds), "seed": seeds, "labels": labels}).encode()

    def judged(self, key: int, seeds: list[int], status: int, answer: bytes) -> str:
        if status == 429:
            return "full"
        if status != 200:
            return f"wrong status {status}"
        for seed, each in zip(seeds, json.loads(answer)["data"], strict=True):
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))))
            if not np.array_equal(found.reshape(self.expected[key][seed].shape), self.expected[key][seed]):
                return f"wrong picture of {KEYS[key]}, seed {seed}"
        return "right"

    def refused(self, body: bytes, expected: int) -> str:
        status, answer = self.ask(body)
        good = status == expected and set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        return "refused" if good else f"wrong refusal {status}"

    def dropped(self, rng: random.Random) -> str:
        _, _, body = self.asked(rng)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(HEAD.format(len(body)).encode() + body[: rng.choice((5, len(body), len(body)))])
            time.sleep(rng.uniform(0, 0.05))
        return "dropped"

    def slow(self, key: int, seeds: list[int], body: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(HEAD.format(len(body)).encode() + body)
            time.sleep(0.5)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            parts = []
            while part := answer.read(256):
                parts.append(part)
                time.sleep(0.002)
        return "slowly " + self.judged(key, seeds, answer.status, b"".join(parts))


def soak(client: Client, process: int, requests: int, seconds: float) -> tuple[Counter[str], Held, Held]:
    """Requests until there are enough or the time is over. Returns how they ended, what was held early and late."""
    ended: Counter[str] = Counter()
    started, early = time.monotonic(), None
    with ThreadPoolExecutor(CLIENTS) as pool:
        for first in range(0, requests, CHUNK):
            idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(IDLE)]
            ended.update(pool.map(client.one, range(first, min(first + CHUNK, requests))))
            for each in idle:
                each.close()
            spent = time.monotonic() - started
            if early is None and (first + CHUNK >= WARM * requests or spent > WARM * seconds):
                early = resting(client, process)
            if spent > seconds:
                break
    return ended, early or resting(client, process), resting(client, process)


def resting(client: Client, process: int) -> Held:
    """What the service holds once nothing is drawn."""
    while re.search(r"^sparse_engine_(queue|in_flight)_images [^0]", client.get("/metrics"), re.M):
        time.sleep(0.1)
    time.sleep(1)
    return Held.now(process)


def end(client: Client, process: subprocess.Popen) -> Counter[str]:
    """SIGTERM under load. Returns how requests ended, and the process."""
    ended: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(number: int) -> None:
        key, seeds, body = client.asked(random.Random(number))
        try:
            status, answer = client.ask(body)
            how = "not accepted" if status == 503 else client.judged(key, seeds, status, answer)
        except ConnectionRefusedError:
            how = "not accepted"
        except (OSError, http.client.HTTPException) as error:
            how = f"lost: {type(error).__name__}"
        with lock:
            ended[how] += 1

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
    for number, each in enumerate(asking):
        each.start()
        if number == 100:
            process.send_signal(signal.SIGTERM)
    for each in asking:
        each.join()
    ended[f"exit code {process.wait(60)}"] += 1
    return ended


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Stop after so many.")
    given = parser.parse_args()
    options = ["--port", "0", "--no-autotune", "--threads", "1", "--max-images", str(LIMIT)]
    command = [sys.executable, "-m", "sparse_engine", "serve", str(given.engine), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving"))
        client = Client(given.engine, int(line.rpartition(":")[2]))
        started = time.monotonic()
        ended, early, late = soak(client, process.pid, given.requests, given.seconds)
        spent = time.monotonic() - started
        last = end(client, process)
    print(
        f"{ended.total()} requests in {spent:.0f} s: {dict(ended)}\nearly {early}\nlate  {late}\nSIGTERM: {dict(last)}"
    )
    found = grown(early, late)
    found += [how for how in (*ended, *last) if "wrong" in how or how.startswith("lost") or "exit code 1" in how]
    print("; ".join(found) if found else "flat, and every answer right")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
