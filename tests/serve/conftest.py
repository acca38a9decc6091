"""A service that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Client, serving


@pytest.fixture(scope="module")
def client(conditional_engine: Path) -> Iterator[Client]:
    with serving(conditional_engine, max_batch=8, max_wait=0.01) as found:
        yield found
