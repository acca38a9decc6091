"""Memory of an engine in a process of its own."""

from pathlib import Path

from sparse_engine.bench.memory import available_bytes, peak_memory


def test_peak_of_an_engine(tiny_engine: Path, tmp_path: Path) -> None:
    found = peak_memory({"small": tiny_engine, "missing": tmp_path / "no.sengine"}, 2, 1)
    assert found.keys() == {"small"}
    assert 0 < found["small"]["host"] < 200


def test_memory_that_is_left() -> None:
    left = available_bytes()
    assert left is not None
    assert 2**20 < left < 2**50
