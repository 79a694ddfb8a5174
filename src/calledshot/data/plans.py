"""The packing plan of a source for one objective and context: which pieces of which documents share a row, kept on disk
beside the shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from calledshot.data.packing import Fitting, fills_row, pack, pairs_fitting
from calledshot.data.prepare import locked
from calledshot.data.prepared import Prepared, SourceShards
from calledshot.data.shards import Readers
from calledshot.objective import Denoising
from calledshot.recipe import RunError
from calledshot.rundir import read_json, write_json
from calledshot.rundir.files import write_failure

PLACED = np.dtype([("shard", "<i4"), ("pairs", "<i4"), ("offset", "<i8")])
"""A piece: `pairs` (input, target) pairs from id number `offset` of a shard on."""


@dataclass(frozen=True)
class Plan:
    """Rows that together hold every pair of a source's training documents once."""

    path: Path
    """Of its files, without suffix: `.pieces` (dtype PLACED, in row order), `.rows` (int64, where each row's begin),
    and where the objective has several tasks `.tasks` (uint8, each piece's)."""
    context: int
    """Positions of a row; of both sides, where there is an encoder."""
    rows: int
    pieces: int
    pairs: int
    filled: int
    """Positions that hold no padding."""
    mixed: bool
    """Whether there are several tasks."""

    @property
    def packing_loss(self) -> float:
        """Share of the positions that hold padding."""
        return 1 - self.filled / (self.rows * self.context) if self.rows else 0.0

    def row(self, readers: Readers, number: int) -> list[tuple[int, int, int]]:
        """(shard, pairs, offset) of each piece of a row."""
        first, end = self._bounds(readers, number)
        size = PLACED.itemsize
        content = readers.read(self.path.with_suffix(".pieces"), size * first, size * (end - first))
        return np.frombuffer(content, PLACED).tolist()

    def tasks(self, readers: Readers, number: int) -> np.ndarray:
        """uint8: the task of each piece of a row."""
        first, end = self._bounds(readers, number)
        if not self.mixed:
            return np.zeros(end - first, np.uint8)
        return np.frombuffer(readers.read(self.path.with_suffix(".tasks"), first, end - first), np.uint8)

    def _bounds(self, readers: Readers, number: int) -> list[int]:
        return np.frombuffer(readers.read(self.path.with_suffix(".rows"), 8 * number, 16), "<i8").tolist()


def plan(prepared: Prepared, source: SourceShards, denoising: Denoising, variant: int = 0) -> Plan:
    """The plan of a source, made at first use and then read back. Variants differ in which task each piece is for."""
    position = prepared.sources.index(source)
    objective = "" if denoising.plain else f"{denoising.key[:12]}-{variant}-"
    name = f"{position}-{denoising.frame.positions}-{objective}{prepared.digest[:12]}"
    path = prepared.path / "plans" / name
    ready = _ready(path, denoising)
    if ready is None:
        with locked(prepared.path):
            ready = _ready(path, denoising) or _make(prepared, source, denoising, variant, path)
    return ready


def fitting_of(denoising: Denoising, variant: int = 0) -> Fitting:
    """How the objective's pieces fill rows."""
    if denoising.plain:
        return pairs_fitting(denoising.frame.context)
    tasks = np.arange(len(denoising.denoisers))
    one = np.ones(len(tasks), np.int64)
    return Fitting(
        denoising.frame.capacity,
        denoising.cuts,
        lambda pieces: denoising.places(pieces["task"], pieces["pairs"], pieces["last"]),
        partial(denoising.choose, variant=variant) if len(tasks) > 1 else None,
        int(denoising.places(tasks, one, one.astype(bool)).min()),
        lambda pieces: denoising.units(pieces["task"], pieces["pairs"], pieces["last"]),
    )


def _ready(path: Path, denoising: Denoising) -> Plan | None:
    record = read_json(path.with_suffix(".json"))
    if record is None:
        return None
    rows, pieces, pairs = record["rows"], record["pieces"], record["pairs"]
    mixed = len(denoising.denoisers) > 1
    made = Plan(path, denoising.frame.positions, rows, pieces, pairs, record.get("filled", pairs), mixed)
    expected = {".rows": 8 * (rows + 1), ".pieces": PLACED.itemsize * pieces, **({".tasks": pieces} if mixed else {})}
    for suffix, size in expected.items():
        file = path.with_suffix(suffix)
        if not file.is_file() or file.stat().st_size != size:
            return None
    return made


def _make(prepared: Prepared, source: SourceShards, denoising: Denoising, variant: int, path: Path) -> Plan:
    rows = pieces = pairs = filled = 0
    suffixes = [".pieces", ".rows", *([".tasks"] if len(denoising.denoisers) > 1 else [])]
    try:
        path.parent.mkdir(exist_ok=True)
        with ExitStack() as stack:
            files = {suffix: stack.enter_context(open(path.with_suffix(suffix), "wb")) for suffix in suffixes}
            files[".rows"].write(np.zeros(1, "<i8").tobytes())
            for found, placed, counts in _windows(prepared, source, fitting_of(denoising, variant)):
                files[".pieces"].write(placed.tobytes())
                files[".rows"].write((pieces + np.cumsum(counts)).astype("<i8").tobytes())
                if ".tasks" in files:
                    files[".tasks"].write(found["task"].astype(np.uint8).tobytes())
                rows += len(counts)
                pieces += len(placed)
                pairs += int(found["pairs"].sum())
                filled += int(denoising.filled(found["task"], found["pairs"], found["last"]).sum())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise write_failure(path, error) from None
    record = {"rows": rows, "pieces": pieces, "pairs": pairs}
    write_json(path.with_suffix(".json"), record if denoising.plain else {**record, "filled": filled})
    made = _ready(path, denoising)
    if made is None:
        raise RunError(f"{path}: the plan just written does not read back; check the disk")
    return made


def _windows(
    prepared: Prepared, source: SourceShards, fitting: Fitting
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Windows of (pieces, the same pieces placed, pieces of each row); of the index, only what waits to be packed is in
    memory."""
    shards = source.train.shards
    documents = np.array([shard.documents for shard in shards], np.int64)
    shard_ends = np.cumsum(documents)
    starts_by_shard: dict[int, np.ndarray] = {}

    def lengths() -> Iterator[np.ndarray]:
        for number, shard in enumerate(shards):
            ids = shard.index(prepared.path)["ids"]
            starts_by_shard[number] = np.cumsum(ids) - ids
            yield ids

    for pieces, counts in pack(lengths(), fitting):
        numbers = np.searchsorted(shard_ends, pieces["document"], side="right")
        placed = np.empty(len(pieces), PLACED)
        placed["shard"], placed["pairs"] = numbers, pieces["pairs"]
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            local = pieces["document"][chosen] - (shard_ends[number] - documents[number])
            placed["offset"][chosen] = starts_by_shard[number][local] + pieces["start"][chosen]
        if not fills_row(pieces[:1], fitting)[0]:
            # Short pieces come in order and full ones before them, so that earlier shards are packed for good.
            for number in range(int(numbers.max())):
                starts_by_shard.pop(number, None)
        yield pieces, placed, counts
