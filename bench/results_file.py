"""Results as files: what was measured, on what, by which command."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_engine import __version__
from sparse_engine.cores import pool_size
from sparse_engine.errors import InputError
from sparse_engine.files import check_readable, parsed_json, replacing
from sparse_engine.tactics import processor_name

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
        for row in rows_of(results):
            _upgrade(row, str(results.get("precision")))
    return dict(results)


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a results file of a grid or a model. Raises InputError where it is none, or of another kind of run."""
    results = read_results(path)
    if results.get("kind") not in ("grid", "model"):
        raise InputError(f"{path} is of a run of the kind {results.get('kind')!r}; expected 'grid' or 'model'")
    return results


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
