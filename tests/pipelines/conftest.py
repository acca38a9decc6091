"""Engines of the small networks, one of each family, built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.pipelines.pipeline_cases import CASES, Built, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Built]]:
    """A case's network and engine, by the case's name."""
    made: dict[str, Built] = {}

    def of(name: str) -> Built:
        case = CASES[name]
        if case.family not in made:
            made[case.family] = build(case, tmp_path_factory.mktemp(case.family))
        return made[case.family]

    yield of
    for each in made.values():
        each.engine.close()
