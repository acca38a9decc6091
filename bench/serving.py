"""What a service costs over ``engine.sample``: one lone client, and many at once.

    python -m sparse_engine.bench.serving model.sengine --steps 2 --clients 64 -o result.json

The service runs in a process of its own on one thread; the clients are in this one, kept to one core, as is the engine
that the service is compared with, which draws while the service rests. Both take turns; ratios are of turns that follow
each other.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_engine import SparseEngine, __version__
from sparse_engine.files import replacing

HEADERS = {"Content-Type": "application/json"}


@contextlib.contextmanager
def service(engine: Path) -> Iterator[int]:
    """``sparse-engine serve`` on one thread, with room for many clients; its port."""
    options = [
        "--port",
        "0",
        "--threads",
        "1",
        "--no-autotune",
        "--queue-images",
        "100000",
        "--queue-seconds",
        "100000",
    ]
    command = [sys.executable, "-m", "sparse_engine", "serve", str(engine), *options, "--deadline", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if line.startswith("serving"):
                    yield int(line.rpartition(":")[2])
                    break
        finally:
            process.terminate()


def client(port: int, count: int, steps: int, seed: int, spent: list[float]) -> None:
    """Ask ``count`` times, one after the other, over one connection; adds the seconds that each took."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100_000)
    for number in range(count):
        body = json.dumps({"steps": steps, "seed": seed, "first": number})
        started = time.perf_counter()
        connection.request("POST", "/v1/images/generations", body, HEADERS)
        answer = connection.getresponse()
        found = answer.read()
        spent.append(time.perf_counter() - started)
        if answer.status != 200:
            raise RuntimeError(found.decode())
    connection.close()


def lone(port: int, engine: SparseEngine, steps: int, turns: int, count: int) -> dict[str, Any]:
    """One client at a time against ``sample(1)``: medians of the turns, in milliseconds."""
    asked, drawn = [], []
    for turn in range(turns):
        spent: list[float] = []
        client(port, count, steps, turn, spent)
        asked.append(1e3 * statistics.median(spent))
        spent = []
        for number in range(count):
            started = time.perf_counter()
            engine.sample(1, steps=steps, seed=turn, first=number)
            spent.append(time.perf_counter() - started)
        drawn.append(1e3 * statistics.median(spent))
    overheads = [a - b for a, b in zip(asked, drawn, strict=True)]
    return {"service_ms": asked, "sample_ms": drawn, "overhead_ms": overheads}


def many(port: int, engine: SparseEngine, steps: int, turns: int, clients: int, each: int) -> dict[str, Any]:
    """``clients`` at once, each asking ``each`` times, against ``sample`` in the usual batch, and in the service's."""
    size, full = engine.manifest.batch[1], largest(port)
    rows = []
    for turn in range(turns):
        spent: list[float] = []
        asking = [
            threading.Thread(target=client, args=(port, each, steps, 1000 * turn + number, spent))
            for number in range(clients)
        ]
        started = time.perf_counter()
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        seconds = time.perf_counter() - started
        began = time.perf_counter()
        batches = max(2, clients * each // size // 4)
        engine.sample(batches * size, steps=steps, seed=turn)
        drawn = batches * size / (time.perf_counter() - began)
        began = time.perf_counter()
        engine.sample(full, steps=steps, seed=turn, batch_size=full)
        batch = time.perf_counter() - began
        spent.sort()
        served = len(spent) / seconds
        p50, p99 = spent[len(spent) // 2], spent[int(0.99 * len(spent))]
        rows.append({"images_per_second": served, "sample_images_per_second": drawn, "ratio": served / drawn})
        rows[-1] |= {"p50": p50, "p99": p99, "full_batch_seconds": batch, "p99_of_two_batches": p99 / (2 * batch)}
    return {"clients": clients, "requests_of_each": each, "batch": size, "full_batch": full, "turns": rows}


def largest(port: int) -> int:
    """Images that the service draws together."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        return int(json.load(answer)["data"][0]["max_batch"])


def measure(engine: Path, steps: int, turns: int, alone: int, clients: int, each: int) -> dict[str, Any]:
    """Everything that is published of a service of this engine."""
    with service(engine) as port:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # after the service, which may go where it likes
        with SparseEngine.load(engine, threads=1, autotune=False) as loaded:
            client(port, 5, steps, 0, [])
            loaded.sample(loaded.manifest.batch[1], steps=steps)
            result = {
                "engine": engine.stem,
                "family": loaded.manifest.family,
                "steps": steps,
                "threads": 1,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "sparse_engine": __version__,
                "load_average_before": os.getloadavg()[0],
            }
            result["lone"] = lone(port, loaded, steps, turns, alone)
            result["many"] = many(port, loaded, steps, turns, clients, each)
    return result


def table(results: dict[str, Any]) -> str:
    """The rows that docs/serving.md shows of a file of results: medians of the turns, and their range."""
    engines = results["engines"]
    full = engines[0]["many"]["full_batch"]
    clients = engines[0]["many"]["clients"]

    def row(name: str, *cells: str) -> str:
        return " | ".join([f"| {name}", *cells]) + " |"

    def of_turns(engine: dict[str, Any], name: str, form: str) -> str:
        return _range([turn[name] for turn in engine["many"]["turns"]], form)

    return "\n".join(
        [
            row("", *(each["engine"] for each in engines)),
            "|---" * (1 + len(engines)) + "|",
            row(
                "a lone request takes longer than `sample(1)` by",
                *(_range(each["lone"]["overhead_ms"], ".1f") + " ms" for each in engines),
            ),
            row(f"{clients} clients: images/s", *(of_turns(each, "images_per_second", ".3g") for each in engines)),
            row("beside `sample` in its usual batch", *(of_turns(each, "ratio", ".2f") + "x" for each in engines)),
            row("99 % of the requests within, s", *(of_turns(each, "p99", ".2f") for each in engines)),
            row(
                f"beside two batches of {full}",
                *(of_turns(each, "p99_of_two_batches", ".2f") + "x" for each in engines),
            ),
        ]
    )


def _range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--alone", type=int, default=60, help="Requests of the lone client in a turn.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=4, help="Requests of each client in a turn.")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    result = measure(given.engine, given.steps, given.turns, given.alone, given.clients, given.each)
    text = json.dumps(result, indent=1) + "\n"
    if given.output:
        with replacing(given.output) as stream:
            stream.write(text.encode())
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
