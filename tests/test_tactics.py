"""Choices by timing, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_engine.tactics import CACHE_VARIABLE, TacticCache, cache_folder


def test_what_another_engine_has_stored_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first, second = TacticCache(device="x"), TacticCache(device="x")
    for cache, key in ((first, "a"), (second, "b")):
        cache.choose(key, lambda: {"only": lambda: None})

    def never() -> dict[str, object]:
        raise AssertionError("it is remembered")

    for key in ("a", "b"):
        assert TacticCache(device="x").choose(key, never).kernel == "only"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "own, shared, expected",
    [
        ("~/x", None, "home/x"),
        ("own", "/shared", "own"),
        ("", "/shared", "/shared/sparse-engine"),
        (None, "shared", "home/.cache/sparse-engine"),
        (None, "~/shared", "home/.cache/sparse-engine"),
        (None, "", "home/.cache/sparse-engine"),
        (None, None, "home/.cache/sparse-engine"),
    ],
)
def test_the_cache_folder_is_where_the_variables_say(
    own: str | None, shared: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in ((CACHE_VARIABLE, own), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == (tmp_path / expected if expected.startswith("home") else Path(expected))


def test_choices_are_made_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "~no-such-user/x")
    assert TacticCache(device="x").choose("a", lambda: {"only": lambda: None}).kernel == "only"
