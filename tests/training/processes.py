"""`shot` in processes of their own, forked by a server that has imported torch: a start takes 0.1 s and not 3."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from calledshot.rundir import RunDirectory

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["calledshot.training", "calledshot.cli.train", "torch._dynamo"])  # the last for FSDP
PATIENCE_SECONDS = 120.0
NUMBERS = itertools.count()


class Ended(NamedTuple):
    """How a command ended: exit code (negative for the signal that killed it), and what it said on stderr."""

    code: int
    said: str

    @property
    def complaint(self) -> str:
        """The one line that an error is told in."""
        lines = [line for line in self.said.splitlines() if line.startswith("shot: ")]
        assert len(lines) == 1, self.said
        assert "Traceback" not in self.said
        return lines[0]


class Shot:
    """`shot ARGUMENTS` in folder `lab`, running."""

    def __init__(self, lab: Path, *arguments: str, before: Callable[[], None] | None = None) -> None:
        """`before`, a function of a module, is called in the process first: to break something in it."""
        self._output = lab / f"output-{time.monotonic_ns()}-{next(NUMBERS)}"
        self.process = CONTEXT.Process(target=_main, args=(lab, arguments, self._output, before), daemon=True)
        self.process.start()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    @property
    def alive(self) -> bool:
        """Whether it is still running."""
        return self.process.is_alive()

    @property
    def said(self) -> str:
        """What it has said on stderr so far."""
        return self._output.read_text() if self._output.exists() else ""

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Waits until `condition` holds; False when the process ended before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if not self.alive:
                return bool(condition())
            assert time.monotonic() < deadline, self._output.read_text()
        return True

    def end(self) -> Ended:
        """Waits for the end."""
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, self._output.read_text()
        said = self._output.read_text()
        self._output.unlink()
        return Ended(self.process.exitcode, said)


def shot(lab: Path, *arguments: str, before: Callable[[], None] | None = None) -> Ended:
    """Runs `shot ARGUMENTS` in folder `lab` to its end."""
    return Shot(lab, *arguments, before=before).end()


def gang(lab: Path, ranks: int, *arguments: str, before: Callable[[], None] | None = None) -> list[Ended]:
    """Runs `shot ARGUMENTS` as so many ranks of one job to their end; each one's."""
    return [rank.end() for rank in start_gang(lab, ranks, *arguments, before=before)]


def start_gang(lab: Path, ranks: int, *arguments: str, before: Callable[[], None] | None = None) -> list[Shot]:
    """The same, running. `before` is called in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Shot(lab, *arguments, before=functools.partial(_take_place, rank, ranks, port, before)) for rank in range(ranks)
    ]


def _take_place(rank: int, ranks: int, port: int, before: Callable[[], None] | None) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    if before:
        before()


def _main(lab: Path, arguments: tuple[str, ...], output: Path, before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(lab)
    from calledshot import machine
    from calledshot.cli import main

    # Most of the time of so short a run would go into probing how fast the machine is.
    measure = machine.matmul_peak
    machine.matmul_peak = lambda dtype, seconds, device: measure(dtype, 0.0, device)
    if before:
        before()
    sys.argv = ["shot", *arguments]
    sys.exit(main(arguments))


def stop_at(step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """For `before`: the process gets a signal when it has recorded a step."""
    from calledshot.training.trainer import Trainer

    record = Trainer._record

    def recorded(self: Trainer, row: dict[str, Any], steps: int) -> None:
        record(self, row, steps)
        if row["step"] == step:
            os.kill(os.getpid(), number)

    Trainer._record = recorded


def curve(run: RunDirectory) -> list[tuple[Any, ...]]:
    """What every step computed, to the last bit."""
    keys = ("step", "tokens", "flops", "loss", "z_loss", "lr", "grad_norm", "update_norm")
    return [tuple(row[key] for key in keys) for row in run.metrics()]


def held_out(run: RunDirectory) -> list[tuple[Any, ...]]:
    """What every measurement on held-out text gave, to the last bit."""
    return [(row["step"], row["source"], row["loss"]) for row in run.standing_rows("validation")]


def weights(run: RunDirectory, step: int) -> list[bytes]:
    """The files of a checkpoint that hold tensors."""
    folder = run.checkpoint_path(step)
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


TINY = """
[data]
sources = [{ path = "corpus" }]
held_out = 0.1

[model]
layers = 2
width = 32
heads = 2
kv_heads = 1
vocabulary = 768
context = 32
tied_embeddings = true

[optimizer]
learning_rate = 0.01
embedding_learning_rate = 0.01

[batch]
tokens = 128

[duration]
tokens = 2560

[parallel]
dtype = "float32"
compile = "off"
threads = 1

[evals]
tokens = 256
final_tokens = 256
"""
"""A recipe that trains twenty steps in a fifth of a second."""


def write_corpus(folder: Path, documents: int = 120, seed: int = 0) -> None:
    """Text files of made-up sentences, always the same: a vocabulary of 200 words, each with a few likely
    successors.
    """
    source = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 3))) for _ in range(200)]
    successors = {word: source.choices(words, k=4) for word in words}
    folder.mkdir(parents=True)
    for number in range(documents):
        word, text = source.choice(words), []
        for _ in range(source.randint(40, 160)):
            text.append(word)
            word = source.choice(successors[word])
        (folder / f"{number:03d}.txt").write_text(" ".join(text) + ".\n", encoding="utf-8")


def make_lab(folder: Path) -> Path:
    """A lab with the corpus and the recipe tiny.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder / "corpus")
    (folder / "tiny.toml").write_text(TINY, encoding="utf-8")
    return folder
