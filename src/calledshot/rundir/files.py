"""Writing files so that a crash, a kill or a full disk at any moment leaves either the old content or the new."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calledshot.recipe.errors import RunError


def utc_now() -> str:
    """The time as every record writes it: ISO 8601, UTC, milliseconds, `2026-01-31T12:00:00.000Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: object) -> float:
    """Seconds since the epoch of a time written by `utc_now`; NaN for anything else."""
    with suppress(ValueError, TypeError):
        return datetime.fromisoformat(str(text)).timestamp()
    return math.nan


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of ours or of a library that writes files, means that the disk or the quota is used up."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)  # safetensors and others hand on only the text


def write_failure(path: Path, error: BaseException) -> RunError:
    """The error to raise when `path` could not be written."""
    if is_disk_full(error):
        return RunError(f"{path}: the disk is full; free some space there and repeat the command (nothing was damaged)")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return RunError(f"{path}: cannot be written ({reason}); check the folder and its permissions")


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync for folders
            raise
    finally:
        os.close(descriptor)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replaces a file whole and durably; text is written as UTF-8.

    RunError, with the old file intact and nothing left beside it, when the disk is full or the folder not writable.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: non-finite numbers become None, arrays lists, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if hasattr(value, "tolist"):  # numpy and torch, which this room does not import
        return _plain(value.tolist())
    return str(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII (so lone surrogates of a model's samples survive); non-finite numbers are null."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except (ValueError, TypeError):
        return json.dumps(_plain(value), allow_nan=False, indent=indent)


def write_json(path: Path | str, value: Any) -> None:
    """Replaces a JSON file whole, as `atomic_write` does."""
    atomic_write(path, to_json(value, indent=1) + "\n")


def read_json(path: Path | str, default: Any = None) -> Any:
    """The content of a JSON file; `default` where there is none. RunError when it is damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return default
    except ValueError as error:
        raise RunError(f"{path}: is not JSON ({error}); restore or delete it") from error


class JsonLines:
    """An append-only file of JSON objects, one a line, each written by a single `write` and stamped with `time`.

    Safe against kills: a line that a dead writer left half-done is ended on opening, and readers drop it.
    """

    def __init__(self, path: Path | str, stamp: Mapping[str, Any] | None = None) -> None:
        """Opens `path`, creating it and its folder; every record gets the fields of `stamp` unless it has them."""
        self.path = Path(path)
        self.stamp = dict(stamp or {})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_failure(self.path, error) from error
        size = os.fstat(self._descriptor).st_size
        # The torn line is ended, not cut off: cutting could hit another process that is appending to a shared record.
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record. RunError when the disk is full; the file stays readable and a later append works."""
        line = (to_json({"time": utc_now(), **self.stamp, **record}) + "\n").encode()
        if self._torn:
            line = b"\n" + line
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise write_failure(self.path, error) from error
        self._torn = written < len(line)
        if self._torn:  # a disk with some room takes the beginning of the line and says no error
            raise write_failure(self.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def sync(self) -> None:
        """Makes what was appended survive a power cut; a kill alone never loses a line."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_failure(self.path, error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stream_jsonl(path: Path | str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file in order, one at a time, unknown fields kept, torn lines dropped; none without the
    file."""
    with suppress(FileNotFoundError, NotADirectoryError), open(path, "rb") as file:
        yield from objects(file)


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """All that `stream_jsonl` gives. A million rows of metrics take 3 GB so."""
    return list(stream_jsonl(path))


def tail_jsonl(path: Path | str, size: int = 1 << 17) -> list[dict[str, Any]]:
    """The objects in the last `size` bytes of a JSONL file; [] without the file."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > size:
                file.seek(-size - 1, os.SEEK_END)
                file.readline()  # what began before
            return list(objects(file))
    except (FileNotFoundError, NotADirectoryError):
        return []


def objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines, up to one without an end.

    Its writer may be at it, and what is read next would begin in its middle.
    """
    # Not json.loads, which looks for the encoding of every line: a third of its time.
    decode = json.JSONDecoder().raw_decode
    for line in lines:
        try:
            text = line.decode("utf-8", "surrogatepass").strip()
            row, end = decode(text)
        except ValueError:
            row, end, text = None, 0, ""
        if end == len(text) and isinstance(row, dict):
            yield row
        if not line.endswith(b"\n"):
            return
