"""Ranks side by side: the same recipe on one rank with all cores, and on several with a share each.

    python benchmarks/ranks.py --size 10M --out docs/ranks-speed.md
    python benchmarks/ranks.py --size tiny --layouts "replicate=2" "shard=2" "tensor=2"

Every contestant is a job of its own, compiled, that works only when it is its turn: A B C A B C ..., on the same random
tokens. Ratios are taken round by round against one rank with all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from calledshot import machine
from calledshot.recipe import Layout, Recipe, load_recipe

SIZES = {
    "10M": "layers=6 width=384 heads=6 kv_heads=2 hidden=1024 vocabulary=8192 context=512",
    "50M": "layers=7 width=768 heads=12 kv_heads=4 hidden=2048 vocabulary=8192 context=512",
    "tiny": "layers=2 width=64 heads=4 kv_heads=2 hidden=192 vocabulary=640 context=64",
}
STEPS = 4


def recipe_of(size: str, optimizer: str, rows: int) -> Recipe:
    """A decoder and a batch of so many rows."""
    keys = [f"model.{each}" for each in SIZES[size].split()]
    context = int(SIZES[size].rpartition("=")[2])
    batch = [f"batch.tokens={rows * context}", f"duration.tokens={1000 * rows * context}"]
    return load_recipe("demo", [*keys, *batch, "model.tied_embeddings=true", f"optimizer.name={optimizer}"])


def work(size: str, optimizer: str, rows: int, layout: Layout, threads: int) -> None:
    """One rank: a line of JSON from the first for each line read."""
    import torch

    from calledshot.training.engine import Engine
    from calledshot.training.probe import Machine
    from calledshot.training.world import World
    from gpu import random_batch

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    recipe, world = recipe_of(size, optimizer, rows), World.join()
    world.arrange(layout)
    micro = rows * recipe.model.context // layout.data
    engine = Engine(recipe, Machine("cpu", "bfloat16", True, threads, micro), world, None, Path())  # ty: ignore
    whole = random_batch(recipe)
    first, last = engine.rows
    arrays = {name: each[first:last] for name, each in vars(whole).items() if each is not None}
    batch, number, said = type(whole)(**arrays), 0, "begin"
    while said:
        times = []
        for _ in range(STEPS):
            number += 1
            start = time.perf_counter()
            loss = engine.update(batch, number, 0.1).loss
            engine.optimizer.clear()
            times.append(time.perf_counter() - start)
        if world.leads:
            print(json.dumps({"seconds": statistics.median(times), "loss": loss}), file=out, flush=True)
        said = world.tell(sys.stdin.readline() if world.leads else None)
    world.leave()


class Contestant:
    """A job, and the seconds of its steps."""

    def __init__(self, name: str, layout: Layout, threads: int, asked: argparse.Namespace) -> None:
        self.name, self.seconds = name, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = [asked.size, asked.optimizer, str(asked.rows), json.dumps(vars(layout)), str(threads)]
        self.ranks = []
        for rank in range(layout.world):
            place = {"RANK": rank, "WORLD_SIZE": layout.world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": layout.world}
            environment = {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
            if layout.world == 1:
                environment = {"OMP_NUM_THREADS": str(threads)}
            self.ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--work", *settings],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"GOMP_SPINCOUNT": "1000"} | environment,
                )
            )
        self.heard()

    def heard(self) -> dict[str, float]:
        """What the first rank says next."""
        assert self.ranks[0].stdout is not None
        return json.loads(self.ranks[0].stdout.readline())

    def turn(self) -> None:
        """Some steps."""
        assert self.ranks[0].stdin is not None
        self.ranks[0].stdin.write("more\n")
        self.ranks[0].stdin.flush()
        self.seconds.append(self.heard()["seconds"])

    def end(self) -> None:
        """Lets the job end."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10M", choices=SIZES)
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--rows", type=int, default=8, help="sequences in the global batch")
    parser.add_argument("--layouts", nargs="+", default=["replicate=2", "shard=2"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a Markdown file to append the table to")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        size, optimizer, rows, layout, threads = asked.work
        return work(size, optimizer, int(rows), Layout(**json.loads(layout)), int(threads))
    cores = machine.usable_cores()
    contestants = [Contestant(f"1 rank, {cores} threads", Layout(), cores, asked)]
    for text in asked.layouts:
        layout = Layout(**{key: int(value) for key, value in (each.split("=") for each in text.split(","))})
        threads = max(1, cores // layout.world)
        contestants.append(Contestant(f"{layout.world} ranks ({text}), {threads} threads", layout, threads, asked))
    for _ in range(asked.rounds):
        for contestant in contestants:
            contestant.turn()
    tokens = asked.rows * int(SIZES[asked.size].rpartition("=")[2])
    lines = [
        f"**{asked.size}**, {asked.optimizer}, {tokens:,} tokens an update, {asked.rounds} rounds of {STEPS} steps in "
        f"turn: {machine.fingerprint()}",
        "",
        "| | tokens/s (median) | against one rank, by round |",
        "|---|--:|--:|",
    ]
    for contestant in contestants:
        ratios = sorted(a / b for a, b in zip(contestants[0].seconds, contestant.seconds, strict=True))
        speed = tokens / statistics.median(contestant.seconds)
        lines.append(
            f"| {contestant.name} | {speed:,.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
        )
        contestant.end()
    print("\n".join(lines))
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")
    return None


if __name__ == "__main__":
    main()
