"""Writing whole or not at all, and saying before the work that it cannot be."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_engine import files, temporaries
from sparse_engine.errors import OptionError, OutputError
from sparse_engine.files import check_fillable, check_writable, create, filling, kept_if_done, replacing, scratch_folder


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "volume" / name)
    (tmp_path / "volume" / "old").write_bytes(b"before")
    for name in ("old", "new"):  # "new" leads to what is not there yet
        check_writable(tmp_path / name)
        with replacing(tmp_path / name) as stream:
            stream.write(b"one")
        assert (tmp_path / "volume" / name).read_bytes() == b"one"
        with kept_if_done(tmp_path / name) as made:
            made.write_bytes(b"two")
        assert (tmp_path / "volume" / name).read_bytes() == b"two"
        assert (tmp_path / name).is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["new", "old", "volume"]
    assert sorted(os.listdir(tmp_path / "volume")) == ["new", "old"]


def a_file_as_folder(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "sub" / "x"


def a_loop(folder: Path) -> Path:
    (folder / "x").symlink_to(folder / "x")
    return folder / "x"


UNWRITABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (lambda folder: folder / "no" / "x", "the folder .*no does not exist"),
    "a file as folder": (a_file_as_folder, "file is a file, no folder"),
    "name too long": (lambda folder: folder / ("x" * 300), "cannot be written: File name too long"),
    "folder's name too long": (lambda folder: folder / ("y" * 300) / "x", "cannot be written: File name too long"),
    "a link to itself": (a_loop, "cannot be written: Too many levels of symbolic links"),
    "null byte": (lambda folder: folder / "x\0y", "cannot be written: .*null byte"),
    "the system's": (lambda folder: Path("/proc/x"), "/proc/x"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_said_before_and_after(tmp_path: Path, case: str) -> None:
    make, message = UNWRITABLE[case]
    path = make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutputError, match=message):
        check_writable(path)
    with pytest.raises(OutputError, match=message), replacing(path):
        pass
    with pytest.raises(OutputError, match=message), kept_if_done(path):
        pass
    if case != "a link to itself":
        with pytest.raises(OutputError, match=message), filling(path):
            pass
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "number, message",
    [
        (errno.EACCES, "the folder .* cannot be written to"),
        (errno.EROFS, "cannot be written: Read-only file system"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your share of the disk is full"),
    ],
)
def test_a_folder_that_takes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    """As root may write everywhere, the system's answer is put on."""

    def refused(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(temporaries.os, "open", refused)
    with pytest.raises(OutputError, match=message) as found:
        check_writable(tmp_path / "x")
    assert found.value.exit_code == 2


def test_a_full_scratch_folder_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match=rf"{tmp_path}: the disk is full.*\n.*set TMPDIR"), scratch_folder():
        raise full
    with (
        pytest.raises(OutputError, match=rf"{tmp_path}: the disk is full.*\n.*set TMPDIR"),
        scratch_folder() as folder,
        replacing(folder / "x"),
    ):
        raise full
    assert os.listdir(tmp_path) == []


def test_a_scratch_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    with pytest.raises(OutputError, match=r"No such file or directory\n.*set TMPDIR"), scratch_folder():
        pass


def test_an_error_of_the_work_is_no_error_of_the_scratch_folder() -> None:
    with pytest.raises(FileNotFoundError), scratch_folder() as folder:
        (folder / "nothing").read_bytes()


def test_an_error_of_the_work_is_not_put_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint"), kept_if_done(tmp_path / "x"):
        (tmp_path / "checkpoint").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "of a volume"
    path.touch()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 /f {str(path).replace(' ', chr(92) + '040')} rw - b c\n"
    )
    monkeypatch.setattr(files, "MOUNTS", mounts)
    with pytest.raises(OutputError, match=r"is a mount point of its own.*\n.*mount its folder instead"):
        check_writable(path)
    check_writable(tmp_path / "another")


def test_an_empty_folder_is_filled_in_place(tmp_path: Path) -> None:
    """It may be a mount point, which nothing can take the place of; and its owner's rights are kept."""
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "lost+found").mkdir()
    before = folder.stat()
    check_fillable(folder)
    with filling(folder) as temporary:
        (temporary / "a").touch()
        (temporary / "b").touch()
        assert "a" not in os.listdir(folder)
    assert sorted(os.listdir(folder)) == ["a", "b", "lost+found"]
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(OutputError, match="is not an empty folder"), filling(folder):
        pass


def fill(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    with filling(folder) as temporary:
        (temporary / "a").touch()
        (temporary / "b").touch()
        meanwhile()


def test_a_folder_that_somebody_else_filled_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not an empty folder"):
        fill(tmp_path, lambda: (tmp_path / "theirs").touch())
    assert os.listdir(tmp_path) == ["theirs"]


def test_a_folder_that_cannot_take_all_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(path: Path, target: Path) -> Path:
        if target.name == "b":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.rename(path, target)
        return target

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        fill(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_real_mount_point(tmp_path: Path) -> None:
    """In a namespace of its own, where the system allows one: both kinds of mount."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "file").touch()
    code = f"""
set -e
mount -t tmpfs none {tmp_path}/volume
mount --bind /etc/hostname {tmp_path}/file
$1 - <<'PY'
from pathlib import Path
from sparse_engine import files
from sparse_engine.errors import OutputError
folder = Path("{tmp_path}")
with files.filling(folder / "volume") as inner:
    (inner / "a").touch()
assert [each.name for each in (folder / "volume").iterdir()] == ["a"]
try:
    files.check_writable(folder / "file")
except OutputError as error:
    assert "mount point" in str(error)
    print("refused")
PY
"""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", code, "sh", sys.executable], capture_output=True, text=True, check=False
    )
    if "permitted" in done.stderr or "denied" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.stdout == "refused\n", done.stderr


def test_the_wrong_kind_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="ends in .png or .svg"):
        check_writable(tmp_path / "x.jpg", ".png", ".svg")
    check_writable(tmp_path / "X.PNG", ".png", ".svg")
    with pytest.raises(OutputError, match="is a folder; expected a file name"):
        check_writable(tmp_path)
    assert files.in_folder(tmp_path, "x.npz") == tmp_path / "x.npz"
    assert files.in_folder(tmp_path / "y.npz", "x.npz") == tmp_path / "y.npz"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_several_that_create_a_file_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    assert [create(tmp_path / "job.json", content) for content in (b"first", b"second", b"third")] == [
        True,
        False,
        False,
    ]
    assert (tmp_path / "job.json").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["job.json"]
    with pytest.raises(OutputError, match="does not exist"):
        create(tmp_path / "nowhere" / "job.json", b"")
