"""The packing plan of a source for one context: which pieces of which documents share a row, kept on disk beside the
shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calledshot.data.packing import pack
from calledshot.data.prepare import locked
from calledshot.data.prepared import Prepared, SourceShards
from calledshot.data.shards import Readers
from calledshot.recipe import RunError
from calledshot.rundir import read_json, write_json
from calledshot.rundir.files import write_failure

PLACED = np.dtype([("shard", "<i4"), ("pairs", "<i4"), ("offset", "<i8")])
"""A piece: `pairs` (input, target) pairs from id number `offset` of a shard on."""


@dataclass(frozen=True)
class Plan:
    """Rows of at most `context` pairs that together hold every pair of a source's training documents once."""

    path: Path
    """Of the two files, without suffix: `.pieces` (dtype PLACED, in row order) and `.rows` (int64, where each row's
    begin)."""
    context: int
    rows: int
    pieces: int
    pairs: int

    @property
    def packing_loss(self) -> float:
        """Share of the positions that hold padding."""
        return 1 - self.pairs / (self.rows * self.context) if self.rows else 0.0

    def row(self, readers: Readers, number: int) -> list[tuple[int, int, int]]:
        """(shard, pairs, offset) of each piece of a row."""
        first, end = np.frombuffer(readers.read(self.path.with_suffix(".rows"), 8 * number, 16), "<i8").tolist()
        size = PLACED.itemsize
        content = readers.read(self.path.with_suffix(".pieces"), size * first, size * (end - first))
        return np.frombuffer(content, PLACED).tolist()


def plan(prepared: Prepared, source: SourceShards, context: int) -> Plan:
    """The plan of a source, made at first use and then read back."""
    position = prepared.sources.index(source)
    path = prepared.path / "plans" / f"{position}-{context}-{prepared.digest[:12]}"
    ready = _ready(path, context)
    if ready is None:
        with locked(prepared.path):
            ready = _ready(path, context) or _make(prepared, source, context, path)
    return ready


def _ready(path: Path, context: int) -> Plan | None:
    record = read_json(path.with_suffix(".json"))
    if record is None:
        return None
    made = Plan(path, context, record["rows"], record["pieces"], record["pairs"])
    expected = {".rows": 8 * (made.rows + 1), ".pieces": PLACED.itemsize * made.pieces}
    for suffix, size in expected.items():
        file = path.with_suffix(suffix)
        if not file.is_file() or file.stat().st_size != size:
            return None
    return made


def _make(prepared: Prepared, source: SourceShards, context: int, path: Path) -> Plan:
    rows = pieces = pairs = 0
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path.with_suffix(".pieces"), "wb") as pieces_file, open(path.with_suffix(".rows"), "wb") as rows_file:
            rows_file.write(np.zeros(1, "<i8").tobytes())
            for placed, counts in _windows(prepared, source, context):
                pieces_file.write(placed.tobytes())
                rows_file.write((pieces + np.cumsum(counts)).astype("<i8").tobytes())
                rows += len(counts)
                pieces += len(placed)
                pairs += int(placed["pairs"].sum(dtype=np.int64))
            for file in (pieces_file, rows_file):
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise write_failure(path, error) from None
    write_json(path.with_suffix(".json"), {"rows": rows, "pieces": pieces, "pairs": pairs})
    made = _ready(path, context)
    if made is None:
        raise RunError(f"{path}: the plan just written does not read back; check the disk")
    return made


def _windows(prepared: Prepared, source: SourceShards, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of placed pieces; of the index, only what waits to be packed is in memory."""
    shards = source.train.shards
    documents = np.array([shard.documents for shard in shards], np.int64)
    shard_ends = np.cumsum(documents)
    starts_by_shard: dict[int, np.ndarray] = {}

    def lengths() -> Iterator[np.ndarray]:
        for number, shard in enumerate(shards):
            ids = shard.index(prepared.path)["ids"]
            starts_by_shard[number] = np.cumsum(ids) - ids
            yield ids

    for pieces, counts in pack(lengths(), context):
        numbers = np.searchsorted(shard_ends, pieces["document"], side="right")
        placed = np.empty(len(pieces), PLACED)
        placed["shard"], placed["pairs"] = numbers, pieces["pairs"]
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            local = pieces["document"][chosen] - (shard_ends[number] - documents[number])
            placed["offset"][chosen] = starts_by_shard[number][local] + pieces["start"][chosen]
        if placed["pairs"][0] < context:
            # Short pieces come in order and full ones before them, so that earlier shards are packed for good.
            for number in range(int(numbers.max())):
                starts_by_shard.pop(number, None)
        yield placed, counts
