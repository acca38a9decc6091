"""The engine file: written whole or not at all; every kind of damage named."""

import errno
import json
import os
import struct
import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sparse_engine.artifact import PAGE, EngineFile, PayloadFile, write_engine
from sparse_engine.backends.base import bytes_payload, weights_payload
from sparse_engine.conditioning import Condition, class_condition
from sparse_engine.errors import EngineFileError, OutputError
from sparse_engine.manifest import FORMAT_VERSION, Manifest

WEIGHTS = {
    "a": np.arange(5000, dtype=np.float32),
    "b": np.arange(7, dtype=np.float32),
    "c": np.ones((40, 40), np.float32),
}
GOLDEN = Path(__file__).parent / "golden"
CONTEXT = Condition("context", (2, 3), null="stored", mask="context_mask")
TOLD = Condition("context", (2, 3)).to_dict()
MASK = Condition("context_mask", (2,), default=1.0, null="ones")


def manifest() -> Manifest:
    return Manifest(
        tool_version="0.1.0",
        family="uvit",
        config={"heads": 4},
        data_shape=(3, 8, 8),
        value_range=(-1.0, 1.0),
        schedule={"name": "vp-linear"},
        prediction="eps",
        conditioning=[],
        sampler="ddim",
        precision="fp32",
        sparse=True,
        mask={"rule": "auto", "pattern": "2:4", "layers": []},
        layers=[],
        backend={"name": "onnxruntime"},
        batch=(1, 2, 4),
        checkpoint_sha256="0" * 64,
        graph_sha256="1" * 64,
        notes=["é"],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "x.sengine"
    write_engine(target, manifest(), [bytes_payload("step.onnx", b"graph"), weights_payload(WEIGHTS)])
    return target


def test_what_is_written_is_read_back(path: Path) -> None:
    file = EngineFile(path)
    file.verify()
    assert file.read("step.onnx") == b"graph"
    read = file.manifest.to_dict()
    assert read.pop("files").keys() == {"step.onnx", "weights.bin"}
    assert read == {key: value for key, value in manifest().to_dict().items() if key != "files"}
    offset, size = file.span("weights.bin")
    assert offset % PAGE == 0
    mapped = np.memmap(path, np.uint8, "r", offset, (size,))
    assert np.array_equal(mapped[:20000].view(np.float32), WEIGHTS["a"])


def test_any_unzip_reads_it(path: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "out")
    assert (tmp_path / "out" / "step.onnx").read_bytes() == b"graph"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["family"] == "uvit"


def test_the_same_input_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_engine(tmp_path / "y.sengine", manifest(), [bytes_payload("step.onnx", b"graph"), weights_payload(WEIGHTS)])
    assert path.read_bytes() == (tmp_path / "y.sengine").read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_any_format_stays_readable(version: int) -> None:
    """Golden bytes: written once, never again."""
    path = GOLDEN / f"format-{version}.sengine"
    file = EngineFile(path)
    file.verify()
    assert file.manifest.format_version == version
    assert file.read("step.onnx") == b"graph"
    offset, size = file.span("weights.bin")
    assert (offset, size) == (4096, file.manifest.files["weights.bin"]["size"])
    data = path.read_bytes()[offset : offset + 20000]
    assert np.array_equal(np.frombuffer(data, np.float32), WEIGHTS["a"])
    assert file.manifest.conditions == (() if version == 1 else (*class_condition(11, 10), CONTEXT, MASK))


def test_what_is_written_are_the_golden_bytes(tmp_path: Path) -> None:
    written = manifest()
    written.conditioning = [each.to_dict() for each in (*class_condition(11, 10), CONTEXT, MASK)]
    row = bytes_payload(CONTEXT.stored, b"row")
    write_engine(tmp_path / "x.sengine", written, [bytes_payload("step.onnx", b"graph"), weights_payload(WEIGHTS), row])
    assert (tmp_path / "x.sengine").read_bytes() == (GOLDEN / "format-2.sengine").read_bytes()


def test_labels_of_a_file_of_format_1(path: Path) -> None:
    rewritten(path, format_version=1, conditioning=None, assets=None, num_classes=11, null_class=10)
    read = EngineFile(path).manifest
    assert read.conditions == class_condition(11, 10)
    assert (read.num_classes, read.null_class, read.assets) == (11, 10, {})


def test_cut_short_anywhere(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    cut = tmp_path / "cut.sengine"
    for length in [*range(0, len(data) - 1, 997), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(EngineFileError, match=r"cut short or altered|no engine file"):
            EngineFile(cut)


def flips(path: Path, positions: Iterable[int]) -> Iterator[tuple[int, Path]]:
    """The file with one bit of one byte altered, for each position."""
    data, flipped = path.read_bytes(), path.with_name("flipped.sengine")
    for position in positions:
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        flipped.write_bytes(altered)
        yield position, flipped


def test_one_bit_flipped_in_a_payload_is_found_on_opening(path: Path) -> None:
    file = EngineFile(path)
    for name, step in (("weights.bin", 1999), ("step.onnx", 1)):
        start, size = file.span(name)
        for _, flipped in flips(path, range(start, start + size, step)):
            with pytest.raises(EngineFileError, match=f"{name} was altered: its xxh3_128 is"):
                EngineFile(flipped)


def test_one_bit_flipped_elsewhere_is_found_or_changes_nothing(path: Path) -> None:
    """Headers, the directory, the manifest: each byte; the padding, which nobody reads: some."""
    original = EngineFile(path)
    start, size = original.span("weights.bin")
    padding = range(200, start)
    elsewhere = [*range(padding.start), *padding[::97], *range(start + size, path.stat().st_size)]
    found = 0
    for _, flipped in flips(path, elsewhere):
        try:
            file = EngineFile(flipped)
        except EngineFileError:
            found += 1
            continue
        file.verify()
        assert file.read("step.onnx") == b"graph"
        assert file.manifest == original.manifest
        assert file.span("weights.bin") == original.span("weights.bin")
    assert found > 1000


def test_bytes_missing_in_the_padding(path: Path) -> None:
    """The directory then points before the file's beginning for its first member."""
    data = path.read_bytes()
    start, _ = EngineFile(path).span("weights.bin")
    path.write_bytes(data[: start - 3000] + data[start - 1000 :])
    with pytest.raises(EngineFileError):
        EngineFile(path)


def test_bytes_behind_the_end_change_nothing(path: Path) -> None:
    original = EngineFile(path).manifest
    with path.open("ab") as stream:
        stream.write(b"more")
    assert EngineFile(path).manifest == original


def test_a_file_without_the_fast_hash_is_checked_by_sha256(path: Path) -> None:
    files = EngineFile(path).manifest.files
    rewritten(path, files={name: {key: entry[key] for key in ("size", "sha256")} for name, entry in files.items()})
    span = EngineFile(path).span("weights.bin")
    data = bytearray(path.read_bytes())
    data[span[0] + 5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineFileError, match="weights.bin was altered: its sha256 is"):
        EngineFile(path)


def test_verify_is_by_sha256_whatever_the_fast_hash_says(path: Path) -> None:
    files = {name: {**entry, "sha256": "0" * 64} for name, entry in EngineFile(path).manifest.files.items()}
    file = EngineFile(rewritten(path, files=files))
    with pytest.raises(EngineFileError, match="its sha256 is"):
        file.verify()


def rewritten(path: Path, **changes: object) -> Path:
    """The same engine with entries of its manifest changed."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    values = {**json.loads(files["manifest.json"]), **changes}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            pad = -(archive.fp.tell() + 30 + len(name) + 4) % PAGE if name.endswith(".bin") else 0
            info.extra = struct.pack("<HH", 0xD935, pad) + bytes(pad)
            archive.writestr(info, json.dumps(values) if name == "manifest.json" else data)
    return path


def test_newer_format(path: Path) -> None:
    rewritten(path, format_version=FORMAT_VERSION + 1, tool_version="9.9")
    with pytest.raises(EngineFileError, match=r"format version 3, written by sparse-engine 9\.9.*\n.*upgrade"):
        EngineFile(path)


def test_manifest_without_an_entry(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", '{"format_version": 1, "files": {}}')
    with pytest.raises(EngineFileError, match="its manifest lacks tool_version"):
        EngineFile(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_shape": 3},
        {"data_shape": [3, 8]},
        {"batch": ["1", "2", "4"]},
        {"value_range": [0, 1, 2]},
        {"files": {"step.onnx": 7}},
        {"files": {"step.onnx": {"size": 7}}},
        {"files": {"step.onnx": {"size": 5.0, "sha256": ""}}},
        {"files": {"step.onnx": {"size": -5, "sha256": ""}}},
        {"files": {"step.onnx": {"size": 5, "sha256": "", "xxh3_128": 7}}},
        {"data_shape": [3, 8, True]},
        {"data_shape": [3, 8, 0]},
        {"data_shape": [3, 8, 2**60]},
        {"batch": [4, 2, 1]},
        {"value_range": [0, float("nan")]},
        {"value_range": [1, -1]},
        {"backend": {"name": "onnxruntime", "device": ["cpu"]}},
        {"family": None},
        {"schedule": []},
        {"conditioning": {}},
        {"conditioning": [{"name": "y"}]},
        {"conditioning": [{**TOLD, "name": "a b"}]},
        {"conditioning": [{**TOLD, "shape": [0]}]},
        {"conditioning": [{**TOLD, "shape": 3}]},
        {"conditioning": [{**TOLD, "dtype": "float16"}]},
        {"conditioning": [{**TOLD, "classes": 0}]},
        {"conditioning": [{**TOLD, "null": 3}]},
        {"conditioning": [{**TOLD, "null": "nothing"}]},
        {"conditioning": [{**TOLD, "null": "stored"}]},
        {"conditioning": [{**TOLD, "default": "1"}]},
        {"conditioning": [{**TOLD, "mask": "context_mask"}]},
        {"conditioning": [TOLD, TOLD]},
        {"assets": []},
        {"excluded_samplers": {"ddpm": 1}},
        {"assets": {"vae": 3}},
        {"format_version": 1, "num_classes": 5, "null_class": "4"},
        {"format_version": 1, "num_classes": 5, "null_class": 5},
        {"format_version": 1, "num_classes": -1, "null_class": None},
        {"sparse": 1},
        {"notes": [1]},
        {"quantisation": "int8"},
        {"backend": {}},
        {"layers": [{"name": "fc1", "macs": None}]},
        {"backend": "onnxruntime"},
        {"layers": {"fc1": 1}},
    ],
    ids=str,
)
def test_manifest_with_an_entry_of_another_form(path: Path, entry: dict) -> None:
    rewritten(path, **entry)
    with pytest.raises(EngineFileError, match=r"its manifest is damaged.*\n.*rebuild"):
        EngineFile(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello" * 100, b"\x89PNG\r\n" + bytes(500)], ids=["empty", "text", "picture"]
)
def test_renamed_from_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.sengine").write_bytes(content)
    with pytest.raises(EngineFileError, match=r"is no engine file.*\n.*expected a \.sengine file"):
        EngineFile(tmp_path / "x.sengine")


def test_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.sengine", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(EngineFileError, match="a zip without manifest.json: no engine file"):
        EngineFile(tmp_path / "x.sengine")


def test_a_manifest_that_is_packed(path: Path) -> None:
    """A few bytes could stand for more than there is memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", b"[" + b" " * 10**7)
    with pytest.raises(EngineFileError, match="manifest.json is compressed; expected it as it is"):
        EngineFile(path)


@pytest.mark.parametrize("kind", ["long", "dangling", "fifo", "under a file"])
def test_a_path_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 300 if kind == "long" else "m.sengine")
    if kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "under a file":
        path.touch()
        path = path / "m.sengine"
    with pytest.raises(EngineFileError, match="cannot be looked at|a link to|a pipe") as found:
        EngineFile(path)
    assert found.value.exit_code == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="does not exist"):
        EngineFile(tmp_path / "x.sengine")


def failing(error: BaseException) -> PayloadFile:
    def chunks() -> Iterator[bytes]:
        yield b"x" * 100
        raise error

    return PayloadFile("weights.bin", 200, chunks, aligned=True)


@pytest.mark.parametrize(
    "error,raised",
    [(OSError(errno.ENOSPC, "No space left"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "interrupt"],
)
def test_nothing_is_left_behind_and_what_was_there_stays(tmp_path: Path, error: BaseException, raised: type) -> None:
    target = tmp_path / "x.sengine"
    target.write_bytes(b"the old one")
    with pytest.raises(raised):
        write_engine(target, manifest(), [failing(error)])
    assert target.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["x.sengine"]


def test_full_disk_for_real(tmp_path: Path) -> None:
    """A file system of one megabyte, where the machine lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
            write_engine(disk / "x.sengine", manifest(), [weights_payload({"w": np.zeros(2_000_000, np.float32)})])
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder .* does not exist"):
        write_engine(tmp_path / "nowhere" / "x.sengine", manifest(), [])


@pytest.mark.slow
def test_larger_than_four_gigabytes_is_zip64(tmp_path: Path) -> None:
    """The paper's largest cells pass 4 GiB; zeros, so that the file system need not store them twice."""
    free = os.statvfs(tmp_path)
    if free.f_bavail * free.f_frsize < 12 << 30:
        pytest.skip("needs 12 GiB of disk")
    size, chunk = (4 << 30) + 4096, bytes(1 << 24)

    def chunks() -> Iterator[bytes]:
        remaining = size
        while remaining:
            yield chunk[: min(remaining, len(chunk))]
            remaining -= min(remaining, len(chunk))

    target = tmp_path / "large.sengine"
    write_engine(
        target, manifest(), [PayloadFile("weights.bin", size, chunks, True), bytes_payload("step.onnx", b"graph")]
    )
    file = EngineFile(target)
    assert file.span("weights.bin")[1] == size
    assert file.span("weights.bin")[0] % PAGE == 0
    assert file.read("step.onnx") == b"graph"
