"""Saving and loading a training state against `torch.save`, in turns, on the same disk.

    python benchmarks/checkpoint.py --parameters 100M --out docs/checkpoint-speed.md

Ours is what `shot train` writes: safetensors, a sha256 of every file in a manifest, everything flushed to the disk
before the checkpoint has a name; loading checks every hash. `torch.save` is measured as people call it (no flush, no
hash) and with a flush; it writes a new file, too, and removes the one before, since a trainer that overwrites its only
checkpoint loses both when it is killed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from calledshot import machine
from calledshot.recipe.units import whole
from calledshot.rundir import RunDirectory
from calledshot.training import state


def flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="100M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="", help="where to write; without it a temporary folder")
    parser.add_argument("--out", default="", help="write the Markdown table there")
    arguments = parser.parse_args()
    count = whole(arguments.parameters)
    matrices = max(1, count // 2**22)
    masters = {f"blocks.{n}.matrix": torch.randn(2048, 2048) for n in range(matrices)}
    moments = {f"{name}.{key}": torch.randn(2048, 2048) for name in masters for key in ("first", "second")}
    size = sum(t.numel() * t.element_size() for t in (*masters.values(), *moments.values()))
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        run = RunDirectory.create(Path(folder) / "run", recipe_toml="", identity="benchmark")
        plain = Path(folder) / "plain-0.pt"
        step = 0

        def ours_save() -> None:
            nonlocal step
            step += 1
            state.save(run, state.Counters(step=step), masters, moments)
            run.prune(1)

        def ours_load() -> None:
            found = state.find(run)
            assert found is not None
            state.read_tensors(found.path / state.MODEL)
            state.read_tensors(found.path / state.OPTIMIZER)

        def torch_save(flushed: bool) -> None:
            nonlocal plain
            before, plain = plain, plain.with_name(f"plain-{time.monotonic_ns()}.pt")
            torch.save({"model": masters, "optimizer": moments}, plain)
            if flushed:
                flush(plain)
            before.unlink(missing_ok=True)

        work: dict[str, Callable[[], object]] = {
            "calledshot: save": ours_save,
            "torch.save and flush": lambda: torch_save(True),
            "torch.save": lambda: torch_save(False),
            "calledshot: verify and load": ours_load,
            "torch.load": lambda: torch.load(plain, weights_only=True),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        shuffle = random.Random(0).shuffle  # what frees memory makes what comes after it slower or quicker
        for number in range(arguments.rounds + 1):
            order = list(work.items())
            if number:  # before the first save there is nothing to load
                shuffle(order)
            for name, task in order:
                start = time.perf_counter()
                task()
                if number:
                    times[name].append(time.perf_counter() - start)
    lines = [
        "# Checkpoint speed\n",
        f"`python benchmarks/checkpoint.py --parameters {arguments.parameters}`: masters and two moments, "
        f"{size / 2**30:.2f} GiB; {machine.describe()['cpu']['model']}, {machine.usable_cores()} cores; "
        f"median of {arguments.rounds} rounds.\n",
        "| | seconds | GiB/s |",
        "|---|--:|--:|",
    ]
    for name, taken in times.items():
        median = statistics.median(taken)
        lines.append(f"| {name} | {median:.2f} ({min(taken):.2f}-{max(taken):.2f}) | {size / 2**30 / median:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
