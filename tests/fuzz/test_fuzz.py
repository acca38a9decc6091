"""Two thousand damaged files: each is read well or refused by an error of ours."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import run


def test_damaged_files_end_well_or_in_an_error_of_ours() -> None:
    counted, findings = run.fuzz(run.names(2000), workers=2)
    assert findings == []
    assert counted.total() == 2000
    assert counted["ok"] > 50
    assert counted["error"] > 1000
