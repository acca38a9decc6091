"""docs/bulk.md: the options that it names are the command's. What it shows is run by tests/test_docs.py."""

import inspect
import re
from pathlib import Path

from sparse_engine.bulk import FORMATS
from sparse_engine.cli import sample_many

PAGE = (Path(__file__).parents[2] / "docs" / "bulk.md").read_text()


def test_options_and_formats_of_the_page_are_there() -> None:
    source = Path(sample_many.__file__).read_text() + str(inspect.signature(sample_many.command))
    ours = re.sub(r"#SBATCH.*|`python [^`]*`", "", PAGE)
    named = set(re.findall(r"--([a-z][a-z-]+)", ours)) - {"sparse"}
    assert {"workers", "cluster", "shard", "labels", "mixed-machines", "steal-lock", "timeout"} <= named
    for option in named:
        assert re.search(rf"\b{option.replace('-', '_')}: |--{option}\b", source), option
    for format in FORMATS:
        assert f"| `{format}` |" in PAGE
