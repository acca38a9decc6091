"""What docs/serving.md says of options, files, metrics and numbers; its commands run with those of all pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import yaml

from sparse_engine.bench.serving import table
from sparse_engine.cli.serve import command
from tests.serving import Client

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "serving.md").read_text()
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


def test_options_are_there() -> None:
    names = {f"--{name.replace('_', '-')}" for name in command.__annotations__}
    for option in re.findall(r"`(?:sparse-engine serve [^`]*?)?(--[a-z-]+)", PAGE):
        assert option in names | {"--cpus"}, option


def test_metrics_are_there(client: Client) -> None:
    found = client.get("/metrics").body.decode()
    table = PAGE.partition("## Metrics")[2].partition("##")[0]
    names = re.findall(r"`([a-z_]+)(?:{[a-z,]+})?`", table)
    assert len(names) == 10
    for name in names:
        assert f"# TYPE sparse_engine_{name}" in found, name


def test_compose_and_kubernetes_fit_the_image() -> None:
    service = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]["sparse-engine"]
    default = json.loads(re.findall(r"^CMD (.*)", DOCKERFILE, re.M)[-1])
    assert service["command"] == default
    port = re.findall(r"^EXPOSE (\d+)", DOCKERFILE, re.M)[0]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert "cache:/home/engine/.cache" in service["volumes"]
    pod = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[0])
    probes = [pod["containers"][0][f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {each["port"] for each in probes} == {int(port)}
    assert {each["path"] for each in probes} == {"/health/live", "/health/ready"}
    assert pod["terminationGracePeriodSeconds"] > 30 + 5


def test_numbers_are_those_of_the_results_file() -> None:
    results = json.loads((REPOSITORY / "bench" / "results" / "serving.json").read_text())
    assert table(results) in PAGE
    for each in results["engines"]:
        assert max(each["lone"]["overhead_ms"]) <= 5
        assert all(turn["p99_of_two_batches"] <= 2 for turn in each["many"]["turns"])
    assert min(turn["ratio"] for turn in results["engines"][0]["many"]["turns"]) >= 0.9


def test_a_small_run_of_the_bench(conditional_engine: Path) -> None:
    command = [sys.executable, "-m", "sparse_engine.bench.serving", conditional_engine, "--steps", "2"]
    small = ["--turns", "1", "--alone", "3", "--clients", "4", "--each", "2"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| 4 clients: images/s |" in table({"engines": [json.loads(done.stdout)]})
