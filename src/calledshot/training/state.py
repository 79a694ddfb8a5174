"""The training state on disk: masters, optimizer and counters, as safetensors and JSON, so that nothing is
unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calledshot.recipe import RunError, UsageError
from calledshot.rundir import CheckpointFound, RunDirectory, atomic_write

MODEL, OPTIMIZER, COUNTERS = "model.safetensors", "optimizer.safetensors", "state.json"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""As safetensors calls them."""


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
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for _, tensor in ordered:
            if tensor.numel():
                yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    run.write_checkpoint_file(step, name, parts())


def find(run: RunDirectory, step: int | None = None) -> CheckpointFound | None:
    """The checkpoint of `step`, or the newest that verifies; None when nothing was ever saved. RunError when
    damaged.
    """
    if step is None:
        return run.latest_checkpoint()
    run.verify(step)
    return CheckpointFound(step, run.checkpoint_path(step), ())


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file. RunError when it is damaged."""
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read as safetensors ({error}); take another checkpoint") from error


def read_counters(folder: Path) -> Counters:
    """Counters of a checkpoint; fields of newer versions are passed over."""
    content: dict[str, Any] = json.loads((folder / COUNTERS).read_bytes())
    return Counters(**{key: content[key] for key in Counters.__dataclass_fields__ if key in content})


def copy_into(masters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill the masters in place. UsageError when names or shapes are another model's."""
    for name, master in masters.items():
        if name not in tensors or tensors[name].shape != master.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise UsageError(
                f"{path}: holds {found} for {name} where the recipe's model has {tuple(master.shape)}; "
                "fork with the model section of the run it comes from"
            )
    if unknown := sorted(set(tensors) - set(masters)):
        raise UsageError(
            f"{path}: holds {unknown[0]} and {len(unknown) - 1} more that the recipe's model has no place for; "
            "fork with the model section of the run it comes from"
        )
    for name, master in masters.items():
        master.copy_(tensors[name])
