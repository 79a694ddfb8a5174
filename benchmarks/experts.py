"""Experts beside the dense feed-forward of equal active FLOPs: the products alone, the layer, and whole training steps.

    python benchmarks/experts.py --out docs/experts-speed.md
    python benchmarks/experts.py --parts steps --threads 1

Everything is measured in turns, A B C A B C ..., and a ratio is the median of the rounds' own ratios. Loads change from
round to round, as they do in training: what an implementation plans anew for each number of rows shows. bfloat16 with
float32 router and masters; forward and backward. `transformers` is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calledshot import machine
from calledshot.model import Decoder, experts, grouped
from calledshot.model.activation import activate
from calledshot.recipe import Recipe, schema, shape
from calledshot.training.optimizer import Optimizer
from calledshot.training.slots import make_slots

Work = Callable[[int], object]
"""Does its thing once; the number of the round chooses the load."""


@dataclass(frozen=True)
class Layer:
    """A feed-forward of width D and hidden F, and experts that cost each token as much."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def expert_hidden(self) -> int:
        return self.hidden // self.top_k

    def __str__(self) -> str:
        return f"D {self.width}, F {self.hidden}, {self.experts} experts, top {self.top_k} of F {self.expert_hidden}"


LAYERS = [
    Layer(2048, width, hidden, number, top_k)
    for width, hidden in ((384, 1024), (768, 2048))
    for number, top_k in ((8, 2), (64, 8), (256, 8))
]
LOADS = 256
SPREAD = 0.3
"""Standard deviation of the logarithm of an expert's load: the fullest of eight has about 1.5 times the mean."""


clock = time.perf_counter


def measure(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round, in turns; the first rounds, which plan and compile, do not count. After a minute five
    rounds will do.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    started = time.perf_counter()
    for number in range(-3, rounds):
        if number == 0:
            started = time.perf_counter()
        if number >= 5 and time.perf_counter() - started > 60:
            break
        for name, work in works.items():
            start = clock()
            work(number)
            if number >= 0:
                times[name].append(clock() - start)
    return times


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ratio(times: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of `name`'s time over `to`'s, round by round."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(times[name], times[to], strict=True)), n=4)
    return middle, low, high


def loads(layer: Layer) -> list[Tensor]:
    """Rows of each expert, for so many rounds."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(LOADS):
        shares_E = (SPREAD * torch.randn(layer.experts, generator=generator)).softmax(0)
        chosen = torch.multinomial(shares_E, layer.tokens * layer.top_k, True, generator=generator)
        drawn.append(chosen.bincount(minlength=layer.experts))
    return drawn


def products(layer: Layer) -> dict[str, Work]:
    """Forward, input gradient and weight gradient of the first matrix alone, on rows that are sorted already."""
    N, D, E, hidden = layer.tokens, layer.width, layer.experts, layer.expert_hidden
    A = N * layer.top_k
    tile = experts.tile_rows(A, E)
    ragged = loads(layer)
    tiled = [-(-counts_E // tile) * tile for counts_E in ragged]
    most = [-(-int(counts_E.max()) // tile) * tile for counts_E in ragged]
    make = lambda *size: torch.randn(size, dtype=torch.bfloat16)  # noqa: E731
    x_RD, h_RF, weight_EFD = make(A + E * tile, D), make(A + E * tile, 2 * hidden), make(E, 2 * hidden, D)
    x_ECD, h_ECF = make(E, max(most), D), make(E, max(most), 2 * hidden)
    x_ND, h_NF, weight_FD = make(N, D), make(N, 2 * layer.hidden), make(2 * layer.hidden, D)

    def dense(_: int) -> object:
        return x_ND @ weight_FD.T, h_NF @ weight_FD, h_NF.T @ x_ND

    def padded_bmm(number: int) -> object:
        rows = most[number % LOADS]
        x, h = x_ECD[:, :rows], h_ECF[:, :rows]
        return torch.bmm(x, weight_EFD.mT), torch.bmm(h, weight_EFD), torch.bmm(h.mT, x)

    def group_by_group(counts: list[Tensor], place: int) -> Work:
        """With `grouped_mm`, or without it the loop over contiguous slices with `out=`; `place` keeps one way from
        meeting the loads that another has just planned.
        """
        ends = [counts_E.cumsum(0).int() for counts_E in counts]

        def work(number: int) -> object:
            ends_E = ends[(number * 6 + place) % LOADS]
            y_RF = grouped.grouped_linear(x_RD, weight_EFD, ends_E)
            return y_RF, grouped.grouped_linear(h_RF, weight_EFD.mT, ends_E), grouped.grouped_outer(h_RF, x_RD, ends_E)

        return work

    return {
        "dense": dense,
        f"grouped_mm, multiples of {tile} rows (taken)": group_by_group(tiled, 0),
        "grouped_mm": group_by_group(ragged, 1),
        f"loop over slices, multiples of {tile} rows": without_kernel(group_by_group(tiled, 2)),
        "loop over slices": without_kernel(group_by_group(ragged, 3)),
        "bmm, padded to the fullest": padded_bmm,
    }


def without_kernel(work: Work) -> Work:
    def slow(number: int) -> object:
        with patch.object(grouped, "_has_kernel", lambda *_: False):
            return work(number)

    return slow


class Dense(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2 * layer.hidden, layer.width) * layer.width**-0.5)
        self.down = nn.Parameter(torch.randn(layer.width, layer.hidden) * layer.hidden**-0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(activate(F.linear(x_ND, self.gate_up), "swiglu"), self.down)


def sparse(layer: Layer) -> experts.Experts:
    model = schema.Model(
        width=layer.width, hidden=layer.hidden, experts=layer.experts, top_k=layer.top_k, heads=1, kv_heads=1
    )
    module = experts.Experts(shape(model), layer.width)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return module.bfloat16()


def peer(layer: Layer, implementation: str) -> nn.Module:
    """Mixtral's layer from `transformers`, whose own implementations are `eager` (a loop) and `grouped_mm`."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.width, intermediate_size=layer.expert_hidden, num_local_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )  # fmt: skip
    config._experts_implementation = implementation
    module = MixtralSparseMoeBlock(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5)
    return module.bfloat16()


def layers(layer: Layer) -> dict[str, Work]:
    """Forward and backward of whole layers, routing and all."""
    generator = torch.Generator().manual_seed(0)
    # What a round's tokens have in common shifts the router's logits by about SPREAD.
    common_LD = SPREAD * torch.randn(LOADS, layer.width, generator=generator)
    fresh = [torch.randn(layer.tokens, layer.width, generator=generator) for _ in range(8)]
    g_ND = torch.randn(layer.tokens, layer.width, generator=generator).bfloat16()

    def work(module: nn.Module, run: Callable[[Tensor], Any]) -> Work:
        def once(number: int) -> None:
            x_ND = (fresh[number % len(fresh)] + common_LD[number % LOADS]).bfloat16()
            x_ND.requires_grad_()
            outputs = run(x_ND[None])
            if isinstance(outputs, tuple):
                torch.autograd.backward((outputs[0], outputs[1].loss), (g_ND[None], None))
            else:
                outputs.backward(g_ND[None])
            module.zero_grad()

        return once

    def compiled(module: nn.Module) -> Work:
        return work(module, torch.compile(module, dynamic=False))

    def ragged(module: nn.Module) -> Work:
        inner = compiled(module)

        def once(number: int) -> None:
            with patch.object(experts, "tile_rows", lambda *_: 1):
                inner(number)

        return once

    eager = sparse(layer)
    works = {
        "dense, compiled": compiled(Dense(layer).bfloat16()),
        "experts, compiled": compiled(sparse(layer)),
        "experts, compiled, rows not padded": ragged(sparse(layer)),
        "experts, eager": work(eager, eager),
    }
    if importlib.util.find_spec("transformers"):
        for implementation in ("grouped_mm", "eager"):
            module = peer(layer, implementation)
            works[f"Mixtral of transformers, {implementation}"] = work(module, module)
    return works


@dataclass(frozen=True)
class Training:
    """A whole step: forward, backward, optimizer."""

    label: str
    model: schema.Model
    tokens: int
    """An update; passes are of at most 4,096, as `shot train` has them on a CPU."""
    optimizer: str


MODELS = {
    "10M": schema.Model(layers=6, width=384, heads=6, kv_heads=2, hidden=1024, vocabulary=8192, context=512),
    "50M": schema.Model(layers=7, width=768, heads=12, kv_heads=4, hidden=2048, vocabulary=8192, context=512),
}
TRAININGS = [
    Training(label, MODELS[label], tokens, optimizer)
    for label, tokens in (("10M", 2048), ("10M", 8192), ("10M", 32_768), ("50M", 8192))
    for optimizer in ("adamw", "muon")
]


def step(training: Training) -> tuple[Work, int]:
    """An update as `shot train` makes it, on tokens drawn anew each time, and the number of parameters."""
    recipe = Recipe(model=training.model, optimizer=schema.Optimizer(name=training.optimizer, learning_rate=1e-3))
    model = Decoder(recipe.model)
    model.initialise(torch.Generator().manual_seed(0))
    masters = {name: parameter.data for name, parameter in model.named_parameters()}
    model.bfloat16()
    model.compile_blocks()
    optimizer = Optimizer(make_slots(model, masters), recipe, compiled=True)
    rows, context = training.tokens // training.model.context, training.model.context
    micro = min(rows, 4096 // context)
    positions_BT = torch.arange(context, dtype=torch.int32).expand(micro, context)
    documents_BT, weights_BT = torch.zeros_like(positions_BT), torch.ones(micro, context)
    scale = torch.tensor(1.0 / training.tokens)

    def update(number: int) -> None:
        generator = torch.Generator().manual_seed(number + 10)
        ids = torch.randint(0, recipe.model.vocabulary, (rows, context + 1), generator=generator)
        for start in range(0, rows, micro):
            part = ids[start : start + micro]
            loss, z_loss = model.loss(
                part[:, :-1].contiguous(), part[:, 1:].contiguous(), weights_BT, scale, 1e-4,
                positions_BT=positions_BT, documents_BT=documents_BT,
            )  # fmt: skip
            total = loss + z_loss
            if model.records:
                total = total + model.auxiliary_loss() * (micro / rows)
            total.backward()
            for slot in optimizer.slots:
                slot.collect()
        optimizer.step(number + 10, optimizer.gradient_norm(), 1.0)
        optimizer.clear()

    return update, sum(parameter.numel() for parameter in model.parameters())


def products_part(rounds: int) -> Iterator[str]:
    yield (
        "## The products alone\n\nForward, input gradient and weight gradient of gate and up, on sorted rows. The "
        "taken way is `calledshot.model.grouped`; `grouped_mm` and the loop without padding are the same code on loads "
        "as they fall."
    )
    found: dict[str, list[str]] = {}
    for layer in LAYERS:
        times = measure(products(layer), rounds)
        for name in times:
            middle = statistics.median(times[name])
            key = _without_number(name)
            found.setdefault(key, []).append(f"{middle * 1e3:.1f} ({ratio(times, name, 'dense')[0]:.2f})")
            print(layer, name, found[key][-1], file=sys.stderr, flush=True)
    heads = ["ms (times dense)", *(f"{_short(layer)}" for layer in LAYERS)]
    yield table(heads, [[name, *row] for name, row in found.items()])


def _without_number(name: str) -> str:
    """Tiles differ between layers."""
    return " ".join(word for word in name.split() if not word.isdigit())


def _short(layer: Layer) -> str:
    return f"D {layer.width}: top {layer.top_k} of {layer.experts}"


def layers_part(rounds: int) -> Iterator[str]:
    yield "## The layer\n\nRouter, sorting, products, activation, combination and losses, forward and backward."
    found: dict[str, list[str]] = {}
    for layer in LAYERS:
        torch.compiler.reset()
        times = measure(layers(layer), rounds)
        for name in times:
            middle, low, high = ratio(times, "dense, compiled", name)
            text = f"{statistics.median(times[name]) * 1e3:.1f} ms, {middle:.2f} ({low:.2f}-{high:.2f})"
            found.setdefault(name, []).append(text)
            print(layer, name, text, file=sys.stderr, flush=True)
    heads = ["ms, speed against dense (quartiles)", *(f"{_short(layer)}" for layer in LAYERS)]
    yield table(heads, [[name, *row] for name, row in found.items()])


def steps_part(rounds: int) -> Iterator[str]:
    yield (
        "## Whole training steps\n\n8 experts, top 2, expert hidden = hidden / 2: equal active FLOPs but the router's. "
        "Compiled blocks, loss, optimizer and all. The optimizer sees each expert whatever the batch: four times the "
        "dense feed-forward's parameters."
    )
    rows = []
    for training in TRAININGS:
        torch.compiler.reset()
        dense, small = step(training)
        moe, large = step(replace(training, model=replace(training.model, experts=8, top_k=2)))
        times = measure({"dense": dense, "experts": moe}, rounds)
        middle, low, high = ratio(times, "dense", "experts")
        speeds = [f"{training.tokens / statistics.median(times[name]):,.0f}" for name in ("dense", "experts")]
        parameters = f"{small / 1e6:.1f}M, {large / 1e6:.1f}M"
        name = f"{training.label}, {training.optimizer}, {training.tokens:,} tokens an update"
        rows.append([name, parameters, *speeds, f"{middle:.2f} ({low:.2f}-{high:.2f})"])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
    heads = ["", "parameters: dense, experts", "dense tok/s", "experts tok/s", "experts / dense (quartiles)"]
    yield table(heads, rows)


PARTS = {"products": (products_part, 25), "layers": (layers_part, 25), "steps": (steps_part, 9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=0, help="of each part; 0 takes its own number")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", default="", help="write the Markdown there")
    parser.add_argument("--cpu-time", action="store_true", help="not wall-clock: one thread on a machine that is busy")
    arguments = parser.parse_args()
    if arguments.cpu_time:
        global clock
        clock, arguments.threads = time.process_time, 1
    torch.set_num_threads(arguments.threads)
    here = machine.describe()
    timing = "CPU time of one thread" if arguments.cpu_time else f"{arguments.threads} threads"
    text = [
        "# Speed of experts",
        f"`python benchmarks/experts.py --parts {' '.join(arguments.parts)}`: {here['cpu']['model']}, {timing}, "
        f"torch {torch.__version__}, allocator {here['allocator']}; bfloat16.",
    ]
    for name in arguments.parts:
        part, rounds = PARTS[name]
        for paragraph in part(arguments.rounds or rounds):
            print(paragraph, flush=True)
            text.append(paragraph)
    if arguments.out:
        Path(arguments.out).write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
