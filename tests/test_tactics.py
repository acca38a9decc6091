"""Choices by timing, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_engine.tactics import CACHE_VARIABLE, TacticCache


def test_what_another_engine_has_stored_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first, second = TacticCache(device="x"), TacticCache(device="x")
    for cache, key in ((first, "a"), (second, "b")):
        cache.choose(key, lambda: {"only": lambda: None})

    def never() -> dict[str, object]:
        raise AssertionError("it is remembered")

    for key in ("a", "b"):
        assert TacticCache(device="x").choose(key, never).kernel == "only"  # type: ignore[arg-type]
