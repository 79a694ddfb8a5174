"""Writes run directories as a trainer would leave them, for tests of what reads them."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

START = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)

RECIPE = """\
name = "{name}"
seed = {seed}

[model]
layers = {layers}
width = 256
heads = 4
kv_heads = 2
vocabulary = 4096
context = 256

[optimizer]
name = "muon"
learning_rate = {learning_rate}

[batch]
tokens = 8192

[duration]
tokens = {tokens}
"""


def stamp(seconds: float) -> str:
    return (START + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def write_run(
    path: Path,
    *,
    steps: int = 400,
    seed: int = 0,
    layers: int = 6,
    learning_rate: float = 0.02,
    restart: tuple[int, int] | None = (240, 260),
    state: str = "done",
    floor: float = 2.35,
    gpu: bool = False,
    sources: tuple[str, ...] = ("python",),
    sample: str = "def read(path):\n    with open(path) as file:\n        return file.read()\n",
) -> Path:
    """A run of `steps` steps; `restart=(a, b)` died after step b and went on from the checkpoint of step a."""
    noise = random.Random(seed)
    path.mkdir(parents=True)
    batch, flops_per_token, pace = 8192, 2.6e7 * layers / 6, 1.3
    (path / "recipe.toml").write_text(
        RECIPE.format(name=path.name, seed=seed, layers=layers, learning_rate=learning_rate, tokens=steps * batch)
    )

    def loss(step: int) -> float:
        return floor + 6 * (1 + step / 4) ** -0.5

    spans = [(1, 1, steps)] if restart is None else [(1, 1, restart[1]), (2, restart[0] + 1, steps)]
    metrics, validation, samples, events, clock = [], [], [], [], 0.0
    for incarnation, first, last in spans:
        clock += 0 if incarnation == 1 else 900
        events.append({"time": stamp(clock), "step": first - 1, "incarnation": incarnation, "kind": "start"})
        clock += 20
        for step in range(first, last + 1):
            clock += pace
            rising, falling = step / (0.02 * steps), (steps - step) / (0.4 * steps)
            gradient = 0.4 + 2 * (1 + step / 3) ** -0.7 + noise.random() * 0.1 + (4 if step % 173 == 0 else 0)
            metrics.append(
                {
                    "step": step, "incarnation": incarnation, "time": stamp(clock), "tokens": step * batch,
                    "flops": step * batch * flops_per_token, "loss": loss(step) + noise.gauss(0, 0.06),
                    "lr": learning_rate * min(1, rising, max(0, falling)), "grad_norm": gradient, "update_norm": 0.2,
                    "tokens_per_second": batch / pace * (1 + noise.gauss(0, 0.02)) * (0.4 if step == first else 1),
                    "mfu_low": 0.41 + noise.gauss(0, 0.005), "mfu_high": 0.47 + noise.gauss(0, 0.005),
                    "step_seconds": pace, "memory_bytes": 1_400_000_000,
                }
            )  # fmt: skip
            if step % max(1, steps // 10) == 0:
                row = {"step": step, "incarnation": incarnation, "time": stamp(clock), "tokens": step * batch}
                for index, source in enumerate(sources):
                    nats = loss(step) + 0.05 + 0.4 * index
                    validation.append(
                        row
                        | {"source": source, "loss": nats, "bits_per_byte": nats / math.log(2) / 2.9,
                           "tokens_evaluated": 65_536, "bytes_evaluated": 190_054}
                    )  # fmt: skip
                samples.append(row | {"prompt": "def read(", "text": sample})
                samples.append(row | {"prompt": "import ", "text": "os\n" * (1 + step * 4 // steps)})
                events.append(row | {"kind": "evaluation", "seconds": 3.0})
                events.append(row | {"kind": "checkpoint", "seconds": 8, "blocked_seconds": 0.2, "bytes": 60_000_000})
                clock += 4
        if incarnation == 1 and restart:
            events.append({"time": stamp(clock), "step": 100, "incarnation": 1, "kind": "skipped_step", "loss": None})
    if state in ("done", "failed", "interrupted"):
        events.append(
            {"time": stamp(clock), "step": steps, "incarnation": spans[-1][0], "kind": "stop", "state": state}
        )

    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "validation.jsonl", validation)
    write_lines(path / "samples.jsonl", samples)
    write_lines(path / "events.jsonl", events)
    write_json(
        path / "status.json",
        {"state": state, "step": steps, "total_steps": steps, "tokens": steps * batch, "total_tokens": steps * batch,
         "heartbeat": stamp(clock), "message": ""},
    )  # fmt: skip
    for incarnation, _, _ in spans:
        folder = path / "incarnations" / f"{incarnation:04d}"
        folder.mkdir(parents=True)
        device = {"gpus": ["NVIDIA H200"] * 2, "world_size": 2} if gpu else {"gpus": [], "world_size": 1}
        write_json(
            folder / "environment.json",
            {"python": "3.11.2", "torch": "2.13.0", "commit": "6d5daa8", "dirty": False, "cpu": "Xeon", "cores": 2}
            | device,
        )
        (folder / "command").write_text("shot train demo\n")
    if state == "done":
        final = {
            source: {"loss": loss(steps) + 0.05 + 0.4 * index, "bytes_per_token": 2.9,
                     "bits_per_byte": (loss(steps) + 0.05 + 0.4 * index) / math.log(2) / 2.9}
            for index, source in enumerate(sources)
        }  # fmt: skip
        write_json(
            path / "summary.json",
            {
                "parameters": {"total": 6_300_000, "non_embedding": 4_200_000, "active": 6_300_000},
                "tokens": steps * batch, "flops": steps * batch * flops_per_token, "seconds": steps * pace,
                "goodput": 0.87, "final": final, "peak_memory_bytes": 1_520_000_000,
                "energy_joules": 5.1e5 if gpu else None,
            },
        )  # fmt: skip
    return path


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
