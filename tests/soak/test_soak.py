"""Half a minute of loads and samples at most, in a process of its own: what it holds stays flat."""

import subprocess
import sys
from pathlib import Path


def test_what_a_process_holds_stays_flat(conditional_engine: Path) -> None:
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, script, conditional_engine, "--seconds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for ending in ("drawn", "cancelled", "closed"):
        assert ending in done.stdout


def test_what_a_service_holds_stays_flat_and_every_answer_is_right(conditional_engine: Path) -> None:
    script = Path(__file__).with_name("serve.py")
    command = [sys.executable, script, conditional_engine, "--seconds", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    for ending in ("right", "slowly right", "dropped", "refused", "exit code 0"):
        assert ending in done.stdout


def test_bulk_sampling_that_is_killed(conditional_engine: Path) -> None:
    script = Path(__file__).with_name("bulk.py")
    options = ["--images", "300", "--chunk", "20", "--steps", "100", "--kills", "3", "--longest", "1"]
    done = subprocess.run(
        [sys.executable, script, conditional_engine, *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "3 kills" in done.stdout
    assert "each image once" in done.stdout
