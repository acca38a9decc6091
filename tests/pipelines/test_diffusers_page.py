"""What docs/diffusers.md says of the pipelines; that its code runs, tests/test_docs.py shows."""

from __future__ import annotations

import re
from pathlib import Path

from tests.pipelines.pipeline_cases import CASES

PAGE = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()


def test_the_pipelines_of_the_page_are_those_that_are_tested() -> None:
    table = re.search(r"\| pipeline \|.*?\n\n", PAGE, re.S)
    assert table is not None
    rows = [line.split("|")[1:4] for line in table[0].strip().splitlines()[2:]]
    for name, case in CASES.items():
        short = name.removeprefix("StableDiffusion") or name
        row = next(row for row in rows if name in row[0] or short in row[0].split("its")[-1])
        kind = type(case.network()).__name__
        assert kind in row[1]
        assert all(scheduler in row[2] or "their own" in row[2] for scheduler in case.schedulers)
