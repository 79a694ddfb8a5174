"""The training state on disk: masters, optimizer and counters, as safetensors and JSON, so that nothing is
unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calledshot import machine
from calledshot.recipe import RunError, UsageError
from calledshot.rundir import CheckpointFound, RunDirectory, atomic_write
from calledshot.rundir.checkpoints import Agree
from calledshot.training.pieces import Piece, moves
from calledshot.training.placement import PIECES, Whole, read_wholes
from calledshot.training.tensorfiles import (
    DTYPES,
    TORCH_DTYPES,
    WRITE_BYTES,
    TensorFile,
    bytes_of,
    lay_out,
    read_document,
)

MODEL, OPTIMIZER, COUNTERS = "model.safetensors", "optimizer.safetensors", "state.json"
_READERS = 8


@dataclass
class Counters:
    """Where a run is."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    """Steps whose update was applied, since the optimizer began."""
    tokens: int = 0
    """Positions seen."""
    flops: float = 0.0
    seconds: float = 0.0
    """Wall-clock of training, all incarnations together, counting only what the checkpoint holds."""
    energy_joules: float | None = None
    non_finite: int = 0
    """Steps in a row, up to this one, whose update was left out."""


def save(run: RunDirectory, counters: Counters, masters: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> int:
    """Write a checkpoint of the present step, complete or not there at all; returns its bytes."""
    with run.checkpoint_writer(counters.step, run.incarnation) as folder:
        with ThreadPoolExecutor(2) as pool:
            files = ((MODEL, masters), (OPTIMIZER, optimizer))
            writing = [pool.submit(_write_tensors, run, counters.step, name, tensors) for name, tensors in files]
        for one in writing:
            one.result()
        atomic_write(folder / COUNTERS, json.dumps(asdict(counters), indent=1))
        size = sum(file.stat().st_size for file in folder.iterdir())
    return size


def _write_tensors(run: RunDirectory, step: int, name: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, which its own library cannot hash while it writes it."""
    header, places = lay_out({key: (DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()})

    def parts() -> Iterator[bytes | memoryview]:
        yield header
        for key in places:
            content = bytes_of(tensors[key]).data
            for start in range(0, len(content), WRITE_BYTES):
                yield content[start : start + WRITE_BYTES]

    run.write_checkpoint_file(step, name, parts())


def find(
    run: RunDirectory, step: int | None = None, *, share: tuple[int, int] = (0, 1), agree: Agree | None = None
) -> CheckpointFound | None:
    """The checkpoint of `step`, or the newest that verifies; None when nothing was ever saved. RunError when damaged.

    Of several ranks, `share` (rank, ranks), each hashes some of the files; `agree` is a collective.
    """
    if step is None:
        found = run.latest_checkpoint(share=share, agree=agree)
    else:
        run.verify(step, share=share, agree=agree)
        found = CheckpointFound(step, run.checkpoint_path(step), ())
    if found is not None:
        listed = run.manifest(found.step)["files"]
        needed = [COUNTERS, *files(found.path, MODEL), *files(found.path, OPTIMIZER)]
        if missing := [name for name in needed if name not in listed]:
            raise RunError(f"{found.path}: its manifest does not know {missing[0]}; take another checkpoint")
    return found


def file_name(kind: str, number: int, writers: int) -> str:
    """Of the file that a rank writes: `kind`, MODEL or OPTIMIZER, where there is one rank."""
    stem, _, suffix = kind.partition(".")
    return kind if writers == 1 else f"{stem}-{number:05d}-of-{writers:05d}.{suffix}"


def files(folder: Path, kind: str) -> list[str]:
    """Names of a checkpoint's files of a kind."""
    writers, _ = _wholes(folder, kind) if (folder / PIECES).exists() else (1, {})
    return [file_name(kind, number, writers) for number in range(writers)]


def stored(folder: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes of a checkpoint's tensors of a kind, MODEL or OPTIMIZER. RunError when damaged."""
    return {name: whole.shape for name, whole in _wholes(folder, kind)[1].items()}


def dtypes(folder: Path, kind: str) -> dict[str, str]:
    """Names and types, as safetensors calls them, of the same."""
    return {name: whole.dtype for name, whole in _wholes(folder, kind)[1].items()}


def _wholes(folder: Path, kind: str) -> tuple[int, dict[str, Whole]]:
    """Number of writers, and the tensors, of any checkpoint."""
    if (folder / PIECES).exists():
        return read_wholes(folder, kind.partition(".")[0])
    with TensorFile(folder / kind) as file:
        return 1, {
            name: Whole(one.dtype, one.shape, ((0, Piece.whole(one.shape)),)) for name, one in file.tensors.items()
        }


def read_pieces(
    folder: Path,
    kind: str,
    wanted: Mapping[str, Piece],
    device: torch.device | str = "cpu",
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Pieces of a checkpoint's tensors, however many ranks wrote it and however they had cut them; hardly more than
    their own bytes are read. Each comes in its `local_shape` and the dtype it was saved in.

    `into` has tensors to be filled instead, of any shape with as many elements, dtype and device. UsageError when a
    name or a shape is another model's; RunError when a file is damaged or missing.
    """
    writers, wholes = _wholes(folder, kind)
    targets: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened: dict[int, TensorFile] = {}

        def source(number: int, name: str, piece: Piece) -> TensorFile:
            if number not in opened:
                opened[number] = stack.enter_context(TensorFile(folder / file_name(kind, number, writers)))
            found, dtype = opened[number].tensors.get(name), wholes[name].dtype
            if found is None or found.dtype != dtype or math.prod(found.shape) != piece.numel:
                raise RunError(f"{opened[number].path}: {name} is not what {PIECES} says; take another checkpoint")
            return opened[number]

        reading = []
        for name, piece in wanted.items():
            whole = wholes.get(name)
            if whole is None or whole.shape != piece.shape:
                raise another_model(folder, name, None if whole is None else whole.shape, piece.shape)
            taken = ((number, one, list(moves(one, piece))) for number, one in whole.pieces)
            reading.append((name, [(source(number, name, one), found) for number, one, found in taken if found]))

        def read(one: tuple[str, list[Any]]) -> None:
            name, sources = one
            piece, dtype = wanted[name], TORCH_DTYPES[wholes[name].dtype]
            given = None if into is None else into[name].detach()
            direct = given is not None and given.device.type == "cpu" and given.dtype == dtype and given.is_contiguous()
            tensor = given if given is not None and direct else torch.empty(piece.local_shape, dtype=dtype)
            content = tensor.view(-1).view(torch.uint8).numpy()
            for file, found in sources:
                file.read_moves(name, found, content)
            if given is not None and not direct:
                given.copy_(tensor.view(given.shape))
            targets[name] = tensor.to(device) if given is None else given

        largest_first = sorted(reading, key=lambda one: -wanted[one[0]].numel)
        with ThreadPoolExecutor(min(_READERS, machine.usable_cores())) as pool:
            for done in [pool.submit(read, one) for one in largest_first]:
                done.result()
    return {name: targets[name] for name in wanted}


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a checkpoint, `path` being its folder with MODEL or OPTIMIZER, whoever wrote it. RunError when it
    is damaged."""
    wanted = {name: Piece.whole(shape) for name, shape in stored(path.parent, path.name).items()}
    return read_pieces(path.parent, path.name, wanted, device)


def read_counters(folder: Path) -> Counters:
    """Counters of a checkpoint; fields of newer versions are passed over. RunError when they are no numbers."""
    path = folder / COUNTERS
    content = read_document(path)
    if not isinstance(content, dict):
        raise RunError(f"{path}: does not hold a run's counters; take another checkpoint")
    given = {key: content[key] for key in Counters.__dataclass_fields__ if key in content}
    defaults = asdict(Counters())
    for key, value in given.items():
        whole = type(defaults[key]) is int
        fine = type(value) is int or (type(value) is float and not whole) or (value is None and defaults[key] is None)
        if not fine or (value is not None and not 0 <= value < math.inf):
            raise RunError(f"{path}: {key} is {value!r:.40}, which is no count; take another checkpoint")
    return Counters(**given)


def another_model(path: Path, name: str, found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> UsageError:
    """The error for a checkpoint whose tensors are not the recipe's."""
    return UsageError(
        f"{path}: holds {'nothing' if found is None else found} for {name} where the recipe's model has {wanted}; "
        "fork with the model section of the run it comes from"
    )


def load_into(masters: Mapping[str, Tensor], folder: Path) -> None:
    """Fill whole masters in place with a checkpoint's MODEL. UsageError when names or shapes are another model's."""
    wanted = {name: Piece.whole(tuple(master.shape)) for name, master in masters.items()}
    if set(wanted) <= set(known := stored(folder, MODEL)) and (unknown := sorted(set(known) - set(wanted))):
        raise UsageError(
            f"{folder}: holds {unknown[0]} and {len(unknown) - 1} more that the recipe's model has no place for; "
            "fork with the model section of the run it comes from"
        )
    read_pieces(folder, MODEL, wanted, into=masters)
