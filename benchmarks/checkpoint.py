"""Saving and loading a training state against `torch.save` and torch's distributed checkpoint, in turns, on one disk.

    python benchmarks/checkpoint.py --parameters 100M --out docs/checkpoint-speed.md

The state is a training one: float32 matrices under AdamW, with a step between the saves, since a save that goes on in
the background costs the steps beside it. Of each way of saving: how long it blocks, how much longer the steps beside it
take (their time, less as many of the median without a save), when the checkpoint is there, and what it costs in
core-seconds, alone, which other work on the machine changes least. Ours hashes every file and flushes it to the disk
before the checkpoint has a name, and loading checks every hash; the others do neither. Each writes a new checkpoint and
removes the one before: a trainer that overwrites its only one loses both when killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from calledshot import machine
from calledshot.recipe import schema
from calledshot.recipe.units import whole
from calledshot.rundir import RunDirectory
from calledshot.training import state
from calledshot.training.pieces import Piece
from calledshot.training.saving import Saver

SIDE = 2048
"""Rows and columns of a matrix."""
REST = 2
"""Steps between the end of one save and the beginning of the next."""


class Training:
    """Matrices one after the other, trained to turn noise into noise."""

    def __init__(self, count: int, tokens: int) -> None:
        self.matrices = [torch.nn.Parameter(torch.randn(SIDE, SIDE) / SIDE**0.5) for _ in range(count)]
        self.optimizer = torch.optim.AdamW(self.matrices, lr=1e-4, fused=True)
        self.input, self.target = torch.randn(tokens, SIDE), torch.randn(tokens, SIDE)
        self.step()

    def step(self) -> float:
        """One update; its seconds."""
        start = time.perf_counter()
        hidden = self.input
        for matrix in self.matrices:
            hidden = hidden + torch.relu(hidden @ matrix) / len(self.matrices)
        (hidden - self.target).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masters, and the optimizer's moments."""
        masters = {f"blocks.{number}.matrix": matrix.data for number, matrix in enumerate(self.matrices)}
        moments = {
            f"blocks.{number}.matrix.{key}": self.optimizer.state[matrix][key]
            for number, matrix in enumerate(self.matrices)
            for key in ("exp_avg", "exp_avg_sq")
        }
        return masters, moments


def pieces(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Piece]]:
    return {name: (tensor, Piece.whole(tuple(tensor.shape))) for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="100M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="in a step: what it takes beside the optimizer")
    parser.add_argument("--folder", default="", help="where to write; without it a temporary folder")
    parser.add_argument("--out", default="", help="write the Markdown there")
    arguments = parser.parse_args()
    torch.set_num_threads(machine.usable_cores())
    warnings.filterwarnings("ignore", module="torch.distributed")
    training = Training(max(1, whole(arguments.parameters) // SIDE**2), arguments.tokens)
    masters, moments = training.tensors()
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*masters.values(), *moments.values()))
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as name:
        folder = Path(name)
        run = RunDirectory.create(folder / "run", recipe_toml="", identity="benchmark")
        run.begin_incarnation({}, [])
        saver = Saver(run, 0, 1, schema.Checkpoint(keep=1))
        plain = folder / "plain-0.pt"
        number = 0

        def ours(wait: bool) -> Callable[[], object]:
            nonlocal number
            number += 1
            saver.save(state.Counters(step=number), pieces(masters), pieces(moments), wait=wait)
            return saver.wait

        def torch_save(flushed: bool) -> Callable[[], object]:
            nonlocal plain
            before, plain = plain, folder / f"plain-{time.monotonic_ns()}.pt"
            torch.save({"model": masters, "optimizer": moments}, plain)
            if flushed:
                with open(plain, "rb") as file:
                    os.fsync(file.fileno())
            before.unlink(missing_ok=True)
            return lambda: None

        def distributed() -> Callable[[], object]:
            old, path = list(folder.glob("dcp-*")), folder / f"dcp-{time.monotonic_ns()}"
            future: Any = dcp.async_save({"model": masters, "optimizer": moments}, checkpoint_id=path)

            def done() -> None:
                future.result()
                for one in old:
                    shutil.rmtree(one)

            return done

        ways = {
            "calledshot": lambda: ours(False),
            "calledshot, waiting": lambda: ours(True),
            "torch.save": lambda: torch_save(False),
            "torch.save and flush": lambda: torch_save(True),
            "torch.distributed.checkpoint.async_save": distributed,
        }
        into = [{name: torch.empty_like(tensor) for name, tensor in part.items()} for part in (masters, moments)]

        def load(verify: bool) -> None:
            found = state.find(run) if verify else run.latest_checkpoint(verify=False)
            assert found is not None
            for kind, tensors in ((state.MODEL, into[0]), (state.OPTIMIZER, into[1])):
                wanted = {name: Piece.whole(tuple(tensor.shape)) for name, tensor in tensors.items()}
                state.read_pieces(found.path, kind, wanted, into=tensors)

        def torch_load() -> None:
            content = torch.load(plain, weights_only=True)
            for tensors, read in zip(into, (content["model"], content["optimizer"]), strict=True):
                for name, tensor in tensors.items():
                    tensor.copy_(read[name])

        loads: dict[str, Callable[[], object]] = {
            "calledshot: verify, and load into the tensors of a trainer": lambda: load(True),
            "calledshot: load into them without verifying": lambda: load(False),
            "torch.load, and copy into them": torch_load,
            "torch.load": lambda: torch.load(plain, weights_only=True),
        }
        first: dict[str, float] = {}
        figures: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in loads}
        cores: dict[str, list[float]] = {way: [] for way in (*ways, *loads)}
        quiet: list[float] = []
        shuffle = random.Random(0).shuffle  # what frees memory makes what comes after it slower or quicker
        for turn in range(arguments.rounds + 1):
            order = list(ways.items())
            if turn:
                shuffle(order)
            for way, save in order:
                quiet += [training.step() for _ in range(REST)]
                start = time.perf_counter()
                done = save()
                blocked = time.perf_counter() - start
                beside = []
                if "async" in way or way == "calledshot":
                    while len(beside) < REST or (way == "calledshot" and saver.busy):
                        beside.append(training.step())
                done()
                published = time.perf_counter() - start
                first.setdefault(way, blocked)
                if turn:
                    extra = sum(beside) - len(beside) * statistics.median(quiet)
                    figures[way].append((blocked, extra, published))
            for way, save in order:
                start = time.process_time()
                save()()
                cores[way].append(time.process_time() - start)
            loading = list(loads.items())
            shuffle(loading)
            for way, task in loading:
                start, worked = time.perf_counter(), time.process_time()
                task()
                cores[way].append(time.process_time() - worked)
                if turn:
                    seconds[way].append(time.perf_counter() - start)
    step = statistics.median(quiet)
    torch_seconds = statistics.median(blocked for blocked, _, _ in figures["torch.save"])
    lines = [
        "# Checkpoint speed\n",
        f"`python benchmarks/checkpoint.py --parameters {arguments.parameters}`: masters and two moments, "
        f"{size / 2**30:.2f} GiB, a step of {step:.2f} s; {machine.describe()['cpu']['model']}, "
        f"{machine.usable_cores()} cores; median (and range) of {arguments.rounds} rounds, in turns.\n",
        "| save | blocks, s | of torch.save | the steps beside it take longer by, s | done after, s | core-seconds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for way, rows in figures.items():
        blocked, extra, published = ([row[column] for row in rows] for column in range(3))
        share = f"{statistics.median(blocked) / torch_seconds:.0%}"
        beside = f"{statistics.median(extra):.2f}" if any(extra) else ""
        core = statistics.median(cores[way])
        lines.append(f"| {way} | {span(blocked)} | {share} | {beside} | {span(published)} | {core:.2f} |")
    lines += [
        f"\nThe first save, which makes the memory to copy into, blocks {first['calledshot']:.2f} s.\n",
        "| load | seconds | GiB/s | core-seconds |",
        "|---|--:|--:|--:|",
    ]
    for way, taken in seconds.items():
        rate, core = size / 2**30 / statistics.median(taken), statistics.median(cores[way])
        lines.append(f"| {way} | {span(taken)} | {rate:.2f} | {core:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")


def span(values: list[float]) -> str:
    """Median, and from where to where."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    main()
