"""Two replicas through Ray Serve, where Ray is installed: the same application, the same pictures, and a good end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.serving import FAST, Client, load


@pytest.mark.slow
def test_two_replicas(conditional_engine: Path) -> None:
    pytest.importorskip("ray.serve")
    from socket import create_server

    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparse_engine", "serve", str(conditional_engine), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--no-autotune", "--replicas", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    with process, ThreadPoolExecutor(24) as pool:
        try:
            assert any(line.startswith("serving conditional") for line in process.stderr)
            client = Client(port)
            assert client.get("/health/ready").status == 200
            assert client.draw(n=0).error["param"] == "n"
            asked = [pool.submit(client.draw, seed=k, steps=300) for k in range(24)]
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
            assert process.wait(90) == 0
        finally:
            if process.poll() is None:
                process.kill()
    assert Counter(answer.status for answer in answers) == {200: 24}
    with load(conditional_engine) as engine:
        expected = engine.sample(24, seed=list(range(24)), **FAST | {"steps": 300})
    np.testing.assert_array_equal(np.concatenate([answer.pictures() for answer in answers]), expected)
