"""Files to documents: plain text, JSONL and Parquet, compressed or not, in pieces that several processes can share."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from calledshot.data.tokenizer import well_formed
from calledshot.recipe import UsageError
from calledshot.recipe.schema import Source

COMPRESSIONS = (".gz", ".xz", ".zst")
CODED = 16 << 10
"""Bytes of a zstandard file that are decompressed at once."""
SMALLEST_CHUNK, LARGEST_CHUNK = 1 << 20, 64 << 20
"""Bounds of a chunk's bytes on disk."""

Advance = Callable[[int], None]
"""Told how many more bytes on disk have been read."""


@dataclass(frozen=True)
class Document:
    """A text and where it comes from."""

    id: str
    """Its name in the source: the file's path in it, the record's own id, or the file and the place there."""
    text: str
    """Well-formed: it encodes as UTF-8."""
    source: str
    language: str
    modality: str


@dataclass(frozen=True)
class File:
    """A file of a source, on this machine."""

    path: str
    name: str
    """Path inside the source, with forward slashes."""
    size: int
    """Bytes on disk."""
    format: str
    """`text`, `jsonl` or `parquet`."""


@dataclass(frozen=True)
class Chunk:
    """A part of a source that one process reads from end to end."""

    files: tuple[File, ...]
    """Several text files, or one file."""
    start: int = 0
    """First byte of a JSONL file, or first row group of a Parquet file."""
    stop: int = -1
    """Where the part ends; -1 at the end of the file."""
    size: int = 0
    """Bytes on disk, for the progress bar."""


def compression(name: str) -> str:
    """`.gz`, `.xz`, `.zst` or nothing."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def format_of(name: str) -> str:
    """The format that a file's suffix stands for."""
    suffix = Path(name[: -len(compression(name))] if compression(name) else name).suffix.lower()
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(suffix, "text")


def chunks(files: tuple[File, ...]) -> list[Chunk]:
    """Cut a source's files into chunks: the same ones on every machine."""
    total = sum(file.size for file in files)
    target = min(max(total // 64, SMALLEST_CHUNK), LARGEST_CHUNK)
    made: list[Chunk] = []
    group: list[File] = []
    for file in files:
        if file.format == "text":
            group.append(file)
            if sum(member.size for member in group) >= target:
                made.append(Chunk(tuple(group), size=sum(member.size for member in group)))
                group = []
        elif file.format == "parquet":
            made.extend(_row_groups(file, target))
        elif compression(file.name):
            made.append(Chunk((file,), size=file.size))
        else:
            for start in range(0, file.size, target):
                stop = min(start + target, file.size)
                made.append(Chunk((file,), start, stop, stop - start))
    if group:
        made.append(Chunk(tuple(group), size=sum(member.size for member in group)))
    return made


def read(
    chunk: Chunk, source: Source, skipped: Counter[str], advance: Advance = lambda size: None
) -> Iterator[Document]:
    """The documents of a chunk, in order; texts without a character are counted in `skipped`."""
    reader = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[chunk.files[0].format]
    for name, text, language in reader(chunk, source, advance):
        if not text:
            skipped["empty"] += 1
            continue
        yield Document(name, well_formed(text), source.name, language, source.modality)


def _read_text(chunk: Chunk, source: Source, advance: Advance) -> Iterator[tuple[str, str, str]]:
    for file in chunk.files:
        with opened(file.path) as (stream, _):
            content = stream.read()
        advance(file.size)
        yield file.name, decode(content, file.path), source.language


def decode(content: bytes, path: str) -> str:
    """The text of a file's bytes."""
    if b"\0" in content:
        raise UsageError(f"{path}: a binary file, not text; leave it out with `exclude`, or set the source's `format`")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start}; convert it (`iconv -t UTF-8`) or leave it out with `exclude`"
        ) from None


def _read_jsonl(chunk: Chunk, source: Source, advance: Advance) -> Iterator[tuple[str, str, str]]:
    (file,) = chunk.files
    with opened(file.path) as (stream, told):
        position = 0
        if chunk.start:
            # A line belongs to the part in which it begins.
            stream.seek(chunk.start - 1)
            position = chunk.start - 1 + len(stream.readline())
        reported = chunk.start
        while chunk.stop < 0 or position < chunk.stop:
            line = stream.readline()
            if not line:
                break
            begin, position = position, position + len(line)
            if told() - reported > 1 << 20:
                advance(told() - reported)
                reported = told()
            if not line.isspace():
                yield _record(line, begin, file, source)


def _record(line: bytes, begin: int, file: File, source: Source) -> tuple[str, str, str]:
    where = f"{file.path}, byte {begin}"
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not UTF-8; convert the file (`iconv -t UTF-8`)") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"{where}: not a JSON object on one line; is the file JSONL? Else set the source's `format`"
        ) from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: JSON, but not an object with fields; one document a line is expected")
    return _fields(record, f"{file.name}:{begin}", where, source)


def _fields(record: dict[str, Any], place: str, where: str, source: Source) -> tuple[str, str, str]:
    for key, name in (("text_field", source.text_field), ("language_field", source.language_field)):
        if name and name not in record:
            raise missing_field(where, name, key, list(record))
    text = record[source.text_field]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: the field {source.text_field!r} holds {type(text).__name__}, not text; set `text_field`"
        )
    name = record.get(source.id_field) if source.id_field else None
    language = record[source.language_field] if source.language_field else None
    return place if name is None else str(name), text, str(language or source.language)


def missing_field(where: str, name: str, key: str, there: list[str]) -> UsageError:
    """The error for a field that is not there, naming those that are."""
    return UsageError(f"{where}: no field {name!r}; there are {', '.join(there) or 'none'} (set the source's `{key}`)")


def _read_parquet(chunk: Chunk, source: Source, advance: Advance) -> Iterator[tuple[str, str, str]]:
    (file,) = chunk.files
    table = _parquet(file)
    there = table.schema_arrow.names
    for key, name in (("text_field", source.text_field), ("language_field", source.language_field)):
        if name and name not in there:
            raise missing_field(file.path, name, key, there)
    wanted = dict.fromkeys((source.text_field, source.id_field, source.language_field))
    columns = [name for name in wanted if name and name in there]
    row = sum(table.metadata.row_group(group).num_rows for group in range(chunk.start))
    for group in range(chunk.start, chunk.stop):
        try:
            for part in table.iter_batches(batch_size=256, row_groups=[group], columns=columns, use_threads=False):
                for record in part.to_pylist():
                    yield _fields(record, f"{file.name}:{row}", f"{file.path}, row {row}", source)
                    row += 1
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise UsageError(f"{file.path}: Parquet that cannot be read ({_first_line(error)}); copy it anew") from None
        advance(table.metadata.row_group(group).total_byte_size)


def _row_groups(file: File, target: int) -> Iterator[Chunk]:
    metadata = _parquet(file).metadata
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= target or group == metadata.num_row_groups - 1:
            yield Chunk((file,), start, group + 1, size)
            start, size = group + 1, 0


def _parquet(file: File) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError(f"{file.path}: Parquet needs pyarrow: pip install 'calledshot[corpora]'") from None
    try:
        return parquet.ParquetFile(file.path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.path}: not a Parquet file, or a damaged one ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def opened(path: str) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """A file's content, decompressed by its suffix, and a function that tells how many bytes on disk were read."""
    try:
        with open(path, "rb") as raw:
            yield _decompressed(raw, path), raw.tell
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UsageError(
            f"{path}: cannot be decompressed ({error}); copy it anew, or rename it if it is not compressed"
        ) from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":  # zstandard may not be installed
            raise UsageError(f"{path}: cannot be decompressed ({error}); copy it anew, or rename it") from None
        raise


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    kind = compression(path)
    if kind == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if kind == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw))  # type: ignore[arg-type]
    if kind == ".zst":
        try:
            import zstandard
        except ImportError:
            raise UsageError(f"{path}: .zst needs zstandard: pip install 'calledshot[corpora]'") from None
        return io.BufferedReader(_Zstandard(raw, zstandard.ZstdDecompressor().decompressobj))
    return raw


class _Zstandard(io.RawIOBase):
    """Frames of zstandard, one after the other. The library's own stream takes a frame that is cut short for the end
    of the file."""

    def __init__(self, raw: IO[bytes], begin: Callable[[], Any]) -> None:
        self._raw, self._begin = raw, begin
        self._frame: Any = None
        self._coded, self._decoded = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decoded:
            coded = self._coded or self._raw.read(CODED)
            if not coded:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._begin()
            self._decoded, self._coded = memoryview(self._frame.decompress(coded)), b""
            if self._frame.eof:
                self._frame, self._coded = None, self._frame.unused_data
        count = min(len(buffer), len(self._decoded))
        buffer[:count] = self._decoded[:count]
        self._decoded = self._decoded[count:]
        return count
