"""Temporaries: gone afterwards, whoever ends the process; never those of a process that is alive."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparse_engine import files, temporaries
from sparse_engine.files import filling, kept_if_done, replacing, scratch_folder

START = {
    "replacing": "with files.replacing(target) as stream:\n    stream.write(b'half')\n    stream.flush()",
    "kept_if_done": "with files.kept_if_done(target) as made:\n    made.write_bytes(b'half')",
    "filling": "with files.filling(target) as folder:\n    (folder / 'a').write_bytes(b'half')",
}


@contextmanager
def at_work(kind: str, target: Path) -> Iterator[subprocess.Popen]:
    """A process that is in the middle of writing."""
    code = "import sys\nfrom pathlib import Path\nfrom sparse_engine import files\ntarget = Path(sys.argv[1])\n"
    code += START[kind] + textwrap.indent("\nprint('written', flush=True)\nsys.stdin.read()", "    ")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    yield process
    process.communicate(timeout=30)


def write(kind: str, target: Path) -> None:
    if kind == "replacing":
        with replacing(target) as stream:
            stream.write(b"whole")
    elif kind == "kept_if_done":
        with kept_if_done(target) as made:
            made.write_bytes(b"whole")
    else:
        with filling(target) as folder:
            (folder / "a").write_bytes(b"whole")


@pytest.mark.parametrize("kind", START)
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path, kind: str) -> None:
    target, other = tmp_path / "x", tmp_path / ".x.0.tmp"
    other.write_bytes(b"of somebody else")
    with at_work(kind, target) as process:
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 2
    write(kind, target)
    assert sorted(os.listdir(tmp_path)) == [".x.0.tmp", "x"]


@pytest.mark.parametrize("kind", START)
def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    with at_work(kind, target):
        write(kind, target)
        assert len(os.listdir(tmp_path)) == 2
        whole = target / "a" if kind == "filling" else target
        assert whole.read_bytes() == b"whole"
        if kind == "filling":
            whole.unlink()
    assert os.listdir(tmp_path) == ["x"]
    assert whole.read_bytes() == b"half"  # the last to end wins


def test_leftovers_of_two_that_ran_side_by_side(tmp_path: Path) -> None:
    with at_work("replacing", tmp_path / "x") as first, at_work("replacing", tmp_path / "x") as second:
        first.kill()
        second.kill()
    assert len(os.listdir(tmp_path)) == 2
    write("replacing", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_two_in_one_process(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as one, replacing(tmp_path / "x") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["x"]


def test_an_interrupt_between_making_and_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``clear`` is what the command line calls at its end: the removal itself may be what was interrupted."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), kept_if_done(tmp_path / "x"):
        patch.setattr(temporaries, "_remove", interrupted)
    assert len(os.listdir(tmp_path)) == 1
    temporaries.clear()
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(temporaries, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("replacing", tmp_path / "x")
    assert len(os.listdir(tmp_path)) == 1
    temporaries.clear()
    assert os.listdir(tmp_path) == []


def test_a_fork_does_not_clear_what_its_parent_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing(tmp_path / "x") as stream:
        stream.write(b"whole")
        with monkeypatch.context() as patch:
            patch.setattr(temporaries, "_process", os.getpid() + 1)
            temporaries.clear()
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_scratch_folders_go_and_those_of_the_killed_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os\nfrom sparse_engine import files\nwith files.scratch_folder():\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (leftover,) = tmp_path.iterdir()
    (leftover / "weights.bin").write_bytes(b"half")
    with scratch_folder() as folder:
        assert list(folder.iterdir()) == []
        assert temporaries.in_scratch(folder / "x") == folder
    assert os.listdir(tmp_path) == []


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(temporaries.fcntl, "flock", refused)
    (tmp_path / f".x.0{temporaries.SUFFIX}").touch()
    write("replacing", tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == [f".x.0{temporaries.SUFFIX}", "x"]
    monkeypatch.setattr(temporaries, "fcntl", None)
    write("kept_if_done", tmp_path / "x")
    assert sorted(os.listdir(tmp_path)) == [f".x.0{temporaries.SUFFIX}", "x"]


def test_a_link_in_place_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / f".x.0{temporaries.SUFFIX}").symlink_to(tmp_path / "precious")
    write("replacing", tmp_path / "x")
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127 + ".", "x" * 240 + ".sengine"])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    files.check_writable(tmp_path / name)
    write("replacing", tmp_path / name)
    assert os.listdir(tmp_path) == [name]
