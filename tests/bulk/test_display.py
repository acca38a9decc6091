"""What a person sees while it runs."""

import time

import pytest

from sparse_engine.bulk import Progress
from sparse_engine.cli import sample_many


@pytest.mark.parametrize(
    "progress, said",
    [
        (Progress(0, 50_000, None, None, 0, 0), ""),
        (Progress(500, 50_000, 83.14, 595.4, 2, 0), "83.1 images/s by 2 workers, 9 min 55 s left"),
        (Progress(500, 50_000, 2012.0, 24.6, 1, 3), "2012 images/s by 1 worker (3 replaced), 25 s left"),
        (Progress(500, 50_000, 0.5, 99_000, 1, 0), "0.5 images/s by 1 worker, 27 h 30 min left"),
    ],
)
def test_pace(progress: Progress, said: str) -> None:
    assert sample_many._pace(progress) == said


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = sample_many._Lines()
    for second in range(65):
        now[0] = 100.0 + second
        lines(Progress(10 * second, 50_000, 10.0, 60.0, 2, 0))
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{done} of 50000 images, 10 images/s by 2 workers, 1 min 0 s left" for done in (300, 600)]
