"""Tensors in safetensors files, one or many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calledshot.recipe import RunError, UsageError
from calledshot.rundir import atomic_write, read_json

SHARD_BYTES = 5_000_000_000
"""Weights past this are spread over several files, as the Hub asks."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int) -> None:
    """One file, or shards with their index."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if shard and held + size > shard_bytes:
            flush()
            held = 0
        # A copy, since safetensors refuses tensors that share memory; one shard at a time stands twice in memory.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        held += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    places = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    atomic_write(folder / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": places}))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, in their dtypes."""
    index = None if (folder / WEIGHTS).is_file() else read_json(folder / INDEX)
    if index is None and not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder}: has no {WEIGHTS}; weights in other formats are not read, since they can run code")
    files = [WEIGHTS] if index is None else _listed(folder, index)
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder / name}: is missing or damaged ({error}); fetch it again") from error
    return weights


def replace_model(folder: Path, draft: Path) -> None:
    """Move the draft's files over a folder's. Until config.json lands, last of all, nothing there loads as a model."""
    for old in [folder / "config.json", *folder.glob("model*.safetensors"), folder / INDEX]:
        with suppress(FileNotFoundError):
            old.unlink()
    for new in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(new, folder / new.name)


def _listed(folder: Path, index: Any) -> list[str]:
    """Names of the files that an index lists."""
    try:
        files = sorted({str(name) for name in index["weight_map"].values()})
    except (TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{folder / INDEX}: is damaged; fetch it again") from error
    if outside := [name for name in files if Path(name).name != name]:
        raise UsageError(f"{folder / INDEX}: names {outside[0]!r}, which is not a file of its folder")
    return files


def to_json(value: Any) -> str:
    """As the files of such a folder are written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
