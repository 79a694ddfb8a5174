"""Which rank writes which piece, and `pieces.json`, which says where the pieces of each tensor are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calledshot.recipe import RunError
from calledshot.training.pieces import Piece
from calledshot.training.tensorfiles import DTYPES, TORCH_DTYPES, read_document, whole_numbers

PIECES = "pieces.json"
_WRITERS = 1_000_000


@dataclass(frozen=True)
class Held:
    """A tensor as one rank holds it."""

    dtype: str
    piece: Piece

    @property
    def size(self) -> int:
        """In bytes."""
        return self.piece.numel * TORCH_DTYPES[self.dtype].itemsize


Holding = Mapping[str, Mapping[str, Held]]
"""What a rank holds: by kind of file (`model`, `optimizer`), by name of the tensor."""


@dataclass(frozen=True)
class Whole:
    """A tensor and where its pieces are."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, Piece], ...]
    """Number of the file, and what it holds."""


def holding(kinds: Mapping[str, Mapping[str, tuple[Tensor, Piece]]]) -> dict[str, dict[str, Held]]:
    """What a rank holds. ValueError for a tensor that is not of its piece's size."""
    for tensors in kinds.values():
        for name, (tensor, piece) in tensors.items():
            if tensor.numel() != piece.numel:
                raise ValueError(f"{name} has {tensor.numel()} elements where its piece has {piece.numel}")
    return {
        kind: {name: Held(DTYPES[tensor.dtype], piece) for name, (tensor, piece) in tensors.items()}
        for kind, tensors in kinds.items()
    }


def to_bytes(holding: Holding) -> bytes:
    """For the other ranks."""
    rows = {
        kind: {name: [held.dtype, held.piece.shape, *_cut(held.piece).values()] for name, held in tensors.items()}
        for kind, tensors in holding.items()
    }
    return json.dumps(rows).encode()


def from_bytes(content: bytes) -> dict[str, dict[str, Held]]:
    """What `to_bytes` wrote."""
    return {
        kind: {name: Held(dtype, Piece(tuple(shape), *cut)) for name, (dtype, shape, *cut) in tensors.items()}
        for kind, tensors in json.loads(content).items()
    }


def assign(holdings: Sequence[Holding]) -> dict[str, dict[str, Whole]]:
    """Every tensor of every rank, each piece by one writer: pieces that several ranks hold go to whoever has least to
    write, the largest first. The same on all ranks.

    ValueError when the pieces of a tensor are not the whole of it.
    """
    load = [0] * len(holdings)
    shared: list[tuple[str, str, Piece, list[int]]] = []
    found: dict[str, dict[str, Held]] = {}
    places: dict[tuple[str, str], list[tuple[int, Piece]]] = {}
    for kind in sorted({kind for each in holdings for kind in each}):
        owners: dict[tuple[str, Piece], list[int]] = {}
        for rank, each in enumerate(holdings):
            for name, held in each.get(kind, {}).items():
                found.setdefault(kind, {}).setdefault(name, held)
                places.setdefault((kind, name), [])
                if held.piece.numel:
                    owners.setdefault((name, held.piece), []).append(rank)
                elif not Piece.whole(held.piece.shape).numel and not places[kind, name]:
                    places[kind, name].append((rank, Piece.whole(held.piece.shape)))
        for (name, piece), ranks in owners.items():
            if len(ranks) == 1:
                load[ranks[0]] += Held(found[kind][name].dtype, piece).size
                places[kind, name].append((ranks[0], piece))
            else:
                shared.append((kind, name, piece, ranks))
    shared.sort(key=lambda one: (-one[2].numel, one[0], one[1], one[2].part, one[2].start))
    for kind, name, piece, ranks in shared:
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] += Held(found[kind][name].dtype, piece).size
        places[kind, name].append((rank, piece))
    wholes: dict[str, dict[str, Whole]] = {"model": {}, "optimizer": {}}
    for (kind, name), pieces in places.items():
        held = found[kind][name]
        whole = Whole(held.dtype, held.piece.shape, tuple(sorted(pieces, key=lambda one: (one[1].part, one[1].start))))
        if fault := _fault(whole):
            raise ValueError(f"{name}: {fault}")
        wholes[kind][name] = whole
    return wholes


def document(wholes: Mapping[str, Mapping[str, Whole]], writers: int) -> dict[str, Any]:
    """The content of pieces.json."""
    return {
        "writers": writers,
        **{
            kind: {
                name: {
                    "dtype": whole.dtype,
                    "shape": list(whole.shape),
                    "pieces": [{"file": file, **_cut(piece)} for file, piece in whole.pieces],
                }
                for name, whole in tensors.items()
            }
            for kind, tensors in wholes.items()
        },
    }


def read_wholes(folder: Path, kind: str) -> tuple[int, dict[str, Whole]]:
    """Number of writers of a checkpoint, and its tensors of a kind. RunError in one line for a pieces.json that is
    damaged, or in which pieces overlap or are missing."""
    path = folder / PIECES
    content = read_document(path)
    wholes = {}
    try:
        (writers,) = whole_numbers([content["writers"]])
        if not 0 < writers < _WRITERS:
            raise ValueError
        for name, entry in content[kind].items():
            shape = whole_numbers(entry["shape"])
            pieces = []
            for one in entry["pieces"]:
                file, part, parts, start, stop = whole_numbers(
                    [one[key] for key in ("file", "part", "parts", "start", "stop")]
                )
                axis = None if one["axis"] is None else whole_numbers([one["axis"]])[0]
                pieces.append((file, Piece(shape, axis, part, parts, start, stop)))
            whole = Whole(entry["dtype"], shape, tuple(pieces))
            fault = _fault(whole) or next((f"file {file} of {writers}" for file, _ in pieces if file >= writers), None)
            if fault or entry["dtype"] not in TORCH_DTYPES:
                raise RunError(f"{path}: {name}: {fault or 'is of no known type'}; take another checkpoint")
            wholes[name] = whole
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: does not describe pieces of tensors; take another checkpoint") from error
    return writers, wholes


def _fault(whole: Whole) -> str | None:
    """Why some pieces are not the whole; None where they are, each element once."""
    for _, piece in whole.pieces:
        if fault := piece.fault():
            return f"a piece {fault}"
    if len({file for file, _ in whole.pieces}) != len(whole.pieces):
        return "has two pieces in one file"
    if len({(piece.axis, piece.parts, piece.shape) for _, piece in whole.pieces}) > 1:
        return "is cut in several ways"
    if not Piece.whole(whole.shape).numel:
        return None
    ends: dict[int, int] = {}
    for piece in sorted((piece for _, piece in whole.pieces), key=lambda piece: (piece.part, piece.start)):
        if piece.start != ends.get(piece.part, 0):
            return "pieces overlap or are missing"
        ends[piece.part] = piece.stop
    if not whole.pieces or len(ends) != piece.parts or set(ends.values()) != {piece.height}:
        return "pieces are missing"
    return None


def _cut(piece: Piece) -> dict[str, int | None]:
    return {"axis": piece.axis, "part": piece.part, "parts": piece.parts, "start": piece.start, "stop": piece.stop}
