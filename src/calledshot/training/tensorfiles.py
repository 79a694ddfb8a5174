"""Safetensors files written and read by the range of bytes, and nothing in a header believed before it is checked."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calledshot.recipe import RunError
from calledshot.training.pieces import Move

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors calls them."""
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
HEADER_BYTES = 100_000_000
"""Most bytes of a header, as in safetensors itself; of other JSON about tensors too."""
CHUNK_BYTES = 8 * 2**20
WRITE_BYTES = 256 * 2**10
"""Checked, hashed and written at a time, by one thread. With 8 MiB, hashed by another thread while they are written, a
save cost 2.8 times the core-seconds and took longer, too: it ran out of the cores' caches."""
GAP_BYTES = 32 * 2**10
"""Bytes between two wanted ranges that are read along with them: a disk would read them ahead anyway."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, from the beginning of the file."""
    end: int


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The beginning of a safetensors file of these tensors (dtype and shape by name), and where the bytes of each
    lie after it, in the order of the file: as safetensors itself would lay them out."""
    width = {name: TORCH_DTYPES[dtype].itemsize for name, (dtype, _) in tensors.items()}
    header: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in sorted(tensors, key=lambda name: (-width[name], name)):  # so that all are aligned
        dtype, shape = tensors[name]
        places[name] = (offset, offset + math.prod(shape) * width[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": list(places[name])}
        offset = places[name][1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's elements as bytes; its own memory where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


class TensorFile:
    """A safetensors file open for reading."""

    def __init__(self, path: Path) -> None:
        """RunError in one line when it cannot be read, or its header is not that of a file of this size."""
        self.path = path
        try:
            # Neither waits for a pipe's writer nor follows anything into a device.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _damaged(path, str(error.strerror)) from error
        try:
            self.tensors = self._header()
        except BaseException:
            self.close()
            raise

    def _header(self) -> dict[str, Stored]:
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(self.path, "not a file")
        size = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        start = 8 + size
        if found.st_size < 8 or start > found.st_size or size > HEADER_BYTES:
            raise _damaged(self.path, f"a header of {size} bytes in a file of {found.st_size}")
        content = parse_json(self.path, os.pread(self._descriptor, size, 8))
        tensors: dict[str, Stored] = {}
        try:
            for name, entry in content.items():
                if name == "__metadata__":
                    continue
                shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
                if math.prod(shape) * TORCH_DTYPES[entry["dtype"]].itemsize != end - begin:
                    raise _damaged(self.path, f"{name} of shape {shape} in {end - begin} bytes")
                tensors[name] = Stored(entry["dtype"], shape, start + begin, start + end)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(self.path, "its header does not describe tensors") from error
        place = start
        for one in sorted(tensors.values(), key=lambda one: (one.begin, one.end)):
            if one.begin != place:
                raise _damaged(self.path, "tensors overlap, or there are bytes between them")
            place = one.end
        if place != found.st_size:
            raise _damaged(self.path, f"tensors end at byte {place} of {found.st_size}")
        return tensors

    def read(self, begin: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `begin` on; several threads may. RunError when there are not so many."""
        while len(target):
            try:
                count = os.preadv(self._descriptor, [target[: 2**30]], begin)
            except OSError as error:
                raise _damaged(self.path, str(error.strerror)) from error
            if not count:
                raise _damaged(self.path, "it ends too early")
            begin, target = begin + count, target[count:]

    def read_moves(self, name: str, moves: Iterable[Move], target: np.ndarray) -> None:
        """Makes moves from a tensor of this file into the bytes of another."""
        stored = self.tensors[name]
        width = TORCH_DTYPES[stored.dtype].itemsize
        for move in moves:
            begin, put, length = stored.begin + move.source * width, move.target * width, move.length * width
            step, put_step = move.source_stride * width, move.target_stride * width
            if move.count == 1 or step - length > GAP_BYTES:
                for number in range(move.count):
                    place = put + number * put_step
                    self.read(begin + number * step, memoryview(target[place : place + length]))
                continue
            rows = max(1, CHUNK_BYTES // step)
            scratch = np.empty(min(rows, move.count) * step, np.uint8)
            for first in range(0, move.count, rows):
                count = min(rows, move.count - first)
                span = scratch[: (count - 1) * step + length]
                self.read(begin + first * step, memoryview(span))
                into = target[put + first * put_step :]
                _strided(into, count, length, put_step)[:] = _strided(span, count, length, step)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _strided(flat: np.ndarray, count: int, length: int, step: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(flat, (count, length), (step, 1))


def parse_json(path: Path, text: bytes) -> Any:
    """JSON of a file that may hold anything. RunError in one line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is not JSON") from error


def read_document(path: Path) -> Any:
    """A JSON file that may hold anything. RunError in one line when it is missing, too large or no JSON."""
    try:
        with open(path, "rb") as file:
            text = file.read(HEADER_BYTES + 1)
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from error
    if len(text) > HEADER_BYTES:
        raise _damaged(path, f"it has more than {HEADER_BYTES} bytes")
    return parse_json(path, text)


def whole_numbers(values: Any) -> tuple[int, ...]:
    """A list of numbers from 0 on. ValueError for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(values)
    return tuple(values)


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"{path}: cannot be read as tensors ({what}); take another checkpoint")
