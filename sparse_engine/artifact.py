"""The engine file ``NAME.sengine``: written whole or not at all, opened with every doubt spoken.

A zip, stored without compression, of ``manifest.json`` and the payload. The specification is
``docs/engine-file.md``; this module is the one place that reads or writes the container.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sparse_engine import arguments
from sparse_engine.errors import EngineFileError
from sparse_engine.files import check_readable, replacing
from sparse_engine.manifest import FAST_HASH, FORMAT_VERSION, Manifest

MANIFEST = "manifest.json"
SUFFIX = ".sengine"
PAGE = 4096
HASH_BYTES = 1 << 24  # hashed at a time: long enough for xxhash to let other threads run
_EPOCH = (1980, 1, 1, 0, 0, 0)  # no clock in the file: the same input gives the same bytes
_PADDING_FIELD = 0xD935  # the extra-field id that Android's zipalign pads with
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class PayloadFile:
    """One file of an engine, written in pieces so that large weights are never held twice.

    ``aligned`` starts it on a page of the engine file, so that it can be mapped.
    """

    name: str
    size: int
    chunks: Callable[[], Iterable[bytes | memoryview]]
    aligned: bool = False


def write_engine(path: str | Path, manifest: Manifest, files: Sequence[PayloadFile]) -> None:
    """Write an engine file: to a temporary file beside it, flushed to disk, then renamed.

    ``manifest.files`` is filled in here. On any failure, an interrupt too, nothing is left behind.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    with replacing(path) as stream:
        records = {}
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for file in files:
                records[file.name] = _write_member(archive, stream, file)
            manifest.files = records
            info = zipfile.ZipInfo(MANIFEST, _EPOCH)
            archive.writestr(info, json.dumps(manifest.to_dict(), indent=1, sort_keys=True))


def _write_member(archive: zipfile.ZipFile, stream: IO[bytes], file: PayloadFile) -> dict[str, Any]:
    info = zipfile.ZipInfo(file.name, _EPOCH)
    info.file_size = file.size
    zip64 = file.size > zipfile.ZIP64_LIMIT
    if file.aligned:
        header = stream.tell() + _LOCAL_HEADER.size + len(file.name) + (20 if zip64 else 0) + 4
        pad = -header % PAGE
        info.extra = struct.pack("<HH", _PADDING_FIELD, pad) + bytes(pad)
    import xxhash

    digest, fast, written = hashlib.sha256(), xxhash.xxh3_128(), 0
    with archive.open(info, "w", force_zip64=zip64) as member:
        for chunk in file.chunks():
            member.write(chunk)
            digest.update(chunk)
            fast.update(chunk)
            written += len(chunk)
    if written != file.size:
        raise EngineFileError(f"{file.name}: {written} bytes were written, {file.size} announced")
    return {"size": file.size, "sha256": digest.hexdigest(), FAST_HASH: fast.hexdigest()}


class EngineFile:
    """An engine file, opened and found whole.

    Every byte that is ever read is hashed here, by the fast hash that the file names (by sha256 where an older version
    wrote the file without one). That guards against accidents, not against somebody who alters the hash as well.

    Attributes:
        path: of the file.
        manifest: what it holds.
        manifest_sha256: of the manifest's bytes, which hold the sha256 of everything else: one engine, one digest.

    Raises (on construction):
        EngineFileError: missing, not an engine file, cut short, altered, or of a newer format version.
    """

    def __init__(self, path: str | Path) -> None:
        path = self.path = arguments.path("path", path)
        check_readable(path, EngineFileError, missing=f"build it: sparse-engine build CHECKPOINT -o {path}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {info.filename: info for info in archive.infolist()}
                if MANIFEST not in self._members:
                    raise EngineFileError(f"{path} is a zip without {MANIFEST}: no engine file", _NOT_AN_ENGINE)
                if self._members[MANIFEST].compress_type != zipfile.ZIP_STORED:  # a few bytes could stand for many
                    raise EngineFileError(f"{path}: {MANIFEST} is compressed; expected it as it is", _COPY_AGAIN)
                manifest = archive.read(MANIFEST)
                self.manifest = Manifest.parse(manifest, str(path))
                self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
        except (
            zipfile.BadZipFile,
            struct.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            OSError,
            MemoryError,
        ) as error:
            raise self._damaged(error) from error
        self._spans = {name: self._span(name) for name in self.manifest.files}
        for name, entry in self.manifest.files.items():
            self._check_hash(name, FAST_HASH if FAST_HASH in entry else "sha256")

    def _damaged(self, error: Exception) -> EngineFileError:
        with self.path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        if is_zip:
            return EngineFileError(f"{self.path} is cut short or altered: {error}", "copy it again, or rebuild it")
        return EngineFileError(f"{self.path} is no engine file: {error}", _NOT_AN_ENGINE)

    def _mapped(self, name: str) -> bool:
        return name.endswith((".bin", ".safetensors"))

    def _span(self, name: str) -> tuple[int, int]:
        """(offset, size) of a member's bytes in the file, read off its local header."""
        expected = self.manifest.files[name]["size"]
        info = self._members.get(name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size != expected:
            found = "nothing" if info is None else f"{info.file_size} bytes"
            raise EngineFileError(f"{self.path}: {name} should have {expected} bytes, found {found}", _COPY_AGAIN)
        if info.header_offset < 0:  # bytes are missing before it
            raise EngineFileError(f"{self.path} is cut short or altered: {name} begins before it", _COPY_AGAIN)
        with self.path.open("rb") as stream:
            stream.seek(info.header_offset)
            header = stream.read(_LOCAL_HEADER.size)
            fields = _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else None
            if fields is None or fields[0] != b"PK\x03\x04" or stream.read(fields[9]) != name.encode():
                raise EngineFileError(f"{self.path}: the header of {name} is damaged", _COPY_AGAIN)
        offset = info.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
        if offset + expected > self.path.stat().st_size or (self._mapped(name) and offset % PAGE):
            raise EngineFileError(f"{self.path}: {name} is not where it should be", _COPY_AGAIN)
        return offset, expected

    def span(self, name: str) -> tuple[int, int]:
        """(offset, size) of a payload file's bytes inside the engine file, for mapping in place.

        Raises EngineFileError where the engine has no such file.
        """
        if name not in self._spans:
            raise EngineFileError(f"{self.path} has no {name}; it holds {', '.join(self._spans)}", _COPY_AGAIN)
        return self._spans[name]

    def read(self, name: str) -> bytes:
        """A payload file's bytes; for small ones."""
        offset, size = self.span(name)
        with self.path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def verify(self) -> None:
        """Hash every payload file by sha256. Raises EngineFileError where one was altered."""
        for name in self.manifest.files:
            self._check_hash(name, "sha256")

    def _check_hash(self, name: str, algorithm: str) -> None:
        found, expected = _hash(self.path, *self._spans[name], algorithm), self.manifest.files[name][algorithm]
        if found != expected:
            raise EngineFileError(
                f"{self.path}: {name} was altered: its {algorithm} is {found[:12]}..., expected {expected[:12]}...",
                _COPY_AGAIN,
            )


def _hash(path: Path, offset: int, size: int, algorithm: str) -> str:
    """The digest of a part of a file, mapped: its pages are the ones that the weights are read from later."""
    import xxhash

    digest = xxhash.xxh3_128() if algorithm == FAST_HASH else hashlib.sha256()
    if size == 0:
        return digest.hexdigest()
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    end = offset - start + size
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), end, access=mmap.ACCESS_READ, offset=start) as mapped,
        memoryview(mapped) as view,
    ):
        for first in range(offset - start, end, HASH_BYTES):
            digest.update(view[first : min(first + HASH_BYTES, end)])
    return digest.hexdigest()


_COPY_AGAIN = "copy the file again, or rebuild it with sparse-engine build"
_NOT_AN_ENGINE = f"expected a {SUFFIX} file that sparse-engine build wrote (format version {FORMAT_VERSION})"
