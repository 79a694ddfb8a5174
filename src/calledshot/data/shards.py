"""Token shards: what documents look like on disk, written once and read by `pread`.

A shard is three files: `.bin`, the ids of its documents one after another, each `[begin] + tokens + [end]`,
little-endian uint16 or uint32; `.index`, four little-endian int64 a document (ids, bytes of its text, language, end of
its name in `.names`); `.names`, the documents' ids in UTF-8, one after another.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from calledshot.recipe import RunError

LARGEST_SHARD = 256 << 20
"""Bytes of ids after which a new shard begins."""

SYNCED = 16 << 20
"""Bytes from which a file is made durable before its record is written."""

SUFFIXES = (".bin", ".index", ".names")
INDEX = np.dtype([("ids", "<i8"), ("bytes", "<i8"), ("language", "<i8"), ("name_end", "<i8")])


def dtype_for(size: int) -> np.dtype:
    """Type of the ids of a tokenizer with so many entries."""
    return np.dtype("<u2" if size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Shard:
    """One shard's record in the manifest."""

    stem: str
    """Path without suffix, relative to the prepared folder."""
    documents: int
    ids: int
    bytes: int
    """Of the documents' texts, in UTF-8."""
    languages: tuple[str, ...]
    """What the index's language numbers mean."""
    sizes: dict[str, int]
    """Bytes of each file by suffix."""
    sha256: dict[str, str]
    """Hash of each file by suffix."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Shard:
        return cls(**{**record, "languages": tuple(record["languages"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def index(self, folder: Path) -> np.ndarray:
        """(documents,) of dtype INDEX."""
        return np.frombuffer(_whole(folder / f"{self.stem}.index", self.sizes[".index"]), INDEX)

    def names(self, folder: Path) -> list[str]:
        """The documents' ids."""
        content = _whole(folder / f"{self.stem}.names", self.sizes[".names"])
        ends = self.index(folder)["name_end"].tolist()
        return [content[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]

    def problem(self, folder: Path, hashes: bool) -> str:
        """What is wrong with the files: their sizes, and their hashes on request; empty where nothing is."""
        for suffix in SUFFIXES:
            path = folder / f"{self.stem}{suffix}"
            if not path.is_file():
                return f"{path}: missing"
            if path.stat().st_size != self.sizes[suffix]:
                return f"{path}: corrupt: {path.stat().st_size} bytes where the manifest says {self.sizes[suffix]}"
            if hashes and file_hash(path) != self.sha256[suffix]:
                return f"{path}: corrupt: its hash is not the manifest's"
        return ""


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _whole(path: Path, size: int) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); run `shot data build` again") from None
    if len(content) != size:
        raise RunError(
            f"{path}: corrupt: {len(content)} bytes where the manifest says {size}; delete it and run `shot data build`"
        )
    return content


@dataclass
class ShardWriter:
    """Writes the shards of one split of one chunk."""

    folder: Path
    """The prepared folder."""
    stem: str
    """Path of the shards without number and suffix, relative to it."""
    dtype: np.dtype
    done: list[Shard] = field(default_factory=list)
    _files: dict[str, _Hashed] = field(default_factory=dict)
    _languages: list[str] = field(default_factory=list)
    _totals: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, ids: np.ndarray, size: int, language: str, name: str) -> None:
        """Append a document: its ids, the bytes of its text, its language and its name."""
        if not self._files:
            path = self.folder / f"{self.stem}-{len(self.done):02d}"
            self._files = {suffix: _Hashed(path.with_name(path.name + suffix)) for suffix in SUFFIXES}
        if language not in self._languages:
            self._languages.append(language)
        self._files[".bin"].write(np.ascontiguousarray(ids, self.dtype).tobytes())
        self._files[".names"].write(name.encode("utf-8", "replace"))
        entry = (len(ids), size, self._languages.index(language), self._files[".names"].size)
        self._files[".index"].write(np.array(entry, INDEX).tobytes())
        self._totals = [self._totals[0] + 1, self._totals[1] + len(ids), self._totals[2] + size]
        if self._files[".bin"].size >= LARGEST_SHARD:
            self._close()

    def finish(self) -> list[Shard]:
        """Close the last shard; the records of all."""
        if self._files:
            self._close()
        return self.done

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        documents, ids, size = self._totals
        self.done.append(
            Shard(
                f"{self.stem}-{len(self.done):02d}",
                documents,
                ids,
                size,
                tuple(self._languages),
                {suffix: file.size for suffix, file in self._files.items()},
                {suffix: file.digest.hexdigest() for suffix, file in self._files.items()},
            )
        )
        self._files, self._languages, self._totals = {}, [], [0, 0, 0]


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = open(path, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self.digest.update(content)
        self.size += len(content)

    def close(self) -> None:
        self._stream.flush()
        # A power cut shows in a small file's size or hash; to wait for the disk each time would cost seconds.
        if self.size >= SYNCED:
            os.fsync(self._stream.fileno())
        self._stream.close()


class Readers:
    """Open files, read by `pread`: safe between threads, and no SIGBUS on network file systems as with mmap."""

    def __init__(self, most: int = 256) -> None:
        """`most` files stay open at once."""
        self._most = most
        self._open: OrderedDict[Path, _Descriptor] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises RunError where the file is shorter."""
        descriptor = self._open.get(path)
        if descriptor is None:
            try:
                descriptor = _Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror}); run `shot data build` again") from None
            self._open[path] = descriptor
            if len(self._open) > self._most:
                # Dropped, not closed: another thread may be reading from it, and the last holder closes it.
                self._open.popitem(last=False)
        content = os.pread(descriptor.number, size, offset)
        while len(content) < size:
            more = os.pread(descriptor.number, size - len(content), offset + len(content))
            if not more:
                end = offset + len(content)
                raise RunError(f"{path}: corrupt: ends at byte {end}; delete it and run `shot data build` again")
            content += more
        return content


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)
