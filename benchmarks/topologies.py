"""Training speed of topologies and experts against the dense decoder, alternating in one process.

    python benchmarks/topologies.py --out docs/topology-speed.md

Every contestant takes whole steps as `shot train` does (bfloat16 with float32 masters, compiled blocks, AdamW) on
random tokens, and works only when it is its turn. FLOPs are those of `recipe.cost`; FLOP/s are compared round by round
with the decoder's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `shot` sets it

import torch

from calledshot.model import BatchTensors, Decoder, EncoderInputs
from calledshot.recipe import Recipe, cost, schema, shape
from calledshot.training.optimizer import Optimizer
from calledshot.training.slots import make_slots

TOKENS = 2048
"""Tokens a step."""
DENSE = schema.Model(
    layers=6, width=384, heads=6, kv_heads=2, hidden=1024, vocabulary=8192, context=512, tied_embeddings=True
)


@dataclass(frozen=True)
class Contestant:
    name: str
    model: schema.Model
    against: str = "decoder"


CONTESTANTS = (
    Contestant("decoder", DENSE),
    Contestant("prefix", replace(DENSE, topology="prefix")),
    Contestant("encoder-decoder, 6 + 6 layers", replace(DENSE, topology="encoder-decoder", context=256)),
    Contestant("encoder-decoder, 3 + 3 layers", replace(DENSE, topology="encoder-decoder", context=256, layers=3)),
    Contestant("8 experts, top 2", replace(DENSE, experts=8, top_k=2)),
    Contestant("64 experts, top 2", replace(DENSE, experts=64, top_k=2)),
)


def stepper(model_keys: schema.Model, device: torch.device) -> tuple[Callable[[], float], Recipe]:
    recipe = Recipe(model=model_keys, optimizer=schema.Optimizer(name="adamw", learning_rate=1e-3))
    recipe = replace(recipe, duration=schema.Duration(tokens=TOKENS), batch=schema.Batch(tokens=TOKENS))
    with torch.device(device):
        model = Decoder(model_keys)
    model.initialise(torch.Generator(device).manual_seed(0))
    masters = {name: parameter.data for name, parameter in model.named_parameters()}
    model.bfloat16()
    model.blocked_attention = device.type == "cpu"
    model.compile_blocks()
    optimizer = Optimizer(make_slots(model, masters), recipe, compiled=True)
    found = shape(model_keys)
    rows = TOKENS // found.row_positions
    ids = torch.randint(0, found.vocabulary, (rows, found.context + 1), device=device)
    positions = torch.arange(found.context, dtype=torch.int32, device=device).expand(rows, -1)
    regions = (positions < found.context // 2).to(torch.int8) if model_keys.topology == "prefix" else None
    encoder = None
    if found.encoder_context:
        read = torch.randint(0, found.vocabulary, (rows, found.encoder_context), device=device)
        places = torch.arange(found.encoder_context, dtype=torch.int32, device=device).expand(rows, -1)
        encoder = EncoderInputs(read, places, torch.zeros_like(places))
    weights = torch.ones(rows, found.context, device=device)
    batch = BatchTensors(ids[:, :-1], ids[:, 1:], weights, positions, torch.zeros_like(positions), regions, encoder)
    scale = 1 / weights.sum()
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        loss, z_loss = model.loss(batch.inputs, batch.targets, batch.weights, scale, 1e-4, **batch.reading)
        total = loss + z_loss
        if model.records:
            total = total + model.auxiliary_loss()
        total.backward()
        for slot in optimizer.slots:
            slot.collect()
        optimizer.step(number, optimizer.gradient_norm(), 1.0)
        optimizer.clear()
        return float(loss.detach())

    return step, recipe


def measure(rounds: int, steps: int, device: torch.device) -> list[str]:
    made = {each.name: stepper(each.model, device) for each in CONTESTANTS}
    costs = {name: cost(recipe) for name, (_, recipe) in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for step, _ in made.values():
        for _ in range(4):
            step()
    for _ in range(rounds):
        for name, (step, _) in made.items():
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(times))
    lines = [
        "| | parameters | active | FLOPs a token | tokens/s | tokens/s / decoder's | FLOP/s / decoder's, by round |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    dense = costs["decoder"].flops_per_token.total
    for name, found in costs.items():
        flops = found.flops_per_token.total
        speeds = [theirs / ours for theirs, ours in zip(seconds["decoder"], seconds[name], strict=True)]
        ratios = [speed * flops / dense for speed in speeds]
        counts = found.parameters
        lines.append(
            f"| {name} | {counts.total / 1e6:.2f}M | {counts.active / 1e6:.2f}M | {flops / 1e6:.1f}M | "
            f"{TOKENS / statistics.median(seconds[name]):,.0f} | {statistics.median(speeds):.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    lines = [
        "# Training speed of topologies and experts", "",
        f"`python benchmarks/topologies.py --rounds {arguments.rounds}`: {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {arguments.device}; {TOKENS} tokens a step, encoder's and decoder's together.", "",
        *measure(arguments.rounds, arguments.steps, device), "",
    ]  # fmt: skip
    print("\n".join(lines))
    if arguments.out:
        arguments.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
