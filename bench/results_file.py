"""Results as files: what was measured, on what, by which command."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_engine.cores import pool_size
from sparse_engine.errors import InputError
from sparse_engine.files import check_readable, parsed_json, replacing
from sparse_engine.tactics import processor_name
from sparse_engine.version import __version__

SCHEMA = "sparse-engine-bench/2"  # docs/bench-results.md describes it
FIRST_SCHEMA = "sparse-engine-bench/1"  # still read
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch")


def describe_run(command: str, threads: int | None) -> dict[str, Any]:
    """Machine, versions, command and commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "schema": SCHEMA,
        "command": command,
        "tool_version": __version__,
        "commit": _commit(),
        "machine": {"processor": processor_name(), "system": platform.system(), "python": platform.python_version()},
        "threads": None if threads is None else pool_size(threads),
        "versions": versions,
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a results file whole or not at all. Raises OutputError."""
    with replacing(path) as stream:
        stream.write((json.dumps(results, indent=1) + "\n").encode())


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file, one of the first schema too. Raises InputError where it is none, or of another schema."""
    check_readable(path, InputError)
    try:
        results = parsed_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no results file: {error}") from error
    found = results.get("schema") if isinstance(results, dict) else None
    if found not in (SCHEMA, FIRST_SCHEMA):
        raise InputError(f"{path} has schema {found!r}; expected {SCHEMA!r}", "run the bench again")
    if found == FIRST_SCHEMA:
        try:
            for row in rows_of(results):
                _upgrade(row, str(results.get("precision")))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged: it lacks what its schema has", "run the bench again") from error
    return dict(results)


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a results file of a grid or a model. Raises InputError where it is none, or of another kind of run."""
    results = read_results(path)
    if results.get("kind") not in ("grid", "model"):
        raise InputError(f"{path} is of a run of the kind {results.get('kind')!r}; expected 'grid' or 'model'")
    problem = _damage(results)
    if problem is not None:
        raise InputError(f"{path} is damaged: {problem}", "run the bench again")
    return results


def _damage(results: dict[str, Any]) -> str | None:
    """What a run of a grid or a model lacks of what is compared; None where it is whole."""
    lacking = [name for name in ("machine", "threads", "precision") if name not in results]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    if not isinstance(results["machine"], dict) or "processor" not in results["machine"]:
        return "its machine has no processor"
    entry = "cells" if results["kind"] == "grid" else "rows"
    if not isinstance(results["precision"], str):
        return "its precision is no name"
    rows = results.get(entry)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return f"it has no list of {entry}"
    broken = [index for index, row in enumerate(rows) if not _is_measured(results, row)]
    return f"{entry}[{broken[0]}] is not what a run writes" if broken else None


def _is_measured(results: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row says what it is of; and, where it was measured, its times and its speed-up in numbers."""
    model = row.get("model") or results.get("model") or {}
    named = ("patch", "mlp_ratio", "batch") if results["kind"] == "grid" else ("batch",)
    if not isinstance(model, dict) or not isinstance(model.get("config", {}), dict):
        return False
    if "milliseconds" not in row:  # a cell that could not be built
        return all(_is_number(row.get(name)) for name in named[:-1])
    times, ratio = row["milliseconds"], row.get("speedup")
    numbers = [row.get(name) for name in named]
    if not isinstance(times, dict) or not isinstance(ratio, dict):
        return False
    if not all(isinstance(found, dict) for found in times.values()):
        return False
    numbers += [ratio.get(name) for name in ("median", "low", "high")]
    numbers += [found.get("median") for found in times.values()]
    return all(_is_number(number) for number in numbers) and all(found["median"] > 0 for found in times.values())


def _is_number(value: Any) -> bool:
    """A number that arithmetic can do without surprises: no truth value, finite, and a float may hold it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured: the cells of a grid, or a model's batches. Cells that could not be built are among them."""
    if results["kind"] == "kernels":
        return []
    rows: list[dict[str, Any]] = results["cells" if results["kind"] == "grid" else "rows"]
    return rows


def place(results: dict[str, Any], row: dict[str, Any]) -> str:
    """Which cell or batch a row is, in words."""
    if results["kind"] == "grid":
        return f"patch {row['patch']}, mlp_ratio {row['mlp_ratio']}"
    return f"batch {row['batch']}"


def _upgrade(row: dict[str, Any], precision: str) -> None:
    """A row of the first schema, whose ``speedup`` was one ratio per candidate and whose dense engine was fp32."""
    row["speedups"] = row["speedup"]
    row["speedup"] = row["speedups"]["dense"]
    row["candidates"] = {
        name: {"precision": "fp32" if name == "dense" else precision, "device": "cpu"} for name in row["milliseconds"]
    }


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None for an installed package, or where there is no git."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "pyproject.toml").is_file() or not shutil.which("git"):
        return None
    done = subprocess.run(
        ["git", "-C", str(checkout), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
